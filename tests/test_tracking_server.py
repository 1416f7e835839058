"""A tracking server that is down, comes back, refuses, or is none."""

import shutil
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from forks import Fork
from mlflow_server import free_port, hanging_server, mlflow_server, rows
from told import EXPECTED, STUDY, driver, environment, epoch, metrics, play

from erpe.errors import TrackingError
from erpe.store import Store
from erpe.study.reading import read_studies
from erpe.tracking.connection import probe
from erpe.tracking.tracker import sync
from erpe.tracking.waiting import lags

slow = pytest.mark.slow


@pytest.fixture
def store(tmp_path, monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "ERPE_STORAGE_URL"):
        monkeypatch.delenv(name, raising=False)
    return Store.open(tmp_path / "store")


@pytest.fixture(scope="module")
def server(tmp_path_factory, empty_database):
    """A server that answers as localhost, and refuses whoever calls it 127.0.0.1: its database and its port."""
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(empty_database, folder / "server.db")
    with mlflow_server(folder / "server.db", folder / "served", allowed_hosts="localhost:*") as url:
        yield folder / "server.db", int(url.rpartition(":")[2])


@slow
def test_what_was_told_while_the_server_was_down_arrives_when_it_is_up(store, empty_database, tmp_path, monkeypatch):
    database, port = tmp_path / "server.db", free_port()
    shutil.copy(empty_database, database)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    monkeypatch.setattr("erpe.tracking.tracker.LONGEST_PAUSE", 1.0)
    with driver(store) as controller:
        play(controller, files=True)
        time.sleep(1)
        tracker = controller.tracker
        assert tracker.lag() and tracker.problem is None and not rows(database, "SELECT * FROM runs")
        with mlflow_server(database, tmp_path / "served", port):
            assert tracker.close(90) == 0, tracker.problem
    assert metrics(database) == EXPECTED
    assert rows(database, "SELECT count(*) FROM model_versions") == [(1,)]


def test_who_syncs_with_a_server_that_is_down_is_not_told_to_sync(store, monkeypatch):
    with driver(store, send=False) as controller:
        controller.next_trial()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(TrackingError, match=r"no answer .*; start it, or name another with MLFLOW_TRACKING_URI"):
        sync(store)


HELD = """
import sys, tracemalloc
sys.path.insert(0, {tests!r})
from told import STUDY, driver
from erpe.store import Store
from erpe.tracking.connection import probe
with driver(Store.open({store!r}), trials=6) as controller:
    tracker, held = controller.tracker, {{}}
    def tell(trials):
        for _ in range(trials):
            trial = controller.next_trial()
            for step in range(1, 201):
                measures = dict.fromkeys(("train/loss", "val/loss", "val/accuracy", "lr"), 0.5)
                tracker.epoch(STUDY, trial, measures | {{"epoch": float(step)}})
    tell(1)
    assert "no answer" in probe(controller.store.tracking_uri)  # and loads what takes more than all epochs
    tracemalloc.start()
    tell(5)
    growth, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert tracker.lag() == 1 + 6 * 201
print(growth)
"""


@slow
def test_memory_stays_bounded_while_a_server_accepts_and_never_answers(store, tmp_path):
    """What waits is on disk; of an epoch some bytes are in memory. No thread of another test is counted."""
    with hanging_server() as silent:
        script = HELD.format(store=str(store.root), tests=str(Path(__file__).parent))
        told = Fork(exec, (script, {}), environment() | {"MLFLOW_TRACKING_URI": silent}, tmp_path / "log")
        assert told.wait() == 0, (tmp_path / "log").read_text()
    assert int((tmp_path / "log").read_text()) < 1000 * 500


TELLER = """
import sys
sys.path.insert(0, {tests!r})
from told import TrialEvent, driver, epoch
from erpe.store import Store
with driver(Store.open({store!r}), "killed", trials=6) as controller:
    while trial := controller.next_trial():
        for step in range(1, 51):
            epoch(controller, trial, step)
        controller.on_trial_result(trial, TrialEvent(outcome={{"params": 1.0}}))
    sys.exit(controller.tracker.close(120))
"""


