"""What a study shows of itself while it runs."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from erpe.config import TrialConfig
from erpe.io import open_plain, read_plain
from erpe.store import PROGRESS


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
    """Changes MLflow does not show yet."""
    folder: Path | None = None
    """Of the trial, where its worker shares this machine's files."""

    @property
    def trained(self) -> float | None:
        """Epochs, of which the running one counts in part; None: its worker has not begun."""
        begun = read_progress(self.folder) if self.folder and self.state == "RUNNING" else float(self.epoch)
        return max(begun or 0.0, float(self.epoch)) if begun is not None or self.epoch else None


class ProgressNote:
    """Note how far a trial is in a file of its folder, once a second: its driver may be another process."""

    def __init__(self, folder: Path) -> None:
        self._path, self._next = folder / PROGRESS, 0.0
        self.training: Any = None
        """What is trained; None: not built yet."""

    def __call__(self, done: int, steps: int) -> None:
        """Note the steps done of the running epoch; a disk that refuses does not matter here."""
        if self.training is None or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + 1
        with suppress(OSError), open(self._path, "w", opener=lambda path, flags: open_plain(Path(path), flags)) as file:
            file.write(f"{len(self.training.history) + done / steps:.3f}")


def read_progress(folder: Path) -> float | None:
    """Return the epochs that a trial's worker noted last; None if it has not begun."""
    try:
        return float(read_plain(folder / PROGRESS, 100))
    except (OSError, ValueError):
        return None


class Progress:
    """Shows a study while it runs; this one shows nothing. Called on the driver's main thread; returns at once."""

    def on_phase(self, phase: str) -> None:
        """Show the phase that begins: `data`, `workers`, `search`, `test` or `tracking`."""

    def on_start(self, moment: TrialProgress) -> None:
        """Show a trial that is handed to a worker, perhaps again."""

    def on_epoch(self, moment: TrialProgress) -> None:
        """Show an epoch that is recorded."""

    def on_end(self, moment: TrialProgress) -> None:
        """Show a trial that is complete, pruned or failed."""

    def on_warning(self, text: str) -> None:
        """Show a warning, one line."""
