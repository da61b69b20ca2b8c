"""Scores of labelled scenes: those of a plain computation on the mask that is published, however the work was cut."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from click.testing import CliRunner
from kit.data import data_folder
from kit.oracle import CLASSES, published_mask, seeded_bundle, whole_mask, write_scene
from numpy.typing import NDArray
from PIL import Image

import geoseg
from geoseg.cli import main
from geoseg.config import PredictConfig, load_settings
from geoseg.errors import ConfigError
from geoseg.evaluate.job import RELIABILITY_NAME, REPORT_NAME, EvaluationJob
from geoseg.evaluate.judge import EvaluationScene, Tally, error_map, evaluate_scenes, find_scene
from geoseg.evaluate.report import Evaluation
from geoseg.model.bundle import Bundle
from geoseg.predict.bundles import load_bundle
from geoseg.predict.failure import Failure
from geoseg.predict.predictor import Predictor, network_spec
from geoseg.predict.report import class_iou
from geoseg.raster.scene import SceneRef
from geoseg.raster.synthetic import synthetic_image
from geoseg.run import run_evaluation
from geoseg.train.codes import UNLABELLED, LabelCodes
from geoseg.train.metrics import Counts, class_scores
from geoseg.train.sources import SourceConfig

LABELS = {"uri": "{folder}/{stem}_classes.tif", "values": {"background": [0], "building": [1], "road": [2]}}
BUILDINGS = {
    "uri": "{folder}/{stem}_buildings.tif",
    "values": {"background": [0], "building": [1]},
    "unlabelled": [255],
}


@dataclass(frozen=True)
class Town:
    """A folder of two labelled scenes, and what labels them."""

    folder: Path
    bundle: Path

    def job(self, out: Path, *, sources: list[dict[str, Any]] | None = None, **settings: Any) -> EvaluationJob:
        values = {"source": sources or [self.source("a"), self.source("b", labels=[BUILDINGS])], "out": str(out)}
        return load_settings(EvaluationJob, None, {**values, "bundle": str(self.bundle), **settings})

    def source(self, stem: str, *, labels: list[dict[str, Any]] | None = None) -> dict[str, Any]:
        labels = labels or [{**LABELS, "unlabelled": [255]}]
        return {"name": stem, "scenes": [str(self.folder / f"{stem}.tif")], "labels": labels}


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory) -> Town:
    folder = tmp_path_factory.mktemp("town")
    for seed, (stem, shape) in enumerate({"a": (1100, 1300), "b": (530, 700)}.items()):
        made = synthetic_image(*shape, seed=seed)
        pixels = made.pixels_bhw.copy()
        pixels[:, 300:420, 200:330] = 0
        write_scene(folder / f"{stem}.tif", pixels, nodata=0)
        classes = made.classes_hw.copy()
        classes[500:600, 450:640] = UNLABELLED
        write_scene(folder / f"{stem}_classes.tif", classes[None])
        write_scene(folder / f"{stem}_buildings.tif", np.where(classes == 2, 0, classes)[None])
    return Town(folder, seeded_bundle(tmp_path_factory.mktemp("bundle"), resolution_m=0.6))


@pytest.fixture(scope="module")
def evaluation(town: Town, tmp_path_factory: pytest.TempPathFactory) -> tuple[Evaluation, Path]:
    out = tmp_path_factory.mktemp("out")
    return run_evaluation(town.job(out)), out


def pixels_of(path: Path) -> NDArray[Any]:
    with rasterio.open(path) as dataset:
        return dataset.read(1)


def test_scores_are_those_of_the_mask_that_predict_publishes(town: Town, evaluation: tuple[Evaluation, Path]) -> None:
    report, out = evaluation
    assert report.exit_code == 0
    told = json.loads((out / REPORT_NAME).read_text())
    mask = whole_mask(load_bundle(str(town.bundle)), town.folder / "a.tif")
    truth = pixels_of(town.folder / "a_classes.tif")
    known = (mask != 255) & (truth != UNLABELLED)
    for value, one in enumerate(CLASSES):
        scores = told["sources"]["a"]["scores"][one.name]
        assert scores["iou"] == class_iou(mask, truth, known, value)
        assert 0 < scores["iou"] < 1
        counts = told["scenes"][0]["counts"]["classes"][value]
        assert counts["known"] == known.sum() < mask.size
        assert sum(count for count, _, _ in counts["bins"]) == known.sum()
        if value:
            assert counts["object_tp"] + counts["object_fn"] > 1


def test_a_class_that_a_source_does_not_label_has_no_score_there(
    town: Town, evaluation: tuple[Evaluation, Path]
) -> None:
    report, _ = evaluation
    scores = class_scores(report.counts_of("b"))
    assert [np.isnan(one.iou) for one in scores] == [True, False, True]
    mask = whole_mask(load_bundle(str(town.bundle)), town.folder / "b.tif")
    truth = pixels_of(town.folder / "b_buildings.tif")
    assert scores[1].iou == class_iou(mask, truth, (mask != 255) & (truth != UNLABELLED), 1)
    assert (
        report.counts_of(None).of("tp").tolist()
        == (report.counts_of("a").of("tp") + report.counts_of("b").of("tp")).tolist()
    )
    rows = [line.split()[:2] for line in report.lines()[1:]]
    everything = [one.name for one in CLASSES]
    assert rows == [*(["a", one] for one in everything), ["b", "building"], *(["all", one] for one in everything)]


@pytest.mark.parametrize("resolution_m", [0.6, 1.0], ids=["own pixels", "coarser"])
def test_windows_change_nothing(town: Town, resolution_m: float, tmp_path: Path) -> None:
    told = []
    bundle = seeded_bundle(tmp_path / "bundle", resolution_m=resolution_m)
    for window in (512, 1024):
        out = tmp_path / str(window)
        run_evaluation(town.job(out, predict={"window": window}, bundle=str(bundle)))
        files = [file for file in sorted(out.rglob("*")) if file.is_file()]
        told.append({str(file.relative_to(out)): file.read_bytes() for file in files})
    assert told[0].keys() == told[1].keys()
    assert [name for name in told[0] if told[0][name] != told[1][name]] == []
    assert len(told[0]) == 6


def test_workers_add_up_to_the_whole(town: Town) -> None:
    bundle = load_bundle(str(town.bundle))
    scenes = [scene for scene in found(town, bundle, window=512) if isinstance(scene, EvaluationScene)]
    predictor = Predictor(bundle, PredictConfig())
    for quick in (True, False):
        (whole_a, whole_b), *shares = (
            evaluate_scenes(predictor, scenes, share=share, quick=quick) for share in ((0, 1), (0, 3), (1, 3), (2, 3))
        )
        for place, whole in enumerate((whole_a, whole_b)):
            each = [share[place] for share in shares]
            joined = Tally.joined([one for one in each if isinstance(one, Tally)], 3, complete=True)
            assert isinstance(whole, Tally)
            assert joined.counts.to_dict() == Tally.joined([whole], 3, complete=True).counts.to_dict()
            assert len([one for one in each if isinstance(one, Tally) and one.counts.pixels]) > 1
        assert bool(joined.counts.of("object_fn").any()) != quick


def test_a_quick_evaluation_counts_the_same_pixels(town: Town) -> None:
    bundle = load_bundle(str(town.bundle))
    scenes = [scene for scene in found(town, bundle, window=None) if isinstance(scene, EvaluationScene)]
    quick, full = (evaluate_scenes(Predictor(bundle, PredictConfig()), scenes, quick=quick) for quick in (True, False))
    for one, other in zip(quick, full, strict=True):
        assert isinstance(one, Tally)
        assert isinstance(other, Tally)
        assert one.counts.pixels == other.counts.pixels > 0
        for column in ("known", "tp", "fp", "fn"):
            assert one.counts.of(column).tolist() == other.counts.of(column).tolist()
        assert one.counts.bins.tolist() == other.counts.bins.tolist()
        assert not one.counts.of("near_truth").any()
        assert other.counts.of("near_truth").any()


def found(town: Town, bundle: Bundle, *, window: Any) -> list[EvaluationScene | Failure]:
    """The scenes, with a bundle that lies nowhere."""
    codes = LabelCodes.for_sources(3, [(1, 2), (1,)])
    spec = network_spec(bundle, PredictConfig(window=window))
    return [
        find_scene(SceneRef(stem, str(town.folder / f"{stem}.tif")), SourceConfig(**source), spec, codes)
        for stem, source in (("a", town.source("a")), ("b", town.source("b", labels=[BUILDINGS])))
    ]


def test_an_error_map_lies_on_its_scene_and_says_what_is_wrong(town: Town, evaluation: tuple[Evaluation, Path]) -> None:
    _, out = evaluation
    for stem, labels in (("a", "classes"), ("b", "buildings")):
        mask = whole_mask(load_bundle(str(town.bundle)), town.folder / f"{stem}.tif")
        truth = pixels_of(town.folder / f"{stem}_{labels}.tif")
        expected = np.full(mask.shape, 255, np.uint8)
        known = (mask != 255) & (truth != UNLABELLED)
        if stem == "b":  # beside buildings there may be a road
            known &= (truth == 1) | (mask == 1)
        expected[known & (truth == mask)] = mask[known & (truth == mask)]
        expected[known & (truth > 0) & (mask == 0)] = 3
        expected[known & (truth == 0) & (mask > 0)] = 4
        expected[known & (truth > 0) & (mask > 0) & (truth != mask)] = 5
        with (
            rasterio.open(out / "errors" / stem / f"{stem}.tif") as errors,
            rasterio.open(town.folder / f"{stem}.tif") as scene,
        ):
            assert (errors.transform, errors.crs, errors.shape) == (scene.transform, scene.crs, scene.shape)
            np.testing.assert_array_equal(errors.read(1), expected)
            assert errors.nodata == 255
            assert errors.tags()["CODE_3"] == "missed"
            assert set(np.unique(expected)) == ({0, 1, 2, 3, 4, 5, 255} if stem == "a" else {1, 3, 4, 5, 255})


def test_an_error_map_of_every_label_and_mask() -> None:
    codes = LabelCodes.for_sources(3, [(1,)])
    beside = codes.background_of((1,))
    labels, mask = (
        each.astype(np.uint8) for each in np.meshgrid([0, 1, 2, beside, 255], [0, 1, 2, 255], indexing="ij")
    )
    assert error_map(mask, labels, codes).tolist() == [
        [0, 4, 4, 255], [3, 1, 5, 255], [3, 5, 2, 255], [255, 4, 255, 255], [255, 255, 255, 255],
    ]  # fmt: skip


def test_pictures_show_the_scene_and_its_errors(evaluation: tuple[Evaluation, Path]) -> None:
    _, out = evaluation
    with Image.open(io.BytesIO((out / "pictures" / "a" / "a.png").read_bytes())) as picture:
        colors = {color for _, color in picture.convert("RGB").getcolors(1 << 24)}
        assert picture.width > 1200
    assert {(255, 40, 170), (40, 200, 255), CLASSES[1].color, CLASSES[2].color} <= colors
    with Image.open(out / RELIABILITY_NAME) as picture:
        assert picture.width > 3 * 300


def test_a_scene_that_cannot_be_judged_is_told_and_the_others_are_judged(town: Town, tmp_path: Path) -> None:
    (tmp_path / "broken.tif").write_bytes((town.folder / "b.tif").read_bytes()[:3000])
    (tmp_path / "broken_buildings.tif").write_bytes((town.folder / "b_buildings.tif").read_bytes())
    (tmp_path / "cut.tif").write_bytes((town.folder / "b.tif").read_bytes())
    with (tmp_path / "cut.tif").open("r+b") as file:
        file.seek(-40_000, 2)
        file.write(b"\0" * 40_000)
    (tmp_path / "cut_buildings.tif").write_bytes((town.folder / "b_buildings.tif").read_bytes())
    (tmp_path / "bare.tif").write_bytes((town.folder / "b.tif").read_bytes())
    names = [tmp_path / "broken.tif", tmp_path / "cut.tif", tmp_path / "bare.tif", town.folder / "b.tif"]
    source = {"name": "all", "scenes": [str(name) for name in names], "labels": [BUILDINGS]}
    report = run_evaluation(town.job(tmp_path / "out", sources=[source]))
    assert report.exit_code == 1
    told = {scene["id"]: scene for scene in json.loads((tmp_path / "out" / REPORT_NAME).read_text())["scenes"]}
    assert "bare_buildings.tif" in told["bare"]["not_judged"]
    assert told["broken"]["not_judged"].startswith("broken: ")
    assert told["cut"]["not_judged"].startswith("cut: ")
    assert told["b"]["counts"]["pixels"] > 0
    assert sum(line.startswith("not judged: all/") for line in report.lines()) == 3
    source["scenes"] = source["scenes"][:3]
    assert run_evaluation(town.job(tmp_path / "none", sources=[source])).exit_code == 3


def test_a_scene_of_nothing_has_no_scores(town: Town, tmp_path: Path) -> None:
    write_scene(tmp_path / "n.tif", np.zeros((3, 300, 300), np.uint8), nodata=0)
    write_scene(tmp_path / "n_classes.tif", np.ones((1, 300, 300), np.uint8))
    source = {"name": "n", "scenes": [str(tmp_path / "n.tif")], "labels": [LABELS]}
    report = run_evaluation(town.job(tmp_path / "out", sources=[source]))
    assert report.exit_code == 0
    assert report.counts_of("n").to_dict() == Counts.zero(3).to_dict()
    assert json.loads((tmp_path / "out" / REPORT_NAME).read_text())["in_all"]["scores"]["road"]["iou"] is None


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"sources": [{"name": "a", "scenes": ["x"], "labels": [{**LABELS, "values": {"house": [1]}}]}]},
            "no class 'house'",
        ),
        ({"predict": {"probabilities": True}}, "no effect on an evaluation"),
        ({"predict": {"uncertainty": "margin"}}, "no effect on an evaluation"),
        (
            {"predict": {"coarse": 4, "max_seam_score": 2}},
            "predict's coarse and max_seam_score have no effect on an evaluation",
        ),
        ({"predict": {"bands": [1, 2]}}, "must name 3 bands"),
        ({"source_name": 1}, "there is no setting 'source_name'; did you mean 'source'"),
    ],
)
def test_a_wrong_job_is_refused(town: Town, tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        run_evaluation(town.job(tmp_path, **settings))


def test_the_command_prints_a_table_and_ends_with_what_came_of_it(town: Town, tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text(
        f"""
        [[source]]
        name = "town"
        scenes = ["{town.folder}/b.tif"]
        [[source.labels]]
        uri = "{{folder}}/{{stem}}_buildings.tif"
        values = {{background = [0], building = [1]}}
        unlabelled = [255]
        """
    )
    words = ["evaluate", str(tmp_path / "job.toml"), "--bundle", str(town.bundle), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    header, row = done.output.splitlines()
    assert header.split()[:4] == ["source", "class", "Mpx", "IoU"]
    assert row.split()[:2] == ["town", "building"]
    (town.folder / "b_buildings.tif").rename(tmp_path / "away.tif")
    try:
        done = CliRunner().invoke(main, words)
    finally:
        (tmp_path / "away.tif").rename(town.folder / "b_buildings.tif")
    assert done.exit_code == 3
    assert "not judged: town/b: " in done.output


def test_the_job_that_is_shown_is_one() -> None:
    job = load_settings(EvaluationJob, str(Path(__file__).parents[1] / "jobs" / "configs" / "evaluate.toml"), {})
    assert [source.name for source in job.source] == ["dubai-2", "massachusetts-14", "kampala", "austin"]


@pytest.mark.ray
@pytest.mark.usefixtures("shared_ray")
@pytest.mark.slow
def test_ray_gives_the_same_files(town: Town, evaluation: tuple[Evaluation, Path], tmp_path: Path) -> None:
    _, alone = evaluation
    run_evaluation(town.job(tmp_path, cluster={"workers": 2}, predict={"window": 512}))
    names = sorted(str(file.relative_to(alone)) for file in alone.rglob("*") if file.is_file())
    assert [name for name in names if (alone / name).read_bytes() != (tmp_path / name).read_bytes()] == []
    assert len(names) == 6


@pytest.mark.slow
def test_a_real_scene_has_the_scores_of_its_published_mask(tmp_path: Path) -> None:
    folder = data_folder() / "dubai"
    source = {"name": "dubai", "scenes": [str(folder / "dubai_2.tif")], "labels": [{**LABELS, "unlabelled": [255]}]}
    report = run_evaluation(load_settings(EvaluationJob, None, {"source": [source], "out": str(tmp_path / "e")}))
    done = geoseg.predict(str(folder / "dubai_2.tif"), str(tmp_path / "p"), engine="local")
    mask, truth = published_mask(done.scenes[0].mask), pixels_of(folder / "dubai_2_classes.tif")
    known = (mask != 255) & (truth != 255)
    ious = [one.iou for one in class_scores(report.counts_of("dubai"))]
    assert ious == [class_iou(mask, truth, known, value) for value in range(3)]
    assert ious[1:] == pytest.approx([0.544, 0.526], abs=0.001)  # as the bundle's card tells
