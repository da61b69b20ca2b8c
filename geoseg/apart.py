"""A module of ours run as a process of its own, where another GDAL than rasterio's is at work with its own settings."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Ended:
    """How a process ended: what it wrote to stdout, and the last line that it complained with, "" when it went well."""

    told: str
    complaint: str


def run_apart(module: str, *arguments: str, folder: Path, **settings: str) -> Ended:
    """Run ``python -m module`` in ``folder``, without what is set here for GDAL, but with these ``settings``."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("GDAL_", "OGR_", "CPL_"))}
    path = os.pathsep.join(place or str(Path.cwd()) for place in sys.path)
    done = subprocess.run(  # noqa: S603 - this Python, a module of ours
        [sys.executable, "-m", module, *arguments],
        cwd=folder,
        env={**kept, **settings, "PYTHONPATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if not done.returncode:
        return Ended(done.stdout, "")
    return Ended(done.stdout, (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1])
