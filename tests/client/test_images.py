"""One image file -> bytes: every colour mode, both ways to resize, and files that are no image."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from client.readers import images
from client.readers.images import load_image, open_picture, placement, to_tensor, turn, turn_boxes
from shared_models.errors import DataError
from shared_models.job_parts import DataPart

GREY = DataPart(shape=(1, 2, 2))
COLOUR = DataPart(shape=(3, 2, 2))


def saved(path: Path, values: object, mode: str | None = None, **options: object) -> Path:
    """An image file with exactly these values."""
    Image.fromarray(np.asarray(values, dtype=np.uint8), mode).save(path, **options)
    return path


def test_grey_and_colour_arrive_bit_for_bit(tmp_path: Path) -> None:
    grey = saved(tmp_path / "grey.png", [[0, 1], [254, 255]])
    assert load_image(grey, GREY).tolist() == [[[0, 1], [254, 255]]]
    assert load_image(grey, COLOUR).tolist() == [[[0, 1], [254, 255]]] * 3
    colour = saved(tmp_path / "colour.png", [[[1, 2, 3], [4, 5, 6]], [[7, 8, 9], [10, 11, 12]]])
    assert load_image(colour, COLOUR).tolist() == [[[1, 4], [7, 10]], [[2, 5], [8, 11]], [[3, 6], [9, 12]]]


def test_colour_becomes_grey_by_luma(tmp_path: Path) -> None:
    """ITU-R 601-2: L = 0.299 R + 0.587 G + 0.114 B, rounded."""
    file = saved(tmp_path / "c.png", [[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]])
    assert load_image(file, GREY).tolist() == [[[76, 150], [29, 255]]]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L"])
def test_transparent_pixels_are_black(tmp_path: Path, mode: str) -> None:
    """White, half transparent white, wholly transparent white, opaque black."""
    file = tmp_path / "t.png"
    if mode == "RGBA":
        saved(file, [[[255, 255, 255, 255], [255, 255, 255, 128]], [[255, 255, 255, 0], [0, 0, 0, 255]]])
        expected = [[255, 128], [0, 0]]
    elif mode == "LA":
        saved(file, [[[255, 255], [255, 128]], [[255, 0], [0, 255]]], "LA")
        expected = [[255, 128], [0, 0]]
    else:  # one palette entry or grey value stands for "transparent"
        image = Image.fromarray(np.array([[1, 2], [2, 0]], dtype=np.uint8))
        if mode == "P":
            image = image.convert("P")
            image.putpalette([0, 0, 0, 255, 255, 255, 255, 255, 255])
        image.save(file, transparency=2)
        expected = [[255 if mode == "P" else 1, 0], [0, 0]]
    with Image.open(file) as written:
        assert written.mode == mode
    assert load_image(file, GREY).tolist() == [expected]
    assert load_image(file, COLOUR).tolist() == [expected] * 3


def test_cmyk_is_printed_colour(tmp_path: Path) -> None:
    """No ink is white; full magenta and yellow are red; full black is black."""
    ink = [[[0, 0, 0, 0], [0, 255, 255, 0]], [[0, 0, 0, 255], [255, 0, 0, 0]]]
    file = saved(tmp_path / "print.tif", ink, "CMYK")
    assert load_image(file, COLOUR).permute(1, 2, 0).tolist() == [
        [[255, 255, 255], [255, 0, 0]],
        [[0, 0, 0], [0, 255, 255]],
    ]


def test_sixteen_bits_are_scaled_to_eight(tmp_path: Path) -> None:
    """v * 255 / 65535, rounded: not cut off at 255."""
    file = tmp_path / "deep.png"
    Image.fromarray(np.array([[0, 257], [32768, 65535]], dtype=np.uint16)).save(file)
    with Image.open(file) as written:
        assert written.mode == "I;16"
    assert load_image(file, GREY).tolist() == [[[0, 1], [128, 255]]]


def test_floats_between_zero_and_one_fill_the_bytes(tmp_path: Path) -> None:
    file = tmp_path / "f.tif"
    Image.fromarray(np.array([[0, 0.2], [0.5, 1]], dtype=np.float32)).save(file)
    assert load_image(file, GREY).tolist() == [[[0, 51], [128, 255]]]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_floats_that_are_no_numbers_are_refused(tmp_path: Path, bad: float) -> None:
    file = tmp_path / "bad-float.tif"
    Image.fromarray(np.array([[bad, 1], [1, 1]], dtype=np.float32)).save(file)
    with pytest.raises(DataError, match=r"bad-float\.tif"):
        load_image(file, GREY)


@pytest.mark.parametrize(
    ("orientation", "expected"),
    [(1, [[1, 2], [3, 4]]), (3, [[4, 3], [2, 1]]), (6, [[3, 1], [4, 2]]), (8, [[2, 4], [1, 3]])],
)
def test_the_camera_orientation_is_applied(tmp_path: Path, orientation: int, expected: list[list[int]]) -> None:
    """EXIF 274: 3 = upside down, 6 = turn clockwise to see it upright, 8 = anticlockwise."""
    exif = Image.Exif()
    exif[274] = orientation
    file = saved(tmp_path / "turned.png", [[1, 2], [3, 4]], exif=exif)
    assert load_image(file, GREY).tolist() == [expected]


def test_stretch_takes_the_whole_image(tmp_path: Path) -> None:
    """2 x 4 -> 2 x 2: a triangle of width 2 pixels about each centre, renormalised at the border.

    Left pixel, centre 1.0: weights of the columns 0..2 are 3, 3, 1 of 7; right pixel the mirror image.
    """
    file = saved(tmp_path / "wide.png", [[10, 20, 30, 40], [50, 60, 70, 80]])
    left, right = (3 * 10 + 3 * 20 + 30) / 7, (20 + 3 * 30 + 3 * 40) / 7
    expected = [[round(left), round(right)], [round(left + 40), round(right + 40)]]
    assert expected == [[17, 33], [57, 73]]
    assert load_image(file, GREY).tolist() == [expected]


@pytest.mark.parametrize("channels", [1, 3])
def test_pad_keeps_the_proportions_and_adds_black(tmp_path: Path, channels: int) -> None:
    wide = saved(tmp_path / "wide.png", [[10, 20, 30, 40], [50, 60, 70, 80]])
    tall = saved(tmp_path / "tall.png", [[10, 50], [20, 60], [30, 70], [40, 80]])
    data = DataPart(shape=(channels, 4, 4), resize="pad")
    black = [0, 0, 0, 0]
    assert load_image(wide, data).tolist() == [[black, [10, 20, 30, 40], [50, 60, 70, 80], black]] * channels
    upright = [[0, 10, 50, 0], [0, 20, 60, 0], [0, 30, 70, 0], [0, 40, 80, 0]]
    assert load_image(tall, data).tolist() == [upright] * channels


def test_height_comes_before_width(tmp_path: Path) -> None:
    file = saved(tmp_path / "x.png", np.full((9, 5), 7))
    image = load_image(file, DataPart(shape=(3, 6, 4)))
    assert image.shape == (3, 6, 4)
    assert image.dtype == torch.uint8
    assert image.is_contiguous()


def _truncated_jpeg(file: Path) -> None:
    saved(file, np.arange(64 * 64).reshape(64, 64) % 251, quality=95)
    file.write_bytes(file.read_bytes()[:700])


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("truncated.jpg", _truncated_jpeg),
        ("empty.png", lambda file: file.write_bytes(b"")),
        ("text.png", lambda file: file.write_text("patient 17, see letter")),
        ("a-folder.png", lambda file: file.mkdir()),
        ("absent.png", lambda file: None),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, write: Callable[[Path], object]) -> None:
    write(tmp_path / name)
    with pytest.raises(DataError) as caught:
        load_image(tmp_path / name, COLOUR)
    assert str(tmp_path / name) in str(caught.value)
    assert "Mend or remove the file" in str(caught.value)


@pytest.mark.parametrize("side", [10_001, 60_000])  # Pillow itself refuses from 13,377 on
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_refused_unopened(tmp_path: Path, side: int) -> None:
    """A header that promises so many pixels, and none of them."""
    (tmp_path / "bomb.pgm").write_text(f"P5 {side} {side} 255\n")
    with pytest.raises(DataError, match=r"bomb\.pgm cannot be read: .*(limit is 100 megapixels|decompression bomb)"):
        load_image(tmp_path / "bomb.pgm", GREY)


def test_the_limit_of_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = saved(tmp_path / "x.png", np.zeros((20, 5)))
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    load_image(file, GREY)
    monkeypatch.setattr(images, "MAX_PIXELS", 99)
    with pytest.raises(DataError, match="5x20 pixels"):
        load_image(file, GREY)


def test_a_file_is_what_it_holds_and_no_program_is_started_for_it(tmp_path: Path) -> None:
    """PostScript, for which Pillow would start Ghostscript, under the name of a PNG; a JPEG is read under any name."""
    (tmp_path / "x.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 2 2\n%%EndComments\n")
    with pytest.raises(DataError, match=r"x\.png cannot be read: cannot identify"):
        load_image(tmp_path / "x.png", GREY)
    saved(tmp_path / "photo.jpg", np.full((2, 2), 9)).rename(tmp_path / "photo.png")
    assert load_image(tmp_path / "photo.png", GREY).tolist() == [[[9, 9], [9, 9]]]


# ---- where an image lies in the job's frame --------------------------------------------------------------------------
@pytest.mark.parametrize("size", [(1, 1), (3, 7), (7, 3), (16, 9), (64, 64), (100, 1), (1, 100), (33, 32)])
@pytest.mark.parametrize("frame", [(32, 32), (17, 32), (32, 17)])
def test_padding_is_pillows(size: tuple[int, int], frame: tuple[int, int]) -> None:
    """ImageOps.pad as the oracle, bit for bit (it has no answer where a side would be rounded to nothing)."""
    pixels = np.random.default_rng(0).integers(1, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    ours = to_tensor(image, DataPart(shape=(3, frame[1], frame[0]), resize="pad"))
    if max(size) / min(size) < min(frame):
        theirs = ImageOps.pad(image, frame, Image.Resampling.BILINEAR, color=0)
        assert torch.equal(ours.permute(1, 2, 0), torch.from_numpy(np.array(theirs)))
    left, top, width, height = placement(size, DataPart(shape=(3, frame[1], frame[0]), resize="pad"))
    inside = torch.zeros(frame[1], frame[0], dtype=torch.bool)
    inside[top : top + height, left : left + width] = True
    assert ((ours > 0).all(0) == inside).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_turn_with_their_image(orientation: int) -> None:
    """A white rectangle is found where its box says, before and after; Pillow's exif_transpose as the oracle."""
    pixels = np.zeros((4, 8), np.uint8)
    pixels[1:3, 1:4] = 255
    image = Image.fromarray(pixels)
    box = turn_boxes(torch.tensor([[1 / 8, 1 / 4, 4 / 8, 3 / 4]]), orientation)[0]
    exif = image.getexif()
    exif[274] = orientation
    for upright in (turn(image, orientation), ImageOps.exif_transpose(image)):
        rows, columns = np.nonzero(np.asarray(upright))
        width, height = upright.size
        found = [columns.min() / width, rows.min() / height, (columns.max() + 1) / width, (rows.max() + 1) / height]
        assert box.tolist() == found


def test_an_orientation_that_exif_does_not_know_turns_nothing(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 9
    file = saved(tmp_path / "odd.png", [[1, 2], [3, 4]], exif=exif)
    assert load_image(file, GREY).tolist() == [[[1, 2], [3, 4]]]
    assert open_picture(file).orientation == 1
