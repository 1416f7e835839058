"""The twelve attentions: y = (K(q, k) * C) v, rows divided by their sums.

K is the kernel (softmax, FAVOR+, ReLU), C = exp(bias) the general encoding; rope and circulant turn q and k,
or the features. A new attention or encoding is one class and one line in a dict.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import normalize, scaled_dot_product_attention

from erpe import variants
from erpe.config import AttentionConfig
from erpe.errors import ConfigError, ShapeError
from erpe.model.encoding import Encoding, GeneralRPE, Shape
from erpe.model.features import FavorFeatures, Features, ReluFeatures, full_precision
from erpe.model.kernels import linear_attention, masked_attention
from erpe.model.kernels.gpu import flex
from erpe.model.rotary import CirculantString, Rope

ENCODING = {"none": Encoding, "general": GeneralRPE, "circulant": CirculantString, "rope": Rope}


class Attention(nn.Module):
    """What all share: the encoding, and the check of shapes."""

    def __init__(self, config: AttentionConfig, shape: Shape, generator: Generator) -> None:
        super().__init__()
        self.config = config
        self.shape = shape
        self.encoding: Encoding = class_of("encoding", config)(config, shape, generator)

    def check(self, q: Tensor, k: Tensor, v: Tensor | None = None) -> None:
        """Raise ShapeError unless q and k are (B, H, N, D) and v is (B, H, N, any)."""
        expected = (self.shape.heads, self.shape.tokens, self.shape.head_dim)
        for name, x in (("q", q), ("k", k)):
            if x.ndim != 4 or x.shape[1:] != expected or x.shape[0] != q.shape[0]:
                raise ShapeError(f"{name} is {tuple(x.shape)}, this layer takes (B, {', '.join(map(str, expected))})")
        if v is not None and (v.ndim != 4 or v.shape[:3] != q.shape[:3]):
            raise ShapeError(f"v is {tuple(v.shape)}, this layer takes {(*q.shape[:3], 'any')}")

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, H, N, D) twice and (B, H, N, Dv) -> (B, H, N, Dv)."""
        raise NotImplementedError

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        """Return the dense twin: A (B, H, N, N) with `layer(q, k, v) == A @ v`."""
        raise NotImplementedError


class Softmax(Attention):
    """K(q, k) = exp(q . k / sqrt(D)); the bias is added to the logits."""

    def scaled(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, float]:
        """Rotated q and k (B, H, N, D), and the factor of their products."""
        rotation = self.encoding.rotation(q)
        q, k = self.encoding.turn(q, k) if rotation is None else rotation.align(q, k)
        if self.config.normalize_qk:
            return normalize(q, dim=-1), normalize(k, dim=-1), 1.0
        return q, k, self.shape.head_dim**-0.5

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, H, N, D) twice and (B, H, N, Dv) -> (B, H, N, Dv), by torch's fused kernel.

        On a CPU in float32 at least, under autocast too: there that kernel is slow in half precision.
        """
        self.check(q, k, v)
        if q.device.type != "cpu":
            return self.fused(q, k, v)
        with torch.autocast("cpu", enabled=False):
            return self.fused(*(full_precision(x) for x in (q, k, v))).to(v.dtype)

    def fused(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`forward` in the precision of its inputs."""
        q, k, scale = self.scaled(q, k)
        mask = self.encoding.mask()
        if mask is not None and flex.serves(q):
            return flex.flex(q, k, v, mask, scale)
        bias = self.encoding.log_weights()
        y = scaled_dot_product_attention(q, k, v, None if bias is None else bias.to(q.dtype)[None], scale=scale)
        return y + no_numbers(q, k).to(y.dtype) if q.device.type == "cpu" else y

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        """Return A (B, H, N, N), dense."""
        self.check(q, k)
        q, k, scale = self.scaled(q, k)
        logits = q @ k.mT * scale                                 # (B, H, N, N)
        bias = self.encoding.log_weights()
        return (logits if bias is None else logits + bias).softmax(dim=-1)


