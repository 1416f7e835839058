"""What SIGINT and SIGTERM do while a search starts, runs and ends: it can be continued."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

from erpe.execution.callbacks import Progress

STOPS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def interruptible(draining: threading.Event, progress: Progress) -> Iterator[None]:
    """SIGINT or SIGTERM once: trials finish their epoch, and the search ends. Twice: KeyboardInterrupt."""

    def on_signal(number: int, frame: Any) -> None:
        if draining.is_set():
            raise KeyboardInterrupt
        draining.set()
        progress.on_phase("stopping")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, on_signal) for number in STOPS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def ending_at_once() -> Iterator[None]:
    """While Ray starts there is no epoch to finish: SIGINT and SIGTERM end the command, and are told to who asked.

    Ray puts its own handler of SIGTERM in place, which raises SystemExit (ray-project/ray#17308); ours comes back.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in STOPS}

    def end(number: int, frame: Any) -> None:
        told = before[signal.Signals(number)]
        if callable(told):
            told(number, frame)
        raise KeyboardInterrupt

    try:
        for number in before:
            signal.signal(number, end)
        yield
    except SystemExit:
        end(signal.SIGTERM, None)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def held_back(*others: signal.Signals) -> Iterator[None]:
    """While the block runs, nothing may cut it off: SIGINT, SIGTERM and others do what they do at its end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in (*STOPS, *others)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for late in came:
            signal.raise_signal(late)
