"""What the commands do, for notebooks and scripts: `erpe.tune`, `erpe.train`, `erpe.run_study`.

Each is its command's own words with the same errors, continues what was begun, and may run in any thread. In the main
thread Ctrl-C, or a notebook's stop button, lets the running epochs finish and returns what is there; twice raises
KeyboardInterrupt. Nothing is lost by either.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

from erpe.datasets import Dataset, facts_of, read_grid
from erpe.errors import ConfigError, StudyError, TrackingError, either
from erpe.execution.callbacks import Progress
from erpe.execution.executors import How
from erpe.live import SearchProgress, StudyProgress
from erpe.notify import notified
from erpe.plugins import load as load_plugin
from erpe.results import Study, load_study
from erpe.store import Store, name_store
from erpe.study.distributions import Space
from erpe.study.entries import dotted
from erpe.study.lookup import numbered
from erpe.study.plan_file import find_plan
from erpe.study.reading import read_studies
from erpe.study.search_space import load_space
from erpe.study.spec import Pruner, Sampler, StudySpec, define
from erpe.study.starting_points import Start, from_file, from_run, from_study
from erpe.tuned import Tuned

Place = str | Path

DEFAULT_TRIALS = {"digits": 6, "mnist": 20, "cifar10": 20}
"""Trials of a search, by the kind of data set."""

Shown = bool | Progress
"""True: a table in a terminal or notebook, lines elsewhere; False: nothing; or an object of one's own."""


def tune(
    variant: str, dataset: Place | Dataset, *, trials: int | None = None, store: Place = "runs",
    name: str | None = None, new: bool = False, epochs: int | None = None, settings: dict[str, Any] | None = None,
    space: Place | None = None, enqueue: Place | None = None, warm_start: str | None = None,
    objective: str | Sequence[str] = "accuracy", at_most: dict[str, float] | None = None, sampler: Sampler = "tpe",
    pruner: Pruner = "auto", seed: int = 0, resize: str | int | None = None, plugins: Sequence[str] = (),
    progress: Shown = True, notify: str | None = None, **how: Unpack[How],
) -> Tuned:  # fmt: skip
    """Search the best settings of a variant and test the best model once; `erpe tune`.

    >>> import erpe
    >>> quick = {"settings": {"model.width": 16, "model.depth": 1, "model.heads": 2}, "progress": False}
    >>> found = erpe.tune("relu_rope", "digits", trials=2, epochs=1, executor="inline", **quick)
    >>> found
    <study digits-relu_rope: 2 complete, trial 0 is the best>
    >>> found.best.model.width, "test/accuracy" in found.metrics
    (16, True)

    Args:
        dataset: the name of a published one, or the path of own images.
        trials: of the whole study, earlier ones included; default: 6 for digits, 20 for others.
        name: of the study; default: DATASET-VARIANT.
        new: start another study beside the one of this name.
        settings: what every trial has, `{"train.ema": 0.99}`.
        objective: accuracy or log_likelihood; or several, as "accuracy,flops".
        at_most: what a model may cost, `{"flops": 20e6}`; also params and inference_ms.
        space: a TOML file whose `[space]` is laid over the default space.
        enqueue: a TOML file with `[[points]]`, tables of settings that the first trials have.
        warm_start: a study whose best configuration comes first; if only the space differs, its other trials teach too.
        resize: height and width that own images get, as "32x32".
        plugins: Python files with own attentions or encodings, or the names of installed ones.
        notify: who is told when it ends, fails or stalls: an address of apprise, as mailto://..., or a command that
            gets the message as its last argument; default: `ERPE_NOTIFY`, or nobody.
    Raises:
        ErpeError: the line that the command would show.
        KeyboardInterrupt: the second Ctrl-C.
    """
    _begin(how, plugins)
    opened, data = _prepare(store, dataset, resize, how)
    spec = define(
        variant, data, space=load_space(space, variant, data, settings) if space else None, settings=settings,
        epochs=epochs, sampler=sampler, pruner=pruner, seed=seed, objective=objective, at_most=at_most,
    )  # fmt: skip
    start = from_file(enqueue, spec) if enqueue else Start()
    if warm_start:
        earlier = from_study(read_studies(opened), warm_start, spec)
        start = earlier._replace(points=start.points + earlier.points)
    trials = DEFAULT_TRIALS[facts_of(data).like] if trials is None else trials
    return _search(spec, opened, progress, notify, trials=trials, name=name, new=new, start=start, **how)


