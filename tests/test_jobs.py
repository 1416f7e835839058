"""Handing commands to a Ray cluster, as far as no cluster is needed; tests/stack has one."""

from __future__ import annotations

import socket
import subprocess
import sys
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest

from erpe.execution.ray_tune.cluster import start
from erpe.execution.ray_tune.jobs import JobError, Jobs

TOKEN = "0123456789abcdef"


def erpe(*words, **environment):
    """What it says and its exit code."""
    done = subprocess.run(
        [sys.executable, "-m", "erpe", *words], capture_output=True, text=True,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path)} | environment,
    )  # fmt: skip
    return done.returncode, done.stderr.strip() or done.stdout.strip()


@contextmanager
def answering(status, body=b"", **headers):
    """A server that answers all requests alike; its address and the headers it got."""
    got = []

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            got.append(dict(self.headers))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *about):
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", got
        server.shutdown()


@pytest.fixture(autouse=True)
def token(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        (["ui"], 1, "ui: is for this machine"),
        (["jobs", "list"], 1, "jobs: is for this machine"),
        (["tunes"], 2, "did you mean tune?"),
        (["study"], 2, "use run, show, status or schema"),
        (["tune", "--variants", "relu"], 2, "No such option"),
        (["study", "run"], 2, "erpe study run: Missing argument"),
        (["tune", "-v", "relu", "-d", "digits"], 1, "no response"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_command_that_makes_no_sense_is_told_before_it_is_sent(words, code, line):
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    found, said = erpe("submit", *words, ERPE_RAY_JOBS=f"http://127.0.0.1:{port}")
    assert found == code and line in said
    assert len(said.splitlines()) == 1


def test_no_secret_is_sent_in_a_command(monkeypatch):
    with answering(200, b"{}") as (address, got):
        for word in (f"--name={TOKEN}", "postgresql://me:mine@host/optuna"):
            with pytest.raises(JobError, match="has a secret in it") as caught:
                Jobs(address).submit(["tune", word])
            assert word not in str(caught.value)
    assert not got


def test_the_token_goes_to_the_head_and_nowhere_else():
    with (
        answering(200, b"[]") as (elsewhere, there),
        answering(302, Location=f"{elsewhere}/api/jobs/") as (address, here),
        pytest.raises(JobError, match="answers 302"),
    ):
        Jobs(address).all()
    assert here[0]["Authorization"] == f"Bearer {TOKEN}" and not there


@pytest.mark.parametrize(
    ("status", "body", "line"),
    [
        (401, b"", "does not know our token"),
        (403, b"", "does not know our token"),
        (404, b"", "no job mine; `erpe jobs list` shows those"),
        (200, b"<html>", "is not the head of a Ray cluster"),
        (500, b"Traceback\n  a line\nNo agent", r"answers 500 \(No agent\)"),
    ],
)
def test_what_a_head_refuses_is_one_line(status, body, line):
    with answering(status, body) as (address, _), pytest.raises(JobError, match=line) as caught:
        Jobs(address).one("mine")
    assert len(str(caught.value).splitlines()) == 1


def test_a_head_without_our_token_says_what_would_do(monkeypatch, tmp_path):
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    with answering(401) as (address, got), pytest.raises(JobError, match=r"asks for a token.* RAY_AUTH_TOKEN_PATH"):
        Jobs(address).all()
    assert "Authorization" not in got[0]
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(JobError, match="cannot be read"):
        Jobs(address)


def test_a_wrong_token_is_told_before_a_node_that_joins_with_it_gives_up(monkeypatch):
    monkeypatch.setenv("ERPE_RAY_START", "0")
    with answering(401) as (url, _), socket.create_server(("127.0.0.1", 0)) as head:
        monkeypatch.setenv("ERPE_RAY_JOBS", url)
        with pytest.raises(JobError, match="it does not know our token"):
            start(f"127.0.0.1:{head.getsockname()[1]}", 0, "")
    Jobs("http://127.0.0.1:1").check_token()  # who does not respond may still have the cluster beside it
