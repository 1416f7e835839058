"""Attention that needs no softmax, by whatever serves a device best. Layers call two functions and know no more.

    y = linear_attention(q, k, v, phi, rotation)        y_i = phi_q_i S / (phi_q_i . z),   S = sum_j phi_k_j v_j^T
    y = masked_attention(q, k, v, phi, mask)            y_i = sum_j A_ij v_j / sum_j A_ij, A = (phi_q phi_k^T) * C

Who computes what, all of it exact but for the series of `rank`; `serving` chooses among the columns:

    | function         | `c`: float32 on a CPU,  | `triton`: CUDA, sizes of  | `torch`: everything else  |
    |                  | compiler, method not    | gpu/__init__, method=auto |                           |
    |                  | `torch`                 |                           |                           |
    |------------------|-------------------------|---------------------------|---------------------------|
    | linear_attention | `linear.c` (linear.py); | gpu/linear.py;            | linear.py                 |
    |                  | `after` the map: torch  | `after` the map: torch    |                           |
    | masked_attention | `masked.c` (masked.py)  | gpu/masked.py             | tiles.py; N x N in        |
    |                  |                         |                           | compiled models, N <= 1024|
    | ... method=fft   | FFTs of each feature and value (fft.py); `auto` takes it for very long grids    |
    | ... rank=R       | a truncated Fourier series of C, of linear cost (low_rank.py)                   |

Products of float32 on CUDA, and why; errors of a whole layer against float64 where operands are rounded to TF32,
N = 256, D = 32, numbers of q and k up to 3 times N(0, 1). `tests/test_triton.py` holds each choice to a limit of 1e-3:

    x W, and into a rotation's basis   1.9e-3    no TF32; three products of it in our kernels, as good as float32
    S, y, and their gradients          3.7e-4    TF32 in our kernels, rounded to nearest; torch's operators: no TF32
    all others of a model              5e-4      no TF32: bfloat16 trains, and what is evaluated is published

`torch.backends.cuda.matmul.fp32_precision` stays as torch has it, "none": no TF32.

The masked kernels for GPUs serve compiled models, too: N x N weights, however they are fused, are written and read some
four times forward and eight backward, of 4 N^2 bytes an image and head each time, where the kernels read and write 4 N
(2 m + 2 Dv). They read float32: values in bfloat16 would save an eighth of that. None of it was timed.

Softmax attention with log-weights may be torch's FlexAttention (gpu/flex.py), which adds their gradients by atomics:
`torch.use_deterministic_algorithms` keeps it away.

"Everything else" is other devices and types, machines without a C compiler, and on CPUs whatever looks at torch's
operators: `torch.compile`, counters of FLOPs, tracing.
"""

from __future__ import annotations

from torch import Tensor

from erpe.model.features import FeatureMap, full_precision
from erpe.model.kernels import cpu, gpu, linear, masked
from erpe.model.kernels.fft import fft_attention
from erpe.model.kernels.masked import exact_method
from erpe.model.rotation import Rotation
from erpe.model.toeplitz import Mask

__all__ = ["exact_method", "linear_attention", "masked_attention"]


def serving(method: str, m: int, q: Tensor, k: Tensor, v: Tensor, *tables: Tensor, projected: bool = False) -> str:
    """Return who serves these inputs, perhaps tables, and m features: `c`, `triton` or `torch`, as the table says."""
    if method == "auto" and gpu.serves(q, k, v, m, projected):
        return "triton"
    return "c" if method != "torch" and cpu.serves(*map(full_precision, (q, k, v)), *tables) else "torch"


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, phi: FeatureMap, rotation: Rotation | None = None, after: bool = False,
    method: str = "auto",
) -> Tensor:  # fmt: skip
    """Linear attention without weights of pairs: rotate, make features, average the values.

    Args:
        q, k: (B, H, N, D).
        v: (B, H, N, Dv).
        phi: makes features (B, H, N, m) of them.
        rotation: of q and k, by their places; None: they stay.
        after: rotate the features instead, and in the numerator alone (RoFormer equation 19).
        method: see `AttentionConfig.method`.
    Returns:
        (B, H, N, Dv), in float32 or the precision of the inputs; features and both sums are never in less.
    """
    projected = phi.w is not None or (rotation is not None and rotation.basis is not None)
    way = "torch" if after else serving(method, phi.size(q), q, k, v, projected=projected)
    if way == "triton":
        return gpu.ops.linear_product(q, k, v, phi, rotation)
    q, k, v = (full_precision(x) for x in (q, k, v))
    if way == "c":
        return linear.compiled(q, k, v, phi, rotation)
    return linear.by_torch(q, k, v, phi, rotation, after)


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, phi: FeatureMap, mask: Mask, method: str = "auto", rank: int | None = None
) -> Tensor:
    """Linear attention with a weight C of each pair of tokens, by their offset on the grid.

    Args:
        q, k: (B, H, N, D).
        v: (B, H, N, Dv).
        phi: makes features (B, H, N, m) of them.
        mask: the logarithm of C.
        method: see `AttentionConfig.method`.
        rank: number of terms to take of the Fourier series of C, which is then not exact; None: all of C.
    Returns:
        (B, H, N, Dv), in float32 at least.
    """
    q, k, v = (full_precision(x) for x in (q, k, v))
    if not rank and exact_method(method, q.shape[2], phi.size(q), v.shape[-1]) == "fft":
        return fft_attention(*phi(q, k), v, mask)
    way = serving(method, phi.size(q), q, k, v, mask.bias)
    if mask.cls is None and not rank:
        return masked.masked_product(q, k, v, mask.bias, None, phi, way)[0]
    return masked.with_class_token(*phi(q, k), v, mask, rank, way)
