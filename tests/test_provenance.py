"""A run names the commit of the code that made it, whatever git is told and whoever owns the checkout."""

import os
import shutil
import subprocess

import pytest

import erpe
from erpe.tracking.provenance import collect

NOBODY = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}


def git(folder, *words):
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    found = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")} | NOBODY
    run = subprocess.run(["git", *author, "-C", folder, *words], env=found, capture_output=True, text=True, check=True)
    return run.stdout.strip()


def repository(folder):
    """The package in a repository of its own, and its commit."""
    (folder / "erpe").mkdir(parents=True)
    (folder / "erpe" / "__init__.py").write_text(f"# {folder.name}")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "First")
    return git(folder, "rev-parse", "HEAD")


@pytest.fixture
def commit(tmp_path, monkeypatch):
    made = repository(tmp_path / "ours")
    monkeypatch.setattr(erpe, "__file__", str(tmp_path / "ours" / "erpe" / "__init__.py"))
    return made


def test_it_is_the_commit_of_the_code(commit, tmp_path):
    found = collect("erpe tune")
    assert (found["git_sha"], found["mlflow.source.git.commit"], found["git_dirty"]) == (commit, commit, "false")
    (tmp_path / "ours" / "erpe" / "new.py").touch()
    assert collect("erpe tune")["git_dirty"] == "true"


def test_a_repository_that_the_environment_names_is_not_asked(commit, tmp_path, monkeypatch):
    other = repository(tmp_path / "theirs")
    for name, value in {"GIT_DIR": ".git", "GIT_WORK_TREE": "", "GIT_INDEX_FILE": ".git/index"}.items():
        monkeypatch.setenv(name, str(tmp_path / "theirs" / value))
    assert commit != other and collect("erpe tune")["git_sha"] == commit


def test_a_checkout_of_another_user_has_its_commit(commit, tmp_path, monkeypatch):
    stranger = tmp_path / "bin" / "git"  # git's own switch for its tests: every repository is someone else's
    stranger.parent.mkdir()
    stranger.write_text(f'#!/bin/sh\nGIT_TEST_ASSUME_DIFFERENT_OWNER=1 exec {shutil.which("git")} "$@"\n')
    stranger.chmod(0o755)
    monkeypatch.setenv("PATH", str(stranger.parent), prepend=os.pathsep)
    assert subprocess.run(["git", "-C", tmp_path / "ours", "status"], capture_output=True).returncode == 128
    found = collect("erpe tune")
    assert (found["git_sha"], found["git_dirty"]) == (commit, "false")
