"""The kernels in C: what torch's operators give in float64, used where they can be, and nowhere else."""

import shutil
import sys

import pytest
import torch
from counters import count_with_torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from erpe.cli import doctor
from erpe.config import ModelConfig
from erpe.model.attention import build_attention
from erpe.model.features import AS_THEY_ARE
from erpe.model.flops import forward_flops
from erpe.model.kernels import cpu, masked
from erpe.model.kernels.abi import masked_sizes
from erpe.model.vit import build

LINEAR = ["relu", "relu_rope", "relu_circulant", "favor", "favor_rope", "favor_circulant"]
MASKED = ["relu_general", "favor_general"]


@pytest.fixture
def calls(monkeypatch):
    """Names of the functions that were called."""
    seen, call = [], cpu._call
    monkeypatch.setattr(cpu, "_call", lambda name, *rest: (seen.append(name), call(name, *rest)))
    return seen


def views(batch, heads, tokens, size, seed=0):
    """q, k, v (B, H, N, D) as a model has them: views of one product, heads side by side."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, tokens, 3, heads, size, generator=generator).permute(2, 0, 3, 1, 4)


def learnt(layer, inputs, weights=False):
    """The layer's result, by its weights or not, with the gradients of inputs and parameters."""
    q, k, v = inputs = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in inputs]
    y = layer.weights(q, k) @ v if weights else layer(q, k, v)
    slope = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return [y.detach(), *torch.autograd.grad(y, [*inputs, *layer.parameters()], slope)]


def random_layer(variant, seed=0, **options):
    """float32, with random parameters."""
    layer = build_attention(variant, seed=seed, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            size = 0.1 if "coefficients" in name else 0.5  # about a radian a patch: float32 rounds great angles
            parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    return layer


def assert_rounding(found, expected, tolerance=2e-5):
    """Apart by rounding of float32, relative to the largest entry."""
    for one, other in zip(found, expected, strict=True):
        assert (one.double() - other).abs().amax() <= tolerance * max(1.0, other.abs().amax()), one.shape


def at_a_kink(layer, q, k):
    """Whether a number is so near to zero that rounding decides on which side ReLU sees it, so on its slope."""
    if not layer.config.variant.startswith("relu"):
        return False
    q, k, phi = layer.features.prepare(q, k)
    rotation = layer.encoding.rotation(q)
    numbers = torch.stack([q, k] if rotation is None else rotation.turn(q, k))
    return bool((numbers if phi.w is None else numbers @ phi.w).abs().amin() < 2e-6)


def test_they_are_there_where_a_compiler_is():
    assert cpu.LIBRARY or not shutil.which("cc")


@pytest.mark.slow
@pytest.mark.parametrize("variant", LINEAR + MASKED)
@given(st.data())
@settings(deadline=None, max_examples=12)
def test_they_are_the_dense_weights_times_v_with_all_gradients(variant, data):
    draw = lambda *values: data.draw(st.sampled_from(values))  # noqa: E731
    grid = data.draw(st.integers(1, 12)), data.draw(st.integers(2, 23))
    heads, size, batch = draw(1, 3), draw(4, 12, 16, 32, 36), draw(1, 2)
    options = {"cls": draw(True, False), "features": draw(8, 24, 33), "normalize_qk": draw(True, False)}
    if variant.startswith("relu"):
        options |= {"relu_projection": draw("none", "orthogonal"), "eps": 1e-2}
    options |= {"rope": draw("axial", "mixed"), "circulant_block": draw(None, size // 2) if size > 4 else None}
    layer = random_layer(variant, grid=grid, heads=heads, head_dim=size, **options)
    inputs = views(batch, heads, layer.shape.tokens, size)
    assert cpu.serves(*inputs) or not cpu.LIBRARY
    found = learnt(layer, inputs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "LIBRARY", None)
        others = learnt(layer, inputs)
    inputs = [x.double() for x in inputs]
    assume(not at_a_kink(layer.double(), *inputs[:2]))
    for one, other, exact in zip(found, others, learnt(layer, inputs, weights=True), strict=True):
        # Tiny denominators, and sums of angles over all tokens, are hard to say in float32: for torch's operators, too.
        tolerance = 2e-5 * max(1.0, exact.abs().amax()) + 4 * (other - exact).abs().amax()
        assert (one - exact).abs().amax() <= tolerance, one.shape


@pytest.mark.parametrize(
    ("variant", "names"),
    [
        ("favor_rope", ["linear_forward", "linear_backward"]),
        ("relu_general", ["masked_forward", "masked_backward"]),
    ],
)
def test_layers_in_float32_use_them_and_none_other_does(variant, names, calls, monkeypatch):
    layer = random_layer(variant, grid=(3, 5), heads=2, head_dim=8)
    inputs = views(2, 2, 15, 8)
    learnt(layer, inputs)
    assert calls == names
    learnt(layer.double(), [x.double() for x in inputs])
    assert calls == names
    monkeypatch.setattr(cpu, "LIBRARY", None)
    without = learnt(layer.float(), inputs)
    assert calls == names
    monkeypatch.undo()
    assert_rounding(learnt(layer, inputs), without)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("variant", ["relu_rope", "favor_circulant"])
def test_a_layer_of_another_type_than_its_inputs_turns_and_learns_the_same(variant, dtype, calls):
    layer = random_layer(variant, grid=(3, 5), heads=2, head_dim=16, rope="mixed", eps=1e-2)
    layer = layer.to(dtype).float().requires_grad_()  # what survives in either
    inputs = views(2, 2, 15, 16)
    expected = learnt(layer, inputs)
    found = learnt(layer.to(dtype), inputs)
    assert len(calls) == 4 if cpu.LIBRARY else not calls
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.to(other.dtype), other, rtol=2e-2, atol=2e-3)


def test_who_counts_flops_sees_the_operators(calls):
    config = ModelConfig(variant="favor_general", image=(1, 8, 8), patch=2, classes=3, width=16, depth=1, heads=2)
    model, images = build(config), torch.randn(1, *config.image)
    assert count_with_torch(model, images) == forward_flops(config)
    assert not calls
    model(images)
    assert calls == ["masked_forward"]


@pytest.mark.parametrize("variant", ["relu", "favor_rope", "relu_general"])
def test_threads_change_nothing(variant):
    layer = random_layer(variant, grid=(9, 13), heads=3, head_dim=20, rope="mixed")
    inputs, threads = views(3, 3, 117, 20), torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(learnt(layer, inputs))
    finally:
        torch.set_num_threads(threads)
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))


