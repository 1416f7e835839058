"""A training step as one CUDA graph: one launch from augmentation to averaged weights.

Of a trial or of a pack. It was never run on a GPU, and is used where `erpe bench device` found it to be faster.

Source: PyTorch, "CUDA semantics", section "CUDA graphs": whole-network capture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor

WARM_UP = 3
"""Steps before the capture, as torch's documentation has them."""


class CudaGraphs:
    """What captures, on CUDA."""

    def warm_up(self, call: Callable[[], Tensor]) -> None:
        """Call it a few times, on a stream of its own: the usual one must not know of what is captured."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                call()
        torch.cuda.current_stream().wait_stream(side)

    def capture(self, call: Callable[[], Tensor], generators: Sequence[Generator]) -> tuple[Callable[[], None], Tensor]:
        """Record what a call does, while other threads may go on copying: they write checkpoints.

        Args:
            generators: what the call draws from, besides torch's global one.
        Returns:
            what does it again, with what the same tensors hold then, and the tensor that it gives, always the same.
        """
        graph = torch.cuda.CUDAGraph()
        for generator in generators:
            graph.register_generator_state(generator)  # read anew by each replay, as torch's own is
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = call()
        return graph.replay, result


class Graphed:
    """In the place of a function of tensors, whose first call captures; then all is as if nothing had happened before.

    Args:
        function: gives a tensor. No choice in it depends on numbers, and no tensor on the CPU takes part.
        written: lists all tensors that it writes and keeps; those that its first call makes begin with zeros.
        generators: what it draws from, besides torch's global one.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        written: Callable[[], list[Tensor]],
        generators: Sequence[Generator],
        graphs: CudaGraphs,
    ) -> None:
        self.function, self.written, self.generators, self.graphs = function, written, generators, graphs
        self.inputs: tuple[Tensor, ...] = ()
        self.replay: Callable[[], None] | None = None
        self.result: Tensor | None = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        """What the function gives; the inputs have the same shapes each time."""
        if self.replay is None:
            self._capture(*inputs)
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        assert self.replay and self.result is not None
        self.replay()
        return self.result.clone()

    def _capture(self, *inputs: Tensor) -> None:
        self.inputs = tuple(x.clone() for x in inputs)
        place = torch.cuda if inputs[0].is_cuda else torch
        dice, own = place.get_rng_state(), [each.get_state() for each in self.generators]
        before = [(x, x.detach().clone()) for x in self.written()]
        self.graphs.warm_up(lambda: self.function(*self.inputs))
        known = {id(x) for x, _ in before}
        with torch.no_grad():
            for x, value in before:
                x.copy_(value)
            for x in self.written():
                if id(x) not in known:
                    x.zero_()
        self.replay, self.result = self.graphs.capture(lambda: self.function(*self.inputs), self.generators)
        place.set_rng_state(dice)
        for generator, state in zip(self.generators, own, strict=True):
            generator.set_state(state)
