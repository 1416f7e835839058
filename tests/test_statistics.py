import re
from dataclasses import replace
from math import exp, sqrt

import numpy as np
import pandas as pd
import pytest
import torch
from outcomes import made_up
from scipy import stats
from statsmodels.discrete.discrete_model import Logit

from erpe.errors import ConfigError, StudyError
from erpe.report import ranks as order
from erpe.report.comparison import compare
from erpe.report.decisions import VERDICTS, holm
from erpe.report.gaps import NOT_SHOWN, gap_closed
from erpe.report.outcomes import TIMED, Outcomes
from erpe.report.pairing import pairs, sound_runs
from erpe.report.ranks import friedman, nemenyi, nemenyi_matrix, pareto, pareto_front, ranks, surely_unbeaten
from erpe.report.significance import plus
from erpe.report.statistics import (
    differences,
    mean_interval,
    paired_test,
    summary,
)  # fmt: skip
from erpe.report.summary import sentences
from erpe.training.evaluate import information_criteria, scores
from erpe.variants import VARIANTS, split_variant

ACCURACY = "test/accuracy"


def study(accuracies, planned=None, study="s", dataset="digits") -> Outcomes:
    """Outcomes from {arm: {seed: accuracy}}; a list stands for the seeds 0, 1, ..."""
    arms, runs = [], []
    for arm, values in accuracies.items():
        values = values if isinstance(values, dict) else dict(enumerate(values))
        attention, encoding = split_variant(arm.partition("-")[0])
        who = {"study": study, "dataset": dataset, "arm": arm, "variant": arm.partition("-")[0]}
        who |= {"attention": attention, "encoding": encoding}
        seeds = {"seeds_planned": planned or len(values), "seeds": len(values)}
        seeds |= {"finished": len(values) >= (planned or 0), "budget": "trials", "trials_planned": 4, "trials": 4}
        arms.append(who | seeds)
        for seed, value in values.items():
            what = {"seed": seed, "uid": f"{study}-{arm}-{seed}", "version": "0.1.0", "device": "cpu"}
            runs.append(who | what | {ACCURACY: value})
    return Outcomes(pd.DataFrame(arms), pd.DataFrame(runs), pd.DataFrame(), pd.DataFrame())


def both(*several: Outcomes) -> Outcomes:
    arms, runs = (pd.concat([getattr(one, name) for one in several], ignore_index=True) for name in ("arms", "runs"))
    return replace(several[0], arms=arms, runs=runs)


def row(table: pd.DataFrame, **where) -> pd.Series:
    for name, value in where.items():
        table = table[table[name] == value]
    assert len(table) == 1, table
    return table.iloc[0]


def test_interval_of_a_mean_by_hand():
    # 1, 2, 3: sd 1, standard error 1 / sqrt(3) = 0.57735, t(0.975, 2) = 4.30265, half-width 2.48414
    found = mean_interval(np.array([1.0, 2.0, 3.0]))
    assert found == pytest.approx((2, 2 - 2.48414, 2 + 2.48414, 3), abs=1e-5)


def test_one_seed_has_a_mean_but_no_interval():
    found = mean_interval(np.array([0.9, np.nan]))
    assert (found.mean, found.n) == (0.9, 1) and np.isnan([found.low, found.high]).all()
    table = row(summary(study({"relu": [0.9]})), measure=ACCURACY)
    assert table["n"] == 1 and np.isnan([table["low"], table["high"]]).all()


def test_paired_test_by_hand():
    # differences 2, 3, 4: t = 3 / 0.57735 = 5.19615; with two degrees of freedom p = 1 - t / sqrt(t^2 + 2) = 0.035099
    found = paired_test(np.array([3.0, 5.0, 7.0]), np.array([1.0, 2.0, 3.0]))
    assert found == pytest.approx((3, 3 - 2.48414, 3 + 2.48414, 1 - sqrt(27) / sqrt(29), 3), abs=1e-5)


