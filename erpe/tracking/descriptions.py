"""What MLflow's page says of an experiment and of a run, in words: what it is, and the command that repeats it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from erpe.study.naming import part_name, trial_name
from erpe.variants import VARIANTS

if TYPE_CHECKING:
    from mlflow import MlflowClient

NOTE = "mlflow.note.content"
"""The tag that holds a description. Source: MLflow 3.17, "Description" of an experiment and of a run."""

_DIGEST = 36
"""Characters of a digest that MLflow keeps."""


def describe_experiment(tags: Mapping[str, str]) -> str:
    """Describe a study.

    Args:
        tags: of one of its runs, see `erpe.tracking.study_tags.study_tags`.
    """
    what = "compares arms" if "seeds_planned" in tags else f"searches {tags.get('variant', '')}"
    return _told(
        f"A study of erpe: it {what} on {tags.get('dataset', '')}.",
        "Its view shows every trial once, best first; the run above a trial holds the plots of its search.",
        tags,
    )


def describe_part(tags: Mapping[str, str]) -> str:
    """Describe the run above the trials of a search, or above the seeds of an arm."""
    name = part_name(tags.get("study", ""), tags["arm"] if "seeds_planned" in tags else "", tags.get("phase", ""))
    if tags.get("phase") == "confirm":
        what = f"The best configuration of {tags['arm']} trained again with fresh seeds on the full training set"
        return _told(f"{name}. {what}; each was tested once.", "Its measures are means over the seeds.", tags)
    what = f"The search of {tags.get('variant', '')} on {tags.get('dataset', '')}"
    return _told(f"{name}. {what}.", "Its measures are those of its best trial.", tags)


def describe_trial(tags: Mapping[str, str], number: int) -> str:
    """Describe a trial or a seed."""
    place = part_name(tags.get("study", ""), tags["arm"] if "seeds_planned" in tags else "", "search")
    name = trial_name(place, tags.get("phase", "search"), number)
    what = f"{tags.get('variant', '')} on {tags.get('dataset', '')}, seed {tags.get('seed', '')}"
    own = "" if tags.get("variant", "softmax") in VARIANTS else " --plugin FILE"
    return _told(f"{name}: {what}.", f"Use it: `erpe predict {name} PICTURE{own}`.", tags)


def _told(what: str, more: str, tags: Mapping[str, str]) -> str:
    again = f"\n\nThe same command continues or repeats the study: `{tags['command']}`" if "command" in tags else ""
    return f"{what} {more}{again}"


def log_data_set(client: MlflowClient, run: str, name: str, sha256: str) -> None:
    """Name the data set of a run, with its digest, as MLflow shows data sets; again it changes nothing."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    source = json.dumps({"data set": name, "sha256": sha256})
    data = Dataset(name=name, digest=sha256[:_DIGEST], source_type="erpe", source=source)
    client.log_inputs(run, datasets=[DatasetInput(data, [InputTag("mlflow.data.context", "training")])])
