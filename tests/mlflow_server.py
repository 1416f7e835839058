"""A real MLflow server for tests, in its own process group, and the rows of its database."""

import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import closing, contextmanager, suppress
from pathlib import Path


def free_port():
    with closing(socket.socket()) as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextmanager
def mlflow_server(database: Path, artifacts: Path, port: int | None = None, *, allowed_hosts: str | None = None):
    """Serve a SQLite database on 127.0.0.1 until the block ends; yields the URL."""
    port = port or free_port()
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", f"sqlite:///{database}", "--artifacts-destination", artifacts.as_uri()),
        *(("--allowed-hosts", allowed_hosts) if allowed_hosts else ()),
    ]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    log = database.with_suffix(".log")
    with log.open("wb") as out:
        server = subprocess.Popen(
            command, stdout=out, stderr=out, env=environment, cwd=database.parent, start_new_session=True
        )
    try:
        await_server(f"http://127.0.0.1:{port}", server, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


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
