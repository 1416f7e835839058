"""Random features and the ReLU kernel. Statistics have fixed seeds and tolerances in standard errors, and each
is also computed with the mistake it is there to catch, which it must reject."""

import math

import numpy as np
import pytest
import torch
from oracle import D, H, explicit_weights, inputs, random_layer
from scipy import stats

from erpe.config import AttentionConfig
from erpe.model.features import FavorFeatures, orthogonal_gaussian

DRAWS, SIZE = 20_000, 16


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def draws():
    """(DRAWS, SIZE, SIZE): that many independent projections with m = d = SIZE."""
    return orthogonal_gaussian(DRAWS * SIZE, SIZE, generator()).view(DRAWS, SIZE, SIZE)


def pair(size, squared_norm, direction):
    """x = y with |x + y|^2 as given."""
    u = torch.eye(size, dtype=torch.float64)[0] if direction == "axis" else torch.full((size,), size**-0.5).double()
    return u * math.sqrt(squared_norm) / 2


def estimates(projections, x):
    """FAVOR+ estimate of exp(x . x) by each projection (draws, m, d), with the features of the layer."""
    draws, m, d = projections.shape
    features = FavorFeatures(AttentionConfig(variant="favor"), d, generator())
    features.projection = projections.reshape(-1, d)
    x = x * d**0.25  # the layer takes it out
    _, key, phi = features.prepare(x, x[None, None, None])
    phi = features.maps.k._replace(eps=0.0)(key, phi.w) * highest_feature(features, x)
    return phi.square().view(draws, m).mean(1)


def highest_feature(features, x):
    """The factor that features of keys lose."""
    y = x * len(x) ** -0.25
    return (features.projection @ y - y @ y / 2).exp().amax()


def z_score(sample, truth):
    return abs(sample.mean().item() - truth) / (sample.std().item() / math.sqrt(len(sample)))


def raw_qr(draws, size):
    """The mistake: Q of a plain QR, whose signs LAPACK fixes, with honest lengths."""
    q = torch.linalg.qr(torch.randn(draws, size, size, generator=generator(3), dtype=torch.float64)).Q
    return q.mT * torch.randn(draws, size, size, generator=generator(4), dtype=torch.float64).norm(dim=-1, keepdim=True)


def row_l1(A, other):
    """Mean L1 distance between rows of attention; at most 2."""
    return np.abs(np.asarray(A) - np.asarray(other)).sum(-1).mean()


# The projection


def test_rows_of_a_block_are_orthogonal_and_blocks_are_not(draws):
    gram = draws @ draws.mT
    off = gram - torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1))
    assert off.abs().max() < 1e-12 * SIZE
    assert (draws[0] @ draws[1].mT).abs().max() > 0.1


@pytest.mark.parametrize(("m", "d"), [(24, 8), (11, 8), (3, 8), (8, 8), (20, 16)])
def test_any_number_of_features_can_be_drawn(m, d):
    W = orthogonal_gaussian(m, d, generator())
    assert W.shape == (m, d)
    first = W[: min(m, d)]
    gram = first @ first.T
    torch.testing.assert_close(gram, gram.diagonal().diag(), rtol=0, atol=1e-12)


def test_each_row_alone_is_a_standard_gaussian(draws):
    first = draws[:, 0]
    bound = 4.5 / math.sqrt(DRAWS)
    assert first.mean(0).abs().max() < bound
    assert (first.mT @ first / DRAWS - torch.eye(SIZE)).abs().max() < bound * math.sqrt(2)
    assert stats.kstest(first.flatten().numpy(), "norm").pvalue > 1e-3
    assert stats.kstest(raw_qr(DRAWS, SIZE)[:, 0].flatten().numpy(), "norm").pvalue < 1e-6


