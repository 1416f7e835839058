"""The command line: one line for a mistake, an exit code for a script, nothing heavy for --help."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from erpe.cli import app
from erpe.cli.options import parse_settings
from erpe.errors import ConfigError
from erpe.inference import predict
from erpe.store import Store
from erpe.text import changes_wait, counted, first_line
from erpe.training.checkpoint import load_model
from erpe.training.data import normalise
from erpe.training.devices import pick_device
from erpe.training.download import UNPACKED
from erpe.training.precision import explain_auto
from erpe.variants import VARIANTS

NINE = str(Path(__file__).parent.parent / "studies/digits_nine.toml")
TINY = ("--epochs", "2", "--set", "model.width=32", "--set", "model.depth=1", "--set", "data.train_limit=100")


@pytest.fixture
def erpe(monkeypatch, capsys, tmp_path):
    """Run a command line in this process, in an empty folder -> (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["erpe", *words])
        try:
            app.main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory, empty_database):
    """A store with one trained model, made by the command itself."""
    store = Store.open(tmp_path_factory.mktemp("trained") / "runs").root
    shutil.copy(empty_database, store / "mlflow.db")
    command = [sys.executable, "-m", "erpe", "train", "-v", "relu", "-d", "digits", "--store", str(store), "--json"]
    done = subprocess.run([*command, *TINY], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return store, json.loads(done.stdout)


MISTAKES = {
    "variant": (("tune", "-v", "relu_rotary", "-d", "digits"), "did you mean relu_rope?"),
    "data set": (("tune", "-v", "relu", "-d", "minst"), "did you mean mnist?"),
    "setting": (("train", "-v", "relu", "-d", "digits", "--set", "train.lrr=1"), "did you mean train.lr?"),
    "value": (("train", "-v", "relu", "-d", "digits", "--set", "model.pooling=max"), "pooling"),
    "negative": (("train", "-v", "relu", "-d", "digits", "--set", "train.lr=-1"), "greater than 0"),
    "nan": (("train", "-v", "relu", "-d", "digits", "--set", "train.lr=nan"), "finite"),
    "infinite": (("train", "-v", "relu", "-d", "digits", "--set", "train.weight_decay=inf"), "finite"),
    "no equals sign": (("train", "-v", "relu", "-d", "digits", "--set", "train.lr"), "NAME=VALUE"),
    "epochs": (("tune", "-v", "relu", "-d", "digits", "--epochs", "0"), "epochs"),
    "trials": (("tune", "-v", "relu", "-d", "digits", "--trials", "0"), "trials"),
    "sampler": (("tune", "-v", "relu", "-d", "digits", "--sampler", "cma"), "use tpe, gp, nsgaii or random instead"),
    "pruner": (("tune", "-v", "relu", "-d", "digits", "--pruner", "a"), "use auto, asha, hyperband, median or none"),
    "executor": (("tune", "-v", "relu", "-d", "digits", "--executor", "spark"), "use ray or inline instead"),
    "two epochs": (("tune", "-v", "relu", "-d", "digits", "--epochs", "1", "--set", "train.epochs=3"), "by --epochs"),
    "two variants": (("train", "-v", "relu", "-d", "digits", "--set", "model.variant=softmax"), "by --variant"),
    "two values": (
        ("train", "-v", "relu", "-d", "digits", "--set", "train.ema=0.1", "--set", "train.ema=0.2"),
        "0.1 and",
    ),
    "two budgets": (("study", "run", NINE, "--budget", "flops", "--set", "search.budget=epochs"), "search.budget: "),
    "patch": (("train", "-v", "relu", "-d", "digits", "--set", "model.patch=3"), "patch 3 does not divide"),
    "heads": (("train", "-v", "relu", "-d", "digits", "--set", "model.heads=5"), "heads 5 does not divide width 64"),
    "rope head": (("train", "-v", "relu_rope", "-d", "digits", "--set", "model.heads=32"), "4 to divide the head size"),
    "circulant": (("train", "-v", "relu_circulant", "-d", "digits", "--set", "model.heads=32"), "blocks of 3"),
    "placement": (("train", "-v", "softmax_rope", "-d", "digits", "--set", "model.rotary_placement=post"), "use pre"),
    "space file": (("tune", "-v", "relu", "-d", "digits", "--space", "none.toml"), "none.toml: cannot be read"),
    "device": (("train", "-v", "relu", "-d", "digits", "--device", "gpu"), "use auto, cpu, cuda or mps instead"),
    "gpu": (("tune", "-v", "relu", "-d", "digits", "--gpus-per-trial", "1"), "use 0 instead"),
    "study name": (("tune", "-v", "relu", "-d", "digits", "--name", "../x"), "letters, digits"),
    "empty store": (("status",), "erpe tune"),
    "no such run": (("predict", "nothing", "x.png"), "erpe tune"),
    "tune on a device": (("tune", "-v", "relu", "-d", "digits", "--device", "cuda:99"), "use cpu instead"),
    "more cpus than there are": (("tune", "-v", "relu", "-d", "digits", "--cpus-per-trial", "9999"), "machine has"),
    "empty study name": (("tune", "-v", "relu", "-d", "digits", "--name", ""), "letters, digits"),
    "study file": (("study", "run", "none.toml"), "none.toml: cannot be read"),
    "line of a study file": (("study", "show", NINE, "--set", "search.trails=1"), "did you mean trials?"),
    "budget": (("study", "run", NINE, "--budget", "time"), "use trials, epochs or flops instead"),
    "compare nothing": (("compare",), "erpe tune"),
    "format": (
        ("compare", "--format", "word"),
        "'word' given; use terminal, markdown, csv, parquet, json or latex instead",
    ),
    "precision": (("bench", "layer", "--precision", "half"), "use float32, bfloat16 or float64 instead"),
    "method": (("bench", "layer", "--method", "slow"), "use auto, torch, dense or fft instead"),
    "server": (("compare", "--server", "http://127.0.0.1:1"), "no answer"),
    "bench variant": (("bench", "layer", "-v", "relux"), "did you mean relu?"),
}


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_1(erpe, mistake, monkeypatch):
    monkeypatch.delenv("ERPE_DATA", raising=False)
    words, would_do = MISTAKES[mistake]
    code, out, err = erpe(*words)
    told = [line for line in err.splitlines() if not line.lstrip()[:1].isdigit()]  # without progress
    assert code == 1 and out == "" and len(told) == 1 and told[0].startswith("erpe: "), err
    assert would_do in told[0] and "Traceback" not in err


@pytest.mark.parametrize(
    "words", [("tune", "--varant", "relu"), ("tune",), ("tunes",), ("bench",), ("bench", "train", "--rounds", "1")]
)
def test_a_command_line_that_makes_no_sense_is_exit_code_2(erpe, words):
    code, _, err = erpe(*words)
    assert code == 2 and "Traceback" not in err


def test_missing_data_without_network_names_folder_files_and_digits(erpe, tmp_path):
    code, _, err = erpe("train", "-v", "relu", "-d", "mnist", "--data-dir", str(tmp_path / "here"))
    line = err.splitlines()[-1]
    assert code == 1 and str(tmp_path / "here") in line and "train-images-idx3-ubyte.gz" in line
    assert "--dataset digits" in line


ENDING = """
import sys, threading, time
from erpe import __main__
from erpe.cli import app as cli
def main():
    threading.Thread(target=time.sleep, args=(60,)).start()  # as one that talks to a server which never answers
    print("said")
    sys.exit(130)
cli.main = main
__main__.main()
"""


def test_a_command_ends_with_its_code_while_something_still_talks_to_a_server():
    ended = subprocess.run([sys.executable, "-c", ENDING], capture_output=True, text=True, timeout=50)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "said\n", "")


