"""A search that searches: rungs and start-up fit the budget, and trial k is the same draw for every arm."""

import pytest
from optuna.pruners import NopPruner, SuccessiveHalvingPruner

from erpe.store import Store
from erpe.study import pruning, samplers
from erpe.study.plan import Plan
from erpe.study.session import StudySession
from erpe.study.spec import define
from erpe.variants import VARIANTS

SAMPLERS = ["tpe", "gp", "random"]


@pytest.fixture
def store(tmp_path):
    return Store.open(tmp_path)


def search(store, spec, count, trials, restart=False, name=None):
    """Parameters of the trials of a search, whose values favour a high learning rate."""
    for budget in range(1, count + 1) if restart else [count]:
        with StudySession.open(store, spec, trials=trials, name=name) as session:
            while trial := session.ask(budget):
                for epoch in range(1, spec.epochs + 1):
                    session.report(trial.number, epoch, trial.config.train.lr)
                session.decide(trial.number, "COMPLETE", {})
                session.tell(trial.number)
            found = {trial.number: trial.params for trial in session._study.get_trials()}
    return [found[number] for number in sorted(found)]


def agree(one, other):
    """Whether trials have the same values of the axes that both have."""
    both = one.keys() & other.keys()
    assert "train.lr" in both or not both
    return {name: one[name] for name in both} == {name: other[name] for name in both}


@pytest.mark.parametrize("epochs", [1, 2, 3, 4, 10, 30, 100])
def test_the_first_rung_is_at_a_third_of_the_epochs_or_later(epochs):
    for pruner, key in (("asha", "min_resource"), ("hyperband", "min_resource"), ("median", "n_warmup_steps")):
        spec = define("relu", "digits", epochs=epochs, pruner=pruner)
        first = samplers.settings(spec, 20)["pruner"][key]
        assert epochs / 3 <= first <= max(1, epochs // 3 + 1)


def test_a_short_search_is_not_pruned_unless_it_is_told_to_be():
    auto, asha = define("relu", "digits"), define("relu", "digits", pruner="asha")
    assert isinstance(pruning.make_pruner(auto, 15), NopPruner)
    assert isinstance(pruning.make_pruner(auto, 16), SuccessiveHalvingPruner)
    assert isinstance(pruning.make_pruner(asha, 2), SuccessiveHalvingPruner)
    assert samplers.settings(auto, 15)["pruner"] == {"name": "none"}
    assert samplers.settings(auto, 16)["pruner"]["name"] == samplers.settings(asha, 2)["pruner"]["name"] == "asha"


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(("trials", "most"), [(1, 1), (2, 1), (3, 1), (6, 3), (8, 4), (100, 8)])
def test_the_start_up_is_at_most_half_the_trials(sampler, trials, most):
    spec = define("relu", "digits", sampler=sampler)
    startup = samplers.startup_trials(spec, trials)
    assert startup <= most and (startup > 0) == (sampler != "random")
    assert samplers.settings(spec, trials)["sampler"].get("n_startup_trials", 0) == startup


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["tpe", "gp"])
def test_a_sampler_takes_over_after_half_the_trials(tmp_path, sampler):
    drawn, learnt = (define("relu", "digits", epochs=1, sampler=name) for name in ("random", sampler))
    draws = search(Store.open(tmp_path / "drawn"), drawn, 6, 6)
    found = search(Store.open(tmp_path / "learnt"), learnt, 6, 6)
    assert found[:3] == draws[:3] and all(mine != drawn for mine, drawn in zip(found[3:], draws[3:], strict=True))


def test_settings_follow_the_budget_of_the_running_command(store):
    spec = define("relu", "digits", epochs=3)
    for trials, startup, pruner in ((6, 3, "none"), (20, 8, "asha"), (6, 3, "none")):
        with StudySession.open(store, spec, trials=trials) as session:
            settings, uid = session.read().about.settings, session.uid
            assert settings["trials"] == trials and settings["sampler"]["n_startup_trials"] == startup
            assert settings["pruner"]["name"] == pruner
    assert session.uid == uid


@pytest.mark.slow
def test_trial_k_has_the_same_shared_axes_in_every_arm(store):
    """Over all twelve variants, with knobs of their own, one of them conditional, and with a switch."""
    switched = {"model.rope": ("axial", "mixed")}
    budget = {"sampler": "random", "epochs": 1}
    plan = Plan(name="x", dataset="digits", variants=VARIANTS, seed=3, switches=switched, search=budget)
    found = {arm.name: search(store, plan.search_spec(arm), 4, 4, name=arm.name) for arm in plan.arms()}
    assert len(found) == 15
    for number in range(4):
        trials = [trials[number] for trials in found.values()]
        assert all(agree(one, other) for one in trials for other in trials)
    conditional = [trial for trial in found["relu"] if "model.features" in trial]
    assert 0 < len(conditional) < 4, "the seed shows both cases"
    assert len({repr(trial) for trial in found["softmax"]}) == 4
    assert "model.rope" not in found["favor_rope-mixed"][1], "what a switch sets is not drawn"


@pytest.mark.slow
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_arm_that_is_continued_after_every_trial_starts_up_as_one_that_is_not(tmp_path, sampler):
    one = define("softmax", "digits", epochs=1, sampler=sampler)
    other = define("favor_rope", "digits", epochs=1, sampler=sampler)
    whole = search(Store.open(tmp_path / "whole"), one, 6, 6)
    apart = search(Store.open(tmp_path / "apart"), other, 6, 6, restart=True)
    assert [agree(*pair) for pair in zip(whole[:3], apart[:3], strict=True)] == [True] * 3
    assert sampler != "random" or all(agree(*pair) for pair in zip(whole, apart, strict=True))


def test_a_draw_lost_by_a_kill_is_drawn_again_from_its_own_number(store):
    spec = define("relu", "digits", epochs=1, sampler="random")
    whole = search(store, spec, 4, 4, name="whole")
    with StudySession.open(store, spec, name="cut") as session:
        session.ask(4)
        session._study.ask()  # killed before the configuration of trial 1 was written
    cut = search(store, spec, 4, 4, name="cut")
    assert cut[0] == whole[0] and cut[2:4] == whole[2:]


def test_another_seed_draws_other_trials(store):
    one, other = (search(store, define("relu", "digits", sampler="random", epochs=1, seed=s), 3, 3, name=f"s{s}")
                  for s in (0, 1))  # fmt: skip
    assert one[0] == other[0] and one[1] != other[1] and one[2] != other[2]
