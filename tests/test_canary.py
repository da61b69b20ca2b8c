"""A new bundle on a sample of what is published: the figures, what is left alone, and what is told of the rest."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import rasterio
from affine import Affine
from click.testing import CliRunner
from kit.nights import job, put
from kit.oracle import CLASSES, seeded_bundle
from kit.scenes import noise, write_scene
from PIL import Image
from rasterio.crs import CRS

import geoseg.canary
from geoseg.canary import run_canary, sample
from geoseg.cli import main
from geoseg.errors import ConfigError, NothingReadableError
from geoseg.evaluate.canary import Canary
from geoseg.evaluate.difference import ClassMatch, MaskDifference, MaskPair, compare_masks
from geoseg.model.bundle import Bundle
from geoseg.model.description import ClassName
from geoseg.nightly import run_nightly
from geoseg.predict.bundles import load_bundle, save_bundle
from geoseg.predict.record import RunReport
from geoseg.predict.verify import verify_output
from geoseg.raster import store
from geoseg.raster.geotiff import write_geotiff
from geoseg.raster.grid import Grid
from geoseg.raster.scene import SceneRef

NAMES = [f"{number:02}" for number in range(5)]
PIXEL_M2 = 0.25
Pixels = Callable[[int], bytes]


def published(root: str, bundles: tuple[Path, Path], pixels: Pixels, **values: Any) -> None:
    """Publish five scenes with the first bundle."""
    put(root, pixels, *NAMES)
    run_nightly(job(root, bundles[0], **values), quiet=True)


def canary(root: str, bundles: tuple[Path, Path], **how: Any) -> Canary:
    return run_canary(job(root, bundles[0]), bundle=str(how.pop("bundle", bundles[1])), quiet=True, **how)


def report(told: Canary) -> dict[str, Any]:
    """Return the report that stands in the store."""
    read = json.loads(store.read(f"{told.after.out}/canary.json"))
    assert read == json.loads(told.to_json())
    return read


def results(root: str) -> dict[str, bytes]:
    """Return each object of the output, without what a canary may write."""
    found = [info.uri for info in store.walk(f"{root}/out/") if "/_geoseg/canary/" not in info.uri]
    return {uri: store.read(uri) for uri in found}


def whole(uri: str) -> npt.NDArray[np.uint8]:
    """Return all pixels of a mask, as rasterio reads them."""
    with rasterio.MemoryFile(store.read(uri)) as memory, memory.open() as dataset:
        return np.asarray(dataset.read(1, masked=True).filled(255))


def with_classes(bundle: Path, folder: Path, *names: str) -> Path:
    """Save a bundle whose classes are called otherwise."""
    read = load_bundle(str(bundle))
    colors = {one.name: one.color for one in CLASSES}
    classes = tuple(ClassName(name=name, color=colors.get(name, (9, 9, 200))) for name in names)
    save_bundle(
        Bundle(description=read.description.model_copy(update={"classes": classes}), weights=read.weights), str(folder)
    )
    return folder


def check_figures(told: dict[str, Any], scenes: list[tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]]) -> None:
    """Compare a report's classes with counts over whole masks, whose codes are places in ``CLASSES``."""
    both = [(before[data], after[data]) for before, after in scenes for data in [(before != 255) & (after != 255)]]
    before, after = (np.concatenate(each) for each in zip(*both, strict=True))
    assert told["both_km2"] == pytest.approx(before.size * PIXEL_M2 / 1e6, rel=1e-3)
    assert told["changed"] == pytest.approx(np.mean(before != after))
    for row in told["classes"]:
        value = [one.name for one in CLASSES].index(row["name"])
        was, now = before == value, after == value
        assert row["iou"] == pytest.approx((was & now).sum() / (was | now).sum())
        for key, where in (("before", was), ("after", now), ("gained", now & ~was), ("lost", was & ~now)):
            assert row[f"{key}_km2"] / told["both_km2"] == pytest.approx(where.mean(), abs=1e-6), (row["name"], key)


