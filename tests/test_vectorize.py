"""Polygons and roads of an output: whole, the same however they are cut, made once, and beside the masks that they came from."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys

import geopandas
import numpy as np
import pyarrow.parquet as pq
import pytest
import rasterio
import shapely
from kit.oracle import seeded_bundle
from kit.published import predicted
from kit.scenes import noise, write_scene
from rasterio.features import rasterize

import geoseg
from geoseg.config import VectorsConfig, load_job
from geoseg.errors import ConfigError, NothingReadableError
from geoseg.nightly import run_nightly
from geoseg.predict.verify import verify_output
from geoseg.raster import store
from geoseg.raster.seal import sealed
from geoseg.vectorize import VectorsJob, load_vectors_job, run_vectorize

LAYERS = ("buildings", "roads", "road_nodes")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two generated scenes side by side, with probabilities, whose masks stand."""
    root = str(tmp_path_factory.mktemp("two"))
    return predicted(root, "west", "east", probabilities=True)


@pytest.fixture
def out(two, tmp_path):
    """Those masks in an output of its own."""
    published, _ = two
    for info in store.walk(published + "/"):
        if "/runs/" not in info.uri:
            store.write(f"{tmp_path}/out{info.uri.removeprefix(published)}", store.read(info.uri))
    return f"{tmp_path}/out"


def vectorize(out, **values):
    return run_vectorize(VectorsJob(out=out, **values), quiet=True)


def objects(out):
    return {
        info.uri.removeprefix(out): info.etag for info in store.walk(out + "/") if not info.uri.endswith("/lease.json")
    }


def item_of(out, scene, name="vectors.json"):
    return json.loads(store.read(f"{out}/{scene}/{name}"))


def file_of(out, scene, layer):
    return f"{out}/{scene}/{item_of(out, scene)['assets'][layer]['href'][2:]}"


def bytes_of(out, scene):
    return {layer: store.read(file_of(out, scene, layer)) for layer in LAYERS}


def read(out, scene, layer):
    return geopandas.read_parquet(file_of(out, scene, layer))


def mask_of(out, scene):
    with rasterio.open(f"{out}/{scene}/{item_of(out, scene, 'item.json')['assets']['mask']['href'][2:]}") as dataset:
        return dataset.read(1), dataset.transform, dataset.crs


def probabilities_of(out, scene, value):
    href = item_of(out, scene, "item.json")["assets"]["probabilities"]["href"]
    with rasterio.open(f"{out}/{scene}/{href[2:]}") as dataset:
        return dataset.read(value + 1)


def test_what_is_traced_is_what_the_mask_shows(out):
    report = vectorize(out, vectors={"buildings": {"min_area_m2": 0, "simplify_px": 0}})
    assert [(one.name, one.status) for one in report.traced] == [("east", "made"), ("west", "made")]
    for scene in ("west", "east"):
        mask_hw, transform, crs = mask_of(out, scene)
        houses = read(out, scene, "buildings")
        assert houses.crs == crs
        assert houses.geometry.is_valid.all()
        assert houses["id"].is_unique
        burnt_hw = rasterize(houses.geometry, mask_hw.shape, transform=transform)
        assert np.array_equal(burnt_hw == 1, mask_hw == 1)
        assert houses["pixels"].sum() == np.count_nonzero(mask_hw == 1)
        assert houses["area_m2"].to_numpy() == pytest.approx(houses["pixels"] * 0.36, rel=2e-3)
        places_hw = rasterize(
            zip(houses.geometry, range(1, len(houses) + 1), strict=True), mask_hw.shape, transform=transform
        )
        sums = np.bincount(places_hw.ravel(), probabilities_of(out, scene, 1).ravel())[1:]
        assert houses["confidence"].to_numpy() == pytest.approx(sums / houses["pixels"] / 254, abs=1e-6)
        roads, nodes = read(out, scene, "roads"), read(out, scene, "road_nodes")
        assert len(roads)
        near = shapely.buffer(roads.geometry.to_numpy(), 0.6 * 2)
        rows, cols = np.nonzero(mask_hw == 2)
        xs, ys = transform * (cols + 0.5, rows + 0.5)
        covered = shapely.intersects_xy(shapely.union_all(shapely.buffer(near, 8)), xs, ys)
        assert covered.mean() > 0.97
        at = dict(zip(nodes["id"], nodes.geometry, strict=True))
        for line, first, last in zip(roads.geometry, roads["from"], roads["to"], strict=True):
            ends = [shapely.Point(line.coords[place]) for place in (0, -1)]
            assert ends[0].equals_exact(at[first], 1e-6)
            assert ends[1].equals_exact(at[last], 1e-6)
        figures = item_of(out, scene)["properties"]
        assert figures["geoseg:roads_km"] == pytest.approx(roads["length_m"].sum() / 1e3, abs=1e-5)
        assert figures["geoseg:buildings"] == len(houses)
    verified = verify_output(out)
    assert not verified.faults


