"""Optuna's own contract of a storage, on what erpe uses: `Database(...).backend`, in both its homes.

Making Optuna's tables takes longer than a case: SQLite's are copied, PostgreSQL's are emptied.
"""

import pickle
import shutil
from contextlib import closing

import pytest
import sqlalchemy
from optuna.testing.pytest_storages import StorageTestCase

from erpe.study.storage import Database


@pytest.fixture(scope="module")
def empty_sqlite(tmp_path_factory):
    path = tmp_path_factory.mktemp("contract") / "optuna.db"
    Database(f"sqlite:///{path}").close()
    return path


@pytest.fixture
def sqlite(empty_sqlite, tmp_path):
    return f"sqlite:///{shutil.copy(empty_sqlite, tmp_path)}"


@pytest.fixture(scope="module")
def own_database(postgres_server):
    """One for all cases: the tables take a second to make."""
    url = postgres_server.create("contract")
    Database(url).close()
    return url


@pytest.fixture
def postgresql(own_database):
    yield own_database
    with closing(Database(own_database)) as database, database.backend.engine.begin() as connection:
        connection.execute(sqlalchemy.text("TRUNCATE studies, trials RESTART IDENTITY CASCADE"))


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request):
    with closing(Database(request.getfixturevalue(request.param))) as database:
        yield database


@pytest.fixture
def storage(database):
    return database.backend


# Optuna's cases leave the sessions of their own threads to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
class TestContract(StorageTestCase):
    """Its cases are Optuna's; none is left out."""

    def test_pickle_storage(self, storage, monkeypatch):
        """Optuna's case, which leaves the connection of the copy open."""
        load, copies = pickle.loads, []
        monkeypatch.setattr(pickle, "loads", lambda data: copies.append(load(data)) or copies[-1])
        super().test_pickle_storage(storage)
        for copy in copies:
            copy.remove_session()
            copy.engine.dispose()

    def test_no_case_is_left_out(self):
        own = {name for name in vars(type(self)) if name.startswith("test_")}
        assert own == {"test_no_case_is_left_out", "test_pickle_storage"}
        assert len({name for name in dir(self) if name.startswith("test_")}) > 45
