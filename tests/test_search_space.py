"""The search space: every sample fits, knobs are there only where they mean something, nonsense is refused."""

import subprocess
import sys

import optuna
import pytest

from erpe.config import defaults
from erpe.datasets import DATASETS
from erpe.errors import ConfigError
from erpe.study.distributions import Choices, Floats, Ints, Space, default_point, sample
from erpe.study.search_space import check_together, default_space, load_space
from erpe.variants import VARIANTS, split_variant

optuna.logging.set_verbosity(optuna.logging.WARNING)


def write(tmp_path, body):
    path = tmp_path / "space.toml"
    path.write_text("[space]\n" + body)
    return path


@pytest.mark.parametrize("dataset", ["digits", "mnist", "cifar10"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_sample_is_a_valid_configuration(variant, dataset):
    space, base = default_space(variant, dataset), defaults(variant, dataset)
    check_together(space, base)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    drawn = [sample(study.ask(), space, base) for _ in range(25)]
    assert len({config.model_dump_json() for config in drawn}) == 25
    assert all(config.model.head_dim % 4 == 0 and config.model.variant == variant for config in drawn)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_knob_is_there_only_where_it_means_something(variant):
    attention, encoding = split_variant(variant)
    axes = default_space(variant, "mnist").axes
    assert ("model.features" in axes) == (attention != "softmax")
    assert ("model.relu_projection" in axes) == (attention == "relu")
    assert ("model.rope" in axes) == (encoding == "rope")
    assert ("model.rotary_placement" in axes) == (attention != "softmax" and encoding in ("rope", "circulant"))


def test_all_variants_share_the_axes_that_are_not_knobs():
    shared = set(default_space("softmax", "mnist").axes)
    for variant in VARIANTS:
        axes = default_space(variant, "mnist").axes
        assert {name: axes[name] for name in shared} == default_space("softmax", "mnist").axes


def test_features_are_drawn_only_with_a_projection():
    space, base = default_space("relu", "digits"), defaults("relu", "digits")
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(20):
        trial = study.ask()
        config = sample(trial, space, base)
        assert ("model.features" in trial.params) == (config.model.relu_projection == "orthogonal")
        assert (config.model.features is not None) == (config.model.relu_projection == "orthogonal")


def test_a_file_overrides_and_fixes(tmp_path):
    ranges = '"train.lr" = {low = 1, high = 2}\n"model.mlp_ratio" = {low = 2, high = 4}\n'
    path = write(tmp_path, ranges + '"model.patch" = [7, 14]\n"model.depth" = 3')
    space, base = load_space(path, "favor", "mnist"), defaults("favor", "mnist")
    assert space.axes["train.lr"] == Floats(low=1, high=2)
    assert space.axes["model.depth"] == Choices(values=(3,))
    trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0)).ask()
    config = sample(trial, space, base)
    assert 1 <= config.train.lr <= 2 and config.model.patch in (7, 14) and config.model.depth == 3
    assert "model.depth" not in trial.params, "a fixed value is no parameter of the search"


def test_whole_and_real_ranges_are_told_apart_by_the_setting(tmp_path):
    space = load_space(write(tmp_path, '"model.depth" = {low = 2, high = 8, step = 2}'), "softmax", "mnist")
    assert space.axes["model.depth"] == Ints(low=2, high=8, step=2)


