"""Cutting does not matter: the mask of a scene is that of one pass over the whole scene, whatever the windows."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kit.oracle import mirrored_whole, published_mask, seeded_bundle, whole_logits, whole_mask, write_scene

import geoseg
from geoseg.model.description import UNetVariant
from geoseg.model.precision import DTYPES, Precision, natural_precision
from geoseg.model.variants import STACK_VARIANTS, VARIANTS, build
from geoseg.predict.bundles import load_bundle
from geoseg.predict.stitch import Stitching
from geoseg.raster.geotiff import ReadOptions, SceneReader, describe
from geoseg.raster.resample import Axis, resample
from geoseg.raster.scene import SceneRef
from geoseg.raster.synthetic import synthetic_image
from geoseg.raster.window import Window, plan_windows

COUNTER = itertools.count()


def predict_one(scene: Path, out: Path, bundle: Path, **settings: object) -> Path:
    """Predict one scene and return the file of its mask."""
    report = geoseg.predict(str(scene), str(out), bundle=str(bundle), engine="local", **settings)
    assert report.exit_code == 0, report.scenes
    return Path(report.scenes[0].mask)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return seeded_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module", params=VARIANTS)
def any_bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of each variant."""
    return seeded_bundle(tmp_path_factory.mktemp("bundle"), name=request.param)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Set the number of torch's threads; put back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.sample(
    "unet-3-16-512-float32",
    "attention-unet-2-4-512-float32",
    "resunet-2-4-512-float32",
    "unet++-2-4-512-float32",
    "unet3d-1-2-256-float32",
    "vnet-1-2-256-float32",
    "unet-2-4-512-bfloat16",
    "vnet-2-4-256-bfloat16",
)
@pytest.mark.parametrize(
    ("name", "depth", "width", "side", "precision"),
    [(name, *shape, 512, "float32") for name in VARIANTS for shape in ((1, 2), (2, 4), (3, 16), (4, 8))]
    + [(name, *shape, 256, "float32") for name in STACK_VARIANTS for shape in ((1, 2), (2, 4), (3, 4))]
    + [(name, 2, 4, 512, "bfloat16") for name in VARIANTS]
    + [("unet", 3, 16, 512, "bfloat16")]
    + [(name, 2, 4, 256, "bfloat16") for name in STACK_VARIANTS],
)
def test_not_a_bit_of_a_logit_depends_on_size_batch_or_threads(
    name: Any, depth: int, width: int, side: int, precision: Precision, threads: Callable[[int], None]
) -> None:
    if precision not in ("float32", natural_precision(torch.device("cpu"))):
        pytest.skip("this processor does not compute in bfloat16")
    torch.manual_seed(depth)
    dates = 4 if name in STACK_VARIANTS else 1
    variant = UNetVariant(name=name, depth=depth, width=width, norm="batch")
    network = build(variant, 3, 3, dates=dates).eval().folded(DTYPES[precision])
    network.padding = "valid"
    margin = 2 * network.margin
    channels = 16 if name in STACK_VARIANTS else 3
    image = torch.randn(1, channels, side + margin, side + margin).to(memory_format=torch.channels_last)
    threads(2)
    with torch.inference_mode():
        whole = network.core_logits(image)
    for num_threads, batch, (rows, cols) in itertools.product(
        (1, 2, 4), (1, 3), [(side, 16), (16, side), (256, 256), (128, 96), (48, 48), (16, 16)]
    ):
        threads(num_threads)
        window = image[..., : rows + margin, : cols + margin].expand(batch, -1, -1, -1)
        with torch.inference_mode():
            logits = network.core_logits(window.contiguous(memory_format=torch.channels_last))
        expected = whole[..., :rows, :cols].expand(batch, -1, -1, -1)
        assert torch.equal(logits, expected), (num_threads, batch, rows, cols)


def test_not_a_byte_of_a_probability_depends_on_the_cut(
    bundle: Path, tmp_path: Path, threads: Callable[[int], None]
) -> None:
    made = synthetic_image(1030, 1541, seed=4)
    scene = write_scene(tmp_path / "scene.tif", made.pixels_bhw, nodata=0)
    published = set()
    for window, num_threads in itertools.product((512, 1024, 2048), (1, 2)):
        threads(num_threads)
        mask = predict_one(scene, tmp_path / f"{window}-{num_threads}", bundle, window=window, probabilities=True)
        (chances,) = mask.parent.glob("probabilities-*.tif")
        published.add((mask.name, chances.name))
    assert len(published) == 1, "the names are digests of the bytes"


