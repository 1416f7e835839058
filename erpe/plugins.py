"""Plug-ins: files of one's own with attentions and encodings, which then make variants as the built-in ones do.

    load("my_encodings.py")                 # or the name of an entry point of the group `erpe.plugins`
    defaults("relu_alibi", "digits")        # @register_encoding("alibi") stood in it

A file is run because a user named it, never because a store or a server holds one. No torch in here.
"""

from __future__ import annotations

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
from typing import Any, TypeVar

from pydantic import BaseModel

from erpe import variants
from erpe.errors import ConfigError
from erpe.text import reason
from erpe.variants import ATTENTIONS, ENCODINGS, Kind, Registered, Source

Class = TypeVar("Class", bound=type)
Options = TypeVar("Options", bound=BaseModel)

GROUP = "erpe.plugins"
"""Of entry points: `my_plugin = "my_package.encodings"`."""

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
    known = variants.REGISTERED.get((kind, name))
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
        variants.REGISTERED[kind, name] = Registered(kind, name, cls, options, space or {}, _loading[-1])
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
    before = dict(variants.REGISTERED)
    for key in [key for key, found in before.items() if found.source.name == source.name]:
        del variants.REGISTERED[key]
    _loading.append(source)
    try:
        exec(compile(source.text, module.__file__, "exec"), module.__dict__)
        if not any(found.source == source for found in variants.REGISTERED.values()):
            raise ConfigError("registers nothing; use @register_encoding(NAME) on a class")
    except (Exception, SystemExit) as error:
        variants.REGISTERED.clear()
        variants.REGISTERED.update(before)
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


def given_names(chosen: Iterable[str]) -> tuple[str, ...]:
    """Return how a command in the current folder names the plug-ins of some variants that were loaded here."""
    wanted = set(chosen)
    return tuple(_GIVEN[s.name] for s in loaded() if s.name in _GIVEN and wanted & set(variants.own_variants(s)))


def plugin_flags() -> str:
    """Return what a command needs to load the plug-ins of this process, with a blank before each."""
    return "".join(f" --plugin {shlex.quote(_GIVEN[s.name])}" for s in loaded() if s.name in _GIVEN)


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
