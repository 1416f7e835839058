"""Estimators of the report on simulated data with known truth. Every simulation has its own fixed seed."""

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import ttost_paired

from erpe.report.decisions import ALPHA, decide, fieller, holm
from erpe.report.images import crossed_errors

STUDIES = 4000


def measured(truth, n, sd=1.0, studies=STUDIES, seed=0, margin=np.nan, apart=False):
    """Decisions on many simulated studies: (m,) true differences to one baseline, or (apart) to one baseline each, n
    seeds; (studies, m) each.
    """
    truth, draw = np.asarray(truth, float), np.random.default_rng(seed)
    noise = draw.normal(0, sd / np.sqrt(2), (studies, n, len(truth) + 1))
    values = truth + noise[..., 1:] - noise[..., :1]  # all against the same arm, so they are correlated
    if apart:
        values = truth + draw.normal(0, sd, values.shape)
    return decide(values.mean(1), values.std(1, ddof=1) / np.sqrt(n), n - 1, margin)


def rate(found):
    """How often something is so, of all studies."""
    return np.any(found, axis=-1).mean()


def above(share, studies=STUDIES):
    """A rate that a simulation of so many studies stays below, but once in a thousand: three standard deviations."""
    return share + 3 * np.sqrt(share * (1 - share) / studies)


@pytest.mark.slow
def test_holm_is_that_of_statsmodels():
    p = np.random.default_rng(0).random((2, 6)) ** 3
    assert holm(p) == pytest.approx(np.stack([multipletests(row, method="holm")[1] for row in p]))


def test_what_could_not_be_tested_counts_in_its_family():
    # 0.01 x 4 = 0.04, 0.02 x 3 = 0.06, 0.04 x 2 = 0.08: four were asked
    assert holm(np.array([0.01, np.nan, 0.04, 0.02])) == pytest.approx([0.04, np.nan, 0.08, 0.06], nan_ok=True)


def test_two_one_sided_tests_are_those_of_statsmodels():
    draw = np.random.default_rng(1)
    one, two = draw.normal(0.9, 0.003, 6), draw.normal(0.9, 0.003, 6)
    difference = one - two
    found = decide(difference.mean(keepdims=True), stats.sem(difference), 5, margin=0.005)
    assert found.p_equivalent[0] == pytest.approx(ttost_paired(one, two, -0.005, 0.005)[0])


@pytest.mark.parametrize(
    ("truth", "n"), [([0] * 6, 4), ([0] * 6, 8), ([0, 0, 3, 3, 3, 3], 8), ([0, 5, 5, 5, 5, 5], 5), ([0, 0], 3)]
)
def test_differences_that_are_none_are_called_real_in_5_percent_of_families_at_most(truth, n):
    found = measured(truth, n)
    null = np.equal(truth, 0)
    assert rate(np.isin(found.verdict[:, null], ["better", "worse"])) <= above(ALPHA)


def test_the_null_is_rejected_often_enough_to_be_a_test():
    found = measured([0], 5)
    assert abs(rate(np.isin(found.verdict, ["better", "worse"])) - ALPHA) < 0.012


@pytest.mark.parametrize("truth", [[0.5] * 6, [0.5, -0.5, 0.5, 0, 0, 0], [0.6, -0.7]])
@pytest.mark.parametrize("n", [4, 8])
def test_differences_as_large_as_the_margin_are_called_equivalent_in_5_percent_of_families_at_most(truth, n):
    found = measured(truth, n, sd=0.3, margin=0.5)
    large = np.abs(truth) >= 0.5
    assert rate(found.p_equivalent[:, large] < ALPHA) <= above(ALPHA)


@pytest.mark.parametrize(("truth", "n"), [([0] * 6, 4), ([0.2, -1, 3, 0.5, 0, 1], 8), ([2, 3], 3)])
def test_all_intervals_of_a_family_hold_their_truths(truth, n):
    found = measured(truth, n)
    assert rate((found.all_low > truth) | (found.all_high < truth)) <= above(ALPHA)


def test_where_holm_says_more_than_bonferroni_the_intervals_err_no_more_than_both_together():
    # five large differences, which leave the whole 5 % to a sixth that is none: the worst case
    truth = [0, 9, 9, 9, 9, 9]
    for apart, most in ((False, ALPHA), (True, ALPHA * (1 + 5 / 6))):
        found = measured(truth, 8, apart=apart)
        assert rate((found.all_low > truth) | (found.all_high < truth)) <= above(most)


