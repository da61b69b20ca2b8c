"""Reading GeoTIFFs: pixels and validity are those that rasterio reads from the file, whatever its layout and window."""

from __future__ import annotations

import itertools
import struct
import threading
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import rasterio.shutil
from kit.scenes import AT_UTM, UTM, noise, write_scene
from numpy.testing import assert_array_equal
from rasterio.windows import Window as RasterioWindow

from geoseg.errors import SceneChangedError, SceneReadError, SceneTooCostlyError, StoreError
from geoseg.raster import geotiff, store, tiff
from geoseg.raster.geotiff import ReadOptions, SceneReader, describe
from geoseg.raster.scene import Scene, SceneRef
from geoseg.raster.stack import StackReader
from geoseg.raster.window import Window

HEIGHT, WIDTH = 151, 133
TILED = {"tiled": True, "blockxsize": 32, "blockysize": 48}
STRIPS = {"blockysize": 7}
# Name: dtype, bands, what GDAL is told.
LAYOUTS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "strips of one row": ("uint8", 3, {"blockysize": 1}),
    "strips, planes": ("uint16", 3, {**STRIPS, "interleave": "band", "compress": "lzw", "predictor": 2}),
    "one strip": ("int16", 1, {"blockysize": HEIGHT, "compress": "deflate"}),
    "tiles, planes": ("uint8", 4, {**TILED, "interleave": "band", "compress": "deflate"}),
    "int8": ("int8", 1, {**TILED, "compress": "deflate", "predictor": 2}),
    "uint16 pixels": ("uint16", 4, {**TILED, "compress": "deflate", "predictor": 2}),
    "int16": ("int16", 2, {**STRIPS, "compress": "packbits"}),
    "uint32": ("uint32", 1, {**TILED, "compress": "zstd", "predictor": 2}),
    "int32": ("int32", 2, {**STRIPS, "compress": "lzw"}),
    "float32": ("float32", 3, {**TILED, "compress": "deflate", "predictor": 3}),
    "float64": ("float64", 1, {**STRIPS, "compress": "zstd", "predictor": 3}),
    "big-endian": ("uint16", 3, {**TILED, "compress": "lzw", "predictor": 2, "ENDIANNESS": "BIG"}),
    "big-endian float": ("float32", 2, {**STRIPS, "compress": "deflate", "predictor": 3, "ENDIANNESS": "BIG"}),
    "BigTIFF": ("uint8", 3, {**TILED, "compress": "packbits", "BIGTIFF": "YES"}),
    "big-endian BigTIFF": ("int32", 1, {**STRIPS, "BIGTIFF": "YES", "ENDIANNESS": "BIG"}),
    "jpeg": ("uint8", 3, {**TILED, "compress": "jpeg", "photometric": "ycbcr"}),
    "jpeg strips": ("uint8", 3, {"blockysize": 16, "compress": "jpeg", "photometric": "rgb"}),
    "gray jpeg": ("uint8", 1, {**TILED, "compress": "jpeg"}),
    "webp": ("uint8", 3, {**TILED, "compress": "webp", "WEBP_LOSSLESS": "YES"}),
    "lerc": ("float32", 1, {**TILED, "compress": "lerc", "MAX_Z_ERROR": 0.01}),
    "lerc_zstd": ("uint16", 3, {**TILED, "compress": "lerc_zstd", "MAX_Z_ERROR": 0}),
    "lzma": ("uint8", 2, {**STRIPS, "compress": "lzma"}),
    "1 bit": ("uint8", 1, {**TILED, "NBITS": 1, "compress": "deflate"}),
    "1 bit fax": ("uint8", 1, {**STRIPS, "NBITS": 1, "compress": "ccittfax4"}),
    "12 bits": ("uint16", 3, {**TILED, "NBITS": 12, "compress": "deflate"}),
    "12 bits, planes": ("uint16", 2, {**STRIPS, "NBITS": 12, "interleave": "band"}),
    "half floats": ("float32", 1, {**TILED, "NBITS": 16, "compress": "deflate", "predictor": 3}),
}


