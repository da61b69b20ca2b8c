"""Labels of a scene: each pixel's code, from rasters and vectors, at any resolution, in any window."""

from __future__ import annotations

import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import rasterio
import shapely
from kit.data import data_folder
from kit.scenes import AT_UTM, ROTATED, SOUTH_UP, UTM, noise, write_scene
from kit.vectors import FORMATS, write_vectors
from pydantic import ValidationError
from rasterio.features import rasterize
from rasterio.transform import Affine

import geoseg.train.labels as labels_module
from geoseg.config import check
from geoseg.errors import ConfigError, LabelError, SceneError
from geoseg.raster import store
from geoseg.raster.geotiff import ReadOptions, describe
from geoseg.raster.scene import Scene, SceneRef
from geoseg.raster.window import Window
from geoseg.raster.work import WorkGrid, work_grid
from geoseg.train.codes import UNLABELLED, LabelCodes
from geoseg.train.labels import LabelConfig, SceneLabels, find_labels, labelled_classes

CLASSES = ("background", "building", "road")
BACKGROUND, BUILDING, ROAD = range(3)
CODES = LabelCodes.for_sources(3, [(1,), (2,), (1, 2)])
NO_BUILDING, NO_ROAD = CODES.background_of((BUILDING,)), CODES.background_of((ROAD,))
SHAPE = (97, 131)
RASTER = {"uri": "{folder}/{stem}_classes.tif", "values": {"building": [1], "road": [2]}, "unlabelled": [255]}


def config(**values: Any) -> LabelConfig:
    return check(LabelConfig, values, where="labels")


def find(scene: Scene, *configs: dict[str, Any]) -> SceneLabels:
    """The labels, by way of a pickle: they travel."""
    found = find_labels([config(**one) for one in configs], scene, CLASSES, CODES)
    return pickle.loads(pickle.dumps(found))  # noqa: S301


def make_scene(folder: Path, *, transform: Affine = AT_UTM, shape: tuple[int, int] = SHAPE, crs: str = UTM) -> Scene:
    path = write_scene(folder / "scene.tif", noise(1, *shape), transform=transform, crs=crs)
    return describe(SceneRef("scene", str(path)), ReadOptions())


def write_labels(folder: Path, codes: npt.NDArray[Any], *, name: str = "scene_classes.tif", **profile: Any) -> Path:
    profile = {"tiled": True, "blockxsize": 32, "blockysize": 32, "compress": "deflate", **profile}
    return write_scene(folder / name, codes[None], **profile)


