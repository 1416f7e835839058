"""The table of erpe/bench/README.md, from `studies/results/bench/*.json`: `python infra/bench_table.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from erpe.bench.tables import conditions

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- bench -->\n", "<!-- /bench -->\n"
TOKENS = (64, 256, 1024, 4096, 16384)


def table(layers: dict[str, Any], models: dict[str, Any]) -> str:
    """Markdown: a row a layer with its ratios to torch's SDPA at each of `TOKENS`, forward / training step, and the
    images a second that a whole model with it trains, as a part of softmax attention's.
    """
    found = {(row["name"], row["tokens"], row["pass"]): row for row in layers["rows"]}
    share = {row["name"]: 1 / row["ratio"] for row in models["rows"] if row["pass"] == "step"}
    shown = [n for n in TOKENS if any(row["tokens"] == n for row in layers["rows"])]
    lines = [
        "| layer | " + " | ".join(f"N={n}" for n in shown) + " | ViT, training |",
        "|---|" + "---|" * (len(shown) + 1),
    ]
    for name in dict.fromkeys(row["name"] for row in layers["rows"]):
        cells = [" / ".join(_ratio(found[name, n, what]) for what in ("forward", "step")) for n in shown]
        model = f"{share[name]:.2f}" if name in share else ""
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {model} |")
    return "\n".join(["", *lines, "", f"Layers: {conditions(layers)}.", f"ViT: {conditions(models)}.", ""])


def _ratio(row: dict[str, Any]) -> str:
    if not row["n"]:
        return "no room"
    return f"{row['ratio']:.3f}" if row["ratio"] < 0.1 else f"{row['ratio']:.2f}"


def rewritten(text: str, results: Path) -> str:
    """A text whose part between `BEGIN` and `END` is the table of the results in a folder."""
    layers, long, models = (
        json.loads((results / f"{name}-cpu.json").read_text()) for name in ("layers", "long", "models")
    )
    layers["rows"] += long["rows"]
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + table(layers, models) + "\n" + END + rest.partition(END)[2]


if __name__ == "__main__":
    readme = ROOT / "erpe/bench/README.md"
    readme.write_text(rewritten(readme.read_text(), ROOT / "studies/results/bench"))
