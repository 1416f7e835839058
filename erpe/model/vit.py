"""The Vision Transformer around an attention layer: pre-norm blocks, mean pooling over exactly the patch grid."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Generator, Tensor, nn

from erpe.config import ModelConfig
from erpe.errors import ShapeError
from erpe.model.attention import Attention, Linear, class_of
from erpe.model.encoding import Encoding, Shape
from erpe.model.grid import keep_grid

Size = tuple[int, ...]
"""Of a tensor."""


class ViT(nn.Module):
    """images (B, channels, height, width) -> logits (B, classes).

    Source: Dosovitskiy et al. 2021 (ViT), with mean pooling instead of a class token unless asked otherwise.
    """

    def __init__(self, config: ModelConfig, seed: int, device: str = "cpu") -> None:
        super().__init__()
        self.config = config
        place: Any = {"dtype": torch.float32, "device": device}
        # A generator for each block, and one for the matrices: variants of one seed differ in nothing they share.
        generator = torch.Generator().manual_seed(seed)
        seeds = torch.randint(2**62, (config.depth,), generator=generator, dtype=torch.int64, device="cpu").tolist()
        generators = [torch.Generator().manual_seed(own) for own in seeds]
        channels, patch, width = config.image[0], config.patch, config.width
        self.embed = nn.Linear(channels * patch * patch, width, **place)
        self.cls = nn.Parameter(torch.zeros(1, 1, width, **place)) if config.pooling == "cls" else None
        self.position = absolute_position(config, device)
        if self.position is not None:
            keep_grid(self, config.grid, config.pooling == "cls")
        self.dropout = Drop(config.dropout, math.prod(config.grid) + (config.pooling == "cls"), width)
        rates = torch.linspace(0, config.drop_path, config.depth, dtype=torch.float32, device="cpu").tolist()
        self.blocks = nn.ModuleList(Block(config, *both, device) for both in zip(rates, generators, strict=True))
        self.norm = nn.LayerNorm(width, **place)
        self.head = nn.Linear(width, config.classes, **place)
        if device != "meta":  # there torch would import its compiler, two seconds, to draw nothing
            self.initialise(generator)

    def initialise(self, generator: Generator) -> None:
        """Xavier-uniform matrices, zero biases, N(0, 0.02^2) class token, N(0, 0.5^2) learned positions.

        Positions start at the size of an embedded patch. At 0.02, usual for long training, a model this small stays
        blind to them for long: after 80 steps on MNIST relu_general had 49 % instead of 78 %, softmax likewise.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                nn.init.zeros_(module.bias)
        if self.cls is not None:
            nn.init.normal_(self.cls, std=0.02, generator=generator)
        if isinstance(self.position, nn.Parameter):
            nn.init.normal_(self.position, std=0.5, generator=generator)

    def tokens(self, images: Tensor) -> Tensor:
        """(B, channels, height, width) -> (B, N, C): patches row by row, a class token first if there is one."""
        if images.ndim != 4 or tuple(images.shape[1:]) != self.config.image:
            raise ShapeError(f"images are {tuple(images.shape)}, this model takes (B, *{self.config.image})")
        (h, w), p = self.config.grid, self.config.patch
        patches = images.unflatten(3, (w, p)).unflatten(2, (h, p))                  # (B, c, h, p, w, p)
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)        # (B, h w, c p p)
        # Under autocast too blocks add to tokens in the parameters' precision.
        x = self.embed(patches.to(self.embed.weight.dtype)).to(self.norm.weight.dtype)
        if self.position is not None:
            x = x + self.position
        if self.cls is not None:
            x = torch.cat([self.cls.expand(len(x), -1, -1).to(x.dtype), x], dim=1)
        return self.dropout(x)

    def forward(self, images: Tensor) -> Tensor:
        """(B, channels, height, width) float -> (B, classes) logits."""
        x = self.tokens(images)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.head(x.mean(dim=1) if self.cls is None else x[:, 0])

    @torch.no_grad()
    def attention_maps(self, images: Tensor) -> Tensor:
        """(B, channels, height, width) -> (B, depth, H, N, N): who attends to whom in each block."""
        x, maps = self.tokens(images), []
        for block in self.blocks:
            assert isinstance(block, Block)
            maps.append(block.attention_map(x))
            x = block(x)
        return torch.stack(maps, dim=1)

    def redraw(self, generator: Generator) -> None:
        """Draw new random features in every block."""
        for block in self.blocks:
            if isinstance(block, Block) and isinstance(block.attention, Linear):
                block.attention.features.redraw(generator)

    def decay_groups(self, weight_decay: float) -> list[dict[str, object]]:
        """Parameter groups of AdamW: matrices decay; biases, norms, class token and every position parameter do not."""
        free = {self.cls, self.position}
        for module in self.modules():
            if isinstance(module, Encoding):
                free.update(module.parameters())
        still = [p for p in self.parameters() if p.ndim < 2 or p in free]
        moving = [p for p in self.parameters() if p.ndim >= 2 and p not in free]
        return [{"params": moving, "weight_decay": weight_decay}, {"params": still, "weight_decay": 0.0}]


