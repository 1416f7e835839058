"""What a search seeks, and what a model may cost: fronts, pruning and limits, whatever was killed between."""

import json

import pytest
import toys
from optuna.trial import TrialState

from erpe.config import defaults
from erpe.errors import ConfigError, ErpeError
from erpe.search.tune import tune
from erpe.store import Store
from erpe.study import pruning, samplers
from erpe.study.objectives import Goals, check_limits, read_limits, read_objective
from erpe.study.reading import read_studies
from erpe.study.records import TrialOutcome, TrialRecord, irreplaceable
from erpe.study.session import StudySession
from erpe.study.spec import StudySpec, define
from erpe.tracking.comparison import diff
from erpe.tracking.image import MOST_TAGGED, desired

BOTH = Goals(("accuracy", "flops"), {})


@pytest.fixture
def store(tmp_path):
    return Store.open(tmp_path)


def record(number, value, flops, state="COMPLETE", epochs=1, **metrics):
    """A trial that costs so much and had this value in all its epochs."""
    verdict = TrialOutcome(state, metrics, None)
    values = dict.fromkeys(range(1, epochs + 1), value)
    config = defaults("relu", "digits")
    return TrialRecord(number, f"x-{number}", state, config, values, verdict, None, None, False, {"flops": flops})


def search(store, spec, trials, budget=None, name="x", value=lambda trial: trial.config.train.lr, **metrics):
    """Play the trials of a study, each worth its learning rate."""
    with StudySession.open(store, spec, trials=trials, name=name) as session:
        while trial := session.ask(budget or trials):
            for epoch in range(1, spec.epochs + 1):
                if pruned := session.report(trial.number, epoch, value(trial)):
                    break
            session.decide(trial.number, "PRUNED" if pruned else "COMPLETE", {} if pruned else metrics)
            session.tell(trial.number)
        return session.read(), session._study.get_trials()


def test_the_front_is_what_no_other_trial_dominates():
    trials = [record(0, 0.9, 100.0), record(1, 0.8, 50.0), record(2, 0.7, 60.0), record(3, 0.95, 200.0)]
    trials += [record(4, 0.99, 10.0, state="PRUNED"), record(5, 0.8, 50.0)]
    assert BOTH.front(trials) == {
        3: {"accuracy": 0.95, "flops": 200.0}, 0: {"accuracy": 0.9, "flops": 100.0},
        1: {"accuracy": 0.8, "flops": 50.0}, 5: {"accuracy": 0.8, "flops": 50.0},
    }  # fmt: skip
    assert BOTH._replace(at_most={"flops": 120.0}).front(trials).keys() == {0, 1, 5}
    assert Goals().front(trials) == {}


@pytest.mark.slow
def test_mlflow_has_the_best_of_a_front_in_a_tag_once_no_driver_is_at_work(store):
    spec = define("relu", "digits", epochs=1, sampler="random", objective="accuracy,flops")
    study, _ = search(store, spec, MOST_TAGGED + 2, value=lambda trial: trial.costs["flops"])
    assert len(study.front) > MOST_TAGGED, "what is worth more costs more"
    *_, image = desired([study], store, running=False)
    ((tags, _),) = [call.news for call in diff(image, None) if call.what == "describe"]
    best = sorted(study.front.items(), key=lambda item: -item[1]["accuracy"])[:MOST_TAGGED]
    assert json.loads(tags["front"]) == {str(number): measures for number, measures in best}
    assert len(tags["front"]) < 8000, "what a tag may have"
    *_, image = desired([study], store, running=True)
    assert "front" not in image.tags


def test_the_best_is_within_the_limits():
    trials = [record(0, 0.9, 1.0), record(1, 0.8, 1.0), record(2, 0.8, 1.0)]
    timed = [
        trial._replace(verdict=TrialOutcome("COMPLETE", {"time/inference_ms_per_image": ms}, None))
        for trial, ms in zip(trials, (0.3, 0.1, 0.1), strict=True)
    ]
    limited = Goals(("accuracy",), {"inference_ms": 0.2})
    assert [trial.number for trial in limited.eligible(timed)] == [1, 2]
    assert limited.over(limited.spent(timed[0])) == "inference_ms 0.3, above 0.2"
    assert [trial.number for trial in Goals().eligible(timed)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("own", "stops"),
    [((0.9, 100), False), ((0.5, 100), True), ((0.5, 10), False), ((0.5, 41), True), ((0.795, 100), False)],
)
def test_a_trial_is_stopped_for_better_ones_that_cost_no_more(own, stops):
    others = [record(n, 0.8 - n / 100, 40.0, epochs=2) for n in range(4)]
    assert BOTH.falls_behind(record(9, *own, state="RUNNING", epochs=2), others, 2, 2) == stops