def test_paired_test_is_that_of_scipy():
    first, second = np.random.default_rng(3).normal(0.9, 0.01, (2, 8))
    theirs = stats.ttest_rel(first, second)
    found = paired_test(first, second)
    assert found[1:4] == pytest.approx((*theirs.confidence_interval(0.95), theirs.pvalue), rel=1e-9)


@pytest.mark.parametrize("shift", [0.0, 0.01])
def test_equal_differences_prove_nothing_and_do_not_warn(shift):
    second = np.array([0.9, 0.91, 0.93])
    found = paired_test(second + shift, second)
    assert found.difference == pytest.approx(shift) and np.isnan([found.low, found.high]).all()
    assert np.isnan(found.p) if shift else found.p == 1


def test_baselines_are_of_the_same_attention_and_the_same_switches():
    names = ["softmax", "softmax-patch2", "relu", "relu-patch2", "relu_rope", "relu_rope-patch2", "softmax_rope"]
    found = pairs(study({name: [0.9, 0.8] for name in names}).arms)
    assert set(found[["arm", "against", "kind"]].itertuples(index=False, name=None)) == {
        ("softmax-patch2", "softmax", "switch"), ("relu", "softmax", "gap"), ("relu_rope", "relu", "encoding"),
        ("relu-patch2", "softmax-patch2", "gap"), ("relu-patch2", "relu", "switch"),
        ("relu_rope", "softmax", "softmax"), ("relu_rope-patch2", "relu-patch2", "encoding"),
        ("relu_rope-patch2", "softmax-patch2", "softmax"), ("relu_rope-patch2", "relu_rope", "switch"),
        ("softmax_rope", "softmax", "encoding"),
    }  # fmt: skip


def test_the_question_fixes_the_families_and_not_the_command():
    """A verdict is the same whatever else is compared, shown or measured beside it."""
    one = study({"softmax": [0.95, 0.96, 0.97], "relu": [0.90, 0.92, 0.92], "relu_rope": [0.91, 0.93, 0.95]})
    alone = differences(one)
    other = study({"softmax": [0.5, 0.6, 0.7], "relu": [0.55, 0.61, 0.60]}, dataset="mnist", study="other")
    third = study({"softmax": [0.94, 0.96, 0.98], "relu": [0.91, 0.90, 0.92]}, study="third")
    beside = differences(both(one, other, third), against="third")
    own = beside[(beside["study"] == "s") & (beside["kind"] != "study")].reset_index(drop=True)
    pd.testing.assert_frame_equal(alone, own)
    assert dict(zip(alone["arm"] + " " + alone["against"], alone["family"], strict=True)) == {
        "relu softmax": "gap", "relu_rope relu": "encoding", "relu_rope softmax": "softmax",
    }  # fmt: skip


def test_holms_correction_is_inside_a_family():
    table = differences(made_up(), [ACCURACY])
    for kind, size in (("gap", 2), ("encoding", 9), ("softmax", 6)):
        family = table[table["kind"] == kind]
        assert len(family) == size and family["p_holm"].to_numpy() == pytest.approx(holm(family["p"].to_numpy()))


def test_arms_with_other_switches_are_a_family_of_their_own():
    names = ["softmax", "relu", "relu_rope", "softmax-patch2", "relu-patch2", "relu_rope-patch2"]
    found = pairs(study({name: [0.9, 0.8] for name in names}).arms)
    assert set(found.loc[found["kind"] == "gap", "family"]) == {"gap", "gap of patch2"}
    assert set(found.loc[found["kind"] == "switch", "family"]) == {"switch patch2 for the default"}


def test_an_encoding_without_positions_is_compared_with_learned_positions():
    found = pairs(study({name: [0.9, 0.8] for name in (
        "relu-learned", "relu-position_none", "relu_rope-learned", "relu_rope-position_none",
    )}).arms)  # fmt: skip
    own = found[found["kind"] == "replacement"]
    assert own[["arm", "against"]].to_numpy().tolist() == [["relu_rope-position_none", "relu-learned"]]


