"""What Optuna, the checkpoints, the histories and MLflow say of a study, compared trial by trial and epoch by epoch."""

import json
from collections import Counter
from dataclasses import dataclass, field

from safetensors import safe_open

from erpe.store import HISTORY
from erpe.study.reading import read_studies
from erpe.tracking.connection import connect

MEASURE = "val/accuracy"
STATUS = {"COMPLETE": "FINISHED", "PRUNED": "KILLED", "FAIL": "FAILED"}


@dataclass
class Books:
    """How far they agree."""

    trials_lost: int = 0
    trials_doubled: int = 0
    epochs_lost: int = 0
    epochs_doubled: int = 0
    wrong: list[str] = field(default_factory=list)
    """Whatever else differs: a value, a state, a file."""

    @property
    def in_order(self):
        """Nothing is lost, doubled or different."""
        return self == Books()


def compare_books(store, name, trials):
    """The books of a study that should have so many trials, all ended."""
    books = Books()
    (study,) = read_studies(store, name)
    numbers = Counter(trial.number for trial in study.trials)
    books.trials_lost += max(0, trials - len(numbers))
    books.trials_doubled += max(0, len(study.trials) - trials) + numbers.total() - len(numbers)
    configs = Counter(trial.config.replace({"seed": 0}).model_dump_json() for trial in study.trials)
    books.wrong += [f"{count} trials with one configuration" for count in configs.values() if count > 1]
    for trial in study.trials:
        if trial.state not in STATUS or trial.verdict is None or trial.verdict.state != trial.state:
            books.wrong.append(f"trial {trial.number}: {trial.state}, decided {trial.verdict}")
        if list(trial.epochs) != list(range(1, len(trial.epochs) + 1)):
            books.wrong.append(f"trial {trial.number}: Optuna has epochs {list(trial.epochs)}")
        _compare_files(books, store, study, trial)
    _compare_mlflow(books, store, study)
    return books


def _compare_files(books, store, study, trial):
    folder = store.trial_folder(study.name, trial.number, trial.config.seed)
    left = [path.name for path in folder.iterdir() if path.name.startswith(".")] if folder.exists() else []
    if left and trial.state == "COMPLETE":
        books.wrong.append(f"trial {trial.number}: {left} left in its folder")
    lines = [json.loads(line) for line in (folder / HISTORY).read_text().splitlines() if line.endswith("}")]
    told = [int(line["epoch"]) for line in lines if "epoch" in line]
    books.epochs_lost += len(trial.epochs.keys() - set(told))
    books.epochs_doubled += len(told) - len(set(told))
    if trial.state == "FAIL":
        return
    if trial.state == "COMPLETE":
        outcome = json.loads((folder / "outcome.json").read_text())
        history = outcome["history"]
        if outcome["metrics"] != trial.verdict.metrics:
            books.wrong.append(f"trial {trial.number}: outcome.json is not what was decided")
        books.wrong += [f"trial {trial.number}: {folder}/training.safetensors"] * (
            folder / "training.safetensors"
        ).exists()
    else:
        with safe_open(folder / "training.safetensors", framework="np") as file:
            history = json.loads(file.metadata()["erpe"])["history"]
    saved = {int(epoch["epoch"]): epoch[MEASURE] for epoch in history}
    books.epochs_lost += len(trial.epochs.keys() - saved.keys())
    books.epochs_doubled += len(history) - len(saved)
    if trial.state == "COMPLETE" and saved.keys() != trial.epochs.keys():
        books.epochs_lost += len(saved.keys() - trial.epochs.keys())
    for epoch in saved.keys() & trial.epochs.keys():
        if saved[epoch] != trial.epochs[epoch]:
            books.wrong.append(f"trial {trial.number} epoch {epoch}: {saved[epoch]} saved, {trial.epochs[epoch]} told")


def _compare_mlflow(books, store, study):
    client = connect(store.tracking_uri)
    experiment = client.get_experiment_by_name(study.name)
    runs = list(client.search_runs([experiment.experiment_id], max_results=1000)) if experiment else []
    by_uid = Counter(run.data.tags.get("erpe.trial_uid") for run in runs)
    parents = [run for run in runs if run.data.tags.get("erpe.study_uid") == study.about.uid]
    books.trials_doubled += max(0, len(parents) - 1)
    books.trials_lost += not parents
    strangers = by_uid.keys() - {trial.uid for trial in study.trials} - {None}
    books.wrong += [f"MLflow has a run of {uid}" for uid in strangers]
    for trial in study.trials:
        books.trials_lost += by_uid[trial.uid] == 0
        books.trials_doubled += max(0, by_uid[trial.uid] - 1)
        for run in (run for run in runs if run.data.tags.get("erpe.trial_uid") == trial.uid):
            if run.info.status != STATUS.get(trial.state) or run.data.tags["state"] != trial.state:
                books.wrong.append(f"trial {trial.number}: {run.info.status} in MLflow, {trial.state} in Optuna")
            points = client.get_metric_history(run.info.run_id, MEASURE)
            found = {point.step: point.value for point in points}
            books.epochs_lost += len(trial.epochs.keys() - found.keys())
            books.epochs_doubled += len(points) - len(found)
            if any(found[step] != value for step, value in trial.epochs.items() if step in found):
                books.wrong.append(f"trial {trial.number}: MLflow has other values")
    if study.best and parents:
        final = study.finals.get(study.best.number, {})
        tested = {key: value for key, value in parents[0].data.metrics.items() if key.startswith("test/")}
        if tested != {key: value for key, value in final.items() if key.startswith("test/")} or not tested:
            books.wrong.append("the test measures differ between Optuna and MLflow")


@dataclass
class Journal:
    """What the workers themselves say: epochs begun and saved."""

    repeated: int
    """Epochs that were begun more than once, counted once for each time too many."""
    retrained: int
    """Epochs that were begun again after they had been saved: never."""


def read_journal(path, fenced=()):
    """Of all processes there were.

    A fenced driver, by its process number, may have been about to begin an epoch when it fell asleep: it notices that
    another took over when it wants to write.
    """
    begun, saved, retrained = Counter(), set(), 0
    for line in path.read_text().splitlines() if path.exists() else []:
        _, pid, what, trial, epochs = line.split()
        if what == "begin":
            begun[trial, int(epochs) + 1] += 1
            retrained += (trial, int(epochs) + 1) in saved and int(pid) not in fenced
        else:
            saved.add((trial, int(epochs)))
    return Journal(begun.total() - len(begun), retrained)


def first_begin(path, since):
    """Seconds from a moment to the first epoch begun after it; nothing if there was none."""
    times = (
        [float(line.split()[0]) for line in path.read_text().splitlines() if " begin " in line] if path.exists() else []
    )
    return next((when - since for when in times if when >= since), None)
