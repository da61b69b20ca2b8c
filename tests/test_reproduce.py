"""A published mask made again from its item: it is the same, or what differs is found and what is missing is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from click.testing import CliRunner
from kit.nights import job
from kit.oracle import seeded_bundle
from kit.scenes import noise, write_scene
from PIL import Image
from rasterio.enums import ColorInterp

from geoseg.cli import main
from geoseg.config import load_job
from geoseg.errors import ConfigError, NothingReadableError
from geoseg.predict.verify import verify_output
from geoseg.raster import store
from geoseg.reproduce import Reproduced, reproduce_item
from geoseg.run import run_job


def item_uri(root: str, scene_id: str = "a") -> str:
    return f"{root}/out/{scene_id}/item.json"


def item_of(root: str, scene_id: str = "a") -> dict[str, Any]:
    return json.loads(store.read(item_uri(root, scene_id)))


def asset(root: str, key: str = "mask", scene_id: str = "a") -> str:
    return f"{root}/out/{scene_id}/{item_of(root, scene_id)['assets'][key]['href'][2:]}"


def publish(root: str, bundle: Path, tmp_path: Path, pixels: Any = None, **predict: Any) -> None:
    """Publish one scene of 40 x 1100 pixels: three windows of 512."""
    nodata = None if predict.get("sidecar_mask") else 0
    scene = write_scene(tmp_path / "made.tif", noise(3, 40, 1100) if pixels is None else pixels, nodata=nodata)
    store.write(f"{root}/in/a.tif", scene.read_bytes())
    assert run_job(job(root, bundle, predict={"window": 512, **predict}), quiet=True).counts == {"published": 1}


def objects(root: str) -> dict[str, str]:
    return {info.uri: info.etag for info in store.walk(f"{root}/out/")}


def change(uri: str, rows: slice, cols: slice, value: int, bands: slice = slice(None)) -> int:
    """Change pixels of a published raster by hand; how many of one band are others now."""
    with rasterio.MemoryFile(store.read(uri)) as memory, memory.open() as dataset:
        profile, whole = dataset.profile, dataset.read()
        colors = dataset.colormap(1) if dataset.colorinterp[0] == ColorInterp.palette else None
    before = whole.copy()
    whole[bands, rows, cols] = value
    with rasterio.MemoryFile() as memory:
        with memory.open(**profile) as dataset:
            dataset.write(whole)
            if colors:
                dataset.write_colormap(1, colors)
        store.write(uri, bytes(memory.getbuffer()))
    return int((before != whole).any(axis=0).sum())


def watched(call: Callable[..., Any], note: Callable[[Any], None]) -> Callable[..., Any]:
    """Return the call, with its first argument noted each time."""

    def watching(first: Any, *rest: Any, **named: Any) -> Any:
        note(first)
        return call(first, *rest, **named)

    return watching


def again(root: str, **how: Any) -> Reproduced:
    return reproduce_item(item_uri(root), quiet=True, **how)


def test_what_was_published_comes_out_again(
    root: str, bundles: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = set[str]()
    monkeypatch.setattr(store, "write", watched(store.write, kept.add))
    monkeypatch.setattr(store, "delete", watched(store.delete, kept.difference_update))
    pixels = noise(3, 40, 1100)
    pixels[:, :, 512:1024] = 0  # a window without data
    publish(root, bundles[0], tmp_path, pixels, probabilities=True, uncertainty="margin")
    kept.clear()
    stood = objects(root)
    told = again(root)
    assert (told.is_equal, told.exit_code, told.obstacles, told.remarks) == (True, 0, (), ())
    assert (told.pixels, told.different) == (40 * 1100, 0)
    assert (told.probabilities_different, told.uncertainty_different) == (0, 0)
    assert told.windows == told.windows_in_all
    assert again(root).to_json() == told.to_json()
    assert reproduce_item(f"{root}/out/a", quiet=True) == told
    assert reproduce_item(f"{root}/out/a/", quiet=True) == told
    assert objects(root) == stood, "nothing is written"
    assert not kept, "nor left in memory"


@pytest.mark.parametrize(
    ("value", "name"),
    [(1, "building"), (255, "no data"), (77, "77, which is no class")],
    ids=["class", "hole", "nonsense"],
)
def test_a_change_by_hand_is_found_and_located(
    value: int, name: str, bundles: tuple[Path, Path], tmp_path: Path
) -> None:
    root = str(tmp_path)
    publish(root, bundles[0], tmp_path)
    num = change(asset(root), slice(20, 40), slice(1040, 1070), value)
    assert num > 100
    picture = tmp_path / "picture.png"
    told = again(root, picture=str(picture))
    assert (told.exit_code, told.is_equal, told.different, told.different_windows) == (1, False, num, 1)
    assert told.worst is not None
    row, col = told.worst.row_off, told.worst.col_off
    assert row <= 20 < row + told.worst.height, told.worst
    assert col <= 1040 < col + told.worst.width, told.worst
    assert len(told.places) == 10
    assert all(20 <= one.row < 40 and 1040 <= one.col < 1070 and one.published == name for one in told.places)
    assert {one.made for one in told.places} <= {"background", "building", "road"}
    assert any("SHA-256" in remark or "bytes" in remark for remark in told.remarks), "the file is not the item's"
    assert Image.open(picture).size[0] > 900
    text = "\n".join(told.lines())
    assert f"DIFFERENT: {num} pixels in 1 windows" in text
    assert "SHA-256" in verify_output(f"{root}/out").faults[0] or "bytes" in verify_output(f"{root}/out").faults[0]


def test_what_stands_where_nothing_was_to_be_is_found(bundles: tuple[Path, Path], tmp_path: Path) -> None:
    root = str(tmp_path)
    pixels = noise(3, 40, 2300)
    scene = write_scene(
        tmp_path / "made.tif", np.where(np.arange(2300) < 1024, pixels, 0).astype(np.uint8), nodata=0,
        tiled=True, blockxsize=512, blockysize=512, sparse_ok=True,
    )  # fmt: skip
    store.write(f"{root}/in/a.tif", scene.read_bytes())
    run_job(job(root, bundles[0], predict={"window": 512, "uncertainty": "entropy"}), quiet=True)
    change(asset(root), slice(30, 31), slice(2200, 2203), 2)
    change(asset(root, "uncertainty"), slice(30, 31), slice(2200, 2202), 2)
    told = again(root)
    assert told.uncertainty_different == 2
    assert [(one.row, one.col, one.published, one.made) for one in told.places] == [
        (30, col, "road", "no data") for col in (2200, 2201, 2202)
    ]


def test_a_sample_is_the_same_each_time(bundles: tuple[Path, Path], tmp_path: Path) -> None:
    root = str(tmp_path)
    scene = write_scene(tmp_path / "made.tif", noise(3, 40, 3000), nodata=0)
    store.write(f"{root}/in/a.tif", scene.read_bytes())
    run_job(job(root, bundles[0]), quiet=True)
    told = again(root, windows=2)
    assert (told.windows, told.windows_in_all, told.exit_code) == (2, 3, 0)
    assert again(root, windows=2) == told
    assert again(root, windows=99).windows == 3
    change(asset(root), slice(0, 40), slice(0, 3000), 0)
    one, two = (again(root, windows=num) for num in (1, 2))
    assert one.worst is not None
    assert one.different < two.different < again(root).different
    assert (len(one.remarks), len(again(root).remarks)) == (1, 2), "of a sample the file is not read whole"


@pytest.mark.parametrize(("layer", "value"), [("probabilities", True), ("uncertainty", "entropy")])
def test_further_layers_are_compared_too(layer: str, value: Any, bundles: tuple[Path, Path], tmp_path: Path) -> None:
    root = str(tmp_path)
    publish(root, bundles[0], tmp_path, **{layer: value})
    assert again(root).to_json()[f"{layer}_different"] == 0
    num = change(asset(root, layer), slice(10, 12), slice(20, 40), 3, slice(0, 1))
    assert num > 30
    told = again(root)
    assert (told.different, told.to_json()[f"{layer}_different"], told.exit_code, told.is_equal) == (0, num, 1, False)
    assert any(f"the published {layer}" in remark for remark in told.remarks)
    assert any(line.startswith(f"DIFFERENT: {num} pixels have") and line.endswith(layer) for line in told.lines())


def test_a_source_that_was_replaced_or_is_gone(root: str, bundles: tuple[Path, Path], tmp_path: Path) -> None:
    publish(root, bundles[0], tmp_path)
    wanted = item_of(root)["properties"]["geoseg:input_etag"]
    store.write(f"{root}/in/a.tif", write_scene(tmp_path / "b.tif", noise(3, 41, 1100, seed=3)).read_bytes())
    came = store.head(f"{root}/in/a.tif").etag
    told = again(root)
    assert (told.exit_code, told.windows) == (3, 0)
    assert f"ETag {wanted}" in told.obstacles[0]
    assert f"there is {came} now" in told.obstacles[0]
    store.delete([f"{root}/in/a.tif"])
    assert "is gone" in again(root).obstacles[0]
    assert wanted in again(root).obstacles[0]


@pytest.mark.parametrize("fault", ["gone", "another", "damaged"])
def test_a_bundle_that_is_not_there(fault: str, bundles: tuple[Path, Path], tmp_path: Path) -> None:
    root = str(tmp_path)
    publish(root, bundles[0], tmp_path)
    files = [info.uri for info in store.walk(f"{root}/out/_geoseg/bundles/")]
    if fault == "gone":
        store.delete(files)
    for uri in files if fault == "another" else files[:1] if fault == "damaged" else []:
        body = (bundles[1] / store.base_name(uri)).read_bytes() if fault == "another" else b"{}"
        store.write(uri, body)
    store.delete([f"{root}/in/a.tif"])
    told = again(root)
    assert told.exit_code == 3
    assert len(told.obstacles) == 2, "all that is missing is told at once"
    assert "bundle" in told.obstacles[1]
    assert "is gone" in told.obstacles[0]


def test_another_version_of_geoseg_is_a_remark(bundles: tuple[Path, Path], tmp_path: Path) -> None:
    root = str(tmp_path)
    publish(root, bundles[0], tmp_path)
    item = item_of(root)
    item["properties"]["processing:software"]["geoseg"] = "0.0.9"
    item["properties"]["geoseg:fingerprint"] = "0" * 64
    store.write(item_uri(root), json.dumps(item).encode())
    told = again(root)
    assert told.exit_code == 0
    assert "made by geoseg 0.0.9" in told.remarks[0]
    assert "fingerprint does not follow" in told.remarks[1]
    item["properties"]["geoseg:settings"]["colour"] = "loud"
    store.write(item_uri(root), json.dumps(item).encode())
    with pytest.raises(ConfigError, match=r"geoseg:settings.*no setting 'predict.colour'"):
        again(root)


def area(path: Path, west: float, east: float) -> str:
    """Write an area: columns of the scene's CRS."""
    ring = [
        [x, y]
        for x, y in ((west, 5_299_000), (east, 5_299_000), (east, 5_301_000), (west, 5_301_000), (west, 5_299_000))
    ]
    crs = {"type": "name", "properties": {"name": "EPSG:32633"}}
    path.write_text(json.dumps({"type": "Polygon", "coordinates": [ring], "crs": crs}))
    return str(path)


