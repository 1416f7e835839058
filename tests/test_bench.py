"""The bench: everybody in every round, ratios to the first, and what the numbers depend on beside them."""

import json
import sys
from itertools import product

import pytest
import torch
from counters import count_with_torch
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._python_dispatch import TorchDispatchMode

from erpe.bench import device
from erpe.bench.layers import SDPA, LayerShape, bench_layers, contenders, grid_of, measured, step
from erpe.bench.memory import bounded, peak_bytes
from erpe.bench.models import bench_models
from erpe.bench.overhead import bench_overhead
from erpe.bench.packing import bench_packs
from erpe.bench.plot import costs_of_layers
from erpe.bench.precision import bench_precision
from erpe.bench.series import bench_series
from erpe.bench.tables import device_table, models_table, overhead_table
from erpe.bench.timing import compete
from erpe.bench.train import bench_training
from erpe.cli.report import written
from erpe.errors import ConfigError, StoreError
from erpe.model.kernels import cpu
from erpe.report.charts import write
from erpe.store import Store
from erpe.training.precision import bfloat16_unit
from erpe.variants import VARIANTS

CPU = torch.device("cpu")
SMALL = LayerShape(heads=2, head_dim=8, features=8, batch_tokens=32)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("erpe.bench.timing.LEAST_SECONDS", 0.0)


def test_rounds_are_interleaved_and_the_first_is_the_reference():
    order = []
    rows = compete({name: lambda name=name: order.append(name) for name in "abc"}, 4, CPU)
    # A call that builds, one that tells how long it takes, a round that warms up, and those that count.
    assert order == [*"aabbcc"][::2] + [*"abc"] * 6
    assert [row["name"] for row in rows] == [*"abc"] and rows[0]["ratio"] == 1
    assert all(0 < row["low"] <= row["ms"] <= row["high"] and row["n"] == 4 for row in rows)


def test_every_layer_is_timed_at_every_size_in_both_passes():
    found = bench_layers(["relu", "favor_general", "softmax_rope"], [16, 12], SMALL, rounds=2, device=CPU)
    names = [SDPA, f"{SDPA}, bias", "relu", "favor_general", "softmax_rope"]
    for tokens, batch in ((16, 2), (12, 2)):
        for what in ("forward", "step"):
            rows = [row for row in found["rows"] if (row["tokens"], row["pass"]) == (tokens, what)]
            assert [row["name"] for row in rows][: len(names)] == names and {row["batch"] for row in rows} == {batch}
    assert found["machine"]["heads"] == 2 and found["machine"]["threads"] == torch.get_num_threads()
    json.dumps(found)


@pytest.mark.parametrize(("tokens", "grid"), [(64, (8, 8)), (49, (7, 7)), (128, (8, 16)), (13, (1, 13)), (1, (1, 1))])
def test_a_number_of_tokens_is_a_grid_as_square_as_it_can_be(tokens, grid):
    assert grid_of(tokens) == grid


def test_no_tokens_are_refused():
    with pytest.raises(ConfigError, match="tokens: 0 given"):
        bench_layers(["relu"], [0], SMALL, rounds=2, device=CPU)


def test_training_is_timed_against_a_bare_loop():
    found = bench_training(["relu_rope"], "digits", rounds=2, settings={"model.width": 16, "model.depth": 1})
    assert [row["name"] for row in found["rows"]] == ["nn.TransformerEncoder, bare loop", "relu_rope"]


def test_packs_are_timed_by_the_trial():
    found = bench_packs(["relu", "softmax"], "digits", [1, 3], rounds=2, settings={"model.width": 16, "model.depth": 1})
    assert [(row["name"], row["pack"]) for row in found["rows"]] == [
        ("relu, alone", 1), ("relu, 3 in a pack", 3), ("softmax, alone", 1), ("softmax, 3 in a pack", 3),
    ]  # fmt: skip
    for row in found["rows"]:
        # 1,222 images in batches of 64, 30 times
        assert row["trials_per_hour"] == pytest.approx(3.6e6 / (row["ms"] * 30 * 20))
    assert found["rows"][2]["ratio"] == 1
    with pytest.raises(ConfigError, match="pack: 0 given"):
        bench_packs(["relu"], "digits", [0])


