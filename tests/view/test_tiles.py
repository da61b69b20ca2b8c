"""Tiles of any GeoTIFF: each pixel is the one that lies there, whatever the file's layout, dtype and geotransform."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import rasterio
from affine import Affine
from kit.published import SIDE, predicted
from kit.scenes import AT_UTM, ROTATED, SOUTH_UP, noise, write_scene
from PIL import Image
from rasterio.enums import Resampling

from geoseg.errors import SceneReadError
from geoseg.raster.geotiff import ReadOptions, describe
from geoseg.raster.grid import Grid
from geoseg.raster.scene import SceneRef
from geoseg.view import tiles
from geoseg.view.catalogue import Catalogue
from geoseg.view.tiles import TILE, Picture, TileGrid


def picture_of(path: Path, bands: tuple[int, ...] = (0, 1, 2), **settings: Any) -> Picture:
    return Picture(describe(SceneRef("one", str(path)), ReadOptions()), bands, **settings)


def decoded(tile: tuple[bytes, str]) -> npt.NDArray[np.uint8]:
    with Image.open(io.BytesIO(tile[0])) as image:
        return np.asarray(image.convert("RGBA"))


def whole(picture: Picture, level: int, **settings: Any) -> npt.NDArray[np.uint8]:
    """Put the tiles of a level side by side (row, col, rgba); where there is no tile nothing is."""
    grid = picture.tile_grid
    step = TILE * grid.resolutions[level]
    xmin, ymin, xmax, ymax = grid.extent
    cols, rows = math.ceil((xmax - xmin) / step), math.ceil((ymax - ymin) / step)
    out = np.zeros((rows * TILE, cols * TILE, 4), np.uint8)
    for row, col in np.ndindex(rows, cols):
        out[row * TILE : (row + 1) * TILE, col * TILE : (col + 1) * TILE] = decoded(
            picture.tile(level, col, row, **settings)
        )
    return out


LAYOUTS: dict[str, dict[str, Any]] = {
    "tiled": {"tiled": True, "blockxsize": 256, "blockysize": 256},
    "strips": {"blockysize": 3},
    "one strip": {"blockysize": 700},
    "planes apart": {"interleave": "band", "tiled": True, "blockxsize": 128, "blockysize": 128},
    "lzw": {"compress": "lzw", "predictor": 2},
}


@pytest.mark.parametrize("profile", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_the_finest_tiles_are_the_pixels_of_the_file(profile: dict[str, Any], tmp_path: Path) -> None:
    pixels = noise(3, 700, 530)
    valid = np.ones((700, 530), bool)
    valid[::256, ::256] = False  # a PNG, which loses nothing
    path = write_scene(tmp_path / "one.tif", pixels, valid=valid, **profile)
    picture = picture_of(path)
    seen = whole(picture, len(picture.tile_grid.resolutions) - 1)
    assert (seen[:700, :530, 3] == np.where(valid, 255, 0)).all()
    assert (seen[:700, :530, :3][valid] == pixels.transpose(1, 2, 0)[valid]).all()
    assert not seen[700:, :, 3].any()
    assert not seen[:, 530:, 3].any()


@pytest.mark.parametrize("overviews", [(), (2, 4, 8)], ids=["no overviews", "overviews"])
def test_coarser_tiles_are_means(overviews: tuple[int, ...], tmp_path: Path) -> None:
    ramp = np.linspace(0, 250, 1024).astype(np.uint8)
    pixels = np.stack(
        [np.tile(ramp, (1024, 1)), np.tile(ramp[:, None], (1, 1024)), np.full((1024, 1024), 90, np.uint8)]
    )
    picture = picture_of(write_scene(tmp_path / "one.tif", pixels, overviews=overviews, tiled=True))
    assert picture.tile_grid.resolutions == (2.0, 1.0, 0.5)
    for level, factor in ((0, 4), (1, 2)):
        seen = whole(picture, level)[..., :3].astype(int)
        mean = pixels.reshape(3, 1024 // factor, factor, 1024 // factor, factor).mean((2, 4)).transpose(1, 2, 0)
        assert np.abs(seen - mean).max() <= 6, "JPEG, and overviews that take one pixel of four"


def test_a_large_scene_without_overviews_is_read_whole_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "_REDUCED_SIDE", 400)
    pixels = np.repeat(np.repeat(noise(3, 16, 16, seed=3), 100, 1), 100, 2)
    picture = picture_of(write_scene(tmp_path / "one.tif", pixels, blockysize=16))
    read = []
    monkeypatch.setattr(type(picture._reader), "read", _noting(type(picture._reader).read, read))
    first = whole(picture, 0)
    num = len(read)
    assert sum(width * height for width, height in read) == 1600 * 1600
    assert (whole(picture, 0) == first).all()
    whole(picture, 1)
    assert len(read) == num, "what is in memory serves the coarse levels"
    for row, col in np.ndindex(16, 16):
        at = int((row + 0.5) * 100 / 8), int((col + 0.5) * 100 / 8)
        assert np.abs(first[at][:3].astype(int) - pixels[:, row * 100, col * 100]).max() <= 30, "JPEG"


def _noting(read: Any, into: list[tuple[int, int]]) -> Any:
    def noted(self: Any, window: Any, *more: Any, **settings: Any) -> Any:
        into.append((window.width, window.height))
        return read(self, window, *more, **settings)

    return noted


def test_what_is_too_large_for_that_says_from_where_on_it_can_be_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "_REDUCED_SIDE", 64)
    monkeypatch.setattr(tiles, "_MOST_REDUCED_PIXELS", 1000)
    monkeypatch.setattr(tiles, "_MOST_TILE_PIXELS", 600 * 600)
    picture = picture_of(write_scene(tmp_path / "one.tif", noise(3, 2000, 2000)))
    assert picture.coarsest == pytest.approx(600 / TILE / 2)
    with pytest.raises(SceneReadError, match="zoom in"):
        picture.tile(0, 0, 0)
    assert decoded(picture.tile(3, 3, 3)).any()


@pytest.mark.parametrize("dtype", ["uint16", "int16", "float32"])
def test_other_dtypes_are_stretched_over_the_whole_scene(dtype: str, tmp_path: Path) -> None:
    values = np.arange(600 * 500).reshape(600, 500) % 1000 + 200
    values[0, 0] = 30_000  # an outlier does not make the rest black
    pixels = np.stack([values, values, values]).astype(dtype)
    if dtype == "float32":
        pixels[:, 5, 5] = np.nan
    picture = picture_of(write_scene(tmp_path / "one.tif", pixels, tiled=True))
    tile = decoded(picture.tile(len(picture.tile_grid.resolutions) - 1, 0, 0))
    wanted = ((values[:256, :256] - 220) / 960).clip(0, 1) * 255
    valid = tile[..., 3] > 0
    assert np.abs(tile[..., 0].astype(float) - wanted)[valid].mean() <= 3, "JPEG"
    assert valid.sum() == 256 * 256 - (dtype == "float32")


@pytest.mark.parametrize(
    "transform", [AT_UTM, ROTATED, SOUTH_UP, Affine(0.5, 0, 0, 0, -0.25, 0), Affine(-1, 0, 9, 0, -1, 9)]
)
def test_each_pixel_lies_where_the_geotransform_puts_it(transform: Affine, tmp_path: Path) -> None:
    codes = noise(1, 300, 410, seed=5) % 7
    picture = picture_of(write_scene(tmp_path / "one.tif", codes, transform=transform), (0,), is_codes=True)
    colors = {code: (code * 30, 255 - code, code, 255) for code in range(7)}
    grid, level = picture.tile_grid, len(picture.tile_grid.resolutions) - 1
    seen = whole(picture, level, colors=colors)
    step = grid.resolutions[level]
    placed = 0
    for row, col in np.random.default_rng(2).integers(0, seen.shape[:2], (2000, 2)):
        x, y = grid.extent[0] + (col + 0.5) * step, grid.extent[3] - (row + 0.5) * step
        at = ~transform @ (x, y) if hasattr(transform, "__matmul__") else ~transform * (x, y)
        if min(abs(one - round(one)) for one in at) < 1e-6:
            continue
        inside = 0 <= at[0] < 410 and 0 <= at[1] < 300
        assert (seen[row, col, 3] > 0) == inside
        if inside:
            placed += 1
            assert tuple(seen[row, col]) == colors[int(codes[0, int(at[1]), int(at[0])])]
    assert placed > 250


@pytest.mark.parametrize("overviews", [(), (2, 4)], ids=["no overviews", "overviews"])
def test_codes_are_sampled_and_those_without_a_colour_are_clear(overviews: tuple[int, ...], tmp_path: Path) -> None:
    codes = np.where(np.indices((1024, 1024)).sum(0) % 2, 1, 3)[None].astype(np.uint8)
    picture = picture_of(write_scene(tmp_path / "one.tif", codes, overviews=overviews), (0,), is_codes=True)
    between = (1, 1, 1, 255)
    for level in range(3):
        seen = np.unique(whole(picture, level, colors={2: between, 3: (9, 8, 7, 255)}).view(np.uint32))
        found = {tuple(one) for one in seen.view(np.uint8).reshape(-1, 4).tolist()}
        assert found <= {(9, 8, 7, 255), (0, 0, 0, 0)}, "no code is between two"


def test_the_pyramid_covers_the_image_and_ends_in_one_tile() -> None:
    grid = TileGrid(Grid("", (0.3, 0, 500, 0, -0.3, 900), 70_001, 12_345))
    assert grid.resolutions[-1] == 0.3
    assert all(
        coarse == pytest.approx(2 * fine) for coarse, fine in zip(grid.resolutions, grid.resolutions[1:], strict=False)
    )
    assert grid.has(0, 0, 0)
    assert not any(grid.has(0, *place) for place in ((1, 0), (0, 1)))
    assert not grid.has(len(grid.resolutions), 0, 0)
    assert TileGrid(Grid("", (1, 0, 0, 0, -1, 0), 1, 1)).resolutions == (1,)


# ---- of a published output


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made, _ = predicted(str(tmp_path_factory.mktemp("tiles")), "alpha", "night", dark=["night"])
    return Path(made)


def test_the_image_of_a_mask_is_its_source_as_rasterio_reads_it(out: Path) -> None:
    catalogue = Catalogue(str(out))
    told = catalogue.image("alpha")
    assert (told["sentence"], told["max_resolution"], told["bands"]) == ("", None, ["red", "green", "blue"])
    seen = whole(catalogue.image_picture("alpha"), len(told["tiles"]["resolutions"]) - 1)
    with rasterio.open(out.parent / "in" / "alpha.tif") as dataset:
        pixels, valid = dataset.read(), dataset.dataset_mask() > 0
    assert ((seen[:SIDE, :SIDE, 3] > 0) == valid).all()
    assert np.abs(seen[:SIDE, :SIDE, :3].astype(int) - pixels.transpose(1, 2, 0))[valid].mean() < 4, "JPEG"


def test_a_drawn_mask_is_the_mask_in_the_colours_of_its_classes(out: Path) -> None:
    picture, classes = Catalogue(str(out)).mask_picture("alpha")
    colors = {one["value"]: (*one["color"], 255) for one in classes if one["value"]}
    mask = json.loads((out / "alpha" / "item.json").read_text())["assets"]["mask"]["href"]
    for level, factor in ((0, 4), (1, 2), (2, 1)):
        seen = whole(picture, level, colors=colors)
        with rasterio.open(out / "alpha" / mask) as dataset:
            shape = (-(-SIDE // factor), -(-SIDE // factor))
            codes = (
                dataset.read(1)[::factor, ::factor]
                if factor == 1
                else dataset.read(1, out_shape=shape, resampling=Resampling.nearest)
            )
        table = np.zeros((256, 4), np.uint8)
        for code, color in colors.items():
            table[code] = color
        wanted = table[codes]
        same = (seen[: shape[0], : shape[1]] == wanted).all(axis=2).mean()
        assert same == 1 if factor == 1 else same > 0.9, "overviews hold every second pixel"


def test_a_scene_that_is_held_back_has_its_image(out: Path) -> None:
    catalogue = Catalogue(str(out))
    assert "grid" not in catalogue.scene("night")
    told = catalogue.image("night")
    assert told["grid"]["crs"] == "EPSG:25832"
    assert decoded(catalogue.image_picture("night").tile(0, 0, 0)).any()


@pytest.mark.parametrize(
    ("href", "sentence"),
    [
        ("/nowhere/scene.tif", "not where it was"),
        ("https://example.org/scene.tif?sig=abc", "not https"),
        ("s3://bucket/scene.tif?X-Amz-Signature=***", "secret"),
        ("/etc/passwd", "cannot be shown"),
        ("/dev/zero", "is no file"),
        ("", "cannot be shown"),
    ],
)
def test_an_image_that_cannot_be_had_is_told_in_a_sentence(href: str, sentence: str, out: Path, tmp_path: Path) -> None:
    (tmp_path / "alpha").mkdir()
    item = json.loads((out / "alpha" / "item.json").read_text())
    item["links"] = [{"rel": "derived_from", "href": href}]
    (tmp_path / "alpha" / "item.json").write_text(json.dumps(item))
    told = Catalogue(str(tmp_path)).image("alpha")
    assert sentence in told["sentence"]
    assert "root:" not in told["sentence"]
    assert "tiles" not in told


def test_an_image_that_changed_since_is_shown_and_told(out: Path, tmp_path: Path) -> None:
    scene = write_scene(tmp_path / "in" / "alpha.tif", noise(3, 64, 64))
    (tmp_path / "out" / "alpha").mkdir(parents=True)
    item = json.loads((out / "alpha" / "item.json").read_text())
    item["links"] = [{"rel": "derived_from", "href": str(scene)}]
    (tmp_path / "out" / "alpha" / "item.json").write_text(json.dumps(item))
    catalogue = Catalogue(str(tmp_path / "out"))
    assert "changed" in catalogue.image("alpha")["sentence"]
    assert "tiles" in catalogue.image("alpha")