def train(
    variant: str = "", dataset: Place | Dataset = "", *, like: str | None = None, store: Place = "runs",
    new: bool = False, epochs: int | None = None, settings: dict[str, Any] | None = None, seed: int = 0,
    resize: str | int | None = None, plugins: Sequence[str] = (), progress: Shown = True, notify: str | None = None,
    data_dir: Path | None = None, device: str = "auto",
) -> Tuned:  # fmt: skip
    """Train one configuration in this process and test it: a study of one trial; `erpe train`.

    >>> import erpe
    >>> small = {"model.width": 16, "model.depth": 1, "model.heads": 2}
    >>> trained = erpe.train("softmax", "digits", epochs=1, settings=small, progress=False)
    >>> trained.model().config.variant
    'softmax'
    >>> again = erpe.train(like="train-digits-softmax/0", settings={"train.lr": 1e-3}, progress=False)
    >>> (again.best.seed, again.best.train.lr) == (trained.best.seed, 1e-3)
    True

    Args:
        like: a recorded run, as STUDY/3, whose variant, data set, settings and seed this one has; `settings` and what
            else is given replace what it had.
    Args, Raises: as of `tune`.
    """
    how = How(data_dir=data_dir, device=device, executor="inline")
    if bool(like) == bool(variant) or not (like or dataset):
        raise ConfigError("train: use either a variant and a data set, or a recorded run (like), instead")
    _begin(how, plugins)
    notes: list[str] = []
    own_seed = 0
    if like:
        from erpe.tracking.provenance import differences

        past, kept, made = from_run(read_studies(Store.existing(store)), like)
        variant, dataset, own_seed = past.model.variant, dataset or past.data.dataset, 0 if seed else past.seed
        if epochs:
            kept.pop("train.epochs", None)
        settings, notes = kept | dotted(settings or {}), differences(like, made)
    opened, data = _prepare(store, dataset, resize, how)
    spec = define(
        variant, data, space=Space(axes={}), settings=settings, epochs=epochs, sampler="random", pruner="none",
        seed=seed,
    )  # fmt: skip
    spec = spec.model_copy(update={"base": spec.base.replace({"seed": own_seed})})
    name = numbered(opened, f"train-{spec.name}", spec, new)
    return _search(spec, opened, progress, notify, trials=1, name=name, start=Start(notes=tuple(notes)), **how)


