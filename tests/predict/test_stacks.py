"""A stack of dates goes in, one mask comes out, whatever the windows; missing dates have no say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import rasterio
import torch
from click.testing import CliRunner
from kit.data import data_folder
from kit.oracle import AFFINE, digests, published_mask, seeded_bundle, whole_logits, write_scene

import geoseg
from geoseg.cli import main
from geoseg.config import load_job
from geoseg.errors import ConfigError, SceneChangedError
from geoseg.model.variants import STACK_VARIANTS
from geoseg.predict.bundles import load_bundle
from geoseg.predict.ledger import prepare_scene
from geoseg.predict.plan import ScenePlan
from geoseg.predict.publish import publish_scene
from geoseg.raster.scene import SceneRef
from geoseg.raster.stack import group_scenes, stack_from_stac
from geoseg.raster.synthetic import synthetic_image
from geoseg.run import RunReport, list_refs, make_run_spec, plan_job

DATES = 4


@pytest.fixture(scope="module", params=STACK_VARIANTS)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return seeded_bundle(tmp_path_factory.mktemp("bundle"), name=request.param, dates=DATES)


@pytest.fixture(scope="module")
def unet3d(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return seeded_bundle(tmp_path_factory.mktemp("bundle"), name="unet3d", dates=DATES, depth=1)


def in_other_light(pixels: npt.NDArray[np.uint8]) -> list[npt.NDArray[np.uint8]]:
    """The same ground at four dates: brighter and darker, with more and less contrast."""
    shifts = [(1.0, 0), (0.7, 20), (1.2, -15), (0.9, 40)]
    return [np.clip(pixels * gain + offset, 1, 255).astype(np.uint8) for gain, offset in shifts[:DATES]]


def write_stack(folder: Path, images: list[npt.NDArray[np.uint8]], name: str = "town", **profile: Any) -> list[Path]:
    """A scene for each date; 0 is nodata."""
    return [
        write_scene(folder / f"{name}_2024{month:02}01.tif", image, nodata=0, **profile)
        for month, image in enumerate(images, 1)
    ]


def whole_mask(bundle: Path, files: list[Path | None], **settings: Any) -> npt.NDArray[np.uint8]:
    """The mask that a stack should get, None for a missing date: rasterio reads all, the network sees it whole."""
    images, valid = [], []
    for file in files:
        with rasterio.open(file or next(one for one in files if one)) as dataset:
            images.append(dataset.read() * np.uint8(file is not None))
            valid.append((dataset.dataset_mask() != 0) & (file is not None))
    logits = whole_logits(load_bundle(str(bundle)), np.concatenate(images), np.stack(valid), **settings)
    return np.where(np.any(valid, axis=0), logits.max(0).indices.to(torch.uint8).numpy(), np.uint8(255))


def predict(out: Path, bundle: Path, *, scenes: Any = (), **settings: Any) -> RunReport:
    settings = {"engine": "local", "window": 512, **settings}
    return geoseg.predict([str(scene) for scene in scenes], str(out), bundle=str(bundle), **settings)


def named(files: list[Path | None], name: str = "town") -> list[dict[str, Any]]:
    return [{"name": name, "scenes": [str(file) if file else "" for file in files]}]


def mask_of(report: RunReport) -> npt.NDArray[np.uint8]:
    assert report.exit_code == 0, report.scenes
    return published_mask(report.scenes[0].mask)


def test_the_mask_of_a_stack_equals_all_its_dates_run_once(bundle: Path, tmp_path: Path) -> None:
    images = in_other_light(synthetic_image(530, 700, seed=3, nodata_fraction=0).pixels_bhw)
    images[0][:, :200, 300:500] = 0
    images[1][:, 100:300, 400:] = 0
    for image in images:
        image[:, 400:450, 100:150] = 0  # at no date
    files = write_stack(tmp_path, images)
    truth = whole_mask(bundle, [*files])
    assert len(np.unique(truth)) == 4, "the network must tell classes apart for this test to mean anything"
    assert (truth == 255).sum() == 50 * 50
    for window in (512, 1024):
        np.testing.assert_array_equal(
            mask_of(predict(tmp_path / str(window), bundle, stacks=named([*files]), window=window)), truth
        )


def test_a_stack_may_be_looked_at_several_times(unet3d: Path, tmp_path: Path) -> None:
    files = write_stack(tmp_path, in_other_light(synthetic_image(130, 600, seed=3).pixels_bhw))
    settings: dict[str, Any] = {"flips_and_turns": True, "pyramid": (1, 2)}
    truth = whole_mask(unet3d, [*files], **settings)
    mask = mask_of(predict(tmp_path / "out", unet3d, stacks=named([*files]), **settings))
    np.testing.assert_array_equal(mask, truth)
    assert (truth != whole_mask(unet3d, [*files])).any()


def test_a_missing_date_is_invalid_and_not_black(bundle: Path, tmp_path: Path) -> None:
    files = write_stack(tmp_path, in_other_light(synthetic_image(200, 300, seed=5, nodata_fraction=0).pixels_bhw))
    some: list[Path | None] = [files[0], None, files[2], files[3]]
    mask = mask_of(predict(tmp_path / "out", bundle, stacks=named(some)))
    np.testing.assert_array_equal(mask, whole_mask(bundle, some))
    with rasterio.open(files[1], "r+") as dataset:
        dataset.write(np.ones((3, 200, 300), np.uint8))  # as dark as can be, and valid
    dark = mask_of(predict(tmp_path / "dark", bundle, stacks=named([*files])))
    assert (dark != mask).any()


@pytest.mark.sample("unet3d-512", "vnet-1024")
@pytest.mark.parametrize("window", [512, 1024])
def test_real_windows_in_four_lights(bundle: Path, tmp_path: Path, window: int) -> None:
    """Not a bit of a logit differs, nor a byte of the mask; with a halo one stride smaller they do."""
    with rasterio.open(data_folder() / "dubai" / "dubai_1.tif") as dataset:
        size = min(600, dataset.height), min(650, dataset.width)
        pixels = dataset.read([1, 2, 3], window=((0, size[0]), (0, size[1])))
    images = in_other_light(pixels)
    files = write_stack(tmp_path, images)
    truth = whole_mask(bundle, [*files])
    np.testing.assert_array_equal(
        mask_of(predict(tmp_path / "out", bundle, stacks=named([*files]), window=window)), truth
    )
    loaded = load_bundle(str(bundle))
    network = loaded.network().folded()
    stack, valid = np.concatenate(images), np.ones((DATES, *size), np.bool_)
    whole = whole_logits(loaded, stack, valid, precision="float32")
    stride, start, end = network.stride, 256, 384
    for halo in (network.halo, network.halo - stride):
        cut = slice(start - halo, end + halo)
        pixels_bkhw, valid_bthw = torch.from_numpy(stack[None, :, cut, cut]), torch.from_numpy(valid[None, :, cut, cut])
        with torch.inference_mode():
            logits = network(loaded.description.normalization(pixels_bkhw, valid_bthw))[0]
        logits = logits[:, halo : halo + end - start, halo : halo + end - start]
        difference = (logits - whole[:, start:end, start:end]).abs().max()
        assert difference == 0 if halo == network.halo else difference > 1e-6, (halo, difference)


@pytest.mark.ray
@pytest.mark.usefixtures("shared_ray")
def test_ray_and_every_reader_give_the_same_bytes(unet3d: Path, tmp_path: Path) -> None:
    files = write_stack(tmp_path, in_other_light(synthetic_image(530, 600, seed=3).pixels_bhw))
    predict(tmp_path / "loop", unet3d, stacks=named([*files]))
    predict(tmp_path / "tasks", unet3d, stacks=named([*files]), engine="ray", workers=2, read="tasks")
    assert digests(tmp_path / "loop") == digests(tmp_path / "tasks")


def test_a_stack_is_read_at_the_bundle_s_resolution(tmp_path: Path) -> None:
    bundle = seeded_bundle(tmp_path / "bundle", name="unet3d", dates=2, depth=1, resolution_m=1.2)
    image = synthetic_image(300, 500, seed=3).pixels_bhw
    files = write_stack(tmp_path, in_other_light(image)[:2])
    report = predict(tmp_path / "out", bundle, stacks=named([*files]))
    assert mask_of(report).shape == (300, 500)
    cut = mask_of(predict(tmp_path / "cut", bundle, stacks=named([*files]), window=1024))
    np.testing.assert_array_equal(cut, mask_of(report))


def test_a_second_run_reads_nothing_until_a_date_changes(unet3d: Path, tmp_path: Path) -> None:
    files = write_stack(tmp_path, in_other_light(synthetic_image(80, 90, seed=3).pixels_bhw))
    assert predict(tmp_path / "out", unet3d, stacks=named([*files])).counts["published"] == 1
    again = predict(tmp_path / "out", unet3d, stacks=named([*files]))
    assert (again.counts["unchanged"], again.pixels) == (1, 0)
    with rasterio.open(files[2], "r+") as dataset:
        dataset.write(np.full((3, 80, 90), 9, np.uint8))
    assert predict(tmp_path / "out", unet3d, stacks=named([*files])).counts["published"] == 1


def test_dates_come_to_a_stack_and_go(tmp_path: Path) -> None:
    bundle = seeded_bundle(tmp_path / "bundle", name="unet3d", dates=2, depth=1)
    files = write_stack(tmp_path, in_other_light(synthetic_image(80, 90, seed=3).pixels_bhw))
    for dates in (files[:2], files[1:3], files[:2]):
        assert predict(tmp_path / "out", bundle, stacks=named([*dates])).counts["published"] == 1
    other = predict(tmp_path / "out", bundle, stacks=named([*files[2:4]]))
    assert "this id is taken by" in other.scenes[0].sentence


def test_a_date_that_is_replaced_meanwhile_is_not_published(unet3d: Path, tmp_path: Path) -> None:
    files = write_stack(tmp_path, in_other_light(synthetic_image(80, 90, seed=3).pixels_bhw))
    job = load_job(None, {"stacks": named([*files]), "out": str(tmp_path / "out"), "bundle": str(unet3d)})
    run = make_run_spec(job)
    plan = prepare_scene(list_refs(job, run)[0], run)
    assert isinstance(plan, ScenePlan)
    with rasterio.open(files[2], "r+") as dataset:
        dataset.write(np.full((3, 80, 90), 9, np.uint8))
    with pytest.raises(SceneChangedError, match="town: was replaced"):
        publish_scene(run, plan)


def test_the_item_tells_of_all_dates(unet3d: Path, tmp_path: Path) -> None:
    files = write_stack(tmp_path, in_other_light(synthetic_image(80, 90, seed=3).pixels_bhw))
    report = predict(tmp_path / "out", unet3d, stacks=named([*files]))
    item = json.loads(Path(report.scenes[0].item).read_text())
    assert item["id"] == "town"
    assert item["properties"]["datetime"] is None
    assert item["properties"]["start_datetime"] <= item["properties"]["end_datetime"]
    assert [link["href"] for link in item["links"] if link["rel"] == "derived_from"] == [str(file) for file in files]
    assert item["properties"]["mlm:input"][0]["input"]["shape"] == [-1, DATES, 3, -1, -1]
    assert len(item["properties"]["geoseg:input_etag"]) == DATES


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"transform": AFFINE @ rasterio.Affine.translation(0.5, 0)}, "has the geotransform"),
        ({"crs": "EPSG:25833"}, "has EPSG:25833, town (town_20240101.tif) has EPSG:25832"),
        ({"cut": 1}, "has 89 x 80 pixels, town (town_20240101.tif) has 90 x 80 pixels"),
    ],
)
def test_scenes_that_share_no_grid_are_refused(
    changed: dict[str, Any], sentence: str, unet3d: Path, tmp_path: Path
) -> None:
    images = in_other_light(synthetic_image(80, 90, seed=3).pixels_bhw)
    files = write_stack(tmp_path, images)
    cut = changed.pop("cut", 0)
    write_scene(files[2], images[2][:, :, cut:], nodata=0, **changed)
    (scene,) = predict(tmp_path / "out", unet3d, stacks=named([*files])).scenes
    assert scene.status == "refused"
    assert "town: the scenes of a stack must lie on one grid; town (town_20240301.tif)" in scene.sentence
    assert sentence in scene.sentence
    assert scene.sentence.endswith("; --warp-stacks reads it there, bilinear")


def test_what_is_no_stack_of_the_bundle_s_dates_is_refused(unet3d: Path, tmp_path: Path) -> None:
    files = write_stack(tmp_path, in_other_light(synthetic_image(80, 90, seed=3).pixels_bhw))
    (scene,) = predict(tmp_path / "out", unet3d, scenes=files[:1]).scenes
    assert "the bundle takes stacks of 4 dates, this is one scene; group scenes with --stack-by" in scene.sentence
    (scene,) = predict(tmp_path / "out", unet3d, stacks=named([*files[:3]])).scenes
    assert scene.sentence == "town: the stack has 3 dates, the bundle takes 4"
    flat = seeded_bundle(tmp_path / "flat")
    (scene,) = predict(tmp_path / "out", flat, stacks=named([*files])).scenes
    assert scene.sentence == "town: the stack has 4 dates, the bundle takes one scene"


def test_warping_without_stacks_is_refused(tmp_path: Path) -> None:
    flat = seeded_bundle(tmp_path / "flat")
    values = {"scenes": ["a.tif"], "out": "o", "bundle": str(flat), "predict": {"warp_stacks": True}}
    with pytest.raises(ConfigError, match="--warp-stacks has no effect with seed-0, which takes single scenes"):
        make_run_spec(load_job(None, values))


PATTERN = r"/(?P<stack>\w+)_(?P<date>\d{8})\.tif$"


def test_scenes_are_grouped_by_their_names() -> None:
    names = ["town_20240201", "town_20240101", "wood_20240201", "wood_20240301", "map"]
    grouped = group_scenes([SceneRef(name, f"s3://b/{name}.tif") for name in names], PATTERN)
    assert grouped == [
        SceneRef("map", "s3://b/map.tif"),
        SceneRef("town", "s3://b/town_20240101.tif", ("s3://b/town_20240101.tif", "s3://b/town_20240201.tif", "")),
        SceneRef("wood", "s3://b/wood_20240201.tif", ("", "s3://b/wood_20240201.tif", "s3://b/wood_20240301.tif")),
    ]


def test_a_scene_that_matches_in_part_stays_by_itself() -> None:
    names = ["town_20240101", "town_20240201", "town", "_20240101"]
    pattern = r"/(?P<stack>[a-z]+)?(_(?P<date>\d{8}))?\.tif$"
    grouped = group_scenes([SceneRef(name, f"s3://b/{name}.tif") for name in names], pattern)
    assert [(ref.id, len(ref.dates)) for ref in grouped] == [("_20240101", 0), ("town", 0), ("town", 2)]


@pytest.mark.parametrize(
    ("pattern", "sentence"),
    [
        ("(", "not a regular expression"),
        ("a", "needs the groups"),
        (r"(?P<stack>town)_(?P<date>\d{4})", "are both stack"),
    ],
)
def test_a_grouping_that_cannot_be_is_refused(pattern: str, sentence: str) -> None:
    refs = [SceneRef(name, f"s3://b/{name}.tif") for name in ("town_20240201", "town_20240101")]
    with pytest.raises(ConfigError, match=sentence):
        group_scenes(refs, pattern)


def test_the_command_line_groups_and_checks(unet3d: Path, tmp_path: Path) -> None:
    write_stack(tmp_path / "in", in_other_light(synthetic_image(80, 90, seed=3).pixels_bhw))
    options = ["--bundle", str(unet3d), "--stack-by", PATTERN]
    checked = CliRunner().invoke(main, ["check", str(tmp_path / "in"), *options])
    assert checked.exit_code == 0, checked.output
    assert checked.output.count("90 x 80 px") == DATES
    done = CliRunner().invoke(main, ["predict", str(tmp_path / "in"), "--out", str(tmp_path / "out"), *options])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out" / "town" / "item.json").exists()


@pytest.mark.parametrize("kind", ["items", "one item"])
def test_a_stac_document_is_a_stack(kind: str, unet3d: Path, tmp_path: Path) -> None:
    files = write_stack(tmp_path / "in", in_other_light(synthetic_image(80, 90, seed=3).pixels_bhw))
    assets = [
        {"href": f"./in/{file.name}", "type": "image/tiff; application=geotiff", "roles": ["data"]} for file in files
    ]
    moments = [f"2024-0{month}-01T00:00:00Z" for month in range(1, 5)]
    preview = {"href": "./x.png", "roles": ["thumbnail"]}
    if kind == "items":
        features = [
            {"type": "Feature", "properties": {"datetime": moment}, "assets": {"a": asset, "preview": preview}}
            for moment, asset in zip(moments, assets, strict=True)
        ]
        del features[1]["assets"]["a"]
        document: dict[str, Any] = {"type": "FeatureCollection", "features": features[::-1]}
        files = [files[0], None, files[2], files[3]]
    else:
        dated = {moment: {**asset, "datetime": moment} for moment, asset in zip(moments, assets, strict=True)}
        document = {"type": "Feature", "properties": {"datetime": None}, "assets": {**dated, "preview": preview}}
    (tmp_path / "town.json").write_text(json.dumps(document))
    expected = tuple(str(file) if file else "" for file in files)
    assert stack_from_stac(str(tmp_path / "town.json")) == SceneRef("town", expected[0], expected)
    mask = mask_of(predict(tmp_path / "out", unet3d, scenes=[tmp_path / "town.json"]))
    np.testing.assert_array_equal(mask, whole_mask(unet3d, [*files]))


def test_a_document_that_is_no_stac_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(ConfigError, match="not a STAC Item"):
        stack_from_stac(str(tmp_path / "a.json"))


def test_names_taken_twice_are_refused(unet3d: Path, tmp_path: Path) -> None:
    file = str(write_scene(tmp_path / "a.tif", synthetic_image(20, 20, seed=1).pixels_bhw))
    values = {"scenes": [file], "stacks": [{"name": "A", "scenes": [file]}], "out": "o", "bundle": str(unet3d)}
    job = load_job(None, values)
    with pytest.raises(ConfigError, match="two scenes or stacks would be published as a"):
        list_refs(job, make_run_spec(job))


def test_the_plan_counts_the_bytes_of_all_dates(unet3d: Path, tmp_path: Path) -> None:
    files = write_stack(tmp_path, in_other_light(synthetic_image(80, 90, seed=3).pixels_bhw), compress=None)
    values = {"stacks": named([*files]), "out": str(tmp_path / "out"), "bundle": str(unet3d)}
    plan = plan_job(load_job(None, values))
    assert (plan.windows, plan.bytes_to_read) == (1, DATES * 3 * 256 * 256)


def test_scenes_on_other_grids_are_read_on_the_first_one_s(unet3d: Path, tmp_path: Path) -> None:
    """The mask does not depend on the windows; a scene moved by whole pixels is read back as it was."""
    images = in_other_light(synthetic_image(560, 700, seed=3, nodata_fraction=0).pixels_bhw)
    files = write_stack(tmp_path / "one", images)
    moved = AFFINE @ rasterio.Affine.translation(-40, -24)
    padded = np.pad(images[2], [(0, 0), (24, 100), (40, 60)])
    others = [*files[:2], write_scene(tmp_path / "moved.tif", padded, nodata=0, transform=moved), files[3]]
    aligned = mask_of(predict(tmp_path / "aligned", unet3d, stacks=named([*files])))
    np.testing.assert_array_equal(
        mask_of(predict(tmp_path / "whole", unet3d, stacks=named([*others]), warp_stacks=True)), aligned
    )
    turned = AFFINE @ rasterio.Affine.rotation(7) @ rasterio.Affine.translation(11.3, -5.7)
    others[2] = write_scene(tmp_path / "turned.tif", images[2], nodata=0, transform=turned)
    masks = {
        window: mask_of(
            predict(tmp_path / str(window), unet3d, stacks=named([*others]), warp_stacks=True, window=window)
        )
        for window in (512, 1024)
    }
    np.testing.assert_array_equal(masks[512], masks[1024])
    assert (masks[512] != aligned).any()
