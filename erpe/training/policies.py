"""RandAugment and TrivialAugment (wide), a batch at a time: each image its own operation and strength.

    policy = Policy("rand", (32, 32))
    varied = policy(pixels, generator)      # (B, channels, height, width) uint8 -> the same

A move is an operation at one strength. A policy is rounds of moves that are all equally likely, so one number an image
and round is drawn, where the images are. A CPU then gathers the images of each operation; other devices, which would
have to be waited for, pass all images through each operation and keep what was asked for.

Moves and pixels are those of torchvision's `transforms.v2` RandAugment() and TrivialAugmentWide() on single images:
nearest pixels, black where nothing comes in. Colours are equal to the bit; a rotation whose source lies halfway between
two pixels may take the other one.

Sources: Cubuk et al. 2020, arXiv 1909.13719; Müller and Hutter 2021, arXiv 2103.10158; torchvision 0.28.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Generator, Tensor
from torch.nn.functional import avg_pool2d, grid_sample

GEOMETRY = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
BLENDS = ("brightness", "color", "contrast", "sharpness")
OPERATIONS = ("identity", *GEOMETRY, *BLENDS, "posterize", "solarize", "autocontrast", "equalize")

BINS = 31
"""Strengths of an operation, from none to the largest."""
RAND_ROUNDS, RAND_BIN = 2, 9
"""Operations in a row of RandAugment, and the strength of all of them."""


def strengths(name: Literal["rand", "trivial"], operation: str, size: tuple[int, int]) -> Tensor:
    """All strengths of an operation in a policy, both signs where it has one: (1 or 2, `BINS`) float32.

    Shears are slopes, translations pixels (of an image of `size`: height, width), rotations degrees, counterclockwise;
    blends go from the image (0) away from (above) or towards (below) its degenerate; posterize keeps a number of bits;
    solarize inverts from this part of white; 0 for what has no strength.
    """
    height, width = size
    wide = name == "trivial"
    largest = dict.fromkeys(BLENDS, 0.99 if wide else 0.9)
    largest |= dict.fromkeys(("shear_x", "shear_y"), 0.99 if wide else 0.3)
    largest |= {"rotate": 135.0 if wide else 30.0}
    largest |= {"translate_x": 32.0 if wide else 150 / 331 * width, "translate_y": 32.0 if wide else 150 / 331 * height}
    if operation in largest:
        found = torch.linspace(0, largest[operation], BINS, dtype=torch.float32, device="cpu")
        return torch.stack([found, -found])
    if operation == "posterize":
        return torch.linspace(8, 2 if wide else 4, BINS, dtype=torch.float32, device="cpu").round()[None]
    if operation == "solarize":
        return torch.linspace(1, 0, BINS, dtype=torch.float32, device="cpu")[None]
    return torch.zeros(1, BINS, dtype=torch.float32, device="cpu")


class Policy:
    """`rand`: RandAugment, two operations at one strength; `trivial`: TrivialAugment, one at any strength."""

    def __init__(self, name: Literal["rand", "trivial"], size: tuple[int, int]) -> None:
        self.rounds = RAND_ROUNDS if name == "rand" else 1
        self.moves: list[tuple[str, float]] = []
        """Operations with their strengths; twice where there is no sign, so that operations are equally likely."""
        for operation in OPERATIONS:
            found = strengths(name, operation, size)
            found = found[:, RAND_BIN, None] if name == "rand" else found
            self.moves += [(operation, strength) for strength in found.expand(2, -1).flatten().tolist()]
        kinds = ["identity", *BATCHED]
        places = [kinds.index("warp" if name in GEOMETRY else name) for name, _ in self.moves]
        self.kinds = torch.tensor(places, dtype=torch.int64, device="cpu")  # (moves)
        numbers = [_numbers(*move, size) for move in self.moves]
        self.numbers = torch.tensor(numbers, dtype=torch.float32, device="cpu")  # (moves, 6)

    def __call__(self, pixels: Tensor, generator: Generator) -> Tensor:
        """Vary each image of (B, channels, height, width) uint8 by moves of its own."""
        return self.apply(pixels, self.draw(len(pixels), generator))

    def draw(self, count: int, generator: Generator) -> Tensor:
        """Return moves of a number of images, (rounds, count) places in `moves`, on the generator's device."""
        drawn: dict[str, Any] = {"generator": generator, "dtype": torch.int64, "device": generator.device}
        return torch.randint(len(self.moves), (self.rounds, count), **drawn)

    def apply(self, pixels: Tensor, drawn: Tensor, gather: bool | None = None) -> Tensor:
        """Make the moves (rounds, B) of images (B, channels, height, width).

        Args:
            gather: the images of each operation, instead of making all operations of all; default: on a CPU.
        """
        gather = pixels.is_cpu if gather is None else gather
        self.kinds, self.numbers = (x.to(pixels.device) for x in (self.kinds, self.numbers))  # there from now on
        for moves in drawn:
            kinds, numbers, varied = self.kinds[moves], self.numbers[moves], pixels.clone()
            for kind, operation in enumerate(BATCHED.values(), 1):
                chosen = kinds == kind
                if gather:
                    varied[chosen] = operation(pixels[chosen], numbers[chosen])
                else:
                    varied = torch.where(chosen[:, None, None, None], operation(pixels, numbers), varied)
            pixels = varied
        return pixels


