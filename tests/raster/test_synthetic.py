"""The generated scenes: repeatable, exact in their truth, and honest about where there are no data."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from geoseg.errors import ConfigError
from geoseg.raster import synthetic
from geoseg.raster.synthetic import synthetic_image

BUILDING, ROAD = 1, 2
SIZES = [(256, 320), (70, 53), (5, 7), (1, 1)]


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_the_same_seed_gives_the_same_bytes(height: int, width: int) -> None:
    first, second = synthetic_image(height, width, seed=4), synthetic_image(height, width, seed=4)
    assert_array_equal(first.pixels_bhw, second.pixels_bhw)
    assert_array_equal(first.classes_hw, second.classes_hw)
    assert_array_equal(first.valid_hw, second.valid_hw)


def test_another_seed_gives_another_scene() -> None:
    first, second = synthetic_image(70, 53, seed=0), synthetic_image(70, 53, seed=1)
    assert (first.pixels_bhw != second.pixels_bhw).mean() > 0.5
    assert (first.classes_hw != second.classes_hw).any()


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_shapes_and_dtypes_are_those_of_an_8_bit_image(height: int, width: int) -> None:
    image = synthetic_image(height, width, seed=2)
    assert (image.pixels_bhw.shape, image.pixels_bhw.dtype.name) == ((3, height, width), "uint8")
    assert (image.classes_hw.shape, image.classes_hw.dtype.name) == ((height, width), "uint8")
    assert (image.valid_hw.shape, image.valid_hw.dtype.name) == ((height, width), "bool")


@pytest.mark.parametrize("seed", range(4))
def test_all_three_classes_are_there_and_no_other(seed: int) -> None:
    image = synthetic_image(300, 300, seed=seed)
    counts = np.bincount(image.classes_hw[image.valid_hw])
    assert counts.size == 3
    assert (counts > 0.02 * image.valid_hw.sum()).all()


@pytest.mark.parametrize("seed", range(4))
def test_zero_means_no_data_and_nothing_else(seed: int) -> None:
    image = synthetic_image(131, 77, seed=seed, nodata_fraction=0.2)
    assert_array_equal((image.pixels_bhw > 0).all(axis=0), image.valid_hw)
    assert_array_equal((image.pixels_bhw > 0).any(axis=0), image.valid_hw)
    assert not image.classes_hw[~image.valid_hw].any()


@pytest.mark.parametrize("seed", range(4))
def test_the_pixels_without_data_are_a_triangle_in_one_corner(seed: int) -> None:
    invalid_hw = ~synthetic_image(131, 77, seed=seed, nodata_fraction=0.2).valid_hw
    assert invalid_hw.mean() == pytest.approx(0.2, abs=0.01)
    assert invalid_hw[[0, 0, -1, -1], [0, -1, 0, -1]].sum() == 1
    for lengths in (invalid_hw.sum(axis=0), invalid_hw.sum(axis=1)):
        falling = lengths if lengths[0] else lengths[::-1]
        assert (np.diff(falling) <= 0).all()
        assert np.ptp(np.diff(falling[falling > 0])) <= 1


def test_a_fraction_of_zero_leaves_data_everywhere() -> None:
    assert synthetic_image(70, 53, seed=3, nodata_fraction=0).valid_hw.all()


def test_buildings_leave_the_sidewalk_free() -> None:
    classes_hw = synthetic_image(600, 600, seed=47, nodata_fraction=0).classes_hw
    building_hw, road_hw = classes_hw == BUILDING, classes_hw == ROAD
    for gap in (1, 2, 3):
        core = slice(gap, -gap)
        for shift in [(0, gap), (0, -gap), (gap, 0), (-gap, 0)]:
            near_hw = np.roll(building_hw, shift, axis=(0, 1))
            assert not (near_hw & road_hw)[core, core].any()


def test_the_strips_that_a_scene_is_rendered_in_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = synthetic_image(150, 90, seed=8)
    monkeypatch.setattr(synthetic, "_STRIP_ROWS", 40)
    cut = synthetic_image(150, 90, seed=8)
    assert_array_equal(cut.classes_hw, whole.classes_hw)
    noise_bhw = cut.pixels_bhw.astype(float) - whole.pixels_bhw
    assert abs(noise_bhw.mean(axis=(0, 2))).max() < 1.5
    assert noise_bhw.std() < 5


@pytest.mark.parametrize(
    ("size", "fraction", "named"), [((0, 5), 0.1, "height=0"), ((5, 5), 0.6, "0.6"), ((5, 5), float("nan"), "nan")]
)
def test_what_cannot_be_drawn_is_refused(size: tuple[int, int], fraction: float, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        synthetic_image(*size, seed=0, nodata_fraction=fraction)
