"""Feature maps of linear attention: phi(q) . phi(k) is the kernel K(q, k)."""

from __future__ import annotations

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

    def project(self, x: Tensor, scale: float = 1.0, basis: Tensor | None = None) -> Tensor:
        """w_l . (scale x): (..., D) -> (..., m), in the dtype of x, whose coordinates are those of a `basis` (D, D)."""
        columns = self.projection.to(x.dtype).T * scale           # (D, m)
        return x @ (columns if basis is None else basis.T @ columns)

    def redraw(self, generator: Generator) -> None:
        """Replace the random projection by a fresh one; nothing to do without a projection."""
        if hasattr(self, "projection"):
            self.projection.copy_(orthogonal_gaussian(self.m, self.head_dim, generator))


class FavorFeatures(Features):
    """FAVOR+ positive orthogonal random features of the softmax kernel.

        phi(x)_l = exp(w_l . x - |x|^2 / 2),      x = d^(-1/4) q or d^(-1/4) k

    but for a factor of each query, and one common to all keys of an image and head: both cancel in the quotient. So
    the features of a query sum to one, and those of all keys together, to which `eps` times their mean is added.
    Source: Choromanski et al. 2021 (Performer), Lemma 1. With `normalize_qk`: Luo et al. 2021, section 3.3.
    """

    def forward(self, q: Tensor, k: Tensor, basis: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, H, N, D) twice -> phi_q, phi_k (B, H, N, m), positive; `basis` as for `project`."""
        a, b = self.exponents(q, k, basis)
        return a.softmax(dim=-1), self.of_keys(b)

    def exponents(self, q: Tensor, k: Tensor, basis: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, H, N, D) twice -> w_l . q and w_l . k - |k|^2 / 2, (B, H, N, m) each; |q|^2 / 2 is a factor."""
        if self.normalize:
            q, k, scale = normalize(q, dim=-1), normalize(k, dim=-1), 1.0
        else:
            scale = self.head_dim**-0.25
        return self.project(q, scale, basis), self.exponent(k, scale, basis)

    def exponent(self, x: Tensor, scale: float = 1.0, basis: Tensor | None = None) -> Tensor:
        """w_l . x - |x|^2 / 2 of x times `scale`: (..., D) -> (..., m)."""
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return self.project(x, scale, basis) - norm.square() * (scale**2 / 2)

    def of_keys(self, b: Tensor) -> Tensor:
        """Exponents -> phi_k, (B, H, N, m)."""
        every = b.flatten(-2).softmax(dim=-1).view(b.shape)
        return every + self.eps / (b.shape[-2] * self.m)


class ReluFeatures(Features):
    """Performer-ReLU: phi(x) = relu(x) + eps, or m^(-1/2) relu(w_l . x) + eps with a projection.

    Positively homogeneous, so the scale of q, and a common scale of k, cancel but for eps.
    Source: Choromanski et al. 2021 (Performer), equation 5 with f = ReLU.
    """

    def forward(self, q: Tensor, k: Tensor, basis: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, H, N, D) twice -> phi_q, phi_k (B, H, N, m), non-negative; `basis` as for `project`."""
        return self.phi(q, basis), self.phi(k, basis)

    def phi(self, x: Tensor, basis: Tensor | None = None) -> Tensor:
        """(..., D) -> (..., m)."""
        x = normalize(x, dim=-1) if self.normalize else x
        if hasattr(self, "projection"):
            x = self.project(x, self.m**-0.5, basis)
        return x.relu() + self.eps
