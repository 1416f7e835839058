"""Packs in a search: trials of one shape run together; whoever leaves, leaves alone; nothing is lost or doubled."""

import os
import signal
from functools import partial
from random import Random
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_run_study import ARMS, is_confirmation
from test_run_study import play as study
from test_tune import EPOCHS, check_books, logs
from toys import number_of, work
from trials import curve, tiny

from erpe.config import defaults
from erpe.errors import ConfigError, TrialError
from erpe.execution.callbacks import Progress
from erpe.execution.trial_queue import OWN, TrialQueue, shape
from erpe.io import read_json
from erpe.search.tune import tune
from erpe.store import Store
from erpe.study.distributions import Choices, Floats, Space
from erpe.study.reading import read_studies
from erpe.study.session import MAX_ATTEMPTS
from erpe.study.spec import define
from erpe.tracking.tracker import Tracker

AXES = {"train.lr": Floats(low=1e-4, high=1e-2), "model.dropout": Floats(low=0.0, high=0.2)}
SPEC = define("relu_general", "digits", space=Space(axes=AXES), epochs=EPOCHS, sampler="random", pruner="none")
NAME = SPEC.name


@pytest.fixture
def store(tmp_path):
    return Store.open(tmp_path)


@pytest.fixture
def without_mlflow(monkeypatch):
    """Everything is recorded, nothing is sent to MLflow."""
    monkeypatch.setattr("erpe.tracking.tracker.Tracker", partial(Tracker, send=False))


def search(store, trials=6, pack=3, spec=SPEC, **options):
    return tune(spec, store, trials=trials, pack=pack, **({"executor": "inline", "work": work()} | options))


def beside(store):
    """Trial -> how many trained beside it, epoch by epoch."""
    found = {}
    for number, log in logs(store, NAME).items():
        found[number], others = [], 0
        for what in log:
            if what.startswith("beside"):
                others = int(what.split()[1])
            elif what.startswith("epoch"):
                found[number].append(others)
                others = 0
    return found


# Who runs with whom


def test_what_is_stacked_may_differ_and_nothing_else():
    base = defaults("favor_rope", "mnist")
    assert shape(base) == shape(base.replace({"seed": 7, "train.lr": 0.1, "model.dropout": 0.1, "train.ema": 0.9}))
    for name, value in {"model.width": 32, "model.eps": 0.1, "train.batch": 32, "data.mixup": 0.5}.items():
        assert shape(base) != shape(base.replace({name: value})), name
    assert set(OWN) <= base.flat().keys()


SIZES = {width: tiny(settings={"model.width": width}) for width in (8, 16, 32)}


class Controller:
    """Hands out trials of these widths in turn, and no more; an event says whether its trial goes on."""

    def __init__(self, widths):
        self.trials = [SimpleNamespace(uid=str(n), config=SIZES[width]) for n, width in enumerate(widths)]
        self.handed, self.ended = 0, []

    def next_trial(self, beside=None):
        self.handed += 1
        return self.trials[self.handed - 1] if self.handed <= len(self.trials) else None

    def on_trial_result(self, trial, event):
        self.ended += [] if event else [trial.uid]
        return event

    def on_trial_error(self, trial, reason):
        return True


@given(st.lists(st.sampled_from(list(SIZES)), max_size=12), st.integers(1, 5), st.integers())
def test_every_trial_is_in_one_pack_of_its_shape_whoever_leaves_and_crashes(widths, size, seed):
    controller, chance, crashed = Controller(widths), Random(seed), set()
    queue, workers = TrialQueue(controller, size), [[], []]
    while any(workers) or queue.running or (pack := queue.next_pack()):
        workers[0] = workers[0] or (pack if not any(workers) else queue.next_pack())
        workers.reverse()
        pack = workers[0]
        assert len(pack) <= size and len({each.config.model.width for each in pack}) <= 1
        assert len(pack) <= 1 or not crashed & {each.uid for each in pack}
        held = {each.uid for worker in workers for each in worker}
        assert len(held) == sum(map(len, workers)), "no trial is in two packs"
        asked = min(controller.handed, len(widths)) - len(controller.ended) - len(held)
        assert asked < 2 * size or crashed, "at most a pack is asked for ahead"
        if chance.random() < 0.1:
            queue.on_crash(pack, "killed")
            crashed |= {each.uid for each in pack}
        else:
            goes_on = [queue.on_event(each, each.uid not in crashed and chance.random() < 0.7) for each in pack]
            if pack and all(goes_on):
                continue
            queue.release(pack)
        workers[0] = []
    assert sorted(controller.ended) == sorted(each.uid for each in controller.trials)


def test_no_more_than_a_pack_is_asked_for_ahead_and_what_rests_goes_first():
    controller = Controller([8, 16, 8, 16, 8, 8])
    queue = TrialQueue(controller, 4)
    first = queue.next_pack()
    assert [each.uid for each in first] == ["0", "2"] and controller.handed == 4
    assert [queue.on_event(each, each.uid == "2") for each in first] == [False, True]
    queue.release(first)
    assert [each.uid for each in queue.next_pack()] == ["2", "4"]
    assert [each.uid for each in queue.next_pack()] == ["1", "3"]


def test_a_trial_that_is_to_be_compiled_runs_alone():
    controller = Controller([8, 8])
    controller.trials[1].config = controller.trials[0].config.replace({"train.compile": "on"})
    assert [len(pack) for pack in iter(TrialQueue(controller, 4).next_pack, [])] == [1, 1]


