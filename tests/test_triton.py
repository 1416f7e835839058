"""Kernels for GPUs on a machine without one: what they compute, in Triton's interpreter (see conftest.py), and what
compilers make of them. None of this says that they are fast, or that they run on a GPU."""

import json
import logging
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from cubins import CASES
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from torch._dynamo.utils import counters
from torch._subclasses import FakeTensorMode
from torch.func import functional_call
from torch.nn.attention.flex_attention import flex_attention
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from erpe.model import build_attention
from erpe.model.features import FeatureMap, Map, Maps
from erpe.model.kernels import cpu, gpu
from erpe.model.kernels.gpu import blocks, flex, launch, masked_launch, masked_ops, ops
from erpe.model.kernels.linear import by_torch
from erpe.model.kernels.tiles import dense_product, window_top
from erpe.model.rotation import Rotation
from erpe.training import compilation
from erpe.training.compilation import Compiled

FAVOR = Maps(Map("exp of query", 0.0), Map("exp of key", 1e-2, 0.2))
RELU = Maps(Map("relu", 0.1), Map("relu", 0.2))
SOME = settings(deadline=None, max_examples=3, phases=[Phase.explicit, Phase.generate])  # shrinking would take minutes
SIZES = st.tuples(*(st.integers(1, most) for most in (2, 20, 18, 20)))
"""Heads, D, Dv, m."""
PLAIN = (None,) * 4
"""Of a product without a rotation."""
KINDS = {"relu": (RELU, False), "relu with projections": (RELU, True), "favor": (FAVOR, True)}


@contextmanager
def exact_products():
    """As float32 has them, not tensor cores: what is left are mistakes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "nearest", lambda x: x)
        yield


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Few tokens are many here, so that all ways are short."""
    monkeypatch.setattr(launch, "FEW", 32)
    monkeypatch.setattr(launch, "PART", 32)
    monkeypatch.setattr(masked_launch, "BLOCK", 16)


@pytest.fixture
def everywhere(monkeypatch):
    """Layers take the kernels on any device, though there are others for CPUs."""
    monkeypatch.setattr(gpu, "serves", lambda *given: gpu.WANTED[0])
    monkeypatch.setattr(cpu, "LIBRARY", None)


def noise(*shape, seed=0, wild=1.0):
    return wild * torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def linear_problem(kind, images, heads, n, d, dv, m, dtype=torch.float32):
    """q, k, v, w, maps; w is one a head where there are two heads."""
    maps, projected = KINDS[kind]
    q, k, v = (noise(images, heads, n, size, seed=seed).to(dtype) for seed, size in enumerate((d, d, dv)))
    w = noise(*((heads,) if heads == 2 else ()), d, m, seed=4) * d**-0.25 if projected else None
    return q, k, v, w, maps


def errors(found, expected):
    """|x - exact| / |exact| of each; what is about zero counts as a tenth."""
    exact = [y.detach().double() for y in expected]
    least = [max(float(y.norm()), 0.1 * y.numel() ** 0.5) for y in exact]
    return [float((x.detach() - y).norm()) / size for x, y, size in zip(found, exact, least, strict=True)]


def worst(found, expected):
    """The largest of `errors`."""
    return max(errors(found, expected))


def assert_as_good_as_torch(errors_of, torchs, *problem):
    """Errors of float32's rounding alone: what torch's operators in float32 have on the same numbers, or less."""
    with exact_products():
        found = errors_of(*problem)
    for own, usual in zip(found, errors_of(*problem, product=torchs), strict=True):
        assert own < max(1e-5, 8 * usual)


def rotation_of(heads, h, w, d, planes, outside=0, basis=False):
    """A rotation by places of its own, of some of the planes."""
    axes = torch.linalg.qr(noise(d, d, seed=6))[0] if basis else None
    return Rotation(noise(2, heads, planes, seed=5), noise(h, seed=7), noise(w, seed=8), outside, axes)