@pytest.mark.sample("512-ragged", "1024-just over", "2048-aligned")
@pytest.mark.parametrize("shape", [(1500, 2300), (1024, 1024), (513, 700)], ids=["ragged", "aligned", "just over"])
@pytest.mark.parametrize("window", [512, 1024, 2048])
def test_mask_equals_the_whole_scene_run_once(
    shape: tuple[int, int], window: int, bundle: Path, tmp_path: Path
) -> None:
    made = synthetic_image(*shape, seed=3)
    scene = write_scene(tmp_path / "scene.tif", made.pixels_bhw, nodata=0)
    mask = published_mask(str(predict_one(scene, tmp_path / "out", bundle, window=window)))
    truth = whole_mask(load_bundle(str(bundle)), scene)
    assert len(np.unique(truth)) == 4, "the network must tell classes apart for this test to mean anything"
    np.testing.assert_array_equal(mask, truth)


def test_every_variant_s_mask_equals_the_whole_scene_run_once(any_bundle: Path, tmp_path: Path) -> None:
    made = synthetic_image(700, 1100, seed=3)
    scene = write_scene(tmp_path / "scene.tif", made.pixels_bhw, nodata=0)
    truth = whole_mask(load_bundle(str(any_bundle)), scene)
    assert len(np.unique(truth)) == 4, "the network must tell classes apart for this test to mean anything"
    for window in (512, 1024):
        mask = predict_one(scene, tmp_path / str(window), any_bundle, window=window)
        np.testing.assert_array_equal(published_mask(str(mask)), truth)


