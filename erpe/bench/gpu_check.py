"""Check and measure erpe on a machine's GPU in ten minutes: `infra/gpu-check FOLDER`.

It needs torch, numpy, pydantic and rich, no network, and no data: images are noise where no data folder is given. What
is most important comes first; each part has its end on the clock; numbers are written as soon as they are known; what
hangs is killed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from erpe.bench import gpu_parts
from erpe.bench.timing import machine
from erpe.errors import ConfigError
from erpe.io import write_atomic
from erpe.training.devices import pick_device

MOST_MINUTES = 10.0
FILE = "gpu-check.json"
UNSHOWN = ("name", "seconds", "ok", "rows", "variant", "kind")
GRACE = 15.0
"""Seconds that the last measurement of a part may last beyond the part's end."""

Row = dict[str, Any]
Unit = tuple[str, Callable[[], Row]]
"""A name, and what measures it."""


class Asked(NamedTuple):
    """What is to be run, and until when."""

    minutes: float
    """When the last measurement ends, on the clock."""
    small: bool
    """Small sizes, a few measurements of each part."""
    started: float
    """When the clock was started, by `time.monotonic`."""
    data: Path | None = None
    """Where CIFAR-10 is."""
    parts: tuple[str, ...] = ()
    """Default: all."""
    goes_on: bool = False
    """Whether the file is another process's, and stays."""


def check(folder: Path, device: torch.device, asked: Asked) -> Row:
    """Run some parts, write `gpu-check.json` before and after each measurement, and return what it holds.

    Returns:
        `machine`, and for each part a list of rows: `name`, and `seconds` with what was measured or an `error`, or
        `left_out`; what an earlier process wrote stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE
    found = read(path) if asked.goes_on else {}
    found |= {"machine": machine(device), "minutes": asked.minutes, "small": asked.small}
    for name in asked.parts or gpu_parts.PARTS:
        make, until = gpu_parts.PARTS[name]
        rows: list[Row] = found.setdefault(name, [])
        for unit in make(device, asked.small, asked.data):
            found["running"] = [name, unit[0]]
            write_atomic(path, json.dumps(found, indent=1))
            rows.append(measured(unit, rows, asked.started + until * 60 * asked.minutes))
    found.pop("running", None)
    found["seconds"] = time.monotonic() - asked.started
    write_atomic(path, json.dumps(found, indent=1))
    return found


def measured(unit: Unit, before: list[Row], end: float) -> Row:
    """Measure a unit's row; left out if it would end too late, as the longest before it tells."""
    name, measure = unit
    now = time.monotonic()
    if now + max((row.get("seconds", 0.0) for row in before), default=0.0) > end:
        return {"name": name, "left_out": "out of time"}
    try:
        row = measure()
    except Exception as error:  # what fails on a machine never seen is a finding; the rest is measured
        row = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    return {"name": name, **row, "seconds": time.monotonic() - now}


def guarded(folder: Path, command: list[str], seconds: float) -> int | None:
    """Run all parts in a process of their own. One that hangs is killed where its part should have ended, even within a
    driver, and another goes on with the next part; none outlasts the clock.

    Args:
        command: runs the parts that are appended to it, after the time when the clock was started.
    Returns:
        what the last process gave; None if nothing could wait for it.
    """
    started, left, path = time.monotonic(), list(gpu_parts.PARTS), folder / FILE
    path.unlink(missing_ok=True)
    while True:
        child = subprocess.Popen([*command, str(started), *left], start_new_session=True)
        try:
            while child.poll() is None and not is_late(path, started, seconds):
                time.sleep(0.1)
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                with suppress(subprocess.TimeoutExpired):  # within a dead driver even that may wait
                    child.wait(5)
        found = read(path)
        began, over = "running" in found, time.monotonic() - started > seconds
        if child.returncode in (0, 2):
            return child.returncode
        part, name = found.pop("running", (left[0], "start"))
        lost = {"left_out": "out of time"} if over else {"error": "it hung, or its process died"}
        found.setdefault(part, []).append({"name": name, **lost})
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(found | {"seconds": time.monotonic() - started}, indent=1))
        left = left[left.index(part) + 1 :]
        if over or not began or not left:
            return child.returncode


def read(path: Path) -> Row:
    """Return what is in the file, if there is one."""
    return json.loads(path.read_text()) if path.exists() else {}