@pytest.mark.parametrize("join", [False, True], ids=["each", "joined"])
def test_neither_windows_nor_their_order_change_a_byte(out, join, tmp_path):
    seen = []
    for window in (512, 2048):
        store.delete([uri for uri in (f"{out}{name}" for name in objects(out)) if "vectors.json" in uri])
        report = vectorize(out, join=join, vectors={"window": window})
        (first, *_) = report.traced
        assert first.status == "made"
        folder, _, scene = first.item.rpartition("/")[0].rpartition("/")
        seen.append(bytes_of(folder, scene))
    assert seen[0] == seen[1]


@pytest.mark.ray
@pytest.mark.usefixtures("shared_ray")
@pytest.mark.slow
def test_neither_workers_nor_ray_change_a_byte(out):
    seen = []
    for cluster in ({"engine": "local"}, {"engine": "ray", "workers": 1}, {"engine": "ray", "workers": 4}):
        store.delete([uri for uri in (f"{out}{name}" for name in objects(out)) if "vectors.json" in uri])
        report = vectorize(out, vectors={"window": 512}, cluster=cluster)
        assert {one.status for one in report.traced} == {"made"}
        seen.append({scene: bytes_of(out, scene) for scene in ("west", "east")})
    assert seen[0] == seen[1] == seen[2]


def test_scenes_side_by_side_are_joined(out):
    vectorize(out)
    report = vectorize(out, join=True)
    assert [(one.name, one.status) for one in report.traced] == [("EPSG-25832", "made")]
    assert not report.remarks
    links = [link["href"] for link in json.loads(store.read(report.traced[0].item))["links"]]
    assert sorted(links) == ["../../../east/item.json", "../../../west/item.json"]
    folder = report.traced[0].item.rpartition("/")[0].rpartition("/")[0]
    joined = read(folder, "EPSG-25832", "buildings")
    apart = [read(out, scene, "buildings") for scene in ("west", "east")]
    border = 350_000 + 640 * 0.6
    across = joined[(joined.bounds.minx < border - 0.3) & (joined.bounds.maxx > border + 0.3)]
    assert len(across)
    # Away from the border ids and shapes are those of the scenes; what lies across it is one, with the first one's id.
    known = {
        **dict(zip(apart[1]["id"], apart[1].geometry, strict=True)),
        **dict(zip(apart[0]["id"], apart[0].geometry, strict=True)),
    }
    away = joined[(joined.bounds.maxx < border - 2) | (joined.bounds.minx > border + 2)]
    assert len(away) > 20
    for name, shape in zip(away["id"], away.geometry, strict=True):
        assert known[name].equals_exact(shape, 1e-6)
    lines = read(folder, "EPSG-25832", "roads")
    assert ((lines.bounds.minx < border - 1) & (lines.bounds.maxx > border + 1)).any()
    verified = verify_output(out)
    assert not verified.faults


