"""How the threads of OpenMP wait for work. OpenMP reads it once, when torch loads it."""

from __future__ import annotations

import os
import sys

WAITING = {"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE")}
"""The environment of every process that trains: asleep, unless the user chose otherwise.

Threads that spin collapse as soon as two processes share a core: 54 to 137 images a second against 670.
"""


def wait_asleep() -> None:
    """Give this process `WAITING`; where torch is loaded already it would come too late, and nothing is done."""
    if "torch" not in sys.modules:
        os.environ.update(WAITING)
