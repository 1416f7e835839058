"""Configurations: checked, frozen, serialisable, and the same for every variant."""

import json
import math
import subprocess
import sys

import pytest
from pydantic import ValidationError

from erpe.config import AttentionConfig, DataConfig, ModelConfig, TrainConfig, TrialConfig, defaults
from erpe.errors import ConfigError, nearest
from erpe.variants import VARIANTS, split_variant

each_variant = pytest.mark.parametrize("variant", VARIANTS)
each_dataset = pytest.mark.parametrize("dataset", ["digits", "mnist", "cifar10"])


def refusal(make) -> str:
    """The one line with which a configuration is refused."""
    with pytest.raises(ConfigError) as refused:
        make()
    text = str(refused.value)
    assert text and "\n" not in text
    return text


# Names


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("relu_rotary", "relu_rope"),
        ("perfomer", "use softmax, softmax_general"),
        ("favour", "did you mean favor?"),
        ("softmax_none", "did you mean softmax"),
        ("Softmax", "did you mean softmax?"),
        ("", "use softmax,"),
    ],
)
def test_an_unknown_variant_is_refused_with_the_names_that_would_do(given, meant):
    for make in (
        lambda: defaults(given, "digits"),
        lambda: split_variant(given),
        lambda: AttentionConfig(variant=given),
    ):
        text = refusal(make)
        assert repr(given) in text and meant in text


@pytest.mark.parametrize(
    ("given", "meant"), [("minst", "mnist?"), ("CIFAR10", "cifar10"), ("imagenet", "use digits, ")]
)
def test_an_unknown_data_set_is_refused_with_the_names_that_would_do(given, meant):
    for make in (lambda: defaults("relu", given), lambda: DataConfig(dataset=given)):
        text = refusal(make)
        assert repr(given) in text and meant in text


