"""One visible picture, one answer: whatever file format, depth, orientation, transparency, place and size."""

import os
import threading

import numpy as np
import pytest
from PIL import Image, ImageDraw

from erpe.errors import DataError
from erpe.pictures import read_picture

SIDE = 280


@pytest.fixture
def ink():
    """A seven, white on black, upright, in the middle: (SIDE, SIDE) uint8."""
    image = Image.new("L", (4 * SIDE, 4 * SIDE))
    points = [(4 * x, 4 * y) for x, y in ((80, 70), (200, 70), (130, 210))]
    ImageDraw.Draw(image).line(points, fill=255, width=80, joint="curve")
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX))


def layers(ink, grey):
    """A picture of one grey whose ink is its opacity."""
    return np.dstack([np.full_like(ink, grey), ink])


def turned(ink, how, orientation):
    exif = Image.Exif()
    exif[0x112] = orientation
    return Image.fromarray(ink).transpose(how), "jpg", {"exif": exif, "quality": 98}


def palette(ink, transparency):
    image = Image.fromarray((ink > 127).astype(np.uint8), "P")
    image.putpalette([255, 255, 255, 0, 0, 0])
    return image, "png", {"transparency": 0} if transparency else {}


ENCODINGS = {
    "PNG": lambda ink: (Image.fromarray(ink), "png", {}),
    "dark on bright": lambda ink: (Image.fromarray(255 - ink), "png", {}),
    "colour": lambda ink: (Image.fromarray(255 - ink).convert("RGB"), "webp", {"lossless": True}),
    "JPEG, EXIF 3": lambda ink: turned(ink, Image.Transpose.ROTATE_180, 3),
    "JPEG, EXIF 6": lambda ink: turned(ink, Image.Transpose.ROTATE_90, 6),
    "JPEG, EXIF 8": lambda ink: turned(ink, Image.Transpose.ROTATE_270, 8),
    "JPEG, EXIF 2": lambda ink: turned(ink, Image.Transpose.FLIP_LEFT_RIGHT, 2),
    "JPEG, CMYK": lambda ink: (Image.fromarray(255 - ink).convert("CMYK"), "jpg", {"quality": 98}),
    "LA, white ink": lambda ink: (Image.fromarray(layers(ink, 255), "LA"), "png", {}),
    "LA, black ink": lambda ink: (Image.fromarray(layers(ink, 0), "LA"), "png", {}),
    "LA, a hole in white": lambda ink: (Image.fromarray(layers(255 - ink, 255), "LA"), "png", {}),
    "RGBA, black ink": lambda ink: (Image.fromarray(layers(ink, 0), "LA").convert("RGBA"), "png", {}),
    "RGBA, opaque": lambda ink: (Image.fromarray(ink).convert("RGBA"), "png", {}),
    "16 bit": lambda ink: (Image.fromarray(ink.astype(np.uint16) * 257), "png", {}),
    "16 bit, half of the range": lambda ink: (Image.fromarray((20000 + ink * 128.5).astype(np.uint16)), "png", {}),
    "8 bit, faint": lambda ink: (Image.fromarray((100 + ink * 0.4).astype(np.uint8)), "png", {}),
    "float, 0 to 1": lambda ink: (Image.fromarray((ink / 255).astype(np.float32)), "tif", {}),
    "float, -1 to 1": lambda ink: (Image.fromarray((ink / 127.5 - 1).astype(np.float32)), "tif", {}),
    "32 bit": lambda ink: (Image.fromarray(ink.astype(np.int32) * 257), "tif", {}),
}


@pytest.mark.parametrize("dataset", ["mnist", "digits"])
@pytest.mark.parametrize("name", ENCODINGS)
def test_a_digit_is_the_same_in_every_encoding(name, dataset, ink, tmp_path):
    Image.fromarray(ink).save(tmp_path / "plain.png")
    image, ending, options = ENCODINGS[name](ink)
    image.save(tmp_path / f"other.{ending}", **options)
    plain = read_picture(tmp_path / "plain.png", dataset).astype(int)
    other = read_picture(tmp_path / f"other.{ending}", dataset).astype(int)
    assert np.abs(plain - other).max() <= 8  # of 255: JPEG, and 0.4 of a range in whole numbers


