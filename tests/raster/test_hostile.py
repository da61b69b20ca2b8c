"""Hostile files: each is refused in one sentence; no other file is read, nobody is called, memory stays bounded."""

from __future__ import annotations

import json
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
from geoseg.raster import tiff
from geoseg.raster.geotiff import ReadOptions, SceneReader, describe
from geoseg.raster.scene import SceneRef, list_scenes
from geoseg.raster.window import Window
from geoseg.run import check_job

TESTS = Path(hostile.__file__).parents[1]
LIMIT_MIB = 512

# What comes of each file of the corpus: a piece of its sentence, or the values that all its pixels have.
VRT = "a GDAL VRT, which may read other files and is refused"
RIGHT = "ok [7]"
NOT_DECODED = "cannot be decoded"
NO_FILE = "is no file"
OTHER_FILES = "its CRS names other files"
OUTCOMES = {
    "vrt to a file": VRT,
    "vrt to a URL": VRT,
    "vrt to raw bytes": VRT,
    "indented vrt": VRT,
    "map service": "a text file",
    "item collection": "a text file",
    "tile index": "a text file",
    "capabilities": "a text file",
    "coverage service": "a text file",
    "zip with a scene": "a ZIP archive",
    "gzip of a scene": "a file of another kind",
    "HDF5": "an HDF5 file",
    "vrt behind a TIFF header": "a directory claims 22076 fields",
    "BigTIFF of nine bytes": "it has 9 bytes",
    "nothing": "the file has 0 bytes",
    "link to passwd": "a file of another kind",
    "link to zeros": NO_FILE,
    "link to nowhere": "there is no such file",
    "pipe": NO_FILE,
    "folder": NO_FILE,
    "shifts from a file": OTHER_FILES,
    "shifts from a URL": OTHER_FILES,
    "a projection from a file": OTHER_FILES,
    "no shifts": RIGHT,
    "overviews in a file": RIGHT,
    "overviews at a URL": RIGHT,
    "a thousand million laughs": RIGHT,
    "an entity that is a file": RIGHT,
    "a band name that drives a terminal": RIGHT,
    "a date and nodata that are none": RIGHT,
    "one block of 32768 x 32768": "rewrite it with gdal_translate -of COG",
    "an overview of one such block": "rewrite it with gdal_translate -of COG",
    "fields that share their bytes": "claim more bytes than the file has",
    "fields of 4 GiB in a hollow file": "its fields take more than 256 MiB",
    "a hundred thousand directories": "more than 64 images",
    "directories in a loop": "its directories loop",
    "2 000 000 000 pixels a side": "the block index is damaged",
    "65535 bands": "it has 65535 bands, the limit is 64",
    "tiles that share their bytes": RIGHT,
    "the largest block that is read": RIGHT,
    "more than it says in deflate": "a block of 256 bytes is said to take",
    "more than it says in packbits": "a block of 256 bytes is said to take",
    "more than it says in zstd": RIGHT,
    "more than it says in lzw": RIGHT,
    "more than it says in jpeg": NOT_DECODED,
    "more than it says in lerc": NOT_DECODED,
    "more than it says in lerc_deflate": NOT_DECODED,
    "more than it says in lerc_zstd": NOT_DECODED,
    "more than it says in lzma": RIGHT,
    "more than it says in webp": NOT_DECODED,
    "a wide dictionary of lzma": RIGHT,
    "a wide dictionary of zstd": NOT_DECODED,
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, Path], Path, Listener]]:
    """Give all hostile files, the raster that some of them name, and the server that others name."""
    folder = tmp_path_factory.mktemp("corpus")
    canary = hostile.constant(folder / "canary" / "canary.tif", side=64)
    os.utime(canary, (0, canary.stat().st_mtime))
    with listener() as caller:
        yield hostile.corpus(folder, canary=canary, url=f"http://{caller.host}"), canary, caller


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


