"""A COG put together from windows: rasterio reads the same pixels, validators find nothing, the bytes do not depend on order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import rasterio
from kit.cogs import AFFINE, UTM, blobs, grid, profile
from rio_cogeo import cog_validate

from geoseg.raster import cog
from geoseg.raster.cog import CogAssembler, encode_window, level_sizes, pack_blocks, unpack_blocks
from geoseg.raster.window import plan_windows


def assemble(pixels: npt.NDArray[np.uint8], size: int, path: Path, *, backwards: bool = False) -> bytes:
    num_bands, height, width = pixels.shape
    with CogAssembler(grid(height, width), profile(num_bands)) as assembler:
        windows = list(plan_windows(height, width, size))
        for window in reversed(windows) if backwards else windows:
            part = pixels[:, window.row_off : window.row_end, window.col_off : window.col_end]
            header, blocks = unpack_blocks(pack_blocks({"told": 1}, encode_window(part, window, size)))
            assert header == {"told": 1}
            assembler.add(blocks)
        assembler.make_overviews(size)
        top = assembler.top_pixels()
        file = assembler.finish()
        data = b"".join(file.chunks())
    step = 2 ** (len(level_sizes(height, width)) - 1)
    np.testing.assert_array_equal(top, pixels[:, ::step, ::step])
    assert len(data) == file.size
    path.write_bytes(data)
    return data


@pytest.mark.sample(without=["3-shape8-4096", "3-shape9-2048"])
@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((3000, 2111), 1024), ((5, 7), 512), ((512, 512), 512), ((1, 1), 512), ((513, 600), 512), ((1030, 513), 2048),
        ((2368, 4096), 1024), ((4096, 512), 512), ((9000, 5000), 4096), ((4100, 9001), 2048),
    ],
)  # fmt: skip
@pytest.mark.parametrize("num_bands", [1, 3])
def test_every_level_holds_the_right_pixels(num_bands: int, shape: tuple[int, int], size: int, tmp_path: Path) -> None:
    pixels = blobs(num_bands, *shape)
    path = tmp_path / "mask.tif"
    data = assemble(pixels, size, path)
    assert assemble(pixels, size, tmp_path / "again.tif", backwards=True) == data
    with rasterio.open(path) as dataset:
        assert dataset.crs == UTM
        assert dataset.transform == AFFINE
        assert dataset.nodata == 255
        np.testing.assert_array_equal(dataset.read(), pixels)
        levels = len(dataset.overviews(1))
        assert levels == len(level_sizes(*shape)) - 1
        if num_bands == 1:
            assert dataset.colormap(1)[2] == (250, 200, 60, 255)
            assert dataset.tags()["CLASS_0"] == "background"
        else:
            assert dataset.scales == (1 / 254,) * 3
            assert dataset.descriptions[2] == "class 2"
    for level in range(levels):
        with rasterio.open(path, overview_level=level) as dataset:
            np.testing.assert_array_equal(dataset.read(), pixels[:, :: 2 ** (level + 1), :: 2 ** (level + 1)])
    assert cog_validate(path, strict=True) == (True, [], [])


@pytest.mark.parametrize("size", [512, 1024, 2048, 4096])
def test_the_bytes_do_not_depend_on_the_window(size: int, tmp_path: Path) -> None:
    pixels = blobs(1, 5000, 3333)
    assert assemble(pixels, size, tmp_path / "a.tif") == assemble(pixels, 512, tmp_path / "b.tif")


def test_large_files_become_bigtiff(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cog, "_CLASSIC_LIMIT", 1000)
    pixels = blobs(1, 1500, 1200)
    path = tmp_path / "big.tif"
    assert assemble(pixels, 512, path)[:4] == b"II+\0"
    with rasterio.open(path) as dataset:
        np.testing.assert_array_equal(dataset.read(), pixels)
    assert cog_validate(path, strict=True) == (True, [], [])


def test_what_has_no_data_is_not_stored(tmp_path: Path) -> None:
    pixels = np.full((1, 4096, 4096), 255, np.uint8)
    pixels[0, 2000:2010, 3000:3010] = 1
    data = assemble(pixels, 1024, tmp_path / "sparse.tif")
    assert len(data) < 12_000
    with rasterio.open(tmp_path / "sparse.tif") as dataset:
        np.testing.assert_array_equal(dataset.read(), pixels)


@pytest.mark.parametrize("cut", [3, 7, 20, -1])
def test_a_part_cut_short_is_noticed(cut: int) -> None:
    data = pack_blocks({}, [(0, 0, 0, b"abc")])
    with pytest.raises(ValueError, match=r"run of blocks|Expecting|Unterminated|buffer"):
        unpack_blocks(data[:cut])
