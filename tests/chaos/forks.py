"""`erpe` in a process forked from one that has loaded its modules: real to the kernel, and there 8 seconds sooner."""

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "erpe.search.tune", "erpe.training.trial", "erpe.tracking.projection", "torch._dynamo", "mlflow.tracking",
        "mlflow.store.tracking.sqlalchemy_store", "optuna.storages", "optuna.visualization", "matplotlib.pyplot",
        "optuna.importance", "psycopg",
    ]
)  # fmt: skip


def run(arguments, changes, log):
    """In the child: the command, in a session of its own, its output in a file."""
    os.setsid()
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(out, stream)
    os.environ.update(changes)
    sys.path.insert(0, str(Path(__file__).parent / "inject"))
    import accidents

    accidents.arm()
    sys.argv = ["erpe", *arguments]
    from erpe.cli.app import main

    main()


class Fork:
    """As `subprocess.Popen`, as far as it is needed here."""

    def __init__(self, arguments, changes, log):
        log.touch()
        self._process = FORKS.Process(target=run, args=(arguments, changes, log))
        self._process.start()
        self.pid = self._process.pid

    def poll(self):
        """Its exit code; nothing while it runs."""
        return self._process.exitcode

    def wait(self, seconds=None):
        """Its exit code."""
        self._process.join(seconds)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("erpe", seconds)
        return self._process.exitcode

    def send_signal(self, number):
        """Unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)
