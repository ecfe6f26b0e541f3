"""YOLO: `images/*` and `labels/*.txt` with lines `class cx cy w h`, in fractions of the image's width and height.

The two folders lie in the root or in each of `{train,val,test}/`, or each of them has folders of these names. An image
without a text file, or with an empty one, is a negative.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from client.readers.base import Reader, Store, Tolerance, Wanted, reader, spelling
from client.readers.boxes import Annotation, Box, decode
from client.readers.folders import image_files, listed, part_folders, read_text, shown
from client.readers.samples import Sample, census, fill, in_order, numbered
from shared_models.errors import DataError

YAML, LISTS = "data.yaml", ("classes.txt", "obj.names")


@dataclass(frozen=True)
class Pair:
    """An image and its text file, None for a negative."""

    image: Path
    text: Path | None


@reader("yolo")
class Yolo(Reader):
    """A class number is a line of `data.yaml`, `classes.txt` or `obj.names` in the root, whichever there is.

    Without them it is the number's own label or alias, or else an index into the label list.
    """

    targets = ("boxes", "box")

    def read(self, root: Path, wanted: Wanted) -> Store:
        """Samples in the order of part and file name."""
        names = class_names(root)
        bad = Tolerance(wanted.skip_bad)
        samples = []
        for part, images, labels in _folders(root):
            for pair in _pairs(images, labels, bad):
                samples.append(Sample(pair.image.relative_to(root).as_posix(), pair, part))

        def one(sample: Sample[Pair]) -> tuple[Tensor, Tensor]:
            pair = sample.about
            boxes = [] if pair.text is None else _boxes(pair.text, names, wanted)
            return decode(pair.image, Annotation(boxes, fractions=True), wanted, shown(pair.text or pair.image))

        return fill(in_order(samples), one, wanted, bad)

    def check(self, root: Path) -> dict[str, Any]:
        """Opens every image; counts boxes."""
        return census(self, root, "boxes")


def class_names(root: Path) -> dict[int, str]:
    """Class number -> name, {} where no file says; raises a DataError where one does in another way than we read."""
    for name in LISTS:
        if (root / name).is_file():
            lines = [line.strip() for line in read_text(root / name).splitlines()]
            return {number: line for number, line in enumerate(lines) if line}
    return yaml_names(root / YAML) if (root / YAML).is_file() else {}


def yaml_names(path: Path) -> dict[int, str]:
    """`names` of a YAML file, in the three forms it has there: `[a, b]`, or indented lines `- a`, or `0: a`."""
    lines = [re.sub(r"(^|\s)#.*", "", line).rstrip() for line in read_text(path).splitlines()]
    start = next((i for i, line in enumerate(lines) if re.match(r"names\s*:", line)), None)
    if start is None:
        return {}
    value = lines[start].partition(":")[2].strip()
    block = []
    for line in lines[start + 1 :]:
        if line and not re.match(r"[\s\]-]", line):
            break
        block.append(line.strip())
    whole = " ".join([value, *block]).strip()
    if value.startswith("["):
        if inner := re.fullmatch(r"\[(.*?),?\s*\]", whole):
            return {i: _unquoted(item) for i, item in enumerate(inner[1].split(","))}
    elif not value:
        items = [re.fullmatch(r"(?:-|(\d+)\s*:)\s+(.+)", line) for line in block if line]
        if items and all(items):
            return {int(m[1]) if m[1] else i: _unquoted(m[2]) for i, m in enumerate(items) if m}
    raise DataError(f"{shown(path)} has 'names' in a form that is not read", hint="Write them as names: [a, b, c]")


def _unquoted(item: str) -> str:
    item = item.strip()
    return item[1:-1] if len(item) > 1 and item[0] == item[-1] and item[0] in "\"'" else item


def _folders(root: Path) -> list[tuple[str, Path, Path]]:
    """(part, images, labels)."""
    images, labels = root / "images", root / "labels"
    if parts := part_folders(root):
        found = [(part, base / "images", base / "labels") for part, base in parts.items()]
    elif images.is_dir() and (parts := part_folders(images)):
        found = [(part, base, labels / base.name) for part, base in parts.items()]
    else:
        found = [("", images, labels)]
    for _, *pair in found:
        for folder in pair:
            if not folder.is_dir():
                raise DataError(f"there is no folder {shown(folder)}", hint="Expected images/ and labels/")
    return found


def _pairs(images: Path, labels: Path, bad: Tolerance) -> list[Pair]:
    texts = {spelling(p.stem): p for p in listed(labels) if p.suffix.lower() == ".txt" and p.name not in LISTS}
    files = image_files(images)
    stems = {spelling(path.stem) for path in files}
    if not files:
        raise DataError(f"no image in {shown(images)}")

    def lonely(text: Path) -> None:
        raise DataError(f"{shown(text)} has no image in {shown(images)}", hint="Add it, or remove the text")

    bad.each([text for stem, text in texts.items() if stem not in stems], lonely)
    return [Pair(path, texts.get(spelling(path.stem))) for path in files]


def _boxes(path: Path, names: dict[int, str], wanted: Wanted) -> list[Box]:
    boxes = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        where = f"line {number} of {shown(path)}"
        words = line.split()
        if not words:
            continue
        if len(words) != 5:
            raise DataError(f"{where} has {len(words)} values, not class, cx, cy, width and height")
        try:
            index, (x, y, width, height) = int(words[0]), map(float, words[1:])
        except ValueError:
            raise DataError(f"{where} is not a class number and four fractions: {line.strip()!r}") from None
        if not names:
            label = numbered(index, wanted, where)
        elif index in names:
            label = wanted.index(names[index], where)
        else:
            raise DataError(f"{where} is of class {index}, and there are {len(names)} class names")
        boxes.append(Box(label, (x - width / 2, y - height / 2, x + width / 2, y + height / 2), where))
    return boxes
