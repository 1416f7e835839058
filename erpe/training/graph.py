"""A training step as one CUDA graph: forward, backward, clipping, AdamW and averaged weights in one launch.

Images are chosen, varied and normalised before it, as ever: their randomness is the CPU's. It was never run on a GPU,
so `infra/gpu-check` alone uses it, beside the plain step.

Source: PyTorch, "CUDA semantics", section "CUDA graphs": whole-network capture.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy

from erpe.training.loop import Trainer
from erpe.training.precision import autocast

WARM_UP = 3
"""Steps before the capture, as torch's documentation has them."""


class Graphs(Protocol):
    """What captures."""

    def warm_up(self, call: Callable[[], None]) -> None:
        """Call it a few times where captures allow it."""

    def capture(self, call: Callable[[], None]) -> Callable[[], None]:
        """Record what a call does; what is returned does it again, with what the same tensors hold then."""


class CudaGraphs:
    """Those of CUDA."""

    def warm_up(self, call: Callable[[], None]) -> None:
        """On a stream of its own: the usual one must not know of what is captured."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                call()
        torch.cuda.current_stream().wait_stream(side)

    def capture(self, call: Callable[[], None]) -> Callable[[], None]:
        """A graph's replay."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        replay: Callable[[], None] = graph.replay
        return replay


class GraphedStep:
    """In the place of `Trainer.step`: whole batches by the graph, a shorter one as it was.

    The first whole batch captures. Weights, moments and averages are then as if nothing had happened before.
    """

    def __init__(self, trainer: Trainer, graphs: Graphs | None = None) -> None:
        self.trainer, self.graphs = trainer, graphs or CudaGraphs()
        self.plain = trainer.step
        device = trainer.device
        self.rate = torch.zeros((), dtype=torch.float32, device=device)
        self.loss = torch.zeros((), dtype=torch.float32, device=device)
        self.images: Tensor | None = None
        self.labels: Tensor | None = None
        self.replay: Callable[[], None] | None = None

    def __call__(self, rows: Tensor, rate: float, vary: Generator) -> Tensor:
        """One step on the images at `rows`; returns the loss, still on the device."""
        trainer = self.trainer
        first = trainer.averaged is not None and trainer.averaged.n_averaged == 0  # which copies instead of averaging
        if first or len(rows) != trainer.config.train.batch or trainer.parts != 1:
            loss = self.plain(rows, rate, vary)
            self._take_rate()
            return loss
        images, labels = trainer.inputs(rows, vary)
        self.rate.fill_(rate)
        if self.replay is None:
            self._capture(images, labels)
        assert self.replay and self.images is not None and self.labels is not None
        self.images.copy_(images)
        self.labels.copy_(labels)
        self.replay()
        if trainer.averaged is not None:
            trainer.averaged.n_averaged += 1
            if trainer.config.train.redraw:
                for old, new in zip(trainer.final.buffers(), trainer.model.buffers(), strict=True):
                    old.copy_(new)
        return self.loss.clone()

    def _take_rate(self) -> None:
        for group in self.trainer.optimiser.param_groups:
            group["lr"], group["capturable"] = self.rate, self.trainer.device.type == "cuda"

    def _capture(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images.clone(), labels.clone()
        trainer = self.trainer
        self._take_rate()
        places = [torch.cuda] if trainer.device.type == "cuda" else [torch]
        dice = [place.get_rng_state() for place in places]
        before = [(x, x.detach().clone()) for x in self._tensors()]
        self.graphs.warm_up(self._body)
        known = {id(x) for x, _ in before}
        with torch.no_grad():
            for x, value in before:
                x.copy_(value)
            for x in self._tensors():
                if id(x) not in known:  # moments that the first step makes
                    x.zero_()
        trainer.optimiser.zero_grad(set_to_none=True)
        self.replay = self.graphs.capture(self._body)
        for place, state in zip(places, dice, strict=True):
            place.set_rng_state(state)

    def _tensors(self) -> list[Tensor]:
        """All that a step writes."""
        trainer = self.trainer
        averaged = [] if trainer.averaged is None else list(trainer.averaged.module.parameters())
        moments = [x for state in trainer.optimiser.state.values() for x in state.values()]
        return [*trainer.model.parameters(), *averaged, *moments]

    def _body(self) -> None:
        """What is captured: no choice in it depends on numbers, and no tensor on the CPU takes part."""
        trainer, train = self.trainer, self.trainer.config.train
        assert self.images is not None and self.labels is not None
        trainer.optimiser.zero_grad(set_to_none=True)
        with autocast(trainer.precision, trainer.device):
            logits = trainer.forward(self.images).float()
            loss = cross_entropy(logits, self.labels, label_smoothing=train.label_smoothing)
        loss.backward()
        if train.clip_norm:
            nn.utils.clip_grad_norm_(trainer.model.parameters(), train.clip_norm)
        trainer.optimiser.step()
        if trainer.averaged is not None:
            average(list(trainer.final.parameters()), list(trainer.model.parameters()), train.ema)
        self.loss.copy_(loss.detach())


@torch.no_grad()
def average(averaged: list[nn.Parameter], weights: list[nn.Parameter], decay: float) -> None:
    """Move averaged weights towards the weights, as torch's `get_ema_multi_avg_fn`."""
    for old, new in zip(averaged, weights, strict=True):
        old.lerp_(new, 1 - decay)
