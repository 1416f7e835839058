"""Magnitude-aware linear attention (MALA): the size of a query matters again, which the quotient of others cancels.

    A_ij = beta_i s_ij - gamma_i,      s_ij = phi_q_i . phi_k_j
    beta_i = 1 + 1 / S_i,  gamma_i = S_i / N,      S_i = sum_j s_ij

Rows sum to one, beta_i S_i - N gamma_i = 1; some weights are negative. phi = elu + 1, of linear cost.
Source: Fan et al. 2025, "Rectifying Magnitude Neglect in Linear Attention" (ICCV), arXiv 2507.00698, equations 7 to 9.
"""

from torch import Generator, Tensor
from torch.nn.functional import elu

from erpe.config import AttentionConfig, ModelConfig
from erpe.errors import ConfigError
from erpe.model.attention import Attention
from erpe.model.encoding import Shape
from erpe.plugins import register_attention


@register_attention("mala")
class Mala(Attention):
    def __init__(self, config: AttentionConfig, shape: Shape, generator: Generator) -> None:
        super().__init__(config, shape, generator)
        if self.encoding.log_weights() is not None:
            raise ConfigError(f"{config.variant}: MALA knows no weights of pairs; use a rotary encoding instead")

    def features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """phi_q, phi_k (B, H, N, D) and S (B, H, N, 1)."""
        self.check(q, k)
        rotation = self.encoding.rotation(q)
        q, k = self.encoding.turn(q, k) if rotation is None else rotation.align(q, k)
        phi_q, phi_k = (elu(x * self.shape.head_dim**-0.25) + 1 for x in (q, k))
        return phi_q, phi_k, (phi_q * phi_k.sum(-2, keepdim=True)).sum(-1, keepdim=True)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, H, N, D) twice and (B, H, N, Dv) -> (B, H, N, Dv)."""
        phi_q, phi_k, s = self.features(q, k)
        return (1 + 1 / s) * (phi_q @ (phi_k.mT @ v)) - s * v.mean(-2, keepdim=True)

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        """A (B, H, N, N)."""
        phi_q, phi_k, s = self.features(q, k)
        return (1 + 1 / s) * (phi_q @ phi_k.mT) - s / q.shape[2]

    @staticmethod
    def flops(config: ModelConfig, n: int) -> tuple[float, float]:
        """Of the forward pass and of a training step: phi_k^T v, then phi_q times it, all heads."""
        forward = 4 * n * config.head_dim * config.width
        return forward, 3 * forward
