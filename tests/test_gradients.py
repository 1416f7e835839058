"""Gradients of gradients, and torch.func: right with the kernels as without them."""

import pytest
import torch
from oracle import LINEAR
from torch.func import functional_call, grad, jacrev, stack_module_state, vmap

from erpe.model.attention import build_attention
from erpe.model.kernels import cpu, masked, tiles

OPTIONS = [{}, {"relu_projection": "orthogonal", "rope": "mixed"}, {"cls": True, "circulant_block": 4}]
B, H, D, GRID = 2, 2, 8, (3, 4)

each_layer = pytest.mark.parametrize("variant", LINEAR)
each_option = pytest.mark.parametrize("options", OPTIONS, ids=str)
each_way = pytest.mark.parametrize("way", ["kernels", "torch", "float64"])


def random_layer(variant, seed=0, **options):
    layer = build_attention(variant, grid=GRID, heads=H, head_dim=D, seed=seed, **({"eps": 1e-2} | options))
    generator = torch.Generator().manual_seed(seed + 1)
    for parameter in layer.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return layer


def made(layer, seed=2, *more):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*more, B, H, layer.shape.tokens, D, generator=generator) for _ in range(3)]


def penalty(y, inputs):
    """Of the slopes of a loss, as gradient penalties are."""
    slopes = torch.autograd.grad((y * y.cos()).sum(), inputs, create_graph=True)
    return sum(slope.square().sum() for slope in slopes)


def dense(layer, q, k, v):
    return layer.weights(q, k) @ v


def twice(layer, call, inputs):
    learn = [x.detach().clone().requires_grad_() for x in inputs]
    everything = [*learn, *layer.parameters()]
    return torch.autograd.grad(penalty(call(*learn), everything), everything)


def assert_close(found, expected, tolerance=1e-3):
    """Relative to the largest entry of each."""
    for one, other in zip(found, expected, strict=True):
        assert (one.double() - other.double()).abs().amax() <= tolerance * other.abs().amax() + 1e-5


@pytest.fixture
def prepared(way, monkeypatch):
    """Layer and inputs as the way wants them."""
    if way == "torch":
        monkeypatch.setattr(cpu, "LIBRARY", None)
    dtype = torch.float64 if way == "float64" else torch.float32
    return lambda layer, *inputs: (layer.to(dtype), *(x.to(dtype) for x in inputs))


@each_layer
@each_option
@each_way
def test_gradients_of_gradients_are_those_of_the_dense_formula(variant, options, prepared):
    layer, *inputs = prepared(random_layer(variant, **options), *made(random_layer(variant, **options)))
    found = twice(layer, layer, inputs)
    layer, inputs = layer.double(), [x.double() for x in inputs]
    assert_close(found, twice(layer, lambda *x: dense(layer, *x), inputs))


@pytest.mark.parametrize("whole", [0, 1024])
@pytest.mark.parametrize("variant", ["relu_general", "favor_general"])
def test_so_they_are_in_tiles_and_where_one_factor_does_not_serve(variant, whole, monkeypatch):
    monkeypatch.setattr(tiles, "WHOLE", whole)
    monkeypatch.setattr(masked, "SPAN", 0.1)
    layer = random_layer(variant)
    inputs = made(layer)
    found = twice(layer, layer, inputs)
    layer, inputs = layer.double(), [x.double() for x in inputs]
    assert_close(found, twice(layer, lambda *x: dense(layer, *x), inputs))


@pytest.mark.slow
@each_layer
@each_option
@each_way
def test_transforms_of_torch_func_give_what_autograd_gives(variant, options, prepared):
    layer, *inputs = prepared(random_layer(variant, **options), *made(random_layer(variant, **options), 2, 3))
    parameters = {name: each.detach() for name, each in layer.named_parameters()}

    def loss(parameters, q, k, v):
        y = functional_call(layer, parameters, (q, k, v))
        return (y * y.cos()).sum()

    def expected(*given):
        learn = [x.detach().clone().requires_grad_() for x in given]
        y = layer(*learn)
        return torch.autograd.grad((y * y.cos()).sum(), [*layer.parameters(), *learn])

    def flat(found):
        return [*found[0].values(), *found[1:]]

    slopes = grad(loss, argnums=(0, 1, 2, 3))
    each = [expected(*(x[n] for x in inputs)) for n in range(3)]
    assert_close(flat(slopes(parameters, *(x[0] for x in inputs))), each[0])
    stacked = [torch.stack(those) for those in zip(*each, strict=True)]
    assert_close(flat(vmap(slopes, in_dims=(None, 0, 0, 0))(parameters, *inputs)), stacked)
    together = grad(lambda *x: vmap(loss, in_dims=(None, 0, 0, 0))(*x).sum(), argnums=(0, 1, 2, 3))
    found = flat(together(parameters, *inputs))
    count = len(parameters)
    assert_close(found, [*(x.sum(0) for x in stacked[:count]), *stacked[count:]])
    last = vmap(slopes, in_dims=(None, -1, -1, -1))(parameters, *(x.movedim(0, -1) for x in inputs))
    assert_close(flat(last), stacked)


@each_layer
@each_option
@pytest.mark.parametrize("way", ["kernels", "torch"])
@pytest.mark.parametrize("buffers", ["of each", "of the first"])
def test_layers_side_by_side_are_each_as_alone(variant, options, prepared, buffers):
    """As packs train them: autograd wants slopes outside of vmap."""
    layers = [random_layer(variant, seed, **options) for seed in ((1, 2) if buffers == "of each" else (1, 1))]
    parameters, every = stack_module_state(layers)
    state = parameters | (every if buffers == "of each" else {})
    _, *inputs = prepared(layers[0], *made(layers[0], 2, 2))
    y = vmap(lambda state, q, k, v: functional_call(layers[0], state, (q, k, v)))(state, *inputs)
    found = torch.autograd.grad((y * y.cos()).sum(), [*parameters.values()]) if parameters else []
    for n, layer in enumerate(layers):
        alone = layer(*(x[n] for x in inputs))
        expected = torch.autograd.grad((alone * alone.cos()).sum(), [*layer.parameters()]) if parameters else []
        assert_close([y[n], *(x[n] for x in found)], [alone, *expected])


@pytest.mark.parametrize("enabled", [True, False])
@each_layer
@each_way
def test_jacobians_are_rows_of_gradients(variant, enabled, prepared):
    layer, q, k, v = prepared(random_layer(variant), *made(random_layer(variant)))
    with torch.set_grad_enabled(enabled):
        found = jacrev(lambda q: layer(q, k, v)[0, 0, 0, :3])(q)
    learn = q.detach().requires_grad_()
    y = layer(learn, k, v)[0, 0, 0, :3]
    expected = torch.stack([torch.autograd.grad(y[n], learn, retain_graph=True)[0] for n in range(3)])
    assert_close([found], [expected])


@each_layer
def test_gradients_of_gradients_by_torch_func(variant):
    layer = random_layer(variant)
    q, k, v = made(layer)

    def loss(q):
        y = layer(q, k, v)
        return (y * y.cos()).sum()

    found = grad(lambda q: grad(loss)(q).square().sum())(q)
    learn = q.detach().requires_grad_()
    (expected,) = torch.autograd.grad(penalty(layer(learn, k, v), [learn]), learn)
    assert_close([found], [expected])
