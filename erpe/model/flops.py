"""FLOPs in closed form: what the field counts, and the oracle of the tools that count.

Counted are matrix products (multiply and add are two) and FFTs (2.5 L log2 L for a real one of length L), for a
batch of one image. Work on single entries (norms, activations, exponentials, divisions, rotations of planes, the
mask times the scores) is not, as usual: `tests/counters.py` lists those operators by name.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from erpe.config import ModelConfig
from erpe.model.attention import class_of
from erpe.model.encoding import Shape
from erpe.model.kernels import exact_method
from erpe.model.kernels.low_rank import terms_used
from erpe.model.kernels.tiles import product_flops


class Cost(NamedTuple):
    """FLOPs of a part of the model."""

    forward: float
    train: float
    """Forward and backward together: three times forward where both operands learn, twice where one does."""

    def __add__(self, other: object) -> Cost:
        assert isinstance(other, Cost)
        return Cost(self.forward + other.forward, self.train + other.train)


def both(flops: float) -> Cost:
    """Return the cost of a product of two operands that need gradients."""
    return Cost(flops, 3 * flops)


def one(flops: float) -> Cost:
    """Return the cost of a product with a constant, or with the images: one operand needs a gradient."""
    return Cost(flops, 2 * flops)


NOTHING = Cost(0, 0)


def forward_flops(config: ModelConfig) -> int:
    """FLOPs of the forward pass of one image."""
    return round(model_cost(config).forward)


def train_step_flops(config: ModelConfig) -> int:
    """FLOPs of forward and backward of one image; the optimiser is not in it."""
    return round(model_cost(config).train)


def model_cost(config: ModelConfig) -> Cost:
    """Return the cost of the whole Vision Transformer, for one image."""
    (h, w), width = config.grid, config.width
    tokens = h * w + (config.pooling == "cls")
    hidden = round(width * config.mlp_ratio)
    embed = one(2 * h * w * config.image[0] * config.patch**2 * width)
    linear = both(2 * tokens * width * (4 * width + 2 * hidden))          # q, k, v and out; two layers of the MLP
    block = linear + attention_cost(config, tokens)
    head = both(2 * width * config.classes)
    return embed + Cost(*(config.depth * flops for flops in block)) + head


def attention_cost(config: ModelConfig, n: int) -> Cost:
    """All heads of one attention layer over `n` tokens.

    Per head, D the head size, m the features:

        softmax         4 N^2 D                   q k^T, then times v
        linear          4 N m D                   phi_k^T v, then phi_q times it
        with general    2 N^2 m + 2 N^2 D         dense; or 2 m (D + 1) FFTs of 4 N and 2 N m (D + 1);
                                                  or 4 N R m D + 2 (2h-1) (2w-1) R with a series of R terms
        projection      4 N D m                   of q and of k
        circulant       8 N S^2                   S rotated channels into the Fourier basis and back;
                                                  softmax and projections need no way back: 4 N S^2, and for
                                                  the latter 2 S^2 m for all heads: the basis in them
    """
    if config.plugin:
        return plugin_cost(config, n)
    d, m, heads = config.head_dim, config.feature_count(config.head_dim), config.heads
    core = both(4 * n * n * d) if config.attention == "softmax" else both(4 * n * m * d)
    if config.attention != "softmax" and config.encoding == "general":
        core = general_cost(config, n, m, d)
    projection = one(4 * n * d * m) if config.projected else NOTHING
    circulant = NOTHING
    if config.encoding == "circulant":
        size = config.rotated_size(d)
        folded = config.projected and config.rotary_placement == "pre"
        ways = 1 if config.attention == "softmax" or folded else 2
        circulant = one(4 * ways * n * size**2)
        core += Cost(*[folded * 2 * size**2 * m / heads] * 2)            # once for all heads, without a gradient
    return Cost(*(heads * flops for flops in core + projection + circulant))


def is_counted(config: ModelConfig) -> bool:
    """Whether torch's counter says what the attention costs: it is of a plug-in that declares no FLOPs for it."""
    if not config.plugin:
        return False
    return config.encoding != "none" or not hasattr(class_of("attention", config), "flops")


def plugin_cost(config: ModelConfig, n: int) -> Cost:
    """What a plug-in's attention declares, or torch's FlopCounterMode counts; all heads, `n` tokens."""
    if not is_counted(config):
        return Cost(*class_of("attention", config).flops(config, n))
    return counted_cost(config)


def counted_cost(config: ModelConfig) -> Cost:
    """FLOPs of an attention layer, one image, by torch's FlopCounterMode; FFTs are not in it."""
    return _counted(config.replace({"depth": 1}).model_dump_json())


@lru_cache(maxsize=1000)
def _counted(text: str) -> Cost:
    config = ModelConfig.model_validate_json(text)
    shape = Shape(config.grid, config.heads, config.head_dim, config.pooling == "cls")
    layer = class_of("attention", config)(config, shape, torch.Generator().manual_seed(0))
    size = (1, shape.heads, shape.tokens, shape.head_dim)
    q, k, v = (torch.ones(size, dtype=torch.float32, device="cpu", requires_grad=True) for _ in range(3))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        y = layer(q, k, v)
        forward = counter.get_total_flops()
        y.sum().backward()
    return Cost(forward, counter.get_total_flops())


def general_cost(config: ModelConfig, n: int, m: int, d: int) -> Cost:
    """Return the cost of the masked product of linear attention, by the method that the layer takes."""
    method = exact_method(config.method, n, m, d)
    h, w = config.grid
    if config.rank or method == "dense":
        patches = Cost(*product_flops(h * w, m, d))
        if config.rank:
            terms = terms_used(config.rank, config.grid)
            patches = both(4 * h * w * terms * m * d) + one(2 * (2 * h - 1) * (2 * w - 1) * terms)
        # The class token as a key of every patch, and as a query.
        return patches if n == h * w else patches + both(2 * h * w * m) + both(2 * n * (m + d))
    length = 4 * h * w
    transform = 2.5 * length * math.log2(length)
    channels = m * (d + 1)
    # Backward, the inverse transform of a channel is a real one, its transform a complex one of twice the work.
    transforms = Cost((2 * channels + 1) * transform, (5 * channels + 3) * transform)
    return both(2 * n * channels) + transforms
