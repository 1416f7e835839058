"""Events on their way to MLflow: one append-only file of JSON lines a study, which outlives every process.

    with outbox.exclusive():       # one writer at a time; first reads what others have written
        outbox.write(event)        # one line
    outbox.read(offset)            # the sender, at its own pace
    outbox.acknowledge(...)        # how far the tracking server has everything

A kill loses nothing. A power cut may lose the last epochs, as it may lose them in the database beside, and they are
trained again or told again from a checkpoint; what was acknowledged is always on the disk.

A line carries a sequence number and a CRC. A last line without its end was torn by a kill or a full disk:
its writer never got an answer, so it is cut. Any other damaged line is moved to `STUDY.corrupt`.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Annotated, Any, Literal, NamedTuple

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, NonNegativeInt, StringConstraints, TypeAdapter, ValidationError

from erpe.errors import ConfigError, StoreError
from erpe.io import open_plain, parse_json, read_plain, write_atomic

BATCH_BYTES = 1 << 20
"""The sender holds at most about this much of the file in memory."""

MOST_LINE = 16 << 20
"""Bytes of a line; erpe writes far shorter ones."""


Uid = Annotated[str, StringConstraints(pattern=r"^[^'\"`\\\x00-\x1f\x7f]+$", max_length=250)]
"""Without what would end it in a query of MLflow."""


class Event(BaseModel):
    """Something that happened to a run. Fields a kind does not need stay at their default and are not written."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    kind: Literal["start_study", "start_trial", "epoch", "end_trial", "end_study", "remove_trial"]
    uid: Uid
    """Whose event: the run's tag in MLflow, which is searched for by it."""
    seq: NonNegativeInt = 0
    """Position in the outbox, from 1; the outbox gives it."""
    ts: NonNegativeInt = 0
    """Milliseconds since 1970; the outbox gives it, and it rises with seq even when the clock steps back. What is
    rebuilt has the time when it happened."""
    step: int = 0
    metrics: dict[str, float] = {}
    tags: dict[str, str] = {}
    number: int | None = None
    parent: Uid | None = None
    """uid of the study a trial belongs to."""
    config: dict[str, Any] = {}
    """A trial's TrialConfig, a study's specification."""
    state: str | None = None
    reason: str | None = None
    folder: str | None = None
    """Where the results lie, relative to the store."""
    best: Uid | None = None
    """uid of a study's best trial."""
    name: str = ""
    """Of the run; default: the experiment's, or TRIAL NUMBER. Of a study also its name in Optuna."""
    model: str = ""
    """Name under which the best trial is registered; None: it is not."""
    rebuilt: bool = False
    """Told again from the database and the checkpoints: MLflow may have it already, with its true time and tags."""


class Ack(NamedTuple):
    """How far a destination has everything."""

    uri: str = ""
    """The tracking URI without its password; another destination starts over, which is harmless."""
    offset: NonNegativeInt = 0
    """Bytes."""
    seq: NonNegativeInt = 0


_ACK = TypeAdapter(Ack)


def encode(event: Event) -> bytes:
    """One line; the CRC covers the object without the CRC."""
    body = event.model_dump_json(exclude_defaults=True).encode()
    return body[:-1] + b',"crc":"%08x"}\n' % zlib.crc32(body)


def decode(line: bytes) -> Event | None:
    """Return the event of a line, or nothing if the line is damaged."""
    body, found, end = line.rpartition(b',"crc":"')
    body += b"}"
    if not found or end.rstrip(b"\n") != b'%08x"}' % zlib.crc32(body):
        return None
    try:
        return Event.model_validate_json(body)
    except ValidationError:
        return None


