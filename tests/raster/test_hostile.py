"""Hostile files: each is refused in one sentence; no other file is read, nobody is called, memory stays bounded."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import rasterio
from kit import hostile
from kit.hostile import Listener, listener
from kit.scenes import AT_UTM, noise, tiny_bundle, write_scene

from geoseg.config import load_job
from geoseg.errors import ConfigError, NotGeoTiffError, NothingReadableError, SceneReadError, SceneTooCostlyError
from geoseg.raster.geotiff import ReadOptions, SceneReader, describe
from geoseg.raster.scene import SceneRef, list_scenes
from geoseg.raster.window import Window
from geoseg.run import check_job

TESTS = Path(hostile.__file__).parents[1]
NUM_MUTANTS = 300
ROOM_MIB = 128

BOMBS: dict[str, tuple[Callable[[Path], Path], type[Exception], str]] = {
    "one block of 32768 x 32768": (hostile.block_bomb, SceneTooCostlyError, "rewrite it with gdal_translate -of COG"),
    "an overview of one such block": (hostile.overview_bomb, SceneTooCostlyError, "rewrite it with gdal_translate"),
    "fields that share their bytes": (hostile.field_bomb, SceneTooCostlyError, "claim more"),
    "a hundred thousand directories": (hostile.many_directories, SceneTooCostlyError, "more than 64 images"),
    "directories in a loop": (hostile.looping, SceneReadError, "its directories loop"),
    "2 000 000 000 pixels a side": (hostile.giant, SceneReadError, "the block index is damaged"),
}


@pytest.fixture
def caller() -> Iterator[Listener]:
    """Count the connections that are made to it."""
    with listener() as one:
        yield one


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """Lay a raster that no test names: its bytes must not be read."""
    path = write_scene(tmp_path / "canary" / "canary.tif", np.full((1, 64, 64), 77, np.uint8))
    os.utime(path, (0, path.stat().st_mtime))
    return path


def assert_untouched(canary: Path) -> None:
    assert canary.stat().st_atime == 0, "the canary was read"


def sentence_of(path: Path, kind: type[Exception]) -> str:
    with pytest.raises(kind) as caught:
        describe(SceneRef("scene-1", str(path)), ReadOptions())
    assert type(caught.value) is kind
    sentence = str(caught.value)
    assert sentence.startswith("scene-1: ")
    assert "\n" not in sentence
    return sentence


def test_a_description_called_tif_is_refused_and_not_followed(tmp_path: Path, canary: Path, caller: Listener) -> None:
    for name, path in hostile.disguises(tmp_path, canary=canary, url=f"http://{caller.host}").items():
        what = "a GDAL VRT, which may read other files" if "vrt" in name else "a text file"
        assert f"{what}" in sentence_of(path, NotGeoTiffError), name
    assert caller.requests == 0
    assert_untouched(canary)


@pytest.mark.parametrize("name", hostile.HOSTILE_NAMES)
def test_a_name_is_a_path_or_a_uri_and_never_a_connection_string(name: str, canary: Path, caller: Listener) -> None:
    with pytest.raises((ConfigError, NothingReadableError)) as caught:
        list_scenes([name.format(canary=canary, host=caller.host)])
    assert "\n" not in str(caught.value)
    assert caller.requests == 0
    assert_untouched(canary)


def test_files_beside_a_scene_have_no_say(tmp_path: Path, canary: Path, caller: Listener) -> None:
    """Overviews, world files and metadata beside a GeoTIFF are what GDAL would read; geoseg does as if they were not."""
    pixels = noise(3, 64, 64)
    scene = write_scene(tmp_path / "scene.tif", pixels)
    beside = {
        ".tif.ovr": hostile.vrt_of(f"/vsicurl/http://{caller.host}/x.tif"),
        ".tif.msk": hostile.vrt_of(str(canary)),
        ".tfw": b"7\n0\n0\n-7\n1000000\n2000000\n",
        ".tif.aux.xml": b"<PAMDataset><SRS>EPSG:3857</SRS><GeoTransform>1,7,0,2,0,-7</GeoTransform>"
        b'<PAMRasterBand band="1"><NoDataValue>77</NoDataValue></PAMRasterBand></PAMDataset>',
        ".tab": b'!table\n!version 300\nDefinition Table\n  File "scene.tif"\n  Type "RASTER"\n',
        ".IMD": b"version = 1;\n",
    }
    for suffix, body in beside.items():
        scene.with_name("scene" + suffix).write_bytes(body)
    assert "allow it with --sidecar-mask" in sentence_of(scene, SceneReadError)
    scene.with_name("scene.tif.msk").unlink()
    found = describe(SceneRef("scene-1", str(scene)), ReadOptions())
    assert found.grid.affine == AT_UTM
    assert found.grid.crs.to_epsg() == 32633
    assert found.nodata == (None, None, None)
    assert len(found.levels) == 1
    np.testing.assert_array_equal(SceneReader(found).read(Window(0, 0, 64, 64), (0, 1, 2)).pixels, pixels)
    assert caller.requests == 0
    assert_untouched(canary)


def test_a_mask_beside_a_scene_is_no_way_to_another_file(tmp_path: Path, canary: Path) -> None:
    scene = write_scene(tmp_path / "scene.tif", noise(3, 64, 64))
    scene.with_name("scene.tif.msk").write_bytes(hostile.vrt_of(str(canary)))
    found = describe(SceneRef("scene-1", str(scene)), ReadOptions(sidecar_mask=True))
    with pytest.raises(SceneReadError, match="a GDAL VRT"):
        SceneReader(found)
    assert_untouched(canary)


def test_a_world_file_places_no_scene(tmp_path: Path) -> None:
    """Under GDAL's defaults the scene below would lie where the file beside it says."""
    plain = write_scene(tmp_path / "scene.tif", noise(1, 16, 16))
    data = bytearray(plain.read_bytes())
    places, _ = hostile.fields(data, hostile.first_directory(data))
    for tag in (33550, 33922):  # ModelPixelScale and ModelTiepoint become private fields that nobody knows
        at = places[tag].entry_at
        data[at : at + 2] = (65000 + tag % 100).to_bytes(2, "little")
    plain.write_bytes(data)
    plain.with_suffix(".tfw").write_bytes(b"7\n0\n0\n-7\n1000000\n2000000\n")
    with pytest.raises(Exception, match="it has no geotransform"):
        describe(SceneRef("scene-1", str(plain)), ReadOptions())


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_by_its_header(name: str, tmp_path: Path) -> None:
    make, kind, remedy = BOMBS[name]
    path = make(tmp_path / "bomb.tif")
    assert path.stat().st_size < 8 << 20, "a bomb is small"
    assert remedy in sentence_of(path, kind)


