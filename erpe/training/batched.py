"""Several trials of one shape trained as one batched program, each as it would be alone, up to rounding.

    results = Pack([trial.trainer for trial in trials]).epoch([len(trial.history) for trial in trials])

An epoch begins by stacking what the trainers have and ends by giving it back: between epochs nothing is packed, so
trials come and go, and their checkpoints are those of any other trial. What differs between trials is a vector over
the pack (the settings of the optimiser) or is drawn by each trial in its turn (all randomness). The models are compiled
as one where a trial alone would be.

A step is dearer by what batching costs and cheaper by the calls it saves, so packs pay where models are small.
Measured by `erpe bench pack` as processor time of one thread of an AMD EPYC that was busy (torch 2.13, float32,
n = 2 to 5), a trial's share over the trial alone:

    K                                    4             8             16
    digits, width 16, depth 2, batch 32  0.77                        0.54
    digits, width 32, depth 2            0.77 to 0.97  0.69 to 0.77  0.66 to 0.73
    digits, defaults: width 64, depth 4  0.97 to 1.09  0.85 to 1.00
    MNIST, defaults: N = 49              1.07 to 1.13

Ranges are over softmax, relu_general and favor_rope (MNIST: the first two; the first row: relu_general). GPUs were not
measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Generator, Tensor
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, one_hot

from erpe.errors import TrialError
from erpe.model.features import Features
from erpe.model.vit import Drop, ViT
from erpe.training.compilation import Compiled, is_wanted
from erpe.training.loop import CHECK_EVERY, OnStep, Trainer, check_finite
from erpe.training.precision import autocast
from erpe.training.vmap_attention import Fold

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8
"""Of torch.optim.AdamW."""


class Layout:
    """All parameters of a model as one row of P numbers, the decaying matrices first."""

    def __init__(self, trainer: Trainer) -> None:
        moving = set(trainer.optimiser.param_groups[0]["params"])
        named = sorted(trainer.model.named_parameters(), key=lambda item: item[1] not in moving)
        self.shapes = {name: parameter.shape for name, parameter in named}
        self.decaying = sum(parameter.numel() for parameter in moving)
        """How many of the numbers decay."""

    def stack(self, models: list[Mapping[str, Tensor]]) -> Tensor:
        """Return the tensors of K models, by name -> (K, P)."""
        return torch.stack([torch.cat([each[name].detach().flatten() for name in self.shapes]) for each in models])

    def parts(self, rows: Tensor) -> dict[str, Tensor]:
        """(..., P) -> views (..., *shape) by name."""
        parts = rows.split([shape.numel() for shape in self.shapes.values()], dim=-1)
        return {name: part.unflatten(-1, shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}


class Plan:
    """The numbers of each step of an epoch and each trial, as tensors (steps, K, 1) or (K, 1)."""

    def __init__(self, trainers: list[Trainer], firsts: list[int]) -> None:
        first, train = trainers[0], [trainer.config.train for trainer in trainers]

        def on_device(values: Tensor) -> Tensor:
            return values.to(first.device, precision(first)).unsqueeze(-1)

        def vector(name: str) -> Tensor:
            return torch.tensor([getattr(each, name) for each in train], dtype=torch.float64, device="cpu")

        steps = torch.arange(1, first.steps + 1, dtype=torch.float64, device="cpu")[:, None]  # (steps, 1)
        steps = steps + torch.tensor(firsts, dtype=torch.float64, device="cpu")  # (steps, K)
        rates = [
            [t.rate(begin + step) for t, begin in zip(trainers, firsts, strict=True)] for step in range(len(steps))
        ]
        rate = torch.tensor(rates, dtype=torch.float64, device="cpu")
        self.shrink = on_device(1 - rate * vector("weight_decay"))
        self.length = on_device(rate / (1 - BETA1**steps))
        self.root = on_device((1 - BETA2**steps).sqrt())
        self.take = on_device(torch.where(steps == 1, 1.0, 1 - vector("ema")))
        """How much of the weights the averaged weights take; the first average is the weights."""
        clip = vector("clip_norm")
        self.clip = on_device(torch.where(clip == 0, torch.inf, clip))
        self.smoothing = on_device(vector("label_smoothing"))[:, None]  # (K, 1, 1)


class Dice:
    """Torch's global randomness as one trial would have it alone."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self._places = [torch] if device.type == "cpu" else [torch, getattr(torch, device.type)]
        torch.manual_seed(seed)
        self._states = [place.get_rng_state() for place in self._places]

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Continue drawing in the block where the last one ended."""
        for place, state in zip(self._places, self._states, strict=True):
            place.set_rng_state(state)
        yield
        self._states = [place.get_rng_state() for place in self._places]


class Pack:
    """K trainers whose models and batches have the same shapes, and which train in the same precision."""

    def __init__(self, trainers: list[Trainer]) -> None:
        self.trainers, self.device = trainers, trainers[0].device
        self.layout = layout = Layout(trainers[0])
        self.weights = layout.stack([dict(t.model.named_parameters()) for t in trainers]).requires_grad_()  # (K, P)
        self.exp_avg, self.exp_avg_sq = (layout.stack([moments(t, key) for t in trainers]) for key in MOMENTS)
        self.averaged: Tensor | None = None
        if any(t.averaged for t in trainers):
            self.averaged = layout.stack([dict(t.final.named_parameters()) for t in trainers])  # (K, P)
        self.drops = [
            {f"{name}.noise": drop for name, drop in t.model.named_modules() if isinstance(drop, Drop) and drop.rate}
            for t in trainers
        ]
        self.buffers = drawn_buffers(trainers)
        first = trainers[0]
        if first.packed is None:  # kept: a pack is of one epoch
            plain = together(first.model, layout)
            wanted = is_wanted(first.config.train, first.device)
            first.packed = Compiled(plain, first.model, first.warn) if wanted else plain
        self.models = first.packed

    def epoch(self, epochs: list[int], on_step: OnStep | None = None) -> list[dict[str, float] | TrialError]:
        """Train epoch `epochs[k]` (from 0) of each trial k.

        Returns:
            What `Trainer.epoch` gives of each, the seconds divided by K; or the error it raises, and then this
            trial's trainer has not got the epoch's weights.
        """
        started, trainers, steps = time.perf_counter(), self.trainers, self.trainers[0].steps
        firsts = [epoch * steps for epoch in epochs]
        plan, dice = Plan(trainers, firsts), []
        for trainer, epoch in zip(trainers, epochs, strict=True):
            trainer.model.train()
            dice.append(Dice(trainer.derive("dropout", epoch), self.device))
        total, losses = torch.zeros(len(trainers), dtype=torch.float32, device=self.device), []
        errors: dict[int, TrialError] = {}
        batches = (trainer.batches(epoch) for trainer, epoch in zip(trainers, epochs, strict=True))
        for done, given in enumerate(zip(*batches, strict=True)):
            if any([t.redraw(first + done) for t, first in zip(trainers, firsts, strict=True)]):
                self.buffers = drawn_buffers(trainers)
            loss = self.step(given, dice, plan, done)
            losses.append(loss)
            total += loss * len(given[0][0])
            if (done + 1) % CHECK_EVERY == 0 or done + 1 == steps:
                errors = self._check(losses, [first + done for first in firsts]) | errors
                losses.clear()
            if on_step:
                on_step(done + 1, steps)
        means = (total / len(trainers[0].images.labels)).tolist()
        self._give_back(errors, [first + steps for first in firsts])
        seconds = (time.perf_counter() - started) / len(trainers)
        return [
            errors.get(k) or {"train/loss": means[k], "lr": t.rate(first + steps - 1), "time/epoch_seconds": seconds}
            for k, (t, first) in enumerate(zip(trainers, firsts, strict=True))
        ]

    def step(self, given: tuple[tuple[Tensor, Generator], ...], dice: list[Dice], plan: Plan, step: int) -> Tensor:
        """One step of AdamW of each trial, on images at places of its own; returns the losses (K,) on the device."""
        images, targets, noise = self._inputs(given, dice)
        targets = targets + plan.smoothing * (1 / targets.shape[-1] - targets)  # (K, B, classes)
        first = self.trainers[0]
        full = images.shape[1] == first.config.train.batch
        models = self.models if full else together(first.model, self.layout)
        with autocast(first.precision, self.device):
            logits = models(images, self.weights, self.buffers | noise)
            each = cross_entropy(logits.flatten(0, 1).float(), targets.flatten(0, 1), reduction="none")
        loss = each.view(targets.shape[:2]).mean(1)  # (K,)
        (gradient,) = torch.autograd.grad(loss.sum(), self.weights)
        self._descend(gradient, plan, step)
        return loss.detach()

    def _inputs(
        self, given: tuple[tuple[Tensor, Generator], ...], dice: list[Dice]
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Images (K, B, ...), probabilities of classes (K, B, classes), and what is dropped: all as drawn alone."""
        images, targets, noises = [], [], []
        for trainer, own, (rows, vary), drops in zip(self.trainers, dice, given, self.drops, strict=True):
            with own.turn():
                some, labels = trainer.inputs(rows, vary)
                noises.append({name: drop.draw(len(some), self.device) for name, drop in drops.items()})
            images.append(some)
            targets.append(labels if labels.is_floating_point() else one_hot(labels, trainer.config.model.classes))
        ones = {name: torch.ones_like(x) for noise in noises for name, x in noise.items()}
        noise = {name: torch.stack([(ones | noise)[name] for noise in noises]) for name in ones}
        return torch.stack(images), torch.stack(targets).to(self.weights.dtype), noise

    @torch.no_grad()
    def _descend(self, gradient: Tensor, plan: Plan, step: int) -> None:
        """Clip each row of the gradient (K, P), and step: torch's clip_grad_norm_, AdamW and averaged model in rows."""
        norm = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)  # (K, 1)
        gradient *= (plan.clip / (norm + 1e-6)).clamp(max=1)
        self.weights[:, : self.layout.decaying] *= plan.shrink[step]
        self.exp_avg.lerp_(gradient, 1 - BETA1)
        self.exp_avg_sq.mul_(BETA2).addcmul_(gradient, gradient, value=1 - BETA2)
        slope = self.exp_avg_sq.sqrt().div_(plan.root[step]).add_(EPS)
        self.weights.addcdiv_(self.exp_avg * -plan.length[step], slope)
        if self.averaged is not None:
            self.averaged.lerp_(self.weights, plan.take[step])

    @staticmethod
    def _check(losses: list[Tensor], last_steps: list[int]) -> dict[int, TrialError]:
        """Return the trials whose loss is not finite."""
        errors = {}
        for k, own in enumerate(torch.stack(losses, dim=1).cpu()):
            try:
                check_finite(list(own), last_steps[k])
            except TrialError as error:
                errors[k] = error
        return errors

    @torch.no_grad()
    def _give_back(self, errors: dict[int, TrialError], steps: list[int]) -> None:
        """To the trainers of all trials without an error what an epoch of their own would have left there."""
        for k, trainer in enumerate(self.trainers):
            if k in errors:
                continue
            weights, *found = (self.layout.parts(rows[k]) for rows in (self.weights, self.exp_avg, self.exp_avg_sq))
            for name, parameter in trainer.model.named_parameters():
                parameter.copy_(weights[name])
                step = torch.tensor(float(steps[k]), dtype=torch.float32, device=self.device)
                kept = {key: parts[name].clone() for key, parts in zip(MOMENTS, found, strict=True)}
                trainer.optimiser.state[parameter] = {"step": step} | kept
            if trainer.averaged is not None and self.averaged is not None:
                averaged = self.layout.parts(self.averaged[k])
                for name, parameter in trainer.final.named_parameters():
                    parameter.copy_(averaged[name])
                for old, new in zip(trainer.final.buffers(), trainer.model.buffers(), strict=True):
                    old.copy_(new)
                trainer.averaged.n_averaged += trainer.steps


