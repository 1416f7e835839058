"""Feature maps of linear attention: phi(q) . phi(k) is the kernel K(q, k)."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import normalize

from erpe.config import AttentionConfig


def orthogonal_gaussian(m: int, d: int, generator: Generator) -> Tensor:
    """Rows that are N(0, I_d) each and orthogonal within blocks of d.

    Returns:
        (m, d) float64, on the CPU.
    Source: Choromanski et al. 2021 (Performer), section 3.2.
    """
    blocks = -(-m // d)
    gaussian = torch.randn(blocks, d, d, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    # QR alone is not uniform over rotations (LAPACK fixes signs); the signs of R make it so.
    q = q * r.diagonal(dim1=-2, dim2=-1).sign()[:, None, :]       # (blocks, d, d)
    rows = q.mT.reshape(blocks * d, d)[:m]                        # (m, d)
    # Lengths of fresh Gaussian vectors, one a row: chi(d), so that each row alone is Gaussian.
    lengths = torch.randn(m, d, generator=generator, dtype=torch.float64).norm(dim=1, keepdim=True)
    return rows * lengths


class Features(nn.Module):
    """phi_q, phi_k = features(q, k); the base holds the random projection, if there is one.

    `projection` (m, D) is a buffer: saved with the model, frozen in evaluation, shared by q, k and heads.
    """

    projection: Tensor

    def __init__(self, config: AttentionConfig, head_dim: int, generator: Generator) -> None:
        super().__init__()
        self.eps = config.eps
        self.normalize = config.normalize_qk
        self.head_dim = head_dim
        self.m = config.feature_count(head_dim)
        if config.projected:
            drawn = orthogonal_gaussian(self.m, head_dim, generator)
            self.register_buffer("projection", drawn.to(torch.get_default_dtype()))

    def project(self, x: Tensor, scale: float = 1.0) -> Tensor:
        """w_l . (scale x): (..., D) -> (..., m), in the dtype of x."""
        return x @ (self.projection.to(x.dtype).T * scale)

    def redraw(self, generator: Generator) -> None:
        """Replace the random projection by a fresh one; nothing to do without a projection."""
        if hasattr(self, "projection"):
            self.projection.copy_(orthogonal_gaussian(self.m, self.head_dim, generator))


class FavorFeatures(Features):
    """FAVOR+ positive orthogonal random features of the softmax kernel.

        phi(x)_l = m^(-1/2) exp(w_l . x - |x|^2 / 2),      x = d^(-1/4) q or d^(-1/4) k

    Source: Choromanski et al. 2021 (Performer), Lemma 1. With `normalize_qk`: Luo et al. 2021, section 3.3.
    """

    def exponent(self, x: Tensor, scale: float = 1.0) -> Tensor:
        """w_l . x - |x|^2 / 2 of x times `scale`: (..., D) -> (..., m)."""
        return self.project(x, scale) - x.square().sum(-1, keepdim=True) * (scale**2 / 2)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H, N, D) twice -> phi_q, phi_k (B, H, N, m), positive."""
        scale = 1.0 if self.normalize else self.head_dim**-0.25
        if self.normalize:
            q, k = normalize(q, dim=-1), normalize(k, dim=-1)
        # A factor of a query, or one common to all keys of an image and head, cancels in the quotient.
        # So the largest exponent is taken away there, and nowhere else, before the exponential.
        a = self.project(q, scale)                                # (B, H, N, m)  |x|^2 / 2 is such a factor
        b = self.exponent(k, scale)                               # (B, H, N, m)
        return self.positive(a, a.amax(dim=-1, keepdim=True)), self.positive(b, b.amax(dim=(-2, -1), keepdim=True))

    def positive(self, exponent: Tensor, largest: Tensor) -> Tensor:
        """m^(-1/2) (exp(exponent - largest) + eps)."""
        shift = largest.detach() + math.log(self.m) / 2
        return (exponent - shift).exp() + self.eps * self.m**-0.5


class ReluFeatures(Features):
    """Performer-ReLU: phi(x) = relu(x) + eps, or m^(-1/2) relu(w_l . x) + eps with a projection.

    Positively homogeneous, so the scale of q, and a common scale of k, cancel but for eps.
    Source: Choromanski et al. 2021 (Performer), equation 5 with f = ReLU.
    """

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H, N, D) twice -> phi_q, phi_k (B, H, N, m), non-negative."""
        return self.phi(q), self.phi(k)

    def phi(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., m)."""
        x = normalize(x, dim=-1) if self.normalize else x
        if hasattr(self, "projection"):
            x = self.project(x, self.m**-0.5)
        return x.relu() + self.eps
