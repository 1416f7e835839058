"""The short set on PostgreSQL and an MLflow server. The long one, with every fault, is `infra/chaos`."""

import tempfile
from pathlib import Path

import pytest
from homes import Served

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def served():
    """One PostgreSQL and one MLflow server for all studies of this file; pytest's folders are closed to `postgres`."""
    with tempfile.TemporaryDirectory(prefix="erpe-chaos-") as folder, Served(Path(folder)).ready() as home:
        yield home


@pytest.mark.parametrize(("fault", "times"), [("driver", 2), ("server", 2), ("database", 2)])
def test_nothing_is_lost_or_doubled(hurt, served, fault, times):
    hurt(fault, served, "inline", times, trials=5)
