"""A state dict says for which grid it was learnt, and loads into modules of the same grid alone.

The tensors of rotations have the same shapes on every grid, and those of learned positions on any of as many patches.
The grid stands in the metadata that torch keeps with a state dict, so no tensor is added; a plain `dict` of the state
has none, and is not checked.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from erpe.errors import ShapeError


def keep_grid(module: nn.Module, grid: tuple[int, int], cls: bool) -> None:
    """Write the grid (h, w), and whether there is a class token, into state dicts of the module; check both in loading.

    Loading raises ShapeError where a state is of others.
    """
    module.grid_of_state = [*grid, cls]  # type: ignore[assignment]
    module.register_state_dict_post_hook(_write)
    module.register_load_state_dict_pre_hook(_check)


def _write(module: nn.Module, state: Any, prefix: str, metadata: dict[str, Any]) -> None:
    metadata["grid"] = module.grid_of_state


def _check(module: nn.Module, state: Any, prefix: str, metadata: dict[str, Any], *rest: Any) -> None:
    own, found = module.grid_of_state, metadata.get("grid")
    if found is not None and found != own:
        where = prefix.rstrip(".") or "state dict"
        text = f"{where}: learnt on {_told(found)}, this module has {_told(own)}"
        raise ShapeError(f"{text}; use a module of that grid instead")


def _told(grid: Any) -> str:
    h, w, cls = grid
    return f"a ({h}, {w}) grid with{'' if cls else 'out'} class token"