class Outbox:
    """One study's events.

    Raises:
        ConfigError: the study's name cannot be the name of a file and of a model.
    """

    def __init__(self, folder: Path, study: str, observe: Callable[[Event], None] = lambda event: None) -> None:
        """`observe` sees every event once, in order: those already there and those written by anyone."""
        if not re.fullmatch(r"\w[\w.-]*", study):
            raise ConfigError(f"study name {study!r}: use letters, digits, '_', '-' and '.'")
        self.path = folder / f"{study}.jsonl"
        self.seq = 0
        self._end = 0
        self._ts = 0
        self._observe = observe
        self._fd = -1
        self._lock = FileLock(self.path.with_suffix(".lock"), timeout=10)

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Be the only writer, having seen everything.

        Raises:
            StoreError: the folder or the disk does not let us; or a line was damaged and has been moved.
        """
        try:
            with self._lock:
                self._fd = open_plain(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
                try:
                    self._catch_up()
                    yield
                finally:
                    os.close(self._fd)
        except Timeout:
            raise StoreError(f"outbox {self.path}: another process has held its lock for 10 s; end it") from None
        except OSError as error:
            raise StoreError(f"outbox {self.path}: cannot be written ({error.strerror or error})") from None

    def write(self, event: Event) -> Event:
        """Append under `exclusive`; gives the event its place, and its time if it has none."""
        ts = event.ts or max(int(time.time() * 1000), self._ts + 1)
        event = event.model_copy(update={"seq": self.seq + 1, "ts": ts})
        self._append([event])
        return event

    def adopt(self, events: Sequence[Event]) -> None:
        """Append under `exclusive` what another outbox has; gives each event its place, and leaves it its time."""
        self._append([event.model_copy(update={"seq": self.seq + n}) for n, event in enumerate(events, 1)])

    def _append(self, events: Sequence[Event]) -> None:
        lines = [encode(event) for event in events]
        try:
            if os.write(self._fd, b"".join(lines)) < sum(map(len, lines)):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if any(event.kind != "epoch" for event in events):  # some disks take 10 ms; an epoch should not wait
                os.fsync(self._fd)
        except OSError:
            os.ftruncate(self._fd, self._end)
            raise
        for event, line in zip(events, lines, strict=True):
            self._see(event, len(line))

    def _see(self, event: Event, size: int) -> None:
        self.seq, self._ts = max(self.seq, event.seq), max(self._ts, event.ts)
        self._end += size
        self._observe(event)

    def _catch_up(self) -> None:
        if os.fstat(self._fd).st_size < self._end:
            raise StoreError(f"outbox {self.path}: it has shrunk while in use; put it back, or use a new store")
        if self._end == 0 and os.fstat(self._fd).st_size == 0:
            self._beside(".ack").unlink(missing_ok=True)  # of an outbox that was deleted
        damaged = 0
        with open(self._fd, "rb", closefd=False) as file:
            file.seek(self._end)
            for line in self._lines(file):
                event = decode(line)
                if event:
                    missing = b"" if line.endswith(b"\n") else b"\n"
                    os.write(self._fd, missing)
                    self._see(event, len(line + missing))
                elif not line.endswith(b"\n"):
                    os.ftruncate(self._fd, self._end)
                else:
                    if line.strip():
                        self._move_away(line)
                        damaged += 1
                    self._end += len(line)
        if damaged:
            raise StoreError(
                f"outbox {self.path}: {damaged} damaged line(s), moved to {self._beside('.corrupt').name}; "
                f"all others are kept, and the same command goes on"
            )

    def _move_away(self, line: bytes) -> None:
        """Copy a damaged line, then blank it where it stands: no offset changes."""
        with os.fdopen(open_plain(self._beside(".corrupt"), os.O_WRONLY | os.O_CREAT | os.O_APPEND), "ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        # O_APPEND makes even pwrite append, so blank through a second descriptor
        with os.fdopen(open_plain(self.path, os.O_RDWR), "r+b") as file:
            file.seek(self._end)
            file.write(b" " * (len(line) - 1))

    def _lines(self, file: IO[bytes]) -> Iterator[bytes]:
        while line := file.readline(MOST_LINE):
            if len(line) == MOST_LINE:
                raise StoreError(f"outbox {self.path}: a line of more than {MOST_LINE} bytes, which erpe did not write")
            yield line

    def _beside(self, suffix: str) -> Path:
        return self.path.with_suffix(suffix)

    def read(self, offset: int) -> list[tuple[Event, int]]:
        """Return the events from a byte offset on, about `BATCH_BYTES` of them, each with the offset behind it.

        Raises:
            StoreError: damage in the middle; the next writer moves it away.
        """
        events: list[tuple[Event, int]] = []
        if not os.path.lexists(self.path):
            return events
        try:
            with os.fdopen(open_plain(self.path, os.O_RDONLY), "rb") as file:
                start = file.seek(offset)
                for line in self._lines(file):
                    if not line.endswith(b"\n") or offset - start > BATCH_BYTES:
                        break
                    offset += len(line)
                    if event := decode(line):
                        events.append((event, offset))
                    elif line.strip():
                        raise StoreError(
                            f"outbox {self.path}: a damaged line ends at byte {offset}; `erpe sync` repairs it"
                        )
        except OSError as error:
            raise StoreError(f"outbox {self.path}: cannot be read ({error.strerror})") from None
        return events

    def events(self) -> Iterator[Event]:
        """All events, in order.

        Raises:
            StoreError: see `read`.
        """
        offset = 0
        while batch := self.read(offset):
            offset = batch[-1][1]
            yield from (event for event, _ in batch)

    def waiting(self, offset: int) -> tuple[Counter[str], int]:
        """How many events of each run lie behind a byte offset, and the time of the oldest; damage is passed over."""
        found: Counter[str] = Counter()
        oldest = 0
        with contextlib.suppress(OSError), self.path.open("rb") as file:
            file.seek(offset)
            for line in file:
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    event = json.loads(line)
                    found[event["uid"]] += 1
                    oldest = min(oldest or event["ts"], event["ts"])
        return found, oldest

    @property
    def ack(self) -> Ack:
        """What has been acknowledged; nothing, if that cannot be read: sending twice is harmless."""
        try:
            return _ACK.validate_python(Ack(**parse_json(read_plain(self._beside(".ack")))), strict=True)
        except (OSError, ValueError, TypeError):
            return Ack()

    def acknowledge(self, ack: Ack) -> None:
        """Remember how far a destination has everything; that part of the file must not be lost any more."""
        try:
            if ack.offset:
                handle = open_plain(self.path, os.O_RDONLY)
                try:
                    os.fsync(handle)
                finally:
                    os.close(handle)
            write_atomic(self._beside(".ack"), json.dumps(ack._asdict()))
        except OSError as error:
            raise StoreError(f"outbox {self.path}: cannot be written ({error.strerror})") from None
