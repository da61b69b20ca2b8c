"""Two operators that torchvision's wheels miss beside torch for the CPU."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch


@cache
def declare_vision_operators() -> Any:
    """Declare ``nms`` and ``qnms``, which cut boxes; without them torchvision, which is built for CUDA, does not import.

    They are declared and no more: whoever calls them gets an error. Kept, for the library takes its operators along when it goes.
    """
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library
