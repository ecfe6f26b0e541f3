"""Pascal VOC: `<root>/Annotations/*.xml` and `<root>/JPEGImages/*`; the root may be the folder around such a one.

The owner's parts are those of `ImageSets/Main/{train,val,test}.txt` where all three are there; what stands in none of
them is left out. Images without an annotation file are left out too, an annotation of no object is a negative.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any
from xml.parsers import expat

from torch import Tensor

from client.readers.base import Reader, Store, Wanted, reader, spelling
from client.readers.boxes import Annotation, Box, decode
from client.readers.folders import PART_WORDS, image_files, listed, named, read_bytes, read_text, shown, steps_of
from client.readers.samples import Sample, census, fill, in_order
from shared_models.errors import DataError

SIDES = ("xmin", "ymin", "xmax", "ymax")


@reader("voc")
class Voc(Reader):
    """Pixels are counted from 1, and a box includes its last: xmin = xmax is one pixel wide."""

    targets = ("boxes", "box")

    def read(self, root: Path, wanted: Wanted) -> Store:
        """Samples in the order of part and annotation."""
        home = _home(root)
        images = {spelling(path.stem): path for path in image_files(home / "JPEGImages")}
        files = [path for path in listed(home / "Annotations") if path.suffix.lower() == ".xml"]
        if not files:
            raise DataError(f"no annotation in {shown(home / 'Annotations')}", hint="Expected *.xml")
        samples = [Sample(path.stem, path) for path in files]
        if parts := _parts(home / "ImageSets" / "Main"):
            there = {spelling(path.stem): path for path in files}
            folder = home / "Annotations"
            samples = [Sample(stem, there.get(stem, folder / f"{stem}.xml"), part) for stem, part in parts.items()]

        def one(sample: Sample[Path]) -> tuple[Tensor, Tensor]:
            path = sample.about
            tree = parse(path)
            return decode(_image(tree, path, images), _annotation(tree, path, wanted), wanted, shown(path))

        return fill(in_order(samples), one, wanted)

    def check(self, root: Path) -> dict[str, Any]:
        """Opens every annotation and its image; counts boxes."""
        return census(self, root, "boxes")


def parse(path: Path) -> ElementTree.Element:
    """The root of an XML file; a document type, by which entities can grow without end, is refused unread."""

    def refuse(*_: object) -> None:
        raise DataError(f"{shown(path)} declares a document type, which annotations do not have", hint="Remove it")

    data = read_bytes(path)
    guard = expat.ParserCreate()
    guard.StartDoctypeDeclHandler = refuse
    try:
        guard.Parse(data, True)
        return ElementTree.fromstring(data)
    except (expat.ExpatError, ElementTree.ParseError, ValueError, LookupError) as error:
        raise DataError(f"{shown(path)} is no XML: {error}", hint="Mend or remove the file") from None


def _home(root: Path) -> Path:
    """The folder that has both folders: the root, or the only one below it."""
    homes = [p for p in (root, *listed(root)) if (p / "Annotations").is_dir() and (p / "JPEGImages").is_dir()]
    if homes[:1] == [root] or len(homes) == 1:
        return homes[0]
    found = f"{len(homes)} folders" if homes else "no folder"
    raise DataError(f"{shown(root)} has {found} with Annotations/ and JPEGImages/", hint="Name the one to read")


def _parts(main: Path) -> dict[str, str]:
    """Annotation -> part; {} unless all three lists are there."""
    lists = {part: main / f"{part}.txt" for part in ("train", "val", "test")}
    if not all(path.is_file() for path in lists.values()):
        return {}
    found: dict[str, str] = {}
    for part, path in lists.items():
        for line in read_text(path).splitlines():
            if words := line.split():
                name = spelling(words[0])
                if found.setdefault(name, PART_WORDS[part]) != PART_WORDS[part]:
                    raise DataError(f"{words[0]!r} stands in two lists of {shown(main)}", hint="Give it one part")
    return found


def _image(tree: ElementTree.Element, path: Path, images: dict[str, Path]) -> Path:
    """The image of the annotation's own name, as VOC's own tools have it; else the one that the annotation names."""
    name = (tree.findtext("filename") or "").strip()
    if name:
        steps_of(name, shown(path))
    return images.get(spelling(path.stem)) or named([path.parents[1] / "JPEGImages"], name, shown(path))


def _annotation(tree: ElementTree.Element, path: Path, wanted: Wanted) -> Annotation:
    width, height = (_number(tree, f"size/{side}", shown(path), 0.0) for side in ("width", "height"))
    boxes = []
    for number, thing in enumerate(tree.findall("object"), start=1):
        where = f"object {number} of {shown(path)}"
        x0, y0, x1, y1 = (_number(thing, f"bndbox/{side}", where) for side in SIDES)
        label = wanted.index((thing.findtext("name") or "").strip(), where)
        boxes.append(Box(label, (x0 - 1, y0 - 1, x1, y1), where))
    return Annotation(boxes, (width, height) if width and height else None)


def _number(element: ElementTree.Element, tag: str, where: str, default: float | None = None) -> float:
    text = element.findtext(tag)
    if text is None and default is not None:
        return default
    try:
        return float(text or "")
    except ValueError:
        raise DataError(f"{where} has no number in {tag}: {text!r}") from None
