"""Properties of all twelve attentions, in the order: the formula, what it implies, numbers, cost, the contract."""

import inspect
from itertools import combinations

import numpy as np
import pytest
import torch
from oracle import DV, GRID, LINEAR, ROTARY, B, D, H, explicit_weights, inputs, random_layer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from erpe.errors import ConfigError, ErpeError, ShapeError
from erpe.model import VARIANTS, build_attention

N = GRID[0] * GRID[1]


def cases():
    """Each variant with each switch that changes its function."""
    for variant in VARIANTS:
        attention, _, encoding = variant.partition("_")
        switches = [{}, {"cls": True}, {"normalize_qk": True}]
        if attention == "relu":
            switches += [{"relu_projection": "orthogonal"}]
        if variant in ROTARY:
            switches += [{"rope": "mixed", "cls": True}] if encoding == "rope" else [{"circulant_block": 4}]
            if variant in LINEAR:
                switches += [{"rotary_placement": "post"}, {"rotary_placement": "post", "cls": True}]
                switches += [{"rotary_placement": "post", "rope": "mixed", "circulant_block": 4}]
        if encoding == "general" and variant in LINEAR:
            switches += [{"method": "fft"}, {"method": "fft", "cls": True}, {"method": "dense", "normalize_qk": True}]
        for options in switches:
            yield pytest.param(variant, options, id="-".join([variant, *(str(x) for x in options.values())]))


CASES = list(cases())
each_case = pytest.mark.parametrize(("variant", "options"), CASES)
each_variant = pytest.mark.parametrize("variant", VARIANTS)


def positive(options):
    """Rows of weights sum to one, unless features were rotated in the numerator only."""
    return options.get("rotary_placement") != "post"


# The formula


@each_case
def test_layer_is_the_explicit_sum_over_pairs(variant, options):
    layer = random_layer(variant, **options)
    q, k, v = inputs(layer)
    A = explicit_weights(layer, q, k)
    np.testing.assert_allclose(layer.weights(q, k).detach(), A, rtol=0, atol=1e-11)
    np.testing.assert_allclose(layer(q, k, v).detach(), A @ v.numpy(), rtol=0, atol=1e-11)


@each_case
def test_constant_values_come_back_and_weights_are_positive(variant, options):
    layer = random_layer(variant, **options)
    q, k, v = inputs(layer)
    total = layer(q, k, torch.ones_like(v))
    if positive(options):
        torch.testing.assert_close(total, torch.ones_like(v), rtol=0, atol=1e-10)
        assert (layer.weights(q, k) >= 0).all()
    else:
        assert (total - 1).abs().amax() > 0.01


@each_case
def test_output_is_linear_in_the_values(variant, options):
    layer = random_layer(variant, **options)
    q, k, v = inputs(layer)
    u = inputs(layer, seed=5)[2]
    torch.testing.assert_close(layer(q, k, 2 * v - 3 * u), 2 * layer(q, k, v) - 3 * layer(q, k, u), rtol=0, atol=1e-9)


def test_no_two_names_or_switches_are_one_function():
    # The same projection, the same inputs, position parameters not zero.
    outputs = {}
    for case in CASES:
        variant, options = case.values
        if options.get("cls") or options.get("method") or (variant, options) == ("relu", {"normalize_qk": True}):
            continue  # other shapes; equal by design; for a ReLU without encoding only keys are re-weighted
        layer = random_layer(variant, **options)
        if hasattr(layer.features if variant in LINEAR else layer, "projection"):
            layer.features.projection = random_layer("favor").features.projection
        outputs[case.id] = layer(*inputs(layer))
    for (one, first), (other, second) in combinations(outputs.items(), 2):
        assert (first - second).abs().mean() > 1e-2, f"{one} is {other}"


# What it implies


@pytest.mark.parametrize("wild", [100.0, 0.0])
@each_case
def test_an_image_ignores_its_batch_neighbours(variant, options, wild):
    layer = random_layer(variant, **({"eps": 1e-6} | options))
    q, k, v = inputs(layer, batch=3)
    # Far from every projection, so that a maximum over the whole batch would leave nothing but eps.
    q, k = 4 * q, 4 * k
    alone = layer(q[1:2], k[1:2], v[1:2])
    with_neighbours = [x.clone() for x in (q, k, v)]
    for x in with_neighbours:
        x[[0, 2]] *= wild
    torch.testing.assert_close(layer(*with_neighbours)[1:2], alone, rtol=0, atol=1e-10)