def windows_of(height: int, width: int) -> list[Window]:
    """The whole, single pixels, the last row and column, and some across the edges of blocks."""
    rng = np.random.default_rng(0)
    found = [
        Window(0, 0, width, height),
        Window(0, 0, 1, 1),
        Window(width - 1, height - 1, 1, 1),
        Window(0, height - 1, width, 1),
        Window(width - 1, 0, 1, height),
    ]
    for _ in range(4):
        col, row = int(rng.integers(0, width)), int(rng.integers(0, height))
        found.append(Window(col, row, int(rng.integers(1, width - col + 1)), int(rng.integers(1, height - row + 1))))
    return found


def scene_at(path: Path, **options: Any) -> Scene:
    return describe(SceneRef("scene-1", str(path)), ReadOptions(**options))


def assert_reads_like_rasterio(path: Path, scene: Scene, *, bands: tuple[int, ...] | None = None) -> None:
    """At every level and in many windows: the pixels, and as validity what rasterio makes of masks, alpha and nodata."""
    chosen = tuple(range(len(scene.bands))) if bands is None else bands
    reader = SceneReader(scene)
    for level, (height, width) in enumerate(scene.levels):
        with rasterio.open(path, **({"overview_level": level - 1} if level else {})) as dataset:
            assert dataset.shape == (height, width)
            for window in windows_of(height, width):
                place = RasterioWindow(window.col_off, window.row_off, window.width, window.height)
                valid = dataset.dataset_mask(window=place) != 0
                found = reader.read(window, chosen, level=level)
                assert_array_equal(found.valid, valid, err_msg=f"level {level}, {window}")
                want = dataset.read([band + 1 for band in chosen], window=place)
                assert found.pixels.dtype == want.dtype
                if valid.any():  # where nothing is valid no pixel need be read
                    assert_array_equal(found.pixels, want, err_msg=f"level {level}, {window}")
                if not level:
                    assert_array_equal(reader.read_valid(window, chosen), valid)


