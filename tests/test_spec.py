"""What makes two studies the same."""

import pytest

from erpe.config import TrainConfig, TrialConfig, defaults
from erpe.errors import ConfigError
from erpe.study import pruning, samplers
from erpe.study.distributions import Choices, Floats, Ints, Space
from erpe.study.search_space import default_space
from erpe.study.spec import StudySpec, check_name, confirmation, define, derive_seed, differences, differences_from
from erpe.variants import VARIANTS


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


SET = {
    "model.features": 32, "model.relu_projection": "orthogonal", "model.rotary_placement": "post",
    "model.rope": "mixed", "model.rope_base": 50, "model.circulant_init": "normal", "model.circulant_block": 8,
    "model.normalize_qk": True, "model.method": "dense", "model.rank": 3, "model.eps": 1e-5, "model.patch": 4,
    "model.width": 32, "model.depth": 2, "model.heads": 2, "model.mlp_ratio": 2, "model.dropout": 0.1,
    "model.drop_path": 0.1, "model.position": "none", "model.pooling": "cls", "data.validation": 0.2,
    "data.split_seed": 1, "data.train_limit": 100, "data.augment": "standard", "data.mixup": 0.1, "data.cutmix": 0.1,
    "data.flips": True, "data.erase": 0.1,
    "train.epochs": 7, "train.batch": 32, "train.lr": 0.01, "train.weight_decay": 0.0, "train.warmup": 0.2,
    "train.label_smoothing": 0.0, "train.clip_norm": 0.0, "train.ema": 0.9, "train.redraw": 5,
    "train.precision": "float32", "train.compile": "off",
}  # fmt: skip
"""A value of every setting that is not its default."""


def test_every_setting_is_a_part_of_the_identity():
    given = {"model.variant", "model.plugin", "model.image", "model.classes", "data.dataset", "seed"}
    assert set(SET) == set(defaults("favor", "digits").flat()) - given
    specs = [define("favor", "digits", space=Space(axes={}), settings={name: value}) for name, value in SET.items()]
    assert [spec.definition["settings"] for spec in specs] == [{name: value} for name, value in SET.items()]
    assert (
        len({spec.identity for spec in specs} | {define("favor", "digits", space=Space(axes={})).identity})
        == len(SET) + 1
    )


def test_a_new_setting_with_a_default_renames_no_study():
    """Neither one of a trial, nor of a range, nor of a study; another value than the default does."""

    class LaterTrain(TrainConfig):
        lookahead: int = 0

    class LaterTrial(TrialConfig):
        train: LaterTrain = LaterTrain()

    class LaterFloats(Floats):
        base: float = 10.0

    class LaterSpace(Space):
        axes: dict[str, LaterFloats | Ints | Choices]

    class LaterSpec(StudySpec):
        base: LaterTrial
        space: LaterSpace
        rungs: int | None = None

    for spec in (
        define("favor_rope", "digits", settings={"train.ema": 0.9}),
        confirmation(defaults("relu", "mnist"), 3),
    ):
        stored = spec.model_dump(mode="json")
        same = LaterSpec(**stored)
        assert same.identity == spec.identity and "lookahead" in same.base.train.model_dump()
        changed = [{"rungs": 2}, {"base": same.base.replace({"train.lookahead": 1}).model_dump()}]
        assert len({LaterSpec(**stored | each).identity for each in changed} | {spec.identity}) == 3


def test_a_default_that_changed_makes_another_study_and_is_named():
    spec = define("favor", "digits")
    stored = spec.model_dump(mode="json")
    stored["base"]["train"]["warmup"], stored["pruner"] = 0.05, "median"  # the defaults of an earlier version
    assert differences_from(stored, spec) == ["train.warmup: 0.05, now 0.1", "pruner: median, now auto"]


def test_identity_is_a_fixed_function_of_what_is_set():
    spec = define(
        "favor",
        "digits",
        settings={"train.ema": 0.9},
        space=Space(axes={"model.depth": Ints(low=1, high=2)}),
        pruner="asha",
    )
    assert spec.definition == {
        "variant": "favor", "dataset": "digits", "settings": {"train.ema": 0.9}, "sampler": "tpe", "pruner": "asha",
        "space": {"model.depth": {"low": 1, "high": 2}}, "seed": 0, "phase": "search", "contract": 1,
    }  # fmt: skip
    assert spec.identity == "72365affe027", "a change would train confirmations again"


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
        ({"settings": {"data.validation": 0}}, "use a number above 0 instead"),
        ({"settings": {"model.width": 34}}, "heads"),
        ({"settings": {"model.variant": "softmax"}}, "model.variant: softmax given, and favor_rope by --variant; use"),
        ({"settings": {"data.dataset": "mnist"}}, "data.dataset: mnist given, and digits by --dataset; use --dataset"),
        ({"settings": {"seed": 3}}, "seed: 3 given, and 0 by --seed; use --seed alone"),
        ({"epochs": 1, "settings": {"train.epochs": 3}}, "train.epochs: 3 given, and 1 by --epochs; use --epochs"),
        ({"settings": {"train.lr": 1, "train": {"lr": 2}}}, "train.lr: 1 and 2 given; use one of them"),
        ({"settings": {"train.lrr": 1, "model.dept": 2}}, "train.lr?; also unknown setting 'model.dept'; did you"),
        ({"settings": {"train.lrr": 1, "train.lr": "a", "model.dropout": 2}}, "train.lr?; also model.dropout: 2 given"),
        ({"settings": {"train.lrr": 1, "train.lr": "a"}}, "train.lr?; also train.lr: 'a' given; use a number instead"),
        ({"epochs": 0}, "greater than 0"),
        ({"sampler": "grid"}, "tpe, gp, nsgaii or random"),
        ({"seed": -1}, "seed"),
    ],
)
def test_a_study_that_cannot_be_run_is_refused(given, said):
    with pytest.raises(ConfigError) as refused:
        define("favor_rope", "digits", **given)
    assert said in str(refused.value)


def test_what_is_set_twice_alike_is_no_contradiction():
    once = define("favor_rope", "digits", epochs=3, seed=2)
    alike = {"model.variant": "favor_rope", "data.dataset": "digits", "train.epochs": 3.0, "seed": 2}
    assert define("favor_rope", "digits", epochs=3, seed=2, settings=alike) == once
    assert define("favor_rope", "digits", seed=2, settings={"train": {"epochs": 3}}) == once


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


@pytest.mark.parametrize("sampler", ["tpe", "gp", "random"])
@pytest.mark.parametrize("pruner", ["auto", "asha", "hyperband", "median", "none"])
def test_every_sampler_and_pruner_can_be_made_and_is_written_down(sampler, pruner):
    spec = define("favor", "digits", sampler=sampler, pruner=pruner)
    samplers.make_sampler(spec, [], 20), pruning.make_pruner(spec, 20)
    written = samplers.settings(spec, 20)
    assert written["sampler"]["name"] == sampler and written["optuna"]
    assert written["pruner"]["name"] == ("asha" if pruner == "auto" else pruner)
