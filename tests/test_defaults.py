"""What torch's defaults are changes nothing: every tensor is made of a type and at a place that is named."""

import ast
from pathlib import Path

import pytest
import torch

import erpe
from erpe.config import ModelConfig
from erpe.model import VARIANTS, build, build_attention
from erpe.model.vit import parameter_count, shapes

MAKERS = set(
    """arange as_tensor complex empty empty_strided eye full linspace logspace normal ones rand randint randn randperm
    range scalar_tensor tensor zeros Conv2d Embedding LayerNorm Linear TransformerEncoderLayer""".split()
)
DEFAULTS = [("float16", "cpu"), ("bfloat16", "cpu"), ("float64", "cpu"), ("float32", "meta")]

each_default = pytest.mark.parametrize(("dtype", "device"), DEFAULTS)


@pytest.fixture
def defaults(dtype, device):
    torch.set_default_dtype(getattr(torch, dtype))
    torch.set_default_device(device)
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


def makers(path):
    """Calls of torch that make a tensor out of nothing."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            *place, name = ast.unparse(node.func).rpartition(".")
            if place[0] in ("torch", "nn", "torch.nn") and name in MAKERS:
                yield node


def test_every_tensor_is_made_of_a_named_type_at_a_named_place():
    unnamed, seen = [], 0
    for path in sorted(Path(erpe.__file__).parent.rglob("*.py")):
        for call in makers(path):
            names, seen = {keyword.arg for keyword in call.keywords}, seen + 1
            if not (None in names or {"dtype", "device"} <= names):
                unnamed.append(f"{path.name}:{call.lineno}")
    assert not unnamed
    assert seen > 20


def learnt(layer, cls=False):
    """The layer's result and gradients, forward and dense, from the same numbers each time."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = (
        torch.randn(2, 2, 15 + cls, 8, generator=generator, dtype=torch.float32, device="cpu", requires_grad=True)
        for _ in range(3)
    )
    y = layer(q, k, v)
    slopes = torch.autograd.grad(y.square().sum(), [q, k, v, *layer.parameters()])
    return [y.detach(), layer.weights(q, k).detach(), *slopes]


def all_equal(found, expected):
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


LAYERS = [
    (variant, options)
    for variant in VARIANTS
    for options in (
        {"seed": 3},
        {"cls": True, "rope": "mixed", "circulant_init": "normal", "relu_projection": "orthogonal"},
        {"method": "fft", "rotary_placement": "post"},
        {"rank": 5},
    )
    if not ("softmax" in variant and "rotary_placement" in options) and ("general" in variant or "rank" not in options)
]


@pytest.mark.slow
@each_default
@pytest.mark.parametrize(("variant", "options"), LAYERS, ids=str)
def test_layers_know_no_defaults_when_they_are_made_nor_when_they_run(variant, options, dtype, device, request):
    expected = learnt(build_attention(variant, grid=(3, 5), heads=2, head_dim=8, **options), "cls" in options)
    before = build_attention(variant, grid=(3, 5), heads=2, head_dim=8, **options)
    request.getfixturevalue("defaults")
    assert all_equal(learnt(before, "cls" in options), expected)
    inside = build_attention(variant, grid=(3, 5), heads=2, head_dim=8, **options)
    assert all_equal(learnt(inside, "cls" in options), expected)


@pytest.mark.slow
@each_default
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_knows_no_defaults(variant, dtype, device, request):
    config = ModelConfig(
        variant=variant, image=(1, 8, 8), patch=2, classes=3, width=16, depth=2, heads=2, dropout=0.2,
        position="sincos2d" if variant.endswith("rope") else "learned",
        pooling="cls" if "general" in variant else "mean",
    )  # fmt: skip
    images = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")

    def found():
        torch.manual_seed(0)
        model = build(config).train()
        loss = model(images).square().mean()
        return [loss, *torch.autograd.grad(loss, list(model.parameters())), *model.state_dict().values()]

    expected = found()
    request.getfixturevalue("defaults")
    assert all_equal(found(), expected)
    assert shapes(config) == {name: tuple(x.shape) for name, x in build(config).state_dict().items()}
    assert parameter_count(config) == sum(x.numel() for x in build(config).parameters())
