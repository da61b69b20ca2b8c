"""Masks on one lattice are one raster, whatever scenes they were published in."""

from __future__ import annotations

import numpy as np
import pytest
import rasterio
from affine import Affine

from geoseg.raster.geotiff import ReadOptions, SceneReader, describe
from geoseg.raster.scene import SceneRef
from geoseg.raster.window import Window
from geoseg.vector.sheet import join_scenes, of_scene

PIXEL = 0.6


def published(folder, name, pixels, *, left, top, crs="EPSG:32640", pixel=PIXEL):
    """A mask or probabilities (band, row, col) whose first pixel is at these pixels from the zero of the CRS, as a scene."""
    bands, height, width = pixels.shape
    path = folder / f"{name}.tif"
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        count=bands,
        height=height,
        width=width,
        dtype="uint8",
        crs=crs,
        transform=Affine(pixel, 0, left * pixel, 0, -pixel, -top * pixel),
        nodata=255,
        tiled=True,
        blockxsize=64,
        blockysize=64,
        sparse_ok=True,
    ) as dataset:
        dataset.write(pixels)
    return describe(SceneRef(name, str(path)), ReadOptions())


@pytest.fixture
def ground():
    """What lies on 300 x 400 pixels from row 1000, column 5000 on: classes 0 to 2 and no data."""
    rng = np.random.default_rng(5)
    return rng.choice(np.array([0, 1, 2, 255], np.uint8), (300, 400), p=[0.6, 0.2, 0.1, 0.1])


def cut(folder, ground, name, rows, cols):
    return published(folder, name, ground[None, slice(*rows), slice(*cols)], left=5000 + cols[0], top=1000 + rows[0])


def whole(sheet, values=(1,), *, shares=False):
    return sheet.read(Window(0, 0, sheet.grid.width, sheet.grid.height), values, shares=shares)


def test_scenes_side_by_side_are_one_raster(tmp_path, ground):
    spans = [((0, 130), (0, 400)), ((130, 300), (0, 171)), ((130, 300), (171, 400))]
    scenes = [(cut(tmp_path, ground, f"s{place}", *span), None) for place, span in enumerate(spans)]
    ((sheet,),) = join_scenes(scenes[::-1])
    assert sheet.origin == (1000, 5000)
    assert np.array_equal(whole(sheet)[0], ground)
    seen, _ = sheet.read(Window(160, 120, 30, 25), (1,), shares=False)
    assert np.array_equal(seen, ground[120:145, 160:190])
    beyond, _ = sheet.read(Window(-5, 290, 20, 20), (1,), shares=False)
    assert np.array_equal(beyond[:10, 5:], ground[290:, :15])
    assert (beyond[:, :5] == 255).all()
    assert (beyond[10:] == 255).all()


def test_where_scenes_overlap_the_first_that_has_data_counts(tmp_path, ground):
    one = cut(tmp_path, ground, "one", (0, 200), (0, 400))
    other = published(tmp_path, "other", np.full((1, 200, 400), 2, np.uint8), left=5000, top=1100)
    ((sheet,),) = join_scenes([(one, None), (other, None)])
    expected = np.full((300, 400), 2, np.uint8)
    expected[:200] = ground[:200]
    expected[:200][(ground[:200] == 255) & (np.arange(200) >= 100)[:, None]] = 2
    assert np.array_equal(whole(sheet)[0], expected)
    ((swapped,),) = join_scenes([(other, None), (one, None)])
    assert (whole(swapped)[0][100:] == 2).all()


