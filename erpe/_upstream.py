"""Use what other packages have no public way for. Everything private that erpe takes from them stands here, and
`tests/test_upstream.py` fails when one of them moves it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow import MlflowClient


def operators_are_watched() -> bool:
    """Tell whether a mode of torch sees the operators of this thread, as one that counts FLOPs does.

    Upstream: pytorch/pytorch#122339 offered a public function and was not merged.
    """
    import torch

    return bool(torch._C._len_torch_dispatch_stack())


def openmp_of_torch() -> list[Path]:
    """List the OpenMP libraries that torch's wheel brings along: a second one would have threads of its own.

    Upstream: pytorch/pytorch#98836; nothing public names the file.
    """
    import torch

    return sorted((Path(torch.__file__).parent / "lib").glob("libgomp*"))


def delete_run_row(client: MlflowClient, run: str) -> None:
    """Remove the row of a deleted run from MLflow's database, as `mlflow gc` does.

    `mlflow gc` itself would start MLflow anew for each run, and remove the artifacts where the row says they are: of a
    copied store, those of the original.

    Upstream: mlflow/mlflow#22725 asks for a public function.
    """
    client._tracking_client.store._hard_delete_run(run)
