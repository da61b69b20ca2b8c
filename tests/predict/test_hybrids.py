"""A scene looked at several times: the mask is still that of the whole scene, whatever the windows."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kit.oracle import published_mask, seeded_bundle, whole_logits, whole_mask, write_scene

import geoseg
from geoseg.config import PredictConfig
from geoseg.errors import ConfigError
from geoseg.model.bundle import Bundle
from geoseg.model.description import UNetVariant
from geoseg.model.variants import build
from geoseg.predict.bundles import load_bundle
from geoseg.predict.predictor import Predictor, network_to_run
from geoseg.raster.raster import Raster
from geoseg.raster.synthetic import synthetic_image

HYBRIDS: dict[str, dict[str, Any]] = {
    "D4": {"flips_and_turns": True},
    "1,2": {"pyramid": (1, 2)},
    "2": {"pyramid": (2,)},
    "2 nearest": {"pyramid": (2,), "resampling": "nearest"},
    "1,2,4 nearest": {"pyramid": (1, 2, 4), "resampling": "nearest"},
    "D4 of 1,4": {"flips_and_turns": True, "pyramid": (1, 4)},
}

any_hybrid = pytest.mark.parametrize("settings", HYBRIDS.values(), ids=HYBRIDS.keys())


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return seeded_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Set the number of torch's threads; put back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def predict_one(scene: Path, out: Path, bundle: Path, **settings: Any) -> Path:
    """Predict one scene and return the file of its mask."""
    report = geoseg.predict(str(scene), str(out), bundle=str(bundle), engine="local", **settings)
    assert report.exit_code == 0, report.scenes
    return Path(report.scenes[0].mask)


def test_a_pruned_unet_plus_plus_is_as_exact(tmp_path: Path) -> None:
    bundle = seeded_bundle(tmp_path / "bundle", name="unet++", depth=3)
    made = synthetic_image(530, 701, seed=3)
    scene = write_scene(tmp_path / "scene.tif", made.pixels_bhw, nodata=0)
    masks = []
    for prune in (None, 3, 1):
        truth = whole_mask(load_bundle(str(bundle)), scene, prune=prune)
        mask = published_mask(str(predict_one(scene, tmp_path / f"{prune}", bundle, window=512, prune=prune)))
        np.testing.assert_array_equal(mask, truth)
        masks.append(mask)
    assert (masks[0] != masks[1]).any()
    assert (masks[1] != masks[2]).any()


@pytest.mark.parametrize(
    ("name", "prune", "sentence"),
    [
        ("unet", 1, "--prune 1: seed-0 is a unet; a unet.. alone has a head at each depth"),
        ("unet++", 3, "can be pruned to 1 to 2, not 3"),
    ],
)
def test_what_cannot_be_pruned_is_refused(name: str, prune: int, sentence: str, tmp_path: Path) -> None:
    loaded = load_bundle(str(seeded_bundle(tmp_path / "bundle", name=name)))
    with pytest.raises(ConfigError, match=sentence):
        network_to_run(loaded, PredictConfig(prune=prune))


@pytest.mark.sample(without=["D4 of 1,4"])
@any_hybrid
def test_mask_equals_the_whole_scene_run_once(settings: dict[str, Any], bundle: Path, tmp_path: Path) -> None:
    made = synthetic_image(530, 701, seed=3)
    scene = write_scene(tmp_path / "scene.tif", made.pixels_bhw, nodata=0)
    truth = whole_mask(load_bundle(str(bundle)), scene, **settings)
    assert len(np.unique(truth)) == 4, "the network must tell classes apart for this test to mean anything"
    assert (truth != whole_mask(load_bundle(str(bundle)), scene)).any(), "and do so in another way than alone"
    names = set()
    for window in (512, 1024):
        mask = predict_one(scene, tmp_path / str(window), bundle, window=window, **settings)
        np.testing.assert_array_equal(published_mask(str(mask)), truth)
        names.add(mask.name)
    assert len(names) == 1, "the name is the digest of the bytes"


@any_hybrid
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (33, 300)], ids=str)
def test_scenes_smaller_than_the_margin(
    shape: tuple[int, int], settings: dict[str, Any], bundle: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    scene = write_scene(tmp_path / "scene.tif", rng.integers(0, 256, (3, *shape), dtype=np.uint8), nodata=7)
    mask = predict_one(scene, tmp_path / "out", bundle, **settings)
    truth = whole_mask(load_bundle(str(bundle)), scene, **settings)
    np.testing.assert_array_equal(published_mask(str(mask)), truth)


@any_hybrid
def test_not_a_bit_of_a_logit_depends_on_size_batch_or_threads(
    settings: dict[str, Any], bundle: Path, threads: Callable[[int], None]
) -> None:
    predictor = Predictor(load_bundle(str(bundle)), PredictConfig(**settings))
    stride, margin = predictor.network.stride, predictor.network.margin
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (3, 192 + 2 * margin, 192 + 2 * margin), dtype=np.uint8)
    valid = rng.random(pixels.shape[1:]) < 0.9
    threads(2)
    whole = predictor.core_logits([Raster(pixels, valid)])
    sizes = [(192, stride), (stride, 192), (96, 64), (stride, stride)]
    for num_threads, batch, (rows, cols) in itertools.product((1, 2), (1, 3), sizes):
        threads(num_threads)
        top, left = 192 - rows, 192 - cols
        cut = (slice(top, top + rows + 2 * margin), slice(left, left + cols + 2 * margin))
        window = Raster(pixels[(slice(None), *cut)], valid[cut])
        logits = predictor.core_logits([window] * batch)
        assert torch.equal(logits, whole[..., top:, left:].expand(batch, -1, -1, -1)), (num_threads, batch, rows, cols)


@any_hybrid
def test_a_halo_one_stride_smaller_is_not_enough(settings: dict[str, Any], bundle: Path) -> None:
    """The same comparison fails with less context, so it is sharp."""
    made = synthetic_image(512, 512, seed=3)
    loaded = load_bundle(str(bundle))
    network = network_to_run(loaded, PredictConfig(**settings)).folded()
    whole = whole_logits(loaded, made.pixels_bhw, made.valid_hw, precision="float32", **settings)
    start, end = 192, 256
    for halo, is_enough in ((network.halo, True), (network.halo - network.stride, False)):
        cut = slice(start - halo, end + halo)
        pixels, valid = torch.from_numpy(made.pixels_bhw[:, cut, cut]), torch.from_numpy(made.valid_hw[cut, cut])
        with torch.inference_mode():
            logits = network(loaded.description.normalization(pixels[None], valid[None]))[0]
        logits = logits[:, halo : halo + end - start, halo : halo + end - start]
        furthest = (logits - whole[:, start:end, start:end]).abs().max()
        assert furthest < 1e-5 if is_enough else furthest > 1e-4


def test_a_turned_scene_gets_the_turned_mask(bundle: Path, tmp_path: Path) -> None:
    made = synthetic_image(256, 512, seed=5, nodata_fraction=0)
    masks = []
    for name, pixels in (("as it is", made.pixels_bhw), ("turned", np.rot90(made.pixels_bhw, axes=(1, 2)).copy())):
        scene = write_scene(tmp_path / f"{name}.tif", pixels)
        masks.append(published_mask(str(predict_one(scene, tmp_path / name, bundle, flips_and_turns=True))))
    assert (np.rot90(masks[0]) == masks[1]).mean() > 0.9999, "sums in another order: hardly any class moves"


def test_windows_do_not_matter_at_another_resolution(bundle: Path, tmp_path: Path) -> None:
    made = synthetic_image(301, 1300, seed=5)
    scene = write_scene(tmp_path / "scene.tif", made.pixels_bhw, nodata=0)
    settings = {"resolution": 1.3, "flips_and_turns": True, "pyramid": (1, 2)}
    names = {
        predict_one(scene, tmp_path / str(window), bundle, window=window, **settings).name for window in (512, 1024)
    }
    assert len(names) == 1


def test_a_second_run_with_other_settings_publishes_anew_and_with_the_same_nothing(
    bundle: Path, tmp_path: Path
) -> None:
    scene = write_scene(tmp_path / "a.tif", synthetic_image(64, 64, seed=1).pixels_bhw, nodata=0)
    told = [
        geoseg.predict(str(scene), str(tmp_path / "out"), bundle=str(bundle), engine="local", **settings)
        for settings in ({}, {"flips_and_turns": False}, {"pyramid": (2,)}, {"pyramid": (2,), "resampling": "bilinear"})
    ]
    assert [report.scenes[0].status for report in told] == ["published", "unchanged", "published", "unchanged"]


def test_windows_that_cannot_begin_where_a_pyramid_wants_are_refused(bundle: Path) -> None:
    variant = UNetVariant(depth=7, width=1)
    description = load_bundle(str(bundle)).description.model_copy(update={"variant": variant})
    deep = Bundle.from_network(build(variant, 3, 3), description)
    assert network_to_run(deep, PredictConfig(pyramid=(1, 4))).stride == 512
    with pytest.raises(
        ConfigError, match=r"--pyramid 1,8: on a network of depth 7.*1024 pixels.*leave out the largest"
    ):
        network_to_run(deep, PredictConfig(pyramid=(1, 8)))