def linear_errors(q, k, v, w, maps, rotation=None, product=ops.linear_product):
    """Of the kernels, of y and all slopes, against torch's operators in float64 on the same numbers."""

    def passed(product, learn, w, rotation):
        turn = rotation and rotation._replace(planes=rotation.planes.requires_grad_())
        y = product(*learn, FeatureMap(maps, w), turn)
        return [y, *torch.autograd.grad(y, [*learn, *([turn.planes] if turn else [])], slope.to(y.dtype))]

    slope = noise(*v.shape, seed=9).to(v.dtype)
    wide = rotation and Rotation(*(x.double() if isinstance(x, torch.Tensor) else x for x in rotation))
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    expected = passed(by_torch, exact, w if w is None else w.double(), wide)
    return errors(passed(product, [x.requires_grad_() for x in (q, k, v)], w, rotation), expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@example(1, (1, 1, 1, 1))
@example(15, (1, 8, 33, 1))
@example(16, (1, 16, 16, 16))
@example(32, (1, 33, 1, 17))  # the most for one pass
@example(64, (1, 1, 17, 15))  # two whole parts
@given(st.sampled_from([7, 17, 33]), SIZES)
@SOME
def test_linear_kernels_give_what_float64_gives_with_all_slopes(kind, n, sizes):
    heads, *sizes = sizes
    assert_as_good_as_torch(linear_errors, by_torch, *linear_problem(kind, 1, heads, n, *sizes))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["relu", "favor"])