def test_an_area_of_interest_has_to_be_the_same(bundles: tuple[Path, Path], tmp_path: Path) -> None:
    root = str(tmp_path)
    one, two = area(tmp_path / "one.json", 500_050, 500_200), area(tmp_path / "two.json", 500_050, 500_210)
    publish(root, bundles[0], tmp_path, aoi=one)
    told = again(root, aoi=one)
    assert (told.is_equal, told.pixels) == (True, 40 * 1100)
    wanted = item_of(root)["properties"]["geoseg:aoi_sha256"]
    without, other = again(root), again(root, aoi=two)
    assert (without.exit_code, other.exit_code) == (3, 3)
    assert wanted in without.obstacles[0]
    assert "--aoi" in without.obstacles[0]
    assert wanted in other.obstacles[0]
    plain = str(tmp_path / "plain")
    publish(plain, bundles[0], tmp_path)
    with pytest.raises(ConfigError, match="leave --aoi out"):
        again(plain, aoi=one)


@pytest.mark.parametrize("missing", [(), (0,), (1,), (2,)], ids=["whole", "first", "middle", "last"])
def test_a_stack_whatever_date_is_missing(missing: tuple[int, ...], tmp_path: Path) -> None:
    root = str(tmp_path)
    bundle = seeded_bundle(tmp_path / "bundle", name="unet3d", dates=3)
    uris = []
    for date in range(3):
        path = write_scene(tmp_path / f"in/{date}.tif", noise(3, 90, 110, seed=date))
        uris.append("" if date in missing else str(path))
    values = {
        "out": f"{root}/out",
        "bundle": str(bundle),
        "stacks": [{"name": "a", "scenes": uris}],
        "cluster": {"engine": "local"},
    }
    assert run_job(load_job(None, values), quiet=True).counts == {"published": 1}
    told = again(root)
    assert (told.obstacles, told.remarks, told.exit_code) == ((), (), 0)
    assert told.pixels == 90 * 110


