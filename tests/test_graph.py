"""A step as one CUDA graph, on a CPU: a stub records the order of capture and replay, and does again what was captured.

What a capture forbids on a GPU, and what it gains, was never seen.
"""

import pytest
import torch
from trials import tiny

from erpe.errors import StoreError
from erpe.model import build
from erpe.training.batched import Pack
from erpe.training.choices import choices_of
from erpe.training.data import load_training
from erpe.training.graph import WARM_UP
from erpe.training.loop import Trainer

CPU = torch.device("cpu")


class Stub:
    """Captures by keeping the call; a capture itself computes nothing, as on CUDA, and its result stays where it is."""

    def __init__(self, *size):
        self.seen, self.size = [], size

    def warm_up(self, call):
        self.seen.append("warm up")
        for _ in range(WARM_UP):
            call()

    def capture(self, call, generators):
        self.seen.append("capture")
        self.generators = generators

        def replay():
            self.seen.append("replay")
            self.result.copy_(call())

        self.result = torch.zeros(self.size)
        return replay, self.result


SETTINGS = {"data.train_limit": 150, "train.batch": 40, "train.epochs": 2, "data.augment": "rand", "data.erase": 0.5}
MORE = {"train.ema": 0.9, "train.redraw": 2, "model.dropout": 0.1, "data.mixup": 0.2, "data.cutmix": 0.5}
"""Four steps an epoch, the last one short."""

each = pytest.mark.parametrize("more", [{}, MORE])


def trainer(more, seed=0):
    config = tiny("favor_general", SETTINGS | more, seed)
    return Trainer(config, build(config.model, seed), load_training(config.data).train, CPU)


def assert_same(one, other):
    for name, x in one.state().items():
        assert torch.allclose(other.state()[name], x, rtol=1e-4, atol=1e-5), name


@each
def test_a_graph_trains_as_the_plain_step_does_augmentation_within(more):
    plain, graphed, graphs = trainer(more), trainer(more), Stub()
    graphed.graphs = graphs
    losses, found = ([one.epoch(epoch)["train/loss"] for epoch in range(2)] for one in (plain, graphed))
    assert found == pytest.approx(losses, rel=1e-5)
    assert_same(plain, graphed)
    # With averaged weights the very first step is plain.
    assert graphs.seen == ["warm up", "capture", *["replay"] * (5 if more else 6)]
    assert graphs.generators == [graphed.vary] and (plain.ran_as_graph, graphed.ran_as_graph) == (False, True)


@each
def test_a_pack_as_a_graph_trains_as_the_plain_pack_does(more):
    (plain, graphed), graphs = [[trainer(more, seed) for seed in range(2)] for _ in range(2)], Stub(2)
    graphed[0].pack_graphs = graphs
    losses, found = ([own["train/loss"] for own in Pack(each).epoch([0, 0])] for each in (plain, graphed))
    assert found == pytest.approx(losses, rel=1e-5)
    for one, other in zip(plain, graphed, strict=True):
        assert_same(one, other)
    assert graphs.seen == ["warm up", "capture", *["replay"] * 3] and len(graphs.generators) == 4
    assert [one.ran_as_graph for one in (*plain, *graphed)] == [False, False, True, True]


def test_inputs_are_read_and_the_loss_is_written_where_they_were_at_the_capture():
    one, places = trainer({}), set()
    one.graphs = Stub()
    for rate in (1e-3, 2e-3):
        loss = one.step(torch.arange(40), rate)
        rows, kept = one.graphed.inputs
        places.add((rows.data_ptr(), kept.data_ptr(), one.graphed.result.data_ptr()))
        assert kept == pytest.approx(rate) and all(group["lr"] is kept for group in one.optimiser.param_groups)
        assert loss == one.graphed.result and loss.data_ptr() != one.graphed.result.data_ptr()
    assert len(places) == 1


def test_only_what_was_measured_to_be_faster_on_this_very_device_is_a_graph(monkeypatch):
    config, cuda = tiny("relu"), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card 1")
    measured = {"Card 1": {"step": ["relu"], "pack": [], "backends": {"N = 16, D = 8, float32": "math"}}}
    model, images = build(config.model), load_training(config.data).train
    for devices, device in (({}, cuda), (measured, CPU), (measured, cuda)):
        chosen = choices_of(devices, device)
        found = Trainer(config, model, images, CPU, choices=chosen)
        assert (found.graphs is not None, found.pack_graphs) == (devices != {} and device == cuda, None)
    assert chosen.backend(config, "float32") == "math" and chosen.backend(config, "bfloat16") is None
    with chosen.sdpa(config, "float32"):
        assert not torch.backends.cuda.flash_sdp_enabled() or torch.backends.cuda.math_sdp_enabled()
    with pytest.raises(StoreError, match="damaged; remove it"):
        choices_of({"Card 1": {"backends": {"x": "best"}}}, cuda)
