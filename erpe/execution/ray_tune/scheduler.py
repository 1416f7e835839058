"""The controller's decisions as Ray Tune knows them: a Searcher, a Scheduler and a Stopper.

Tune places trials, reuses workers and notices dead ones; it decides nothing and remembers nothing.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from erpe.errors import ConfigError, StudyError
from erpe.execution.fair_share import TrialController
from erpe.execution.ray_tune.cluster import check_reachable
from erpe.execution.ray_tune.trainable import LAST_WORDS, MOST, Worker  # before Ray: sets its environment
from erpe.execution.trial_loop import TrialFactory
from erpe.execution.trial_queue import TrialQueue
from erpe.study.records import TrialRecord
from erpe.text import Terminal, last_line

import ray  # isort: skip
from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

T = TypeVar("T")

KILLED = "the worker was killed, perhaps for want of memory"

RAISED = re.compile(r"Traceback|ray::")  # what Ray says of an exception, and not of a process that was killed
LOOK_SECONDS = 5.0
"""How often the driver looks whether Ray is alive."""


class TuneBridge:
    """Which trial of Tune is which pack of trials, and the first error of ours, which Tune would wrap and swallow."""

    def __init__(self, controller: TrialController, start: TrialFactory, size: int) -> None:
        self.controller, self.start, self.queue = controller, start, TrialQueue(controller, size)
        self.packs: dict[str, list[TrialRecord]] = {}
        """Trial of Tune -> its pack, while a worker has it."""
        self.begun: set[str] = set()
        """Trials of Tune that a worker has begun."""
        self.reasons: dict[str, str] = {}
        """Trials of Tune whose worker raised an exception -> its traceback."""
        self.error: BaseException | None = None

    def guarded(self, call: Callable[[], T], otherwise: T) -> T:
        """Return the call's answer; after an error of ours, the search stops and no trial changes."""
        if self.error is not None:
            return otherwise
        try:
            return call()
        except Exception as error:
            self.error = error
            return otherwise


class StudySearcher(Searcher):
    """Hands the session's trials to Tune."""

    def __init__(self, link: TuneBridge) -> None:
        super().__init__()
        self._link = link

    def suggest(self, trial_id: str) -> Any:
        """Return a pack as Tune's configuration."""
        link = self._link
        pack = link.guarded(link.queue.next_pack, list[TrialRecord]())
        if not pack:
            return None if link.queue.running else Searcher.FINISHED  # those that run may yet need another worker
        link.packs[trial_id] = pack
        trials = {
            each.uid: {"config": each.config.model_dump(mode="json"), "folder": str(link.controller.folder(each))}
            for each in pack
        }
        return {"pack": trials, "start": link.start}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Record what the scheduler has not: that a worker was dead when it should take another pack."""
        link = self._link
        if pack := link.packs.pop(trial_id, None):
            link.guarded(lambda: link.queue.on_crash(pack, KILLED) if error else link.queue.release(pack), None)

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: the database is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing: the database is the state."""

    def __reduce__(self) -> Any:
        # Tune pickles its searcher into a file that is never read.
        return Searcher, ()


class StudyScheduler(FIFOScheduler):
    """Pass every event to the controller; stop a pack when one of its trials ends, as the others make a new pack."""

    def __init__(self, link: TuneBridge) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # Ray's
        self._link = link

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Record what the worker says."""
        link = self._link
        link.begun.add(trial.trial_id)
        if result["crash"]:  # its next step raises, and Tune asks for another worker
            link.reasons[trial.trial_id] = result["crash"]
            return TrialScheduler.CONTINUE
        pack, events = link.packs[trial.trial_id], dict(result["events"])
        heard = [each for each in pack if each.uid in events]
        if link.guarded(lambda: all([link.queue.on_event(each, events[each.uid]) for each in heard]), False):
            return TrialScheduler.CONTINUE
        link.queue.release(link.packs.pop(trial.trial_id))
        return TrialScheduler.STOP

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Handle a trial of Tune that is new, or comes back after a crash; then its trials make new packs."""
        if not trial.num_failures:
            return
        link = self._link
        pack = link.packs.pop(trial.trial_id)
        reason = link.reasons.pop(trial.trial_id, "") or _last_words(link.controller.folder(pack[0]))
        said = Path(trial.error_file).read_text(errors="replace")
        if trial.trial_id not in link.begun and RAISED.search(said):  # no fault of the trials, which never began
            why = last_line(said)
            link.error = link.error or StudyError(f"ray: a worker cannot begin ({why}); the same command continues")
        link.guarded(lambda: link.queue.on_crash(pack, reason), None)  # after an error of ours, nothing is recorded
        tune_controller.stop_trial(trial)

    def __reduce__(self) -> Any:
        return FIFOScheduler, ()


