"""Small GeoTIFFs with exact truths, and untrained bundles that run in milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio
from affine import Affine
from rasterio.enums import Resampling

from kit.oracle import seeded_bundle

UTM = "EPSG:32633"
AT_UTM = Affine(0.5, 0, 500_000.25, 0, -0.5, 5_300_000.75)
ROTATED = Affine(0.43, 0.25, 500_000, 0.25, -0.43, 5_300_000)
SOUTH_UP = Affine(0.5, 0, 500_000, 0, 0.5, 5_300_000)

_BAND_NAMES = {1: ("gray",), 3: ("red", "green", "blue")}


def noise(num_bands: int, height: int, width: int, *, dtype: str = "uint8", seed: int = 0) -> npt.NDArray[Any]:
    """Return pixels (band, row, col) over the whole range of a whole-number dtype, in 0 to 1000 for real numbers."""
    rng = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "f":
        return rng.uniform(0, 1000, (num_bands, height, width)).astype(dtype)
    limits = np.iinfo(dtype)
    return rng.integers(limits.min, limits.max, (num_bands, height, width), dtype=dtype, endpoint=True)


def write_scene(
    path: Path,
    pixels: npt.NDArray[Any],
    *,
    valid: npt.NDArray[np.bool_] | None = None,
    crs: str | None = UTM,
    transform: Affine = AT_UTM,
    overviews: tuple[int, ...] = (),
    **profile: Any,
) -> Path:
    """Write pixels (band, row, col) as a GeoTIFF, ``valid`` as its internal mask; ``profile`` goes to GDAL as it is.

    Overviews are built one by one, so they lie in the file in the order in which they are named.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if len(pixels) == 3 and pixels.dtype == np.uint8:
        profile = {"photometric": "rgb", **profile}
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
        with rasterio.open(
            path,
            "w",
            driver="GTiff",
            count=pixels.shape[0],
            height=pixels.shape[1],
            width=pixels.shape[2],
            dtype=pixels.dtype.name,
            crs=crs,
            transform=transform,
            **profile,
        ) as dataset:
            dataset.write(pixels)
            if valid is not None:
                dataset.write_mask(valid)
        for factor in overviews:
            with rasterio.open(path, "r+") as dataset:
                dataset.build_overviews([factor], Resampling.nearest)
    return path


def tiny_bundle(path: Path, *, bands: int = 3, dtype: str = "uint8", resolution_m: float | None = None) -> str:
    """Save an untrained U-Net of depth 2 and width 4 for one grey or three colour bands; return its URI."""
    return str(seeded_bundle(path, bands=_BAND_NAMES[bands], dtype=dtype, resolution_m=resolution_m))
