"""Softmax attention with log-weights of offsets by torch's FlexAttention, which never forms them for all pairs.

Taken on CUDA alone, where `erpe bench device` found it to be faster. It adds gradients of log-weights by atomics: where
torch is asked for deterministic algorithms, the dense way takes its place. It was never run on a GPU.

Source: PyTorch, `torch.nn.attention.flex_attention`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from erpe.model.toeplitz import Mask

WANTED = [False]
"""Whether it is taken: see `wanted`."""

Score = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""Logit, image, head, query and key -> another logit."""


@contextmanager
def wanted() -> Iterator[None]:
    """In the block it is taken, where it serves."""
    before, WANTED[0] = WANTED[0], True
    try:
        yield
    finally:
        WANTED[0] = before


def serves(q: Tensor) -> bool:
    """Whether it is to be taken for these queries."""
    return WANTED[0] and q.device.type == "cuda" and not torch.are_deterministic_algorithms_enabled()


def flex(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> Tensor:
    """(B, H, N, D) twice and (B, H, N, Dv) -> (B, H, N, Dv)."""
    return _compiled()(q, k, v, score_mod=score_of(mask), scale=scale)


def score_of(mask: Mask) -> Score:
    """Return what adds its offset's log-weight to a logit."""
    (h, w), table, cls = mask

    def of_offset(score: Tensor, image: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + table[head, key // w - query // w + h - 1, key % w - query % w + w - 1]

    if cls is None:
        return of_offset

    def with_class_token(score: Tensor, image: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        patches = of_offset(score, image, head, (query - 1).clamp(min=0), (key - 1).clamp(min=0))
        kind = torch.where(query > 0, 0, torch.where(key > 0, 1, 2))  # to it, from it, its own: rows of `cls`
        return torch.where((query > 0) & (key > 0), patches, score + cls[kind, head])

    return with_class_token


@cache
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention  # imports torch's compiler: two seconds

    return torch.compile(flex_attention, dynamic=False)
