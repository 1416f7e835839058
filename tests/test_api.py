"""The Python face: `erpe.tune`, `erpe.train`, `erpe.run_study`."""

from __future__ import annotations

import doctest
import os
import signal
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from forks import Fork

import erpe
from erpe import plugins, variants
from erpe.cli.app import main
from erpe.errors import ErpeError
from erpe.store import Store
from erpe.study.objectives import check_limits
from erpe.study.plan_file import load_plan
from erpe.study.reading import read_studies

TOP = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tune", "train", "run_study"])
def test_the_examples_of_the_functions_say_what_happens(name, tmp_path, monkeypatch, without_mlflow):
    monkeypatch.chdir(tmp_path)
    (example,) = doctest.DocTestFinder(recurse=False).find(getattr(erpe, name), name)
    assert doctest.DocTestRunner().run(example) == (0, len(example.examples))


@pytest.mark.slow
def test_a_search_is_drawn_and_gives_its_models_and_a_wrong_name_is_told(tmp_path, without_mlflow):
    small = {"model.width": 16, "model.depth": 1, "model.heads": 2, "data.train_limit": 200}
    ask = partial(erpe.tune, "softmax", "digits", trials=2, epochs=1, store=tmp_path, executor="inline", progress=False)
    found = ask(settings=small)
    assert len(found.plot_history().axes[0].lines) == 2 and len(found.plot("parallel_coordinates").axes) == 2
    assert found.model(1).config.variant == "softmax" and found.model().config == found.best.model
    assert list(found.epochs["val/accuracy"]) == list(found.trials["value"])
    for call, said in [
        (lambda: found.plot("histroy"), "no figure 'histroy'; did you mean history"),
        (lambda: found.model(7), "digits-softmax/7: no finished trial"),
        (lambda: ask(sampler="best"), "sampler"),
        (lambda: ask(executor="rai"), "executor: 'rai' given; use ray or inline instead"),
    ]:
        with pytest.raises(ErpeError, match=said) as error:
            call()
        assert "\n" not in str(error.value)
    assert ask(settings=small).result.finished, "the same call finds it again"
    again = erpe.train(like="digits-softmax/1", store=tmp_path, progress=False)
    assert again.best == found.model(1).trial, "its seed, too"
    assert list(again.trials["value"]) == list(found.trials["value"][1:])
    for words in ({"like": "digits-softmax/1", "variant": "relu"}, {"variant": "relu"}, {}):
        with pytest.raises(ErpeError, match="use either a variant and a data set, or a recorded run"):
            erpe.train(store=tmp_path, **words)


def readme_s_program(images):
    _, text = (TOP / "README.md").read_text().split("## Your own data, encoding and goal")
    program = text.partition("```python\n")[2].partition("```")[0].replace("studies/plugins", f"{TOP}/studies/plugins")
    return program.replace("path/to/flowers", str(images))


def test_the_limits_of_readme_s_program_leave_models_for_photographs(tmp_path, monkeypatch):
    draw = np.random.default_rng(0)
    photographs = draw.integers(0, 256, (24, 96, 96, 3), dtype=np.uint8)
    np.savez(tmp_path / "flowers.npz", images=photographs, labels=np.arange(24) % 2)
    given = []
    monkeypatch.setattr(erpe, "run_study", given.append)
    with suppress(AttributeError):  # nothing was run
        exec(readme_s_program(tmp_path / "flowers.npz"), {})
    plan = load_plan(given[0] | {"plugins": [], "variants": ["relu"]})
    assert check_limits(plan.search_spec(plan.arms()[0])) > 0.1


SMALLER = """
import erpe
from functools import partial
less = ["search.trials=1", "search.epochs=1", "confirm.seeds=1", 'variants=["relu_alibi", "relu_cayley"]']
less += [f"settings.model.{name}" for name in ("width=16", "depth=1", "heads=2", "patch=2")]
erpe.run_study = partial(erpe.run_study, changes=less, executor="inline", offline=True, progress=False)
"""


@pytest.mark.slow
def test_readme_s_program_over_own_images_and_encodings_is_killed_and_goes_on_by_command(tmp_path, monkeypatch, capsys):
    """As it stands there, but for the path, less to train, no Ray and no MLflow."""
    program = SMALLER + readme_s_program("flowers.npz")
    draw = np.random.default_rng(0)
    images, labels = draw.integers(0, 256, (60, 6, 4, 3), dtype=np.uint8), np.arange(60) % 3
    np.savez(tmp_path / "flowers.npz", images=images, labels=labels)
    store = Store.open(tmp_path / "runs")
    notebook = Fork(exec, (program, {}), {**os.environ, "PYTHONUNBUFFERED": "1"}, tmp_path / "log", tmp_path)
    while not sum(study.counts["COMPLETE"] for study in read_studies(store)) and notebook.poll() is None:
        time.sleep(0.05)
    notebook.end()
    assert notebook.wait() == -signal.SIGKILL, (tmp_path / "log").read_text()

    def run(words):
        monkeypatch.setattr("sys.argv", ["erpe", *words.split(), "--store", str(store.root)])
        with suppress(SystemExit):
            main()
        return capsys.readouterr()

    monkeypatch.setattr(variants, "REGISTERED", {})
    monkeypatch.setattr(plugins, "_LOADED", {})
    own = " ".join(f"--plugin {TOP}/studies/plugins/{name}.py" for name in ("alibi", "cayley_string"))
    assert own in run("study run mine --executor inline --offline").err
    told = run(f"study run mine --executor inline --offline {own}")
    assert "relu_cayley" in told.out and "starting the workers" not in told.err
    assert f"erpe report mine --store {store.root} {own}" in told.out, "what is said may be copied"

    monkeypatch.chdir(tmp_path)
    found = {"images": images[:5].transpose(0, 3, 1, 2)}
    monkeypatch.setattr(erpe, "run_study", erpe.run_study)  # put back after the test
    exec(program, found)
    assert repr(found["study"]) == "<study mine: 2 of 2 arms finished, 2 trials, 2 confirmed runs>"
    assert found["study"].result.finished, "the command did all"
    assert set(found["study"].comparison().fronts["objective"]) == {"accuracy", "flops"}
    assert found["study"].model("relu_alibi").predict(found["images"]).shape == (5, 3)
