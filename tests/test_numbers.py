"""The twelve layers in floating point: wild inputs, half precision, autocast."""

import pytest
import torch
from oracle import GRID, LINEAR, ROTARY, D, H, inputs, random_layer
from test_grid import CASES, each_case, each_variant
from torch.utils._python_dispatch import TorchDispatchMode

from erpe.model import VARIANTS, build_attention


def of_norm_1000(x):
    return 1e3 * x / x.norm(dim=-1, keepdim=True)


WILD = {
    "zero queries and keys": lambda q, k: (0 * q, 0 * k),
    "negative queries and keys": lambda q, k: (-q.abs(), -k.abs()),
    "a norm of a thousand": lambda q, k: (of_norm_1000(q), of_norm_1000(k)),
    "identical tokens": lambda q, k: (q[:, :, :1].expand_as(q), k[:, :, :1].expand_as(k)),
    "one large token": lambda q, k: (q, torch.cat([1e3 * k[:, :, :1], k[:, :, 1:]], dim=2)),
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("normalize_qk", [False, True])
@pytest.mark.parametrize("wild", WILD)
@each_variant
def test_wild_inputs_give_finite_outputs_and_gradients(variant, wild, normalize_qk, dtype):
    layer = random_layer(variant, eps=1e-6, normalize_qk=normalize_qk).to(dtype)
    q, k, v = (x.to(dtype) for x in inputs(layer))
    q, k = (x.clone().requires_grad_() for x in WILD[wild](q, k))
    y = layer(q, k, v)
    y.square().sum().backward()
    assert y.isfinite().all()
    assert y.abs().amax() < v.abs().amax() * 1.001
    assert all(x.grad.isfinite().all() for x in (q, k, *layer.parameters()))


@each_case
def test_float32_agrees_with_float64(variant, options):
    layer = random_layer(variant, **({"eps": 1e-6} | options))
    q, k, v = inputs(layer)
    expected = layer(q, k, v)
    actual = layer.float()(q.float(), k.float(), v.float())
    assert actual.dtype == torch.float32
    assert (actual - expected).abs().amax() < 1e-4 * expected.abs().amax()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each_case
def test_a_converted_layer_gives_back_the_dtype_it_is_given(variant, options, dtype):
    layer = random_layer(variant, **({"eps": 1e-6} | options))
    q, k, v = inputs(layer)
    expected = layer(q, k, v).detach()
    y = layer.to(dtype)(q.to(dtype), k.to(dtype), v.to(dtype)).detach()
    assert y.dtype == dtype
    assert (y.double() - expected).abs().mean() < 0.1  # parameters and inputs were rounded too


@each_variant
def test_a_float32_layer_takes_float64(variant):
    layer = build_attention(variant, grid=GRID, heads=H, head_dim=D)
    assert layer(*inputs(layer)).dtype == torch.float64


class Dtypes(TorchDispatchMode):
    """Dtypes of the operators that decide precision, below autocast."""

    WATCHED = ("mm", "bmm", "exp", "polar", "_fft_r2c", "_fft_c2r", "_softmax")

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.overloadpacket.__name__ in self.WATCHED:
            self.seen.add(out.dtype)
        return out


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("variant", "options"), [case for case in CASES if case.values[0] in LINEAR])
def test_features_and_contractions_are_float32_under_autocast(variant, options, given):
    layer = random_layer(variant, **({"eps": 1e-6} | options)).float()
    q, k, v = (x.to(given) for x in inputs(layer))
    expected = layer(q.float(), k.float(), v.float())
    with torch.autocast("cpu", torch.bfloat16), Dtypes() as dtypes:
        y = layer(q, k, v)
    assert dtypes.seen and not dtypes.seen & {torch.bfloat16, torch.float16}
    assert y.dtype == given
    torch.testing.assert_close(y, expected.to(given))


@pytest.mark.parametrize("variant", LINEAR)
def test_weights_are_float32_under_autocast(variant):
    layer = random_layer(variant, eps=1e-6).float()
    q, k, _ = (x.bfloat16() for x in inputs(layer))
    expected = layer.weights(q.float(), k.float())
    with torch.autocast("cpu", torch.bfloat16):
        A = layer.weights(q, k)
    torch.testing.assert_close(A, expected.to(A.dtype))


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name.startswith("softmax")])
def test_softmax_under_autocast_is_softmax_to_half_precision(variant):
    layer = random_layer(variant).float()
    q, k, v = (x.float() for x in inputs(layer))
    expected, expected_weights = layer(q, k, v), layer.weights(q, k)
    with torch.autocast("cpu", torch.bfloat16):
        y, A = layer(q, k, v), layer.weights(q, k)
    torch.testing.assert_close(y.float(), expected, rtol=0, atol=0.05)
    torch.testing.assert_close(A.float(), expected_weights, rtol=0, atol=0.05)


@pytest.mark.parametrize("variant", ROTARY)
def test_phases_are_float32_under_autocast_and_for_half_precision_inputs(variant):
    layer = random_layer(variant, grid=(3, 64)).float()  # far positions: half precision would lose the angle
    q, k, _ = (x.float() for x in inputs(layer))
    expected = layer.encoding.rotate(q, k)
    with torch.autocast("cpu", torch.bfloat16), Dtypes() as dtypes:
        turned = layer.encoding.rotate(q, k)
        (half,) = layer.encoding.rotate(q.bfloat16())
    assert dtypes.seen and not dtypes.seen & {torch.bfloat16, torch.float16}
    assert half.dtype == torch.bfloat16
    for actual, right in zip(turned, expected, strict=True):
        torch.testing.assert_close(actual, right)
    torch.testing.assert_close(half, layer.encoding.rotate(q.bfloat16().float())[0].bfloat16())