@example((1, 1), 0, (1, 2, 1, 1), 1, True)
@example((4, 4), 0, (1, 8, 16, 16), 4, False)
@example((1, 16), 1, (1, 33, 8, 17), 15, True)
@given(st.sampled_from([(2, 3), (9, 5)]), st.integers(0, 1), SIZES, st.integers(1, 9), st.booleans())
@SOME
def test_queries_and_keys_are_turned_within_the_kernels_and_frequencies_get_slopes(
    kind, grid, outside, sizes, planes, basis
):
    (h, w), (heads, d, *sizes) = grid, sizes
    d = max(d, 2)
    rotation = rotation_of(heads, h, w, d, min(planes, d // 2), outside, basis)
    problem = linear_problem(kind, 1, heads, h * w + outside, d, *sizes)
    assert_as_good_as_torch(linear_errors, by_torch, *problem, rotation)


@pytest.mark.parametrize("d", [40, 72])
def test_larger_heads_too_though_torch_turns_them_or_makes_their_basis(d):
    rotation = rotation_of(1, 2, 3, d, d // 2, basis=True)
    assert_as_good_as_torch(linear_errors, by_torch, *linear_problem("relu", 1, 1, 6, d, 70, d), rotation)
    assert_as_good_as_torch(masked_errors, dense_product, *masked_problem(1, 1, 2, 3, d, 70))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_in_tensor_cores_precision_linear_kernels_are_off_by_less_than_a_thousandth(kind):
    rotation = rotation_of(1, 5, 10, 32, 15, basis=True)
    assert 1e-5 < max(linear_errors(*linear_problem(kind, 1, 1, 50, 32, 32, 64), rotation)) < 1e-3


class Tf32(TorchFunctionMode):
    """Rounds operands of products to TF32: of vectors and one matrix for all, or of all others."""

    def __init__(self, shared):
        super().__init__()
        self.shared = shared

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.matmul, torch.Tensor.__matmul__) and (args[1].ndim == 2) == self.shared:
            args = [(x.contiguous().view(torch.int32) + 0x1000 & -0x2000).view(torch.float32) for x in args]
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("shared", "least", "most"), [(True, 1e-3, 2e-3), (False, 1e-4, 1e-3)])
def test_exponents_are_not_made_in_tf32_whose_error_is_too_large_and_sums_are(shared, least, most, monkeypatch):
    monkeypatch.setattr(cpu, "LIBRARY", None)
    assert torch.backends.cuda.matmul.fp32_precision in ("none", "ieee")
    layer = build_attention("favor_circulant", grid=(8, 8), heads=4, head_dim=32)
    q, k, v = (noise(2, 4, 64, 32, seed=seed, wild=3.0 if seed < 2 else 1.0) for seed in range(3))
    with torch.no_grad(), Tf32(shared):
        found = layer(q, k, v)
    assert least < worst([found], [layer.double()(q.double(), k.double(), v.double())]) < most


@pytest.mark.parametrize("kind", ["relu", "favor"])
def test_half_as_wide_inputs_are_read_as_they_are(kind):
    # The interpreter has no products of bfloat16: kernels widen what they load, and round what they store.
    assert max(linear_errors(*linear_problem(kind, 1, 2, 20, 8, 8, 16, torch.bfloat16))) < 5e-3


def test_large_exponents_and_one_wild_image_spoil_nothing():
    q, k, v, w, maps = linear_problem("favor", 2, 2, 40, 8, 8, 16)
    with exact_products():
        before, *_ = ops.linear_forward(q, k, v, w, *PLAIN, *ops.numbers(maps))
        k[1] *= 30
        after, *_ = ops.linear_forward(q, k, v, w, *PLAIN, *ops.numbers(maps))
        assert torch.equal(before[0], after[0]) and after.isfinite().all()
        assert max(linear_errors(q, 5 * k, v, w, maps)) < 1e-3


def masked_problem(images, heads, h, w, m, dv):
    """phi_q, phi_k, v, bias, top."""
    phi_q, phi_k = (noise(images, heads, h * w, m, seed=seed).abs() for seed in (0, 1))
    bias = 2 * noise(heads, 2 * h - 1, 2 * w - 1, seed=3)
    return phi_q, phi_k, noise(images, heads, h * w, dv, seed=2), bias, window_top(bias)


def masked_errors(phi_q, phi_k, v, bias, top, product=masked_ops.masked_forward):
    """As `linear_errors`, of numerators, denominators and slopes, those of the table of offsets too."""
    exact = [x.double().requires_grad_() for x in (phi_q, phi_k, v, bias)]
    made = dense_product(*exact, top.double())
    slopes = [noise(*x.shape, seed=9) for x in made]
    expected = torch.autograd.grad(made, exact, [x.double() for x in slopes])
    learn = [x.requires_grad_() for x in (phi_q, phi_k, v, bias)]
    found = product(*learn, top)
    return errors([*found, *torch.autograd.grad(found, learn, slopes)], [*made, *expected])


@pytest.mark.slow
@example((1, 1), (1, 1, 1, 1))
@example((3, 5), (1, 1, 8, 17))
@example((4, 4), (1, 16, 16, 16))
@example((1, 17), (1, 33, 15, 1))
@given(st.sampled_from([(3, 4), (1, 20), (9, 2)]), SIZES)
@SOME
def test_masked_kernels_give_what_float64_gives_with_all_slopes(grid, sizes):
    heads, m, dv, more = sizes
    assert_as_good_as_torch(masked_errors, dense_product, *masked_problem(1 + more % 2, heads, *grid, m, dv))


def test_slopes_of_log_weights_are_the_same_whatever_the_memory_for_them(monkeypatch):
    monkeypatch.setattr(masked_launch, "ENTRIES", 24)  # a row of the grid at a time
    assert_as_good_as_torch(masked_errors, dense_product, *masked_problem(2, 1, 5, 4, 3, 3))


def test_in_tensor_cores_precision_masked_kernels_are_off_by_less_than_a_thousandth():
    assert 1e-5 < max(masked_errors(*masked_problem(1, 1, 5, 6, 32, 32))) < 1e-3


LINEAR = [f"{attention}{encoding}" for attention in ("relu", "favor") for encoding in ("", "_rope", "_circulant")]


@pytest.mark.slow
@pytest.mark.parametrize("variant", [*LINEAR, "relu_general", "favor_general"])
def test_a_layer_takes_the_kernels_behind_its_two_functions(variant, everywhere):
    layer = build_attention(variant, grid=(2, 3), heads=2, head_dim=8, features=8, cls="general" in variant)
    inputs = [noise(1, 2, layer.shape.tokens, 8, seed=seed) for seed in range(3)]
    with torch.profiler.profile() as seen:
        y = layer(*(x.requires_grad_() for x in inputs))
        y.sum().backward()
    names = {event.name for event in seen.events()}
    assert f"erpe::{'masked' if 'general' in variant else 'linear'}_backward" in names
    with gpu.torch_only():
        exact = layer.double()(*(x.double() for x in inputs))
    assert worst([y], [exact]) < 1e-3


@pytest.mark.parametrize("variant", ["favor_rope", "relu_general"])
@pytest.mark.parametrize("method", ["torch", "dense"])
def test_kernels_are_taken_by_auto_alone_and_none_at_all_where_torchs_operators_are_asked_for(
    variant, method, monkeypatch
):
    monkeypatch.setattr(gpu, "serves", lambda *given: True)
    for way in ("forward", "backward"):
        monkeypatch.setattr(launch, way, pytest.fail)
        monkeypatch.setattr(masked_launch, way, pytest.fail)
    if method == "torch":
        monkeypatch.setattr(cpu, "_call", pytest.fail)
    layer = build_attention(variant, grid=(2, 3), heads=2, head_dim=8, features=8, method=method)
    layer(*(noise(1, 2, 6, 8, seed=seed).requires_grad_() for seed in range(3))).sum().backward()


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("variant", ["favor_rope", "relu_circulant", "favor_general"])
def test_a_compiled_layer_is_one_graph_with_the_kernels_in_it_and_has_their_slopes(
    variant, packed, everywhere, monkeypatch
):
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)  # pytest would ask for all of it
    layer = build_attention(variant, grid=(2, 2), heads=1, head_dim=8, features=8, cls="general" in variant)
    learn = [noise(1, 1, layer.shape.tokens, 8, seed=seed) for seed in range(3)]
    names = [name for name, _ in layer.named_parameters()]
    learn += [noise(*x.shape) for x in layer.parameters()]
    learn = [(torch.stack([x, -x]) if packed else x).requires_grad_() for x in learn]

    def call(*given):
        return functional_call(layer, dict(zip(names, given[3:], strict=True)), given[:3])

    many = torch.vmap(call) if packed else call
    counters.clear()
    found, expected = ([y, *torch.autograd.grad(y.square().sum(), learn)]
                       for y in (Compiled(many, layer, pytest.fail)(*learn), many(*learn)))  # fmt: skip
    assert worst(found, expected) < 1e-6
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_operators_fit_torchs_rules_for_operators():
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    q, k, v, w, maps = linear_problem("favor", 1, 1, 6, 4, 3, 6)
    rotation = rotation_of(1, 2, 3, 4, 2, basis=True)
    turn = rotation.planes.requires_grad_(), rotation.table(), rotation.places(), rotation.basis
    given = (q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), w, *turn, *ops.numbers(maps))
    torch.library.opcheck(torch.ops.erpe.linear_forward.default, given, test_utils=checks)
    given = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in given)
    y, *made = ops.linear_forward(*given)
    given = (*given, True, *made, noise(*y.shape))
    torch.library.opcheck(torch.ops.erpe.linear_backward.default, given, test_utils=checks)
    masked = [x.requires_grad_() for x in masked_problem(1, 1, 2, 2, 3, 3)[:4]]
    masked.append(window_top(masked[3]).detach())
    torch.library.opcheck(torch.ops.erpe.masked_forward.default, tuple(masked), test_utils=checks)


