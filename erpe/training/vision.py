"""The one door to torchvision.

Its wheels hold a compiled part for one build of torch. Beside another build (a CPU torch next to the registry's
CUDA torchvision) that part does not load, and then the whole package fails to import with `operator
torchvision::nms does not exist`, although data sets and transforms need nothing of it. Declaring the schemas of
the two missing operators lets the import finish; detection operators and image codecs stay unusable.
"""

from __future__ import annotations

import sys
from functools import cache
from types import ModuleType

import torch


@cache
def torchvision() -> ModuleType:
    """torchvision, with `datasets` and `transforms.v2` imported."""
    try:
        return _import()
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    module = _import()
    module.erpe_operators = library  # type: ignore[attr-defined]  # the schemas live as long as this object
    return module


def _import() -> ModuleType:
    import torchvision
    import torchvision.datasets
    import torchvision.transforms.v2

    return torchvision
