"""The Python face: `erpe.tune`, `erpe.train`, `erpe.run_study`."""

from __future__ import annotations

import doctest
from functools import partial

import pytest

import erpe
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
        with pytest.raises(ErpeError, match="use a variant and a data set, or like"):
            erpe.train(store=tmp_path, **words)
