"""Ray as a run starts it for itself: what it needs, and soon."""

import os
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
from toys import work

from erpe.execution.callbacks import NullCallback
from erpe.search.tune import tune
from erpe.store import Store
from erpe.study.spec import define
from erpe.tracking.tracker import Tracker

SPEC = define("relu_general", "digits", epochs=2, sampler="random", pruner="none")


class Watching(NullCallback):
    """Sees the processes that are there when the search begins."""

    def on_phase(self, phase):
        if phase == "search":
            self.time = time.time()
            self.processes = [" ".join(child.cmdline()) for child in psutil.Process().children(recursive=True)]


def _birth(folder, epoch):
    started = psutil.Process().create_time()
    (folder / "birth").write_text(f"{started} {'torch' in sys.modules} {'sklearn' in sys.modules}")


@pytest.mark.slow
def test_a_run_of_its_own_starts_few_processes_and_its_trials_take_the_workers_that_wait(tmp_path, monkeypatch):
    monkeypatch.setattr("erpe.tracking.tracker.Tracker", partial(Tracker, send=False))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, Path(__file__).parents[:2])))
    store, seen = Store.open(tmp_path), Watching()
    tune(SPEC, store, trials=3, concurrency=2, work=work(accident=_birth), progress=seen)
    assert any("raylet" in process for process in seen.processes), "Ray was started for this run"
    for spared in ("dashboard.py", "monitor.py", "log_monitor.py"):
        assert not any(spared in process for process in seen.processes)
    births = [path.read_text().split() for path in store.checkpoints.glob("*/*/birth")]
    assert len(births) == 3
    for started, torch, sklearn in births:
        assert float(started) < seen.time, "a worker is there before it has a trial"
        assert (torch, sklearn) == ("False", "False"), "what only real training needs"
    from ray.tune.execution import class_cache

    assert class_cache.DEFAULT_ENV_VARS and class_cache.ENV_VARS_TO_PROPAGATE, "a cluster, later on, needs them"
