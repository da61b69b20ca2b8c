"""The demonstration: a generated scene through the real Ray path, and a picture of what came out.

Its bundle, ``demo``, was trained on such scenes alone (``jobs/configs/demo.toml``); ``write_scenes`` makes them again.
"""

from __future__ import annotations

from collections.abc import Iterator

import rasterio
from affine import Affine
from rasterio.crs import CRS

from geoseg.config import load_job
from geoseg.errors import ConfigError, StopError
from geoseg.predict.bundles import load_bundle
from geoseg.predict.report import class_iou, side_by_side
from geoseg.raster import store
from geoseg.raster.geotiff import write_geotiff
from geoseg.raster.grid import Grid
from geoseg.raster.synthetic import synthetic_image
from geoseg.run import run_job

_MIN_SIZE, _MAX_SIZE = 256, 8192
_PIXEL_M = 0.6
_BUNDLE = "demo"
_CORNER_M = (350_000.0, 5_600_000.0)


def write_scenes(out: str, *, count: int, size: int, seed: int) -> Iterator[str]:
    """Write ``count`` generated scenes, of the seeds from ``seed`` on, each beside its truth, and tell each.

    The truth, ``<scene>_classes.tif``, has the values of the demonstration's classes. Scenes lie side by side on the ground.
    Raises ConfigError, StoreError.
    """
    _check_size(size)
    for number in range(count):
        made = synthetic_image(size, size, seed=seed + number)
        grid = _grid(size, east=number * size)
        uri = store.join(store.normalize_uri(out), f"demo-{seed + number}-{size}")
        write_geotiff(f"{uri}.tif", made.pixels_bhw, grid, nodata=0)
        write_geotiff(f"{uri}_classes.tif", made.classes_hw[None], grid, nodata=None)
        yield f"scene    {uri}.tif  ({size} x {size} px of {_PIXEL_M} m, seed {seed + number})"


def run_demo(out: str, *, size: int, seed: int) -> Iterator[str]:
    """Run the demonstration into the folder ``out`` and tell it line by line. Raises StopError kinds."""
    _check_size(size)
    root = store.normalize_uri(out)
    made = synthetic_image(size, size, seed=seed)
    scene_uri = store.join(root, "scenes", f"demo-{seed}-{size}.tif")
    write_geotiff(scene_uri, made.pixels_bhw, _grid(size), nodata=0)
    yield f"scene    {scene_uri}  ({size} x {size} px of {_PIXEL_M} m, seed {seed})"

    values = {
        "scenes": [scene_uri],
        "out": store.join(root, "masks"),
        "bundle": _BUNDLE,
        "cluster": {"engine": "ray"},
    }
    report = run_job(load_job(None, values))
    scene = report.scenes[0]
    if scene.status not in ("published", "unchanged"):
        raise StopError(f"the demonstration failed: {scene.sentence}")
    yield report.summary()
    yield f"mask     {scene.mask}"
    yield f"item     {scene.item}"

    with rasterio.open(scene.mask) as dataset:
        mask = dataset.read(1)
    classes = load_bundle(_BUNDLE).description.classes
    scores = [
        f"{one.name} {class_iou(mask, made.classes_hw, made.valid_hw, value):.3f}" for value, one in enumerate(classes)
    ]
    yield f"IoU      {', '.join(scores)} (against the truth of the generated scene)"
    truth = made.classes_hw.copy()
    truth[~made.valid_hw] = 255
    picture = store.join(root, "picture.png")
    panels = [("mask", mask), ("truth", truth)]
    store.write(picture, side_by_side(made.pixels_bhw, made.valid_hw, panels, classes))
    yield f"picture  {picture}"
    yield f"look     geoseg view {store.join(out, 'masks')}"


def _check_size(size: int) -> None:
    if not _MIN_SIZE <= size <= _MAX_SIZE:
        raise ConfigError(f"--size must be {_MIN_SIZE} to {_MAX_SIZE} pixels, got {size}")


def _grid(size: int, *, east: int = 0) -> Grid:
    """The grid of a generated scene of ``size`` pixels a side, ``east`` pixels east of the first."""
    left, top = _CORNER_M
    affine = Affine(_PIXEL_M, 0, left + east * _PIXEL_M, 0, -_PIXEL_M, top)
    return Grid(CRS.from_epsg(25832).to_wkt(), tuple(affine)[:6], size, size)
