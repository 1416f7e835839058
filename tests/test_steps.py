"""A step of training: rate, decay, clipping, loss, averages, features; and clean images for evaluation."""

import math
from itertools import pairwise

import pytest
import torch
from test_training import assert_same, train, weights
from torch.nn.functional import cross_entropy
from trials import tiny

from erpe.config import TrainConfig
from erpe.training import confirmation, evaluate
from erpe.training.data import load_training, normalise
from erpe.training.loop import learning_rate
from erpe.training.trial import Trial
from erpe.variants import VARIANTS


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
    trainer.step(torch.arange(8), 0.1)
    for name, parameter in trainer.model.named_parameters():
        kept = name.startswith(POSITIONS) or name.endswith((*POSITIONS, ".bias")) or "norm" in name
        assert parameter.unique().item() == pytest.approx(1 if kept else 1 - 0.1 * 0.5), name


def gradient_norm(trainer):
    trainer.step(torch.arange(64), 1e-3)
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
    torch.testing.assert_close(trainer.step(torch.arange(50), 1e-3), expected)


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
    logits = evaluate.logits_of(trainer.final, trial.validation, "digits")
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

    monkeypatch.setattr(confirmation, "load_test", opened)
    train(tiny(), tmp_path)


def test_without_a_validation_part_a_trial_trains_on_all_images(tmp_path):
    history, measures = train(tiny(settings={"data.validation": 0, "data.train_limit": None}), tmp_path)
    assert not any(name.startswith("val/") for name in [*history[0], *measures])
    assert confirmation.final_evaluation(tmp_path)["train/images"] == 1437
