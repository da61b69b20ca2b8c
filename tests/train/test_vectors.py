"""Vector files: four formats, their CRS, their geometries, and what a file in disguise may not do."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pyproj
import pytest
import shapely
from kit.vectors import FORMATS, write_vectors

from geoseg.errors import LabelError, StopError
from geoseg.raster.grid import Grid
from geoseg.raster.window import Window
from geoseg.raster.work import WorkGrid
from geoseg.train.vectors import LineWidth, find_vectors, load_features, place

UTM = pyproj.CRS(32633)
GRID = Grid(UTM.to_wkt(), (0.5, 0, 500_000, 0, -0.5, 5_300_000), 80, 120)
SQUARES = [shapely.box(500_000 + 8 * x, 5_299_970, 500_005 + 8 * x, 5_299_978) for x in range(3)]
BOW_TIE = shapely.Polygon([(0, 0), (10, 10), (10, 0), (0, 10)])


def load(path: Path, *fields: str, layer: str | None = None):
    return load_features(find_vectors(str(path), layer), fields)


def burnt(path: Path, grid: Grid = GRID, *, width: LineWidth | None = None) -> npt.NDArray[np.int32]:
    shapes = place(load(path, *(one for one in [width and width.field] if one)), grid, width=width)
    work = WorkGrid((grid.height, grid.width), (grid.height, grid.width), 0, (grid.height, grid.width))
    return shapes.burn(work, Window(0, 0, grid.width, grid.height), shapes.numbers, fill=0)


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_gives_the_same_geometries_and_fields(suffix: str, tmp_path: Path) -> None:
    path = write_vectors(
        tmp_path / f"a{suffix}", SQUARES, crs="EPSG:32633", width=[1.5, None, 3.0], kind=["x", "y", "z"]
    )
    features = load(path, "kind", "width")
    order = np.argsort(features.columns["kind"])  # FlatGeobuf sorts its features by place
    assert shapely.equals_exact(features.geometries[order], SQUARES, tolerance=1e-6).all()
    assert sorted(zip(features.columns["kind"], map(str, features.columns["width"]), strict=True)) == [
        ("x", "1.5"),
        ("y", "None"),
        ("z", "3.0"),
    ]
    assert features.crs.to_epsg() == 32633
    assert not features.remarks


def test_a_geojson_without_a_crs_is_in_degrees(tmp_path: Path) -> None:
    path = tmp_path / "a.geojson"
    path.write_text(
        json.dumps({"type": "Feature", "properties": {}, "geometry": shapely.box(14, 47, 15, 48).__geo_interface__})
    )
    assert load(path).crs.to_epsg() == 4326


def test_another_crs_is_brought_where_pyproj_says(tmp_path: Path) -> None:
    inner = shapely.box(500_003, 5_299_970, 500_050, 5_299_990)
    to_degrees = pyproj.Transformer.from_crs(UTM, 4326, always_xy=True)
    degrees = shapely.transform(inner, to_degrees.transform, interleaved=False)
    path = write_vectors(tmp_path / "a.gpkg", [degrees], crs="EPSG:4326")
    shapes = place(load(path), GRID, width=None)
    assert shapely.bounds(shapes.geometries[0]) == pytest.approx([6, 20, 100, 60], abs=1e-4)


def test_a_long_edge_bends_as_its_own_crs_has_it(tmp_path: Path) -> None:
    """A parallel is a curve in UTM: over 60 km, its middle lies tens of metres off the straight line between its ends."""
    grid = Grid(UTM.to_wkt(), (20, 0, 470_000, 0, -20, 5_300_000), 3000, 3000)
    path = write_vectors(tmp_path / "a.fgb", [shapely.box(14, 47, 16, 47.6)], crs="EPSG:4326")
    (shape,) = place(load(path), grid, width=None).geometries
    to_utm = pyproj.Transformer.from_crs(4326, UTM, always_xy=True)
    for lon in np.linspace(14.61, 15.3, 9):
        x, y = to_utm.transform(lon, 47.6)
        col, row = ~grid.affine @ (x, y)
        assert shapely.Point(col, row).distance(shape.exterior) < 0.05
    straight = shapely.LineString([~grid.affine @ to_utm.transform(lon, 47.6) for lon in (14.61, 15.3)])
    assert straight.distance(shapely.Point(~grid.affine @ to_utm.transform(14.95, 47.6))) > 1


@pytest.mark.parametrize("crs", [32633, 3857], ids=["UTM", "Web Mercator"])
def test_a_line_is_as_wide_as_its_ground(crs: int, tmp_path: Path) -> None:
    """At 47.8 degrees north a metre on the ground is 1.49 units of Web Mercator."""
    x, y = pyproj.Transformer.from_crs(UTM, crs, always_xy=True).transform(500_000, 5_300_000)
    grid = Grid(pyproj.CRS(crs).to_wkt(), (0.5, 0, x, 0, -0.5, y), 80, 120)
    line = shapely.LineString([(x - 5, y - 20.1), (x + 100, y - 20.1)])
    path = write_vectors(tmp_path / "a.gpkg", [line], crs=f"EPSG:{crs}")
    (painted,) = np.nonzero(burnt(path, grid, width=LineWidth(12.0, None))[:, 60])
    assert painted.mean() + 0.5 == pytest.approx(40, abs=1)
    rows = len(painted)
    assert rows * grid.pixel_size_m[1] == pytest.approx(12, abs=0.5)
    assert rows == pytest.approx(24 if crs == 32633 else 36, abs=1)


def test_a_field_says_how_wide_a_line_is_and_a_default_where_it_is_empty(tmp_path: Path) -> None:
    lines = [shapely.LineString([(500_000, y), (500_060, y)]) for y in (5_299_990.1, 5_299_975.1)]
    path = write_vectors(tmp_path / "a.geojson", lines, crs="EPSG:32633", width=[4.0, None])
    found = burnt(path, width=LineWidth(10.0, "width"))[:, 60]
    assert ((found == 1).sum(), (found == 2).sum()) == (8, 20)


@pytest.mark.parametrize(
    ("width", "values", "told"),
    [
        (LineWidth(None, None), None, "feature 2 is a line without a width; give width_m"),
        (LineWidth(None, "width"), [5.0, None], "feature 2 is a line without a width; give width_m"),
        (LineWidth(6.0, "width"), [5.0, -1.0], "feature 2 has the width -1.0 in 'width'"),
        (LineWidth(6.0, "width"), ["5", "wide"], "feature 2 has the width 'wide' in 'width'"),
        (None, None, "feature 2 is a line; an area is made of polygons"),
    ],
)
def test_a_line_without_a_width_is_refused_by_name(width, values, told, tmp_path: Path) -> None:
    line = shapely.LineString([(500_000, 5_299_990), (500_060, 5_299_990)])
    first = line if values else SQUARES[0]
    path = write_vectors(
        tmp_path / "a.geojson", [first, line], crs="EPSG:32633", **({"width": values} if values else {})
    )
    with pytest.raises(LabelError, match=rf"a\.geojson: {told}"):
        burnt(path, width=width)


def test_a_polygon_that_crosses_itself_is_repaired_and_keeps_its_area(tmp_path: Path) -> None:
    path = write_vectors(tmp_path / "a.gpkg", [SQUARES[0], BOW_TIE], crs="EPSG:32633")
    features = load(path)
    assert features.geometries[1].is_valid
    assert features.geometries[1].area == pytest.approx(50)
    (remark,) = features.remarks
    assert "1 invalid polygon(s) repaired, first feature 2 (Self-intersection" in remark


def test_features_without_a_geometry_or_area_are_left_out_and_told(tmp_path: Path) -> None:
    flat = shapely.Polygon([(0, 0), (1, 1), (2, 2), (0, 0)])
    path = write_vectors(
        tmp_path / "a.gpkg", [None, SQUARES[0], shapely.Polygon(), flat], crs="EPSG:32633", kind=list("abcd")
    )
    features = load(path, "kind")
    assert features.numbers.tolist() == [2]
    assert features.columns["kind"] == ["b"]
    assert features.remarks[0].endswith("3 feature(s) without a geometry or area left out, first feature 1")


@pytest.mark.parametrize(
    ("geometry", "told"),
    [
        (shapely.Point(1, 1), "feature 2 is a Point; labels are polygons, or lines with a width"),
        (shapely.Polygon([(0, 0), (1, np.inf), (1, 0)]), "feature 2 has a coordinate that is not finite"),
    ],
)
def test_what_cannot_be_a_label_is_refused_by_name(geometry, told: str, tmp_path: Path) -> None:
    path = write_vectors(tmp_path / "a.parquet", [SQUARES[0], geometry], crs="EPSG:32633")
    with pytest.raises(LabelError, match=rf"a\.parquet: {told}"):
        load(path)


def test_layers_and_fields_are_known_by_name(tmp_path: Path) -> None:
    path = write_vectors(tmp_path / "a.gpkg", SQUARES, crs="EPSG:32633", layer="roofs", kind=list("abc"))
    write_vectors(path, SQUARES[:1], crs="EPSG:32633", layer="sheds", append=True)
    assert len(load(path, layer="roofs").numbers) == 3
    with pytest.raises(
        LabelError, match=r"has 2 layers with geometries \(roofs, sheds\); say which with layer = 'roofs'"
    ):
        load(path)
    with pytest.raises(LabelError, match="has no layer 'houses' with geometries, only roofs, sheds"):
        load(path, layer="houses")
    with pytest.raises(LabelError, match="has no field 'colour', only kind"):
        load(path, "colour", layer="roofs")
    parquet = write_vectors(tmp_path / "a.parquet", SQUARES, crs="EPSG:32633", kind=list("abc"))
    with pytest.raises(LabelError, match="has no field 'colour', only kind"):
        load(parquet, "colour")


@pytest.mark.parametrize("suffix", [".gpkg", ".fgb", ".parquet"])
def test_a_file_without_a_crs_is_refused(suffix: str, tmp_path: Path) -> None:
    path = write_vectors(tmp_path / f"a{suffix}", SQUARES, crs=None)
    with pytest.raises(LabelError, match="has no CRS"):
        load(path)


def test_other_encodings_of_geoparquet_are_refused(tmp_path: Path) -> None:
    geo = {"version": "1.1.0", "primary_column": "g", "columns": {"g": {"encoding": "polygon", "geometry_types": []}}}
    table = pa.table({"g": [b""]}).replace_schema_metadata({"geo": json.dumps(geo)})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(LabelError, match="encoded as polygon, geoseg reads WKB"):
        load(tmp_path / "a.parquet")


@pytest.mark.parametrize("content", [b"", b"II*\x00rest", b"<OGRVRTDataSource/>", b"id,wkt\n1,POINT(0 0)\n", b"PAR1"])
def test_anything_else_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.gpkg").write_bytes(content)
    with pytest.raises(LabelError, match=r"a\.gpkg: (vector labels are GeoJSON|not a readable GeoParquet)"):
        load(tmp_path / "a.gpkg")


@pytest.mark.parametrize("disguise", ["a pipeline of GDAL", "a TopoJSON", "an SQLite database"])
def test_a_file_in_disguise_opens_no_other_file(disguise: str, tmp_path: Path) -> None:
    """All of these GDAL would read with another driver; the first one reads any file it names."""
    secret = write_vectors(tmp_path / "secret.geojson", SQUARES, crs="EPSG:32633")
    path = tmp_path / "a.geojson"
    if disguise == "a pipeline of GDAL":
        path.write_text(
            json.dumps(
                {
                    "type": "gdal_streamed_alg",
                    "command_line": f"gdal vector pipeline ! read {secret} ! write --of stream x",
                }
            )
        )
    elif disguise == "a TopoJSON":
        path.write_text(json.dumps({"type": "Topology", "objects": {}, "arcs": []}))
    else:
        import sqlite3

        with sqlite3.connect(path) as database:
            database.execute("create table t (a)")
    with pytest.raises(LabelError, match=r"a\.geojson: (cannot be read as GeoJSON|vector labels are)"):
        load(path)


def test_a_damaged_file_is_refused_with_what_gdal_says(tmp_path: Path) -> None:
    path = tmp_path / "a.geojson"
    path.write_text('{"type": "FeatureCollection", "features": [')
    with pytest.raises(LabelError, match=r"a\.geojson: cannot be read as GeoJSON: ") as caught:
        load(path)
    assert "Traceback" not in str(caught.value)


def test_a_file_that_was_replaced_stops_the_run(tmp_path: Path) -> None:
    path = write_vectors(tmp_path / "a.geojson", SQUARES, crs="EPSG:32633")
    file = find_vectors(str(path), None)
    write_vectors(path, SQUARES[:1], crs="EPSG:32633")
    with pytest.raises(StopError, match="changed while the run was going on"):
        load_features(file, ())
