"""From scenes to published masks, step by step; joins raster and model, knows no Ray.

The package is also the function ``geoseg.predict``: calling it runs a whole job.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from geoseg.predict.record import RunReport


class _CallablePackage(ModuleType):
    """A package that can be called."""

    def __call__(self, scenes: str | Sequence[str], out: str, **settings: Any) -> RunReport:
        """Predict masks for scenes and publish them under ``out``; the same as the command ``geoseg predict``.

        ``scenes`` are files, folders, globs, prefixes or ``.txt`` lists. ``settings`` are those of a job file: ``bundle``
        and the keys of its sections ``predict`` and ``cluster`` (see ``geoseg.config``), for example
        ``geoseg.predict("scene.tif", "out", window=2048, workers=2)``. Returns what came of each scene; raises StopError
        kinds alone, a scene that cannot be processed is in the report.
        """
        from geoseg.run import predict_from_settings

        return predict_from_settings(scenes, out, **settings)


sys.modules[__name__].__class__ = _CallablePackage