@pytest.mark.parametrize(
    ("make", "key", "meant"),
    [
        (lambda: TrainConfig(learning_rate=1e-3), "learning_rate", "use epochs, "),
        (lambda: TrainConfig(epoch=3), "epoch", "did you mean epochs?"),
        (lambda: ModelConfig(variant="relu", image=(1, 8, 8), classes=10, widht=64), "widht", "did you mean width?"),
        (lambda: AttentionConfig(variant="relu", feature=8), "feature", "did you mean features?"),
        (lambda: DataConfig(dataset="digits", validations=0.1), "validations", "did you mean validation?"),
        (lambda: TrialConfig(**defaults("relu", "digits").model_dump(), sede=1), "sede", "did you mean seed?"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(make, key, meant):
    text = refusal(make)
    assert text.startswith(f"{key}: unknown key") and meant in text


def test_an_unknown_key_deep_inside_is_refused_with_its_place():
    tree = defaults("relu", "digits").model_dump()
    tree["train"]["wramup"] = 0.1
    text = refusal(lambda: TrialConfig(**tree))
    assert text.startswith("train") and "did you mean warmup?" in text


@pytest.mark.parametrize("name", ["train.rl", "trian.lr", "lr", "train.lr.x", "train.", "", ".", "model.model.width"])
def test_replacing_an_unknown_setting_is_refused_with_a_known_one(name):
    text = refusal(lambda: defaults("relu", "digits").replace({name: 1}))
    assert text.startswith(f"unknown setting {name!r}; ")
    assert any(known in text for known in defaults("relu", "digits").flat())


def test_a_missing_value_is_named():
    assert refusal(lambda: DataConfig()) == "dataset: a value is needed"
    assert refusal(lambda: ModelConfig(variant="relu", image=(1, 8, 8))) == "classes: a value is needed"


# Values

NUMBERS = [name for name, value in defaults("relu", "digits").flat().items() if type(value) in (int, float)]


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf, -1, -1e-9, "fast", None, [1], {}], ids=repr)
@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_that_makes_no_sense_is_refused_with_its_name(name, wrong):
    text = refusal(lambda: defaults("relu", "digits").replace({name: wrong}))
    assert name.split(".")[-1] in text


@pytest.mark.parametrize("name", sorted({*NUMBERS} - {"train.redraw"}))
def test_a_number_that_fits_into_no_machine_is_refused(name):
    assert name.split(".")[-1] in refusal(lambda: defaults("relu", "digits").replace({name: 10**400}))


@pytest.mark.parametrize(
    ("name", "value", "would_do"),
    [
        ("train.lr", 0, "greater than 0"),
        ("train.epochs", 0, "greater than 0"),
        ("train.epochs", 1.5, "use a whole number instead"),
        ("train.batch", 0, "greater than 0"),
        ("train.warmup", 1, "less than 1"),
        ("train.ema", 1.0, "less than 1"),
        ("train.label_smoothing", 1, "less than 1"),
        ("train.precision", "float64", "auto, float32, bfloat16 or float16"),
        ("train.compile", "yes", "auto, on or off"),
        ("model.dropout", 1, "less than 1"),
        ("model.drop_path", 1.5, "less than 1"),
        ("model.pooling", "max", "mean or cls"),
        ("model.position", "sin", "learned, sincos2d or none"),
        ("model.rope", "2d", "axial or mixed"),
        ("model.features", 0, "greater than 0"),
        ("model.circulant_block", 0, "greater than 0"),
        ("model.mlp_ratio", 0.001, "use 1 instead"),
        ("model.normalize_qk", "maybe", "use true or false instead"),
        ("model.image", (1, 8), "image.2"),
        ("model.image", (1, 8, 0), "greater than 0"),
        ("model.classes", 1, "greater than or equal to 2"),
        ("data.validation", 0.6, "less than or equal to 0.5"),
        ("data.augment", "autoaugment", "none, standard, rand or trivial"),
        ("seed", 2**32, "less than 4294967296"),
        ("data.split_seed", 2**32, "less than 4294967296"),
    ],
)
def test_a_value_out_of_bounds_is_refused_with_what_would_do(name, value, would_do):
    text = refusal(lambda: defaults("relu", "digits").replace({name: value}))
    assert would_do in text and name.split(".")[-1] in text
    assert str(value) in text or name == "model.image"


@pytest.mark.parametrize("would_do", [{"data.validation": 0.007}, {"data.validation": 0}, {"data.validation": 0.5}])
def test_every_part_of_the_training_set_has_room_for_every_class(would_do):
    text = refusal(lambda: defaults("relu", "digits").replace({"data.validation": 0.005}))
    assert text == "data: validation 0.005 of 1437 images is less than one a class; use 0.007 instead"
    defaults("relu", "digits").replace(would_do)


@pytest.mark.parametrize("limit", [1, 9, 1212, 1220])
def test_a_train_limit_uses_and_leaves_an_image_a_class(limit):
    digits = defaults("relu", "digits").replace({"data.validation": 0.15})  # holds out 216 of 1437
    assert "use 10 to 1211, or none, instead" in refusal(lambda: digits.replace({"data.train_limit": limit}))
    for fits in (10, 1211, 1221, 10**6):
        digits.replace({"data.train_limit": fits})


# Combinations


@pytest.mark.parametrize(
    ("variant", "settings", "said"),
    [
        ("relu", {"patch": 3}, "patch 3 does not divide the 8 x 8 image; use 2 instead"),
        ("relu", {"patch": 16}, "patch 16 does not divide the 8 x 8 image; use 8 instead"),
        ("relu", {"image": (1, 12, 20), "patch": 7}, "patch 7 does not divide the 12 x 20 image; use 4 instead"),
        ("relu", {"heads": 5}, "heads 5 does not divide width 64; use 4 instead"),
        ("relu", {"heads": 100}, "heads 100 does not divide width 64; use 64 instead"),
        ("relu", {"width": 6, "heads": 2, "position": "sincos2d"}, "a width that 4 divides, not 6; use 8 instead"),
        ("relu_rope", {"width": 24, "heads": 4}, "rope needs 4 to divide the head size, got 6; use 8 instead"),
        ("softmax_rope", {"width": 8, "heads": 8}, "rope needs 4 to divide the head size, got 1; use 4 instead"),
        ("favor_rope", {"rotary_placement": "post", "features": 6}, "4 to divide features, got 6; use 8 instead"),
        ("relu_circulant", {"width": 8, "heads": 4}, "circulant needs blocks of 3 or more"),
        ("relu_circulant", {"circulant_block": 5}, "got 5 for 16; use circulant_block 16 instead"),
        ("softmax_rope", {"rotary_placement": "post"}, "softmax_rope has none; use pre instead"),
        ("softmax_circulant", {"rotary_placement": "post"}, "softmax_circulant has none; use pre instead"),
    ],
)
def test_what_does_not_fit_together_is_refused_with_what_would(variant, settings, said):
    given = {"variant": variant, "image": (1, 8, 8), "classes": 10} | settings
    assert said in refusal(lambda: ModelConfig(**given))


@pytest.mark.parametrize(("setting", "value"), [("model.image", (1, 16, 16)), ("model.classes", 100)])
def test_a_model_for_other_images_than_the_data_set_s_is_refused(setting, value):
    text = refusal(lambda: defaults("relu", "digits").replace({setting: value}))
    assert text.startswith("digits has (1, 8, 8) images of 10 classes") and str(value) in text


@each_variant
def test_a_switch_that_a_variant_has_no_use_for_is_no_mistake(variant):
    ModelConfig(variant=variant, image=(1, 8, 8), classes=10, features=8, circulant_block=4, rope="mixed", method="fft")


# What is agreed on


@each_dataset
@each_variant
def test_every_variant_has_defaults_that_differ_in_the_variant_alone(variant, dataset):
    mine, other = (defaults(name, dataset).flat() for name in (variant, "softmax"))
    assert {name for name in mine if mine[name] != other[name]} <= {"model.variant"}
    assert mine["model.variant"] == variant


def test_there_are_twelve_variants_in_the_order_of_the_table():
    assert len(VARIANTS) == 12
    assert VARIANTS[:4] == ("softmax", "softmax_general", "softmax_circulant", "softmax_rope")
    assert {split_variant(name) for name in VARIANTS} == {
        (attention, encoding)
        for attention in ("softmax", "favor", "relu")
        for encoding in ("none", "general", "circulant", "rope")
    }


@pytest.mark.parametrize("config", [defaults("relu", "digits"), defaults("relu", "digits").model])
def test_a_configuration_cannot_be_changed(config):
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = config.width = 3
    assert hash(config) == hash(type(config)(**config.model_dump()))


@each_dataset
@each_variant
def test_json_brings_a_configuration_back(variant, dataset):
    config = defaults(variant, dataset, seed=3).replace({"model.features": 24, "train.lr": 1 / 3, "data.mixup": 0.2})
    assert TrialConfig(**json.loads(config.model_dump_json())) == config
    assert json.loads(json.dumps(config.flat(), allow_nan=False))["train.lr"] == 1 / 3


def test_flat_names_every_setting_and_replace_takes_each_back():
    config = defaults("relu_general", "cifar10")
    flat = config.flat()
    assert {"seed", "model.variant", "model.image", "data.dataset", "data.split_seed", "train.lr"} <= set(flat)
    fields = sum(len(type(part).model_fields) for part in (config.model, config.data, config.train))
    assert len(flat) == 1 + fields - 1, "the seed, and no options without a plug-in"
    assert config.replace(flat) == config


def test_replace_leaves_the_original_alone_and_checks_all_changes_together():
    config = defaults("relu", "digits")
    wide = config.replace({"model.width": 60, "model.heads": 5})
    assert (wide.model.width, wide.model.head_dim) == (60, 12)
    assert config == defaults("relu", "digits")
    assert "heads 5 does not divide width 64" in refusal(lambda: config.replace({"model.heads": 5}))


def test_every_setting_has_a_line_that_says_what_it_is():
    for part in (ModelConfig, DataConfig, TrainConfig):
        assert all(field.description for name, field in part.model_fields.items()), part


def test_a_model_knows_its_grid_and_head_size():
    config = ModelConfig(variant="favor", image=(3, 12, 20), classes=2, patch=4, width=48, heads=3)
    assert (config.grid, config.head_dim, config.feature_count(config.head_dim)) == ((3, 5), 16, 32)


def test_configurations_need_no_torch():
    code = "import sys, erpe.config, erpe.store; print(*{'torch', 'numpy', 'ray', 'mlflow'} & {*sys.modules})"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == ""


def test_advice_names_each_name_once():
    assert nearest("z", ["a", "b", "a"]) == "use a or b" and nearest("z", []) == "there is none"
