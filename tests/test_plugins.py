"""Plug-ins: own attentions and encodings are variants like the built-in ones, and nothing runs that nobody named."""

import pickle
import shutil
from pathlib import Path

import pytest
import torch
from trials import TINY, objective

import erpe
from erpe import plugins, variants
from erpe.cli.app import main
from erpe.config import AttentionConfig, TrialConfig, defaults
from erpe.errors import ConfigError
from erpe.execution.objective import vision
from erpe.model import build, build_attention
from erpe.model.flops import counted_cost, forward_flops, is_counted
from erpe.store import Store, name_store
from erpe.study.naming import shown
from erpe.study.plan_file import load_plan
from erpe.study.reading import read_studies
from erpe.study.records import ExperimentRef
from erpe.study.search_space import default_space
from erpe.study.session import StudySession
from erpe.study.spec import define, differences_from
from erpe.tracking.image import desired
from erpe.tracking.study_tags import study_tags
from erpe.training.check import check_variant
from erpe.training.checkpoint import load_model
from erpe.variants import NINE, VARIANTS, own_variants

EXAMPLES = Path(__file__).parent.parent / "studies" / "plugins"
ALIBI = EXAMPLES / "alibi.py"

WRONG = """
import torch
from erpe.model.encoding import Encoding
from erpe.plugins import register_encoding

@register_encoding("wrong")
class Wrong(Encoding):
    def __init__(self, config, shape, generator):
        super().__init__(config, shape, generator)
        self.unused = torch.nn.Parameter(torch.ones(3))

    def rotate(self, *vectors):
        return tuple(x + x.mean(0, keepdim=True) for x in vectors)
"""


@pytest.fixture(autouse=True)
def nothing_loaded(monkeypatch):
    """Each test begins without plug-ins, and leaves none behind."""
    monkeypatch.setattr(variants, "REGISTERED", {})
    monkeypatch.setattr(plugins, "_LOADED", {})
    monkeypatch.setattr(plugins, "_GIVEN", {})


def refusal(make, *args, **more):
    with pytest.raises(ConfigError) as refused:
        make(*args, **more)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def alibi(tmp_path, change=("", "")):
    """A copy of the example, perhaps changed."""
    path = tmp_path / "alibi.py"
    path.write_text(ALIBI.read_text().replace(*change))
    return path


# The examples hold what the grid holds


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_holds_all_that_is_checked(file):
    source = plugins.load(file)
    for variant in own_variants(source):
        checks = {check.what: check for check in check_variant(variant)}
        assert not [check for check in checks.values() if check.well is False], variant
        if variant in ("softmax_alibi", "relu_alibi", "favor_alibi", "softmax_cayley"):
            assert checks["positions"].text == "relative"
    assert len([*own_variants(source)]) == (4 if file.stem == "mala" else 3)


def test_far_tokens_weigh_less_by_alibi():
    plugins.load(ALIBI)
    layer = build_attention("softmax_alibi", grid=(1, 4), heads=2, head_dim=4)
    a = layer.weights(*torch.zeros(2, 1, 2, 4, 4))[0]  # without content: C alone, (H, N, N)
    slopes = 2.0 ** -torch.tensor([4.0, 8.0])
    far = (torch.arange(4)[:, None] - torch.arange(4)).abs()
    torch.testing.assert_close(a, (-slopes[:, None, None] * far).softmax(-1))


def test_what_is_wrong_with_a_plug_in_is_found(tmp_path):
    (tmp_path / "wrong.py").write_text(WRONG)
    plugins.load(tmp_path / "wrong.py")
    wrong = {check.what for check in check_variant("softmax_wrong") if check.well is False}
    assert {"gradients", "batch independence"} <= wrong


# Variants are the product; the nine and the twelve stay


