"""What each trial printed and how it went, line by line, in `log.txt` of its folder; `erpe logs` shows it.

A worker captures what is printed and sends it with its next event; the driver writes it down. So it works wherever
trials run. What a library written in C prints past Python is in the worker's own output alone.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import threading
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from erpe.io import open_plain
from erpe.store import LOG
from erpe.text import printable, redact

if TYPE_CHECKING:
    from erpe.execution.trial_loop import TrialEvent

MOST = 16 * 2**20
"""Bytes of a log; what comes later is left out."""


class _Tee:
    """A stream that also keeps what one thread writes."""

    def __init__(self, stream: Any, kept: io.StringIO) -> None:
        self._stream, self._kept, self._thread = stream, kept, threading.get_ident()

    def write(self, text: str) -> int:
        if threading.get_ident() == self._thread:
            self._kept.write(text)
        return int(self._stream.write(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def captured() -> Iterator[io.StringIO]:
    """Keep what this thread prints and warns of in the block, which is shown as ever."""
    kept = io.StringIO()
    out: Any = _Tee(sys.stdout, kept)
    err: Any = _Tee(sys.stderr, kept)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield kept


def write_log(folder: Path, event: TrialEvent | str) -> None:
    """Append what a worker says of a trial, or a text, to its log; one that cannot be written costs no trial."""
    lines = [event] if isinstance(event, str) else _lines(event)
    now = f"{datetime.now().astimezone():%Y-%m-%d %H:%M:%S%z}"
    text = "".join(f"{now}  {each}\n" for each in redact("\n".join(lines)).splitlines())
    if not text:
        return
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        with os.fdopen(open_plain(folder / LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "a") as file:
            if file.tell() < MOST:
                file.write(text)


def _lines(event: TrialEvent) -> list[str]:
    lines = event.printed.splitlines()
    if len(event.epochs) > 1:
        lines.append(f"goes on after epoch {event.epochs[-1]['epoch']:g}")
    lines += [_measured(f"epoch {epoch['epoch']:g}", epoch) for epoch in event.epochs[-1:]]
    lines += [f"warning: {event.warning}"] if event.warning else []
    lines += [f"stopped: {event.broken}"] if event.broken else []
    return lines + ([_measured("complete", event.outcome)] if event.outcome is not None else [])


def _measured(what: str, measures: dict[str, float]) -> str:
    found = ", ".join(f"{name} {value:.6g}" for name, value in measures.items() if name != "epoch")
    return f"{what}: {found}"


def read_log(folder: Path) -> str:
    """Return a trial's log, fit for a terminal.

    Raises:
        OSError: there is none.
    """
    with os.fdopen(open_plain(folder / LOG, os.O_RDONLY), errors="replace") as file:
        return printable(redact(file.read(2 * MOST)))
