"""Outcomes: what is read of a study is what was measured, from a store and from MLflow alike."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import zipfile

import numpy as np
import pandas as pd
import pytest
import torch

import erpe
from erpe.cli import app
from erpe.cli.report import outcomes_of
from erpe.errors import StoreError, StudyError, TrackingError
from erpe.io import MOST_BYTES, read_arrays
from erpe.report.comparison import compare
from erpe.report.outcomes import Rows, describe
from erpe.report.sources.store import load
from erpe.store import Store
from erpe.study.reading import read_studies


@pytest.fixture(scope="module")
def synced(digits_study, empty_database, tmp_path_factory):
    """A copy of the study's store whose MLflow has everything."""
    from erpe.tracking.tracker import sync

    root = tmp_path_factory.mktemp("synced") / "store"
    shutil.copytree(digits_study.root, root)
    shutil.copy(empty_database, root / "mlflow.db")
    store = Store.open(root)
    assert set(sync(store).values()) == {0}
    return store


def test_a_row_is_what_the_run_wrote(digits_study):
    outcomes = load(digits_study)
    assert list(outcomes.arms["arm"]) == ["softmax", "relu", "relu_rope"] and outcomes.arms["finished"].all()
    for study in read_studies(digits_study):
        if study.part_of.phase != "confirm":
            continue
        for trial in study.trials:
            folder = digits_study.trial_folder(study.name, trial.number, trial.config.seed)
            row = outcomes.runs.set_index("uid").loc[trial.uid]
            written = json.loads((folder / "test.json").read_text())
            assert {name: row[name] for name in written} == pytest.approx(written)
            assert (outcomes.predictions[trial.uid] == outcomes.labels["digits"]).mean() == row["test/accuracy"]
            assert row["seed"] == trial.config.seed and row["train/images"] == 300


def test_an_arm_says_what_it_searches_alone_whether_the_default_won_and_how_often_the_test_set_was_opened(digits_study):
    outcomes = load(digits_study)
    arms = outcomes.arms.set_index("arm")
    assert arms["openings"].tolist() == arms["seeds"].tolist() == [2] * 3 and arms["abandoned"].tolist() == [0] * 3
    assert arms["own_axes"].tolist() == [
        "none",
        "model.relu_projection, model.features, model.normalize_qk",
        "model.relu_projection, model.features, model.normalize_qk, model.rotary_placement, model.rope",
    ]
    assert "digits-nine: the test set was opened 6 times" in outcomes.notes
    assert any("the default configuration won the search in" in note for note in outcomes.notes)
    for arm, trials in outcomes.trials.groupby("arm"):
        best = trials.sort_values("number").loc[lambda own: own["value"] == own["value"].max(), "number"].iloc[0]
        assert arms.loc[arm, "default_won"] == (best == 0)


def test_a_confirmed_run_trains_on_everything_and_a_search_never_sees_what_it_is_judged_by(digits_study):
    for study in read_studies(digits_study):
        for trial in study.trials:
            held_out = trial.config.data.validation
            assert (held_out == 0) == (study.part_of.phase == "confirm")
            folder = digits_study.trial_folder(study.name, trial.number, trial.config.seed)
            assert (folder / "test.json").exists() == (study.part_of.phase == "confirm")


def test_seconds_of_training_beside_other_trials_are_no_time_of_a_run(digits_study, tmp_path):
    """A study that was interrupted before its timing phase; the store has the seconds of its own training still."""
    store = Store.open(shutil.copytree(digits_study.root, tmp_path / "store"))
    with contextlib.closing(sqlite3.connect(store.root / "optuna.db")) as database, database:
        database.execute("DELETE FROM study_user_attributes WHERE key LIKE 'erpe.final.%'")
    whole, cut = load(digits_study), load(store)
    assert whole.runs["time/train_seconds_per_epoch"].notna().all()
    assert cut.runs["test/accuracy"].tolist() == whole.runs["test/accuracy"].tolist()
    assert not [name for name in cut.runs if name.startswith("time/")]
    assert any("times were not measured for 6 of 6 runs" in note for note in compare(cut).notes)


def test_curves_have_every_epoch(digits_study):
    epochs = load(digits_study).epochs
    assert (epochs.groupby("uid")["epoch"].apply(list).map(tuple) == (1, 2)).all()
    search, confirm = (epochs[epochs["phase"] == phase] for phase in ("search", "confirm"))
    assert search["val/accuracy"].notna().all() and search["train/loss"].isna().all()
    assert confirm["train/loss"].gt(0).all() and confirm["val/accuracy"].isna().all()


@pytest.mark.slow
def test_a_tracking_server_tells_the_same_as_the_store(synced):
    from erpe.report.sources.mlflow import read

    here, there = load(synced), read(synced.tracking_uri)
    for name in ("arms", "runs", "trials", "epochs"):
        ours, theirs = getattr(here, name), getattr(there, name)
        shared = [column for column in ours if column in theirs and column != "seconds"]
        assert set(ours) - set(theirs) <= {"seconds"}, name
        order = [column for column in ("uid", "epoch", "arm") if column in shared]
        first, second = (frame[shared].sort_values(order).reset_index(drop=True) for frame in (ours, theirs))
        pd.testing.assert_frame_equal(first, second, check_dtype=False, obj=name)
    assert here.made_with == there.made_with and here.notes == there.notes
    assert here.margins == there.margins == {"digits-nine": 0.4}
    assert {uid: list(found) for uid, found in here.predictions.items()} == {
        uid: list(found) for uid, found in there.predictions.items()
    }


