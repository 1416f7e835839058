"""Write `studies/results/mnist_nine_small.md` from the numbers beside it: `python infra/mnist_tables.py`.

Of these runs only the table of means and of paired differences was kept, not the seeds: enough for the verdicts, as
these follow from mean, interval and n of each pair; not for the gap closed, ranks or ratios of times.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from erpe.report.comparison import Comparison
from erpe.report.outcomes import Outcomes
from erpe.report.pairing import PAIR, pairs
from erpe.report.ranks import fronts
from erpe.report.significance import verdicts
from erpe.report.statistics import PARTS, TESTED, Paired, decided
from erpe.report.tables import render
from erpe.study.plan import Compare
from erpe.variants import split_variant

RESULTS = Path(__file__).parent.parent / "studies" / "results"
BEGIN = "### "
"""The page's own words end where the first table begins."""


def read(path: Path) -> Comparison:
    """Return the comparison that a CSV file of `erpe compare` has the numbers of."""
    given = pd.read_csv(path)
    summary = given[given["table"] == "summary"][["study", "dataset", "arm", "measure", "mean", "low", "high", "n"]]
    arms = summary[["study", "dataset", "arm"]].drop_duplicates().reset_index(drop=True)
    parts = [split_variant(arm) for arm in arms["arm"]]
    seeds = summary.groupby("arm", sort=False)["n"].max().to_numpy()
    arms = arms.assign(
        variant=arms["arm"], attention=[one for one, _ in parts], encoding=[two for _, two in parts], budget="trials",
        seeds=seeds, seeds_planned=seeds, finished=True, mark="",
    )  # fmt: skip
    known = given[given["table"] == "difference"].set_index(["arm", "against", "measure"])
    rows = []
    for pair in pairs(arms).to_dict("records"):
        for measure in TESTED:
            found = known.loc[(pair["arm"], pair["against"], measure)]
            numbers = Paired(found["mean"], found["low"], found["high"], found["p"], int(found["n"]))
            margin = Compare().margin / 100 if measure in PARTS else float("nan")
            rows.append(pair | {"measure": measure, "margin": margin} | numbers._asdict())
    table = pd.DataFrame(rows, columns=[*PAIR, "measure", "margin", *Paired._fields])
    none = pd.DataFrame(columns="study dataset arm against measure rank p n version".split())
    outcomes = Outcomes(arms, none, none, none)
    differences = decided(table, outcomes)
    gaps = _gaps(arms, differences)
    return Comparison(
        arms=arms, summary=summary.astype({"n": int}), differences=differences, gaps=gaps, ratios=none, ranks=none,
        friedman=none, nemenyi=none, fronts=fronts(outcomes), verdicts=verdicts(arms, differences, gaps), notes=(),
    )  # fmt: skip


def _gaps(arms: pd.DataFrame, differences: pd.DataFrame) -> pd.DataFrame:
    """Return the gap that each encoding could close; none is shown here, so that no part of one is needed."""
    tests = differences[(differences["kind"] == "gap") & (differences["measure"] == "test/accuracy")]
    assert not (tests["verdict"] == "worse").any()
    encoded = arms.loc[(arms["attention"] != "softmax") & (arms["encoding"] != "none"), ["study", "dataset", "arm"]]
    found = encoded.assign(baseline=encoded["arm"].str.partition("_")[0]).merge(
        tests.rename(columns={"arm": "baseline", "against": "softmax", "p_holm": "gap_p", "n": "gap_n"}),
        on=["study", "dataset", "baseline"],
    )
    turned = {"gap": -found["difference"], "gap_low": -found["all_high"], "gap_high": -found["all_low"]}
    unknown = dict.fromkeys(("closed", "low", "high"), float("nan"))
    return found.assign(**turned, **unknown, shown=False, n=found["gap_n"])


def rewritten(text: str, results: Path = RESULTS) -> str:
    """Return a page with today's tables below its own words."""
    head, _, _ = text.partition(BEGIN)
    return head + str(render(read(results / "mnist_nine_small.csv"), "markdown")).rstrip() + "\n"


if __name__ == "__main__":
    page = RESULTS / "mnist_nine_small.md"
    page.write_text(rewritten(page.read_text()))
