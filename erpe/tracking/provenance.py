"""Which code, versions and machine made a result: tags for every run. No torch, ray or mlflow is imported."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path

import erpe
from erpe.surroundings import cores
from erpe.text import redact, repeatable

MADE_WITH = ("cpu", "cores", "threads", "version.erpe", "version.torch", "version.python", "git_sha", "platform")
"""Tags that a published table names."""

_NAMED = ("torch", "ray", "optuna", "mlflow")


def collect(command: str, threads: int | None = None) -> dict[str, str]:
    """Tags that say where a run comes from. Call it on the driver: a Ray worker would name Ray's own script.

    Args:
        command: what was called, without its arguments, which may hold passwords: "erpe tune".
        threads: CPU threads a trial computes with; default: the cores that this process may use.
    """
    commit, dirty = _commit(Path(erpe.__file__).parent)
    return {
        "mlflow.source.name": command,
        "command": _repeated(command),
        "mlflow.source.type": "LOCAL",
        **({"mlflow.source.git.commit": commit} if commit else {}),
        "git_sha": commit or "unknown",
        "git_dirty": dirty,
        "lock_sha256": lock_hash(),
        "version.erpe": erpe.__version__,
        **{f"version.{name}": _version(name) for name in _NAMED},
        "version.python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "cores": str(cores()),
        "threads": str(threads or cores()),
    }


def made_with(tags: dict[str, str]) -> dict[str, str]:
    """Return what a study keeps of the tags of its runs."""
    return {name: tags[name] for name in MADE_WITH}


def _repeated(command: str) -> str:
    """The command line that repeats the study, without passwords; what was called, where a program called it."""
    if Path(sys.argv[0]).name not in ("erpe", "__main__.py"):
        return command
    return redact(shlex.join(["erpe", *repeatable(sys.argv[1:])]))


def differences(run: str, made: dict[str, str]) -> list[str]:
    """Say what a run was made with that is another here, where results may differ for that; a line each.

    Args:
        made: of `made_with`.
    """
    here, lines = made_with(collect("erpe train")), []
    for name in ("git_sha", "version.erpe", "version.torch"):
        if made.get(name, here[name]) != here[name]:
            what = {"git_sha": "commit"}.get(name, name.removeprefix("version."))
            lines.append(f"{run} was made with {what} {made[name][:12]}, this is {here[name][:12]}: results may differ")
    return lines


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"  # a machine that trains needs neither Ray nor MLflow


def cpu_name() -> str:
    """As the kernel calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def lock_hash() -> str:
    """SHA-256 of `infra/constraints.txt`; where erpe is installed without it, of the versions that are installed."""
    lock = Path(erpe.__file__).parents[1] / "infra" / "constraints.txt"
    if lock.exists():
        return hashlib.sha256(lock.read_bytes()).hexdigest()
    installed = sorted({f"{item.metadata['Name']}=={item.version}".lower() for item in distributions()})
    return hashlib.sha256("\n".join(installed).encode()).hexdigest()


def _commit(folder: Path) -> tuple[str, str]:
    """Commit of the repository that holds this code, and "true", "false" or "unknown" for changes since."""

    # GIT_DIR and the like name the repository that someone works on. The owner of this one need not be us: git then
    # refuses, so that no foreign hooks run, but the code that is there runs already.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-c", "safe.directory=*", "-C", str(folder)]

    def git(*words: str) -> str:
        run = subprocess.run(
            [*command, *words], env=environment, capture_output=True, text=True, timeout=10, check=True
        )
        return run.stdout.strip()

    try:
        if not git("ls-files", "--", "__init__.py"):
            return "", "unknown"  # installed inside someone else's repository
        return git("rev-parse", "HEAD"), "true" if git("status", "--porcelain", "--", str(folder)) else "false"
    except (OSError, subprocess.SubprocessError):
        return "", "unknown"
