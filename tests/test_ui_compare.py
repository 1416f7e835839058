"""The confirmed runs of a study can be selected in the MLflow UI, and Compare draws the numbers of the database.

`ERPE_SCREENSHOTS=FOLDER pytest tests/test_ui_compare.py` keeps the pictures; with `ERPE_UI_STORE=STORE` as well, they
are of that store's newest study instead of the small one made here.
"""

import math
import os
import re
import shutil
from collections import defaultdict
from statistics import mean
from urllib.parse import unquote

import pytest
from browsing import choose, pick, press, table, tidy, visit, wait
from mlflow_server import newest_study, rows

from erpe.cli.ui import pages
from erpe.store import Store
from erpe.tracking import artifacts
from erpe.tracking.tracker import sync
from erpe.tracking.ui_views import CONFIRMED_MEASURES, confirmed_page

pytestmark = pytest.mark.slow

VARIANT, ACCURACY, TIME = "model.variant", "test/accuracy", "time/inference_ms_per_image"
COLUMN = f"metrics.`{ACCURACY}`"
AXES = (VARIANT, TIME, "flops/forward", "bic", ACCURACY)


@pytest.fixture(scope="module")
def store(request, tmp_path_factory):
    """A whole study with MLflow's database of it."""
    if given := os.environ.get("ERPE_UI_STORE"):
        return Store.open(given)
    trained, database = request.getfixturevalue("digits_study"), request.getfixturevalue("empty_database")
    store = Store.open(shutil.copytree(trained.root, tmp_path_factory.mktemp("compare") / "store"))
    shutil.copy(database, store.root / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setattr(artifacts, "draw", lambda folder, into: [])  # test_ui looks at figures; these take a minute
        assert set(sync(store, timeout=200).values()) == {0}
    return store


@pytest.fixture(scope="module")
def study(store):
    """(experiment id, name) of the newest study in MLflow's database."""
    return newest_study(store.root / "mlflow.db")


def finished(store, study, phase):
    """What MLflow's database has of the finished trials of a phase: {run id: {"metrics": {key: value}, ...}}."""
    database = store.root / "mlflow.db"
    found = defaultdict(dict)
    for what in ("latest_metrics", "params", "tags"):
        query = f"SELECT run_uuid, name, key, value FROM runs LEFT JOIN {what} USING (run_uuid) WHERE experiment_id = ?"
        for run, name, key, value in rows(database, query, study[0]):
            found[run].setdefault("name", name)
            found[run].setdefault(what.removeprefix("latest_"), {})[key] = value
    keep = {"phase": phase, "state": "COMPLETE"}.items()
    return {run: it for run, it in found.items() if "erpe.trial_uid" in it["tags"] and keep <= it["tags"].items()}


@pytest.fixture(scope="module")
def confirmed(store, study):
    return finished(store, study, "confirm")


@pytest.mark.parametrize("phase", ["search", "confirm"])
def test_no_run_lacks_a_measure_a_parameter_or_a_tag(store, study, phase):
    runs = finished(store, study, phase).values()
    assert len({run["tags"]["arm"] for run in runs}) >= 3
    for what in ("metrics", "params", "tags"):
        assert len({frozenset(run[what]) for run in runs}) == 1, what
    assert all(math.isfinite(value) for run in runs for value in run["metrics"].values())
    assert phase == "search" or all(set(CONFIRMED_MEASURES) <= set(run["metrics"]) for run in runs)


def test_runs_are_named_by_arm_and_seed(confirmed):
    for run in confirmed.values():
        assert run["name"] == f"{run['tags']['arm']}/seed-{run['tags']['optuna.number']}"
    seeds = defaultdict(set)
    for run in confirmed.values():
        seeds[run["tags"]["arm"]].add((run["tags"]["optuna.number"], run["params"]["seed"]))
    assert len(set(map(frozenset, seeds.values()))) == 1, "equal seeds of all arms are pairs"


def test_a_run_ends_when_its_training_does_not_when_all_are_timed(store, study, confirmed):
    query = "SELECT run_uuid, end_time FROM runs WHERE experiment_id = ?"
    ends = {run: end for run, end in rows(store.root / "mlflow.db", query, study[0]) if run in confirmed}
    assert len(set(ends.values())) == len(ends)


@pytest.fixture(scope="module")
def confirmed_runs(browser, ui, study, confirmed):
    """The page of the confirmed runs, as `erpe ui` prints it."""
    browser.set_window_size(1900, 760)
    visit(browser, ui + confirmed_page(study[0]))

    def ready():
        tidy(browser)
        shown = table(browser)
        return {run["name"] for run in confirmed.values()} <= set(shown) and all(
            COLUMN in row for row in shown.values()
        )

    wait(browser, ready)
    return browser


def test_the_view_of_confirmed_runs_shows_those_alone_and_the_mean_of_each_arm(
    confirmed_runs, store, study, confirmed, photograph
):
    assert confirmed_page(study[0]) in pages(store).values()
    assert "confirmed runs by arm" in confirmed_runs.find_element("css selector", "[data-testid*=views-trigger]").text
    groups = defaultdict(list)
    for run in confirmed.values():
        groups[run["tags"]["arm"]].append(run)
    shown = {text: float(row[COLUMN].split()[0]) for text, row in table(confirmed_runs, full_name=True).items()}
    photograph("mlflow-confirmed")
    assert len(shown) == len(confirmed) + len(groups)
    for run in confirmed.values():
        assert shown[run["name"]] == run["metrics"][ACCURACY]
    for name, members in groups.items():
        text = next(text for text in shown if f"arm: {name}," in text)
        assert f"configuration: {members[0]['tags']['configuration']}" in text and text.endswith(str(len(members)))
        assert re.fullmatch(r"trial \d", members[0]["tags"]["configuration"])
        assert shown[text] == pytest.approx(mean(run["metrics"][ACCURACY] for run in members))


@pytest.fixture(scope="module")
def compared(confirmed_runs, confirmed):
    """All of them selected, and Compare pressed."""
    confirmed_runs.find_element("css selector", ".ag-header-select-all input").click()
    press(confirmed_runs, "button", "Compare")
    wait(confirmed_runs, lambda: drawn(confirmed_runs, "parcoords"))
    assert set(re.findall(r"[0-9a-f]{32}", unquote(confirmed_runs.current_url))) == set(confirmed)
    confirmed_runs.set_window_size(1900, 1100)
    return confirmed_runs


def drawn(browser, kind):
    """The traces of this kind on the page, as plotly has them, once they are drawn."""
    traces = browser.execute_script(
        "return [...document.querySelectorAll('.js-plotly-plot')].filter(plot => plot.querySelector('svg.main-svg'))"
        ".flatMap(plot => plot.data).map(trace => JSON.parse(JSON.stringify(trace)))"
    )
    return [trace for trace in traces if trace["type"].startswith(kind)]


def values(run, keys):
    return tuple(run["metrics"].get(key, run["params"].get(key)) for key in keys)


def test_compare_names_all_runs_and_begins_with_what_differs(compared, confirmed):
    text = compared.find_element("css selector", ".CompareRunView").text
    assert f"Comparing {len(confirmed)} Runs from 1 Experiment" in text
    assert all(run["name"] in text for run in confirmed.values())
    (plot,) = drawn(compared, "parcoords")
    assert {VARIANT, "seed"} <= {axis["label"] for axis in plot["dimensions"]}


def test_parallel_coordinates_are_those_of_the_database(compared, confirmed, photograph):
    press(compared, "[role=tab]", "Parallel Coordinates Plot")
    press(compared, "button", "Clear All")
    choose(compared, "Parameters:", VARIANT)
    for key in AXES[1:]:
        choose(compared, "Metrics:", key)
    wait(compared, lambda: [len(plot["dimensions"]) for plot in drawn(compared, "parcoords")] == [len(AXES)])
    (plot,) = drawn(compared, "parcoords")
    assert tuple(axis["label"] for axis in plot["dimensions"]) == AXES
    assert [label.text for label in compared.find_elements("css selector", ".axis-title")] == list(AXES)
    first, *others = (axis["values"] for axis in plot["dimensions"])
    named = dict(zip(plot["dimensions"][0]["tickvals"], plot["dimensions"][0]["ticktext"], strict=True))
    lines = sorted(zip((named[value] for value in first), *others, strict=True))
    expected = [values(run, AXES) for run in confirmed.values()]
    assert lines == sorted((variant[:10], *rest) for variant, *rest in expected)  # MLflow cuts names on an axis
    assert len(set(named.values())) == len({variant for variant, *_ in expected})
    photograph("mlflow-compare")


def test_the_scatter_plot_has_a_point_for_every_run(compared, confirmed, photograph):
    press(compared, "[role=tab]", "Scatter Plot")
    pick(compared, "x-axis-selector", TIME)
    pick(compared, "y-axis-selector", ACCURACY)
    expected = {run["name"]: values(run, (TIME, ACCURACY)) for run in confirmed.values()}

    def points():
        return {
            re.match("<b>(.*?)</b>", text)[1]: (x, y)
            for plot in drawn(compared, "scatter")
            for text, x, y in zip(plot["text"], plot["x"], plot["y"], strict=True)
        }

    wait(compared, lambda: points() == expected)
    titles = [compared.find_element("css selector", f".g-{axis}title").text for axis in "xy"]
    assert titles == [TIME, ACCURACY] and compared.find_elements("css selector", "canvas.gl-canvas")
    photograph("mlflow-compare-scatter")


def test_the_box_plot_has_a_box_for_every_variant(compared, confirmed, photograph):
    press(compared, "[role=tab]", "Box Plot")
    pick(compared, "x-axis-selector", VARIANT)
    pick(compared, "y-axis-selector", ACCURACY)
    expected = defaultdict(list)
    for run in confirmed.values():
        expected[run["params"][VARIANT]].append(run["metrics"][ACCURACY])

    def boxes():
        return {box["name"]: sorted(box["y"]) for box in drawn(compared, "box")}

    wait(compared, lambda: boxes() == {name: sorted(found) for name, found in expected.items()})
    assert len(compared.find_elements("css selector", "path.box")) == len(expected)
    photograph("mlflow-compare-box")


def test_every_trial_names_its_data_set_with_its_digest_and_says_what_it_is_and_how_to_use_it(store, study, confirmed):
    database = store.root / "mlflow.db"
    query = "SELECT destination_id, name, digest FROM inputs JOIN datasets ON source_id = dataset_uuid"
    found = {run: (name, digest) for run, name, digest in rows(database, query)}
    for run, it in confirmed.items():
        assert found[run] == ("digits", it["tags"]["data_sha256"][:36])
        assert f"`erpe predict digits-nine/{it['name']} PICTURE`" in it["tags"]["mlflow.note.content"]
    [(said,)] = rows(database, "SELECT value FROM experiment_tags WHERE key = 'mlflow.note.content'")
    assert "compares arms on digits" in said


def test_weights_are_in_mlflow_once_a_run(store, confirmed):
    champions = {path.parent.name for path in store.artifacts.rglob("MLmodel")}
    assert champions == {"checkpoint"}
    for run in confirmed:
        assert len(list((store.artifacts / "digits-nine" / run).rglob("model.safetensors"))) == 1
