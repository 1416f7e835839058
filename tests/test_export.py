"""A model as a file says what the model says, and a file that says something else is not kept."""

from __future__ import annotations

import pytest
import torch

from erpe.config import defaults
from erpe.errors import ConfigError, StoreError
from erpe.export import Portable, export
from erpe.training.checkpoint import TrainedViT


def small(variant):
    settings = {"model.width": 16, "model.depth": 1, "model.heads": 2}
    return TrainedViT(defaults(variant, "digits").replace(settings)).eval()


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["softmax", "favor_general", "relu_circulant"])
def test_torch_s_own_file_says_what_the_model_says_for_any_number_of_pictures(variant, tmp_path):
    model, path = small(variant), tmp_path / "model.pt2"
    assert export(model, path, "torch") < 1e-4
    images = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
    said = torch.export.load(path).module()(images)
    assert torch.allclose(said, torch.from_numpy(model.predict(images)), atol=1e-5)
    assert "erpe" not in {str(node.target).partition(".")[0] for node in torch.export.load(path).graph.nodes}


def test_a_file_that_says_something_else_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("erpe.export.TOLERANCE", -1.0)
    with pytest.raises(StoreError, match=r"differs by .* from the model; nothing was written"):
        export(small("softmax"), tmp_path / "model.pt2", "torch")
    assert not list(tmp_path.iterdir())


def test_ctrl_c_leaves_the_file_that_was_there(tmp_path, monkeypatch):
    def ctrl_c(*args, **settings):
        raise KeyboardInterrupt

    path = tmp_path / "model.pt2"
    path.write_text("of yesterday")
    monkeypatch.setattr(torch.export, "load", ctrl_c)  # before the new file is compared with the model
    with pytest.raises(KeyboardInterrupt):
        export(small("softmax"), path, "torch")
    assert path.read_text() == "of yesterday" and [*tmp_path.iterdir()] == [path]


def test_without_onnx_a_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("erpe.export.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'erpe\[export\]', or --format torch instead"):
        export(small("softmax"), tmp_path / "model.onnx", "onnx")


@pytest.mark.slow
def test_onnx_says_what_the_model_says(tmp_path):
    assert export(small("relu_rope"), tmp_path / "model.onnx", "onnx") < 1e-4
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"], "one file"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["onnx", "torch"])
def test_a_model_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, kind):
    """As those of plug-ins may be: of ONNX no solving of equations, of both no number that is read from a tensor."""
    forward = Portable.forward

    def wrong(self, images):
        said = forward(self, images)
        return said + torch.linalg.solve(torch.eye(10), said.T).T if kind == "onnx" else said * float(said.max())

    monkeypatch.setattr(Portable, "forward", wrong)
    with pytest.raises(ConfigError, match="torch cannot write this model") as error:
        export(small("relu"), tmp_path / f"model.{kind}", kind)
    assert "\n" not in str(error.value) and ("use --format torch" in str(error.value)) == (kind == "onnx")
    assert not list(tmp_path.iterdir())
