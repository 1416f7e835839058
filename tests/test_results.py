"""A study in Python: frames, best configurations and models; and the notebook that shows them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_run_study import play
from trials import ARMS, STUDIES, TINY

import erpe
from erpe.errors import ShapeError, StoreError, StudyError
from erpe.report.sources.store import load
from erpe.search.tune import tune
from erpe.store import Store
from erpe.study.reading import read_studies
from erpe.study.spec import define

NAME = "digits-nine"
TABLES = ("arms", "runs", "trials", "epochs")


@pytest.fixture(scope="module")
def study(digits_study):
    return erpe.load_study(NAME, digits_study.root)


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """The store of a study of toys."""
    store = Store.open(tmp_path_factory.mktemp("toys") / "store")
    play(store)
    return store


def test_the_tables_are_those_that_compare_reads_and_each_row_is_there_once(study, digits_study):
    outcomes = load(digits_study, [NAME])
    for name in TABLES:
        assert getattr(study, name).equals(getattr(outcomes, name)), name
    assert tuple(study.arms["arm"]) == ARMS
    assert study.runs["uid"].is_unique and len(study.runs) == 3 * 2
    assert study.trials["uid"].is_unique and len(study.trials) == 3 * 2
    assert not study.epochs.duplicated(["uid", "epoch"]).any() and len(study.epochs) == 3 * (2 + 2) * 2
    assert repr(study) == "<study digits-nine: 3 of 3 arms finished, 6 trials, 6 confirmed runs>"


def test_best_is_the_configuration_that_was_confirmed(study, digits_study):
    for member in read_studies(digits_study):
        if member.part_of.phase == "search":
            assert study.best(member.part_of.arm) == member.best.config
    rows = study.trials.set_index("uid")
    best = study.best("relu_rope")
    row = rows.loc[rows.loc[rows["arm"] == "relu_rope", "value"].idxmax()]
    assert (best.seed, best.train.lr, best.model.variant) == (row["seed"], row["train.lr"], "relu_rope")


def test_a_model_says_again_what_it_said_when_it_was_tested(study):
    from erpe.training.data import load_test, normalise

    test = load_test("digits")
    for run in study.runs.itertuples():
        with torch.no_grad():
            seen = study.model(run.uid)(normalise(test.pixels, "digits")).argmax(dim=1)
        assert np.array_equal(seen, study.outcomes.predictions[run.uid])


def test_the_model_of_an_arm_is_that_of_its_first_seed_and_a_trial_of_the_search_has_one_too(study):
    def weights(run):
        return study.model(run).state_dict()["head.weight"]

    runs = study.runs[study.runs["arm"] == "relu_rope"]
    assert torch.equal(weights("relu_rope"), weights(runs["uid"].iloc[0]))
    assert not torch.equal(weights("relu_rope"), weights(runs["uid"].iloc[1]))
    assert study.model(study.trials["uid"].iloc[0]).config.variant == study.trials["variant"].iloc[0]


def test_a_study_compares_itself(study):
    summary = study.comparison().summary.set_index(["arm", "measure"])["mean"]
    assert summary["relu", "test/accuracy"] == pytest.approx(
        study.runs.loc[study.runs["arm"] == "relu", "test/accuracy"].mean()
    )


def test_a_variant_stands_for_its_arms(tmp_path):
    store = Store.open(tmp_path)
    play(store, 'variants=["relu"]', 'switches."model.pooling"=["mean", "cls"]')
    study = erpe.load_study(NAME, store.root)
    assert len(study.arms) == 2 and "relu" not in set(study.arms["arm"])
    best = study.trials.loc[study.trials["value"].astype(float).idxmax()]
    assert study.best("relu").train.lr == best["train.lr"]
    for arm in study.arms["arm"]:
        assert study.best(arm).model.pooling in arm


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda store: erpe.load_study("digits-nin", store), "study digits-nin: .* did you mean digits-nine?"),
        (lambda store: erpe.load_study(NAME, store).best("relu_rop"), "relu_rop.*did you mean relu_rope?"),
        (lambda store: erpe.load_study(NAME, store).model("softmx"), "softmx.*did you mean softmax?"),
        (lambda store: erpe.load_study(NAME, store).model("favor"), "'favor'"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest_in_one_line(toys, ask, said):
    with pytest.raises(StudyError, match=said) as error:
        ask(toys.root)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_study_of_tune_has_one_arm_and_the_model_of_its_best_trial(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nowhere://")
    spec = define("relu", "digits", settings=TINY | {"train.epochs": 1}, sampler="random", pruner="none")
    found = tune(spec, Store.open(tmp_path), trials=2, executor="inline")
    study = erpe.load_study("digits-relu", tmp_path)
    assert repr(study) == "<study digits-relu: 1 of 1 arms finished, 2 trials, 0 confirmed runs>"
    assert study.best("relu") == study.model("relu").trial == found.config
    best = study.trials.set_index("number").loc[found.best]
    assert (best["value"], best["test/accuracy"]) == (found.value, found.test["test/accuracy"])
    assert len(study.epochs) == 2 and study.arms["openings"].tolist() == [1] and study.runs.empty
    with pytest.raises(StudyError, match="nothing to compare"):
        study.comparison()


def test_a_store_that_is_not_there_is_not_made(tmp_path):
    with pytest.raises(StoreError, match="nothing there"):
        erpe.load_study(NAME, tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_an_arm_without_results_says_so(tmp_path):
    from toys import work

    from erpe.errors import TrialError

    def accident(folder, epoch):
        if "relu_rope" in folder.parent.name:
            raise TrialError("the loss of step 7 is not finite")

    store = Store.open(tmp_path)
    play(store, work=work(accident=accident))
    study = erpe.load_study(NAME, store.root)
    with pytest.raises(StudyError, match="relu_rope has no complete trial yet"):
        study.best("relu_rope")
    with pytest.raises(StudyError, match="relu_rope has no confirmed run yet"):
        study.model("relu_rope")
    failed = study.trials.loc[study.trials["arm"] == "relu_rope", "uid"].iloc[0]
    with pytest.raises(StudyError, match=f"trial {failed} is not complete"):
        study.model(failed)


def test_importing_erpe_stays_light():
    code = "import sys, erpe; print(sorted({'torch', 'pandas', 'optuna', 'mlflow', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    with pytest.raises(AttributeError, match="no attribute 'load_studies'"):
        erpe.load_studies  # noqa: B018


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom_and_is_kept_without_outputs(digits_study, monkeypatch):
    import nbclient
    import nbformat

    path = STUDIES / "explore.ipynb"
    book = nbformat.read(path, 4)
    assert all(not cell.outputs and cell.execution_count is None for cell in book.cells if cell.cell_type == "code")
    monkeypatch.setenv("ERPE_STORE", str(digits_study.root))
    monkeypatch.setenv("ERPE_STUDY", NAME)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(STUDIES.parent), os.environ.get("PYTHONPATH", "")]))
    nbclient.NotebookClient(book, timeout=300, resources={"metadata": {"path": str(STUDIES)}}).execute()
    outputs = [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 4
    assert not [output for output in outputs if output.get("name") == "stderr"], "no warning on the way"
    assert "<study digits-nine" in outputs[0]["data"]["text/plain"]
    assert not list(Path(STUDIES).glob(".ipynb_checkpoints"))


def test_a_model_predicts_pictures_as_they_are_and_says_what_it_takes(study):
    from erpe.training.data import load_test, normalise

    test = load_test("digits")
    model = study.model("relu_rope")
    found = model.predict(test.pixels[:5].numpy())
    assert found.dtype == np.float32 and found.shape == (5, 10) and np.allclose(found.sum(1), 1, atol=1e-5)
    with torch.no_grad():
        logits = model(normalise(test.pixels[:5], "digits"))
    assert np.array_equal(found, logits.softmax(-1).numpy()) and np.array_equal(found, model.predict(test.pixels[:5]))
    for wrong in (test.pixels[:5].float(), test.pixels[0], np.zeros((2, 3, 8, 8), np.uint8), ["a"], [[1, 2]]):
        with pytest.raises(ShapeError, match=r"^images: use uint8 of shape \(B, 1, 8, 8\) instead of .*$"):
            model.predict(wrong)
