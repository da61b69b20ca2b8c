"""The structure of TIFF files: directories and blocks are where rasterio and the bytes say they are."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from hypothesis import given, settings
from hypothesis import strategies as st
from kit import hostile
from kit.scenes import AT_UTM, UTM, noise, write_scene
from numpy.testing import assert_array_equal
from rasterio.io import MemoryFile

from geoseg.errors import NotGeoTiffError, SceneReadError, SceneTooCostlyError
from geoseg.raster import tiff
from geoseg.raster.window import plan_windows

TILED = {"tiled": True, "blockxsize": 32, "blockysize": 16}
BUILDS: dict[str, dict[str, Any]] = {
    "tiled": TILED,
    "strips": {"blockysize": 7},
    "one strip": {"blockysize": 70},
    "planes of tiles": {**TILED, "interleave": "band"},
    "planes of strips": {"blockysize": 11, "interleave": "band"},
    "big-endian": {**TILED, "ENDIANNESS": "BIG"},
    "BigTIFF": {**TILED, "BIGTIFF": "YES"},
    "big-endian BigTIFF": {"blockysize": 7, "BIGTIFF": "YES", "ENDIANNESS": "BIG"},
}
SIGNATURES = {
    b"\xff\xd8\xff\xe0": "a JPEG image",
    b"\x89PNG\r\n\x1a\n": "a PNG image",
    b"PK\x03\x04": "a ZIP archive",
    b"\x89HDF\r\n": "an HDF5 file",
    b"CDF\x01": "a NetCDF file",
    b"\x00\x00\x00\x0cjP  ": "a JPEG 2000 image",
    b"GIF89a": "a GIF image",
    b"%PDF-1.7": "a PDF document",
    b"NITF02.10": "a NITF image",
    b'<?xml version="1.0"?>\n<VRTDataset rasterXSize="1">': "a GDAL VRT",
    b"<html>": "a text file",
    b'  {"type": "FeatureCollection"}': "a text file",
    b"\x7fELF": "a file of another kind",
    bytes(16): "a file of another kind",
    b"II*\x01": "a file of another kind",
    b"MM*\0": "a file of another kind",
}


def directories(data: bytes) -> list[tiff.Directory]:
    return tiff.read_directories(lambda start, end: data[start:end], len(data))


@pytest.mark.parametrize("build", BUILDS)
def test_directories_say_what_rasterio_says(build: str, tmp_path: Path) -> None:
    valid = np.ones((70, 53), np.bool_)
    valid[:9] = False
    path = write_scene(tmp_path / "a.tif", noise(3, 70, 53), valid=valid, overviews=(2, 4), **BUILDS[build])
    found = directories(path.read_bytes())
    full, overviews = found[0], [one for one in found[1:] if one.is_overview and not one.is_mask]
    with rasterio.open(path) as dataset:
        assert (full.height, full.width) == dataset.shape
        if build != "one strip":  # libtiff shows a single large strip as several small ones
            assert full.block_shape == dataset.block_shapes[0]
        assert (full.num_planes == 3) == (dataset.interleaving.name == "band")
        assert len(overviews) == len(dataset.overviews(1)) == 2
    for level, one in enumerate(overviews):
        with rasterio.open(path, overview_level=level) as dataset:
            assert (one.height, one.width) == dataset.shape
            assert one.block_shape == dataset.block_shapes[0]
    masks = {(one.height, one.width) for one in found if one.is_mask}
    assert masks == {(70, 53), (35, 27), (18, 14)}


@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32"])
@pytest.mark.parametrize("build", BUILDS)
def test_each_block_lies_where_the_index_says(build: str, dtype: str, tmp_path: Path) -> None:
    """Uncompressed blocks are the pixels themselves, so the bytes tell."""
    pixels = noise(3, 70, 53, dtype=dtype)
    data = write_scene(tmp_path / "a.tif", pixels, **BUILDS[build]).read_bytes()
    directory = directories(data)[0]
    index = tiff.block_index(directory, len(data))
    rows, cols = index.block_shape
    for plane, row, col in np.ndindex(index.counts.shape):
        start = int(index.offsets[plane, row, col])
        raw = np.frombuffer(
            data[start : start + int(index.counts[plane, row, col])], directory.byte_order + dtype_code(dtype)
        )
        want = pixels[:, row * rows : (row + 1) * rows, col * cols : (col + 1) * cols]
        if directory.num_planes == 3:
            block = raw.reshape(1, -1, cols)
            want = want[plane : plane + 1]
        else:
            block = raw.reshape(-1, cols, 3).transpose(2, 0, 1)
        assert_array_equal(block[:, : want.shape[1], : want.shape[2]], want)


@pytest.mark.parametrize("layout", [{}, {"interleave": "band"}, TILED], ids=["strips", "planes", "tiles"])
@pytest.mark.parametrize(
    ("dtype", "bits"),
    [("uint8", 1), ("uint8", 2), ("uint8", 4), ("uint8", 8), ("uint16", 12), ("float32", 16), ("float64", 64)],
)
def test_a_block_costs_what_it_is_decoded_to(dtype: str, bits: int, layout: dict[str, Any], tmp_path: Path) -> None:
    """GDAL gives a pixel of one bit a byte, and a half float four."""
    pixels = np.ones((3, 16, 53), dtype)
    data = write_scene(tmp_path / "a.tif", pixels, NBITS=bits, photometric="minisblack", **layout).read_bytes()
    one = directories(data)[0]
    num_bands = 3 // one.num_planes
    assert one.block_bytes == one.block_shape[0] * one.block_shape[1] * num_bands * pixels.itemsize
    assert one.packed_bytes == tiff.block_index(one, len(data)).counts[0, 0, 0]
    assert one.number(tiff.BITS) == bits


def dtype_code(dtype: str) -> str:
    return np.dtype(dtype).str[1:]


@pytest.mark.parametrize("build", BUILDS)
def test_an_excerpt_holds_the_pixels_of_its_blocks(build: str, tmp_path: Path) -> None:
    """GDAL reads from the excerpt what rasterio reads from the file: compression, predictor and byte order come along."""
    pixels = noise(3, 70, 53, dtype="uint16")
    data = write_scene(tmp_path / "a.tif", pixels, compress="lzw", predictor=2, **BUILDS[build]).read_bytes()
    directory = directories(data)[0]
    index = tiff.block_index(directory, len(data))
    rows, cols = index.block_shape
    row, col = index.counts.shape[1] - 1, index.counts.shape[2] - 1
    spans = [(int(index.offsets[p, row, col]), int(index.counts[p, row, col])) for p in range(directory.num_planes)]
    height = rows if directory.tiled else 70 - row * rows
    part = tiff.excerpt(directory, [data[at : at + count] for at, count in spans], height, cols)
    want = pixels[:, row * rows :, col * cols :]
    with MemoryFile(part) as memory, memory.open(driver="GTiff") as dataset:
        assert_array_equal(dataset.read()[:, : want.shape[1], : want.shape[2]], want)
        assert dataset.crs.to_string() == UTM
        assert dataset.transform == AT_UTM


def sparse(tmp_path: Path, **profile: Any) -> bytes:
    """A file of 4 x 4 tiles of which three hold data."""
    path = tmp_path / "sparse.tif"
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        count=1,
        height=60,
        width=60,
        dtype="uint8",
        crs=UTM,
        transform=AT_UTM,
        tiled=True,
        blockxsize=16,
        blockysize=16,
        SPARSE_OK=True,
        **profile,
    ) as dataset:
        for row, col in ((0, 0), (1, 2), (3, 3)):
            size = (min(16, 60 - 16 * row), min(16, 60 - 16 * col))
            window = ((16 * row, 16 * row + size[0]), (16 * col, 16 * col + size[1]))
            dataset.write(np.full((1, *size), 9, np.uint8), window=window)
    return path.read_bytes()


def test_a_sparse_file_tells_which_blocks_it_holds(tmp_path: Path) -> None:
    data = sparse(tmp_path)
    index = tiff.block_index(directories(data)[0], len(data))
    held = {(row, col) for row, col in np.ndindex(4, 4) if index.counts[0, row, col]}
    assert held == {(0, 0), (1, 2), (3, 3)}
    assert index.places(0, 60, 0, 60, plane=0) == sorted(held)
    assert index.places(15, 17, 15, 33, plane=0) == [(0, 0), (1, 2)]
    assert index.places(16, 32, 0, 32, plane=0) == []


@settings(deadline=None)
@given(st.data())
def test_stored_is_asked_of_the_blocks_that_pixels_touch(data: st.DataObject) -> None:
    counts = np.zeros((1, 4, 4), np.int64)
    for row, col in ((0, 0), (1, 2), (3, 3)):
        counts[0, row, col] = 10
    index = tiff.BlockIndex((16, 16), counts * 3, counts)
    row_off, col_off = data.draw(st.integers(0, 59)), data.draw(st.integers(0, 59))
    box = (row_off, data.draw(st.integers(row_off + 1, 60)), col_off, data.draw(st.integers(col_off + 1, 60)))
    held = counts[0].repeat(16, 0).repeat(16, 1)[box[0] : box[1], box[2] : box[3]] > 0
    assert index.stored(*box) == held.any()
    absent = index.unstored_pixels(*box)
    touched = counts[0, box[0] // 16 : -(-box[1] // 16), box[2] // 16 : -(-box[3] // 16)]
    assert (absent is None) == bool((touched > 0).all())
    if absent is not None:
        assert_array_equal(absent, ~held)


@pytest.mark.parametrize("size", [512, 1024])
@pytest.mark.parametrize(("rows", "cols"), [(9, 13), (1, 1), (40, 3)])
def test_windows_side_by_side_own_each_byte_once(rows: int, cols: int, size: int) -> None:
    """At full size and at an overview, whose blocks lie over several windows."""
    counts = np.random.default_rng(0).integers(0, 1000, (1, rows, cols))
    index = tiff.BlockIndex((256, 256), counts, counts)
    for scale in (1, 2, 8):
        height, width = rows * 256 * scale - 5, cols * 256 * scale - 3
        windows = plan_windows(height, width, size)
        boxes = [(one.row_off, one.row_end, one.col_off, one.col_end) for one in windows]
        assert sum(index.owned_bytes(box, (height, width)) for box in boxes) == counts.sum()


@settings(deadline=None)
@given(
    st.lists(
        st.dictionaries(
            st.integers(256, 65535), st.tuples(st.sampled_from([1, 3, 4, 12]), st.binary(max_size=40)), min_size=1
        ),
        min_size=1,
        max_size=5,
    ),
    st.booleans(),
    st.sampled_from("<>"),
    st.integers(0, 9),
)
def test_directories_are_read_as_they_were_written(
    tables: list[dict[int, tuple[int, bytes]]],
    big: bool,
    order: str,
    gap: int,
) -> None:
    size = {1: 1, 3: 2, 4: 4, 12: 8}
    written = [
        {
            tag: tiff.Entry(kind, len(raw) // size[kind], raw[: len(raw) // size[kind] * size[kind]])
            for tag, (kind, raw) in table.items()
        }
        for table in tables
    ]
    start = 16 + 2 * gap
    body, end = tiff.write_directories(written, start, big=big, order=order)
    name = b"II" if order == "<" else b"MM"
    signature = (
        struct.pack(order + "2sHHHQ", name, 43, 8, 0, start) if big else struct.pack(order + "2sHI", name, 42, start)
    )
    data = signature.ljust(start, b"\0") + body
    assert end == len(data)
    assert [one.entries for one in directories(data)] == written


@pytest.mark.parametrize(
    "start", SIGNATURES, ids=[name.replace(" ", "-") + str(i) for i, name in enumerate(SIGNATURES.values())]
)
def test_what_is_no_tiff_is_called_by_its_name(start: bytes) -> None:
    with pytest.raises(NotGeoTiffError, match=f"{SIGNATURES[start]}.*not a GeoTIFF"):
        directories(start.ljust(600, b" "))


@pytest.mark.parametrize("size", range(8))
def test_eight_bytes_are_the_least(size: int) -> None:
    with pytest.raises(NotGeoTiffError, match=f"the file has {size} bytes"):
        directories(b"II*\0\x08\0\0\0"[:size])


def patched(
    data: bytes, tag: int, *, kind: int | None = None, value: int | None = None, at: int | None = None
) -> bytes:
    """The file with the type, the first value or the position of the values of a field of the first directory changed."""
    out = bytearray(data)
    place = hostile.fields(data, hostile.first_directory(data))[0][tag]
    if kind is not None:
        struct.pack_into("<H", out, place.entry_at + 2, kind)
    if value is not None:
        struct.pack_into("<I", out, place.at, value)
    if at is not None:
        struct.pack_into("<I", out, place.entry_at + 8, at)
    return bytes(out)


def index_of(data: bytes) -> tiff.BlockIndex:
    return tiff.block_index(directories(data)[0], len(data))


def test_a_block_index_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    data = write_scene(tmp_path / "a.tif", noise(1, 64, 64), **TILED).read_bytes()
    assert index_of(data).counts.shape == (1, 4, 2)
    damaged = {
        "an offset past the end": (patched(data, tiff.TILE_OFFSETS, value=len(data)), "points past the end"),
        "a count past the end": (patched(data, tiff.TILE_BYTES, kind=4, at=0), "points past the end"),
        "no tiles in it": (patched(data, tiff.TILE_OFFSETS, kind=2), "the block index is damaged"),
        "a wider image": (patched(data, tiff.WIDTH, kind=4, value=6400), "8 offsets"),
        "no columns": (patched(data, tiff.WIDTH, kind=4, value=0), "0 x 64 pixels|damaged"),
        "no rows": (patched(data, tiff.HEIGHT, kind=4, value=0), "64 x 0 pixels|damaged"),
    }
    for body, reason in damaged.values():
        with pytest.raises(SceneReadError, match=reason):
            index_of(body)


@pytest.mark.parametrize(
    ("offset", "count"), [(1 << 63, 100), (100, 1 << 63), ((1 << 62) + 5, (1 << 62) + 5), (3, (1 << 63) - 1)]
)
def test_offsets_of_64_bits_do_not_wrap(offset: int, count: int, tmp_path: Path) -> None:
    """As signed numbers they turn negative, or their sum does: both lie past the end of any file."""
    path = write_scene(tmp_path / "a.tif", noise(1, 16, 16), BIGTIFF="YES", **TILED)
    directory = directories(path.read_bytes())[0]
    for tag, value in ((tiff.TILE_OFFSETS, offset), (tiff.TILE_BYTES, count)):
        directory.entries[tag] = tiff.Entry(16, 1, struct.pack("<Q", value))
    with pytest.raises(SceneReadError, match="past the end"):
        tiff.block_index(directory, path.stat().st_size)


def test_directories_that_are_too_many_or_never_end_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SceneTooCostlyError, match="more than 64 images"):
        directories(hostile.many_directories(tmp_path / "a.tif", count=100).read_bytes())
    assert len(directories(hostile.many_directories(tmp_path / "a.tif", count=63).read_bytes())) == 64
    with pytest.raises(SceneReadError, match="its directories loop"):
        directories(hostile.looping(tmp_path / "a.tif").read_bytes())
