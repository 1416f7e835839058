"""torch.compile: one graph for each of the twelve, however many models a process had before."""

import json
import logging
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from test_training import EVERYTHING, train
from torch._dynamo.utils import counters
from trials import tiny

from erpe.config import ModelConfig, TrainConfig
from erpe.model import ViT, build
from erpe.model.kernels import gpu
from erpe.model.kernels.gpu import flex
from erpe.training import compilation, timing
from erpe.training.choices import FLEX, size
from erpe.training.compilation import compiled
from erpe.training.confirmation import Confirmation, final_evaluation
from erpe.training.devices import device_name
from erpe.training.timing import time_runs
from erpe.training.trial import Trial
from erpe.variants import VARIANTS

CPU = torch.device("cpu")
BASE = {"image": (1, 4, 4), "classes": 3, "patch": 2, "width": 8, "depth": 1, "heads": 2, "mlp_ratio": 1.0}
SWITCHES = {
    "softmax": {"pooling": "cls", "dropout": 0.1},
    "softmax_general": {"pooling": "cls", "drop_path": 0.1, "normalize_qk": True},
    "softmax_circulant": {"position": "sincos2d"},
    "softmax_rope": {"rope": "mixed", "dropout": 0.1},
    "favor": {"drop_path": 0.1, "features": 3},
    "favor_general": {"pooling": "cls", "dropout": 0.1},
    "favor_circulant": {"pooling": "cls", "drop_path": 0.1},
    "favor_rope": {"rotary_placement": "post", "features": 4},
    "relu": {"relu_projection": "orthogonal", "position": "none"},
    "relu_general": {"pooling": "cls", "rank": 5, "drop_path": 0.1},
    "relu_circulant": {"rotary_placement": "post", "dropout": 0.1},
    "relu_rope": {"pooling": "cls", "dropout": 0.1, "drop_path": 0.1},
}
"""Of each variant another configuration."""


@pytest.fixture
def graphs(monkeypatch):
    """What torch would compile: how many operators each graph has. It runs as it is, and needs no compiler."""
    seen = []

    def backend(graph, inputs):
        seen.append(sum(node.op == "call_function" for node in graph.graph.nodes))
        return graph.forward

    monkeypatch.setattr(compilation, "BACKEND", backend)
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)  # pytest would ask for all of it
    counters.clear()
    return seen


def images(count):
    return torch.randn(count, *BASE["image"], generator=torch.Generator().manual_seed(0))


@pytest.mark.slow
def test_each_of_twelve_configurations_in_a_process_has_one_graph_in_training_and_one_in_evaluation(graphs):
    assert list(SWITCHES) == list(VARIANTS)
    alive = []
    for number, (variant, switches) in enumerate(SWITCHES.items(), 1):
        model = build(ModelConfig(variant=variant, **BASE | switches))
        forward = compiled(model, TrainConfig(compile="on"), CPU, pytest.fail)
        alive.append(forward)  # as trials of a pack are
        for count in (3, 2):  # the last batch of an epoch is shorter
            assert forward(images(count)).shape == (count, 3)
        with torch.no_grad():
            model.eval()
            for count in (3, 2):
                torch.testing.assert_close(forward(images(count)), model(images(count)), rtol=1e-4, atol=1e-5)
        assert len(graphs) == 2 * number, variant
        assert max(graphs[-2:]) < 300, "tables of rotations are constants, not computed in each step"
    assert not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_of_the_compiled_graph_are_those_of_the_model(graphs, monkeypatch, variant):
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")
    model = build(ModelConfig(variant=variant, **BASE | SWITCHES[variant] | {"dropout": 0.0, "drop_path": 0.0}))

    def slopes(forward):
        return torch.autograd.grad(forward(images(3)).square().sum(), [*model.parameters()])

    found = slopes(compiled(model, TrainConfig(compile="on"), CPU, pytest.fail))
    for one, other in zip(found, slopes(model), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["softmax_general", "favor_circulant"])