def test_help_is_quick_because_nothing_heavy_is_imported():
    script = (
        "import sys; sys.argv = ['erpe', '--help']\n"
        "from erpe.cli.app import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'torchvision', 'ray', 'mlflow', 'optuna', 'sklearn', 'pandas', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


@pytest.mark.parametrize(
    "command",
    "tune train variants status sync ui predict doctor bench study compare report".split(),
)
def test_every_command_explains_itself(erpe, command):
    code, out, _ = erpe(command, "--help")
    assert code == 0 and "Usage: erpe" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("tun", "erpe: No such command 'tun'. Did you mean 'tune'? (see `erpe --help`)"),
        ("tune", "erpe tune: Missing option '--variant' / '-v' (see `erpe tune --help`)"),
        ("tune --variants relu", "erpe tune: No such option: --variants"),
        ("tune -v relu -d digits --trials many", "erpe tune: Invalid value for '--trials': "),
        ("study run", "erpe study run: Missing argument"),
    ],
)
def test_a_command_line_that_makes_no_sense_is_one_line(erpe, words, said):
    code, out, told = erpe(*words.split())
    assert code == 2 and not out and told.startswith(said) and told.count("\n") == 1


def test_variants_lists_the_twelve_with_size_and_cost(erpe):
    code, out, _ = erpe("variants", "--dataset", "digits", "--json")
    rows = json.loads(out)
    assert code == 0 and tuple(row["variant"] for row in rows) == VARIANTS
    by_name = {row["variant"]: row for row in rows}
    # The general encoding has a scalar for each of 7 x 7 offsets, 4 heads and 4 layers.
    assert by_name["relu_general"]["params"] - by_name["relu"]["params"] == 4 * 4 * 49
    assert by_name["softmax"]["flops/forward"] > 0


