"""A pack: several trials as one program, each as it would be alone."""

import math
from pathlib import Path

import pytest
import torch
from trials import curve, tiny

from erpe import plugins, variants
from erpe.errors import TrialError
from erpe.model import build
from erpe.model.kernels.gpu import flex
from erpe.training import trial as objective
from erpe.training.batched import Pack
from erpe.training.choices import FLEX, size
from erpe.training.devices import device_name
from erpe.training.trial import Trial
from erpe.variants import VARIANTS

CPU = torch.device("cpu")
OWN = (
    {"model.drop_path": 0.2, "train.redraw": 3},
    {
        "train.lr": 5e-3, "train.weight_decay": 0.3, "train.clip_norm": 0.0, "train.label_smoothing": 0.0,
        "train.warmup": 0.3, "model.dropout": 0.1, "train.epochs": 4,
    },
    {"train.lr": 1e-3, "train.clip_norm": 0.1, "train.ema": 0.9, "train.redraw": 2},
)  # fmt: skip
"""What trials of one shape may have for themselves."""
SMALL = {"data.train_limit": 150}
"""Three steps an epoch, the last of a shorter batch."""


@pytest.fixture
def double(monkeypatch):
    """In float64, but for the loss: in float32 AdamW makes a step of a gradient that is only rounding."""
    monkeypatch.setattr(objective, "build", lambda *given: build(*given).double())


def made(folder, variant="relu", settings=SMALL, own=OWN):
    """Trials of one shape and of different seeds."""
    return [Trial(tiny(variant, settings | mine, seed=k), folder / str(k)) for k, mine in enumerate(own)]


def train(trials, epochs, packed):
    for _ in range(epochs):
        if packed:
            Trial.ahead(trials)
        for trial in trials:
            trial.epoch()
    return trials


def assert_alike(first, second, tolerance=5e-6):
    """Curves, weights, averages and the optimiser's state."""
    for one, other in zip(first, second, strict=True):
        for left, right in zip(curve(one.history), curve(other.history), strict=True):
            assert left == pytest.approx(right, abs=tolerance)
        left, right = one.trainer.state(), other.trainer.state()
        assert left.keys() == right.keys()
        for name, tensor in left.items():
            torch.testing.assert_close(tensor, right[name], atol=tolerance, rtol=tolerance, msg=lambda m, n=name: n + m)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_trials_in_a_pack_are_what_they_are_alone(tmp_path, double, variant):
    alone = train(made(tmp_path / "alone", variant), 2, packed=False)
    assert_alike(train(made(tmp_path / "packed", variant), 2, packed=True), alone)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["softmax_alibi", "relu_alibi", "favor_cayley", "mala_rope"])
def test_so_are_trials_of_plug_ins(tmp_path, double, monkeypatch, variant):
    monkeypatch.setattr(variants, "REGISTERED", {})
    monkeypatch.setattr(plugins, "_LOADED", {})
    for file in (Path(__file__).parent.parent / "studies" / "plugins").glob("*.py"):
        plugins.load(file)
    alone = train(made(tmp_path / "alone", variant), 2, packed=False)
    assert_alike(train(made(tmp_path / "packed", variant), 2, packed=True), alone)


VARIED = {
    "data.augment": "rand", "data.mixup": 0.2, "data.cutmix": 1.0, "model.pooling": "cls", "model.position": "sincos2d",
    "model.rope": "mixed", "model.relu_projection": "orthogonal", "model.rotary_placement": "post",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["softmax_general", "favor_general", "relu_circulant", "relu_rope"])
def test_whatever_is_drawn_is_drawn_as_alone(tmp_path, double, variant):
    settings = SMALL | VARIED | ({"model.rotary_placement": "pre"} if "softmax" in variant else {})
    settings |= {"model.method": "fft", "model.features": 4}
    settings |= {"model.eps": 0.1}  # the loss is float32: where sums of ReLU features are near 0 its rounding grows
    alone = train(made(tmp_path / "alone", variant, settings), 2, packed=False)
    assert_alike(train(made(tmp_path / "packed", variant, settings), 2, packed=True), alone)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["favor_rope", "relu_rope", "relu_circulant"])