def test_lengths_of_rows_are_chi_and_independent_within_a_block(draws):
    def is_right(squares):
        """squares (draws, m) of the lengths: their law, and correlations between the rows of a block."""
        law = stats.kstest(squares[:, :4].flatten(), stats.chi2(SIZE).cdf).pvalue > 1e-3
        correlation = np.corrcoef(squares.T) - np.eye(squares.shape[1])
        return law and np.abs(correlation).max() < 4.5 / math.sqrt(len(squares))

    squares = draws.square().sum(-1).numpy()
    se = math.sqrt(2 * SIZE / squares.size)
    assert abs(squares.mean() - SIZE) < 4 * se
    assert is_right(squares)
    assert not is_right(np.repeat(squares[:, :1], SIZE, axis=1))  # one length a block
    assert not is_right(SIZE + 1e-9 * squares)  # sqrt(d) for every row
    assert not is_right(squares / SIZE)  # unit length on average


@pytest.mark.parametrize("direction", ["axis", "diagonal"])
def test_favor_is_an_unbiased_estimate_of_the_softmax_kernel(draws, direction):
    x = pair(SIZE, 1.0, direction)
    truth = math.exp(x @ x)
    assert z_score(estimates(draws, x), truth) < 4
    assert z_score(estimates(draws / draws.norm(dim=-1, keepdim=True), x), truth) > 20  # rows of unit length


@pytest.mark.parametrize("direction", ["axis", "diagonal"])
def test_raw_qr_would_be_a_biased_estimate(direction):
    x = pair(SIZE, 1.0, direction)
    assert z_score(estimates(raw_qr(DRAWS, SIZE), x), math.exp(x @ x)) > 20


@pytest.mark.parametrize("squared_norm", [0.5, 1.0])
def test_orthogonal_rows_beat_the_variance_of_independent_ones(draws, squared_norm):
    x = pair(SIZE, squared_norm, "diagonal")
    kernel, norms = math.exp(x @ x), math.exp(-(x @ x))
    independent = (math.exp(squared_norm) - 1) * kernel**2 / SIZE
    gap = 2 * (SIZE - 1) / (SIZE * (SIZE + 2)) * (kernel - norms) ** 2

    def squared_errors(projections):
        errors = (estimates(projections, x) - kernel).square()
        return errors.mean().item(), errors.std().item() / math.sqrt(DRAWS)

    error, se = squared_errors(draws)
    assert error < independent - gap + 4 * se
    error, se = squared_errors(torch.randn(draws.shape, generator=generator(9), dtype=torch.float64))
    assert abs(error - independent) < min(4 * se, 0.05 * independent)
    assert error > independent - gap + 4 * se


def test_error_of_the_kernel_falls_as_one_over_the_root_of_m():
    d, repeats = 8, 200
    x = pair(d, 1.0, "axis")
    sizes = [64, 128, 256, 512, 1024, 2048]

    def slope(truth):
        errors = []
        for m in sizes:
            blocks = orthogonal_gaussian(repeats * m, d, generator(m)).view(repeats, m, d)
            errors.append((estimates(blocks, x) - truth).square().mean().sqrt().item())
        return np.polyfit(np.log(sizes), np.log(errors), 1)[0]

    truth = math.exp(x @ x)
    assert -0.6 < slope(truth) < -0.4
    assert slope(truth * math.exp(x @ x)) > -0.2  # without -|x|^2 / 2 the estimate goes elsewhere


def test_many_features_recover_softmax_attention():
    m = 8192
    layer = random_layer("favor", features=m)
    q, k, _ = (x / 2 for x in inputs(layer))
    softmax = explicit_weights(random_layer("softmax"), q, k)
    few = row_l1(random_layer("favor", features=32).weights(q, k), softmax)
    many = row_l1(layer.weights(q, k), softmax)
    assert many < 0.05
    assert many < few / 8  # 16, were there no noise

    W, other = layer.features.projection, orthogonal_gaussian(m, D, generator(9))

    def wrong(phi_q, phi_k):
        A = phi_q.exp() @ phi_k.exp().mT
        return row_l1(A / A.sum(-1, keepdim=True), softmax)

    x, y = q * D**-0.25, k * D**-0.25
    norm = y.square().sum(-1, keepdim=True) / 2
    assert wrong(x @ W.T, y @ W.T - norm) == pytest.approx(many)
    assert wrong(q @ W.T, k @ W.T - k.square().sum(-1, keepdim=True) / 2) > 0.1  # no d^(-1/4)
    assert wrong(x @ W.T, y @ W.T) > 0.08  # no exp(-|k|^2 / 2)
    assert wrong(x @ W.T, y @ other.T - norm) > 0.15  # another projection for k