def test_a_pack_of_none_is_refused(store):
    with pytest.raises(ConfigError, match="pack: 0 given; use 1 or more instead"):
        search(store, pack=0)


# In this process


def test_trials_of_one_shape_train_together(store, without_mlflow):
    assert search(store).counts == {"COMPLETE": 6}
    check_books(store, 6)
    assert all(others == [2] * EPOCHS for others in beside(store).values())


@pytest.mark.slow
def test_the_same_seed_gives_the_same_search_and_a_pack_only_asks_ahead(tmp_path, without_mlflow):
    spec = define("relu_general", "digits", space=Space(axes=AXES), epochs=3, sampler="tpe", pruner="asha", seed=5)
    found = []
    for name, pack in (("a", 3), ("b", 3), ("c", 1)):
        place = Store.open(tmp_path / name)
        search(place, pack=pack, spec=spec)
        (study,) = read_studies(place, spec.name)
        found.append([(trial.config, trial.state, trial.epochs) for trial in study.trials])
    assert found[0] == found[1]
    assert [config for config, *_ in found[0]][:3] == [config for config, *_ in found[2]][:3]


def test_trials_of_other_shapes_wait_for_a_pack_of_their_own(store, without_mlflow):
    spec = define(
        "relu", "digits", epochs=2, sampler="random", pruner="none",
        space=Space(axes={"model.width": Choices(values=(32, 64)), **AXES}),
    )  # fmt: skip
    assert search(store, trials=9, spec=spec, name=NAME).counts == {"COMPLETE": 9}
    assert {others for each in beside(store).values() for others in each} >= {1}


def _diverge(folder, epoch):
    if number_of(folder) == 1 and epoch == 2:
        raise TrialError("step 17: the loss is nan")


@pytest.mark.slow
def test_whoever_fails_leaves_and_another_takes_the_place(store, without_mlflow):
    result = search(store, trials=4, work=work(accident=_diverge))
    assert result.counts == {"COMPLETE": 3, "FAIL": 1} and result.reasons == {1: "step 17: the loss is nan"}
    check_books(store, 4)
    # 3 takes the place of 1 after the second epoch; two epochs later 0 and 2 are done.
    assert beside(store) == {0: [2, 2, 2, 2], 1: [2, 2], 2: [2, 2, 2, 2], 3: [2, 2, 0, 0]}


def _bug(folder, epoch):
    if number_of(folder) == 1:
        raise ZeroDivisionError("a bug")


def test_after_a_crash_each_goes_on_alone_and_only_the_poisonous_one_fails(store, without_mlflow):
    result = search(store, trials=4, work=work(accident=_bug))
    assert result.counts == {"COMPLETE": 3, "FAIL": 1} and "ZeroDivisionError: a bug" in result.reasons[1]
    check_books(store, 4, repeated=MAX_ATTEMPTS + 1)
    assert logs(store, NAME)[1].count("epoch 1") == MAX_ATTEMPTS


class Stops(Progress):
    """Ctrl-C at an epoch of a trial."""

    def on_epoch(self, moment):
        if (moment.number, moment.epoch) == (1, 2):
            os.kill(os.getpid(), signal.SIGINT)


def test_after_ctrl_c_all_of_a_pack_go_on_where_they_were(store, without_mlflow):
    first = search(store, progress=Stops())
    assert first.interrupted and first.counts["RUNNING"] == 3
    assert search(store).counts == {"COMPLETE": 6}
    check_books(store, 6)


def test_a_pack_is_of_one_arm_and_the_arms_take_turns_by_the_pack(store):
    order = []
    plain = work()

    def start(config, folder):
        order.append((config.model.variant, is_confirmation(folder)))
        return (plain.confirm if is_confirmation(folder) else plain.start)(config, folder)

    fixed = [f'space."model.{name}"={value}' for name, value in (("width", 16), ("depth", 2), ("heads", 2))]
    changes = [*fixed, "search.trials=4", "confirm.seeds=2"]
    result = study(store, *changes, pack=2, work=plain._replace(start=start, confirm=start))
    assert result.confirmed == dict.fromkeys(ARMS, 2)
    seeds = [(variant, True) for variant in ARMS for _ in range(2)]
    assert order[-6:] == seeds
    confirmed = [path.read_text() for path in store.checkpoints.glob("*.confirm-*/*/log")]
    assert len(confirmed) == 6 and all("beside 1" in log for log in confirmed)


def test_real_trials_in_packs_are_those_of_a_search_without(tmp_path, without_mlflow):
    spec = define(
        "favor_general", "digits", space=Space(axes=AXES), epochs=2, sampler="random", pruner="none",
        settings={"model.width": 16, "model.depth": 1, "data.train_limit": 150},
    )  # fmt: skip
    found = []
    for pack in (1, 3):
        place = Store.open(tmp_path / str(pack))
        assert search(place, trials=3, pack=pack, spec=spec, work=None).counts == {"COMPLETE": 3}
        outcomes = sorted(place.checkpoints.glob("*/*/outcome.json"))
        found.append([curve(read_json(path)["history"]) for path in outcomes])
    for alone, packed in zip(*found, strict=True):
        for left, right in zip(alone, packed, strict=True):
            assert left == pytest.approx(right, abs=1e-3)
