"""Masks: pairing, what a value or colour stands for, sizes, turning, and every way a mask can be wrong."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from client.readers import check, read
from client.readers.base import PARTS, Store, Wanted
from shared_models.errors import DataError
from shared_models.job_parts import DataPart

DATA = DataPart(shape=(1, 2, 3))
LABELS = ("background", "vessel", "tumour")


def put(folder: Path, name: str, values: object, mode: str | None = None, **options: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, dtype=np.uint8), mode).save(folder / name, **options)
    return folder / name


def pair(root: Path, mask: object, name: str = "a.png", **options: object) -> None:
    """An image of the mask's height and width, and the mask."""
    put(root / "image", name, np.zeros(np.shape(mask)[:2]))
    put(root / "label", name, mask, **options)


def masks(root: Path, data: DataPart = DATA, labels: tuple[str, ...] = LABELS, skip: int = 0, **alias: str) -> Store:
    return read("masks", root, Wanted(data, labels, "mask", alias, skip))


def one(root: Path, **aliases: str) -> list[list[int]]:
    return masks(root, **aliases).y[0].tolist()


# ---- what a value stands for -----------------------------------------------------------------------------------------
def test_grey_values_are_indices_and_255_counts_nowhere(tmp_path: Path) -> None:
    pair(tmp_path, [[0, 1, 2], [2, 255, 0]])
    store = masks(tmp_path)
    assert store.y.tolist() == [[[0, 1, 2], [2, 255, 0]]]
    assert (store.y.dtype, store.x.shape) == (torch.uint8, (1, 1, 2, 3))


def test_an_alias_of_a_grey_value_wins(tmp_path: Path) -> None:
    """As in ISBI 2012, where 255 is the cell and 0 the membrane."""
    pair(tmp_path, [[0, 255, 255], [0, 0, 255]])
    aliases = {"0": "vessel", "255": "background"}
    assert one(tmp_path, **aliases) == [[1, 0, 0], [1, 1, 0]]


def test_a_label_that_is_a_number_is_that_number(tmp_path: Path) -> None:
    """And then no other number is an index: 0 would be label "1", as 1 is."""
    pair(tmp_path, [[1, 2, 2]])
    data = DataPart(shape=(1, 1, 3))
    assert masks(tmp_path, data, ("2", "1")).y.tolist() == [[[1, 0, 0]]]
    pair(tmp_path, [[0, 1, 2]])
    with pytest.raises(DataError, match=r"at \(x, y\) = \(0, 0\) holds class 0, which stands for none"):
        masks(tmp_path, data, ("2", "1"))


def test_a_value_that_stands_for_nothing_is_placed(tmp_path: Path) -> None:
    pair(tmp_path, [[0, 0, 0], [0, 7, 7]])
    with pytest.raises(
        DataError, match=r"mask .*label/a\.png at \(x, y\) = \(1, 1\) holds class 7, .* 3 labels"
    ) as caught:
        masks(tmp_path)
    assert "[data.labels]" in str(caught.value)


RED, BLACK, GREY = (255, 0, 0), (0, 0, 0), (2, 2, 2)


def test_colours(tmp_path: Path) -> None:
    """An alias of the colour in either case; a colour without hue is else its grey value, so white counts nowhere."""
    colours = [[RED, BLACK, GREY], [RED, (255, 255, 255), (0, 255, 171)]]
    pair(tmp_path, colours)
    expected = [[2, 0, 2], [2, 255, 1]]
    assert one(tmp_path, **{"#ff0000": "tumour", "#00FFAB": "vessel"}) == expected
    opaque = [[(*pixel, 255) for pixel in row] for row in colours]
    pair(tmp_path, opaque)
    assert one(tmp_path, **{"#FF0000": "tumour", "#00ffab": "vessel"}) == expected
    with pytest.raises(DataError, match=r"at \(x, y\) = \(2, 1\) has the colour #00ffab, which stands for no class"):
        one(tmp_path, **{"#ff0000": "tumour"})


def test_transparent_masks_are_refused(tmp_path: Path) -> None:
    pair(tmp_path, [[(255, 0, 0, 128)]])
    with pytest.raises(DataError, match="has transparent pixels"):
        masks(tmp_path)