def test_layers_side_by_side_are_one_of_more_heads_also_in_the_slopes():
    q, k, v, _, maps = linear_problem("favor", 1, 1, 6, 4, 3, 5)
    rotation, w = rotation_of(1, 2, 3, 4, 2, basis=True), noise(3, 4, 5)
    many = [torch.stack([x, 2 * x, -x]).requires_grad_() for x in (q, k, v, rotation.planes)]

    def layer(product):
        return lambda q, k, v, planes, w: product(q, k, v, FeatureMap(maps, w), rotation._replace(planes=planes))

    with exact_products():
        found, expected = (torch.vmap(layer(each))(*many, w) for each in (ops.linear_product, by_torch))
        slopes = [torch.autograd.grad(y.square().sum(), many) for y in (found, expected)]
    assert worst([found, *slopes[0]], [expected, *slopes[1]]) < 1e-5
    phi_q, phi_k, v, bias, top = masked_problem(1, 1, 2, 3, 4, 3)
    masked = [torch.stack([x, x + 1]).requires_grad_() for x in (phi_q, phi_k, v, bias)]
    tops = torch.stack([top, top + 1])
    with exact_products():
        found, expected = (torch.vmap(each)(*masked, tops) for each in (masked_ops.masked_forward, dense_product))
        slopes = [torch.autograd.grad(sum(x.square().sum() for x in each), masked) for each in (found, expected)]
    assert worst([*found, *slopes[0]], [*expected, *slopes[1]]) < 1e-5