def test_lattices_that_nearly_lie_on_each_other_have_folders_of_their_own(tmp_path):
    bundle = seeded_bundle(tmp_path / "bundle")
    for name, phase in (("a", 0.20), ("b", 0.23)):
        transform = rasterio.Affine(0.6, 0, 0.6 * (800_000 + phase), 0, -0.6, 5_300_000.0)
        write_scene(tmp_path / "in" / f"{name}.tif", noise(3, 60, 70, seed=ord(name)), transform=transform)
    geoseg.predict(f"{tmp_path}/in", f"{tmp_path}/out", bundle=str(bundle), engine="local")
    for status in ("made", "unchanged"):
        traced = vectorize(f"{tmp_path}/out", join=True).traced
        assert [one.status for one in traced] == [status] * 2
        assert len({one.item for one in traced}) == 2


def test_what_stands_is_left_alone_and_a_new_setting_makes_it_anew(out):
    vectorize(out)
    before = objects(out)
    again = vectorize(out, vectors={"window": 512})
    assert {one.status for one in again.traced} == {"unchanged"}
    assert again.traced[0].figures["buildings"] > 10
    assert objects(out) == before
    changed = vectorize(out, vectors={"buildings": {"min_area_m2": 60}}, scenes=("west",))
    assert [(one.name, one.status) for one in changed.traced] == [("west", "made")]
    assert read(out, "west", "buildings")["area_m2"].min() >= 60
    assert before.items() <= {**objects(out), "/west/vectors.json": before["/west/vectors.json"]}.items()


def test_a_scene_that_cannot_be_traced_does_not_stop_the_others(out):
    mask = f"{out}/east/{item_of(out, 'east', 'item.json')['assets']['mask']['href'][2:]}"
    store.delete([mask])
    report = vectorize(out)
    assert [(one.name, one.status) for one in report.traced] == [("east", "failed"), ("west", "made")]
    assert "there is no such file" in report.traced[0].sentence
    assert report.exit_code == 1
    assert not store.exists(f"{out}/east/vectors.json")


def test_a_damaged_mask_is_told_and_leaves_the_vectors_of_before(out):
    vectorize(out)
    before = objects(out)
    mask = f"{out}/east/{item_of(out, 'east', 'item.json')['assets']['mask']['href'][2:]}"
    whole = store.read(mask)
    store.write(mask, whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2))
    report = vectorize(out, vectors={"buildings": {"min_area_m2": 60}})
    assert {one.name: one.status for one in report.traced} == {"east": "failed", "west": "made"}
    assert objects(out)["/east/vectors.json"] == before["/east/vectors.json"]


def test_vectors_of_an_earlier_mask_are_told(out):
    vectorize(out)
    item = item_of(out, "east", "item.json")
    mask = store.read(f"{out}/east/{item['assets']['mask']['href'][2:]}") + b"x"
    name = f"mask-{hashlib.sha256(mask).hexdigest()[:16]}.tif"
    store.write(f"{out}/east/{name}", mask)
    item["assets"]["mask"] |= {
        "href": f"./{name}",
        "file:size": len(mask),
        "file:checksum": "1220" + hashlib.sha256(mask).hexdigest(),
    }
    store.write(f"{out}/east/item.json", sealed(item))
    (fault,) = verify_output(out).faults
    assert fault.endswith("was traced from another mask than the one that stands; geoseg vectorize does it anew")
    again = vectorize(out)
    assert {one.name: one.status for one in again.traced} == {"east": "made", "west": "unchanged"}
    assert not verify_output(out).faults


def test_other_formats_are_written_on_request(out):
    report = vectorize(out, scenes=("west",), vectors={"formats": ("fgb", "gpkg")})
    assert report.exit_code == 0
    assets = item_of(out, "west")["assets"]
    assert {"buildings_fgb", "roads_gpkg", "road_nodes_fgb"} <= assets.keys()
    assert store.read(f"{out}/west/{assets['roads_fgb']['href'][2:]}")[:3] == b"fgb"
    assert not verify_output(out).faults