def smooth(num_bands: int, height: int, width: int, dtype: str, top: int) -> np.ndarray[Any, Any]:
    """Pixels that codecs with losses like."""
    rows, cols = np.mgrid[:height, :width]
    return np.stack([(rows * (3 + band) + cols * 2) % (top + 1) for band in range(num_bands)]).astype(dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_reads_as_rasterio_reads_it(layout: str, tmp_path: Path) -> None:
    dtype, num_bands, profile = LAYOUTS[layout]
    compress = str(profile.get("compress", ""))
    if "NBITS" in profile and dtype != "float32":
        pixels = smooth(num_bands, HEIGHT, WIDTH, dtype, 2 ** profile["NBITS"] - 1)
    elif compress.startswith(("jpeg", "webp", "lerc")) or dtype == "float32":
        pixels = smooth(num_bands, HEIGHT, WIDTH, dtype, 255)
    else:
        pixels = noise(num_bands, HEIGHT, WIDTH, dtype=dtype)
    path = tmp_path / "a.tif"
    try:
        write_scene(path, pixels, overviews=(2, 4), **profile)
    except rasterio.errors.RasterioError as error:
        pytest.skip(f"this GDAL does not write it: {error}")
    scene = scene_at(path)
    assert len(scene.levels) == 3
    assert_reads_like_rasterio(path, scene)
    if num_bands > 1:
        assert_reads_like_rasterio(path, scene, bands=(num_bands - 1, 0))


def holes(height: int, width: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Validity with a hole, a stripe and single pixels, so that every level has both."""
    valid = np.ones((height, width), np.bool_)
    valid[20:60, 10:77] = False
    valid[:, 100:108] = False
    valid[90::7, ::5] = False
    return valid


@pytest.mark.parametrize("layout", [TILED, STRIPS, {**TILED, "interleave": "band"}], ids=["tiles", "strips", "planes"])
@pytest.mark.parametrize("kind", ["nodata", "negative", "nan", "real", "infinite", "mask", "alpha", "nothing"])
def test_what_counts_is_what_rasterio_says(kind: str, layout: dict[str, Any], tmp_path: Path) -> None:
    valid = holes(HEIGHT, WIDTH)
    dtype, value = {
        "nodata": ("uint8", 7),
        "negative": ("int16", -5),
        "nan": ("float32", np.nan),
        "real": ("float32", -9999.0),
        "infinite": ("float64", np.inf),
    }.get(kind, ("uint8", None))
    pixels = noise(4 if kind == "alpha" else 3, HEIGHT, WIDTH, dtype=dtype, seed=1)
    profile: dict[str, Any] = {"compress": "deflate", **layout}
    if value is not None:
        pixels[:, ~valid] = value
        profile["nodata"] = value
    if kind == "alpha":
        pixels[3] = np.where(valid, np.maximum(pixels[3], 1), 0)
        profile |= {"photometric": "rgb", "ALPHA": "YES"}
    path = write_scene(tmp_path / "a.tif", pixels, valid=valid if kind == "mask" else None, overviews=(2, 4), **profile)
    scene = scene_at(path)
    assert len(scene.levels) == 3
    assert_reads_like_rasterio(path, scene, bands=(2, 0, 1))
    if kind != "nothing":
        whole = SceneReader(scene).read(Window(0, 0, WIDTH, HEIGHT), (0, 1, 2)).valid
        assert not whole[~valid].any()


@pytest.mark.parametrize(
    ("dtype", "nodata"), [("uint8", 300), ("uint8", -1), ("uint8", 7.5), ("uint8", np.nan), ("int16", 40_000)]
)
def test_a_nodata_that_no_pixel_can_have_marks_none(dtype: str, nodata: float, tmp_path: Path) -> None:
    path = write_scene(tmp_path / "a.tif", noise(1, 40, 30, dtype=dtype))
    assert SceneReader(scene_at(path, nodata=nodata)).read(Window(0, 0, 30, 40), (0,)).valid.all()


def test_a_pixel_is_nodata_when_all_its_bands_are(tmp_path: Path) -> None:
    pixels = np.array([[[0, 0, 1]], [[0, 5, 0]]], np.uint8)
    scene = scene_at(write_scene(tmp_path / "a.tif", pixels, nodata=0))
    assert SceneReader(scene).read(Window(0, 0, 3, 1), (0, 1)).valid.tolist() == [[False, True, True]]


@pytest.mark.parametrize("interleave", ["pixel", "band"])
def test_blocks_that_are_not_stored_are_not_valid(interleave: str, tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    block = noise(2, 32, 32, dtype="uint16", seed=2)
    with rasterio.open(
        path, "w", driver="GTiff", count=2, height=100, width=90, dtype="uint16", crs=UTM, transform=AT_UTM,
        tiled=True, blockxsize=32, blockysize=32, compress="deflate", interleave=interleave, SPARSE_OK=True,
    ) as dataset:  # fmt: skip
        dataset.write(block, window=RasterioWindow(32, 64, 32, 32))
    reader = SceneReader(scene_at(path))
    pixels, stored = np.zeros((2, 100, 90), np.uint16), np.zeros((100, 90), np.bool_)
    pixels[:, 64:96, 32:64], stored[64:96, 32:64] = block, True
    for window in windows_of(100, 90):
        found = reader.read(window, (1, 0))
        rows, cols = slice(window.row_off, window.row_end), slice(window.col_off, window.col_end)
        assert_array_equal(found.valid, stored[rows, cols])
        assert_array_equal(reader.read_valid(window, (1, 0)), stored[rows, cols])
        assert found.pixels.dtype == np.uint16
        assert_array_equal(found.pixels, pixels[::-1, rows, cols])
        assert reader.is_stored(window) or not found.valid.any()


@pytest.mark.parametrize("order", [(2, 4, 8), (8, 4, 2), (4, 8, 2)], ids=str)
def test_overviews_and_their_masks_in_any_order(order: tuple[int, ...], tmp_path: Path) -> None:
    path = write_scene(
        tmp_path / "a.tif", noise(3, HEIGHT, WIDTH), valid=holes(HEIGHT, WIDTH), overviews=order, **TILED
    )
    scene = scene_at(path)
    assert [size[0] for size in scene.levels] == [151, 76, 38, 19]
    reader = SceneReader(scene)
    factors = {76: 2, 38: 4, 19: 8}
    for level, (height, width) in enumerate(scene.levels[1:], start=1):
        # rasterio numbers overviews by their place in the file.
        with rasterio.open(path, overview_level=order.index(factors[height])) as dataset:
            found = reader.read(Window(0, 0, width, height), (0, 1, 2), level=level)
            assert_array_equal(found.valid, dataset.dataset_mask() != 0)
            assert_array_equal(found.pixels, dataset.read())
            assert 0 < found.valid.mean() < 1


def test_a_cog_with_a_mask_reads_as_rasterio_reads_it(tmp_path: Path) -> None:
    plain = write_scene(tmp_path / "plain.tif", noise(3, 1100, 700), valid=holes(1100, 700))
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
        rasterio.shutil.copy(plain, tmp_path / "a.tif", driver="COG", blocksize=128, overview_resampling="average")
    scene = scene_at(tmp_path / "a.tif")
    assert len(scene.levels) > 3
    assert_reads_like_rasterio(tmp_path / "a.tif", scene)


def test_overviews_without_their_masks_are_not_used(tmp_path: Path) -> None:
    """The pixels of such an overview could not be told apart: those outside the mask would count."""
    path = write_scene(tmp_path / "a.tif", noise(3, HEIGHT, WIDTH), overviews=(2, 4), **TILED)
    assert len(scene_at(path).levels) == 3
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(path, "r+") as dataset:
        dataset.write_mask(holes(HEIGHT, WIDTH))
    scene = scene_at(path)
    assert scene.has_mask
    assert scene.levels == ((HEIGHT, WIDTH),)
    assert_reads_like_rasterio(path, scene)


def joined(path: Path, *pages: tuple[Path, int]) -> Path:
    """A TIFF whose directories are the first ones of other files, each with a new NewSubfileType."""
    body, tables = bytearray(16), []
    for source, subfile in pages:
        data = source.read_bytes()
        directory = tiff.read_directories(lambda start, end, data=data: data[start:end], len(data))[0]
        tag = tiff.TILE_OFFSETS if directory.tiled else tiff.STRIP_OFFSETS
        offsets = directory.numbers(tag) + len(body)
        tables.append(
            {
                **directory.entries,
                tag: tiff.Entry(16, len(offsets), offsets.astype("<u8").tobytes()),
                tiff.SUBFILE: tiff.Entry(4, 1, struct.pack("<I", subfile)),
            }
        )
        body += data + bytes(len(data) % 2)
    table, _ = tiff.write_directories(tables, len(body), big=True)
    body[:16] = struct.pack("<2sHHHQ", b"II", 43, 8, 0, len(body))
    path.write_bytes(body + table)
    return path


@pytest.fixture
def page(tmp_path: Path) -> Callable[..., Path]:
    """Write a page for ``joined``: noise in as many bands, or a mask."""
    names = itertools.count()

    def write(height: int, width: int, *, bands: int = 3, mask: bool = False) -> Path:
        number = next(names)
        pixels = holes(height, width)[None] * np.uint8(255) if mask else noise(bands, height, width, seed=number)
        if mask:
            pixels = np.roll(pixels, number, 1)
        return write_scene(tmp_path / f"page-{number}.tif", pixels, compress="deflate", **TILED)

    return write


IMAGE, OVERVIEW, PAGE, MASK, OVERVIEW_MASK = 0, 1, 2, 4, 5


def test_of_two_of_a_kind_the_first_counts(page: Callable[..., Path], tmp_path: Path) -> None:
    """Two images, masks and overviews of one size, as files that were appended to have them."""
    path = joined(
        tmp_path / "a.tif",
        (page(HEIGHT, WIDTH), IMAGE),
        (page(HEIGHT, WIDTH, mask=True), MASK),
        (page(76, 67), OVERVIEW),
        (page(76, 67, mask=True), OVERVIEW_MASK),
        (page(HEIGHT, WIDTH), IMAGE),
        (page(HEIGHT, WIDTH, mask=True), MASK),
        (page(76, 67), OVERVIEW),
        (page(76, 67, mask=True), OVERVIEW_MASK),
    )
    scene = scene_at(path)
    assert scene.levels == ((HEIGHT, WIDTH), (76, 67))
    assert_reads_like_rasterio(path, scene)


def test_pages_and_thumbnails_are_no_overviews(page: Callable[..., Path], tmp_path: Path) -> None:
    path = joined(
        tmp_path / "a.tif",
        (page(HEIGHT, WIDTH), IMAGE),
        (page(76, 67, bands=1), OVERVIEW),
        (page(64, 64), PAGE),
        (page(40, 67), OVERVIEW),
        (page(38, 34), OVERVIEW),
        (page(76, 67), IMAGE),
    )
    scene = scene_at(path)
    assert scene.levels == ((HEIGHT, WIDTH), (38, 34))
    with rasterio.open(joined(tmp_path / "b.tif", (tmp_path / "page-4.tif", IMAGE))) as dataset:
        assert_array_equal(SceneReader(scene).read(Window(0, 0, 34, 38), (0, 1, 2), level=1).pixels, dataset.read())


@pytest.mark.parametrize("kind", [MASK, OVERVIEW_MASK])
def test_a_mask_of_another_size_is_refused(kind: int, page: Callable[..., Path], tmp_path: Path) -> None:
    path = joined(tmp_path / "a.tif", (page(HEIGHT, WIDTH), IMAGE), (page(76, 67, mask=True), kind))
    with pytest.raises(SceneReadError, match=r"^scene-1: its mask is 67 x 76, the image 133 x 151, .* write the mask"):
        scene_at(path)


def with_mask_beside(path: Path, valid: np.ndarray[Any, np.dtype[np.bool_]], **profile: Any) -> Path:
    """Write the mask beside a scene; returns the scene."""
    write_scene(path.with_name(path.name + ".msk"), valid[None] * np.uint8(255), **profile)
    return path


@pytest.mark.parametrize("kind", ["nothing", "nodata", "alpha"])
def test_a_mask_beside_a_scene_counts_at_full_size_and_leaves_no_overview(kind: str, tmp_path: Path) -> None:
    """Before what else the scene says of its validity, as for GDAL."""
    profile = {"nodata": {"nodata": 7}, "alpha": {"photometric": "rgb", "ALPHA": "YES"}}.get(kind, {})
    pixels = noise(4 if kind == "alpha" else 3, HEIGHT, WIDTH)
    path = write_scene(tmp_path / "a.tif", pixels, overviews=(2,), **TILED, **profile)
    valid = holes(HEIGHT, WIDTH)
    with_mask_beside(path, valid, overviews=(2,))
    with pytest.raises(SceneReadError, match=r"the file a\.tif\.msk beside it says .* allow it with --sidecar-mask"):
        scene_at(path)
    scene = scene_at(path, sidecar_mask=True)
    assert scene.levels == ((HEIGHT, WIDTH),)
    window = Window(3, 5, WIDTH - 9, HEIGHT - 7)
    reader = SceneReader(scene)
    for found in (reader.read(window, (0, 1, 2)).valid, reader.read_valid(window, (0, 1, 2))):
        assert_array_equal(found, valid[5:-2, 3:-6])


@pytest.mark.parametrize("tag", [None, 7], ids=["untagged", "tagged"])
@pytest.mark.parametrize("kind", ["mask", "alpha", "beside"])
def test_a_nodata_value_counts_beside_a_mask_where_it_is_asked_for(kind: str, tag: int | None, tmp_path: Path) -> None:
    """The value of a tag does not, as GDAL has it."""
    by_mask = holes(HEIGHT, WIDTH)
    by_value = np.roll(by_mask, 31, axis=0)
    pixels = noise(4 if kind == "alpha" else 3, HEIGHT, WIDTH, seed=1)
    pixels[:3, ~by_value] = 7
    profile: dict[str, Any] = {**TILED, "nodata": tag}
    if kind == "alpha":
        pixels[3] = 255 * by_mask
        profile |= {"photometric": "rgb", "ALPHA": "YES"}
    path = write_scene(tmp_path / "a.tif", pixels, valid=by_mask if kind == "mask" else None, overviews=(2,), **profile)
    if kind == "beside":
        with_mask_beside(path, by_mask)
    for nodata, wanted in ((None, by_mask), (7, by_mask & by_value)):
        scene = scene_at(path, nodata=nodata, sidecar_mask=kind == "beside")
        assert len(scene.levels) == (1 if kind == "beside" else 2)
        reader, bands = SceneReader(scene), (0, 1, 2)
        stack = StackReader((scene, None, scene))
        for window in windows_of(HEIGHT, WIDTH):
            here = wanted[window.row_off : window.row_end, window.col_off : window.col_end]
            assert_array_equal(reader.read(window, bands).valid, here)
            assert_array_equal(reader.read_valid(window, bands), here)
            assert_array_equal(stack.read_valid(window, bands), here)
        for level, (height, width) in enumerate(scene.levels[1:], 1):
            found = reader.read(Window(0, 0, width, height), bands, level=level)
            assert nodata is None or not found.valid[(found.pixels == 7).all(axis=0)].any()
            assert 0 < found.valid.mean() < 1


def told_by(error: pytest.ExceptionInfo[Exception]) -> str:
    sentence = str(error.value)
    assert sentence.startswith("scene-1: ")
    assert sentence.count("scene-1") == 1, sentence
    assert "\n" not in sentence
    return sentence


def use(path: Path, **options: Any) -> None:
    """Open and read a scene, as a worker does."""
    scene = scene_at(path, **options)
    height, width = scene.levels[0]
    SceneReader(scene).read(Window(0, 0, width, height), (0,))


def test_who_reads_a_scene_that_is_gone_or_replaced_is_told_which(tmp_path: Path) -> None:
    path = write_scene(tmp_path / "a.tif", noise(3, HEIGHT, WIDTH), **TILED)
    scene = scene_at(path)
    reader = SceneReader(scene)
    write_scene(path, noise(3, HEIGHT, WIDTH, seed=1), **TILED)

    def read_anew() -> None:
        geotiff._known.cache_clear()  # another process knows no header yet
        SceneReader(scene)

    for act in (read_anew, lambda: reader.read(Window(0, 0, 9, 9), (0,))):
        with pytest.raises(SceneChangedError, match="run again to take the new version") as error:
            act()
        told_by(error)
    path.unlink()
    for act in (lambda: scene_at(path), read_anew, lambda: reader.read(Window(0, 0, 9, 9), (0,))):
        with pytest.raises(SceneReadError, match="there is no such file") as error:
            act()
        told_by(error)


def test_a_mask_beside_a_scene_that_cannot_serve_is_told_of(tmp_path: Path) -> None:
    path = write_scene(tmp_path / "a.tif", noise(3, HEIGHT, WIDTH), **TILED)
    with_mask_beside(path, holes(76, 67))
    with pytest.raises(SceneReadError, match="the mask beside it: it is 67 x 76, the scene 133 x 151") as error:
        use(path, sidecar_mask=True)
    told_by(error)
    path.with_name("a.tif.msk").write_bytes(b"%PDF-1.7".ljust(64))
    with pytest.raises(SceneReadError, match="the mask beside it: a PDF document, not a GeoTIFF") as error:
        use(path, sidecar_mask=True)
    told_by(error)
    with_mask_beside(path, holes(HEIGHT, WIDTH), compress="deflate")
    body = bytearray(path.with_name("a.tif.msk").read_bytes())
    directory = tiff.read_directories(lambda start, end: bytes(body[start:end]), len(body))[0]
    at = directory.number(tiff.STRIP_OFFSETS)
    body[at : at + 30] = bytes(30)
    path.with_name("a.tif.msk").write_bytes(body)
    with pytest.raises(SceneReadError, match=r"the mask beside it: the blocks at row 0, .* cannot be decoded") as error:
        use(path, sidecar_mask=True)
    told_by(error)


def test_a_mask_beside_a_scene_that_is_replaced_is_noticed(tmp_path: Path) -> None:
    path = write_scene(tmp_path / "a.tif", noise(3, HEIGHT, WIDTH), **TILED)
    with_mask_beside(path, holes(HEIGHT, WIDTH))
    scene = scene_at(path, sidecar_mask=True)
    reader = SceneReader(scene)
    with_mask_beside(path, ~holes(HEIGHT, WIDTH))
    assert scene_at(path, sidecar_mask=True) != scene
    for act in (lambda: SceneReader(scene), lambda: reader.read(Window(0, 0, 9, 9), (0,))):
        with pytest.raises(SceneChangedError, match=r"the mask beside it: .*was replaced while the run") as error:
            act()
        told_by(error)


def test_a_store_that_fails_is_told_of_with_the_scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_scene(tmp_path / "a.tif", noise(3, HEIGHT, WIDTH), **TILED)
    scene = scene_at(path)
    reader = SceneReader(scene)

    def failing(uri: str, *_: object, **__: object) -> list[bytes]:
        raise StoreError(f"{uri}: the store failed on reading: 503 Slow Down")

    monkeypatch.setattr(store, "read_ranges", failing)
    geotiff._known.cache_clear()
    acts = (lambda: scene_at(path), lambda: SceneReader(scene), lambda: reader.read(Window(0, 0, 9, 9), (0,)))
    for act in acts:
        with pytest.raises(StoreError, match="503 Slow Down") as error:
            act()
        told_by(error)


def test_a_reader_of_a_scene_that_costs_too_much_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = scene_at(write_scene(tmp_path / "a.tif", noise(3, HEIGHT, WIDTH), **TILED))
    monkeypatch.setattr(geotiff, "MAX_BANDS", 2)
    geotiff._known.cache_clear()
    with pytest.raises(SceneTooCostlyError, match="it has 3 bands, the limit is 2") as error:
        SceneReader(scene)
    told_by(error)


def fat_blocks(path: Path, *, side: int, claimed: int) -> Path:
    """``side`` x ``side`` pixels in tiles of 16 x 16 that all lie in the same bytes and each claim so many of them."""
    write_scene(path, np.zeros((1, 16, 16), np.uint8), tiled=True, blockxsize=16, blockysize=16, compress="deflate")
    data = path.read_bytes()
    directory = tiff.read_directories(lambda start, end: data[start:end], len(data))[0]
    start, num = directory.number(tiff.TILE_OFFSETS), (side // 16) ** 2
    body = data[start : start + directory.number(tiff.TILE_BYTES)].ljust(claimed, b"\0")
    entries = dict(directory.entries)
    entries[tiff.WIDTH] = entries[tiff.HEIGHT] = tiff.Entry(4, 1, struct.pack("<I", side))
    entries[tiff.TILE_OFFSETS] = tiff.Entry(16, num, np.full(num, 16, "<u8").tobytes())
    entries[tiff.TILE_BYTES] = tiff.Entry(4, num, np.full(num, claimed, "<u4").tobytes())
    at = 16 + len(body) + len(body) % 2
    table, _ = tiff.write_directories([entries], at, big=True)
    path.write_bytes((struct.pack("<2sHHHQ", b"II", 43, 8, 0, at) + body).ljust(at, b"\0") + table)
    return path


def test_blocks_that_share_a_large_range_cost_no_more_than_a_portion(tmp_path: Path) -> None:
    """A window of 4096 blocks of 64 kB each, in a file of 130 kB: at once they would be 256 MiB, twice."""
    path = fat_blocks(tmp_path / "a.tif", side=1024, claimed=64_000)
    assert path.stat().st_size < 200_000
    reader = SceneReader(scene_at(path))
    tracemalloc.start()
    try:
        assert not reader.read(Window(0, 0, 1024, 1024), (0,)).pixels.any()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 80 << 20, f"{peak >> 20} MiB"


def test_a_block_out_of_proportion_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SceneReadError, match="a block of 256 bytes is said to take 70000 in the file") as error:
        scene_at(fat_blocks(tmp_path / "a.tif", side=64, claimed=70_000))
    told_by(error)


def number_block(key: tuple[int]) -> np.ndarray[Any, Any]:
    return np.full((1, 4, 4), key[0], np.int64)


def test_threads_that_want_the_same_blocks_decode_each_once() -> None:
    """Each thread wants blocks that others want, in another order; all get theirs, none waits for ever."""
    cache = geotiff._DecodedBlocks(1 << 20)
    decoded: list[tuple[int]] = []
    gate = threading.Barrier(4)

    def decode(keys: list[Any]) -> list[Any]:
        threading.Event().wait(0.002)
        decoded.extend(keys)
        return [number_block(key) for key in keys]

    def work(number: int) -> None:
        rng = np.random.default_rng(number)
        gate.wait()
        for _ in range(30):
            wanted = [(int(key),) for key in rng.choice(60, 9, replace=False)]
            assert [int(block[0, 0, 0]) for block in cache.get(wanted, decode)] == [key[0] for key in wanted]

    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(work, number) for number in range(4)]:
            future.result(timeout=60)
    assert len(decoded) == len(set(decoded))


def test_a_block_that_another_thread_failed_to_decode_is_tried_again() -> None:
    cache = geotiff._DecodedBlocks(1 << 20)
    started, go_on = threading.Event(), threading.Event()

    def failing(_: list[Any]) -> list[Any]:
        started.set()
        assert go_on.wait(30)
        raise StoreError("the first thread's request failed")

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(cache.get, [(1,), (2,)], failing)
        assert started.wait(30)
        second = pool.submit(cache.get, [(2,), (3,)], lambda keys: [number_block(key) for key in keys])
        go_on.set()
        assert [int(block[0, 0, 0]) for block in second.result(timeout=30)] == [2, 3]
        with pytest.raises(StoreError):
            first.result(timeout=30)
    assert cache.get([(1,)], lambda keys: [number_block(key) for key in keys])


def test_what_is_kept_is_bounded() -> None:
    cache = geotiff._DecodedBlocks(10 * 128)
    decoded: list[Any] = []

    def decode(keys: list[Any]) -> list[Any]:
        decoded.extend(keys)
        return [number_block(key) for key in keys]

    for number in range(30):
        cache.get([(number,)], decode)
    assert sum(block.nbytes for block in cache._blocks.values()) == cache._held == 10 * 128
    cache.get([(number,) for number in range(20, 30)], decode)
    assert len(decoded) == 30, "the last ten are there"
    cache.get([(19,)], decode)
    assert len(decoded) == 31
    assert not cache._coming
