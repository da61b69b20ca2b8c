"""A scene looked at coarsely first: full resolution where that sees something, background elsewhere, whatever the windows."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import rasterio
from kit.encoders import outside_bundle, stand_in
from kit.oracle import digests, published_mask, seeded_bundle, whole_logits, whole_mask, write_scene
from rasterio.enums import Resampling

import geoseg
from geoseg.config import PredictConfig
from geoseg.errors import ConfigError
from geoseg.predict.bundles import load_bundle
from geoseg.predict.coarse import CELL, cover
from geoseg.predict.predictor import network_spec

SHAPE = 1030, 1540
LIKELY = 0.9  # of what the seeded network finds in motley things, and not on plain ground
CLOSE = 4
NODATA = 255
THING = 64
RING = [
    (row * CELL + 90, col * CELL + 90) for row, col in itertools.product(range(3), range(3)) if (row, col) != (1, 1)
]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return seeded_bundle(tmp_path_factory.mktemp("bundle"))


def plain_ground(*things: tuple[int, int], shape: tuple[int, int] = SHAPE) -> npt.NDArray[np.uint8]:
    """Ground of one colour with motley things whose first row and column are given, and a corner without data (0)."""
    rng = np.random.default_rng(0)
    pixels = np.full((3, *shape), 110, np.uint8)
    for row, col in things:
        motley = np.kron(
            rng.integers(1, 256, (3, THING // 16, THING // 16), dtype=np.uint8), np.ones((16, 16), np.uint8)
        )
        pixels[:, row : row + THING, col : col + THING] = motley
    pixels[:, -150:, :300] = 0
    return pixels


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Things all around a cell, in the corner between four cells, and at an edge of the scene; no overviews."""
    pixels = plain_ground(*RING, (3 * CELL - 20, 5 * CELL - 30), (SHAPE[0] - THING, 4 * CELL + 70))
    return write_scene(tmp_path_factory.mktemp("scenes") / "scene.tif", pixels, nodata=0)


def predict(scene: Path, out: Path, bundle: Path | str, **settings: Any) -> Path:
    """Predict one scene and return the file of its mask."""
    report = geoseg.predict(str(scene), str(out), bundle=str(bundle), engine="local", **settings)
    assert report.exit_code == 0, report.scenes
    return Path(report.scenes[0].mask)


