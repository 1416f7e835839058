"""Studies from one Optuna database to another, row by row: with their numbers, states and times, and all at once.

Optuna's own interface can make such trials but not change one that goes on, nor many in one transaction.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import optuna
from optuna.trial import FrozenTrial
from sqlalchemy import Connection, MetaData, Table, delete, insert, select

from erpe.study.records import CONFIG, END, EPOCH, FINAL, REMOVED
from erpe.study.storage import Database, retry_while_unavailable

OF_STUDY = ("study_directions", "study_user_attributes", "study_system_attributes")
OF_TRIAL = (
    "trial_user_attributes", "trial_system_attributes", "trial_params", "trial_values", "trial_intermediate_values",
    "trial_heartbeats",
)  # fmt: skip
"""Optuna's tables with something of a study, and of a trial."""


def continues(new: optuna.Study, old: optuna.Study) -> bool:
    """Whether `new` has all that `old` has of their common beginning, so that it may take its place."""
    known, later = old.get_trials(deepcopy=False), new.get_trials(deepcopy=False)
    finals = {key: value for key, value in old.user_attrs.items() if key.startswith(FINAL)}
    return (
        len(known) <= len(later)
        and finals.items() <= new.user_attrs.items()
        and all(_goes_on(after, before) for after, before in zip(later, known, strict=False))
    )


def _goes_on(new: FrozenTrial, old: FrozenTrial) -> bool:
    if old.state.is_finished():
        return facts(new) == facts(old)
    fixed = {key: old.user_attrs[key] for key in (CONFIG, END) if key in old.user_attrs}
    return (
        old.datetime_start in (None, new.datetime_start)
        and old.params.items() <= new.params.items()
        and old.intermediate_values.items() <= new.intermediate_values.items()
        and fixed.items() <= new.user_attrs.items()
    )


def facts(trial: FrozenTrial) -> tuple[Any, ...]:
    """All there is to a trial, but for where a database keeps it."""
    return (
        trial.number, trial.state, trial.values, trial.params, trial.distributions, trial.user_attrs,
        trial.system_attrs, trial.intermediate_values, trial.datetime_start, trial.datetime_complete,
    )  # fmt: skip


@retry_while_unavailable
def transplant(source: Database, target: Database, names: Sequence[str]) -> None:
    """Put studies in the place of those of their names: all of them, or none when this is killed.

    Raises:
        StoreError: the database does not let us.
    """
    tables = MetaData()
    tables.reflect(target.engine, only=["studies", "trials", *OF_STUDY, *OF_TRIAL])
    with source.engine.connect() as there, target.engine.begin() as here:
        for name in names:
            _Transplant(there, here, tables.tables).move(name)


class _Transplant:
    def __init__(self, there: Connection, here: Connection, tables: Any) -> None:
        self.there, self.here = there, here
        self.studies, self.trials = tables["studies"], tables["trials"]
        self.of_study = [tables[name] for name in OF_STUDY]
        self.of_trial = [tables[name] for name in OF_TRIAL]

    def move(self, name: str) -> None:
        named = select(self.studies.c.study_id).where(self.studies.c.study_name == name)
        old, known = self.there.execute(named).scalar_one(), self.here.scalar(named)
        drivers, removed = 0, set()
        if known is None:
            new = self._insert(self.studies, {"study_name": name})
        else:
            new = known
            drivers = self._read(new, EPOCH, 0) + 1  # an older driver may no longer write
            removed = set(self._read(new, REMOVED, []))  # and what was given up does not return
            self._clear(new)
        for table in self.of_study:
            self._copy(table, "study_id", {old: new})
        own = select(self.trials).where(self.trials.c.study_id == old).order_by(self.trials.c.number)
        places = {
            row["trial_id"]: self._insert(self.trials, _without_key(self.trials, row) | {"study_id": new})
            for row in self.there.execute(own).mappings()
        }
        for table in self.of_trial:
            self._copy(table, "trial_id", places)
        self._write(new, EPOCH, max(drivers, self._read(new, EPOCH, 0)))
        self._write(new, REMOVED, sorted(removed.union(self._read(new, REMOVED, []))))

    def _insert(self, table: Table, row: dict[str, Any]) -> int:
        key = self.here.execute(insert(table).values(row)).inserted_primary_key
        assert key is not None
        return int(key[0])

    def _clear(self, study: int) -> None:
        own = select(self.trials.c.trial_id).where(self.trials.c.study_id == study)
        for table in self.of_trial:
            self.here.execute(delete(table).where(table.c.trial_id.in_(own)))
        for table in (self.trials, *self.of_study):
            self.here.execute(delete(table).where(table.c.study_id == study))

    def _copy(self, table: Table, key: str, places: dict[int, int]) -> None:
        """Copy the rows that belong to the keys of `places`, to those of its values."""
        rows = [
            _without_key(table, row) | {key: places[row[key]]}
            for row in self.there.execute(select(table)).mappings()
            if row[key] in places
        ]
        if rows:
            self.here.execute(insert(table), rows)

    def _read(self, study: int, key: str, otherwise: Any) -> Any:
        """Return an attribute of a study here."""
        table = self.of_study[1]
        found = self.here.scalar(select(table.c.value_json).where(table.c.study_id == study, table.c.key == key))
        return json.loads(found) if found else otherwise

    def _write(self, study: int, key: str, value: Any) -> None:
        table = self.of_study[1]
        if value and value != self._read(study, key, None):
            self.here.execute(delete(table).where(table.c.study_id == study, table.c.key == key))
            self.here.execute(insert(table).values(study_id=study, key=key, value_json=json.dumps(value)))


def _without_key(table: Table, row: Any) -> dict[str, Any]:
    (key,) = table.primary_key.columns.keys()
    return {name: value for name, value in row.items() if name != key}
