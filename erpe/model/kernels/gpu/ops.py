"""The kernels as operators of torch, `torch.ops.erpe.*`: with what compilers, gradients, vmap and counters of FLOPs
need to know of them. They run on CUDA; in Triton's interpreter on any device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from erpe.model.features import FeatureMap, Map, Maps, full_precision
from erpe.model.kernels.cpu import side_by_side
from erpe.model.kernels.functions import again, more_heads, own_projections
from erpe.model.kernels.gpu import BASIS, TURN, launch, or_torch
from erpe.model.kernels.linear import by_torch
from erpe.model.rotation import Rotation, angles, turn_real


def linear_product(q: Tensor, k: Tensor, v: Tensor, phi: FeatureMap, rotation: Rotation | None) -> Tensor:
    """`linear_attention` by the kernels."""
    turn: Any = (None,) * 4
    if rotation is not None:
        phi, basis = phi.of(rotation.basis), rotation.basis
        if q.shape[-1] > TURN:
            q, k = rotation.align(q.float(), k.float())
        else:
            if basis is not None and q.shape[-1] > BASIS:
                q, k, basis = q.float() @ basis, k.float() @ basis, None
            turn = rotation.planes, rotation.table(), rotation.places(), basis
    y, *_ = linear_forward(q, k, v, phi.w, *turn, *numbers(phi.maps))
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
    q: Tensor, k: Tensor, v: Tensor, w: Tensor | None, planes: Tensor | None, table: Tensor | None,
    places: Tensor | None, basis: Tensor | None, exp: bool, q_eps: float, k_eps: float, norm: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y (B, H, N, Dv), and what the backward pass needs again; see `launch.forward`. `table` is that of `planes`."""
    maps, turn = maps_of(exp, q_eps, k_eps, norm), launch.Turn(table, places, basis)

    def torchs() -> tuple[Tensor, launch.Made]:
        y, m = _torchs(w, maps, turn)(q, k, v, planes), q.shape[-1] if w is None else w.shape[-1]
        sums, z, top = (y.new_zeros(*q.shape[:2], *size, dtype=torch.float32) for size in ((m, v.shape[-1]), (m,), ()))
        return side_by_side(v).copy_(y), (sums, z, top)

    with torch.cuda.device_of(q):
        y, made = or_torch(lambda: launch.forward(q, k, v, w, maps, turn), torchs, *_size(q, v, w))
    return y, *made


@torch.library.custom_op("erpe::linear_backward", mutates_args=())
def linear_backward(
    q: Tensor, k: Tensor, v: Tensor, w: Tensor | None, planes: Tensor | None, table: Tensor | None,
    places: Tensor | None, basis: Tensor | None, exp: bool, q_eps: float, k_eps: float, norm: float,
    learns: bool, sums: Tensor, z: Tensor, top: Tensor, d_y: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v and, if they are wanted, of the planes; see `launch.backward`."""
    maps, turn = maps_of(exp, q_eps, k_eps, norm), launch.Turn(table, places, basis)

    def torchs() -> tuple[Tensor, ...]:
        product = _torchs(w, maps, turn)
        if learns:
            *found, d_planes = torch.func.vjp(product, q, k, v, planes)[1](d_y)
        else:
            found = torch.func.vjp(lambda *x: product(*x, planes), q, k, v)[1](d_y)
            d_planes = d_y.new_empty(2, q.shape[1], 0, dtype=torch.float32)
        return *(side_by_side(x).copy_(x) for x in found), d_planes

    with torch.cuda.device_of(q):
        found: tuple[Tensor, Tensor, Tensor, Tensor] = or_torch(
            lambda: launch.backward(q, k, v, w, maps, turn, learns, (sums, z, top), d_y), torchs, *_size(q, v, w)
        )
    return found


def _size(q: Tensor, v: Tensor, w: Tensor | None) -> tuple[Any, ...]:
    return "linear", q.shape[-1], v.shape[-1], None if w is None else w.shape[-1]


def _torchs(w: Tensor | None, maps: Maps, turn: launch.Turn) -> Callable[..., Tensor]:
    """The same by torch's operators: of q, k, v and planes."""
    phi, (_, places, basis) = FeatureMap(maps, w), turn

    def product(q: Tensor, k: Tensor, v: Tensor, planes: Tensor | None) -> Tensor:
        q, k, wide_v = (full_precision(x) for x in (q, k, v))
        if planes is not None and places is not None:
            angle = angles(planes, places)
            q, k = (turn_real(x if basis is None else x @ basis, angle.cos(), angle.sin()) for x in (q, k))
        return by_torch(q, k, wide_v, phi).to(v.dtype)

    return product


@linear_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, w: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    m = q.shape[-1] if w is None else w.shape[-1]
    sizes = ((m, v.shape[-1]), (m,), ())
    return side_by_side(v), *(v.new_empty(*q.shape[:2], *size, dtype=torch.float32) for size in sizes)


@linear_backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    planes, learns = rest[1], rest[9]
    count = planes.shape[-1] if learns else 0
    slopes = q.new_empty(2, q.shape[1], count, dtype=torch.float32)
    return *(side_by_side(x) for x in (q, k, v)), slopes


def _keep_linear(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:8], *output[1:])
    ctx.maps = inputs[8:]