def patches(
    shape: tuple[int, int] = SHAPE, values: tuple[int, ...] = (0, 1, 2, 255), seed: int = 0
) -> npt.NDArray[np.uint8]:
    """Random blobs of some pixels each."""
    rng = np.random.default_rng(seed)
    small = rng.choice(np.array(values, np.uint8), (shape[0] // 5 + 1, shape[1] // 3 + 1))
    return np.kron(small, np.ones((5, 3), np.uint8))[: shape[0], : shape[1]]


def whole(labels: SceneLabels, work: WorkGrid) -> npt.NDArray[np.uint8]:
    return labels.read(work, Window(0, 0, work.work_shape[1], work.work_shape[0]))


def polygons(transform: Affine, num: int = 40, seed: int = 1) -> list[Any]:
    """Quadrangles in the pixels of a scene, turned, on places that are whole multiples of 1/16 pixel; in its CRS."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(num):
        centre, size, turn = rng.uniform(0, SHAPE[::-1]), rng.uniform(3, 12), rng.uniform(0, 3)
        corners = centre + size * np.array([[np.cos(turn + a), np.sin(turn + a)] for a in (0, 1.5, 3.1, 4.8)])
        found.append(shapely.Polygon([transform @ tuple(corner) for corner in np.round(corners * 16) / 16]))
    return found


def area_majority(codes: npt.NDArray[np.uint8], out_shape: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """Shares of area counted on a grid so fine that both kinds of pixels are whole numbers of it."""
    rows, cols = (np.repeat(np.arange(n), m) for n, m in zip(codes.shape, out_shape, strict=True))
    fine = codes[rows[:, None], cols]  # out * in by out * in
    blocks = fine.reshape(out_shape[0], codes.shape[0], out_shape[1], codes.shape[1])
    shares = np.stack([(blocks == code).sum(axis=(1, 3)) for code in (0, 1, 2, 255)])
    best = 2 - np.argmax(shares[2::-1], axis=0)
    return np.where(2 * shares[3] > shares.sum(0), 255, best).astype(np.uint8)


@pytest.mark.parametrize("transform", [AT_UTM, ROTATED, SOUTH_UP], ids=["north up", "rotated", "south up"])
@pytest.mark.parametrize("suffix", FORMATS)
def test_polygons_lie_where_rasterio_puts_them(suffix: str, transform: Affine, tmp_path: Path) -> None:
    scene = make_scene(tmp_path, transform=transform)
    write_vectors(tmp_path / f"houses{suffix}", polygons(transform), crs=UTM)
    labels = find(scene, {"uri": f"{{folder}}/houses{suffix}", "class": "building"})
    inside = rasterize(polygons(transform), out_shape=SHAPE, transform=transform) != 0
    assert 0.1 < inside.mean() < 0.9
    found = whole(labels, work_grid(scene.levels, 1))
    # A corner comes back from the CRS a billionth of a pixel off, so a centre on an edge may fall to either side.
    assert ((found == BUILDING) != inside).sum() <= 2
    assert set(np.unique(found)) == {BUILDING, NO_BUILDING}


@pytest.mark.parametrize("factor", [2, 4, 2.7, 1.3])
def test_a_coarse_pixel_has_the_class_of_the_greatest_share_of_its_area(factor: float, tmp_path: Path) -> None:
    shape = (36, 41)
    scene = make_scene(tmp_path, shape=shape)
    write_labels(tmp_path, patches(shape))
    work = work_grid(scene.levels, factor)
    expected = area_majority(patches(shape), work.work_shape)
    assert len(np.unique(expected)) == 4
    assert np.array_equal(whole(find(scene, RASTER), work), expected)


def test_a_label_raster_of_another_pixel_size_is_read_over_the_same_ground(tmp_path: Path) -> None:
    scene = make_scene(tmp_path, shape=(30, 40))
    half = patches((15, 20))
    write_labels(tmp_path, half, transform=AT_UTM @ Affine.scale(2))
    native = work_grid(scene.levels, 1)
    assert np.array_equal(whole(find(scene, RASTER), native), np.kron(half, np.ones((2, 2), np.uint8)))
    assert np.array_equal(whole(find(scene, RASTER), work_grid(scene.levels, 2)), half)


@pytest.mark.parametrize("factor", [1, 2.7, 0.6, 9])
def test_a_window_holds_what_the_whole_holds_there(
    factor: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = make_scene(tmp_path)
    write_labels(tmp_path, patches())
    write_vectors(tmp_path / "houses.geojson", polygons(AT_UTM), crs=UTM)
    work = work_grid(scene.levels, factor)
    rng = np.random.default_rng(3)
    for source in (RASTER, {"uri": "{folder}/houses.geojson", "class": "building"}):
        labels = find(scene, source)
        expected = np.pad(whole(labels, work), 200, constant_values=UNLABELLED)
        monkeypatch.setattr("geoseg.train.labels._STRIP_PX", 500)
        for _ in range(20):
            col, row = rng.integers(-20, work.work_shape[1] + 5), rng.integers(-20, work.work_shape[0] + 5)
            window = Window(int(col), int(row), int(rng.integers(1, 60)), int(rng.integers(1, 60)))
            part = expected[200 + row : 200 + window.row_end, 200 + col : 200 + window.col_end]
            assert np.array_equal(labels.read(work, window), part)
        monkeypatch.undo()


def test_numbers_of_buildings_do_not_depend_on_the_window(tmp_path: Path) -> None:
    scene = make_scene(tmp_path)
    write_vectors(tmp_path / "houses.geojson", polygons(AT_UTM), crs=UTM)
    labels = find(scene, {"uri": "{folder}/houses.geojson", "class": "building"})
    work = work_grid(scene.levels, 1)
    all_of_them = labels.read_instances(work, Window(0, 0, *SHAPE[::-1]), BUILDING)
    numbered = rasterize(zip(polygons(AT_UTM), range(1, 41), strict=True), out_shape=SHAPE, transform=AT_UTM)
    assert (all_of_them != numbered).sum() <= 2
    part = labels.read_instances(work, Window(-3, 20, 50, 40), BUILDING)
    assert np.array_equal(part[:, 3:], all_of_them[20:60, :47])
    assert not part[:, :3].any()
    assert not labels.read_instances(work, Window(0, 0, *SHAPE[::-1]), ROAD).any()


def test_buildings_of_a_raster_are_its_connected_pieces_and_give_way_to_roads(tmp_path: Path) -> None:
    codes = np.zeros(SHAPE, np.uint8)
    codes[5:15, 5:15] = codes[30:40, 5:15] = 1
    scene = make_scene(tmp_path)
    write_labels(tmp_path, codes)
    road = shapely.LineString([AT_UTM @ (0, 10), AT_UTM @ (200, 10)])
    write_vectors(tmp_path / "roads.geojson", [road], crs=UTM)
    labels = find(scene, RASTER, {"uri": "{folder}/roads.geojson", "class": "road", "width_m": 2})
    pieces = labels.read_instances(work_grid(scene.levels, 1), Window(0, 0, *SHAPE[::-1]), BUILDING)
    assert set(np.unique(pieces)) == {0, 1, 2}
    assert (pieces[7, 7], pieces[10, 7], pieces[35, 7]) == (1, 0, 2)


def test_values_that_are_not_named_are_background_and_unlabelled_ones_are_not(tmp_path: Path) -> None:
    scene = make_scene(tmp_path)
    write_labels(tmp_path, patches(values=(0, 1, 2, 7, 9, 255)))
    found = whole(find(scene, {**RASTER, "unlabelled": [255, 9]}), work_grid(scene.levels, 1))
    wanted = np.array([0, 1, 2, 0, 0, 0, 0, 0, 0, 255] + [0] * 245 + [255])
    assert np.array_equal(found, wanted[patches(values=(0, 1, 2, 7, 9, 255))])


def test_a_class_that_a_source_does_not_label_stays_open(tmp_path: Path) -> None:
    scene = make_scene(tmp_path)
    write_labels(tmp_path, patches(values=(0, 255)))
    labels = find(scene, {"uri": "{folder}/scene_classes.tif", "values": {"building": [255]}})
    found = whole(labels, work_grid(scene.levels, 1))
    assert np.array_equal(found, np.where(patches(values=(0, 255)) == 255, BUILDING, NO_BUILDING))
    assert CODES.possible[NO_BUILDING].tolist() == [True, False, True]


def test_later_sources_paint_over_earlier_ones_and_unlabelled_needs_a_class_to_be_known(tmp_path: Path) -> None:
    scene = make_scene(tmp_path, shape=(4, 3))
    houses = np.array([[0, 1, 255]] * 4, np.uint8)
    roads = np.array([[0] * 3, [1] * 3, [255] * 3, [0] * 3], np.uint8)
    write_labels(tmp_path, houses, name="houses.tif")
    write_labels(tmp_path, roads, name="roads.tif")
    sources = [
        {"uri": f"{{folder}}/{name}.tif", "values": {class_name: [1]}, "unlabelled": [255]}
        for name, class_name in (("houses", "building"), ("roads", "road"))
    ]
    found = whole(find(scene, *sources), work_grid(scene.levels, 1))
    assert found.tolist() == [
        [BACKGROUND, BUILDING, UNLABELLED],
        [ROAD, ROAD, ROAD],
        [UNLABELLED, BUILDING, UNLABELLED],
        [BACKGROUND, BUILDING, UNLABELLED],
    ]
    other_way = whole(find(scene, *reversed(sources)), work_grid(scene.levels, 1))
    assert other_way[1].tolist() == [ROAD, BUILDING, ROAD]


def test_outside_the_area_nothing_is_known(tmp_path: Path) -> None:
    scene = make_scene(tmp_path)
    write_labels(tmp_path, patches(values=(0, 1)))
    write_vectors(tmp_path / "houses.geojson", polygons(AT_UTM), crs=UTM)
    square = shapely.Polygon([AT_UTM @ corner for corner in ((20, 10), (60, 10), (60, 50), (20, 50))])
    write_vectors(tmp_path / "labelled.gpkg", [square], crs=UTM)
    inside = np.zeros(SHAPE, np.bool_)
    inside[10:50, 20:60] = True
    for source in (RASTER, {"uri": "{folder}/houses.geojson", "class": "building"}):
        found = whole(find(scene, {**source, "area": "{folder}/labelled.gpkg"}), work_grid(scene.levels, 1))
        assert np.array_equal(found != UNLABELLED, inside)
        assert np.array_equal(found[inside], whole(find(scene, source), work_grid(scene.levels, 1))[inside])


def test_a_field_tells_the_class_of_each_feature(tmp_path: Path) -> None:
    scene = make_scene(tmp_path)
    boxes = [
        shapely.Polygon([AT_UTM @ c for c in ((x, 0), (x + 10, 0), (x + 10, 90), (x, 90))]) for x in (0, 20, 40, 60)
    ]
    write_vectors(tmp_path / "all.gpkg", boxes, crs=UTM, kind=["hut", "street", "river", None], level=[1, 2, 3, None])
    for field, values in (("kind", (["hut"], ["street", "lane"])), ("level", ([1], [2]))):
        named = dict(zip(("building", "road"), values, strict=True))
        found = whole(
            find(scene, {"uri": "{folder}/all.gpkg", "class_field": field, "values": named}), work_grid(scene.levels, 1)
        )
        assert found[5, [5, 15, 25, 45, 65]].tolist() == [BUILDING, BACKGROUND, ROAD, BACKGROUND, BACKGROUND]
    with pytest.raises(LabelError, match=r"no feature has one of the values in 'level', they have 1\.0, 2\.0"):
        find(scene, {"uri": "{folder}/all.gpkg", "class_field": "level", "values": {"road": ["2"]}})


@pytest.mark.parametrize("marked", ["by nodata", "by a mask", "by a block left out"])
def test_what_the_file_marks_as_no_data_is_unlabelled(marked: str, tmp_path: Path) -> None:
    scene = make_scene(tmp_path)
    codes, unknown = patches(values=(0, 1)), np.zeros(SHAPE, np.bool_)
    unknown[64:96, 32:64] = True
    if marked == "by a mask":
        write_labels(tmp_path, codes, valid=~unknown)
    else:
        codes[unknown] = 9
        write_labels(tmp_path, codes, nodata=9, sparse_ok=marked == "by a block left out")
    found = whole(find(scene, RASTER), work_grid(scene.levels, 1))
    assert np.array_equal(found == UNLABELLED, unknown)


@pytest.mark.parametrize("valid", [None, np.ones(SHAPE, np.bool_)], ids=["alone", "beside a mask"])
def test_a_nodata_value_of_0_must_be_explained(valid: npt.NDArray[np.bool_] | None, tmp_path: Path) -> None:
    scene = make_scene(tmp_path)
    write_labels(tmp_path, patches(values=(0, 1)), nodata=0, valid=valid)
    with pytest.raises(LabelError, match=r"nodata value is 0, .* unlabelled = \[0\] or values = \{background = \[0\]"):
        find(scene, RASTER)
    for told, code in (
        ({"unlabelled": [0]}, UNLABELLED),
        ({"values": {"building": [1], "road": [2], "background": [0]}}, 0),
    ):
        found = whole(find(scene, {**RASTER, **told}), work_grid(scene.levels, 1))
        assert np.array_equal(found, np.where(patches(values=(0, 1)) == 1, BUILDING, code))


@pytest.mark.parametrize(
    ("profile", "told"),
    [
        (
            {"crs": "EPSG:32634"},
            "its CRS is EPSG:32634, the scene's EPSG:32633; bring it there with gdalwarp -r near -t_srs",
        ),
        (
            {"transform": AT_UTM @ Affine.translation(0.4, 0)},
            r"its first corner is 0\.40 columns and 0\.00 rows off; .*gdalwarp",
        ),
        ({"transform": AT_UTM @ Affine.scale(1.01)}, r"its top right corner is 1\.31 columns"),
    ],
)
def test_a_label_raster_that_lies_elsewhere_is_refused_with_the_remedy(profile, told: str, tmp_path: Path) -> None:
    scene = make_scene(tmp_path)
    write_labels(tmp_path, patches(), **profile)
    with pytest.raises(LabelError, match=rf"^scene: .*scene_classes\.tif: .*{told}"):
        find(scene, RASTER)


def test_a_label_raster_without_a_crs_has_the_scenes(tmp_path: Path) -> None:
    scene = make_scene(tmp_path)
    write_labels(tmp_path, patches(), crs=None)
    assert np.array_equal(whole(find(scene, RASTER), work_grid(scene.levels, 1)), patches())


def test_what_is_missing_or_is_something_else_is_refused(tmp_path: Path) -> None:
    scene = make_scene(tmp_path)
    with pytest.raises(LabelError, match=r"^scene: missing labels: there is no .*scene_classes\.tif"):
        find(scene, RASTER)
    with pytest.raises(LabelError, match=r"^scene: missing labels: there is no .*houses\.gpkg"):
        find(scene, {"uri": "{folder}/houses.gpkg", "class": "building"})
    write_scene(tmp_path / "scene_classes.tif", noise(3, *SHAPE))
    with pytest.raises(LabelError, match="has 3 bands, labels are one"):
        find(scene, RASTER)
    with pytest.raises(LabelError, match="this is a GeoTIFF; a label raster has values"):
        find(scene, {"uri": "{folder}/scene_classes.tif", "class": "building"})
    write_vectors(tmp_path / "houses.geojson", polygons(AT_UTM), crs=UTM)
    with pytest.raises(LabelError, match="a vector file has class = "):
        find(scene, {**RASTER, "uri": "{folder}/houses.geojson"})


def test_a_vector_file_with_nothing_for_the_scene_needs_an_area(tmp_path: Path) -> None:
    scene = make_scene(tmp_path)
    write_vectors(tmp_path / "none.geojson", [], crs=UTM)
    write_vectors(tmp_path / "far.geojson", [shapely.box(0, 0, 9, 9)], crs=UTM)
    all_of_it = shapely.Polygon([AT_UTM @ corner for corner in ((-1, -1), (999, -1), (999, 999), (-1, 999))])
    write_vectors(tmp_path / "labelled.geojson", [all_of_it], crs=UTM)
    for name, told in (("none", "holds no feature; .*area = "), ("far", "lies elsewhere, .*area = ")):
        source = {"uri": f"{{folder}}/{name}.geojson", "class": "building"}
        with pytest.raises(LabelError, match=told):
            find(scene, source)
        labels = find(scene, {**source, "area": "{folder}/labelled.geojson"})
        assert (whole(labels, work_grid(scene.levels, 1)) == NO_BUILDING).all()


def test_classes_are_known_by_name() -> None:
    sources = [
        config(uri="a.tif", values={"road": [1], "background": [0]}),
        config(uri="b.gpkg", **{"class": "building"}),
    ]
    assert labelled_classes(sources, CLASSES) == (BUILDING, ROAD)
    assert labelled_classes(sources[:1], CLASSES) == (ROAD,)
    with pytest.raises(ConfigError, match=r"there is no class 'buildings', the bundle has .*did you mean 'building'"):
        labelled_classes([config(uri="b.gpkg", **{"class": "buildings"})], CLASSES)
    with pytest.raises(ConfigError, match="no class but background"):
        labelled_classes([config(uri="a.tif", values={"background": [0]})], CLASSES)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"uri": "a.tif"}, "say which class it labels"),
        ({"uri": "a.tif", "values": {"road": [1]}, "width_m": 3}, "width_m has no effect on a raster"),
        ({"uri": "a.tif", "values": {"road": ["1"]}}, "values of a raster are numbers"),
        ({"uri": "a.tif", "values": {"road": [1], "building": [1]}}, "a value may stand for one class alone"),
        ({"uri": "a.tif", "values": {"road": [1]}, "unlabelled": [1]}, "a value may stand for one class alone"),
        ({"uri": "a.gpkg", "class": "road", "unlabelled": [1]}, "unlabelled has no effect on a vector file"),
        ({"uri": "a.gpkg", "class": "road", "values": {"road": [1]}}, "class is for a file of one class"),
        ({"uri": "{dir}/a.gpkg", "class": "road"}, r"there is no {dir}, only {folder}, {stem}, {name}"),
        ({"uri": "a.gpkg", "class": "road", "width_m": 0}, "width_m"),
        ({"uri": "a.gpkg", "class": "road", "colour": 0}, "no setting 'colour'"),
    ],
)
def test_a_request_without_sense_is_refused(values: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        config(**values)


def test_a_source_reads_back_as_it_was_written() -> None:
    one = config(uri="a.gpkg", **{"class": "road"}, width_field="width")
    assert LabelConfig.model_validate(one.model_dump()) == one
    with pytest.raises(ValidationError):
        one.uri = "b.gpkg"


def test_the_digest_changes_with_each_file_and_meaning(tmp_path: Path) -> None:
    scene = make_scene(tmp_path)
    write_labels(tmp_path, patches())
    write_vectors(tmp_path / "houses.geojson", polygons(AT_UTM), crs=UTM)
    write_vectors(tmp_path / "area.geojson", polygons(AT_UTM), crs=UTM)
    house = {"uri": "{folder}/houses.geojson", "class": "building", "area": "{folder}/area.geojson"}
    digests = [find(scene, RASTER, house).digest]
    assert find(scene, RASTER, house).digest == digests[0]
    digests += [find(scene, house, RASTER).digest, find(scene, {**RASTER, "unlabelled": [3]}, house).digest]
    for change in (
        lambda: write_labels(tmp_path, patches(seed=1)),
        lambda: write_vectors(tmp_path / "houses.geojson", polygons(AT_UTM, seed=2), crs=UTM),
        lambda: write_vectors(tmp_path / "area.geojson", polygons(AT_UTM, seed=3), crs=UTM),
    ):
        change()
        digests.append(find(scene, RASTER, house).digest)
    assert len(set(digests)) == len(digests)


def test_a_raster_that_was_replaced_is_not_read(tmp_path: Path) -> None:
    scene = make_scene(tmp_path)
    write_labels(tmp_path, patches())
    labels = find(scene, RASTER)
    write_labels(tmp_path, patches(seed=1))
    with pytest.raises(SceneError, match=r"^scene: .*was replaced"):
        whole(labels, work_grid(scene.levels, 1))


def test_labels_are_read_from_anywhere(root: str, tmp_path: Path) -> None:
    make_scene(tmp_path)
    write_labels(tmp_path, patches())
    write_vectors(tmp_path / "houses.gpkg", polygons(AT_UTM), crs=UTM)
    for name in ("scene.tif", "scene_classes.tif", "houses.gpkg"):
        store.write(store.join(root, "in", name), (tmp_path / name).read_bytes())
    scene = describe(SceneRef("scene", store.join(root, "in", "scene.tif")), ReadOptions())
    work = work_grid(scene.levels, 1)
    assert np.array_equal(whole(find(scene, RASTER), work), patches())
    houses = whole(find(scene, {"uri": "{folder}/houses.gpkg", "class": "building"}), work) == BUILDING
    assert (houses != rasterize(polygons(AT_UTM), out_shape=SHAPE, transform=AT_UTM)).sum() <= 2


def test_threads_read_what_one_thread_reads(tmp_path: Path) -> None:
    scene = make_scene(tmp_path)
    write_labels(tmp_path, patches())
    write_vectors(tmp_path / "houses.gpkg", polygons(AT_UTM), crs=UTM)
    labels = find(scene, RASTER, {"uri": "{folder}/houses.gpkg", "class": "building"})
    work = work_grid(scene.levels, 1)
    expected = whole(labels, work)
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda _: whole(labels, work), range(32)):
            assert np.array_equal(found, expected)


def test_shapes_that_were_forgotten_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = make_scene(tmp_path)
    work = work_grid(scene.levels, 1)
    read = []
    place = labels_module.place
    monkeypatch.setattr(labels_module, "_KEPT", labels_module._Kept(500))
    monkeypatch.setattr(
        labels_module, "place", lambda features, *a, **b: read.append(features) or place(features, *a, **b)
    )
    labels = []
    for seed in range(3):  # 40 quadrangles, 600 each
        write_vectors(tmp_path / f"{seed}.geojson", polygons(AT_UTM, seed=seed), crs=UTM)
        labels.append(find(scene, {"uri": f"{{folder}}/{seed}.geojson", "class": "building"}))
    first = [whole(one, work) for one in labels]
    again = [whole(one, work) for one in labels]
    assert len(read) == 9
    assert all(np.array_equal(one, other) for one, other in zip(first, again, strict=True))
    assert np.array_equal(whole(labels[2], work), again[2])
    assert len(read) == 9


def test_real_buildings_lie_where_their_raster_has_them() -> None:
    """OpenStreetMap's outlines of Kampala in degrees, the scene in Web Mercator; their raster was cut to its valid pixels."""
    folder = data_folder() / "hot_buildings"
    scene = describe(SceneRef("kampala", str(folder / "kampala_ug_z20.tif")), ReadOptions())
    with rasterio.open(scene.uri) as dataset:
        valid = dataset.dataset_mask() != 0
    work = work_grid(scene.levels, 1)
    burnt, kept = (
        (whole(find(scene, source), work) == BUILDING) & valid
        for source in (
            {"uri": "{folder}/kampala_ug_osm_buildings.geojson", "class": "building"},
            {"uri": "{folder}/{stem}_buildings.tif", "values": {"building": [255]}},
        )
    )
    assert kept.sum() > 100_000
    assert (burnt & kept).sum() / (burnt | kept).sum() > 0.9999


def test_a_scene_beside_which_labels_lie_names_them(tmp_path: Path) -> None:
    make_scene(tmp_path)
    shutil.move(tmp_path / "scene.tif", tmp_path / "a.b.tif")
    scene = describe(SceneRef("x", str(tmp_path / "a.b.tif")), ReadOptions())
    for uri in ("{folder}/a.b.labels.tif", "{folder}/{stem}.labels.tif", "{folder}/labels/{name}"):
        target = tmp_path / uri.format(folder=".", stem="a.b", name="a.b.tif")
        write_labels(target.parent, patches(), name=target.name)
        assert np.array_equal(whole(find(scene, {**RASTER, "uri": uri}), work_grid(scene.levels, 1)), patches())