def test_the_margin_is_that_of_the_study_unless_one_is_given():
    outcomes = study({"softmax": [0.950, 0.951, 0.952, 0.951], "relu": [0.952, 0.950, 0.953, 0.951]})
    of_study = replace(outcomes, margins={"s": 0.1})
    found = [row(compare(*which).differences) for which in ((outcomes,), (of_study,), (of_study, None, 1.0))]
    # differences 0.2, -0.1, 0.1 and 0: mean 0.05, standard error 0.065
    assert [one["margin"] for one in found] == pytest.approx([0.005, 0.001, 0.01])
    assert [one["verdict"] for one in found] == ["equivalent", "undecided", "equivalent"]


@pytest.mark.parametrize("margin", [-0.1, 0.0, float("nan"), 101])
def test_a_margin_that_is_none_is_one_line(margin):
    with pytest.raises(ConfigError, match=r"margin: .* given; use a .*number.* instead") as error:
        compare(study({"softmax": [0.9, 0.8], "relu": [0.9, 0.8]}), margin=margin)
    assert "\n" not in str(error.value)


def test_pairs_are_by_seed_whatever_the_order():
    outcomes = made_up(("softmax", "relu", "relu_rope"))
    shuffled = replace(outcomes, runs=outcomes.runs.sample(frac=1, random_state=0))
    pd.testing.assert_frame_equal(differences(outcomes), differences(shuffled))
    pd.testing.assert_frame_equal(gap_closed(outcomes), gap_closed(shuffled))


def test_a_missing_seed_leaves_its_pair_out_and_is_said():
    # Seed 2 of relu_rope is missing. Over seeds 0 and 1 the differences are 0.02 and 0.04, so 0.03; had the means been
    # compared, (0.92 + 0.95) / 2 - (0.90 + 0.91 + 0.50) / 3 would have been 0.165.
    outcomes = study({"relu": [0.90, 0.91, 0.50], "relu_rope": [0.92, 0.95], "softmax": [0.95, 0.96, 0.96]}, planned=3)
    found = row(differences(outcomes), arm="relu_rope", against="relu")
    assert found["difference"] == pytest.approx(0.03) and found["n"] == 2 and found["preliminary"]
    comparison = compare(outcomes)
    assert "s on digits: seeds 2 are missing, pairs are over 2: relu_rope" in comparison.notes
    assert comparison.arms["mark"].tolist() == ["", "2 of 3 seeds", ""]
    assert "preliminary" in row(comparison.verdicts, arm="relu_rope", kind="encoding")["text"]
    assert "ReLU + RoPE is unfinished: 2 of 3 seeds are confirmed" in comparison.verdicts["text"].tolist()


def test_an_unfinished_arm_with_one_common_seed_is_not_tested():
    outcomes = study({"softmax": [0.95, 0.96, 0.97], "relu": [0.90, 0.92, 0.92], "relu_rope": {1: 0.99}}, planned=3)
    comparison = compare(outcomes)
    found = comparison.differences[comparison.differences["arm"] == "relu_rope"]
    assert (found["n"] == 1).all() and found[["p", "p_holm", "low", "high"]].isna().all(axis=None)
    told = row(comparison.verdicts, arm="relu_rope", kind="encoding")
    assert told["verdict"] == "undecided" and "one seed tells nothing" in told["text"]
    assert "relu_rope" not in set(comparison.ranks["arm"])


def test_an_arm_without_runs_is_shown_and_not_tested():
    comparison = compare(study({"softmax": [0.95, 0.96], "relu": [0.90, 0.92], "relu_rope": {}}, planned=2))
    assert comparison.arms["mark"].tolist() == ["", "", "0 of 2 seeds"]
    assert row(comparison.verdicts, arm="relu_rope", kind="encoding")["text"].startswith(
        "ReLU + RoPE and ReLU have no seed in common"
    )


