"""Processes forked from one that has loaded Python's heavy modules: real to the kernel, and there 8 seconds sooner."""

import multiprocessing
import os
import signal
import subprocess
from contextlib import suppress

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "erpe.search.tune", "erpe.training.trial", "erpe.tracking.mlflow_calls", "torch._dynamo", "mlflow.tracking",
        "mlflow.store.tracking.sqlalchemy_store", "optuna.storages", "optuna.visualization", "matplotlib.pyplot",
        "optuna.importance", "psycopg",
        # An MLflow server, but for mlflow.server itself, which reads its environment when it is imported.
        "mlflow.cli", "mlflow.genai.judges", "mlflow.assistant.providers",
        "mlflow.store.model_registry.sqlalchemy_store",
        "fastapi", "flask", "uvicorn.main", "prometheus_client",
    ]
)  # fmt: skip


def in_child(function, arguments, environment, log, folder):
    """A session of its own, its output in a file."""
    os.setsid()
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(out, stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    function(*arguments)


class Fork:
    """A function in a process of its own; as `subprocess.Popen`, as far as it is needed here."""

    def __init__(self, function, arguments, environment, log, folder="."):
        log.touch()
        given = (function, arguments, environment, log.absolute(), os.path.abspath(folder))
        self._process = FORKS.Process(target=in_child, args=given, daemon=True)
        self._process.start()
        self.pid = self._process.pid

    def poll(self):
        """Its exit code; nothing while it runs."""
        return self._process.exitcode

    def wait(self, seconds=None):
        """Its exit code."""
        self._process.join(seconds)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("a fork", seconds)
        return self._process.exitcode

    def send_signal(self, number):
        """Unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def end(self):
        """SIGKILL, to it and its children."""
        for kill in (os.killpg, os.kill):  # its session may not have begun
            with suppress(ProcessLookupError):
                kill(self.pid, signal.SIGKILL)
        self.wait()
