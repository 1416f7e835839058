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

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, one_hot

from erpe.errors import TrialError
from erpe.model.features import Features
from erpe.model.vit import Drop, ViT
from erpe.training.compilation import Compiled, is_wanted
from erpe.training.graph import Graphed
from erpe.training.loop import CHECK_EVERY, OnStep, Trainer, check_finite, look
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
    """Settings of an epoch's steps, of each trial."""

    def __init__(self, trainers: list[Trainer], firsts: list[int]) -> None:
        count, known = trainers[0].steps, [planned(trainer) for trainer in trainers]
        own = [steps[first : first + count] for (steps, _), first in zip(known, firsts, strict=True)]
        self.steps = torch.stack(own, dim=2)[..., None]
        """(steps, 4, K, 1), see `planned`."""
        self.clip, smoothing = torch.stack([settings for _, settings in known], dim=1)[..., None]  # (K, 1) each
        self.smoothing = smoothing[:, None]  # (K, 1, 1)


def planned(trainer: Trainer) -> tuple[Tensor, Tensor]:
    """What the steps of a trial are made of, on its device: copied there once, for a copy waits.

    Returns:
        (all steps, 4): by what decaying weights shrink, how far a step goes, the root of what the mean square lacks,
        and how much of the weights the averaged ones take (the first average is the weights); and (2): the norm to clip
        at, label smoothing.
    """
    if trainer.planned is None:
        train, exact = trainer.config.train, dict[str, Any](dtype=torch.float64, device="cpu")
        count = train.epochs * trainer.steps
        step = torch.arange(1, count + 1, **exact)
        rate = torch.tensor([trainer.rate(each) for each in range(count)], **exact)
        take = torch.where(step == 1, 1.0, 1 - train.ema)
        shrink, length = 1 - rate * train.weight_decay, rate / (1 - BETA1**step)
        steps = torch.stack([shrink, length, (1 - BETA2**step).sqrt(), take], dim=1)
        settings = torch.tensor([train.clip_norm or torch.inf, train.label_smoothing], **exact)
        steps, settings = (x.to(precision(trainer)) for x in (steps, settings))  # some devices have no float64
        trainer.planned = steps.to(trainer.device), settings.to(trainer.device)
    return trainer.planned


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
        self.dice = [torch.Generator(self.device) for _ in trainers]
        """What each trial drops; alone it would draw the same from torch's global generator."""
        first = trainers[0]
        if first.packed is None:  # kept: a pack is of one epoch
            plain = together(first.model, layout)
            wanted = is_wanted(first.config.train, first.device)
            first.packed = Compiled(plain, first.model, lambda _: None) if wanted else plain  # all are told, see `note`
        self.models = first.packed
        graphs = first.pack_graphs
        self.graphed = graphs and Graphed(
            self.step, self._written, [*self.dice, *(trainer.vary for trainer in trainers)], graphs
        )

    def epoch(self, epochs: list[int], on_step: OnStep | None = None) -> list[dict[str, float] | TrialError]:
        """Train epoch `epochs[k]` (from 0) of each trial k.

        Returns:
            What `Trainer.epoch` gives of each, the seconds divided by K; or the error it raises, and then this
            trial's trainer has not got the epoch's weights.
        """
        started, trainers, steps = time.perf_counter(), self.trainers, self.trainers[0].steps
        firsts = [epoch * steps for epoch in epochs]
        self.plan = Plan(trainers, firsts)
        for trainer, dice, epoch in zip(trainers, self.dice, epochs, strict=True):
            trainer.model.train()
            dice.manual_seed(trainer.derive("dropout", epoch))
        total, losses = [0.0] * len(trainers), list[Tensor]()
        errors: dict[int, TrialError] = {}
        batches = (trainer.batches(epoch) for trainer, epoch in zip(trainers, epochs, strict=True))
        for done, rows in enumerate(zip(*batches, strict=True)):
            if any([t.redraw(first + done) for t, first in zip(trainers, firsts, strict=True)]):
                for name, drawn in drawn_buffers(trainers).items():
                    self.buffers[name].copy_(drawn)
            whole = len(rows[0]) == trainers[0].config.train.batch
            step = self.graphed if self.graphed and whole else self.step
            for trainer in trainers:
                trainer.ran_as_graph |= step is self.graphed
            losses.append(step(torch.stack(rows), self.plan.steps[done]) * len(rows[0]))
            if (done + 1) % CHECK_EVERY == 0 or done + 1 == steps:
                found = look(losses, dim=1)
                errors = self._check(found, [first + done for first in firsts]) | errors
                total = [before + math.fsum(own) for before, own in zip(total, found, strict=True)]
                losses.clear()
            if on_step:
                on_step(done + 1, steps)
        self._note()
        means = [each / len(trainers[0].images.labels) for each in total]
        self._give_back(errors, [first + steps for first in firsts])
        seconds = (time.perf_counter() - started) / len(trainers)
        return [
            errors.get(k) or {"train/loss": means[k], "lr": t.rate(first + steps - 1), "time/epoch_seconds": seconds}
            for k, (t, first) in enumerate(zip(trainers, firsts, strict=True))
        ]

    def step(self, rows: Tensor, numbers: Tensor) -> Tensor:
        """One step of AdamW of each trial; returns the losses (K,) on the device.

        Args:
            rows: (K, B) places of images.
            numbers: (4, K, 1), this step's of `Plan.steps`.
        """
        images, targets, noise = self._inputs(rows)
        targets = targets + self.plan.smoothing * (1 / targets.shape[-1] - targets)  # (K, B, classes)
        first = self.trainers[0]
        full = images.shape[1] == first.config.train.batch
        models = self.models if full else together(first.model, self.layout)
        with autocast(first.precision, self.device), first.choices.sdpa(first.config, first.precision, packed=True):
            logits = models(images, self.weights, self.buffers | noise)
            each = cross_entropy(logits.flatten(0, 1).float(), targets.flatten(0, 1), reduction="none")
        loss = each.view(targets.shape[:2]).mean(1)  # (K,)
        (gradient,) = torch.autograd.grad(loss.sum(), self.weights)
        self._descend(gradient, numbers)
        return loss.detach()

    def _note(self) -> None:
        compiled, first = isinstance(self.models, Compiled) and self.models, self.trainers[0]
        chosen = first.choices.backend(first.config, first.precision, packed=True)
        for trainer in self.trainers:
            trainer.note("math" if compiled and not compiled.failed else chosen, compiled.failed if compiled else "")

    def _written(self) -> list[Tensor]:
        """All that a step writes."""
        averaged = [] if self.averaged is None else [self.averaged]
        return [self.weights, self.exp_avg, self.exp_avg_sq, *averaged]

    def _inputs(self, rows: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Images (K, B, ...), probabilities of classes (K, B, classes), and what is dropped: all as drawn alone."""
        images, targets, noises = [], [], []
        for trainer, own, places, drops in zip(self.trainers, self.dice, rows, self.drops, strict=True):
            some, labels = trainer.inputs(places)
            noises.append({name: drop.draw(len(some), self.device, own) for name, drop in drops.items()})
            images.append(some)
            targets.append(labels if labels.is_floating_point() else one_hot(labels, trainer.config.model.classes))
        ones = {name: torch.ones_like(x) for noise in noises for name, x in noise.items()}
        noise = {name: torch.stack([(ones | noise)[name] for noise in noises]) for name in ones}
        return torch.stack(images), torch.stack(targets).to(self.weights.dtype), noise

    @torch.no_grad()
    def _descend(self, gradient: Tensor, numbers: Tensor) -> None:
        """Clip each row of the gradient (K, P), and step: torch's clip_grad_norm_, AdamW and averaged model in rows."""
        norm = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)  # (K, 1)
        shrink, length, root, take = numbers  # (K, 1) each
        gradient *= (self.plan.clip / (norm + 1e-6)).clamp(max=1)
        self.weights.narrow(1, 0, self.layout.decaying).mul_(shrink)
        self.exp_avg.lerp_(gradient, 1 - BETA1)
        self.exp_avg_sq.mul_(BETA2).addcmul_(gradient, gradient, value=1 - BETA2)
        slope = self.exp_avg_sq.sqrt().div_(root).add_(EPS)
        self.weights.addcdiv_(self.exp_avg * -length, slope)
        if self.averaged is not None:
            self.averaged.lerp_(self.weights, take)

    @staticmethod
    def _check(losses: list[list[float]], last_steps: list[int]) -> dict[int, TrialError]:
        """Return the trials whose loss is not finite."""
        errors = {}
        for k, own in enumerate(losses):
            try:
                check_finite(own, last_steps[k])
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
                step = torch.full((), float(steps[k]), dtype=torch.float32, device=self.device)
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
            return vmap(lambda own, x: functional_call(model, own, (x,)))(tensors, images)

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
