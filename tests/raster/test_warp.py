"""A scene read on another's grid holds what rasterio's warper puts there, whatever the windows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import rasterio
from kit.oracle import AFFINE, write_scene
from rasterio.enums import Resampling
from rasterio.warp import reproject

from geoseg.raster.geotiff import ReadOptions, describe
from geoseg.raster.raster import Raster
from geoseg.raster.scene import Scene, SceneRef
from geoseg.raster.warp import WarpedReader
from geoseg.raster.window import Window, plan_windows

ROWS, COLS = 150, 210


def smooth(rows: int, cols: int) -> npt.NDArray[np.uint8]:
    """Three bands of waves, so that a hundredth of a pixel moves no value by more than 1."""
    row, col = np.mgrid[:rows, :cols]
    waves = [np.sin(row / 9 + band) * np.cos(col / 11 - band) for band in range(3)]
    return np.stack([128 + 100 * wave for wave in waves]).astype(np.uint8)


def opened(path: Path) -> Scene:
    return describe(SceneRef(path.stem, str(path)), ReadOptions())


def target(folder: Path, **profile: Any) -> Scene:
    shape = profile.pop("shape", (ROWS, COLS))
    return opened(write_scene(folder / "target.tif", np.ones((3, *shape), np.uint8), **profile))


def warped(scene: Scene, onto: Scene, *, level: int = 0) -> Raster:
    rows, cols = onto.levels[level]
    return WarpedReader(scene, onto).read(Window(0, 0, cols, rows), (0, 1, 2), level=level)


def of_rasterio(scene: Scene, onto: Scene) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
    found = np.zeros((3, onto.grid.height, onto.grid.width), np.uint8)
    with rasterio.open(scene.uri) as dataset:
        pixels = dataset.read()
    grids = {
        "src_transform": scene.grid.affine, "src_crs": scene.grid.crs,
        "dst_transform": onto.grid.affine, "dst_crs": onto.grid.crs,
    }  # fmt: skip
    reproject(pixels, found, **grids, resampling=Resampling.bilinear, src_nodata=0, dst_nodata=0, tolerance=0)
    return found, (found != 0).any(0)


MOVES = {
    "half a pixel": rasterio.Affine.translation(0.5, -0.5),
    "turned": rasterio.Affine.rotation(20) @ rasterio.Affine.translation(10, -40),
    "larger pixels": rasterio.Affine.scale(1.7),
    "smaller pixels": rasterio.Affine.scale(0.8),
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES.keys())
def test_pixels_are_those_of_rasterio(move: rasterio.Affine, tmp_path: Path) -> None:
    pixels = smooth(ROWS, COLS)
    pixels[:, 40:60, 100:130] = 0
    scene = opened(write_scene(tmp_path / "scene.tif", pixels, nodata=0, transform=AFFINE @ move))
    onto = target(tmp_path)
    found = warped(scene, onto)
    expected, valid = of_rasterio(scene, onto)
    assert valid.any()
    assert not valid.all()
    both = valid & found.valid
    # They may differ in what is half valid: along the edges.
    assert np.mean(valid != found.valid) < 0.02
    assert np.abs(found.pixels[:, both].astype(int) - expected[:, both]).max() <= 1


def test_another_crs(tmp_path: Path) -> None:
    scene = opened(write_scene(tmp_path / "scene.tif", smooth(ROWS, COLS), nodata=0))
    around = rasterio.Affine(8.4e-06, 0, 6.883423, 0, -5.3e-06, 50.532732)  # its ground in degrees, 0.6 m
    onto = target(tmp_path, shape=(158, 214), crs="EPSG:4326", transform=around)
    found = warped(scene, onto)
    expected, valid = of_rasterio(scene, onto)
    both = valid & found.valid
    assert np.mean(valid != found.valid) < 0.02
    assert both.mean() > 0.9
    assert np.abs(found.pixels[:, both].astype(int) - expected[:, both]).max() <= 1


@pytest.mark.parametrize("level", [0, 1])
def test_no_pixel_depends_on_the_window(level: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    turned = AFFINE @ rasterio.Affine.rotation(33) @ rasterio.Affine.translation(40, -90)
    pixels = rng.integers(0, 4, (3, 900, 700), dtype=np.uint8)
    scene = opened(write_scene(tmp_path / "scene.tif", pixels, nodata=0, crs="EPSG:25833", transform=turned))
    profile = {"crs": "EPSG:25833", "shape": (700, 1100)}
    path = tmp_path / "target.tif"
    target(tmp_path, **profile)
    with rasterio.open(path, "r+") as dataset:
        dataset.build_overviews([2])
    onto = opened(path)
    whole = warped(scene, onto, level=level)
    assert whole.valid.any()
    reader = WarpedReader(scene, onto)
    for window in plan_windows(*onto.levels[level], 512):
        rows = slice(window.row_off, min(window.row_end, onto.levels[level][0]))
        cols = slice(window.col_off, min(window.col_end, onto.levels[level][1]))
        cut = Window(cols.start, rows.start, cols.stop - cols.start, rows.stop - rows.start)
        part = reader.read(cut, (0, 1, 2), level=level)
        np.testing.assert_array_equal(part.valid, whole.valid[rows, cols])
        np.testing.assert_array_equal(part.pixels, whole.pixels[:, rows, cols])


def test_a_scene_elsewhere_is_invalid_and_costs_nothing(tmp_path: Path) -> None:
    far = AFFINE @ rasterio.Affine.translation(5000, 0)
    scene = opened(write_scene(tmp_path / "scene.tif", smooth(ROWS, COLS), transform=far))
    onto = target(tmp_path)
    reader = WarpedReader(scene, onto)
    before = reader.bytes_fetched  # its header
    window = Window(0, 0, COLS, ROWS)
    assert not reader.is_stored(window)
    assert reader.stored_bytes(window) == 0
    assert not reader.read_valid(window, (0, 1, 2)).any()
    assert reader.bytes_fetched == before