def test_slopes_have_slopes():
    q, k, v, w, maps = linear_problem("favor", 1, 1, 6, 4, 3, 5)
    rotation = rotation_of(1, 2, 3, 4, 2, basis=True)
    learn, seconds = [x.requires_grad_() for x in (q, k, v, rotation.planes)], []
    with exact_products():
        for product in (ops.linear_product, by_torch):
            y = product(q, k, v, FeatureMap(maps, w), rotation)
            first = torch.autograd.grad(y.square().sum(), learn, create_graph=True)
            seconds.append(torch.autograd.grad(sum(x.square().sum() for x in first), learn))
    assert worst(seconds[0], seconds[1]) < 1e-4


@pytest.mark.parametrize("variant", ["relu_circulant", "favor", "favor_general"])
def test_counters_of_flops_see_what_torchs_operators_would_take(variant, everywhere):
    layer = build_attention(variant, grid=(2, 3), heads=2, head_dim=8, features=16)
    inputs = [noise(1, 2, 6, 8, seed=seed).requires_grad_() for seed in range(3)]

    def counted():
        with FlopCounterMode(display=False) as counter:
            layer(*inputs).sum().backward()
        return counter.get_total_flops()

    found = counted()
    with gpu.torch_only():
        assert found == counted() > 0


def test_cpus_and_what_does_not_fit_are_left_to_others():
    x = noise(1, 1, 4, 8)
    assert not gpu.serves(x, x, x, 8)
    with FakeTensorMode():
        x, wide = (torch.empty(1, 1, 4, d, device="cuda") for d in (8, 128))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gpu, "AVAILABLE", True)
            assert gpu.serves(x, x, x, 8) and gpu.serves(x.bfloat16(), x, x, 8)
            assert gpu.serves(wide, wide, wide, 128) and not gpu.serves(wide, wide, wide, 128, projected=True)
            assert not gpu.serves(wide, wide, wide, 129) and not gpu.serves(x.double(), x, x, 8)
            with gpu.torch_only():
                assert not gpu.serves(x, x, x, 8)


@pytest.mark.parametrize("way", ["forward", "backward"])
@pytest.mark.parametrize("variant", ["favor", "relu_general"])
def test_where_kernels_cannot_be_built_torch_does_it_and_says_so_once(variant, way, everywhere, monkeypatch):
    def broken(*given):
        raise RuntimeError("out of resource: shared memory,\nRequired: 999")

    monkeypatch.setattr(gpu, "REFUSED", set())
    monkeypatch.setattr(masked_launch if "general" in variant else launch, way, broken)
    layer = build_attention(variant, grid=(2, 3), heads=2, head_dim=8, features=8)
    learn = [noise(1, 2, 6, 8, seed=seed).requires_grad_() for seed in range(3)]
    slope, found = noise(1, 2, 6, 8, seed=4), []
    with pytest.warns(
        UserWarning, match="do not run here .RuntimeError: out of resource: shared memory, Required: 999"
    ):
        found.append(torch.autograd.grad(layer(*learn), learn, slope))
    for _ in range(2):  # without a warning, which would be an error
        found.append(torch.autograd.grad(layer(*learn), learn, slope))
    assert worst(found[0], found[1]) < 1e-3 and worst(found[1], found[2]) == 0