def test_a_stabiliser_over_the_batch_would_show():
    layer = random_layer("favor", eps=1e-6)
    q, k, _ = inputs(layer, batch=2)
    q, k = 4 * q, 4 * k
    k[1] = 0
    W = layer.features.projection
    x = k * D**-0.25
    b = x @ W.T - x.square().sum(-1, keepdim=True) / 2
    phi_q, _ = layer.features(q, k)
    A = phi_q @ ((b - b.amax()).exp() + 1e-6).mT
    assert (A / A.sum(-1, keepdim=True) - layer.weights(q, k))[0].abs().sum(-1).amax() > 0.1


@pytest.mark.parametrize("head", range(H))
@each_variant
def test_heads_do_not_mix(variant, head):
    layer = random_layer(variant)
    q, k, v = inputs(layer)
    y = layer(q, k, v)
    others = [h for h in range(H) if h != head]
    for x in (q, k, v):
        x[:, others] = x[:, others].flip(1) + 1
    torch.testing.assert_close(layer(q, k, v)[:, head], y[:, head], rtol=0, atol=1e-12)


@each_variant
def test_tokens_can_be_permuted_exactly_if_there_is_no_encoding(variant):
    layer = random_layer(variant)
    q, k, v = inputs(layer)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    difference = (layer(q[:, :, order], k[:, :, order], v[:, :, order]) - layer(q, k, v)[:, :, order]).abs().amax()
    assert difference < 1e-12 if "_" not in variant else difference > 0.01


@each_variant
def test_keys_and_values_can_be_permuted_together_without_an_encoding(variant):
    layer = random_layer(variant)
    q, k, v = inputs(layer)
    difference = (layer(q, k.flip(2), v.flip(2)) - layer(q, k, v)).abs().amax()
    assert difference < 1e-12 if "_" not in variant else difference > 0.01


