"""The general encoding as a truncated series: exact with all terms, better with more, linear in the tokens."""

import pytest
import torch
from oracle import inputs, random_layer

from erpe.model.kernels.low_rank import series, terms_used

GRID = (3, 4)
OFFSETS = 5 * 7
GENERAL = pytest.mark.parametrize("variant", ["favor_general", "relu_general"])


def twins(variant, rank, cls=False, smooth=False):
    """The exact layer, and the one with a series; positive features, so that denominators are far from zero."""
    made = [random_layer(variant, grid=GRID, cls=cls, eps=0.1, **more) for more in ({}, {"rank": rank})]
    y, x = torch.meshgrid(torch.arange(-2.0, 3), torch.arange(-3.0, 4), indexing="ij")
    for layer in made if smooth else ():
        layer.encoding.bias.data[:] = -(y**2 + x**2) / 8
    return made


def error(variant, rank, **how):
    exact, cheap = twins(variant, rank, **how)
    given = inputs(exact)
    return (cheap(*given) - exact(*given)).abs().max().item()


@GENERAL
@pytest.mark.parametrize("cls", [False, True])
def test_all_terms_are_the_exact_layer_with_its_gradients(variant, cls):
    exact, cheap = twins(variant, OFFSETS, cls)
    given = inputs(exact)
    outputs = exact(*given), cheap(*given)
    torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-9)
    gradients = [
        torch.autograd.grad(y.square().sum(), [*layer.encoding.parameters()])
        for layer, y in zip((exact, cheap), outputs, strict=True)
    ]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


@GENERAL
def test_more_terms_are_nearer(variant):
    errors = [error(variant, rank, smooth=True) for rank in (1, 9, 25, OFFSETS)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-9 < errors[-2] < errors[0] / 2


@GENERAL
def test_one_term_is_no_encoding(variant):
    cheap = twins(variant, 1)[1]
    plain = random_layer(variant.removesuffix("_general"), grid=GRID, eps=0.1)
    given = inputs(plain)
    torch.testing.assert_close(cheap(*given), plain(*given))


@GENERAL
def test_a_series_that_crosses_zero_leaves_finite_outputs(variant):
    layer = random_layer(variant, grid=GRID, rank=3)
    layer.encoding.bias.data.fill_(-30.0)[:, 2, 3] = 5.0
    y = layer(*(10 * x for x in inputs(layer)))
    y.sum().backward()
    assert y.isfinite().all() and layer.encoding.bias.grad.isfinite().all()


@pytest.mark.parametrize(("terms", "used"), [(1, 1), (2, 1), (8, 7), (9, 9), (1000, OFFSETS)])
def test_terms_come_in_pairs_and_end_with_the_offsets(terms, used):
    assert terms_used(terms, GRID) == used == series(GRID, terms, torch.float32, torch.device("cpu")).analysis.shape[1]


@pytest.mark.parametrize("grid", [(1, 1), (1, 4), (4, 1)])
def test_a_grid_may_be_a_line_or_a_point(grid):
    exact, cheap = (random_layer("relu_general", grid=grid, **more) for more in ({}, {"rank": 1000}))
    given = inputs(exact)
    torch.testing.assert_close(cheap(*given), exact(*given))


def test_softmax_has_no_use_for_it():
    exact, same = (random_layer("softmax_general", **more) for more in ({}, {"rank": 3}))
    given = inputs(exact)
    assert torch.equal(exact(*given), same(*given))
