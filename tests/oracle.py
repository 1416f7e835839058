"""Attention by the book: loops over pairs of tokens and matrix exponentials, numpy, float64. What layers must equal."""

import numpy as np
import torch
from scipy.linalg import block_diag, circulant, expm
from torch import Tensor

from erpe.model import VARIANTS, Attention, build_attention
from erpe.variants import split_variant

# All different: a swapped axis cannot pass. Rope asks 4 to divide D, and m where it rotates features.
B, H, D, DV, M, GRID = 2, 3, 8, 5, 12, (3, 5)

LINEAR = [name for name in VARIANTS if not name.startswith("softmax")]
ROTARY = [name for name in VARIANTS if name.endswith(("rope", "circulant"))]


def random_layer(variant: str, *, grid=GRID, heads=H, head_dim=D, cls=False, seed=0, **options) -> Attention:
    """A float64 layer whose position parameters are random and not small."""
    # FAVOR+ without eps is exactly its formula; ReLU without it divides by zero where all features vanish.
    options = {"features": M, "eps": 1e-3 if variant.startswith("relu") else 0.0} | options
    layer = build_attention(variant, grid=grid, heads=heads, head_dim=head_dim, cls=cls, seed=seed, **options).double()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in layer.encoding.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2)
    return layer


def inputs(layer: Attention, batch=B, seed=2, v_dim=DV) -> tuple[Tensor, Tensor, Tensor]:
    """q, k (B, H, N, D) and v (B, H, N, Dv), N(0, 1) in float64."""
    generator = torch.Generator().manual_seed(seed)
    heads, head_dim = layer.shape.heads, layer.shape.head_dim
    q, k, v = (
        torch.randn(batch, heads, layer.shape.tokens, size, generator=generator, dtype=torch.float64)
        for size in (head_dim, head_dim, v_dim)
    )
    return q, k, v


def positions(layer: Attention) -> list[tuple[int, int] | None]:
    """(y, x) of each token, row by row; None for the class token."""
    h, w = layer.shape.grid
    patches = [(y, x) for y in range(h) for x in range(w)]
    return [None, *patches] if layer.shape.cls else patches


def generators(layer: Attention, head: int) -> tuple[np.ndarray, np.ndarray]:
    """L_y and L_x with R(r) = exp(y L_y + x L_x)."""
    encoding = split_variant(layer.config.variant)[1]
    if encoding == "rope":
        frequencies = layer.encoding.frequencies.detach().double().numpy()[:, head]
        return tuple(block_diag(*[f * np.array([[0.0, -1.0], [1.0, 0.0]]) for f in axis]) for axis in frequencies)
    coefficients = layer.encoding.coefficients.detach().double().numpy()[:, head]
    block = layer.config.circulant_block or coefficients.shape[-1]
    return tuple(block_diag(*[circulant(c) - circulant(c).T for c in axis.reshape(-1, block)]) for axis in coefficients)


def rotations(layer: Attention) -> np.ndarray:
    """R(r) of each head and token, (H, N, size, size); the class token is not rotated."""
    turned = []
    for head in range(layer.shape.heads):
        along_y, along_x = generators(layer, head)
        turned.append([expm(r[0] * along_y + r[1] * along_x) if r else np.eye(len(along_y)) for r in positions(layer)])
    return np.array(turned)


def log_weight(layer: Attention, head: int, query: tuple[int, int] | None, key: tuple[int, int] | None) -> float:
    """The general encoding's scalar of one pair of tokens."""
    if query is None or key is None:
        row = 2 if query is key else 1 if query is None else 0
        return layer.encoding.cls_bias[row, head].item()
    h, w = layer.shape.grid
    return layer.encoding.bias[head, key[0] - query[0] + h - 1, key[1] - query[1] + w - 1].item()


def feature_map(layer: Attention, x: np.ndarray) -> np.ndarray:
    """phi of one vector."""
    config, size = layer.config, len(x)
    x = x / np.linalg.norm(x) if config.normalize_qk else x
    if config.attention == "favor":
        x = x if config.normalize_qk else x / size**0.25
        projection = layer.features.projection.double().numpy()
        return np.exp(projection @ x - x @ x / 2) / np.sqrt(len(projection))
    if config.relu_projection == "orthogonal":
        projection = layer.features.projection.double().numpy()
        x = projection @ x / np.sqrt(len(projection))
    return np.maximum(x, 0) + config.eps


def softmax_kernel(layer: Attention, x: np.ndarray, y: np.ndarray) -> float:
    """exp of the scaled product, or of the cosine."""
    if layer.config.normalize_qk:
        return np.exp(x @ y / np.linalg.norm(x) / np.linalg.norm(y))
    return np.exp(x @ y / np.sqrt(len(x)))


def explicit_weights(layer: Attention, q: Tensor, k: Tensor) -> np.ndarray:
    """A (B, H, N, N), pair by pair."""
    attention, encoding = split_variant(layer.config.variant)
    rotary = encoding in ("rope", "circulant")
    post = rotary and layer.config.rotary_placement == "post"
    places = positions(layer)
    R = rotations(layer) if rotary else None
    A = np.empty((*q.shape[:3], len(places)))
    for b, h in np.ndindex(*q.shape[:2]):
        x, y = q[b, h].numpy(), k[b, h].numpy()
        if rotary and not post:
            x, y = ([R[h, i] @ row for i, row in enumerate(rows)] for rows in (x, y))
        if attention != "softmax":
            x, y = ([feature_map(layer, row) for row in rows] for rows in (x, y))
        for i, query in enumerate(places):
            above, below = np.empty(len(places)), 0.0
            for j, key in enumerate(places):
                kernel = softmax_kernel(layer, x[i], y[j]) if attention == "softmax" else x[i] @ y[j]
                mask = np.exp(log_weight(layer, h, query, key)) if encoding == "general" else 1.0
                below += kernel * mask
                above[j] = (R[h, i] @ x[i]) @ (R[h, j] @ y[j]) if post else kernel * mask
            A[b, h, i] = above / below
    return A
