"""The MLflow UI in a real browser shows a study as it was told.

`ERPE_SCREENSHOTS=FOLDER pytest tests/test_ui.py` keeps the pictures; with `ERPE_UI_STORE=STORE` as well, they are of
that store's newest study instead of the small one made here.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
from browsing import table, tidy, visit, wait
from mlflow_server import newest_study, rows
from told import driver, epoch, results

from erpe.execution.trial_loop import TrialEvent
from erpe.store import Store
from erpe.tracking.ui_views import MEASURES, runs_page

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def store(tmp_path_factory, empty_database):
    """A study of five trials, the last of them still running, as its driver would tell it."""
    if given := os.environ.get("ERPE_UI_STORE"):
        return Store.open(given)
    store = Store.open(tmp_path_factory.mktemp("ui") / "store")
    shutil.copy(empty_database, store.root / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.delenv("ERPE_STORAGE_URL", raising=False)
        with driver(store, trials=5) as controller:
            _tell(controller)
    return store


def _tell(controller):
    session, tracker = controller.session, controller.tracker
    for n in range(5):
        trial = controller.next_trial()
        for step in range(1, 4 if n < 4 else 2):
            epoch(controller, trial, step, **{"val/accuracy": 0.97 - 0.3 / step - n / 100, "val/loss": 0.1 + 1 / step})
        final = {"val/accuracy": 0.97 - 0.3 / 3 - n / 100, "params": 202842.0, "flops/forward": 6571264.0}
        if n == 2:
            session.decide(n, "PRUNED", {}, "pruned after epoch 3")
            session.tell(n)
            tracker.end_trial(session.name, trial)
        elif n < 4:
            if n == 0:
                results(controller.folder(trial))
            controller.on_trial_result(trial, TrialEvent(outcome=final))
    assert tracker.close(120) == 0, tracker.problem


@pytest.fixture(scope="module")
def study(store):
    """(experiment id, name) of the newest study in MLflow's database."""
    return newest_study(store.root / "mlflow.db")


def told(store, study):
    """The same from MLflow's database: {run name: {metric: value}}."""
    query = "SELECT name, key, value FROM runs LEFT JOIN latest_metrics USING (run_uuid) WHERE experiment_id = ?"
    found = {}
    for name, key, value in rows(store.root / "mlflow.db", query, study[0]):
        found.setdefault(name, {})[key] = value
    return found


def test_the_runs_page_shows_each_trial_once_with_its_measures(browser, ui, store, study, photograph):
    expected = told(store, study)
    del expected[study[1]]  # the parent, which has those of the best trial again
    visit(browser, ui + runs_page(study[0]))
    wait(browser, lambda: set(table(browser)) >= set(expected))
    columns = {f"metrics.`{measure}`" for measure in MEASURES if any(measure in row for row in expected.values())}
    wait(browser, lambda: tidy(browser) or columns <= set(table(browser)[next(iter(expected))]))
    shown = table(browser)
    assert len(shown) == len(expected)
    for name, metrics in expected.items():
        for column in columns:
            measure, text = column[9:-1], shown[name][column]
            assert (float(text) if text != "-" else None) == metrics.get(measure), (name, measure)
    photograph("mlflow-ui")


def test_a_trials_page_shows_its_measures_and_its_figures(browser, ui, store, study, photograph):
    query = "SELECT run_uuid, name FROM runs WHERE experiment_id = ? AND name LIKE '%/%' AND status = 'FINISHED'"
    run, name = rows(store.root / "mlflow.db", query + " ORDER BY name", study[0])[0]
    page = f"{ui}/#/experiments/{study[0]}/runs/{run}"
    visit(browser, f"{page}?workflowType=machine_learning")
    metrics = told(store, study)[name]

    def text():
        return browser.find_element("tag name", "body").text

    wait(browser, lambda: all(key in text() for key in metrics) and name in text())
    assert str(metrics["val/accuracy"]) in text()
    photograph("mlflow-trial")
    visit(browser, f"{page}/artifacts/figures/attention.png?workflowType=machine_learning")
    wait(browser, lambda: browser.execute_script("return [...document.images].some(i => i.naturalWidth > 500)"))
    photograph("mlflow-attention")


def test_optunas_plots_open_in_the_ui_without_any_network(browser, ui, store, study, photograph):
    query = "SELECT run_uuid, artifact_uri FROM runs WHERE experiment_id = ? AND name NOT LIKE '%/%'"
    run, uri = rows(store.root / "mlflow.db", query, study[0])[0]
    plots = sorted(path.name for path in Path(uri.removeprefix("file://"), "optuna").iterdir())
    assert plots == ["history.png", "importances.png", "parallel_coordinates.png"]
    page = f"{ui}/#/experiments/{study[0]}/runs/{run}/artifacts/optuna/{plots[-1]}"
    visit(browser, f"{page}?workflowType=machine_learning")
    wait(browser, lambda: browser.execute_script("return [...document.images].some(i => i.naturalWidth > 500)"))
    photograph("mlflow-optuna")


def test_the_view_is_what_the_experiment_carries(store, study):
    query = "SELECT value FROM experiment_tags WHERE experiment_id = ? AND key = 'mlflow.sharedViewState.erpe'"
    ((state,),) = rows(store.root / "mlflow.db", query, study[0])
    assert {f"metrics.`{measure}`" for measure in MEASURES} <= set(json.loads(state)["selectedColumns"])