def _numbers(operation: str, strength: float, size: tuple[int, int]) -> tuple[float, ...]:
    """Return what `BATCHED` takes of a move: where pixels come from, or the strength, padded to six numbers."""
    height, width = size
    sin, cos = math.sin(math.radians(strength)), math.cos(math.radians(strength))
    matrices = {
        "shear_x": (1, strength, strength * height / 2, 0, 1, 0),
        "shear_y": (1, 0, 0, strength, 1, strength * width / 2),
        "translate_x": (1, 0, -int(strength), 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, -int(strength)),
        "rotate": (cos, -sin, 0, sin, cos, 0),
    }
    return matrices.get(operation, (strength, 0, 0, 0, 0, 0))


# Each takes images (n, channels, height, width) uint8 and six numbers an image, (n, 6) float32


def warp(images: Tensor, numbers: Tensor) -> Tensor:
    """Take pixel (x, y), counted from the centre, from (a x + b y + c, d x + e y + f); black from outside."""
    height, width = images.shape[-2:]
    x = torch.arange(width, device=images.device, dtype=torch.float32) - (width - 1) / 2  # (width)
    y = torch.arange(height, device=images.device, dtype=torch.float32)[:, None] - (height - 1) / 2  # (height, 1)
    a, b, c, d, e, f = numbers.T[..., None, None]  # (n, 1, 1)
    grid = torch.stack([(a * x + b * y + c) / (width / 2), (d * x + e * y + f) / (height / 2)], dim=-1)
    return grid_sample(images.float(), grid, mode="nearest", align_corners=False).to(images.dtype)


def brightness(images: Tensor, numbers: Tensor) -> Tensor:
    """Away from black: x (1 + s)."""
    return _grey_levels(images * (1 + _strength(numbers)))


def color(images: Tensor, numbers: Tensor) -> Tensor:
    """Away from the image in grey."""
    return images if images.shape[1] == 1 else _blend(images.float(), _grey(images), numbers)


def contrast(images: Tensor, numbers: Tensor) -> Tensor:
    """Away from the mean grey."""
    return _blend(images.float(), _grey(images).mean((1, 2, 3), keepdim=True), numbers)


def sharpness(images: Tensor, numbers: Tensor) -> Tensor:
    """Away from the image smoothed by a 3 x 3 window whose centre weighs 5 of 13; the border stays."""
    sharp = images.float()
    inner = sharp[..., 1:-1, 1:-1]
    smooth = ((9 * avg_pool2d(sharp, 3, stride=1) + 4 * inner) / 13).round()  # never near a half: 13 is odd
    inner.copy_(torch.addcmul(inner, smooth - inner, -_strength(numbers)))
    return _grey_levels(sharp)


def posterize(images: Tensor, numbers: Tensor) -> Tensor:
    """Keep the s highest of the eight bits."""
    return images & (256 - torch.exp2(8 - _strength(numbers))).to(torch.uint8)


def solarize(images: Tensor, numbers: Tensor) -> Tensor:
    """Invert what is s of white or brighter."""
    return torch.where(images >= 255 * _strength(numbers), ~images, images)


def autocontrast(images: Tensor, _: Tensor) -> Tensor:
    """Stretch each channel from black to white; one of a single colour stays."""
    floats = images.float()
    low, high = floats.amin((2, 3), keepdim=True), floats.amax((2, 3), keepdim=True)
    return torch.where(high > low, _grey_levels((floats - low) / ((high - low) * (1 / 255))), images)


def equalize(images: Tensor, _: Tensor) -> Tensor:
    """Map the levels of each channel so that all occur about as often, as Pillow does."""
    flat = images.flatten(2).long()  # (n, channels, height width)
    counts = torch.zeros(*flat.shape[:2], 256, dtype=torch.long, device=images.device)
    counts.scatter_add_(2, flat, torch.ones_like(flat))
    step = (flat.shape[2] - counts.gather(2, flat.amax(2, keepdim=True))) // 255  # (n, channels, 1)
    below = counts.cumsum(2) - counts
    levels = ((below + step // 2) // step.clamp(min=1)).clamp(max=255)
    return torch.where(step > 0, levels.gather(2, flat), flat).to(images.dtype).view_as(images)


BATCHED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    operation.__name__: operation
    for operation in (warp, brightness, color, contrast, sharpness, posterize, solarize, autocontrast, equalize)
}
"""What changes images, by name; the five operations of `GEOMETRY` are one."""


def _strength(numbers: Tensor) -> Tensor:
    return numbers[:, 0, None, None, None]  # (n, 1, 1, 1)


def _grey_levels(floats: Tensor) -> Tensor:
    return floats.clamp(0, 255).to(torch.uint8)


def _grey(images: Tensor) -> Tensor:
    """(n, channels, height, width) uint8 -> (n, 1, height, width), whole numbers in float32."""
    if images.shape[1] == 1:
        return images.float()
    red, green, blue = images.float().split(1, dim=1)
    return (0.2989 * red).add(green, alpha=0.587).add(blue, alpha=0.114).floor()


def _blend(images: Tensor, degenerate: Tensor, numbers: Tensor) -> Tensor:
    """x (1 + s) - degenerate s, rounded as torchvision does: the second product is not."""
    strength = _strength(numbers)
    return _grey_levels(torch.addcmul(images * (1 + strength), degenerate, -strength))
