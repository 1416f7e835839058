"""Measures of a trained model, against hand-computed examples, scikit-learn and a clock that we turn."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn import metrics
from torch.nn.functional import cross_entropy
from trials import tiny

from erpe.errors import StoreError
from erpe.model import build
from erpe.training import confirmation, evaluate
from erpe.training.checkpoint import load_model
from erpe.training.confirmation import final_evaluation
from erpe.training.data import Images, load_test, load_training, normalise
from erpe.training.evaluate import (
    confusion,
    inference_time,
    information_criteria,
    logits_of,
    peak_memory_mib,
    per_class,
    reset_peak_memory,
    save_attention_example,
    scores,
    seconds_per_epoch,
)
from erpe.training.trial import Trial

CPU = torch.device("cpu")


def digits(count=50):
    return Images(*(part[:count] for part in load_training(tiny().data).validation))


@pytest.fixture
def model():
    """Untrained, with dropout and stochastic depth, left in training mode."""
    return build(tiny("favor_rope", {"model.dropout": 0.5, "model.drop_path": 0.5}).model).train()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished trial, its measures and those of the final evaluation."""
    folder = tmp_path_factory.mktemp("trial")
    trial = Trial(tiny("relu_general"), folder)
    while not trial.done:
        trial.epoch()
    return folder, trial.finish(), final_evaluation(folder)


# Predictions


def test_scores_of_a_small_example_are_those_of_a_pencil():
    shares = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.7, 0.2, 0.1], [0.2, 0.2, 0.6], [0.25, 0.5, 0.25]])
    labels = torch.tensor([0, 1, 1, 2, 2])  # predicted: 0 1 0 2 1
    found = scores(shares.log(), labels, "test")
    likelihood = math.log(0.5) + math.log(0.8) + math.log(0.2) + math.log(0.6) + math.log(0.25)
    assert found["test/log_likelihood"] == pytest.approx(likelihood, rel=1e-6)
    assert found["test/loss"] == pytest.approx(-likelihood / 5, rel=1e-6)
    assert found["test/accuracy"] == 3 / 5
    precision, recall = (1 / 2, 1 / 2, 1), (1, 1 / 2, 1 / 2)
    assert found["test/precision"] == pytest.approx(np.mean(precision))
    assert found["test/recall"] == pytest.approx(np.mean(recall))
    assert found["test/f1"] == pytest.approx(
        np.mean([2 * p * r / (p + r) for p, r in zip(precision, recall, strict=True)])
    )


def test_scores_are_those_of_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(300, 10, generator=generator)
    labels = torch.randint(10, (300,), generator=generator)
    logits[torch.arange(150), labels[:150]] += 3
    found, predicted = scores(logits, labels, "val"), logits.argmax(1)
    assert found["val/accuracy"] == pytest.approx(metrics.accuracy_score(labels, predicted))
    for name, score in (
        ("precision", metrics.precision_score),
        ("recall", metrics.recall_score),
        ("f1", metrics.f1_score),
    ):
        assert found[f"val/{name}"] == pytest.approx(score(labels, predicted, average="macro"))
    assert found["val/loss"] == pytest.approx(metrics.log_loss(labels, logits.softmax(1).numpy()), rel=1e-5)


def test_a_class_that_is_never_predicted_counts_as_zero():
    found = scores(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1]), "test")
    assert (found["test/precision"], found["test/recall"]) == (0.25, 0.5)


def test_a_likelihood_beyond_float32_is_finite():
    found = scores(torch.tensor([[3e38, -3e38], [-200.0, 200.0]]), torch.tensor([1, 0]), "test")
    assert found["test/log_likelihood"] == pytest.approx(-6e38, rel=1e-6)


def test_the_confusion_matrix_counts_true_rows_and_predicted_columns():
    logits = torch.eye(10)[[3, 3, 5, 7]]
    found = confusion(logits, torch.tensor([3, 5, 5, 0]), "mnist", "test")
    expected = np.zeros((10, 10), int)
    expected[3, 3], expected[5, 3], expected[5, 5], expected[0, 7] = 1, 1, 1, 1
    assert found == {"split": "test", "classes": [*"0123456789"], "matrix": expected.tolist()}


def test_classes_are_reported_by_name_even_those_that_do_not_occur():
    found = per_class(torch.eye(10)[[0, 0, 1]], torch.tensor([0, 1, 1]), "cifar10")
    assert found["airplane"] == {"precision": 0.5, "recall": 1.0, "f1-score": pytest.approx(2 / 3), "support": 1}
    assert found["automobile"]["recall"] == 0.5 and found["truck"]["support"] == 0


def test_information_criteria_are_those_of_their_definitions():
    found = information_criteria(-120.0, 7, 50)
    assert found == {"aic": 2 * 7 + 240, "bic": pytest.approx(7 * math.log(50) + 240), "train/images": 50}


# Logits


