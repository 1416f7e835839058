"""The measures that tables of means show, and how."""

from __future__ import annotations

from typing import NamedTuple

PLUS_MINUS = "mean ± half-width of the 95 % interval over n seeds (no ±: one seed, or all are equal)"


class Column(NamedTuple):
    """How a measure is shown."""

    name: str
    unit: float
    """The measure is divided by this."""
    exact: bool = False
    """A count, not an estimate: no interval, no digit too many."""


PERCENT, MEGA = 0.01, 1e6
WIDE = 1e5
"""From here on two more digits would break the lines of a terminal."""
QUALITY = {
    "test/accuracy": Column("accuracy %", PERCENT), "test/precision": Column("precision %", PERCENT),
    "test/recall": Column("recall %", PERCENT), "test/f1": Column("F1 %", PERCENT),
}  # fmt: skip
FIT = {
    "test/log_likelihood": Column("test lnL", 1), "train/log_likelihood": Column("train lnL", 1),
    "aic": Column("AIC", 1), "bic": Column("BIC", 1),
}  # fmt: skip
SIZE = {
    "params": Column("parameters", 1, exact=True), "flops/forward": Column("forward MFLOPs", MEGA, exact=True),
    "flops/train_step": Column("training step MFLOPs", MEGA, exact=True),
}  # fmt: skip
COST = {
    "time/inference_ms_per_image": Column("ms/image", 1), "time/inference_ms_batch1": Column("ms, batch 1", 1),
    "time/train_seconds_per_epoch": Column("train s/epoch", 1), "memory/peak_mib": Column("peak MiB", 1),
}  # fmt: skip
ACCURACIES = "quality on the test set"
MAIN = {
    ACCURACIES: (QUALITY, f"{PLUS_MINUS}; precision, recall and F1 are macro averages"),
    "fit": (
        FIT,
        f"{PLUS_MINUS}; lnL in nats, summed over the images; AIC and BIC of the training set, which mostly count "
        "parameters here: no ranks and no tests of them",
    ),
    "size": (SIZE, "FLOPs of one image, a multiplication and an addition counted as two"),
    "time and memory": (COST, f"{PLUS_MINUS}; inference in full batches unless it says batch 1"),
}
