"""What `erpe bench` shows in a terminal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from erpe.text import Terminal


def conditions(found: dict[str, Any]) -> str:
    """Return what the numbers depend on, in a line."""
    return ", ".join(f"{key} {value}" for key, value in found["machine"].items())


def training_table(found: dict[str, Any]) -> None:
    """Print times, ratios, and what they depend on."""
    table = _table("a training step", conditions(found))
    _columns(table, "loop", "ms, median", "low to high", "ratio of medians")
    for row in found["rows"]:
        table.add_row(row["name"], f"{row['ms']:.1f}", spread(row), f"{row['ratio']:.2f}")
    Terminal().print_table(table)


def device_table(found: dict[str, Any]) -> None:
    """Print times as `training_table` does, and what was chosen."""
    training_table(found)
    for what, chosen in found["chosen"].items():
        print(f"{what}: {', '.join(chosen) if isinstance(chosen, list) else chosen}")


def models_table(found: dict[str, Any]) -> None:
    """Images a second of each variant, and their part of what softmax attention does."""
    for what, title in {"forward": "forward", "step": "training step"}.items():
        table = _table(title, conditions(found) if what == "step" else None)
        _columns(table, "variant", "images/s", "ms, median", "low to high", "of softmax's")
        for row in found["rows"]:
            if row["pass"] == what:
                cells = (f"{row['images_per_second']:,.0f}", f"{row['ms']:.1f}", spread(row), f"{1 / row['ratio']:.2f}")
                table.add_row(row["name"], *cells)
        Terminal().print_table(table)


def precision_table(found: dict[str, Any]) -> None:
    """Images a second of each variant in both precisions, a table a data set."""
    rows = {(row["dataset"], row["variant"], row["precision"]): row for row in found["rows"]}
    for dataset in dict.fromkeys(row["dataset"] for row in found["rows"]):
        table = _table(f"training, images of {dataset}: images/s, median (low to high)")
        _columns(table, "variant", "float32", "bfloat16", "ratio")
        for variant in dict.fromkeys(row["variant"] for row in found["rows"]):
            single, half = (rows[dataset, variant, precision] for precision in ("float32", "bfloat16"))
            table.add_row(variant, _images(single), _images(half), f"{1 / half['ratio']:.2f}")
        Terminal().print(table)
    print(f"n={found['rows'][0]['n']} rounds; {conditions(found)}")


def _images(row: dict[str, Any]) -> str:
    low, high = (row["images_per_second"] * row["ms"] / row[end] for end in ("high", "low"))
    return f"{row['images_per_second']:,.0f} ({low:,.0f} to {high:,.0f})"


def overhead_table(found: dict[str, Any]) -> None:
    """Print what each stack takes for a trial and for an epoch that train nothing."""
    table = _table("beside the training, ms; processor time of this process, a trial and an epoch", conditions(found))
    _columns(table, "stack", "an empty trial", "low to high", "an epoch more", "low to high", "processor")
    for row in found["rows"]:
        reach = [f"{row[f'{of}_ms_low']:.2f} to {row[f'{of}_ms_high']:.2f}" for of in ("trial", "epoch")]
        processor = f"{row['trial_cpu_ms']:.0f}, {row['epoch_cpu_ms']:.2f}"
        table.add_row(
            row["name"], f"{row['trial_ms']:.2f}", reach[0], f"{row['epoch_ms']:.2f}", reach[1], processor
        )  # fmt: skip
    Terminal().print_table(table)


def series_table(found: dict[str, Any]) -> None:
    """Error and ratios to softmax attention, a row a layer and rank."""
    steps = {(row["tokens"], row["name"]): row for row in found["rows"] if row["pass"] == "step"}
    table = _table("a truncated series against the exact general encoding; ratios to torch SDPA", conditions(found))
    _columns(table, "layer", "N", "relative error", "forward", "step")
    for row in found["rows"]:
        if row["pass"] == "forward" and row["error"] is not None:
            step = steps[row["tokens"], row["name"]]["ratio"]
            cells = (f"{row['tokens']}", f"{row['error']:.1e}", f"{row['ratio']:.3f}", f"{step:.3f}")
            table.add_row(row["name"], *cells)
    Terminal().print_table(table)


def layers_table(found: dict[str, Any]) -> None:
    """Milliseconds and ratios to torch's softmax attention, then MiB: a row a layer, a column a number of tokens."""
    for what, title in {"forward": "forward", "step": "forward and backward"}.items():
        rows = [row for row in found["rows"] if row["pass"] == what]
        _by_tokens(f"{title}: ms, median, and ratio to the first", rows, _time)
    _by_tokens("forward and backward: MiB at the peak", rows, lambda row: f"{row['peak_mib']:.1f}")
    timed = [row for row in found["rows"] if row["n"]]
    if not timed:
        print(f"no layer had room in the memory; {conditions(found)}")
        return
    most = max((row["high"] - row["low"]) / row["ms"] for row in timed)
    print(f"n={timed[0]['n']} rounds, spread (highest less lowest over median) at most {most:.0%}; {conditions(found)}")


def _time(row: dict[str, Any]) -> str:
    return f"{row['ms']:.2f}  {row['ratio']:.2f}"


def _by_tokens(title: str, rows: list[dict[str, Any]], cell: Callable[[dict[str, Any]], str]) -> None:
    table = _table(title)
    _columns(table, "layer", *dict.fromkeys(f"N={row['tokens']}, B={row['batch']}" for row in rows))
    for name in dict.fromkeys(row["name"] for row in rows):
        table.add_row(name, *(cell(row) if row["n"] else "no room" for row in rows if row["name"] == name))
    Terminal().print_table(table)


def spread(row: dict[str, Any]) -> str:
    """Lowest to highest, and of how many."""
    return f"{row['low']:.1f} to {row['high']:.1f} (n={row['n']})"


def _table(title: str, caption: str | None = None) -> Table:
    return Table(box=SIMPLE, title=title, caption=caption, title_justify="left", caption_justify="left")


def _columns(table: Table, name: str, *numbers: str) -> None:
    table.add_column(name, no_wrap=True, min_width=len("softmax_circulant"))
    for number in numbers:
        table.add_column(number, justify="right", no_wrap=True)