def test_variants_are_the_product_and_the_built_in_ones_stay():
    before = VARIANTS, NINE
    plugins.load(ALIBI)
    plugins.load(EXAMPLES / "mala.py")
    assert set(own_variants()) == {"softmax_alibi", "favor_alibi", "relu_alibi", "mala", "mala_alibi"} | {
        f"mala_{name}" for name in ("general", "circulant", "rope")
    }
    assert before == (VARIANTS, NINE)
    assert "did you mean relu_alibi?" in refusal(defaults, "relu_alibbi", "digits")


def test_options_are_settings_with_a_range_of_their_own():
    plugins.load(ALIBI)
    config = defaults("relu_alibi", "digits")
    assert (
        config.flat()["model.options.slope"] == 1.0 and "model.options.slope" not in defaults("relu", "digits").flat()
    )
    assert config.replace({"model.options.slope": 2}).overrides == {"model.options.slope": 2.0}
    assert default_space("relu_alibi", "digits").axes["model.options.slope"].values == (0.5, 1.0, 2.0)
    assert "slope" in refusal(config.replace, {"model.options.slope": -1})
    assert "unknown key" in refusal(AttentionConfig, variant="relu_alibi", options={"slop": 1})
    assert "options: 1 given" in refusal(AttentionConfig, variant="relu_alibi", options=1)


def test_the_flops_of_a_layer_that_declares_none_are_counted():
    plugins.load(EXAMPLES / "mala.py")
    plugins.load(ALIBI)
    own, built_in = (defaults(name, "digits").model for name in ("softmax_alibi", "softmax"))
    assert is_counted(own) and not is_counted(built_in) and not is_counted(defaults("mala", "digits").model)
    assert forward_flops(own) == forward_flops(built_in), "weights of pairs are work on single entries"
    assert counted_cost(defaults("mala", "digits").model).forward < counted_cost(own).forward * 2


# The source is a part of what a study is


def test_the_source_is_a_part_of_the_identity(tmp_path):
    plugins.load(alibi(tmp_path))
    first = define("relu_alibi", "digits")
    before = first.identity
    assert define("relu", "digits").definition.keys() == first.definition.keys() - {"plugin"}
    plugins.load(alibi(tmp_path, ("far tokens weigh less", "far tokens weigh little")))
    second = define("relu_alibi", "digits")
    assert before != second.identity
    (told,) = differences_from(first.model_dump(mode="json"), second)
    assert told.startswith("model.plugin: ")


def test_a_stored_configuration_is_read_without_its_plug_in_and_runs_nothing(tmp_path):
    plugins.load(alibi(tmp_path))
    config = defaults("relu_alibi", "digits").replace(TINY)
    text = config.model_dump_json()
    variants.REGISTERED.clear()
    plugins._LOADED.clear()
    read = TrialConfig.model_validate_json(text)
    assert read == config and read.model.encoding == "alibi"
    assert "--plugin" in refusal(build, read.model)
    plugins.load(alibi(tmp_path, ("far tokens weigh less", "far tokens weigh little")))
    assert "is another one" in refusal(build, read.model)
    assert "is another one" in refusal(lambda: read.overrides), "its options had other defaults, perhaps"


def test_a_study_file_names_plug_ins_relative_to_itself(tmp_path, monkeypatch):
    alibi(tmp_path)
    (tmp_path / "x.toml").write_text(
        'dataset = "digits"\nplugins = ["alibi.py"]\nvariants = ["relu", "relu_alibi"]\n'
        "[settings]\nmodel.options.learned = false\n[space]\nmodel.options.slope = [0.25, 4]\n"
    )
    monkeypatch.chdir("/")
    plain, own = (load_plan(tmp_path / "x.toml").search_spec(arm) for arm in load_plan(tmp_path / "x.toml").arms())
    assert own.base.model.options == {"slope": 1.0, "learned": False} and not plain.base.model.options
    assert own.space.axes["model.options.slope"].values == (0.25, 4.0)
    monkeypatch.chdir(tmp_path.parent)
    assert load_plan(f"{tmp_path.name}/x.toml").plugins == (f"{tmp_path.name}/alibi.py",)
    assert plugins.plugin_flags() == f" --plugin {tmp_path.name}/alibi.py"
    without = load_plan({"dataset": "digits", "variants": ["relu_alibi"]})
    assert without.plugins == (f"{tmp_path.name}/alibi.py",), "those of --plugin, too"
    assert not load_plan({"dataset": "digits", "variants": ["relu"]}).plugins


