"""Checkpoints: the very same model again, and nothing in them that could run."""

import errno
import json
import os
import pickle
import re
import subprocess

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from trials import tiny

from erpe.errors import StoreError
from erpe.model import build
from erpe.store import OWNER, STATE
from erpe.training.checkpoint import MODEL, load_model, load_tensors, save_model, save_tensors
from erpe.training.confirmation import final_evaluation
from erpe.training.data import load_training, normalise
from erpe.training.trial import Trial
from erpe.variants import VARIANTS


def refusal(make, *args) -> str:
    """The one line with which a checkpoint is refused."""
    with pytest.raises(StoreError) as refused:
        make(*args)
    text = str(refused.value)
    assert text and "\n" not in text
    return text


def random_model(config):
    """Every parameter random, those that start at zero too, and features that were drawn again."""
    model, generator = build(config.model, config.seed), torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn(parameter.shape, generator=generator) / 10
    model.redraw(generator)
    return model


@pytest.fixture
def saved(tmp_path):
    """The folder of a saved model."""
    config = tiny("favor_general")
    save_model(tmp_path, random_model(config), config)
    return tmp_path


@pytest.mark.parametrize("settings", [{}, {"model.pooling": "cls", "model.relu_projection": "orthogonal"}])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_reloaded_model_gives_identical_logits(tmp_path, variant, settings):
    config = tiny(variant, settings | {"model.dropout": 0.5, "model.drop_path": 0.5}, seed=5)
    images = normalise(load_training(config.data).train.pixels[:20], "digits")
    model = random_model(config)
    save_model(tmp_path, model.train(), config)
    again, found = load_model(tmp_path)
    assert found == config
    assert not again.training
    with torch.no_grad():
        torch.testing.assert_close(again(images), model.eval()(images), rtol=0, atol=0)


@pytest.mark.parametrize("variant", ["favor", "relu_circulant", "softmax_rope"])
def test_what_a_model_knows_beyond_its_parameters_is_saved(tmp_path, variant):
    settings = {"model.relu_projection": "orthogonal", "model.rope": "mixed"}
    first, second = (tiny(variant, settings, seed) for seed in (0, 1))
    save_model(tmp_path, build(first.model, first.seed), first)
    (tmp_path / "config.json").write_text(second.model_dump_json())
    again, _ = load_model(tmp_path)
    for name, tensor in build(first.model, first.seed).state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_tensors_and_facts_come_back_as_they_were(tmp_path):
    tensors = {
        "half": torch.randn(3, 4).bfloat16(),
        "turned": torch.randn(3, 4).T,
        "count": torch.tensor(7),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "none": torch.zeros(0),
        "learned": torch.randn(2, requires_grad=True),
    }
    facts = {"history": [{"val/loss": 1 / 3}], "text": "ü"}
    save_tensors(tmp_path / "new" / STATE, tensors, facts)
    found, read = load_tensors(tmp_path / "new" / STATE)
    assert read == facts and found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


# Damage


@pytest.mark.parametrize("keep", [0, 1, 8, 100, -1])
def test_a_truncated_model_is_one_line(saved, keep):
    path = saved / MODEL
    path.write_bytes(path.read_bytes()[:keep])
    assert str(path) in refusal(load_model, saved)