def together(model: ViT, layout: Layout) -> Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor]:
    """K models as one: images (K, B, ..), weights (K, P) and what else differs, by name -> logits (K, B, classes)."""

    def call(images: Tensor, weights: Tensor, others: dict[str, Tensor]) -> Tensor:
        tensors = layout.parts(weights) | others
        with sdpa_kernel(SDPBackend.MATH) if torch.compiler.is_compiling() else Fold():
            mapped = vmap(lambda own, x: functional_call(model, own, (x,)))
            logits: Tensor = mapped(tensors, images)
            return logits

    return call


MOMENTS = ("exp_avg", "exp_avg_sq")


def precision(trainer: Trainer) -> torch.dtype:
    """Return the type of its parameters."""
    return next(trainer.model.parameters()).dtype


def moments(trainer: Trainer, key: str) -> dict[str, Tensor]:
    """Return a moving average of AdamW of each parameter, by name; zero before the first step."""
    state = trainer.optimiser.state
    return {name: state[p].get(key, torch.zeros_like(p)) for name, p in trainer.model.named_parameters()}


def drawn_buffers(trainers: list[Trainer]) -> dict[str, Tensor]:
    """Return the random features of all models, stacked; other buffers are the same in all, and not looked at."""
    model = trainers[0].model
    names = [f"{name}.projection" for name, each in model.named_modules() if isinstance(each, Features)]
    buffers = [dict(t.model.named_buffers()) for t in trainers]
    return {name: torch.stack([each[name] for each in buffers]) for name in names if name in buffers[0]}
