"""Before a search on several hosts: does each see what the others write? A trial may end on another than it began."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from erpe.checkpoints import RemoteCheckpoints
from erpe.errors import ErpeError, StoreError

import erpe.execution.ray_tune.environment  # isort: skip  # noqa: F401  before Ray
from erpe.text import first_line

import ray  # isort: skip
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # isort: skip

ANSWER_SECONDS = 60.0
"""How long the driver waits for a node: it may have to start a process."""

REMEDY = "use one folder that all nodes share, or ERPE_CHECKPOINTS=URL"


def find_blind(place: RemoteCheckpoints) -> dict[str, str]:
    """Let this process, and each node of a cluster that runs trials, write a small file, and read all others' files.

    Args:
        place: where checkpoints go; the store's folder is one, too.
    Returns:
        address of a node -> what is wrong with it.
    Raises:
        StoreError: this machine itself cannot write there, or read what it wrote.
    """
    place, mark = replace(place, tries=3), f".preflight-{uuid.uuid4().hex}"
    nodes = {
        node["NodeID"]: node["NodeManagerAddress"]
        for node in (ray.nodes() if ray.is_initialized() else [])
        if node["Alive"] and node["Resources"].get("CPU")
    }
    try:
        write(place, f"{mark}/driver")
        unread(place, [f"{mark}/driver"])
        wrote = _ask(write, {node: (place, f"{mark}/{node}") for node in nodes})
        files = [f"{mark}/driver", *(f"{mark}/{node}" for node, said in wrote.items() if said is None)]
        saw = _ask(unread, {node: (place, files) for node, said in wrote.items() if said is None})
        return {nodes[node]: f"{said}; {REMEDY}" for node, said in (wrote | saw).items() if said}
    finally:
        place.remove(mark)


def require_shared(place: RemoteCheckpoints) -> None:
    """Make sure that trials may begin on any node and end on another.

    Raises:
        StoreError: they may not; it names the first node that is to blame, and counts the others.
    """
    wrong = find_blind(place)
    for address, said in wrong.items():
        others = f"; {len(wrong) - 1} more nodes, `erpe doctor` names them" if len(wrong) > 1 else ""
        raise StoreError(f"node {address}: {said}{others}")


def write(place: RemoteCheckpoints, name: str) -> None:
    """Write a file that says where it is from."""
    place.write(name, name.encode())


def unread(place: RemoteCheckpoints, names: list[str]) -> None:
    """Read files of others.

    Raises:
        StoreError: one of them is not there, or says something else.
    """
    missing = [name for name in names if place.read(name) != name.encode()]
    if missing:
        raise StoreError(f"checkpoints {place}: {len(missing)} of {len(names)} files of others are not here")


def _ask(function: Callable[..., None], of: dict[str, tuple[Any, ...]]) -> dict[str, str | None]:
    """Call a function on each node; what went wrong there."""
    waiting = {
        node: ray.remote(num_cpus=0, max_retries=0)(function)
        .options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))
        .remote(*arguments)
        for node, arguments in of.items()
    }
    if waiting:
        ray.wait(list(waiting.values()), num_returns=len(waiting), timeout=ANSWER_SECONDS)
    return {node: _answer(reference) for node, reference in waiting.items()}


def _answer(reference: Any) -> str | None:
    try:
        ray.get(reference, timeout=0)
        return None
    except ray.exceptions.GetTimeoutError:
        return f"no answer in {ANSWER_SECONDS:.0f} s"
    except ray.exceptions.RayTaskError as error:
        return str(error.cause) if isinstance(error.cause, ErpeError) else first_line(error.cause)
    except ray.exceptions.RayError as error:
        return first_line(error)