@pytest.mark.parametrize("transparency", [True, False])
def test_a_palette_of_two_colours_is_read_with_and_without_transparency(transparency, ink, tmp_path):
    Image.fromarray(((ink > 127) * 255).astype(np.uint8)).save(tmp_path / "plain.png")
    image, ending, options = palette(ink, transparency)
    image.save(tmp_path / f"other.{ending}", **options)
    found = read_picture(tmp_path / "other.png", "mnist")
    assert np.array_equal(found, read_picture(tmp_path / "plain.png", "mnist"))


@pytest.mark.parametrize("corner", [(0, 0), (300, 20), (37, 411)])
@pytest.mark.parametrize("scale", [0.5, 1.7])
def test_a_digit_has_the_place_and_size_that_mnist_gives_it(corner, scale, ink, tmp_path):
    """20 pixels for the longer side, and the centre of mass in the middle of 28."""
    side = round(SIDE * scale)
    page = Image.new("L", (900, 1000))
    page.paste(Image.fromarray(ink).resize((side, side)), corner)
    page.save(tmp_path / "page.png")
    (found,) = read_picture(tmp_path / "page.png", "mnist")
    rows, columns = (np.flatnonzero((found > 25).any(axis=axis)) for axis in (1, 0))
    assert max(np.ptp(rows), np.ptp(columns)) + 1 in (19, 20)
    mass = found.astype(float)
    assert [(mass.sum(axis=1 - axis) @ (np.arange(28) + 0.5)) / mass.sum() for axis in (0, 1)] == pytest.approx(
        [14, 14], abs=0.51
    )


def test_an_image_that_is_as_the_data_set_made_it_stays_as_it_is(ink, tmp_path):
    Image.fromarray(ink).save(tmp_path / "large.png")
    made = read_picture(tmp_path / "large.png", "mnist")
    Image.fromarray(made[0]).save(tmp_path / "made.png")
    assert np.array_equal(read_picture(tmp_path / "made.png", "mnist"), made)


def test_raw_leaves_place_and_polarity_alone(ink, tmp_path):
    page = np.full((SIDE, SIDE), 255, np.uint8)
    page[:40, :40] = 0
    Image.fromarray(page).save(tmp_path / "page.png")
    (found,) = read_picture(tmp_path / "page.png", "mnist", raw=True)
    assert found[0, 0] == 0 and found[-1, -1] == 255 and found.shape == (28, 28)


def test_a_photograph_keeps_its_shape_and_colours(tmp_path):
    photo = np.zeros((100, 300, 3), np.uint8)
    photo[:, 100:200] = (200, 100, 50)  # the middle square
    Image.fromarray(photo).save(tmp_path / "photo.png")
    found = read_picture(tmp_path / "photo.png", "cifar10")
    assert found.shape == (3, 32, 32) and (found[:, 2:30, 2:30].reshape(3, -1).T == (200, 100, 50)).all()


@pytest.mark.parametrize(
    "empty",
    [np.zeros((9, 9), np.uint8), np.full((9, 9), 255, np.uint8), np.zeros((9, 9, 4), np.uint8),
     np.zeros((9, 9), np.uint16)],
    ids=["black", "white", "transparent", "16 bit"],
)  # fmt: skip
@pytest.mark.parametrize("raw", [False, True])
def test_a_picture_with_nothing_on_it_is_said_to_be_so(empty, raw, tmp_path):
    Image.fromarray(empty).save(tmp_path / "empty.png")
    with pytest.raises(DataError, match="nothing to see"):
        read_picture(tmp_path / "empty.png", "mnist", raw)


def test_a_link_and_a_pipe_are_pictures(ink, tmp_path):
    Image.fromarray(ink).save(tmp_path / "plain.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "plain.png")
    os.mkfifo(tmp_path / "pipe")
    plain, link = (read_picture(tmp_path / name, "mnist") for name in ("plain.png", "link.png"))
    writer = threading.Timer(0.3, (tmp_path / "pipe").write_bytes, [(tmp_path / "plain.png").read_bytes()])
    writer.start()  # the reader comes first
    pipe = read_picture(tmp_path / "pipe", "mnist")
    writer.join()
    assert np.array_equal(plain, link) and np.array_equal(plain, pipe)


@pytest.mark.parametrize("data", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n" + bytes(30)])
def test_what_is_no_picture_is_one_line(data, tmp_path):
    (tmp_path / "x.png").write_bytes(data)
    for path in (tmp_path / "x.png", tmp_path, tmp_path / "missing.png", "/dev/zero"):
        with pytest.raises(DataError) as told:
            read_picture(path, "mnist")
        assert len(str(told.value).splitlines()) == 1 and str(path) in str(told.value)