def test_a_pack_is_one_graph_too_and_the_same_in_every_epoch(graphs, monkeypatch, tmp_path, variant):
    def losses(name, wanted):
        own = {"model.dropout": 0.1, "data.train_limit": 150, "model.depth": 1, "train.compile": wanted}
        trials = [Trial(tiny(variant, own, seed=k), tmp_path / f"{name}-{k}") for k in range(2)]
        for _ in range(2):
            Trial.ahead(trials)
            for trial in trials:
                trial.epoch()
        assert not any(trial.warning for trial in trials)
        return [[epoch["train/loss"] for epoch in trial.history] for trial in trials]

    torch.testing.assert_close(losses("compiled", "on"), losses("plain", "off"), rtol=1e-3, atol=1e-4)
    assert len(graphs) == 3, "the pack, and each trial's evaluation"


def test_a_model_that_cannot_be_compiled_runs_as_it_is(monkeypatch, tmp_path):
    calls = []

    def no_compiler(model, **_):
        def fail(images):
            calls.append(len(images))
            raise RuntimeError("no compiler\n\nSet TORCHDYNAMO_VERBOSE=1")

        return fail

    expected = train(tiny(settings=EVERYTHING), tmp_path / "plain")[0]
    monkeypatch.setattr(torch, "compile", no_compiler)
    told = []
    config = tiny(settings=EVERYTHING | {"train.compile": "on"})
    found = train(config, tmp_path / "tried", lambda trial: told.append(trial.warning))
    assert found[0] == expected
    assert calls == [64, 216], "the model and its average are tried once, then never again"
    assert told[0] == "torch.compile: no compiler; the model runs without it, slower"


@pytest.fixture
def passes(monkeypatch):
    """How often models ran, and how often through what torch.compile gave: itself, which fails on small batches if
    `small` is set."""
    seen, run = SimpleNamespace(all=0, compiled=0, small=0), ViT.forward

    def compiling(plain, **_):
        def fast(images):
            if len(images) < seen.small:
                raise RuntimeError("no compiler")
            seen.compiled += 1
            return plain(images)

        return fast

    def counted(model, images):
        seen.all += 1
        return run(model, images)

    monkeypatch.setattr(torch, "compile", compiling)
    monkeypatch.setattr(ViT, "forward", counted)
    return seen


@pytest.mark.slow
def test_final_evaluations_and_times_are_of_the_compiled_model_or_all_of_the_model_as_it_is(passes, tmp_path):
    for wanted in ("on", "off"):
        trial = Confirmation(tiny(settings={"train.compile": wanted, "train.epochs": 1}), tmp_path / wanted)
        trial.epoch()
        trial.finish()
        assert (passes.all > 0, passes.compiled) == (True, passes.all if wanted == "on" else 0)
        passes.all = passes.compiled = 0
    (row,) = time_runs([tmp_path / "on"])
    assert row["time/compiled"] == 1 and passes.compiled == passes.all > 0
    assert [row["time/compiled"] for row in time_runs([tmp_path / "on", tmp_path / "off"])] == [0, 0]
    passes.small, passes.compiled = 2, 0
    with pytest.warns(UserWarning, match="no compiler; the model runs without it, slower; so all runs are timed"):
        (row,) = time_runs([tmp_path / "on"])
    assert row["time/compiled"] == 0 and row["time/inference_ms_batch1"] > 0


def test_training_evaluations_and_times_all_take_the_attention_that_was_the_fastest(monkeypatch, tmp_path):
    monkeypatch.setattr(timing, "STEPS", 1)
    seen, run = [], ViT.forward
    monkeypatch.setattr(ViT, "forward", lambda model, images: seen.append(flex.WANTED[0]) or run(model, images))
    config = tiny("softmax_general", {"train.epochs": 1, "data.train_limit": 100})
    devices = {device_name(CPU): {"backends": {size(config.model, "float32"): FLEX}}}
    for kind, more in ((Trial, {"timed": True}), (Confirmation, {})):
        trial = kind(config, tmp_path / kind.__name__, devices=devices, **more)
        trial.epoch()
        trial.finish()
    (tmp_path / "Confirmation" / "test.json").unlink()
    final_evaluation(tmp_path / "Confirmation", devices=devices)
    time_runs([tmp_path / "Confirmation"], devices=devices)
    assert len(seen) > 100 and all(seen)