def _linear_slopes(ctx: Any, d_y: Tensor | None, *none: Any) -> tuple[Tensor | None, ...]:
    if d_y is None:
        return (None,) * 12
    inputs, made, learns = ctx.saved_tensors[:8], ctx.saved_tensors[8:], bool(ctx.needs_input_grad[4])
    *found, d_planes = linear_backward(*inputs, *ctx.maps, learns, *made, d_y)
    return *found, None, d_planes if learns else None, *[None] * 7


def _keep_linear_slopes(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:8], inputs[-1])
    ctx.maps, ctx.learns = maps_of(*inputs[8:12]), inputs[12]


def _slopes_of_linear_slopes(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, w, planes, *turn, d_y = ctx.saved_tensors
    product, learn = _torchs(w, ctx.maps, launch.Turn(*turn)), [q, k, v, *([planes] if ctx.learns else [])]

    def products(*x: Tensor) -> tuple[Tensor]:
        return (product(*x[:3], x[3] if ctx.learns else planes),)

    *found, d_d_y = again(products, learn, [d_y], slopes[: len(learn)])
    return *found[:3], None, found[3] if ctx.learns else None, *[None] * 11, d_d_y


linear_forward.register_autograd(_linear_slopes, setup_context=_keep_linear)
linear_backward.register_autograd(_slopes_of_linear_slopes, setup_context=_keep_linear_slopes)


def _layers_as_heads(
    size: int, dims: Any, q: Tensor, k: Tensor, v: Tensor, w: Tensor | None, planes: Tensor | None,
    table: Tensor | None, places: Tensor | None, basis: Tensor | None,
) -> list[Any]:  # fmt: skip
    """Tensors of several layers -> of one; places, basis and what the maps are, are the same for all."""
    *of_qkv, of_w, of_planes, of_table, of_places, of_basis = dims
    q, k, v = more_heads(size, of_qkv, (q, k, v))
    turns = [x if x is None else more_heads(size, [dim], [x])[0] for x, dim in ((planes, of_planes), (table, of_table))]
    fixed = (places, of_places), (basis, of_basis)
    shared = [x if x is None or dim is None else x.select(dim, 0) for x, dim in fixed]
    return [q, k, v, own_projections(size, of_w, w, heads=q.shape[1] // size), *turns, *shared]


def _apart(size: int, found: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    return tuple(x.unflatten(1, (size, -1)) for x in found), (1,) * len(found)


@linear_forward.register_vmap
def _(
    info: Any, in_dims: Any, q: Tensor, k: Tensor, v: Tensor, w: Tensor | None, planes: Tensor | None,
    table: Tensor | None, places: Tensor | None, basis: Tensor | None, *maps: Any,
) -> Any:  # fmt: skip
    given = _layers_as_heads(info.batch_size, in_dims[:8], q, k, v, w, planes, table, places, basis)
    return _apart(info.batch_size, linear_forward(*given, *maps))


@linear_backward.register_vmap
def _(
    info: Any, in_dims: Any, q: Tensor, k: Tensor, v: Tensor, w: Tensor | None, planes: Tensor | None,
    table: Tensor | None, places: Tensor | None, basis: Tensor | None, exp: bool, q_eps: float, k_eps: float,
    norm: float, learns: bool, sums: Tensor, z: Tensor, top: Tensor, d_y: Tensor,
) -> Any:  # fmt: skip
    given = _layers_as_heads(info.batch_size, in_dims[:8], q, k, v, w, planes, table, places, basis)
    made = more_heads(info.batch_size, in_dims[13:], (sums, z, top, d_y))
    return _apart(info.batch_size, linear_backward(*given, exp, q_eps, k_eps, norm, learns, *made))


def _linear_products(q: Any, v: Any, w: Any, basis: Any) -> tuple[int, int]:
    """FLOPs of the projections of queries and keys, into a basis too, and of S and y."""
    images, heads, n, d = q
    own, sizes = 4 * images * heads * n, [] if w is None else [w[-1]]
    m, sizes = d if w is None else w[-1], sizes if basis is None else [*sizes, d]
    return own * d * sum(sizes), own * m * v[-1]


@register_flop_formula(torch.ops.erpe.linear_forward)
def _(q: Any, k: Any, v: Any, w: Any, planes: Any, table: Any, places: Any, basis: Any, *rest: Any, **more: Any) -> int:
    return sum(_linear_products(q, v, w, basis))


@register_flop_formula(torch.ops.erpe.linear_backward)
def _(q: Any, k: Any, v: Any, w: Any, planes: Any, table: Any, places: Any, basis: Any, *rest: Any, **more: Any) -> int:
    projections, products = _linear_products(q, v, w, basis)
    return projections + 2 * products