def test_settings_are_read_as_toml_and_bare_words_as_text():
    given = ["train.ema=0.99", "model.pooling=cls", "model.normalize_qk=true", "model.patch=2"]
    expected = {"train.ema": 0.99, "model.pooling": "cls", "model.normalize_qk": True, "model.patch": 2}
    assert parse_settings(given) == expected
    assert parse_settings(["train.ema=1", '"train.ema"=1.0', "train={ema=1, lr=2}"]) == {"train.ema": 1, "train.lr": 2}
    with pytest.raises(ConfigError, match="NAME=VALUE"):
        parse_settings(["train.ema"])


@pytest.mark.slow
def test_train_reports_every_measure_and_continues_where_it_was(erpe, trained):
    store, first = trained
    assert {"test/accuracy", "test/f1", "test/log_likelihood", "aic", "bic"} <= first["test"].keys()
    assert {"val/accuracy", "params", "flops/forward", "memory/peak_mib"} <= first["metrics"].keys()
    code, out, _ = erpe("train", "-v", "relu", "-d", "digits", "--store", str(store), "--json", *TINY)
    again = json.loads(out)
    assert code == 0 and again["test"] == first["test"], "the test split is opened once"


@pytest.mark.slow
def test_status_shows_the_trial_and_its_test(erpe, trained):
    store, first = trained
    code, out, _ = erpe("status", "--store", str(store), "--json")
    (row,) = json.loads(out)
    assert code == 0 and row["study"] == first["study"] and row["counts"] == {"COMPLETE": 1}
    assert row["trials"][0]["epochs"] == 2 and row["test"] == first["test"]
    assert erpe("status", first["study"], "--store", str(store))[1].count("complete") == 2
    assert first["study"] in erpe("status", "--store", str(store))[1]


def test_status_says_that_a_study_without_data_has_no_trial_yet(erpe, tmp_path):
    store, data = str(tmp_path / "runs"), tmp_path / "data"
    data.mkdir()
    for name in UNPACKED:
        (data / name).write_text("not of MNIST")
    code, _, err = erpe("train", "-v", "relu", "-d", "mnist", "--data-dir", str(data), "--store", store)
    assert code == 1 and "MD5" in err
    (name,) = (row["study"] for row in json.loads(erpe("status", "--store", store, "--json")[1]))
    code, out, _ = erpe("status", name, "--store", store)
    assert code == 0 and out.rstrip().endswith("no trial yet; the command that made it goes on")


def test_predict_takes_a_study_a_trial_or_a_folder(erpe, trained, tmp_path):
    store, first = trained
    picture = tmp_path / "digit.png"
    Image.fromarray((load_digits().images[0] * 15).astype(np.uint8)).resize((80, 80)).save(picture)
    answers = [
        erpe("predict", run, str(picture), "--store", str(store), "--json")
        for run in (first["study"], f"{first['study']}/0", first["folder"])
    ]
    shares = json.loads(answers[0][1])
    assert [code for code, _, _ in answers] == [0, 0, 0]
    assert sum(shares.values()) == pytest.approx(1, abs=1e-5) and len(shares) == 10
    assert answers[0][1] == answers[1][1] == answers[2][1]
    told = erpe("predict", first["study"], str(picture), "--store", str(store))[1].splitlines()
    assert told and not [line for line in told if line != line.rstrip()]


def test_a_picture_file_is_seen_as_the_pixels_it_holds_and_dark_on_bright_too(trained, tmp_path):
    """The model gets from a picture what it was trained on, for every digit, in either polarity."""
    folder, digits = Path(trained[1]["folder"]), load_digits().images[:50]
    model, _ = load_model(folder)
    for image in digits:
        grey = np.rint(image * 255 / 16).astype(np.uint8)
        with torch.no_grad():
            expected = model(normalise(torch.from_numpy(grey)[None, None], "digits")).softmax(dim=1)[0]
        for shown in (grey, 255 - grey):
            Image.fromarray(shown).save(tmp_path / "digit.png")
            shares = predict(folder, tmp_path / "digit.png")
            assert [shares[str(n)] for n in range(10)] == pytest.approx(expected.tolist(), abs=1e-5)


