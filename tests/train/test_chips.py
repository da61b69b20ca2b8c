"""Chips: drawn from counted cells, where the classes are, and read as a whole scene would be."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from kit.training import LABELS, labelled_scene, scenes, training

from geoseg.pieces import connected
from geoseg.raster.window import Window
from geoseg.raster.work import near_work_grid, work_grid
from geoseg.train.augment import AugmentConfig
from geoseg.train.border import border_weights
from geoseg.train.chips import ChipDraw, ChipReader, Place, Sampler, TrainScene
from geoseg.train.data import Found, find_scenes, hold_out, keep_table, measure_light, table_uri
from geoseg.train.index import CellTable, count_cells
from geoseg.train.stages import BorderConfig, Stage, resolve_stages
from geoseg.training import keep_tables_in_threads

RANGE = (0.0, 255.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="module")
def found(folder: Path) -> Found:
    return find_scenes(training(folder, folder / "out"))


@pytest.fixture(scope="module")
def tables(folder: Path, found: Found) -> list[CellTable]:
    return [
        keep_table(table_uri(str(folder / "out"), scene, 0.5), scene, resolution_m=0.5, num_classes=3)
        for scene in found.train
    ]


def stage(folder: Path, **changes: Any) -> Stage:
    job = training(folder, folder / "out")
    (last,) = resolve_stages(
        job.stage[1:], resolution_m=0.5, labelled_m2=1.0, stride=4, classes=("background", "building", "road")
    )
    return replace(last, augment=AugmentConfig(flips_and_turns=False), **changes)


def test_cells_count_every_labelled_valid_pixel_once(folder: Path, found: Found, tables: list[CellTable]) -> None:
    for scene, table in zip(found.train, tables, strict=True):
        with rasterio.open(scene.scene.uri) as image, rasterio.open(f"{scene.scene.uri[:-4]}_classes.tif") as truth:
            valid, classes = image.dataset_mask() > 0, truth.read(1)
        known = valid & (classes != 255)
        assert table.labelled.sum() == known.sum()
        for code in range(3):
            assert table.of_class[:, code].sum() == (known & (classes == code)).sum()
        side = table.side
        for (row, col), labelled, of_class in zip(table.places, table.labelled, table.of_class, strict=True):
            cell = np.s_[row * side : (row + 1) * side, col * side : (col + 1) * side]
            assert labelled == known[cell].sum()
            assert of_class.tolist() == [(known[cell] & (classes[cell] == code)).sum() for code in range(3)]


@pytest.mark.parametrize("side", [1, 7, 64, 300])
def test_cells_at_the_edge_are_cut_off(side: int) -> None:
    rng = np.random.default_rng(1)
    codes = rng.choice(np.array([0, 1, 255], np.uint8), (61, 83))
    valid = rng.random((61, 83)) < 0.7

    def read(window: Window) -> tuple[np.ndarray, np.ndarray]:
        part = np.s_[window.row_off : window.row_end, window.col_off : window.col_end]
        return codes[part], valid[part]

    table = count_cells((61, 83), side, 2, read)
    assert table.labelled.sum() == (valid & (codes != 255)).sum()
    assert table.of_class.sum(0).tolist() == [(valid & (codes == code)).sum() for code in (0, 1)]
    again = CellTable.from_bytes(table.to_bytes())
    assert np.array_equal(again.places, table.places)
    assert np.array_equal(again.of_class, table.of_class)
    assert (again.side, again.labelled.tolist()) == (side, table.labelled.tolist())


def test_the_index_is_counted_once(
    folder: Path, found: Found, tables: list[CellTable], monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = found.train[0]
    monkeypatch.setattr(TrainScene, "reader", lambda _: pytest.fail("read again"))
    again = keep_table(table_uri(str(folder / "out"), scene, 0.5), scene, resolution_m=0.5, num_classes=3)
    assert np.array_equal(again.labelled, tables[0].labelled)


@pytest.mark.timeout(60)
def test_many_indexes_at_once_do_not_wait_for_each_other(
    folder: Path, found: Found, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each reads several ranges in the store's threads; there are more of them than these threads."""
    monkeypatch.setattr("geoseg.raster.geotiff._MERGE_GAP", -1)
    kept = [(f"{tmp_path}/{number}.npz", found.train[0]) for number in range(40)]
    tables = keep_tables_in_threads(kept, 0.5, 3)
    assert len(list(tmp_path.iterdir())) == 40
    assert len({table.labelled.tobytes() for table in tables if isinstance(table, CellTable)}) == 1


def test_draws_depend_on_seed_and_place_alone(folder: Path, found: Found, tables: list[CellTable]) -> None:
    one, same, other = (Sampler(found.train, tables, (1.0, 0.0), seed=seed) for seed in (3, 3, 4))
    places = [Place(0, step, position) for step in range(4) for position in range(4)]
    at = stage(folder)
    drawn = [one.draw(at, place) for place in places]
    assert drawn == [same.draw(at, place) for place in reversed(places)][::-1]
    assert drawn != [other.draw(at, place) for place in places]
    assert len(set(drawn)) == len(drawn)


