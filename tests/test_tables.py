import io
import json
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from markdown_it import MarkdownIt
from outcomes import made_up
from rich.cells import cell_len

from erpe.errors import ConfigError, StoreError
from erpe.report.outcomes import TIMED
from erpe.report.protocol import search_tables
from erpe.report.sources.files import exports, read
from erpe.report.tables import FORMATS, TIDY, TYPES, compare, render, tidy
from erpe.report.terminal import ending


@pytest.fixture(scope="module")
def whole():
    return compare(made_up())


@pytest.fixture(scope="module")
def half():
    """relu_rope has two of five seeds, favor_rope was run by another version, softmax was not timed on one seed."""
    outcomes = made_up(study="half_done & 100 %")
    arms, runs = outcomes.arms.copy(), outcomes.runs.copy()
    arms.loc[arms["arm"] == "relu_rope", ["seeds", "finished"]] = [2, False]
    runs.loc[runs["arm"] == "favor_rope", "version"] = "0.0.9"
    runs.loc[0, "time/inference_ms_per_image"] = np.nan
    runs = runs[~((runs["arm"] == "relu_rope") & (runs["seed"] > 1001))]
    return compare(replace(outcomes, arms=arms, runs=runs))


@pytest.fixture(scope="module")
def several():
    """Two data sets side by side."""
    one, two = made_up(("softmax", "relu")), made_up(("softmax", "relu"), dataset="mnist", study="other", seed=1)
    arms, runs = (pd.concat([getattr(part, name) for part in (one, two)]) for name in ("arms", "runs"))
    return compare(replace(one, arms=arms, runs=runs))


def test_every_number_of_the_summary_is_in_the_tidy_table(whole):
    table = tidy(whole)
    found = table[table["table"] == "summary"].set_index(["arm", "measure"])
    for row in whole.summary.itertuples():
        there = found.loc[(row.arm, row.measure)]
        np.testing.assert_array_equal(there[["mean", "low", "high", "n"]].astype(float), row[5:9])
    assert list(table) == list(TIDY) and set(TYPES) == set(TIDY)


@pytest.mark.parametrize("which", ["whole", "half", "several"])
def test_parquet_and_csv_and_json_come_back_as_they_went(which, request):
    comparison = request.getfixturevalue(which)
    table = tidy(comparison)
    pd.testing.assert_frame_equal(pd.read_parquet(io.BytesIO(render(comparison, "parquet"))), table)
    csv = pd.read_csv(io.StringIO(render(comparison, "csv")), dtype=TYPES)
    pd.testing.assert_frame_equal(csv, table, check_exact=True)
    read = json.loads(render(comparison, "json"))
    pd.testing.assert_frame_equal(pd.DataFrame(read["rows"]).astype(TYPES), table, check_exact=True)
    assert read["columns"] == TIDY and read["notes"] == list(comparison.notes)
    assert [row["text"] for row in read["verdicts"]] == comparison.verdicts["text"].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("width", [45, 60, 80, 120])
