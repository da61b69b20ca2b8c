"""What people otherwise ask: is everything installed, does the store answer, is there room."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from geoseg.errors import GeosegError

_PACKAGES = ("geoseg", "ray", "torch", "rasterio", "obstore", "boto3", "numpy", "pystac", "shapely")
_ROOM_BYTES = 5 << 30


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the examination."""

    ok: bool
    text: str


def examine(uris: Sequence[str]) -> list[Finding]:
    """Findings about this machine and about each URI (read, write, write once, delete). Secrets are never shown."""
    findings = [Finding(sys.version_info >= (3, 10), f"Python {sys.version.split()[0]}")]
    for name in _PACKAGES:
        try:
            findings.append(Finding(True, f"{name} {version(name)}"))
        except PackageNotFoundError:
            findings.append(Finding(False, f"{name} is not installed: pip install geoseg"))
    findings += [_gdal(), _torch(), _bundle(), _torchvision(), _room()]
    for uri in uris:
        findings += _store(uri)
    return findings


def _attempt(text: str, action: Callable[[], str | None]) -> Finding:
    try:
        more = action()
    except GeosegError as error:
        return Finding(False, f"{text}: {error}")
    except Exception as error:  # noqa: BLE001 - whatever is broken here is what the examination is for
        return Finding(False, f"{text}: {type(error).__name__}: {error}")
    return Finding(True, f"{text}{': ' + more if more else ''}")


def _gdal() -> Finding:
    def action() -> str:
        import rasterio
        from rasterio.crs import CRS
        from rasterio.env import Env

        import geoseg.raster  # noqa: F401 - sets GDAL up

        CRS.from_epsg(25832)
        with Env() as env:
            drivers = sorted(env.drivers())
        if set(drivers) - {"COG", "GTiff", "MEM"}:
            raise GeosegError(
                f"more drivers than wanted are registered ({len(drivers)}); import geoseg before rasterio"
            )
        return f"{rasterio.__gdal_version__}, drivers {', '.join(drivers)}, PROJ database found"

    return _attempt("GDAL", action)


def _torch() -> Finding:
    def action() -> str:
        import torch

        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return f"{', '.join(names) or 'no GPU, the CPU will do'}; {os.cpu_count()} cores"

    return _attempt("device", action)


def _bundle() -> Finding:
    def action() -> str:
        from geoseg.config import DEFAULT_BUNDLE
        from geoseg.predict.bundles import load_bundle

        bundle = load_bundle(DEFAULT_BUNDLE)
        return f"{DEFAULT_BUNDLE}, {bundle.digest[:12]}"

    return _attempt("default bundle", action)


def _torchvision() -> Finding:
    if find_spec("torchvision") is None:
        return Finding(True, "torchvision is not installed, and not needed")

    def action() -> None:
        import torchvision  # noqa: F401

    return _attempt("torchvision is installed, geoseg does not need it", action)


def _room() -> Finding:
    free = shutil.disk_usage(tempfile.gettempdir()).free
    return Finding(
        free > _ROOM_BYTES, f"{free / 1e9:.0f} GB free in {tempfile.gettempdir()} (Ray's objects, masks in the making)"
    )


def _store(uri: str) -> list[Finding]:
    from geoseg.raster import store

    root = store.normalize_uri(uri)
    probe = store.join(root, "_geoseg", f"doctor-{uuid.uuid4().hex[:8]}")
    shown = store.redact(root)

    def lists() -> None:
        next(iter(store.walk(root.rstrip("/") + "/")), None)

    def writes() -> None:
        store.write(probe, b"geoseg", create=True)

    def once() -> None:
        try:
            store.write(probe, b"again", create=True)
        except store.ObjectExistsError:
            return
        raise GeosegError("a second create-only write was accepted; this store cannot keep two runs apart")

    def reads() -> None:
        if store.read_ranges(probe, [(1, 4)]) != [b"eos"]:
            raise GeosegError("a ranged read gave other bytes than were written")

    steps = [("lists", lists), ("writes", writes), ("refuses to overwrite", once), ("reads ranges", reads)]
    findings = [_attempt(f"{shown} {name}", action) for name, action in steps]
    findings.append(_attempt(f"{shown} deletes", lambda: store.delete([probe])))
    return findings