def test_classes_are_drawn_equally_often_and_the_rest_evenly(
    folder: Path, found: Found, tables: list[CellTable]
) -> None:
    """Around a class: the chip's own cell of the draw holds it; evenly: scenes come as often as they have labelled ground."""
    sampler = Sampler(found.train, tables, (1.0, 0.0), seed=0)
    labelled = [table.labelled.sum() for table in tables]
    even = Counter(sampler.draw(stage(folder, focus=0.0), Place(0, 0, at)).scene for at in range(2000))
    assert even[0] / 2000 == pytest.approx(labelled[0] / sum(labelled), abs=0.05)
    reader = ChipReader(found.train, dtype="uint8", value_range=RANGE)
    shares = []
    for focus in (0.0, 1.0):
        at = stage(folder, focus=focus)
        chips = [reader.read(sampler.draw(at, Place(0, 1, position)), at) for position in range(150)]
        shares.append(np.mean([[(chip.labels == code).any() for code in (1, 2)] for chip in chips], axis=0))
    assert (shares[1] > shares[0]).all()
    assert shares[1].min() > 0.5


def test_sources_come_by_their_weights(folder: Path, found: Found, tables: list[CellTable]) -> None:
    scenes = [replace(scene, source=number) for number, scene in enumerate(found.train)]
    sampler = Sampler(scenes, tables, (1.0, 3.0), seed=0)
    drawn = Counter(sampler.draw(stage(folder), Place(0, 0, at)).scene for at in range(2000))
    assert drawn[1] / 2000 == pytest.approx(0.75, abs=0.04)


def test_chips_lie_inside_the_scene_and_reach_its_edges(folder: Path, found: Found, tables: list[CellTable]) -> None:
    sampler = Sampler(found.train, tables, (1.0, 0.0), seed=0)
    for resolution_m in (0.5, 1.0, 1.7):
        at = stage(folder, resolutions_m=(resolution_m,), focus=0.0)
        draws = [sampler.draw(at, Place(0, 0, position)) for position in range(400)]
        size = round(256 * 0.5 / resolution_m)
        assert {draw.work.work_shape for draw in draws} == {(size, size)}
        offsets = [draw.window.row_off for draw in draws]
        assert min(offsets) == 0
        assert max(offsets) == size - 32
        assert {(draw.window.height, draw.window.width) for draw in draws} == {(32, 32)}


def test_a_scene_smaller_than_a_chip_lies_in_its_middle(tmp_path: Path) -> None:
    labelled_scene(tmp_path, "small", seed=3, size=24)
    job = training(
        tmp_path, tmp_path / "out", source=[{"name": "s", "scenes": [f"{tmp_path}/small.tif"], "labels": [LABELS]}]
    )
    (scene,) = find_scenes(job).train
    table = keep_table(table_uri(str(tmp_path), scene, 0.5), scene, resolution_m=0.5, num_classes=3)
    at = stage(tmp_path, focus=0.0)
    draw = Sampler([scene], [table], (1.0,), seed=0).draw(at, Place(0, 0, 0))
    chip = ChipReader([scene], dtype="uint8", value_range=RANGE).read(draw, at)
    assert (draw.window.row_off, draw.window.col_off) == (-4, -4)
    assert chip.pixels.shape == (3, 32, 32)
    assert (chip.labels[:4] == 255).all(), "what is mirrored has no label"
    assert (chip.labels[4:28, 4:28] != 255).any()


@pytest.mark.parametrize("resolution_m", [0.5, 1.0, 2.0, 0.7])
def test_a_chip_is_a_crop_of_the_whole_scene_at_its_resolution(found: Found, folder: Path, resolution_m: float) -> None:
    scene = found.train[0]
    work = work_grid(scene.levels, resolution_m / 0.5)
    whole = work.read(scene.reader(), Window(0, 0, *work.work_shape[::-1]), scene.bands)
    labels = scene.labels.read(work, Window(0, 0, *work.work_shape[::-1]))
    chip = ChipReader(found.train, dtype="uint8", value_range=RANGE).read(
        ChipDraw(0, work, Window(9, 5, 32, 32)), stage(folder), context=4
    )
    assert np.array_equal(chip.pixels, whole.pixels[:, 1:41, 5:45])
    assert np.array_equal(chip.valid, whole.valid[1:41, 5:45])
    inner = np.s_[5:37, 9:41]
    assert np.array_equal(chip.labels, np.where(whole.valid[inner], labels[inner], 255))


def test_a_stage_may_mix_resolutions(folder: Path, found: Found, tables: list[CellTable]) -> None:
    sampler = Sampler(found.train, tables, (1.0, 0.0), seed=0)
    at = stage(folder, resolutions_m=(2.0, 0.5))
    sizes = Counter(sampler.draw(at, Place(0, 0, position)).work.work_shape for position in range(1000))
    assert set(sizes) == {(64, 64), (256, 256)}
    assert sizes[64, 64] / 1000 == pytest.approx(0.5, abs=0.05)


