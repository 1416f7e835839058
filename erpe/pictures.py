"""Read a picture file as the images of a data set were made: one visible picture, one answer, whatever its encoding.

pixels = read_picture("seven.jpg", "mnist")        # (1, 28, 28) uint8, white ink on black, centred
"""

from __future__ import annotations

import io
import os
import select
import stat
import struct

import numpy as np
from PIL import Image, ImageOps

from erpe.datasets import Dataset, Frame, facts_of
from erpe.errors import DataError

FORMATS = ("PNG", "JPEG", "GIF", "BMP", "PPM", "TIFF", "WEBP")
"""Of pictures; Pillow would give a PostScript file to another program, which runs it."""

MOST_BYTES = 256 * 2**20
MOST_PIXELS = 50_000_000

PATIENCE = 10.0
"""Seconds until a pipe's writer must have come."""

LEAST_CONTRAST = 4 / 255
"""Brightest minus darkest pixel, in [0, 1], below which there is nothing to see."""

FAINT = 0.7
"""Contrast below which a handwritten digit is stretched to black and white."""


def read_picture(picture: str | os.PathLike[str], dataset: str | Dataset, raw: bool = False) -> np.ndarray:
    """Read a picture as an image of a data set.

    The orientation that a camera notes is applied, transparent parts are laid on a background that contrasts with the
    ink, and any depth is scaled by its range. A digit becomes white on black, and is centred and sized as those of
    the data set.

    Args:
        picture: a file of one of `FORMATS`, a link to one, or a pipe such as /dev/stdin.
        raw: only scale to the size of the image; leave position, contrast and polarity alone.
    Returns:
        (channels, height, width) uint8.
    Raises:
        DataError: it cannot be read, or shows nothing.
    """
    facts = facts_of(dataset)
    channels, height, width = facts.image
    shown = read_image(picture)
    if channels == 1:
        shown = (shown @ [0.299, 0.587, 0.114])[..., None]  # (h, w, 1)  ITU-R 601, as Pillow
    if np.ptp(shown.reshape(-1, channels), axis=0).max() < LEAST_CONTRAST:
        raise DataError(f"{picture}: nothing to see, all pixels are alike")
    if facts.frame and not raw:
        found = _framed(_white_on_black(shown[..., 0]), facts.frame, height)[..., None]
    else:
        found = fitted(shown, height, width)
    return np.rint(found.clip(0, 1) * 255).astype(np.uint8).transpose(2, 0, 1).copy()


def read_image(picture: str | os.PathLike[str]) -> np.ndarray:
    """Return a picture file in colours, upright, transparent parts laid on a background: (h, w, 3) in [0, 1].

    Raises:
        DataError: it cannot be read.
    """
    return _opaque(_open(picture))


