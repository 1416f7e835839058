"""A Ray of this machine alone, sooner: what has no option is changed in its private parts while it starts or runs."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

NOT_HERE = ("start_api_server", "start_monitor", "start_log_monitor")
"""What a node need not start that only this run uses: nobody looks at a dashboard, nothing scales, the session has the
errors. Together they take two seconds of its start, three of CPU, and 180 MB."""

ASK_SECONDS = 30.0
"""For so long a node may take to start; then Ray itself asks."""


@contextmanager
def starting_sooner() -> Iterator[None]:
    """While the block starts Ray: a few processes less, and no long naps."""
    with _sparing(NOT_HERE), _asking_often():
        yield


@contextmanager
def _sparing(names: tuple[str, ...]) -> Iterator[None]:
    """Let Ray's node start without some of its processes, and find that its dashboard's packages are not there.

    Options of `ray start` say the same of most, but `ray.init` has none for them.
    """
    from ray._private.node import Node

    kept = {name: getattr(Node, name) for name in names}
    packages = "ray.dashboard.optional_deps"
    known = sys.modules.get(packages)
    sys.modules[packages] = None  # type: ignore[assignment]  # so that importing it fails
    try:
        for name in names:
            setattr(Node, name, lambda *_, **__: None)
        yield
    finally:
        for name, method in kept.items():
            setattr(Node, name, method)
        del sys.modules[packages]
        if known:
            sys.modules[packages] = known


@contextmanager
def _asking_often() -> Iterator[None]:
    """Whether the node has come is asked ten times a second; Ray does once, and so waits half a second for nothing."""
    from ray._private import services
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    ask = services.get_node

    def get_node(address: str, node: str) -> Any:
        head, until = GcsClient(address=address), time.monotonic() + ASK_SECONDS
        while not head.get_all_node_info(timeout=ASK_SECONDS) and time.monotonic() < until:
            time.sleep(0.1)
        return ask(address, node)

    services.get_node = get_node
    try:
        yield
    finally:
        services.get_node = ask


@contextmanager
def taking_those_that_wait() -> Iterator[None]:
    """While the block runs, Tune takes the workers that Ray started ahead, which inherited this process's environment.

    It would give its own an environment of theirs, and Ray start others for it; on a cluster they need that.
    """
    from ray.tune.execution import class_cache

    fixed, passed_on = dict(class_cache.DEFAULT_ENV_VARS), set(class_cache.ENV_VARS_TO_PROPAGATE)
    class_cache.DEFAULT_ENV_VARS.clear()
    class_cache.ENV_VARS_TO_PROPAGATE.clear()
    try:
        yield
    finally:
        class_cache.DEFAULT_ENV_VARS.update(fixed)
        class_cache.ENV_VARS_TO_PROPAGATE.update(passed_on)
