"""Rope and circulant-STRING: R(r) as a matrix, and what follows for attention."""

import math

import numpy as np
import pytest
import torch
from oracle import GRID, LINEAR, D, H, generators, inputs, positions, random_layer, rotations
from scipy.linalg import circulant, expm

from erpe.errors import ConfigError
from erpe.model import build_attention

KINDS = {
    "axial": ("softmax_rope", {}),
    "mixed": ("softmax_rope", {"rope": "mixed"}),
    "circulant": ("softmax_circulant", {}),
    "circulant in blocks": ("softmax_circulant", {"circulant_block": 4}),
    "circulant of odd size": ("softmax_circulant", {"head_dim": 7}),
    "circulant in odd blocks": ("softmax_circulant", {"head_dim": 15, "circulant_block": 5}),
}


@pytest.fixture(params=KINDS)
def layer(request):
    variant, options = KINDS[request.param]
    return random_layer(variant, **options)


def matrices(layer):
    """R[h, i] of the layer, column by column: what it does to each basis vector."""
    size = layer.encoding.size
    basis = torch.eye(size, dtype=torch.float64)[:, None, None].expand(-1, layer.shape.heads, layer.shape.tokens, -1)
    (turned,) = layer.encoding.rotate(basis)
    return turned.permute(1, 2, 3, 0).detach().numpy()


def at(layer, y, x):
    return matrices(layer)[:, y * layer.shape.grid[1] + x]


def assert_equal(actual, expected, atol=1e-10):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


def move(layer, dy, dx):
    """Every position shifts by (dy, dx)."""
    layer.encoding.rows += dy
    layer.encoding.columns += dx
    return layer


def row_l1(A, other):
    return (A - other).abs().sum(-1).mean()


# R is a group of rotations


def test_rotation_is_the_exponential_of_its_generators(layer):
    assert_equal(matrices(layer), rotations(layer))


@pytest.mark.parametrize("head_dim", [7, 8, 16, 64])
def test_circulant_is_its_exponential_and_its_fft_at_every_head_size(head_dim):
    layer = random_layer("softmax_circulant", head_dim=head_dim, grid=(2, 3), heads=2)
    R = matrices(layer)
    assert_equal(R, rotations(layer))
    c = layer.encoding.coefficients.detach().numpy()
    theta = 2 * np.fft.fft(c).imag
    z = np.random.default_rng(0).normal(size=head_dim)
    for head in range(2):
        for i, (y, x) in enumerate(positions(layer)):
            turned = np.fft.ifft(np.exp(1j * (y * theta[0, head] + x * theta[1, head])) * np.fft.fft(z))
            assert np.abs(turned.imag).max() < 1e-12
            assert_equal(R[head, i] @ z, turned.real)


def test_rotations_are_orthogonal_and_keep_norms_and_orientation(layer):
    R = matrices(layer)
    assert_equal(R.swapaxes(-1, -2) @ R, np.broadcast_to(np.eye(R.shape[-1]), R.shape))
    assert_equal(np.linalg.det(R), np.ones(R.shape[:2]))
    q, _, _ = inputs(layer)
    (turned,) = layer.encoding.rotate(q)
    torch.testing.assert_close(turned.norm(dim=-1), q.norm(dim=-1))
    assert (turned - q)[:, :, 1:].abs().amax() > 0.1


def test_rotations_compose_as_positions_add(layer):
    R = matrices(layer)
    assert_equal(R[:, 0], np.broadcast_to(np.eye(R.shape[-1]), R[:, 0].shape))
    assert_equal(at(layer, 1, 1) @ at(layer, 1, 3), at(layer, 2, 4))
    assert_equal(at(layer, 1, 3) @ at(layer, 1, 1), at(layer, 2, 4))
    assert_equal(at(layer, 1, 1).swapaxes(-1, -2) @ at(layer, 2, 4), at(layer, 1, 3))