def test_predict_refuses_what_is_no_picture_and_what_is_no_run(erpe, trained, tmp_path):
    store, first = trained
    (tmp_path / "text.png").write_text("not a picture")
    for run, picture in ((first["study"], "text.png"), (first["study"], "missing.png"), ("nothing", "text.png")):
        code, _, err = erpe("predict", run, picture, "--store", str(store))
        assert code == 1 and len(err.splitlines()) == 1


def test_a_damaged_model_is_named(erpe, trained, tmp_path):
    _, first = trained
    folder = tmp_path / "damaged"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        data = (Path(first["folder"]) / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2] if name == "model.safetensors" else data)
    store, _ = trained
    code, _, err = erpe("predict", str(folder), "x.png", "--store", str(store))
    assert code == 1 and "model.safetensors" in err and len(err.splitlines()) == 1


def test_a_store_that_is_a_file_or_of_another_layout_is_refused(erpe, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = erpe("train", "-v", "relu", "-d", "digits", "--store", "file")
    assert code == 1 and "cannot be written" in err and len(err.splitlines()) == 1
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "erpe.json").write_text('{"layout": 99}')
    code, _, err = erpe("train", "-v", "relu", "-d", "digits", "--store", "old")
    assert code == 1 and "layout" in err and len(err.splitlines()) == 1


def test_doctor_finds_nothing_wrong_here_and_says_what_is_missing(erpe, tmp_path):
    code, out, _ = erpe("doctor", "--data-dir", str(tmp_path), "--json")
    findings = {finding["what"]: finding for finding in json.loads(out)}
    assert code == 0 and findings["torch"]["state"] == "well" and findings["digits"]["state"] == "well"
    assert findings["precision"]["text"] == f"auto is {explain_auto(pick_device())}"
    assert findings["mnist"]["state"] == "note" and str(tmp_path) in findings["mnist"]["text"]
    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (tmp_path / "MNIST" / "raw" / f"{name}-ubyte.gz").write_bytes(b"altered")
    code, out, _ = erpe("doctor", "--data-dir", str(tmp_path), "--json")
    findings = {finding["what"]: finding for finding in json.loads(out)}
    assert code == 1 and findings["mnist"]["state"] == "wrong" and "MD5" in findings["mnist"]["text"]


STREAMS = {
    "full": (">/dev/full", 1, "erpe: standard output: cannot be written (No space left on device)\n"),
    "unread": ("| true", 141, ""),
    "closed": (">&-", 0, ""),
    "errors unread": ("2>/dev/full", 0, ""),
}


@pytest.mark.slow
@pytest.mark.parametrize("command", ["--help", "variants"])
@pytest.mark.parametrize("stream", STREAMS)
def test_output_that_cannot_be_written_is_one_line_at_most(command, stream):
    where, code, said = STREAMS[stream]
    line = f"sleep .1 | {sys.executable} -m erpe {command} {where}; exit ${{PIPESTATUS[1]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (code, said)


def test_a_terminal_without_a_character_gets_a_stand_in(trained):
    command = [sys.executable, "-m", "erpe", "status", "--store", str(trained[0])]
    done = subprocess.run(command, capture_output=True, timeout=100, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and not done.stderr
    assert b"| study " in done.stdout and done.stdout.startswith(b"+--")


SERVER = """
import os, sys
from erpe import __main__
from erpe.cli import app
from erpe.cli.ui import run_server
server = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(50)"]
app.main = lambda: run_server(server, dict(os.environ))
__main__.main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.usefixtures("hangup")
def test_a_signal_ends_the_ui_with_a_line(number):
    with subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout is not None and running.stdout.readline() == b"up\n"
        running.send_signal(number)
        assert running.communicate(timeout=20) == (b"the server has ended\n", b"")
    assert running.returncode == 0


def test_more_tokens_than_the_memory_holds_are_one_line(erpe):
    code, _, said = erpe("bench", "layer", "--tokens", "100000000000", "-v", "relu", "--rounds", "2")
    assert code == 1
    assert said.startswith("erpe: no room in memory (") and said.count("\n") == 1


@pytest.mark.parametrize(("error", "line"), [(ValueError(" \n"), "ValueError"), (OSError("a\nb"), "a")])
def test_an_exception_without_words_is_told_by_its_kind(error, line):
    assert first_line(error) == line


def test_a_number_agrees_with_its_noun():
    assert [counted(n, "study") for n in (0, 1, 2000)] == ["0 studies", "1 study", "2,000 studies"]
    assert [changes_wait(n) for n in (1, 2)] == ["1 change waits", "2 changes wait"]
    assert [counted(n, "run") for n in (1, 2)] == ["1 run", "2 runs"]
