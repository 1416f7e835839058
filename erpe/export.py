"""A trained model as one file that needs no erpe: ONNX, or torch's own `torch.export`.

The file takes pictures as they are, (B, channels, height, width) uint8, and returns (B, classes) probabilities.
"""

from __future__ import annotations

import io
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from erpe.errors import ConfigError, StoreError
from erpe.io import write_atomic
from erpe.text import first_line
from erpe.training.data import normalise

if TYPE_CHECKING:
    from erpe.training.checkpoint import TrainedViT

TOLERANCE = 1e-4
"""Of a probability, between the file and the model."""

CHECKED = 8
"""Pictures on which they are compared: noise, an empty one and a full one."""


class Portable(nn.Module):
    """Pictures in, probabilities out."""

    def __init__(self, model: TrainedViT) -> None:
        super().__init__()
        self.model, self.dataset = model, model.trial.data.dataset

    def forward(self, images: Tensor) -> Tensor:
        """(B, channels, height, width) uint8 -> (B, classes)."""
        return self.model(normalise(images, self.dataset)).softmax(-1)


def export(model: TrainedViT, path: Path, kind: str) -> float:
    """Write a model, and compare what the file says with what the model says.

    Args:
        path: of the file.
        kind: onnx or torch.
    Returns:
        the largest difference of a probability.
    Raises:
        ConfigError: what writes or runs ONNX is not installed, or the model computes what such a file cannot.
        StoreError: the file would say something else than the model, so that it was not written.
    """
    if kind == "onnx" and not all(find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")):
        raise ConfigError("export: onnx is not installed; use pip install 'erpe[export]', or --format torch instead")
    images = torch.randint(0, 256, (CHECKED, *model.trial.model.image), dtype=torch.uint8, device="cpu")
    images[0], images[1] = 0, 255
    wanted = torch.from_numpy(model.predict(images))  # first: a tracer would fill caches of constants with its own kind
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporters, about themselves
        content = _exported(Portable(model).eval(), images, kind)
        run = _onnx(content) if kind == "onnx" else torch.export.load(io.BytesIO(content)).module()
        worst = max(float((run(images[:n]) - wanted[:n]).abs().max()) for n in (CHECKED, 1))
    if not worst <= TOLERANCE:
        raise StoreError(f"{path}: differs by {worst:.2g} from the model; nothing was written")
    write_atomic(path, content)
    return worst


def _exported(portable: Portable, images: Tensor, kind: str) -> bytes:
    file = io.BytesIO()
    batch = {0: torch.export.Dim("batch", min=1)}
    try:
        if kind == "onnx":
            program = torch.onnx.export(
                portable, (images,), dynamo=True, dynamic_shapes=(batch,), verbose=False,
                input_names=["images"], output_names=["probabilities"],
            )  # fmt: skip
            assert program is not None
            file.write(program.model_proto.SerializeToString())
        else:
            torch.export.save(torch.export.export(portable, (images,), dynamic_shapes=(batch,)), file)
    except RuntimeError as error:  # of layers that someone else wrote
        cause: BaseException = error
        while cause.__cause__:
            cause = cause.__cause__
        other = "; use --format torch instead" if kind == "onnx" else ""
        raise ConfigError(f"export: torch cannot write this model ({first_line(cause)[:200]}){other}") from error
    return file.getvalue()


def _onnx(content: bytes) -> nn.Module:
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

    class Run(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])

    return Run()