def test_runs_of_another_version_are_marked_and_left_out():
    outcomes = made_up(("softmax", "relu", "relu_rope"))
    runs = outcomes.runs.copy()
    runs.loc[runs["arm"] == "relu_rope", "version"] = "0.0.9"
    comparison = compare(replace(outcomes, runs=runs))
    assert "made-up: 5 runs of relu_rope by erpe 0.0.9, not 0.1.0: left out of every test" in comparison.notes
    assert row(comparison.arms, arm="relu_rope")["mark"] == "erpe 0.0.9"
    assert row(comparison.summary, arm="relu_rope", measure=ACCURACY)["n"] == 5
    tests = comparison.differences
    other = tests["arm"] == "relu_rope"
    assert tests.loc[other, "p"].isna().all() and tests.loc[other, "images_low"].isna().all()
    assert tests.loc[~other & (tests["measure"] == ACCURACY), "images_low"].notna().all()


def test_one_run_of_another_version_is_not_averaged_with_the_rest():
    outcomes = study({"softmax": [0.9, 0.9, 0.9], "relu": [0.8, 0.8, 0.1]})
    outcomes.runs.loc[5, "version"] = "0.0.9"
    found = row(compare(outcomes).summary, arm="relu")
    assert found["mean"] == 0.8 and found["n"] == 2


def test_a_seed_confirmed_twice_counts_once_and_is_said():
    outcomes = study({"softmax": [0.9, 0.95], "relu": [0.8, 0.82]})
    again = outcomes.runs[outcomes.runs["arm"] == "relu"].head(1).assign(uid="again", **{ACCURACY: 0.1})
    comparison = compare(replace(outcomes, runs=pd.concat([outcomes.runs, again], ignore_index=True)))
    assert row(comparison.summary, arm="relu")["mean"] == pytest.approx(0.81)
    assert "s: relu was confirmed 2 times with seed 0; the first run counts" in comparison.notes


def test_intervals_for_new_images_are_wider_where_images_decide():
    """Equal seeds, but each of 50 images of 100 decides for itself: no spread over seeds, all of it over images."""
    draw = np.random.default_rng(0)
    labels = np.zeros(100, int)
    hard = draw.random(100) < 0.5
    outcomes, predictions = study({"softmax": [0.9] * 4, "relu": [0.5] * 4}), {}
    for seed in range(4):
        predictions[f"s-softmax-{seed}"] = np.where(np.arange(100) == seed, 1, labels)
        predictions[f"s-relu-{seed}"] = np.where(hard, 1, labels)
    for place, run in enumerate(outcomes.runs["uid"]):
        outcomes.runs.loc[place, ACCURACY] = (predictions[run] == labels).mean()
    bare = row(differences(outcomes), arm="relu")
    found = row(differences(replace(outcomes, predictions=predictions, labels={"digits": labels})), arm="relu")
    assert np.isnan(bare["images_low"]) and found["difference"] == bare["difference"]
    # a difference of about -1 or 0 on each image: its standard error is 0.05, times t(3) = 3.18
    assert found["images_high"] - found["difference"] == pytest.approx(3.18 * 0.05, rel=0.15)
    assert any("8 of 8 runs have no predictions" in note for note in compare(outcomes).notes)


def test_gap_closed_by_hand():
    # relu 0.90, softmax 0.95 and relu_rope 0.93 on average: 0.03 of 0.05 closed
    outcomes = study({"softmax": [0.94, 0.95, 0.96], "relu": [0.90, 0.90, 0.90], "relu_rope": [0.92, 0.93, 0.94]})
    found = row(gap_closed(outcomes), arm="relu_rope")
    assert found["closed"] == pytest.approx(0.6) and found["gap"] == pytest.approx(0.05) and found["shown"]
    # gain and gap move together: gain - r gap has mean 0.03 - 0.05 r and sd 0.01 |1 - r|, so the ends solve
    # 0.03 - 0.05 r = +- 4.30265 x 0.01 / sqrt(3) x (1 - r)
    t = 4.30265 * 0.01 / sqrt(3)
    ends = sorted([(0.03 - t) / (0.05 - t), (0.03 + t) / (0.05 + t)])
    assert (found["low"], found["high"]) == pytest.approx(ends, abs=1e-4)


