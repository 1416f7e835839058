"""Variations of training images, a batch at a time, on the device, each image its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn.functional import one_hot, pad

from erpe.config import DataConfig
from erpe.training.data import constants
from erpe.training.policies import Policy

ERASED, ASPECT, TRIES = (0.02, 0.33), (0.3, 3.3), 10
"""Of an erased rectangle: its part of the image, its height over its width, and the draws of a size that fits."""

SHARES = 4096
"""Shares of mixtures, equally likely, of which a batch takes one."""

Augment = Callable[[Tensor, Generator], Tensor]
Mix = Callable[[Tensor, Tensor, Generator], tuple[Tensor, Tensor]]


def augmentation(config: DataConfig) -> Augment:
    """uint8 (B, channels, height, width) -> the same, varied; one generator of their device decides all of it."""
    facts, steps = config.facts, list[Augment]()
    if config.augment != "none":
        steps.append(lambda pixels, generator: shift(pixels, facts.shift, generator))
        if facts.flips if config.flips is None else config.flips:
            steps.append(flip)
    if config.augment == "rand" or config.augment == "trivial":
        steps.append(Policy(config.augment, facts.image[1:]))
    if config.erase:
        steps.append(lambda pixels, generator: erase(pixels, config.erase, facts.mean, generator))

    def vary(pixels: Tensor, generator: Generator) -> Tensor:
        for step in steps:
            pixels = step(pixels, generator)
        return pixels

    return vary


def mixing(config: DataConfig) -> Mix:
    """Images, labels (B,) -> mixed images and class probabilities (B, classes), or both unchanged.

    Each image takes the one before it as its partner; a batch has one share, or one rectangle, and where both kinds are
    wanted either is as likely: torchvision's MixUp and CutMix, drawn on the device.
    """
    kinds = [(make, quantiles(alpha)) for make, alpha in ((blend, config.mixup), (paste, config.cutmix)) if alpha]
    if not kinds:
        return lambda images, labels, generator: (images, labels)

    def mix(images: Tensor, labels: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        draws = torch.rand(4, 1, generator=generator, dtype=torch.float32, device=images.device)
        found = []
        for place, (make, shares) in enumerate(kinds):
            kinds[place] = make, shares = make, shares.to(images.device)  # there from the first batch on
            found.append(make(shares[(draws[0] * len(shares)).long()], draws[1:3], *images.shape[2:]))
        own = torch.where(draws[3] < 0.5, found[0], found[-1])  # (height, width)
        classes = one_hot(labels, config.facts.classes).float()
        mixed = [torch.lerp(x.roll(1, 0), x, part) for x, part in ((images, own), (classes, own.mean()))]
        return mixed[0], mixed[1]

    return mix


def quantiles(alpha: float) -> Tensor:
    """Return shares that are equally likely under Beta(alpha, alpha)."""
    from scipy.special import betaincinv

    middles = (torch.arange(SHARES, dtype=torch.float64, device="cpu") + 0.5) / SHARES
    return torch.from_numpy(betaincinv(alpha, alpha, middles.numpy())).float()


def blend(share: Tensor, _: Tensor, height: int, width: int) -> Tensor:
    """Return what images keep of their own at each pixel, (height, width): everywhere the share (1).

    Source: Zhang et al. 2018 (mixup), arXiv 1710.09412.
    """
    return share.expand(height, width)


def paste(share: Tensor, middle: Tensor, height: int, width: int) -> Tensor:
    """As `blend`: nothing in a rectangle of the other part of the area, around a place (2, 1), all outside of it.

    Source: Yun et al. 2019 (CutMix), arXiv 1905.04899.
    """
    inside = []
    for side, at in zip((height, width), middle, strict=True):
        half, centre = (0.5 * (1 - share).sqrt() * side).long(), (at * side).long()
        place = torch.arange(side, dtype=torch.int64, device=share.device)
        inside.append((centre - half <= place) & (place < centre + half))
    return 1 - (inside[0][:, None] & inside[1]).float()


def shift(pixels: Tensor, largest: int, generator: Generator) -> Tensor:
    """Move each image by up to `largest` pixels along both axes; black comes in at the border.

    Args:
        pixels: (B, channels, height, width).
    Returns:
        The same shape.
    """
    batch, _, height, width = pixels.shape
    drawn: Any = {"generator": generator, "dtype": torch.int64, "device": pixels.device}
    offsets = torch.randint(2 * largest + 1, (2, batch, 1), **drawn)
    rows = offsets[0] + torch.arange(height, dtype=torch.int64, device=pixels.device)  # (B, height)
    columns = offsets[1] + torch.arange(width, dtype=torch.int64, device=pixels.device)  # (B, width)
    images = torch.arange(batch, dtype=torch.int64, device=pixels.device)[:, None, None]
    padded = pad(pixels, (largest,) * 4).permute(0, 2, 3, 1)  # (B, height + 2s, width + 2s, c)
    return padded[images, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def flip(pixels: Tensor, generator: Generator) -> Tensor:
    """Mirror half of the images, left to right: (B, channels, height, width) -> the same shape."""
    chosen = torch.rand(len(pixels), generator=generator, dtype=torch.float32, device=pixels.device) < 0.5
    return torch.where(chosen[:, None, None, None], pixels.flip(-1), pixels)


def erase(pixels: Tensor, probability: float, colour: tuple[float, ...], generator: Generator) -> Tensor:
    """Paint a rectangle over some of the images: torchvision's RandomErasing, sizes and places alike.

    Args:
        pixels: (B, channels, height, width) uint8.
        probability: that an image gets one.
        colour: of the rectangle, a number in [0, 1] a channel.
    Returns:
        The same shape.
    Source: Zhong et al. 2017, arXiv 1708.04896.
    """
    batch, _, height, width = pixels.shape
    boxes = _boxes(batch, height, width, probability, generator, pixels.device)
    (top, left), (bottom, right) = boxes[..., None, None, None]  # each (B, 1, 1, 1)
    y, x = (torch.arange(size, dtype=torch.int64, device=pixels.device) for size in (height, width))
    inside = (top <= y[:, None]) & (y[:, None] < bottom) & (left <= x) & (x < right)  # (B, 1, height, width)
    paint = constants(tuple(round(255 * part) for part in colour), torch.uint8, pixels.device)  # (channels)
    return torch.where(inside, paint[:, None, None], pixels)


def _boxes(
    batch: int, height: int, width: int, probability: float, generator: Generator, device: torch.device
) -> Tensor:
    """First and last row and column but one of rectangles, (2, 2, B); both the same where there is none."""
    wide = torch.float32 if device.type == "mps" else torch.float64
    draws = torch.rand(3 + 2 * TRIES, batch, generator=generator, dtype=wide, device=device)
    chosen, places, (parts, logs) = draws[0] < probability, draws[1:3], draws[3:].view(2, TRIES, batch)
    area = height * width * (ERASED[0] + (ERASED[1] - ERASED[0]) * parts)  # (TRIES, B)
    low, high = (math.log(end) for end in ASPECT)
    aspect = (low + (high - low) * logs).exp()
    image = constants((height, width), torch.int64, device)[:, None]  # (2, 1)
    sizes = torch.stack([(area * aspect).sqrt(), (area / aspect).sqrt()]).round().long()  # (2, TRIES, B)
    fits = (sizes < image[..., None]).all(0)
    sizes = sizes[
        :, fits.byte().argmax(0), torch.arange(batch, dtype=torch.int64, device=device)
    ]  # the first that fits
    sizes = sizes * (chosen & fits.any(0))
    starts = (places * (image - sizes + 1)).long()
    return torch.stack([starts, starts + sizes])
