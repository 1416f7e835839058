"""Training: decided by the seed, the same after any interruption, and honest about what goes wrong."""

import errno
import json
import math
import os
import shutil
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from trials import curve, objective, tiny

from erpe.config import VARIANTS, TrainConfig
from erpe.errors import ConfigError, StoreError, TrialError
from erpe.model import ViT
from erpe.store import STATE
from erpe.training import trial as trials
from erpe.training.checkpoint import MODEL, load_model, save_tensors
from erpe.training.compilation import compiled
from erpe.training.data import load_training, normalise
from erpe.training.loop import derive, learning_rate, pick_device
from erpe.training.trial import TakenOver, Trial

CPU = torch.device("cpu")
EVERYTHING = {
    "model.dropout": 0.1,
    "model.drop_path": 0.1,
    "model.rope": "mixed",
    "model.relu_projection": "orthogonal",
    "data.augment": "standard",
    "data.mixup": 0.2,
    "data.cutmix": 1.0,
    "train.ema": 0.9,
    "train.redraw": 2,
    "data.train_limit": 150,
}
"""All options in which randomness or a state of their own hides; three steps an epoch."""


def train(config, folder, after_epoch=lambda trial: None) -> tuple[list[dict[str, float]], dict[str, float]]:
    """A whole trial: its curve, and its measures without those of the clock and the memory."""
    trial = Trial(config, folder)
    while not trial.done:
        trial.epoch()
        after_epoch(trial)
    return curve(trial.history), {k: v for k, v in trial.finish().items() if k.split("/")[0] not in ("time", "memory")}


def weights(folder):
    return load_file(folder / MODEL)


def assert_same(first, second):
    """Equal names, and tensors equal bit by bit."""
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


# The seed decides


SOME = ["favor_general", "favor_rope", "relu_circulant", "softmax_rope"]
"""Every attention, every encoding."""


@pytest.mark.parametrize("variant", SOME)
def test_the_same_seed_gives_the_same_curve_bit_by_bit(tmp_path, variant):
    config = tiny(variant, EVERYTHING | {"train.epochs": 2}, seed=3)
    torch.manual_seed(1)
    first = train(config, tmp_path / "first")
    torch.manual_seed(2)
    assert train(config, tmp_path / "second", lambda trial: torch.rand(7)) == first
    assert_same(weights(tmp_path / "first"), weights(tmp_path / "second"))


def test_trials_side_by_side_do_not_disturb_each_other(tmp_path):
    configs = [tiny(variant, EVERYTHING, seed) for seed, variant in enumerate(("favor_rope", "relu_general"))]
    alone = [train(config, tmp_path / config.model.variant)[0] for config in configs]
    together = [Trial(config, tmp_path / f"{config.model.variant}-2") for config in configs]
    for _ in range(3):
        for trial in together:
            trial.epoch()
    assert [curve(trial.history) for trial in together] == alone


def test_different_seeds_give_different_curves(tmp_path):
    curves = [train(tiny("relu", seed=seed), tmp_path / str(seed))[0] for seed in range(3)]
    assert len({json.dumps(found) for found in curves}) == 3


@pytest.mark.parametrize("variant", ["favor", "relu_circulant"])
def test_the_seed_reaches_weights_features_and_order(tmp_path, variant):
    first, second = (Trial(tiny(variant, seed=seed), tmp_path / str(seed)) for seed in (0, 1))
    for (name, x), y in zip(
        first.trainer.model.state_dict().items(), second.trainer.model.state_dict().values(), strict=True
    ):
        if name.endswith(("weight", "projection", "coefficients")) and "norm" not in name:
            assert not torch.equal(x, y), name
    assert recorded_rows(first)[0].tolist() != recorded_rows(second)[0].tolist()


def recorded_rows(trial, epochs=1):
    """The places of the images of each step."""
    rows, step = [], trial.trainer.step
    trial.trainer.step = lambda chosen, *rest: (rows.append(chosen), step(chosen, *rest))[1]
    for _ in range(epochs):
        trial.epoch()
    return rows


def test_each_epoch_sees_each_image_once_in_another_order(tmp_path):
    trial = Trial(tiny(), tmp_path)
    rows = recorded_rows(trial, epochs=2)
    assert [len(chosen) for chosen in rows] == [64, 64, 64, 64, 44] * 2
    first, second = torch.cat(rows[:5]), torch.cat(rows[5:])
    assert sorted(first.tolist()) == sorted(second.tolist()) == [*range(300)]
    assert first.tolist() != second.tolist()


