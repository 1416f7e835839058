"""A real MLflow server for tests, in its own process group, and the rows of its database."""

import os
import socket
import sqlite3
import subprocess
import threading
import time
import urllib.error
import urllib.request
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from forks import Fork


def free_port():
    with closing(socket.socket()) as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start_server(uri: str, artifacts: Path, port: int, log: Path, *, allowed_hosts: str | None = None) -> Fork:
    """`mlflow server`, whose words go to `log`, in the folder of that."""
    words = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1", "--backend-store-uri", uri]
    words += ["--artifacts-destination", artifacts.as_uri()]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    environment |= {"MLFLOW_SERVER_ALLOWED_HOSTS": allowed_hosts} if allowed_hosts else {}
    return Fork(_serve, (words,), environment, log, log.parent)


def _serve(words):
    """In the child: MLflow's command, and the server that it would start as a process of its own."""
    import uvicorn.main

    def here(command, env, **_):
        os.environ.update(env)
        uvicorn.main.main(command[command.index("uvicorn") + 1 :])

    subprocess.Popen = here
    from mlflow.cli import cli

    cli(["server", *words])


@contextmanager
def mlflow_server(database: Path, artifacts: Path, port: int | None = None, *, allowed_hosts: str | None = None):
    """Serve a SQLite database on 127.0.0.1 until the block ends; yields the URL."""
    port, log = port or free_port(), database.with_suffix(".log")
    server = start_server(f"sqlite:///{database}", artifacts, port, log, allowed_hosts=allowed_hosts)
    try:
        await_server(f"http://127.0.0.1:{port}", server, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.end()


@contextmanager
def hanging_server():
    """Accepts everyone, answers nobody; yields the URL."""
    held, server = [], socket.create_server(("127.0.0.1", 0))

    def accept():
        with suppress(OSError):  # closed
            while True:
                held.append(server.accept()[0])

    accepting = threading.Thread(target=accept, daemon=True)
    accepting.start()
    try:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        accepting.join()
        for connection in held:
            connection.close()


def await_server(url, server, log):
    for _ in range(600):
        try:
            urllib.request.urlopen(f"{url}/api/2.0/mlflow/experiments/search?max_results=1", timeout=5).close()
            return
        except urllib.error.HTTPError as refused:
            if refused.code == 403:
                return  # up, and refuses us: a test asked for that
        except OSError:
            pass
        assert server.poll() is None, log.read_text()
        time.sleep(0.1)
    raise TimeoutError(log.read_text())


def rows(database: Path, query: str, *values):
    """The answer of MLflow's own database."""
    with closing(sqlite3.connect(database)) as connection:
        return connection.execute(query, values).fetchall()


def newest_study(database: Path):
    """Its experiment: (id, name)."""
    query = "SELECT experiment_id, name FROM experiments WHERE name != 'Default' ORDER BY experiment_id DESC LIMIT 1"
    return rows(database, query)[0]
