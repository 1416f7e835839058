"""From a store to outcomes: what the Optuna database and the trials' folders hold of studies.

    outcomes = load(Store.open("runs"), ["mnist-nine"])

`erpe.report.sources.mlflow` gives the same from a tracking server.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC
from pathlib import Path
from typing import Any

from erpe import __version__
from erpe.datasets import Dataset
from erpe.errors import ConfigError, StoreError
from erpe.io import read_json
from erpe.report.outcomes import GIVEN, Outcomes, Rows, describe
from erpe.store import Store
from erpe.study.objectives import Goals
from erpe.study.openings import openings
from erpe.study.plan import Plan
from erpe.study.plan_file import stored_plan, toml_lines
from erpe.study.reading import read_studies
from erpe.study.records import StudyRecord, TrialRecord, arm_of, grouped
from erpe.study.search_space import NO_AXES, own_axes
from erpe.study.spec import CONTRACT, StudySpec
from erpe.variants import split_variant


def load(store: Store, studies: Sequence[str] = ()) -> Outcomes:
    """Return the studies of these names; default: all that `erpe study run` made.

    Raises:
        StudyError: there is none of a name.
        StoreError: the database cannot be read.
    """
    records = read_studies(store)
    names = list(dict.fromkeys(studies)) or [plan["name"] for plan, _ in grouped(records)]
    rows = Rows()
    for name in names:
        for plan, members in grouped(records, name):
            try:
                _read_study(rows, stored_plan(plan), members, store)
            except ConfigError as error:
                if name in studies or len(names) == 1:
                    raise
                rows.notes.append(str(error))
    return rows.outcomes()


def _read_study(rows: Rows, plan: Plan, members: list[StudyRecord], store: Store) -> None:
    for arm in plan.arms():
        search, confirm = arm_of(members, arm.name)
        attention, encoding = split_variant(arm.variant)
        who = {"study": plan.name, "arm": arm.name, "variant": arm.variant}
        what = {"dataset": str(plan.dataset), "attention": attention, "encoding": encoding}
        done = [trial for trial in confirm.trials if trial.state == "COMPLETE"] if confirm else []
        opened = openings([member for member in members if member.arm == arm.name], [arm.name])
        axes = own_axes(arm.variant, plan.search_spec(arm).space)
        rows.tables["arms"].append(
            who | what | {"budget": plan.search.budget, "trials_planned": plan.search.trials}
            | {"trials": sum(t.state != "RUNNING" for t in search.trials) if search else 0}
            | {"seeds_planned": plan.confirm.seeds, "seeds": len(done), "finished": len(done) >= plan.confirm.seeds}
            | {"openings": opened.total, "abandoned": opened.abandoned, "own_axes": ", ".join(axes) or NO_AXES}
            | Goals.of(plan.search).tags
        )  # fmt: skip
        if search and search.trials and (model := search.trials[0].config.model).plugin:
            from erpe.model.flops import is_counted  # brings torch

            counted = ["; FLOPs of its attention are counted by torch, not in closed form"] * is_counted(model)
            rows.notes.append(f"{plan.name}: {arm.name} is of a plug-in{''.join(counted)}")
        for trial in search.trials if search else []:
            rows.tables["trials"].append(who | trial_row(trial, Goals.of(plan.search)))
            rows.tables["epochs"] += [who | row for row in _epochs(trial, search)] if search else []
        for trial in done:
            assert confirm is not None
            folder = store.trial_folder(confirm.name, trial.number, trial.config.seed)
            rows.add_run(who | what | _run_row(trial, confirm, folder))
            rows.tables["epochs"] += [who | row for row in _epochs(trial, confirm)]
            rows.add_folder(trial.uid, str(plan.dataset), folder)
        made = next((member.part_of.made_with for member in members if member.part_of), {})
        rows.found.made_with[plan.name] = describe(made | {"device": _devices(rows, plan)})
    if isinstance(plan.dataset, Dataset):
        rows.found.datasets[plan.dataset.name] = plan.dataset
    rows.found.margins[plan.name] = plan.compare.margin
    ended = [trial.ended for member in members for trial in member.trials if trial.ended]
    if ended:
        rows.found.dates[plan.name] = max(ended).astimezone(UTC).date().isoformat()
    if not isinstance(plan.dataset, Dataset):  # the place of own images is no fact of a study
        rows.found.files[plan.name] = "\n".join(toml_lines(plan.model_dump(mode="json", exclude_defaults=True))) + "\n"
    rows.notes.append(f"{plan.name}: {openings(members, [arm.name for arm in plan.arms()]).told()}")


def load_tuned(study: StudyRecord, store: Store) -> Outcomes:
    """Return a study of `erpe tune`: one arm, called as its variant, and no confirmed run.

    Its trials have the measures of their end, and the best one those of the test split.
    """
    rows, spec = Rows(), StudySpec(**study.about.spec)
    attention, encoding = split_variant(spec.variant)
    who = {"study": study.name, "arm": spec.variant, "variant": spec.variant}
    over = study.best is not None and study.best.number in study.finals
    rows.tables["arms"].append(
        who | {"dataset": spec.dataset, "attention": attention, "encoding": encoding, "budget": "trials"}
        | {"trials_planned": len(study.trials), "trials": sum(trial.state != "RUNNING" for trial in study.trials)}
        | {"seeds_planned": 0, "seeds": 0, "finished": over, "openings": len(study.opened), "abandoned": 0}
        | {"own_axes": ", ".join(own_axes(spec.variant, spec.space)) or NO_AXES} | spec.goals.tags
    )  # fmt: skip
    for trial in study.trials:
        measures = (trial.verdict.metrics if trial.verdict else {}) | study.finals.get(trial.number, {})
        rows.tables["trials"].append(who | trial_row(trial, spec.goals) | measures)
        rows.tables["epochs"] += [who | row for row in _epochs(trial, study)]
    return rows.outcomes()


def _devices(rows: Rows, plan: Plan) -> str:
    return ", ".join(sorted({row["device"] for row in rows.tables["runs"] if row["study"] == plan.name}))


def trial_row(trial: TrialRecord, goals: Goals) -> dict[str, Any]:
    """Return a trial of a search, with its settings, and its objectives where there are several."""
    seconds = (trial.ended - trial.started).total_seconds() if trial.started and trial.ended else None
    own = {"number": trial.number, "uid": trial.uid, "seed": trial.config.seed, "state": trial.state}
    value = None if goals.over(goals.spent(trial)) else trial.value
    sought = goals.values(trial) if goals.several else {}
    flat = trial.config.flat().items()
    settings = {name: value for name, value in flat if name.startswith(("model.", "train.")) and name not in GIVEN}
    return own | {"value": value, "epochs": len(trial.epochs), "seconds": seconds} | sought | settings


def _run_row(trial: TrialRecord, study: StudyRecord, folder: Path) -> dict[str, Any]:
    """Return a confirmed run: times were taken later, when nothing else ran."""
    assert trial.verdict is not None
    made = study.part_of.made_with if study.part_of else {}
    contract = study.about.spec.get("contract")
    version = made.get("version.erpe", __version__) if contract == CONTRACT else f"with contract {contract}"
    try:
        device = read_json(folder / "outcome.json")["device"]
    except (StoreError, KeyError, TypeError):
        device = "unknown"
    who = {"seed": trial.config.seed, "uid": trial.uid, "version": version, "device": device}
    return who | trial.verdict.metrics | study.finals.get(trial.number, {})


def _epochs(trial: TrialRecord, study: StudyRecord) -> list[dict[str, Any]]:
    who = {"phase": study.phase, "uid": trial.uid, "seed": trial.config.seed}
    sign, key = study.goals.reported(study.phase)
    return [who | {"epoch": epoch, key: sign * value} for epoch, value in sorted(trial.epochs.items())]
