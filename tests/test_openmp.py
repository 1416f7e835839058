"""Threads of whatever trains sleep while they wait: OpenMP is told before torch loads it, as the user wants it."""

import os
import re
import subprocess
import sys

import pytest

WATCH = """
import os, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"), flush=True)
            os._exit(0)

sys.meta_path.insert(0, Watch())
"""
COMMAND = "import runpy\nsys.argv = ['erpe', *{!r}.split()]\nrunpy.run_module('erpe', run_name='__main__')"
WAYS = {
    "train": COMMAND.format("train -v relu -d digits"),
    "tune": COMMAND.format("tune -v relu -d digits --executor inline"),
    "bench": COMMAND.format("bench train -v relu"),
    "training": "from erpe.training.trial import Trial",
    "model": "from erpe.model import build",
}


def run(program, folder, **environment):
    """What a Python process prints and warns of whose environment has nothing else for OpenMP's threads."""
    inherited = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, env=inherited | environment, capture_output=True, text=True
    )
    assert not done.returncode, done.stderr
    return done.stdout.strip(), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_threads_sleep_whatever_loads_torch(tmp_path, way):
    assert run(WATCH + WAYS[way], tmp_path)[0] == "PASSIVE"


@pytest.mark.parametrize("way", ["train", "training"])
def test_what_the_user_set_stays(tmp_path, way):
    assert run(WATCH + WAYS[way], tmp_path, OMP_WAIT_POLICY="ACTIVE")[0] == "ACTIVE"


@pytest.mark.slow
def test_a_torch_that_is_loaded_has_read_it_and_nothing_pretends_otherwise(tmp_path):
    said, _ = run("import os, torch, erpe\nprint(os.environ.get('OMP_WAIT_POLICY'))", tmp_path)
    assert said == "None"


@pytest.mark.slow
def test_openmp_itself_has_read_it(tmp_path):
    _, said = run("import erpe, torch", tmp_path, OMP_DISPLAY_ENV="true")
    assert re.search(r"OMP_WAIT_POLICY\s*=\s*'PASSIVE'", said), said
