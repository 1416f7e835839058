"""Whether a search searched: known by hand, and equal to what was trained."""

import itertools

import numpy as np
import pytest
from outcomes import made_up

from erpe.report.charts.effort import expected_best, expected_best_curves
from erpe.report.outcomes import default_wins


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
