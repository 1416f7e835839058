"""What an epoch on a GPU copies and waits for: its losses. On tensors without numbers, which need no GPU.

A build of torch for CPUs cannot record gradients on CUDA: the backward pass is on torch's device `meta`, which has no
numbers either, and refuses to wait.
"""

import re
import traceback
from contextlib import ExitStack, nullcontext
from pathlib import Path

import pytest
import torch
import torchgen
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import grid_sample
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from trials import tiny

from erpe.model import build, build_attention
from erpe.model.kernels.low_rank import _series
from erpe.model.rotary import _fourier
from erpe.training import batched, loop
from erpe.training.batched import Pack
from erpe.training.data import Images, constants
from erpe.training.loop import Trainer
from erpe.variants import VARIANTS

WAITS = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "is_nonzero", "item"}
"""Operators whose result the CPU needs, or whose shape depends on numbers."""
COPIES = {"_to_copy", "copy_", "_foreach_copy_", "set_", "_copy_from"}
SETTINGS = {
    "model.dropout": 0.1, "model.drop_path": 0.1, "model.depth": 1, "train.batch": 120, "train.clip_norm": 1.0,
    "train.ema": 0.9, "train.redraw": 2, "train.precision": "float32", "train.compile": "off",
}  # fmt: skip
VARIED = {"data.erase": 0.5, "data.flips": True, "data.mixup": 0.2, "data.cutmix": 0.5}
POLICY = VARIED | {"data.augment": "rand"}
CASES = [*((variant, {}) for variant in VARIANTS), ("relu", POLICY), ("favor", {"data.augment": "trivial"})]


class Watch(TorchDispatchMode):
    """Lists each copy between devices, and each wait, with the line of erpe that asked for it."""

    def __init__(self, device="cuda"):
        super().__init__()
        self.seen, self.device = [], device

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        try:
            result = function(*args, **(kwargs or {}))
        finally:
            places = {x.device.type for x in tree_leaves(args) if isinstance(x, torch.Tensor)}
            where = (kwargs or {}).get("device")
            places |= {where.type} if isinstance(where, torch.device) else set()
            if (name in COPIES and len(places) > 1) or (name in WAITS and self.device in places):
                lines = [each for each in traceback.extract_stack() if "/erpe/" in each.filename]
                where = lines[-1] if lines else traceback.extract_stack()[-2]
                self.seen.append(f"{name}: {where.name}: {where.line}")
        return result