def test_palettes_by_index_whatever_their_colours(tmp_path: Path) -> None:
    pair(tmp_path, [[0, 1, 2], [2, 1, 255]])
    with Image.open(tmp_path / "label" / "a.png") as grey:
        palette = Image.frombytes("P", grey.size, grey.tobytes())
    palette.putpalette([9, 9, 9, 0, 0, 0, 255, 0, 0] + [0] * 759)
    palette.save(tmp_path / "label" / "a.png")
    with Image.open(tmp_path / "label" / "a.png") as written:
        assert written.mode == "P"
    assert one(tmp_path) == [[0, 1, 2], [2, 1, 255]]


def test_masks_of_one_bit(tmp_path: Path) -> None:
    """White is 1; where the job knows a 255, as any viewer shows it, it is that."""
    pair(tmp_path, [[0, 255, 0], [255, 0, 255]])
    with Image.open(tmp_path / "label" / "a.png") as grey:
        bits = grey.convert("1")
    bits.save(tmp_path / "label" / "a.png")
    assert one(tmp_path) == [[0, 1, 0], [1, 0, 1]]
    assert one(tmp_path, **{"255": "tumour"}) == [[0, 2, 0], [2, 0, 2]]


def test_sixteen_bits(tmp_path: Path) -> None:
    pair(tmp_path, [[0, 1, 2]])
    Image.fromarray(np.array([[0, 256, 40000]], np.uint16)).save(tmp_path / "label" / "a.png")
    aliases = {"256": "vessel", "40000": "tumour"}
    assert masks(tmp_path, DataPart(shape=(1, 1, 3)), **aliases).y.tolist() == [[[0, 1, 2]]]
    with pytest.raises(DataError, match="holds class 40000"):
        masks(tmp_path, **{"256": "vessel"})


def test_floats_are_no_mask(tmp_path: Path) -> None:
    pair(tmp_path, [[0]])
    (tmp_path / "label" / "a.png").unlink()
    Image.fromarray(np.zeros((1, 1), np.float32)).save(tmp_path / "label" / "a.tif")
    with pytest.raises(DataError, match="mode F, which is no mask's"):
        masks(tmp_path)


def test_more_classes_than_a_byte_holds(tmp_path: Path) -> None:
    pair(tmp_path, [[0, 1]])
    labels = tuple(f"c{i}" for i in range(300))
    with pytest.raises(DataError, match="has the 256th class, and a mask holds at most 255"):
        masks(tmp_path, labels=labels, **{"1": "c255"})


# ---- size and turning ------------------------------------------------------------------------------------------------
def test_nearest_neighbour_makes_no_new_class(tmp_path: Path) -> None:
    """4 x 6 -> 2 x 3: the pixel under each centre, (1, 1), (1, 3), (1, 5), ... is taken."""
    values = np.arange(24).reshape(4, 6)
    labels = tuple(f"c{i}" for i in range(24))
    pair(tmp_path, values)
    assert masks(tmp_path, labels=labels).y[0].tolist() == values[1::2, 1::2].tolist()


def test_padding_counts_nowhere(tmp_path: Path) -> None:
    pair(tmp_path, [[1, 2, 1, 2], [0, 0, 0, 0]])
    store = masks(tmp_path, DataPart(shape=(1, 4, 4), resize="pad"))
    ignored = [255] * 4
    assert store.y[0].tolist() == [ignored, [1, 2, 1, 2], [0, 0, 0, 0], ignored]