def test_vectors_that_a_night_did_not_come_to_are_made_by_the_next(tmp_path):
    root = str(tmp_path)
    out, _ = predicted(root, "west", "east")
    job = load_job(
        None, {"scenes": [f"{root}/in/"], "out": out, "bundle": "demo", "cluster": {"engine": "local"}, "vectors": {}}
    )
    run_nightly(job, quiet=True)
    # The source of one scene changes, and a run without vectors publishes it.
    store.write(f"{root}/in/east.tif", store.read(f"{root}/in/west.tif"))
    run_nightly(job.model_copy(update={"vectors": None}), quiet=True)
    assert len(verify_output(out).faults) == 1
    report = run_nightly(job, quiet=True)
    assert report.counts["unchanged"] == 2
    assert report.remarks[-1].startswith("vectors: 1 made")
    assert not verify_output(out).faults


def test_a_layer_is_not_replaced_by_one_that_lacks_a_scene(out):
    whole = vectorize(out, join=True)
    before = store.read(whole.traced[0].item)
    mask = f"{out}/east/{item_of(out, 'east', 'item.json')['assets']['mask']['href'][2:]}"
    store.delete([mask])
    report = vectorize(out, join=True, vectors={"buildings": {"min_area_m2": 60}})
    assert [(one.name, one.status) for one in report.traced] == [("east", "failed")]
    assert report.remarks[0].startswith("nothing was joined")
    assert store.read(whole.traced[0].item) == before


def test_without_probabilities_there_is_no_confidence(tmp_path):
    out, _ = predicted(str(tmp_path), "one")
    vectorize(out)
    table = pq.read_table(file_of(out, "one", "buildings"))
    assert table.num_rows
    assert table["confidence"].null_count == table.num_rows
    assert pq.read_table(file_of(out, "one", "roads"))["confidence"].null_count > 0


@pytest.mark.parametrize("kind", ["folder", pytest.param("bucket", marks=pytest.mark.bucket)])
def test_a_night_traces_what_it_publishes_and_nothing_twice(kind, tmp_path, request):
    root = str(tmp_path) if kind == "folder" else f"s3://{request.getfixturevalue('bucket')}"
    out, _ = predicted(root, "west", "east")
    job = load_job(
        None,
        {
            "scenes": [f"{root}/in/"],
            "out": out,
            "bundle": "demo",
            "cluster": {"engine": "local"},
            "vectors": {"window": 1024},
        },
    )
    first = run_nightly(job, quiet=True)
    assert first.exit_code == 0
    assert first.remarks[-1].startswith("vectors: 2 made, 0 unchanged (")
    stands = objects(out)
    assert {f"/{scene}/vectors.json" for scene in ("west", "east")} <= stands.keys()
    second = run_nightly(job, quiet=True)
    assert re.match(r"vectors: 0 made, [02] unchanged", second.remarks[-1])
    kept = {name: etag for name, etag in objects(out).items() if "/_geoseg/" not in name}
    assert kept == {name: etag for name, etag in stands.items() if "/_geoseg/" not in name}
    store.delete([f"{root}/in/east.tif"])
    third = run_nightly(job, remove_gone=True, quiet=True)
    assert [gone.id for gone in third.gone] == ["east"]
    assert not [name for name in objects(out) if name.startswith("/east/")]
    assert not verify_output(out).faults


def test_what_cannot_be_traced_is_counted_in_the_runs_record(tmp_path):
    root = str(tmp_path)
    out, _ = predicted(root, "west", "east")
    job = load_job(
        None,
        {"scenes": [f"{root}/in/"], "out": out, "bundle": "demo", "cluster": {"engine": "local"}, "vectors": {}},
    )
    mask = f"{out}/east/{item_of(out, 'east', 'item.json')['assets']['mask']['href'][2:]}"
    store.delete([mask])
    report = run_nightly(job, quiet=True)
    assert report.num_untraced == 1
    assert report.exit_code == 1
    assert any("1 scene without vectors: geoseg vectorize" in step for step in report.next_steps())


