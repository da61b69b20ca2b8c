"""Roads and buildings from imagery, at any scale."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from geoseg.run import RunReport

__all__ = ["__version__", "predict"]


def predict(scenes: str | list[str], out: str, **settings: Any) -> RunReport:
    """Predict masks for scenes and publish them under ``out``; the same as ``geoseg predict``.

    ``settings`` are those of a job file: ``bundle``, and the keys of its sections ``predict`` and ``cluster``
    (``geoseg.config``), for example ``geoseg.predict("scene.tif", "out", window=2048, workers=2)``. Returns what was done
    with each scene. Raises StopError kinds alone; a scene that cannot be processed is in the report.
    """
    from geoseg.run import predict_from_settings

    return predict_from_settings(scenes, out, **settings)
