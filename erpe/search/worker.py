"""The process that trains: imports Ray and no Optuna, so that it starts soon and stays small."""

from __future__ import annotations

import faulthandler
import gc
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from erpe.config import TrialConfig
from erpe.search.play import Event, play

import erpe.search.ray_environment  # isort: skip  # noqa: F401  before Ray
from ray import tune  # isort: skip

LAST_WORDS = "crash.txt"
"""In a trial's folder: the traceback of a signal such as SIGSEGV, which no exception handler sees."""


class Worker(tune.Trainable):
    """A process that plays one trial after the other, an event a step. The checkpoint is the trial's own affair."""

    _events: Iterator[Event]
    _last_words: TextIO | None = None

    def setup(self, config: dict[str, Any]) -> None:
        """Take a trial; nothing is built before the first step, whose errors are reported."""
        folder = Path(config["folder"])
        self._events = play(TrialConfig(**config["config"]), folder, config["start"])
        with suppress(OSError):  # a full disk is told by the first step
            folder.mkdir(parents=True, exist_ok=True)
            (folder / LAST_WORDS).unlink(missing_ok=True)  # never write through what lies there
            self._last_words = (folder / LAST_WORDS).open("x")
            faulthandler.enable(self._last_words, all_threads=False)

    def reset_config(self, config: dict[str, Any]) -> bool:
        """Take another trial in the same process."""
        self.cleanup()
        self.setup(config)
        return True

    def step(self) -> dict[str, Any]:
        """The next event, or the exception nobody foresaw."""
        return {"event": next(self._events)}

    def cleanup(self) -> None:
        """Let go of the trial's memory, also on the GPU."""
        self._events = iter(())
        faulthandler.disable()
        if self._last_words:
            self._last_words.close()
            Path(self._last_words.name).unlink(missing_ok=True)
            self._last_words = None
        gc.collect()
        if "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized():
            sys.modules["torch"].cuda.empty_cache()
