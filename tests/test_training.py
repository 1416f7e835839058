"""Training: decided by the seed, the same after any interruption, and honest about what goes wrong."""

import errno
import json
import math
import os
import shutil
import subprocess
import sys
import threading

import pytest
import torch
from safetensors.torch import load_file
from trials import curve, objective, tiny

from erpe import io
from erpe.errors import StoreError
from erpe.store import STATE
from erpe.training.checkpoint import MODEL, load_model, load_tensors, save_tensors
from erpe.training.data import load_training
from erpe.training.devices import pick_device
from erpe.training.loop import derive
from erpe.training.trial import Trial
from erpe.training.trial_folder import TakenOver

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


@pytest.mark.slow
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
    config, write = tiny("favor_rope", EVERYTHING), io.write_atomic

    def cut_off(path, content):
        if path.name == unwritten:
            raise KeyboardInterrupt
        write(path, content)

    for module in ("trial_folder", "checkpoint", "evaluate"):
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


@pytest.mark.slow
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


def test_beside_a_gpu_a_thread_saves_what_an_epoch_left_while_the_next_one_trains(tmp_path, monkeypatch):
    trial, go = Trial(tiny(), tmp_path), threading.Event()
    trial.files.beside = True
    monkeypatch.setattr("erpe.training.trial_folder.save_tensors", lambda *given: go.wait(60) and save_tensors(*given))
    trial.epoch()
    left = {name: x.clone() for name, x in trial.trainer.state().items()}
    trial.trainer.epoch(1)
    assert not (tmp_path / STATE).exists()
    go.set()
    trial.settle()
    saved, facts = load_tensors(tmp_path / STATE)
    assert len(facts["history"]) == 1 and all(torch.equal(saved[name], x) for name, x in left.items())
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    trial.epoch()
    with pytest.raises(StoreError, match="cannot be written"):
        trial.epoch()
    assert load_tensors(tmp_path / STATE)[1] == facts


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


@pytest.mark.slow
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


@pytest.mark.slow
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