def test_a_package_offers_a_plug_in_by_an_entry_point(tmp_path, monkeypatch):
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "__init__.py").touch()
    (tmp_path / "my_package" / "encodings.py").write_text(ALIBI.read_text())
    about = tmp_path / "my_package-0.1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 0.1\n")
    (about / "entry_points.txt").write_text("[erpe.plugins]\nmine = my_package.encodings\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert plugins.load("mine").text == ALIBI.read_text() and "relu_alibi" in own_variants()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("1 +", "SyntaxError"),
        ("x = 1\nraise KeyError('here')", "line 2: KeyError"),
        ("x = 1", "registers nothing"),
        ("from erpe.plugins import register_encoding\nregister_encoding('rope')", "there already"),
        ("from erpe.plugins import register_encoding\nregister_encoding('a_b')", "lower-case letters"),
        ("raise SystemExit(0)", "line 1: SystemExit"),
        (f"{ALIBI.read_text()}\nregister_encoding('alibi')(Alibi)", "'alibi' is there already in plug-in own.py"),
        (
            "from erpe.plugins import register_encoding\nregister_encoding('mine')(int)",
            "is no erpe.model.encoding.Encoding",
        ),
        (ALIBI.read_text().replace("PositiveFloat = 1.0", "PositiveFloat"), "option 'slope' has no default"),
        (ALIBI.read_text().replace('{"slope":', '{"slop":'), "space of 'slop', which is no option"),
    ],
)
def test_a_plug_in_that_cannot_be_used_is_one_line_with_its_name(tmp_path, text, told):
    (tmp_path / "own.py").write_text(text)
    said = refusal(plugins.load, tmp_path / "own.py")
    assert told in said and "own.py" in said
    assert "nowhere.py: cannot be read" in refusal(plugins.load, tmp_path / "nowhere.py")
    assert not own_variants() and not plugins.loaded()


def test_a_mistake_in_a_changed_file_leaves_what_was_loaded_and_two_files_of_a_name_are_told_apart(tmp_path):
    plugins.load(alibi(tmp_path))
    refusal(plugins.load, alibi(tmp_path, ("class Alibi", "1 + class")))
    assert plugins.load(alibi(tmp_path)) and "relu_alibi" in own_variants()
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside" / "alibi.py").write_text(ALIBI.read_text().replace('"alibi"', '"other"'))
    assert f"{tmp_path}/alibi.py, has its name" in refusal(plugins.load, tmp_path / "beside" / "alibi.py")


def test_another_process_loads_the_plug_ins_that_come_with_its_work(tmp_path):
    plugins.load(alibi(tmp_path))
    sent = pickle.dumps(vision("digits", None, "cpu").start)
    (tmp_path / "alibi.py").unlink()
    variants.REGISTERED.clear()
    plugins._LOADED.clear()
    assert not own_variants()
    assert callable(pickle.loads(sent))
    assert "relu_alibi" in own_variants()


