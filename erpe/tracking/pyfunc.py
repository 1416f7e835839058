"""A checkpoint as an MLflow pyfunc model: MLflow calls `_load_pyfunc`, so no pickle is involved.

mlflow.pyfunc.load_model("models:/STUDY@champion").predict(images)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from erpe.errors import ShapeError
from erpe.training.checkpoint import load_model
from erpe.training.data import normalise


class Classifier:
    """Class probabilities for pictures."""

    def __init__(self, folder: Path) -> None:
        """Load `model.safetensors` and `config.json`; a StoreError says what is wrong with them."""
        self.model, self.config = load_model(folder)

    def predict(self, images: np.ndarray, params: dict[str, Any] | None = None) -> np.ndarray:
        """(B, channels, height, width) uint8 -> (B, classes) float32 probabilities.

        Raises:
            ShapeError: not such a batch.
        """
        images = np.asarray(images)
        if images.ndim != 4 or images.shape[1:] != self.config.model.image or images.dtype != np.uint8:
            raise ShapeError(
                f"use a uint8 batch of {self.config.model.image} images instead of {images.dtype} {images.shape}"
            )
        pixels = torch.from_numpy(np.ascontiguousarray(images))
        with torch.inference_mode():
            return self.model(normalise(pixels, self.config.data.dataset)).softmax(-1).numpy()


def _load_pyfunc(data_path: str) -> Classifier:
    return Classifier(Path(data_path))
