"""NaN and infinities in q, k and v: the same answer by the kernels, by torch and by the dense twin."""

import math

import pytest
import torch

from erpe.model import VARIANTS
from erpe.model.attention import build_attention
from erpe.model.kernels import cpu

OPTIONS = [
    {},
    {"cls": True, "rope": "mixed"},
    {"relu_projection": "orthogonal", "circulant_block": 4},
    {"grid": (5, 33)},
]


def answers(layer, q, k, v):
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        found = {"kernels": layer(q, k, v), "dense": layer.weights(q, k) @ v}
        patch.setattr(cpu, "LIBRARY", None)
        return found | {"torch": layer(q, k, v)}


@pytest.mark.slow
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_not_finite_gives_one_answer_on_every_path(variant, options, value):
    layer = build_attention(variant, **({"grid": (2, 3), "heads": 2, "head_dim": 8} | options))
    generator = torch.Generator().manual_seed(0)
    for which in range(3):
        for token in (0, 1, layer.shape.tokens - 1):
            inputs = list(torch.randn(3, 2, 2, layer.shape.tokens, 8, generator=generator))
            inputs[which][0, 1, token, 2] = value
            found = answers(layer, *inputs)
            for other in ("kernels", "torch"):
                torch.testing.assert_close(found[other], found["dense"], equal_nan=True, rtol=1e-3, atol=1e-5)
            assert all(y[1].isfinite().all() and y[:, 0].isfinite().all() for y in found.values())  # all others'
            if math.isnan(value):
                rows = [token] if which == 0 else range(layer.shape.tokens)
                assert found["kernels"][0, 1, rows].isnan().any(-1).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_queries_and_keys_of_nothing_but_nan_give_nan(variant):
    layer = build_attention(variant, grid=(1, 1), heads=1, head_dim=8)
    q, k, v = torch.ones(3, 1, 1, 1, 8)
    for inputs in ((q * math.nan, k, v), (q, k * math.nan, v)):
        assert all(y.isnan().all() for y in answers(layer, *inputs).values())
