"""Small scenes in a store, the job that predicts them there, and what stands in its output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from geoseg.config import Job, load_job
from geoseg.raster import store


def put(root: str, pixels: Any, *names: str, seed: int = 0) -> None:
    """Put a scene for each name, which begins with its seed; ``pixels`` is the fixture of that name."""
    for name in names:
        store.write(f"{root}/in/{name}.tif", pixels(seed + int(name[:2])))


def job(root: str, bundle: Path, **values: Any) -> Job:
    """Return the job of all scenes that ``put`` puts, in a plain loop."""
    return load_job(
        None,
        {
            "scenes": [f"{root}/in/"],
            "out": f"{root}/out",
            "bundle": str(bundle),
            "cluster": {"engine": "local"},
            **values,
        },
    )


def objects(root: str) -> dict[str, str]:
    """ETag of each object of the output, without the records of runs and the lease."""
    return {
        info.uri.removeprefix(f"{root}/out/"): info.etag
        for info in store.walk(f"{root}/out/")
        if "/_geoseg/runs/" not in info.uri and not info.uri.endswith("/_geoseg/lease.json")
    }
