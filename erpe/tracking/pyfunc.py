"""A checkpoint as an MLflow pyfunc model: MLflow calls `_load_pyfunc`, so no pickle is involved.

mlflow.pyfunc.load_model("models:/STUDY@champion").predict(images)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from erpe.training.checkpoint import load_model


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
        return self.model.predict(np.asarray(images))


def _load_pyfunc(data_path: str) -> Classifier:
    return Classifier(Path(data_path))
