"""What the shell offers for <TAB>: variants, data sets, and the studies, trials and figures of a store.

A completion never fails and says nothing: a store that cannot be read offers nothing.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

import typer

from erpe.errors import ErpeError


def variants(context: typer.Context, incomplete: str) -> list[str]:
    """The twelve, and those of the plug-ins on the line, which are read and not run."""
    from erpe.variants import ATTENTIONS, ENCODINGS, product

    found: dict[str, list[str]] = {"attention": [*ATTENTIONS], "encoding": [*ENCODINGS]}
    for file in context.params.get("plugin") or ():
        with contextlib.suppress(OSError, UnicodeDecodeError):
            for kind, name in _REGISTERS.findall(Path(file).read_text(encoding="utf-8")):
                found[kind].append(name)
    return [name for name in product(found["attention"], found["encoding"]) if name.startswith(incomplete)]


_REGISTERS = re.compile(r"""@register_(attention|encoding)\(\s*["']([a-z][a-z0-9]*)["']""")


def plugins(incomplete: str) -> list[str]:
    """Installed plug-ins, and files."""
    from importlib.metadata import entry_points

    from erpe.plugins import GROUP

    return [each.name for each in entry_points(group=GROUP) if each.name.startswith(incomplete)] + _files(incomplete)


def datasets(incomplete: str) -> list[str]:
    """Published data sets, or what lies in a folder."""
    from erpe.datasets import DATASETS

    return [name for name in DATASETS if name.startswith(incomplete)] + (_files(incomplete) if incomplete else [])


def _files(incomplete: str) -> list[str]:
    place, _, begun = incomplete.rpartition("/")
    with contextlib.suppress(OSError):
        return [os.path.join(place, each.name) for each in Path(place or ".").iterdir() if each.name.startswith(begun)]
    return []


def plans(context: typer.Context, incomplete: str) -> list[str]:
    """Study files, and names of studies."""
    return studies(context, incomplete) + _files(incomplete)


def studies(context: typer.Context, incomplete: str) -> list[str]:
    """Names of studies."""
    return sorted({each.partition("/")[0] for each in runs(context, incomplete)})


def runs(context: typer.Context, incomplete: str) -> list[str]:
    """Names of studies, and what is in the one that is begun."""
    from erpe.store import Store
    from erpe.study.naming import trial_name
    from erpe.study.reading import read_studies

    found: list[str] = []
    with contextlib.suppress(ErpeError):
        for part in read_studies(Store.existing(context.params.get("store") or "runs")):
            own = f"{part.experiment}/{part.arm}" if part.arm else part.experiment
            found += [part.experiment, own]
            found += [trial_name(own, part.phase, trial.number) for trial in part.trials]
    deep = incomplete.count("/")
    return [name for name in dict.fromkeys(found) if name.startswith(incomplete) and name.count("/") <= deep + 1]


def figures(incomplete: str) -> list[str]:
    """Figures of the page, and of a search."""
    from erpe.report.charts import CHARTS

    known = [*CHARTS, "history", "importances", "parallel_coordinates", "front"]
    return [name for name in known if name.startswith(incomplete)]
