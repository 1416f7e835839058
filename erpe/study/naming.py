"""Which study of the database a command means, and what a new one is called.

newest(database, "a")               # "a", or the one that `--new` made beside it last: "a-3"
beside(database, "a")               # what `--new` makes next: "a-4"
identified(store, "train-a", spec)  # "train-a-4b0c5b": the study of this specification, made or not
"""

from __future__ import annotations

import contextlib
import itertools
import re
from typing import Any

from erpe.store import Store
from erpe.study import storage
from erpe.study.records import STUDY
from erpe.study.spec import StudySpec, differences_from


def newest(database: storage.Database, wanted: str) -> str:
    """The study of a name, or the newest that `--new` made beside it; the name itself if there is none."""
    found = _numbered(database, wanted)
    return found[max(found)] if found else wanted


def beside(database: storage.Database, wanted: str) -> str:
    """A name that is free: the wanted one, or else NAME-2, NAME-3, ... above those that `--new` made before."""
    found, names = _numbered(database, wanted), set(database.names())
    if not found:
        return wanted
    numbers = itertools.count(max(found) + 1)
    return next(name for name in (f"{wanted}-{number}" for number in numbers) if name not in names)


def _numbered(database: storage.Database, wanted: str) -> dict[int, str]:
    """Number -> study; the one of the wanted name is number 1. A study that was named NAME-2 by hand is not in it."""
    found = {}
    for name in database.names():
        numbered = re.fullmatch(re.escape(wanted) + r"-([2-9]|[1-9][0-9]+)", name)
        if name == wanted:
            found[1] = name
        elif numbered and _about(database, name).get("asked") in (wanted, None):  # None: of 0.1.0
            found[int(numbered[1])] = name
    return found


@storage.retry_while_unavailable
def identified(store: Store, stem: str, spec: StudySpec) -> str:
    """The name of a study that is called by its identity: STEM and six digits of it.

    A study is known by what its stored specification means, not by its digits: another version may have given it
    others.
    """
    if storage.exists(storage.parse(store.storage_url)):
        with contextlib.closing(storage.Database(store.storage_url)) as database:
            for name in database.names():
                stored = _about(database, name) if re.fullmatch(re.escape(stem) + "-[0-9a-f]{6}", name) else {}
                if "spec" in stored and not differences_from(stored["spec"], spec):
                    return name
    return f"{stem}-{spec.identity[:6]}"


def _about(database: storage.Database, name: str) -> dict[str, Any]:
    found = database.study_attr(database.backend.get_study_id_from_name(name), STUDY)
    return found if isinstance(found, dict) else {}
