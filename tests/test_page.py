import base64
import dataclasses
import io
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from outcomes import made_up

from erpe.report.charts import CHARTS
from erpe.report.charts.captions import seeds_told
from erpe.report.comparison import compare
from erpe.report.grid import grid
from erpe.report.outcomes import TIMED
from erpe.report.page import page, write_report
from erpe.report.protocol import protocol, search_tables
from erpe.report.summary import sentences
from erpe.report.table_blocks import blocks

FEW = ("softmax", "relu", "relu_general")
HOSTILE = """<script>alert('1')</script><img src="http://example.org/x.png">"""
EMPTY = {"meta", "link", "img", "br", "hr", "input"}


class Reader(HTMLParser):
    """What a browser would see: elements with attributes, text by element, tags that do not match."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.text, self.open, self.torn = [], [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.torn.append(tag)

    def handle_data(self, data):
        if data.strip() and self.open[-1:] != ["style"]:
            self.text.append(data.strip().replace("\N{NO-BREAK SPACE}%", " %"))

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def outcomes():
    """Three arms, one of them unfinished, and a name and a note that a page must not take as its own words."""
    found = made_up(FEW, seeds=3, images=100, study=HOSTILE)
    arms = found.arms.assign(finished=[True, True, False], seeds=[3, 3, 2])
    return dataclasses.replace(found, arms=arms, runs=found.runs.iloc[:-1], notes=(f"beware of {HOSTILE}",))


@pytest.fixture(scope="module")
def html(outcomes):
    return page(outcomes, compare(outcomes))


@pytest.fixture(scope="module")
def seen(html):
    return Reader(html)


@pytest.mark.slow
def test_the_page_needs_nothing_from_outside(seen, html):
    assert not {"script", "link", "iframe", "img", "object", "embed"} & {tag for tag, _ in seen.elements}
    for tag, attributes in seen.elements:
        for name, value in attributes.items():
            assert name not in ("src", "srcset", "action") and not name.startswith("on"), tag
            if name == "href":
                assert value.startswith(("#", "data:")), value
            if name not in ("aria-label", "title"):
                assert "http" not in (value or ""), value
    style = re.search("<style>(.*?)</style>", html, re.DOTALL)[1]
    assert "@import" not in style and "url(" not in style and "http" not in style


def test_what_data_say_is_shown_as_text(seen, html):
    assert "<script" not in html and "<img" not in html
    assert f"beware of {HOSTILE}" in seen.text and HOSTILE in seen.text


def test_every_element_is_closed_and_every_id_is_one_element(seen, html):
    assert not seen.torn and not seen.open
    ids = [attributes["id"] for _, attributes in seen.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = {value[1:] for _, attributes in seen.elements if (value := attributes.get("href", "")).startswith("#")}
    used |= set(re.findall(r"url\(#([^)]+)\)", html))
    assert used and used <= set(ids)


def test_figures_and_tables_can_be_read_without_eyes(seen):
    figures, tables = seen.all("svg"), seen.all("table")
    assert len(figures) == 8 and len(tables) == len(seen.all("caption"))
    assert all(figure["role"] == "img" and len(figure["aria-label"]) > 60 for figure in figures)
    assert {attributes["scope"] for attributes in seen.all("th")} == {"col", "row"}
    assert len([th for th in seen.all("th") if th["scope"] == "row"]) >= 3 * len(tables) - 10
    assert seen.all("html")[0]["lang"] == "en" and len(seen.all("h1")) == 1


def test_each_caption_says_over_how_many_seeds(seen):
    text = " ".join(seen.text)
    assert text.count("n = 2 to 3 seeds") >= 4
    assert "What one patch looks at. No figure: no confirmed run's attention.npz is on this machine." in text


def test_a_caption_counts_the_seeds_that_its_figure_is_over():
    found = made_up(("softmax", "relu", "relu_general", "relu_rope"), seeds=6, images=500)
    arms = found.arms.assign(finished=[True, True, True, False])
    gone = found.runs.index[found.runs["arm"] == "relu_rope"][2:]
    comparison = compare(dataclasses.replace(found, arms=arms, runs=found.runs.drop(gone)))
    for chart in ("accuracy", "differences"):
        assert seeds_told(comparison, chart) == "n = 2 to 6 seeds"
    assert seeds_told(comparison, "critical_difference") == "n = 6 seeds"  # of the finished arms


def test_the_page_has_every_number_of_the_tables_and_every_verdict(outcomes, seen):
    comparison = compare(outcomes)
    text = set(seen.text)
    for block in blocks(comparison, labels=True):
        if block.title.endswith("attention x encoding"):  # the first screen has it in a shape of its own
            continue
        for row in block.rows:
            assert {cell.strip() for cell in row if cell.strip()} <= text
        assert set(block.remarks) <= text
    for row in grid(comparison.only(HOSTILE, "digits")):
        for cell in row.cells.values():
            assert cell.accuracy in text and cell.arm in text
            assert not cell.against or any(line.startswith(f"{cell.difference} ") for line in text)
    assert set(comparison.verdicts["text"]) <= text and set(comparison.notes) <= text


def test_the_first_screen_answers_with_sentences_the_grid_and_the_forest_and_warnings_follow(outcomes, html):
    places = ["The answer", sentences(compare(outcomes))[0], 'class="grid"', "Paired differences.", "What to know",
              "are missing, pairs are over", "Contents", "Differences</h3>"]  # fmt: skip
    text = html.replace("\N{NO-BREAK SPACE}%", " %")
    found = [text.index(place) for place in places]
    assert found == sorted(found)


@pytest.mark.slow
def test_warnings_about_times_stand_with_the_times(outcomes):
    runs = outcomes.runs.assign(device=["cuda", *outcomes.runs["device"][1:]])
    found = page(again := dataclasses.replace(outcomes, runs=runs), compare(again))
    assert (
        found.index("What it costs</h3>") < found.index("do not compare its times and memory") < found.index("Fit</h3>")
    )
    assert found.count("do not compare its times and memory") == 1


@pytest.mark.slow
def test_the_page_says_when_and_how_to_repeat_it_and_has_the_data_of_every_figure(outcomes):
    told = dataclasses.replace(outcomes, dates={HOSTILE: "2026-11-29"}, files={HOSTILE: 'dataset = "digits"\n'})
    seen = Reader(page(told, compare(told)))
    text = " ".join(seen.text)
    assert "Last run: 2026-11-29" in text and "erpe study run" in text
    files = {link["download"]: link["href"] for link in seen.all("a") if "download" in link}
    data = {name: base64.b64decode(href.partition(",")[2]).decode() for name, href in files.items()}
    assert data.pop(f"{HOSTILE}.toml") == 'dataset = "digits"\n'
    assert len(data) == len(seen.all("svg")) and all(len(table.splitlines()) > 1 for table in data.values())
    accuracy = pd.read_csv(io.StringIO(data["accuracy.csv"]))
    assert accuracy["test/accuracy"].tolist() == outcomes.runs["test/accuracy"].tolist()


def test_every_link_of_the_contents_goes_somewhere(seen):
    ids = {attributes.get("id") for _, attributes in seen.elements}
    links = [link["href"][1:] for link in seen.all("a") if link["href"].startswith("#")]
    assert len(links) >= 8 and set(links) <= ids


@pytest.mark.slow
def test_no_number_is_parted_from_its_per_cent_sign(html):
    assert re.search("[0-9]\N{NO-BREAK SPACE}%", html) and not re.search("[0-9] %", html)


def test_equal_outcomes_give_the_same_page_written_whole(outcomes, html, tmp_path):
    path = write_report(outcomes, compare(outcomes), tmp_path / "report.html")
    assert path.read_text(encoding="utf-8") == html and list(tmp_path.iterdir()) == [path]


def test_the_answer_finds_what_is_true():
    outcomes = made_up(images=20_000, noise=0.001)
    favor, relu, softmax, cheap = sentences(compare(outcomes))
    assert favor.startswith("FAVOR+ is ") and " points below softmax (95 % " in favor
    assert "Part of the gap is removed by general RPE (" in favor and relu.startswith("ReLU is ")
    found = re.search(
        r"general RPE \((\d+) % of it, 95 % (\d+) to (\d+); 1.05 points below softmax, ", relu
    )  # 0.03 of 0.04
    share, low, high = map(int, found.groups())
    assert low < 75 < high and abs(share - 75) < 12
    assert softmax.startswith("Better than softmax alone: general RPE (+")
    assert cheap.endswith("more accurate than softmax or softmax + general RPE.")


def test_what_an_encoding_does_to_a_gap_is_said_by_its_verdicts():
    outcomes = made_up(("softmax", "relu", "relu_general", "relu_circulant", "relu_rope"), seeds=8, images=50)
    means = {"softmax": 0.90, "relu": 0.85, "relu_general": 0.92, "relu_circulant": 0.85, "relu_rope": 0.80}
    noise = np.random.default_rng(0).normal(0, 0.001, len(outcomes.runs))
    runs = outcomes.runs.assign(**{"test/accuracy": outcomes.runs["arm"].map(means) + noise})
    said, *_ = sentences(compare(dataclasses.replace(outcomes, runs=runs, predictions={})))
    assert said == (
        "ReLU is 5.12 points below softmax (95 % 5.06 to 5.19, 8 seeds). All of the gap is removed by general RPE "
        "(1.98 points above softmax, 95 % 1.88 to 2.09). Within 0.5 points the gap is the same with circulant-STRING "
        "(+0.06 points, 95 % -0.04 to 0.17). The gap is larger with RoPE (-4.88 points, 95 % -4.97 to -4.79)."
    )


def test_nothing_is_concluded_of_times_that_intervals_do_not_tell_apart():
    outcomes = made_up(FEW, images=100)
    outcomes.runs[TIMED] *= np.tile([1.0, 2.0, 0.5, 3.0, 1.5], len(FEW))
    comparison = compare(outcomes)
    assert sentences(comparison)[-1].endswith("accuracies bear that out, so it stays open.")
    assert any("the machine was busy" in note and "relu_general" in note for note in comparison.notes)
    assert sentences(compare(made_up(FEW, seeds=1)))[-1].endswith("so it stays open.")


def test_switches_are_told_by_their_two_values():
    outcomes = made_up(("relu_rope",), seeds=5, images=100)
    gains = {"axial-learned": 0.0, "axial-position_none": -0.05, "mixed-learned": 0.05, "mixed-position_none": 0.0}
    copies = {}
    for name in ("arms", "runs"):
        table = getattr(outcomes, name)
        copies[name] = pd.concat(
            [table.assign(arm=f"relu_rope-{switches}", gain=gain) for switches, gain in gains.items()]
        )
    noise = np.random.default_rng(0).normal(0, 0.001, len(copies["runs"]))
    copies["runs"]["test/accuracy"] = 0.9 + copies["runs"]["gain"] + noise
    first, second, *_ = sentences(compare(dataclasses.replace(outcomes, predictions={}, **copies)))
    assert first == (
        "With no positions instead of learned positions, worse: ReLU + RoPE (axial) and ReLU + RoPE (mixed)."
    )
    assert second == (
        "With mixed instead of axial, better: ReLU + RoPE (learned positions) and ReLU + RoPE (no positions)."
    )


def test_what_an_unfinished_arm_says_is_told_to_be_preliminary():
    outcomes = made_up(FEW, seeds=4, images=400)
    arms = outcomes.arms.assign(finished=[True, True, False], seeds=[4, 4, 3], seeds_planned=4)
    said = sentences(compare(dataclasses.replace(outcomes, arms=arms, runs=outcomes.runs.iloc[:-1])))
    (about,) = [sentence for sentence in said if sentence.startswith("ReLU is")]
    assert about.count("So far ") == 1 and "So far not shown to remove any of the gap: general RPE" in about
    assert "preliminary" not in about


def test_one_arm_has_no_answer_yet():
    outcomes = made_up(("relu",), seeds=2, images=20)
    bare = outcomes.runs.drop(columns="time/inference_ms_per_image")
    assert sentences(compare(dataclasses.replace(outcomes, runs=bare))) == ["There are no two arms to compare yet."]


def test_the_protocol_names_data_budget_device_and_versions():
    outcomes = made_up(FEW, seeds=2, images=20)
    outcomes = dataclasses.replace(outcomes, runs=outcomes.runs.assign(torch="2.13.0"))
    steps = protocol(outcomes)
    assert steps["Data"] == "digits: 1,437 training images (1,437 of them for the confirmation), 360 test images"
    assert steps["Budget"] == "4 trials an arm of 5 epochs, fewer where pruned; equal for all: trials"
    assert steps["Confirmation"].endswith("on the whole training set, for 5 epochs")
    assert (steps["Device"], steps["Version"], steps["Torch"]) == ("cpu", "0.1.0", "2.13.0")


def test_the_search_tables_have_what_was_searched_a_column_an_arm():
    outcomes = made_up(FEW, seeds=2, images=20)
    softmax, relu = search_tables(outcomes)
    assert softmax.columns == ["", "softmax"] and relu.columns == ["", "ReLU", "ReLU + general RPE"]
    assert relu.rows == [
        ["trials", *["4 of 4 (3 complete, 1 pruned)"] * 2], ["best validation accuracy (%)", "82.00", "82.00"],
        ["seeds", "2 of 2", "2 of 2"], ["train.lr", "0.003", "0.003"],
    ]  # fmt: skip
    assert relu.remarks == ["the same for all: model.width 64"]
    _, relu = search_tables(dataclasses.replace(outcomes, trials=pd.DataFrame()))
    assert [row[1] for row in relu.rows] == ["4 of 4", "-", "2 of 2"]


def test_two_studies_are_two_answers_on_one_page(monkeypatch):
    monkeypatch.setattr("erpe.report.page.CHARTS", dict.fromkeys(CHARTS, lambda *part: None))
    one, two = made_up(FEW, seeds=2, images=20), made_up(FEW, seeds=2, images=20, study="second", dataset="mnist")
    tables = {
        name: pd.concat([getattr(one, name), getattr(two, name)]) for name in ("arms", "runs", "trials", "epochs")
    }
    both = dataclasses.replace(one, **tables)
    seen = Reader(page(both, compare(both)))
    headings = [text for text in seen.text if text.endswith(": the answer")]
    assert headings == ["made-up on digits: the answer", "second on mnist: the answer"]
