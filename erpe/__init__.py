"""erpe: do relative position encodings close the accuracy gap of linear attention, and what do they cost?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from erpe.openmp import wait_asleep

if TYPE_CHECKING:
    from erpe.results import Study, load_study

__all__ = ["Study", "__version__", "load_study"]
__version__ = "0.1.0"
wait_asleep()  # here, for whatever imports torch afterwards


def __getattr__(name: str) -> Any:
    """What needs pandas is imported when it is used: `import erpe` stays light."""
    if name in ("Study", "load_study"):
        from erpe import results

        return getattr(results, name)
    raise AttributeError(f"module 'erpe' has no attribute {name!r}")