@pytest.mark.slow
def test_without_a_cost_in_closed_form_pruning_is_that_of_optuna(tmp_path):
    """Successive halving on the first objective stops the trials that Optuna's would."""
    one = define("relu", "digits", epochs=9, sampler="random", pruner="asha")
    several = define("relu", "digits", epochs=9, sampler="random", pruner="asha", objective="accuracy,inference_ms")
    found = []
    for spec in (one, several):
        metrics = {"time/inference_ms_per_image": 0.1}
        record, _ = search(Store.open(tmp_path / spec.objective), spec, 8, **metrics)
        found.append([(trial.state, trial.epochs) for trial in record.trials])
    assert found[0] == found[1] and {state for state, _ in found[0]} == {"PRUNED", "COMPLETE"}


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["tpe", "gp", "nsgaii", "random"])
def test_every_sampler_seeks_several_objectives_within_limits(store, sampler):
    spec = define("relu", "digits", epochs=1, sampler=sampler, objective="accuracy,flops", at_most={"params": 90_000})
    study, trials = search(store, spec, 6)
    assert study.counts == {"COMPLETE": 6} and study.front
    assert all(trial.costs["params"] <= 90_000 for trial in study.trials)
    assert [trial.values for trial in trials if trial.state == TrialState.COMPLETE] == [
        [trial.value, trial.costs["flops"]] for trial in study.trials
    ]
    assert study.refused == len(trials) - 6 > 0
    assert irreplaceable(study).keys() == study.front.keys() | {study.best.number}


def test_the_first_generation_and_start_up_are_the_same_draws_for_every_arm(store):
    for sampler in ("tpe", "nsgaii"):
        drawn = [
            search(store, define(variant, "digits", epochs=1, sampler=sampler, objective="accuracy,params"), 8, 2, name)
            for variant, name in (("softmax", f"one-{sampler}"), ("favor", f"other-{sampler}"))
        ]
        one, other = ([trial.config.train.lr for trial in study.trials] for study, _ in drawn)
        assert one == other and one[0] != one[1]


def test_a_limit_refuses_before_training_and_refused_draws_use_no_budget(store):
    spec = define("relu", "digits", epochs=1, at_most={"flops": 1e6})
    assert 0 < check_limits(spec) < 1
    study, trials = search(store, spec, 4)
    assert study.counts == {"COMPLETE": 4} and all(trial.costs["flops"] <= 1e6 for trial in study.trials)
    refused = [trial for trial in trials if trial.number not in {each.number for each in study.trials}]
    assert study.refused == len(refused) > 0
    assert all(trial.state == TrialState.PRUNED and trial.constraints["flops"] > 0 for trial in refused)
    again, more = search(store, spec, 4)
    assert again == study and len(more) == len(trials)


def test_a_trial_above_a_measured_limit_is_told_to_optuna_and_is_never_the_best(store):
    spec = define("relu", "digits", epochs=1, at_most={"inference_ms": 0.2})
    study, trials = search(store, spec, 2, **{"time/inference_ms_per_image": 0.5})
    assert study.best is None and study.counts == {"COMPLETE": 2}
    assert study.reasons[0] == "inference_ms 0.5, above 0.2"
    assert trials[0].constraints == {"inference_ms": pytest.approx(1.5)}


def test_a_study_of_several_objectives_is_continued_where_it_was_killed(store):
    spec = define("relu", "digits", epochs=4, pruner="asha", objective="accuracy,flops")
    with StudySession.open(store, spec, trials=4, name="x") as session:
        first = session.ask(4)
        session.report(first.number, 1, 0.5)
        session.report(first.number, 2, 0.6)
    with StudySession.open(store, spec, trials=4, name="x") as session:
        again = session.ask(4)
        assert again == first._replace(epochs={1: 0.5, 2: 0.6}) and again.costs["flops"] > 0
        session.report(again.number, 3, 0.7)
        session.report(again.number, 3, 0.9)  # the first word counts
        session.decide(again.number, "COMPLETE", {})
    study, trials = search(store, spec, 4)
    assert study.trials[0].epochs == {1: 0.5, 2: 0.6, 3: 0.7, 4: study.trials[0].value} and study.counts.total() == 4
    assert trials[0].values == [study.trials[0].value, first.costs["flops"]]


