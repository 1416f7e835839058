"""What `erpe._upstream` takes from other packages is still there, and means the same."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from mlflow.entities import ViewType
from torch.utils.flop_counter import FlopCounterMode

from erpe import _upstream
from erpe.tracking.connection import connect


def test_torch_tells_whether_its_operators_are_watched():
    assert not _upstream.operators_are_watched()
    with FlopCounterMode(display=False):
        assert _upstream.operators_are_watched()
    assert not _upstream.operators_are_watched()


def test_the_openmp_of_torch_is_the_one_that_it_has_loaded():
    """A wheel without one takes the system's, and so do we."""
    loaded = {
        line.split()[-1]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if "libgomp" in line and "torch" in line
    }
    assert {str(path.resolve()) for path in _upstream.openmp_of_torch()} == loaded
    for path in _upstream.openmp_of_torch():
        assert ctypes.CDLL(str(path)).omp_get_max_threads() == torch.get_num_threads()


@pytest.mark.slow
def test_the_row_of_a_deleted_run_can_be_removed(tmp_path):
    client = connect(f"sqlite:///{tmp_path / 'mlflow.db'}")
    run = client.create_run("0").info.run_id
    client.delete_run(run)
    _upstream.delete_run_row(client, run)
    assert not client.search_runs(["0"], run_view_type=ViewType.ALL)