@each_case
def test_every_position_parameter_gets_a_gradient(variant, options):
    layer = random_layer(variant, **options)
    parameters = dict(layer.encoding.named_parameters())
    learned = variant.endswith(("general", "circulant")) or (variant.endswith("rope") and "rope" in options)
    assert bool(parameters) == learned
    gradients = torch.autograd.grad(layer(*inputs(layer)).square().sum(), parameters.values()) if learned else []
    for name, gradient in zip(parameters, gradients, strict=True):
        if name == "coefficients":  # of c only the odd part counts, so that some entries of a block have none
            block = options.get("circulant_block", gradient.shape[-1])
            gradient = gradient.unflatten(-1, (-1, block))[..., 1 : (block + 1) // 2]
        assert (gradient.abs() > 1e-9).all(), name


@pytest.mark.slow
@each_case
def test_gradients_are_those_of_finite_differences(variant, options):
    small = options | ({"circulant_block": 4} if "circulant_block" in options else {})
    layer = random_layer(variant, grid=(2, 1), heads=2, head_dim=4, **({"features": 4} | small))
    leaves = [(x.abs() + 0.1 if "relu" in variant else x).requires_grad_() for x in inputs(layer, batch=1, v_dim=2)]
    parameters = dict(layer.named_parameters())

    def f(q, k, v, *values):
        return torch.func.functional_call(layer, dict(zip(parameters, values, strict=True)), (q, k, v))

    assert torch.autograd.gradcheck(f, (*leaves, *parameters.values()))


@each_variant
def test_values_may_have_any_size(variant):
    layer = random_layer(variant)
    for size in (1, D, 3 * D):
        q, k, v = inputs(layer, v_dim=size)
        assert layer(q, k, v).shape == (B, H, N, size)


# Cost


class LargestTensor(TorchDispatchMode):
    """Entries in the memory of the largest tensor that any operator returns."""

    def __init__(self):
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        sizes = [x.untyped_storage().nbytes() // x.element_size() for x in tensors]
        self.entries = max([self.entries, *sizes])
        return out


def cost(variant, grid, **options):
    """FLOPs of the matrix products, and the entries of the largest tensor."""
    layer = build_attention(variant, grid=grid, heads=1, head_dim=D, features=8, **options)
    q, k, v = (x.float() for x in inputs(layer, batch=1, v_dim=3))
    # The plain form of torch's softmax attention: the fused one on CPU is not counted.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as flops:
        layer(q, k, v)
    with torch.no_grad(), LargestTensor() as largest:
        layer(q, k, v)
    return flops.get_total_flops(), largest.entries


@pytest.mark.parametrize(
    ("variant", "options"),
    [(name, {}) for name in LINEAR if not name.endswith("general")]
    + [(name, {"rotary_placement": "post"}) for name in LINEAR if name in ROTARY]
    + [(name, {"method": "fft"}) for name in LINEAR if name.endswith("general")],
)
def test_linear_attention_costs_in_proportion_to_the_tokens(variant, options):
    (few_flops, few_entries), (flops, entries) = (cost(variant, grid, **options) for grid in ((8, 32), (32, 64)))
    assert np.log(flops / few_flops) / np.log(8) < 1.2
    assert np.log(entries / few_entries) / np.log(8) < 1.2
    assert entries < 2048**2 / 4


@pytest.mark.parametrize("variant", ["favor_general", "relu_general"])
@pytest.mark.parametrize("method", ["auto", "dense"])
def test_no_square_matrix_is_formed_for_many_tokens(variant, method):
    assert cost(variant, (32, 64), method=method)[1] <= 2048**2 / 4


@pytest.mark.parametrize("variant", ["favor_general", "relu_general"])
def test_auto_is_dense_for_few_tokens(variant):
    few = cost(variant, (3, 5), method="auto")
    assert few == cost(variant, (3, 5), method="dense") != cost(variant, (3, 5), method="fft")


@pytest.mark.parametrize("variant", ["softmax", "softmax_rope", "favor_general", "relu_general"])
def test_dense_paths_cost_in_proportion_to_the_square_of_the_tokens(variant):
    (few_flops, _), (flops, entries) = (cost(variant, grid, method="dense") for grid in ((8, 16), (16, 64)))
    assert np.log(flops / few_flops) / np.log(8) > 1.8
    assert not variant.startswith("softmax") or entries >= 1024**2


# The contract


def test_the_twelve_names_are_the_rows_and_columns_of_the_table():
    assert VARIANTS == (
        "softmax", "softmax_general", "softmax_circulant", "softmax_rope",
        "favor", "favor_general", "favor_circulant", "favor_rope",
        "relu", "relu_general", "relu_circulant", "relu_rope",
    )  # fmt: skip


@each_case
def test_a_state_dict_makes_another_seed_the_same_layer(variant, options):
    layer, other = random_layer(variant, **options), random_layer(variant, seed=7, **options)
    q, k, v = inputs(layer)
    y = layer(q, k, v)
    if list(layer.parameters()) or "features.projection" in layer.state_dict():
        assert not torch.equal(other(q, k, v), y)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(q, k, v), y)


@each_case
def test_two_calls_give_one_answer(variant, options):
    for mode in (True, False):
        layer = random_layer(variant, **options).train(mode)
        q, k, v = inputs(layer)
        state = {name: value.clone() for name, value in layer.state_dict().items()}
        assert torch.equal(layer(q, k, v), layer(q, k, v))
        assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())


@each_variant
def test_the_seed_alone_decides_the_layer(variant):
    torch.manual_seed(0)
    layer = build_attention(variant, grid=GRID, heads=H, head_dim=D, seed=3)
    torch.manual_seed(1)
    again = build_attention(variant, grid=GRID, heads=H, head_dim=D, seed=3)
    assert layer.state_dict().keys() == again.state_dict().keys()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in layer.state_dict().items())