class Linear(Attention):
    """K(q, k) = phi(q) . phi(k), never formed without the general encoding: O(N m D).

        y_i = phi_q_i . sum_j phi_k_j v_j / (phi_q_i . sum_j phi_k_j)

    Features and both contractions are in float32 at least, under autocast too: a sum over keys in half precision
    loses small features.
    Source: Choromanski et al. 2021 (Performer), section 3.1.
    """

    FEATURES: type[Features]

    def __init__(self, config: AttentionConfig, shape: Shape, generator: Generator) -> None:
        # Drawn before the encoding: one seed gives every encoding the same features.
        features = self.FEATURES(config, shape.head_dim, generator, shape.device)
        super().__init__(config, shape, generator)
        self.features = features

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, H, N, D) twice and (B, H, N, Dv) -> (B, H, N, Dv)."""
        self.check(q, k, v)
        with torch.autocast(q.device.type, enabled=False):
            return self.attend(q, k, v).to(v.dtype)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, H, N, D) twice and (B, H, N, Dv) -> (B, H, N, Dv), in float32 at least or the precision of the inputs."""
        mask, rotation = self.encoding.mask(), self.encoding.rotation(q)
        if mask is None and self.encoding.log_weights() is not None:  # of a plug-in: any weight of each pair
            return self.dense_weights(*self.phi(full_precision(q), full_precision(k))) @ full_precision(v)
        q, k = self.encoding.turn(q, k) if rotation is None else (q, k)
        q, k, phi = self.features.prepare(q, k)
        if mask is not None:
            return masked_attention(q, k, v, phi, mask, self.config.method, self.config.rank)
        return linear_attention(q, k, v, phi, rotation, self.rotates_features, self.config.method)

    @property
    def rotates_features(self) -> bool:
        """Whether a rotary encoding turns the features, in the numerator alone, instead of q and k."""
        return self.config.rotary_placement == "post" and self.config.encoding in ("rope", "circulant")

    def phi(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Features of q and k, rotated before the map unless placed after: (B, H, N, m) each."""
        rotation = self.encoding.rotation(q)
        q, k = self.encoding.turn(q, k) if rotation is None else (q, k)
        q, k, phi = self.features.prepare(q, k)
        if rotation is not None and not self.rotates_features:
            (q, k), phi = rotation.align(q, k), phi.of(rotation.basis)
        return phi(q, k)

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        """Return A (B, H, N, N), dense.

        With `rotary_placement="post"` some weights are negative and rows do not sum to 1.
        """
        self.check(q, k)
        with torch.autocast(q.device.type, enabled=False):
            return self.dense_weights(*self.phi(full_precision(q), full_precision(k))).to(q.dtype)

    def dense_weights(self, phi_q: Tensor, phi_k: Tensor) -> Tensor:
        """Features (B, H, N, m) -> A (B, H, N, N)."""
        kernel = phi_q @ phi_k.mT                                 # (B, H, N, N)
        log_c = self.encoding.log_weights()
        if log_c is not None:
            kernel = kernel * row_weights(log_c)
        denominator = kernel.sum(dim=-1, keepdim=True)
        if self.rotates_features:
            phi_q, phi_k = self.encoding.rotate(phi_q, phi_k)
            kernel = phi_q @ phi_k.mT
        return kernel / denominator


class Favor(Linear):
    """Performer with FAVOR+ features: an unbiased estimate of the softmax kernel."""

    FEATURES = FavorFeatures


class Relu(Linear):
    """Performer-ReLU."""

    FEATURES = ReluFeatures


ATTENTION = {"softmax": Softmax, "favor": Favor, "relu": Relu}


def class_of(kind: variants.Kind, config: AttentionConfig) -> Any:
    """The class of a variant's attention or encoding: built in, or of the plug-in that the configuration is of.

    Raises:
        ConfigError: that plug-in is not loaded, or its source is another one.
    """
    built_in: dict[str, Any] = ATTENTION if kind == "attention" else ENCODING
    name = config.attention if kind == "attention" else config.encoding
    if name in built_in:
        return built_in[name]
    return variants.find(kind, name, config.variant, config.plugin or "").cls


def no_numbers(q: Tensor, k: Tensor) -> Tensor:
    """NaN (B, H, N, 1) for queries without weights, else zero: torch's fused kernel for CPUs gives zeros for them."""
    q, k = q.detach(), k.detach()
    return (q * 0).sum(-1, keepdim=True) + (k.clamp(-1, 1) * 0).sum((-2, -1), keepdim=True)


def row_weights(log_c: Tensor) -> Tensor:
    """exp of log-weights (H, N, N), each row divided by its largest: a factor of the query, which cancels."""
    return (full_precision(log_c) - full_precision(log_c).amax(dim=-1, keepdim=True).detach()).exp()


def build_attention(
    variant: str,
    *,
    grid: tuple[int, int],
    heads: int,
    head_dim: int,
    cls: bool = False,
    seed: int = 0,
    **options: Any,
) -> Attention:
    """One attention layer.

    Args:
        variant: one of `VARIANTS`.
        grid: (h, w) patches; N = h w tokens, row-major, and one more in front with `cls`.
        heads: H.
        head_dim: D of q and k.
        cls: token 0 is a class token, outside the grid.
        seed: of random features and learned frequencies.
        options: of `AttentionConfig`; one that the variant has no use for changes nothing.
    Raises:
        ConfigError: an unknown variant or option, or a value that does not fit.
    """
    if min(*grid, heads, head_dim) < 1:
        raise ConfigError(f"grid {grid}, heads {heads}, head_dim {head_dim}: each must be at least 1")
    config = AttentionConfig(variant=variant, **options)
    config.check_rotation(head_dim)
    generator = torch.Generator().manual_seed(seed)
    return class_of("attention", config)(config, Shape(grid, heads, head_dim, cls), generator)
