"""The process that trains: imports Ray and no Optuna, so that it starts soon and stays small."""

from __future__ import annotations

import faulthandler
import gc
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from erpe.config import TrialConfig
from erpe.execution.trial_loop import PackRunner

import erpe.execution.ray_tune.environment  # isort: skip  # noqa: F401  before Ray

from ray import tune  # isort: skip

LAST_WORDS = "crash.txt"
"""In the folder of a pack's first trial: the traceback of a signal such as SIGSEGV, which no exception handler sees."""


MOST = 8_000
"""Characters of a traceback that are kept."""


class Worker(tune.Trainable):
    """Plays one pack of trials after the other, an event of each a step; the checkpoint is each trial's own affair."""

    _together: PackRunner | None = None
    _folder: Path
    _last_words: TextIO | None = None
    _crash: Exception | None = None

    def setup(self, config: dict[str, Any]) -> None:
        """Take a pack; nothing is built before the first step, whose errors are reported."""
        self._together = PackRunner(config["start"])
        trials = {uid: (TrialConfig(**trial["config"]), Path(trial["folder"])) for uid, trial in config["pack"].items()}
        self._together.hold(trials)
        _, self._folder = next(iter(trials.values()))

    def reset_config(self, config: dict[str, Any]) -> bool:
        """Take another pack in the same process."""
        self.cleanup()
        self.setup(config)
        return True

    def step(self) -> dict[str, Any]:
        """Give the next events, by trial.

        An exception that nobody foresaw is told first, as `crash`, and raised by the next step: then this process ends.
        """
        if self._crash:
            raise self._crash
        assert self._together
        if not self._last_words:
            self._leave_last_words()
        try:
            return {"events": list(self._together.round().items()), "crash": ""}
        except Exception as error:
            self._crash = error
            lines = traceback.format_exc().splitlines()
            return {"events": [], "crash": "\n".join(line for line in lines if line.strip(" ^"))[-MOST:]}

    def _leave_last_words(self) -> None:
        # Not in `setup`: Tune may set up a second worker on the same pack, and end one of them before its first step.
        with suppress(OSError):  # a full disk is told by the trial itself
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / LAST_WORDS).unlink(missing_ok=True)  # never write through what lies there
            self._last_words = (self._folder / LAST_WORDS).open("x")
            faulthandler.enable(self._last_words, all_threads=False)

    def cleanup(self) -> None:
        """Release the memory of the trials, also on the GPU."""
        self._together = None
        faulthandler.disable()
        if self._last_words:
            self._last_words.close()
            Path(self._last_words.name).unlink(missing_ok=True)
            self._last_words = None
        gc.collect()
        if not gc.get_freeze_count():
            gc.freeze()  # imported modules stay: without them, the next collections take no tenth of a second each
        if "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized():
            sys.modules["torch"].cuda.empty_cache()
