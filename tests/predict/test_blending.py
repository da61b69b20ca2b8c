"""Networks from outside: their masks do not depend on the cut either, and what blending costs is counted once."""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from kit.encoders import STAND_IN, outside_bundle, real_encoders, stand_in
from kit.oracle import digests, published_mask, seeded_bundle, whole_logits, whole_mask, write_scene

import geoseg
from geoseg.cli import main
from geoseg.config import PredictConfig, load_job
from geoseg.errors import ConfigError
from geoseg.model.tiling import tiling
from geoseg.predict.bundles import load_bundle
from geoseg.predict.predictor import Predictor
from geoseg.predict.seams import Seams, count_seams
from geoseg.predict.stitch import Stitching
from geoseg.predict.tiles import hann, run_tiles
from geoseg.raster.raster import Raster
from geoseg.raster.synthetic import synthetic_image
from geoseg.raster.window import Window, plan_windows
from geoseg.run import make_run_spec, plan_job

SHAPE = (700, 1100)


@pytest.fixture(scope="module", autouse=True)
def library() -> Iterator[None]:
    """Let the stand-in be imported in place of the real library."""
    with stand_in():
        yield


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("bundles")
    return {encoder: str(outside_bundle(folder / encoder, encoder)) for encoder in ("convs", "gated")}


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = synthetic_image(*SHAPE, seed=3)
    return write_scene(tmp_path_factory.mktemp("scenes") / "scene.tif", made.pixels_bhw, nodata=0)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Set the number of torch's threads; put back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def predict(scene: Path, out: Path, bundle: str, **settings: Any) -> Any:
    report = geoseg.predict(str(scene), str(out), bundle=bundle, engine="local", **settings)
    assert report.exit_code == 0, report.scenes
    return report.scenes[0]


CUTS: list[dict[str, Any]] = [{"window": 512}, {"window": 1024, "batch": 3}, {"window": 512, "batch": 2}]
WAYS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "another resolution": {"resolution": 0.83},
    "finer": {"resolution": 0.4},
    "tiles of 264": {"tile": 264},
    "flipped and turned": {"flips_and_turns": True},
}


@pytest.mark.sample("convs-finer", "gated-as it is")
@pytest.mark.parametrize(
    ("encoder", "way"),
    [*(("convs", way) for way in WAYS), *(("gated", way) for way in WAYS if way != "flipped and turned")],
)
def test_not_a_byte_depends_on_the_cut(
    encoder: str, way: str, bundles: dict[str, str], scene: Path, tmp_path: Path, threads: Callable[[int], None]
) -> None:
    told = []
    for place, cut in enumerate(CUTS):
        threads(1 + place % 2)
        predict(scene, tmp_path / str(place), bundles[encoder], probabilities=True, **WAYS[way], **cut)
        told.append(digests(tmp_path / str(place)))
    assert told[0] == told[1] == told[2], "masks, probabilities, and items with their scores"
    assert len(np.unique(published_mask(str(next((tmp_path / "0" / "scene").glob("mask-*")))))) == 4


@pytest.mark.parametrize("encoder", ["convs", "gated"])
def test_not_a_bit_of_a_logit_depends_on_the_core(
    encoder: str, bundles: dict[str, str], threads: Callable[[int], None]
) -> None:
    predictor = Predictor(load_bundle(bundles[encoder]), PredictConfig(tile=64))
    assert predictor.tiling is not None
    step, margin = predictor.tiling.step, predictor.tiling.margin
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (3, 4 * step + 2 * margin, 3 * step + 2 * margin), dtype=np.uint8)
    valid = rng.random(pixels.shape[1:]) < 0.9
    threads(2)
    ((whole, whole_differ),) = predictor.cores([Raster(pixels, valid)])
    for num_threads, batch, (rows, cols) in itertools.product((1, 2), (1, 3), ((1, 1), (2, 3), (4, 1))):
        threads(num_threads)
        top, left = (4 - rows) * step, (3 - cols) * step
        cut = (slice(top, top + rows * step + 2 * margin), slice(left, left + cols * step + 2 * margin))
        each = predictor.cores([Raster(pixels[(slice(None), *cut)], valid[cut])] * batch)
        assert len(each) == batch
        for logits, differ in each:
            assert torch.equal(logits, whole[:, top:, left:])
            assert (differ is None) == (whole_differ is None)
            if differ is not None and whole_differ is not None:
                np.testing.assert_array_equal(differ, whole_differ[:, top:, left:])
    assert torch.get_num_threads() == num_threads