@pytest.mark.parametrize("margin", [np.nan, 0.5, 1.5])
def test_intervals_and_verdicts_never_disagree(margin):
    found = measured([0, 0.2, -0.4, 1, -2, 0], 6, sd=0.8, margin=margin)
    assert set(found.verdict.ravel()) >= {"better", "worse", "undecided"}
    one_sided = (found.all_low >= 0) | (found.all_high <= 0)
    assert (one_sided == np.isin(found.verdict, ["better", "worse"])).all()
    inside = (found.all_low >= -margin) & (found.all_high <= margin)
    assert (inside == (found.p_equivalent < ALPHA)).all()
    assert (inside[found.verdict == "equivalent"]).all() and not inside[found.verdict == "undecided"].any()


def test_power_is_that_of_the_t_test_at_the_first_step_of_holm():
    # 1.2 standard deviations, 10 seeds, five others that are none: non-central t at 0.05 / 6
    found = measured([1.2, 0, 0, 0, 0, 0], 10, sd=1.0)
    critical = stats.t.isf(ALPHA / 12, 9)
    least = stats.nct.sf(critical, 9, 1.2 * np.sqrt(10))
    power = (found.verdict[:, 0] == "better").mean()
    assert least - 0.025 < power < least + 0.05  # a rejected null among the others gives it a little more


def test_equal_methods_are_found_equivalent_with_enough_seeds():
    found = measured([0] * 6, 8, sd=0.3, margin=0.5)
    assert (found.verdict == "equivalent").mean() > 0.9
    assert (measured([0] * 6, 3, sd=0.6, margin=0.5).verdict == "equivalent").mean() < 0.1


@pytest.mark.parametrize("n", [3, 4, 5, 10])
def test_fiellers_interval_holds_the_gap_closed(n):
    draw = np.random.default_rng(n)
    variant, baseline, softmax = (draw.normal(mean, 0.004, (STUDIES, n)) for mean in (0.925, 0.90, 0.95))
    low, high = fieller(variant - baseline, softmax - baseline)
    held = np.isnan(low) | ((low <= 0.5) & (high >= 0.5))  # no interval excludes nothing
    assert np.isnan(low).mean() < 0.1 and abs(held.mean() - 0.95) < 0.0125


def test_fieller_by_hand_and_where_the_gap_may_be_nothing():
    # means 2 and 4, variances 1 and 0, no covariance: (2 - 4 r)^2 <= t^2 / 3, so r = (2 -+ 4.30265 / sqrt(3)) / 4
    low, high = fieller(np.array([1.0, 2.0, 3.0]), np.array([4.0, 4.0, 4.0]))
    assert (low, high) == pytest.approx((0.5 - 0.62103, 0.5 + 0.62103), abs=1e-5)
    assert np.isnan(fieller(np.array([1.0, 2.0, 3.0]), np.array([-1.0, 0.5, 1.0]))).all()
    assert np.isnan(fieller(np.array([1.0]), np.array([1.0]))).all()


@pytest.mark.parametrize(("n", "by_seed", "by_image"), [(4, 0.01, 0.02), (8, 0.01, 0.1), (8, 0.0, 0.2), (5, 0.05, 0.0)])
def test_intervals_for_new_images_hold_the_difference_in_the_population(n, by_seed, by_image):
    """Two methods of which one is right 2 points more often; images and seeds have effects of their own."""
    draw, studies, images = np.random.default_rng(n), 300, 400
    seeds, pictures = draw.normal(0, by_seed, (studies, 1, n)), draw.normal(0, by_image, (studies, images, 1))
    tables = np.sign(draw.random((studies, images, n)) - 0.5) * (draw.random((studies, images, n)) < 0.1)
    gained = draw.random((studies, images, n)) < np.clip(0.3 + seeds + pictures, 0, 1)
    tables = np.where(gained, 1, tables)
    many = np.random.default_rng(0)
    truth = np.clip(0.3 + many.normal(0, by_seed, 200_000) + many.normal(0, by_image, 200_000), 0, 1).mean()
    half = stats.t.isf(ALPHA / 2, n - 1) * crossed_errors(list(tables), draws=300)
    held = np.abs(tables.mean((1, 2)) - truth) <= half
    over_seeds = stats.t.isf(ALPHA / 2, n - 1) * tables.mean(1).std(1, ddof=1) / np.sqrt(n)
    assert held.mean() >= 0.95 - 3 * np.sqrt(0.05 * 0.95 / studies)
    assert by_image < 0.2 or (np.abs(tables.mean((1, 2)) - truth) <= over_seeds).mean() < 0.9  # what it is for


def test_the_bootstrap_over_seeds_alone_gives_the_standard_error_of_a_mean():
    table = np.tile(np.random.default_rng(0).normal(0, 1, 5), (50, 1))  # no image differs from another
    (error,) = crossed_errors([table], draws=20_000)
    assert error == pytest.approx(stats.sem(table[0]), rel=0.03)