def test_border_weights_come_with_chips_that_want_them(folder: Path, found: Found) -> None:
    work = work_grid(found.train[0].levels, 1.0)
    draw = ChipDraw(0, work, Window(32, 32, 128, 128))
    reader = ChipReader(found.train, dtype="uint8", value_range=RANGE)
    chip = reader.read(draw, stage(folder, border=BorderConfig(w0=10, sigma=5)), border_class=1)
    instances = connected(chip.labels == 1)
    assert chip.weights is not None
    assert np.array_equal(chip.weights, border_weights(chip.labels, instances, w0=10, sigma=5))
    assert chip.weights.max() > 1.5, "two buildings are near each other"
    assert reader.read(draw, stage(folder)).weights is None


def test_an_overview_of_an_odd_size_is_read_as_it_is() -> None:
    """GDAL's COG driver halves 1931 to 965, the half is 965.5; the full image would be four times the pixels."""
    levels = ((1931, 2391), (965, 1195), (482, 597))
    assert near_work_grid(levels, 2.0).work_shape == (965, 1195)
    assert near_work_grid(levels, 4.0).level == 2
    assert near_work_grid(levels, 1.0).is_native
    assert near_work_grid(levels, 2.1) == work_grid(levels, 2.1)


def test_a_coarse_stage_reads_the_overview(found: Found, folder: Path) -> None:
    work = work_grid(found.train[0].levels, 4.0)
    assert (work.level, work.level_shape) == (2, (64, 64))


def test_scale_is_read_not_resampled_afterwards(found: Found, folder: Path, tables: list[CellTable]) -> None:
    at = replace(stage(folder), augment=AugmentConfig(scale=(2.0, 2.0)))
    draw = Sampler(found.train, tables, (1.0, 0.0), seed=0).draw(at, Place(0, 0, 0))
    assert draw.work.work_shape == (512, 512), "ground looks twice as large in pixels of half the size"


def test_raw_values_are_brought_to_the_bundles_range(found: Found, folder: Path) -> None:
    work = work_grid(found.train[0].levels, 1.0)
    draw = ChipDraw(0, work, Window(40, 40, 32, 32))
    plain = ChipReader(found.train, dtype="uint8", value_range=RANGE).read(draw, stage(folder))
    scaled = [replace(found.train[0], scale=(50.0, 150.0))]
    chip = ChipReader(scaled, dtype="float32", value_range=RANGE).read(draw, stage(folder))
    assert chip.pixels.dtype == np.float32
    assert np.allclose(chip.pixels, (plain.pixels.astype(float) - 50) * 2.55, atol=1e-3)


def test_a_damaged_scene_gives_chips_without_a_label_and_says_why(tmp_path: Path) -> None:
    path = labelled_scene(tmp_path, "a", seed=0, overviews=False)
    job = training(tmp_path, tmp_path / "out", source=[{"name": "s", "scenes": [str(path)], "labels": [LABELS]}])
    (scene,) = find_scenes(job).train
    data = bytearray(path.read_bytes())
    path.write_bytes(bytes(data[:-20000]))
    at = stage(tmp_path)
    draw = ChipDraw(0, work_grid(scene.levels, 1.0), Window(200, 200, 32, 32))
    chip = ChipReader([scene], dtype="uint8", value_range=RANGE).read(draw, at)
    assert "a:" in chip.failure
    assert not chip.valid.any()
    assert (chip.labels == 255).all()


def test_scenes_that_share_ground_are_held_out_together(tmp_path: Path) -> None:
    for at, name in enumerate("pqrst"):
        labelled_scene(tmp_path, name, seed=at, size=64, at=at)
    labelled_scene(tmp_path, "p2", seed=9, size=64, at=0)
    source = {
        "name": "s",
        "scenes": [f"{tmp_path}/{name}.tif" for name in ("p", "p2", "q", "r", "s", "t")],
        "labels": [LABELS],
        "use": "split",
        "hold_out": 0.4,
    }
    found = find_scenes(training(tmp_path, tmp_path / "out", source=[source]))
    held = {scene.scene.id for scene in found.validate}
    assert ("p" in held) == ("p2" in held)
    assert 2 <= len(held) <= 3
    assert len(found.train) + len(held) == 6
    others = [hold_out([*found.train, *found.validate], 0.4, seed=seed) for seed in range(8)]
    assert len({frozenset(one) for one in others}) > 1, "the seed chooses"


def test_light_is_measured_on_valid_pixels_alone(folder: Path, found: Found, tables: list[CellTable]) -> None:
    sampler = Sampler(found.train, tables, (1.0, 0.0), seed=0)
    at = stage(folder, focus=0.0, chip=64)
    mean, std = measure_light(sampler, at, ChipReader(found.train, dtype="uint8", value_range=RANGE), num_bands=3)
    pixels = []
    for scene in found.train:
        with rasterio.open(scene.scene.uri) as image:
            pixels.append(image.read()[:, image.dataset_mask() > 0])
    known = np.concatenate(pixels, 1)
    assert np.allclose(mean, known.mean(1), rtol=0.1)
    assert np.allclose(std, known.std(1), rtol=0.15)
