"""What a training step costs: erpe's loop against a bare one over torch's own transformer, in the same run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from erpe.bench.timing import compete, machine
from erpe.config import ModelConfig, TrialConfig, defaults
from erpe.model import build
from erpe.training.data import Images, batches, normalise
from erpe.training.devices import pick_device
from erpe.training.loop import Trainer
from erpe.training.precision import autocast, pick_precision

STEPS = 10
"""Steps a round."""
ENDLESS = {"train.epochs": 10_000}
"""More than a measurement needs."""


class Bare(nn.Module):
    """The same Vision Transformer from torch's `nn.TransformerEncoder`: patches by convolution, mean pooling."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        (h, w), width = config.grid, config.width
        place: Any = {"dtype": torch.float32, "device": "cpu"}
        self.embed = nn.Conv2d(config.image[0], width, config.patch, config.patch, **place)
        self.position = nn.Parameter(torch.zeros(1, h * w, width, **place))
        hidden, ways = round(width * config.mlp_ratio), {"batch_first": True, "norm_first": True} | place
        layer = nn.TransformerEncoderLayer(width, config.heads, hidden, 0.0, "gelu", **ways)
        norm = nn.LayerNorm(width, **place)
        self.encoder = nn.TransformerEncoder(layer, config.depth, norm, enable_nested_tensor=False)
        self.head = nn.Linear(width, config.classes, **place)

    def forward(self, images: Tensor) -> Tensor:
        """(B, channels, height, width) -> (B, classes)."""
        x = self.embed(images).flatten(2).transpose(1, 2) + self.position
        return self.head(self.encoder(x).mean(dim=1))


def bare_epoch(model: nn.Module, config: TrialConfig, images: Images, device: torch.device) -> Callable[[], None]:
    """Train an epoch as one would by hand: shuffle, normalise, forward, backward, clip, step; no augmentation."""
    train, precision = config.train, pick_precision(config, device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=train.lr, weight_decay=train.weight_decay, fused=True)

    def epoch() -> None:
        for rows in batches(len(images.labels), train.batch, torch.Generator(device).manual_seed(0)):
            pixels, labels = images.pixels[rows], images.labels[rows]
            with autocast(precision, device):
                logits = model(normalise(pixels, config.data.dataset))
                loss = cross_entropy(logits, labels, label_smoothing=train.label_smoothing)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), train.clip_norm)
            optimiser.step()
        loss.item()  # waits for the device

    return epoch


def bench_training(
    variants: list[str], dataset: str, *, rounds: int = 7, settings: dict[str, Any] | None = None, device: str = "auto"
) -> dict[str, Any]:
    """Milliseconds of a training step of each variant and of the bare loop, in interleaved rounds.

    Returns:
        `machine`, and a row for each loop: `name`, `ms` (median), `low`, `high` (over the rounds after the first,
        which warms up), `ratio` (of medians, to the bare loop), `n` rounds.
    """
    where = pick_device(device)
    base = defaults("softmax", dataset).replace(settings or {})
    images = imagined(base, STEPS).to(where)
    loops = {"nn.TransformerEncoder, bare loop": bare_epoch(Bare(base.model).to(where), base, images, where)}
    for variant in variants:
        config = base.replace({"model.variant": variant} | ENDLESS)
        loops[variant] = epochs_of(Trainer(config, build(config.model).to(where), images, where))
    rows = compete(loops, rounds, where)
    for row in rows:
        row |= {key: row[key] / STEPS for key in ("ms", "low", "high")}
    return {"machine": machine(where) | {"batch": base.train.batch, "dataset": dataset}, "rows": rows}


def imagined(config: TrialConfig, steps: int) -> Images:
    """Noise of the data set's form, enough for the given number of steps an epoch."""
    generator, count = torch.Generator().manual_seed(0), steps * config.train.batch
    shape = (count, *config.model.image)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator, device="cpu")
    labels = torch.randint(0, config.model.classes, (count,), dtype=torch.int64, generator=generator, device="cpu")
    return Images(pixels, labels)


def epochs_of(trainer: Trainer) -> Callable[[], None]:
    """Train the next epoch at each call."""
    done = iter(range(10**9))

    def epoch() -> None:
        trainer.epoch(next(done))

    return epoch
