"""Trials that train nothing but keep books of what was asked of them, for the tests of the search room."""

import json
import time
from functools import partial

from erpe.execution.objective import Objective
from erpe.io import write_atomic


class Toy:
    """A training that does nothing but keep its own books, and have accidents."""

    def __init__(self, config, folder, sleep, accident):
        folder.mkdir(parents=True, exist_ok=True)
        self.config, self.folder, self.sleep, self.accident = config, folder, sleep, accident
        self.warning = None
        saved = folder / "toy.json"
        self.history = json.loads(saved.read_text()) if saved.exists() else []
        self.note("start")

    def note(self, what):
        with (self.folder / "log").open("a") as file:
            file.write(f"{what}\n")

    @staticmethod
    def ahead(toys):
        for toy in toys:
            toy.note(f"beside {len(toys) - 1}")

    def epoch(self):
        number = len(self.history) + 1
        time.sleep(self.sleep)
        self.note(f"epoch {number}")
        if self.accident:
            self.accident(self.folder, number)
        found = {"epoch": float(number), "val/accuracy": 0.5 + self.config.train.lr + number / 100, "train/loss": 1.0}
        self.history.append(found)
        write_atomic(self.folder / "toy.json", json.dumps(self.history))
        return found

    def settle(self):
        pass

    def finish(self):
        self.note("finish")
        outcome = {
            "metrics": {"params": 7.0, "val/accuracy": self.history[-1]["val/accuracy"]},
            "history": self.history,
        }
        write_atomic(self.folder / "outcome.json", json.dumps({**outcome, "config": self.config.model_dump_json()}))
        return outcome["metrics"]


class Confirmed(Toy):
    """A toy whose end opens the test split."""

    def finish(self):
        self.note("test")
        return super().finish() | {"test/accuracy": 0.9}


def toy(config, folder, sleep=0.0, accident=None):
    return Toy(config, folder, sleep, accident)


def examine(folder):
    with (folder / "log").open("a") as file:
        file.write("test\n")
    return {"test/accuracy": 0.5}


def nothing():
    pass


def confirm(config, folder, sleep=0.0, accident=None):
    return Confirmed(config, folder, sleep, accident)


def clock(folders):
    for folder in folders:
        with (folder / "log").open("a") as file:
            file.write("time\n")
    return [{"time/inference_ms_per_image": 0.1 * turn} for turn, _ in enumerate(folders, 1)]


def work(**toys):
    return Objective(nothing, partial(toy, **toys), examine, partial(confirm, **toys), clock)


def number_of(folder):
    return int(folder.name.partition("-")[0])


def once(folder, what):
    """Whether this is the first time for a trial."""
    marker = folder / f"once-{what}"
    if marker.exists():
        return False
    marker.touch()
    return True