# The stabiliser


def exponents(layer, q, k):
    """Whole exponents of queries and keys, (B, H, N, m)."""
    W = layer.features.projection
    return [x @ W.T * D**-0.25 - x.square().sum(-1, keepdim=True) * D**-0.5 / 2 for x in (q, k)]


def from_exponents(a, b, eps=0.0):
    A = (a.exp() + eps) @ (b.exp() + eps).mT
    return A / A.sum(-1, keepdim=True)


def test_attention_is_that_without_any_stabiliser():
    layer = random_layer("favor")
    q, k, _ = inputs(layer)
    a, b = exponents(layer, q, k)
    torch.testing.assert_close(layer.weights(q, k), from_exponents(a, b), rtol=0, atol=1e-12)


def test_only_shifts_common_to_all_keys_cancel():
    layer = random_layer("favor")
    q, k, _ = inputs(layer)
    a, b = exponents(layer, q, k)
    A = layer.weights(q, k)
    shift = torch.randn(a.shape[:3], dtype=torch.float64, generator=generator(6))[..., None]
    torch.testing.assert_close(from_exponents(a + shift, b), A, rtol=0, atol=1e-12)
    torch.testing.assert_close(from_exponents(a, b + shift[:, :, :1]), A, rtol=0, atol=1e-12)
    assert row_l1(from_exponents(a, b - b.amax(-1, keepdim=True)), A) > 0.1  # a maximum for each key


def test_eps_hardly_blurs_the_attention():
    head_dim = 32
    exact, shipped = (random_layer("favor", head_dim=head_dim, features=128, eps=eps) for eps in (0.0, 1e-6))
    assert AttentionConfig(variant="favor").eps == 1e-6
    q, k, _ = inputs(exact)
    A = exact.weights(q, k)
    assert row_l1(shipped.weights(q, k), A) < 0.005
    # The reference leaves -|x|^2 / 2 out of the maximum, so that most key features fall below its eps of 1e-4.
    W = exact.features.projection
    x, y = q * head_dim**-0.25, k * head_dim**-0.25
    a, b = x @ W.T, y @ W.T
    a = a - a.amax(-1, keepdim=True) - x.square().sum(-1, keepdim=True) / 2
    b = b - b.amax((-2, -1), keepdim=True) - y.square().sum(-1, keepdim=True) / 2
    torch.testing.assert_close(from_exponents(a, b), A, rtol=0, atol=1e-12)
    assert row_l1(from_exponents(a, b, 1e-4), A) > 0.2


def test_float32_features_neither_overflow_nor_vanish():
    layer = random_layer("favor", eps=1e-6).float()
    for scale in (1e-3, 1.0, 30.0, 1e3):
        q, k, _ = (x.float() * scale for x in inputs(layer))
        phi_q, phi_k = layer.features(q, k)
        assert (phi_k > 0).all() and (phi_q >= 0).all()
        torch.testing.assert_close(phi_q.amax(-1), torch.ones(q.shape[:3]))
        torch.testing.assert_close(phi_k.amax((-2, -1)), torch.ones(q.shape[:2]))


def test_features_are_positive_and_their_factors_cancel():
    layer = random_layer("favor")
    q, k, _ = inputs(layer)
    phi_q, phi_k = layer.features(q, k)
    a, b = (x.exp() for x in exponents(layer, q, k))
    torch.testing.assert_close(phi_q, a / a.amax(-1, keepdim=True))  # of each query
    torch.testing.assert_close(phi_k, b / b.amax((-2, -1), keepdim=True))  # of all keys of an image and head


