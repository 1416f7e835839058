"""The general relative encoding: one scalar for each 2-D offset and head, with softmax and with linear attention."""

import numpy as np
import pytest
import torch
from oracle import DV, GRID, B, D, H, explicit_weights, inputs, random_layer

from erpe.model import build_attention

GENERAL = ["softmax_general", "favor_general", "relu_general"]
LINEAR_GENERAL = GENERAL[1:]
GRIDS = [(3, 5), (5, 2), (1, 6), (6, 1), (1, 1)]


def plain_like(layer):
    """The same attention without the encoding."""
    plain = random_layer(layer.config.attention)
    if layer.config.attention == "favor":
        plain.features.projection = layer.features.projection
    return plain


def fill(layer, value):
    with torch.no_grad():
        for parameter in layer.encoding.parameters():
            parameter.fill_(value)
    return layer


def twin(layer, method):
    """The same layer by another method."""
    config, shape = layer.config, layer.shape
    other = random_layer(
        config.variant,
        grid=shape.grid,
        heads=shape.heads,
        head_dim=shape.head_dim,
        cls=shape.cls,
        method=method,
        features=config.features,
        eps=config.eps,
    )
    other.load_state_dict(layer.state_dict())
    return other


@pytest.mark.parametrize("variant", GENERAL)
def test_there_is_one_scalar_an_offset_and_head_and_it_starts_without_effect(variant):
    layer = build_attention(variant, grid=GRID, heads=H, head_dim=D)
    assert layer.encoding.bias.shape == (H, 2 * 3 - 1, 2 * 5 - 1)
    assert not layer.encoding.bias.any()
    assert [name for name, _ in layer.encoding.named_parameters()] == ["bias"]


@pytest.mark.parametrize("method", ["dense", "fft"])
@pytest.mark.parametrize("value", [0.0, 2.5, -40.0, 800.0, -800.0])
@pytest.mark.parametrize("variant", GENERAL)
def test_a_constant_bias_of_any_size_is_no_encoding(variant, value, method):
    layer = fill(random_layer(variant, method=method), value)
    q, k, v = inputs(layer)
    plain = plain_like(layer)
    torch.testing.assert_close(layer(q, k, v), plain(q, k, v), rtol=0, atol=1e-12)
    torch.testing.assert_close(layer.weights(q, k), plain.weights(q, k), rtol=0, atol=1e-12)