class Drop(nn.Module):
    """In training some of the numbers are zero, the others grow to keep the mean.

    Args:
        rate: the part that is zero.
        tokens, width: N and C of what comes; 1 and 1 drop all of an image, or nothing: stochastic depth.
    """

    noise: Tensor | None
    """Factors that were drawn before, where several models run as one: (B, N, C), or (B, 1, 1)."""

    def __init__(self, rate: float, tokens: int = 1, width: int = 1) -> None:
        super().__init__()
        self.rate, self.size = rate, (tokens, width)
        self.register_buffer("noise", None, persistent=False)

    def draw(self, batch: int, device: torch.device, generator: Generator | None = None) -> Tensor:
        """Factors for a number of images, (B, N, C), or (B, 1, 1); default: from torch's global generator."""
        drawn = torch.empty(batch, *self.size, dtype=torch.float32, device=device)
        return drawn.bernoulli_(1 - self.rate, generator=generator).div_(1 - self.rate)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        noise = self.noise
        if noise is None:
            if not self.training or not self.rate:
                return x
            noise = self.draw(len(x), x.device)
        return x * noise.to(x.dtype)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); stochastic depth skips each branch on its own."""

    def __init__(self, config: ModelConfig, drop_path: float, generator: Generator, device: str) -> None:
        super().__init__()
        width, hidden = config.width, round(config.width * config.mlp_ratio)
        place: Any = {"dtype": torch.float32, "device": device}
        self.heads = config.heads
        self.norm1 = nn.LayerNorm(width, **place)
        self.qkv = nn.Linear(width, 3 * width, **place)
        shape = Shape(config.grid, config.heads, config.head_dim, config.pooling == "cls", device)
        self.attention: Attention = class_of("attention", config)(config, shape, generator)
        rate, tokens = config.dropout, shape.tokens
        self.out = nn.Sequential(nn.Linear(width, width, **place), Drop(rate, tokens, width), Drop(drop_path))
        self.norm2 = nn.LayerNorm(width, **place)
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden, **place),
            nn.GELU(),
            Drop(rate, tokens, hidden),
            nn.Linear(hidden, width, **place),
            Drop(rate, tokens, width),
            Drop(drop_path),
        )

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (B, N, C) -> q, k, v (B, H, N, D), views of one product."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        y = self.attention(*self.split(x))                        # (B, H, N, D)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))

    def attention_map(self, x: Tensor) -> Tensor:
        """(B, N, C) -> A (B, H, N, N)."""
        q, k, _ = self.split(x)
        return self.attention.weights(q, k)


def absolute_position(config: ModelConfig, device: str) -> nn.Parameter | nn.Buffer | None:
    """(1, h w, C) added to the patch tokens; learned, or the fixed sines of both axes; the class token has none."""
    h, w = config.grid
    if config.position == "none":
        return None
    if config.position == "learned":
        return nn.Parameter(torch.zeros(1, h * w, config.width, dtype=torch.float32, device=device))
    quarter = config.width // 4
    steps, rows, columns = (torch.arange(n, dtype=torch.float32, device=device) for n in (quarter, h, w))
    frequency = torch.exp(-math.log(10_000) * steps / max(1, quarter - 1))
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    angles = [axis.flatten()[:, None] * frequency for axis in (y, x)]               # (h w, C/4) each
    table = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)
    return nn.Buffer(table[None], persistent=False)


def build(config: ModelConfig, seed: int = 0) -> ViT:
    """Return a Vision Transformer with random weights that depend on the configuration and the seed alone.

    It is in float32 and on the CPU, whatever torch's defaults are; `.to` moves it.

    Raises:
        ConfigError: the configuration does not fit together.
    """
    return ViT(config, seed)


def shapes(config: ModelConfig) -> dict[str, Size]:
    """Name -> shape of every tensor of a model's state, without the model: blocks are alike."""
    one = ViT(config.replace({"depth": 1}), seed=0, device="meta").state_dict()
    found = {name: tuple(tensor.shape) for name, tensor in one.items()}
    for name in [name for name in found if name.startswith("blocks.0.")]:
        found |= {name.replace(".0.", f".{block}.", 1): found[name] for block in range(1, config.depth)}
    return found


def parameter_count(config: ModelConfig) -> int:
    """Trainable parameters k of a model, without the model."""
    models = [ViT(config.replace({"depth": depth}), seed=0, device="meta") for depth in (1, 2)]
    one, two = (sum(parameter.numel() for parameter in model.parameters()) for model in models)
    return one + (config.depth - 1) * (two - one)