def relative_error(R):
    """How far scores of one q and one k everywhere are from a function of the offset; R (N, d, d) on GRID."""
    h, w = GRID
    q, k = np.random.default_rng(1).normal(size=(2, R.shape[-1]))
    scores = np.einsum("iab,b,jac,c->ij", R, q, R, k)
    by_offset = {}
    for i in range(h * w):
        for j in range(h * w):
            by_offset.setdefault((j // w - i // w, j % w - i % w), []).append(scores[i, j])
    return max(max(same) - min(same) for same in by_offset.values())


def orthogonality_error(R):
    return np.abs(R.swapaxes(-1, -2) @ R - np.eye(R.shape[-1])).max()


def test_scores_of_one_query_and_one_key_everywhere_depend_on_the_offset_only(layer):
    for R in matrices(layer):
        assert relative_error(R) < 1e-10


def test_maps_that_look_like_rotations_are_told_apart():
    layer = random_layer("softmax_rope", rope="mixed")
    frequencies = layer.encoding.frequencies.detach().numpy()[:, 0]
    angles = np.array([y * frequencies[0] + x * frequencies[1] for y, x in positions(layer)])  # (N, D/2)
    swap_halves = np.kron([[0, -1], [1, 0]], np.eye(D // 2))
    swap_pairs = np.kron(np.eye(D // 2), [[0, -1], [1, 0]])

    def table(layout, swap):
        return np.array([np.diag(layout(np.cos(a))) + np.diag(layout(np.sin(a))) @ swap for a in angles])

    def for_pairs(a):
        return np.repeat(a, 2)

    def for_halves(a):
        return np.tile(a, 2)

    for right in (table(for_pairs, swap_pairs), table(for_halves, swap_halves)):
        assert orthogonality_error(right) < 1e-10
        assert relative_error(right) < 1e-10
    mixed_up = table(for_pairs, swap_halves)
    assert orthogonality_error(mixed_up) > 0.1
    assert relative_error(mixed_up) > 0.1

    along_y, along_x = generators(layer, 0)
    L = np.array([y * along_y + x * along_x for y, x in positions(layer)])
    first_order = np.eye(D) + L
    cayley = np.linalg.solve(np.eye(D) - L, np.eye(D) + L)  # orthogonal, and yet not relative
    assert orthogonality_error(first_order) > 0.1
    assert orthogonality_error(cayley) < 1e-10
    assert relative_error(first_order) > 0.1
    assert relative_error(cayley) > 0.1

    heads_and_positions_swapped = matrices(layer).reshape(len(angles), H, D, D)[:, 0]
    assert relative_error(heads_and_positions_swapped) > 0.1


def test_learned_rotations_differ_between_heads(layer):
    R = matrices(layer)
    learned = bool(list(layer.encoding.parameters()))
    assert (np.abs(R[0] - R[1]).max() > 0.1) == learned


# What circulant-STRING is


@pytest.mark.parametrize(
    ("head_dim", "block", "moved"), [(8, None, 6), (7, None, 6), (16, None, 14), (8, 4, 4), (12, 3, 8), (15, 5, 12)]
)
def test_circulant_leaves_two_channels_of_an_even_block_and_one_of_an_odd(head_dim, block, moved):
    layer = random_layer("softmax_circulant", head_dim=head_dim, circulant_block=block)
    for R in at(layer, 1, 2):
        assert np.linalg.matrix_rank(R - np.eye(head_dim), tol=1e-8) == moved
    along_y, _ = generators(layer, 0)
    eigenvalues = np.linalg.eigvals(along_y)
    assert np.abs(eigenvalues.real).max() < 1e-10
    assert (np.abs(eigenvalues.imag) > 1e-8).sum() == moved


def reverse(c):
    """c[n] -> c[-n]: the first row of a circulant with first column c."""
    return c.flip(-1).roll(1, -1)


@pytest.mark.parametrize("head_dim", [7, 8])
def test_only_the_odd_part_of_the_coefficients_matters(head_dim):
    layer = random_layer("softmax_circulant", head_dim=head_dim)
    before = matrices(layer)
    c = layer.encoding.coefficients
    even = torch.randn(c.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    even = even + reverse(even)
    with torch.no_grad():
        c += even
    assert_equal(matrices(layer), before)
    layer(*inputs(layer)).square().sum().backward()
    assert c.grad[..., 1:].abs().amax() > 1e-3
    assert c.grad[..., 0].abs().amax() < 1e-12
    assert (c.grad + reverse(c.grad)).abs().amax() < 1e-12


def test_coefficients_are_a_first_column_not_a_first_row():
    layer = random_layer("softmax_circulant")
    c = layer.encoding.coefficients.detach().numpy()
    for head, R in enumerate(at(layer, 0, 1)):
        C = circulant(c[1, head])
        assert_equal(R, expm(C - C.T))
        assert np.abs(R - expm(C.T - C)).max() > 0.1


def test_circulant_is_mixed_rope_in_a_fixed_fourier_basis():
    string, rope = random_layer("softmax_circulant"), random_layer("softmax_rope", rope="mixed")
    theta = 2 * np.fft.fft(string.encoding.coefficients.detach().numpy()).imag  # (2, H, D)
    n = np.arange(D)
    columns = []
    for f in range(1, D // 2):
        columns += [np.cos(2 * np.pi * f * n / D), -np.sin(2 * np.pi * f * n / D)]
    basis = np.stack([*columns, np.ones(D), (-1.0) ** n], axis=1)
    basis = torch.tensor(basis / np.linalg.norm(basis, axis=0))
    with torch.no_grad():
        planes = torch.tensor(theta[..., 1 : D // 2])
        rope.encoding.frequencies.copy_(torch.cat([planes, torch.zeros(2, H, 1)], dim=-1))
    q, k, _ = inputs(string)
    torch.testing.assert_close(string.weights(q, k), rope.weights(q @ basis, k @ basis))


# Frequencies at the start


def test_axial_frequencies_are_those_of_rope_vit():
    layer = build_attention("favor_rope", grid=GRID, heads=H, head_dim=16)
    y, x = layer.encoding.frequencies
    expected = torch.tensor([100 ** (-4 * t / 16) for t in range(4)])
    torch.testing.assert_close(x, torch.cat([expected, torch.zeros(4)]).expand(H, -1))
    torch.testing.assert_close(y, torch.cat([torch.zeros(4), expected]).expand(H, -1))
    assert not list(layer.encoding.parameters())


@pytest.mark.parametrize("base", [None, 50.0])
def test_mixed_frequencies_start_at_one_random_angle_a_head(base):
    layer = build_attention("relu_rope", grid=GRID, heads=H, head_dim=16, rope="mixed", rope_base=base)
    y, x = layer.encoding.frequencies.detach()
    expected = torch.tensor([(base or 10) ** (-4 * t / 16) for t in range(4)]).repeat(2)
    torch.testing.assert_close((y**2 + x**2).sqrt(), expected.expand(H, -1))
    angle = torch.atan2(y, x)
    torch.testing.assert_close(angle[:, :4], angle[:, :1].expand(-1, 4))
    quarter_turn = (angle[:, 4:] - angle[:, :4]).remainder(2 * math.pi)
    torch.testing.assert_close(quarter_turn, torch.full((H, 4), math.pi / 2))
    assert (angle[0, 0] - angle[1, 0]).abs() > 1e-3


def test_circulant_starts_at_the_frequencies_of_mixed_rope():
    layer = build_attention("softmax_circulant", grid=GRID, heads=H, head_dim=16)
    y, x = torch.fft.fft(layer.encoding.coefficients.detach()).imag[..., [1, 3, 5, 7, 2, 4, 6]] * 2
    magnitude = (y**2 + x**2).sqrt()
    first = torch.tensor([10 ** (-2 * t / 7) for t in range(4)])
    torch.testing.assert_close(magnitude, torch.cat([first, first[:3]]).expand(H, -1))


def test_circulant_can_start_small():
    layer = build_attention("softmax_circulant", grid=GRID, heads=16, head_dim=64, circulant_init="normal")
    c = layer.encoding.coefficients
    assert c.std().item() == pytest.approx(0.02, rel=4 / math.sqrt(2 * c.numel()))


def test_axial_is_mixed_along_the_axes():
    axial, mixed = random_layer("favor_rope"), random_layer("favor_rope", rope="mixed")
    with torch.no_grad():
        mixed.encoding.frequencies.copy_(axial.encoding.frequencies)
        mixed.features.projection.copy_(axial.features.projection)
    q, k, v = inputs(axial)
    assert torch.equal(axial(q, k, v), mixed(q, k, v))


@pytest.mark.parametrize(
    ("attention", "placement"),
    [("softmax", "pre"), ("favor", "pre"), ("relu", "pre"), ("favor", "post"), ("relu", "post")],
)
def test_frequencies_of_zero_are_no_encoding(attention, placement):
    plain = random_layer(attention)
    rope, string = (random_layer(f"{attention}_{name}", rotary_placement=placement) for name in ("rope", "circulant"))
    if attention == "favor":
        string.features.projection = rope.features.projection = plain.features.projection
    rope.encoding.frequencies.zero_()
    torch.nn.init.zeros_(string.encoding.coefficients)
    q, k, v = inputs(plain)
    # Bit for bit where the planes are those of the input; circulant-STRING goes to another basis and back.
    exact = {} if placement == "post" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(rope(q, k, v), plain(q, k, v), **exact)
    assert torch.equal(rope.weights(q, k), plain.weights(q, k))
    torch.testing.assert_close(string(q, k, v), plain(q, k, v))


# What follows for attention


def test_softmax_does_not_move_when_every_position_shifts(layer):
    q, k, v = inputs(layer)
    A, y = layer.weights(q, k), layer(q, k, v)
    move(layer, 3, -5)
    torch.testing.assert_close(layer.weights(q, k), A, rtol=0, atol=1e-10)
    torch.testing.assert_close(layer(q, k, v), y, rtol=0, atol=1e-10)


@pytest.mark.parametrize("variant", [name for name in LINEAR if name.endswith(("rope", "circulant"))])
def test_features_rotated_after_the_map_do_not_move_when_every_position_shifts(variant):
    layer = random_layer(variant, rotary_placement="post")
    q, k, v = inputs(layer)
    y = layer(q, k, v)
    move(layer, 3, -5)
    torch.testing.assert_close(layer(q, k, v), y, rtol=0, atol=1e-10)


@pytest.mark.parametrize("encoding", ["rope", "circulant"])
@pytest.mark.parametrize(("attention", "options"), [("favor", {}), ("relu", {"relu_projection": "orthogonal"})])
def test_shifted_positions_are_a_rotated_projection(attention, options, encoding):
    # So a projection whose law is invariant under rotations makes the attention relative in law.
    variant = f"{attention}_{encoding}"
    layer, rotated = random_layer(variant, heads=1, **options), random_layer(variant, heads=1, **options)
    q, k, v = inputs(layer)
    unmoved = layer(q, k, v)
    along_y, along_x = generators(layer, 0)
    rotated.features.projection = rotated.features.projection @ torch.tensor(expm(3 * along_y - 5 * along_x))
    move(layer, 3, -5)
    torch.testing.assert_close(layer(q, k, v), rotated(q, k, v), rtol=0, atol=1e-10)
    assert (layer(q, k, v) - unmoved).abs().amax() > 0.01


@pytest.mark.parametrize("encoding", ["rope", "circulant"])
def test_relu_without_projection_is_not_relative_if_rotated_before(encoding):
    layer = random_layer(f"relu_{encoding}")
    q, k, _ = inputs(layer)
    A = layer.weights(q, k)
    assert row_l1(move(layer, 3, -5).weights(q, k), A) > 0.1


@pytest.mark.parametrize("options", [{}, {"rope": "mixed"}, {"circulant_block": 4}])
@pytest.mark.parametrize("encoding", ["rope", "circulant"])
def test_a_class_token_is_not_rotated_and_patches_are_as_without_it(encoding, options):
    with_cls = random_layer(f"softmax_{encoding}", cls=True, **options)
    without = random_layer(f"softmax_{encoding}", **options)
    R = matrices(with_cls)
    assert_equal(R[:, 0], np.broadcast_to(np.eye(D), (H, D, D)))
    assert_equal(R[:, 1:], matrices(without))
    q, _, _ = inputs(with_cls)
    if encoding == "rope":
        assert torch.equal(with_cls.encoding.rotate(q)[0][:, :, 0], q[:, :, 0])


def test_denominators_are_not_rotated_because_they_would_change_sign():
    layer = random_layer("favor_rope", heads=8, head_dim=32, features=64, grid=(8, 8), rotary_placement="post")
    q, k, v = inputs(layer, batch=4)
    phi_q, phi_k = layer.features(q, k)
    turned_q, turned_k = layer.encoding.rotate(phi_q, phi_k)
    rotated = (turned_q @ turned_k.mT).sum(-1)
    unrotated = (phi_q @ phi_k.mT).sum(-1)
    assert 0.005 < (rotated <= 0).double().mean() < 0.1
    assert (unrotated > 0).all()
    expected = turned_q @ turned_k.mT @ v / unrotated[..., None]
    torch.testing.assert_close(layer(q, k, v), expected)


def test_weights_rotated_after_the_map_are_signed_and_do_not_sum_to_one():
    layer = random_layer("favor_rope", rotary_placement="post")
    A = layer.weights(*inputs(layer)[:2])
    assert (A < 0).any()
    assert (A.sum(-1) - 1).abs().amax() > 0.1


# What cannot be rotated


@pytest.mark.parametrize(
    ("variant", "head_dim", "options", "said"),
    [
        ("softmax_rope", 6, {}, "4 to divide the head size, got 6; use 8 instead"),
        ("favor_rope", 8, {"features": 11, "rotary_placement": "post"}, "4 to divide features, got 11; use 12 instead"),
        ("softmax_rope", 8, {"rotary_placement": "post"}, "softmax_rope has none; use pre instead"),
        ("relu_circulant", 8, {"circulant_block": 3}, "got 3 for 8; use circulant_block 8 instead"),
        ("relu_circulant", 2, {}, "got 2 for 2; use 4 instead"),
    ],
)
def test_a_size_that_cannot_be_rotated_is_refused_with_one_that_can(variant, head_dim, options, said):
    with pytest.raises(ConfigError) as refused:
        build_attention(variant, grid=GRID, heads=H, head_dim=head_dim, **options)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_rotation_does_not_care_where_its_input_lies_in_memory(layer):
    q, _, _ = inputs(layer)
    (expected,) = layer.encoding.rotate(q)
    odd_offset = torch.cat([torch.zeros(1), q.flatten()])[1:].view(q.shape)
    transposed = q.transpose(1, 2).contiguous().transpose(1, 2)
    for same in (odd_offset, transposed):
        torch.testing.assert_close(layer.encoding.rotate(same)[0], expected)