def test_a_series_of_all_terms_has_no_error_and_of_one_some():
    found = bench_series(["relu_general"], [16], [1, 1000], SMALL, rounds=2, device=CPU)
    errors = {(row["pass"], row["rank"]): row["error"] for row in found["rows"] if row["name"] != SDPA}
    assert errors["step", None] == 0 and errors["step", 1000] < 1e-5 < 0.05 < errors["step", 1]
    with pytest.raises(ConfigError, match="relu has no series; relu_general and favor_general have one"):
        bench_series(["relu"], [16], [1], SMALL, rounds=2, device=CPU)


TINY = ("--set", "model.width=16", "--set", "model.depth=1", "--set", "train.batch=8")
SIZES = {
    "layer": ("--tokens", "16", "--batch", "2", "--figure", "x.svg"),
    "train": ("-d", "digits", *TINY),
    "model": ("-d", "digits", *TINY),
    "precision": ("-d", "digits", *TINY),
    "pack": ("--pack", "1", "--pack", "2", *TINY),
    "series": ("--tokens", "16", "--rank", "3", "--batch-tokens", "16"),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", SIZES)
def test_the_table_has_every_name(what, monkeypatch, capsys, tmp_path):
    from erpe.cli import app

    monkeypatch.chdir(tmp_path)
    names = ("relu_general", "favor_general") if what == "series" else ("relu", "favor_rope")
    words = [what, *SIZES[what], *(word for name in names for word in ("-v", name)), "--rounds", "2"]
    monkeypatch.setattr(sys, "argv", ["erpe", "bench", *words])
    with pytest.raises(SystemExit) as ended:
        app.main()
    said = capsys.readouterr().out
    assert not ended.value.code and all(name in said for name in names) and "threads 1" in " ".join(said.split())
    assert [path.name for path in tmp_path.iterdir()] == (["x.svg"] if what == "layer" else [])


def test_memory_is_counted_to_the_byte_also_what_is_let_go_before_the_end():
    def call():
        kept = torch.zeros(1000)
        torch.ones(3000)
        kept.add_(torch.ones(500).sum())

    assert peak_bytes(call, CPU) == 4 * 4000


def test_memory_that_lives_before_is_not_counted():
    before = torch.zeros(5000)
    assert peak_bytes(lambda: before.mul_(before), CPU) == 0


def test_a_layer_without_room_is_left_out_and_named():
    def too_much():
        torch.empty(2**50)

    calls = {"small": lambda: torch.ones(10), "great": too_much, "other": lambda: torch.ones(20)}
    with bounded(CPU):
        rows = measured({name: (lambda call=call: call) for name, call in calls.items()}, 2, CPU)
    assert [(row["name"], row["n"]) for row in rows] == [("small", 2), ("great", 0), ("other", 2)]
    assert rows[1]["ms"] is None and rows[2]["peak_mib"] == pytest.approx(80 / 2**20, abs=1e-9)


def test_a_mistake_in_a_layer_is_not_taken_for_want_of_room():
    def wrong():
        torch.ones(2) @ torch.ones(3)

    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        measured({"wrong": lambda: wrong}, 2, CPU)


LINEAR = [f"{attention}{encoding}" for attention in ("relu", "favor") for encoding in ("", "_rope", "_circulant")]
QUADRATIC = ["softmax_general", "relu_general", "favor_general"]


def cost_at(variant, tokens):
    """FLOPs, bytes at the peak and entries of the greatest tensor of a training step over N tokens."""
    shape = LayerShape(heads=2, head_dim=16, features=16, batch=1)
    layer = contenders([variant], tokens, shape, CPU, torch.float32, method="dense")[variant]()
    inputs = torch.randn(3, 1, 2, tokens, 16, generator=torch.Generator().manual_seed(0))
    flops = count_with_torch(lambda q: layer(q, *inputs[1:]), inputs[0].clone().requires_grad_(), backward=True)
    call = step(layer, *inputs)
    call()
    with Greatest() as greatest:
        call()
    return flops, peak_bytes(call, CPU), greatest.entries


class Greatest(TorchDispatchMode):
    """Notes the greatest tensor that any operator makes."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.entries = max(self.entries, tensor.untyped_storage().nbytes() // tensor.element_size())
        return made


@pytest.mark.parametrize("variant", LINEAR)
def test_linear_attention_grows_linearly_and_makes_no_tensor_of_tokens_squared(variant):
    small, great = cost_at(variant, 1024), cost_at(variant, 4096)
    for before, after in zip(small, great, strict=True):
        assert after < 4.5 * before
    assert great[2] < 4096**2 / 32


@pytest.mark.slow
@pytest.mark.parametrize("variant", QUADRATIC)
def test_a_general_encoding_that_is_dense_grows_quadratically_in_time_and_linearly_in_memory(variant, monkeypatch):
    small, great = cost_at(variant, 1024), cost_at(variant, 4096)
    assert great[0] > 12 * small[0]
    if cpu.LIBRARY and variant != "softmax_general":
        assert great[1] < 4.5 * small[1]
    # Without the kernels, what torch keeps of the pairs is the memory of few tokens.
    monkeypatch.setattr(cpu, "LIBRARY", None)
    small, great = cost_at(variant, 64), cost_at(variant, 256)
    assert great[1] > 8 * small[1] and great[2] >= 256**2


def test_models_are_timed_against_softmax_attention():
    small = {"model.width": 16, "model.depth": 1, "train.batch": 8}
    found = bench_models(["relu_rope", "softmax"], "digits", rounds=2, settings=small, device="cpu")
    assert [(row["pass"], row["name"]) for row in found["rows"]] == [
        (what, name) for what in ("forward", "step") for name in ("softmax", "relu_rope")
    ]
    for row in found["rows"]:
        assert row["images_per_second"] * row["ms"] == pytest.approx(8000)
    assert found["rows"][0]["ratio"] == 1 and found["machine"]["width"] == 16
    models_table(found)
    json.dumps(found)


def test_both_precisions_of_every_variant_are_timed_in_the_same_rounds():
    small, some = {"model.width": 16, "model.depth": 1, "train.batch": 8}, VARIANTS[::4]
    found = bench_precision([*some], ["digits", "mnist"], rounds=2, settings=small, device="cpu")
    keys = [(row["dataset"], row["variant"], row["precision"]) for row in found["rows"]]
    assert keys == [*product(("digits", "mnist"), some, ("float32", "bfloat16"))]
    for row, other in zip(found["rows"][::2], found["rows"][1::2], strict=True):
        assert row["ratio"] == 1 and other["ratio"] == pytest.approx(other["ms"] / row["ms"])
        assert row["images_per_second"] * row["ms"] == pytest.approx(8000)
        assert 0 < other["low"] <= other["ms"] <= other["high"] and other["n"] == 2
    assert found["machine"].items() >= {"threads": 1, "bfloat16": bfloat16_unit(CPU) or "none", **small}.items()
    json.dumps(found)


def test_each_precision_is_trained_in():
    seen = []

    def note(module, given, out):
        if isinstance(module, torch.nn.Linear):
            seen.append(out.dtype)

    with register_module_forward_hook(note):
        bench_precision(["relu"], ["digits"], rounds=1, settings={"model.depth": 1, "train.batch": 8}, device="cpu")
    counts = [seen.count(dtype) for dtype in (torch.float32, torch.bfloat16)]
    assert counts[0] == counts[1] == len(seen) / 2 > 0
    with pytest.raises(ConfigError, match=r"train.precision is what is compared"):
        bench_precision(["relu"], ["digits"], settings={"train.precision": "float32"})


def row(name, tokens, what, ms, mib):
    return {"name": name, "tokens": tokens, "batch": 4096 // tokens, "pass": what, "ms": ms, "low": ms, "high": ms,
            "ratio": 1.0, "n": 3, "peak_mib": mib}  # fmt: skip


@pytest.mark.slow
def test_the_figure_names_where_a_layer_overtakes(tmp_path):
    rows = []
    for n in (64, 256, 1024):
        for what in ("forward", "step"):
            rows += [row(SDPA, n, what, n / 64, 1.0), row(f"{SDPA}, bias", n, what, n / 32, n / 32)]
            rows += [row("relu", n, what, 2.0, 2.0), row("softmax_rope", n, what, n / 60, 2.0)]
    rows[-2] |= {"n": 0, "ms": None, "peak_mib": None}
    found = {"machine": {}, "rows": rows}
    write(costs_of_layers(found), tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    assert "faster from N =" in text and "<!-- 128 -->" in text and "<!-- softmax_rope -->" in text
    write(costs_of_layers(found), tmp_path / "b.svg")
    assert (tmp_path / "b.svg").read_text() == text
    with pytest.raises(StoreError, match="cannot be written"):
        written(missing := tmp_path / "none/a.png", lambda: write(costs_of_layers(found), missing))


@pytest.mark.slow
def test_overhead_tells_trials_from_epochs_on_every_stack(monkeypatch):
    monkeypatch.setattr("erpe.bench.overhead.TRIALS", 2)
    monkeypatch.setattr("erpe.bench.overhead.EPOCHS", 2)
    found = bench_overhead(rounds=1)
    assert [row["name"] for row in found["rows"]] == ["bare loop", "+ Optuna", "+ tracker", "+ MLflow", "+ Ray"]
    bare, *others = found["rows"]
    assert all(row["trial_ms"] > bare["trial_ms"] and row["n"] == 1 for row in others)
    overhead_table(found)
    json.dumps(found)


def test_a_graph_and_a_backend_are_chosen_by_their_times_and_kept_for_trials_of_that_device(tmp_path, monkeypatch):
    monkeypatch.setattr(device, "STEPS", 2)
    monkeypatch.setattr(device, "FASTER", 0.5)
    monkeypatch.setattr(device, "compete", lambda calls, *rest: [
        call() or {"name": name, "ms": 2.0, "low": 2.0, "high": 2.0, "n": 1, "ratio": 0.4 if "relu, 2" in name else 0.6}
        for name, call in calls.items()
    ])  # fmt: skip
    settings = {"model.width": 16, "model.depth": 1, "train.batch": 8, "train.precision": "float32"}
    found = device.bench_device(["relu", "favor"], "digits", 2, settings=settings, device="cpu", graphs=Kept())
    assert found["chosen"]["step"] == [] and found["chosen"]["pack"] == ["relu"]
    assert found["chosen"]["backends"].keys() == {f"N = 16, D = 4, float32{more}" for more in ("", ", log-weights")}
    store = Store.open(tmp_path)
    store.keep_device("cpu", found["chosen"])
    store.keep_device("Card", {"step": ["favor"], "pack": [], "backends": {}})
    assert store.devices["cpu"] == found["chosen"] and store.devices["Card"]["step"] == ["favor"]
    device_table(found)
    with pytest.raises(ConfigError, match="one way only; use a GPU"):
        device.bench_device(["relu"], "digits", device="cpu")


class Kept:
    """In the place of CUDA's graphs: what is captured is called again."""

    def warm_up(self, call):
        call()

    def capture(self, call, generators):
        result = call()
        return lambda: result.copy_(call()), result