class AbortStopper(tune.Stopper):
    """Stop the experiment at once when the machine is broken; Ctrl-C is gentler, see `StudyController.draining`."""

    def __init__(self, link: TuneBridge) -> None:
        self._link = link
        context = ray.get_runtime_context()
        self._node, self._head = context.get_node_id(), context.gcs_address
        self._looked = time.monotonic()

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Single trials are stopped by the scheduler."""
        return False

    def stop_all(self) -> bool:
        """Whether an error of ours, or the end of Ray itself, ends the search."""
        if self._link.error is None and time.monotonic() - self._looked > LOOK_SECONDS:
            self._looked = time.monotonic()
            self._link.guarded(self._look, None)
        return self._link.error is not None

    def _look(self) -> None:
        # Without its node, Tune would wait for workers for ever. A head that is gone is never asked: Ray would wait
        # for its answer, and then end the process. `watch_head` ends the search.
        try:
            check_reachable(self._head)
        except ConfigError:
            return
        if not any(node["NodeID"] == self._node and node["Alive"] for node in ray.nodes()):
            raise StudyError("ray: this machine's node died; trials stay as they are, the same command continues")

    def __reduce__(self) -> Any:
        return tune.Stopper, ()


def _last_words(folder: Path) -> str:
    """What a worker that died could say, its cause in the last line: the traceback of a signal, or nothing."""
    file, words = folder / LAST_WORDS, ""
    with suppress(OSError):
        words = file.read_text(errors="replace").partition("\n\nExtension")[0][:MOST].strip()
        file.unlink()  # the next death has its own cause
    return f"{words}\nthe worker died of: {words.splitlines()[0]}" if words else KILLED


def run_ray(
    controller: TrialController,
    start: TrialFactory,
    *,
    concurrency: int | None,
    cpus: float,
    gpus: float,
    scratch: Path,
    pack: int = 1,
) -> None:
    """Run the search on Ray, which is running.

    Args:
        concurrency: packs at a time; default: as many as fit, and one more that waits for room.
        pack: trials of one shape that share a worker, and train as one program.
        cpus, gpus: of each pack; a fraction of a GPU is bookkeeping, not isolation.
        scratch: where Tune writes files that are never read.
    Raises:
        ErpeError: see `StudyController.on_trial_result`.
    """
    link = TuneBridge(controller, start, pack)
    tune.Tuner(
        tune.with_resources(Worker, {"cpu": cpus, "gpu": gpus}),
        tune_config=tune.TuneConfig(
            search_alg=StudySearcher(link),
            scheduler=StudyScheduler(link),
            num_samples=-1,
            max_concurrent_trials=concurrency,
            reuse_actors=True,
            trial_name_creator=lambda trial: trial.trial_id,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(scratch),
            stop=AbortStopper(link),
            failure_config=tune.FailureConfig(max_failures=-1),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            verbose=0,
            # Ray's own for notebooks empties the cell, and so our table; elsewhere Ray warns of a given one.
            progress_reporter=tune.CLIReporter() if Terminal().is_jupyter else None,
        ),
    ).fit()
    if link.error is not None:
        raise link.error
