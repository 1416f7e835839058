"""The bench: everybody in every round, ratios to the first, and what the numbers depend on beside them."""

import json
import sys

import pytest
import torch

from erpe.bench.layers import SDPA, LayerShape, bench_layers, grid_of
from erpe.bench.packing import bench_packs
from erpe.bench.rounds import compete
from erpe.bench.train import bench_training
from erpe.errors import ConfigError

CPU = torch.device("cpu")
SMALL = LayerShape(heads=2, head_dim=8, features=8, batch_tokens=32)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("erpe.bench.rounds.LEAST_SECONDS", 0.0)


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
            assert [row["name"] for row in rows] == names and {row["batch"] for row in rows} == {batch}
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


@pytest.mark.parametrize(
    "what",
    [
        ("layer", "--tokens", "16", "--batch-tokens", "16"),
        ("train", "-d", "digits"),
        ("pack", "--pack", "1", "--pack", "2"),
    ],
)
def test_the_table_has_every_name(what, monkeypatch, capsys):
    from erpe import cli

    monkeypatch.setattr(sys, "argv", ["erpe", "bench", *what, "-v", "relu", "-v", "favor_rope", "--rounds", "2"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().out
    assert not ended.value.code and "relu" in said and "favor_rope" in said and "threads 1" in said
