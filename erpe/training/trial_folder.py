"""The folder of a trial in training: one process owns it, and no other one writes into it."""

from __future__ import annotations

import contextlib
import json
import uuid
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from erpe.errors import StoreError
from erpe.io import read_plain, write_atomic
from erpe.store import OWNER, STATE
from erpe.training.checkpoint import save_tensors, writing


class TakenOver(RuntimeError):
    """Another process trains this trial now. A process with the study's lock takes the trial back; one without ends."""


class TrialFolder:
    """What a trial writes. Each write makes sure that the folder is still this process's.

    A process that was stopped, and wakes up when another one trains its trial, must not write.

    Args:
        path: the folder, made by `claim`.
        device: where the saved tensors lie. Beside a GPU a thread writes checkpoints, while the next epoch trains.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        self.path, self.device = path, device
        self.beside = device.type != "cpu"
        """Whether a thread writes checkpoints, while the device trains on."""
        self._writer = ThreadPoolExecutor(1)
        self._saving: Future[None] | None = None
        self._owner = uuid.uuid4().hex

    def claim(self) -> None:
        """Become its owner.

        Raises:
            StoreError: it cannot be written.
        """
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomic(self.path / OWNER, self._owner)

    def check_owner(self) -> None:
        """Refuse to write.

        Raises:
            TakenOver: another process trains this trial.
        """
        try:
            same = read_plain(self.path / OWNER, 100).decode(errors="replace") == self._owner
        except (OSError, StoreError):
            same = False
        if not same:
            raise TakenOver(f"{self.path}: another process began to train this trial")

    def write(self, name: str, content: object) -> None:
        """Write a result as JSON.

        Raises:
            StoreError, TakenOver: it was not written.
        """
        self.check_owner()
        with writing(self.path):
            write_atomic(self.path / name, json.dumps(content))

    def save(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Write the last epoch's checkpoint, or have it written by a thread; then `settle` says how that went.

        Raises:
            StoreError, TakenOver: this checkpoint is not written, or the last one was not; the one before is intact.
        """
        self.settle()
        if not self.beside:
            self._save(tensors, facts, contextlib.nullcontext())
        else:
            kept = {name: x.clone() for name, x in tensors.items()}
            self._saving = self._writer.submit(self._save, kept, facts, self._stream())

    def settle(self) -> None:
        """Wait until the last checkpoint is written.

        Raises:
            StoreError, TakenOver: it is not.
        """
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def _save(self, tensors: dict[str, Tensor], facts: dict[str, Any], stream: AbstractContextManager[Any]) -> None:
        self.check_owner()
        with stream:
            save_tensors(self.path / STATE, tensors, facts)

    def _stream(self) -> AbstractContextManager[Any]:
        """Return a context whose copies wait for what was asked for so far, and for nothing that comes later."""
        if self.device.type != "cuda":
            return contextlib.nullcontext()
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(stream)