def test_what_is_asked_for_must_be_there(out, tmp_path):
    with pytest.raises(NothingReadableError, match=r"north is not published there"):
        vectorize(out, scenes=("north",))
    with pytest.raises(NothingReadableError, match=r"nothing is published there; run geoseg predict first"):
        vectorize(f"{tmp_path}/empty")
    report = vectorize(out, scenes=("west",), vectors={"buildings": {"classes": ("water",)}})
    assert report.traced[0].status == "failed"
    assert "no class 'water' to make polygons of; the mask has building, road" in report.traced[0].sentence
    for wrong, told in (
        ({"to": f"{tmp_path}/x"}, "to has no effect without join"),
        ({"join": True, "scenes": ("west",)}, "need a place of their own"),
        ({"cluster": {"engine": "local", "workers": 2}}, "--engine local is one process"),
        ({"vectors": {"roads": {"classes": ("road", "road")}}}, "each is named once"),
    ):
        with pytest.raises(ValueError, match=told):
            vectorize(out, **wrong)
    with pytest.raises(ConfigError, match=r"results lie there, among which layers would be lost"):
        vectorize(out, join=True, to=out)
    none = vectorize(out, scenes=("west",), vectors={"roads": {"classes": ()}})
    assert none.traced[0].figures["roads"] == 0
    assert none.traced[0].figures["buildings"] > 10


def test_a_bundle_without_buildings_or_roads_has_none_of_these(out):
    uri = f"{out}/west/item.json"
    item = json.loads(store.read(uri))
    classes = item["assets"]["mask"]["classification:classes"]
    classes[1]["name"] = "shed"
    store.write(uri, sealed(item))
    report = vectorize(out, scenes=("west",))
    assert report.traced[0].figures["buildings"] == 0
    assert report.traced[0].figures["roads"] > 0
    job = VectorsConfig.model_validate(VectorsConfig().model_dump())  # as a record keeps it
    assert vectorize(out, scenes=("west",), vectors=job).traced[0].status == "unchanged"


def test_a_job_file_says_how_and_options_overrule_it(tmp_path):
    path = tmp_path / "job.toml"
    path.write_text(
        'scenes = ["in/"]\nout = "elsewhere"\n[vectors]\nwindow = 512\n[vectors.buildings]\nmin_area_m2 = 25\nsquare = true\n'
        "[cluster]\nworkers = 3\n"
    )
    job = load_vectors_job(
        "out", (), str(path), {"min_area": 40.0, "formats": ("fgb",), "window": None, "workers": None}
    )
    assert job.out == "out"
    assert job.cluster.workers == 3
    assert job.vectors == VectorsConfig(buildings={"min_area_m2": 40.0, "square": True}, formats=("fgb",), window=512)
    path.write_text("[vectors]\nwidow = 512\n")
    with pytest.raises(ConfigError, match=r"there is no setting 'vectors\.widow'; did you mean 'window'"):
        load_vectors_job("out", (), str(path), {})


def test_without_the_extra_predicting_works_and_tracing_says_what_is_missing(tmp_path):
    (tmp_path / "scipy.py").write_text("raise ModuleNotFoundError(\"No module named 'scipy'\", name='scipy')\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    for program, told in (
        (["-c", "import geoseg.run, geoseg.nightly"], ""),
        (
            ["-m", "geoseg", "vectorize", str(tmp_path)],
            "tracing needs scipy, which is not installed: pip install 'geoseg[vector]'",
        ),
    ):
        done = subprocess.run([sys.executable, *program], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == (2 if told else 0), done.stderr
        assert told in done.stderr
