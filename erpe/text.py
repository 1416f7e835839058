"""What erpe tells: text without secrets, and without commands to the terminal that shows it.

Names, reasons and messages come from stores and servers that others may have written.
"""

from __future__ import annotations

import os
import re
from typing import Any
from urllib.parse import unquote

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

SHORTEST = 6
"""Characters of a secret that is looked for by its value: a shorter one would be found in ordinary words."""

LONGEST_WORD = 20
"""Characters of a word that a table keeps in one line."""

_SECRET_NAME = re.compile(r"PASSWORD|PASSWD|TOKEN|SECRET|CREDENTIAL|(^|_)(API|ACCESS|ACCOUNT|PRIVATE)?_?KEY(_|$)", re.I)
_NOT_SECRET = re.compile(r"PATH$|FILE$|_ID$", re.I)
_USER = re.compile(r"(\w+://)(?!/)(?:[^\s'\"/]*@|[^\s'\"/:]*:(?!\d+(?:/|$))[^\s'\"]*@)")
"""User and password of a URL: up to the last @ before the path, or of a password with a slash in it."""

_IN_QUERY = re.compile(r"([?&;][^=&;\s]*(?:password|passwd|passfile|token|secret|key)[^=&;\s]*=)[^&;\s'\"]+", re.I)


def redact(text: str) -> str:
    """Return a message or a URL without users and passwords of URLs, and without the secrets of the environment."""
    text = _IN_QUERY.sub(r"\1***", _USER.sub(r"\1", text))
    for secret in secrets():
        text = text.replace(secret, "***")
    return text


def secrets() -> list[str]:
    """Values of the environment that must not be shown: passwords, tokens, keys, and the passwords of URLs."""
    found: set[str] = set()
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name) and not _NOT_SECRET.search(name):
            found.add(value)
        for inside in re.findall(r"\w://[^\s:/@]*:(\S*)@", value):
            found |= {inside, unquote(inside)}
    return sorted((secret for secret in found if len(secret) >= SHORTEST), key=len, reverse=True)


def printable(text: str) -> str:
    """Text that commands no terminal: control characters, and those that turn the writing, are shown as escapes."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in "\n\t" or (c.isspace() and ord(c) > 0xA0) else c.encode("unicode_escape").decode()
        for c in text
    )


def line(text: str) -> str:
    """Return a message as one line, fit for a terminal."""
    return printable(" ".join(redact(text).splitlines()))


def repeatable(words: list[str]) -> list[str]:
    """Return the words of a command that say what is run: not `--new`, nor `--notify`, whose address is a secret."""
    after = ["", *words]
    return [
        word for before, word in zip(after, words, strict=False)
        if word not in ("--new", "--notify") and before != "--notify" and not word.startswith("--notify=")
    ]  # fmt: skip


def first_line(error: BaseException) -> str:
    """Return what an exception says, in a line; its kind, if it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def reason(error: BaseException) -> object:
    """Return what an error of the system means, without its number; of any other error, the error."""
    return getattr(error, "strerror", None) or error


def last_line(text: str) -> str:
    """Return the end of a traceback, or of a message: its cause."""
    return next(reversed(text.strip().splitlines()), "")


def out_of_memory(error: BaseException) -> bool:
    """Whether it says that there is no memory for something: Python's own word, or torch's."""
    return isinstance(error, MemoryError) or "allocate memory" in str(error) or "out of memory" in str(error)


def percent(value: float | None) -> str:
    """Return a share as per cent."""
    return "-" if value is None else f"{100 * value:.2f} %"


def number(value: float) -> str:
    """Return a measure, readable: thousands apart, four digits where it is small."""
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.4g}"


def counted(number: int, noun: str) -> str:
    """`1 study`, `2 studies`."""
    plural = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"


def changes_wait(number: int) -> str:
    """Return `1 change waits` or `2 changes wait`: what MLflow does not show yet."""
    return f"{counted(number, 'change')} {'waits' if number == 1 else 'wait'}"


def clock(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 20 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


class Terminal(Console):
    """Show text literally: what looks like markup, emoji codes or commands to a terminal is text, too."""

    def render_str(self, text: str, **how: Any) -> Text:
        """See `rich.console.Console`; every string passes here, those in tables and titles, too."""
        return super().render_str(printable(text), **how | {"markup": False, "emoji": False, "highlight": False})

    def print_table(self, table: Table, indent: str = "") -> None:
        """Show a table whole: without its last columns, and a line that names them, where the terminal is too narrow.

        In a file there is room for all, unless COLUMNS is set, and no line ends with blanks.

        Args:
            indent: what every line begins with.
        """
        bounded = self.is_terminal or "COLUMNS" in os.environ
        self.width = self.width - len(indent) if bounded else 10_000
        left_out = self.fit(table) if bounded else []
        title, table.title = table.title, None  # rich breaks it where the table ends
        lines = [printable(str(title))] if title else []
        with self.capture() as shown:
            self.print(table)
        lines += shown.get().splitlines()
        if left_out:
            lines.append(f"left out: {', '.join(left_out)}; use a wider terminal, or a file, to see them")
        for each in lines:
            print((indent + each).rstrip(), file=self.file)

    def fit(self, table: Table) -> list[str]:
        """Take the last columns out of a table that is wider than the terminal -> their names."""
        left_out: list[str] = []
        while len(table.columns) > 2 and _width(table) > self.width:
            left_out.insert(0, str(table.columns.pop().header))
        return left_out


def _width(table: Table) -> int:
    """Characters that a table takes at least: words are not cut, and numbers, which stand at the right, not wrapped."""
    total = 1
    for column in table.columns:
        if column.justify == "right":
            column.no_wrap = True
        cells = list(map(str, column.cells))
        if not column.no_wrap:
            column.overflow = "fold"  # a path, say, may go on in the next line
            cells = [word[:LONGEST_WORD] for cell in cells for word in cell.split()]
        words = [*str(column.header).split(), *cells]
        total += max(map(cell_len, words), default=0) + 3
    return total