def test_log_weights_too_far_apart_for_one_factor_are_left_to_torch(calls):
    layer = random_layer("relu_general", grid=(1, 40), heads=1, head_dim=16)
    inputs = views(1, 1, 40, 16)
    with torch.no_grad():
        layer.encoding.bias.copy_(torch.linspace(0, 300, 79).view(1, 1, 79))  # a query's window is half of it
    assert_rounding(learnt(layer, inputs), learnt(layer.double(), [x.double() for x in inputs], weights=True))
    assert not calls
    with torch.no_grad():
        layer.float().encoding.bias.mul_((masked.SPAN - 1) / 150)
    assert_rounding(learnt(layer, inputs), learnt(layer.double(), [x.double() for x in inputs], weights=True))
    assert len(calls) == 2


@pytest.mark.parametrize("scale", [1e-3, 30.0, 1e3])
def test_exponents_of_any_size_stay_finite(scale):
    layer = random_layer("favor", grid=(4, 4), heads=2, head_dim=16)
    q, k, v = views(2, 2, 16, 16)
    found = learnt(layer, (q * scale, k * scale, v))
    assert all(x.isfinite().all() for x in found)
    # Attention of weights that sum to one.
    torch.testing.assert_close(layer(q * scale, k * scale, torch.ones_like(v)), torch.ones_like(v))


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("variant", ["relu", "favor", "relu_general", "favor_general"])
def test_what_is_no_number_stays_visible(variant, which):
    layer = random_layer(variant, grid=(2, 2), heads=1, head_dim=4)
    inputs = views(1, 1, 4, 4)
    inputs[which][0, 0, 1, 2] = torch.nan
    assert layer(*inputs).isnan().any()


@pytest.mark.skipif(not cpu.LIBRARY, reason="no C compiler when erpe was installed")
@pytest.mark.parametrize("way", ["forward", "backward"])
def test_the_scratch_of_the_masked_product_grows_with_n(way):
    def entries(side):
        q = torch.empty(1, 1, side * side, 32)
        size = masked_sizes(q, q, torch.empty(1, 2 * side - 1, 2 * side - 1), None, AS_THEY_ARE.maps)
        return getattr(cpu.LIBRARY, f"masked_{way}_room")(size, 1)

    assert entries(128) / entries(64) == pytest.approx(4, rel=0.1)
    assert entries(128) < 20 * 128**2 * 32


@pytest.mark.parametrize(("platform", "said"), [("linux", "install a C compiler"), ("darwin", "lack -fopenmp")])
def test_where_there_are_no_kernels_in_c_the_doctor_says_why(platform, said, monkeypatch):
    monkeypatch.setattr(cpu, "LIBRARY", None)
    looks = doctor.devices()
    next(looks)
    monkeypatch.setattr(sys, "platform", platform)
    found = next(looks)
    assert (found.what, found.state) == ("kernels", "note") and said in found.text and "torch's operators" in found.text
