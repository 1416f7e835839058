"""Ctrl-C, SIGTERM and SIGHUP: at any moment the command ends as it should, and leaves nothing behind."""

import io
import signal
import socket
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
from toys import work

from erpe.execution.callbacks import Progress
from erpe.execution.signals import STOPS, ending_at_once, held_back, interruptible, unheard_by_children
from erpe.search.run_study import run
from erpe.search.tune import tune
from erpe.store import Store
from erpe.study.plan import Plan
from erpe.study.spec import define
from erpe.tracking.tracker import Tracker

PIPES = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}


class Printing(Progress):
    """Phases, as lines of a stream."""

    def __init__(self, stream):
        self.stream = stream

    def on_phase(self, phase):
        print(phase, file=self.stream, flush=True)


class Pressed(io.RawIOBase):
    """A file; somebody presses Ctrl-C in the middle of the first line."""

    def __init__(self):
        self.said = b""

    def writable(self):
        return True

    def write(self, data):
        first, self.said = not self.said, self.said + data
        if first:
            signal.raise_signal(signal.SIGINT)
        return len(data)


@pytest.fixture(autouse=True)
def handlers(hangup):
    before = [signal.getsignal(number) for number in STOPS]
    yield
    assert [signal.getsignal(number) for number in STOPS] == before


def test_a_signal_may_come_in_the_middle_of_a_line_that_is_printed():
    """A handler that prints would raise: the stream is taken."""
    file, draining = Pressed(), threading.Event()
    stream = io.TextIOWrapper(io.BufferedWriter(file), line_buffering=True)
    with interruptible(draining, Printing(stream)):
        print("a line", file=stream)
    assert file.said == b"a line\nstopping\n" and draining.is_set()


def test_a_second_signal_may_come_while_the_first_is_handled():
    class Slow(threading.Event):
        def set(self):
            signal.raise_signal(signal.SIGTERM)
            super().set()

    with pytest.raises(KeyboardInterrupt), interruptible(Slow(), Progress()):
        signal.raise_signal(signal.SIGINT)


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        draining = threading.Event()
        with interruptible(draining, Progress()), ending_at_once(), held_back():
            signal.raise_signal(signal.SIGHUP)
        assert not draining.is_set() and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_nobody_may_end_but_their_parent_does_not_hear_a_terminal_that_is_closed():
    """As Ray's processes, without which no trial could finish its epoch."""
    with unheard_by_children():
        child = subprocess.Popen([sys.executable, "-c", "input(); print('there', flush=True); input()"], **PIPES)
    child.send_signal(signal.SIGHUP)
    assert child.communicate("\n\n", timeout=50)[0] == "there\n" and child.returncode == 0
    with subprocess.Popen([sys.executable, "-c", "input()"], **PIPES) as other:
        other.send_signal(signal.SIGHUP)
    assert other.returncode == -signal.SIGHUP


def test_a_head_that_is_gone_is_never_asked(monkeypatch):
    """Ray would wait for its answer for a minute, in which no signal comes through, and then end the process."""
    from erpe.execution.ray_tune import scheduler

    def nodes():
        raise AssertionError

    context = SimpleNamespace(get_node_id=str, gcs_address="127.0.0.1:1")
    monkeypatch.setattr(scheduler, "ray", SimpleNamespace(get_runtime_context=lambda: context, nodes=nodes))
    monkeypatch.setattr(scheduler, "LOOK_SECONDS", -1)
    link = SimpleNamespace(error=None, guarded=lambda call, otherwise: call())
    assert not scheduler.AbortStopper(link).stop_all()
    with socket.create_server(("127.0.0.1", 0)) as head, pytest.raises(AssertionError):
        context.gcs_address = f"127.0.0.1:{head.getsockname()[1]}"
        scheduler.AbortStopper(link).stop_all()


@pytest.mark.parametrize("number", STOPS)
def test_what_is_held_back_comes_at_the_end(number):
    draining, done = threading.Event(), False
    with interruptible(draining, Progress()):
        with held_back():
            signal.raise_signal(number)
            done = not draining.is_set()
        assert done and draining.is_set()
        with pytest.raises(KeyboardInterrupt), held_back():
            signal.raise_signal(number)


def searches(store, preparing):
    """Both jobs, whose data are prepared so."""
    found = work()._replace(prepare=preparing)
    yield lambda: tune(define("relu", "digits"), store, trials=1, work=found)
    plan = Plan(name="of", dataset="digits", variants=["relu"])
    yield lambda: run(plan, store, offline=True, work=found)


def test_a_search_that_a_signal_ends_before_it_began_starts_no_workers(tmp_path, without_mlflow, monkeypatch):
    monkeypatch.delattr("erpe.execution.executors.on_ray")
    for search in searches(Store.open(tmp_path), lambda: signal.raise_signal(signal.SIGTERM)):
        assert search().interrupted


@pytest.mark.timeout(60)
def test_after_a_signal_a_slow_server_is_not_waited_for(tmp_path, monkeypatch):
    """Neither after one that came before the rest is sent, nor after one that comes meanwhile."""
    monkeypatch.setattr("erpe.tracking.tracker.HURRY_SECONDS", 0.1)
    monkeypatch.setattr("erpe.tracking.publisher.Publisher.step", lambda self, *_: not self.stop.wait())
    for seconds in (0, 0.5):
        asked = threading.Event()
        threading.Timer(seconds, asked.set).start()
        assert Tracker(Store.open(tmp_path), "of").close(10**6, asked) == 1, "what is left was not counted"


def test_while_ray_is_imported_one_signal_ends_the_command(tmp_path, without_mlflow, monkeypatch):
    def start(*args):
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("it went on")

    monkeypatch.setattr("erpe.execution.executors.start", start)
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    for search in searches(Store.open(tmp_path), lambda: None):
        with pytest.raises(KeyboardInterrupt):
            search()


COMMAND = """
import atexit, signal, sys, tempfile
from erpe import __main__
number, when, folder = signal.Signals[sys.argv[1]], *sys.argv[2:]

class Importing:
    def find_spec(self, name, path, target=None):
        if name == "erpe.cli.app":
            signal.raise_signal(number)

def work(dataset):
    with tempfile.TemporaryDirectory(dir=folder):
        signal.raise_signal(number)

if when == "importing":
    sys.meta_path.insert(0, Importing())
elif when == "working":
    from erpe.cli import tables
    tables.variants_rows, sys.argv[1:] = work, ["variants"]
else:
    from erpe.cli import app
    app.main = lambda: sys.exit(3)
    atexit.register(lambda: signal.raise_signal(number))
__main__.main()
"""


@pytest.mark.parametrize("number", STOPS)
@pytest.mark.parametrize(
    ("when", "code", "said"),
    [("importing", 130, "erpe: interrupted\n"), ("working", 130, "erpe: interrupted\n"), ("ending", 3, "")],
)
def test_a_command_that_a_signal_ends_leaves_no_traceback_and_no_folder(tmp_path, number, when, code, said):
    words = [sys.executable, "-c", COMMAND, number.name, when, tmp_path]
    done = subprocess.run(words, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", said)
    assert not list(tmp_path.iterdir())
