"""The short set: every fault once or twice, on real processes. The long set is `infra/chaos`."""

import os
import random
import tempfile
from pathlib import Path

import pytest
from case import Case
from faults import FAULTS, POINTS
from homes import Embedded, Served

pytestmark = pytest.mark.slow
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk")


@pytest.fixture(scope="module")
def served():
    """One PostgreSQL and one MLflow server for all studies of this file; pytest's folders are closed to `postgres`."""
    with tempfile.TemporaryDirectory(prefix="erpe-chaos-") as folder, Served(Path(folder)).ready() as home:
        yield home


@pytest.fixture
def hurt(tmp_path, request):
    def run(fault, home, executor, times, **size):
        name = request.node.name.replace("[", "-").strip("]")
        case = Case(home or Embedded(tmp_path), tmp_path / name, executor, **size)
        result = FAULTS[fault](case, random.Random(name), times)
        assert result.fine, result
        assert result.injected >= 1, result

    return run


def test_a_kill_at_any_named_point_loses_and_doubles_nothing(hurt):
    hurt("points", None, "inline", len(POINTS), trials=34, epochs=2, slow=0.3)


@pytest.mark.parametrize(("fault", "times"), [("driver", 2), ("worker", 2), ("raylet", 1)])
def test_on_ray_a_dead_process_costs_at_most_an_epoch(hurt, fault, times):
    hurt(fault, None, "ray", times, trials=5)


@pytest.mark.parametrize(
    ("fault", "times"),
    [("driver", 2), ("server", 2), ("database", 2), ("sender", 1), ("second", 1), ("fenced", 1)],
)
def test_on_servers_nothing_is_lost_or_doubled(hurt, served, fault, times):
    hurt(fault, served, "inline", times, trials=5)


@pytest.mark.parametrize("fault", ["fenced", "sigterm", "clock", pytest.param("disk", marks=needs_root)])
def test_in_a_folder_nothing_is_lost_or_doubled(hurt, fault):
    hurt(fault, None, "inline", 2, trials=5)