@pytest.fixture
def recorded(tmp_path, monkeypatch, empty_database):
    """Where a store lies with a study `tuned` and one of a study file, `plug`, both of a plug-in that is not loaded."""
    store = Store.open(tmp_path / "runs")
    shutil.copy(empty_database, store.root / "mlflow.db")
    plan = load_plan(
        {"name": "plug", "dataset": "digits", "variants": ["relu", "relu_alibi"], "plugins": [str(alibi(tmp_path))],
         "search": {"trials": 1, "epochs": 1}, "confirm": {"seeds": 1}}
    )  # fmt: skip

    def play(spec, name, **about):
        part = ExperimentRef("plug", **about, plan=plan.model_dump(mode="json")) if about else None
        with StudySession.open(store, spec, trials=1, name=name, part_of=part) as session:
            session.record_tags(study_tags(spec, name, part))
            trial = session.ask(1)
            session.report(trial.number, 1, 0.5)
            session.decide(trial.number, "COMPLETE", {"test/accuracy": 0.5})
            session.tell(trial.number)
            folder = store.trial_folder(name, trial.number, trial.config.seed)
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(trial.config.model_dump_json())
        return trial.config

    for arm in plan.arms():
        best = play(plan.search_spec(arm), f"plug.{arm.name}", arm=arm.name, phase="search")
        play(plan.confirm_spec(arm, best), f"plug.{arm.name}.seeds", arm=arm.name, phase="confirm", trial=0)
    play(define("relu_alibi", "digits", epochs=1), "tuned")
    variants.REGISTERED.clear()
    plugins._LOADED.clear()
    monkeypatch.chdir(tmp_path)
    return store.root


DIGIT = EXAMPLES.parent / "digit.png"
ASKED = [
    "status plug", "study status plug", "compare plug", "report plug", "plot plug accuracy", f"predict tuned {DIGIT}",
    f"predict plug/relu_alibi {DIGIT}", "export tuned --format torch",
    "study run plug --executor inline", "study show plug",
]  # fmt: skip
OPEN = [
    "status", "study status", "status plug/relu_alibi", "status tuned", "diff plug/relu/0 plug/relu_alibi/0",
    "plot tuned history", "gc --keep-best 1 --dry-run",
]  # fmt: skip


@pytest.mark.slow
def test_every_command_names_the_plug_in_that_it_needs_or_needs_none(recorded, monkeypatch, capsys):
    def run(words):
        monkeypatch.setattr("sys.argv", ["erpe", *words.split(), "--store", str(recorded)])
        try:
            main()
        except SystemExit as end:
            return end.code, capsys.readouterr().err
        return 0, capsys.readouterr().err

    for words in ASKED:
        code, said = run(words)
        assert code == 1 and "--plugin" in said and said.count("\n") == 1, (words, said)
    for words in OPEN:
        code, said = run(words)
        assert not code and "Traceback" not in said, (words, said)
    assert "--plugin" in run("study status")[1], "the store's other studies are shown"
    assert not plugins.loaded()
    parts = [each for each in read_studies(Store(recorded)) if each.part_of]
    runs = {each.name: each for each in desired(parts, Store(recorded), running=False) if not each.is_trial}
    assert runs.keys() == {"relu", "relu/seeds", "relu_alibi", "relu_alibi/seeds"}, "`erpe sync` needs none"
    assert not run("study status plug --plugin alibi.py")[0]
    assert "did you mean plug" in run("study run plugg")[1]
    assert not run("study show plug --plugin alibi.py")[0]
    hint = name_store("`erpe compare plug` and `erpe ui plug`", Path("/a"))
    assert hint == "`erpe compare plug --store /a --plugin alibi.py` and `erpe ui plug --store /a`"
    assert list(erpe.load_study("plug", recorded, plugins=["alibi.py"]).arms["arm"]) == ["relu", "relu_alibi"]
    assert shown("plug.relu_alibi.confirm-0ae200") == "plug/relu_alibi/seeds"


def test_a_model_of_a_plug_in_is_trained_and_keeps_its_source(tmp_path):
    plugins.load(alibi(tmp_path))
    own = {"train.epochs": 1, "data.train_limit": 100}
    config = defaults("relu_alibi", "digits").replace(TINY | own)
    measured = objective(config, lambda epoch, measures: False, tmp_path / "trial", device="cpu")
    assert measured and "val/accuracy" in measured
    assert ALIBI.read_text() in (tmp_path / "trial" / "plugins.txt").read_text()
    model, read = load_model(tmp_path / "trial")
    assert read == config and model.blocks[0].attention.encoding.log_rates.requires_grad