def test_a_halo_one_stride_smaller_is_not_enough(any_bundle: Path, tmp_path: Path) -> None:
    """The same comparison fails with less context, so it is sharp."""
    made = synthetic_image(1024, 1024, seed=3)
    loaded = load_bundle(str(any_bundle))
    network = loaded.network().folded()
    whole = whole_logits(loaded, made.pixels_bhw, made.valid_hw, precision="float32")
    start, end = 512, 768
    margin = network.halo - network.stride
    cut = slice(start - margin, end + margin)
    pixels, valid = torch.from_numpy(made.pixels_bhw[:, cut, cut]), torch.from_numpy(made.valid_hw[cut, cut])
    with torch.inference_mode():
        logits = network(loaded.description.normalization(pixels[None], valid[None]))[0]
    logits = logits[:, margin : margin + end - start, margin : margin + end - start]
    assert (logits - whole[:, start:end, start:end]).abs().max() > 1e-3


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.one_of(st.integers(1, 40), st.integers(480, 560)),
    cols=st.one_of(st.integers(1, 40), st.integers(500, 540), st.just(1030)),
    seed=st.integers(0, 2**16),
    holes=st.integers(0, 4),
    kind=st.sampled_from(["nodata", "mask", "none"]),
)
def test_any_size_and_nodata_anywhere(
    rows: int, cols: int, seed: int, holes: int, kind: str, bundle: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(1, 256, (3, -(-rows // 8), -(-cols // 8)), dtype=np.uint8)
    pixels = coarse.repeat(8, 1).repeat(8, 2)[:, :rows, :cols].copy()
    valid = np.ones((rows, cols), np.bool_)
    for _ in range(holes):
        row, col = rng.integers(0, rows), rng.integers(0, cols)
        valid[row : row + rng.integers(1, rows + 1), col : col + rng.integers(1, cols + 1)] = False
    folder = tmp_path / str(next(COUNTER))
    if kind == "nodata":
        pixels[:, ~valid] = 0
    scene = write_scene(folder / "scene.tif", pixels, nodata=0 if kind == "nodata" else None)
    if kind == "mask":
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(scene, "r+") as dataset:
            dataset.write_mask(valid)
    mask = published_mask(str(predict_one(scene, folder / "out", bundle, window=512)))
    np.testing.assert_array_equal(mask, whole_mask(load_bundle(str(bundle)), scene))
    if kind != "none":
        np.testing.assert_array_equal(mask == 255, ~valid)


@pytest.mark.sample("True-0.7", "False-2.05")
@pytest.mark.parametrize("resolution", [0.7, 1.2, 2.05, 0.35])
@pytest.mark.parametrize("overviews", [False, True])
def test_windows_do_not_matter_at_another_resolution(
    resolution: float, overviews: bool, bundle: Path, tmp_path: Path
) -> None:
    made = synthetic_image(1100, 1300, seed=5)
    scene = write_scene(tmp_path / "scene.tif", made.pixels_bhw, nodata=0)
    if overviews:
        with rasterio.open(scene, "r+") as dataset:
            dataset.build_overviews([2, 4], rasterio.enums.Resampling.average)
    digests = set()
    for window in (512, 1024, 2048):
        file = predict_one(scene, tmp_path / f"out{window}", bundle, window=window, resolution=resolution)
        digests.add(hashlib.sha256(file.read_bytes()).hexdigest())
    assert len(digests) == 1
    mask = published_mask(str(file))
    np.testing.assert_array_equal(mask == 255, ~made.valid_hw)
    assert len(np.unique(mask)) == 4


def test_the_resampled_scene_is_run_whole_too(bundle: Path, tmp_path: Path) -> None:
    """At half the resolution: resample whole, run whole, interpolate whole; the windows give the same mask."""
    made = synthetic_image(1100, 1300, seed=6, nodata_fraction=0)
    scene = write_scene(tmp_path / "scene.tif", made.pixels_bhw)
    loaded = load_bundle(str(bundle))
    work = (550, 650)
    axes = Axis(1100, work[0]), Axis(1300, work[1])
    pixels, valid = resample(made.pixels_bhw, made.valid_hw, *axes, (0, work[0], 0, work[1]), (0, 0))
    logits = torch.nn.functional.interpolate(
        whole_logits(loaded, pixels, valid)[None], size=(1100, 1300), mode="bilinear", align_corners=False
    )[0]
    truth = logits.max(0).indices.numpy()
    mask = published_mask(str(predict_one(scene, tmp_path / "out", bundle, window=512, resolution=1.2)))
    assert (mask == truth).mean() > 0.9999, "torch rounds its own interpolation differently, hardly any class moves"


def test_no_byte_is_fetched_twice(bundle: Path, tmp_path: Path) -> None:
    """Sixteen windows with their margins overlap in most blocks, yet each block comes once; the header's pages on top."""
    made = synthetic_image(2048, 2048, seed=8, nodata_fraction=0)
    scene = write_scene(tmp_path / "scene.tif", made.pixels_bhw)
    report = geoseg.predict(str(scene), str(tmp_path / "out"), bundle=str(bundle), engine="local", window=512)
    assert report.bytes_read < scene.stat().st_size * 1.02


def test_batches_do_not_matter(bundle: Path, tmp_path: Path) -> None:
    made = synthetic_image(1600, 1600, seed=7)
    scene = write_scene(tmp_path / "scene.tif", made.pixels_bhw, nodata=0)
    files = [predict_one(scene, tmp_path / f"out{batch}", bundle, window=512, batch=batch) for batch in (1, 3, 8)]
    assert len({file.read_bytes() for file in files}) == 1


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 5000),
    cols=st.integers(1, 5000),
    factor=st.floats(0.3, 9),
    stride=st.sampled_from([2, 4, 8, 16]),
    size=st.sampled_from([512, 1024]),
)
def test_cores_hold_all_that_their_windows_need(rows: int, cols: int, factor: float, stride: int, size: int) -> None:
    work = max(1, round(rows / factor)), max(1, round(cols / factor))
    stitching = Stitching((rows, cols), work, 0, (rows, cols), stride, 10)
    covered = np.zeros((rows, cols), np.uint8) if rows * cols < 4_000_000 else None
    for write in plan_windows(rows, cols, size):
        core = stitching.core(write)
        assert core.row_off % stride == core.col_off % stride == core.width % stride == core.height % stride == 0
        for axis, (start, end, low, high) in enumerate(
            [
                (write.row_off, write.row_end, core.row_off, core.row_end),
                (write.col_off, write.col_end, core.col_off, core.col_end),
            ]
        ):
            first, last = stitching.to_scene(axis).span(start, end)
            assert low <= first
            assert last <= high
        if covered is not None:
            covered[write.row_off : write.row_end, write.col_off : write.col_end] += 1
    if covered is not None:
        assert (covered == 1).all()


def test_what_lies_outside_is_mirrored(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (3, 37, 53), dtype=np.uint8)
    scene = describe(SceneRef("a", str(write_scene(tmp_path / "a.tif", pixels, nodata=7))), ReadOptions())
    stitching = Stitching((37, 53), (37, 53), 0, (37, 53), 4, 20)
    reader = SceneReader(scene)
    around = stitching.read_core(reader, stitching.core(Window(0, 0, 53, 37)), (0, 1, 2))
    np.testing.assert_array_equal(around.pixels, mirrored_whole(pixels, 20, 4))
    np.testing.assert_array_equal(around.valid, mirrored_whole((pixels != 7).any(0), 20, 4))
