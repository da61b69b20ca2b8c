"""Features of a box: those that geopandas finds there, from the row groups that lie near it and no others."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from shapely.geometry import LineString, Point, box

from geoseg.errors import SceneReadError
from geoseg.raster import store
from geoseg.view.features import MOST_FEATURES, FeatureFile

COLUMNS = ["id", "class", "area_m2", "confidence", "geometry"]


def squares(num: int) -> geopandas.GeoDataFrame:
    rng = np.random.default_rng(4)
    xs, ys = rng.random((2, num)) * 1000
    order = np.lexsort((xs, ys // 100))
    told = {"id": np.arange(num), "class": 1, "area_m2": 25.0, "confidence": rng.random(num)}
    return geopandas.GeoDataFrame(
        told, geometry=[box(x, y, x + 5, y + 5) for x, y in zip(xs[order], ys[order], strict=True)], crs=32633
    )


def opened(frame: geopandas.GeoDataFrame, path: Path, **settings: Any) -> FeatureFile:
    frame.to_parquet(path, write_covering_bbox=True, **{"row_group_size": 100, **settings})
    return FeatureFile.open(store.head(str(path)))


def found(file: FeatureFile, *sides: float, **settings: Any) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(file.read(sides, **settings))
    return told


@pytest.fixture(scope="module")
def frame() -> geopandas.GeoDataFrame:
    return squares(2000)


@pytest.fixture(scope="module")
def file(frame: geopandas.GeoDataFrame, tmp_path_factory: pytest.TempPathFactory) -> FeatureFile:
    return opened(frame, tmp_path_factory.mktemp("features") / "buildings.parquet")


@settings(max_examples=40, deadline=None)
@given(corner=st.tuples(st.floats(-50, 1050), st.floats(-50, 1050)), width=st.floats(0, 600), height=st.floats(0, 600))
def test_they_are_those_that_geopandas_finds(
    corner: tuple[float, float], width: float, height: float, frame: geopandas.GeoDataFrame, file: FeatureFile
) -> None:
    sides = (*corner, corner[0] + width, corner[1] + height)
    told = found(file, *sides)
    wanted = frame[frame.intersects(box(*sides))].set_index("id")
    assert {one["properties"]["id"] for one in told["features"]} == set(wanted.index)
    for one in told["features"]:
        row = wanted.loc[one["properties"]["id"]]
        assert shapely.equals_exact(shapely.geometry.shape(one["geometry"]), row.geometry)
        assert one["properties"] == {"id": row.name, **{name: row[name] for name in COLUMNS[1:-1]}}


def test_row_groups_far_from_the_box_are_not_read(file: FeatureFile) -> None:
    near = file.groups_in((0, 0, 1000, 90))
    assert 1 <= len(near) <= 4 < file.metadata.num_row_groups
    before = file.file.bytes_fetched
    assert found(file, 0, 0, 1000, 90)["features"]
    taken = file.file.bytes_fetched - before
    assert taken < file.file.size * (len(near) + 1) / file.metadata.num_row_groups
    assert found(file, 5000, 5000, 6000, 6000)["features"] == []


def test_too_many_are_told_and_not_shown_in_part(file: FeatureFile) -> None:
    assert found(file, 0, 0, 1000, 1000, most=1999) == {"type": "FeatureCollection", "too_many": True, "features": []}
    assert len(found(file, 0, 0, 1010, 1010, most=2000)["features"]) == 2000
    assert MOST_FEATURES >= 1000


def test_a_few_with_very_many_points_are_too_many_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rings = geopandas.GeoDataFrame(
        {"id": [1, 2]}, geometry=[Point(0, 0).buffer(9, 500), Point(50, 0).buffer(9, 500)], crs=32633
    )
    file = opened(rings, tmp_path / "rings.parquet")
    assert len(found(file, -10, -10, 60, 10)["features"]) == 2
    monkeypatch.setattr("geoseg.view.features.MOST_POINTS", 3000)
    assert found(file, -10, -10, 60, 10)["too_many"]


def test_lines_and_what_json_does_not_know(tmp_path: Path) -> None:
    told = {
        "id": ["a", None],
        "length_m": [np.nan, 5.0],
        "width_m": [np.inf, 2.5],
        "from": [1, -19_970_000_000_000_001],
        "name": ["<b>'\"", "ü"],
    }
    lines = geopandas.GeoDataFrame(
        told, geometry=[LineString([(0, 0), (1, 1)]), LineString([(2, 2), (3, 3)])], crs=32633
    )
    first, second = found(opened(lines, tmp_path / "roads.parquet"), -1, -1, 9, 9)["features"]
    assert first["properties"] == {"id": "a", "length_m": None, "width_m": None, "from": 1, "name": "<b>'\""}
    assert second["properties"] == {
        "id": None,
        "length_m": 5.0,
        "width_m": 2.5,
        "from": "-19970000000000001",
        "name": "ü",
    }
    assert first["geometry"] == {"type": "LineString", "coordinates": [[0, 0], [1, 1]]}


def test_a_file_without_features_has_none(tmp_path: Path) -> None:
    assert found(opened(squares(5).iloc[:0], tmp_path / "none.parquet"), 0, 0, 9, 9)["features"] == []


def test_a_group_without_statistics_is_read(tmp_path: Path, frame: geopandas.GeoDataFrame) -> None:
    made = io.BytesIO()
    frame.to_parquet(made, write_covering_bbox=True)
    path = tmp_path / "bare.parquet"
    pq.write_table(pq.read_table(made), path, row_group_size=100, write_statistics=False)
    file = FeatureFile.open(store.head(str(path)))
    assert len(file.groups_in((0, 0, 1, 1))) == 20
    assert len(found(file, 0, 0, 1010, 1010)["features"]) == 2000


@pytest.mark.parametrize("kind", ["no parquet", "no geometry", "no boxes", "cut short"])
def test_another_file_is_refused_with_what_to_do(kind: str, tmp_path: Path, frame: geopandas.GeoDataFrame) -> None:
    path = tmp_path / "file.parquet"
    if kind == "no parquet":
        path.write_bytes(b"PAR1 is not enough PAR1")
    elif kind == "no geometry":
        pq.write_table(pa.table({"id": [1]}), path)
    elif kind == "no boxes":
        frame.to_parquet(path)
    else:
        frame.to_parquet(path, write_covering_bbox=True)
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(SceneReadError, match="write_covering_bbox=True"):
        FeatureFile.open(store.head(str(path)))


def test_damaged_pages_are_told(tmp_path: Path, frame: geopandas.GeoDataFrame) -> None:
    path = tmp_path / "file.parquet"
    frame.to_parquet(path, write_covering_bbox=True)
    body = bytearray(path.read_bytes())
    body[4:20_000] = bytes(19_996)
    path.write_bytes(body)
    with pytest.raises(SceneReadError, match="cannot be read"):
        FeatureFile.open(store.head(str(path))).read((0, 0, 1000, 1000))
