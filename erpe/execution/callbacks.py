"""What a study shows of itself while it runs."""

from __future__ import annotations

from typing import NamedTuple

from erpe.config import TrialConfig


class TrialProgress(NamedTuple):
    """State of a trial and its study, for callbacks that show it."""

    arm: str
    """Arm of a study file's study; empty for `tune`."""
    phase: str
    """`search` or `confirm`."""
    number: int
    state: str
    """RUNNING, COMPLETE, PRUNED or FAIL."""
    epoch: int
    epochs: int
    """Of a trial that is not pruned."""
    value: float | None
    """Validation accuracy of the last epoch."""
    reason: str | None
    """Why it failed."""
    config: TrialConfig
    counts: dict[str, int]
    """Trials of the study by state."""
    budget: int
    """Trials the study will have."""
    best: float | None
    """The highest value of a complete trial."""
    lag: int
    """Events MLflow has not got yet."""


class Progress:
    """Shows a study while it runs; this one shows nothing. Called on the driver's main thread; returns at once."""

    def on_phase(self, phase: str) -> None:
        """Show the phase that begins: `data`, `workers`, `search`, `test` or `tracking`."""

    def on_start(self, moment: TrialProgress) -> None:
        """Show a trial that is handed to a worker, perhaps again."""

    def on_step(self, done: int, steps: int) -> None:
        """Show steps of the running epoch; only known of trials in this process."""

    def on_epoch(self, moment: TrialProgress) -> None:
        """Show an epoch that is recorded."""

    def on_end(self, moment: TrialProgress) -> None:
        """Show a trial that is complete, pruned or failed."""

    def on_warning(self, text: str) -> None:
        """Show a warning, one line."""
