"""Which settings the search varies, per data set and variant; and how a file overrides that.

space = load_space("space.toml", "favor_rope", "mnist")       # or default_space(variant, dataset)
"""

from __future__ import annotations

import math
import tomllib
from itertools import product
from pathlib import Path
from typing import Any

from erpe import variants
from erpe.config import TrialConfig, defaults
from erpe.datasets import Dataset, facts_of
from erpe.errors import ConfigError, ErpeError, nearest
from erpe.study.distributions import MOST_VALUES, Axis, Choices, Floats, Ints, Space
from erpe.study.entries import KNOWN, contradictions, dotted, fits, typed
from erpe.variants import split_variant

# Sizes that fit together: every width is divisible by 4 x every number of heads, as rope asks.
_BY_KIND: dict[str, dict[str, Axis]] = {
    "digits": {
        "model.width": Choices(values=(32, 64, 96)),
        "model.depth": Ints(low=2, high=4), "model.heads": Choices(values=(2, 4, 8)),
        "train.batch": Choices(values=(32, 64, 128)), "train.lr": Floats(low=5e-4, high=1e-2, log=True),
    },
    "mnist": {
        "model.width": Choices(values=(32, 64, 96)),
        "model.depth": Ints(low=2, high=6), "model.heads": Choices(values=(2, 4, 8)),
        "train.batch": Choices(values=(64, 128, 256)), "train.lr": Floats(low=3e-4, high=5e-3, log=True),
    },
    "cifar10": {
        "model.width": Choices(values=(96, 192, 288, 384)),
        "model.depth": Ints(low=4, high=9), "model.heads": Choices(values=(3, 6, 12)),
        "train.batch": Choices(values=(64, 128, 256)), "train.lr": Floats(low=1e-4, high=3e-3, log=True),
    },
}  # fmt: skip
_COMMON: dict[str, Axis] = {
    "train.weight_decay": Floats(low=1e-3, high=0.3, log=True),
    "model.dropout": Floats(low=0.0, high=0.2),
    "model.drop_path": Floats(low=0.0, high=0.2),
}
_FEATURES = {"digits": (16, 32, 64), "mnist": (32, 64, 128), "cifar10": (32, 64, 128, 256)}

NO_AXES = "none"
"""Instead of a list of own axes, where an arm has none."""

MOST_TOML = 2**20
"""Bytes of a study or space file."""

RESERVED = {
    "model.variant": "--variant", "data.dataset": "--dataset", "train.epochs": "--epochs", "seed": "--seed",
    "model.image": "--dataset", "model.classes": "--dataset", "model.plugin": "--plugin",
}  # fmt: skip
"""Settings that are no axis, and what sets them instead."""

_SIZES = (
    "model.width", "model.heads", "model.features", "model.relu_projection", "model.rotary_placement",
    "model.circulant_block", "model.position",
)  # fmt: skip
"""Settings that constrain one another."""

_SAME_FOR_ALL = ("data.validation", "data.split_seed", "data.train_limit")
"""Trials are compared on one split: a space may fix these, not vary them."""


def variant_params(variant: str, dataset: str | Dataset) -> dict[str, Axis]:
    """Return the axes only some variants have: features m, placement, projection, normalisation, frequencies.

    Raises:
        ConfigError: unknown variant or data set.
    """
    attention, encoding = split_variant(variant)
    kind = facts_of(dataset).like
    linear, rotary = attention in ("favor", "relu"), encoding in ("circulant", "rope")
    found: dict[str, Axis] = {}
    if attention == "relu":
        found["model.relu_projection"] = Choices(values=("none", "orthogonal"))
    if linear:
        found["model.features"] = Choices(values=_FEATURES[kind])
        found["model.normalize_qk"] = Choices(values=(False, True))
    if linear and rotary:
        found["model.rotary_placement"] = Choices(values=("pre", "post"))
    if encoding == "rope":
        found["model.rope"] = Choices(values=("axial", "mixed"))
    for part in variants.parts_of(attention, encoding):
        found |= {f"model.options.{name}": Choices(values=tuple(values)) for name, values in part.space.items()}
    return found


def own_axes(variant: str, space: Space) -> list[str]:
    """Return what an arm searches beyond the axes that all variants have."""
    dataset = next(iter(_BY_KIND))  # which settings are knobs does not depend on it
    return [
        name for name in variant_params(variant, dataset) if name in space.axes and len(space.axes[name].probes()) > 1
    ]


def default_space(variant: str, dataset: str | Dataset) -> Space:
    """Return the space of a variant on a data set: the same for all variants, plus the variant's own axes."""
    facts = facts_of(dataset)
    patch = {"model.patch": Choices(values=facts.patches)}
    return Space(axes=patch | _BY_KIND[facts.like] | _COMMON | variant_params(variant, facts))


