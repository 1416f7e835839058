"""A whole study: equal budgets, arms in turn, confirmed with fresh seeds, tested once, resumed after anything."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import pytest
from toys import clock, work
from trials import TINY

from erpe.cli.status import result_lines, statuses
from erpe.cli.status import status_table as study_table
from erpe.cli.trials import status_rows, status_table
from erpe.errors import StudyError
from erpe.execution.callbacks import Progress
from erpe.execution.fair_share import Budget
from erpe.report.comparison import compare
from erpe.report.sources.store import load
from erpe.search.run_study import run
from erpe.store import Store
from erpe.study.plan_file import load_plan
from erpe.study.reading import read_studies
from erpe.study.spec import StudySpec
from erpe.tracking.image import desired

FILE = Path(__file__).parent.parent / "studies/digits_nine.toml"
ARMS = ("softmax", "relu", "relu_rope")
CHOSEN = f"variants={json.dumps(ARMS)}"
SMALL = ["search.trials=2", "search.epochs=2", "confirm.seeds=2", "search.pruner=none", CHOSEN]


@pytest.fixture
def store(tmp_path):
    return Store.open(tmp_path / "store")


def play(store, *changes, **options):
    """A study of toys, in this process, without MLflow."""
    return run(
        load_plan(FILE, [*SMALL, *changes]), store, executor="inline", offline=True, **({"work": work()} | options)
    )


@cache
def _played(*changes):
    folder = tempfile.TemporaryDirectory(prefix="erpe-played-")
    atexit.register(folder.cleanup)
    play(Store.open(Path(folder.name)), *changes)
    return folder


def played(store, *changes):
    """Leave a new store as `play` would, in less time: each is played once, and then copied."""
    shutil.copytree(_played(*changes).name, store.root, dirs_exist_ok=True)


def calls(store, what):
    """(arm's folder, times) for each trial whose toy was asked for this."""
    logs = {path.parent: path.read_text().split("\n") for path in store.checkpoints.glob("*/*/log")}
    return {folder: log.count(what) for folder, log in logs.items() if what in log}


def is_confirmation(folder):
    return ".confirm-" in folder.parent.name


def test_every_arm_gets_its_trials_and_its_seeds_and_each_confirmed_run_is_tested_and_timed_once(store):
    result = play(store)
    assert result.confirmed == dict.fromkeys(ARMS, 2) and not result.failed and not result.interrupted
    assert len(calls(store, "start")) == 3 * (2 + 2)
    assert set(calls(store, "test").values()) == {1} and len(calls(store, "test")) == 6
    assert all(is_confirmation(folder) for folder in calls(store, "test")), "the search never opens the test split"
    assert len(calls(store, "time")) == 6


@pytest.mark.slow
def test_the_arms_take_turns(store):
    order = []
    plain = work()

    def start(config, folder):
        order.append((config.model.variant, "confirm" if is_confirmation(folder) else "search"))
        return (plain.confirm if is_confirmation(folder) else plain.start)(config, folder)

    play(store, work=plain._replace(start=start, confirm=start))
    for turn in range(4):
        phase = "search" if turn < 2 else "confirm"
        assert order[3 * turn : 3 * turn + 3] == [(variant, phase) for variant in ARMS]


def test_equal_seeds_of_all_arms_are_pairs(store):
    played(store)
    runs = load(store).runs
    assert runs.groupby("arm")["seed"].apply(tuple).nunique() == 1
    assert not set(runs["seed"]) & set(load(store).trials["seed"])


def test_the_same_command_again_changes_nothing(store):
    played(store)
    before = shown(store), load(store).runs
    result = play(store, work=work()._replace(start=pytest.fail, confirm=pytest.fail, time=pytest.fail))
    assert result.confirmed == dict.fromkeys(ARMS, 2)
    assert shown(store) == before[0]
    assert load(store).runs.equals(before[1])


@pytest.mark.slow
def test_confirmations_are_found_whatever_digits_another_version_named_them_by(store, monkeypatch):
    played(store)
    names = [study.name for study in read_studies(store)]
    monkeypatch.setattr(StudySpec, "identity", "0" * 12)
    play(store, work=work()._replace(start=pytest.fail, confirm=pytest.fail, time=pytest.fail))
    assert [study.name for study in read_studies(store)] == names


@pytest.mark.slow
def test_interrupted_anywhere_the_same_command_finishes_the_same_study(store, tmp_path):
    whole = Store.open(tmp_path / "whole")
    played(whole)
    seen = []

    def killed(config, folder):
        seen.append(folder)
        if len(seen) in (2, 5, 7, 9):
            raise KeyboardInterrupt
        return (work().confirm if is_confirmation(folder) else work().start)(config, folder)

    for _ in range(4):
        with pytest.raises(KeyboardInterrupt):
            play(store, work=work()._replace(start=killed, confirm=killed))
    play(store)
    drop = ["uid"]
    assert load(store).runs.drop(columns=drop).equals(load(whole).runs.drop(columns=drop))
    assert set(calls(store, "test").values()) == {1}


@pytest.mark.slow
def test_more_seeds_and_more_trials_continue_and_a_new_best_is_confirmed_anew(store):
    played(store)
    play(store, "confirm.seeds=3")
    assert len(calls(store, "test")) == 9
    play(store, "search.trials=5", "confirm.seeds=3", replace=True)
    outcomes = load(store)
    assert (outcomes.arms["trials"] == 5).all() and (outcomes.arms["seeds"] == 3).all()
    best = outcomes.trials.loc[outcomes.trials.groupby("arm")["value"].idxmax()].set_index("arm")["train.lr"]
    for study in read_studies(store):
        if study.part_of.phase == "confirm" and study.trials[0].config.train.lr == best[study.part_of.arm]:
            assert study.counts["COMPLETE"] == 3


@pytest.mark.slow
def test_a_file_that_would_replace_what_the_test_set_said_is_refused_unless_told(store):
    assert play(store).openings == (6, 0)
    before = load(store)
    for changes, said in (
        (["confirm.epochs=3"], r"confirm\.epochs: 2, now 3: replaces results of 6 runs .* use --replace"),
        (["search.trials=5"], r"search\.trials: 2, now 5: .*--set name=ANOTHER"),
    ):
        with pytest.raises(StudyError, match=said):
            play(store, *changes)
    assert load(store).arms.equals(before.arms) and load(store).runs.equals(before.runs)
    assert play(store, "confirm.seeds=3").openings == (9, 0), "more seeds replace nothing, and are counted"
    warnings = []
    progress = type("Listening", (Progress,), {"on_warning": lambda _, text: warnings.append(text)})()
    replaced = play(store, "confirm.epochs=3", replace=True, progress=progress)
    assert warnings == ["confirm.epochs: 2, now 3: replaces results of 9 runs that met the test set; they stay counted"]
    assert replaced.confirmed == dict.fromkeys(ARMS, 2) and replaced.openings == (15, 9)
    assert play(store, "confirm.epochs=3").openings == (15, 9), "once told, the same file goes on"
    outcomes = load(store)
    assert set(outcomes.epochs.loc[outcomes.epochs["phase"] == "confirm", "epoch"]) == {1, 2, 3}
    assert outcomes.arms["openings"].tolist() == [5] * 3 and outcomes.arms["abandoned"].tolist() == [3] * 3
    (found,) = statuses(store)
    told = "the test set was opened 15 times, 9 of them for results that were replaced"
    assert study_table(found).caption == found.openings.told() == told
    assert told in "\n".join(result_lines(replaced, store.root))


def test_a_default_that_is_written_out_replaces_nothing(store):
    played(store)
    assert play(store, "confirm.epochs=2", 'search.budget="trials"').openings == (6, 0)


def test_openings_of_an_arm_that_leaves_the_study_stay_counted(store):
    played(store)
    assert play(store, 'variants=["softmax"]').openings == (6, 4)


def test_another_space_is_refused_with_its_difference(store):
    played(store)
    with pytest.raises(StudyError, match=r"digits-nine/softmax has other settings \(.*weight_decay.*--set name="):
        play(store, 'space."train.weight_decay"=0.1')


@pytest.mark.slow
def test_an_arm_that_never_works_is_told_and_the_others_are_confirmed(store):
    def accident(folder, epoch):
        from erpe.errors import TrialError

        if "relu_rope" in folder.parent.name:
            raise TrialError("the loss of step 7 is not finite")

    result = play(store, work=work(accident=accident))
    assert result.failed == {"relu_rope": "the loss of step 7 is not finite"}
    assert set(result.confirmed) == set(ARMS) - {"relu_rope"}
    found = load(store).arms.set_index("arm")["finished"]
    assert found["relu"] and not found["relu_rope"]


@pytest.mark.slow
@pytest.mark.parametrize("budget", ["epochs", "flops"])
def test_a_budget_of_epochs_or_flops_is_spent_by_every_arm_to_within_a_trial(store, budget):
    plan = load_plan(FILE, [*SMALL, "search.trials=4", "search.pruner=median", f"search.budget={budget}"])
    run(plan, store, executor="inline", offline=True, work=work())
    for study in read_studies(store):
        if study.part_of.phase == "search":
            assert study.counts["RUNNING"] == 0
            spent = [len(trial.epochs) for trial in study.trials]
            if budget == "epochs":
                assert 8 <= sum(spent) < 8 + 2
            else:
                from erpe.search.run_study import flops_per_image

                spent = [flops_per_image(trial, len(trial.epochs)) for trial in study.trials]
                assert plan.flops_per_image() <= sum(spent) < plan.flops_per_image() + max(spent)


def test_a_failing_trial_uses_some_budget_so_that_a_search_ends():
    class Failed:
        state, epochs = "FAIL", {}

    class Study:
        trials = [Failed()] * 8

    assert Budget(4, 8.0).share(Study) == 1


def test_the_status_of_a_confirmation_shows_test_accuracies_and_no_best(store, capsys):
    played(store)
    confirmed = [row for row in status_rows(store) if row["phase"] == "confirm"]
    assert confirmed and all(row["best"] is row["value"] is row["test"] is None for row in confirmed)
    assert {trial["value"] for row in confirmed for trial in row["trials"]} == {0.9}
    status_table(confirmed)
    said = capsys.readouterr().out
    assert "test accuracy" in said and "90.00 %" in said and "best" not in said


@pytest.mark.slow
def test_status_tells_of_every_arm_and_of_the_time_left(store):
    played(store, "confirm.seeds=1")
    (found,) = statuses(store)
    assert found.done and [arm.arm for arm in found.arms] == list(ARMS)
    play_more = load_plan(FILE, [*SMALL, "confirm.seeds=3"])
    from erpe.cli.status import status

    more = status(play_more, read_studies(store))
    assert not more.done and all(arm.confirmed == 1 and arm.seeds == 3 for arm in more.arms)
    assert more.seconds_left is not None and more.seconds_left > 0


@pytest.mark.slow
def test_a_study_is_done_when_its_times_were_taken(store, monkeypatch):
    monkeypatch.setattr("erpe.search.run_study._Campaign._time", lambda *_: None)  # stopped just before
    play(store)
    (found,) = statuses(store)
    assert not found.done and found.stage == "all confirmed, times not taken yet"
    monkeypatch.undo()
    play(store)
    assert statuses(store)[0].done


def test_a_study_whose_models_are_gone_in_part_is_done_with_the_times_that_can_be_taken(store):
    said = Progress()
    warnings = []
    said.on_warning = warnings.append
    play(store, work=work()._replace(time=lambda folders: [{}, *clock(folders[1:])]), progress=said)
    assert warnings == ["1 of 6 confirmed runs have no times: their models are gone"]
    assert statuses(store)[0].done
    assert any("not measured for 1 of 6 runs" in note for note in compare(load(store)).notes)
    play(store, work=work()._replace(start=pytest.fail, confirm=pytest.fail, time=pytest.fail))


def shown(store):
    """uid -> what MLflow should show."""
    members = [part for part in read_studies(store) if part.experiment == "digits-nine"]
    return {image.uid: image for image in desired(members, store, running=False)}


def test_all_trials_are_shown_with_the_same_keys(store):
    played(store)
    runs = [image for image in shown(store).values() if image.is_trial]
    assert len(runs) == 12 and len({frozenset(run.tags) for run in runs}) == 1, "no run lacks a tag"
    parents = {image.uid for image in shown(store).values() if not image.is_trial}
    assert len(parents) == 6 and {run.parent for run in runs} == parents
    assert sum("time/inference_ms_per_image" in run.points for run in runs) == 6


def test_the_parent_of_a_confirmation_has_means_over_seeds_and_how_many_they_are(store):
    played(store)
    images = shown(store)
    confirmed = [study for study in read_studies(store) if study.phase == "confirm"]
    assert len(confirmed) == 3
    for study in confirmed:
        own = [trial.verdict.metrics | study.finals[trial.number] for trial in study.trials]
        told = {name: points[0].value for name, points in images[study.about.uid].points.items()}
        assert told["seeds"] == len(own) == 2
        for name in ("test/accuracy", "time/inference_ms_per_image"):
            assert told[name] == pytest.approx((own[0][name] + own[1][name]) / 2)


@pytest.mark.slow
def test_runs_of_all_twelve_variants_have_the_same_parameters_and_tags(store):
    play(store, 'variants="twelve"', "search.trials=1", "search.epochs=1", "confirm.seeds=1")
    runs = [image for image in shown(store).values() if image.is_trial]
    assert len({run.tags["variant"] for run in runs}) == 12
    assert len({frozenset(run.params) for run in runs}) == 1
    assert len({frozenset(run.tags) for run in runs}) == 1


REAL = [f"settings.{json.dumps(name)}={json.dumps(value)}" for name, value in TINY.items() if name.startswith("data.t")]
REAL += ['space."model.width"=16', 'space."model.depth"=2', 'space."model.heads"=2', 'space."train.batch"=64']


@pytest.mark.slow
def test_torch_alone_runs_a_whole_study_without_ray_and_mlflow(tmp_path):
    """On a machine where neither can be imported."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('ray', 'mlflow', 'plotly'):\n"
        "            raise ModuleNotFoundError(f'{name} is not there')\n"
        "sys.meta_path.insert(0, Absent())\n"
    )
    changes = [
        "search.trials=1",
        "search.epochs=1",
        "confirm.seeds=1",
        'variants=["softmax", "relu", "relu_general"]',
        *REAL,
    ]
    command = [
        sys.executable,
        "-m",
        "erpe",
        "study",
        "run",
        str(FILE),
        "--executor",
        "inline",
        "--offline",
        "--store",
        "store",
    ]
    command += [word for change in changes for word in ("--set", change)]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "test accuracy" in done.stdout and done.stdout.rindex("the answer") > done.stdout.rindex("done in")
    outcomes = load(Store.open(tmp_path / "store"))
    assert set(outcomes.predictions) == set(outcomes.runs["uid"])
    for uid, run_ in outcomes.runs.set_index("uid").iterrows():
        right = outcomes.predictions[uid] == outcomes.labels["digits"]
        assert right.mean() == pytest.approx(run_["test/accuracy"]) and len(right) == 360
        assert run_["time/inference_ms_per_image"] > 0 and run_["time/train_seconds_per_epoch"] > 0
    assert outcomes.runs.notna().all(axis=None), "every measure of every run"