def test_one_file_serves_all_variants(tmp_path):
    path = write(tmp_path, '"model.features" = [32]\n"model.rope" = ["mixed"]')
    assert "model.features" not in load_space(path, "softmax", "mnist").axes
    assert load_space(path, "favor_rope", "mnist").axes["model.rope"] == Choices(values=("mixed",))


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ('"train.lr" = {low = 1e-2, high = 1e-4}', 'space."train.lr": low 0.01 is above high 0.0001'),
        ('"train.lr" = {low = 0, high = 1, log = true}', "a log range starts above 0"),
        ('"train.lr" = {low = nan, high = 1}', "finite"),
        ('"train.lr" = {low = 1e-4, hi = 1}', "did you mean high?"),
        ('"train.lr" = {low = -1, high = 1}', "greater than 0"),
        ('"train.lr" = "fast"', "use a number instead"),
        ('"train.lerning" = 3', "unknown setting; did you mean train"),
        ("train.lrr = 3", 'space."train.lrr": unknown setting; did you mean train.lr?'),
        ('train.lr = 3\n"train.lr" = 2', "train.lr: 3 and 2 given; use one of them"),
        ('"model.depth" = [2, 2.0]', "there twice"),
        ('"model.normalize_qk" = [true, 1]', "there twice"),
        ('"model.depth" = [[2]]', "[2] given; use a finite number, text, true or false instead"),
        ('"train.epochs" = 3', "--epochs sets it"),
        ('"model.depth" = []', "no value to choose from"),
        ('"model.depth" = [2, 2]', "there twice"),
        ('"model.depth" = {low = 2.5, high = 4}', "use a whole number instead"),
        ('"model.depth" = {low = 2, high = 5, step = 2}', "do not end at 5"),
        ('"model.patch" = [5]', "patch 5 does not divide the 28 x 28 image"),
        ('"model.width" = [48, 50]', "rope needs 4 to divide the head size"),
        ('"model.dropout" = {low = 0.5, high = 1.5}', "less than 1"),
        ('"train.precision" = ["float64"]', "bfloat16"),
        ('"data.split_seed" = [1, 2]', "compared on one split"),
        ("nonsense", "cannot be read"),
        ('[other]\n"train.lr" = 1', "one table"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line_with_its_place(tmp_path, body, said):
    path = write(tmp_path, body)
    with pytest.raises(ConfigError) as error:
        load_space(path, "relu_rope", "mnist")
    text = str(error.value)
    assert said in text and text.startswith(str(path)) and "\n" not in text


def test_a_name_may_be_written_with_and_without_quotes_and_in_a_table(tmp_path):
    quoted = load_space(write(tmp_path, '"train.lr" = {low = 1, high = 2}\n"model.depth" = [2, 3]'), "favor", "mnist")
    for body in (
        "train.lr = {low = 1, high = 2}\nmodel.depth = [2, 3]",
        "model.depth = [2, 3]\n[space.train]\nlr = {low = 1, high = 2}",
        "train.lr.low = 1\ntrain.lr.high = 2\nmodel = {depth = [2, 3]}",
    ):
        assert load_space(write(tmp_path, body), "favor", "mnist") == quoted


def test_every_mistake_is_told_at_once(tmp_path):
    path = write(tmp_path, '"train.lrr" = 1\n"model.depth" = []\n"train.lr" = {lo = 1, high = true}\n')
    with pytest.raises(ConfigError) as error:
        load_space(path, "favor", "mnist")
    for said in (
        "did you mean train.lr?",
        'space."model.depth": no value',
        "lo: unknown key",
        "low: a value is needed",
    ):
        assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_set_may_not_contradict_a_space_file(tmp_path):
    path = write(tmp_path, "train.lr = {low = 1, high = 2}\nmodel.depth = 3")
    assert load_space(path, "favor", "mnist", {"model.depth": 3, "train.ema": 0.9}) == load_space(
        path, "favor", "mnist"
    )
    with pytest.raises(ConfigError, match=r"train.lr: --set has 1 and \[space\] has .*; use one of them"):
        load_space(path, "favor", "mnist", {"train.lr": 1})


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.toml: cannot be read"):
        load_space(tmp_path / "nowhere.toml", "favor", "mnist")


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_default_configuration_lies_in_the_space(variant):
    for dataset in DATASETS:
        space, base = default_space(variant, dataset), defaults(variant, dataset)
        point = default_point(space, base)
        assert set(space.axes) - set(point) <= {"model.features"}
        assert base.replace(point) == base


def test_a_space_survives_json():
    space = default_space("relu_rope", "cifar10")
    assert Space(**space.model_dump(mode="json")) == space


def test_looking_at_a_space_loads_nothing_heavy():
    heavy = "{'torch', 'ray', 'mlflow', 'optuna', 'sqlalchemy'}"
    code = f"import sys, erpe.study.search_space, erpe.study.spec; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