def test_with_an_exact_margin_the_mask_is_that_of_the_whole_scene_run_once(
    bundles: dict[str, str], scene: Path, tmp_path: Path
) -> None:
    truth = whole_mask(load_bundle(bundles["convs"]), scene)
    assert len(np.unique(truth)) == 4, "the network must tell classes apart for this test to mean anything"
    done = predict(scene, tmp_path, bundles["convs"])
    assert (published_mask(done.mask) == truth).mean() > 0.99999, "a tile may round the last bit of a logit as it likes"
    assert (done.seam_score, done.blend_error) == (None, None)
    assert "seam" not in Path(done.item).read_text()


def test_a_margin_one_stride_smaller_is_not_enough(bundles: dict[str, str]) -> None:
    """The same comparison fails with less context, so it is sharp."""
    made = synthetic_image(256, 256, seed=3)
    loaded = load_bundle(bundles["convs"])
    whole = whole_logits(loaded, made.pixels_bhw, made.valid_hw)[:, 128:192, 128:192]
    for margin, is_enough in ((8, True), (4, False)):
        tiles = tiling(4, margin, 64 + 2 * margin)
        cut = slice(128 - margin, 192 + margin)
        pixels, valid = torch.from_numpy(made.pixels_bhw[:, cut, cut]), torch.from_numpy(made.valid_hw[cut, cut])
        with torch.inference_mode():
            logits, _ = run_tiles(loaded.network(), loaded.description.normalization(pixels[None], valid[None]), tiles)
        furthest = (logits - whole).abs().max()
        assert furthest < 1e-5 if is_enough else furthest > 1e-3


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (33, 300)], ids=str)
def test_scenes_smaller_than_a_tile(shape: tuple[int, int], bundles: dict[str, str], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    small = write_scene(tmp_path / "scene.tif", rng.integers(0, 256, (3, *shape), dtype=np.uint8))
    told = {digests_of(small, tmp_path / str(window), bundles["gated"], window) for window in (512, 1024)}
    assert len(told) == 1


def digests_of(scene: Path, out: Path, bundle: str, window: int) -> str:
    predict(scene, out, bundle, window=window)
    return json.dumps(digests(out))


@pytest.mark.parametrize("size", [2, 8, 64, 512])
def test_weights_add_up_to_one_and_none_is_zero(size: int) -> None:
    weights = hann(size).double()
    assert bool((weights > 0).all())
    torch.testing.assert_close(
        weights[: size // 2] + weights[size // 2 :], torch.ones(size // 2).double(), atol=1e-6, rtol=0
    )
    assert torch.equal(weights.float(), weights.float().flip(0)) or (weights - weights.flip(0)).abs().max() < 1e-7


def test_tiles_that_agree_are_blended_to_what_they_say_and_differ_nowhere() -> None:
    image = torch.rand(1, 3, 6 * 8, 5 * 8)
    logits, differ = run_tiles(lambda tile: tile * 2, image, tiling(4, None, 16))
    torch.testing.assert_close(logits, 2 * image[0, :, 8:-8, 8:-8], rtol=1e-6, atol=1e-6)
    assert differ is not None
    assert differ.shape == (2, 32, 24)
    assert not differ.any()


def test_each_pixel_is_looked_at_for_one_pair_of_tiles_along_each_axis() -> None:
    """A network that tells its tiles apart differs at every pixel; one that sees columns differs side by side alone."""
    image = torch.zeros(1, 2, 5 * 8, 5 * 8)
    turn = itertools.count()

    def by_turns(tile: torch.Tensor) -> torch.Tensor:
        row, col = divmod(next(turn), 4)
        logits = torch.zeros(1, 2, 16, 16)
        logits[:, (row + col) % 2] = 1
        return logits

    _, differ = run_tiles(by_turns, image, tiling(4, None, 16))
    assert differ is not None
    assert differ.all()
    turn = itertools.count()

    def by_columns(tile: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(1, 2, 16, 16)
        logits[:, next(turn) % 4 % 2] = 1
        return logits

    _, differ = run_tiles(by_columns, image, tiling(4, None, 16))
    assert differ is not None
    assert differ[1].all()
    assert not differ[0].any()


@pytest.mark.parametrize("work", [(700, 1100), (350, 550), (933, 1467), (699, 1099)], ids=str)
def test_every_valid_pixel_is_counted_once_for_each_axis_whatever_the_windows(work: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    tiles = tiling(4, None, 128)
    stitching = Stitching(SHAPE, work, 0, SHAPE, tiles.step, tiles.margin)
    valid = rng.random(SHAPE) < 0.7
    differ = rng.random((2, *(size + 2 * 1024 for size in work))) < 0.1
    told = set()
    for size in (512, 1024, 2048):
        total = Seams()
        for write in plan_windows(*SHAPE, size):
            core = stitching.core(write)
            inside = (slice(write.row_off, write.row_end), slice(write.col_off, write.col_end))
            seen = differ[:, core.row_off : core.row_end, core.col_off : core.col_end]
            total += count_seams(seen, tiles, stitching, core, write, valid[inside])
        told.add(total.counts())
        assert total.rim_pixels + total.inside_pixels == 2 * int(valid.sum())
    assert len(told) == 1
    assert total.at_rim == pytest.approx(0.1, abs=0.01)
    assert total.score == pytest.approx(1, abs=0.1)


def test_the_rim_is_what_lies_at_the_border_of_a_tile() -> None:
    tiles = tiling(4, None, 128)  # steps of 64: 8 pixels at either side
    differ = np.zeros((2, 64, 64), np.bool_)
    differ[1, :, [0, 7, 56, 63]] = True
    differ[1, :, [8, 55]] = True
    differ[0, [0, 31], :] = True
    stitching = Stitching((64, 64), (64, 64), 0, (64, 64), 64, 64)
    window = Window(0, 0, 64, 64)
    seams = count_seams(differ, tiles, stitching, window, window, np.ones((64, 64), np.bool_))
    assert seams.counts() == (64 * 5, 2 * 64 * 16, 64 * 3, 2 * 64 * 48)


def test_a_scene_without_disagreement_has_a_score_of_one() -> None:
    assert Seams().score == 1
    assert Seams(0, 100, 0, 300).score == 1
    assert Seams(10, 100, 30, 300).score == 1
    assert Seams(20, 100, 30, 300).score == pytest.approx(2, abs=0.03)


def test_the_score_is_told_and_a_limit_keeps_a_scene_back(bundles: dict[str, str], scene: Path, tmp_path: Path) -> None:
    done = predict(scene, tmp_path / "first", bundles["gated"])
    item = json.loads(Path(done.item).read_text())["properties"]
    assert item["geoseg:seam_score"] == done.seam_score > 1
    assert 0 < item["geoseg:blend_error_inside"] < item["geoseg:blend_error"] == pytest.approx(done.blend_error)
    (record,) = (tmp_path / "first" / "_geoseg" / "runs").glob("*/summary.json")
    assert json.loads(record.read_text())["scenes"][0]["seam_score"] == done.seam_score
    words = ["predict", str(scene), "--out", str(tmp_path / "out"), "--bundle", bundles["gated"], "--engine", "local"]
    kept = CliRunner().invoke(main, [*words, "--max-seam-score", f"{done.seam_score * 0.99}"])
    assert kept.exit_code == 1, kept.output
    assert re.search(
        "held: scene: .*times as often at their borders as inside, .* --max-seam-score.*larger --tile", kept.output
    )
    assert not (tmp_path / "out" / "scene" / "item.json").exists()
    again = geoseg.predict(
        str(scene), str(tmp_path / "out"), bundle=bundles["gated"], engine="local", max_seam_score=done.seam_score
    )
    assert again.exit_code == 0
    assert (again.scenes[0].status, again.scenes[0].seam_score, again.pixels) == ("published", done.seam_score, 0)
    assert Path(again.scenes[0].item).read_text() == Path(done.item).read_text(), "a limit is no setting of pixels"


def test_a_scene_that_stands_keeps_its_score_and_does_not_pass_a_limit(
    bundles: dict[str, str], scene: Path, tmp_path: Path
) -> None:
    done = predict(scene, tmp_path, bundles["gated"])
    same = predict(scene, tmp_path, bundles["gated"], max_seam_score=1e6)
    assert (same.status, same.seam_score, same.blend_error) == ("unchanged", done.seam_score, done.blend_error)
    report = geoseg.predict(str(scene), str(tmp_path), bundle=bundles["gated"], engine="local", max_seam_score=0.5)
    assert report.exit_code == 1
    assert (report.scenes[0].status, report.scenes[0].seam_score) == ("held", done.seam_score)
    assert "0.5 is the most" in report.scenes[0].sentence


@pytest.mark.parametrize(
    ("encoder", "settings", "sentence"),
    [
        (None, {"tile": 512}, "--tile has no effect with seed-0, a unet"),
        (None, {"max_seam_score": 2}, "--max-seam-score has no effect with seed-0"),
        ("convs", {"max_seam_score": 2}, "--max-seam-score has no effect with outside-convs.*exact margin"),
        ("convs", {"tile": 16}, "sees 7 pixels"),
        ("gated", {"tile": 100}, "multiple of 8"),
        ("gated", {"pyramid": (1, 2)}, "--pyramid: outside-gated is a Unet of gated, whose layers are not ours"),
        ("gated", {"prune": 1}, "--prune 1: outside-gated is a Unet of gated"),
    ],
)
def test_what_has_no_effect_or_no_margin_is_refused(
    encoder: str | None, settings: dict[str, Any], sentence: str, bundles: dict[str, str], scene: Path, tmp_path: Path
) -> None:
    bundle = bundles[encoder] if encoder else str(seeded_bundle(tmp_path / "bundle"))
    with pytest.raises(ConfigError, match=sentence):
        geoseg.predict(str(scene), str(tmp_path / "out"), bundle=bundle, engine="local", **settings)


def test_a_plan_tells_the_memory_of_a_tile(bundles: dict[str, str], scene: Path, tmp_path: Path) -> None:
    told = []
    for tile in (256, 1024):
        values = {"scenes": [str(scene)], "out": str(tmp_path), "bundle": bundles["gated"], "predict": {"tile": tile}}
        told.append(plan_job(load_job(None, values)).memory_bytes)
    assert told[1] > told[0] + (20 << 20)


def test_what_the_scenes_share_can_be_a_key(bundles: dict[str, str], scene: Path, tmp_path: Path) -> None:
    """Workers that read for others keep their readers by it."""
    values = {"scenes": [str(scene)], "out": str(tmp_path), "bundle": bundles["gated"]}
    assert hash(make_run_spec(load_job(None, values))) == hash(make_run_spec(load_job(None, values)))


@pytest.mark.thorough
@pytest.mark.ray
@pytest.mark.usefixtures("no_ray_yet")
@pytest.mark.parametrize("read", ["tasks"])
def test_ray_publishes_the_same_bytes(
    read: str, bundles: dict[str, str], scene: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", ":".join([str(STAND_IN), *filter(None, sys.path)]))
    predict(scene, tmp_path / "local", bundles["gated"], window=1024)
    report = geoseg.predict(
        str(scene), str(tmp_path / "ray"), bundle=bundles["gated"], engine="ray", workers=2, window=512, read=read
    )
    assert report.exit_code == 0, report.scenes
    assert digests(tmp_path / "ray") == digests(tmp_path / "local")


@pytest.fixture
def real() -> Iterator[None]:
    with real_encoders():
        yield


@pytest.mark.slow
@pytest.mark.parametrize(("encoder", "tile"), [("resnet18", 832), ("efficientnet-b0", 256)])
def test_a_real_encoder_end_to_end(encoder: str, tile: int, real: None, tmp_path: Path) -> None:
    made = synthetic_image(250, 600, seed=3)
    scene = write_scene(tmp_path / "scene.tif", made.pixels_bhw, nodata=0)
    bundle = str(outside_bundle(tmp_path / "bundle", encoder, decoder_channels=[16, 16, 16, 8, 8]))
    masks = []
    for window in (512, 1024):
        done = predict(scene, tmp_path / str(window), bundle, window=window, tile=tile)
        masks.append(published_mask(done.mask))
    assert digests(tmp_path / "512") == digests(tmp_path / "1024")
    assert len(np.unique(masks[0])) == 4
    if encoder == "resnet18":
        assert (masks[0] == whole_mask(load_bundle(bundle), scene)).mean() > 0.9999
        assert done.seam_score is None
    else:
        assert done.seam_score > 1
