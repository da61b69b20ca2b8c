"""A layer's file: whole, ordered in space, the same whatever order its features came in, and open to those who read it."""

from __future__ import annotations

import os
import subprocess
import sys

import geopandas
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely
from rasterio.crs import CRS

from geoseg.errors import SceneError
from geoseg.vector.layers import ROWS_PER_GROUP, LayerKind, LayerSpool, convert, hilbert_code

COLUMNS = pa.schema([("id", pa.int64()), ("class", pa.string()), ("confidence", pa.float32())])
BUILDINGS = LayerKind(name="buildings", geometry="Polygon", columns=COLUMNS)
WKT = CRS.from_epsg(32640).to_wkt()


def houses(num, seed=3):
    rng = np.random.default_rng(seed)
    x, y = rng.uniform(400_000, 402_000, num), rng.uniform(2_700_000, 2_702_000, num)
    columns = {
        "id": np.arange(num),
        "class": ["building"] * num,
        "confidence": [None if place % 7 == 0 else place / num for place in range(num)],
    }
    return columns, shapely.box(x, y, x + rng.uniform(5, 15, num), y + 9)


def write(folder, columns, geometries, *, order, at_once, name="b.parquet"):
    with LayerSpool(BUILDINGS, folder) as spool:
        for start in range(0, len(order), at_once):
            some = order[start : start + at_once]
            spool.add({key: [values[one] for one in some] for key, values in columns.items()}, geometries[some])
        spool.write_parquet(folder / name, WKT)
    return folder / name


def test_a_layer_holds_each_feature_once_and_does_not_depend_on_their_order(tmp_path):
    num = 2 * ROWS_PER_GROUP + 77
    columns, geometries = houses(num)
    one = write(tmp_path, columns, geometries, order=np.arange(num), at_once=1000)
    mixed = np.random.default_rng(1).permutation(num)
    other = write(tmp_path, columns, geometries, order=mixed, at_once=3333, name="c.parquet")
    assert one.read_bytes() == other.read_bytes()
    read = geopandas.read_parquet(one).sort_values("id")
    assert read.crs.to_epsg() == 32640
    assert read["id"].tolist() == list(range(num))
    assert shapely.equals_exact(read.geometry.to_numpy(), geometries).all()
    assert [None if np.isnan(value) else value for value in read["confidence"]] == pytest.approx(columns["confidence"])
    assert pq.ParquetFile(one).metadata.num_row_groups == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.parquet", "c.parquet"]


def test_an_empty_layer_is_a_file_too(tmp_path):
    path = write(tmp_path, {"id": [], "class": [], "confidence": []}, np.array([]), order=np.arange(0), at_once=1)
    read = geopandas.read_parquet(path)
    assert len(read) == 0
    assert read.crs.to_epsg() == 32640


def test_neighbours_on_the_curve_lie_beside_each_other():
    cols, rows = (each.ravel() for each in np.meshgrid(np.arange(64), np.arange(64)))
    code = hilbert_code(cols, rows)
    assert np.array_equal(np.sort(code), np.arange(64 * 64))
    order = np.argsort(code)
    steps = np.abs(np.diff(cols[order])) + np.abs(np.diff(rows[order]))
    assert (steps == 1).all()
    far = hilbert_code(np.array([65_535, 0]), np.array([0, 65_535]))
    assert sorted(far) == sorted({*far})
    assert far.max() == 65_536**2 - 1


@pytest.mark.parametrize("suffix", ["fgb", "gpkg", "pmtiles"])
def test_other_formats_hold_the_same_features(tmp_path, suffix):
    columns, geometries = houses(300)
    path = write(tmp_path, columns, geometries, order=np.arange(300), at_once=300)
    convert(path, tmp_path / f"b.{suffix}", BUILDINGS)
    before = (tmp_path / f"b.{suffix}").read_bytes()
    (tmp_path / f"b.{suffix}").unlink()
    convert(path, tmp_path / f"b.{suffix}", BUILDINGS)
    assert (tmp_path / f"b.{suffix}").read_bytes() == before
    program = (
        "import sys, pyogrio; frame = pyogrio.read_dataframe(sys.argv[1]); "
        "print(len(frame), frame.crs.to_epsg(), frame['class'].iloc[0], frame.geometry.is_valid.all(), round(frame.area.sum()))"
    )
    command = [sys.executable, "-c", program, tmp_path / f"b.{suffix}"]
    everything = {key: value for key, value in os.environ.items() if not key.startswith("GDAL_")}
    told = subprocess.run(command, check=True, capture_output=True, text=True, env=everything).stdout.split()
    if suffix == "pmtiles":  # cut at the borders of tiles, in Web Mercator
        assert int(told[0]) >= 300
        assert told[1:3] == ["3857", "building"]
    else:
        assert told == ["300", "32640", "building", "True", str(round(shapely.area(geometries).sum()))]


def test_what_cannot_be_written_is_told(tmp_path):
    columns, geometries = houses(3)
    path = write(tmp_path, columns, geometries, order=np.arange(3), at_once=3)
    with pytest.raises(SceneError, match=r"b\.fgb: the layer buildings could not be written: .+"):
        convert(path, tmp_path / "nowhere" / "b.fgb", BUILDINGS)
