"""COCO: `<root>/annotations.json`, or `<root>/annotations/*.json` with the part's word in each name, and the images.

Of several files only those are read whose name starts with `instances`, where there are such. Images lie in the root,
in its folder `images`, or, in either of them, in a folder that is called like the part or like the rest of the file's
name (`instances_train2017.json`: `train2017`). Boxes around crowds are left out; an image without boxes is a negative.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from client.readers.base import Reader, Store, Tolerance, Wanted, reader
from client.readers.boxes import Annotation, Box, decode
from client.readers.folders import PART_WORDS, all_or_none, listed, named, read_text, shown
from client.readers.samples import Sample, census, fill, in_order
from shared_models.errors import DataError

log = logging.getLogger("fedzoo.client")

T = TypeVar("T")


@dataclass(frozen=True)
class Entry:
    """One image of an annotation file.

    Attributes:
        path: the image.
        size: width and height as stated, None where they are not.
        objects: its annotations as they stand in the file.
        names: category id -> name, of the whole file.
        where: for messages.
    """

    path: Path
    size: tuple[float, float] | None
    objects: Sequence[Any]
    names: Mapping[Any, str]
    where: str


@reader("coco")
class Coco(Reader):
    """A class is a category's name; x, y, width and height of a box are pixels counted from 0."""

    targets = ("boxes", "box")

    def read(self, root: Path, wanted: Wanted) -> Store:
        """Samples in the order of part and file name."""
        bad = Tolerance(wanted.skip_bad)
        entries = [(part, entry) for part, file in _files(root) for entry in _entries(root, file, part, bad)]
        samples: dict[Path, Sample[Entry]] = {}

        def add(found: tuple[str, Entry]) -> None:
            part, entry = found
            if entry.path in samples:
                raise DataError(f"{entry.where} is listed twice: {shown(entry.path)}", hint="List each image once")
            samples[entry.path] = Sample(entry.path.relative_to(root).as_posix(), entry, part)

        def one(sample: Sample[Entry]) -> tuple[Tensor, Tensor]:
            entry = sample.about
            return decode(entry.path, _annotation(entry, wanted), wanted, entry.where)

        bad.each(entries, add)
        return fill(in_order(samples.values()), one, wanted, bad)

    def check(self, root: Path) -> dict[str, Any]:
        """Opens every image; counts boxes."""
        return census(self, root, "boxes")


def _files(root: Path) -> list[tuple[str, Path]]:
    """The annotation files with the owner's part of each."""
    if (root / "annotations.json").is_file():
        return [("", root / "annotations.json")]
    folder = root / "annotations"
    files = [path for path in listed(folder) if path.suffix.lower() == ".json"] if folder.is_dir() else []
    files = [path for path in files if path.name.startswith("instances")] or files
    if not files:
        raise DataError(f"{shown(root)} has neither annotations.json nor annotations/*.json")
    if len(files) == 1:
        return [("", files[0])]
    parts = [{PART_WORDS[w] for w in re.findall("[a-z]+", path.stem.lower()) if w in PART_WORDS} for path in files]
    all_or_none({part for found in parts for part in found}, shown(folder))
    return [(found.pop() if len(found) == 1 else "", path) for found, path in zip(parts, files, strict=True)]


def _entries(root: Path, file: Path, part: str, bad: Tolerance) -> list[Entry]:
    """All images of an annotation file that can be found."""
    where = shown(file)
    try:
        data = json.loads(read_text(file))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is no JSON: {error}", hint="Mend the file") from None
    categories, images, annotations = (_field(data, k, list, where) for k in ("categories", "images", "annotations"))
    names = {_field(c, "id", (int, str), where): _field(c, "name", str, where) for c in categories}
    objects: dict[Any, list[Any]] = {_field(i, "id", (int, str), f"an image of {where}"): [] for i in images}

    def assign(numbered: tuple[int, Any]) -> None:
        number, annotation = numbered
        place = f"annotation {number} of {where}"
        image = _field(annotation, "image_id", (int, str), place)
        if image not in objects:
            raise DataError(f"{place} is of image {image!r}, which is not listed")
        objects[image].append(annotation)

    words = [word for word, stands_for in PART_WORDS.items() if stands_for == part]
    names_of_folders = [re.sub("^instances_", "", file.stem), *words]
    bases = [root / "images", root]
    folders = [path for base in bases for name in names_of_folders if (path := base / name).is_dir()]
    folders += [base for base in bases if base.is_dir()]

    def entry(image: Any) -> Entry:
        place = f"image {image['id']!r} of {where}"
        path = named(folders, _field(image, "file_name", str, place), place)
        stated = [image.get(side) for side in ("width", "height")]
        size = (_number(stated[0], place), _number(stated[1], place)) if all(stated) else None
        return Entry(path, size, objects[image["id"]], names, place)

    bad.each(enumerate(annotations, start=1), assign)
    return [good for _, good in bad.each(images, entry)]


def _annotation(entry: Entry, wanted: Wanted) -> Annotation:
    boxes = []
    for number, thing in enumerate(entry.objects, start=1):
        where = f"annotation {number} of {entry.where}"
        if thing.get("iscrowd"):
            log.info("%s is of a crowd and left out", where)
            continue
        corners = _field(thing, "bbox", list, where)
        if len(corners) != 4:
            raise DataError(f"{where} has a bbox of {len(corners)} numbers, not x, y, width and height")
        x, y, width, height = (_number(value, where) for value in corners)
        category = _field(thing, "category_id", (int, str), where)
        if category not in entry.names:
            raise DataError(f"{where} is of category {category!r}, which is not listed")
        label = wanted.index(entry.names[category], where)
        boxes.append(Box(label, (x, y, x + width, y + height), where))
    return Annotation(boxes, entry.size)


def _field(entry: Any, key: str, kind: type[T] | tuple[type[T], ...], where: str) -> T:
    value = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(value, kind):
        raise DataError(f"{where} has no '{key}', or one of another type", hint="See cocodataset.org/#format-data")
    return value


def _number(value: Any, where: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise DataError(f"{where} has {value!r:.40} where a number should be") from None