def test_in_half_the_digits_a_pack_differs_by_its_rounding(tmp_path, variant):
    """In float32, where the kernels are used: encodings that learn do so in a pack, too."""
    settings = SMALL | ({"model.rope": "mixed"} if variant == "relu_rope" else {})
    alone = train(made(tmp_path / "alone", variant, settings), 3, packed=False)
    packed = train(made(tmp_path / "packed", variant, settings), 3, packed=True)
    for one, other in zip(packed, alone, strict=True):
        for left, right in zip(curve(one.history), curve(other.history), strict=True):
            assert left == pytest.approx(right, abs=1e-4)


def test_a_trial_goes_from_pack_to_pack_with_the_epochs_it_has(tmp_path, double):
    alone = train(made(tmp_path / "alone", "favor"), 3, packed=False)
    trials = made(tmp_path / "packed", "favor")
    train(trials[:1], 1, packed=False)
    train(trials[:2], 1, packed=True)
    again = made(tmp_path / "packed", "favor")  # from its checkpoint, as after a kill
    assert [len(trial.history) for trial in again] == [2, 1, 0]
    train(again, 1, packed=True)
    train(again[1:], 1, packed=True)
    train(again[2:], 1, packed=False)
    assert_alike(again, alone)


def test_a_trial_that_diverges_fails_alone_and_as_alone(tmp_path, double):
    own = ({"train.lr": 1e-3}, {"train.lr": 1e200, "train.clip_norm": 0.0}, {"train.lr": 2e-3})
    alone, packed = made(tmp_path / "alone", own=own), made(tmp_path / "packed", own=own)
    with pytest.raises(TrialError, match=r"the loss of step [12] is not finite") as expected:
        alone[1].epoch()
    Trial.ahead(packed)
    with pytest.raises(TrialError) as found:
        packed[1].epoch()
    assert str(found.value) == str(expected.value)
    packed[0].epoch(), packed[2].epoch()
    train([packed[0], packed[2]], 1, packed=True)
    assert_alike([packed[0], packed[2]], train([alone[0], alone[2]], 2, packed=False))


def test_without_room_for_a_pack_its_trials_train_alone(tmp_path, double, monkeypatch):
    alone, packed = made(tmp_path / "alone", "favor"), made(tmp_path / "packed", "favor")
    train(alone, 2, packed=False)
    train(packed, 1, packed=True)
    step, calls = Pack.step, iter(range(9))

    def full(self, *given):
        if next(calls) == 2:
            raise torch.OutOfMemoryError("no room")
        return step(self, *given)

    monkeypatch.setattr(Pack, "step", full)
    train(packed, 1, packed=True)
    assert_alike(packed, alone)
    assert "3 trials do not fit together" in packed[0].warning


def test_trials_of_a_plug_in_that_cannot_be_mapped_train_alone_and_say_so_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(variants, "REGISTERED", {})
    monkeypatch.setattr(plugins, "_LOADED", {})
    example = Path(__file__).parent.parent / "studies" / "plugins" / "alibi.py"
    own = tmp_path / "alibi.py"
    own.write_text(
        example.read_text().replace(
            "        return -", "        float(self.log_rates.detach().sum())\n        return -"
        )
    )
    plugins.load(own)
    alone = train(made(tmp_path / "alone", "relu_alibi"), 2, packed=False)
    packed = train(made(tmp_path / "packed", "relu_alibi"), 2, packed=True)
    assert_alike(packed, alone, tolerance=0)
    assert "relu_alibi: torch.vmap cannot map its plug-in" in packed[0].warning and "\n" not in packed[0].warning


def test_a_pack_has_no_flexattention_which_cannot_be_mapped(tmp_path, monkeypatch):
    monkeypatch.setattr(flex, "serves", lambda q: flex.WANTED[0])  # on CPUs, too
    own = {"backends": {size(tiny("softmax_general").model, "float32"): FLEX}}
    trials = [
        Trial(tiny("softmax_general", SMALL, seed=k), tmp_path / str(k), devices={device_name(CPU): own})
        for k in range(2)
    ]
    assert trials[0].choices.backend(trials[0].config, "float32") == FLEX
    Trial.ahead(trials)
    assert [trial.trainer.sdpa for trial in trials] == [{"torch's choice"}] * 2


def test_the_time_of_an_epoch_is_shared_and_steps_are_told_once(tmp_path):
    steps = []
    trials = made(tmp_path)
    trials[0].on_step = lambda done, of: steps.append((done, of))
    train(trials, 1, packed=True)
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert len({trial.history[0]["time/epoch_seconds"] for trial in trials}) == 1
    assert all(math.isfinite(trial.history[0]["val/loss"]) for trial in trials)
