import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from erpe.errors import ShapeError
from erpe.model.toeplitz import toeplitz_dense, toeplitz_matmul

GRIDS = [(3, 5), (5, 2), (1, 4), (4, 1), (1, 1), (8, 8)]
H, F, B = 3, 4, 2


def offsets(grid, seed=0):
    """A random table (H, 2h-1, 2w-1), every scalar another one."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(H, 2 * grid[0] - 1, 2 * grid[1] - 1, generator=generator, dtype=torch.float64)


def grid_values(grid, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, H, F, *grid, generator=generator, dtype=torch.float64)


def explicit(c, grid):
    """T[i, j] = c[key - query], entry by entry."""
    h, w = grid
    T = torch.empty(H, h * w, h * w, dtype=torch.float64)
    for i in range(h * w):
        for j in range(h * w):
            dy, dx = j // w - i // w, j % w - i % w
            T[:, i, j] = c[:, dy + h - 1, dx + w - 1]
    return T


@pytest.mark.parametrize("grid", GRIDS)
def test_an_entry_is_the_weight_of_key_minus_query(grid):
    c = offsets(grid)
    assert torch.equal(toeplitz_dense(c), explicit(c, grid))


@pytest.mark.parametrize("grid", [(3, 5), (5, 2), (8, 8)])
def test_two_entries_agree_exactly_if_their_2d_offsets_do(grid):
    h, w = grid
    T = toeplitz_dense(torch.arange((2 * h - 1) * (2 * w - 1)).reshape(1, 2 * h - 1, 2 * w - 1))[0]
    y, x = torch.arange(h * w) // w, torch.arange(h * w) % w
    offset = torch.stack([y[None] - y[:, None], x[None] - x[:, None]], dim=-1).flatten(0, 1)
    same_offset = (offset[:, None] == offset[None]).all(-1)
    same_weight = T.flatten()[:, None] == T.flatten()[None]
    assert torch.equal(same_offset, same_weight)


def test_raster_neighbours_across_a_row_end_are_no_neighbours():
    h, w = 3, 5
    T = toeplitz_dense(offsets((h, w)))[0]
    end_of_row, start_of_next = w - 1, w
    assert T[end_of_row, start_of_next] == T[2 * w - 1, 2 * w]
    assert T[end_of_row, start_of_next] != T[0, 1]
    # A table over raster offsets, 2 h w - 1 scalars, cannot tell the two apart.
    raster = torch.randn(2 * h * w - 1)
    n = torch.arange(h * w)
    wrong = raster[n[None] - n[:, None] + h * w - 1]
    assert wrong[end_of_row, start_of_next] == wrong[0, 1]


@pytest.mark.parametrize("grid", GRIDS)
def test_reversing_all_offsets_transposes(grid):
    c = offsets(grid)
    assert torch.equal(toeplitz_dense(c.flip(-2, -1)), toeplitz_dense(c).mT)
    if grid != (1, 1):
        assert not torch.equal(toeplitz_dense(c), toeplitz_dense(c).mT)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(h=st.integers(1, 6), w=st.integers(1, 6), more_h=st.integers(0, 4), more_w=st.integers(0, 4))
def test_fft_is_the_explicit_product_on_every_padding(h, w, more_h, more_w):
    c, x = offsets((h, w)), grid_values((h, w))
    expected = torch.einsum("hij,bhfj->bhfi", explicit(c, (h, w)), x.flatten(-2)).unflatten(-1, (h, w))
    size = (2 * h - 1 + more_h, 2 * w - 1 + more_w)
    torch.testing.assert_close(toeplitz_matmul(c, x, size), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(toeplitz_matmul(c, x), expected, rtol=0, atol=1e-12)


def test_a_flipped_sign_of_the_offset_would_show():
    c, x = offsets((3, 5)), grid_values((3, 5))
    assert (toeplitz_matmul(c.flip(-2, -1), x) - toeplitz_matmul(c, x)).abs().max() > 1


def test_the_offset_of_one_step_moves_values_by_one_step():
    c = torch.zeros(1, 5, 9, dtype=torch.float64)
    c[0, 2 + 1, 4 - 2] = 1  # the key one row below and two columns to the left
    x = torch.arange(15.0, dtype=torch.float64).reshape(1, 1, 1, 3, 5) + 1
    expected = torch.tensor([[0, 0, 6, 7, 8], [0, 0, 11, 12, 13], [0, 0, 0, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(toeplitz_matmul(c, x)[0, 0, 0], expected)


def test_gradients_are_those_of_finite_differences():
    c = offsets((2, 3)).requires_grad_()
    x = grid_values((2, 3))[:, :, :2].clone().requires_grad_()
    assert torch.autograd.gradcheck(toeplitz_matmul, (c, x))
    assert torch.autograd.gradcheck(toeplitz_dense, (c,))


@pytest.mark.parametrize("table", [(5, 8), (4, 9), (9, 5), (3, 5)])
def test_a_table_that_does_not_span_the_grid_is_refused(table):
    with pytest.raises(ShapeError, match=r"\(3, 5\) grid has offsets \(5, 9\)") as refused:
        toeplitz_matmul(torch.zeros(H, *table), torch.zeros(B, H, F, 3, 5))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("size", [(4, 9), (5, 8)])
def test_a_padding_that_would_wrap_around_is_refused(size):
    with pytest.raises(ShapeError, match="do not fit"):
        toeplitz_matmul(torch.zeros(H, 5, 9), torch.zeros(B, H, F, 3, 5), size)