@slow
def test_a_publisher_killed_in_the_middle_again_and_again_shows_everything_once(store, server, tmp_path):
    database, port = server
    script = TELLER.format(store=str(store.root), tests=str(Path(__file__).parent))
    with_server = environment() | {"MLFLOW_TRACKING_URI": f"http://localhost:{port}"}

    def arrived():
        return sum(map(len, metrics(database, "killed").values()))

    def told():
        return Fork(exec, (script, {}), with_server, tmp_path / "log")

    for _ in range(3):
        teller, before = told(), arrived()
        while arrived() == before and teller.poll() is None:
            time.sleep(0.01)
        teller.end()  # some of what it was sending has arrived
    assert told().wait() == 0, (tmp_path / "log").read_text()
    found, numbers = metrics(database, "killed"), [trial.number for trial in read_studies(store)[0].trials]
    assert len(numbers) == 6
    for n in numbers:
        value = [(step, step / 10 + n / 100) for step in range(1, 51)]
        assert found[f"killed/{n}", "val/accuracy"] == value and found[f"killed/{n}", "params"] == [(50, 1.0)]
        assert found[f"killed/{n}", "train/loss"] == [(step, 1 / step) for step in range(1, 51)]
    runs = "SELECT count(*) FROM runs JOIN experiments e USING (experiment_id) WHERE e.name = 'killed'"
    assert rows(database, runs) == [(7,)]


@slow
def test_a_server_that_refuses_our_host_is_one_line_and_nothing_is_lost(store, server, monkeypatch):
    database, port = server
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:hunter22@127.0.0.1:{port}")
    with driver(store) as controller:
        play(controller)
        tracker = controller.tracker
        assert tracker.close(60) == lags(store)[STUDY] > 0
    assert "(403)" in tracker.problem and "allowed-hosts" in tracker.problem and "\n" not in tracker.problem
    with pytest.raises(TrackingError, match="403") as error:
        sync(store)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:hunter22@localhost:{port}")
    assert sync(store) == {STUDY: 0}
    assert metrics(database) == EXPECTED
    kept = b"".join(path.read_bytes() for path in (*store.tracking.iterdir(), database))
    assert b"hunter22" not in kept and "hunter22" not in tracker.problem + str(error.value)


@contextmanager
def http_server(answer, asked=None):
    """A web server that is not MLflow; `asked` is set as soon as it was."""
    asked = asked or threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            status, kind, body = answer
            asked.set()
            if status is None:
                return time.sleep(60)
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@slow
@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ((200, "text/html", b"<html>hello</html>"), "not MLflow"),
        ((404, "text/html", b"nothing here"), "not MLflow"),
        ((401, "text/plain", b"who are you"), "login"),
        ((403, "text/plain", b"no"), "403"),
        ((503, "text/plain", b"starting"), None),
    ],
)
def test_another_server_is_one_line_and_nothing_is_lost(store, monkeypatch, answer, told):
    with http_server(answer) as url:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        with driver(store, trials=1) as controller:
            tracker = controller.tracker
            epoch(controller, controller.next_trial(), 1)
            until = time.monotonic() + (60 if told else 1)
            while tracker.problem is None and time.monotonic() < until:
                time.sleep(0.05)
            assert tracker.close(0) == 3
            if told:
                assert told in tracker.problem and url in tracker.problem and "\n" not in tracker.problem
            else:
                assert tracker.problem is None and "503" in probe(url)


@slow
@pytest.mark.timeout(60)
def test_a_server_that_never_answers_holds_nobody_up(store, monkeypatch):
    asked = threading.Event()
    with http_server((None, "", b""), asked) as url:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        with driver(store, trials=1) as controller:
            trial = controller.next_trial()
            epoch(controller, trial, 1)
            assert asked.wait(30)  # the publisher hangs in its first call
            for step in range(2, 50):
                epoch(controller, trial, step)
            assert controller.tracker.close(1) == 49 + 2
