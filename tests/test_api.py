"""The Python face: `erpe.tune`, `erpe.train`, `erpe.run_study`."""

from __future__ import annotations

import doctest
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import erpe
from erpe import plugins
from erpe.errors import ErpeError


@pytest.mark.parametrize("name", ["tune", "train", "run_study"])
def test_the_examples_of_the_functions_say_what_happens(name, tmp_path, monkeypatch, without_mlflow):
    monkeypatch.chdir(tmp_path)
    (example,) = doctest.DocTestFinder(recurse=False).find(getattr(erpe, name), name)
    assert doctest.DocTestRunner().run(example) == (0, len(example.examples))


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


@pytest.mark.slow
def test_the_program_of_readme_asks_its_question_of_own_images_and_encodings(tmp_path, monkeypatch):
    """As it stands there, but for the path, less to train and no Ray."""
    top = Path(__file__).parent.parent
    _, text = (top / "studies" / "README.md").read_text().split("All of it in one program or notebook")
    program = text.partition("```python\n")[2].partition("```")[0].replace("studies/plugins", f"{top}/studies/plugins")
    draw = np.random.default_rng(0)
    images, labels = draw.integers(0, 256, (60, 6, 4, 3), dtype=np.uint8), np.arange(60) % 3
    np.savez(tmp_path / "flowers.npz", images=images, labels=labels)
    small = ["search.trials=1", "search.epochs=1", "confirm.seeds=1", "settings.model.width=16"]
    small += ["settings.model.depth=1", "settings.model.heads=2", "settings.model.patch=2"]
    small += ['variants=["relu", "relu_alibi"]']
    ask = partial(erpe.run_study, changes=small, executor="inline", offline=True, progress=False)
    monkeypatch.setattr(erpe, "run_study", ask)
    monkeypatch.setattr(plugins, "_REGISTERED", {})
    monkeypatch.setattr(plugins, "_LOADED", {})
    monkeypatch.chdir(tmp_path)
    found = {"images": images[:5].transpose(0, 3, 1, 2)}
    exec(program.replace("path/to/flowers", "flowers.npz"), found)
    assert repr(found["study"]) == "<study mine: 2 of 2 arms finished, 2 trials, 2 confirmed runs>"
    assert set(found["study"].comparison().fronts["objective"]) == {"accuracy", "flops"}
    assert found["model"].predict(found["images"]).shape == (5, 3)
