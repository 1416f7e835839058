"""The training loop: a straight one, over images that lie on the device."""

from __future__ import annotations

import hashlib
import math
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from erpe.config import TrainConfig, TrialConfig
from erpe.errors import TrialError
from erpe.model import ViT
from erpe.training.augment import augmentation, mixing
from erpe.training.choices import NONE, Choices
from erpe.training.compilation import Compiled, Warn, compiled
from erpe.training.data import Images, batches, normalise
from erpe.training.graph import CudaGraphs, Graphed
from erpe.training.precision import Precision, autocast, pick_precision

CHECK_EVERY = 50
"""Steps between looks at the losses; each look waits for the device."""

SCALE = "scale", "_growth_tracker"
"""What GradScaler knows that is not a setting: in `GradScaler.state_dict`."""

OnStep = Callable[[int, int], None]
"""Called with the steps done and all steps of the epoch."""


def derive(*parts: int | str) -> int:
    """Return a seed for one purpose from a seed for all: the same parts, the same number."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")


def learning_rate(step: int, steps: int, train: TrainConfig) -> float:
    """Linear warm-up to the peak, then half a cosine to zero; `step` counts from 0."""
    warmup = max(1, round(train.warmup * steps))
    if step < warmup:
        return train.lr * (step + 1) / warmup
    return train.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


class Trainer:
    """A model and its optimiser, an epoch at a time. All randomness of epoch e comes from (seed, e)."""

    def __init__(
        self,
        config: TrialConfig,
        model: ViT,
        images: Images,
        device: torch.device,
        warn: Warn = warnings.warn,
        choices: Choices = NONE,
    ) -> None:
        self.config, self.model, self.images, self.device = config, model, images, device
        train = config.train
        self.steps = math.ceil(len(images.labels) / train.batch)
        """Steps an epoch."""
        self.parts = 1
        """Run a batch through the model in a number of parts: the same gradient up to rounding, in less memory."""
        self.compute_in(pick_precision(config, device))
        self.optimiser = torch.optim.AdamW(model.decay_groups(train.weight_decay), lr=train.lr, fused=True)
        self.averaged: AveragedModel | None = None
        if train.ema:
            self.averaged = AveragedModel(model)
        self.choices = choices
        self.graphs, self.pack_graphs = (self._graphs(variants) for variants in (choices.step, choices.pack))
        """What makes one graph of a step, of this trial or of a pack, where that was measured to be faster."""
        self.graphed: Graphed | None = None
        self.ran_as_graph = False
        """Whether a step was one graph, this trial's or that of its pack."""
        self.sdpa = set[str]()
        """Backends of torch's fused attention that steps asked for, here or in a pack."""
        self.pack_failed = ""
        """Why a pack that it was in was not compiled."""
        self.augment, self.mix = augmentation(config.data), mixing(config.data)
        self.vary = torch.Generator(device)
        """Decides how the images of a step are varied; on the device, as all that is drawn for a step."""
        self.fastest = partial(compiled, train=train, device=device, warn=warn)
        """Of a model what runs it fastest: itself, or compiled."""
        self.forward = self.fastest(model)
        self.evaluated = self.forward if self.final is model else self.fastest(self.final)
        """`final`, perhaps compiled."""
        self.packed: Callable[..., Tensor] | None = None
        """Several models of this shape as one, made by the first pack that this trainer leads."""
        self.planned: tuple[Tensor, Tensor] | None = None
        """See `batched.planned`."""
        self.warn = warn

    def _graphs(self, variants: tuple[str, ...]) -> CudaGraphs | None:
        return CudaGraphs() if self.config.model.variant in variants else None

    def compute_in(self, precision: Precision) -> None:
        """Train in this precision; in float16 the loss is scaled, as small gradients would vanish."""
        self.precision = precision
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "float16")

    @property
    def is_compiled(self) -> bool:
        """Whether all of it runs compiled, but for the short last batch of a pack: asked for, and none failed."""
        ways = self.forward, self.evaluated
        return not self.pack_failed and all(isinstance(each, Compiled) and not each.failed for each in ways)

    def note(self, sdpa: str | None, pack_failed: str = "") -> None:
        """Keep how an epoch's steps ran; a failure of its pack is told once."""
        self.sdpa.add(sdpa or "torch's choice")
        if pack_failed and not self.pack_failed:
            self.warn(pack_failed)
            self.pack_failed = pack_failed

    @property
    def final(self) -> ViT:
        """The model that is evaluated and kept: the averaged one, if weights are averaged."""
        return self.model if self.averaged is None else self.averaged.module  # type: ignore[return-value]

    def epoch(self, epoch: int, on_step: OnStep | None = None) -> dict[str, float]:
        """Train epoch `epoch` (from 0).

        Returns:
            `train/loss` (mean over images, with augmentation and label smoothing, nats), `lr` (of the last step),
            `time/epoch_seconds` (evaluation excluded).
        Raises:
            TrialError: the loss of a step is not finite.
        """
        torch.manual_seed(self.derive("dropout", epoch))
        self.model.train()
        started, losses, total, rate = time.perf_counter(), list[Tensor](), 0.0, 0.0
        for done, rows in enumerate(self.batches(epoch)):
            step = epoch * self.steps + done
            self.redraw(step)
            rate = self.rate(step)
            losses.append(self.step(rows, rate) * len(rows))
            if (done + 1) % CHECK_EVERY == 0 or done + 1 == self.steps:
                found = look(losses)
                check_finite(found, step)
                total += math.fsum(found)
                losses.clear()
            if on_step:
                on_step(done + 1, self.steps)
        self.note(self.choices.backend(self.config, self.precision))
        mean = total / len(self.images.labels)
        return {"train/loss": mean, "lr": rate, "time/epoch_seconds": time.perf_counter() - started}

    def derive(self, purpose: str, turn: int) -> int:
        """Return the seed of one purpose in an epoch, or a step."""
        return derive(self.config.seed, purpose, turn)

    def batches(self, epoch: int) -> Iterator[Tensor]:
        """Places of the images of each step of an epoch; what varies them is that epoch's, too."""
        order = torch.Generator(self.device).manual_seed(self.derive("order", epoch))
        self.vary.manual_seed(self.derive("augment", epoch))
        yield from batches(len(self.images.labels), self.config.train.batch, order)

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0 over all epochs."""
        return learning_rate(step, self.config.train.epochs * self.steps, self.config.train)

    def inputs(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images at `rows`, varied and normalised, (B, channels, height, width), and what they show.

        Returns:
            their classes (B,), or where images are mixed the probabilities of the classes (B, classes).
        """
        pixels = self.augment(self.images.pixels[rows], self.vary)
        return self.mix(normalise(pixels, self.config.data.dataset), self.images.labels[rows], self.vary)

    def step(self, rows: Tensor, rate: float) -> Tensor:
        """One step of AdamW on the images at `rows`; returns the loss, still on the device."""
        first = self.averaged is not None and self.averaged.n_averaged == 0  # which copies instead of averaging
        whole = len(rows) == self.config.train.batch and self.parts == 1 and not self.scaler.is_enabled()
        if self.graphs is None or first or not whole:
            loss = self.descend(rows, rate)
        else:
            if self.graphed is None:
                self.graphed = Graphed(self.descend, self._written, [self.vary], self.graphs)
                for group in self.optimiser.param_groups:
                    group["capturable"] = self.device.type == "cuda"
            self.ran_as_graph = True
            loss = self.graphed(rows, torch.full((), rate, dtype=torch.float32, device=self.device))
        if self.averaged is not None:
            self.averaged.n_averaged += 1
        return loss

    def descend(self, rows: Tensor, rate: float | Tensor) -> Tensor:
        """Do the work of `step`, but for its choices and its counter."""
        train = self.config.train
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        images, labels = self.inputs(rows)
        self.optimiser.zero_grad(set_to_none=True)
        loss = torch.zeros((), dtype=torch.float32, device=self.device)
        for some, theirs in zip(images.chunk(self.parts), labels.chunk(self.parts), strict=True):
            with autocast(self.precision, self.device), self.choices.sdpa(self.config, self.precision):
                mean = cross_entropy(self.forward(some).float(), theirs, label_smoothing=train.label_smoothing)
            part = mean * (len(some) / len(images))
            self.scaler.scale(part).backward()
            loss += part.detach()
        if train.clip_norm:
            self.scaler.unscale_(self.optimiser)
            nn.utils.clip_grad_norm_(self.model.parameters(), train.clip_norm)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        if self.averaged is not None:
            self._average(self.averaged)
        return loss

    @torch.no_grad()
    def _average(self, averaged: AveragedModel) -> None:
        """Do what `AveragedModel.update_parameters` does, but for its counter, which it copies to the device."""
        old, new = list(averaged.module.parameters()), list(self.model.parameters())
        if averaged.n_averaged == 0:
            for one, other in zip(old, new, strict=True):
                one.copy_(other)
        else:
            get_ema_multi_avg_fn(self.config.train.ema)(old, new, averaged.n_averaged)
        for kept, now in zip(averaged.module.buffers(), self.model.buffers(), strict=True):
            kept.copy_(now)

    def _written(self) -> list[Tensor]:
        """All that a step writes."""
        averaged = [] if self.averaged is None else self.averaged.module.parameters()
        moments = (x for slot in self.optimiser.state.values() for x in slot.values())
        return [*self.model.parameters(), *averaged, *moments]

    def redraw(self, step: int) -> bool:
        """Draw new random features every `train.redraw` steps; a step's depend on the seed and the step alone."""
        every = self.config.train.redraw
        due = bool(every and step and step % every == 0)
        if due:
            place = "cpu" if self.device.type == "mps" else self.device  # MPS has no float64
            self.model.redraw(torch.Generator(place).manual_seed(self.derive("features", step)))
        return due

    def state(self) -> dict[str, Tensor]:
        """All tensors that the next epoch needs, by name."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        if self.averaged is not None:
            tensors |= {f"averaged.{name}": tensor for name, tensor in self.averaged.state_dict().items()}
        for name, parameter in self._slots():
            tensors |= {f"adam.{name}.{key}": value for key, value in self.optimiser.state[parameter].items()}
        scale = {name: x for name, x in self.scaler.state_dict().items() if name in SCALE}
        sent = {name: torch.tensor(float(x), dtype=torch.float64, device="cpu") for name, x in scale.items()}
        return tensors | {f"scale.{name}": x for name, x in sent.items()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take up what `state` gave.

        Raises:
            RuntimeError, KeyError: the tensors are of another configuration.
        """
        part = {kind: _below(tensors, kind) for kind in ("model", "averaged", "adam", "scale")}
        self.model.load_state_dict(part["model"])
        if self.averaged is not None:
            self.averaged.load_state_dict(part["averaged"])
        for name, parameter in self._slots():
            slot = _below(part["adam"], name)
            found = {key: (x.shape, x.dtype) for key, x in slot.items() if key != "step"}
            if slot and found != dict.fromkeys(("exp_avg", "exp_avg_sq"), (parameter.shape, parameter.dtype)):
                raise RuntimeError(f"the optimiser's state of {name} is that of another model")
            self.optimiser.state[parameter] = {
                key: value if key == "step" and self.device.type == "cpu" else value.to(self.device)
                for key, value in slot.items()
            }

        if self.scaler.is_enabled():
            scale, steps = (part["scale"][name].item() for name in SCALE)
            self.scaler.load_state_dict(self.scaler.state_dict() | {SCALE[0]: scale, SCALE[1]: int(steps)})

    def _slots(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self.model.named_parameters()


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{prefix}."): x for name, x in tensors.items() if name.startswith(f"{prefix}.")}


def look(losses: list[Tensor], dim: int = 0) -> Any:
    """What is in the stacked losses, waiting for the device: the only look that an epoch takes."""
    return torch.stack(losses, dim).tolist()


def check_finite(losses: list[float], last_step: int) -> None:
    """Raise TrialError if one is not finite, with the first such step; `last_step` is that of the last one."""
    for place, loss in enumerate(losses):
        if not math.isfinite(loss):
            step = last_step - len(losses) + 1 + place
            raise TrialError(f"the loss of step {step} is not finite; use a smaller train.lr or train.clip_norm")
