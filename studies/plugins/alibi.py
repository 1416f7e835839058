"""ALiBi on a grid: far tokens weigh less, at a rate that each head has for its own. `erpe tune -v relu_alibi ...`.

    log C[i, j] = -slope_h * |r_j - r_i|,      slope_h = slope * 2^(-8 (h + 1) / H)

The rates are fixed, or learned as logarithms. A class token lies outside the grid: its weights are 1.
Source: Press et al. 2022 (ALiBi), with the Euclidean distance of patches as Fuller et al. 2023 (CROMA) have it.
"""

import torch
from pydantic import BaseModel, PositiveFloat
from torch import Generator, Tensor, nn

from erpe.config import AttentionConfig
from erpe.model.encoding import Encoding, Shape
from erpe.plugins import options_of, register_encoding


class AlibiOptions(BaseModel, extra="forbid"):
    slope: PositiveFloat = 1.0
    """Factor of every head's rate."""
    learned: bool = True
    """Train the rates."""


@register_encoding("alibi", options=AlibiOptions, space={"slope": (0.5, 1.0, 2.0)})
class Alibi(Encoding):
    def __init__(self, config: AttentionConfig, shape: Shape, generator: Generator) -> None:
        super().__init__(config, shape, generator)
        options, (h, w) = options_of(config, AlibiOptions), shape.grid
        heads = torch.arange(1, shape.heads + 1, dtype=torch.float32, device="cpu")
        rates = options.slope * 2 ** (-8 * heads / shape.heads)  # (H,)
        self.log_rates = nn.Parameter(rates.log(), requires_grad=options.learned)
        y, x = (torch.arange(n, dtype=torch.float32, device="cpu") for n in (h, w))
        r = torch.cartesian_prod(y, x)  # (h w, 2)
        far = nn.functional.pad(torch.cdist(r, r), (1, 0, 1, 0)) if shape.cls else torch.cdist(r, r)
        self.register_buffer("far", far, persistent=False)  # (N, N)

    def log_weights(self) -> Tensor:
        """(H, N, N)."""
        return -self.log_rates.exp()[:, None, None] * self.far
