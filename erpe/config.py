"""What flows through erpe: frozen, checked, serialisable configurations. No torch in here.

defaults(variant, dataset) -> TrialConfig -> .replace({"train.lr": 1e-3}) -> TrialConfig
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, NonNegativeFloat, PositiveFloat, ValidationInfo, model_validator

from erpe import variants
from erpe.datasets import AnyDataset, Dataset, Size, facts_of
from erpe.errors import ConfigError
from erpe.settings import Config, largest_divisor


def _known_variant(variant: str, info: ValidationInfo) -> str:
    if not (info.data or {}).get("plugin"):  # a stored one is read without its plug-in; to build a model needs it
        variants.split_variant(variant)
    return variant


Variant = Annotated[str, AfterValidator(_known_variant)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Depth = Annotated[int, Field(gt=0, le=1000)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""What scikit-learn and torch both take."""


class AttentionConfig(Config):
    """One of the twelve attentions, or one of a plug-in, with the switches that are axes of the study."""

    plugin: str | None = Field(None, exclude_if=lambda plugin: plugin is None)  # as `rank`
    """Hash of the plug-ins that the variant is of, filled in; default: it is built in."""
    variant: Variant
    """ATTENTION[_ENCODING]; see `VARIANTS`."""
    features: Size | None = None
    """Random features m of favor, and of relu with a projection; default: twice the head size."""
    relu_projection: Literal["none", "orthogonal"] = "none"
    """What Performer-ReLU projects q and k with before the ReLU."""
    rotary_placement: Literal["pre", "post"] = "pre"
    """Rotate q and k before the feature map, or the features in the numerator only (RoFormer eq. 19)."""
    rope: Literal["axial", "mixed"] = "axial"
    """Fixed frequencies, one axis a pair; or learned ones that mix both axes."""
    rope_base: PositiveFloat | None = None
    """Base of the frequencies; default: 100 for axial, 10 for mixed."""
    circulant_init: Literal["rope", "normal"] = "rope"
    """Start circulant-STRING at the frequencies of mixed RoPE, or at N(0, 0.02^2)."""
    circulant_block: Size | None = None
    """Size of the circulant blocks; default: the whole head."""
    normalize_qk: bool = False
    """l2-normalise q and k per head; then no d^(-1/4)."""
    method: Literal["auto", "dense", "fft", "torch"] = "auto"
    """How linear attention is computed, always exactly: `auto`, what is quickest; `torch`, by torch's operators alone;
    `dense` or `fft`, ways of the general encoding. Only `auto` takes the kernels for GPUs."""
    rank: Size | None = Field(None, exclude_if=lambda rank: rank is None)  # written where set: older stores stay theirs
    """Terms of a series instead, on linear attention: linear cost, not exact; default: exact."""
    eps: NonNegativeFloat = 1e-6
    """Added to the features of linear attention; those of FAVOR+ queries need none."""
    options: dict[str, Any] = Field({}, exclude_if=lambda options: not options)
    """Of the plug-ins; those that are not given have their defaults."""

    def __hash__(self) -> int:
        return hash(self.model_dump_json())  # `options` alone has no hash

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, given: Any) -> Any:
        """Fill in the hash and the options of plug-ins, where the loaded ones are those that are meant."""
        if not isinstance(given, dict) or not isinstance(given.get("variant"), str):
            return given
        if not isinstance(given.get("options", {}), dict):
            return given
        attention, _, encoding = given["variant"].partition("_")
        parts = variants.parts_of(attention, encoding or "none")
        own = variants.hash_of(parts)
        if not own or given.get("plugin") not in (None, own):
            return given
        return given | {"plugin": own, "options": variants.checked_options(parts, given.get("options") or {})}

    @property
    def attention(self) -> str:
        """One of `ATTENTIONS`, or of a plug-in's."""
        return self.variant.partition("_")[0]

    @property
    def encoding(self) -> str:
        """One of `ENCODINGS`, or of a plug-in's."""
        return self.variant.partition("_")[2] or "none"

    @property
    def projected(self) -> bool:
        """Whether the feature map has a random projection."""
        return self.attention == "favor" or (self.attention == "relu" and self.relu_projection != "none")

    def feature_count(self, head_dim: int) -> int:
        """Features a head: m of the projection, or the head size where there is none."""
        return (self.features or 2 * head_dim) if self.projected else head_dim

    def rotated_size(self, head_dim: int) -> int:
        """Size of the vectors that a rotary encoding turns: features if placed after the map, else heads."""
        return self.feature_count(head_dim) if self.rotary_placement == "post" else head_dim

    def check_rotation(self, head_dim: int) -> None:
        """Refuse what a rotary encoding cannot rotate.

        Raises:
            ConfigError: names the size that was given and one that fits.
        """
        if self.encoding not in ("rope", "circulant"):
            return
        if self.rotary_placement == "post" and self.attention == "softmax":
            raise ConfigError(f"rotary_placement post rotates features and {self.variant} has none; use pre instead")
        size = self.rotated_size(head_dim)
        what = "features" if self.rotary_placement == "post" else "the head size"
        if self.encoding == "rope" and size % 4:
            raise ConfigError(f"rope needs 4 to divide {what}, got {size}; use {4 * max(1, round(size / 4))} instead")
        block = self.circulant_block or size
        if self.encoding == "circulant" and block > 4096:  # its basis is a matrix of that side
            raise ConfigError(f"circulant needs blocks of at most 4096, got {block}; use circulant_block 64 instead")
        if self.encoding == "circulant" and (block < 3 or size % block):
            fitting = f"circulant_block {size}" if size >= 3 else "4"
            raise ConfigError(
                f"circulant needs blocks of 3 or more that divide {what}, got {block} for {size}; use {fitting} instead"
            )


