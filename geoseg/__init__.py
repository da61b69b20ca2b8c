"""Roads and buildings from imagery, at any scale.

``geoseg.predict("scene.tif", "out")`` does what the command ``geoseg predict scene.tif --out out`` does.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "predict"]


def __getattr__(name: str) -> Any:
    """``geoseg.predict`` is imported when it is asked for: torch and rasterio take seconds."""
    if name == "predict":
        return import_module("geoseg.predict")
    raise AttributeError(f"module 'geoseg' has no attribute {name!r}")
