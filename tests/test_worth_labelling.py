"""What is most worth labelling: the squares with the highest mean uncertainty, apart from each other, the same on every run."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
import rasterio
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kit.oracle import AFFINE, published_mask, seeded_bundle, write_scene
from PIL import Image

import geoseg
from geoseg.cli import main
from geoseg.errors import ConfigError, NothingReadableError
from geoseg.evaluate.squares import Lattice, UncertainScene, best_squares
from geoseg.evaluate.worth_labelling import Wanted, Worth, find_worth_labelling, list_worth_labelling
from geoseg.raster import store
from geoseg.raster.cog import CogAssembler, CogProfile, encode_window
from geoseg.raster.grid import Grid
from geoseg.raster.synthetic import synthetic_image
from geoseg.raster.window import plan_windows

FEW = Wanted(top=8, chip=64)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return seeded_bundle(tmp_path_factory.mktemp("bundle"), temperature=0.3)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three scenes side by side with a gap, one with a hole without data; the third has the first one's bytes elsewhere."""
    folder = tmp_path_factory.mktemp("scenes")
    for place, (name, seed) in enumerate((("a", 1), ("b", 2), ("c", 1))):
        pixels = synthetic_image(330, 520, seed=seed).pixels_bhw
        pixels[:, 40:160, 200:330] = 0 if name != "b" else pixels[:, 40:160, 200:330]
        moved = AFFINE @ rasterio.Affine.translation(600 * place, 0)
        write_scene(folder / f"{name}.tif", pixels, nodata=0, transform=moved)
    return folder


