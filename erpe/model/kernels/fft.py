"""The masked product by FFT over each channel of a feature and a value: exact, O(N log N), for very long grids.

Source: Luo et al. 2021 (NeurIPS), algorithm 1, on a 2-D grid.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from erpe.model.toeplitz import Mask, toeplitz_matmul

CHUNK = 2**22
"""Entries of the tensor that is transformed at once: bounded memory for long sequences."""


def fft_attention(phi_q: Tensor, phi_k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """Averages of the values (B, H, N, Dv) by weights (phi_q . phi_k) exp(mask), features (B, H, N, m).

    In float32 the error of an FFT, relative to its largest value, drowns what far offsets weigh: it is in float64, but
    on MPS, which has none.
    """
    # A column of ones gives the denominators.
    v1 = pad(v, (0, 1), value=1.0)                                # (B, H, N, Dv + 1)
    channels = v1.shape[-1]
    step = max(1, CHUNK // (v1.numel() * 4))                      # the padded grid has four times the tokens
    wide = torch.float32 if v1.device.type == "mps" else torch.float64
    phi_q, phi_k, narrow, v1 = phi_q.to(wide), phi_k.to(wide), v1.dtype, v1.to(wide)
    weights = _weights(mask)
    total = torch.zeros_like(v1)
    for q_part, k_part in zip(phi_q.split(step, dim=-1), phi_k.split(step, dim=-1), strict=True):
        outer = k_part.mT[:, :, :, None] * v1.mT[:, :, None]      # (B, H, .., Dv + 1, N)
        mixed = _weigh(outer.flatten(2, 3), weights, mask.grid).unflatten(2, (-1, channels))
        total = total + torch.einsum("bhnf,bhfcn->bhnc", q_part, mixed)
    # It may still leave a tiny denominator negative. All its terms are positive: it is at least the token's own.
    c, c_cls = weights
    own = c[:, c.shape[1] // 2, c.shape[2] // 2, None].expand(-1, phi_q.shape[2])             # (H, N)
    if c_cls is not None:
        own = torch.cat([c_cls[2, :, None], own[:, 1:]], dim=1)
    least = (phi_q * phi_k).sum(-1) * own                         # (B, H, N)
    return total[..., :-1].to(narrow) / torch.maximum(total[..., -1], least).to(narrow)[..., None]


def _weights(mask: Mask) -> tuple[Tensor, Tensor | None]:
    """exp of both tables, each head divided by its largest: a factor that cancels in the quotient."""
    top = mask.bias.flatten(1).amax(1).detach()                   # (H,)
    if mask.cls is None:
        return (mask.bias - top[:, None, None]).exp(), None
    top = torch.maximum(top, mask.cls.detach().amax(0))
    return (mask.bias - top[:, None, None]).exp(), (mask.cls - top).exp()


def _weigh(x: Tensor, weights: tuple[Tensor, Tensor | None], grid: tuple[int, int]) -> Tensor:
    """C x, never forming C: (B, H, F, N) -> (B, H, F, N)."""
    c, c_cls = (None if table is None else table.to(x.dtype) for table in weights)
    assert c is not None
    patches = x[..., 1:] if c_cls is not None else x
    y = toeplitz_matmul(c, patches.unflatten(-1, grid)).flatten(-2)
    if c_cls is None:
        return y
    to_cls, from_cls, own = c_cls[:, :, None, None]               # (H, 1, 1) each
    first = x[..., :1]                                            # (B, H, F, 1)
    cls = from_cls * patches.sum(-1, keepdim=True) + own * first
    return torch.cat([cls, y + to_cls * first], dim=-1)
