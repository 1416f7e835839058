"""A clone of this repository, as far as the stack needs one, and a shell in it where `docker` is ours."""

import os
import shutil
import subprocess
import time

from engine import PROGRAMS, ROOT, Stack


def project(folder):
    """A clone, as far as the stack needs one."""
    shutil.copytree(ROOT / "infra", folder / "infra", ignore=shutil.ignore_patterns("pictures"))
    shutil.copytree(ROOT / "studies", folder / "studies", ignore=shutil.ignore_patterns("results"))
    shutil.copy(ROOT / "docker-compose.yml", folder)
    return folder


class Shell:
    """Command lines in a clone, where `docker` is ours."""

    def __init__(self, project, state, **environment):
        self.project, self.state, self.started = project, state, []
        path = os.pathsep.join([str(ROOT / "tests/stack"), *PROGRAMS, os.environ["PATH"]])
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("ERPE_", "MLFLOW_", "RAY_"))}
        self.environment = kept | {"PATH": path, "ERPE_STACK": str(state)} | environment

    def start(self, line, log):
        """In the background, its words in a file."""
        with log.open("wb") as out:
            process = subprocess.Popen(
                ["bash", "-c", f"exec {line}"], cwd=self.project, env=self.environment, stdin=subprocess.DEVNULL,
                stdout=out, stderr=out,
            )  # fmt: skip
        self.started.append(process)
        return process

    def __call__(self, line, code=0):
        """In the foreground -> what it printed; it must end with this code."""
        began = time.monotonic()
        done = subprocess.run(
            ["bash", "-c", line], cwd=self.project, env=self.environment, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        print(f"{time.monotonic() - began:6.1f} s  $ {line}")  # what pytest shows of a test that fails, or with -s
        assert done.returncode == code, f"{line}: {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return done.stdout + done.stderr

    def end(self):
        """Nothing of it runs or is kept."""
        self.stack.down(volumes=True)
        for process in self.started:
            process.wait()

    @property
    def stack(self):
        """Its services."""
        return Stack(self.project, self.state)