def test_no_bomb_takes_memory(tmp_path: Path) -> None:
    """All of them in one child: the most memory it ever held stays near what it held before."""
    for name, (make, _, _) in BOMBS.items():
        make(tmp_path / f"{name.replace(' ', '-')}.tif")
    hostile.shared_blocks(tmp_path / "shared.tif")
    done = run_child(
        "import sys; from pathlib import Path; from kit.hostile import outcome, peak_mib\n"
        "print(peak_mib())\n"
        "for path in sorted(Path(sys.argv[1]).glob('*.tif')): print(outcome(path))\n"
        "print(peak_mib())",
        str(tmp_path),
    )
    before_mib, *outcomes, peak_mib = done.stdout.splitlines()
    assert len(outcomes) == len(BOMBS) + 1, done.stderr
    # Fields are fetched until the sum of their claims passes its limit of 256 MiB.
    assert int(peak_mib) - int(before_mib) < ROOM_MIB + 256


def test_blocks_that_share_their_bytes_cost_what_is_read(tmp_path: Path) -> None:
    """A file of 131 kB may declare 65536 x 65536 pixels: a window of it costs a window."""
    path = hostile.shared_blocks(tmp_path / "shared.tif")
    assert path.stat().st_size < 200_000
    scene = describe(SceneRef("scene-1", str(path)), ReadOptions())
    assert scene.levels == ((65536, 65536),)
    reader = SceneReader(scene)
    assert (reader.read(Window(40_000, 60_000, 512, 512), (0,)).pixels == 7).all()
    assert reader.bytes_fetched < 1 << 20


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    sound = write_scene(
        tmp_path / "sound.tif", noise(3, 70, 53), tiled=True, blockxsize=16, blockysize=16, compress="deflate"
    ).read_bytes()
    path = tmp_path / "cut.tif"
    for size in sorted({0, 1, 4, 7, 8, 9, 15, 16, 17, *range(20, len(sound), len(sound) // 50), len(sound) - 1}):
        path.write_bytes(sound[:size])
        kind = NotGeoTiffError if size < 8 else SceneReadError
        told = sentence_of(path, kind)
        assert f"the file has {size} bytes" in told or "the file is cut short or damaged" in told, size


def test_mutants_are_read_or_refused(tmp_path: Path) -> None:
    """Seeded bit flips, holes, cuts and splices, in a child: no crash, no hang, and no error but those of a scene."""
    done = run_child(
        "import sys; from pathlib import Path; from kit.hostile import main; main(Path(sys.argv[1]), 0, int(sys.argv[2]))",
        str(tmp_path),
        str(NUM_MUTANTS),
    )
    before_mib, *told_of = done.stdout.splitlines()
    lines = [line.split("\t") for line in told_of]
    assert len(lines) == NUM_MUTANTS, f"the child ended at seed {len(lines)}: {done.stderr[-2000:]}"
    assert done.returncode == 0
    refusals = ("GeoreferenceError: ", "SceneReadError: ", "NotGeoTiffError: ", "SceneTooCostlyError: ")
    for seed, peak_mib, told in lines:
        outcome = told[1:-1]
        assert outcome == "ok" or outcome.startswith(tuple(f"{kind}mutant: " for kind in refusals)), (seed, outcome)
        assert "\\n" not in outcome, (seed, outcome)
        assert int(peak_mib) - int(before_mib) < ROOM_MIB, (seed, outcome)
    sound = [told for _, _, told in lines if told == "'ok'"]
    assert 0.2 < len(sound) / NUM_MUTANTS < 0.8, "the mutations should hit, and not always"


def test_the_same_damaged_file_gets_the_same_sentence(tmp_path: Path) -> None:
    """A sentence names the scene and the place, no temporary name: it can be compared, grouped and searched for."""
    path = write_scene(
        tmp_path / "hole.tif", noise(1, 64, 64), tiled=True, blockxsize=32, blockysize=32, compress="deflate"
    )
    data = bytearray(path.read_bytes())
    places, _ = hostile.fields(data, hostile.first_directory(data))
    (offset,) = np.frombuffer(data, "<u4", 1, places[324].at)
    data[offset : offset + 40] = bytes(40)
    path.write_bytes(data)
    scene = describe(SceneRef("scene-1", str(path)), ReadOptions())
    told = set()
    for _ in range(2):
        with pytest.raises(SceneReadError) as caught:
            SceneReader(scene).read(Window(0, 0, 64, 64), (0,))
        told.add(str(caught.value))
    assert len(told) == 1, told
    assert told.pop().startswith("scene-1: the blocks at row 0, column 0 ")


def test_check_says_a_sentence_for_each_hostile_file(tmp_path: Path, canary: Path, caller: Listener) -> None:
    """One bad file must not hide the others: ``geoseg check`` tells of all, also of the sound one among them."""
    folder = tmp_path / "scenes"
    folder.mkdir()
    hostile.disguises(folder, canary=canary, url=f"http://{caller.host}")
    for index, (make, _, _) in enumerate(BOMBS.values()):
        make(folder / f"bomb-{index}.tif")
    (folder / "empty.tif").touch()
    write_scene(folder / "sound.tif", noise(3, 64, 64))
    bundle = tiny_bundle(tmp_path / "bundle")
    checked = check_job(load_job(None, {"scenes": [str(folder)], "out": str(tmp_path / "out"), "bundle": bundle}))
    assert len(checked) == len(list(folder.iterdir()))
    assert [one.text.splitlines()[0] for one in checked if not one.refused] == [str(folder / "sound.tif")]
    for one in checked:
        assert one.refused == ("  refused: " in one.text)
        assert len(one.text.splitlines()) <= 3
    assert caller.requests == 0
    assert_untouched(canary)


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed; it shows which files are opened")
def test_the_kernel_sees_no_other_file_and_no_connection(tmp_path: Path, canary: Path, caller: Listener) -> None:
    """What GDAL opens natively no hook in Python sees: the trace of all system calls does."""
    folder = tmp_path / "scenes"
    folder.mkdir()
    hostile.disguises(folder, canary=canary, url=f"http://{caller.host}")
    sound = write_scene(folder / "sound.tif", noise(3, 64, 64))
    beside = folder / "beside"
    beside.mkdir()
    scene = write_scene(beside / "scene.tif", noise(3, 64, 64))
    for suffix in (".tif.ovr", ".tif.aux.xml", ".tfw", ".IMD"):
        scene.with_name("scene" + suffix).write_bytes(hostile.vrt_of(f"/vsicurl/http://{caller.host}/x.tif"))
    trace = tmp_path / "trace"
    done = run_child(
        "import sys; from kit.hostile import outcome; from pathlib import Path\n"
        "for path in sys.argv[1:]: print(outcome(Path(path)))",
        *(str(path) for path in sorted(folder.rglob("*.tif"))),
        watched=["strace", "-f", "-qq", "-e", "trace=open,openat,openat2,connect,sendto,unlink", "-o", str(trace)],
    )
    if not trace.exists() or "ptrace" in done.stderr:
        pytest.skip("strace may not watch processes here")
    assert done.stdout.splitlines().count("ok") == 2, done.stdout
    calls = [line for line in trace.read_text(errors="replace").splitlines() if " = -1 ENOENT" not in line]
    assert [line for line in calls if str(sound) in line], "the trace shows what is opened"
    named = {str(path) for path in folder.rglob("*.tif")}
    opened = {
        part for line in calls for part in line.split('"')[1:2] if str(tmp_path) in part and part != str(tmp_path)
    }
    assert opened <= named
    assert not [line for line in calls if "/etc/passwd" in line]
    assert not [line for line in calls if "connect(" in line and "AF_INET" in line]
    assert caller.requests == 0


def test_only_the_drivers_for_geotiff_are_left() -> None:
    """The last line of defence: a driver that is not there opens nothing."""
    done = run_child(
        "import geoseg.raster, rasterio\nfrom rasterio.drivers import raster_driver_extensions\n"
        "with rasterio.Env() as env: print(' '.join(sorted(env.drivers())))"
    )
    assert set(done.stdout.split()) <= {"COG", "GTiff", "MEM", "GNMDatabase"}, done.stdout
    with rasterio.Env() as env:
        assert "VRT" not in env.drivers()


def run_child(code: str, *arguments: str, watched: list[str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run Python in a child with the kit at hand; a hang ends after two minutes as a failure."""
    return subprocess.run(
        [*(watched or []), sys.executable, "-c", code, *arguments],
        cwd=TESTS,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
