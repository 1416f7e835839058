"""What a training step on a GPU copies and waits for: nothing. On CUDA tensors without numbers, which need no GPU.

The backward pass is not in it: a build of torch for CPUs cannot record gradients on CUDA.
"""

import traceback

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from trials import tiny

from erpe.config import VARIANTS
from erpe.model import build
from erpe.model.kernels.low_rank import _series
from erpe.model.rotary import _fourier
from erpe.training.data import Images, constants
from erpe.training.loop import Trainer

WAITS = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "is_nonzero", "item"}
"""Operators whose result the CPU needs, or whose shape depends on numbers."""
SETTINGS = {
    "data.augment": "standard", "data.erase": 0.5, "data.flips": True, "model.dropout": 0.1, "model.drop_path": 0.1,
    "train.clip_norm": 1.0, "model.depth": 1, "train.precision": "float32", "train.compile": "off",
}  # fmt: skip


class Watch(TorchDispatchMode):
    """Lists each copy between devices, and each wait, with the line of erpe that asked for it."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        try:
            result = function(*args, **(kwargs or {}))
        finally:
            places = {x.device.type for x in args if isinstance(x, torch.Tensor) and (x.ndim or name == "copy_")}
            where = (kwargs or {}).get("device")
            places |= {where.type} if isinstance(where, torch.device) else set()
            crosses = name in ("_to_copy", "copy_") and len(places) > 1
            if crosses or (name in WAITS and "cuda" in places):
                lines = [each for each in traceback.extract_stack() if "/erpe/" in each.filename]
                self.seen.append(f"{name}: {lines[-1].name}: {lines[-1].line}")
        return result


class Indexing(TorchFunctionMode):
    """x[...] by operators: in Python's own way torch wants a CUDA of flesh and blood."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not torch.Tensor.__getitem__ or args[0].device.type != "cuda":
            return function(*args, **(kwargs or {}))
        x, index = args
        index = list(index) if isinstance(index, tuple) else [index]
        used = sum(each is not None and each is not Ellipsis for each in index)
        if any(each is Ellipsis for each in index):
            at = next(n for n, each in enumerate(index) if each is Ellipsis)
            index[at : at + 1] = [slice(None)] * (x.ndim - used)
        dim, tensors = 0, []
        for each in index:
            if isinstance(each, torch.Tensor):
                tensors += [None] * (dim - len(tensors)) + [each]
            elif each is None:
                x = x.unsqueeze(dim)
            elif isinstance(each, slice):
                x = torch.ops.aten.slice.Tensor(x, dim, each.start, each.stop, each.step or 1)
            else:
                x = x.select(dim, each)
                continue
            dim += 1
        return torch.ops.aten.index.Tensor(x, tensors) if tensors else x


def on_cuda(module):
    """The module with tensors of CUDA that have no numbers."""
    for each in module.modules():
        for name, x in each._parameters.items():
            if x is not None:
                each._parameters[name] = torch.nn.Parameter(torch.empty(x.shape, dtype=x.dtype, device="cuda"))
        for name, x in each._buffers.items():
            if x is not None:
                each._buffers[name] = torch.empty(x.shape, dtype=x.dtype, device="cuda")
    return module


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_training_step_copies_nothing_and_waits_for_nothing(variant, monkeypatch):
    config, cuda = tiny(variant, SETTINGS), torch.device("cuda")
    images = Images(torch.zeros(300, *config.model.image, dtype=torch.uint8), torch.zeros(300, dtype=torch.int64))
    trainer = Trainer(config, build(config.model), images, torch.device("cpu"))

    def without_numbers(loss):  # a build of torch for CPUs records nothing of CUDA for gradients
        for p in trainer.model.parameters():
            p.grad = torch.empty_like(p)

    monkeypatch.setattr(torch.Tensor, "backward", without_numbers)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), Indexing(), torch.no_grad():
            on_cuda(trainer.model)
            trainer.device, trainer.images = cuda, Images(*(torch.empty_like(x, device=cuda) for x in images))
            trainer.optimiser = torch.optim.AdamW(trainer.model.decay_groups(0.1), lr=1e-3, fused=True)
            generator, rows = torch.Generator().manual_seed(0), torch.zeros(64, dtype=torch.int64, device=cuda)
            trainer.model.train()
            trainer.step(rows, 1e-3, generator)  # tables are made
            with Watch() as watch:
                trainer.step(rows, 1e-3, generator)
                loss = trainer.step(rows, 1e-3, generator)
        assert loss.device.type == "cuda"
        assert watch.seen == []
    finally:
        for made in (constants, _fourier, _series):  # they hold tensors without numbers
            made.cache_clear()