def deserving(bundle: Path, scene: Path) -> npt.NDArray[np.bool_]:
    """Pixels (row, col) to be seen at full resolution: the means of 2 x 2 pixels are seen whole, then looked at by cells."""
    with rasterio.open(scene) as dataset:
        pixels, valid = dataset.read().astype(np.float64), dataset.dataset_mask() != 0
    num_valid = in_fours(valid.astype(np.int64)).sum((-3, -1))
    small = np.rint(in_fours(np.where(valid, pixels, 0)).sum((-3, -1)) / np.maximum(num_valid, 1))
    small = np.where(num_valid >= 2, small, 0).astype(np.uint8)
    chances = whole_logits(load_bundle(str(bundle)), small, num_valid >= 2).double().softmax(0).numpy()
    likely = (chances[1:] >= LIKELY).any(0)
    fine = np.zeros(SHAPE, np.bool_)
    for row, col in itertools.product(*(range(0, size, CELL) for size in SHAPE)):
        cell = slice(row, row + CELL), slice(col, col + CELL)
        close = tuple(slice(max(0, at // 2 - CLOSE), (at + CELL) // 2 + CLOSE) for at in (row, col))
        fine[cell] = likely[close].any() and valid[cell].any()
    return fine


def in_fours(pixels: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The pixels (..., row, col) as (..., half row, row in it, half col, col in it)."""
    return pixels.reshape(*pixels.shape[:-2], SHAPE[0] // 2, 2, SHAPE[1] // 2, 2)


def test_the_mask_is_the_full_one_in_cells_that_deserve_it_and_background_elsewhere(
    bundle: Path, scene: Path, tmp_path: Path
) -> None:
    full, fine = whole_mask(load_bundle(str(bundle)), scene), deserving(bundle, scene)
    assert 0.3 < fine.mean() < 0.7
    assert len(np.unique(full[fine])) == 3, "the network must tell classes apart for this test to mean anything"
    assert (full[~fine] == 2).any(), "and to say something elsewhere, too"
    file = predict(scene, tmp_path, bundle, coarse=2, coarse_threshold=LIKELY)
    np.testing.assert_array_equal(published_mask(str(file)), np.where(fine | (full == NODATA), full, 0))
    told = item_of(file)["properties"]
    assert told["geoseg:fine_share"] == pytest.approx(
        (fine & (full != NODATA)).sum() / (full != NODATA).sum(), rel=1e-5
    )
    assert (told["geoseg:settings"]["coarse"], told["geoseg:settings"]["coarse_threshold"]) == (2, LIKELY)


@pytest.mark.parametrize(
    "settings",
    [
        {"coarse": 4, "probabilities": True, "uncertainty": "entropy"},
        {"coarse": 2, "resolution": 1.3, "flips_and_turns": True},
    ],
    ids=["its own pixels, from overviews", "other pixels"],
)
def test_not_a_byte_depends_on_windows_and_batches(
    settings: dict[str, Any], bundle: Path, scene: Path, tmp_path: Path
) -> None:
    with_overviews = tmp_path / "scene.tif"
    with_overviews.write_bytes(scene.read_bytes())
    with rasterio.open(with_overviews, "r+") as dataset:
        dataset.build_overviews([2, 4], Resampling.average)
    told = []
    for window, batch in ((512, 3), (1024, 1), (2048, 1)):
        file = predict(
            with_overviews,
            tmp_path / str(window),
            bundle,
            window=window,
            batch=batch,
            coarse_threshold=LIKELY,
            **settings,
        )
        told.append(digests(tmp_path / str(window)))
    assert 0.1 < item_of(file)["properties"]["geoseg:fine_share"] < 0.9
    assert told[0] == told[1] == told[2]


def test_a_stack_is_looked_at_coarsely_too(tmp_path: Path) -> None:
    bundle = seeded_bundle(tmp_path / "bundle", name="unet3d", dates=2, depth=1)
    dates = [plain_ground((300, 400), shape=(400, 600)), plain_ground((300, 400), (40, 60), shape=(400, 600))]
    for date, pixels in enumerate(dates, 1):
        write_scene(tmp_path / "in" / f"town_2024010{date}.tif", pixels, nodata=0)
    told = []
    for window in (512, 1024):
        settings = {"stack_by": r"(?P<stack>\w+)_(?P<date>\d{8})", "coarse": 2, "coarse_threshold": 0.6}
        file = predict(tmp_path / "in", tmp_path / str(window), bundle, window=window, **settings)
        told.append(digests(tmp_path / str(window)))
    assert 0.1 < item_of(file)["properties"]["geoseg:fine_share"] < 0.9
    assert told[0] == told[1]


def test_a_small_thing_in_one_cell_is_found_and_that_cell_alone_is_seen_at_full_resolution(
    bundle: Path, tmp_path: Path
) -> None:
    pixels = plain_ground((CELL + 60, 2 * CELL + 90))
    scene = write_scene(tmp_path / "scene.tif", pixels, nodata=0)
    file = predict(
        scene, tmp_path / "out", bundle, coarse=4, coarse_threshold=LIKELY, probabilities=True, precision="float32"
    )
    full = predict(scene, tmp_path / "full", bundle, probabilities=True, precision="float32")
    mask, truth = published_mask(str(file)), published_mask(str(full))
    cell = slice(CELL, 2 * CELL), slice(2 * CELL, 3 * CELL)
    np.testing.assert_array_equal(mask[cell], truth[cell])
    elsewhere = mask != NODATA
    assert item_of(file)["properties"]["geoseg:fine_share"] == pytest.approx(CELL**2 / elsewhere.sum(), rel=1e-5)
    elsewhere[cell] = False
    assert set(np.unique(mask[elsewhere])) == {0}
    assert 0 not in np.unique(truth[elsewhere]), "the network says otherwise, and nobody asked it"
    chances, wanted = (probabilities(one) for one in (file, full))
    assert (chances[(slice(None), *cell)] == wanted[(slice(None), *cell)]).all()
    plain = slice(0, 500), slice(1000, None)  # far from all else, where both resolutions see much the same
    apart = np.abs(chances[(slice(None), *plain)].astype(int) - wanted[(slice(None), *plain)])
    assert apart.max() <= 10, "of 254; nobody knowing anything would be further off"


def probabilities(mask: Path) -> npt.NDArray[np.uint8]:
    """The probabilities (class, row, col) published beside a mask."""
    (file,) = mask.parent.glob("probabilities-*.tif")
    with rasterio.open(file) as dataset:
        pixels: npt.NDArray[np.uint8] = dataset.read()
    return pixels


def item_of(mask: Path) -> dict[str, Any]:
    """The item beside a mask."""
    told: dict[str, Any] = json.loads((mask.parent / "item.json").read_text())
    return told


def test_boxes_hold_each_cell_that_deserves_it_once_and_cost_no_more_than_one_for_all() -> None:
    rng = np.random.default_rng(0)
    for share, rim in itertools.product((0.02, 0.2, 0.7), (0.05, 0.5, 2.0)):
        cells = rng.random((16, 13)) < share
        boxes = cover(cells, rim)
        count = np.zeros(cells.shape, int)
        for top, bottom, left, right in boxes:
            count[top:bottom, left:right] += 1
        assert count.max() <= 1
        assert (count[cells] == 1).all()
        rows, cols = (np.ptp(places) + 1 + rim for places in np.nonzero(cells))
        assert sum((bottom - top + rim) * (right - left + rim) for top, bottom, left, right in boxes) <= rows * cols
    assert cover(np.zeros((4, 4), bool), 0.2) == []
    assert cover(np.eye(4, dtype=bool), 0.2) == [(at, at + 1, at, at + 1) for at in range(4)]
    assert cover(np.eye(4, dtype=bool), 9.0) == [(0, 4, 0, 4)], "where context costs more than cells"


def test_a_network_from_outside_is_refused(tmp_path: Path) -> None:
    with stand_in():
        loaded = load_bundle(str(outside_bundle(tmp_path, "convs")))
        with pytest.raises(ConfigError, match=r"--coarse: .* from outside.*leave it out"):
            network_spec(loaded, PredictConfig(coarse=4))