def fitted(shown: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return the middle part of the wanted form, scaled: (h, w, channels) -> (height, width, channels)."""
    if shown.shape[:2] == (height, width):
        return shown
    return np.stack([_fit(shown[..., c], height, width) for c in range(shown.shape[2])], axis=-1)


def _without_hanging(path: str, flags: int) -> int:
    """Open a file; a pipe that nobody writes to for `PATIENCE` seconds is empty."""
    file = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    if stat.S_ISFIFO(os.fstat(file).st_mode):
        select.select([file], [], [], PATIENCE)
    os.set_blocking(file, True)
    return file


def _open(picture: str | os.PathLike[str]) -> Image.Image:
    """Return the first frame, upright; raises DataError."""
    why: object
    try:
        with open(picture, "rb", opener=_without_hanging) as file:
            data = file.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise ValueError(f"more than {MOST_BYTES // 2**20} MiB")
        with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
            if opened.width * opened.height > MOST_PIXELS:
                raise ValueError(f"{opened.width} x {opened.height} pixels are too many")
            opened.load()
            return ImageOps.exif_transpose(opened)
    except Image.UnidentifiedImageError:
        why = f"not a picture of a format that is known here: {', '.join(FORMATS)}"
    except OSError as error:
        why = error.strerror or error
    except (ValueError, SyntaxError, LookupError, EOFError, TypeError, struct.error, Image.DecompressionBombError,
            ZeroDivisionError, Warning) as error:  # fmt: skip
        why = error
    raise DataError(f"{picture}: cannot be read as a picture ({why})")


def _opaque(image: Image.Image) -> np.ndarray:
    """Colours of a picture of any mode, transparency laid on a background: (h, w, 3) in [0, 1]."""
    if image.mode[0] in "IF":  # I, I;16, I;16B, F: more than 8 bits of grey
        return np.repeat(_by_range(image)[..., None], 3, axis=2)
    if not image.has_transparency_data:
        return np.asarray(image.convert("RGB"), dtype=np.float64) / 255
    rgba = np.asarray(image.convert("RGBA"), dtype=np.float64) / 255
    colours, alpha = rgba[..., :3], rgba[..., 3:]
    return colours * alpha + _background(colours.mean(axis=2), alpha[..., 0]) * (1 - alpha)


def _by_range(image: Image.Image) -> np.ndarray:
    """Grey of more than 8 bits, over the range of its depth: (h, w) in [0, 1]."""
    grey = np.nan_to_num(np.asarray(image, dtype=np.float64))
    tops = [65535.0] if image.mode.startswith("I;16") else [1.0, 255.0, 65535.0, 2.0**32 - 1]
    for top in tops:
        if grey.min() >= 0 and grey.max() <= top:
            return grey / top
    return (grey - grey.min()) / max(np.ptp(grey), np.finfo(float).tiny)


def _background(grey: np.ndarray, alpha: np.ndarray) -> float:
    """Brightness to lay a partly transparent picture on: what is little, or all of one grey, wants contrast."""
    if not alpha.any():
        return 0.0
    solid = grey[alpha > 0.5]
    if alpha.mean() < 0.5 or np.ptp(solid) < LEAST_CONTRAST:
        return float(np.average(grey, weights=alpha) < 0.5)
    return float(np.median(solid))


def _white_on_black(grey: np.ndarray) -> np.ndarray:
    """Return a digit in white on black, of full contrast unless it had enough: (h, w) in [0, 1]."""
    low, high = grey.min(), grey.max()
    if high - low < FAINT:
        grey = (grey - low) / (high - low)
    border = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    return 1 - grey if np.median(border) > 0.5 else grey


def _framed(ink: np.ndarray, frame: Frame, side: int) -> np.ndarray:
    """Return a digit of the size and in the place that the data set gives it: (side, side)."""
    rows, columns = (np.flatnonzero((ink > 0.1).any(axis=axis)) for axis in (1, 0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    if ink.shape == (side, side) and abs(max(bottom - top, right - left) - frame.box) <= 2:
        return ink  # made so already
    digit = ink[top:bottom, left:right]
    scale = frame.box / max(digit.shape)
    digit = _resize(digit, *(max(1, round(length * scale)) for length in digit.shape))
    centre = [length / 2 for length in digit.shape]
    if frame.by_mass:
        mass = digit.clip(0)
        centre = [float(np.average(np.arange(n) + 0.5, weights=mass.sum(axis=1 - axis)))
                  for axis, n in enumerate(digit.shape)]  # fmt: skip
    corner = [int(np.clip(round(side / 2 - c), 0, side - n)) for c, n in zip(centre, digit.shape, strict=True)]
    framed = np.zeros((side, side))
    framed[corner[0] : corner[0] + digit.shape[0], corner[1] : corner[1] + digit.shape[1]] = digit
    return framed


def _fit(plane: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return the middle part of the wanted shape, scaled: (h, w) -> (height, width)."""
    image = Image.fromarray(plane.astype(np.float32))
    return np.asarray(ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR))


def _resize(plane: np.ndarray, height: int, width: int) -> np.ndarray:
    image = Image.fromarray(plane.astype(np.float32))
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