GAPS = {
    "worse": ([0.95, 0.951, 0.949], [0.90, 0.9012, 0.8988]),
    "better": ([0.90, 0.9012, 0.8988], [0.95, 0.951, 0.949]),
    "undecided": ([0.95, 0.96, 0.97], [0.945, 0.962, 0.954]),
    "equivalent": ([0.95, 0.951, 0.949], [0.9505, 0.9505, 0.9496]),
    "the same on every seed": ([0.95, 0.96, 0.97], [0.90, 0.91, 0.92]),
    "nothing": ([0.9, 0.9, 0.9], [0.9, 0.9, 0.9]),
}


@pytest.mark.parametrize("state", GAPS)
def test_a_part_of_a_gap_is_told_only_where_the_gap_is_shown(state):
    softmax, relu = GAPS[state]
    comparison = compare(study({"softmax": softmax, "relu": relu, "relu_rope": [0.93, 0.91, 0.94]}))
    gap = row(comparison.gaps, arm="relu_rope")
    test = row(comparison.differences, arm="relu", against="softmax", measure=ACCURACY)
    assert test["verdict"] == (state if state in VERDICTS else "undecided")
    assert (gap["gap"], gap["gap_low"], gap["gap_high"], gap["gap_p"]) == pytest.approx(
        (-test["difference"], -test["all_high"], -test["all_low"], test["p_holm"]), nan_ok=True
    )
    text = row(comparison.verdicts, arm="relu_rope", kind="closed")["text"]
    assert gap["shown"] == (state == "worse")
    assert (gap[["closed", "low", "high"]].notna() == gap["shown"]).all()
    assert (NOT_SHOWN in text) == (not gap["shown"]) and ("closes" in text) == gap["shown"]
    if not gap["shown"]:  # instead: how it stands to both ends
        assert re.search(r"; it is .* ReLU.* and .* softmax", text)


def test_friedman_gives_no_p_of_too_few_seeds():
    few, enough = (made_up(("softmax", "favor", "relu"), seeds=seeds) for seeds in (4, 5))
    assert friedman(few)["p"].isna().all() and friedman(enough)["p"].notna().all()


def test_ranks_friedman_and_nemenyi_by_hand(monkeypatch):
    # Seed 0: softmax 1, relu 2, favor 3; seed 1: relu 1, softmax 2, favor 3. Rank sums 3, 3, 6:
    # chi-squared = 12 / (2 x 3 x 4) (9 + 9 + 36) - 3 x 2 x 4 = 3, and with two degrees of freedom p = exp(-3 / 2).
    # Nemenyi: q = (3 - 1.5) / sqrt(3 x 4 / (6 x 2)) = 1.5, times sqrt(2) on the studentized range of three groups.
    monkeypatch.setattr(order, "FEWEST_BLOCKS", 2)
    outcomes = study({"softmax": [0.9, 0.8], "favor": [0.7, 0.7], "relu": [0.8, 0.9]})
    assert ranks(outcomes).set_index("arm")["rank"].to_dict() == {"softmax": 1.5, "favor": 3, "relu": 1.5}
    test = row(friedman(outcomes), measure=ACCURACY)
    assert (test["statistic"], test["p"], test["arms"], test["n"]) == pytest.approx((3, exp(-1.5), 3, 2))
    matrix = nemenyi_matrix(nemenyi(outcomes))
    assert matrix.loc["softmax", "relu"] == pytest.approx(1) and (np.diag(matrix) == 1).all()
    assert matrix.loc["favor", "relu"] == pytest.approx(stats.studentized_range.sf(1.5 * sqrt(2), 3, np.inf))
    assert (matrix.to_numpy() == matrix.to_numpy().T).all() and list(matrix) == ["softmax", "favor", "relu"]