def test_logits_are_those_of_clean_images_in_evaluation_mode(model):
    images = digits()
    found = logits_of(model, images, "digits")
    assert found.dtype == torch.float32 and not found.requires_grad
    assert not model.training
    with torch.no_grad():
        torch.testing.assert_close(found, model(normalise(images.pixels, "digits")))
    torch.testing.assert_close(found, logits_of(model.train(), images, "digits"), rtol=0, atol=0)


@pytest.mark.parametrize("batch", [1, 7, 49, 50, 51])
def test_a_short_last_batch_weighs_no_more_than_its_images(model, monkeypatch, batch):
    images = digits()
    whole = scores(logits_of(model, images, "digits"), images.labels, "val")
    monkeypatch.setattr(evaluate, "FULL_BATCH", batch)
    assert scores(logits_of(model, images, "digits"), images.labels, "val") == pytest.approx(whole, rel=1e-5)


# Cost


def test_inference_is_timed_between_waits_for_the_device_without_preparing_images(model, monkeypatch):
    """A clock that turns when something is done: a second for an image normalised, a millisecond for one seen."""
    now, events, batches = [0.0], [], []

    def clock():
        events.append("clock")
        return now[0]

    def forward(_, inputs):
        events.append("model")
        batches.append(len(inputs[0]))
        now[0] += 1e-3 * len(inputs[0])

    def prepare(pixels, dataset):
        now[0] += len(pixels)
        return normalise(pixels, dataset)

    monkeypatch.setattr(evaluate, "time", SimpleNamespace(perf_counter=clock))
    monkeypatch.setattr(evaluate, "normalise", prepare)
    monkeypatch.setattr(evaluate, "wait_for", lambda device: events.append("wait"))
    model.register_forward_pre_hook(forward)
    found = inference_time(model, digits(), "digits", repeats=5)
    assert found == pytest.approx(
        {
            "time/inference_batch": 50,
            "time/inference_ms_per_image": 1,
            "time/inference_ms_per_image_p95": 1,
            "time/inference_ms_batch1": 1,
            "time/inference_ms_batch1_p95": 1,
        }
    )
    turn = ["wait", "clock", "model", "wait"]
    assert events == 2 * (3 * turn + 5 * [*turn, "clock"])
    assert batches == [50] * 8 + [1] * 8


