import shutil

import pytest
import scipy.linalg  # noqa: F401  its threads can be limited only once it is loaded
import threadpoolctl
import torch
from postgres import PROGRAMS, Postgres

# Small matrices: more threads would only wait for each other. And sums are added in one order.
torch.set_num_threads(1)
threadpoolctl.threadpool_limits(1)


@pytest.fixture(scope="session")
def postgres(tmp_path_factory):
    if not shutil.which("initdb", path=PROGRAMS):
        pytest.skip("no PostgreSQL on this machine")
    server = Postgres(tmp_path_factory.mktemp("postgres"))
    yield server
    server.stop()


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory):
    """MLflow's tables take seconds to make: make them once."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    from erpe.tracking.server import connect

    connect(f"sqlite:///{path}").search_experiments(max_results=1)
    return path


@pytest.fixture(scope="session")
def digits_study(tmp_path_factory):
    """The store of a whole small study of real digits, `digits-nine`; change a copy, not it."""
    from trials import small_study

    return small_study(tmp_path_factory.mktemp("study") / "store")
