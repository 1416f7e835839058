"""The stack that docker-compose.yml describes, as processes, for the tests of this folder."""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from clone import Shell, project
from engine import PROGRAMS, ROOT

sys.path.insert(0, str(ROOT / "tests/chaos"))  # for its books


@pytest.fixture(scope="module")
def shell():
    """A clone with its secrets, whose stack is up with one worker that runs one trial at a time."""
    if not sys.platform.startswith("linux") or not shutil.which("initdb", path=os.pathsep.join(PROGRAMS)):
        pytest.skip("no Linux, or no PostgreSQL on this machine")
    # Not below pytest's own folder, which is closed to PostgreSQL's user; and short, for Ray's sockets.
    with tempfile.TemporaryDirectory(prefix="erpe-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "state").mkdir()
        (folder / "erpe").mkdir()
        shell = Shell(project(folder / "erpe"), folder / "state", RAY_WORKER_CPUS="1", MLFLOW_WORKERS="1")
        shell("infra/secrets")
        try:
            shell("docker compose up -d")
            yield shell
        finally:
            shell.end()
