"""How unsure each pixel is: the figure that probabilities give, the same whatever the cut, and nothing where nobody asks."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import rasterio
import torch
from kit.encoders import outside_bundle, stand_in
from kit.oracle import AFFINE, digests, published_mask, seeded_bundle, whole_logits, write_scene
from pydantic import ValidationError

import geoseg
from geoseg.config import PredictConfig, load_job
from geoseg.model.bundle import Bundle
from geoseg.predict.bundles import load_bundle, save_bundle
from geoseg.predict.ledger import prepare_scene
from geoseg.predict.mask import class_uncertainty, sum_by_class
from geoseg.predict.output import list_output
from geoseg.predict.parts import part_uri
from geoseg.predict.plan import RunSpec, ScenePlan
from geoseg.predict.publish import publish_scene
from geoseg.predict.reading import Task
from geoseg.predict.remove import half_removed
from geoseg.predict.verify import verify_output
from geoseg.predict.worker import Worker
from geoseg.raster import store
from geoseg.raster.scene import SceneRef, list_scenes
from geoseg.raster.synthetic import synthetic_image
from geoseg.run import make_run_spec, plan_job

SHAPE = (560, 900)
KINDS = ("entropy", "margin")
TEMPERATURE = 0.3


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A bundle with a temperature and a threshold."""
    folder = tmp_path_factory.mktemp("bundle")
    seeded = load_bundle(str(seeded_bundle(folder / "seeded")))
    background, building, road = seeded.description.classes
    classes = (background, building.model_copy(update={"threshold": 0.4}), road)
    told = seeded.description.model_copy(update={"temperature": TEMPERATURE, "classes": classes})
    save_bundle(Bundle(description=told, weights=seeded.weights), str(folder / "bundle"))
    return str(folder / "bundle")


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scene with a hole without data."""
    pixels = synthetic_image(*SHAPE, seed=3).pixels_bhw
    pixels[:, 100:300, 500:800] = 0
    return write_scene(tmp_path_factory.mktemp("scenes") / "scene.tif", pixels, nodata=0)


def predict(scene: Path, out: Path | str, bundle: str, **settings: Any) -> dict[str, Any]:
    """Predict one scene and return its item."""
    settings = {"engine": "local", "window": 512, **settings}
    report = geoseg.predict(str(scene), str(out), bundle=bundle, **settings)
    assert report.exit_code == 0, report.scenes
    item: dict[str, Any] = json.loads(store.read(report.scenes[0].item))
    return item


def layer(out: Path, name: str = "uncertainty") -> npt.NDArray[np.uint8]:
    """The pixels of a published layer."""
    return published_mask(str(next(out.glob(f"*/{name}-*.tif"))))


def unsure(logits_chw: npt.NDArray[np.float64], kind: str, temperature: float = TEMPERATURE) -> npt.NDArray[np.float64]:
    """The oracle: 0 to 1 (row, col), as the books have it."""
    powers = np.exp((logits_chw - logits_chw.max(0)) / temperature)
    chances = powers / powers.sum(0)
    if kind == "margin":
        ordered = np.sort(chances, axis=0)
        return 1 - (ordered[-1] - ordered[-2])
    return -(chances * np.log(np.maximum(chances, 1e-300))).sum(0) / np.log(len(chances))


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_the_probabilities_of_the_whole_scene_give(
    kind: str, scene: Path, bundle: str, tmp_path: Path
) -> None:
    item = predict(scene, tmp_path, bundle, uncertainty=kind)
    with rasterio.open(scene) as dataset:
        valid, image = dataset.dataset_mask() != 0, dataset.read()
    wanted = unsure(whole_logits(load_bundle(bundle), image, valid).double().numpy(), kind)
    steps, mask = layer(tmp_path), layer(tmp_path, "mask")
    assert wanted[valid].min() < 0.1, "the network must be sure of some pixels for this test to mean anything"
    assert wanted[valid].max() > 0.9
    assert np.abs(steps[valid] / 254 - wanted[valid]).max() <= 0.5 / 254 + 1e-5
    np.testing.assert_array_equal(steps == 255, ~valid)
    told = item["properties"]["geoseg:uncertainty"]
    assert told["kind"] == kind
    assert told["mean"] == pytest.approx(steps[valid].mean() / 254, rel=1e-5)
    for value, name in enumerate(("background", "building", "road")):
        assert told["classes"][name] == pytest.approx(steps[mask == value].mean() / 254, rel=1e-5)


def test_it_is_what_the_published_probabilities_give(scene: Path, bundle: str, tmp_path: Path) -> None:
    predict(scene, tmp_path, bundle, uncertainty="margin", probabilities=True)
    with rasterio.open(next(tmp_path.glob("*/probabilities-*.tif"))) as dataset:
        ordered = np.sort(dataset.read().astype(np.int64), axis=0)
    valid = layer(tmp_path) != 255
    assert np.abs((254 - (ordered[-1] - ordered[-2]) - layer(tmp_path))[valid]).max() <= 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_classes", [2, 3, 200])
def test_its_ends_are_those_of_a_guess_and_of_a_certainty(kind: Any, num_classes: int, bundle: str) -> None:
    description = load_bundle(bundle).description
    logits_chw = torch.zeros(num_classes, 3, 4)
    logits_chw[0, 1] = 1e4
    logits_chw[1, 2] = -torch.inf
    steps = class_uncertainty(logits_chw, np.ones((3, 4), np.bool_), description, kind)
    assert (steps[0] == 254).all()
    assert (steps[1] == 0).all()
    minus_infinity = {2: 0, 3: 160, 200: 254}[num_classes] if kind == "entropy" else 254 * (num_classes > 2)
    assert (steps[2] == minus_infinity).all(), "a class without any chance counts for nothing"


@pytest.mark.parametrize("kind", KINDS)
def test_strips_leave_no_trace(kind: Any, bundle: str) -> None:
    description = load_bundle(bundle).description
    logits_chw = 3 * torch.randn(3, 301, 67, generator=torch.Generator().manual_seed(1))
    valid_hw = np.random.default_rng(1).random((301, 67)) > 0.2
    steps = class_uncertainty(logits_chw, valid_hw, description, kind)
    wanted = np.rint(254 * unsure(logits_chw.double().numpy(), kind)).astype(np.uint8)
    np.testing.assert_array_equal(steps, np.where(valid_hw, wanted, 255))
    mask = np.where(valid_hw, logits_chw.argmax(0).numpy(), 255).astype(np.uint8)
    assert sum_by_class(steps, mask, 4) == [*(int(steps[mask == value].sum()) for value in range(3)), 0]


WAYS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "another resolution": {"resolution": 0.83},
    "flipped, turned and at two resolutions": {"flips_and_turns": True, "pyramid": (1, 2)},
    "blended": {},
}


@pytest.mark.parametrize(("way", "kind"), zip(WAYS, itertools.cycle(KINDS), strict=False))
def test_not_a_byte_depends_on_the_cut(way: str, kind: str, scene: Path, bundle: str, tmp_path: Path) -> None:
    told = []
    before = torch.get_num_threads()
    with stand_in():
        if way == "blended":
            bundle = str(outside_bundle(tmp_path / "bundle", "gated"))
        for place, cut in enumerate(({"window": 512, "batch": 3}, {"window": 1024})):
            torch.set_num_threads(1 + place % 2)
            predict(scene, tmp_path / str(place), bundle, uncertainty=kind, **WAYS[way], **cut)
            told.append(digests(tmp_path / str(place)))
    torch.set_num_threads(before)
    assert told[0] == told[1], "masks, uncertainty, and items with their means"
    assert len(np.unique(layer(tmp_path / "0"))) > 100


@pytest.mark.thorough
@pytest.mark.ray
@pytest.mark.usefixtures("shared_ray")
@pytest.mark.slow
def test_ray_changes_nothing(scene: Path, bundle: str, tmp_path: Path) -> None:
    predict(scene, tmp_path / "loop", bundle, uncertainty="entropy")
    predict(scene, tmp_path / "ray", bundle, uncertainty="entropy", engine="ray", workers=2)
    assert digests(tmp_path / "ray") == digests(tmp_path / "loop")


def test_of_a_stack_and_outside_an_area(tmp_path: Path) -> None:
    image = synthetic_image(300, 420, seed=1).pixels_bhw
    files = [
        str(write_scene(tmp_path / f"{name}.tif", np.clip(image * gain, 1, 255).astype(np.uint8)))
        for name, gain in (("a", 1.0), ("b", 0.8))
    ]
    bundle = str(seeded_bundle(tmp_path / "bundle", name="unet3d", dates=2, depth=1))
    right, bottom = AFFINE.c + 200 * AFFINE.a, AFFINE.f + 150 * AFFINE.e
    ring = [[AFFINE.c, AFFINE.f], [right, AFFINE.f], [right, bottom], [AFFINE.c, bottom], [AFFINE.c, AFFINE.f]]
    lons, lats = rasterio.warp.transform("EPSG:25832", "EPSG:4326", *zip(*ring, strict=True))
    area = {"type": "Polygon", "coordinates": [[list(each) for each in zip(lons, lats, strict=True)]]}
    (tmp_path / "area.geojson").write_text(json.dumps(area))
    stack = [{"name": "town", "scenes": files}]
    settings = {"bundle": bundle, "engine": "local", "window": 512, "aoi": str(tmp_path / "area.geojson")}
    report = geoseg.predict([], str(tmp_path / "out"), stacks=stack, uncertainty="entropy", **settings)
    assert report.exit_code == 0, report.scenes
    steps = layer(tmp_path / "out")
    both = np.concatenate([published_pixels(file) for file in files])
    logits = whole_logits(load_bundle(bundle), both, np.ones((2, 300, 420), np.bool_)).double().numpy()
    inside = layer(tmp_path / "out", "mask") != 255
    assert inside[10:140, 10:190].all()
    assert not inside[160:].any()
    np.testing.assert_array_equal(steps != 255, inside)
    assert np.abs(steps[inside] / 254 - unsure(logits, "entropy", 1.0)[inside]).max() <= 0.5 / 254 + 1e-5


def published_pixels(path: str) -> npt.NDArray[np.uint8]:
    with rasterio.open(path) as dataset:
        pixels: npt.NDArray[np.uint8] = dataset.read()
    return pixels


def test_windows_without_data_are_skipped_and_a_scene_without_any_has_no_mean(bundle: str, tmp_path: Path) -> None:
    pixels = np.zeros((3, 600, 1200), np.uint8)
    pixels[:, :80, :90] = 120
    for name, image in (("some", pixels), ("stored", pixels), ("none", np.zeros_like(pixels))):
        path = write_scene(tmp_path / f"{name}.tif", image, nodata=0, SPARSE_OK=name != "stored")
        item = predict(path, tmp_path / name, bundle, uncertainty="margin")
        steps = layer(tmp_path / name)
        np.testing.assert_array_equal(steps != 255, image[0] != 0)
        assert ("mean" in item["properties"]["geoseg:uncertainty"]) == (name != "none")
        assert not verify_output(str(tmp_path / name)).faults


def test_the_item_and_the_file_say_what_it_is(scene: Path, bundle: str, tmp_path: Path) -> None:
    item = predict(scene, tmp_path / "out", bundle, uncertainty="entropy")
    asset = item["assets"]["uncertainty"]
    assert (asset["roles"], asset["raster:bands"][0]["nodata"]) == (["data", "uncertainty"], 255)
    assert "entropy" in asset["title"]
    with rasterio.open(tmp_path / "out" / "scene" / asset["href"]) as dataset:
        assert (dataset.count, dataset.dtypes, dataset.nodata) == (1, ("uint8",), 255)
        assert dataset.scales[0] == asset["raster:bands"][0]["scale"] == pytest.approx(1 / 254)
        assert dataset.descriptions == ("entropy",)
        overviews, transform, shape = dataset.overviews(1), dataset.transform, dataset.shape
    with rasterio.open(next((tmp_path / "out").glob("*/mask-*.tif"))) as mask:
        assert (overviews, transform, shape) == (mask.overviews(1), mask.transform, mask.shape)
    assert not verify_output(str(tmp_path / "out")).faults
    path = tmp_path / "out" / "scene" / asset["href"]
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    (fault,) = verify_output(str(tmp_path / "out")).faults
    assert path.name in fault
    write_scene(path, np.zeros((1, 30, 40), np.uint8))
    asset |= {
        "file:size": path.stat().st_size,
        "file:checksum": "1220" + hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    (tmp_path / "out" / "scene" / "item.json").write_text(json.dumps(item))
    assert any("40 x 30, the item says" in fault for fault in verify_output(str(tmp_path / "out")).faults)


def test_without_it_nothing_is_other_than_before(scene: Path, bundle: str, tmp_path: Path) -> None:
    plain = predict(scene, tmp_path / "plain", bundle)
    item = predict(scene, tmp_path / "asked", bundle, uncertainty="margin")
    assert "uncertainty" not in json.dumps(plain)
    assert PredictConfig().pixel_settings() == PredictConfig(uncertainty=None).pixel_settings()
    told = [PredictConfig(uncertainty=kind).pixel_settings() for kind in (None, *KINDS)]
    assert len(set(map(json.dumps, told))) == 3
    prints = [one["properties"]["geoseg:fingerprint"] for one in (plain, item)]
    assert prints[0] != prints[1]
    assert item["assets"]["mask"] == plain["assets"]["mask"]
    asked = geoseg.predict(str(scene), str(tmp_path / "plain"), bundle=bundle, uncertainty="margin", engine="local")
    assert asked.scenes[0].status == "published", "an output gets it when it is asked for"
    ours, theirs = digests(tmp_path / "asked"), digests(tmp_path / "plain")
    assert [name for name in ours if ours[name] != theirs.get(name)] == ["scene/item.json"], (
        "which counts its revisions"
    )


def run_of(scene: Path, out: Path, bundle: str) -> tuple[RunSpec, ScenePlan]:
    values = {"scenes": [str(scene)], "out": str(out), "bundle": bundle}
    run = make_run_spec(load_job(None, {**values, "predict": {"window": 512, "uncertainty": "entropy"}}))
    plan = prepare_scene(SceneRef("scene", str(scene)), run)
    assert isinstance(plan, ScenePlan)
    return run, plan


def make_parts(run: RunSpec, plan: ScenePlan) -> list[bool]:
    worker = Worker(run)
    done = list(worker.run(Task(plan, window) for window in plan.windows(plan.reader())))
    worker.close()
    assert not [one.failure for one in done if one.failure]
    return [one.skipped for one in done]


def test_a_run_takes_up_what_an_earlier_one_left(scene: Path, bundle: str, tmp_path: Path) -> None:
    predict(scene, tmp_path / "calm", bundle, uncertainty="entropy")
    run, plan = run_of(scene, tmp_path / "out", bundle)
    make_parts(run, plan)
    parts = [part_uri(run, plan, window) for window in plan.windows(plan.reader())]
    before = [store.read(uri) for uri in parts]
    store.delete([parts[0], parts[1], f"{parts[1]}.uncertainty"])
    assert sorted(make_parts(run, plan)) == [False] * 2 + [True] * (len(parts) - 2)
    assert [store.read(uri) for uri in parts] == before
    predict(scene, tmp_path / "out", bundle, uncertainty="entropy")
    assert digests(tmp_path / "out") == digests(tmp_path / "calm")
    assert not [file for file in (tmp_path / "out" / "_geoseg" / "parts").rglob("*") if file.is_file()]
    assert publish_scene(run, plan).item_uri
    assert digests(tmp_path / "out") == digests(tmp_path / "calm"), "published twice, published once"


def test_a_part_that_is_missing_is_told(scene: Path, bundle: str, tmp_path: Path) -> None:
    run, plan = run_of(scene, tmp_path / "out", bundle)
    make_parts(run, plan)
    lost = part_uri(run, plan, next(plan.windows(plan.reader()))) + ".uncertainty"
    store.delete([lost])
    with pytest.raises(geoseg.errors.StoreError, match="part is missing; run again"):
        publish_scene(run, plan)


def test_it_is_no_scene_and_is_known_as_a_leftover(scene: Path, bundle: str, tmp_path: Path) -> None:
    predict(scene, tmp_path, bundle, uncertainty="entropy")
    with pytest.raises(geoseg.errors.NothingReadableError):
        list_scenes([str(tmp_path)], out=str(tmp_path))
    (tmp_path / "scene" / "item.json").unlink()
    assert half_removed(list_output(str(tmp_path)), ()) == ["scene"]


def test_a_plan_accounts_for_it(scene: Path, bundle: str, tmp_path: Path) -> None:
    plain, asked = (
        plan_job(
            load_job(
                None, {"scenes": [str(scene)], "out": str(tmp_path), "bundle": bundle, "predict": {"uncertainty": kind}}
            )
        )
        for kind in (None, "entropy")
    )
    assert asked.bytes_to_write - plain.bytes_to_write == plain.pixels
    waiting, strips = 3 * SHAPE[0] * SHAPE[1], 4 * 8 * 3 * 128 * SHAPE[1]
    assert asked.memory_bytes - plain.memory_bytes == waiting + strips


def test_another_kind_is_refused() -> None:
    with pytest.raises(ValidationError, match="'entropy' or 'margin'"):
        PredictConfig(uncertainty="variance")


@pytest.mark.bucket
def test_in_a_bucket(scene: Path, bundle: str, bucket: str, tmp_path: Path) -> None:
    item = predict(scene, f"s3://{bucket}/out", bundle, uncertainty="entropy")
    assert item == predict(scene, tmp_path, bundle, uncertainty="entropy")
    checked = verify_output(f"s3://{bucket}/out")
    assert (checked.num_items, checked.faults) == (1, ())
