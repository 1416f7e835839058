"""End a search on SIGINT or SIGTERM so that it can be continued."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

from erpe.execution.callbacks import Progress


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
    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
