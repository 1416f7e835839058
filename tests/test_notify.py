"""A message when a study ends, fails or stalls, and no word of where it goes."""

from __future__ import annotations

import json
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from queue import Queue
from threading import Thread

import pytest
from trials import Notes

from erpe.cli.tables import continuation
from erpe.errors import ConfigError, StudyError
from erpe.execution.callbacks import Progress
from erpe.notify import notified
from erpe.tracking.provenance import collect

SECRET = "t0ps3cr3t"


@pytest.fixture
def inbox():
    """Where an address of apprise leads to -> (address, messages)."""
    found = Queue()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            found.put(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["message"])
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"json://me:{SECRET}@127.0.0.1:{server.server_port}", found
        server.shutdown()


def test_the_end_a_failure_and_a_stop_are_told(inbox):
    address, messages = inbox
    with notified(address, "a", Progress()):
        pass
    with notified(address, "b", Progress()) as progress:
        progress.on_phase("stopping")
    with pytest.raises(StudyError), notified(address, "c", Progress()):
        raise StudyError("postgresql://me:hunter2@host/db is away\nfor now")
    assert messages.get(timeout=30) == "a: ended; erpe status shows more"
    assert messages.get(timeout=30) == "b: stopped, the same command continues it; erpe status shows more"
    assert messages.get(timeout=30) == "c: failed: postgresql://host/db is away"


def test_a_stall_is_told_once_until_something_is_heard(inbox):
    address, messages = inbox
    with notified(address, "a", Progress(), quiet=0.05) as progress:
        assert messages.get(timeout=30).startswith("a: stalled, silent for 0 min")
        progress.on_phase("test")
        assert messages.get(timeout=30).startswith("a: stalled")
    assert messages.get(timeout=30).startswith("a: ended") and messages.empty()


def test_a_command_gets_the_message_and_one_that_fails_is_a_warning(tmp_path):
    write = tmp_path / "write.py"
    write.write_text(f"import sys; open({str(tmp_path / 'told')!r}, 'w').write(sys.argv[1])")
    with notified(f"{sys.executable} {write}", "a", Progress()):
        pass
    assert (tmp_path / "told").read_text() == "a: ended; erpe status shows more"
    notes = Notes()
    with notified(f"{sys.executable} nowhere.py", "a", notes):
        pass
    assert notes.said == ["notify: a message could not be sent"]


@pytest.mark.parametrize("target", [f"nonsense://{SECRET}", f"no-such-program --password {SECRET}", " "])
def test_an_address_that_leads_nowhere_is_told_before_anything_runs_without_its_secrets(target):
    with pytest.raises(ConfigError, match="notify: ") as error, notified(target, "a", Progress()):
        raise AssertionError("ran")
    assert SECRET not in str(error.value)


def test_the_address_is_kept_nowhere(monkeypatch):
    for given in (["--notify", f"json://x/{SECRET}"], [f"--notify=json://x/{SECRET}"]):
        words = ["erpe", "tune", *given, "--new", "-v", "relu"]
        monkeypatch.setattr(sys, "argv", words)
        assert collect("erpe tune")["command"] == "erpe tune -v relu"
        assert continuation(words).endswith("erpe tune -v relu")
