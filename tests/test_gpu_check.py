"""The script for a GPU that is at hand for ten minutes: it ends by the clock, keeps what it has, hides no failure."""

import json
import re
import sys
import time
from pathlib import Path

import pytest
import torch

from erpe.bench import gpu_check, gpu_errors, gpu_parts
from erpe.bench.gpu_check import FILE, Asked, check, failures, guarded, main, table
from erpe.model.kernels import gpu
from erpe.variants import VARIANTS

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]


def parts(monkeypatch, *units, until=1.0):
    monkeypatch.setattr(gpu_parts, "PARTS", {"correctness": (lambda device, small, data: iter(units), until)})


def checked(folder, minutes=9):
    return check(folder, CPU, Asked(minutes, True, time.monotonic()))


@pytest.mark.slow
def test_a_small_run_measures_every_part_and_finds_nothing_wrong(tmp_path, monkeypatch):
    monkeypatch.setattr("erpe.bench.timing.LEAST_SECONDS", 0.0)
    found = checked(tmp_path)
    assert all(found[part] for part in gpu_parts.PARTS) and not failures(found)
    assert {row["variant"] for row in found["epoch"]} == set(VARIANTS)
    assert json.loads((tmp_path / FILE).read_text()) == found
    assert "yardstick: 12 variants x 5 seeds" in table(found) and table(found).endswith(" s")


def test_what_fails_is_a_finding_and_the_rest_is_measured(tmp_path, monkeypatch):
    def broken():
        raise RuntimeError("no kernel image\nis available")

    parts(monkeypatch, ("a", broken), ("b", lambda: {"kind": "x", "ok": False}), ("c", lambda: {"ok": True}))
    said = table(checked(tmp_path))
    assert "3 of 3 measured" in said and "2 failures" in said
    assert "FAILED correctness: a: RuntimeError: no kernel image is available" in said
    assert "FAILED correctness: b: WRONG" in said


def test_a_layer_that_gives_no_numbers_is_wrong(monkeypatch):
    monkeypatch.setattr(gpu_errors, "relative_error", lambda x, exact: float("nan"))
    assert not gpu_errors.layer_errors("relu", (2, 2), torch.float32, CPU)["ok"]


def test_kernels_that_do_not_run_are_a_failure_though_torch_takes_their_place(monkeypatch):
    monkeypatch.setattr(gpu, "REFUSED", set())

    def broken():
        raise RuntimeError("no device")

    for _ in range(2):
        with pytest.raises(UserWarning, match="no device"), gpu_errors.running("kernels"):
            gpu.or_torch(broken, lambda: 1)


def test_at_the_end_of_its_time_a_part_leaves_out_what_is_left(tmp_path, monkeypatch):
    parts(monkeypatch, *[(str(k), lambda: time.sleep(0.3) or {}) for k in range(9)], until=0.5)
    found = checked(tmp_path, 1 / 60)
    left = ["left_out" in row for row in found["correctness"]]
    assert left == sorted(left) and left[-1] and not left[0]


CHILD = """
import ctypes, json, sys
from pathlib import Path
path, parts = Path(sys.argv[1]), sys.argv[3:]
found = json.loads(path.read_text()) if path.exists() else {}
found[parts[0]] = [{"name": "quick", "seconds": 0.1}]
if parts[0] in %r:
    path.write_text(json.dumps(found | {"running": [parts[0], "endless"]}))
    ctypes.CDLL(None).sleep(1000)
path.write_text(json.dumps(found | {"seconds": 1.0}))
"""
"""Finishes the first of its parts, or hangs there where no exception reaches it."""


@pytest.mark.parametrize(("hanging", "lost"), [(["card"], {"error"}), (["card", "epoch"], {"error", "left_out"})])
def test_what_hangs_in_a_driver_is_killed_and_the_next_part_runs_until_all_time_is_over(
    tmp_path, monkeypatch, hanging, lost
):
    monkeypatch.setattr(gpu_check, "GRACE", 0.0)
    monkeypatch.setattr(gpu_parts, "PARTS", {"card": (None, 0.1), "epoch": (None, 1.0)})
    command = [sys.executable, "-S", "-c", CHILD % hanging, str(tmp_path / FILE)]
    guarded(tmp_path, command, 3.0)
    found = json.loads((tmp_path / FILE).read_text())
    assert "running" not in found and len(failures(found)) == 1
    assert [row["name"] for row in found["card"]] == ["quick", "endless"]
    assert [row["name"] for row in found["epoch"]] == ["quick", "endless"][: len(hanging)]
    assert lost == {key for part in gpu_parts.PARTS for row in found[part] for key in row} - {"name", "seconds"}


def test_a_child_adds_its_parts_to_the_file_and_the_table_is_of_all(tmp_path, monkeypatch):
    parts(monkeypatch, ("a", lambda: {"ok": True}))
    (tmp_path / FILE).write_text(json.dumps({"card": [{"name": "copy", "error": "it hung"}]}))
    words = [str(tmp_path), "--device", "cpu", "--small", "--child", str(time.monotonic()), "correctness"]
    assert main(words) == 0
    found = json.loads((tmp_path / FILE).read_text())
    assert [found[part][0]["name"] for part in ("card", "correctness")] == ["copy", "a"] and "running" not in found


def test_it_needs_neither_ray_nor_mlflow():
    known, waiting = set(), ["erpe.bench.gpu_check"]
    while waiting:
        name = waiting.pop()
        path = ROOT / name.replace(".", "/")
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if name in known or not path.exists():
            continue
        known.add(name)
        found = re.findall(r"^(?:from|import) (\S+)(?: import (.*))?", path.read_text(), re.MULTILINE)
        waiting += [module for module, _ in found] + [
            f"{module}.{name}" for module, names in found for name in names.split(", ")
        ]
        heavy = {"ray", "mlflow", "optuna", "sklearn", "scipy", "pandas", "torchvision", "matplotlib", "safetensors"}
        heavy |= {"PIL"}
        assert not heavy & {module.partition(".")[0] for module, _ in found}, name
    assert "erpe.training.loop" in known


def test_a_wrong_call_is_told_in_one_line(tmp_path, capsys):
    assert main([str(tmp_path), "--minutes", "11"]) == 2
    assert capsys.readouterr().out == "gpu-check: --minutes 11.0 given; use a number up to 10 instead\n"


@pytest.mark.parametrize("seconds", [1.0, 2.0])
def test_the_yardstick_takes_the_quickest_way_and_a_whole_epoch(seconds):
    rows = [{"variant": "relu", "epoch_seconds": s, "images": gpu_parts.IMAGES // 2} for s in (seconds, 3.0)]
    assert f"{2 * seconds * 500 / 3600:.2f} h" in gpu_check.yardstick({"epoch": rows})
