"""A study that MLflow is told of, whose workers are the test; and what MLflow has of it."""

import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from mlflow_server import rows

from erpe.config import defaults
from erpe.execution.controller import StudyController
from erpe.execution.trial_loop import TrialEvent
from erpe.study.session import StudySession
from erpe.study.spec import define
from erpe.tracking.study_tags import study_tags
from erpe.tracking.tracker import Tracker

STUDY = "relu_general-digits"
SPEC = define("relu_general", "digits", epochs=3, sampler="random", pruner="none")
CONFIG = defaults("relu_general", "digits")


EXPECTED = {
    (STUDY, "test/accuracy"): [(0, 0.5)],
    (STUDY, "val/accuracy"): [(0, 0.3)],
    (STUDY, "params"): [(0, 1e5)],
    (STUDY, "memory/peak_mib"): [(0, "nan")],
    (f"{STUDY}/0", "params"): [(3, 1e5)],
    (f"{STUDY}/0", "memory/peak_mib"): [(3, "nan")],
    **{(f"{STUDY}/{n}", "val/accuracy"): [(s, s / 10 + n / 100) for s in (1, 2, 3)[: 3 - (n == 1)]] for n in range(3)},
    **{(f"{STUDY}/{n}", "train/loss"): [(s, 1 / s) for s in (1, 2, 3)[: 3 - (n == 1)]] for n in range(3)},
}
NAMES = [STUDY, *(f"{STUDY}/{n}" for n in range(3))]


def results(folder, seed=0):
    """What training writes for a completed trial."""
    from erpe.model import build
    from erpe.training.checkpoint import save_model

    folder.mkdir(parents=True, exist_ok=True)
    save_model(folder, build(CONFIG.model, seed).eval(), CONFIG)
    history = [{"epoch": n, "train/loss": 2 / n, "val/loss": 2.1 / n, "val/accuracy": 1 - 1 / n} for n in (1, 2, 3)]
    outcome = {"metrics": {}, "history": history, "data_sha256": "d" * 64, "device": "cpu"}
    (folder / "outcome.json").write_text(json.dumps(outcome))
    matrix = np.eye(10, dtype=int).tolist()
    names = [str(n) for n in range(10)]
    for name, split in (("confusion.json", "validation"), ("confusion_test.json", "test")):
        (folder / name).write_text(json.dumps({"split": split, "classes": names, "matrix": matrix}))
    maps = np.full((4, 4, 16, 16), 1 / 16)
    np.savez_compressed(folder / "attention.npz", image=np.zeros((1, 8, 8)), maps=maps, grid=np.array((4, 4)))
    return folder


@contextmanager
def driver(store, name=STUDY, *, send=True, trials=3):
    """A driver of a study, whose workers are the test."""
    with StudySession.open(store, SPEC, trials=trials, name=name) as session:
        tags = study_tags(SPEC, name, None)
        tracker = Tracker(store, name, send=send)
        session.record_tags(tags)
        tracker.tell(name)
        try:
            yield StudyController(session, SPEC, tracker, store, trials, tags=tags)
        finally:
            tracker.close(0)


def epoch(controller, trial, step, **more):
    measures = {"epoch": float(step), "val/accuracy": step / 10 + trial.number / 100, "train/loss": 1 / step}
    controller.on_trial_result(trial, TrialEvent(epochs=(measures | more,)))


def play(controller, *, files=False):
    """A small study: trial 0 completes, trial 1 is pruned, trial 2 fails. A restart makes the same calls again."""
    session, tracker = controller.session, controller.tracker
    while trial := controller.next_trial():
        n = trial.number
        for step in range(1, (2 if n == 1 else 3) + 1):
            epoch(controller, trial, step)
        if n == 1:
            session.decide(n, "PRUNED", {}, "pruned after epoch 2")
            session.tell(n)
            tracker.end_trial(session.name, trial)
        elif n == 2:
            failure = "Traceback (most recent call last):\n  ...\nTrialError: loss is nan"
            controller.on_trial_result(trial, TrialEvent(failure=failure))
        else:
            if files:
                results(controller.folder(trial))
            final = {"val/accuracy": 0.3, "params": 1e5, "memory/peak_mib": float("nan")}
            controller.on_trial_result(trial, TrialEvent(outcome=final))
    session.record_final(0, {"test/accuracy": 0.5})
    tracker.tell(session.name)


def metrics(database, study=STUDY):
    """{(run name, key): [(step, value), ...]} of every row MLflow has."""
    query = (
        "SELECT r.name, key, step, value, is_nan FROM metrics JOIN runs r USING (run_uuid) "
        "JOIN experiments e USING (experiment_id) "
        "WHERE r.lifecycle_stage = 'active' AND e.name = ? ORDER BY step"
    )
    found = {}
    for name, key, step, value, is_nan in rows(database, query, study):
        found.setdefault((name, key), []).append((step, "nan" if is_nan else value))
    return found


def send(store, *, files=False):
    """The small study, in MLflow: its database."""
    with driver(store) as controller:
        play(controller, files=files)
        assert controller.tracker.close(120) == 0, controller.tracker.problem
        assert controller.tracker.problem is None
    return store.root / "mlflow.db"


def environment():
    """Of a process that finds erpe and these modules."""
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
