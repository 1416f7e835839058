"""What every run of a study is tagged with."""

from __future__ import annotations

from typing import Any

from erpe.study.records import ExperimentRef, StudyRecord
from erpe.study.search_space import NO_AXES, own_axes
from erpe.study.spec import StudySpec


def study_tags(spec: StudySpec, name: str, part_of: ExperimentRef | None) -> dict[str, str]:
    """Return what every run of a study is tagged with: the same keys for all, and what is sought if it is set.

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


def made_with(member: StudyRecord) -> dict[str, str]:
    """Where a study was made, as far as the database knows that erpe 0.1.0 wrote."""
    made = member.made_with
    command = "study run" if member.part_of else "train" if member.name.startswith("train-") else "tune"
    commit = {"mlflow.source.git.commit": made["git_sha"]} if made.get("git_sha", "unknown") != "unknown" else {}
    return made | commit | {"mlflow.source.name": f"erpe {command}", "mlflow.source.type": "LOCAL"}