def is_late(path: Path, started: float, seconds: float) -> bool:
    """Whether what runs should have ended: all of it, or its part some time ago."""
    took = time.monotonic() - started
    running = read(path).get("running")
    return took > seconds or (running is not None and took > gpu_parts.PARTS[running[0]][1] * seconds + GRACE)


def table(found: Row) -> str:
    """Return the short table."""
    lines = [", ".join(f"{key} {value}" for key, value in found.get("machine", {}).items())]
    for part in gpu_parts.PARTS:
        rows = found.get(part, [])
        ran = [row for row in rows if "left_out" not in row]
        lines.append(f"\n{part}: {len(ran)} of {len(rows)} measured")
        shown = worst(ran) if part == "correctness" else ran
        lines += [f"  {row['name']:<34} {told(row)}" for row in shown if "error" not in row]
    lines.append(f"\n{yardstick(found)}")
    lines.append(f"{len(failures(found))} failures; {found['seconds']:.0f} s")
    return "\n".join(lines + [f"  FAILED {part}: {row['name']}: {told(row)}" for part, row in failures(found)])


def worst(rows: list[Row]) -> list[Row]:
    """Of each kind of correctness the row with the largest error."""
    kinds = {row["kind"]: row for row in sorted(rows, key=lambda row: row.get("error_of_all", 0)) if "kind" in row}
    return list(kinds.values())


def told(row: Row) -> str:
    """Return a row's numbers in few letters."""
    if "error" in row:
        return str(row["error"])[:120]
    numbers = {key: value for key, value in row.items() if key not in UNSHOWN}
    short = {key: f"{value:.3g}" if isinstance(value, float) else value for key, value in numbers.items()}
    shown = " ".join(f"{key} {value}" for key, value in short.items())
    return shown if row.get("ok", True) else f"WRONG {shown}"


def failures(found: Row) -> list[tuple[str, Row]]:
    """Return the rows that are errors, or whose errors are too large."""
    rows = [(part, row) for part in gpu_parts.PARTS for row in found.get(part, [])]
    return [(part, row) for part, row in rows if "error" in row or not row.get("ok", True)]


def yardstick(found: Row) -> str:
    """Twelve variants, five seeds, a hundred epochs, from the quickest way that was measured of each."""
    best: dict[str, float] = {}
    for row in found.get("epoch", []):
        if "epoch_seconds" in row:
            took = row["epoch_seconds"] * gpu_parts.IMAGES / row["images"]
            best[row["variant"]] = min(best.get(row["variant"], math.inf), took)
    hours = sum(best.values()) * 5 * 100 / 3600
    return f"yardstick: {len(best)} variants x 5 seeds x 100 epochs of {gpu_parts.IMAGES:,} images: {hours:.2f} h"


def main(words: list[str] | None = None) -> int:
    """Run the command. Returns 1 where something failed, 2 where it was called wrongly."""
    parser = argparse.ArgumentParser("infra/gpu-check", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help=f"where {FILE} goes")
    parser.add_argument("--minutes", type=float, default=MOST_MINUTES - 0.5, help="at most 10; default: 9.5")
    parser.add_argument("--device", default="auto", help="default: CUDA, else MPS, else the CPU")
    parser.add_argument("--data", type=Path, help="a folder with CIFAR-10; default: noise")
    parser.add_argument("--small", action="store_true", help="small sizes, for a CPU")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)  # when the clock was started, and parts
    words = sys.argv[1:] if words is None else words
    given = parser.parse_args(words)
    try:
        if not 0 < given.minutes <= MOST_MINUTES:
            raise ConfigError(f"--minutes {given.minutes} given; use a number up to {MOST_MINUTES:g} instead")
        if given.child:
            started, *parts = given.child
            asked = Asked(given.minutes, given.small, float(started), given.data, tuple(parts), goes_on=True)
            check(given.folder, pick_device(given.device), asked)
            return 0
    except ConfigError as error:
        print(f"gpu-check: {error}")
        return 2
    command = [sys.executable, "-m", "erpe.bench.gpu_check", *words, "--child"]
    if guarded(given.folder, command, 60 * given.minutes) == 2:
        return 2
    found = read(given.folder / FILE)
    print(table(found))
    return 1 if failures(found) else 0


if __name__ == "__main__":
    raise SystemExit(main())
