"""The short set where everything lives in a folder. The long one, with every fault and on Ray, is `infra/chaos`.

A dead worker of Ray: `test_on_ray_a_dead_worker_is_replaced_and_a_poisonous_trial_ends` in ../test_tune_on_ray.py.
"""

import os

import pytest
from faults import POINTS
from homes import Embedded

pytestmark = pytest.mark.slow
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk")


def test_a_kill_at_a_named_point_loses_and_doubles_nothing(hurt, tmp_path, monkeypatch):
    """A point of each kind: around the database, a history, MLflow and the checkpoint."""
    few = (
        "between create_run and save", "between ask and write", "during a write of a history",
        "during a checkpoint write", "before tell",
    )  # fmt: skip
    monkeypatch.setattr("faults.POINTS", {name: POINTS[name] for name in few})
    hurt("points", Embedded(tmp_path), "inline", len(few), trials=16, epochs=2, slow=0.3)


@pytest.mark.parametrize("fault", ["sigterm", pytest.param("disk", marks=needs_root)])
def test_a_study_that_was_stopped_goes_on(hurt, tmp_path, fault):
    hurt(fault, Embedded(tmp_path), "inline", 2, trials=5)


def test_a_driver_that_wakes_up_after_another_took_over_writes_nothing(hurt, tmp_path):
    hurt("fenced", Embedded(tmp_path), "inline", 1, trials=5)
