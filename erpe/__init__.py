"""erpe: do relative position encodings close the accuracy gap of linear attention, and what do they cost?"""

from __future__ import annotations

import os
import sys

# `python -m erpe` puts the working directory first. It is the user's: a statistics.py there is not Python's own.
_ours = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if sys.argv[:1] == ["-m"] and not sys.flags.safe_path and os.path.abspath(sys.path[0]) != _ours:
    del sys.path[0]

from typing import TYPE_CHECKING, Any  # noqa: E402

from erpe.openmp import wait_asleep  # noqa: E402

if TYPE_CHECKING:
    from erpe.api import run_study, train, tune
    from erpe.results import Study, load_study
    from erpe.tuned import Tuned

__all__ = ["Study", "Tuned", "__version__", "load_study", "run_study", "train", "tune"]
_MODULES = {"Study": "results", "load_study": "results", "Tuned": "tuned"}
__version__ = "0.1.0"
wait_asleep()  # here, for whatever imports torch afterwards


def __getattr__(name: str) -> Any:
    """Import what is heavy when it is used: `import erpe` stays light."""
    if name in __all__:
        from importlib import import_module

        return getattr(import_module(f"erpe.{_MODULES.get(name, 'api')}"), name)
    raise AttributeError(f"module 'erpe' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Name what is imported when it is used, too."""
    return sorted({*globals(), *__all__})