@pytest.mark.parametrize("variant", GENERAL)
def test_adding_a_constant_to_the_bias_changes_nothing(variant):
    layer = random_layer(variant, cls=True)
    q, k, v = inputs(layer)
    y = layer(q, k, v)
    with torch.no_grad():
        layer.encoding.bias += 3
        layer.encoding.cls_bias += 3
    torch.testing.assert_close(layer(q, k, v), y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("variant", GENERAL)
def test_the_bias_multiplies_weights_before_they_are_normalised(variant):
    layer = random_layer(variant)
    q, k, _ = inputs(layer)
    h, w = GRID
    C = np.empty((H, h * w, h * w))
    for i, j in np.ndindex(h * w, h * w):
        C[:, i, j] = layer.encoding.bias.detach()[:, j // w - i // w + h - 1, j % w - i % w + w - 1].exp()
    plain = plain_like(layer).weights(q, k).numpy()
    before = plain * C / (plain * C).sum(-1, keepdims=True)
    A = layer.weights(q, k).detach().numpy()
    np.testing.assert_allclose(A, before, rtol=0, atol=1e-12)
    assert np.abs(A - plain * C).max() > 0.1  # the mistake: weights on what is already normalised


@pytest.mark.parametrize("variant", GENERAL)
def test_equal_offsets_have_equal_weights_and_other_offsets_have_not(variant):
    layer = random_layer(variant)
    q, k, _ = inputs(layer)
    alike = [x[:, :, :1].expand_as(x) for x in (q, k)]  # one q and one k everywhere: only C is left
    C = layer.weights(*alike)[0, 0].detach()
    w = GRID[1]
    centre, right, end_of_row = C[w + 2], C[w + 3], C[2 * w - 1]
    # The same offset from two queries, once for each row sum.
    assert centre[w + 3] / centre[w + 2] == pytest.approx((right[w + 4] / right[w + 3]).item())
    assert centre[2] / centre[w + 2] == pytest.approx((right[3] / right[w + 3]).item())
    # The next token in the raster, across a row end, is another offset.
    assert end_of_row[2 * w] / end_of_row[2 * w - 1] != pytest.approx((centre[w + 3] / centre[w + 2]).item(), rel=1e-3)


def test_the_sign_of_an_offset_is_key_minus_query():
    layer = fill(random_layer("relu_general"), -40.0)
    with torch.no_grad():
        layer.encoding.bias[:, 2 + 1, 4 - 2] = 40.0  # one row below, two columns to the left
    q, k, v = inputs(layer)
    query, key = 0 * 5 + 3, 1 * 5 + 1
    torch.testing.assert_close(layer(q, k, v)[:, :, query], v[:, :, key])


@pytest.mark.parametrize("method", ["dense", "fft"])
@pytest.mark.parametrize("variant", GENERAL)
def test_a_sharp_bias_returns_the_token_itself(variant, method):
    layer = fill(random_layer(variant, method=method), 0.0)
    with torch.no_grad():
        layer.encoding.bias[:, 2, 4] = 30.0
    q, k, v = (x / 2 for x in inputs(layer))
    torch.testing.assert_close(layer(q, k, v), v, rtol=0, atol=1e-6)


# The FFT path


@pytest.mark.parametrize("cls", [False, True])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("variant", LINEAR_GENERAL)
def test_fft_dense_and_auto_are_one_function_with_one_gradient(variant, grid, cls):
    layer = random_layer(variant, grid=grid, cls=cls, method="dense")
    leaves = [x.requires_grad_() for x in inputs(layer)]
    results = []
    for method in ("dense", "fft", "auto"):
        same = twin(layer, method)
        y = same(*leaves)
        gradients = torch.autograd.grad(y.square().sum(), [*leaves, *same.encoding.parameters()])
        results.append([y, *gradients])
    for other in results[1:]:
        for expected, actual in zip(results[0], other, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(
        layer.weights(*leaves[:2]).detach(), explicit_weights(layer, *(x.detach() for x in leaves[:2])), atol=1e-11
    )


@pytest.mark.parametrize("variant", LINEAR_GENERAL)
def test_fft_in_pieces_is_fft_at_once(variant, monkeypatch):
    layer = random_layer(variant, method="fft", cls=True)
    q, k, v = inputs(layer)
    y = layer(q, k, v)
    monkeypatch.setattr("erpe.model.kernels.fft.CHUNK", B * H * 16 * (DV + 1) * 4 * 5)  # five features at a time
    torch.testing.assert_close(layer(q, k, v), y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("slope", [1.0, 3.0])
@pytest.mark.parametrize("variant", LINEAR_GENERAL)
def test_a_local_bias_leaves_no_negative_denominator_in_float32(variant, slope):
    # The error of an FFT is relative to its largest value, and far weights are as small as exp(-14 slope).
    grid = (8, 8)
    layer = random_layer(variant, grid=grid, method="fft", eps=1e-6, head_dim=16)
    dy, dx = torch.meshgrid(torch.arange(-7, 8), torch.arange(-7, 8), indexing="ij")
    with torch.no_grad():
        layer.encoding.bias.copy_(-slope * (dy.abs() + dx.abs()))
    q, k, v = inputs(layer)
    expected = twin(layer, "dense")(q, k, v)
    torch.testing.assert_close(layer(q, k, v), expected, rtol=0, atol=1e-9)
    single = layer.float()
    ones = torch.ones_like(v).float()
    y, total = single(q.float(), k.float(), v.float()), single(q.float(), k.float(), ones)
    assert y.isfinite().all()
    assert (total > 0).all()
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("place", [(2, 4), (0, 0), (2, 5)], ids=["own", "corner", "right"])
@pytest.mark.parametrize(
    ("variant", "method", "spread", "atol"),
    [(variant, "dense", 100.0, 1e-4) for variant in GENERAL]
    + [(variant, "fft", spread, 1e-3) for variant in LINEAR_GENERAL for spread in (8.0, 20.0)],
)
def test_float32_survives_a_bias_that_some_queries_cannot_reach(variant, method, spread, atol, place):
    # For the others every weight is exp(-spread) of the largest: what a query has in common must cancel for them.
    layer = fill(random_layer(variant, method=method, eps=1e-6), 0.0)
    with torch.no_grad():
        layer.encoding.bias[:, place[0], place[1]] = spread
    q, k, v = inputs(layer)
    expected = explicit_weights(layer, q, k) @ v.numpy()
    y = layer.float()(q.float(), k.float(), v.float()).detach()
    np.testing.assert_allclose(y, expected, rtol=0, atol=atol)
    if method == "dense":
        A = layer.weights(q.float(), k.float()).detach()
        np.testing.assert_allclose(A @ v.float(), expected, rtol=0, atol=atol)


# The class token


@pytest.mark.parametrize("variant", GENERAL)
def test_a_class_token_has_three_scalars_of_its_own_and_leaves_patches_alone(variant):
    layer = random_layer(variant, cls=True)
    assert layer.encoding.cls_bias.shape == (3, H)
    q, k, _ = inputs(layer)
    A = layer.weights(q, k).detach()
    without = random_layer(variant)
    without.encoding.bias = layer.encoding.bias
    if variant == "favor_general":
        without.features.projection = layer.features.projection
    patches = A[:, :, 1:, 1:]
    torch.testing.assert_close(
        patches / patches.sum(-1, keepdim=True), without.weights(q[:, :, 1:], k[:, :, 1:]).detach()
    )


@pytest.mark.parametrize(
    ("row", "query", "key"), [(0, slice(1, None), 0), (1, 0, slice(1, None)), (2, 0, 0)], ids=["to", "from", "own"]
)
@pytest.mark.parametrize("variant", GENERAL)
def test_each_scalar_of_the_class_token_weighs_its_own_pairs(variant, row, query, key):
    layer = fill(random_layer(variant, cls=True), 0.0)
    q, k, _ = inputs(layer)
    before = layer.weights(q, k).detach()
    factor = torch.ones_like(before)
    factor[:, :, query, key] = 4.0
    with torch.no_grad():
        layer.encoding.cls_bias[row] = np.log(4.0)
    expected = before * factor
    torch.testing.assert_close(layer.weights(q, k).detach(), expected / expected.sum(-1, keepdim=True))


@pytest.mark.parametrize("row", [0, 1, 2], ids=["to", "from", "own"])
@pytest.mark.parametrize(
    ("variant", "method", "value"),
    [(variant, "dense", 100.0) for variant in GENERAL] + [(variant, "fft", 50.0) for variant in LINEAR_GENERAL],
)
def test_float32_survives_a_large_scalar_of_the_class_token(variant, method, value, row):
    layer = fill(random_layer(variant, method=method, cls=True, eps=1e-6), 0.0)
    with torch.no_grad():
        layer.encoding.cls_bias[row] = value
    q, k, v = inputs(layer)
    expected = explicit_weights(layer, q, k) @ v.numpy()
    y = layer.float()(q.float(), k.float(), v.float()).detach()
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-3)