def test_highest_accuracy_ranks_first_and_equal_ones_share():
    outcomes = made_up(("softmax", "favor", "relu"))
    outcomes.runs[ACCURACY] = outcomes.runs["arm"].map({"softmax": 0.3, "favor": 0.9, "relu": 0.3})
    found = ranks(outcomes).set_index("arm")["rank"].to_dict()
    assert found == {"softmax": 2.5, "favor": 1, "relu": 2.5}


def test_arms_that_are_all_equal_have_p_one():
    assert row(friedman(study({arm: [0.9, 0.8, 0.9, 0.7, 0.6] for arm in ("softmax", "favor", "relu")})))["p"] == 1


def test_two_arms_or_one_seed_have_no_test_of_ranks():
    assert friedman(study({"softmax": [0.9, 0.8], "favor": [0.7, 0.7]})).empty
    assert nemenyi(study({"softmax": [0.9], "favor": [0.7], "relu": [0.8]})).empty


def test_pareto_front_by_hand():
    # 1: cheapest; 2: dearer and better; 3: dearer than 2, no better; 4: as dear as 2, worse; 5: best; 6: not measured
    cost = np.array([1, 2, 3, 2, 4, np.nan])
    quality = np.array([0.8, 0.9, 0.9, 0.85, 0.95, 0.99])
    assert pareto_front(cost, quality).tolist() == [True, True, False, False, True, False]


def test_only_what_intervals_bear_out_is_sure():
    # 0 is cheapest; 1 is best, but its time overlaps that of 0; 2 is dearer and worse than both; 3 has no interval
    cost, quality = np.array([[1, 2], [1.5, 3], [5, 6]]), np.array([[0.5, 0.6], [0.8, 0.9], [0.1, 0.2]])
    assert surely_unbeaten(cost, quality).tolist() == [False, True, False]
    cost[1] = [2.5, 3]
    assert surely_unbeaten(cost, quality).tolist() == [True, True, False]
    more = [np.vstack([table, [np.nan, np.nan]]) for table in (cost, quality)]
    assert not surely_unbeaten(*more).any()


def test_each_data_set_has_its_own_pareto_front():
    outcomes = both(made_up(("softmax", "relu")), made_up(("softmax", "relu"), dataset="mnist", study="other"))
    found = pareto(summary(outcomes), "flops/forward")
    assert found["front"].tolist() == [True, False, True, False]  # softmax is made up to be cheaper and better


def test_a_true_null_keeps_its_error_rate():
    """All arms equally good: in each family any pair called better or worse in at most 5 % of studies."""
    draw, studies = np.random.default_rng(0), 60
    many = []
    for number in range(studies):
        shared = draw.normal(0.9, 0.01, 5)
        values = {arm: shared + draw.normal(0, 0.005, 5) for arm in ("softmax", "relu", "relu_rope", "relu_general")}
        many.append(study(values, study=f"null{number}"))
    found = differences(both(*many), [ACCURACY])
    wrong = found["verdict"].isin(["better", "worse"]).groupby([found["study"], found["family"]]).any()
    # 60 studies at 5 %: standard deviation 2.8 %; test_decisions has thousands
    for family, rate in wrong.groupby("family").mean().items():
        assert rate <= 0.05 + 3 * 0.028, family
    assert 0.01 <= (found["p"] < 0.05).mean() <= 0.09


