"""The masked product: one function, whole or in tiles, forward and backward, for one layer or several at once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from erpe.model.kernels import cpu
from erpe.model.kernels import tiles as by_torch
from erpe.model.kernels.masked import masked_product
from erpe.model.kernels.tiles import window_top
from erpe.model.toeplitz import toeplitz_dense


def problem(grid, heads=2, batch=3, m=5, v_dim=4, seed=0):
    """phi_q, phi_k, v, bias and top, float64; the first four learn."""
    h, w = grid
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)  # noqa: E731
    phi_q, phi_k = draw(2, batch, heads, h * w, m).exp()
    learn = [phi_q, phi_k, draw(batch, heads, h * w, v_dim), draw(heads, 2 * h - 1, 2 * w - 1)]
    return [x.requires_grad_() for x in learn], window_top(learn[3]).detach()


def explicit(phi_q, phi_k, v, bias, top):
    """With all N x N weights, by autograd."""
    a = phi_q @ phi_k.mT * (toeplitz_dense(bias) - top[..., None]).exp()
    return a @ v / a.sum(-1, keepdim=True), a.sum(-1)


def gradients(outputs, inputs):
    weights = [torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y) for y in outputs]
    return torch.autograd.grad(outputs, inputs, weights)


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.fixture
def tiles(monkeypatch):
    """Tiles of few tokens and images, whatever the size."""

    def small(side, entries):
        monkeypatch.setattr(by_torch, "WHOLE", 0)
        monkeypatch.setitem(by_torch.SIDE, "cpu", side)
        monkeypatch.setitem(by_torch.ENTRIES, "cpu", entries)

    return small


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 9), st.integers(1, 400), st.booleans())
@settings(deadline=None, max_examples=40)
def test_whole_or_in_tiles_it_is_the_explicit_product_with_its_gradients(h, w, side, entries, whole):
    learn, top = problem((h, w))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(by_torch, "WHOLE", 512 if whole else 0)
        patch.setitem(by_torch.SIDE, "cpu", side)
        patch.setitem(by_torch.ENTRIES, "cpu", entries)
        found, expected = masked_product(*learn, top), explicit(*learn, top)
        assert_same(found, expected)
        assert_same(gradients(found, learn), gradients(expected, learn))


@pytest.mark.parametrize("whole", [0, 512])
def test_gradients_are_those_of_finite_differences(tiles, whole, monkeypatch):
    tiles(4, 10)
    monkeypatch.setattr(by_torch, "WHOLE", whole)
    learn, top = problem((2, 3), batch=1, m=2, v_dim=2)
    assert torch.autograd.gradcheck(lambda *x: masked_product(*x, top), learn)


@pytest.mark.parametrize("used", [0, 1])
def test_averages_and_denominators_may_be_used_alone(used):
    learn, top = problem((2, 3))
    found, expected = masked_product(*learn, top)[used], explicit(*learn, top)[used]
    for one, other in zip(gradients([found], learn[:2]), gradients([expected], learn[:2]), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("whole", [0, 512])
def test_layers_side_by_side_are_each_alone(tiles, whole, monkeypatch):
    tiles(8, 50)
    monkeypatch.setattr(by_torch, "WHOLE", whole)
    alone = [problem((3, 4), seed=seed) for seed in range(3)]
    stacked = [torch.stack(each).detach().requires_grad_() for each in zip(*(learn for learn, _ in alone), strict=True)]
    found = torch.vmap(masked_product)(*stacked, torch.stack([top for _, top in alone]))
    single = [masked_product(*learn, top) for learn, top in alone]
    assert_same(found, [torch.stack(each) for each in zip(*single, strict=True)])
    expected = [
        torch.autograd.grad([y.sum() for y in one], learn) for one, (learn, _) in zip(single, alone, strict=True)
    ]
    assert_same(
        torch.autograd.grad([y.sum() for y in found], stacked),
        [torch.stack(each) for each in zip(*expected, strict=True)],
    )


def test_the_top_of_a_query_is_the_largest_weight_it_reaches():
    (*_, bias), top = problem((3, 5))
    torch.testing.assert_close(top, toeplitz_dense(bias).amax(-1).detach())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_factor_of_the_query_changes_no_average(dtype):
    learn, top = problem((3, 5))
    learn, top = [x.to(dtype).detach() for x in learn], top.to(dtype)
    way = "c" if cpu.serves(*learn) else "torch"
    expected = masked_product(*learn, top, way=way)[0]
    for other in (None, top + torch.linspace(-3, 3, top.numel()).view_as(top).to(dtype)):
        torch.testing.assert_close(masked_product(*learn, other, way=way)[0], expected)
