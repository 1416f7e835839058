"""The Python face: `erpe.tune`, `erpe.train`, `erpe.run_study`."""

from __future__ import annotations

import doctest
from functools import partial

import pytest

import erpe
from erpe.tracking.tracker import Tracker


@pytest.fixture
def outbox_only(monkeypatch):
    """Everything is recorded, nothing is sent to MLflow."""
    monkeypatch.setattr("erpe.tracking.tracker.Tracker", partial(Tracker, send=False))


@pytest.mark.parametrize("name", ["tune", "train", "run_study"])
def test_the_examples_of_the_functions_say_what_happens(name, tmp_path, monkeypatch, outbox_only):
    monkeypatch.chdir(tmp_path)
    (example,) = doctest.DocTestFinder(recurse=False).find(getattr(erpe, name), name)
    assert doctest.DocTestRunner().run(example) == (0, len(example.examples))