@pytest.fixture(scope="module")
def out(scenes: Path, bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return predict(scenes, tmp_path_factory.mktemp("out"), bundle)


def predict(scenes: Path, out: Path, bundle: Path, **told: Any) -> Path:
    told = {"uncertainty": "entropy", "window": 512, **told}
    report = geoseg.predict(str(scenes), str(out), bundle=str(bundle), engine="local", **told)
    assert report.exit_code == 0, report.scenes
    return out


def layers(folder: Path) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """The uncertainty and the mask of a published scene."""
    unsure, mask = (published_mask(str(next(folder.glob(f"{name}-*.tif")))) for name in ("uncertainty", "mask"))
    return unsure, mask


Told = tuple[str, int, int, int, int]


def told(worth: Worth) -> list[Told]:
    """Scene and window of each square."""
    squares = [one.square for one in worth.squares]
    return [(one.scene_id, *(getattr(one.window, name) for name in NAMES)) for one in squares]


NAMES = ("col_off", "row_off", "width", "height")


def every_square(unsure: npt.NDArray[np.uint8], chip: int, min_valid: float) -> list[tuple[float, int, int]]:
    """The oracle: every square of a scene, cut out one by one, as (-score, row, col), the best first."""
    lasts = [max(0, size - chip) for size in unsure.shape]
    found = []
    for row, col in itertools.product(*({*range(0, last, chip // 2), last} for last in lasts)):
        part = unsure[row : row + chip, col : col + chip]
        seen = part[part != 255]
        if seen.size and seen.size >= min_valid * part.size:
            found.append((-int(seen.sum(dtype=np.int64)) / seen.size / 254, row, col))
    return sorted(found)


def greedily(squares: list[tuple[float, int, int]], apart: int, most: int) -> list[tuple[float, int, int]]:
    """The oracle: one after the other, unless it is near one that was taken."""
    taken: list[tuple[float, int, int]] = []
    for score, row, col in squares:
        if all(abs(row - other[1]) >= apart or abs(col - other[2]) >= apart for other in taken):
            taken.append((score, row, col))
    return taken[:most]


def test_the_best_squares_of_a_scene_are_those_that_a_plain_loop_finds(out: Path) -> None:
    unsure, mask = layers(out / "a")
    names = [str(next((out / "a").glob(f"{name}-*.tif"))) for name in ("uncertainty", "mask")]
    scene = UncertainScene("a", uncertainty=names[0], mask=names[1], num_classes=3)
    for chip, spacing, min_valid in ((64, 1, 0.5), (32, 0, 0.9), (34, 50, 0.0), (400, 1, 0.2), (2048, 1, 0.5)):
        found = best_squares(scene, Lattice(chip=chip, spacing=spacing, min_valid=min_valid), 10)
        wanted = greedily(every_square(unsure, chip, min_valid), chip + spacing, 10)
        assert [(-one.score, one.window.row_off, one.window.col_off) for one in found] == wanted
        assert wanted
        for one in found:
            assert (one.window.height, one.window.width) == (min(chip, 330), min(chip, 520))
            part = (slice(one.window.row_off, one.window.row_end), slice(one.window.col_off, one.window.col_end))
            assert one.valid == np.count_nonzero(unsure[part] != 255)
            assert one.classes == tuple(np.count_nonzero(mask[part] == value) for value in range(3))


@given(
    shape=st.tuples(st.integers(1, 700), st.integers(1, 1300)),
    chip=st.integers(8, 300).map(lambda half: 2 * half),
    spacing=st.integers(0, 90),
    most=st.integers(1, 9),
    seed=st.integers(0, 99),
)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_so_they_are_on_any_scene(
    shape: tuple[int, int], chip: int, spacing: int, most: int, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Few levels of uncertainty, so that many squares are of one worth."""
    folder = tmp_path_factory.mktemp("any")
    rng = np.random.default_rng(seed)
    coarse = rng.choice(np.array([0, 3, 254, 255], np.uint8), size=(-(-shape[0] // 64), -(-shape[1] // 64)))
    unsure = np.kron(coarse, np.ones((64, 64), np.uint8))[: shape[0], : shape[1]]
    unsure[:512, 512:1024] = 255  # a whole block, which the file does not hold
    mask = np.where(unsure == 255, 255, rng.integers(0, 3, shape)).astype(np.uint8)
    for name, pixels in (("unsure", unsure), ("mask", mask)):
        write_layer(folder / name, pixels)
    scene = UncertainScene("s", uncertainty=str(folder / "unsure"), mask=str(folder / "mask"), num_classes=3)
    found = best_squares(scene, Lattice(chip=chip, spacing=spacing, min_valid=0.4), most)
    wanted = greedily(every_square(unsure, chip, 0.4), chip + spacing, most)
    assert [(-one.score, one.window.row_off, one.window.col_off) for one in found] == wanted


def write_layer(path: Path, pixels: npt.NDArray[np.uint8]) -> None:
    """Publish pixels as a run would, blocks without data left out."""
    affine = (AFFINE.a, AFFINE.b, AFFINE.c, AFFINE.d, AFFINE.e, AFFINE.f)
    grid = Grid(rasterio.crs.CRS.from_epsg(25832).to_wkt(), affine, *pixels.shape)
    profile = CogProfile(num_bands=1, colors=None, tags=(), band_names=("one",), scale=None)
    with CogAssembler(grid, profile) as assembler:
        for window in plan_windows(*pixels.shape, 512):
            part = pixels[None, window.row_off : window.row_end, window.col_off : window.col_end]
            assembler.add(encode_window(part, window, 512))
        assembler.make_overviews(512)
        path.write_bytes(b"".join(assembler.finish().chunks()))


def test_a_list_is_of_the_whole_output_with_a_share_of_each_scene(out: Path) -> None:
    worth = find_worth_labelling(str(out), FEW)
    wanted = []
    for name in "abc":
        best = greedily(every_square(layers(out / name)[0], 64, 0.5), 65, 3)
        wanted += [(score, name, row, col) for score, row, col in best]
    expected = [(name, col, row) for _, name, row, col in sorted(wanted)[:8]]
    assert [one[:3] for one in told(worth)] == expected
    assert expected[0][0] == "a"
    assert expected[1] == ("c", *expected[0][1:]), "of equal worth, in the order of their names"
    assert worth.exit_code == 0
    assert not worth.remarks
    more = find_worth_labelling(str(out), Wanted(top=8, chip=256))
    assert len(more.squares) < 8
    assert more.remarks[0].startswith("no more squares are apart from these, 50% valid, and within the 3 ")


def test_the_windows_of_the_prediction_change_nothing(out: Path, scenes: Path, bundle: Path, tmp_path: Path) -> None:
    again = find_worth_labelling(str(predict(scenes, tmp_path, bundle, window=1024, batch=2)), FEW)
    before = find_worth_labelling(str(out), FEW)
    assert told(again) == told(before)
    assert [one.square for one in again.squares] == [one.square for one in before.squares]


def test_no_place_comes_twice_though_scenes_overlap(scenes: Path, bundle: Path, tmp_path: Path) -> None:
    made = synthetic_image(330, 520, seed=1).pixels_bhw
    for name, shift in (("one", 0), ("other", 200)):
        moved = AFFINE @ rasterio.Affine.translation(shift, shift // 2)
        write_scene(tmp_path / "in" / f"{name}.tif", made, transform=moved)
    worth = find_worth_labelling(str(predict(tmp_path / "in", tmp_path / "out", bundle)), Wanted(top=30, chip=64))
    assert len({one.scene.id for one in worth.squares}) == 2
    for one, other in itertools.combinations(worth.squares, 2):
        assert not one.outline.intersects(other.outline)
    by_name = {name: [one for one in worth.squares if one.scene.id == name] for name in ("one", "other")}
    alone = find_worth_labelling(
        str(predict(tmp_path / "in" / "other.tif", tmp_path / "alone", bundle)), Wanted(top=30, chip=64)
    )
    assert len(by_name["other"]) < len(alone.squares)


def test_squares_of_metres_show_as_much_ground_in_every_scene(bundle: Path, tmp_path: Path) -> None:
    for name, factor in (("fine", 0.5), ("coarse", 1.0)):
        made = synthetic_image(int(300 / factor), int(400 / factor), seed=1).pixels_bhw
        moved = AFFINE @ rasterio.Affine.translation(0 if name == "fine" else 900, 0) @ rasterio.Affine.scale(factor)
        write_scene(tmp_path / "in" / f"{name}.tif", made, transform=moved)
    worth = find_worth_labelling(
        str(predict(tmp_path / "in", tmp_path / "out", bundle)), Wanted(top=4, chip_m=48.0, scene_share=0.5)
    )
    sides = {(one.scene.id, one.square.window.width) for one in worth.squares}
    assert sides == {("fine", 160), ("coarse", 80)}
    with_gaps = find_worth_labelling(str(tmp_path / "out"), Wanted(top=4, chip_m=12.0))
    assert with_gaps.exit_code == 0
    none = find_worth_labelling(str(tmp_path / "out"), Wanted(top=4, chip_m=8.0))
    assert none.exit_code == 1
    assert "14 pixels of 0.6 m" in none.remarks[0]


def test_the_table_is_geoparquet_that_others_read(out: Path, scenes: Path, tmp_path: Path) -> None:
    duckdb = pytest.importorskip("duckdb")
    to = tmp_path / "list.parquet"
    worth = list_worth_labelling(str(out), FEW, to=str(to))
    frame = geopandas.read_parquet(to)
    assert frame.crs.to_epsg() == 4326
    assert [*frame["rank"]] == [*range(1, 9)]
    assert [tuple(row) for row in frame[["scene", *NAMES]].itertuples(index=False)] == told(worth)
    assert frame["score"].is_monotonic_decreasing
    for row in frame.itertuples():
        unsure, mask = layers(out / row.scene)
        part = slice(row.row_off, row.row_off + row.height), slice(row.col_off, row.col_off + row.width)
        seen = unsure[part] != 255
        assert row.score == pytest.approx(unsure[part][seen].mean() / 254)
        assert row.share_valid == pytest.approx(seen.mean())
        shares = [np.mean(mask[part][seen] == value) for value in range(3)]
        assert [row.share_of_background, row.share_of_building, row.share_of_road] == pytest.approx(shares)
        assert row.source == str(scenes / f"{row.scene}.tif")
        assert json.loads(store.read(row.item))["id"] == row.scene
        with rasterio.open(row.source) as dataset:
            window = rasterio.windows.Window(*(getattr(row, name) for name in NAMES))
            bounds = rasterio.windows.bounds(window, dataset.transform)
        box = geopandas.GeoSeries.from_wkt([row.geometry.wkt], crs=4326).to_crs(25832)
        np.testing.assert_allclose(box.total_bounds, bounds, atol=0.05)
    geo = json.loads(pq.read_metadata(to).metadata[b"geo"])
    assert (geo["version"], geo["columns"]["geometry"]["covering"]["bbox"]["xmin"]) == ("1.1.0", ["bbox", "xmin"])
    west = float(frame.geometry.total_bounds[0])
    ((found,),) = duckdb.sql(f"select count(*) from '{to}' where bbox.xmin >= {west}").fetchall()  # noqa: S608 - a number
    assert found == 8
    again = tmp_path / "again.parquet"
    list_worth_labelling(str(out), FEW, to=str(again))
    assert again.read_bytes() == to.read_bytes(), "done twice, done once"


def test_the_picture_shows_image_mask_and_uncertainty(out: Path, scenes: Path, tmp_path: Path) -> None:
    worth = list_worth_labelling(
        str(out), Wanted(top=2, chip=256), to=str(tmp_path / "l.parquet"), picture=str(tmp_path / "p.png")
    )
    assert not worth.remarks
    first = worth.squares[0]
    with rasterio.open(scenes / f"{first.scene.id}.tif") as dataset:
        shown = dataset.read(window=rasterio.windows.Window(*(getattr(first.square.window, name) for name in NAMES)))
    drawn = np.asarray(Image.open(tmp_path / "p.png").convert("RGB"))
    image = shown.transpose(1, 2, 0)
    assert image.shape[:2] == (256, 256)
    top = next(
        row for row in range(drawn.shape[0] - 256) if (drawn[row : row + 256, 12 : 12 + 256] == image).mean() > 0.7
    )
    unsure, _ = layers(out / first.scene.id)
    window = first.square.window
    unsure = unsure[window.row_off : window.row_end, window.col_off : window.col_end]
    brightness = drawn[top : top + 256, 12 + 2 * 268 : 12 + 2 * 268 + 256].sum(2)
    known = unsure != 255
    assert np.corrcoef(brightness[known], unsure[known])[0, 1] > 0.9
    list_worth_labelling(str(out), Wanted(top=2), to=str(tmp_path / "l.parquet"), picture=str(tmp_path / "p.jpg"))
    assert Image.open(tmp_path / "p.jpg").format == "JPEG"


def test_an_image_that_is_gone_or_changed_is_not_shown_and_told(bundle: Path, tmp_path: Path) -> None:
    for name in ("changed", "gone"):
        made = synthetic_image(100, 140, seed=1 + len(name)).pixels_bhw
        moved = AFFINE @ rasterio.Affine.translation(40 * len(name), 0)
        write_scene(tmp_path / "in" / f"{name}.tif", made, transform=moved)
    predict(tmp_path / "in", tmp_path / "out", bundle)
    (tmp_path / "in" / "gone.tif").unlink()
    write_scene(tmp_path / "in" / "changed.tif", synthetic_image(100, 140, seed=9).pixels_bhw)
    one_of_each = Wanted(top=2, chip=64, scene_share=0.5)
    worth = list_worth_labelling(
        str(tmp_path / "out"), one_of_each, to=str(tmp_path / "l.parquet"), picture=str(tmp_path / "p.png")
    )
    assert worth.exit_code == 0
    assert {"was replaced since" in one or "no such file" in one for one in worth.remarks} == {True}
    assert any("gone" in one for one in worth.remarks)
    assert any("changed: its image was replaced" in one for one in worth.remarks)


def test_scenes_without_a_layer_or_with_another_kind_are_left_out_and_told(
    out: Path, scenes: Path, bundle: Path, tmp_path: Path
) -> None:
    predict(scenes / "a.tif", tmp_path, bundle, uncertainty=None)
    with pytest.raises(
        NothingReadableError, match="no scene has a layer of uncertainty; predict them with --uncertainty"
    ):
        find_worth_labelling(str(tmp_path), FEW)
    predict(scenes / "b.tif", tmp_path, bundle, uncertainty="margin")
    predict(scenes / "c.tif", tmp_path, bundle)
    worth = find_worth_labelling(str(tmp_path), FEW)
    assert {one.scene.id for one in worth.squares} == {"c"}
    assert worth.remarks[0].startswith("left out, since they have no layer of uncertainty: a; predict them with")
    assert worth.remarks[1] == "left out, since their uncertainty is not the entropy, as that of most: b"
    assert worth.exit_code == 0


def test_a_scene_that_cannot_be_read_is_told_and_the_others_are_listed(
    scenes: Path, bundle: Path, tmp_path: Path
) -> None:
    predict(scenes, tmp_path, bundle)
    (damaged,) = (tmp_path / "a").glob("uncertainty-*.tif")
    damaged.write_bytes(b"MM")
    (tmp_path / "b" / "item.json").write_text('{"assets": {"uncertainty": {}}}')
    worth = find_worth_labelling(str(tmp_path), FEW)
    assert {one.scene.id for one in worth.squares} == {"c"}
    assert worth.exit_code == 1
    assert sorted(one[:2] for one in worth.remarks[:-1]) == ["a:", "b:"]


def test_a_mask_of_other_pixels_than_its_uncertainty_is_refused(scenes: Path, bundle: Path, tmp_path: Path) -> None:
    predict(scenes / "a.tif", tmp_path, bundle)
    (mask,) = (tmp_path / "a").glob("mask-*.tif")
    write_layer(mask, np.zeros((330, 520), np.uint8))
    with pytest.raises(NothingReadableError, match=r"is not the mask of its uncertainty; geoseg verify tells more"):
        find_worth_labelling(str(tmp_path), FEW)


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        ({"top": 0}, "--top must be 1 to 10000, got 0"),
        ({"chip": 15}, "--chip must be 16 to 2048, got 15"),
        ({"chip": 33}, "--chip must be even"),
        ({"chip_m": -1.0}, "--chip-m must be metres, more than 0"),
        ({"spacing": -1}, "--spacing must be 0 to 2048"),
        ({"scene_share": 1.5}, "--scene-share must be 0 to 1"),
        ({"min_valid": math.nan}, "--min-valid must be 0 to 1"),
    ],
)
def test_a_wish_without_sense_is_refused(wanted: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Wanted(**wanted)


@pytest.mark.parametrize(
    ("top", "share", "num", "most"), [(50, 0.2, 1, 50), (50, 0.2, 4, 13), (50, 0.2, 99, 10), (3, 0, 9, 1)]
)
def test_a_scene_gives_its_share_or_an_even_one(top: int, share: float, num: int, most: int) -> None:
    assert Wanted(top=top, scene_share=share).most_per_scene(num) == most


def test_names_that_do_not_fit_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ends in \.parquet"):
        list_worth_labelling(str(tmp_path), FEW, to="list.csv")
    with pytest.raises(ConfigError, match=r"ends in \.jpg or \.png"):
        list_worth_labelling(str(tmp_path), FEW, to="list.parquet", picture="p.gif")
    with pytest.raises(NothingReadableError, match="nothing is published there"):
        list_worth_labelling(str(tmp_path), FEW, to="list.parquet")


def test_too_few_valid_pixels_everywhere_is_a_sentence(out: Path) -> None:
    with pytest.raises(NothingReadableError, match="no square has 100% of its pixels valid; take a smaller --chip"):
        find_worth_labelling(str(out), Wanted(chip=1024, min_valid=1.0))


def test_the_command(out: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(
        main, ["worth-labelling", str(out), "--to", str(tmp_path / "l.parquet"), "--top", "3", "--chip", "64"]
    )
    assert done.exit_code == 0, done.output
    assert done.output.splitlines()[0] == "3 squares from 3 of 3 scenes, by mean entropy"
    assert done.output.splitlines()[1].split()[0] == "1"
    assert len(geopandas.read_parquet(tmp_path / "l.parquet")) == 3
    program = (
        "import sys\nfrom geoseg.evaluate.worth_labelling import Wanted, list_worth_labelling\n"
        f"list_worth_labelling({str(out)!r}, Wanted(), to={str(tmp_path / 'm.parquet')!r})\n"
        "assert 'pyogrio' not in sys.modules, 'its GDAL and rasterio must not meet in one process'"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    bad = CliRunner().invoke(main, ["worth-labelling", str(out), "--to", "l.csv"])
    assert bad.exit_code == 2


@pytest.mark.bucket
def test_in_a_bucket(scenes: Path, bundle: Path, out: Path, bucket: str) -> None:
    report = geoseg.predict(
        str(scenes), f"s3://{bucket}/out", bundle=str(bundle), engine="local", uncertainty="entropy", window=512
    )
    assert report.exit_code == 0
    to = f"s3://{bucket}/lists/list.parquet"
    worth = list_worth_labelling(f"s3://{bucket}/out", FEW, to=to, picture=f"s3://{bucket}/lists/list.jpg")
    assert told(worth) == told(find_worth_labelling(str(out), FEW))
    assert {info.uri for info in store.walk(f"s3://{bucket}/lists")} == {to, f"s3://{bucket}/lists/list.jpg"}