@each_variant
def test_training_works_after_inference_mode(variant):
    # A head size in float64 that no other test has, so that constants are first made, and perhaps kept, in this mode.
    layer = build_attention(variant, grid=(2, 7), heads=H, head_dim=20).double()
    q, k, v = inputs(layer)
    with torch.inference_mode():
        expected = layer(q, k, v)
    y = layer(q.requires_grad_(), k, v)
    y.sum().backward()
    assert torch.equal(y, expected)
    assert q.grad.isfinite().all()


@each_variant
def test_an_unknown_option_is_refused_with_the_nearest_name(variant):
    for wrong, right in (
        ("feature", "features"),
        ("rotary_placment", "rotary_placement"),
        ("normalise_qk", "normalize_qk"),
    ):
        with pytest.raises(ConfigError, match=f"{wrong}: unknown key; did you mean {right}") as refused:
            build_attention(variant, grid=GRID, heads=H, head_dim=D, **{wrong: 4})
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("relu_rotary", "relu_rope"),
        ("favour", "favor"),
        ("softmax_genral", "softmax_general"),
        ("circulant", "relu_circulant"),
    ],
)
def test_an_unknown_variant_is_refused_with_the_nearest_name(wrong, right):
    with pytest.raises(ConfigError, match=f"unknown variant '{wrong}'; did you mean {right}") as refused:
        build_attention(wrong, grid=GRID, heads=H, head_dim=D)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "options",
    [
        {"features": 0},
        {"features": -3},
        {"eps": float("nan")},
        {"eps": -1e-6},
        {"method": "FFT"},
        {"rotary_placement": "both"},
        {"rope": "spiral"},
        {"rope_base": float("inf")},
        {"relu_projection": "gaussian"},
        {"circulant_block": 0},
        {"grid": (0, 5)},
        {"heads": 0},
        {"head_dim": 0},
    ],
    ids=str,
)
@each_variant
def test_a_value_that_makes_no_sense_is_refused_in_one_line_that_names_it(variant, options):
    (name,) = options
    with pytest.raises(ConfigError, match=name) as refused:
        build_attention(variant, **({"grid": GRID, "heads": H, "head_dim": D} | options))
    assert "\n" not in str(refused.value)


@each_variant
def test_tensors_of_other_shapes_are_refused_in_one_line(variant):
    layer = random_layer(variant)
    q, k, v = inputs(layer)
    wrong = {
        "tokens of q": (q[:, :, 1:], k, v),
        "tokens of k": (q, k[:, :, 1:], v),
        "tokens of v": (q, k, v[:, :, 1:]),
        "heads of q": (q[:, 1:], k, v),
        "heads of v": (q, k, v[:, 1:]),
        "size of q": (q[..., 1:], k, v),
        "size of k": (q, k[..., 1:], v),
        "batch of k": (q, k[:1], v),
        "batch of v": (q, k, v[:1]),
        "axes of q": (q[0], k, v),
        "axes of all": (q[0], k[0], v[0]),
        "heads and tokens swapped": tuple(x.transpose(1, 2) for x in (q, k, v)),
    }
    for name, tensors in wrong.items():
        with pytest.raises(ShapeError) as refused:
            layer(*tensors)
            pytest.fail(f"{name} went through")
        assert "\n" not in str(refused.value)
        assert isinstance(refused.value, ErpeError)
    with pytest.raises(ShapeError):
        layer.weights(q, k[:, :, 1:])


def test_an_option_without_use_changes_nothing():
    useless = {
        "softmax": {"features": 7, "method": "fft", "rotary_placement": "post", "eps": 0.5, "circulant_block": 3},
        "favor": {"rope": "mixed", "relu_projection": "orthogonal", "rotary_placement": "post"},
        "relu_general": {"features": 7, "rope_base": 3.0, "rotary_placement": "post"},
        "softmax_rope": {"features": 7, "circulant_block": 3},
    }
    for variant, options in useless.items():
        layer = random_layer(variant)
        q, k, v = inputs(layer)
        assert torch.equal(random_layer(variant, **options)(q, k, v), layer(q, k, v))


def test_a_layer_is_built_from_the_names_of_the_contract():
    names = inspect.signature(build_attention).parameters
    assert {"grid", "heads", "head_dim", "seed"} <= names.keys()
    assert inputs(random_layer("softmax"))[2].shape[-1] == DV
