"""The measures of a confirmed run, and how tables show them."""

from __future__ import annotations

from typing import NamedTuple

PLUS_MINUS = "mean ± half-width of the 95 % interval over n seeds (no ±: one seed, or all are equal)"
PERCENT, MEGA = 0.01, 1e6
WIDE = 1e5
"""From here on two more digits would break the lines of a terminal."""


class Measure(NamedTuple):
    """What a measure is called, and how it is shown."""

    name: str
    """Of a column."""
    label: str
    """With its unit, where a trial is shown."""
    unit: float = 1
    """A column shows the measure divided by this."""
    more: bool = False
    """Whether more of it is better."""
    exact: bool = False
    """A count, not an estimate: no interval, no digit too many."""


QUALITY = {
    "test/accuracy": Measure("accuracy %", "test accuracy", PERCENT, more=True),
    "test/precision": Measure("precision %", "test precision (macro)", PERCENT, more=True),
    "test/recall": Measure("recall %", "test recall (macro)", PERCENT, more=True),
    "test/f1": Measure("F1 %", "test F1 (macro)", PERCENT, more=True),
}
FIT = {
    "test/log_likelihood": Measure("test lnL", "test log-likelihood (nats)", more=True),
    "train/log_likelihood": Measure("train lnL", "train log-likelihood (nats)", more=True),
    "aic": Measure("AIC", "AIC"), "bic": Measure("BIC", "BIC"),
}  # fmt: skip
SIZE = {
    "params": Measure("parameters", "parameters", exact=True),
    "flops/forward": Measure("forward MFLOPs", "FLOPs, forward, an image", MEGA, exact=True),
    "flops/train_step": Measure("training step MFLOPs", "FLOPs, training step, an image", MEGA, exact=True),
}
COST = {
    "time/inference_ms_per_image": Measure("ms/image", "inference, ms an image"),
    "time/inference_ms_batch1": Measure("ms, batch 1", "inference, ms, one alone"),
    "time/train_seconds_per_epoch": Measure("train s/epoch", "training, s an epoch"),
    "memory/peak_mib": Measure("peak MiB", "peak memory, MiB"),
}
MEASURES = QUALITY | FIT | SIZE | COST
"""In the order of the question."""

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
"""Tables of means: title -> its columns, and what to know."""
