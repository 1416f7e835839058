"""The kernels as operators of torch, `torch.ops.erpe.*`: with what compilers, gradients, vmap and counters of FLOPs
need to know of them. They run on CUDA; in Triton's interpreter on any device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from erpe.model.features import FeatureMap, Map, Maps, full_precision
from erpe.model.kernels.functions import again, more_heads, own_projections
from erpe.model.kernels.gpu import launch, or_torch
from erpe.model.kernels.linear import by_torch
from erpe.model.rotation import Rotation


def linear_product(q: Tensor, k: Tensor, v: Tensor, phi: FeatureMap, rotation: Rotation | None) -> Tensor:
    """`linear_attention` by the kernels; vectors are turned before, in float32."""
    if rotation is not None:
        (q, k), phi = rotation.align(q.float(), k.float()), phi.of(rotation.basis)
    y, *_ = linear_forward(q, k, v, phi.w, *numbers(phi.maps))
    return y


def numbers(maps: Maps) -> tuple[bool, float, float, float]:
    """Feature maps as operators take them: whether they are exponential, eps of queries, eps of keys, norm."""
    return maps.k.kind == "exp of key", maps.q.eps, maps.k.eps, maps.k.norm


def maps_of(exp: bool, q_eps: float, k_eps: float, norm: float) -> Maps:
    """The reverse of `numbers`."""
    kinds = ("exp of query", "exp of key") if exp else ("relu", "relu")
    return Maps(Map(kinds[0], q_eps), Map(kinds[1], k_eps, norm))


@torch.library.custom_op("erpe::linear_forward", mutates_args=())
def linear_forward(
    q: Tensor, k: Tensor, v: Tensor, w: Tensor | None, exp: bool, q_eps: float, k_eps: float, norm: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y (B, H, N, Dv), and what the backward pass needs again; see `launch.forward`."""
    maps = maps_of(exp, q_eps, k_eps, norm)

    def torchs() -> tuple[Tensor, launch.Made]:
        y, m = _torchs(w, maps)(q, k, v), q.shape[-1] if w is None else w.shape[-1]
        sums, z, top = (y.new_zeros(*q.shape[:2], *size, dtype=torch.float32) for size in ((m, v.shape[-1]), (m,), ()))
        return launch.side_by_side(v).copy_(y), (sums, z, top)

    with torch.cuda.device_of(q):
        y, made = or_torch(lambda: launch.forward(q, k, v, w, maps), torchs)
    return y, *made


@torch.library.custom_op("erpe::linear_backward", mutates_args=())
def linear_backward(
    q: Tensor, k: Tensor, v: Tensor, w: Tensor | None, exp: bool, q_eps: float, k_eps: float, norm: float,
    sums: Tensor, z: Tensor, top: Tensor, d_y: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Slopes of q, k and v."""
    maps = maps_of(exp, q_eps, k_eps, norm)

    def torchs() -> tuple[Tensor, ...]:
        found = torch.func.vjp(_torchs(w, maps), q, k, v)[1](d_y)
        return tuple(launch.side_by_side(x).copy_(x) for x in found)

    with torch.cuda.device_of(q):
        found: tuple[Tensor, Tensor, Tensor] = or_torch(
            lambda: launch.backward(q, k, v, w, maps, (sums, z, top), d_y), torchs
        )
    return found


def _torchs(w: Tensor | None, maps: Maps) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The same by torch's operators."""
    phi = FeatureMap(maps, w)
    return lambda q, k, v: by_torch(full_precision(q), full_precision(k), full_precision(v), phi).to(v.dtype)


@linear_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, w: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    m = q.shape[-1] if w is None else w.shape[-1]
    sizes = ((m, v.shape[-1]), (m,), ())
    return launch.side_by_side(v), *(v.new_empty(*q.shape[:2], *size, dtype=torch.float32) for size in sizes)


@linear_backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(launch.side_by_side(x) for x in (q, k, v))


def _keep_linear(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:4], *output[1:])
    ctx.maps = inputs[4:]


def _linear_slopes(ctx: Any, d_y: Tensor | None, *none: Any) -> tuple[Tensor | None, ...]:
    if d_y is None:
        return (None,) * 8
    q, k, v, w, *made = ctx.saved_tensors
    return *linear_backward(q, k, v, w, *ctx.maps, *made, d_y), *[None] * 5


def _keep_linear_slopes(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:4], inputs[-1])
    ctx.maps = maps_of(*inputs[4:8])


def _slopes_of_linear_slopes(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, w, d_y = ctx.saved_tensors

    def product(*x: Tensor) -> tuple[Tensor]:
        return (by_torch(x[0], x[1], x[2], FeatureMap(ctx.maps, w)),)

    *found, d_d_y = again(product, (q, k, v), [d_y], slopes)
    return *found, *[None] * 8, d_d_y


linear_forward.register_autograd(_linear_slopes, setup_context=_keep_linear)
linear_backward.register_autograd(_slopes_of_linear_slopes, setup_context=_keep_linear_slopes)


def _layers_as_heads(size: int, dims: Any, inputs: Any) -> list[Any]:
    """q, k, v, w of several layers -> of one; what the maps are is the same for all."""
    q, k, v = more_heads(size, dims[:3], inputs[:3])
    return [q, k, v, own_projections(size, dims[3], inputs[3], heads=q.shape[1] // size), *inputs[4:8]]


def _apart(size: int, found: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    return tuple(x.unflatten(1, (size, -1)) for x in found), (1,) * len(found)


@linear_forward.register_vmap
def _(info: Any, in_dims: Any, *inputs: Any) -> Any:
    return _apart(info.batch_size, linear_forward(*_layers_as_heads(info.batch_size, in_dims, inputs)))


@linear_backward.register_vmap
def _(info: Any, in_dims: Any, *inputs: Any) -> Any:
    made = more_heads(info.batch_size, in_dims[8:], inputs[8:])
    return _apart(info.batch_size, linear_backward(*_layers_as_heads(info.batch_size, in_dims, inputs), *made))


def _linear_products(q: Any, v: Any, w: Any) -> tuple[int, int]:
    """FLOPs of the projections of queries and keys, and of S and y."""
    images, heads, n, d = q
    m = d if w is None else w[-1]
    return (0 if w is None else 4 * images * heads * n * d * m), 4 * images * heads * n * m * v[-1]


@register_flop_formula(torch.ops.erpe.linear_forward)
def _(q: Any, k: Any, v: Any, w: Any, *rest: Any, **more: Any) -> int:
    return sum(_linear_products(q, v, w))


@register_flop_formula(torch.ops.erpe.linear_backward)
def _(q: Any, k: Any, v: Any, w: Any, *rest: Any, **more: Any) -> int:
    projections, products = _linear_products(q, v, w)
    return projections + 2 * products
