"""``geoseg train``: what is wrong is told before the first step, in a sentence; what comes out is a bundle that predicts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from affine import Affine
from click.testing import CliRunner
from kit.scenes import write_scene
from kit.training import LABELS, PIXEL_M, labelled_scene, scenes, training, values
from PIL import Image

import geoseg
from geoseg.cli import main
from geoseg.config import check
from geoseg.errors import ConfigError, GeosegError, NothingReadableError
from geoseg.predict.bundles import load_bundle
from geoseg.raster import store
from geoseg.run_training import run_training
from geoseg.train.job import TrainJob
from geoseg.training import Prepared, example_chips, keep_tables_in_threads, prepare


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes(tmp_path_factory.mktemp("scenes"))


def ready(job: TrainJob) -> Prepared:
    return prepare(job, keep_tables=keep_tables_in_threads)


def toml_of(told: dict[str, Any]) -> str:
    """The values as TOML: JSON's texts, numbers and lists are TOML's, its objects become inline tables."""

    def inline(value: Any) -> str:
        if isinstance(value, dict):
            return "{" + ", ".join(f"{key} = {inline(one)}" for key, one in value.items()) + "}"
        if isinstance(value, list):
            return "[" + ", ".join(inline(one) for one in value) + "]"
        return json.dumps(value)

    return "".join(f"{key} = {inline(value)}\n" for key, value in told.items())


@pytest.fixture(scope="module")
def trained(folder: Path) -> tuple[Path, str]:
    """Train by the command line into a folder; what it printed."""
    out = folder / "trained"
    job = folder / "train.toml"
    job.write_text(toml_of(values(folder, out)))
    told = CliRunner().invoke(main, ["train", str(job)])
    assert told.exit_code == 0, told.output
    return out, told.output


def test_a_bundle_comes_out_that_predicts(trained: tuple[Path, str], folder: Path, tmp_path: Path) -> None:
    out, told = trained
    assert f"bundle   {out}/bundle" in told
    report = geoseg.predict(str(folder / "v.tif"), str(tmp_path), bundle=str(out / "bundle"))
    assert report.counts["published"] == 1
    with rasterio.open(report.scenes[0].mask) as mask:
        assert set(np.unique(mask.read(1))) <= {0, 1, 2, 255}


def test_the_bundle_knows_the_light_of_its_training_scenes(
    trained: tuple[Path, str], folder: Path, tmp_path: Path
) -> None:
    out, _ = trained
    job = json.loads((out / "job.json").read_text())
    description = load_bundle(str(out / "bundle")).description
    assert len(description.light) == len(job["train"])
    assert {one.source for one in description.light} == {
        source["name"] for source in job["job"]["source"] if source["use"] != "validate"
    }
    report = geoseg.predict(str(folder / f"{job['train'][0]}.tif"), str(tmp_path), bundle=str(out / "bundle"))
    assert report.scenes[0].novelty is not None
    assert report.scenes[0].novelty < 1.5


def test_the_scores_are_those_of_the_masks_that_predict_publishes(
    trained: tuple[Path, str], folder: Path, tmp_path: Path
) -> None:
    out, told = trained
    report = geoseg.predict(str(folder / "v.tif"), str(tmp_path), bundle=str(out / "bundle"), precision="float32")
    with rasterio.open(report.scenes[0].mask) as mask, rasterio.open(folder / "v_classes.tif") as truth:
        mask_hw, truth_hw = mask.read(1), truth.read(1)
    for code, name in enumerate(("background", "building", "road")):
        known = (truth_hw != 255) & (mask_hw != 255)
        ours, theirs = (mask_hw == code) & known, (truth_hw == code) & known
        assert f"{name} {(ours & theirs).sum() / (ours | theirs).sum():.3f}" in told


def test_pictures_and_logs_come_with_it(trained: tuple[Path, str]) -> None:
    out, told = trained
    for name in ("curves", "chips"):
        assert Image.open(out / f"{name}.png").size[0] > 400
    assert "ETA" in told
    assert "chips/s" in told
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 9 + 3
    assert list((out / "tensorboard").iterdir())
    job = json.loads((out / "job.json").read_text())
    assert job["job"]["seed"] == 5
    assert [stage["steps"] for stage in job["stages"]] == [5, 4]
    assert job["train"] == ["a", "b"]
    assert job["validate"] == ["v"]


def test_the_same_command_again_takes_no_step(trained: tuple[Path, str], folder: Path) -> None:
    out, _ = trained
    before = (out / "metrics.jsonl").read_bytes(), (out / "bundle" / "model.safetensors").read_bytes()
    told = CliRunner().invoke(main, ["train", str(folder / "train.toml")])
    assert told.exit_code == 0
    assert before == ((out / "metrics.jsonl").read_bytes(), (out / "bundle" / "model.safetensors").read_bytes())


def test_without_validation_the_last_weights_are_the_bundle(folder: Path, tmp_path: Path) -> None:
    job = training(folder, tmp_path, source=values(folder, tmp_path)["source"][:1])
    run_training(job, warn=lambda _: None, quiet=True)
    assert (tmp_path / "bundle" / "model.safetensors").read_bytes() == (
        tmp_path / "stage-2" / "last" / "model.safetensors"
    ).read_bytes()


@pytest.mark.bucket
def test_scenes_labels_and_all_that_comes_out_may_lie_in_buckets(
    trained: tuple[Path, str], folder: Path, bucket: str
) -> None:
    for path in folder.glob("*.tif"):
        store.write(f"s3://{bucket}/scenes/{path.name}", path.read_bytes())
    job = training(f"s3://{bucket}/scenes", f"s3://{bucket}/out")
    report = run_training(job, warn=lambda _: None, quiet=True)
    assert report.bundle == f"s3://{bucket}/out/bundle"
    weights = store.read(f"s3://{bucket}/out/bundle/model.safetensors")
    assert weights == (trained[0] / "bundle" / "model.safetensors").read_bytes()
    again = run_training(job, warn=lambda _: None, quiet=True)
    assert again.scores == report.scores


def change_source(folder: Path, out: Path, **more: Any) -> TrainJob:
    told = values(folder, out)
    told["source"][0] |= more
    return training(folder, out, source=told["source"])


def labels(**more: Any) -> list[dict[str, Any]]:
    return [{**LABELS, **more}]


def test_examples_of_scaled_imagery_show_it_as_the_network_sees_it(folder: Path, tmp_path: Path) -> None:
    """The scenes to train on are of bytes, those to validate on are not."""
    for name in ("v.tif", "v_classes.tif"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with rasterio.open(folder / "v.tif") as dataset:
        pixels, transform = dataset.read(), dataset.transform
    write_scene(tmp_path / "v.tif", pixels.astype(np.uint16) * 8 + 60, transform=transform, photometric="rgb")
    sources = values(folder, tmp_path / "out")["source"]
    sources[1] |= {"scenes": [f"{tmp_path}/v.tif"], "scale": [0, 1020]}  # half of it is brighter than white
    job = training(folder, tmp_path / "out", source=sources)
    prepared = ready(job)
    assert prepared.plan.chip_dtype == "uint8"
    run_training(job, warn=lambda _: None, quiet=True)
    bundle = load_bundle(str(tmp_path / "out" / "bundle"))
    shown = np.stack([one.image_khw for one in example_chips(prepared, bundle, device="cpu")])
    assert shown.max() > 255, "what is brighter than white stays so"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"labels": labels(uri="{folder}/{stem}_nothing.tif")},
            r"source two: .*a_nothing\.tif|source two: .*b_nothing\.tif",
        ),
        ({"labels": labels(values={"bilding": [1]})}, "there is no class 'bilding'.*did you mean 'building'"),
        (
            {"labels": labels(values={"building": [77], "road": [2]})},
            "no pixel of the training scenes is labelled 'building'",
        ),
        ({"labels": labels(uri="{folder}/nope/{stem}.tif")}, "source two: none of its scenes can be used"),
        ({"scenes": ["FOLDER/z*.tif"]}, "no scene found there"),
        ({"scenes": ["FOLDER/v.tif"]}, "validation scene v shares ground with training scene v"),
        ({"bands": [1, 2, 9]}, "--bands must name 3 of its 3 bands"),
        ({"labels": [{"uri": "FOLDER/away.geojson", "class": "building"}]}, r"away\.geojson"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:40],
)
def test_what_is_wrong_with_data_is_told_before_the_first_step(
    folder: Path, tmp_path: Path, change: dict[str, Any], told: str
) -> None:
    square = [[10.0, 10.0], [10.1, 10.0], [10.1, 10.1], [10.0, 10.0]]
    away = {"type": "Feature", "properties": {}, "geometry": {"type": "Polygon", "coordinates": [square]}}
    (folder / "away.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": [away]}))
    named = json.loads(json.dumps(change).replace("FOLDER", str(folder)))
    with pytest.raises(GeosegError, match=told):
        ready(change_source(folder, tmp_path, **named))


def test_labels_of_another_crs_are_told_with_the_remedy(folder: Path, tmp_path: Path) -> None:
    labelled_scene(tmp_path, "a", seed=0)
    with rasterio.open(tmp_path / "a_classes.tif") as dataset:
        classes, transform = dataset.read(), dataset.transform
    write_scene(tmp_path / "a_classes.tif", classes, crs="EPSG:32634", transform=transform)
    source = [{"name": "s", "scenes": [f"{tmp_path}/a.tif"], "labels": [LABELS]}]
    with pytest.raises(NothingReadableError, match=r"source s: none of its scenes.*gdalwarp"):
        ready(training(tmp_path, tmp_path / "out", source=source))


def test_imagery_of_another_dtype_is_told_with_the_remedy(folder: Path, tmp_path: Path) -> None:
    labelled_scene(tmp_path, "a", seed=0)
    with rasterio.open(tmp_path / "a.tif") as dataset:
        pixels = dataset.read().astype(np.uint16) * 8
    write_scene(
        tmp_path / "a.tif", pixels, transform=Affine(PIXEL_M, 0, 500_000, 0, -PIXEL_M, 5_300_000), photometric="rgb"
    )
    source = {"name": "s", "scenes": [f"{tmp_path}/a.tif"], "labels": [LABELS]}
    with pytest.raises(NothingReadableError, match=r"has uint16; .*scale = \[0, 2047\]"):
        ready(training(tmp_path, tmp_path / "out", source=[source]))
    plan = ready(training(tmp_path, tmp_path / "out", source=[source | {"scale": [0, 2040]}])).plan
    assert plan.chip_dtype == "float32"
    assert all(20 < one < 235 for one in plan.description.mean), "in the units of the bundle"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"modle": {}}, "there is no setting 'modle'; did you mean 'model'"),
        ({"stage": []}, "stage: .*at least 1"),
        ({"seed": -1}, "seed: "),
        ({"optimizer": {"clip_norm": 0}}, "optimizer.clip_norm"),
        ({"cluster": {"workers": [4, 2]}}, "the least and then the most"),
        (
            {"source": [{"name": "v", "use": "validate", "scenes": ["x"], "labels": [LABELS]}]},
            "no source is there to train on",
        ),
        (
            {"source": [{"name": "v", "hold_out": 0.5, "scenes": ["x"], "labels": [LABELS]}]},
            "hold_out belongs to use = 'split'",
        ),
        ({"source": 2 * [{"name": "v", "scenes": ["x"], "labels": [LABELS]}]}, "two sources have the same name"),
        ({"stage": [{"chip": 32, "steps": 1}, {"chip": 8, "steps": 1}]}, "test: stage 2: chip: .*16, got 8"),
        ({"stage": [{"chip": 32, "steps": 1, "resolution_m": [1, -1]}]}, "stage 1: resolution_m 2: .*greater than 0"),
        ({"stage": [{"chip": 32}]}, "test: stage 1: a stage wants either steps or epochs$"),
        (
            {"stage": [{"chip": 32, "steps": 1, "loss": {"terms": [{"loss": {"name": "dice", "clases": [1]}}]}}]},
            "no setting 'stage 1: loss.terms 1: loss.clases'; did you mean 'classes'",
        ),
        (
            {"source": [{"name": "v", "scenes": ["x"], "labels": [{"uri": "a", "clas": "b"}]}]},
            "no setting 'source 1: labels 1: clas'; did you mean 'class'",
        ),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:40],
)
def test_a_wrong_setting_is_named(folder: Path, tmp_path: Path, change: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        training(folder, tmp_path, **change)


@pytest.mark.parametrize(
    ("variant", "told"),
    [
        ({"name": "unet", "width": 0}, r"test: model\.variant\.width: .*1, got 0$"),
        ({"name": "unet", "widht": 8}, r"no setting 'model\.variant\.widht'; did you mean 'width'"),
        ({"name": "smp", "encoder": "resnet18", "depth": 3}, r"no setting 'model\.variant\.depth'$"),
        ({"name": "smp"}, r"the setting 'model\.variant\.encoder' is missing"),
        ({"name": "Unet"}, r"model\.variant: its name is one of unet, .*, or smp"),
        ("unet", r"model\.variant: .*got 'unet'"),
        (
            {"name": "smp", "encoder": "resnet18", "options": {"encoder_weights": "imagenet"}},
            r"model\.variant\.options: options cannot set encoder_weights",
        ),
        (
            {"name": "smp", "encoder": "resnet18", "options": {"decoder_channels": [16, "x"]}},
            r"model\.variant\.options\.decoder_channels 2: .*got 'x'",
        ),
    ],
)
def test_a_wrong_variant_is_named_as_it_stands_in_the_file(
    folder: Path, tmp_path: Path, variant: Any, told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        training(folder, tmp_path, model=values(folder, tmp_path)["model"] | {"variant": variant})


def test_settings_of_the_model_that_contradict_each_other_are_told(folder: Path, tmp_path: Path) -> None:
    model = values(folder, tmp_path)["model"]
    for change, told in (
        ({"mean": [1.0, 1.0, 1.0]}, "mean and std are given both"),
        ({"mean": [1.0], "std": [1.0]}, "^model: bands, mean and std must be equally many"),
        ({"name": "a/b"}, "^model.name: .*got 'a/b'"),
        ({"dates": 3}, "has 1 dates, the model takes 3"),
    ):
        with pytest.raises(GeosegError, match=told):
            ready(training(folder, tmp_path, model=model | change))


def test_local_is_one_process(folder: Path, tmp_path: Path) -> None:
    job = training(folder, tmp_path, cluster={"engine": "local", "workers": 2})
    with pytest.raises(ConfigError, match="one process"):
        run_training(job, warn=lambda _: None)


def test_a_scene_that_cannot_be_used_is_left_out_and_told(folder: Path, tmp_path: Path) -> None:
    for name in ("a", "b", "v"):
        for suffix in ("", "_classes"):
            shutil.copy(folder / f"{name}{suffix}.tif", tmp_path)
    (tmp_path / "b.tif").write_bytes(b"not a tiff")
    prepared = ready(training(tmp_path, tmp_path / "out"))
    assert [scene.scene.id for scene in prepared.plan.scenes] == ["a"]
    assert any("source two: b: " in sentence for sentence in prepared.warnings)


def test_missing_overviews_are_told(tmp_path: Path) -> None:
    labelled_scene(tmp_path, "a", seed=0, overviews=False)
    source = [{"name": "s", "scenes": [f"{tmp_path}/a.tif"], "labels": [LABELS]}]
    stages = [{"resolution_m": 2.0, "chip": 32, "steps": 1}, {"chip": 32, "steps": 1, "batch": 1, "learning_rate": 0.1}]
    prepared = ready(training(tmp_path, tmp_path / "out", source=source, stage=stages))
    (warning,) = prepared.warnings
    assert "stage 1: a has no overview near 2 m, so 16 times the pixels are read" in warning


def test_a_source_of_one_class_leaves_the_other_open(folder: Path, tmp_path: Path) -> None:
    told = values(folder, tmp_path)["source"]
    only = {"name": "one", "scenes": [f"{folder}/b.tif"], "labels": labels(values={"building": [1]})}
    both = told[0] | {"scenes": [f"{folder}/a.tif"]}
    plan = ready(training(folder, tmp_path, source=[both, only])).plan
    assert plan.codes.sets == ((0, 2),)


@pytest.mark.parametrize("network", ["unet3d", "vnet"])
def test_stacks_of_dates_are_trained_on_as_they_are_predicted(tmp_path: Path, network: str) -> None:
    for place, name in enumerate(("east", "west", "far")):
        labelled_scene(tmp_path, f"{name}_20240101", seed=place, at=place, size=128)
        with rasterio.open(tmp_path / f"{name}_20240101.tif") as dataset:
            pixels, transform = dataset.read(), dataset.transform
        for date, gain in ((20240201, 0.8), (20240301, 1.1)):
            brighter = (pixels * gain).clip(0, 255).astype(np.uint8)
            shifted = transform @ Affine.translation(0.25, 0.5) if (name, date) == ("west", 20240201) else transform
            write_scene(tmp_path / f"{name}_{date}.tif", brighter, transform=shifted, nodata=0)
    model = values(tmp_path, tmp_path)["model"] | {
        "variant": {"name": network, "depth": 2, "width": 4, "norm": "batch"},
        "dates": 3,
    }
    stack_by = r"(?P<stack>[a-z]+)_(?P<date>\d{8})\.tif"
    use = {"train": ("east", "west"), "validate": ("far",)}
    source = [
        {
            "name": one,
            "use": one,
            "scenes": [f"{tmp_path}/{name}_*[0-9].tif" for name in names],
            "labels": labels(),
            "stack_by": stack_by,
        }
        for one, names in use.items()
    ]
    plain = ready(training(tmp_path, tmp_path / "plain", model=model, source=source))
    assert [scene.scene.id for scene in plain.plan.scenes] == ["east"]
    assert any("west" in sentence and "warp" in sentence for sentence in plain.warnings)
    source = [one | {"warp_stacks": True} for one in source]
    warped = ready(training(tmp_path, tmp_path / "warped", model=model, source=source))
    assert [scene.scene.id for scene in warped.plan.scenes] == ["east", "west"]
    stage = {"chip": 32, "steps": 2, "batch": 2, "learning_rate": 0.01}
    out = tmp_path / "out"
    run_training(training(tmp_path, out, model=model, source=source, stage=[stage]), warn=lambda _: None, quiet=True)
    report = geoseg.predict(
        [str(path) for path in tmp_path.glob("far_*[0-9].tif")],
        str(tmp_path / "masks"),
        bundle=str(out / "bundle"),
        stack_by=stack_by,
    )
    assert [scene.status for scene in report.scenes] == ["published"]


def test_border_weights_where_labels_leave_the_class_open_are_told(folder: Path, tmp_path: Path) -> None:
    roads = LABELS | {"values": {"road": [2]}}
    told = values(folder, tmp_path)
    told["source"][:1] = [
        {"name": "all", "scenes": [f"{folder}/a.tif"], "labels": [LABELS]},
        {"name": "roads", "scenes": [f"{folder}/b.tif"], "labels": [roads]},
    ]
    told["stage"][1]["border"] = {"label": "building"}
    job = check(TrainJob, told, where="the test")
    (warning,) = ready(job).warnings
    assert warning == (
        "stage 2: border has no effect on chips of source roads, whose labels leave open where a building is"
    )
