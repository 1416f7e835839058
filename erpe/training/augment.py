"""Variations of training images, a batch at a time, on the device, each image its own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor
from torch.nn.functional import pad

from erpe.config import DATASETS, DataConfig
from erpe.training.vision import torchvision

SHIFT = {"digits": 1, "mnist": 2, "cifar10": 4}
"""Largest shift of an image in pixels."""

Augment = Callable[[Tensor, Generator], Tensor]
Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def augmentation(config: DataConfig) -> Augment:
    """uint8 (B, channels, height, width) -> the same, varied; one generator decides the shifts and flips.

    The policies of torchvision draw from torch's global generator, which the loop seeds each epoch.
    """
    if config.augment == "none":
        return lambda pixels, generator: pixels
    policy = _policy(config.augment)

    def vary(pixels: Tensor, generator: Generator) -> Tensor:
        pixels = shift(pixels, SHIFT[config.dataset], generator)
        if config.dataset == "cifar10":
            pixels = flip(pixels, generator)
        return pixels if policy is None else torch.stack([policy(image) for image in pixels])

    return vary


def mixing(config: DataConfig) -> Mix:
    """Images and labels (B,) -> mixed images and class probabilities (B, classes), or both unchanged."""
    transforms, classes = [], DATASETS[config.dataset].classes
    if config.mixup:
        transforms.append(torchvision().transforms.v2.MixUp(alpha=config.mixup, num_classes=classes))
    if config.cutmix:
        transforms.append(torchvision().transforms.v2.CutMix(alpha=config.cutmix, num_classes=classes))
    if not transforms:
        return lambda images, labels: (images, labels)
    return torchvision().transforms.v2.RandomChoice(transforms)


def shift(pixels: Tensor, largest: int, generator: Generator) -> Tensor:
    """Move each image by up to `largest` pixels along both axes; black comes in at the border.

    Args:
        pixels: (B, channels, height, width).
    Returns:
        The same shape.
    """
    batch, _, height, width = pixels.shape
    drawn = torch.randint(2 * largest + 1, (2, batch, 1), generator=generator, dtype=torch.int64, device="cpu")
    offsets = _sent(drawn, pixels.device)
    rows = offsets[0] + torch.arange(height, dtype=torch.int64, device=pixels.device)  # (B, height)
    columns = offsets[1] + torch.arange(width, dtype=torch.int64, device=pixels.device)  # (B, width)
    images = torch.arange(batch, dtype=torch.int64, device=pixels.device)[:, None, None]
    padded = pad(pixels, (largest,) * 4).permute(0, 2, 3, 1)  # (B, height + 2s, width + 2s, c)
    return padded[images, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def flip(pixels: Tensor, generator: Generator) -> Tensor:
    """Mirror half of the images, left to right: (B, channels, height, width) -> the same shape."""
    drawn = torch.rand(len(pixels), generator=generator, dtype=torch.float32, device="cpu")
    chosen = _sent(drawn, pixels.device) < 0.5
    return torch.where(chosen[:, None, None, None], pixels.flip(-1), pixels)


def _sent(drawn: Tensor, device: torch.device) -> Tensor:
    """Numbers drawn on the CPU, on the device. Not waited for on CUDA, which stages pageable memory before it returns.

    Source: CUDA driver API, "API synchronization behavior".
    """
    return drawn.to(device, non_blocking=device.type == "cuda")


def _policy(name: str) -> Callable[[Tensor], Tensor] | None:
    if name == "standard":
        return None
    transforms = torchvision().transforms.v2
    return transforms.RandAugment() if name == "rand" else transforms.TrivialAugmentWide()
