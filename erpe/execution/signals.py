"""What SIGINT, SIGTERM and SIGHUP do while a search starts, runs and ends: it can be continued."""

from __future__ import annotations

import contextlib
import queue
import signal
import threading
from collections.abc import Iterator
from typing import Any

from erpe.execution.callbacks import Progress

STOPS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
"""SIGINT last: the first one after its own handler is back raises, and the others must be back by then."""


def _handlers() -> dict[signal.Signals, Any]:
    """Signal -> its handler, of those that stop a command; one that `nohup` or a host of Python has taken is left."""
    found = {number: signal.getsignal(number) for number in STOPS}
    ignored = found[signal.SIGHUP] is signal.SIG_IGN
    return {n: had for n, had in found.items() if had is not None and not (n is signal.SIGHUP and ignored)}


@contextlib.contextmanager
def _handled(handler: Any) -> Iterator[None]:
    """While the block runs, this handles the signals that stop a command; what did before comes back."""
    before = _handlers()
    try:
        for number in before:
            signal.signal(number, handler)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def interruptible(draining: threading.Event, progress: Progress) -> Iterator[None]:
    """A signal once: trials finish their epoch, and the search ends. Twice: KeyboardInterrupt.

    It comes anywhere, in the middle of a line that is printed, too: the handler only notes it, and a thread tells.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    phases: queue.SimpleQueue[str] = queue.SimpleQueue()  # its `put` may be cut off by another one

    def on_signal(number: int, frame: Any) -> None:
        if came:
            raise KeyboardInterrupt
        came.append(number)
        draining.set()
        phases.put("stopping")

    def tell() -> None:
        if phase := phases.get():
            progress.on_phase(phase)

    telling = threading.Thread(target=tell, daemon=True)
    telling.start()
    try:
        with _handled(on_signal):
            yield
    finally:
        phases.put("")
        telling.join()


@contextlib.contextmanager
def ending_at_once() -> Iterator[None]:
    """While Ray starts there is no epoch to finish: a signal ends the command, and is told to who handled it before.

    Ray puts its own handler of SIGTERM in place, which raises SystemExit (ray-project/ray#17308); ours comes back.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = _handlers()

    def end(number: int, frame: Any) -> None:
        told = before[signal.Signals(number)]
        if callable(told):
            told(number, frame)
        raise KeyboardInterrupt

    try:
        with _handled(end):
            yield
    except SystemExit:
        end(signal.SIGTERM, None)


@contextlib.contextmanager
def unheard_by_children() -> Iterator[None]:
    """Processes that the block starts do not hear SIGHUP: they end when their parent ends them.

    A terminal that is closed sends it to all; without them, no trial could finish its epoch.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """While the block runs, no signal cuts it off: it does at the end what it would have done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    try:
        with _handled(lambda number, frame: came.append(number)):
            yield
    finally:
        for late in came:
            signal.raise_signal(late)