@pytest.mark.parametrize("which", ["whole", "half", "several"])
def test_the_terminal_needs_no_more_columns_than_it_has(which, width, request, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    shown = render(request.getfixturevalue(which), "terminal")
    assert max(cell_len(line) for line in shown.splitlines()) <= width
    assert "softmax_circulant  " in shown or which == "several" or width < 60  # no name is broken
    assert ("not shown in this width: F1 %" in " ".join(shown.split())) == (width <= 60)
    for words in ("verdict", "points", "95 % interval"):  # no narrow terminal does without these
        assert words in shown


def test_a_comparison_begins_with_the_answer_then_the_grid_then_tables(whole):
    titles = [line.removeprefix("### made-up on digits: ") for line in render(whole, "markdown").splitlines()
              if line.startswith("### ")]  # fmt: skip
    assert titles == [
        "the answer", "attention x encoding", "test accuracy, linear attention against softmax",
        "test accuracy, each encoding against none", "test accuracy, linear attention with an encoding against softmax",
        "gap closed", "quality on the test set", "fit", "size", "time and memory", "times as ratios to softmax",
        "ranks by accuracy", "Pareto fronts",
    ]  # fmt: skip


def test_cells_have_mean_half_width_and_n_by_hand():
    outcomes = made_up(("softmax", "relu"), seeds=3)
    outcomes.runs["test/accuracy"] = [0.95, 0.96, 0.97, 0.90, 0.92, 0.94]
    # softmax 96 +- 4.30265 x 1 / sqrt(3) = 2.48; relu 92 +- 4.97; two digits of the usual half-width 3.7: one place
    text = render(compare(replace(outcomes, predictions={})), "markdown")
    lines = text.splitlines()
    assert any(line.startswith("| softmax | 3 | 96.0 ± 2.5 |") for line in lines)
    assert any(line.startswith("| relu | 3 | 92.0 ± 5.0 |") for line in lines)
    # differences -5, -4, -3 points: -4 +- 2.48; no predictions, so nothing on new images
    assert any(line.startswith("| relu | softmax | -4.0 | -6.5 to -1.5 | - | 0.020 | 3 | worse |") for line in lines)


def test_no_part_of_a_gap_that_is_not_shown_has_a_number():
    outcomes = made_up(("softmax", "relu", "relu_rope"), seeds=3)
    outcomes.runs["test/accuracy"] = [0.94, 0.95, 0.96, 0.95, 0.95, 0.949, 0.97, 0.97, 0.98]
    comparison = compare(outcomes)
    assert re.search(
        r"\| relu\\_rope \| relu \| 0.0 \| [^|]* \| no gap shown \| - \| 3 \|", render(comparison, "markdown")
    )
    table = tidy(comparison)
    assert table.loc[table["measure"] == "gap/closed", ["mean", "low", "high"]].isna().all(axis=None)


def test_one_seed_is_shown_without_an_interval():
    found = compare(made_up(("softmax", "relu", "relu_rope"), seeds=1))
    text = render(found, "markdown")
    assert not re.search(r"\d ± \d", text) and "one seed tells nothing" in text and "| undecided |" in text


def test_unfinished_arms_and_other_versions_are_marked_wherever_they_stand(half, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    text = render(half, "terminal")
    assert text.replace("\n", " ").count("* erpe 0.0.9: favor_rope; 2 of 5 seeds: relu_rope") == 1
    assert not [line for line in text.splitlines() if line != line.rstrip()]
    for line in text.splitlines():
        if re.match(r" (relu_rope|favor_rope) ", line):
            assert " * " in line
    assert re.search(r"relu_rope \* +2 ", text) and "undecided (so far)" in text
    assert re.search(r"softmax +5 .*\(n=4\)", text)  # not timed on one seed
    table = tidy(half)
    assert set(table.loc[table["arm"] == "relu_rope", "mark"]) == {"2 of 5 seeds"}


@pytest.mark.slow
@pytest.mark.parametrize("against", [None, "made-up"])
def test_a_study_that_was_not_timed_stands_beside_one_that_was(against):
    one, two = made_up(("softmax", "relu")), made_up(("softmax", "relu"), study="cut", seed=1)
    times = [name for name in two.runs if name.startswith("time/")]
    arms, runs = pd.concat([one.arms, two.arms]), pd.concat([one.runs, two.runs.drop(columns=times)])
    found = compare(replace(one, arms=arms, runs=runs), against)
    assert [note for note in found.notes if "times were not measured" in note] == [
        "cut on digits: inference and training times were not measured for 10 of 10 runs; the study's command does "
        "it at its end, when nothing else runs, if the models are still there"
    ]
    for style in ("terminal", "markdown", "latex"):
        assert "nan" not in render(found, style).lower()
    _, _, cut = render(found, "markdown").partition("### cut on digits: time and memory")
    assert re.search(r"\| softmax \| 5 \| - \| - \| - \| 500", cut)


def test_a_measure_that_some_runs_lack_is_said():
    outcomes = made_up(("softmax", "relu"), seeds=3)
    outcomes.runs.loc[0, "memory/peak_mib"] = np.nan
    assert compare(outcomes).notes == ("made-up on digits: 1 of 6 runs have no memory/peak_mib",)


def test_a_number_has_the_digits_of_its_own_spread():
    outcomes = made_up(("softmax", "relu"), seeds=3)
    outcomes.runs["time/train_seconds_per_epoch"] = [1.21, 1.31, 1.11, 120.0, 130.0, 110.0]
    # 4.30265 x 0.1 / sqrt(3) = 0.248 and a hundred times that
    text = render(compare(outcomes), "markdown")
    assert "| 1.21 ± 0.25 |" in text and "| 120 ± 25 |" in text


def test_equal_seeds_have_no_interval():
    outcomes = made_up(("softmax", "relu"), seeds=3)
    outcomes.runs["test/accuracy"] = [0.95, 0.95, 0.95, 0.90, 0.92, 0.94]
    text = render(compare(outcomes), "markdown")
    assert "| softmax | 3 | 95.00 |" in text and "± 0" not in re.sub(r"± 0\.0*[1-9]", "", text)


def test_data_sets_stand_in_blocks_of_their_own(several):
    text = render(several, "markdown")
    assert "### made-up on digits: quality" in text and "### other on mnist: quality" in text
    assert set(several.differences.groupby("dataset")["against_study"].unique().explode()) == {"made-up", "other"}


def test_markdown_is_read_as_tables_with_every_cell(half):
    tokens = MarkdownIt("commonmark").enable("table").parse(render(half, "markdown"))
    kinds = [token.type for token in tokens]
    assert (
        kinds.count("table_open") == 1 + 3 + 1 + 4 + 1 + 1 + 1
    )  # grid, differences, gaps, means, ratios, ranks, fronts
    assert kinds.count("bullet_list_open") == 2  # the answer and notes
    columns = row = None
    for token in tokens:
        if token.type == "thead_open":
            columns = None
        if token.type == "tr_open":
            row = 0
        if token.type in ("th_open", "td_open"):
            row += 1
        if token.type == "tr_close":
            columns = columns or row
            assert row == columns
    words = [token.children for token in tokens if token.type == "inline"]
    shown = ["".join(child.content for child in children) for children in words]
    assert "relu_rope *" in shown and any("half_done & 100 %" in text for text in shown)
    assert not any(child.type in ("em_open", "strong_open", "code_inline") for children in words for child in children)


def test_latex_is_well_formed_and_needs_only_booktabs(half):
    text = render(half, "latex")
    body = "\n".join(line for line in text.splitlines() if not line.startswith("% "))
    known = set(
        "begin end caption label centering small footnotesize par medskip textbf addlinespace times "
        "setlength tabcolsep footnotesize toprule midrule bottomrule pm textbackslash textasciitilde textasciicircum"
        .split()
    )  # fmt: skip
    assert set(re.findall(r"\\([A-Za-z]+)", body)) <= known
    assert "ReLU + RoPE $^{*}$ &" in body and r"relu\_rope" not in body
    depth = 0
    for brace in re.findall(r"(?<!\\)[{}]", body):
        depth += 1 if brace == "{" else -1
        assert depth >= 0
    assert depth == 0
    opened = []
    for what, name in re.findall(r"\\(begin|end)\{(\w+\*?)\}", body):
        assert what == "begin" or opened.pop() == name
        opened += [name] if what == "begin" else []
    assert not opened
    words = re.sub(r"\$[^$]*\$", "", body)  # what is no mathematics
    assert not re.search(r"(?<!\\)[_%#^~<>]", words) and body.isascii() and "half\\_done \\& 100 \\%" in body
    for columns, rows in re.findall(r"\\begin\{tabular\}\{([lr]+)\}(.*?)\\end\{tabular\}", body, flags=re.S):
        lines = [line for line in rows.splitlines() if line.endswith("\\\\")]
        assert len(lines) > 1 and {len(re.findall(r"(?<!\\)&", line)) for line in lines} == {len(columns) - 1}


def test_the_main_table_of_a_paper_is_bold_within_the_margin_of_the_best():
    outcomes = made_up(("softmax", "favor", "relu"), seeds=3)
    outcomes.runs["test/accuracy"] = [0.95, 0.96, 0.97, 0.957, 0.958, 0.954, 0.94, 0.95, 0.96]
    text = render(compare(replace(outcomes, predictions={}), margin=0.4), "latex")
    main = text[: text.index(r"\end{table*}")]
    assert re.findall(r"^(\S+) & \\textbf", main, flags=re.M) == ["softmax", "FAVOR+"]  # 96.0 and 95.63; relu has 95.0
    assert r"\label{tab:made-up-digits}" in main and "0.4 points" in main
    labels = re.findall(r"\\label\{(.*)\}", text)
    assert len(set(labels)) == len(labels) == text.count(r"\caption{") > 3


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_what_is_exported_gives_the_same_comparison_again(tmp_path, kind):
    outcomes = made_up(("softmax", "relu", "relu_rope"), seeds=3, images=101)
    for end, content in exports(outcomes, kind):
        (tmp_path / f"table{end}").write_bytes(content.encode() if isinstance(content, str) else content)
    table = pd.read_csv if kind == "csv" else pd.read_parquet
    assert (len(table(tmp_path / f"table_runs.{kind}")), len(table(tmp_path / f"table_trials.{kind}"))) == (9, 12)
    again = read([tmp_path / f"table.{kind}"])
    assert render(compare(again), "json") == render(compare(outcomes), "json")
    assert len(search_tables(again)) == 2


def test_two_exports_are_read_as_two_studies(tmp_path):
    for name, dataset in (("one", "digits"), ("two", "mnist")):
        for end, content in exports(made_up(("softmax", "relu"), seeds=3, study=name, dataset=dataset), "csv"):
            (tmp_path / f"{name}{end}").write_bytes(content.encode() if isinstance(content, str) else content)
    both = read([tmp_path / "one.csv", tmp_path / "two.csv"])
    assert list(both.arms["study"].unique()) == ["one", "two"] and len(both.runs) == 12


@pytest.mark.parametrize(("damage", "said"), [
    (lambda place: (place / "t_runs.csv").unlink(), "t_runs.csv: missing"),
    (lambda place: (place / "t_runs.csv").write_text("a,b\n1,2\n"), "damaged (t_runs.csv has no column arm)"),
    (lambda place: (place / "t_study.json").write_text("[]"), "damaged"),
    (lambda place: (place / "t_images.npz").write_bytes(b"PK"), "t_images.npz"),
])  # fmt: skip
def test_damaged_exports_are_one_line(tmp_path, damage, said):
    for end, content in exports(made_up(("softmax", "relu"), seeds=2), "csv"):
        (tmp_path / f"t{end}").write_bytes(content.encode() if isinstance(content, str) else content)
    damage(tmp_path)
    with pytest.raises(StoreError, match=re.escape(said)) as error:
        read([tmp_path / "t.csv"])
    assert "\n" not in str(error.value)
    with pytest.raises(StoreError, match="not a table of"):
        read([tmp_path / "t.txt"])


def test_times_are_ratios_to_softmax_by_seed_whose_intervals_stay_above_0():
    outcomes = made_up(("softmax", "relu"), seeds=3)
    outcomes.runs[TIMED] = [1.0, 2.0, 4.0, 2.0, 1.0, 16.0]
    found = compare(outcomes).ratios
    ratio = found[(found["measure"] == TIMED) & (found["arm"] == "relu")].iloc[0]
    # ratios 2, 1/2 and 4: the mean of their logarithms is ln(4) / 3
    assert ratio["ratio"] == pytest.approx(4 ** (1 / 3)) and ratio["n"] == 3 and 0 < ratio["low"] < 0.2
    one = found[(found["measure"] == TIMED) & (found["arm"] == "softmax")].iloc[0]
    assert one["ratio"] == 1 and np.isnan(one["low"])


def test_a_study_ends_with_accuracies_and_the_answer(whole):
    text = ending(whole)
    assert text.index("test accuracy") < text.index("softmax_rope") < text.index("the answer") < text.index("FAVOR+ is")
    assert "precision" not in text and "p (Holm)" not in text


def test_latex_escapes_every_sign_that_means_something():
    outcomes = made_up(("softmax", "relu"), study=r"a\b{c}_$x^2~#&%")
    text = render(compare(outcomes), "latex")
    assert r"a\textbackslash{}b\{c\}\_\$x\textasciicircum{}2\textasciitilde{}\#\&\%" in text


def test_brackets_in_names_are_no_markup():
    shown = render(compare(made_up(("softmax", "relu"), study="[bold]odd[/bold] *name*")), "terminal")
    assert "[bold]odd[/bold] *name* on digits" in shown


def test_an_unknown_format_is_refused_with_the_nearest(whole):
    with pytest.raises(ConfigError, match="unknown format 'markdwon'; did you mean markdown"):
        render(whole, "markdwon")
    assert set(FORMATS) == {"terminal", "markdown", "csv", "parquet", "json", "latex"}