def test_a_measure_that_is_missing_or_no_number_fails_the_trial(store):
    for metrics in ({}, {"time/inference_ms_per_image": float("nan")}):
        spec = define("relu", "digits", epochs=1, objective="accuracy,inference_ms")
        study, _ = search(store, spec, 1, name=f"n{len(metrics)}", **metrics)
        assert study.counts == {"FAIL": 1} and "time/inference_ms_per_image" in study.reasons[0]


def test_tune_trains_and_times_real_trials(store, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store.root}/no/such.db")
    small = {"model.width": 16, "model.depth": 1, "model.heads": 2, "data.train_limit": 200}
    spec = define("relu", "digits", epochs=1, settings=small, objective="log_likelihood,inference_ms,flops")
    found = tune(spec, store, trials=1, executor="inline")
    assert found.front[0].keys() == {"log_likelihood", "inference_ms", "flops"}
    assert found.value == found.front[0]["log_likelihood"] < 0 < found.front[0]["inference_ms"]


def test_what_is_not_set_changes_no_identity():
    plain, spelt = define("relu", "digits"), define("relu", "digits", objective=["accuracy"], at_most={})
    assert plain.identity == spelt.identity and {"objective", "at_most"}.isdisjoint(plain.model_dump())
    assert StudySpec(**plain.model_dump()).goals == Goals()
    other = define("relu", "digits", objective="accuracy,flops", at_most={"params": 1})
    assert other.identity != plain.identity and StudySpec(**other.model_dump(mode="json")) == other


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("acuracy", "did you mean accuracy"),
        ("flops", "accuracy,flops"),
        ("accuracy,accuracy", "there twice"),
        ("", "use"),
    ],
)
def test_a_wrong_objective_is_told_in_one_line(given, said):
    with pytest.raises(ConfigError, match=said):
        read_objective(given)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"flop": 1}, "did you mean flops"),
        ({"flops": 0}, "above 0"),
        ({"flops": "x"}, "above 0"),
        (3, "use a table"),
        ("flops=fast", "a number for each cost"),
    ],
)
def test_a_wrong_limit_is_told_in_one_line(given, said):
    with pytest.raises(ConfigError, match=said):
        read_limits(given)


def test_limits_and_pruners_that_cannot_work_are_refused_before_anything_starts(store):
    for pruner in ("median", "hyperband"):
        with pytest.raises(ConfigError, match="use asha, none or auto"):
            define("relu", "digits", pruner=pruner, objective="accuracy,flops")
    with pytest.raises(ConfigError, match=r"none of .* is within .*least: flops"):
        tune(define("relu", "digits", at_most={"flops": 10}), store, trials=1, executor="inline", work=toys.work())
    assert read_studies(store) == []


def test_a_search_that_can_meet_its_limits_no_more_says_so(store, monkeypatch):
    monkeypatch.setattr("erpe.study.samplers.MOST_DRAWS", 3)
    with pytest.raises(ErpeError, match="3 draws in a row"):
        search(store, define("relu", "digits", epochs=1, at_most={"flops": 10}), 1)


def test_rungs_are_those_of_the_settings_that_are_stored():
    spec = define("relu", "digits", epochs=10, pruner="asha", objective="accuracy,flops")
    first = samplers.settings(spec, 20)["pruner"]["min_resource"]
    others = [record(n, 0.9, 1.0, epochs=10) for n in range(8)]
    own = record(9, 0.1, 2.0, state="RUNNING")
    stops = [
        epoch
        for epoch in range(1, 10)
        if pruning.falls_behind(spec, 20, own._replace(epochs=dict.fromkeys(range(1, epoch + 1), 0.1)), others)
    ]
    assert stops == [first, 2 * first]
    never = spec.model_copy(update={"pruner": "none"})
    assert not pruning.falls_behind(never, 20, own._replace(epochs={first: 0.1}), others)
