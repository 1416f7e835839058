"""The twelve Vision Transformers, in pure torch: one formula, two seams.

    model = build(ModelConfig(variant="relu_general", image=(1, 28, 28), classes=10))
    layer = build_attention("favor_general", grid=(7, 7), heads=4, head_dim=16)
"""

from erpe.model.attention import Attention, build_attention
from erpe.model.vit import ViT, build
from erpe.variants import VARIANTS

__all__ = ["VARIANTS", "Attention", "ViT", "build", "build_attention"]