@pytest.mark.slow
@pytest.mark.parametrize("works", [True, False])
def test_each_trial_of_a_pack_records_how_the_pack_ran(monkeypatch, tmp_path, works):
    def compiling(plain, **_):
        def fast(images, *more):
            if more and not works:
                raise RuntimeError("no compiler")
            return plain(images, *more)

        return fast

    monkeypatch.setattr(torch, "compile", compiling)
    monkeypatch.setattr(gpu, "REFUSED", {("masked", 64, 32)})
    own = {"train.compile": "on", "train.epochs": 1, "data.train_limit": 150}
    trials = [Trial(tiny("softmax", own | {"train.ema": ema}), tmp_path / str(ema)) for ema in (0.9, 0.0)]
    Trial.ahead(trials)
    for trial in trials:
        trial.epoch()
        trial.finish()
        outcome = json.loads((trial.folder / "outcome.json").read_text())
        assert outcome["compiled"] == ("yes" if works else "no")
        assert outcome["sdpa"] == ("math" if works else "torch's choice")
        assert outcome["refused_kernels"] == "masked 64 32"
        assert bool(trial.warning) != works


@pytest.mark.parametrize(("wanted", "ran"), [(("on", "off"), "mixed"), (("on", "on"), "yes"), (("on", None), "yes")])
def test_a_trial_of_two_processes_records_how_both_trained_it(monkeypatch, tmp_path, wanted, ran):
    monkeypatch.setattr(torch, "compile", lambda plain, **_: plain)
    monkeypatch.setattr(gpu, "REFUSED", {("masked", 64, 32)})
    epochs = sum(each is not None for each in wanted)
    for wish in wanted:
        monkeypatch.setattr(compilation, "is_wanted", lambda train, device, wish=wish: wish == "on")
        trial = Trial(tiny(settings={"train.epochs": epochs, "data.train_limit": 100}), tmp_path)
        if not trial.done:
            trial.epoch()
            trial.settle()
        gpu.REFUSED.clear()
    trial.finish()
    outcome = json.loads((tmp_path / "outcome.json").read_text())
    assert (outcome["compiled"], outcome["graph"], outcome["refused_kernels"]) == (ran, "no", "masked 64 32")


def test_a_mistake_of_ours_is_not_taken_for_a_missing_compiler(monkeypatch):
    def mistaken(images):
        return images.no_such_thing

    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    with pytest.raises(AttributeError), pytest.warns(UserWarning, match="torch.compile"):
        compiled(mistaken, TrainConfig(compile="on"), CPU)(torch.zeros(1, 1, 1, 1))


def test_no_memory_is_not_taken_for_a_missing_compiler(monkeypatch):
    def full(images):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(torch, "compile", lambda model, **_: full)
    with pytest.raises(torch.OutOfMemoryError):
        compiled(torch.nn.Identity(), TrainConfig(compile="on"), CPU)(torch.zeros(1, 1, 1, 1))


@pytest.mark.parametrize("wanted", ["auto", "off"])
def test_nothing_is_compiled_on_a_cpu_unless_asked_for(wanted):
    model = torch.nn.Identity()
    assert compiled(model, TrainConfig(compile=wanted), CPU) is model


REAL = """
import os, sys
import torch
from erpe.config import TrainConfig
from erpe.training.compilation import compiled
torch.set_num_threads(1)
model, images = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.GELU()), torch.randn(5, 4)

def works():
    fast = compiled(model, TrainConfig(compile="on"), torch.device("cpu"), print)
    slopes = [torch.autograd.grad(call(images).square().sum(), [*model.parameters()]) for call in (model, fast)]
    for one, other in zip(*slopes, strict=True):
        torch.testing.assert_close(one, other)
    return fast.fast is not None

path, os.environ["PATH"] = os.environ["PATH"], os.getcwd()
print(works())
if len(sys.argv) > 1:
    os.environ["PATH"] = path
    torch._dynamo.reset()
    print(works())
"""


@pytest.mark.slow
def test_compiling_works_where_a_compiler_is_and_fails_nowhere(tmp_path):
    there = bool(shutil.which("g++") or shutil.which("clang++"))
    own = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    own |= {"TORCHINDUCTOR_VEC_ISA_OK": "1"}  # what the CPU can do is not tried out by the compiler
    env = {name: value for name, value in os.environ.items() if name not in ("CXX", "CC")} | own
    words = [sys.executable, "-c", REAL, *(["compiler"] if there else [])]
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    warned, *used = done.stdout.splitlines()
    assert "the model runs without it" in warned and used == ["False", *(["True"] if there else [])]