def test_scenes_apart_or_on_other_lattices_stay_apart(tmp_path, ground):
    near = cut(tmp_path, ground, "near", (0, 100), (0, 100))
    far = cut(tmp_path, ground, "far", (0, 100), (101, 200))
    shifted = published(tmp_path, "shifted", ground[None, :100, 100:200], left=5100.3, top=1000)
    finer = published(tmp_path, "finer", ground[None, :100, 100:200], left=10200, top=2000, pixel=PIXEL / 2)
    elsewhere = published(tmp_path, "elsewhere", ground[None, :100, 100:200], left=5100, top=1000, crs="EPSG:32641")
    lattices = join_scenes([(one, None) for one in (near, far, shifted, finer, elsewhere)])
    assert [len(sheets) for sheets in lattices] == [2, 1, 1, 1]
    found = [sheet for sheets in lattices for sheet in sheets]
    assert sorted(piece.mask.id for sheet in found for piece in sheet.pieces) == sorted(
        ["near", "far", "shifted", "finer", "elsewhere"]
    )
    assert len(found) == 5
    touching = cut(tmp_path, ground, "touching", (100, 120), (100, 101))
    ((one,),) = join_scenes([(near, None), (touching, None)])
    assert len(one.pieces) == 2


def test_probabilities_come_from_the_scene_whose_class_counts(tmp_path, ground):
    masks = [cut(tmp_path, ground, "one", (0, 200), (0, 400)), cut(tmp_path, ground, "two", (100, 300), (0, 400))]
    told = [
        published(tmp_path, f"p{place}", np.full((3, 200, 400), 10 * place + 1, np.uint8), left=5000, top=top)
        for place, top in ((1, 1000), (2, 1100))
    ]
    ((sheet,),) = join_scenes(list(zip(masks, told, strict=True)))
    assert sheet.has_shares
    mask_hw, shares_vhw = whole(sheet, (1, 2), shares=True)
    assert np.array_equal(mask_hw, ground)
    assert shares_vhw.shape == (2, 300, 400)
    assert set(np.unique(shares_vhw[:, :200])) <= {11, 255}
    assert set(np.unique(shares_vhw[:, 200:])) <= {21, 255}
    assert np.array_equal(shares_vhw[0] == 255, ground == 255)


def test_a_window_without_data_is_none(tmp_path, ground):
    blank = ground.copy()
    blank[64:128, 64:128] = 255
    scene = of_scene(cut(tmp_path, blank, "blank", (0, 300), (0, 400)), None)
    assert scene.read(Window(64, 64, 64, 64), (1,), shares=False) is None
    assert scene.read(Window(900, 900, 10, 10), (1,), shares=False) is None
    assert scene.read(Window(63, 64, 64, 64), (1,), shares=False) is not None


def test_blocks_that_are_not_stored_hold_nothing(tmp_path):
    holes = np.full((1, 128, 128), 255, np.uint8)
    holes[:, :64, :64] = 1
    one = published(tmp_path, "one", holes, left=0, top=0)
    other = published(tmp_path, "other", np.full((1, 128, 128), 2, np.uint8), left=0, top=0)
    assert not SceneReader(one).is_stored(Window(64, 64, 64, 64))
    assert np.array_equal(
        of_scene(one, None).read(Window(32, 32, 64, 64), (1,), shares=False)[0], holes[0, 32:96, 32:96]
    )
    ((sheet,),) = join_scenes([(one, None), (other, None)])
    seen = whole(sheet)[0]
    assert (seen[:64, :64] == 1).all()
    assert (seen == 2).sum() == 128 * 128 - 64 * 64


@pytest.mark.parametrize("pixel", [0.1, 0.25, 0.6])
def test_a_lattice_half_a_pixel_off_is_one(tmp_path, pixel):
    pixels = np.ones((1, 10, 128), np.uint8)
    for gap in range(5):
        left = 26_000_000.5 + 37 * gap
        one = published(tmp_path, "one", pixels, left=left, top=1000.5, pixel=pixel)
        other = published(tmp_path, "other", pixels, left=left + 128, top=1000.5, pixel=pixel)
        ((sheet,),) = join_scenes([(one, None), (other, None)])
        assert (sheet.grid.width, sheet.grid.height) == (256, 10)
        assert (whole(sheet)[0] == 1).all()
        assert of_scene(other, None).origin == (sheet.origin[0], sheet.origin[1] + 128)
