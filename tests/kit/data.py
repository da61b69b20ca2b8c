"""Where the real imagery lies that some tests read, and scenes cut from it; it is no part of the project."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import rasterio
from rasterio.windows import Window

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_IMAGERY = ("dubai/dubai_?.tif", "mass_roads/mass_*[0-9].tif", "hot_buildings/*_z20.tif", "inria_austin/austin.tif")
RECIPE = Path(__file__).parents[2] / "jobs" / "configs" / "default-coarse.toml"


def data_folder() -> Path:
    """The folder with real imagery beside the project, or GEOSEG_TEST_DATA; skips the test when there is none."""
    folder = Path(os.environ.get("GEOSEG_TEST_DATA") or Path(__file__).parents[3] / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"there is no real imagery at {folder}; set GEOSEG_TEST_DATA to a folder that has it")
    return folder


def recipe() -> dict[str, Any]:
    """Return the training with which the shipped bundle begins, as TOML has it, with its imagery where it lies here."""
    told = tomllib.loads(RECIPE.read_text())
    for source in told["source"]:
        source["scenes"] = [uri.replace("../shared/data", str(data_folder())) for uri in source["scenes"]]
    return told


def cut_scenes(folder: Path, num: int, *, side: int = 400) -> list[Path]:
    """Cut scenes of ``side`` x ``side`` from the imagery in turn, another part of each every time; none of nodata alone."""
    images = [path for pattern in _IMAGERY for path in sorted(data_folder().glob(pattern))]
    scenes: list[Path] = []
    place = 0
    while len(scenes) < num:
        image, place = images[place % len(images)], place + 1
        with rasterio.open(image) as source:
            down, across = source.height // side, source.width // side
            if not down * across:
                continue
            at = place * 7 % (down * across)
            window = Window(at % across * side, at // across * side, side, side)
            pixels = source.read((1, 2, 3), window=window)
            if pixels.any(0).mean() < 0.5:
                continue
            path = folder / f"{image.stem}-{at:03}-{len(scenes):02}.tif"
            told = {
                "driver": "GTiff",
                "count": 3,
                "height": side,
                "width": side,
                "dtype": "uint8",
                "photometric": "rgb",
            }
            with rasterio.open(path, "w", **told, crs=source.crs, transform=source.window_transform(window)) as scene:
                scene.write(pixels)
            scenes.append(path)
    return scenes
