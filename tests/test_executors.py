"""Ray as a run starts it for itself: what it needs, and soon."""

import os
import sys
from functools import partial
from pathlib import Path

import pytest
from toys import work

from erpe.search.tune import tune
from erpe.store import Store
from erpe.study.spec import define
from erpe.tracking.tracker import Tracker

SPEC = define("relu_general", "digits", epochs=2, sampler="random", pruner="none")


def _birth(folder, epoch):
    (folder / "birth").write_text(f"{'torch' in sys.modules} {'sklearn' in sys.modules}")


@pytest.mark.slow
def test_a_worker_imports_only_what_its_trials_need(tmp_path, monkeypatch):
    monkeypatch.setattr("erpe.tracking.tracker.Tracker", partial(Tracker, send=False))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, Path(__file__).parents[:2])))
    store = Store.open(tmp_path)
    tune(SPEC, store, trials=2, concurrency=2, work=work(accident=_birth))
    births = [path.read_text() for path in store.checkpoints.glob("*/*/birth")]
    assert births == ["False False"] * 2, "what only real training needs"