def test_queries_keys_and_heads_share_one_projection():
    layer = random_layer("favor")
    q, _, _ = inputs(layer)
    same = q[:, :1, :1].expand_as(q)
    phi_q, phi_k = layer.features(same, same)
    torch.testing.assert_close(phi_q, phi_k)
    torch.testing.assert_close(phi_q, phi_q[:, :1].expand_as(phi_q))


# ReLU


@pytest.mark.parametrize("projection", ["none", "orthogonal"])
def test_relu_ignores_the_scale_of_a_query_and_a_common_scale_of_keys(projection):
    layer = random_layer("relu", eps=0.0, relu_projection=projection, head_dim=16)
    q, k, _ = inputs(layer)
    A = layer.weights(q, k)
    assert A.isfinite().all()
    scale = torch.rand(q.shape[:3], dtype=torch.float64, generator=generator(7))[..., None] * 9 + 0.1
    torch.testing.assert_close(layer.weights(q * scale, k * 7), A, rtol=0, atol=1e-12)
    assert row_l1(layer.weights(q, k * scale), A) > 0.1


def test_projected_relu_estimates_the_arc_cosine_kernel(draws):
    x = torch.randn(SIZE, generator=generator(8), dtype=torch.float64)
    y = x + torch.randn(SIZE, generator=generator(9), dtype=torch.float64)
    angle = math.acos(x @ y / x.norm() / y.norm())
    truth = (x.norm() * y.norm()).item() * (math.sin(angle) + (math.pi - angle) * math.cos(angle)) / (2 * math.pi)

    layer = random_layer("relu", heads=1, grid=(1, 1), head_dim=SIZE, relu_projection="orthogonal", eps=0.0)
    layer.features.projection = draws.reshape(-1, SIZE)
    phi_x, phi_y = layer.features(x[None], y[None])
    products = phi_x[0] * phi_y[0]
    m = layer.features.m  # the factor is that of the m it was built for
    assert z_score(products.view(DRAWS, SIZE).sum(1) * m / SIZE, truth) < 4


def test_relu_without_projection_has_no_buffer_and_its_features_are_heads():
    layer = random_layer("relu")
    q, k, _ = inputs(layer)
    phi_q, phi_k = layer.features(q, k)
    torch.testing.assert_close(phi_q, q.clamp(min=0) + 1e-3)
    torch.testing.assert_close(phi_k, k.clamp(min=0) + 1e-3)
    assert not list(layer.buffers())


# Drawing again, and saving


@pytest.mark.parametrize(("variant", "options"), [("favor", {}), ("relu", {"relu_projection": "orthogonal"})])
def test_the_projection_is_saved_never_trained_and_depends_on_the_seed_alone(variant, options):
    first, again, other = (random_layer(variant, seed=seed, **options) for seed in (0, 0, 1))
    saved = first.state_dict()["features.projection"]
    assert saved.shape == (12, D)
    assert not any(name == "features.projection" for name, _ in first.named_parameters())
    assert torch.equal(saved, again.state_dict()["features.projection"])
    assert not torch.equal(saved, other.state_dict()["features.projection"])
    first.features.redraw(generator(11))
    assert (first.features.projection - again.features.projection).abs().min() > 0
    again.features.redraw(generator(11))
    assert torch.equal(first.features.projection, again.features.projection)


def test_by_default_there_are_twice_as_many_features_as_head_channels():
    assert random_layer("favor", features=None).features.projection.shape == (2 * D, D)
    assert random_layer("favor", features=None, heads=H + 1, head_dim=6).features.projection.shape == (12, 6)


@pytest.mark.parametrize("variant", ["softmax", "favor", "relu"])
def test_normalised_queries_and_keys_have_no_scale(variant):
    layer = random_layer(variant, normalize_qk=True)
    q, k, _ = inputs(layer)
    scale = torch.rand(q.shape[:3], dtype=torch.float64, generator=generator(7))[..., None] * 9 + 0.1
    torch.testing.assert_close(layer.weights(q * scale, k * scale), layer.weights(q, k))
