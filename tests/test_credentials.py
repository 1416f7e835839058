"""Passwords come from files, too; whoever is refused is told why, and the doctor says how to fix it."""

import json
import os
import socket
import sys

import pytest

from erpe.cli import app
from erpe.credentials import NAMES, read_secret_files
from erpe.errors import ConfigError
from erpe.store import Store
from erpe.tracking.connection import _judge


@pytest.fixture(autouse=True)
def signed_out(monkeypatch):
    for name in (*NAMES, *(f"{name}_FILE" for name in NAMES), "ERPE_RAY_ADDRESS"):
        monkeypatch.setenv(name, "")  # so that what is read is forgotten afterwards
        monkeypatch.delenv(name)


@pytest.mark.parametrize("name", NAMES)
def test_a_secret_is_read_from_the_file_that_the_environment_names(name, monkeypatch, tmp_path):
    (tmp_path / "secret").write_text("from a file\n")
    monkeypatch.setenv(f"{name}_FILE", str(tmp_path / "secret"))
    Store.open(tmp_path / "store")
    assert os.environ[name] == "from a file"


def test_what_the_environment_holds_itself_comes_first(monkeypatch, tmp_path):
    monkeypatch.setenv("PGPASSWORD", "given")
    monkeypatch.setenv("PGPASSWORD_FILE", str(tmp_path / "none"))
    read_secret_files()
    assert os.environ["PGPASSWORD"] == "given"


@pytest.mark.parametrize(("content", "why"), [(None, "No such file"), (b"", "empty"), (b"\xff\xfe", "no text")])
def test_a_secret_that_cannot_be_read_is_one_line_that_names_its_file(content, why, monkeypatch, tmp_path):
    if content is not None:
        (tmp_path / "secret").write_bytes(content)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD_FILE", str(tmp_path / "secret"))
    with pytest.raises(ConfigError, match=f"MLFLOW_TRACKING_PASSWORD_FILE .*secret: .*{why}"):
        read_secret_files()


def test_no_login_and_a_wrong_one_are_told_apart():
    assert "wants a login (401)" in _judge("server", 401, "", "").fact
    assert "does not know me with this password (401)" in _judge("server", 401, "", "me").fact


@pytest.fixture
def closed_port():
    """Nobody listens there."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    return port


@pytest.mark.slow
def test_the_doctor_asks_every_service_though_others_are_away(closed_port, monkeypatch, tmp_path, capfd):
    """None of them stops the next, and each says how to fix it."""
    monkeypatch.setattr("erpe.study.storage.OPENING_SECONDS", 0)
    monkeypatch.setenv("ERPE_STORAGE_URL", f"postgresql+psycopg://me@127.0.0.1:{closed_port}/optuna")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{closed_port}")
    monkeypatch.setenv("ERPE_RAY_ADDRESS", f"127.0.0.1:{closed_port}")
    monkeypatch.setattr(sys, "argv", ["erpe", "doctor", "--json", "--store", str(tmp_path / "store")])
    with pytest.raises(SystemExit, match="1"):
        app.main()
    found = {each["what"]: each for each in json.loads(capfd.readouterr().out)}
    wrong = {what: each["text"] for what, each in found.items() if each["state"] == "wrong"}
    assert wrong.keys() == {"studies", "tracking", "ray cluster"}
    assert "refused" in wrong["studies"] and "no answer" in wrong["tracking"]
    assert "is the cluster up?" in wrong["ray cluster"]
    assert not (tmp_path / "store").exists(), "looking made a store"
