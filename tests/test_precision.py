"""Training in bfloat16: where it is chosen, and that nothing but the speed is different."""

import json
from types import MappingProxyType

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.modules.module import register_module_forward_hook
from trials import curve, tiny

from erpe.config import defaults
from erpe.errors import StoreError
from erpe.model import build
from erpe.store import STATE
from erpe.training.checkpoint import MODEL, load_tensors, save_tensors
from erpe.training.precision import LEAST, autocast, explain_auto, pick_precision
from erpe.training.timing import time_runs
from erpe.training.trial import Trial
from erpe.variants import VARIANTS

CPU = torch.device("cpu")
HALF = {"train.precision": "bfloat16", "train.epochs": 2, "data.augment": "standard", "model.dropout": 0.1}
ENOUGH = {"model.width": 32, "train.batch": LEAST // (16 * 32), "train.epochs": 2}
"""Of 16 tokens: just large enough for bfloat16."""

each_variant = pytest.mark.parametrize("variant", VARIANTS)


@pytest.fixture
def cpu(monkeypatch):
    """Makes this machine's CPU one with these units and no others."""

    def become(*units: str) -> None:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: MappingProxyType(dict.fromkeys(units, True)))

    return become


def train(trial):
    while not trial.done:
        trial.epoch()
    return curve(trial.history)


@pytest.mark.parametrize(
    ("units", "precision"),
    [
        (("amx_bf16",), "bfloat16"),
        (("avx512_bf16", "avx512_f"), "bfloat16"),
        (("avx512_f", "amx_int8", "amx_tile"), "float32"),
        (("bf16", "neon"), "float32"),  # ARM: not measured
        ((), "float32"),
    ],
)
def test_auto_is_bfloat16_on_a_cpu_that_computes_in_it_and_nowhere_else(cpu, units, precision):
    cpu(*units)
    assert pick_precision(defaults("relu", "cifar10"), CPU) == precision


def test_auto_is_float32_for_a_model_too_small_to_gain(cpu):
    cpu("amx_bf16")
    assert pick_precision(tiny("relu", ENOUGH), CPU) == "bfloat16"
    assert pick_precision(tiny("relu", ENOUGH | {"train.batch": ENOUGH["train.batch"] - 1}), CPU) == "float32"
    assert pick_precision(defaults("relu", "digits"), CPU) == "float32"


def test_what_auto_comes_to_is_told_with_its_reason(cpu, monkeypatch):
    cpu("amx_bf16", "avx512_bf16")
    told = explain_auto(CPU)
    assert told.startswith("bfloat16, by AMX") and f"{LEAST:,}" in told
    assert "by default for mnist, cifar10, " in told and "digits" not in told
    cpu()
    assert explain_auto(CPU) == "float32: this CPU has neither AMX nor AVX-512 for bfloat16"
    assert explain_auto(torch.device("mps")) == "float32: bfloat16 is not taken on mps"
    for capability, told in (
        ((8, 0), "bfloat16: this GPU computes in it"),
        ((7, 5), "float16, with a scaled loss: this GPU has no bfloat16"),
        ((6, 1), "float32: this GPU has no bfloat16, and no tensor cores"),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, has=capability: has)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has=capability: has >= (8, 0))
        assert explain_auto(torch.device("cuda")) == told
        assert told.startswith(pick_precision(tiny(), torch.device("cuda")))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_precision_that_was_asked_for_is_taken_on_any_cpu(cpu, precision):
    for units in ((), ("amx_bf16",)):
        cpu(*units)
        assert pick_precision(tiny(settings={"train.precision": precision}), CPU) == precision


@pytest.mark.slow
@each_variant
def test_bfloat16_learns_as_float32_does_and_keeps_float32_weights(tmp_path, variant):
    curves = {}
    for precision in ("float32", "bfloat16"):
        settings = {"train.precision": precision, "train.epochs": 4, "train.batch": 32, "train.lr": 5e-3}
        trial = Trial(tiny(variant, settings), tmp_path / precision)
        curves[precision] = train(trial)
        trial.finish()
        assert json.loads((tmp_path / precision / "outcome.json").read_text())["precision"] == precision
    assert curves["bfloat16"] != curves["float32"]
    assert curves["float32"][-1]["train/loss"] < 0.9 * curves["float32"][0]["train/loss"]
    for one, other in zip(curves["float32"], curves["bfloat16"], strict=True):
        assert other["train/loss"] == pytest.approx(one["train/loss"], rel=0.02)
        assert other["val/loss"] == pytest.approx(one["val/loss"], rel=0.02)
    assert {x.dtype for x in load_file(tmp_path / "bfloat16" / MODEL).values()} == {torch.float32}


@pytest.mark.parametrize("variant", ["softmax_general", "favor_rope", "relu_circulant"])
def test_float16_learns_as_float32_does_and_goes_on_where_it_stopped(tmp_path, variant):
    settings = HALF | {"train.lr": 5e-3, "train.precision": "float16"}
    single = train(Trial(tiny(variant, settings | {"train.precision": "float32"}), tmp_path / "single"))
    whole = train(Trial(tiny(variant, settings), tmp_path / "whole"))
    assert single != whole
    for one, other in zip(single, whole, strict=True):
        assert other["train/loss"] == pytest.approx(one["train/loss"], rel=0.02)
    Trial(tiny(variant, settings), tmp_path / "parts").epoch()
    again = Trial(tiny(variant, settings), tmp_path / "parts")
    again.trainer.scaler.scale(torch.zeros(()))
    assert again.trainer.scaler.get_scale() == load_tensors(tmp_path / "parts" / STATE)[0]["scale.scale"]
    assert train(again) == whole


