"""Check and measure erpe on a machine's GPU in ten minutes: `infra/gpu-check FOLDER`.

It needs torch, numpy, pydantic and rich, no network, and no data: images are noise where no data folder is given. What
is most important comes first; each part has its end on the clock; numbers are written as soon as they are known.
"""

from __future__ import annotations

import _thread
import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Timer
from typing import Any, NamedTuple

import torch

from erpe.bench import gpu_parts
from erpe.bench.timing import machine
from erpe.errors import ConfigError
from erpe.io import write_atomic
from erpe.training.devices import pick_device

MOST_MINUTES = 10.0
FILE = "gpu-check.json"
UNSHOWN = ("name", "seconds", "ok", "rows", "variant", "kind", "images")

Row = dict[str, Any]
Unit = tuple[str, Callable[[], Row]]
"""A name, and what measures it."""


class Part(NamedTuple):
    """Measurements of one kind."""

    units: Iterator[Unit]
    until: float
    """When it ends, as a part of all the time."""


def check(folder: Path, device: torch.device, *, minutes: float, small: bool, data: Path | None = None) -> Row:
    """Run all parts, write `gpu-check.json` after each measurement, and return what it holds.

    Args:
        minutes: when the last measurement ends, on the clock.
        small: small sizes, a few measurements of each part.
        data: where CIFAR-10 is.
    Returns:
        `machine`, and for each part a list of rows: `name`, and `seconds` with what was measured or an `error`, or
        `left_out`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    started, seconds = time.monotonic(), 60 * minutes
    found: Row = {"machine": machine(device), "minutes": minutes, "small": small}
    parts = {name: Part(make(device, small, data), until) for name, (make, until) in gpu_parts.PARTS.items()}
    alarm = Timer(seconds, _thread.interrupt_main)
    alarm.daemon = True
    alarm.start()
    try:
        for name, part in parts.items():
            rows: list[Row] = found.setdefault(name, [])
            for row in measured(part, started, seconds):
                rows.append(row)
                write_atomic(folder / FILE, json.dumps(found, indent=1))
    except KeyboardInterrupt:
        found["interrupted"] = True
    finally:
        alarm.cancel()
    found["seconds"] = time.monotonic() - started
    write_atomic(folder / FILE, json.dumps(found, indent=1))
    return found


def measured(part: Part, started: float, seconds: float) -> Iterator[Row]:
    """Measure a row for each unit; those that would end too late, as the longest before them tells, are left out."""
    longest = 0.0
    for name, measure in part.units:
        now = time.monotonic()
        if now + longest > started + part.until * seconds:
            yield {"name": name, "left_out": "out of time"}
            continue
        try:
            row = measure()
        except Exception as error:  # what fails on a machine never seen is a finding; the rest is measured
            row = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        took = time.monotonic() - now
        longest = max(longest, took)
        yield {"name": name, **row, "seconds": took}


def table(found: Row) -> str:
    """Return the short table."""
    lines = [", ".join(f"{key} {value}" for key, value in found["machine"].items())]
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
    numbers = {
        key: value for key, value in row.items() if key not in ("name", "seconds", "ok", "rows", "variant", "kind")
    }
    shown = " ".join(f"{key} {brief(value)}" for key, value in numbers.items())
    return shown if row.get("ok", True) else f"WRONG {shown}"


def brief(value: Any) -> str:
    """Return a number in three digits."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


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
    given = parser.parse_args(words)
    try:
        if not 0 < given.minutes <= MOST_MINUTES:
            raise ConfigError(f"--minutes {given.minutes} given; use a number up to {MOST_MINUTES:g} instead")
        device = pick_device(given.device)
    except ConfigError as error:
        print(f"gpu-check: {error}")
        return 2
    found = check(given.folder, device, minutes=given.minutes, small=given.small, data=given.data)
    print(table(found))
    return 1 if failures(found) else 0


if __name__ == "__main__":
    raise SystemExit(main())
