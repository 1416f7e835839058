"""The models that one can name: a variant is an attention and a position encoding, built in or of a plug-in.

VARIANTS                                 # the twelve that are built in
split_variant("relu_general")            # ("relu", "general")

A plug-in adds to `REGISTERED`, see `erpe.plugins`. No torch in here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ValidationError

from erpe.errors import ConfigError, nearest

Kind = Literal["attention", "encoding"]

ATTENTIONS = ("softmax", "favor", "relu")
ENCODINGS = ("none", "general", "circulant", "rope")
"""What is built in."""


def product(attentions: Iterable[str], encodings: Sequence[str]) -> tuple[str, ...]:
    """`("relu",), ("none", "rope")` -> `("relu", "relu_rope")`."""
    return tuple(a if e == "none" else f"{a}_{e}" for a in attentions for e in encodings)


VARIANTS = product(ATTENTIONS, ENCODINGS)
NINE = ("softmax", *product(ATTENTIONS[1:], ENCODINGS))
"""The models of the question; the other three tell what an encoding does for softmax."""


class Source(NamedTuple):
    """A plug-in as text, which can be sent to another process."""

    name: str
    text: str

    @property
    def sha256(self) -> str:
        """Twelve digits, by which configurations name the plug-in that they are of."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:12]


class Registered(NamedTuple):
    """A class that a plug-in registered."""

    kind: Kind
    name: str
    cls: type
    options: type[BaseModel] | None
    space: Mapping[str, Sequence[Any]]
    source: Source


REGISTERED: dict[tuple[Kind, str], Registered] = {}
"""What the plug-ins of this process registered."""


def names(kind: Kind, source: Source | None = None) -> list[str]:
    """Registered names of a kind, or those of one plug-in."""
    return [each.name for each in REGISTERED.values() if each.kind == kind and source in (None, each.source)]


def split_variant(variant: str) -> tuple[str, str]:
    """`"relu_general"` -> `("relu", "general")`; `"softmax"` -> `("softmax", "none")`.

    Raises:
        ConfigError: there is no such variant, built in or of a loaded plug-in.
    """
    attention, _, encoding = variant.partition("_")
    known = attention in (*ATTENTIONS, *names("attention"))
    encodings = (*ENCODINGS, *names("encoding"))
    if variant not in VARIANTS and not (known and (encoding or "none") in encodings and not variant.endswith("_none")):
        raise ConfigError(f"unknown variant {variant!r}; {nearest(variant, (*VARIANTS, *own_variants()))}"
                          " (--plugin FILE loads others)")  # fmt: skip
    return attention, encoding or "none"


def own_variants(source: Source | None = None) -> tuple[str, ...]:
    """Variants of loaded plug-ins, or of one: its attentions with all encodings, its encodings with all attentions."""
    own = {kind: names(kind, source) for kind in ("attention", "encoding")}
    attentions, encodings = (*ATTENTIONS, *names("attention")), (*ENCODINGS, *names("encoding"))
    return tuple(
        a if e == "none" else f"{a}_{e}"
        for a in attentions
        for e in encodings
        if a in own["attention"] or e in own["encoding"]
    )


def find(kind: Kind, name: str, variant: str, plugin: str) -> Registered:
    """Return what is registered under a name, for a configuration; see `check_source`."""
    check_source(variant, plugin)
    return REGISTERED[kind, name]


def parts_of(attention: str, encoding: str) -> list[Registered]:
    """The registered parts of a variant."""
    return [REGISTERED[key] for key in (("attention", attention), ("encoding", encoding)) if key in REGISTERED]


def hash_of(parts: list[Registered]) -> str | None:
    """What a configuration keeps of the sources of its parts."""
    return "+".join(dict.fromkeys(part.source.sha256 for part in parts)) or None


def check_source(variant: str, plugin: str) -> None:
    """Refuse other plug-ins than those that a configuration is of.

    Raises:
        ConfigError: they are not loaded, or their source is another one.
    """
    attention, _, encoding = variant.partition("_")
    own = hash_of(parts_of(attention, encoding or "none"))
    if own is None:
        raise ConfigError(f"{variant} is of a plug-in that is not loaded; use --plugin FILE")
    if own != plugin:
        raise ConfigError(f"{variant}: its plug-in is another one (sha256 {own}, not {plugin}); use that file instead")


def checked_options(parts: list[Registered], given: dict[str, Any]) -> dict[str, Any]:
    """The options of a variant's parts, with their defaults.

    Raises:
        ConfigError: one is unknown, or has a value that does not fit.
    """
    models = [part.options for part in parts if part.options]
    known = {name for model in models for name in model.model_fields}
    if stray := sorted(given.keys() - known):
        raise ConfigError(f"options.{stray[0]}: unknown key; {nearest(stray[0], known) if known else 'there are none'}")
    found: dict[str, Any] = {}
    for model in models:
        try:
            made = model(**{name: value for name, value in given.items() if name in model.model_fields})
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise ConfigError(f"options.{place}: {first['input']!r} given; {first['msg'].lower()}") from None
        found |= made.model_dump(mode="json")
    return found


def has_option(name: str) -> bool:
    """Whether some loaded part has this option."""
    return any(name in part.options.model_fields for part in REGISTERED.values() if part.options)
