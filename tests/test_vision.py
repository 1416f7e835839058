"""torchvision through its one door: usable beside any build of torch, and left alone where it is whole."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import erpe
from erpe.training.vision import torchvision

# Stand-ins for torchvision. Declaring a fake kernel of a missing operator fails just as in the real package.
PACKAGES = {
    "whole": "",
    "misfit": """
import torch
for operator in ("nms", "qnms"):
    torch.library.register_fake(f"torchvision::{operator}", lambda dets, scores, iou_threshold: dets)
""",
    "broken": "raise RuntimeError('something else')",
    "absent": "raise ModuleNotFoundError('no torchvision')",
}

SCRIPT = """
import json, sys, torch
from erpe.training.vision import torchvision
found = {}
for name, folder in json.loads(sys.argv[1]).items():
    for module in [x for x in sys.modules if x.split(".")[0] == "torchvision"]:
        del sys.modules[module]
    torchvision.cache_clear()
    sys.path.insert(0, folder)
    try:
        module = torchvision()
        found[name] = {"patched": hasattr(module, "erpe_operators"), "same": torchvision() is module}
        found[name] |= {"parts": [hasattr(module, "datasets"), hasattr(module.transforms, "v2")]}
        found[name]["first import"] = len(open(folder + "/imports").readlines())
    except Exception as error:
        found[name] = f"{type(error).__name__}: {error}"
    found[name] = {"result": found[name], "operators": "nms" in dir(torch.ops.torchvision)}
    sys.path.remove(folder)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What becomes of each stand-in, in a fresh process; the misfit last, for its operators stay."""
    folders = {}
    for name in ("whole", "broken", "absent", "misfit"):
        folder = tmp_path_factory.mktemp(name)
        package = folder / "torchvision"
        for part in ("datasets", "transforms/v2"):
            (package / part).mkdir(parents=True)
            (package / part / "__init__.py").write_text("")
        (package / "transforms" / "__init__.py").write_text("")
        note = f"open({str(folder / 'imports')!r}, 'a').write('import\\n')\n"
        (package / "__init__.py").write_text(note + PACKAGES[name])
        folders[name] = str(folder)
    root = Path(erpe.__file__).parents[1]
    command = [sys.executable, "-c", SCRIPT, json.dumps(folders)]
    return json.loads(subprocess.check_output(command, text=True, cwd=root))


@pytest.mark.slow
def test_a_whole_package_is_imported_once_and_left_alone(found):
    result = {"patched": False, "same": True, "parts": [True, True], "first import": 1}
    assert found["whole"] == {"result": result, "operators": False}


def test_a_package_whose_compiled_part_does_not_fit_is_made_to_import(found):
    result = {"patched": True, "same": True, "parts": [True, True], "first import": 2}
    assert found["misfit"]["result"] == result


def test_any_other_failure_is_not_hidden(found):
    assert found["broken"] == {"result": "RuntimeError: something else", "operators": False}
    assert found["absent"] == {"result": "ModuleNotFoundError: no torchvision", "operators": False}


def test_data_sets_and_transforms_work(tmp_path):
    v2, datasets = torchvision().transforms.v2, torchvision().datasets
    pixels = torch.arange(3 * 8 * 8, dtype=torch.uint8).reshape(3, 8, 8)
    for transform in (v2.RandAugment(), v2.TrivialAugmentWide(), v2.RandomCrop(8, padding=2), v2.RandomErasing(p=1)):
        assert transform(pixels).shape == pixels.shape
    images, labels = v2.MixUp(num_classes=10)(torch.rand(4, 3, 8, 8), torch.arange(4))
    assert images.shape == (4, 3, 8, 8) and labels.shape == (4, 10)
    assert len(datasets.FakeData(size=3, image_size=(1, 8, 8))) == 3
    with pytest.raises(RuntimeError, match="not found"):
        datasets.MNIST(tmp_path)


def test_nobody_else_imports_it():
    folder = Path(erpe.__file__).parent
    importers = {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.Import) and any(name.name.split(".")[0] == "torchvision" for name in node.names))
        or (isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torchvision")
    }
    assert importers == {"training/vision.py"}