def test_slopes_that_are_too_large_for_float16_are_scaled_down_and_their_step_is_left_out(tmp_path):
    trainer = Trial(tiny("relu", {"train.precision": "float16"}), tmp_path).trainer
    trainer.scaler.load_state_dict(trainer.scaler.state_dict() | {"scale": 2.0**40})
    before = {name: x.clone() for name, x in trainer.model.state_dict().items()}
    assert trainer.step(torch.arange(32), 1e-3).isfinite()
    assert all(torch.equal(before[name], x) for name, x in trainer.model.state_dict().items())
    assert trainer.scaler.get_scale() == 2.0**39


def test_trials_in_float16_are_no_pack(tmp_path):
    trials = [Trial(tiny("relu", {"train.precision": "float16"}, seed), tmp_path / str(seed)) for seed in range(2)]
    Trial.ahead(trials)
    assert all(trial._trained is None for trial in trials)


@each_variant
def test_what_trains_in_bfloat16_is_evaluated_in_float32(tmp_path, variant):
    trial = Trial(tiny(variant, HALF | {"train.epochs": 1}), tmp_path)
    seen = set()
    for module in trial.trainer.model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda module, given, out: seen.add((module.training, out.dtype)))
    trial.epoch()
    trial.finish()
    assert seen == {(True, torch.bfloat16), (False, torch.float32)}


@pytest.mark.slow
@each_variant
def test_a_trial_in_bfloat16_goes_on_exactly_where_it_stopped(tmp_path, variant):
    config = tiny(variant, HALF)
    whole = train(Trial(config, tmp_path / "whole"))
    Trial(config, tmp_path / "parts").epoch()
    assert train(Trial(config, tmp_path / "parts")) == whole
    first, second = (load_tensors(tmp_path / name / STATE)[0] for name in ("whole", "parts"))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize(("before", "after"), [(("amx_bf16",), ()), ((), ("amx_bf16",))], ids=["to old", "to new"])
def test_a_trial_goes_on_in_the_precision_it_began_in_on_another_cpu(cpu, tmp_path, before, after):
    config = tiny("relu_rope", ENOUGH)
    cpu(*before)
    whole = train(Trial(config, tmp_path / "whole"))
    Trial(config, tmp_path / "parts").epoch()
    cpu(*after)
    assert train(Trial(config, tmp_path / "elsewhere")) != whole
    assert train(Trial(config, tmp_path / "parts")) == whole


def test_trials_that_began_in_two_precisions_are_no_pack_and_train_as_alone(cpu, tmp_path):
    configs = [tiny("relu", ENOUGH, seed) for seed in range(2)]
    cpu("amx_bf16")
    first = Trial(configs[0], tmp_path / "0")
    cpu()
    second = Trial(configs[1], tmp_path / "1")
    Trial.ahead([first, second])
    assert train(Trial(configs[1], tmp_path / "alone")) == train(second)


def test_a_checkpoint_of_an_unknown_precision_is_set_aside(tmp_path):
    Trial(tiny(), tmp_path).epoch()
    tensors, facts = load_tensors(tmp_path / STATE)
    save_tensors(tmp_path / STATE, tensors, facts | {"precision": "float8"})
    again = Trial(tiny(), tmp_path)
    assert again.history == [] and "precision is unknown" in again.warning


@pytest.fixture
def seen():
    """Types in which linear layers compute while they train."""
    found = set()

    def note(module, given, out):
        if module.training and isinstance(module, torch.nn.Linear):
            found.add(out.dtype)

    with register_module_forward_hook(note):
        yield found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("units", "elsewhere", "dtype"), [(("amx_bf16",), (), torch.bfloat16), ((), ("amx_bf16",), torch.float32)]
)
def test_a_run_is_timed_in_the_precision_in_which_it_was_trained(cpu, tmp_path, seen, units, elsewhere, dtype):
    cpu(*units)
    trial = Trial(tiny("relu", ENOUGH), tmp_path)
    train(trial)
    trial.finish()
    cpu(*elsewhere)
    seen.clear()
    (times, gone) = time_runs([tmp_path, tmp_path / "gone"])
    assert seen == {dtype} and times["time/inference_ms_per_image"] > 0 and gone == {}


@pytest.mark.parametrize("outcome", ['{"precision": "float8"}', '{"precision": []}', "[]"])
def test_an_outcome_of_an_unknown_precision_is_not_timed(tmp_path, outcome):
    trial = Trial(tiny(), tmp_path)
    train(trial)
    trial.finish()
    (tmp_path / "outcome.json").write_text(outcome)
    with pytest.raises(StoreError, match="precision is unknown"):
        time_runs([tmp_path])


@pytest.mark.parametrize("position", ["learned", "sincos2d", "none"])
@each_variant
def test_blocks_add_to_float32_under_autocast(variant, position):
    config = tiny(variant, {"model.position": position}).model
    model, seen = build(config), set()
    for block in model.blocks:
        block.register_forward_hook(lambda block, given, out: seen.update(x.dtype for x in (*given, out)))
    with autocast("bfloat16", CPU):
        model(torch.randn(2, *config.image))
    assert seen == {torch.float32}
