"""Whether a search searched: known by hand, and equal to what was trained."""

import dataclasses
import itertools

import numpy as np
import pytest
from outcomes import made_up

from erpe.model.flops import train_step_flops
from erpe.report.effort import compute, expected_best, expected_best_curves
from erpe.report.outcomes import default_wins
from erpe.report.sources.store import load
from erpe.study.records import read_studies


def test_expected_best_is_the_mean_over_all_draws():
    values = np.array([0.9, 0.5, 0.7, 0.7])
    for n, found in enumerate(expected_best(values), 1):
        assert found == pytest.approx(np.mean([max(drawn) for drawn in itertools.product(values, repeat=n)]))
    assert expected_best(np.array([np.nan, 0.3])) == pytest.approx([0.3]) and not len(expected_best(np.array([])))


def test_curves_rise_to_the_best_and_have_a_row_a_trial():
    outcomes = made_up(("softmax", "relu"))
    curves = expected_best_curves(outcomes)
    for _, curve in curves.groupby("arm"):
        assert curve["trials"].tolist() == [1, 2, 3, 4] and curve["value"].is_monotonic_increasing
        assert curve["value"].iloc[0] == pytest.approx(0.815) and curve["value"].max() < 0.83


def test_in_how_many_arms_the_default_won_is_said():
    arms = [
        {"study": study, "default_won": won}
        for study, won in zip("aaabbc", (True, False, True, None, True, None), strict=True)
    ]
    said = "the default configuration won the search in"
    assert default_wins(arms) == [f"a: {said} 2 of 3 arms", f"b: {said} 1 of 1 arm"]


def test_an_arm_spent_what_its_trials_and_runs_trained(digits_study):
    found = compute(load(digits_study)).set_index("arm")
    assert set(found.index) == {"softmax", "relu", "relu_rope"}
    for study in read_studies(digits_study):
        epochs, flops = f"{study.part_of.phase}_epochs", f"{study.part_of.phase}_flops"
        row = found.loc[study.part_of.arm]
        assert row[epochs] == sum(len(trial.epochs) for trial in study.trials) > 0
        spent = sum(len(trial.epochs) * train_step_flops(trial.config.model) for trial in study.trials)
        assert row[flops] == pytest.approx(spent)


def test_an_arm_that_has_nothing_yet_spent_nothing():
    outcomes = made_up(("softmax", "relu"))
    outcomes = dataclasses.replace(
        outcomes, runs=outcomes.runs[outcomes.runs["arm"] != "relu"], trials=outcomes.trials.iloc[:4]
    )
    row = compute(outcomes).set_index("arm").loc["relu"]
    assert (row[["search_epochs", "search_flops", "confirm_epochs", "confirm_flops"]] == 0).all()
    assert set(expected_best_curves(outcomes)["arm"]) == {"softmax"}