def test_a_mask_beside_the_scene_counts(bundles: tuple[Path, Path], tmp_path: Path) -> None:
    root = str(tmp_path)
    valid = np.where(np.arange(1100) < 900, 255, 0).astype(np.uint8)
    beside = write_scene(tmp_path / "m.tif", np.tile(valid, (1, 40, 1)))
    store.write(f"{root}/in/a.tif.msk", beside.read_bytes())
    publish(root, bundles[0], tmp_path, sidecar_mask=True)
    assert item_of(root)["properties"]["geoseg:mask_etag"]
    assert again(root).exit_code == 0
    store.delete([f"{root}/in/a.tif.msk"])
    told = again(root)
    assert told.exit_code == 3
    assert "the mask beside its source" in told.obstacles[0]


def test_refusals(bundles: tuple[Path, Path], tmp_path: Path) -> None:
    root = str(tmp_path)
    publish(root, bundles[0], tmp_path)
    with pytest.raises(NothingReadableError, match="OUT/SCENE"):
        reproduce_item(f"{root}/out/b")
    with pytest.raises(ConfigError, match="into which nothing is written"):
        again(root, picture=f"{root}/out/picture.png")
    store.write(f"{root}/out/c/item.json", b'{"type": "Feature"}')
    with pytest.raises(ConfigError, match="not an item of a mask"):
        reproduce_item(f"{root}/out/c/item.json")
    store.delete([asset(root)])
    told = again(root)
    assert told.exit_code == 3
    assert "no such file" in told.obstacles[0]


def test_the_command(bundles: tuple[Path, Path], tmp_path: Path) -> None:
    root = str(tmp_path)
    publish(root, bundles[0], tmp_path)
    done = CliRunner().invoke(main, ["reproduce", f"{root}/out/a", "--windows", "1", "--json", "-q"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert (told["equal"], told["windows"], told["different"]) == (True, 1, 0)
    change(asset(root), slice(0, 5), slice(0, 5), 255)
    done = CliRunner().invoke(main, ["reproduce", item_uri(root), "-q"])
    assert done.exit_code == 1
    assert "row 0 col 0: no data -> " in done.stdout
    done = CliRunner().invoke(main, ["reproduce", f"{root}/out/b", "-q"])
    assert done.exit_code == 3
