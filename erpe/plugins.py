"""Plug-ins: files of one's own with attentions and encodings, which then make variants as the built-in ones do.

    load("my_encodings.py")                 # or the name of an entry point of the group `erpe.plugins`
    defaults("relu_alibi", "digits")        # @register_encoding("alibi") stood in it

A file is run because a user named it, never because a store or a server holds one. No torch in here.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ValidationError

from erpe.errors import ConfigError, nearest
from erpe.text import reason

Kind = Literal["attention", "encoding"]
Class = TypeVar("Class", bound=type)
Options = TypeVar("Options", bound=BaseModel)

ATTENTIONS = ("softmax", "favor", "relu")
ENCODINGS = ("none", "general", "circulant", "rope")
"""What is built in."""


def product(attentions: Iterable[str], encodings: Sequence[str]) -> tuple[str, ...]:
    """`("relu",), ("none", "rope")` -> `("relu", "relu_rope")`."""
    return tuple(a if e == "none" else f"{a}_{e}" for a in attentions for e in encodings)


VARIANTS = product(ATTENTIONS, ENCODINGS)
NINE = ("softmax", *product(ATTENTIONS[1:], ENCODINGS))
"""The models of the question; the other three tell what an encoding does for softmax."""

GROUP = "erpe.plugins"
"""Of entry points: `my_plugin = "my_package.encodings"`."""


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


_REGISTERED: dict[tuple[Kind, str], Registered] = {}
_LOADED: dict[str, Source] = {}
_GIVEN: dict[str, str] = {}
"""Name of a plug-in -> how a command names it that is given in the current folder."""

_loading: list[Source] = []
"""What is being run; its decorators belong to the last one."""


def register_encoding(
    name: str, *, options: type[BaseModel] | None = None, space: Mapping[str, Sequence[Any]] | None = None
) -> Callable[[Class], Class]:
    """Register a position encoding: a subclass of `erpe.model.encoding.Encoding` with `rotate` or `log_weights`.

    Args:
        name: of lower-case letters and digits; `relu_NAME` is a variant then.
        options: its settings, each with a default; in files `model.options.NAME`.
        space: what a search varies, option -> values.
    Raises:
        ConfigError: the name is taken, or is none.
    """
    return _register("encoding", name, options, space)


def register_attention(
    name: str, *, options: type[BaseModel] | None = None, space: Mapping[str, Sequence[Any]] | None = None
) -> Callable[[Class], Class]:
    """Register an attention: a subclass of `erpe.model.attention.Attention` with `forward` and `weights`.

    It may declare its FLOPs without encoding: a static method `flops(config, n)` that gives those of the forward pass
    and of a training step, all heads. Otherwise torch counts them. The arguments are those of `register_encoding`.
    """
    return _register("attention", name, options, space)


def _register(
    kind: Kind, name: str, options: type[BaseModel] | None, space: Mapping[str, Sequence[Any]] | None
) -> Callable[[Class], Class]:
    if not re.fullmatch(r"[a-z][a-z0-9]*", name):
        raise ConfigError(f"{kind} {name!r} given; use lower-case letters and digits instead")
    known = _REGISTERED.get((kind, name))
    if name in (*ATTENTIONS, *ENCODINGS) or (known and _loading):
        where = f" in plug-in {known.source.name}.py" if known else ""
        raise ConfigError(f"{kind} {name!r} is there already{where}; use another name")
    fields = options.model_fields if options else {}
    if bare := [option for option, field in fields.items() if field.is_required()]:
        raise ConfigError(f"{kind} {name!r}: option {bare[0]!r} has no default; give it one")
    if stray := (space or {}).keys() - fields:
        raise ConfigError(f"{kind} {name!r}: space of {min(stray)!r}, which is no option of it")

    def register(cls: Class) -> Class:
        if not _loading:
            raise ConfigError(f"{kind} {name!r} is registered by an import; use --plugin FILE instead")
        if f"erpe.model.{kind}.{kind.title()}" not in (f"{base.__module__}.{base.__name__}" for base in cls.__mro__):
            raise ConfigError(f"{kind} {name!r} is no erpe.model.{kind}.{kind.title()}; use it as the base")
        _REGISTERED[kind, name] = Registered(kind, name, cls, options, space or {}, _loading[-1])
        return cls

    return register


def load(given: str | Path, base: Path | None = None) -> Source:
    """Run a plug-in, and remember it.

    Args:
        given: a Python file, or the name of an entry point of the group `erpe.plugins`.
        base: the folder that a relative path starts from; default: the current one.
    Raises:
        ConfigError: there is none, or it raises; the line says where.
    """
    path = (base or Path()) / Path(given).expanduser()
    name, words = path.stem, str(path)
    points = {point.name: point for point in entry_points(group=GROUP)}
    try:
        if point := points.get(str(given)):
            name = words = str(given)
            spec = find_spec(point.module)
            path = Path(spec.origin) if spec and spec.origin else path
        text = path.read_text(encoding="utf-8")
    except Exception as error:  # of the system, or of the package that an installed one lies in
        raise ConfigError(
            f"plug-in {given}: cannot be read ({reason(error)}); use a Python file or an installed one"
        ) from None
    there = _GIVEN.get(name, words)
    if os.path.abspath(there) != os.path.abspath(words) and _LOADED.get(name, Source(name, text)).text != text:
        raise ConfigError(f"plug-in {words}: another one, {there}, has its name; rename one of them")
    source = load_source(Source(name, text), str(path))
    _GIVEN[name] = words
    return source


def load_source(source: Source, path: str = "") -> Source:
    """Run the text of a plug-in, unless it is what was run before under its name.

    Raises:
        ConfigError: it raises, or registers nothing.
    """
    if _LOADED.get(source.name) == source:
        return source
    module = ModuleType(f"erpe_plugin_{source.name}")
    module.__file__ = path or f"{source.name}.py"
    sys.modules[module.__name__] = module  # pydantic looks up annotations there
    before = dict(_REGISTERED)
    for key in [key for key, found in before.items() if found.source.name == source.name]:
        del _REGISTERED[key]
    _loading.append(source)
    try:
        exec(compile(source.text, module.__file__, "exec"), module.__dict__)
        if not any(found.source == source for found in _REGISTERED.values()):
            raise ConfigError("registers nothing; use @register_encoding(NAME) on a class")
    except (Exception, SystemExit) as error:
        _REGISTERED.clear()
        _REGISTERED.update(before)
        frame = error.__traceback__
        lines = [line for line in _lines(frame) if line[0] == module.__file__]
        place = f"line {lines[-1][1]}: " if lines else ""
        kind = "" if isinstance(error, ConfigError) else f"{type(error).__name__}: "
        raise ConfigError(f"plug-in {module.__file__}: {place}{kind}{error}") from error
    finally:
        _loading.pop()
    _LOADED[source.name] = source
    return source


def _lines(trace: Any) -> Iterator[tuple[str, int]]:
    while trace is not None:
        yield inspect.getfile(trace), trace.tb_lineno
        trace = trace.tb_next


def loaded() -> tuple[Source, ...]:
    """What was loaded in this process."""
    return tuple(_LOADED.values())


def given_names(variants: Iterable[str]) -> tuple[str, ...]:
    """Return how a command in the current folder names the plug-ins of some variants that were loaded here."""
    wanted = set(variants)
    return tuple(_GIVEN[s.name] for s in loaded() if s.name in _GIVEN and wanted & set(own_variants(s)))


def plugin_flags() -> str:
    """Return what a command needs to load the plug-ins of this process, with a blank before each."""
    return "".join(f" --plugin {shlex.quote(_GIVEN[s.name])}" for s in loaded() if s.name in _GIVEN)


def names(kind: Kind, source: Source | None = None) -> list[str]:
    """Registered names of a kind, or those of one plug-in."""
    return [each.name for each in _REGISTERED.values() if each.kind == kind and source in (None, each.source)]


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
    """The variants that loaded plug-ins add, or one of them: their attentions with all encodings, their encodings with
    all attentions.
    """
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
    return _REGISTERED[kind, name]


def parts_of(attention: str, encoding: str) -> list[Registered]:
    """The registered parts of a variant."""
    return [_REGISTERED[key] for key in (("attention", attention), ("encoding", encoding)) if key in _REGISTERED]


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
    return any(name in part.options.model_fields for part in _REGISTERED.values() if part.options)


def options_of(config: Any, model: type[Options]) -> Options:
    """The options of one part, from the configuration that its class is given."""
    return model(**{name: value for name, value in config.options.items() if name in model.model_fields})


class WithPlugins:
    """A function that brings its plug-ins along: in another process they are loaded before anything asks for them."""

    def __init__(self, sources: tuple[Source, ...], function: Callable[..., Any]) -> None:
        self.sources, self.function = sources, function

    def __call__(self, *args: Any, **more: Any) -> Any:
        return self.function(*args, **more)

    def __reduce__(self) -> Any:
        return _arrived, (self.sources, self.function)


def _arrived(sources: tuple[Source, ...], function: Callable[..., Any]) -> WithPlugins:
    for source in sources:
        load_source(source)
    return WithPlugins(sources, function)


def stored_text(plugin: str) -> str:
    """The sources that a configuration is of, to be kept beside its model for people to read."""
    wanted = plugin.split("+")
    return "\n".join(f"# {s.name}.py, sha256 {s.sha256}\n{s.text}" for s in loaded() if s.sha256 in wanted)