def run_study(
    file: Place | dict[str, Any], *, changes: Sequence[str] = (), store: Place = "runs", offline: bool = False,
    replaces: bool = False, progress: Shown = True, plugins: Sequence[str] = (), notify: str | None = None,
    **how: Unpack[How],
) -> Study:  # fmt: skip
    """Search, confirm and test every variant of a study file; `erpe study run`.

    >>> import erpe
    >>> question = {
    ...     "name": "two", "dataset": "digits", "variants": ["softmax", "relu"],
    ...     "search": {"trials": 1, "epochs": 1}, "confirm": {"seeds": 2},
    ...     "settings": {"model.width": 16, "model.depth": 1, "model.heads": 2},
    ... }
    >>> study = erpe.run_study(question, executor="inline", offline=True, progress=False)
    >>> study
    <study two: 2 of 2 arms finished, 2 trials, 4 confirmed runs>
    >>> list(study.runs.groupby("arm")["test/accuracy"].count())
    [2, 2]
    >>> figure = study.plot_accuracy()

    Args:
        file: a study file; what is in one, as nested dictionaries; or the name of a study, which goes on as it was.
        changes: lines of the file that are changed, as `["search.trials=2"]`.
        offline: needs no MLflow; `erpe sync` sends it later.
        replaces: test results that a changed file makes old are replaced.
        plugins: those of a study that is given by its name; a study file names its own.
    Returns:
        the study; its `result` says how it stands, `result.interrupted` whether Ctrl-C ended it.
    Raises:
        ErpeError, KeyboardInterrupt: as of `tune`.
    """
    from erpe.search.run_study import run

    _begin(how, plugins)
    opened = Store.open(store)
    plan = find_plan(file, changes, opened)
    with _shown(progress, lambda: StudyProgress(plan), notify, plan.name, plan.dataset) as shows:
        if not offline:
            _check_tracking(opened, shows)
        result = run(plan, opened, offline=offline, replace=replaces, progress=shows, **how)
    if not result.confirmed and not result.interrupted:
        raise StudyError(f"study {result.study}: no trial to confirm; {next(iter(result.failed.values()))}")
    study = replace(load_study(plan.name, opened.root), result=result)
    if offline or result.interrupted:
        return study
    from erpe.report.page import publish

    page, lag = publish(plan, opened, study.outcomes, study.comparison())
    return replace(study, result=replace(result, page=page, lag=lag))


def _prepare(store: Place, dataset: Place | Dataset, resize: str | int | None, how: How) -> tuple[Store, str | Dataset]:
    """Open the store and find the data; raises ConfigError where arguments make no sense."""
    from erpe.training.own import find_dataset, recall

    opened = Store.open(store)
    found: str | Dataset
    if isinstance(dataset, Dataset):
        found = dataset
        recall(dataset, opened.datasets)
    else:
        found = find_dataset(dataset, resize=read_grid(resize), cache=opened.datasets)
    if how.get("data_dir") and isinstance(found, Dataset):
        raise ConfigError("--data-dir is the folder of published data sets; --dataset says where own images lie")
    return opened, found


def _begin(how: How, plugins: Sequence[str]) -> None:
    """Refuse an unknown executor, and load plug-ins."""
    executor = how.get("executor", "ray")
    if executor not in ("ray", "inline"):
        raise ConfigError(f"executor: {executor!r} given; use {either(('ray', 'inline'))} instead")
    for each in plugins:
        load_plugin(each)


def _search(spec: StudySpec, store: Store, progress: Shown, notify: str | None, **how: Any) -> Tuned:
    from erpe.search.tune import tune as search

    data = spec.base.data.dataset
    with _shown(progress, lambda: SearchProgress(spec), notify, how["name"] or spec.name, data) as shows:
        _check_tracking(store, shows)
        result = search(spec, store, progress=shows, **how)
    return Tuned(result, spec, store)


@contextlib.contextmanager
def _shown(given: Shown, make: Any, notify: str | None, study: str, dataset: str | Dataset) -> Iterator[Progress]:
    """Show a study while it runs; first what may be wrong with own images."""
    from erpe.training.own import doubt_of

    shown = (make() if given else contextlib.nullcontext(Progress())) if isinstance(given, bool) else None
    target = notify or os.environ.get("ERPE_NOTIFY")
    with shown or contextlib.nullcontext(given) as progress, notified(target, study, progress) as told:
        if doubt := doubt_of(dataset):
            told.on_warning(doubt)
        yield told


def _check_tracking(store: Store, progress: Progress) -> None:
    """Say before a long search that its results will wait in the store, if the server is down; raises TrackingError."""
    from erpe.tracking.connection import examine

    health = examine(store.tracking_uri)
    if health.state == "refuses":
        raise TrackingError(health.line)
    if health.state != "well":
        progress.on_warning(name_store(health.line, store.root))
