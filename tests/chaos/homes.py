"""Where a study lives while it is hurt: a folder with SQLite, or PostgreSQL and an MLflow server. All of it real."""

import os
import shutil
from contextlib import closing, contextmanager
from pathlib import Path

import sqlalchemy
from mlflow_server import await_server, free_port, start_server
from postgres import Postgres

from erpe.store import Store


class Embedded:
    """Everything in the store's folder."""

    name = "embedded"

    def __init__(self, folder):
        self.folder = folder

    @contextmanager
    def ready(self):
        yield self

    def environment(self):
        """What the command needs to find it: nothing that another home has left."""
        return {"ERPE_STORAGE_URL": "", "MLFLOW_TRACKING_URI": ""}


class Served:
    """One PostgreSQL with a database for Optuna and one for MLflow, and an MLflow server on it."""

    name = "served"

    def __init__(self, folder):
        self.folder, self.port, self._server = folder, free_port(), None

    @contextmanager
    def ready(self):
        self.folder.chmod(0o755)  # PostgreSQL runs as a user of its own
        folder = self.folder / "postgres"
        folder.mkdir(parents=True)
        self.postgres = Postgres(folder)
        try:
            for name in ("optuna", "mlflow"):
                self.postgres.create(name)
            self.start_server()
            yield self
        finally:
            self.kill_server()
            self.postgres.stop()
            shutil.rmtree(folder)

    def environment(self):
        """What the command needs to find it."""
        return {
            "ERPE_STORAGE_URL": self.postgres.address("optuna"),
            "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{self.port}",
        }

    def start_server(self, wait=True):
        """At the same address every time, as a service that is started again."""
        log, uri = self.folder / "server.log", self.postgres.address("mlflow")
        self._server = start_server(uri, self.folder / "served", self.port, log)
        if wait:
            await_server(f"http://127.0.0.1:{self.port}", self._server, log)

    def kill_server(self):
        """All its processes, at once."""
        if self._server is not None:
            self._server.end()
            self._server = None

    def restart_database(self):
        """As a crash would: without a word to anyone."""
        self.postgres.stop()
        self.postgres.start()

    def cut(self):
        """End every session with Optuna's database, and with it every lease."""
        engine = sqlalchemy.create_engine(self.postgres.address("postgres"), isolation_level="AUTOCOMMIT")
        with closing(engine.connect()) as connection:
            connection.execute(
                sqlalchemy.text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'optuna'")
            )
        engine.dispose()


def store_of(home, folder):
    """The store as a process of ours sees it, whatever the home."""
    os.environ.update(home.environment())
    return Store.open(Path(folder))