def test_the_figures_are_those_of_whole_masks_and_results_stay_as_they_are(
    root: str, bundles: tuple[Path, Path], pixels: Pixels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = noise(3, 600, 70, seed=9)
    part[:, :520, 9:] = 0  # a part of a block
    part[:, :512] = 0  # and a whole one, which is not stored
    store.write(f"{root}/in/torn.tif", write_scene(tmp_path / "torn.tif", part, nodata=0).read_bytes())
    published(root, bundles, pixels)
    stood = results(root)
    first = canary(root, bundles, scenes=2)
    assert results(root) == stood
    told = report(first)
    masks = [(whole(one["published_mask"]), whole(one["canary_mask"])) for one in told["scenes"]]
    assert len(masks) == 2
    check_figures(told["in_all"], masks)
    for one, pair in zip(told["scenes"], masks, strict=True):
        check_figures(one, [pair])
    assert told["sample"] == {"scenes": 2, "published": 6, "compared": 2}
    assert [row["name"] for row in told["in_all"]["classes"]] == ["background", "building", "road"]
    assert told["in_all"]["one_km2"] == 0
    ran: list[RunReport] = []
    predict_refs = geoseg.canary.predict_refs
    monkeypatch.setattr(geoseg.canary, "predict_refs", lambda *a, **k: ran.append(predict_refs(*a, **k)) or ran[-1])
    again = report(canary(root, bundles, scenes=2))
    assert again == told, "nothing was predicted, so the speed is the one that was measured"
    assert (ran[0].windows, ran[0].counts) == (0, {"unchanged": 2})
    more = report(canary(root, bundles, scenes=3))
    assert ran[1].counts == {"unchanged": 2, "published": 1}
    assert {one["id"] for one in told["scenes"]} < {one["id"] for one in more["scenes"]}
    assert results(root) == stood
    assert verify_output(f"{root}/out").num_items == 6


def test_the_sample_is_a_matter_of_ids_alone() -> None:
    refs = [SceneRef(f"s{number:03}", f"/in/s{number:03}.tif") for number in range(300)]
    chosen = sample(refs, 30)
    random.Random(0).shuffle(refs)
    assert sample(refs, 30) == chosen
    assert sample([one for one in refs if one not in chosen[10:20]], 20) == chosen[:10] + chosen[20:30]
    numbers = sorted(int(one.id[1:]) for one in chosen)
    assert all(any(low <= number < low + 75 for number in numbers) for low in (0, 75, 150, 225)), "from everywhere"
    assert len(sample(refs, 1000)) == 300


def test_classes_are_matched_by_name(bundles: tuple[Path, Path], pixels: Pixels, tmp_path: Path) -> None:
    root = str(tmp_path)
    published(root, bundles, pixels)
    turned = with_classes(bundles[1], tmp_path / "turned", "road", "background", "building")
    told = report(canary(root, bundles, bundle=turned))
    codes = np.full(256, 255, np.uint8)
    codes[:3] = 2, 0, 1
    check_figures(
        told["in_all"], [(whole(one["published_mask"]), codes[whole(one["canary_mask"])]) for one in told["scenes"]]
    )
    other = canary(
        root, bundles, bundle=with_classes(bundles[0], tmp_path / "other", "background", "building", "water")
    )
    told = report(other)
    assert (told["classes"]["all"], told["classes"]["compared"]) == (
        ["background", "building", "road", "water"], ["background", "building"],
    )  # fmt: skip
    assert [row["iou"] for row in told["in_all"]["classes"]] == [1, 1], "the weights are the same"
    road = sum(int((whole(one["published_mask"]) == 2).sum()) for one in told["scenes"])
    assert sum(one["pixels"][2][3] for one in told["scenes"]) == road > 0, "all road became water"
    assert "road in the published masks alone; water in the canary alone" in "\n".join(other.lines())


@pytest.fixture(scope="module")
def two_masks(tmp_path_factory: pytest.TempPathFactory) -> list[npt.NDArray[np.uint8]]:
    """Make two masks of 1300 x 1100 pixels, a part of either without data."""
    folder, rng = tmp_path_factory.mktemp("masks"), np.random.default_rng(0)
    before = rng.integers(0, 3, (1300, 1100), dtype=np.uint8)
    after = np.where(rng.random(before.shape) < 0.2, rng.integers(0, 3, before.shape, dtype=np.uint8), before)
    after[600:900, 530:1000] = 0
    before[:520, :600], after[:400, :700] = 255, 255
    grid = Grid(CRS.from_epsg(32633).to_wkt(), tuple(Affine(0.5, 0, 5e5, 0, -0.5, 5.3e6))[:6], *before.shape)
    for name, mask in (("before", before), ("after", after)):
        write_geotiff(str(folder / f"{name}.tif"), mask[None], grid, nodata=255)
    return [folder, before, after]


def difference(two_masks: Any, window: int) -> MaskDifference:
    match = ClassMatch(CLASSES, CLASSES)
    uris = tuple(str(two_masks[0] / f"{name}.tif") for name in ("before", "after"))
    return compare_masks(MaskPair("a", uris, match), match, window=window)


@pytest.mark.parametrize("window", [512, 1024, 2048])
def test_the_window_does_not_change_the_figures(window: int, two_masks: Any) -> None:
    _, before, after = two_masks
    found = difference(two_masks, window)
    codes = [0, 1, 2, 255]
    assert found.pixels_ba.tolist() == [
        [int(((before == was) & (after == now)).sum()) for now in codes] for was in codes
    ]
    changed = (before != after) & (before != 255) & (after != 255)
    blocks = {
        (row, col): changed[row : row + 512, col : col + 512].sum()
        for row in range(0, 1300, 512)
        for col in range(0, 1100, 512)
    }
    assert (found.place.row_off, found.place.col_off) == max(blocks, key=lambda place: blocks[place])
    assert (found.place.height, found.place.width) == (512, 512)


def test_a_mask_that_holds_no_class_is_told(tmp_path: Path) -> None:
    grid = Grid(CRS.from_epsg(32633).to_wkt(), tuple(Affine(0.5, 0, 5e5, 0, -0.5, 5.3e6))[:6], 4, 4)
    uri, match = str(tmp_path / "a.tif"), ClassMatch(CLASSES, CLASSES)
    write_geotiff(uri, np.full((1, 4, 4), 3, np.uint8), grid, nodata=255)
    with pytest.raises(geoseg.errors.SceneReadError, match=r"a: .* no class of its bundle's"):
        compare_masks(MaskPair("a", (uri, uri), match), match)


def test_what_the_new_bundle_refuses_is_told(bundles: tuple[Path, Path], pixels: Pixels, tmp_path: Path) -> None:
    root = str(tmp_path)
    fine = write_scene(tmp_path / "a.tif", noise(3, 40, 53, seed=7), transform=Affine(0.2, 0, 5e5, 0, -0.2, 5.3e6))
    store.write(f"{root}/in/fine.tif", fine.read_bytes())
    published(root, bundles, pixels)
    told = canary(root, bundles, bundle=seeded_bundle(tmp_path / "fine", seed=2, resolution_m=0.1))
    assert {one.id: one.status for one in told.scenes} == {**dict.fromkeys(NAMES, "refused"), "fine": "compared"}
    assert (told.exit_code, report(told)["sample"]["compared"]) == (1, 1)
    lines = "\n".join(told.lines())
    assert "refused: 00: 00: its pixels are 0.5 m on the ground" in lines
    assert "1 of 6 published scenes compared" in lines
    store.delete([f"{root}/in/fine.tif"])
    none = canary(root, bundles, bundle=tmp_path / "fine")
    assert (none.exit_code, report(none)["picture"]) == (3, "")
    assert "6 scenes will be done again" not in "\n".join(none.lines())


def test_a_scene_that_is_replaced_meanwhile_is_told(
    bundles: tuple[Path, Path], pixels: Pixels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = str(tmp_path)
    published(root, bundles, pixels)
    predict_refs = geoseg.canary.predict_refs

    def meanwhile(*args: Any, **how: Any) -> RunReport:
        put(root, pixels, "01", seed=100)
        ran = predict_refs(*args, **how)
        put(root, pixels, "02", seed=100)
        run_nightly(job(root, bundles[0], scenes=[f"{root}/in/02.tif"]), quiet=True)
        item = json.loads(store.read(f"{root}/out/03/item.json"))
        store.delete([f"{root}/out/03/{item['assets']['mask']['href'][2:]}"])
        return ran

    monkeypatch.setattr(geoseg.canary, "predict_refs", meanwhile)
    scenes = {one.id: one for one in canary(root, bundles).scenes}
    assert {name: one.status for name, one in scenes.items()} == {
        "00": "compared", "01": "failed", "02": "failed", "03": "failed", "04": "compared",
    }  # fmt: skip
    assert "replaced while the canary ran" in scenes["01"].sentence
    assert "replaced while the canary ran" in scenes["02"].sentence
    assert "mask-" in scenes["03"].sentence


def test_the_sample_is_of_what_stands(bundles: tuple[Path, Path], pixels: Pixels, tmp_path: Path) -> None:
    root = str(tmp_path)
    put(root, pixels, *NAMES)
    with pytest.raises(NothingReadableError, match=r"of 0 published scenes none .* run geoseg nightly first"):
        canary(root, bundles)
    published(root, bundles, pixels)
    put(root, pixels, "01", seed=100)
    put(root, pixels, "05")
    store.delete([f"{root}/in/02.tif"])
    told = canary(root, bundles)
    assert {one.id for one in told.scenes} == {"00", "03", "04"}
    assert (told.redo.scenes, told.redo.items_read) == (4, 4), "the one that changed has to be done as well"
    assert told.redo.area_km2 == pytest.approx(4 * 40 * 53 * PIXEL_M2 / 1e6, rel=1e-3)
    named = [{"type": "Feature", "id": name, "properties": {"uri": f"{root}/in/{name}.tif"}} for name in NAMES]
    store.write(f"{root}/list.geojson", json.dumps({"type": "FeatureCollection", "features": named}).encode())
    by_name = job(root, bundles[0], scenes=[], source=[{"manifest": f"{root}/list.geojson"}])
    again = run_canary(by_name, bundle=str(bundles[1]), quiet=True)
    assert {one.id for one in again.scenes} == {"00", "03", "04"}, "the list still names the one that is gone"
    with pytest.raises(NothingReadableError, match=r"of 5 published scenes none .* present bundle"):
        run_canary(job(root, bundles[1]), bundle=str(bundles[0]), quiet=True)


def test_a_canary_has_a_place_of_its_own(bundles: tuple[Path, Path], pixels: Pixels, tmp_path: Path) -> None:
    root = str(tmp_path / "a")
    published(root, bundles, pixels)
    stood = results(root)
    with pytest.raises(ConfigError, match="the bundle that the job runs already"):
        canary(root, bundles, bundle=bundles[0])
    run_nightly(job(root, bundles[1], out=f"{tmp_path}/theirs"), quiet=True)
    for to, why in (
        (f"{root}/out", "job's results lie"),
        (f"{root}/out/new", "job's results lie"),
        (root, "job's results lie"),
        (f"{root}/in/new", "inside the job's sources"),
        (f"{tmp_path}/theirs", "results of other runs"),
    ):
        with pytest.raises(ConfigError, match=why):
            canary(root, bundles, to=to)
    assert report(canary(root, bundles, to=f"{tmp_path}/new/"))["to"] == f"{tmp_path}/new"
    assert results(root) == stood


def test_the_next_night_does_not_take_a_canary_for_scenes(
    bundles: tuple[Path, Path], pixels: Pixels, tmp_path: Path
) -> None:
    root, around = str(tmp_path / "a"), {"scenes": [f"{tmp_path}/a/"]}
    published(root, bundles, pixels, **around)
    run_canary(job(root, bundles[0], **around), bundle=str(bundles[1]), quiet=True)
    assert run_nightly(job(root, bundles[0], **around), quiet=True).counts == {"unchanged": 5}


def test_the_command_line(bundles: tuple[Path, Path], pixels: Pixels, tmp_path: Path) -> None:
    root, file = str(tmp_path), tmp_path / "job.toml"
    published(root, bundles, pixels)
    file.write_text(
        f'scenes = ["{root}/in/"]\nout = "{root}/out"\nbundle = "{bundles[0]}"\n[cluster]\nengine = "local"\n'
    )
    words = ["canary", str(file), "--bundle", str(bundles[1]), "-q", "--scenes", "3"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    assert "3 of 5 published scenes compared" in done.stdout
    assert f'set bundle = "{bundles[1]}" in JOB.toml; 5 scenes will be done again, 0.00265 km2, about ' in done.stdout
    assert "speed: as published" in done.stdout
    told = json.loads(CliRunner().invoke(main, [*words, "--json"]).stdout)
    picture = np.asarray(Image.open(io.BytesIO(store.read(told["picture"]))))
    assert picture.shape[1] > 4 * 360
    seen = {tuple(color) for color in picture.reshape(-1, 3)}
    colors = [(230, 85, 60), (250, 200, 60)]
    assert {*colors} <= seen
    assert told["schema"] == 1
    assert CliRunner().invoke(main, [*words[:3], str(bundles[0])]).exit_code == 2


def test_each_change_has_a_colour_of_its_own() -> None:
    from geoseg.evaluate.picture import ChangedPlace, changes_picture

    match = ClassMatch(CLASSES, CLASSES)
    before, after = (np.repeat(np.repeat(one, 40, 0), 40, 1) for one in np.indices((3, 3), dtype=np.uint8))
    image = np.zeros((120, 120, 3), np.uint8)
    drawn = Image.open(io.BytesIO(changes_picture([ChangedPlace("a: all that can be", image, before, after)], match)))
    panel = np.asarray(drawn)[-372:-12, 12 + 3 * 372 : 12 + 3 * 372 + 360]
    colors = {(was, now): tuple(panel[60 + 120 * was, 60 + 120 * now]) for was in range(3) for now in range(3)}
    assert len(set(colors.values())) == 8, "a building that became a road looks like a road that became a building"
    assert colors[1, 2] == colors[2, 1]
    assert all((max(color) == 255) == (was != now) for (was, now), color in colors.items()), "what stays is dark"
