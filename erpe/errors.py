"""What can go wrong because of what a user gave us.

Every `ErpeError` is shown as one line: where, what was given, what to use instead. A bug of ours is no
`ErpeError` and keeps its traceback.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches

UNSENT, INTERRUPTED, UNREAD = 3, 130, 141
"""Exit codes: done, but MLflow has not got everything yet; stopped by Ctrl-C, to be continued; output closed."""

MOST_MISTAKES = 8
"""That one line tells of."""


LONG_WORD = re.compile(r"\S{300,}")
"""A value of that many characters is shown by its ends: nobody reads it, and a message is a line."""


def shortened(text: str) -> str:
    """Return a message in which words of hundreds of characters are cut in the middle."""
    return LONG_WORD.sub(lambda word: f"{word[0][:100]}...{word[0][-30:]}", text)


class ErpeError(Exception):
    """A mistake the user can correct; its text is the whole message."""

    def __str__(self) -> str:
        return shortened(super().__str__())


class ConfigError(ErpeError, ValueError):
    """A value, key or combination of values that makes no sense; or several, an argument each."""

    def __str__(self) -> str:
        mistakes = list(dict.fromkeys(map(str, self.args)))
        shown = [*mistakes[:MOST_MISTAKES], f"{len(mistakes) - MOST_MISTAKES} more"]
        return shortened("; also ".join(shown if len(mistakes) > MOST_MISTAKES else mistakes))


class ShapeError(ErpeError, ValueError):
    """A tensor of the wrong shape was given to a layer."""


class DataError(ErpeError):
    """A data set is missing, truncated or altered."""


class StoreError(ErpeError):
    """The store cannot be read or written, or another version wrote it."""


class StudyError(ErpeError):
    """The study on disk differs from the one requested, or another process is running it."""


class BusyError(StudyError):
    """Another process is running the study."""


class TrackingError(ErpeError):
    """The tracking server is down, refuses us, or is not MLflow."""


class OutputError(ErpeError):
    """What a command prints cannot be written: the disk is full, or who read it has gone."""


class TrialError(ErpeError):
    """A trial cannot go on: its loss is not finite, or its worker died too often."""


def nearest(given: str, allowed: Iterable[str]) -> str:
    """Return the end of an error line: the name that was probably meant, or all that are known."""
    names = list(dict.fromkeys(allowed))
    close = get_close_matches(given, names, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]}?"
    return f"use {either(names)}" if names else "there is none"


def either(words: Iterable[str]) -> str:
    """`tpe, gp or random`."""
    *others, last = words
    return f"{', '.join(others)} or {last}" if others else last
