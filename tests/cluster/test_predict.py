"""Ray changes nothing: the objects it publishes are those of the plain loop, whatever the workers."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
from kit import small_pieces
from kit.oracle import digests, published_mask, seeded_bundle, whole_mask, write_scene
from kit.own_ray import own_ray

import geoseg
import geoseg.errors
from geoseg.cluster.rows import pack_pixels, unpack_pixels
from geoseg.predict.bundles import load_bundle
from geoseg.predict.reading import WindowPixels
from geoseg.predict.turns import Turn, take_turns
from geoseg.raster import cog
from geoseg.raster.raster import Raster
from geoseg.raster.scene import SceneRef
from geoseg.raster.synthetic import synthetic_image
from geoseg.raster.versions import Versions

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return seeded_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three scenes of odd sizes, one of them finer than the others, and one that is no GeoTIFF."""
    folder = tmp_path_factory.mktemp("scenes")
    for seed, shape in enumerate([(1500, 1100), (700, 900), (40, 30)]):
        made = synthetic_image(*shape, seed=seed)
        write_scene(folder / f"scene{seed}.tif", made.pixels_bhw, nodata=0)
    (folder / "broken.tif").write_bytes(b"<VRTDataset></VRTDataset>")
    return folder


@pytest.fixture(scope="module")
def local(scenes: Path, bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("local")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cog, "PIECE_BYTES", small_pieces.PIECE_BYTES)
        geoseg.predict(str(scenes), str(out), bundle=str(bundle), engine="local", window=512)
    return digests(out)


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where those that write pieces of files say what they are."""
    return tmp_path_factory.mktemp("notes")


@pytest.fixture(scope="module", autouse=True)
def private_ray(notes: Path) -> Iterator[None]:
    """A Ray of our own for the module; the runs below find it there and use it. Files above 8000 bytes are made in pieces."""
    with own_ray(runtime_env=small_pieces.runtime_env(notes)):
        yield


@pytest.mark.sample("4-actor", "2-tasks")
@pytest.mark.parametrize(("workers", "read"), [(1, "actor"), (2, "actor"), (4, "actor"), (2, "tasks")])
def test_objects_are_those_of_the_plain_loop(
    workers: int, read: str, scenes: Path, bundle: Path, local: dict[str, str], notes: Path, tmp_path: Path
) -> None:
    for note in notes.iterdir():
        note.unlink()
    report = geoseg.predict(
        str(scenes), str(tmp_path), bundle=str(bundle), engine="ray", workers=workers, read=read, window=512
    )
    assert {scene.id: scene.status for scene in report.scenes} == {
        "broken": "refused",
        "scene0": "published",
        "scene1": "published",
        "scene2": "published",
    }
    assert report.exit_code == 1
    assert digests(tmp_path) == local
    assert len(local) == 9
    assert [note.name for note in notes.iterdir()] == ["task"], "the actor that publishes is not to write pieces itself"
    assert not list((tmp_path / "_geoseg").rglob("r*c*")), "the parts of published scenes are removed"


def test_a_coarse_pass_decides_the_same_of_pixels_that_were_read_elsewhere(
    scenes: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cog, "PIECE_BYTES", small_pieces.PIECE_BYTES)
    settings = {"bundle": str(bundle), "window": 512, "coarse": 2, "coarse_threshold": 0.8}
    scene = str(scenes / "scene1.tif")
    geoseg.predict(scene, str(tmp_path / "local"), engine="local", **settings)
    geoseg.predict(scene, str(tmp_path / "ray"), engine="ray", workers=1, read="tasks", **settings)
    assert digests(tmp_path / "ray") == digests(tmp_path / "local") != {}


@pytest.mark.thorough
def test_turns_do_not_matter_to_the_objects(
    scenes: Path, bundle: Path, local: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut: list[Turn] = []

    def take_many(refs: list[SceneRef], versions: Versions) -> list[Turn]:
        cut.extend(take_turns(refs, versions, turn_bytes=1 << 16))
        return cut

    monkeypatch.setattr("geoseg.run.take_turns", take_many)
    geoseg.predict(str(scenes), str(tmp_path), bundle=str(bundle), engine="ray", workers=2, window=512)
    assert max(turn.count for turn in cut) > 1
    assert digests(tmp_path) == local


@pytest.mark.thorough
def test_window_size_does_not_matter_to_the_masks(scenes: Path, bundle: Path, tmp_path: Path) -> None:
    truth = whole_mask(load_bundle(str(bundle)), scenes / "scene0.tif")
    for window in (1024, 2048):
        out = tmp_path / str(window)
        report = geoseg.predict(
            str(scenes / "scene0.tif"), str(out), bundle=str(bundle), engine="ray", workers=2, window=window
        )
        np.testing.assert_array_equal(published_mask(report.scenes[0].mask), truth)


@pytest.mark.slow
@pytest.mark.chaos
def test_a_killed_worker_changes_nothing(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cog, "PIECE_BYTES", small_pieces.PIECE_BYTES)
    made = synthetic_image(4096, 4096, seed=9)
    scene = write_scene(tmp_path / "in" / "scene.tif", made.pixels_bhw, nodata=0)
    geoseg.predict(str(scene), str(tmp_path / "calm"), bundle=str(bundle), engine="local", window=512)
    killed: list[int] = []

    def kill_one() -> None:
        parts = tmp_path / "out" / "_geoseg" / "parts"
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and sum(1 for _ in parts.rglob("r*c*")) < 4:
            time.sleep(0.02)
        for process in Path("/proc").glob("[0-9]*"):
            try:
                words = (process / "cmdline").read_bytes()
                ours = int((process / "status").read_text().split("PPid:")[1].split()[0])
            except (OSError, IndexError):
                continue
            if b"MapWorker" in words and raylet_is_ours(ours):
                os.kill(int(process.name), signal.SIGKILL)
                killed.append(int(process.name))
                return

    def raylet_is_ours(pid: int) -> bool:
        return (
            str(ray._private.worker._global_node.get_session_dir_path()).encode()
            in Path(f"/proc/{pid}/cmdline").read_bytes()
        )

    killer = threading.Thread(target=kill_one)
    killer.start()
    report = geoseg.predict(str(scene), str(tmp_path / "out"), bundle=str(bundle), engine="ray", workers=2, window=512)
    killer.join()
    assert killed, "the test must have killed a worker at work"
    assert report.exit_code == 0, report.scenes
    assert digests(tmp_path / "out") == digests(tmp_path / "calm")


def test_a_denied_output_stops_the_job(scenes: Path, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(geoseg.errors.GeosegError, match="file"):
        geoseg.predict(str(scenes), str(tmp_path / "file"), bundle=str(bundle), engine="ray")


@pytest.mark.parametrize("num", [0, 1, 2], ids=["empty", "full resolution", "a coarse pass too"])
def test_pixels_survive_the_row(num: int) -> None:
    rng = np.random.default_rng(0)
    valid = rng.random((13, 7)) > 0.5
    rasters = [
        Raster(rng.integers(0, 9999, (2, *shape)).astype("uint16"), rng.random(shape) > 0.5)
        for shape in [(21, 15), (9, 11)][:num]
    ]
    around, coarse = [*rasters, None, None][:2]
    back = unpack_pixels(pack_pixels(WindowPixels(around, valid, 12, 0.5, coarse)))
    np.testing.assert_array_equal(back.valid, valid)
    assert (back.bytes_fetched, back.seconds) == (12, 0.5)
    for came, wanted in ((back.around, around), (back.coarse, coarse)):
        if wanted is None:
            assert came is None
        else:
            assert came is not None
            np.testing.assert_array_equal(came.pixels, wanted.pixels)
            np.testing.assert_array_equal(came.valid, wanted.valid)
