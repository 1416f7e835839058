"""What a whole Vision Transformer costs, forward and as a training step, against the one with softmax attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from erpe.bench.timing import compete, machine
from erpe.config import TrialConfig, defaults
from erpe.model import ViT, build
from erpe.training.compilation import compiled
from erpe.training.devices import pick_device
from erpe.training.precision import autocast, pick_precision


def bench_models(
    variants: list[str], dataset: str, *, rounds: int = 7, settings: dict[str, Any] | None = None, device: str = "auto"
) -> dict[str, Any]:
    """Images a second of each variant's Vision Transformer, in interleaved rounds; the first is that of softmax.

    Args:
        settings: dotted names, as `model.width` and `train.batch`, that all have.
    Returns:
        `machine`, and rows as `compete` gives them, each with `pass` (`forward`: evaluation; `step`: forward,
        backward, clipping and optimiser, on one batch that lies on the device) and `images_per_second`.
    """
    where = pick_device(device)
    base = defaults("softmax", dataset).replace(settings or {})
    generator = torch.Generator().manual_seed(0)
    batch, drawn = base.train.batch, dict[str, Any](generator=generator, device="cpu")
    images = torch.randn(batch, *base.model.image, dtype=torch.float32, **drawn).to(where)
    labels = torch.randint(0, base.model.classes, (batch,), dtype=torch.int64, **drawn).to(where)
    configs = {name: base.replace({"model.variant": name}) for name in dict.fromkeys(["softmax", *variants])}
    models = {name: build(config.model).to(where) for name, config in configs.items()}
    forwards = {name: forward(models[name], configs[name], images) for name in configs}
    steps = {name: step(models[name], configs[name], images, labels) for name in configs}
    rows = [
        {"pass": what} | row | {"images_per_second": 1000 * base.train.batch / row["ms"]}
        for what, calls in {"forward": forwards, "step": steps}.items()
        for row in compete(calls, rounds, where)
    ]
    sizes = {name: getattr(base.model, name) for name in ("image", "patch", "width", "depth", "heads")}
    return {"machine": machine(where) | sizes | {"batch": base.train.batch, "dataset": dataset}, "rows": rows}


def forward(model: ViT, config: TrialConfig, images: Tensor) -> Callable[[], None]:
    """Run a forward pass as in evaluation: in float32."""
    fast = compiled(model, config.train, images.device)

    def call() -> None:
        model.eval()
        with torch.inference_mode():
            fast(images)

    return call


def step(model: ViT, config: TrialConfig, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """Run a training step, input to optimiser: no data are chosen or augmented."""
    train = config.train
    fast, precision = compiled(model, train, images.device), pick_precision(config, images.device)
    optimiser = torch.optim.AdamW(model.decay_groups(train.weight_decay), lr=train.lr, fused=True)

    def call() -> None:
        model.train()
        with autocast(precision, images.device):
            loss = cross_entropy(fast(images).float(), labels, label_smoothing=train.label_smoothing)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.clip_norm)
        optimiser.step()

    return call