class ModelConfig(AttentionConfig):
    """A Vision Transformer with one of the twelve attentions."""

    image: tuple[Size, Size, Size]
    """(channels, height, width) in pixels."""
    classes: Annotated[Size, Field(ge=2)]
    """Number of classes."""
    patch: Size = 4
    """Side of a square patch in pixels."""
    width: Size = 64
    """Size of a token, C = heads * head size."""
    depth: Depth = 4
    """Number of blocks."""
    heads: Size = 4
    """Attention heads, H."""
    mlp_ratio: PositiveFloat = 4.0
    """Hidden size of the MLP over the width."""
    dropout: Fraction = 0.0
    """Probability that an activation is dropped after attention, inside the MLP and after the embedding."""
    drop_path: Fraction = 0.0
    """Stochastic depth: probability that the last block is skipped; grows linearly from 0."""
    position: Literal["learned", "sincos2d", "none"] = "learned"
    """Absolute position embedding, the same for every variant; a study may have it as a switch."""
    pooling: Literal["mean", "cls"] = "mean"
    """What the classifier reads: the mean of the patch tokens, or a class token."""

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) patches."""
        return self.image[1] // self.patch, self.image[2] // self.patch

    @property
    def head_dim(self) -> int:
        """Head size D."""
        return self.width // self.heads

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        _, height, width = self.image
        if height % self.patch or width % self.patch:
            fitting = largest_divisor(math.gcd(height, width), self.patch)
            raise ConfigError(f"patch {self.patch} does not divide the {height} x {width} image; use {fitting} instead")
        if self.width % self.heads:
            fitting = largest_divisor(self.width, self.heads)
            raise ConfigError(f"heads {self.heads} does not divide width {self.width}; use {fitting} instead")
        if self.position == "sincos2d" and self.width % 4:
            other = self.width + -self.width % 4
            raise ConfigError(f"position sincos2d needs a width that 4 divides, not {self.width}; use {other} instead")
        if round(self.width * self.mlp_ratio) < 1:
            raise ConfigError(f"mlp_ratio {self.mlp_ratio} leaves the MLP nothing of width {self.width}; use 1 instead")
        self.check_rotation(self.head_dim)
        return self


class DataConfig(Config):
    """Which images, in which split, how they are varied in training."""

    dataset: AnyDataset
    """The name of a published data set, or what is known of own data; see `erpe.datasets`."""
    validation: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    """Part of the training set that is held out, stratified; 0 trains on all of it."""
    split_seed: Seed = 0
    """Seed of that split; the same for every trial of a study."""
    train_limit: Annotated[int, Field(gt=0)] | None = None
    """Train on this many images only, stratified; default: on all."""
    augment: Literal["none", "standard", "rand", "trivial"] = "standard"
    """Standard: shifts (and flips, see below); rand and trivial: RandAugment and TrivialAugment (wide) on top."""
    flips: bool | None = Field(None, exclude_if=lambda flips: flips is None)  # as `rank`
    """Mirror half of the augmented images; default: where the data set allows it. Own data are not flipped."""
    mixup: NonNegativeFloat = 0.0
    """Alpha of mixup; 0 is off."""
    cutmix: NonNegativeFloat = 0.0
    """Alpha of cutmix; 0 is off."""
    erase: Annotated[float, Field(ge=0, le=1)] = Field(0.0, exclude_if=lambda erase: not erase)  # as `rank`
    """Probability that a rectangle of an image is painted over, with the mean colour of the data set; 0 is off."""

    @property
    def facts(self) -> Dataset:
        """What is known of the data set."""
        return facts_of(self.dataset)

    @model_validator(mode="after")
    def _every_class_in_every_part(self) -> Self:
        facts = self.facts
        held = math.ceil(self.validation * facts.train)
        if 0 < held < facts.classes:
            fitting = math.ceil(1000 * facts.classes / facts.train) / 1000
            raise ConfigError(
                f"validation {self.validation} of {facts.train} images is less than one a class; use {fitting} instead"
            )
        least, most = facts.classes, facts.train - held - facts.classes
        if self.train_limit and (self.train_limit < least or most < self.train_limit < most + facts.classes):
            raise ConfigError(
                f"train_limit {self.train_limit}: one image a class must be used and one left out; "
                f"use {least} to {most}, or none, instead"
            )
        return self


class TrainConfig(Config):
    """How a model is trained."""

    epochs: Size = 5
    """Passes over the training images."""
    batch: Size = 128
    """Images a step."""
    lr: PositiveFloat = 1e-3
    """Peak learning rate of AdamW, reached after warm-up."""
    weight_decay: NonNegativeFloat = 0.05
    """Decoupled decay of matrices; never of position parameters, biases and norms."""
    warmup: Fraction = 0.1
    """Part of all steps in which the learning rate rises; after it, a cosine to zero."""
    label_smoothing: Fraction = 0.1
    """Mass spread over all classes."""
    clip_norm: NonNegativeFloat = 1.0
    """Largest norm of the gradient; 0 does not clip."""
    ema: Fraction = 0.0
    """Decay of the averaged weights a step, which are then the model; 0 is off."""
    redraw: Annotated[int, Field(ge=0)] = 0
    """Draw new random features after this number of steps; 0: never. Frozen in evaluation."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of training. Auto: bfloat16 where a GPU or CPU computes in it and it pays; float16 on older GPUs; or float32."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; auto: on GPUs with a compiler, where it pays."""


class TrialConfig(Config):
    """One trial: one configuration and one seed."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig = TrainConfig()
    seed: Seed = 0
    """Decides initial weights, random features, data order, augmentation and dropout."""

    @property
    def overrides(self) -> dict[str, Any]:
        """The settings that differ from the defaults of the variant on the data set: `{"train.lr": 0.01}`.

        Raises:
            ConfigError: it is of a plug-in, whose options have defaults, and that is not loaded, or has changed.
        """
        if self.model.plugin:
            variants.check_source(self.model.variant, self.model.plugin)
        usual = type(self)(**defaults(self.model.variant, self.data.dataset).tree()).flat()
        return {name: value for name, value in self.flat().items() if value != usual[name]}

    @model_validator(mode="after")
    def _model_fits_data(self) -> Self:
        facts = self.data.facts
        if self.model.image != facts.image or self.model.classes != facts.classes:
            raise ConfigError(
                f"{self.data.dataset} has {facts.image} images of {facts.classes} classes, "
                f"the model expects {self.model.image} and {self.model.classes}"
            )
        return self


def defaults(variant: str, dataset: str | Dataset, seed: int = 0) -> TrialConfig:
    """Return the default trial of a variant on a data set; equal for all variants but for the variant.

    Raises:
        ConfigError: unknown variant or data set.
    """
    variants.split_variant(variant)
    facts, usual = facts_of(dataset), facts_of(dataset).usual
    model = ModelConfig(variant=variant, image=facts.image, classes=facts.classes, patch=usual["model.patch"])
    data = DataConfig(dataset=dataset, validation=usual.get("data.validation", 0.1))
    return TrialConfig(model=model, data=data, seed=seed).replace(usual)
