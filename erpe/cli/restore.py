"""`erpe restore`: what there is of the database of trials, and the way back to it."""

from __future__ import annotations

import json
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from erpe.cli.options import STORE, AsJson, StoreOption
from erpe.store import Store, store_flag

if TYPE_CHECKING:
    from erpe.study.backup import Copy


def restore(
    backup: Annotated[str | None, typer.Argument(help="newest or older; default: show what there is.")] = None,
    store: StoreOption = STORE,
    as_json: AsJson = False,
) -> None:
    """Show the backups of the database of trials, or bring one back; the current database is kept beside it."""
    from erpe.study.backup import restore as bring_back
    from erpe.study.backup import survey

    opened = Store.existing(store)
    kept = bring_back(opened, backup) if backup else None
    found = _rows(opened, *survey(opened)) | {"kept": str(kept) if kept else None}
    print(json.dumps(found)) if as_json else _print(found, opened)


def _rows(store: Store, now: Copy, backups: dict[str, Copy]) -> dict[str, Any]:
    trained = sum(path.is_dir() for path in store.checkpoints.glob("*/*"))
    return {
        "database": _row(now),
        "backups": {word: _row(found) for word, found in backups.items()},
        "checkpoints": trained,
        "mlflow": (store.root / "mlflow.db").exists(),
    }


def _row(found: Copy) -> dict[str, Any]:
    time = datetime.fromtimestamp(found.modified).astimezone().isoformat(" ", "seconds") if found.modified else None
    return {"time": time, "studies": found.studies, "trials": found.trials, "damage": found.damage or None}


def _print(found: dict[str, Any], store: Store) -> None:
    from erpe.text import counted, printable

    for name, row in {"database": found["database"], **found["backups"]}.items():
        holds = f"{counted(row['studies'], 'study')}, {counted(row['trials'], 'trial')}"
        state = f"damaged ({row['damage']})" if row["damage"] else holds
        print(printable(f"{name:<10} {row['time'] or '-':<19}  {state}"))
    checkpoints = f"checkpoints of {counted(found['checkpoints'], 'trial')}"
    print(f"besides: {checkpoints}{', and MLflow' if found['mlflow'] else ''}")
    if found["kept"]:
        print(printable(f"restored; the former database is {found['kept']}. Trials that it had in addition run again"))
    elif whole := [word for word, row in found["backups"].items() if not row["damage"]]:
        told = f"bring one back: erpe restore {whole[0]}{store_flag(store.root)}; nothing that is there is overwritten"
        print(printable(told))
    else:
        print("no whole backup: commands that write make one as they begin and end")