def test_times_are_the_median_and_the_95th_percentile_after_warm_up(model, monkeypatch):
    def turns(*milliseconds):
        return [9e9] * 3 + [x for duration in milliseconds for x in (0.0, duration / 1000)]

    clock = iter(turns(*range(1, 101)) + turns(*range(101, 201)))
    monkeypatch.setattr(evaluate, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    found = inference_time(model, digits(1), "digits", repeats=100)
    assert found["time/inference_ms_per_image"] == pytest.approx(50.5)
    assert found["time/inference_ms_per_image_p95"] == pytest.approx(95.05)
    assert found["time/inference_ms_batch1"] == pytest.approx(150.5)


@pytest.mark.parametrize(("device", "sizes"), [("cpu", [256, 256, 88]), ("meta", [600])])
def test_other_devices_than_cpus_get_larger_batches(model, device, sizes):
    seen = []

    def forward(batch):
        seen.append(len(batch))
        return torch.zeros(len(batch), 10)

    pixels = torch.zeros(600, 1, 8, 8, dtype=torch.uint8, device=device)
    logits_of(model, Images(pixels, torch.zeros(600, dtype=torch.int64)), "digits", forward)
    assert seen == sizes


def test_real_times_are_positive_and_ordered(model):
    found = inference_time(model, digits(), "digits", repeats=5)
    for name in ("time/inference_ms_per_image", "time/inference_ms_batch1"):
        assert 0 < found[name] <= found[f"{name}_p95"]


def test_seconds_an_epoch_are_the_median_without_the_first():
    def history(*seconds):
        return [{"time/epoch_seconds": x} for x in seconds]

    assert seconds_per_epoch(history(100, 1, 3, 2, 9)) == 2.5
    assert seconds_per_epoch(history(5)) == 5


def test_evaluation_is_not_in_the_seconds_of_an_epoch(monkeypatch, tmp_path):
    now, measure = [0.0], evaluate.logits_of

    def slow(*given):
        now[0] += 1000
        return measure(*given)

    monkeypatch.setattr("erpe.training.loop.time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr("erpe.training.evaluate.logits_of", slow)

    def tick(done, steps):
        now[0] += 1

    trial = Trial(tiny(), tmp_path, on_step=tick)
    assert trial.epoch()["time/epoch_seconds"] == trial.trainer.steps == 5


@pytest.mark.skipif(not evaluate.Path("/proc/self/clear_refs").exists(), reason="only Linux can forget a peak")
def test_peak_memory_sees_what_was_used_since_it_was_reset():
    reset_peak_memory(CPU)
    before = peak_memory_mib(CPU)
    torch.ones(64 * 2**20 // 4)
    peak = peak_memory_mib(CPU)
    assert 50 < peak - before < 200
    reset_peak_memory(CPU)
    assert peak_memory_mib(CPU) < peak - 40


# A whole trial

CHEAP = {
    *(f"val/{name}" for name in ("accuracy", "loss", "precision", "recall", "f1", "log_likelihood")),
    *("params", "flops/forward", "flops/train_step", "time/train_seconds_per_epoch", "memory/peak_mib"),
}
FINAL = {
    *(f"test/{name}" for name in ("accuracy", "loss", "precision", "recall", "f1", "log_likelihood")),
    *("train/log_likelihood", "train/images", "aic", "bic", "params", "flops/forward", "flops/train_step"),
    *("time/inference_batch", "time/inference_ms_per_image", "time/inference_ms_per_image_p95"),
    *("time/inference_ms_batch1", "time/inference_ms_batch1_p95"),
}


def test_every_measure_of_the_table_is_there_and_finite(finished):
    _, cheap, final = finished
    assert set(cheap) == CHEAP and set(final) == FINAL
    for name, value in (cheap | final).items():
        assert math.isfinite(value), name
        if name.split("/")[-1] in ("accuracy", "precision", "recall", "f1"):
            assert 0 <= value <= 1
        elif "likelihood" in name:
            assert value < 0
        else:
            assert value > 0, name


def test_measures_are_those_of_the_saved_model(finished):
    folder, cheap, final = finished
    model, config = load_model(folder)
    split, test = load_training(config.data), load_test("digits")
    likelihood = {}
    for name, images in (("train", split.train), ("val", split.validation), ("test", test)):
        with torch.no_grad():
            logits = model(normalise(images.pixels, "digits"))
        likelihood[name] = -cross_entropy(logits.double(), images.labels, reduction="sum").item()
        found = final if name != "val" else cheap
        assert found[f"{name}/log_likelihood"] == pytest.approx(likelihood[name], rel=1e-5)
    k = sum(parameter.numel() for parameter in model.parameters())
    assert final["params"] == cheap["params"] == k
    assert final["train/images"] == len(split.train.labels) == 300
    assert final["aic"] == pytest.approx(2 * k - 2 * likelihood["train"], rel=1e-6)
    assert final["bic"] == pytest.approx(k * math.log(300) - 2 * likelihood["train"], rel=1e-6)


def test_random_features_are_no_parameters(tmp_path):
    few, many = (build(tiny("favor", {"model.features": m}).model) for m in (8, 80))
    count = [sum(p.numel() for p in model.parameters()) for model in (few, many)]
    assert count[0] == count[1]


def test_what_is_written_beside_the_measures_agrees_with_them(finished):
    folder, cheap, final = finished
    read = confirmation.json.loads
    test = read((folder / "test.json").read_text())
    assert test == final
    outcome = read((folder / "outcome.json").read_text())
    assert outcome["metrics"] == cheap and len(outcome["history"]) == 3
    assert outcome["history"][-1]["val/accuracy"] == cheap["val/accuracy"]
    for name, split, count in (("confusion.json", "val", 216), ("confusion_test.json", "test", 360)):
        matrix = np.array(read((folder / name).read_text())["matrix"])
        assert matrix.sum() == count
        assert np.trace(matrix) / count == pytest.approx((cheap | final)[f"{split}/accuracy"])
    assert read((folder / "per_class.json").read_text())["macro avg"]["f1-score"] == pytest.approx(final["test/f1"])


def test_two_evaluations_differ_in_time_alone(finished):
    folder, _, first = finished
    second = final_evaluation(folder)
    assert {x: first[x] for x in FINAL if "time/" not in x} == {x: second[x] for x in FINAL if "time/" not in x}


@pytest.mark.parametrize(("patch", "heads"), [(2, 2), (4, 2)])
def test_the_attention_example_is_plain_arrays_whose_rows_sum_to_one(tmp_path, patch, heads):
    model = build(tiny("softmax_general", {"model.patch": patch}).model)
    save_attention_example(tmp_path / "attention.npz", model, digits(), "digits")
    tokens = (8 // patch) ** 2
    with np.load(tmp_path / "attention.npz", allow_pickle=False) as found:
        assert found["maps"].shape == (2, heads, tokens, tokens)
        np.testing.assert_allclose(found["maps"].astype(float).sum(-1), 1, atol=2e-2)
        np.testing.assert_array_equal(found["image"], digits().pixels[0].numpy().astype(np.float32) / 255)
        assert found["grid"].tolist() == [8 // patch] * 2


def test_long_sequences_keep_one_averaged_head(tmp_path):
    config = tiny("relu").model.model_copy(update={"image": (1, 34, 34)})
    images = Images(torch.zeros(1, 1, 34, 34, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64))
    save_attention_example(tmp_path / "attention.npz", build(config), images, "digits")
    with np.load(tmp_path / "attention.npz", allow_pickle=False) as found:
        assert found["maps"].shape == (2, 1, 289, 289)


def test_a_missing_model_is_one_line(tmp_path):
    with pytest.raises(StoreError, match=r"config.json: cannot be read") as refused:
        final_evaluation(tmp_path)
    assert "\n" not in str(refused.value)