class Trap:
    """What unpickling it would run."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("write", [pickle.dump, torch.save], ids=["pickle", "torch"])
def test_a_pickle_in_place_of_a_model_is_refused_and_does_not_run(saved, write):
    with (saved / MODEL).open("wb") as file:
        write(Trap(saved / "sprung"), file)
    assert "damaged" in refusal(load_model, saved)
    assert not (saved / "sprung").exists()


@pytest.mark.parametrize("content", [b"text", b"\xff" * 64, b"\0" * 64, b"{}"])
def test_something_else_in_place_of_a_model_is_one_line(saved, content):
    (saved / MODEL).write_bytes(content)
    assert str(saved / MODEL) in refusal(load_model, saved)


def test_a_single_flipped_bit_of_a_weight_is_noticed(saved):
    content = bytearray((saved / MODEL).read_bytes())
    content[-100] ^= 1
    (saved / MODEL).write_bytes(content)
    assert "checksum" in refusal(load_model, saved)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"erpe": "{"}])
def test_tensors_of_somebody_else_are_one_line(saved, metadata):
    save_file({"weight": torch.zeros(2)}, saved / MODEL, metadata=metadata)
    assert str(saved / MODEL) in refusal(load_model, saved)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"1", b"\xff", b"{}", b'{"model": 1}'])
def test_a_damaged_configuration_is_one_line(saved, content):
    (saved / "config.json").write_bytes(content)
    assert "config.json" in refusal(load_model, saved)


def test_a_configuration_of_another_version_is_one_line(saved):
    config = json.loads((saved / "config.json").read_text())
    config["model"]["registers"] = 4
    (saved / "config.json").write_text(json.dumps(config))
    assert "registers: unknown key" in refusal(load_model, saved)


@pytest.mark.parametrize(
    "variant", [name for name in VARIANTS if name not in ("softmax_general", "relu_general", "favor_general")]
)
def test_weights_of_another_variant_are_one_line(saved, variant):
    (saved / "config.json").write_text(tiny(variant).model_dump_json())
    assert "its model has" in refusal(load_model, saved)


@pytest.mark.parametrize("name", [MODEL, "config.json"])
def test_a_missing_file_is_one_line(saved, name):
    (saved / name).unlink()
    assert str(saved / name) in refusal(load_model, saved)


# A disk that is full


@pytest.fixture(params=["told", "real"])
def small_disk(request, tmp_path, monkeypatch):
    """A folder and a function that fills its disk; told: the system says so, real: it is so."""
    if request.param == "told":

        def refuse(_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        yield tmp_path, lambda: monkeypatch.setattr(os, "fsync", refuse)
        return
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "erpe", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("a disk of our own takes root")
    try:
        yield folder, lambda: fill(folder / "filler")
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)  # loaded tensors still lie in its files


def fill(path):
    with pytest.raises(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def test_a_full_disk_leaves_the_old_file_whole(small_disk):
    folder, fill_up = small_disk
    path = folder / STATE
    save_tensors(path, {"weight": torch.zeros(10_000)}, {"epoch": 1})
    fill_up()
    text = refusal(save_tensors, path, {"weight": torch.ones(10_000)}, {"epoch": 2})
    assert str(folder) in text and "No space left on device" in text and "intact" in text
    tensors, facts = load_tensors(path)
    assert facts == {"epoch": 1} and not tensors["weight"].any()
    assert {file.name for file in folder.iterdir()} <= {STATE, "filler"}


@pytest.mark.parametrize("place", ["erpe.training.checkpoint.write_atomic", "erpe.training.trial_folder.write_atomic"])
def test_results_that_do_not_fit_are_one_line_and_the_trial_can_finish_later(tmp_path, monkeypatch, place):
    trial = Trial(tiny(settings={"train.epochs": 1}), tmp_path)
    trial.epoch()

    def refuse(path, _):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    monkeypatch.setattr(place, refuse)
    assert "No space left on device" in refusal(trial.finish)
    monkeypatch.undo()
    again = Trial(tiny(settings={"train.epochs": 1}), tmp_path)
    assert again.done
    assert again.finish()["val/accuracy"] == again.history[-1]["val/accuracy"]
    monkeypatch.setattr("erpe.training.evaluate.write_atomic", refuse)
    assert "attention.npz: cannot be written (No space left on device)" in refusal(final_evaluation, tmp_path)


# No pickle


def test_nothing_in_a_trial_folder_can_run_code(tmp_path):
    trial = Trial(tiny(settings={"train.epochs": 2, "train.ema": 0.9}), tmp_path)
    trial.epoch()
    assert check_files(tmp_path) == {STATE, OWNER}
    trial.epoch()
    trial.finish()
    final_evaluation(tmp_path)
    assert check_files(tmp_path) == {
        *(MODEL, "config.json", "outcome.json", "test.json", "attention.npz"),
        *("confusion.json", "confusion_test.json", "per_class.json", "predictions.npz"),
    }


def check_files(folder) -> set[str]:
    """The names of the files, each read as what it claims to be without unpickling."""
    for path in folder.rglob("*"):
        content = path.read_bytes()
        assert not re.match(rb"\x80[\x02-\x05][\x95}\](KX]", content), "a pickle"  # protocol, and a first opcode
        assert b".pkl" not in content, "a torch archive"
        if path.suffix == ".json":
            json.loads(content, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        elif path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                assert all(arrays[name].dtype != object for name in arrays)
        elif path.name == OWNER:
            assert re.fullmatch(rb"[0-9a-f]{32}", content)
        else:
            with safe_open(path, framework="pt") as file:
                json.loads(file.metadata()["erpe"])
    return {path.name for path in folder.rglob("*")}
