"""Feature maps of linear attention: phi(q) . phi(k) is the kernel K(q, k)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import normalize

from erpe.config import AttentionConfig

KINDS = ("plain", "relu", "exp of query", "exp of key")


def wide(dtype: torch.dtype) -> torch.dtype:
    """float32 in the place of half precision, which loses angles and small weights."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def full_precision(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(wide(x.dtype))


class Map(NamedTuple):
    """What makes features of numbers x: x + eps, max(x, 0) + eps, or e^(x - norm |x|^2 - top) + eps.

    `top` is the largest exponent of a query, or of all keys of an image and head: a factor that cancels.
    """

    kind: str
    """One of `KINDS`."""
    eps: float
    norm: float = 0.0

    def __call__(self, x: Tensor, w: Tensor | None) -> Tensor:
        """(B, H, N, D), projections (D, m) -> (B, H, N, m); without projections of the numbers themselves."""
        y = x if w is None else x @ w
        if self.norm:
            y = y - self.norm * torch.linalg.vector_norm(x, dim=-1, keepdim=True).square()
        if self.kind == "relu":
            y = y.relu()
        elif self.kind == "exp of query":
            y = (y - y.amax(dim=-1, keepdim=True).detach()).exp()
        elif self.kind == "exp of key":
            y = (y - y.amax(dim=(-2, -1), keepdim=True).detach()).exp()
        return y + self.eps if self.eps else y


class Maps(NamedTuple):
    """Of queries and of keys."""

    q: Map
    k: Map


class FeatureMap(NamedTuple):
    """phi: vectors (B, H, N, D) -> features (B, H, N, m)."""

    maps: Maps
    w: Tensor | None = None
    """(D, m) projections, which `maps` are of; (H, D, m): one for each head; None: m is D."""

    def __call__(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H, N, D) twice -> phi_q, phi_k (B, H, N, m), non-negative."""
        return self.maps.q(q, self.w), self.maps.k(k, self.w)

    def size(self, q: Tensor) -> int:
        """m."""
        return q.shape[-1] if self.w is None else self.w.shape[-1]

    def of(self, basis: Tensor | None) -> FeatureMap:
        """Return the same features, of vectors in the coordinates of a `basis` (D, D)."""
        if basis is None:
            return self
        return self._replace(w=basis.T if self.w is None else basis.T @ self.w)


AS_THEY_ARE = FeatureMap(Maps(Map("plain", 0.0), Map("plain", 0.0)))


def orthogonal_gaussian(m: int, d: int, generator: Generator) -> Tensor:
    """Rows that are N(0, I_d) each and orthogonal within blocks of d.

    Returns:
        (m, d) float64, where the generator draws.
    Source: Choromanski et al. 2021 (Performer), section 3.2.
    """
    blocks = -(-m // d)
    exact: Any = {"generator": generator, "dtype": torch.float64, "device": generator.device}
    gaussian = torch.randn(blocks, d, d, **exact)
    q, r = torch.linalg.qr(gaussian)
    # QR alone is not uniform over rotations (LAPACK fixes signs); the signs of R make it so.
    q = q * r.diagonal(dim1=-2, dim2=-1).sign()[:, None, :]       # (blocks, d, d)
    rows = q.mT.reshape(blocks * d, d)[:m]                        # (m, d)
    # Lengths of fresh Gaussian vectors, one a row: chi(d), so that each row alone is Gaussian.
    lengths = torch.randn(m, d, **exact).norm(dim=1, keepdim=True)
    return rows * lengths


class Features(nn.Module):
    """phi_q, phi_k = features(q, k): `maps` of the projections of q and k, or of themselves.

    `projection` (m, D) is a buffer: saved with the model, frozen in evaluation, shared by q, k and heads.
    """

    maps: Maps
    scale: float
    """Of the projections."""
    projection: Tensor

    def __init__(self, config: AttentionConfig, head_dim: int, generator: Generator, device: str = "cpu") -> None:
        super().__init__()
        self.normalize = config.normalize_qk
        self.head_dim = head_dim
        self.m = config.feature_count(head_dim)
        if config.projected:
            self.register_buffer("projection", torch.empty(self.m, head_dim, dtype=torch.float32, device=device))
            if device != "meta":
                self.redraw(generator)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H, N, D) twice -> phi_q, phi_k (B, H, N, m), non-negative."""
        q, k, phi = self.prepare(q, k)
        return phi(q, k)

    def prepare(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, FeatureMap]:
        """(B, H, N, D) twice -> the vectors whose features are wanted, and the map."""
        if self.normalize:
            q, k = (normalize(full_precision(x), dim=-1) for x in (q, k))
        w = self.projection.to(wide(q.dtype)).T * self.scale if hasattr(self, "projection") else None
        return q, k, FeatureMap(self.maps, w)

    def redraw(self, generator: Generator) -> None:
        """Replace the random projection by a fresh one; nothing to do without a projection."""
        if hasattr(self, "projection"):
            self.projection.copy_(orthogonal_gaussian(self.m, self.head_dim, generator))


class FavorFeatures(Features):
    """FAVOR+ positive orthogonal random features of the softmax kernel.

        phi(x)_l = exp(w_l . x - |x|^2 / 2),      x = d^(-1/4) q or d^(-1/4) k

    but for a factor of each query, such as exp(-|q|^2 / 2), and one common to all keys of an image and head: both
    cancel in the quotient. The largest feature of a query is one, which needs no eps; those of keys get it.
    Source: Choromanski et al. 2021 (Performer), Lemma 1. With `normalize_qk`: Luo et al. 2021, section 3.3.
    """

    def __init__(self, config: AttentionConfig, head_dim: int, generator: Generator, device: str = "cpu") -> None:
        super().__init__(config, head_dim, generator, device)
        self.scale = 1.0 if self.normalize else head_dim**-0.25
        self.maps = Maps(Map("exp of query", 0.0), Map("exp of key", config.eps, self.scale**2 / 2))


class ReluFeatures(Features):
    """Performer-ReLU: phi(x) = relu(x) + eps, or m^(-1/2) relu(w_l . x) + eps with a projection.

    Positively homogeneous, so the scale of q, and a common scale of k, cancel but for eps.
    Source: Choromanski et al. 2021 (Performer), equation 5 with f = ReLU.
    """

    def __init__(self, config: AttentionConfig, head_dim: int, generator: Generator, device: str = "cpu") -> None:
        super().__init__(config, head_dim, generator, device)
        self.scale = self.m**-0.5
        self.maps = Maps(Map("relu", config.eps), Map("relu", config.eps))
