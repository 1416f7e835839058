"""What is known of a data set before it is loaded: everything that depends on one asks this class. No torch in here.

facts_of("mnist").image                       # (1, 28, 28)
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt, WithJsonSchema

from erpe.errors import ConfigError, nearest
from erpe.settings import Config

Size = Annotated[int, Field(gt=0, lt=2**16)]

LEAST_TOKENS, MOST_TOKENS, ENOUGH_TOKENS = 4, 4096, 49
"""Of an image in patches: the fewest, the most, and what the default patch leaves where it can."""


class Frame(NamedTuple):
    """How handwritten digits, white on black, lie in their image."""

    box: int
    """Longer side of the ink, in pixels of the image."""
    by_mass: bool
    """Whether the centre of mass lies in the middle, or that of the bounding box."""


class Dataset(Config):
    """A data set: the form of its images, its classes, and what is usual for such images."""

    name: str
    """As tables and studies call it."""
    image: tuple[Size, Size, Size]
    """(channels, height, width) in pixels."""
    names: Annotated[tuple[str, ...], Field(min_length=2)]
    """Of the classes."""
    train: PositiveInt
    """Images of the training set, validation part included."""
    test: PositiveInt
    """Images of the test set."""
    mean: tuple[float, ...]
    """Mean of each channel over the training set, pixels in [0, 1]."""
    std: tuple[PositiveFloat, ...]
    """Standard deviation of each channel."""
    sha256: str | None = None
    """Of pixels and labels of the training set, as `erpe.training.data` computes it; default: its files' MD5."""
    like: Literal["digits", "mnist", "cifar10"]
    """Whose defaults and search space it takes."""
    shift: PositiveInt
    """Largest shift of an augmented image, in pixels."""
    flips: bool = False
    """Whether a mirrored image shows the same; a digit, a house number or a text does not."""
    frame: Frame | None = None
    """How digits lie in the image, for the user's own pictures; default: a picture is only scaled."""
    part: bool = False
    """Whether the test set of own data is a fixed stratified part of the images given, not one given as such."""
    fingerprint: str | None = None
    """SHA-256 of training and test set of own data; None for a published data set, known by its name."""

    def __str__(self) -> str:
        return self.name

    def tree(self, mode: str = "python") -> Any:
        """Return the description itself: it is a value, not a table of settings."""
        return self if mode == "python" else super().tree(mode)

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.names)

    @property
    def key(self) -> str:
        """What a study is known by: the name of a published data set, or the content of own data wherever it lies."""
        return f"sha256:{self.fingerprint}" if self.fingerprint else self.name

    @property
    def patches(self) -> tuple[int, ...]:
        """Sides of patches to choose from, the default first; empty: no patch divides the image."""
        height, width = self.image[1:]
        whole = math.gcd(height, width)
        tokens = {side: height * width // side**2 for side in range(1, whole + 1) if whole % side == 0}
        fit = [side for side, count in tokens.items() if LEAST_TOKENS <= count <= MOST_TOKENS]
        coarse = [side for side in fit if side > 1]
        enough = [side for side in coarse if tokens[side] >= ENOUGH_TOKENS]
        usual = enough[-1:] or coarse[:1] or fit[:1]
        return tuple([*usual, *(side for side in fit if usual and side > usual[0])][:2])

    @property
    def usual(self) -> dict[str, Any]:
        """The settings of a trial that differ from those of other data sets: `{"train.epochs": 5}`."""
        found: dict[str, Any] = {"model.patch": self.patches[0]} | _BY_KIND[self.like]
        if self.fingerprint:  # one image a class in each part, however few there are
            least = math.ceil(1000 * self.classes / self.train) / 1000
            found["data.validation"] = min(0.5, max(found.get("data.validation", 0.1), least))
        return found


_BY_KIND: dict[str, dict[str, Any]] = {
    "digits": {
        "data.validation": 0.15, "data.augment": "none", "train.epochs": 30, "train.batch": 64, "train.lr": 2e-3,
    },
    "mnist": {"train.epochs": 5, "train.batch": 64, "train.lr": 2e-3},
    "cifar10": {"model.width": 192, "model.depth": 6, "model.heads": 6, "train.epochs": 50},
}  # fmt: skip


def kind_of(image: tuple[int, int, int]) -> Literal["digits", "mnist", "cifar10"]:
    """Return the data set whose images are about as large."""
    numbers = math.prod(image)
    return "digits" if numbers <= 256 else "mnist" if numbers <= 1024 else "cifar10"


_DIGITS = tuple("0123456789")
_OBJECTS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_CLOTHES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
_KANA = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")
_HUNDRED = tuple(
    """apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
    caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant
    flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree
    motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate
    poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider
    squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle
    wardrobe whale willow_tree wolf woman worm""".split()
)
_GREY: dict[str, Any] = {"image": (1, 28, 28), "train": 60_000, "test": 10_000, "like": "mnist", "shift": 2}
_COLOUR: dict[str, Any] = {"image": (3, 32, 32), "train": 50_000, "test": 10_000, "like": "cifar10", "shift": 4}

DATASETS = {
    found.name: found
    for found in (
        Dataset(
            name="digits", image=(1, 8, 8), names=_DIGITS, train=1437, test=360, mean=(0.3054,), std=(0.3760,),
            sha256="cf523fcf146ab6c4a2fc65ac83b5a8f7bbca3d816b439954e27c285d3462cf27",
            like="digits", shift=1, frame=Frame(8, False),
        ),
        Dataset(
            name="mnist", names=_DIGITS, mean=(0.1307,), std=(0.3081,), frame=Frame(20, True),
            sha256="d18cfd466eb143ac1097fde604dba9eec4116885869d04cc648b510949f9e88c", **_GREY,
        ),
        Dataset(
            name="cifar10", names=_OBJECTS, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616), flips=True,
            sha256="973ef2abb5897efc795681a4d79a6f5f642fa2bcb1a828f7476017c89db53a57", **_COLOUR,
        ),
        Dataset(name="fashion_mnist", names=_CLOTHES, mean=(0.2860,), std=(0.3530,), flips=True, **_GREY),
        Dataset(name="kmnist", names=_KANA, mean=(0.1918,), std=(0.3483,), **_GREY),
        Dataset(
            name="cifar100", names=_HUNDRED, mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762), flips=True,
            **_COLOUR,
        ),
        Dataset(
            name="svhn", names=_DIGITS, mean=(0.4377, 0.4438, 0.4728), std=(0.1980, 0.2010, 0.1970),
            **_COLOUR | {"train": 73_257, "test": 26_032},
        ),
    )
}  # fmt: skip
"""Those whose files are published, by name. Sources of digits and MNIST's frames: Alpaydin and Kaynak 1998; LeCun et
al. 1998."""


