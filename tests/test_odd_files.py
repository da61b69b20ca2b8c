"""Every odd file gives a right mask or a refusal in one sentence; the tables below say which."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from kit.data import data_folder
from kit.oracle import seeded_bundle
from rasterio.errors import NotGeoreferencedWarning

import geoseg

MASK = "mask"
VRT = "a GDAL VRT, which may read other files and is refused"
COARSE = "--resolution native"
BANDS = "say which to take, for example --bands 1"
NO_CRS = "--assume-crs EPSG:<code>"

# With the default bundle (red, green, blue; uint8; 0.6 m): a mask, or a piece of the sentence with the remedy.
AS_THEY_ARE = {
    "389225main_sw_1965_1024.jpg": "a JPEG image, not a GeoTIFF",
    "RGB.byte.gcp.vrt": VRT,
    "RGB.byte.rpc.vrt": VRT,
    "RGB.byte.tif": COARSE,
    "RGB2.byte.tif": "allow it with --sidecar-mask",
    "RGB2.byte.tif.msk": "it has no geotransform",
    "RGBA.byte.tif": COARSE,
    "RGBA.uint16.tif": "--scale 0,2047",
    "all-nodata.tif": "--scale 0,2047",
    "alpha.tif": COARSE,
    "byte.tif": BANDS,
    "cog_cmap.tif": "gdal_translate -expand rgb",
    "cog_dateline.tif": BANDS,
    "cog_gcps.tif": "gdalwarp -order 1",
    "cog_hirise_mars.tif": COARSE,
    "cog_nodata_nan.tif": BANDS,
    "cog_nonearth.tif": BANDS,
    "cog_rgb.tif": MASK,
    "cog_rgb_mask.tif": MASK,
    "cog_rgba.tif": MASK,
    "cog_scale.tif": BANDS,
    "cog_world.tif": BANDS,
    "cogeo.tif": MASK,
    "corrupt.tif": "its block index points past the end of the file",
    "float.tif": NO_CRS,
    "float_nan.tif": NO_CRS,
    "float_raster_with_nodata.tif": BANDS,
    "goes.tif": COARSE,
    "inverted_lat.tif": BANDS,
    "no_geo.jpg": "a JPEG image, not a GeoTIFF",
    "rgb.tif": BANDS,
    "rgb_deflate.tif": COARSE,
    "rgb_lzw.tif": COARSE,
    "rotated.tif": NO_CRS,
    "shade.tif": BANDS,
    "test_esri_wkt.tif": BANDS,
    "white-gemini-iv.vrt": VRT,
    "world.rgb.tif": COARSE,
}

# With the remedies their sentences name, and a network of one or three bands for any resolution.
RGB: dict[str, Any] = {"bands": (1, 2, 3)}
GRAY: dict[str, Any] = {"bands": (1,)}
WITH_REMEDIES: dict[str, dict[str, Any]] = {
    "RGB.byte.tif": RGB,
    "RGB2.byte.tif": {**RGB, "sidecar_mask": True},
    "RGBA.byte.tif": RGB,
    "RGBA.uint16.tif": {"bands": (3, 2, 1), "scale": (0, 2047)},
    "all-nodata.tif": {"bands": (3, 2, 1), "scale": (0, 2047)},
    "alpha.tif": RGB,
    "byte.tif": GRAY,
    "cog_cmap.tif": GRAY,
    "cog_dateline.tif": {**GRAY, "scale": (0, 65535)},
    "cog_hirise_mars.tif": RGB,
    "cog_nodata_nan.tif": {**GRAY, "scale": (0, 1)},
    "cog_nonearth.tif": {**GRAY, "scale": (0, 1)},
    "cog_rgb.tif": RGB,
    "cog_rgb_mask.tif": RGB,
    "cog_rgba.tif": RGB,
    "cog_scale.tif": {**GRAY, "scale": (-1000, 1000)},
    "cogeo.tif": RGB,
    "float.tif": {**GRAY, "scale": (0, 10), "assume_crs": "EPSG:32633"},
    "float_nan.tif": {**GRAY, "scale": (0, 10), "assume_crs": "EPSG:32633"},
    "float_raster_with_nodata.tif": {**GRAY, "scale": (0, 500)},
    "goes.tif": RGB,
    "inverted_lat.tif": {**GRAY, "scale": (0, 30)},
    "rgb.tif": {**RGB, "scale": (0, 10000)},
    "rgb_deflate.tif": RGB,
    "rgb_lzw.tif": RGB,
    "rotated.tif": {**GRAY, "assume_crs": "EPSG:32633"},
    "shade.tif": GRAY,
    "test_esri_wkt.tif": {**GRAY, "scale": (0, 255)},
    "world.rgb.tif": RGB,
}
# What no option helps, and the one whose 648 Mpx would take this suite's time: its plan is checked, not its pixels.
BEYOND_REMEDY = {name for name, outcome in AS_THEY_ARE.items() if "not a GeoTIFF" in outcome or outcome == VRT} | {
    "RGB2.byte.tif.msk",
    "cog_gcps.tif",
    "corrupt.tif",
    "cog_world.tif",
}


@pytest.fixture(scope="module")
def odd() -> Path:
    return data_folder() / "odd"


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("bundles")
    names = {1: ("gray",), 3: ("red", "green", "blue")}
    return {num: seeded_bundle(folder / str(num), bands=bands) for num, bands in names.items()}


def true_valid(path: Path) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which pixels are data, as rasterio sees it; NaN is not data, and the mask beside a file counts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(path, driver="GTiff") as dataset:
            valid = dataset.dataset_mask() != 0
            if dataset.dtypes[0].startswith("float"):
                valid &= np.isfinite(dataset.read()).all(0)
        if path.with_name(path.name + ".msk").exists():
            with rasterio.open(path.with_name(path.name + ".msk")) as dataset:
                valid = dataset.read(1) != 0
    return valid


def assert_mask_is_right(source: Path, mask: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(source, driver="GTiff") as scene, rasterio.open(mask) as dataset:
            assert scene.crs is None or dataset.crs == scene.crs
            assert dataset.transform == scene.transform
            assert dataset.shape == scene.shape
            codes = dataset.read(1)
    np.testing.assert_array_equal(codes == 255, ~true_valid(source))
    assert set(np.unique(codes)) <= {0, 1, 2, 255}


def test_every_odd_file_has_a_row(odd: Path) -> None:
    names = {path.name for path in odd.iterdir()}
    assert names == set(AS_THEY_ARE)
    assert names == set(WITH_REMEDIES) | BEYOND_REMEDY


def test_all_odd_files_in_one_run(odd: Path, tmp_path: Path, figure: Callable[..., None]) -> None:
    """Refusals stop nothing: the good ones are done, each of the others has one sentence, the exit code is 1."""
    names = sorted(AS_THEY_ARE)
    report = geoseg.predict([str(odd / name) for name in names], str(tmp_path), engine="local")
    by_name = {Path(scene.uri).name: scene for scene in report.scenes}
    assert set(by_name) == set(names)
    assert report.exit_code == 1
    num_masks = 0
    for name, outcome in AS_THEY_ARE.items():
        scene = by_name[name]
        if outcome == MASK:
            assert scene.status == "published", scene
            assert_mask_is_right(odd / name, scene.mask)
            num_masks += 1
        else:
            assert scene.status == "refused", scene
            assert outcome in scene.sentence
            assert "\n" not in scene.sentence
            assert scene.id in scene.sentence
    figure("S4", "masks of odd files on the very pixels of their scene", f"{num_masks} of {num_masks}", goal="all")
    figure(
        "S5",
        "odd files with a right mask, or refused with the remedy",
        f"{len(AS_THEY_ARE)} of {len(names)}",
        goal="all",
    )


@pytest.mark.parametrize("name", sorted(WITH_REMEDIES))
def test_with_its_remedy_a_file_gets_the_right_mask(
    name: str, odd: Path, bundles: dict[int, Path], tmp_path: Path
) -> None:
    settings = WITH_REMEDIES[name]
    bundle = str(bundles[len(settings["bands"])])
    report = geoseg.predict(
        str(odd / name), str(tmp_path), bundle=bundle, resolution="native", engine="local", **settings
    )
    assert report.exit_code == 0, report.scenes
    assert_mask_is_right(odd / name, report.scenes[0].mask)
    item = json.loads(Path(report.scenes[0].item).read_text())
    if name in ("cog_hirise_mars.tif", "cog_nonearth.tif", "goes.tif"):
        assert item["geometry"] is None, "what is not on the Earth, or not all of it, has no footprint"
    if name == "cog_dateline.tif":
        assert item["geometry"]["type"] == "MultiPolygon"
        assert item["bbox"][0] > item["bbox"][2], "over the antimeridian west is larger than east"


def test_the_largest_odd_file_is_planned(odd: Path, bundles: dict[int, Path], tmp_path: Path) -> None:
    from geoseg.config import load_job
    from geoseg.run import plan_job

    values = {"scenes": [str(odd / "cog_world.tif")], "out": str(tmp_path), "bundle": str(bundles[1])}
    plan = plan_job(load_job(None, {**values, "predict": {"bands": (1,), "resolution": "native"}}))
    assert 0 < plan.windows <= 18 * 36
    assert plan.memory_bytes < 1 << 30


def test_no_other_file_and_no_network_is_touched(odd: Path, tmp_path: Path) -> None:
    """Under strace: of the folder, only the files that are named are opened, and nothing is connected to."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed: what is opened cannot be watched")
    names = [name for name in sorted(AS_THEY_ARE) if not name.endswith(".msk")]
    trace = tmp_path / "trace"
    command = ["strace", "-f", "-qq", "-e", "trace=openat,open,connect", "-o", str(trace)]
    command += [sys.executable, "-m", "geoseg", "predict", *(str(odd / name) for name in names)]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "out"), "--engine", "local"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    lines = trace.read_text(errors="replace").splitlines()
    assert not [line for line in lines if "connect(" in line and "AF_INET" in line]
    opened = {line.split('"')[1] for line in lines if str(odd) in line and "O_DIRECTORY" not in line}
    assert {Path(path).name for path in opened} <= set(names)
    assert len(opened) > 20, "the trace must have seen the scenes"
