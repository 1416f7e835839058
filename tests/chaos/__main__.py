"""The long set: `infra/chaos` hurts studies for an hour, keeps what came of it, and writes the table of README.md.

infra/chaos                         all of it
infra/chaos worker served-ray       only what has these words
infra/chaos sender 4                each so often at most
infra/chaos --table                 nothing new, just the table
"""

import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]

from case import Case, Result  # noqa: E402
from faults import FAULTS, POINTS  # noqa: E402
from homes import Embedded, Served  # noqa: E402
from outage import as_table, measure  # noqa: E402

from erpe.tracking.provenance import cpu_name  # noqa: E402

RESULTS, OUTAGE, README = HERE / "results.jsonl", HERE / "outage.json", HERE / "README.md"
PLAN = [
    ("driver", "embedded", "inline", 40),
    ("driver", "embedded", "ray", 10),
    ("driver", "served", "inline", 40),
    ("points", "embedded", "inline", len(POINTS)),
    ("points", "served", "inline", len(POINTS)),
    ("worker", "embedded", "ray", 16),
    ("worker", "served", "ray", 16),
    ("raylet", "embedded", "ray", 2),
    ("server", "served", "inline", 21),
    ("database", "served", "ray", 6),
    ("database", "served", "inline", 6),
    ("sender", "served", "inline", 6),
    ("second", "embedded", "ray", 3),
    ("second", "served", "inline", 3),
    ("fenced", "embedded", "inline", 3),
    ("fenced", "served", "inline", 3),
    ("sigterm", "embedded", "ray", 4),
    ("sigterm", "served", "inline", 6),
    ("clock", "embedded", "inline", 6),
    ("disk", "embedded", "inline", 6),
]
"""Fault, home, executor, how often in all."""

A_STUDY = {"driver": 8, "worker": 8, "server": 7, "fenced": 2, "sigterm": 4, "disk": 4}
"""How often one study is hurt, at most; of others as often as there is to do."""


def run(fault, home, executor, times, seed):
    """Hurt one study after the other until it was done so often."""
    kind = {"embedded": Embedded, "served": Served}[home]
    with tempfile.TemporaryDirectory(prefix="erpe-chaos-") as folder, kind(Path(folder)).ready() as ready:
        left, turn = times, 0
        while left > 0 and turn < times:
            share = min(left, A_STUDY.get(fault, times))
            size = {"trials": 60, "epochs": 2, "slow": 0.3} if fault == "points" else {"trials": 10}
            case = Case(ready, Path(folder) / f"{fault}-{turn}", executor, **size)
            began = time.monotonic()
            result = FAULTS[fault](case, random.Random(f"{seed} {fault} {home} {executor} {turn}"), share)
            left, turn = left - result.injected, turn + 1
            keep(result)
            print(
                f"{result.fault}, {home}, {executor}: {result.injected} times, {time.monotonic() - began:.0f} s, "
                f"{'fine' if result.fine else asdict(result)}",
                flush=True,
            )
            shutil.rmtree(case.folder)


def keep(result):
    """Behind what was found before."""
    result.date, result.commit = f"{datetime.now(UTC):%Y-%m-%d}", commit()
    with RESULTS.open("a") as file:
        file.write(json.dumps(asdict(result)) + "\n")


def commit():
    """Of the code here."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE)
    return found.stdout.strip()


def last(results):
    """Date, commit and number of injections of the newest code that a fault was tried on."""
    newest = results[-1]  # they are kept in order
    times = sum(result.injected for result in results if (result.date, result.commit) == (newest.date, newest.commit))
    return f"{newest.date}, {newest.commit} ({times})" if newest.date else "at 7e85fa5, or before"


def table():
    """A row a fault, over homes and executors, as Markdown."""
    found = defaultdict(list)
    for line in RESULTS.read_text().splitlines():
        result = Result(**json.loads(line))
        found[result.fault].append(result)
    head = "| fault | where | injected | trials lost | trials doubled | epochs lost | epochs doubled "
    lines = [
        head + "| epochs trained again | seconds to the next epoch | anything else | last (n) |",
        "|---|---|" + "---:|" * 7 + "---|---|",
    ]
    for fault, results in found.items():
        where = ", ".join(sorted({f"{result.home} {result.executor}" for result in results}))
        sums = [
            sum(getattr(result, name) for result in results)
            for name in ("injected", "trials_lost", "trials_doubled", "epochs_lost", "epochs_doubled", "repeated")
        ]
        seconds = [second for result in results for second in result.seconds]
        took = f"{statistics.median(seconds):.1f} ({max(seconds):.1f})" if seconds else "-"
        wrong = "; ".join(f"{word[:80]}" for result in results for word in result.wrong) or "nothing"
        lines.append(
            f"| {fault} | {where} | " + " | ".join(map(str, sums)) + f" | {took} | {wrong} | {last(results)} |"
        )
    return "\n".join(lines)


def write_tables(*made):
    """Between the marks of README.md: `table`, `outage`."""
    machine = f"{cpu_name()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    text, tables = README.read_text(), {"table": table, "outage": lambda: as_table(OUTAGE.read_text())}
    own = {"table": machine, "outage": f"{machine}, commit {commit()}"}  # each row of the table has its own
    for mark in made:
        before, _, rest = text.partition(f"<!-- {mark} -->\n")
        after = rest.partition("<!-- end -->")[2]
        text = f"{before}<!-- {mark} -->\n{tables[mark]()}\n\nLast measured on {own[mark]}.\n<!-- end -->{after}"
    README.write_text(text)


def run_outage(rounds=60):
    """What an outage costs; alone on the machine."""
    with tempfile.TemporaryDirectory(prefix="erpe-chaos-") as folder, Served(Path(folder)).ready() as home:
        OUTAGE.write_text(json.dumps(measure(home, Path(folder), rounds), indent=1) + "\n")


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if not word.isdigit()]
    most = min((int(word) for word in sys.argv[1:] if word.isdigit()), default=100)
    if words != ["--table"]:
        for fault, home, executor, times in PLAN:
            if all(word in (fault, home, executor, f"{home}-{executor}") for word in words):
                run(fault, home, executor, min(times, most), seed=time.time_ns())
        if words in ([], ["outage"]):
            run_outage(min(60, most))
            write_tables("outage")
    write_tables("table")