class Indexing(TorchFunctionMode):
    """x[...] by operators: in Python's own way torch wants a device of flesh and blood."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is grid_sample and not args[0].is_cpu:  # which does x[...] within
            return torch.empty_like(args[0])
        if function is torch.Tensor.__invert__:
            function = torch.bitwise_not
        if function is torch.Tensor.copy_ and not args[0].is_cpu:
            args[1].to(args[0].device, args[0].dtype)
            return args[0]
        if function is not torch.Tensor.__getitem__ or args[0].is_cpu:
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


def elsewhere(module, device):
    """Give it tensors of a device, without numbers."""
    for each in module.modules():
        for name, x in each._parameters.items():
            if x is not None:
                each._parameters[name] = torch.nn.Parameter(torch.empty(x.shape, dtype=x.dtype, device=device))
        for name, x in each._buffers.items():
            if x is not None:
                each._buffers[name] = torch.empty(x.shape, dtype=x.dtype, device=device)


class Dice(torch.Generator):
    """One of a device that is not here."""

    def __new__(cls, device="cpu"):
        self = super().__new__(cls)
        self.device = torch.device(device)
        return self

    device = None


@pytest.fixture
def absent(monkeypatch):
    """Makes trainers whose tensors are of a device that is not here, and have no numbers; lists looks at the losses."""
    looks, modes = [], ExitStack()
    monkeypatch.setattr(torch, "Generator", Dice)
    monkeypatch.setattr(loop, "CHECK_EVERY", 2)
    monkeypatch.setattr(loop, "look", lambda losses: looks.append(len(losses)) or [0.0] * len(losses))

    def make(variant, device, settings=(), count=1):
        config = tiny(variant, SETTINGS | dict(settings))
        images = Images(torch.zeros(300, *config.model.image, dtype=torch.uint8), torch.zeros(300, dtype=torch.int64))
        made = [Trainer(config, build(config.model), images, torch.device("cpu")) for _ in range(count)]

        def without_numbers(loss):  # a build of torch for CPUs records nothing of other devices for gradients
            for trainer in made:
                for p in trainer.model.parameters():
                    p.grad = torch.empty_like(p)

        monkeypatch.setattr(torch.Tensor, "backward", without_numbers)
        for each in (FakeTensorMode(allow_non_fake_inputs=True), Indexing(), torch.no_grad()):
            modes.enter_context(each)
        for trainer in made:
            trainer.device, trainer.vary = torch.device(device, 0), Dice(device)
            elsewhere(trainer.model, device)
            if trainer.averaged is not None:
                elsewhere(trainer.averaged.module, device)
                del trainer.averaged.n_averaged
                trainer.averaged.n_averaged = 1
            trainer.images = Images(*(torch.empty_like(x, device=device) for x in images))
            trainer.optimiser = torch.optim.AdamW(trainer.model.decay_groups(0.1), lr=1e-3, fused=True)
        return made

    with modes:
        yield make, looks
    for made in (constants, _fourier, _series):  # they hold tensors without numbers
        made.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "more"), CASES)
def test_an_epoch_copies_nothing_and_waits_for_its_losses_alone(variant, more, absent):
    make, looks = absent
    (trainer,) = make(variant, "cuda", more)
    trainer.epoch(0)  # tables are made
    looks.clear()
    with Watch() as watch:
        trainer.epoch(1)
    assert watch.seen == []
    assert looks == [2, 1] and trainer.steps == 3


@pytest.mark.slow
def test_an_epoch_of_a_pack_copies_nothing_and_waits_for_its_losses_alone(absent, monkeypatch):
    make, looks = absent
    trainers = make("favor", "cuda", POLICY | {"train.epochs": 2}, count=2)
    models = lambda images, weights, others: weights.new_empty(*images.shape[:2], 10)  # noqa: E731
    trainers[0].packed = models  # which copy nothing: see above
    monkeypatch.setattr(batched, "together", lambda model, layout: models)
    monkeypatch.setattr(batched, "CHECK_EVERY", 2)
    monkeypatch.setattr(batched, "look", lambda losses, dim: looks.append(len(losses)) or [[0.0] * len(losses)] * 2)
    monkeypatch.setattr(torch.autograd, "grad", lambda loss, weights: (torch.empty_like(weights),))
    Pack(trainers).epoch([0, 0])  # tables are made
    looks.clear()
    with Watch() as watch:
        Pack(trainers).epoch([1, 1])
    assert watch.seen == []
    assert looks == [2, 1]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_with_its_slopes_copies_nothing_and_waits_for_nothing(variant, monkeypatch):
    config = tiny(variant, SETTINGS)
    images = Images(torch.zeros(300, *config.model.image, dtype=torch.uint8), torch.zeros(300, dtype=torch.int64))
    trainer = Trainer(config, build(config.model), images, torch.device("cpu"))
    for model in (trainer.model, trainer.final):
        elsewhere(model, "meta")
    trainer.averaged.n_averaged.fill_(1)
    trainer.device = torch.device("meta")
    trainer.optimiser = torch.optim.SGD(trainer.model.parameters())  # AdamW's is above
    monkeypatch.setattr(torch, "autocast", lambda *given, **more: nullcontext())
    monkeypatch.setattr(trainer, "inputs", lambda rows: (rows.new_empty(120, *config.model.image).float(), rows))
    rows = torch.empty(120, dtype=torch.int64, device="meta")
    trainer.step(rows, 1e-3)  # tables are made
    with Watch("meta") as watch:
        trainer.step(rows, 1e-3)
    assert watch.seen == []
    assert all(p.grad is not None and p.grad.is_meta for p in trainer.model.parameters())


@pytest.mark.parametrize(("way", "seen"), [
    (lambda x, y: x[0, 0].copy_(y[0, 0]), "copy_"),
    (lambda x, y: y.sum().to("meta"), "_to_copy"),
    (lambda x, y: torch._foreach_copy_([x], [y]), "_foreach_copy_"),
    (lambda x, y: x.add_(y.to("meta")), "_to_copy"),
])  # fmt: skip
def test_a_copy_is_seen_also_one_of_a_single_number_or_of_many_tensors(way, seen):
    x = torch.empty(2, 2, device="meta")
    with Watch("meta") as watch:
        way(x, torch.ones(2, 2))
    assert len(watch.seen) == 1 and watch.seen[0].startswith(f"{seen}: ")


class Operators(TorchDispatchMode):
    """Lists the operators on a device, and those that see or make float64 there."""

    def __init__(self, device):
        super().__init__()
        self.device, self.seen, self.float64 = device, set(), set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
        if any(x.device.type == self.device for x in tensors):
            self.seen.add(function)
        if any(x.device.type == self.device and x.dtype == torch.float64 for x in tensors):
            self.float64.add(str(function))
        return result


@pytest.fixture(scope="module")
def on_mps():
    """Tells whether torch has an operator for MPS, by the table that its own code is made of."""
    text = (Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml").read_text()
    entries = {}
    for entry in re.split(r"^- func: ", text, flags=re.MULTILINE)[1:]:
        name = entry.partition("(")[0]
        entries[name] = entry

    def has(function):
        if function.namespace == "prim":
            return True
        name = function.name().removeprefix("aten::")
        entry = entries[name if name in entries else name.removesuffix(".default")]
        delegate = re.search(r"structured_delegate: (\S+)", entry)
        entry = entries[delegate[1]] if delegate else entry
        kernels = entry.partition("dispatch:")[2]
        return not kernels or bool(re.search(r"\bMPS\b|Composite", kernels))

    return has


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "more"),
    [("relu_circulant", VARIED), ("favor_rope", POLICY), ("relu_general", {"model.method": "fft"})],
)
def test_on_mps_nothing_is_in_float64_and_torch_has_every_operator_there(variant, more, absent, on_mps):
    make, _ = absent
    (trainer,) = make(variant, "mps", more)
    with Operators("mps") as watch:
        trainer.epoch(0)
    assert watch.float64 == set()
    assert len(watch.seen) > 30 and [str(each) for each in watch.seen if not on_mps(each)] == []


@pytest.mark.parametrize("variant", VARIANTS)
def test_slopes_take_operators_of_mps_alone_and_no_float64(variant, on_mps, monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *given, **more: nullcontext())
    layer = build_attention(variant, grid=(3, 4), heads=2, head_dim=8).to("meta")  # as a device that is no CPU
    with Operators("meta") as watch:
        q, k, v = (torch.empty(2, 2, 12, 8, device="meta", requires_grad=True) for _ in range(3))
        layer(q, k, v).sum().backward()
    assert watch.float64 == set()
    assert [str(each) for each in watch.seen if not on_mps(each)] == []