def _oriented(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[274] = orientation
    return exif


@pytest.mark.parametrize("mask_is", ["upright", "stored", "stored with its own tag"])
def test_masks_turn_with_their_image(tmp_path: Path, mask_is: str) -> None:
    """A photo taken sideways: stored 3 wide and 2 high, shown 2 wide and 3 high (EXIF 6: clockwise)."""
    stored = [[0, 1, 2], [2, 2, 0]]
    upright = [[2, 0], [2, 1], [0, 2]]
    put(tmp_path / "image", "a.png", stored, exif=_oriented(6))
    if mask_is == "upright":
        put(tmp_path / "label", "a.png", upright)
    elif mask_is == "stored":
        put(tmp_path / "label", "a.png", stored)
    else:
        put(tmp_path / "label", "a.png", stored, exif=_oriented(6))
    store = masks(tmp_path, DataPart(shape=(1, 3, 2)))
    assert store.x[0, 0].tolist() == upright
    assert store.y[0].tolist() == upright


def test_a_mask_that_says_how_it_is_turned_is_turned_no_other_way(tmp_path: Path) -> None:
    put(tmp_path / "image", "a.png", np.zeros((2, 3)), exif=_oriented(6))
    put(tmp_path / "label", "a.png", np.zeros((2, 3)), exif=_oriented(3))
    with pytest.raises(DataError, match="has 3x2 pixels, its image 2x3"):
        masks(tmp_path)


def test_a_mask_of_another_size_than_its_image(tmp_path: Path) -> None:
    put(tmp_path / "image", "a.png", np.zeros((4, 6)))
    put(tmp_path / "label", "a.png", np.zeros((4, 5)))
    with pytest.raises(DataError, match=r"mask .*label/a\.png has 5x4 pixels, its image 6x4"):
        masks(tmp_path)


# ---- pairs -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("images", "labels"), [("image", "label"), ("images", "labels"), ("images", "masks"), ("imgs", "masks")]
)
def test_names_of_the_folders(tmp_path: Path, images: str, labels: str) -> None:
    put(tmp_path / images, "b.jpg", [[0]])
    put(tmp_path / images, "a.png", [[0]])
    put(tmp_path / images, ".hidden.png", [[0]])
    put(tmp_path / labels, "a.png", [[1]])
    put(tmp_path / labels, "b.PNG", [[2]])
    (tmp_path / labels / "Thumbs.db").write_bytes(b"x")
    store = masks(tmp_path)
    assert list(store.names) == [f"{images}/a.png", f"{images}/b.jpg"]
    assert store.y[:, 0, 0].tolist() == [1, 2]
    assert not store.parts


def test_the_owners_parts(tmp_path: Path) -> None:
    for value, part in enumerate(("train", "val", "test")):
        pair(tmp_path / part, [[value]])
    store = masks(tmp_path)
    assert list(store.parts) == list(PARTS)
    assert store.y[:, 0, 0].tolist() == [0, 1, 2]
    assert list(store.names) == ["train/image/a.png", "val/image/a.png", "test/image/a.png"]


def test_pairs_in_two_unicode_spellings(tmp_path: Path) -> None:
    put(tmp_path / "image", unicodedata.normalize("NFC", "Läsion 猫.png"), [[0]])
    put(tmp_path / "label", unicodedata.normalize("NFD", "Läsion 猫.png"), [[2]])
    assert masks(tmp_path).y[0, 0, 0] == 2