def test_a_known_effect_is_found():
    """relu_general gains 3 points with noise of 0.5: found, with the right sign; relu_rope gains nothing."""
    draw, many = np.random.default_rng(1), []
    for number in range(40):
        means = {"softmax": 0.95, "relu": 0.90, "relu_general": 0.93, "relu_rope": 0.90}
        many.append(study({arm: mean + draw.normal(0, 0.005, 5) for arm, mean in means.items()}, study=f"s{number}"))
    table = differences(both(*many), [ACCURACY])
    gains = table[(table["kind"] == "encoding")].set_index("arm")
    assert (gains.loc["relu_general", "difference"] > 0).all()
    assert (gains.loc["relu_general", "p_holm"] < 0.05).mean() > 0.9
    assert (gains.loc["relu_rope", "p_holm"] < 0.05).mean() < 0.1


def test_the_verdict_tells_size_interval_and_n():
    outcomes = study({"softmax": [0.9500, 0.9510, 0.9490], "relu": [0.9000, 0.9012, 0.8988]})
    # differences 5.00, 4.98, 5.02 points: mean 5, sd 0.02, half-width 4.30265 x 0.02 / sqrt(3) = 0.0497
    assert row(compare(outcomes).verdicts, arm="relu")["text"] == (
        "ReLU is 5.00 points below softmax (95 % 4.95 to 5.05, 3 seeds): worse"
    )
    # differences 1, -2, 2: mean 1 / 3, sd 2.08, half-width 5.17
    open_ = study({"softmax": [0.93, 0.95, 0.91], "relu": [0.94, 0.93, 0.93]})
    assert row(compare(open_).verdicts, arm="relu")["text"] == (
        "ReLU is 0.3 points above softmax (95 % -4.8 to 5.5, 3 seeds): undecided, up to 4.8 points below and 5.5 above "
        "are not excluded"
    )
    close = study({"softmax": [0.950, 0.951, 0.949], "relu": [0.9505, 0.9505, 0.9496]})
    assert row(compare(close).verdicts, arm="relu")["text"].endswith("3 seeds): equivalent within 0.5 points")


def test_a_difference_that_is_rounded_to_zero_has_no_sign():
    assert [plus(value, 1) for value in (-0.06, -0.04, 0.04, 0.06)] == ["-0.1", "0.0", "0.0", "+0.1"]


def test_every_pair_has_one_verdict():
    comparison = compare(made_up())
    assert len(comparison.verdicts) == 9 + 2 + 6 + 6  # encodings, gaps, encodings against softmax, gaps closed
    assert comparison.verdicts["text"].is_unique and comparison.notes == ()


def test_studies_are_compared_with_each_other_on_the_same_data():
    long = study({"softmax": [0.97, 0.99], "relu": [0.9, 0.9]}, study="long")
    outcomes = both(study({"softmax": [0.95, 0.96]}, study="short"), long)
    assert set(compare(outcomes).differences["kind"]) == {"gap"}
    found = row(compare(outcomes, against="short").differences, kind="study")
    assert found["difference"] == pytest.approx(0.025) and (found["study"], found["against_study"]) == ("long", "short")
    assert any(
        "softmax is 2.5 points above softmax of short" in text for text in compare(outcomes, "short").verdicts["text"]
    )


EMPTY = Outcomes(pd.DataFrame(), pd.DataFrame(), pd.DataFrame(), pd.DataFrame())
APART = both(study({"softmax": [0.9, 0.9]}, study="a"), study({"softmax": [0.8, 0.8]}, study="b", dataset="mnist"))


@pytest.mark.parametrize(
    "outcomes, against, words",
    [
        (EMPTY, None, "no study to compare"),
        (study({"softmax": {}, "relu": {}}, planned=5), None, "s: no confirmed run yet"),
        (both(study({"softmax": [0.9]}), study({"relu": [0.9]}, dataset="mnist")), None, "arms share no data set"),
        (APART, "a", r"a \(digits\) and b \(mnist\) share no data set"),
        (APART, "c", "c is none of the studies here: a, b"),
        (study({"softmax": [0.9, 0.9]}), "s", "only study here"),
    ],
)
def test_what_cannot_be_compared_is_one_line(outcomes, against, words):
    with pytest.raises(StudyError, match=words) as told:
        compare(outcomes, against)
    assert "\n" not in str(told.value)


