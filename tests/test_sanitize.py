"""The kernels write nowhere but where they may: the sanitizers of gcc say so."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "infra" / "sanitize"


def has_sanitizers():
    """gcc answers with a whole path where it has the library."""
    if not shutil.which("gcc"):
        return False
    answer = subprocess.run(["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout
    return Path(answer.strip()).is_absolute()


if has_sanitizers():

    @pytest.mark.slow
    def test_sanitizers_find_nothing_in_the_kernels():
        environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([SCRIPT, "40"], capture_output=True, text=True, env=environment)
        assert done.stdout.splitlines()[-1:] == ["clean"], done.stdout + done.stderr