REGISTERS = {
    ("linear.backward", "relu", 90): 106,
    ("linear.backward", "favor_circulant", 80): 239,
    ("linear.backward", "favor_circulant", 90): 216,
    ("linear.backward", "favor_circulant", 100): 218,
    ("linear.backward", "favor_rope, D = 64", 80): 255,
    ("linear.backward", "relu, D = 128", 80): 226,
    ("linear.backward", "favor_rope, D = 64, m = 128", 90): 242,
    ("masked.key_slopes", "general", 80): 255,
    ("masked.key_slopes", "general, m = 128", 80): 255,
    ("masked.pair_slopes", "general, m = 128", 80): 182,
    ("linear.forward", "favor_circulant", 90): 162,
    ("linear.forward_sums", "favor_circulant", 90): 128,
    ("linear.forward_averages", "favor_circulant", 90): 123,
    ("linear.backward_queries", "favor_circulant", 90): 204,
    ("linear.backward_keys", "favor_circulant", 90): 136,
    ("masked.forward", "general", 90): 192,
    ("masked.query_slopes", "general", 90): 194,
}
"""Of a thread; 255 are all that there are. Beyond them a program keeps numbers in memory."""


@pytest.mark.slow
def test_no_kernel_spills_and_registers_are_those_of_the_table(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(Path(__file__).parent / "cubins.py")]
    rows = json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert [tuple(row[:3]) for row in rows] == [(name, what, capability) for name, what, _, capability in CASES]
    for name, what, capability, registers, spilled, shared in rows:
        assert spilled == 0 and registers <= REGISTERS[name, what, capability]
        assert shared <= (227 if "128" in what else 96) * 2**10


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("cls", [False, True])
def test_flexattention_adds_the_log_weight_of_each_offset_with_its_slope(cls, monkeypatch):
    layer = build_attention("softmax_general", grid=(3, 4), heads=2, head_dim=8, cls=cls)
    with torch.no_grad():
        for x in layer.encoding.parameters():
            x.copy_(noise(*x.shape))
    q, k, v = (noise(2, 2, 12 + cls, 8, seed=seed) for seed in range(3))
    expected, learn = layer(q, k, v), [*layer.encoding.parameters()]
    monkeypatch.setattr(flex, "_compiled", lambda: flex_attention)  # slow, and runs on CPUs without slopes
    monkeypatch.setattr(flex, "serves", lambda q: True)
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)  # pytest would ask for all of it
    with torch.no_grad():
        assert worst([layer.fused(q, k, v)], [expected]) < 1e-6
    places = torch.meshgrid(*(torch.arange(n) for n in (2, 2, 12 + cls, 12 + cls)), indexing="ij")
    weights = flex.score_of(layer.encoding.mask())(q @ k.mT * 8**-0.5, *places).softmax(-1)
    slopes = [torch.autograd.grad((x * v).sum(), learn) for x in (weights @ v, expected)]
    assert worst(*slopes) < 1e-5


def test_flexattention_is_taken_on_cuda_where_it_is_wanted_and_atomics_are_allowed():
    with FakeTensorMode():
        q = torch.empty(1, 1, 4, 8, device="cuda")
        assert not flex.serves(q)
        with flex.wanted():
            assert flex.serves(q) and not flex.serves(torch.empty(1, 1, 4, 8))
            torch.use_deterministic_algorithms(True)
            try:
                assert not flex.serves(q)
            finally:
                torch.use_deterministic_algorithms(False)
        assert not flex.serves(q)