BAD = {
    "one seed": (
        lambda runs: runs[runs["seed"] == 0],
        "s: one seed an arm, so nothing can be tested; use confirm.seeds=8 instead",
    ),
    "unequal seeds": (
        lambda runs: runs.drop(index=5),
        "s on digits: seeds 2 are missing, pairs are over 2: relu",
    ),
    "an arm missing": (lambda runs: runs[runs["arm"] != "relu"], "s on digits: no run to compare: relu"),
    "another version": (
        lambda runs: runs.assign(version=["0.1.0"] * 3 + ["0.0.9"] * 3 + ["0.1.0"] * 3),
        "s: 3 runs of relu by erpe 0.0.9, not 0.1.0: left out of every test",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_clear_line_beside_the_answer(what):
    change, line = BAD[what]
    arms = {"softmax": [0.95, 0.96, 0.97], "relu": [0.90, 0.92, 0.91], "relu_rope": [0.93, 0.92, 0.94]}
    outcomes = study(arms)
    outcomes = replace(outcomes, runs=change(outcomes.runs))
    comparison = compare(outcomes)
    assert comparison.notes.count(line) == 1 and all("\n" not in note for note in comparison.notes)
    assert "softmax" in sentences(comparison)[0]


def test_notes_tell_of_devices_budgets_and_missing_partners():
    arms = {"softmax-patch4": [0.95, 0.96], "relu-patch4": [0.9, 0.92], "relu_rope-patch2": [0.9, 0.95]}
    outcomes = study(arms)
    outcomes.runs.loc[0, "device"] = "cuda"
    outcomes.arms.loc[1, "trials"] = 3
    notes = compare(replace(outcomes, arms=outcomes.arms.assign(budget="flops"), notes=("said before",))).notes
    assert notes[0] == "said before"
    for words in ("ran on cuda, cpu", "relu-patch4 3 of 4", "the same FLOPs", "no arm relu or softmax with their"):
        assert any(words in note for note in notes)


def test_times_of_one_device_may_be_compared_though_other_runs_are_of_another():
    outcomes = study({"softmax": [0.95, 0.96], "relu": [0.9, 0.92]})
    runs = outcomes.runs.assign(device=["old", "new"] * 2, **{TIMED: [float("nan"), 2.0] * 2})
    told = [note for note in compare(replace(outcomes, runs=runs)).time_notes if "ran on" in note]
    assert told == ["s on digits: ran on old, new; do not compare its memory"]


@pytest.mark.slow
def test_outcomes_are_left_as_they_are():
    outcomes = made_up(("softmax", "relu", "relu_rope"))
    before = outcomes.arms.copy(), outcomes.runs.copy()
    compare(outcomes)
    pd.testing.assert_frame_equal(before[0], outcomes.arms)
    pd.testing.assert_frame_equal(before[1], outcomes.runs)
    assert len(sound_runs(outcomes)) == len(outcomes.runs)


def test_a_logistic_regression_has_the_aic_and_bic_of_statsmodels():
    draw = np.random.default_rng(0)
    x = np.column_stack([np.ones(300), draw.normal(size=(300, 3))])
    y = (draw.random(300) < 1 / (1 + np.exp(-x @ [0.3, 1.0, -2.0, 0.0]))).astype(int)
    fit = Logit(y, x).fit(disp=False)
    logits = torch.from_numpy(np.stack([np.zeros(300), x @ fit.params], axis=1))
    likelihood = scores(logits, torch.from_numpy(y), "train")["train/log_likelihood"]
    found = information_criteria(likelihood, k=4, n=300)
    assert (likelihood, found["aic"], found["bic"]) == pytest.approx((fit.llf, fit.aic, fit.bic))


def test_all_twelve_variants_are_in_order():
    assert list(dict.fromkeys(summary(made_up())["arm"])) == list(VARIANTS)