def test_every_hostile_file_is_refused_or_read_right(
    corpus: tuple[dict[str, Path], Path, Listener], figure: Callable[..., None]
) -> None:
    """Each in a child of its own, with the most memory that it ever held; what is refused says why in a line."""
    files, canary, caller = corpus
    assert files.keys() == OUTCOMES.keys()
    done = run_child(
        "import sys; from pathlib import Path; from kit.hostile import main; main(list(map(Path, sys.argv[1:])))",
        *map(str, files.values()),
    )
    told = {name: (outcome, mib) for name, outcome, mib in map(json.loads, done.stdout.splitlines())}
    assert told.keys() == {path.name for path in files.values()}, done.stderr
    wrong = {name: told[path.name][0] for name, path in files.items() if OUTCOMES[name] not in told[path.name][0]}
    worst_mib, worst = max((told[path.name][1], name) for name, path in files.items())
    num_touched = int(canary.stat().st_atime != 0)
    figure("S1", "hostile files refused or read right", f"{len(files) - len(wrong)} of {len(files)}", goal="all")
    figure("S1", "network requests of hostile files", caller.requests, goal="0")
    figure("S1", "foreign files read for hostile files", num_touched, goal="0")
    figure("S2", f"MiB for the worst hostile file ({worst}), beyond what was held", worst_mib, goal=f"< {LIMIT_MIB}")
    assert not wrong
    assert caller.requests == num_touched == 0
    assert worst_mib < LIMIT_MIB
    assert not [outcome for outcome, _ in told.values() if not outcome.isprintable()]
    for name in hostile.BOMBS:
        assert files[name].stat().st_blocks * 512 < 8 << 20, "a bomb is small"


def test_what_a_file_says_of_itself_drives_no_terminal(tmp_path: Path) -> None:
    """Names of bands go into sentences, and those to terminals."""
    item = f'<Item name="DESCRIPTION" sample="0" role="description">{hostile.TERMINAL}</Item>'
    scene = describe(SceneRef("scene-1", str(hostile.metadata_of(tmp_path / "scene.tif", item))), ReadOptions())
    assert scene.bands == ("]0;owned  [2j red",)


def test_web_mercator_in_the_words_of_esri_is_no_other_file(tmp_path: Path) -> None:
    path = write_scene(tmp_path / "scene.tif", noise(1, 16, 16), crs="EPSG:3857", GEOTIFF_KEYS_FLAVOR="ESRI_PE")
    assert b"ESRI PE String" in path.read_bytes()
    assert "Mercator" in describe(SceneRef("scene-1", str(path)), ReadOptions()).grid.crs_wkt


def test_blocks_that_share_their_bytes_cost_what_is_read(tmp_path: Path) -> None:
    """A file of 131 kB may declare 65536 x 65536 pixels: a window of it costs a window."""
    path = hostile.shared_blocks(tmp_path / "shared.tif")
    assert path.stat().st_size < 200_000
    scene = describe(SceneRef("scene-1", str(path)), ReadOptions())
    assert scene.levels == ((65536, 65536),)
    reader = SceneReader(scene)
    assert (reader.read(Window(40_000, 60_000, 512, 512), (0,)).pixels == 7).all()
    assert reader.bytes_fetched < 1 << 20


def test_a_block_of_bits_costs_the_bytes_that_they_become(tmp_path: Path) -> None:
    """Packed it is 16 MiB, on disk a few kB; GDAL makes 128 MiB of it."""
    path = hostile.constant(tmp_path / "bits.tif", NBITS=1)
    hostile.with_fields(path, {tiff.TILE_WIDTH: hostile.shorts(8192), tiff.TILE_HEIGHT: hostile.shorts(16384)})
    assert "8192 x 16384, 128 MiB each, the limit is 64 MiB" in sentence_of(path, SceneTooCostlyError)


@pytest.mark.parametrize("big", ["NO", "YES"])
def test_a_file_cut_anywhere_is_refused(big: str, tmp_path: Path) -> None:
    layout = {"tiled": True, "blockxsize": 16, "blockysize": 16, "compress": "deflate", "BIGTIFF": big}
    sound = write_scene(tmp_path / "sound.tif", noise(3, 70, 53), **layout).read_bytes()
    path = tmp_path / "cut.tif"
    for size in sorted({0, 1, 4, 7, 8, 9, 15, 16, 17, *range(20, len(sound), len(sound) // 50), len(sound) - 1}):
        path.write_bytes(sound[:size])
        kind = NotGeoTiffError if size < 8 else SceneReadError
        told = sentence_of(path, kind)
        assert f"the file has {size} bytes" in told or "the file is cut short" in told, size


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
    for name in ("one block of 32768 x 32768", "directories in a loop", "65535 bands"):
        hostile.BOMBS[name](folder / f"{name.replace(' ', '-')}.tif")
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
    hostile.leading_elsewhere(folder, canary=canary, url=f"http://{caller.host}")
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
    assert sum(line.startswith("ok") for line in done.stdout.splitlines()) == 2 + 7, done.stdout
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
