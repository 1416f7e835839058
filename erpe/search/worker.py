"""The process that trains: imports Ray and no Optuna, so that it starts soon and stays small."""

from __future__ import annotations

import faulthandler
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from erpe.config import TrialConfig
from erpe.search.play import Event, play

# Read by Ray when it is imported or started; what the user set stays.
for _name, _value in {
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # under `uv run`, workers would be started by uv, from a copy
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # a local cluster listens on the loopback only
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # silences a warning about its coming default
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # what Ray says of dead workers goes to stdout; the ledger has it
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # prints a box even when told to be silent
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # ours lets trials finish their epoch
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # the ledger keeps them
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # the snapshot is never read
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}.items():
    os.environ.setdefault(_name, _value)

from ray import tune  # noqa: E402

WORKER_ENV = {
    # Spinning threads collapse as soon as two processes share a core: 54-137 against 670 images/s.
    "OMP_WAIT_POLICY": "PASSIVE",
}
"""Environment of every worker, from before its start."""


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
