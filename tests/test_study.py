"""What makes two studies the same."""

import pytest

from erpe.config import VARIANTS
from erpe.errors import ConfigError
from erpe.search import samplers
from erpe.search.axes import Choices, Space
from erpe.search.space import default_space
from erpe.search.study import StudySpec, check_name, define, derive_seed, differences


def test_identity_does_not_depend_on_the_order_of_the_space():
    space = default_space("relu_rope", "digits")
    turned = Space(axes=dict(reversed(space.axes.items())))
    assert define("relu_rope", "digits", space=space).identity == define("relu_rope", "digits", space=turned).identity


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 7},
        {"sampler": "random"},
        {"pruner": "none"},
        {"seed": 1},
        {"settings": {"train.ema": 0.9}},
        {"space": Space(axes={"model.depth": Choices(values=(1, 2))})},
    ],
)
def test_identity_depends_on_all_that_shapes_the_result(change):
    assert define("favor", "digits", **change).identity != define("favor", "digits").identity


def test_every_variant_and_data_set_is_another_study():
    specs = [define(variant, dataset) for variant in VARIANTS for dataset in ("digits", "mnist", "cifar10")]
    assert len({spec.identity for spec in specs}) == len({spec.name for spec in specs}) == 36


def test_differences_name_what_changed_and_how():
    old = define("favor", "digits", epochs=3).model_dump(mode="json")
    new = define("favor", "digits", pruner="none").model_dump(mode="json")
    assert differences(old, new) == ["train.epochs: 3, now 30", "pruner: auto, now none"]
    assert differences(old, old) == []
    assert differences({}, {"a": {"b": 1}}) == ["a.b: absent, now 1"]


def test_a_given_setting_leaves_the_space():
    spec = define("favor", "digits", settings={"train.lr": 0.01})
    assert "train.lr" not in spec.space.axes and spec.base.train.lr == 0.01


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"settings": {"train.lrr": 1}}, "did you mean train.lr"),
        ({"settings": {"data.validation": 0}}, "above 0 would do"),
        ({"settings": {"model.width": 34}}, "heads"),
        ({"epochs": 0}, "greater than 0"),
        ({"sampler": "grid"}, "'tpe', 'gp', 'cmaes' or 'random'"),
        ({"seed": -1}, "seed"),
    ],
)
def test_a_study_that_cannot_be_run_is_refused(given, said):
    with pytest.raises(ConfigError, match=said):
        define("favor_rope", "digits", **given)


@pytest.mark.parametrize("name", ["", "../x", "a/b", "a b", ".hidden", "x" * 101])
def test_a_name_that_is_no_folder_is_refused(name):
    with pytest.raises(ConfigError, match="study name"):
        check_name(name)


def test_derived_seeds_differ_and_stay():
    seeds = {derive_seed(study, purpose, number) for study in range(5) for purpose in "ab" for number in range(50)}
    assert len(seeds) == 500 and all(0 <= seed < 2**31 for seed in seeds)
    assert derive_seed(0, "trial", 0) == 237832870, "a change would make old studies unrepeatable"


def test_a_specification_survives_json():
    spec = define("relu_circulant", "mnist")
    assert StudySpec(**spec.model_dump(mode="json")) == spec


@pytest.mark.parametrize("sampler", ["tpe", "gp", "cmaes", "random"])
@pytest.mark.parametrize("pruner", ["auto", "asha", "hyperband", "median", "none"])
def test_every_sampler_and_pruner_can_be_made_and_is_written_down(sampler, pruner):
    spec = define("favor", "digits", sampler=sampler, pruner=pruner)
    samplers.make_sampler(spec, [], 20), samplers.make_pruner(spec, 20)
    written = samplers.settings(spec, 20)
    assert written["sampler"]["name"] == sampler and written["optuna"]
    assert written["pruner"]["name"] == ("asha" if pruner == "auto" else pruner)
