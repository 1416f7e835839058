"""Cayley-STRING: a learned orthogonal basis, and rotations of its planes by the position.

    R(r) = Q rope(r) Q^T,      Q = (I - S) (I + S)^(-1),  S = A - A^T

Q commutes with no rotation of fixed planes, so the planes that turn are learned; R(a)^T R(b) = R(b - a) as in RoPE.
Source: Schenck et al. 2025 (STRING), Cayley-STRING.
"""

import torch
from torch import Generator, Tensor, nn

from erpe.config import AttentionConfig
from erpe.model.encoding import Encoding, Shape
from erpe.plugins import register_encoding


@register_encoding("cayley")
class CayleyString(Encoding):
    def __init__(self, config: AttentionConfig, shape: Shape, generator: Generator) -> None:
        super().__init__(config, shape, generator)
        d, (h, w) = shape.head_dim, shape.grid
        self.a = nn.Parameter(torch.zeros(shape.heads, d, d, dtype=torch.float32, device="cpu"))
        self.a.data.normal_(0, 0.1, generator=generator)
        self.frequencies = nn.Parameter(torch.zeros(2, shape.heads, d // 2, dtype=torch.float32, device="cpu"))
        self.frequencies.data.normal_(0, 0.5, generator=generator)  # rad per patch along y and x
        y, x = (torch.arange(n, dtype=torch.float32, device="cpu") for n in (h, w))
        r = torch.cartesian_prod(y, x)  # (h w, 2)
        r = nn.functional.pad(r, (0, 0, 1, 0)) if shape.cls else r  # a class token is not turned
        self.register_buffer("r", r, persistent=False)  # (N, 2)

    def basis(self) -> Tensor:
        """Q (H, D, D), orthogonal."""
        s = self.a - self.a.mT
        one = torch.eye(s.shape[-1], dtype=s.dtype, device=s.device)
        return torch.linalg.solve(one + s, one - s)

    def rotate(self, *vectors: Tensor) -> tuple[Tensor, ...]:
        """Each (B, H, N, D); Q^T alone is left out: in q . k it cancels."""
        angle = torch.einsum("na,ahp->hnp", self.r, self.frequencies)  # (H, N, D / 2)
        cos, sin, q = angle.cos(), angle.sin(), self.basis()
        turned = []
        for x in vectors:
            # The features of linear attention depend on the basis: back to the first one.
            a, b = (x @ q.to(x.dtype))[..., : 2 * cos.shape[-1]].unflatten(-1, (-1, 2)).unbind(-1)
            pairs = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
            rest = (x @ q.to(x.dtype))[..., pairs.shape[-1] :]
            turned.append((torch.cat([pairs, rest], dim=-1) @ q.mT.to(x.dtype)).to(x.dtype))
        return tuple(turned)
