"""Reading a scene's windows in the plan's order: each byte comes once, whatever the blocks, and memory stays bounded."""

from __future__ import annotations

import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kit.scenes import tiny_bundle, write_scene

from geoseg.config import load_job
from geoseg.predict.plan import RunSpec, ScenePlan, plan_scene
from geoseg.predict.reading import Task, WindowReader
from geoseg.raster import geotiff, tiff
from geoseg.raster.geotiff import MAX_CACHE_BYTES, SceneReader, cache_bytes, keep_decoded
from geoseg.raster.scene import SceneRef
from geoseg.raster.window import plan_windows
from geoseg.run import make_run_spec, plan_job

MIB = 1 << 20
SLACK = 48 * MIB  # a portion of 32 MiB, encoded and decoded, and a window


@pytest.fixture(autouse=True)
def fresh_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no test see what another one had decoded, nor the room it made."""
    monkeypatch.setattr(geotiff, "_DECODED", geotiff._DecodedBlocks(geotiff._CACHE_BYTES))


def plan_of(path: Path, bundle: str, *, window: int) -> tuple[RunSpec, ScenePlan]:
    values = {"scenes": [str(path)], "out": str(path.parent / "out"), "bundle": bundle, "predict": {"window": window}}
    run = make_run_spec(load_job(None, values))
    return run, plan_scene(SceneRef("scene", str(path)), run)


def tasks_of(plan: ScenePlan) -> list[Task]:
    return [Task(plan, window) for window in plan.windows(SceneReader(plan.scene))]


def ramps(height: int, width: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Pixels (3, row, col) that are quickly made, no two rows alike."""
    rows, cols = np.arange(height, dtype=np.uint32)[:, None], np.arange(width, dtype=np.uint32)[None]
    plane = ((rows * 131 + cols * 7) >> 2).astype(np.uint8)
    return np.stack([plane, plane ^ np.uint8(85), plane + np.uint8(60)])


WIDE: dict[str, tuple[tuple[int, int], int, dict[str, Any]]] = {
    "strips of 1": ((3000, 12_000), 512, {"blockysize": 1}),
    "strips of 16": ((3000, 12_000), 512, {"blockysize": 16}),
    "planes of strips": ((3000, 12_000), 512, {"blockysize": 16, "interleave": "band"}),
    "more than 64 MiB": ((1300, 32_000), 1024, {"blockysize": 16}),
}


@pytest.mark.parametrize("build", WIDE)
def test_each_byte_comes_once(build: str, tmp_path: Path) -> None:
    """A strip is as wide as the image: every window of a row needs all of the row's strips."""
    shape, window, profile = WIDE[build]
    path = write_scene(tmp_path / "scene.tif", ramps(*shape), **profile)
    run, plan = plan_of(path, tiny_bundle(tmp_path / "bundle"), window=window)
    reader = WindowReader(run)
    tracemalloc.start()
    try:
        fetched = sum(reader.read(task).bytes_fetched for task in tasks_of(plan))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert fetched <= 1.02 * path.stat().st_size
    assert fetched >= 0.99 * path.stat().st_size
    assert geotiff._DECODED._held <= cache_bytes(plan.decoded_bytes)
    assert peak < cache_bytes(plan.decoded_bytes) + 2 * SLACK, f"{peak / MIB:.0f} MiB"


def test_a_wide_scene_of_tiles_comes_once_from_room_for_the_edges_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no room for all blocks under a row of windows; those that no later window needs make place for the others."""
    monkeypatch.setattr(geotiff, "_CACHE_BYTES", MIB)
    monkeypatch.setattr(geotiff, "_DECODED", geotiff._DecodedBlocks(MIB))
    tiled = {"tiled": True, "blockxsize": 256, "blockysize": 256}
    path = write_scene(tmp_path / "scene.tif", ramps(2560, 16_384), **tiled)
    run, plan = plan_of(path, tiny_bundle(tmp_path / "bundle"), window=512)
    assert plan.across == 32
    assert plan.decoded_bytes < 40 * MIB < 3 * 16_384 * (512 + 2 * 256)
    reader = WindowReader(run)
    fetched = sum(reader.read(task).bytes_fetched for task in tasks_of(plan))
    assert fetched <= 1.005 * path.stat().st_size


def test_headers_are_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_scene(tmp_path / "scene.tif", ramps(300, 300))
    opened: list[str] = []
    directories = tiff.read_directories

    def noted(*arguments: Any) -> Any:
        opened.append("once")
        return directories(*arguments)

    monkeypatch.setattr(tiff, "read_directories", noted)
    run, plan = plan_of(path, tiny_bundle(tmp_path / "bundle"), window=512)
    WindowReader(run).read(tasks_of(plan)[0])
    assert opened == ["once"]
    write_scene(path, ramps(300, 301))
    _, plan = plan_of(path, tiny_bundle(tmp_path / "bundle"), window=512)
    assert plan.scene.grid.width == 301


@pytest.mark.parametrize("across", [4, 8, 12])
def test_windows_come_in_squares_each_once(across: int) -> None:
    windows = list(plan_windows(4000, 6000, 512, across=across))
    corners = [(window.row_off // 512, window.col_off // 512) for window in windows]
    assert sorted(corners) == [(row, col) for row in range(8) for col in range(12)]
    assert sum(window.width * window.height for window in windows) == 4000 * 6000
    for first in range(0, 96, 16):
        assert len({(row // 4, col // 4) for row, col in corners[first : first + 16]}) == 1


def test_the_plan_tells_of_the_blocks_that_are_kept(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "bundle")
    told = {}
    for width in (1200, 32_000):
        path = write_scene(tmp_path / f"{width}.tif", ramps(1200, width), blockysize=16, compress="deflate", zlevel=1)
        values = {"scenes": [str(path)], "out": str(tmp_path / "out"), "bundle": bundle, "predict": {"window": 1024}}
        told[width] = plan_job(load_job(None, values)).memory_bytes
    assert told[32_000] - told[1200] > 1024 * 32_000 * 3 - geotiff._CACHE_BYTES
    assert cache_bytes(1) == geotiff._CACHE_BYTES
    assert cache_bytes(1 << 40) == MAX_CACHE_BYTES
    keep_decoded(1 << 40)
    keep_decoded(1)
    assert geotiff._DECODED._max_bytes == MAX_CACHE_BYTES, "another scene of the process may still need it"


@pytest.mark.parametrize(
    "profile", [{"tiled": True, "blockxsize": 256, "blockysize": 256}, {"blockysize": 16}], ids=str
)
def test_four_threads_fetch_each_byte_once(profile: dict[str, Any], tmp_path: Path) -> None:
    """And tell of each byte once, though they count at the same time."""
    pixels = np.random.default_rng(0).integers(0, 256, (3, 2600, 2600), dtype=np.uint8)
    path = write_scene(tmp_path / "scene.tif", pixels, **profile)
    run, plan = plan_of(path, tiny_bundle(tmp_path / "bundle"), window=512)
    reader = WindowReader(run)
    tasks = tasks_of(plan)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(reader.read, tasks))
    fetched = sum(one.bytes_fetched for one in found)
    assert 0.99 * path.stat().st_size <= fetched <= 1.02 * path.stat().st_size
    for task, one in zip(tasks, found, strict=True):
        window = task.window
        assert one.around is not None
        margin = plan.stitching.margin
        core = one.around.pixels[:, margin : margin + window.height, margin : margin + window.width]
        want = pixels[:, window.row_off : window.row_end, window.col_off : window.col_end]
        np.testing.assert_array_equal(core, want)
