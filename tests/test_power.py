"""What can be found is said before anything is trained, and it is right."""

import math

import numpy as np
import pytest
from scipy import stats

from erpe.errors import ConfigError
from erpe.report.power import detectable_difference, power_of


@pytest.mark.parametrize(
    ("sd", "seeds"), [(0.7, {(1, 1): 7, (1, 6): 10, (2, 9): 6, (4, 9): 4}),
                      (1.0, {(1, 1): 10, (1, 6): 16, (2, 9): 8, (4, 9): 5})],
)  # fmt: skip
def test_seeds_for_a_difference_in_points(sd, seeds):
    for (points, tests), n in seeds.items():
        assert detectable_difference(n, sd, tests) <= points < detectable_difference(n - 1, sd, tests)


@pytest.mark.parametrize("tests", [1, 14, 66])
@pytest.mark.parametrize("n", [2, 4, 8, 50])
def test_a_detectable_difference_is_found_four_times_in_five(n, tests):
    """In simulated paired t-tests; two pairs and many tests too, where SciPy's noncentral t gives no number."""
    draw, repeats = np.random.default_rng(0), 100_000
    mean = detectable_difference(n, 1.0, tests) + draw.normal(size=repeats) / math.sqrt(n)
    t = mean / np.sqrt(draw.chisquare(n - 1, repeats) / (n - 1) / n)
    assert (2 * stats.t.sf(abs(t), n - 1) < 0.05 / tests).mean() == pytest.approx(0.8, abs=0.006)


def test_no_difference_is_found_as_often_as_the_level_says():
    assert power_of(0, 5, 1.0) == pytest.approx(0.05, abs=1e-4)


def test_one_seed_finds_nothing():
    assert detectable_difference(1, 0.7) == math.inf


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"sd": 0}, "standard deviation: 0"), ({"sd": math.nan}, "standard deviation: nan"), ({"tests": 0}, "tests: 0"),
        ({"power": 1}, "power: 1"), ({"power": 0.01}, "above 0.05"),
    ],
)  # fmt: skip
def test_numbers_that_make_no_sense_are_refused(given, said):
    with pytest.raises(ConfigError, match=said):
        detectable_difference(**({"n": 8, "sd": 0.7} | given))