@pytest.mark.slow
def test_a_tracking_server_gives_the_same_configurations_and_models(synced):
    here = erpe.load_study("digits-nine", synced.root)
    there = erpe.load_study("digits-nine", server=synced.tracking_uri)
    for arm in ("softmax", "relu", "relu_rope"):
        assert there.best(arm) == here.best(arm)
        ours, theirs = here.model(arm).state_dict(), there.model(arm).state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with pytest.raises(StudyError, match="did you mean relu"):
        there.model("rel")


FETCHED = """
import sys, tempfile
from pathlib import Path
import erpe
study = erpe.load_study("digits-nine", server=sys.argv[1])
for ask in (study.best, study.model):
    ask("relu")
    print("weights" if list(Path(tempfile.gettempdir()).rglob("model.safetensors")) else "no weights")
"""


@pytest.mark.slow
def test_a_configuration_from_a_server_needs_no_weights_and_what_was_fetched_goes_with_the_process(synced, tmp_path):
    words = [sys.executable, "-c", FETCHED, synced.tracking_uri]
    done = subprocess.run(words, env=os.environ | {"TMPDIR": str(tmp_path)}, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("no weights\nweights\n", 0), done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_unknown_studies_and_servers_are_one_line(synced):
    from erpe.report.sources.mlflow import read

    with pytest.raises(StudyError, match="did you mean digits-nine"):
        read(synced.tracking_uri, ["digits-nin"])
    with pytest.raises(StudyError, match="did you mean digits-nine"):
        load(synced, ["digits-nin"])
    with pytest.raises(TrackingError, match="no answer") as error:
        read("http://127.0.0.1:1")
    assert "sync" not in str(error.value) and "spool" not in str(error.value)
    with pytest.raises(StudyError, match="not on this server") as error:
        read(synced.tracking_uri, ["Defaul"])  # MLflow's own experiment is no study
    assert "did you mean" not in str(error.value) and "digits-nine" in str(error.value)


@pytest.mark.slow
def test_the_commands_end_with_tables_figures_and_a_page_that_is_in_mlflow(synced, monkeypatch, capsys, tmp_path):
    from erpe.report.page import publish
    from erpe.study.plan import Plan
    from erpe.tracking.connection import connect

    def erpe(*words):
        monkeypatch.setattr(sys, "argv", ["erpe", *words, "--store", str(synced.root)])
        app.main() if words[0] != "compare" else _quietly(app.main)
        return capsys.readouterr().out

    monkeypatch.chdir(tmp_path)
    assert "relu_rope" in erpe("compare") and "undecided" in erpe("compare", "--format", "markdown")
    erpe("compare", "--format", "parquet", "--output", "table.parquet")
    assert set(pd.read_parquet("table.parquet")["arm"].dropna()) >= {"softmax", "relu", "relu_rope"}
    plan = Plan(**read_studies(synced)[0].part_of.plan)
    outcomes = load(synced)
    page, lag = publish(plan, synced, outcomes, compare(outcomes))
    assert lag == 0 and page.read_text().startswith("<!DOCTYPE html>")
    client = connect(synced.tracking_uri)
    (run,) = client.search_runs([client.get_experiment_by_name(plan.name).experiment_id], "tags.phase = 'report'")
    assert "report.html" in [file.path for file in client.list_artifacts(run.info.run_id)]


def _quietly(main):
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code


def test_a_damaged_file_is_one_note(digits_study, tmp_path):
    store = Store.open(shutil.copytree(digits_study.root, tmp_path / "store"))
    uid, folder = next(iter(load(store).folders.items()))
    (folder / "predictions.npz").write_bytes(b"torn")
    assert len([note for note in compare(load(store)).notes if "predictions" in note]) == 1
    assert len([note for note in compare(load(store)).notes if uid in note]) == 1


def test_what_made_a_study_counts_one_and_many():
    assert "2 cores, 1 thread a trial" in describe({"cores": "2", "threads": "1"})
    assert "1 core, 4 threads a trial" in describe({"cores": "1", "threads": "4"})


def test_a_study_to_compare_with_need_not_be_named(digits_study):
    assert list(outcomes_of(["digits-nine"], "digits-nine", digits_study.root, None).runs["study"].unique()) == [
        "digits-nine"
    ]
    with pytest.raises(StudyError, match="study other: not one of `erpe study run`; use digits-nine"):
        outcomes_of(["digits-nine"], "other", digits_study.root, None)


def test_an_array_from_a_store_cannot_be_a_link_a_pickle_or_a_bomb(tmp_path):
    good, evil, link, bomb = (tmp_path / f"{name}.npz" for name in ("good", "evil", "link", "bomb"))
    np.savez(good, predicted=np.arange(3))
    assert list(read_arrays(good)["predicted"]) == [0, 1, 2]
    np.savez(evil, predicted=np.array([{"a": 1}], dtype=object))
    link.symlink_to(good)
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("predicted.npy", bytes(MOST_BYTES + 1))
    for path in (evil, link, bomb, tmp_path / "missing.npz"):
        with pytest.raises(StoreError) as error:
            read_arrays(path)
        assert "\n" not in str(error.value) and path.name in str(error.value)


def test_before_the_first_confirmed_run_there_is_no_accuracy_and_no_error():
    assert Rows().outcomes().runs.groupby("arm")["test/accuracy"].mean().empty