def facts_of(dataset: str | Dataset) -> Dataset:
    """Return what is known of a data set: that of a published one's name, or the description itself.

    Raises:
        ConfigError: no data set has this name.
    """
    if isinstance(dataset, Dataset):
        return dataset
    if dataset not in DATASETS:
        raise ConfigError(f"unknown data set {dataset!r}, and no such folder or .npz; {nearest(dataset, DATASETS)}")
    return DATASETS[dataset]


def read_grid(given: Any) -> tuple[int, int] | None:
    """(height, width) of `"28x40"`, `28`, `[28, 40]`, or nothing of nothing.

    Raises:
        ConfigError: it is none of these, or not positive.
    """
    if given is None:
        return None
    sides = str(given).lower().split("x") if isinstance(given, int | str) else list(given)
    numbers = [int(side) for side in sides if str(side).strip().isdigit()]
    if len(numbers) != len(sides) or not 1 <= len(numbers) <= 2 or not all(0 < side < 2**12 for side in numbers):
        raise ConfigError(f"resize: {given!r} given; use HEIGHTxWIDTH in pixels instead, as 32x32")
    return numbers[0], numbers[-1]


def _known(dataset: str | Dataset) -> str | Dataset:
    facts_of(dataset)
    return dataset


AnyDataset = Annotated[str | Dataset, AfterValidator(_known), WithJsonSchema({"type": "string"})]
"""The name of a published data set, or the description of own data."""
