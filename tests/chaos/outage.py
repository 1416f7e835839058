"""What an outage of the tracking server costs training: one training, its epochs told to each server in turn.

well     an MLflow server that answers
down     nobody listens at its address
hangs    somebody accepts the connection and never says a word
"""

import json
import os
import random
import socket
import statistics
import time
from contextlib import ExitStack

from mlflow_server import hanging_server

from erpe.config import defaults
from erpe.store import Store
from erpe.study.session import StudySession
from erpe.study.spec import define
from erpe.tracking.tracker import Tracker
from erpe.training.trial import Trial

BLOCK = 8
"""Epochs told to one server before it is another's turn."""


def closed_port():
    """One that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


SMALL = {"model.width": 32, "model.depth": 2, "model.features": 8, "data.train_limit": 1000}


class Told:
    """A study whose tracking server is at `uri`; its sender works only while it is its turn."""

    def __init__(self, folder, uri):
        self.store, self.uri = Store.open(folder), uri
        self.spec = define("relu_general", "digits", epochs=10_000, pruner="none")

    def turn(self, trial):
        """Seconds an epoch: trained, saved, in the session and in its history."""
        os.environ |= {"MLFLOW_TRACKING_URI": self.uri, "ERPE_STORAGE_URL": ""}
        tracker = Tracker(self.store, "outage")
        with StudySession.open(self.store, self.spec, name="outage") as session:
            asked = session.ask(1)
            tracker.tell("outage")
            tracker.start_trial("outage", asked, {})
            began = time.perf_counter()
            for _ in range(BLOCK):
                measured = trial.epoch()
                step = int(measured["epoch"])
                session.report(0, step, measured["val/accuracy"])
                tracker.epoch("outage", asked, measured)
            took = time.perf_counter() - began
        tracker.close(0)
        tracker._thread.join(60)  # before the next one's turn
        return took / BLOCK


def measure(home, folder, rounds):
    """Of each state: median seconds an epoch, and the median and range of its ratios to `well` in the same round."""
    config = defaults("relu_general", "digits").replace(SMALL | {"train.epochs": 10_000})
    trial, found = Trial(config, folder / "trial"), {"well": [], "down": [], "hangs": []}
    with ExitStack() as opened:
        places = {
            "well": home.environment()["MLFLOW_TRACKING_URI"],
            "down": f"http://127.0.0.1:{closed_port()}",
            "hangs": opened.enter_context(hanging_server()),
        }
        told = {state: Told(folder / state, uri) for state, uri in places.items()}
        for study in told.values():
            study.turn(trial)  # modules are loaded, tables and runs are made
        for turn in range(rounds):
            for state in random.sample(list(told), len(told)):
                found[state].append(told[state].turn(trial))
            print(f"round {turn + 1}: " + ", ".join(f"{s} {1000 * t[-1]:.1f} ms" for s, t in found.items()), flush=True)
    return [
        {"state": state, "ms": 1000 * statistics.median(times), "n": rounds, "epochs": rounds * BLOCK}
        | ratios([one / well for one, well in zip(times, found["well"], strict=True)])
        for state, times in found.items()
    ]


def ratios(found):
    """Median and its 95 % interval, from resampled rounds."""
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(found, k=len(found))) for _ in range(10_000))
    return {"ratio": statistics.median(found), "low": medians[250], "high": medians[-251]}


def as_table(text):
    """Markdown of what `measure` found, a JSON list."""
    lines = ["| tracking server | ms an epoch, median | epochs | ratio to *well* in the same round, median (95 %) |"]
    lines.append("|---|---:|---:|---:|")
    for row in json.loads(text):
        spread = f"{row['ratio']:.3f} ({row['low']:.3f} to {row['high']:.3f}, n={row['n']})"
        lines.append(f"| {row['state']} | {row['ms']:.1f} | {row['epochs']} | {spread} |")
    return "\n".join(lines)
