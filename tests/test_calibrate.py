"""Temperature and thresholds: fitted to validation scenes, kept in the bundle, and what masks and probabilities follow."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from kit import scenes as kit_scenes
from kit.oracle import published_mask, seeded_bundle, whole_logits, write_scene
from kit.training import scenes, training, values
from pydantic import ValidationError

import geoseg
from geoseg.evaluate.calibrate import TEMPERATURES, Calibration
from geoseg.evaluate.judge import SeenWindow
from geoseg.model.bundle import Bundle
from geoseg.predict.bundles import load_bundle, save_bundle
from geoseg.predict.mask import class_mask
from geoseg.raster.raster import Raster
from geoseg.raster.synthetic import synthetic_image
from geoseg.raster.window import Window
from geoseg.run_training import run_training
from geoseg.train.codes import UNLABELLED, LabelCodes
from geoseg.train.loop import Group
from geoseg.training import Validation, keep_tables_in_threads, prepare, with_light


def with_thresholds(folder: Path, *, building: float, road: float, temperature: float) -> Bundle:
    """An untrained bundle with a temperature and thresholds."""
    bundle = load_bundle(str(seeded_bundle(folder)))
    classes = [
        one.model_copy(update={"threshold": threshold})
        for one, threshold in zip(bundle.description.classes, (0.5, building, road), strict=True)
    ]
    told = bundle.description.model_copy(update={"classes": tuple(classes), "temperature": temperature})
    return Bundle(description=told, weights=bundle.weights)


def seen(logits_chw: torch.Tensor, labels_hw: np.ndarray) -> tuple[SeenWindow, Window]:
    valid_hw = np.ones(labels_hw.shape, np.bool_)
    around = Raster(np.zeros((3, 1, 1), np.uint8), valid_hw[:1, :1])
    height, width = labels_hw.shape
    return SeenWindow(labels_hw, logits_chw, valid_hw, around, (0, 0)), Window(0, 0, width, height)


def iou(mask_hw: np.ndarray, labels_hw: np.ndarray, value: int) -> float:
    ours, theirs = (mask_hw == value), (labels_hw == value)
    return float((ours & theirs).sum() / (ours | theirs).sum())


def test_masks_and_probabilities_follow_the_bundle_whatever_the_window(tmp_path: Path) -> None:
    bundle = with_thresholds(tmp_path / "seeded", building=0.3, road=0.8, temperature=2.5)
    save_bundle(bundle, str(tmp_path / "bundle"))
    path = write_scene(tmp_path / "a.tif", synthetic_image(900, 700, seed=1).pixels_bhw)
    masks = []
    for window in (512, 1024):
        report = geoseg.predict(
            str(path), str(tmp_path / str(window)), bundle=str(tmp_path / "bundle"), window=window, probabilities=True
        )
        masks.append(published_mask(report.scenes[0].mask))
    assert (masks[0] == masks[1]).all()
    with rasterio.open(path) as dataset:
        logits = whole_logits(bundle, dataset.read(), np.ones((900, 700), np.bool_)).double()
    chances = (logits / 2.5).softmax(0).numpy()
    odds = [np.ones_like(chances[0]), *(chances[c] / chances[0] * (1 - t) / t for c, t in ((1, 0.3), (2, 0.8)))]
    wanted = np.argmax(odds, axis=0)
    assert (masks[0] != wanted).mean() < 1e-5, "but for ties in rounding"
    assert (wanted != logits.argmax(0).numpy()).mean() > 0.01
    with rasterio.open(next((tmp_path / "512").rglob("*probabilities*.tif"))) as dataset:
        assert np.abs(dataset.read() / 254 - chances).max() <= 0.5 / 254 + 1e-5


def test_a_bundle_without_them_keeps_its_bytes(tmp_path: Path) -> None:
    description = load_bundle(str(seeded_bundle(tmp_path))).description
    assert "threshold" not in description.model_dump_json()
    assert "temperature" not in description.model_dump_json()
    assert with_thresholds(tmp_path, building=0.5, road=0.5, temperature=1).description == description


def test_a_threshold_for_the_first_class_is_refused(tmp_path: Path) -> None:
    told = load_bundle(str(seeded_bundle(tmp_path))).description.model_dump()
    told["classes"][0]["threshold"] = 0.4
    with pytest.raises(ValidationError, match="the first class has no threshold of its own"):
        type(load_bundle(str(tmp_path)).description).model_validate(told)


@pytest.mark.parametrize("true_temperature", [0.7, 1.0, 2.2])
def test_the_temperature_is_that_of_the_labels(true_temperature: float) -> None:
    rng = torch.Generator().manual_seed(3)
    logits_chw = 3 * torch.randn(3, 200, 200, generator=rng)
    chances = (logits_chw / true_temperature).softmax(0).reshape(3, -1).T
    labels_hw = torch.multinomial(chances, 1, generator=rng).reshape(200, 200).numpy().astype(np.uint8)
    labels_hw[:20] = UNLABELLED
    calibration = Calibration(LabelCodes(3))
    calibration.add(*seen(logits_chw, labels_hw), source="a", classes=(0, 1, 2))
    assert calibration.temperature() == pytest.approx(true_temperature, rel=0.06)
    assert calibration.temperature() in TEMPERATURES


def test_labels_that_leave_classes_open_have_their_say() -> None:
    codes = LabelCodes.for_sources(3, [(1,)])
    rng = torch.Generator().manual_seed(3)
    logits_chw = 3 * torch.randn(3, 300, 300, generator=rng)
    chances = (logits_chw / 2).softmax(0).reshape(3, -1).T
    drawn = torch.multinomial(chances, 1, generator=rng).reshape(300, 300).numpy()
    labels_hw = np.where(drawn == 1, 1, codes.background_of((1,))).astype(np.uint8)
    calibration = Calibration(codes)
    calibration.add(*seen(logits_chw, labels_hw), source="a", classes=(1,))
    assert calibration.temperature() == pytest.approx(2, rel=0.06)
    assert calibration.thresholds(2.0)[2] == 0.5, "of roads nothing is known"


def test_the_threshold_has_the_highest_iou(tmp_path: Path) -> None:
    """Truth is biased: a network that sees roads everywhere gets a high threshold for them."""
    rng = torch.Generator().manual_seed(4)
    truth = torch.randint(0, 3, (256, 256), generator=rng)
    logits_chw = torch.nn.functional.one_hot(truth, 3).permute(2, 0, 1) * 2.0 + torch.randn(3, 256, 256, generator=rng)
    logits_chw[2] += 1.5
    labels_hw = truth.numpy().astype(np.uint8)
    calibration = Calibration(LabelCodes(3))
    calibration.add(*seen(logits_chw, labels_hw), source="a", classes=(0, 1, 2))
    temperature = calibration.temperature()
    found = calibration.thresholds(temperature)
    assert found[2] > 0.6

    def scored(road: float) -> float:
        bundle = with_thresholds(tmp_path, building=found[1], road=road, temperature=temperature)
        mask = class_mask(logits_chw, np.ones((256, 256), np.bool_), bundle.description)
        assert mask is not None
        return (iou(mask, labels_hw, 1) + iou(mask, labels_hw, 2)) / 2

    best = scored(found[2])
    assert best > scored(0.5) + 0.02
    others = [scored(road) for road in np.linspace(0.05, 0.95, 19)]
    assert best >= max(others) - 1e-4


def test_of_many_pixels_those_on_a_lattice_are_taken_whatever_the_cut() -> None:
    rng = torch.Generator().manual_seed(4)
    logits_chw = torch.randn(2, 300, 300, generator=rng)
    labels_hw = torch.randint(0, 2, (300, 300), generator=rng).numpy().astype(np.uint8)
    fitted = []
    for cut in (300, 100, 64):
        calibration = Calibration(LabelCodes(2), every=7)
        for row in range(0, 300, cut):
            for col in range(0, 300, cut):
                part = (slice(row, row + cut), slice(col, col + cut))
                window_seen, window = seen(logits_chw[:, part[0], part[1]], labels_hw[part])
                there = Window(col, row, window.width, window.height)
                calibration.add(window_seen, there, source="a", classes=(0, 1))
        fitted.append((calibration.temperature(), calibration.thresholds(1.0)))
    assert fitted[0] == fitted[1] == fitted[2]
    whole = Calibration(LabelCodes(2))
    whole.add(*seen(logits_chw[:, ::7, ::7], np.ascontiguousarray(labels_hw[::7, ::7])), source="a", classes=(0, 1))
    assert fitted[0] == (whole.temperature(), whole.thresholds(1.0))


def test_no_source_decides_alone() -> None:
    """Of two sources that want other thresholds the larger has no larger say."""
    rng = torch.Generator().manual_seed(4)
    found = {}
    for sizes in ((64, 64), (64, 512)):
        calibration = Calibration(LabelCodes(2))
        for source, (shift, size) in enumerate(zip((-2.0, 2.0), sizes, strict=True)):
            truth = torch.randint(0, 2, (size, 128), generator=rng)
            lead = 2.0 * truth + torch.randn(size, 128, generator=rng) + shift
            logits_chw = torch.stack([torch.zeros_like(lead), lead])
            calibration.add(*seen(logits_chw, truth.numpy().astype(np.uint8)), source=str(source), classes=(0, 1))
        found[sizes] = calibration.thresholds(1.0)[1]
    assert found[64, 64] == pytest.approx(found[64, 512], abs=0.1)


def test_training_ends_with_a_calibrated_bundle(tmp_path: Path) -> None:
    folder = scenes(tmp_path)
    out = tmp_path / "out"
    report = run_training(training(folder, out), warn=lambda _: None, quiet=True)
    plain, fitted = load_bundle(str(out / "stage-2" / "best")), load_bundle(report.bundle)
    assert plain.weights == fitted.weights
    assert fitted.description.classes != plain.description.classes
    prepared = prepare(training(folder, out), keep_tables=keep_tables_in_threads)
    before, after = (Validation(prepared, device="cpu").scores(one, Group()) for one in (plain, fitted))
    assert after["score"] > before["score"]
    assert report.scores == after
    assert any(line.startswith("fitted   temperature") for line in report.lines())
    not_fitted = run_training(training(folder, out, calibrate=False), warn=lambda _: None, quiet=True)
    assert load_bundle(not_fitted.bundle) == with_light(prepared, plain)
    assert not not_fitted.thresholds


def test_validation_scenes_of_another_scale_are_read_as_they_are_trained_on(tmp_path: Path) -> None:
    """The same scene with raw values sixteen times as large has the same scores, when its source says so."""
    folder = scenes(tmp_path)
    with rasterio.open(folder / "v.tif") as dataset:
        pixels, transform = dataset.read().astype(np.uint16) * 16, dataset.transform
    kit_scenes.write_scene(folder / "w.tif", pixels, transform=transform, nodata=0, photometric="rgb")
    shutil.copy(folder / "v_classes.tif", folder / "w_classes.tif")
    scores = []
    for name, more in (("v", {}), ("w", {"scale": [0, 255 * 16]})):
        told = values(folder, tmp_path / name)
        told["source"][1] |= {"scenes": [f"{folder}/{name}.tif"], **more}
        prepared = prepare(training(folder, tmp_path / name, source=told["source"]), keep_tables=keep_tables_in_threads)
        bundle = load_bundle(str(seeded_bundle(tmp_path / "seeded", resolution_m=0.5)))
        scores.append(Validation(prepared, device="cpu").scores(bundle, Group()))
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)
