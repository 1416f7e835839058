"""The spool of erpe 0.1.0, `spool/STUDY.jsonl`: read once, and what it alone knew is kept with each trial.

It was a line for every event on its way to MLflow. The times and measures of the epochs, and the tags of who ran the
trials, go to the `history.jsonl` of the trials that ended and have none.
"""

from __future__ import annotations

import contextlib
import json
from typing import Any

from erpe.errors import StoreError
from erpe.io import parse_json, read_plain, write_atomic
from erpe.store import HISTORY, Store
from erpe.tracking.history import is_line

_MOST = 2**30


def read_spool(store: Store, study: str) -> None:
    """Keep what the spool of a study knows, unless that was done; the spool itself stays as it is.

    Raises:
        StoreError: the store cannot be written.
    """
    spool = store.root / "spool" / f"{study}.jsonl"
    marker = spool.with_suffix(".read")
    if marker.exists() or not spool.is_file():
        return
    try:
        lines: dict[str, list[dict[str, Any]]] = {}
        parts, folders = {}, {}
        for text in read_plain(spool, _MOST).splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
                event = parse_json(text)
                uid, kind, at = event["uid"], event["kind"], {"at": event["ts"]}
                if kind == "start_study":
                    parts[uid] = event.get("name") or study
                elif kind == "start_trial":
                    part, seed = parts[event["parent"]], int(event["config"]["seed"])
                    folders[uid] = store.trial_folder(part, int(event["number"]), seed)
                    lines.setdefault(uid, []).append(at | {"tags": event["tags"]})
                elif kind == "epoch":
                    lines.setdefault(uid, []).append(at | {"epoch": event["step"]} | event["metrics"])
        for uid, folder in folders.items():
            if (folder / "outcome.json").is_file() and not (folder / HISTORY).exists():
                write_atomic(folder / HISTORY, "".join(f"{json.dumps(line)}\n" for line in lines[uid] if is_line(line)))
        write_atomic(marker, "")
    except OSError as error:
        raise StoreError(f"{spool}: cannot be read, or kept ({error.strerror or error}); nothing is lost") from None
