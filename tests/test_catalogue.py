"""The catalogue of an output: what other programs read in it, that it says what the items say, and that it disturbs nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import geopandas
import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pystac
import pytest
import rasterio
import stac_geoparquet.arrow
from affine import Affine
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from kit.nights import job, objects, put
from kit.oracle import published_mask
from kit.scenes import AT_UTM, ROTATED, noise, write_scene
from pystac import STACObjectType
from pystac.validation import validate_dict
from shapely.geometry import shape

import geoseg.catalogue
from geoseg.catalogue import Catalogue, make_catalogue
from geoseg.cli import main
from geoseg.errors import ConfigError, NothingReadableError
from geoseg.nightly import run_nightly
from geoseg.predict.collection import union_bbox
from geoseg.predict.output import list_output
from geoseg.predict.verify import verify_output
from geoseg.raster import store
from geoseg.raster.seal import sealed

Pixels = Callable[[int], bytes]
_READ = """
import sys, numpy, rasterio
with rasterio.open(sys.argv[1]) as dataset:
    colors = dataset.colormap(1)
    told = [colors.get(value, (0, 0, 0, 255)) for value in range(4)]
    numpy.savez(
        sys.argv[2], pixels=dataset.read(1), driver=dataset.driver, nodata=dataset.nodata, colors=told,
        transform=list(dataset.transform)[:6], epsg=dataset.crs.to_epsg() or 0, overviews=dataset.overviews(1),
        coarse=dataset.read(1, out_shape=(max(1, dataset.height // 4), max(1, dataset.width // 4))),
    )
"""


def opened(path: Path, tmp_path: Path) -> Any:
    """Read a raster in a process whose GDAL has all its drivers, from another folder."""
    out = tmp_path / "read.npz"
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("GDAL_", "PYTHONPATH"))}
    subprocess.run([sys.executable, "-c", _READ, path, out], check=True, env=environment, cwd="/")
    return np.load(out)


def catalogue(root: str, **how: Any) -> Catalogue:
    return make_catalogue(f"{root}/out", quiet=True, **how)


def collection(root: str) -> dict[str, Any]:
    told = json.loads(store.read(f"{root}/out/collection.json"))
    validate_dict(told, stac_object_type=STACObjectType.COLLECTION, extensions=[])
    return told


def item(root: str, scene_id: str) -> dict[str, Any]:
    return json.loads(store.read(f"{root}/out/{scene_id}/item.json"))


def change(root: str, scene_id: str, **properties: Any) -> None:
    """Write an item anew with other properties; a key that is not one of the properties is the item's own."""
    told = item(root, scene_id)
    for key, value in properties.items():
        (told if key in told else told["properties"])[key.replace("__", ":")] = value
    store.write(f"{root}/out/{scene_id}/item.json", sealed(told))


def top(root: str) -> dict[str, bytes]:
    """Return the objects of the catalogue."""
    return {
        info.uri.removeprefix(f"{root}/out/"): store.read(info.uri)
        for info in store.walk(f"{root}/out/")
        if "/" not in info.uri.removeprefix(f"{root}/out/")
    }


def placed(root: str, bundle: Path, *scenes: tuple[str, npt.NDArray[Any], Affine, str], tmp_path: Path) -> None:
    """Publish scenes by their names, pixels, geotransforms and CRS."""
    for name, pixels, transform, crs in scenes:
        path = write_scene(tmp_path / "made.tif", pixels, transform=transform, crs=crs, nodata=0)
        store.write(f"{root}/in/{name}.tif", path.read_bytes())
    run_nightly(job(root, bundle, predict={"resolution": "native"}), quiet=True)


def test_it_says_what_the_items_say(root: str, bundles: tuple[Path, Path], pixels: Pixels) -> None:
    put(root, pixels, "00", "01", "02")
    run_nightly(job(root, bundles[0]), quiet=True)
    before = objects(root)
    made = catalogue(root, title="Town", licence="CC-BY-4.0", name="town")
    assert (made.exit_code, made.num_items, made.left_out, made.remarks) == (0, 3, (), ())
    told = collection(root)
    assert (told["id"], told["title"], told["license"]) == ("town", "Town", "CC-BY-4.0")
    items = [item(root, name) for name in ("00", "01", "02")]
    counts: dict[str, int] = {}
    for one in items:
        for each in one["assets"]["mask"]["classification:classes"][:-1]:
            counts[each["name"]] = counts.get(each["name"], 0) + each["count"]
    classes = told["summaries"]["geoseg:classes"]
    assert {one["name"]: one["pixels"] for one in classes} == counts
    assert sum(counts.values()) == 3 * 40 * 53
    gsd = items[0]["properties"]["gsd"]
    assert sum(one["area_km2"] for one in classes) == pytest.approx(3 * 40 * 53 * gsd**2 / 1e6, abs=1e-5)
    assert told["summaries"]["gsd"] == {"minimum": gsd, "maximum": gsd}
    assert told["summaries"]["proj:code"] == ["EPSG:32633"]
    (bundle,) = told["summaries"]["geoseg:bundle"]
    assert bundle == {**items[0]["properties"]["geoseg:bundle"], "items": 3}
    for key in ("mlm:name", "mlm:architecture", "mlm:framework"):
        assert told["summaries"][key] == [items[0]["properties"][key]]
    assert told["summaries"]["mlm:input"] == items[0]["properties"]["mlm:input"]
    assert set(told["item_assets"]) == {"mask", "thumbnail", "model"}
    assert not any("href" in one or "file:size" in one for one in told["item_assets"].values())
    assert [one["href"] for one in told["links"] if one["rel"] == "item"] == [f"./0{n}/item.json" for n in range(3)]
    west, south, east, north = told["extent"]["spatial"]["bbox"][0]
    boxes = np.array([one["bbox"] for one in items])
    assert [west, south, east, north] == [*boxes[:, :2].min(0), *boxes[:, 2:].max(0)]
    interval = told["extent"]["temporal"]["interval"][0]
    times = sorted(one["properties"]["datetime"] for one in items)
    assert interval == [times[0], times[-1]]
    assert told["assets"]["items.parquet"]["roles"] == ["collection-mirror"]
    stood = top(root)
    assert set(stood) == {"collection.json", "items.parquet", "mosaic-EPSG-32633.vrt"}
    catalogue(root, title="Town", licence="CC-BY-4.0", name="town")
    assert top(root) == stood, "the same items give the same bytes"
    assert {name: etag for name, etag in objects(root).items() if "/" in name} == before, "items stay as they are"
    checked = verify_output(f"{root}/out")
    assert (checked.num_items, checked.faults, checked.orphans) == (3, (), ())


def test_pystac_walks_it_from_its_file(bundles: tuple[Path, Path], pixels: Pixels, tmp_path: Path) -> None:
    root = str(tmp_path)
    put(root, pixels, "00", "01")
    run_nightly(job(root, bundles[0]), quiet=True)
    catalogue(root)
    read = pystac.Collection.from_file(f"{root}/out/collection.json")
    items = list(read.get_items())
    assert [one.id for one in items] == ["00", "01"]
    for one in items:
        validate_dict(one.to_dict(transform_hrefs=False), stac_object_type=STACObjectType.ITEM, extensions=[])
        assert Path(one.assets["mask"].get_absolute_href()).exists()
    assert Path(read.assets["items.parquet"].get_absolute_href()).exists()


def test_other_programs_read_the_items(bundles: tuple[Path, Path], tmp_path: Path) -> None:
    root = str(tmp_path)
    scenes = [
        ("b", noise(3, 40, 53), AT_UTM, "EPSG:32633"),
        ("a", noise(3, 40, 53), Affine(1e-5, 0, 15.0, 0, -1e-5, 47.0), "EPSG:4326"),
        ("c", noise(3, 30, 20), Affine(10, 0, 500_000, 0, -10, 5_300_000), "EPSG:32633"),
    ]
    placed(root, bundles[0], *scenes, tmp_path=tmp_path)
    one = job(root, bundles[0], scenes=[f"{root}/in/c.tif"], predict={"resolution": 12.5, "probabilities": True})
    run_nightly(one, quiet=True)  # settings of another type: a number where others have a word
    change(root, "b", geoseg__novelty=1)
    assert catalogue(root, name="town").remarks == ()
    path = f"{root}/out/items.parquet"
    table = pq.read_table(path)
    assert table.column("id").to_pylist() == ["a", "b", "c"]
    back = list(stac_geoparquet.arrow.stac_table_to_items(table))
    for told in back:
        was = item(root, told["id"])
        assert shape(told["geometry"]).equals(shape(was["geometry"]))
        assert list(told["bbox"]) == pytest.approx(was["bbox"])
        assert told["collection"] == "town"
        assert json.loads(told["properties"]["geoseg:settings"]) == was["properties"]["geoseg:settings"]
        assert set(told["assets"]) == set(was["assets"])
        for asset in told["assets"].values():
            assert Path(root, "out", asset["href"]).exists(), "hrefs count from the file"
    frame = geopandas.read_parquet(path)
    assert frame.crs.to_epsg() == 4326
    assert frame.geometry.iloc[1].equals(shape(item(root, "b")["geometry"]))
    near = geopandas.read_parquet(path, bbox=(14.9, 46.9, 15.1, 47.1))
    assert near["id"].tolist() == ["a"], "the bbox column is a covering"
    rows = duckdb.sql(f"SELECT id, gsd, assets.mask.href FROM '{path}' WHERE bbox.ymin > 47.5 ORDER BY id").fetchall()  # noqa: S608
    assert [row[0] for row in rows] == ["b", "c"]
    assert rows[1][1] == pytest.approx(10, rel=0.01)
    assert json.loads(pq.read_schema(path).metadata[b"stac-geoparquet"])["collections"]["town"]["type"] == "Collection"


def overlapping(root: str, bundle: Path, tmp_path: Path) -> None:
    """Publish three scenes on one lattice that overlap; the second has a hole, the first is the newest."""
    made = [noise(3, 40, 53, seed=seed) for seed in range(3)]
    made[1][:, 10:20, 10:30] = 0
    made[0][:, 30:35, 40:50] = 0
    moves = [(0, 0), (20, 15), (45, 5)]
    scenes = [
        (name, one, AT_UTM @ Affine.translation(*move), "EPSG:32633")
        for name, one, move in zip("abc", made, moves, strict=True)
    ]
    placed(root, bundle, *scenes, tmp_path=tmp_path)
    for name, time in (("a", "2024-06-01T00:00:00Z"), ("b", "2020-06-01T00:00:00Z"), ("c", "2020-06-01T00:00:00Z")):
        change(root, name, datetime=time)


def whole(root: str) -> npt.NDArray[np.uint8]:
    """Put the masks of ``overlapping`` on each other by hand."""
    out = np.full((55, 98), 255, np.uint8)
    for name, (col, row) in (("b", (20, 15)), ("c", (45, 5)), ("a", (0, 0))):
        mask = published_mask(f"{root}/out/{name}/{item(root, name)['assets']['mask']['href'][2:]}")
        part = out[row : row + 40, col : col + 53]
        part[mask != 255] = mask[mask != 255]
    return out


@pytest.mark.parametrize("kind", ["VRT", "GTI"])
def test_a_mosaic_shows_the_masks_the_newest_on_top(
    kind: str, bundles: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = str(tmp_path)
    overlapping(root, bundles[0], tmp_path)
    if kind == "GTI":
        monkeypatch.setattr(geoseg.catalogue, "_MANY_MASKS", 2)
    catalogue(root)
    stood = top(root)
    name = "mosaic-EPSG-32633" + {"VRT": ".vrt", "GTI": ".gti.gpkg"}[kind]
    assert collection(root)["assets"][name]["file:size"] == len(stood[name])
    read = opened(Path(root, "out", name), tmp_path)
    assert str(read["driver"]) == kind
    assert np.array_equal(read["pixels"], whole(root))
    assert (read["pixels"] == 255).any()
    assert (float(read["nodata"]), int(read["epsg"])) == (255, 32633)
    assert list(read["transform"]) == list(AT_UTM)[:6]
    assert read["colors"][:3].tolist() == [[0, 0, 0, 255], [230, 85, 60, 255], [250, 200, 60, 255]]
    catalogue(root)
    assert top(root) == stood
    assert verify_output(f"{root}/out").faults == ()


def test_a_mosaic_of_large_masks_has_overviews(bundles: tuple[Path, Path], tmp_path: Path) -> None:
    root = str(tmp_path)
    placed(root, bundles[0], ("a", noise(3, 40, 1300), AT_UTM, "EPSG:32633"), tmp_path=tmp_path)
    catalogue(root)
    read = opened(Path(root, "out/mosaic-EPSG-32633.vrt"), tmp_path)
    assert read["overviews"].tolist() == [2, 4]
    assert np.array_equal(read["coarse"], read["pixels"][::4, ::4])


def test_other_lattices_show_the_nearest_pixel(bundles: tuple[Path, Path], tmp_path: Path) -> None:
    root = str(tmp_path)
    fine, coarse = Affine(0.5, 0, 500_000, 0, -0.5, 5_300_000), Affine(2.1, 0, 500_100.3, 0, -2.1, 5_300_007.7)
    placed(
        root, bundles[0], ("a", noise(3, 40, 53), fine, "EPSG:32633"), ("b", noise(3, 21, 33), coarse, "EPSG:32633"),
        tmp_path=tmp_path,
    )  # fmt: skip
    catalogue(root)
    read = opened(Path(root, "out/mosaic-EPSG-32633.vrt"), tmp_path)
    at = Affine(*read["transform"])
    assert (at.a, at.e, at.c, at.f) == (0.5, -0.5, 500_000, 5_300_007.7)
    pixels = read["pixels"]
    for name, grid, shape_hw, shift in (("a", fine, (40, 53), 0.5), ("b", coarse, (21, 33), 0.5)):
        mask = published_mask(f"{root}/out/{name}/{item(root, name)['assets']['mask']['href'][2:]}")
        rows, cols = np.nonzero(pixels != 255)
        xs, ys = at @ (cols + 0.5, rows + 0.5)
        own_cols, own_rows = ~grid @ (xs, ys)
        inside = (
            (own_rows > shift)
            & (own_rows < shape_hw[0] - shift)
            & (own_cols > shift)
            & (own_cols < shape_hw[1] - shift)
        )
        found = pixels[rows[inside], cols[inside]]
        # Where a centre lies nearer to a border than half of a mosaic's pixel, either side is right.
        near = [
            mask[np.clip(np.floor(own_rows[inside] + a), 0, shape_hw[0] - 1).astype(int),
                 np.clip(np.floor(own_cols[inside] + b), 0, shape_hw[1] - 1).astype(int)]
            for a in (-0.5 * 0.5 / -grid.e, 0, 0.5 * 0.5 / -grid.e)
            for b in (-0.5 * 0.5 / grid.a, 0, 0.5 * 0.5 / grid.a)
        ]  # fmt: skip
        assert inside.sum() > 1000
        assert np.any([found == one for one in near], axis=0).all()


def test_a_mosaic_for_each_crs_and_list_of_classes(bundles: tuple[Path, Path], tmp_path: Path) -> None:
    root = str(tmp_path)
    local = rasterio.crs.CRS.from_proj4("+proj=laea +lat_0=48 +lon_0=15 +datum=WGS84 +units=m")
    placed(
        root, bundles[0],
        ("a", noise(3, 40, 53), AT_UTM, "EPSG:32633"),
        ("b", noise(3, 40, 53), Affine(1e-5, 0, 15.0, 0, -1e-5, 47.0), "EPSG:4326"),
        ("c", noise(3, 40, 53), Affine(0.5, 0, 20, 0, -0.5, 30), local.to_wkt()),
        ("d", noise(3, 40, 53), ROTATED, "EPSG:32633"),
        tmp_path=tmp_path,
    )  # fmt: skip
    made = catalogue(root)
    assert made.exit_code == 0
    assert [remark for remark in made.remarks if "west to east" in remark] == list(made.remarks)
    assert made.remarks[0].startswith("d: ")
    names = sorted(name for name in top(root) if name.startswith("mosaic-"))
    assert names[:2] == ["mosaic-EPSG-32633.vrt", "mosaic-EPSG-4326.vrt"]
    assert names[2].startswith("mosaic-crs-")
    for name, scene_id in zip(names, "abc", strict=True):
        read = opened(Path(root, "out", name), tmp_path)
        mask = published_mask(f"{root}/out/{scene_id}/{item(root, scene_id)['assets']['mask']['href'][2:]}")
        assert np.array_equal(read["pixels"], mask), name
    assert (opened(Path(root, "out", names[1]), tmp_path)["epsg"]) == 4326
    told = item(root, "a")
    told["assets"]["mask"]["classification:classes"][1]["name"] = "a<b&\"c'"
    told["properties"]["proj:code"] = "EPSG:4326"
    told["properties"]["proj:transform"] = item(root, "b")["properties"]["proj:transform"]
    store.write(f"{root}/out/a/item.json", sealed(told))
    catalogue(root)
    names = sorted(name for name in top(root) if name.startswith("mosaic-"))
    assert len(names) == 3, "the one that lost its mask is gone"
    assert [name[:17] for name in names[:2]] == ["mosaic-EPSG-4326-"] * 2
    for name in names:
        opened(Path(root, "out", name), tmp_path)


def test_what_is_damaged_is_told_and_the_rest_goes_on(root: str, bundles: tuple[Path, Path], pixels: Pixels) -> None:
    with pytest.raises(NothingReadableError, match="holds no item"):
        catalogue(root)
    put(root, pixels, "00", "01", "02", "03", "04", "05", "06")
    run_nightly(job(root, bundles[0]), quiet=True)
    store.write(f"{root}/out/00/item.json", b"{")
    change(root, "01", assets={"mask": {"href": "./x.tif"}})
    change(root, "02", gsd="wide")
    change(root, "03", proj__shape="large")
    told = item(root, "04")
    del told["bbox"]
    store.write(f"{root}/out/04/item.json", json.dumps({**told, "geometry": None}).encode())
    told = item(root, "06")
    told["properties"]["mlm:framework"] = 7
    store.write(f"{root}/out/06/item.json", sealed(told))
    made = catalogue(root)
    assert (made.exit_code, made.num_items) == (1, 3)
    assert [sentence[:3] for sentence in sorted(made.left_out)] == ["00:", "01:", "02:", "03:"]
    assert [remark[:3] for remark in made.remarks] == ["04:", "06:"]
    assert [one["href"] for one in collection(root)["links"] if one["rel"] == "item"] == [
        "./04/item.json", "./05/item.json", "./06/item.json",
    ]  # fmt: skip
    rows = pq.read_table(store_file(f"{root}/out/items.parquet")).column("id").to_pylist()
    assert rows == ["05"]
    store.delete([f"{root}/out/0{number}/item.json" for number in (4, 5, 6)])
    with pytest.raises(NothingReadableError, match="holds no item that can be catalogued: 00: "):
        catalogue(root)


def store_file(uri: str) -> Any:
    import pyarrow as pa

    return pa.BufferReader(store.read(uri))


def test_a_collection_of_somebody_else_stays(bundles: tuple[Path, Path], pixels: Pixels, tmp_path: Path) -> None:
    root = str(tmp_path)
    put(root, pixels, "00")
    run_nightly(job(root, bundles[0]), quiet=True)
    store.write(f"{root}/out/collection.json", b'{"type": "Collection", "id": "theirs", "summaries": {}}')
    with pytest.raises(ConfigError, match="geoseg did not make"):
        catalogue(root)
    checked = verify_output(f"{root}/out")
    assert checked.faults == ()
    assert checked.orphans == (f"{root}/out/collection.json",)


def vectors(root: str, scene_id: str, **told: Any) -> None:
    """Put the item of a scene's buildings beside its mask."""
    import hashlib

    body = f"buildings of {scene_id}".encode()
    digest = hashlib.sha256(body).hexdigest()
    name = f"buildings-{digest[:16]}.parquet"
    store.write(f"{root}/out/{scene_id}/{name}", body)
    of_mask = item(root, scene_id)
    document = {
        **{key: of_mask[key] for key in ("type", "stac_version", "geometry", "bbox")},
        "id": f"{scene_id}-vectors",
        "properties": {
            "datetime": of_mask["properties"]["datetime"],
            "geoseg:mask_sha256": of_mask["assets"]["mask"]["file:checksum"].removeprefix("1220"),
        },
        "links": [{"rel": "derived_from", "href": "./item.json"}],
        "assets": {
            "buildings": {
                "href": f"./{name}",
                "type": "application/vnd.apache.parquet",
                "roles": ["data"],
                "title": "Buildings",
                "file:size": len(body),
                "file:checksum": "1220" + digest,
            }
        },
        **told,
    }
    store.write(f"{root}/out/{scene_id}/vectors.json", sealed(document))


def test_polygons_and_lines_are_catalogued_and_checked(root: str, bundles: tuple[Path, Path], pixels: Pixels) -> None:
    put(root, pixels, "00", "01", "02")
    run_nightly(job(root, bundles[0]), quiet=True)
    masks = verify_output(f"{root}/out").num_assets
    vectors(root, "01")
    checked = verify_output(f"{root}/out")
    assert (checked.num_items, checked.num_assets, checked.faults, checked.orphans) == (3, masks + 1, (), ())
    catalogue(root)
    told = collection(root)
    assert told["item_assets"]["buildings"] == {
        "type": "application/vnd.apache.parquet", "roles": ["data"], "title": "Buildings",
    }  # fmt: skip
    assert "./01/vectors.json" in [one["href"] for one in told["links"]]
    rows = pq.read_table(store_file(f"{root}/out/items.parquet")).to_pylist()
    assert [(row["assets"]["buildings"] or {}).get("href", "")[:15] for row in rows] == ["", "./01/buildings-", ""]
    vectors(root, "02", assets=7)
    made = catalogue(root)
    assert (made.num_items, made.left_out) == (3, ())
    assert made.remarks[0].startswith("02: ")
    assert "vectors.json" in verify_output(f"{root}/out").faults[0]
    vectors(root, "02")
    (name,) = (info.uri for info in store.walk(f"{root}/out/01/") if "buildings-" in info.uri)
    store.write(name, b"others entirely")
    assert "buildings-" in verify_output(f"{root}/out").faults[0]


def test_runs_and_checks_are_not_disturbed(root: str, bundles: tuple[Path, Path], pixels: Pixels) -> None:
    root = f"{root}/store"
    put(root, pixels, "00", "01", "02")
    around = job(root, bundles[0], scenes=[f"{root}/"])  # the output lies inside the sources
    run_nightly(around, quiet=True)
    before = list_output(f"{root}/out")
    catalogue(root)
    after = list_output(f"{root}/out")
    assert (after.items, after.beside, after.parts) == (before.items, before.beside, before.parts)
    assert run_nightly(around, quiet=True).counts == {"unchanged": 3}
    store.delete([f"{root}/in/02.tif"])
    gone = run_nightly(around, remove_gone=True, quiet=True)
    assert [(one.id, one.removed) for one in gone.gone] == [("in-02", True)]
    faults = verify_output(f"{root}/out").faults
    assert len(faults) == 1
    assert "in-02/item.json, which is not there; geoseg catalogue makes it anew" in faults[0]
    catalogue(root)
    checked = verify_output(f"{root}/out")
    assert (checked.faults, checked.orphans) == ((), ())
    store.write(f"{root}/out/items.parquet", b"PAR1")
    assert "items.parquet" in verify_output(f"{root}/out").faults[0]


def test_many_items_are_listed_in_the_parquet_alone(
    bundles: tuple[Path, Path], pixels: Pixels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = str(tmp_path)
    put(root, pixels, "00", "01", "02")
    run_nightly(job(root, bundles[0]), quiet=True)
    monkeypatch.setattr(geoseg.catalogue, "MOST_LINKS", 2)
    monkeypatch.setattr("geoseg.predict.collection.MOST_LINKS", 2)
    monkeypatch.setattr(geoseg.catalogue, "_BATCH", 2)
    made = catalogue(root)
    assert "links none" in made.remarks[0]
    assert [one["rel"] for one in collection(root)["links"]] == ["root", "items"]
    file = pq.ParquetFile(f"{root}/out/items.parquet")
    assert (file.num_row_groups, file.read().column("id").to_pylist()) == (2, ["00", "01", "02"])


def test_the_command(bundles: tuple[Path, Path], pixels: Pixels, tmp_path: Path) -> None:
    root = str(tmp_path)
    put(root, pixels, "00", "01")
    run_nightly(job(root, bundles[0]), quiet=True)
    done = CliRunner().invoke(main, ["catalogue", f"{root}/out", "--id", "town", "--license", "MIT"])
    assert done.exit_code == 0, done.output
    assert "2 items in the catalogue, 0 left out" in done.output
    assert "items read 2/2" in done.stderr
    assert (collection(root)["id"], collection(root)["license"]) == ("town", "MIT")
    store.write(f"{root}/out/00/item.json", b"{}")
    assert CliRunner().invoke(main, ["catalogue", f"{root}/out", "-q"]).exit_code == 1


boxes = st.lists(
    st.tuples(st.integers(-180, 179), st.integers(-90, 89), st.integers(1, 359), st.integers(1, 30)),
    min_size=1,
    max_size=6,
)


@given(boxes)
def test_the_box_around_boxes_leaves_the_widest_gap_out(drawn: list[tuple[int, int, int, int]]) -> None:
    covered = np.zeros(360, np.bool_)  # degree by degree
    made = []
    for west, south, width, height in drawn:
        covered[(np.arange(west, west + width) + 180) % 360] = True
        east = west + width if west + width <= 180 else west + width - 360
        made.append([float(west), float(south), float(east), float(min(90, south + height))])
    found = union_bbox(made)
    assert found is not None
    west, south, east, north = found
    assert (south, north) == (min(one[1] for one in made), max(one[3] for one in made))
    assert -180 <= west <= 180
    assert -180 <= east <= 180
    degrees = np.arange(360) - 180 + 0.5
    inside = (degrees > west) & (degrees < east) if west <= east else (degrees > west) | (degrees < east)
    assert inside[covered].all()
    around = np.concatenate([covered, covered])
    gaps = np.diff(np.flatnonzero(np.concatenate([[True], around, [True]]))) - 1
    widest = min(360, int(gaps.max())) if covered.any() else 360
    assert (~inside).sum() == widest


def test_boxes_over_the_antimeridian() -> None:
    assert union_bbox([]) is None
    assert union_bbox([[170, 0, 175, 1], [-175, 2, -170, 3]]) == [170, 0, -170, 3]
    assert union_bbox([[175, 0, -175, 1]]) == [175, 0, -175, 1]
    assert union_bbox([[-180, -90, 180, 90], [0, 0, 1, 1]]) == [-180, -90, 180, 90]
