"""What the tracker is told of a study: by its driver while it runs, and by the reconciler from the database alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from erpe.store import Store
from erpe.study.naming import model_name, trial_name
from erpe.study.records import ExperimentRef, StudyRecord, TrialRecord
from erpe.study.search_space import NO_AXES, own_axes
from erpe.study.spec import StudySpec

MOST_TAGGED = 40
"""Trials of a front in MLflow's tag, which may have 8000 characters; the best by the first objective."""


def study_tags(spec: StudySpec, name: str, part_of: ExperimentRef | None) -> dict[str, str]:
    """Return what every run of a study is tagged with: the same keys for all.

    Args:
        name: of the study; an arm's phase is tagged with the name of its experiment.
    """
    facts = spec.base.data.facts
    tags = {
        "arm": part_of.arm if part_of else spec.variant, "variant": spec.variant, "dataset": spec.dataset,
        "phase": spec.phase, "data_sha256": facts.sha256 or facts.name, "study_hash": spec.identity,
        "study_seed": str(spec.seed), "sampler": spec.sampler, "pruner": spec.pruner,
        "study": part_of.study if part_of else name,
        "configuration": _configuration(spec, part_of),
        "own_axes": ", ".join(own_axes(spec.variant, spec.space)) or NO_AXES,
    }  # fmt: skip
    return tags | spec.goals.tags | (_planned(part_of.plan) if part_of else {})


def _configuration(spec: StudySpec, part_of: ExperimentRef | None) -> str:
    """Whose configuration runs repeat: what tells the seeds of an arm from those of an earlier best one."""
    if spec.phase != "confirm":
        return "own"
    return f"trial {part_of.trial}" if part_of and part_of.trial is not None else "confirmed"


def _planned(plan: dict[str, Any]) -> dict[str, str]:
    """Return what a study file plans; one that an older erpe stored says nothing of a margin."""
    search, seeds = plan["search"], plan["confirm"]["seeds"]
    margin = {"margin": f"{plan['compare']['margin']:g}"} if "compare" in plan else {}
    return {"trials_planned": str(search["trials"]), "seeds_planned": str(seeds), "budget": search["budget"]} | margin


def start_trial(tracker: Any, study: str, trial: TrialRecord, tags: dict[str, str], arm: str, phase: str) -> None:
    """Log that a trial starts.

    Args:
        study: uid of its study.
        tags: of every run of the study.
        arm: of a study file's study; empty for `tune`.
    """
    own = {"optuna.number": str(trial.number), "seed": str(trial.config.seed)}
    name = trial_name(arm or tags["study"], phase, trial.number)
    tracker.start_trial(trial.uid, trial.number, trial.config, tags | own, parent=study, name=name)


def end_trial(
    tracker: Any, store: Store, study: str, trial: TrialRecord, later: dict[str, float] | None = None
) -> None:
    """Log the end of a trial that is decided.

    Args:
        study: name of its study.
        later: what was measured after its end; it is told as another end.
    """
    if trial.verdict:
        state, metrics, reason = trial.verdict
        folder = folder_of(store, study, trial) if state == "COMPLETE" else None
        tracker.end_trial(trial.uid, state, metrics | (later or {}), folder, reason)


def end_study(tracker: Any, store: Store, study: StudyRecord, over: bool) -> None:
    """Log that a study ends, or pauses. A search has the measures of its best trial; a confirmation their means over
    seeds, and its champion is seed 0: no test score chooses it.

    Args:
        over: whether all that was requested is done.
    """
    part_of, confirm = study.part_of, study.phase == "confirm"
    complete = [trial for trial in study.trials if trial.state == "COMPLETE"]
    best = (complete[0] if complete else None) if confirm else study.best
    metrics = means(study, complete) if confirm else _measures(study, best) if best else {}
    model = (model_name(part_of.study, part_of.arm) if confirm and over else "") if part_of else study.name
    tracker.end_study(
        study.about.uid,
        best.uid if best else None,
        metrics,
        folder_of(store, study.name, best) if best and over else None,
        ("COMPLETE" if best else "FAIL") if over else "INTERRUPTED",
        name=study.name if part_of else "",
        model=model,
        tags=_front(study),
    )


def _front(study: StudyRecord) -> dict[str, str]:
    """Of several objectives: number of a trial that no other one dominates -> its objectives, as JSON."""
    front = list(study.front.items())[:MOST_TAGGED]
    return {"front": json.dumps(dict(front))} if front else {}


def means(study: StudyRecord, trials: list[TrialRecord]) -> dict[str, float]:
    """Return the mean over seeds of every measure that each of these trials has, and `seeds`, how many they are."""
    measured = [_measures(study, trial) for trial in trials]
    shared = [name for name in measured[0] if all(name in own for own in measured)] if measured else []
    found = {name: math.fsum(own[name] for own in measured) / len(measured) for name in shared}
    return found | ({"seeds": float(len(measured))} if measured else {})


def _measures(study: StudyRecord, trial: TrialRecord) -> dict[str, float]:
    """Return what was measured at the end of a trial, and later: the test of a search's best, the times of a seed."""
    return (trial.verdict.metrics if trial.verdict else {}) | study.finals.get(trial.number, {})


def folder_of(store: Store, study: str, trial: TrialRecord) -> Path:
    """Where a trial's checkpoint and results lie."""
    return store.trial_folder(study, trial.number, trial.config.seed)
