"""A step as one CUDA graph, on a CPU: a stub records the order of capture and replay, and does again what was captured.

What a capture forbids on a GPU, and what it gains, was never seen.
"""

import pytest
import torch
from trials import tiny

from erpe.model import build
from erpe.training.data import load_training
from erpe.training.graph import WARM_UP, GraphedStep
from erpe.training.loop import Trainer

CPU = torch.device("cpu")


class Stub:
    """Captures by keeping the call; a capture itself computes nothing, as on CUDA."""

    def __init__(self):
        self.seen = []

    def warm_up(self, call):
        self.seen.append("warm up")
        for _ in range(WARM_UP):
            call()

    def capture(self, call):
        self.seen.append("capture")
        return lambda: (self.seen.append("replay"), call())


def trained(config, graphs, epochs=2):
    trainer = Trainer(config, build(config.model, seed=0), load_training(config.data).train, CPU)
    if graphs:
        trainer.step = GraphedStep(trainer, graphs)
    return trainer, [trainer.epoch(epoch)["train/loss"] for epoch in range(epochs)]


@pytest.mark.parametrize("more", [{}, {"train.ema": 0.9, "train.redraw": 2, "model.dropout": 0.1}])
def test_a_graph_trains_as_the_plain_step_does(more):
    config = tiny("favor_general").replace({"data.train_limit": 150, "train.batch": 40, "train.epochs": 2} | more)
    graphs = Stub()
    (plain, losses), (graphed, found) = trained(config, None), trained(config, graphs)
    assert found == pytest.approx(losses, rel=1e-5)
    for name, x in plain.state().items():
        assert torch.allclose(graphed.state()[name], x, rtol=1e-4, atol=1e-5), name
    # Four steps an epoch, the last one short; with averaged weights the very first is plain.
    assert graphs.seen == ["warm up", "capture", *["replay"] * (5 if more else 6)]


def test_the_batch_and_the_rate_are_read_from_where_they_were_at_the_capture():
    config = tiny("relu").replace({"data.train_limit": 80, "train.batch": 40})
    trainer = Trainer(config, build(config.model, seed=0), load_training(config.data).train, CPU)
    step = GraphedStep(trainer, Stub())
    places = set()
    for rate in (1e-3, 2e-3):
        step(torch.arange(40), rate, torch.Generator().manual_seed(0))
        places.add((step.images.data_ptr(), step.labels.data_ptr(), step.rate.data_ptr(), step.loss.data_ptr()))
        assert step.rate == pytest.approx(rate)
        assert all(group["lr"] is step.rate for group in trainer.optimiser.param_groups)
    assert len(places) == 1
