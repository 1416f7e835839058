"""Study files: what they mean, and what they refuse in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from erpe.bench.probe import probe
from erpe.cli.plan import detectable, families, plan_notes, plan_rows, plan_table, time_notes
from erpe.config import defaults
from erpe.errors import ConfigError
from erpe.model.flops import train_step_flops
from erpe.report.power import detectable_difference
from erpe.store import Store
from erpe.study.entries import check_agreement
from erpe.study.plan_file import find_plan, load_plan, schema
from erpe.variants import NINE, VARIANTS

STUDIES = Path(__file__).parent.parent / "studies"
FILES = sorted(path for path in STUDIES.glob("*.toml") if path.name != "space.toml")
SMALL = 'dataset = "digits"\nvariants = ["relu", "relu_rope", "softmax_rope"]\nseed = 3\n'


@pytest.fixture
def plan_of(tmp_path):
    def make(text, *changes):
        path = tmp_path / "my_study.toml"
        path.write_text(text)
        return load_plan(path, changes)

    return make


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_study_file_is_valid_and_opens_with_question_expectation_and_cost(path):
    plan = load_plan(path)
    assert len({arm.name for arm in plan.arms()}) == len(plan.arms()) > 1
    head = [line for line in path.read_text().splitlines()[:8] if line.startswith("#")]
    assert [word for word in ("Question:", "Expectation:", "Cost:") if any(word in line for line in head)] == [
        "Question:", "Expectation:", "Cost:"
    ]  # fmt: skip


def test_the_files_of_the_question_have_its_models():
    for name in ("digits_nine", "mnist_nine", "cifar10_nine"):
        assert tuple(arm.name for arm in load_plan(STUDIES / f"{name}.toml").arms()) == NINE
    for name in ("mnist_grid", "cifar10_grid"):
        assert tuple(arm.name for arm in load_plan(STUDIES / f"{name}.toml").arms()) == VARIANTS


def test_the_schema_for_editors_is_that_of_the_code_and_accepts_every_file():
    import tomllib

    import jsonschema

    committed = (STUDIES / "study.schema.json").read_text()
    assert committed == schema()
    check = jsonschema.Draft202012Validator(json.loads(committed))
    for path in FILES:
        assert not list(check.iter_errors(tomllib.loads(path.read_text())))
    assert list(check.iter_errors({"dataset": "digits", "variants": "nine", "seed": 0, "sede": 1}))


def test_a_margin_is_no_part_of_what_is_run(plan_of):
    plan, other = plan_of(SMALL), plan_of(SMALL, "compare.margin=1")
    assert (plan.compare.margin, other.compare.margin) == (0.5, 1)
    assert [plan.search_spec(arm).identity for arm in plan.arms()] == [
        other.search_spec(arm).identity for arm in other.arms()
    ]


def test_all_arms_get_one_budget_and_one_space_but_for_their_own_knobs(plan_of):
    plan = plan_of(SMALL)
    specs = {arm.name: plan.search_spec(arm) for arm in plan.arms()}
    assert {spec.epochs for spec in specs.values()} == {30}
    assert {spec.seed for spec in specs.values()} == {3}
    shared = set.intersection(*(set(spec.space.axes) for spec in specs.values()))
    assert {spec.space.axes[name].model_dump_json() for name in shared for spec in specs.values()} == {
        axis.model_dump_json() for name, axis in specs["relu"].space.axes.items() if name in shared
    }
    own = set(specs["relu_rope"].space.axes) - shared
    assert own == {
        "model.features", "model.normalize_qk", "model.relu_projection", "model.rope", "model.rotary_placement"
    }  # fmt: skip


def test_switches_make_an_arm_of_every_combination_that_means_something(plan_of):
    plan = plan_of(SMALL + '[switches]\n"model.rope" = ["axial", "mixed"]\n"model.patch" = [2, 4]\n')
    assert [arm.name for arm in plan.arms()] == [
        "relu-patch2", "relu-patch4",
        "relu_rope-axial-patch2", "relu_rope-axial-patch4", "relu_rope-mixed-patch2",
        "relu_rope-mixed-patch4", "softmax_rope-axial-patch2", "softmax_rope-axial-patch4",
        "softmax_rope-mixed-patch2", "softmax_rope-mixed-patch4",
    ]  # fmt: skip
    spec = plan.search_spec(plan.arms()[5])
    assert (spec.base.model.rope, spec.base.model.patch) == ("mixed", 4)
    assert not {"model.rope", "model.patch"} & set(spec.space.axes)


def test_equal_flops_let_cheap_arms_train_longer(plan_of):
    text = SMALL.replace('"relu",', '"relu", "softmax",') + '[switches]\n"model.patch" = [1, 2]\n'
    plan = plan_of(text, "search.budget=flops", "search.epochs=20")
    epochs = {arm.name: plan.epochs(arm) for arm in plan.arms()}
    assert epochs["softmax-patch2"] == 20, "the reference is softmax at the default configuration"
    assert epochs["relu-patch1"] > epochs["softmax-patch1"] and epochs["softmax-patch1"] < 20


def test_equal_flops_are_those_of_models_the_study_may_draw(plan_of):
    small = '[space]\n"model.width" = 32\n"model.depth" = [1, 2]\n"model.patch" = 4\n'
    plan = plan_of(SMALL + small, "search.budget=flops", "search.trials=3", "search.epochs=4")
    one = train_step_flops(
        defaults("softmax", "digits").replace({"model.width": 32, "model.depth": 2, "model.patch": 4}).model
    )
    assert plan.flops_per_image() == 3 * 4 * one
    assert {plan.epochs(arm) for arm in plan.arms()} <= {3, 4, 5}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("budget", "path"), [*(("trials", path) for path in FILES), ("flops", FILES[0])], ids=lambda given: Path(given).stem
)
def test_what_show_prints_is_a_file_of_the_same_study_with_every_default(path, budget, tmp_path, capsys):
    plan = load_plan(path, [f"search.budget={budget}"])
    some = {"epochs": 1, "confirm": 1, "axes": 1, "params": 1, "flops/train_step": 1, "own": ["model.rope"]}
    rows = [{"arm": arm.name, "variant": arm.variant} | some for arm in plan.arms()]
    plan_table(plan, rows, plan_notes(plan, rows, 0.7))
    printed = tmp_path / "printed.toml"
    printed.write_text(capsys.readouterr().out)
    again = load_plan(printed)
    assert again == plan.resolved() == again.resolved()
    for arm, same in zip(plan.arms(), again.arms(), strict=True):
        assert same == arm and again.search_spec(arm) == plan.search_spec(arm)
        best = plan.search_spec(arm).base
        assert again.confirm_spec(arm, best) == plan.confirm_spec(arm, best)
    assert again.flops_per_image() == plan.flops_per_image()


def test_neither_a_file_nor_a_study_is_told_so_by_an_empty_store_too(tmp_path):
    with pytest.raises(ConfigError, match="mine: no such file, and no such study in the store; the store has none"):
        find_plan("mine", (), Store(tmp_path))
    (tmp_path / "file_without_a_suffix").write_text(SMALL)
    assert find_plan(tmp_path / "file_without_a_suffix", (), Store(tmp_path)).seed == 3


def test_a_file_that_an_editor_marked_as_utf8_is_read(plan_of):
    assert plan_of("\ufeff" + SMALL) == plan_of(SMALL)


def test_a_confirmation_trains_the_best_configuration_on_everything_with_seeds_of_its_own(plan_of):
    plan = plan_of(SMALL, "confirm.epochs=7")
    search = plan.search_spec(plan.arms()[0])
    best = search.base.replace({"train.lr": 0.005, "seed": 99})
    specs = [plan.confirm_spec(arm, best) for arm in plan.arms()]
    assert specs[0].base == best.replace({"seed": 0, "data.validation": 0.0, "train.epochs": 7})
    seeds = [[spec.trial_seed(k) for k in range(5)] for spec in specs]
    assert seeds[0] == seeds[1] and len(set(seeds[0])) == 5, "equal seeds of different arms are pairs"
    assert not set(seeds[0]) & {search.trial_seed(k) for k in range(50)}, "fresh seeds"


@pytest.mark.parametrize(
    ("text", "changes", "said"),
    [
        (SMALL.replace('dataset = "digits"\n', ""), [], "dataset: a value is needed"),
        (SMALL + "sede = 1\n", [], "sede: unknown key; did you mean seed"),
        (SMALL + "[serach]\ntrials = 2\n", [], "serach: unknown key; did you mean search"),
        (SMALL + "[search]\ntrails = 2\n", [], "search.trails: unknown key; did you mean trials"),
        (SMALL, ["search.trials=0"], "search.trials: 0 given"),
        (SMALL, ["search.trials=99999999999999999999"], "search.trials: 99999999999999999999 given"),
        (SMALL, ["search.budget=time"], "search.budget: 'time' given"),
        (SMALL, ["confirm.seeds=0"], "confirm.seeds: 0 given"),
        (SMALL, ["search.trials"], "--set search.trials: use NAME=VALUE instead"),
        (SMALL.replace('"relu"', '"rleu"'), [], "unknown variant 'rleu'; did you mean relu"),
        (SMALL.replace("digits", "digit"), [], "and no such folder or .npz; did you mean digits"),
        (SMALL, ['variants="ten"'], "'ten'"),
        (SMALL, ["variants=[]"], "variants: none given"),
        (SMALL, ["variants=[softmax, relu]"], 'or a list, as ["softmax", "relu"], instead'),
        (SMALL, ['variants=["relu", "relu"]'], "variants: relu is there 2 times"),
        (SMALL, ['name="../x"'], "study name '../x'"),
        (SMALL + '[settings]\n"data.validation" = 0.2\n', [], "data.validation: the study sets it"),
        (SMALL, ["settings.train.epochs=2"], "settings.train.epochs: the study sets it; use search.epochs instead"),
        (SMALL + '[settings]\n"train.lrr" = 0.2\n', [], "train.lrr"),
        (SMALL + '[space]\n"train.lr" = {low = 1.0, high = 0.1}\n', [], 'space."train.lr": low 1 is above high 0.1'),
        (SMALL + '[switches]\n"model.patch" = []\n', [], "switches.model.patch: no value"),
        (SMALL + '[switches]\n"model.patch" = [3]\n', [], "patch 3 does not divide the 8 x 8 image"),
        (SMALL + '[switches]\n"model.pacth" = [2]\n', [], "model.pacth"),
        (SMALL + '[switches]\n"model.rope" = ["axial", "axial"]\n', [], "switches.model.rope: a value is there twice"),
        (SMALL + '[switches]\n"model.patch" = [2, 2.0]\n', [], "switches.model.patch: a value is there twice"),
        (SMALL + '[switches]\n"model.normalize_qk" = [true, 1]\n', [], "model.normalize_qk: a value is there twice"),
        (SMALL + '[switches]\n"train.lr" = [0.001, 0.0010000001]\n', [], "2 arms would be named relu-lr0.001"),
        (SMALL, ["space.train.lrr=0.01"], 'space."train.lrr": unknown setting; did you mean train.lr?'),
        (SMALL, ["settings.model.bool=1"], "settings: unknown setting 'model.bool'"),
        (SMALL, ["settings.model.patch=[2]"], "settings.model.patch: [2] given; use a finite number, text, true or"),
        (SMALL, ["compare.margin=0"], "compare.margin: 0 given; use a number greater than 0 instead"),
        (SMALL, ["compare.margin=-1"], "compare.margin: -1 given; use a number greater than 0 instead"),
        (SMALL, ["switches.model.patch=2"], "switches.model.patch: 2 given; use a list instead"),
        (SMALL, ["settings.train.lr=1", "space.train.lr=2"], "train.lr: [settings] has 1 and [space] has 2; use one"),
        (SMALL, ["settings.model.patch=2", "switches.model.patch=[2, 4]"], "[settings] has 2 and [switches] has [2"),
        (SMALL, ["space.model.patch=2", "switches.model.patch=[2, 4]"], "[switches] has [2, 4] and [space] has 2"),
        ("dataset = ", [], "cannot be read"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_in_one_line_that_names_the_file(plan_of, text, changes, said):
    with pytest.raises(ConfigError) as error:
        plan_of(text, *changes)
    assert said in str(error.value) and "my_study.toml" in str(error.value)
    assert "\n" not in str(error.value)


def test_every_mistake_of_a_file_is_told_at_once_and_that_of_many_arms_once(plan_of):
    with pytest.raises(ConfigError) as error:
        plan_of(SMALL + 'sede = 1\n[search]\ntrials = 0\n[switches]\n"model.patch" = 2\n')
    for said in ("sede: unknown key", "search.trials: 0 given", "switches.model.patch: 2 given; use a list instead"):
        assert said in str(error.value)
    with pytest.raises(ConfigError) as error:
        plan_of(SMALL + "[settings]\ntrain.lrr = 1\ndata.validation = 0.2\n[switches]\nmodel.patch = []\n")
    for said in ("did you mean train.lr?", "settings.data.validation: the study sets it", "model.patch: no value"):
        assert said in str(error.value)
    with pytest.raises(ConfigError) as error:
        plan_of(SMALL + "[space]\ntrain.lrr = 1\nmodel.patch = 3\n")
    assert str(error.value).count("train.lrr") == str(error.value).count("patch 3 does not divide") == 1
    with pytest.raises(ConfigError) as error:
        plan_of(SMALL + '[search]\ntrials = "many"\n[settings]\nmodel.image = 5\n"a{b" = 1\n[space]\nmodel.patch = 3\n')
    for said in ("search.trials: 'many' given", "model.image: the study sets it", "'a{b'", "patch 3 does not divide"):
        assert said in str(error.value), "values, names and arms in one line"


def test_one_setting_means_the_same_with_quotes_without_and_in_a_table(plan_of, tmp_path):
    quoted = plan_of(SMALL + '[settings]\n"train.ema" = 0.9\n[switches]\n"model.patch" = [2, 4]\n')
    assert plan_of(SMALL + "[settings]\ntrain.ema = 0.9\n[switches]\nmodel.patch = [2, 4]\n") == quoted
    assert plan_of(SMALL + "[settings.train]\nema = 0.9\n[switches.model]\npatch = [2, 4]\n") == quoted
    assert plan_of(SMALL, "settings.train.ema=0.9", 'switches."model.patch"=[2, 4]') == quoted
    assert (
        plan_of(SMALL + '[settings]\n"train.ema" = 0.5\n[switches]\nmodel.patch = [2, 4]\n', "settings.train.ema=0.9")
        == quoted
    )


def test_what_is_written_twice_alike_is_no_contradiction(plan_of):
    text = SMALL + "[settings]\ntrain.ema = 0.9\nmodel.depth = 2\n[space]\nmodel.depth = [2.0]\n"
    plan = plan_of(text, "settings.train.ema=0.9", "settings.train.ema=0.9")
    assert plan.search_spec(plan.arms()[0]).base.model.depth == 2


def test_a_file_without_a_seed_has_seed_0(plan_of):
    assert plan_of(SMALL.replace("seed = 3\n", "")) == plan_of(SMALL, "seed=0")


def test_show_says_what_each_arm_searches_alone_how_much_is_run_and_what_can_be_found(plan_of):
    plan = plan_of(
        SMALL, 'variants="nine"', "search.trials=6", "search.epochs=4", "confirm.seeds=10", "confirm.epochs=5"
    )
    rows = plan_rows(plan)
    told = "\n".join(plan_notes(plan, rows, 0.7))
    assert "the first 3 of 6 are the same draws for every arm; sampler tpe; pruner none (fewer than 16" in told
    assert "9 arms x (6 trials + 10 seeds) = 144 runs" in told
    assert "at most 216 epochs of search and 450 of confirmation" in told
    assert "\n  favor, favor_general: model.features, model.normalize_qk\n" in told
    assert "\n  softmax" not in told
    own = {row["arm"]: set(row["own"]) for row in rows}
    for arm in plan.arms():
        axes = {name for name, axis in plan.search_spec(arm).space.axes.items() if len(axis.probes()) > 1}
        shared = {name for name, axis in plan.search_spec(plan.arms()[0]).space.axes.items() if len(axis.probes()) > 1}
        assert axes - shared == own[arm.name], arm.name
    assert families(plan) == {
        "gaps, linear attention against softmax": 2, "encodings against none": 6, "encodings against softmax": 6,
    }  # fmt: skip
    assert f"encodings against none: {detectable_difference(10, 0.7, 6):.2f} points (first of 6 tests, Holm)" in told
    with pytest.raises(ConfigError, match="standard deviation: 0 given"):
        plan_notes(plan, rows, 0)


def test_the_numbers_that_show_tells_are_numbers_for_programs_too(plan_of):
    plan = plan_of(SMALL, "confirm.seeds=8")
    found = detectable(plan, 0.7)
    told = "\n".join(plan_notes(plan, plan_rows(plan), 0.7))
    assert found and all(f"{name}: {points:.2f} points" in told for name, points in found.items())
    one = plan_of(SMALL, "confirm.seeds=1")
    assert set(detectable(one, 0.7).values()) == {None}


def test_a_pruner_that_is_named_is_used_and_that_trials_are_few_is_said(plan_of):
    plan = plan_of(SMALL, "search.trials=6", "search.pruner=median", "search.sampler=random")
    told = plan_notes(plan, plan_rows(plan), 0.7)[0]
    assert "all 6 are the same draws" in told and "pruner median (fewer than 16 trials compare too few)" in told
    none = plan_of(SMALL, "search.trials=6", "search.pruner=none")
    assert plan_notes(none, plan_rows(none), 0.7)[0].endswith("pruner none")


def test_the_probe_measures_every_arm_and_counts_every_image(plan_of):
    changes = ["search.trials=3", "search.epochs=2", "confirm.seeds=4", "confirm.epochs=5", 'space."model.width"=32']
    plan = plan_of(SMALL, *changes, 'space."data.validation"=0.2')
    found = probe(plan, concurrency=2, seconds=0)
    assert set(found.images_per_second) == {arm.name for arm in plan.arms()} and found.threads == 1
    held_out = 1437 * 0.2
    images = 3 * 2 * (1437 - held_out + held_out / 3) + 4 * (5 * 1437 + 360 / 3)
    assert found.total_seconds == pytest.approx(sum(images / speed for speed in found.images_per_second.values()) / 2)
    assert "2 trials at a time, threads of each: 1" in time_notes(found)[0]
    with pytest.raises(ConfigError, match="threads: 0 given"):
        probe(plan, threads=0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["search.trials=2", "search.trials=3"], "--set search.trials: 2 and 3 given; use one of them"),
        (["search=1", "search.trials=3"], "--set search: 1 and"),
        (["settings.train.lr=1", 'settings."train.lr"=2'], "--set settings.train.lr: 1 and 2 given"),
        (["space={train={lr=1}}", "space.train.lr={low=1, high=2}"], "--set space.train.lr: 1 and"),
    ],
)
def test_lines_of_a_command_that_contradict_each_other_are_refused(changes, said):
    check_agreement([changes[0], changes[0], "seed=1"])
    with pytest.raises(ConfigError) as error:
        check_agreement(changes)
    assert said in str(error.value)
