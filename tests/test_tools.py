"""The small tools: `erpe diff`, `erpe logs`, `erpe plot`, and what the shell completes."""

from __future__ import annotations

import json
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
from test_run_study import play
from toys import number_of, work
from typer.testing import CliRunner

from erpe.cli.app import app
from erpe.errors import ErpeError
from erpe.search.tune import tune
from erpe.store import Store
from erpe.study.spec import define
from erpe.tracking.tracker import Tracker


def _talks(folder, epoch):
    if epoch == 1:
        print(f"hello from {number_of(folder)}")
        print("at postgresql://me:hunter2hunter2@host/db", file=sys.stderr)
    if number_of(folder) == 1:
        warnings.warn("a library is unhappy", UserWarning, stacklevel=1)
        raise RuntimeError("out of luck")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store with a study of a file, `digits-nine`, and one search, `digits-relu`, whose trial 1 fails."""
    store = Store.open(tmp_path_factory.mktemp("tools") / "runs")
    play(store)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("default")
        patch.setattr("erpe.tracking.tracker.Tracker", partial(Tracker, send=False))
        spec = define("relu", "digits", epochs=2, sampler="random", pruner="none")
        tune(spec, store, trials=3, executor="inline", work=work(accident=_talks))
    return store


def erpe(*words):
    done = CliRunner().invoke(app, [str(word) for word in words])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.output


@pytest.mark.slow
def test_each_trial_has_a_log_of_its_epochs_of_what_it_printed_and_of_why_it_failed(store):
    good, bad = (erpe("logs", f"digits-relu/{number}", "--store", store.root) for number in (0, 1))
    lines = [line.split("  ", 1)[1] for line in good.splitlines()]
    assert lines[0].startswith("handed to a worker; seed ") and lines[-1].startswith("complete: params 7")
    assert "hello from 0" in lines and "hello from 1" not in good
    assert [line.split(":")[0] for line in lines if line.startswith("epoch")] == ["epoch 1", "epoch 2"]
    assert bad.count("RuntimeError: out of luck") == 3, "three crashes"
    assert "hunter2" not in good + bad and "me:" not in good
    with pytest.raises(ErpeError, match="digits-relu/7: no such trial; `erpe status digits-relu`"):
        erpe("logs", "digits-relu/7", "--store", store.root)


def test_a_log_is_written_through_no_link_and_costs_no_trial(tmp_path):
    from erpe.execution.trial_log import write_log

    (tmp_path / "elsewhere").write_text("mine")
    (tmp_path / "trial").mkdir()
    (tmp_path / "trial/log.txt").symlink_to(tmp_path / "elsewhere")
    write_log(tmp_path / "trial", "theirs")
    assert (tmp_path / "elsewhere").read_text() == "mine"


def test_what_two_threads_print_is_kept_apart(capsys):
    from threading import Thread

    from erpe.execution.trial_log import captured

    with captured() as kept:
        other = Thread(target=print, args=("theirs",))
        other.start()
        other.join()
        print("mine")
    assert kept.getvalue() == "mine\n" and capsys.readouterr().out == "theirs\nmine\n"


def test_two_trials_differ_in_what_was_drawn_and_measured_and_a_trial_from_itself_in_nothing(store):
    rows = json.loads(erpe("diff", "digits-relu/0", "digits-relu/2", "--store", store.root, "--json"))
    names = {row["name"]: row for row in rows}
    assert {"seed", "train.lr", "val/accuracy"} <= names.keys() and "train.epochs" not in names
    assert names["train.lr"]["part"] == "settings" and names["val/accuracy"]["part"] == "measures"
    assert not [row for row in rows if row["part"] == "versions"], "one erpe made both"
    assert erpe("diff", "digits-relu/0", "digits-relu/0", "--store", store.root) == "no difference\n"
    assert "out of luck" not in erpe("diff", "digits-relu/0", "digits-relu/1", "--store", store.root)
    seeds = erpe("diff", "digits-nine/relu/seed-0", "digits-nine/relu/seed-1", "--store", store.root)
    assert "seed" in seeds and "train.lr" not in seeds
    rows = json.loads(erpe("diff", "digits-nine/relu/0", "digits-nine/relu/seed-0", "--store", store.root, "--json"))
    kinds = {row["name"]: row for row in rows}
    assert kinds["train/loss"]["first"] is None and "value" not in kinds, "what was measured is named"


def test_a_study_is_no_trial(store):
    with pytest.raises(ErpeError, match="digits-nine is a study, digits-relu/0 a trial; use two trials"):
        erpe("diff", "digits-nine", "digits-relu/0", "--store", store.root)
    rows = json.loads(erpe("diff", "digits-nine", "digits-relu", "--store", store.root, "--json"))
    counts = {row["name"]: (row["first"], row["second"]) for row in rows if row["name"].endswith("complete")}
    assert counts == {"trials complete": (6, 2), "seeds complete": (6, None)}, "a confirmed run is no trial"


def test_one_figure_is_drawn_of_a_study_and_of_a_search(store, tmp_path):
    for study, what in [("digits-nine", "search_effort"), ("digits-relu", "history")]:
        path = tmp_path / f"{what}.svg"
        assert "written" in erpe("plot", study, what, "-o", path, "--store", store.root)
        assert path.read_text().startswith("<?xml")
    for words, said in [
        (("digits-nine", "acuracy"), "no figure 'acuracy'; did you mean accuracy"),
        (("digits-relu", "accuracy"), "no figure 'accuracy'"),
        (("digits-relu", "history", "-o", "x.doc"), "use a name that ends in .pdf, .svg or .png instead"),
    ]:
        with pytest.raises(ErpeError, match=said):
            erpe("plot", *words, "--store", store.root)


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("erpe tune --variant softmax_", ["softmax_general", "softmax_circulant", "softmax_rope"]),
        ("erpe tune --plugin studies/plugins/alibi.py --variant relu_a", ["relu_alibi"]),
        ("erpe tune --plugin studies/plugins/mala.py --plugin nowhere --variant mala_ro", ["mala_rope"]),
        ("erpe tune --plugin studies/plugins/mal", ["studies/plugins/mala.py"]),
        ("erpe tune --dataset cif", ["cifar10", "cifar100"]),
        ("erpe plot --store STORE digits-", ["digits-nine", "digits-relu"]),
        ("erpe plot --store STORE digits-nine gap", ["gap_closed"]),
        ("erpe plot --store STORE digits-relu fr", ["front", "fronts"]),
        ("erpe study run --store STORE digits-n", ["digits-nine"]),
        ("erpe study run STORE/optuna.d", ["STORE/optuna.db"]),
        ("erpe logs --store STORE digits-relu/", ["digits-relu/0", "digits-relu/1", "digits-relu/2"]),
        ("erpe diff --store nowhere digits-relu/0 d", []),
    ],
)
def test_the_shell_completes_values(store, line, offered, monkeypatch):
    line = line.replace("STORE", str(store.root))
    monkeypatch.chdir(Path(__file__).parent.parent)
    words = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1)}
    done = CliRunner().invoke(app, prog_name="erpe", env=words | {"_ERPE_COMPLETE": "complete_bash"})
    assert sorted(done.output.split()) == sorted(each.replace("STORE", str(store.root)) for each in offered)
