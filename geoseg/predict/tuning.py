"""What a device was measured to be fastest with, kept for the user. It changes no pixel."""

from __future__ import annotations

import json
import os
import platform
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a device makes of batches of windows: pixels of the mask per second."""

    window: int
    batch: int
    pixels_per_s: float


def device_name(device: torch.device) -> str:
    """The kind of device, as far as its speed goes."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def remember(best: Measured, *, digest: str, device: torch.device) -> Path:
    """Keep what a device is fastest with, with the bundle of this digest; the file it is kept in."""
    path = _path()
    told = {**_all(), _key(digest, device): asdict(best)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}-", delete=False) as file:
        json.dump(told, file, indent=1, sort_keys=True)
    Path(file.name).replace(path)
    return path


def remembered(digest: str, device: torch.device) -> Measured | None:
    """What was kept, or None; a file that cannot be read is as good as none."""
    try:
        told = _all()[_key(digest, device)]
        return Measured(window=int(told["window"]), batch=int(told["batch"]), pixels_per_s=float(told["pixels_per_s"]))
    except (KeyError, TypeError, ValueError):
        return None


def _key(digest: str, device: torch.device) -> str:
    return f"{device_name(device)}; torch {torch.__version__}; bundle {digest[:16]}"


def _path() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "geoseg" / "tuned.json"


def _all() -> dict[str, dict[str, float]]:
    try:
        told = json.loads(_path().read_text())
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}