def test_an_image_or_mask_that_is_alone_or_one_too_many(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png", "d.png"):
        pair(tmp_path, [[1]], name)
    (tmp_path / "label" / "a.png").unlink()
    (tmp_path / "image" / "b.png").unlink()
    put(tmp_path / "image", "c.jpg", [[0]])
    store = masks(tmp_path, skip=3)
    assert list(store.names) == ["image/d.png"]
    assert [line.split(" have this name")[0] for line in store.skipped] == [
        f"{tmp_path}/image/a.png: 1 images and 0 masks",
        f"{tmp_path}/label/b.png: 0 images and 1 masks",
        f"{tmp_path}/image/c.jpg: 2 images and 1 masks",
    ]
    with pytest.raises(DataError, match="2 files or rows cannot be used and 1 may be skipped"):
        masks(tmp_path, skip=1)


def test_a_folder_without_pairs_is_explained(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no folders for images and masks\. Expected one of image/ and label/, "):
        masks(tmp_path)
    (tmp_path / "image").mkdir()
    (tmp_path / "label").mkdir()
    with pytest.raises(DataError, match=r"no image in .*image"):
        masks(tmp_path)


def test_check_counts_values_and_lists_what_is_bad(tmp_path: Path) -> None:
    speck = np.zeros((50, 50))
    speck[17, 3] = 10
    pair(tmp_path, [[0, 255]], "a.png")
    pair(tmp_path, speck, "b.png")
    pair(tmp_path, [[0, 0]], "c.png")
    (tmp_path / "image" / "c.png").write_bytes(b"")
    put(tmp_path / "label", "d.png", [[0]])
    found = check(tmp_path, "masks")
    assert found["images"] == 2
    assert found["classes"] == {"all": {"0": 2, "10": 1, "255": 1}}
    assert ["d.png: 0 images" in found["unreadable"][0], "c.png cannot be read" in found["unreadable"][1]] == [True] * 2


def test_tiles_cover_an_image_once(tmp_path: Path) -> None:
    """5 x 7 pixels in tiles of 2 x 4; what reaches beyond the edge is black and counts nowhere."""
    image = np.arange(1, 36, dtype=np.uint8).reshape(5, 7)
    put(tmp_path / "image", "a.png", image)
    put(tmp_path / "label", "a.png", image % 3)
    found = masks(tmp_path, DataPart(shape=(1, 2, 4), tile=(2, 4)), labels=("x", "y", "z"))
    assert list(found.names) == [f"image/a.png#{i}" for i in range(6)]
    assert list(found.groups) == ["image/a.png"] * 6
    whole = np.zeros((6, 8), np.uint8)
    whole[:5, :7] = image
    classes = np.full((6, 8), 255, np.uint8)
    classes[:5, :7] = image % 3
    for i in range(6):
        rows, columns = slice(i // 2 * 2, i // 2 * 2 + 2), slice(i % 2 * 4, i % 2 * 4 + 4)
        assert found.x[i, 0].tolist() == whole[rows, columns].tolist()
        assert found.y[i].tolist() == classes[rows, columns].tolist()


def test_tiles_are_cut_from_the_upright_image_and_then_resized(tmp_path: Path) -> None:
    """Stored lying, 4 wide and 2 high; upright 2 wide and 4 high: two tiles of 2 x 2, each shown at 4 x 4."""
    stored = np.array([[10, 20, 30, 40], [50, 60, 70, 80]], np.uint8)
    put(tmp_path / "image", "a.png", stored, exif=_oriented(6))
    put(tmp_path / "label", "a.png", (stored > 40).astype(np.uint8))
    found = masks(tmp_path, DataPart(shape=(1, 4, 4), tile=(2, 2)))
    upright = np.rot90(stored, -1)
    assert found.x.shape == (2, 1, 4, 4)
    for i, half in enumerate((upright[:2], upright[2:])):
        expected = Image.fromarray(half).resize((4, 4), Image.Resampling.BILINEAR)
        assert found.x[i, 0].tolist() == np.asarray(expected).tolist()
        assert found.y[i].tolist() == np.kron(half > 40, np.ones((2, 2), int)).tolist()


def test_a_bad_file_in_tiles_counts_once(tmp_path: Path) -> None:
    """A broken image, a broken mask and a good pair."""
    for name in ("a.png", "b.png", "c.png"):
        pair(tmp_path, np.zeros((4, 4), np.uint8), name)
    (tmp_path / "image" / "a.png").write_bytes(b"no image")
    (tmp_path / "label" / "b.png").write_bytes(b"no mask")
    tiled = DataPart(shape=(1, 2, 2), tile=(2, 2))
    found = masks(tmp_path, tiled, skip=2)
    assert list(found.names) == [f"image/c.png#{i}" for i in range(4)]
    assert len(found.skipped) == 2
    with pytest.raises(DataError):
        masks(tmp_path, tiled, skip=1)


@pytest.mark.data
def test_isbi_2012(real_data: Path) -> None:
    """30 slices of 512 x 512; 255 is the cell, 0 the membrane around it, about a fifth of the pixels."""
    root = real_data / "isbi2012_em" / "train"
    aliases = {"0": "membrane", "255": "cell"}
    store = masks(root, DataPart(shape=(1, 512, 512)), ("cell", "membrane"), **aliases)
    assert store.x.shape == (30, 1, 512, 512)
    with Image.open(root / "label" / "7.png") as file:
        white = np.asarray(file) == 255
    assert np.array_equal(store.y[list(store.names).index("image/7.png")].numpy() == 0, white)
    assert store.y.max() == 1
    assert (store.y == 1).float().mean() == pytest.approx(0.22, abs=0.01)
    assert check(root, "masks") == {"images": 30, "classes": {"all": {"0": 30, "255": 30}}, "unreadable": []}
