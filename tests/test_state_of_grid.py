"""States of another grid are refused, wherever they would fit."""

import copy
import io

import pytest
import torch

from erpe.config import ModelConfig
from erpe.errors import ShapeError
from erpe.model import VARIANTS, build, build_attention

GRIDS = [((3, 5), False), ((5, 3), False), ((3, 5), True)]
ENCODED = [name for name in VARIANTS if "_" in name]


def layer(variant, grid, cls):
    return build_attention(variant, grid=grid, heads=2, head_dim=8, cls=cls)


def saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("variant", ENCODED)
def test_a_layer_takes_a_state_of_its_own_grid_alone(variant):
    state = saved(layer(variant, *GRIDS[0]).state_dict())
    for other in (layer(variant, *GRIDS[0]), copy.deepcopy(layer(variant, *GRIDS[0]))):
        other.load_state_dict(state)
    for grid, cls in GRIDS[1:]:
        for other in (layer(variant, grid, cls), copy.deepcopy(layer(variant, grid, cls))):
            with pytest.raises(ShapeError, match=r"encoding: learnt on a \(3, 5\) grid without class token, this mod"):
                other.load_state_dict(state)
    layer(variant, *GRIDS[0]).load_state_dict(dict(state))


@pytest.mark.parametrize("position", ["learned", "sincos2d"])
def test_a_model_with_absolute_positions_takes_a_state_of_its_own_grid_alone(position):
    config = ModelConfig(
        variant="relu", image=(1, 8, 16), patch=4, classes=3, width=16, depth=1, heads=2, position=position
    )
    state = build(config).state_dict()
    build(config).load_state_dict(state)
    with pytest.raises(ShapeError, match=r"state dict: learnt on a \(2, 4\) grid"):
        build(config.replace({"image": (1, 16, 8)})).load_state_dict(state)


def test_without_positions_any_grid_will_do():
    config = ModelConfig(
        variant="relu", image=(1, 8, 8), patch=4, classes=3, width=16, depth=1, heads=2, position="none"
    )
    build(config.replace({"image": (1, 16, 8)})).load_state_dict(build(config).state_dict())


def test_states_are_the_same_tensors_as_ever():
    assert list(layer("softmax_rope", *GRIDS[0]).state_dict()) == ["encoding.frequencies"]