def load_space(path: str | Path, variant: str, dataset: str | Dataset, settings: dict[str, Any] | None = None) -> Space:
    """Return the default space with the entries of a TOML file's `[space]` table laid over it.

    Args:
        settings: what `--set` gives; it may not contradict the file.
    Raises:
        ConfigError: one line naming the file, the key and what is wrong with it.
    """
    table = read_toml(path)
    entries = table.get("space")
    if not isinstance(entries, dict) or set(table) != {"space"}:
        stray = ", ".join(sorted(set(table) - {"space"})) or ("a value of that name" if table else "nothing")
        raise ConfigError(f"{path}: a space file has one table, [space]; found {stray}")
    try:
        entries = dotted(entries)
        if against := contradictions({"--set": settings or {}, "[space]": entries}):
            raise ConfigError(*against)
        space = apply_overrides(entries, variant, dataset)
        check_together(space, defaults(variant, dataset))
    except ErpeError as error:
        raise ConfigError(f"{path}: {error}") from None
    return space


def read_toml(path: str | Path) -> dict[str, Any]:
    """Return a TOML file of at most 1 MiB.

    Raises:
        ConfigError: it cannot be read, or is none.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(MOST_TOML + 1)
        if len(data) > MOST_TOML:
            raise ValueError(f"more than {MOST_TOML} bytes")
        return tomllib.loads(data.decode("utf-8-sig"))
    except OSError as error:
        said: object = error.strerror
    except UnicodeDecodeError as error:
        said = f"not UTF-8 at byte {error.start}"
    except RecursionError:
        said = "nested too deeply"
    except ValueError as error:
        said = error
    raise ConfigError(f"{path}: cannot be read ({said})")


def apply_overrides(entries: dict[str, Any], variant: str, dataset: str | Dataset) -> Space:
    """Return the default space with other ranges for some settings.

        train.lr = {low = 1e-4, high = 1e-2, log = true}        # a range
        model.patch = [2, 4]                                    # a choice
        "model.depth" = 4                                       # fixed; with quotes or without

    A knob that only other variants have is skipped, so that one set of entries serves all twelve.

    Raises:
        ConfigError: one line naming the key and what is wrong with it.
    """
    base = defaults(variant, dataset)
    axes = dict(default_space(variant, dataset).axes)
    elsewhere = {name for other in ("favor", "relu_rope") for name in variant_params(other, dataset)} - set(
        variant_params(variant, dataset)
    )
    mistakes = []
    for name, entry in dotted(entries).items():
        option = name.removeprefix("model.options.")
        if option != name and name not in base.flat() and variants.has_option(option):
            continue
        try:
            axis = _read_axis(name, entry, base)
            _check_values(name, axis, base)
        except ConfigError as error:
            mistakes += [f'space."{name[:100]}": {said}' for said in error.args]
        else:
            if name not in elsewhere:
                axes[name] = axis
    if mistakes:
        raise ConfigError(*mistakes)
    return Space(axes=axes)


def _read_axis(name: str, entry: Any, base: TrialConfig) -> Axis:
    """Return an entry of a space file as an axis; raises ConfigError."""
    if name in RESERVED:
        raise ConfigError(f"not for a space; {RESERVED[name]} sets it")
    if name not in base.flat():
        raise ConfigError(f"unknown setting; {nearest(name, base.flat())}")
    if not isinstance(entry, dict):
        values = entry if isinstance(entry, list) else [entry]
        axis: Axis = Choices(values=tuple(typed(name, value) for value in values))
    elif isinstance(base.flat()[name], int) if name not in KNOWN else not fits(name, 0.5):
        axis = Ints(**entry)
    else:
        axis = Floats(**entry)
    if name in _SAME_FOR_ALL and len(axis.probes()) > 1:
        raise ConfigError("trials are compared on one split; give a single value")
    return axis


def _check_values(name: str, axis: Axis, base: TrialConfig) -> None:
    room, _, setting = name.rpartition(".")
    for value in axis.probes() if name not in _SIZES else ():  # `check_together` looks at sizes
        try:
            base.replace({name: value})
        except ConfigError as error:
            said = str(error).removeprefix(f"{room}: ").removeprefix(f"{room}.").removeprefix(f"{setting}: ")
            raise ConfigError(said) from None


def check_together(space: Space, base: TrialConfig) -> None:
    """Refuse a space that could draw sizes that do not fit together: then every sample is valid.

    Only the sizes of a model constrain one another, so their whole product is tried.

    Raises:
        ConfigError: the first combination that does not fit.
    """
    names = [name for name in _SIZES if name in space.axes]
    if math.prod(len(space.axes[name].probes()) for name in names) > MOST_VALUES:
        raise ConfigError(f"more than {MOST_VALUES} combinations of {', '.join(names)}; use fewer values")
    fixed = {name: axis.probes()[0] for name, axis in space.axes.items() if name not in names}
    for values in product(*(space.axes[name].probes() for name in names)):
        chosen = dict(zip(names, values, strict=True))
        active = {name: chosen[name] for name in names if name in space.active(chosen)}
        try:
            base.replace(fixed | active)
        except ConfigError as error:
            drawn = ", ".join(f"{name} {value}" for name, value in active.items())
            said = str(error).removeprefix("model: ").removeprefix("model.")
            raise ConfigError(f"the space can draw {drawn}: {said}") from None
