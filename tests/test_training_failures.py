"""Training that cannot go on: told in one line, with its step; a batch without room is split."""

import math

import pytest
import torch
from test_training import train, weights
from trials import tiny

from erpe.errors import ConfigError, TrialError
from erpe.model import ViT
from erpe.store import STATE
from erpe.training.devices import pick_device
from erpe.training.trial import Trial


@pytest.mark.parametrize(
    ("step", "value"), [(0, math.nan), (2, math.inf), (4, -math.inf), (5, math.nan), (14, math.inf)]
)
def test_a_loss_that_is_not_finite_names_its_step(tmp_path, step, value):
    trial = Trial(tiny(), tmp_path)
    fail_at(trial, step, value)
    with pytest.raises(TrialError, match=f"the loss of step {step} is not finite; use a smaller") as failed:
        while not trial.done:
            trial.epoch()
    assert "\n" not in str(failed.value)
    assert len(trial.history) == len(Trial(tiny(), tmp_path).history) == step // 5


@pytest.mark.slow
@pytest.mark.parametrize("step", [0, 49, 50, 51, 74, 75, 149])
def test_the_step_is_named_exactly_although_losses_are_read_in_bunches(tmp_path, step):
    trial = Trial(tiny(settings={"train.batch": 4, "model.depth": 1, "train.epochs": 2}), tmp_path)
    fail_at(trial, step, math.nan)
    with pytest.raises(TrialError, match=f"the loss of step {step} is not finite"):
        while not trial.done:
            trial.epoch()


def fail_at(trial, step, value):
    """Let the loss of one step be something that is no number; the others are unharmed."""
    taken, losses = trial.trainer.step, iter(range(10**6))
    trial.trainer.step = lambda *given: taken(*given) * (value if next(losses) == step else 1)


def room_for(monkeypatch, images, steps=0):
    """Let the device have memory for so many images at a time, from a step of training on."""
    forward, taken = ViT.forward, iter(range(10**6))

    def cramped(model, batch):
        if model.training and len(batch) > images and next(taken) >= steps:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(model, batch)

    monkeypatch.setattr(ViT, "forward", cramped)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [0, 1, 7])
@pytest.mark.parametrize("variant", ["relu_circulant", "favor_general"])
def test_a_batch_without_room_is_split_and_learns_the_same(tmp_path, monkeypatch, variant, steps):
    """In the middle of an epoch, too: it begins again from the end of the one before."""
    config = tiny(variant, {"train.ema": 0.9, "train.redraw": 2})
    roomy, _ = train(config, tmp_path / "roomy")
    room_for(monkeypatch, config.train.batch // 3, steps)
    trial = Trial(config, tmp_path / "cramped")
    while not trial.done:
        trial.epoch()
    trial.finish()
    assert trial.trainer.parts == 4 and "out of memory" in trial.warning and "in 4 parts" in trial.warning
    assert [epoch["train/loss"] for epoch in trial.history] == pytest.approx([e["train/loss"] for e in roomy], rel=1e-3)
    for name, tensor in weights(tmp_path / "roomy").items():
        assert torch.allclose(tensor, weights(tmp_path / "cramped")[name], atol=1e-3), name


def test_no_room_for_a_single_image_ends_the_trial(tmp_path, monkeypatch):
    room_for(monkeypatch, 0)
    trial = Trial(tiny(), tmp_path)
    with pytest.raises(torch.OutOfMemoryError):
        trial.epoch()
    assert trial.trainer.parts < 2 * trial.config.train.batch


def test_a_learning_rate_beyond_reason_fails_the_trial(tmp_path):
    with pytest.raises(TrialError, match=r"step [1-9] is not finite"):
        train(tiny(settings={"train.lr": 1e300}), tmp_path)


def test_a_last_step_beyond_reason_fails_the_trial(tmp_path):
    trial = Trial(tiny(settings={"train.lr": 1e38, "train.batch": 300, "train.epochs": 1}), tmp_path)
    with pytest.raises(TrialError, match="the validation loss after step 0 is not finite"):
        trial.epoch()
    assert trial.history == [] and not (tmp_path / STATE).exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:7"])
def test_a_gpu_where_there_is_none_is_refused_in_one_line(tmp_path, device):
    with pytest.raises(ConfigError, match=f"device '{device}': this machine has none .*; use cpu instead") as refused:
        Trial(tiny(), tmp_path, device=device)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 250


@pytest.mark.parametrize("device", ["gpu", "", "meta", "CPU", "cuda:x", "hpu", "vulkan", "cpu ", "privateuseone", "-1"])
def test_a_device_that_is_none_is_refused_in_one_line(device):
    with pytest.raises(ConfigError, match=r"use (auto, cpu|cpu instead)") as refused:
        pick_device(device)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 250


def test_auto_takes_what_is_there():
    expected = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert pick_device().type == pick_device("auto").type == expected
    assert pick_device("cpu") == torch.device("cpu")