def test_seeds_for_different_purposes_differ_and_stay():
    assert (
        len({derive(seed, use, epoch) for seed in range(9) for use in ("order", "augment") for epoch in range(9)})
        == 162
    )
    assert derive(0, "order", 0) == 14568928064228822
    assert all(0 <= derive(seed) < 2**56 for seed in range(99))


# Interruption


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The folder, curve and measures of trials that nobody stopped."""
    folders = {variant: tmp_path_factory.mktemp(variant) for variant in SOME}
    return {variant: (folder, *train(tiny(variant, EVERYTHING), folder)) for variant, folder in folders.items()}


@pytest.mark.parametrize("variant", SOME)
def test_a_trial_that_begins_anew_every_epoch_ends_bit_by_bit_where_it_would_have(tmp_path, uninterrupted, variant):
    config = tiny(variant, EVERYTHING)
    for epoch in range(3):
        trial = Trial(config, tmp_path)
        assert len(trial.history) == epoch
        torch.manual_seed(epoch)
        trial.epoch()
    folder, history, measures = uninterrupted[variant]
    assert train(config, tmp_path) == (history, measures)
    assert_same(weights(tmp_path), weights(folder))


@pytest.mark.parametrize("steps", [1, 3])
def test_an_epoch_that_was_cut_off_is_trained_again(tmp_path, uninterrupted, steps):
    config = tiny("favor_rope", EVERYTHING)

    def stop(done, _):
        if done == steps and trial.history:
            raise KeyboardInterrupt

    trial = Trial(config, tmp_path, on_step=stop)
    trial.epoch()
    with pytest.raises(KeyboardInterrupt):
        trial.epoch()
    folder, history, measures = uninterrupted["favor_rope"]
    assert train(config, tmp_path) == (history, measures)
    assert_same(weights(tmp_path), weights(folder))


@pytest.mark.parametrize("unwritten", ["config.json", "confusion.json", "attention.npz", "outcome.json"])
def test_a_trial_that_was_cut_off_while_it_wrote_its_results_finishes_again(
    tmp_path, uninterrupted, monkeypatch, unwritten
):
    config, write = tiny("favor_rope", EVERYTHING), trials.write_atomic

    def cut_off(path, content):
        if path.name == unwritten:
            raise KeyboardInterrupt
        write(path, content)

    for module in ("trial", "checkpoint", "evaluate"):
        monkeypatch.setattr(f"erpe.training.{module}.write_atomic", cut_off)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path)
    monkeypatch.undo()
    folder, history, measures = uninterrupted["favor_rope"]
    assert train(config, tmp_path) == (history, measures)
    assert_same(weights(tmp_path), weights(folder))
    assert not (tmp_path / STATE).exists()


# Checkpoints that are none


def damage_checkpoint(path, how):
    """Spoil the checkpoint of a trial in one of the ways in which it can be."""
    facts = {"config": tiny("favor_rope", EVERYTHING).model_dump_json(), "history": []}
    mine = load_file(path)
    if how.startswith("another"):
        other = Trial(tiny("relu", seed=1), path.parent.with_name("other"))
        other.epoch()
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("not a checkpoint")
    elif how == "another trial's":
        shutil.copy(other.folder / STATE, path)
    elif how == "another model's tensors":
        save_tensors(path, load_file(other.folder / STATE), facts)
    elif how == "no history":
        save_tensors(path, mine, {"config": facts["config"]})
    elif how == "no facts":
        save_tensors(path, mine, None)
    elif how == "a tensor missing":
        save_tensors(path, {name: x for name, x in mine.items() if "model.head" not in name}, facts)


@pytest.mark.parametrize(
    "how",
    [
        *("truncated", "empty", "text", "another trial's"),
        *("another model's tensors", "no history", "no facts", "a tensor missing"),
    ],
)
def test_a_damaged_checkpoint_is_set_aside_and_the_trial_begins_again(tmp_path, uninterrupted, how):
    config = tiny("favor_rope", EVERYTHING)
    folder = tmp_path / "trial"
    Trial(config, folder).epoch()
    damage_checkpoint(folder / STATE, how)
    content = (folder / STATE).read_bytes()
    again = Trial(config, folder)
    assert again.history == [] and not (folder / STATE).exists()
    assert again.warning is not None and "begins again" in again.warning and "\n" not in again.warning
    assert (folder / STATE).with_suffix(".damaged").read_bytes() == content
    assert train(config, folder) == uninterrupted["favor_rope"][1:]


@pytest.mark.parametrize("change", [{"train.lr": 1e-4}, {"model.depth": 1}, {"data.split_seed": 1}])
def test_a_checkpoint_of_another_configuration_is_not_taken_up(tmp_path, change):
    Trial(tiny(), tmp_path).epoch()
    assert Trial(tiny(settings=change), tmp_path).history == []


def test_a_full_disk_is_one_line_and_the_epoch_before_is_not_lost(tmp_path, uninterrupted, monkeypatch):
    config = tiny("relu_circulant", EVERYTHING)
    trial = Trial(config, tmp_path)
    trial.epoch()

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="No space left on device") as refused:
        trial.epoch()
    assert "\n" not in str(refused.value)
    monkeypatch.undo()
    assert len(Trial(config, tmp_path).history) == 1
    assert train(config, tmp_path) == uninterrupted["relu_circulant"][1:]


@pytest.mark.parametrize("epochs", [1, 3])
def test_who_wakes_up_when_another_one_trains_its_trial_writes_nothing(tmp_path, epochs):
    config = tiny()
    old, new = Trial(config, tmp_path), Trial(config, tmp_path)
    for _ in range(epochs):
        new.epoch()
    if new.done:
        new.finish()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(TakenOver, match="another process began to train this trial"):
        old.epoch()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# What goes wrong


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
    assert pick_device("cpu") == CPU


# What a step does


@pytest.mark.parametrize("warmup", [0, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("steps", [1, 2, 10, 1000])
def test_the_learning_rate_rises_to_its_peak_and_falls_to_nothing(warmup, steps):
    rates = [learning_rate(step, steps, TrainConfig(lr=0.5, warmup=warmup)) for step in range(steps)]
    rising = max(1, round(warmup * steps))
    assert rates[:rising] == pytest.approx([0.5 * (step + 1) / rising for step in range(rising)])
    assert max(rates) == rates[rising - 1] == 0.5
    assert all(later <= earlier for earlier, later in pairwise(rates[rising - 1 :]))
    assert all(rate > 0 for rate in rates)
    for step in range(rising, steps):
        part = (step - rising) / (steps - rising)
        assert rates[step] == pytest.approx(0.25 * (1 + math.cos(math.pi * part)))


def test_each_step_takes_its_learning_rate_over_all_epochs(tmp_path):
    trial, rates = Trial(tiny(settings={"train.warmup": 0.4}), tmp_path), []
    trial.trainer.optimiser.register_step_pre_hook(
        lambda optimiser, *_: rates.append({group["lr"] for group in optimiser.param_groups})
    )
    while not trial.done:
        trial.epoch()
    assert rates == [{learning_rate(step, 15, trial.config.train)} for step in range(15)]
    assert [epoch["lr"] for epoch in trial.history] == [max(rates[step]) for step in (4, 9, 14)]


POSITIONS = ("position", "cls", "encoding.bias", "cls_bias", "coefficients", "frequencies")


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_only_matrices_decay_never_positions_biases_and_norms(tmp_path, variant, pooling):
    settings = {"model.pooling": pooling, "model.rope": "mixed", "train.weight_decay": 0.5, "train.lr": 0.1}
    trainer = Trial(tiny(variant, settings), tmp_path).trainer
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.fill_(1)
    trainer.forward = lambda images: trainer.model(images) * 0  # a gradient of zero: only the decay moves
    trainer.step(torch.arange(8), 0.1, torch.Generator())
    for name, parameter in trainer.model.named_parameters():
        kept = name.startswith(POSITIONS) or name.endswith((*POSITIONS, ".bias")) or "norm" in name
        assert parameter.unique().item() == pytest.approx(1 if kept else 1 - 0.1 * 0.5), name


def gradient_norm(trainer):
    trainer.step(torch.arange(64), 1e-3, torch.Generator().manual_seed(0))
    return torch.stack([p.grad.norm() for p in trainer.model.parameters()]).norm().item()


def test_the_gradient_is_clipped_to_its_norm(tmp_path):
    free, loose, tight = (
        gradient_norm(Trial(tiny(settings={"train.clip_norm": norm}), tmp_path).trainer) for norm in (0, 1e6, 1e-3)
    )
    assert free == pytest.approx(loose) and free > 0.1
    assert tight == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_the_loss_is_the_cross_entropy_with_labels_smoothed(tmp_path, smoothing):
    trainer = Trial(tiny(settings={"train.label_smoothing": smoothing}), tmp_path).trainer
    with torch.no_grad():
        logits = trainer.model(normalise(trainer.images.pixels[:50], "digits"))
    log_p, labels = logits.log_softmax(1), trainer.images.labels[:50]
    expected = (1 - smoothing) * -log_p[torch.arange(50), labels].mean() - smoothing * log_p.mean()
    torch.testing.assert_close(trainer.step(torch.arange(50), 1e-3, torch.Generator()), expected)


def test_the_training_loss_is_the_mean_over_images_with_a_short_last_batch(tmp_path):
    trial, seen = Trial(tiny(), tmp_path), []
    step = trial.trainer.step

    def noted(rows, *rest):
        loss = step(rows, *rest)
        seen.append((len(rows), loss.item()))
        return loss

    trial.trainer.step = noted
    found = trial.epoch()["train/loss"]
    assert found == pytest.approx(sum(count * loss for count, loss in seen) / 300, rel=1e-6)
    assert found != pytest.approx(sum(loss for _, loss in seen) / len(seen), rel=1e-6)


def test_averaged_weights_follow_the_decay_and_are_the_model(tmp_path):
    trial = Trial(tiny("favor", {"train.ema": 0.7, "train.redraw": 2}), tmp_path)
    trainer, expected = trial.trainer, None
    step = trainer.step

    def followed(*given):
        nonlocal expected
        loss = step(*given)
        now = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        expected = now if expected is None else {name: 0.7 * expected[name] + 0.3 * now[name] for name in now}
        return loss

    trainer.step = followed
    found = trial.epoch()
    for name, parameter in trainer.final.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-5, atol=1e-7)
    for mine, averaged in zip(trainer.model.buffers(), trainer.final.buffers(), strict=True):
        assert torch.equal(mine, averaged)  # averages are taken of parameters; random features are the latest
    logits = trials.logits_of(trainer.final, trial.validation, "digits")
    assert found["val/loss"] == pytest.approx(cross_entropy(logits, trial.validation.labels).item(), rel=1e-5)
    while not trial.done:
        trial.epoch()
    trial.finish()
    assert_same(weights(tmp_path), trainer.final.state_dict())
    assert not torch.equal(trainer.model.head.weight, trainer.final.head.weight)


def test_features_are_drawn_again_at_their_steps_and_stay_in_evaluation(tmp_path):
    trial, seen = Trial(tiny("favor", {"train.redraw": 4}), tmp_path), []
    before = trial.trainer.model.blocks[0].attention.features.projection.clone()
    step = trial.trainer.step

    def noted(*given):
        seen.append(trial.trainer.model.blocks[0].attention.features.projection.clone())
        return step(*given)

    trial.trainer.step = noted
    trial.epoch()
    trial.epoch()
    assert torch.equal(seen[0], before)
    changed = [number for number in range(1, 10) if not torch.equal(seen[number], seen[number - 1])]
    assert changed == [4, 8]
    assert torch.equal(trial.trainer.model.blocks[0].attention.features.projection, seen[-1])


# Clean images for evaluation


@pytest.mark.parametrize("augment", ["standard", "rand", "trivial"])
def test_evaluation_sees_clean_images_and_training_varied_ones(tmp_path, augment):
    trial = Trial(tiny(settings={"data.augment": augment, "data.mixup": 1.0}), tmp_path)
    clean = {
        part: normalise(images.pixels, "digits") for part, images in zip(("train", "val"), trial.split, strict=False)
    }
    seen = {True: [], False: []}
    trial.trainer.model.register_forward_pre_hook(lambda model, given: seen[model.training].append(given[0].clone()))
    trial.epoch()
    assert torch.equal(torch.cat(seen[False]), clean["val"])
    trained = torch.cat(seen[True]).flatten(1)
    known = (trained[:, None] == clean["train"].flatten(1)).all(-1).any(1)
    assert len(trained) == 300 and known.sum() < 60
    seen[False].clear()
    trial.epoch()
    trial.finish()
    assert torch.equal(torch.cat(seen[False])[: 2 * len(clean["val"])], clean["val"].repeat(2, 1, 1, 1))


def test_the_images_of_the_data_set_are_not_written_to(tmp_path):
    before = load_training(tiny().data).train.pixels.clone()
    trial = Trial(tiny(settings={"data.augment": "rand", "data.mixup": 1.0, "data.cutmix": 1.0}), tmp_path)
    trial.epoch()
    assert torch.equal(trial.trainer.images.pixels, before)


def test_a_trial_never_asks_for_the_test_set(tmp_path, monkeypatch):
    def opened(*_):
        pytest.fail("the test set was opened")

    monkeypatch.setattr(trials, "load_test", opened)
    train(tiny(), tmp_path)


def test_without_a_validation_part_a_trial_trains_on_all_images(tmp_path):
    history, measures = train(tiny(settings={"data.validation": 0, "data.train_limit": None}), tmp_path)
    assert not any(name.startswith("val/") for name in [*history[0], *measures])
    assert trials.final_evaluation(tmp_path)["train/images"] == 1437


# Compilation


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


# The objective


def test_the_objective_reports_each_epoch_once_and_measures_at_the_end(tmp_path):
    reported, steps = [], []
    found = objective(
        tiny(), lambda epoch, measured: reported.append((epoch, measured)), tmp_path, on_step=lambda *x: steps.append(x)
    )
    assert [epoch for epoch, _ in reported] == [1, 2, 3]
    assert steps == [(done, 5) for done in (1, 2, 3, 4, 5)] * 3
    for epoch, measured in reported:
        assert measured["epoch"] == epoch
        keys = {"epoch", "train/loss", "lr", "time/epoch_seconds", "val/loss", "val/accuracy"}
        assert set(measured) == keys and all(map(math.isfinite, measured.values()))
    assert found["val/accuracy"] == reported[-1][1]["val/accuracy"]


def test_an_objective_that_is_asked_to_stop_stops_and_can_go_on(tmp_path):
    expected = objective(tiny(), lambda *_: False, tmp_path / "expected")
    seen = []
    assert objective(tiny(), lambda epoch, _: epoch == 2, tmp_path / "trial") is None
    found = objective(tiny(), lambda epoch, _: seen.append(epoch), tmp_path / "trial")
    assert seen == [1, 2, 3]
    assert found["val/loss"] == expected["val/loss"]


def test_who_is_asked_to_stop_after_the_last_epoch_has_finished(tmp_path):
    assert objective(tiny(), lambda epoch, _: epoch == 3, tmp_path)["val/accuracy"] > 0


def test_a_finished_trial_leaves_its_results_and_no_checkpoint(tmp_path):
    config = tiny()
    train(config, tmp_path)
    outcome = json.loads((tmp_path / "outcome.json").read_text())
    assert not (tmp_path / STATE).exists()
    split = load_training(config.data)
    assert (outcome["data_sha256"], outcome["split_sha256"]) == (split.digest, split.split_digest)
    assert (outcome["device"], outcome["threads"]) == (pick_device().type, str(torch.get_num_threads()))
    assert json.loads(outcome["config"]) == json.loads(config.model_dump_json())
    assert load_model(tmp_path)[1] == config


HEAP = """
import torch
from erpe.training.malloc import keep_heap

def heap_after_a_big_tensor():
    torch.ones(64 * 2**20, dtype=torch.uint8)
    lines = [line.split()[0].split("-") for line in open("/proc/self/maps") if "[heap]" in line]
    return sum(int(end, 16) - int(start, 16) for start, end in lines) // 2**20

before = heap_after_a_big_tensor()
keep_heap()
print(before, heap_after_a_big_tensor())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_the_memory_of_a_big_tensor_is_kept_for_the_next():
    said = subprocess.run([sys.executable, "-c", HEAP], capture_output=True, text=True, check=True).stdout
    before, after = map(int, said.split())
    assert after >= before + 60


def test_a_second_of_training_learns_digits(tmp_path):
    settings = {"data.train_limit": None, "train.epochs": 4, "train.lr": 5e-3, "model.width": 32}
    history, measures = train(tiny("relu_general", settings), tmp_path)
    losses = [epoch["train/loss"] for epoch in history]
    assert losses == sorted(losses, reverse=True)
    assert measures["val/accuracy"] > 0.7
