"""The streams of a command: what a terminal cannot show has a stand-in, and what cannot be written is one line."""

from __future__ import annotations

import codecs
import io
import os
import sys
from typing import Any, TextIO

from erpe.errors import OutputError

STAND_INS = {"·": "|", "█": "#", "…": "...", "±": "+-", "×": "x", "→": "->"}
"""Of characters that the terminal's encoding lacks; others are shown as escapes."""


def open_streams() -> None:
    """Put streams in place of stdout and stderr that fail as an `OutputError`, or not at all.

    A reader of results must know that some are missing; a study does not end because its output was closed.
    """
    codecs.register_error("stand_in", _stand_in)
    sys.stdout = _stream(sys.stdout, required=True)
    sys.stderr = _stream(sys.stderr, required=False)


def close_output() -> None:
    """Send what is left in the buffer nowhere: Python would try again at its end, and complain."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)


def _stream(given: TextIO | None, *, required: bool) -> TextIO:
    if not isinstance(given, io.TextIOWrapper):  # None where the descriptor was closed before we began
        return given or io.StringIO()
    raw = io.BufferedWriter(_Descriptor(given.fileno(), required))
    return io.TextIOWrapper(raw, given.encoding, "stand_in", line_buffering=given.line_buffering)


class _Descriptor(io.FileIO):
    def __init__(self, number: int, required: bool) -> None:
        super().__init__(number, "w", closefd=False)
        self._required = required

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if self._required:
                raise OutputError(f"standard output: cannot be written ({error.strerror})") from error
            return len(data)


def _stand_in(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(STAND_INS.get(c) or c.encode("unicode_escape").decode() for c in text), error.end
