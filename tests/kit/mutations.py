"""Mutations of sound GeoTIFFs by seed, and what reading each of them gives.

A crash or a hang ends a child and is told of that one mutation: ``python -m kit.mutations FOLDER DATA FIRST LAST`` forks children
that read a few dozen mutations each, and prints a line of JSON for every one.
"""

from __future__ import annotations

import faulthandler
import hashlib
import json
import os
import random
import select
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio
from rasterio.windows import Window as Cut

from geoseg.errors import SceneError
from geoseg.predict.stac import footprint
from geoseg.raster.geotiff import ReadOptions, SceneReader, describe
from geoseg.raster.scene import SceneRef
from geoseg.raster.window import Window
from kit.measured import peak_bytes
from kit.scenes import write_scene

KINDS = ("cut", "flip", "hole", "splice", "field")
HANG_S = 120.0
_BATCH = 40
_SIDE = 512
_MOST_BANDS = 4  # a run reads those of its bundle
_OPTIONS = ReadOptions(assume_crs="EPSG:32633")
_TILES = {"tiled": True, "blockxsize": 32, "blockysize": 32}
_RGB = "mass_roads/mass_1014.tif"

# Where pixels come from, in which dtype and layout they are written, and whether with a mask and an overview.
LAYOUTS: dict[str, tuple[str, str, dict[str, Any], bool, bool]] = {
    "tiles deflate": (_RGB, "uint8", {**_TILES, "compress": "deflate"}, False, True),
    "strips deflate": (_RGB, "uint8", {"compress": "deflate", "blockysize": 7}, False, False),
    "tiles lzw": (_RGB, "uint8", {**_TILES, "compress": "lzw"}, True, True),
    "strips lzw predictor": (_RGB, "uint16", {"compress": "lzw", "predictor": 2, "interleave": "band"}, False, False),
    "tiles zstd": (_RGB, "uint8", {**_TILES, "compress": "zstd"}, False, True),
    "float zstd predictor": (_RGB, "float32", {**_TILES, "compress": "zstd", "predictor": 3}, False, False),
    "tiles plain": (_RGB, "uint8", dict(_TILES), True, False),
    "strips plain": (_RGB, "uint8", {"nodata": 0}, False, True),
    "jpeg": ("dubai/dubai_1.tif", "uint8", {**_TILES, "compress": "jpeg", "photometric": "ycbcr"}, False, True),
    "mask deflate": ("hot_buildings/kampala_ug_z20.tif", "uint8", {**_TILES, "compress": "deflate"}, True, True),
    "big endian packbits": (_RGB, "int16", {"ENDIANNESS": "BIG", "compress": "packbits"}, True, False),
    "BigTIFF": (_RGB, "uint8", {**_TILES, "BIGTIFF": "YES", "compress": "lzw", "interleave": "band"}, True, True),
}
AS_THEY_ARE = (
    "float.tif",
    "float_nan.tif",
    "rotated.tif",
    "byte.tif",
    "test_esri_wkt.tif",
    "float_raster_with_nodata.tif",
    "inverted_lat.tif",
    "RGBA.uint16.tif",
    "cog_rgb.tif",
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a mutation.

    ``what`` is ``refused`` (with its sentence), ``same`` or ``other`` pixels, or what must not be: ``crash``, ``hang``, and
    ``surprise`` for an error that is not a scene's. ``peak_mib`` is the most memory that the child had held by then.
    """

    seed: int
    kind: str
    what: str
    told: str
    peak_mib: int


def sound_files(folder: Path, data: Path) -> list[bytes]:
    """Return real scenes cut small in every layout, and small real files as their writers left them."""
    made = []
    for name, (source, dtype, profile, masked, overview) in LAYOUTS.items():
        path = folder / f"sound-{name.replace(' ', '-')}.tif"
        pixels, valid = _cut(data / source, dtype)
        write_scene(path, pixels, valid=valid if masked else None, overviews=(2,) if overview else (), **profile)
        made.append(path.read_bytes())
    return made + [(data / "odd" / name).read_bytes() for name in AS_THEY_ARE]


def _cut(path: Path, dtype: str) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
    """Return 70 x 53 pixels of the middle of a scene, and which of them a mask with a hole says are valid."""
    with rasterio.open(path) as dataset:
        pixels = dataset.read((1, 2, 3), window=Cut(dataset.width // 2, dataset.height // 2, 53, 70))
    valid = np.ones(pixels.shape[1:], np.bool_)
    valid[:20, :30] = False
    return pixels.astype(dtype), valid


# --- mutations -------------------------------------------------------------------------------------------------------


def mutated(sound: list[bytes], seed: int) -> tuple[bytes, str]:
    """Return one of the files with damage of one kind in one to four places, and the kind."""
    rng = random.Random(seed)
    kind = KINDS[seed % len(KINDS)]
    out = bytearray(sound[seed // len(KINDS) % len(sound)])
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(out))
        if kind == "cut":
            del out[rng.randrange(len(out)) :]
            break
        if kind == "flip":
            out[at] ^= 1 << rng.randrange(8)
        elif kind == "hole":
            end = min(len(out), at + rng.choice((4, 64, 1024, 4096)))
            out[at:end] = bytes(end - at)
        elif kind == "splice":
            other = rng.choice(sound)
            begin = rng.randrange(len(other))
            piece = other[begin : begin + rng.choice((2, 4, 12, 100, 2000))]
            out[at : at + rng.choice((0, len(piece)))] = piece
        else:
            _edit_field(out, rng)
    return bytes(out), kind


@dataclass(frozen=True, slots=True)
class _Table:
    """A directory's place, the places of its entries, and that of the pointer to the next one."""

    at: int
    entries: list[int]
    pointer: int


@dataclass(frozen=True, slots=True)
class _Form:
    """How a TIFF writes its numbers: ``word`` is what counts and offsets are, ``num`` what the number of entries is."""

    order: str
    num: str
    word: str

    def put(self, out: bytearray, code: str, at: int, value: int) -> None:
        """Write a number, cut to the bytes it has, if it lies within the file."""
        size = struct.calcsize(code)
        if 0 <= at <= len(out) - size:
            struct.pack_into(self.order + code, out, at, value & ((1 << 8 * size) - 1))

    def get(self, out: bytearray, code: str, at: int) -> int:
        """Read a number; 0 beyond the end."""
        size = struct.calcsize(code)
        return int(struct.unpack_from(self.order + code, out, at)[0]) if 0 <= at <= len(out) - size else 0


def _tables(out: bytearray) -> tuple[_Form, list[_Table]]:
    big = 43 in out[2:4]
    form = _Form("<" if out[:2] == b"II" else ">", "Q" if big else "H", "Q" if big else "I")
    entry, head = (20, 8) if big else (12, 2)
    at, found = form.get(out, form.word, 8 if big else 4), list[_Table]()
    while at and len(found) < 8 and at not in [one.at for one in found]:
        num = min(form.get(out, form.num, at), 64)
        places = [at + head + entry * index for index in range(num)]
        found.append(_Table(at, places, at + head + entry * num))
        at = form.get(out, form.word, found[-1].pointer)
    return form, [one for one in found if one.entries]


def _edit_field(out: bytearray, rng: random.Random) -> None:
    """Change one field of one directory: its tag, type, count, value or offset, one of its values, its neighbours."""
    form, tables = _tables(out)
    if not tables:
        return
    table = rng.choice(tables)
    at, other = rng.choice(table.entries), rng.choice(table.entries)
    count_at = at + 4
    value_at = count_at + struct.calcsize(form.word)
    count, value = form.get(out, form.word, count_at), form.get(out, form.word, value_at)
    numbers = (0, 1, 2, 8, value + 1, value - 1, value ^ 1 << rng.randrange(32), 2 * value, rng.randrange(len(out)))
    number = rng.choice((*numbers, len(out) - 1, len(out), 1 << 16, (1 << 31) - 1, (1 << 32) - 1, 1 << 63))
    entry_bytes = 20 if form.word == "Q" else 12
    tags = (form.get(out, "H", other), 254, 266, 317, 322, 338, 339, 347, 34735, 42113)
    codes = (*range(9), 16, 32, 64, 32773, 34887, 50000, number)
    counts = (0, 1, count + 1, count - 1, 2 * count, number)
    edits: tuple[tuple[str, int, int], ...] = (
        ("H", at, rng.choice(tags)),
        ("H", at + 2, rng.randrange(20)),
        (form.word, count_at, rng.choice(counts)),
        (form.word, value_at, number),
        ("H", value_at, rng.choice(codes)),
        ("I", value + 4 * rng.randrange(max(1, min(count, 64))), number),
        (form.word, table.pointer, rng.choice((rng.choice(tables).at, number))),
        (form.num, table.at, rng.choice((0, len(table.entries) - 1, len(table.entries) + 1, 65535))),
    )
    edit = rng.randrange(len(edits) + 1)
    if edit < len(edits):
        form.put(out, *edits[edit])
    elif max(at, other) + entry_bytes <= len(out):
        mine, its = slice(at + 2, at + entry_bytes), slice(other + 2, other + entry_bytes)
        out[mine], out[its] = out[its], out[mine]


# --- reading ---------------------------------------------------------------------------------------------------------


def digests(path: Path) -> list[str]:
    """Return what a run would take from a file, level by level: place, bands, which pixels count, and these pixels."""
    scene = describe(SceneRef("mutant", str(path)), _OPTIONS)
    reader, bands = SceneReader(scene), tuple(range(min(_MOST_BANDS, len(scene.bands))))
    footprint(scene.grid)
    assert scene.grid.resolution_m > 0
    found = []
    for level, (height, width) in enumerate(scene.levels):
        told = hashlib.sha256(repr((scene.grid, scene.bands, scene.dtype, height, width)).encode())
        # A mutant may say that it is large, and a sparse one may be: its first and its last pixels stand for all.
        for row, col in {(0, 0), (max(0, height - _SIDE), max(0, width - _SIDE))}:
            window = Window(col, row, min(_SIDE, width), min(_SIDE, height))
            raster = reader.read(window, bands, level=level)
            told.update(np.packbits(raster.valid).tobytes())
            told.update(np.where(raster.valid, raster.pixels, 0).tobytes())
        found.append(told.hexdigest())
    return found


def _read_batch(folder: Path, sound: list[bytes], seeds: range, out: int) -> None:
    """Read mutations one after the other; tell each one's seed before it is read, and its outcome after."""
    expected: dict[int, list[str]] = {}
    for seed in seeds:
        origin = seed // len(KINDS) % len(sound)
        if origin not in expected:
            (folder / f"origin-{seeds.start}-{origin}.tif").write_bytes(sound[origin])
            expected[origin] = digests(folder / f"origin-{seeds.start}-{origin}.tif")
        data, kind = mutated(sound, seed)
        path = folder / f"mutant-{seed}.tif"
        path.write_bytes(data)
        os.write(out, json.dumps(seed).encode() + b"\n")
        what, told = _outcome(path, expected[origin])
        os.write(out, json.dumps(asdict(Outcome(seed, kind, what, told, peak_bytes() >> 20))).encode() + b"\n")
        path.unlink()


def _outcome(path: Path, expected: list[str]) -> tuple[str, str]:
    try:
        full, *overviews = digests(path)
    except SceneError as error:
        return "refused", f"{type(error).__name__}: {error}"
    except Exception as error:  # noqa: BLE001 - that is what is looked for
        return "surprise", f"{type(error).__name__}: {error}"
    return ("same" if full == expected[0] and set(overviews) <= set(expected) else "other"), ""


def _in_children(folder: Path, sound: list[bytes], first: int, last: int) -> Iterator[Outcome]:
    """Outcomes of mutations that forked children read; who crashes or hangs is followed by another, from the next one on."""
    seed = first
    while seed < last:
        batch = range(seed, min(last, seed + _BATCH))
        read_end, write_end = os.pipe()
        child = os.fork()
        if not child:
            os.close(read_end)
            _read_batch(folder, sound, batch, write_end)
            os._exit(0)
        os.close(write_end)
        begun, how = seed, "crash"
        with os.fdopen(read_end, "rb", buffering=0) as pipe:
            rest = b""
            while True:
                if not select.select([pipe], [], [], HANG_S)[0]:
                    how = "hang"
                    os.kill(child, signal.SIGKILL)
                    break
                told = pipe.read(1 << 16)
                if not told:
                    break
                *lines, rest = (rest + told).split(b"\n")
                for line in map(json.loads, lines):
                    if isinstance(line, dict):
                        yield Outcome(**line)
                        seed = line["seed"] + 1
                    else:
                        begun = line
        _, status = os.waitpid(child, 0)
        if status or seed < batch.stop:
            _, kind = mutated(sound, begun)
            yield Outcome(begun, kind, how, f"status {status}", 0)
            seed = begun + 1


def read_mutants(folder: Path, data: Path, first: int, last: int) -> tuple[int, list[Outcome]]:
    """Return the MiB that a child holds before it reads, and the outcomes of the mutations from ``first`` to ``last``."""
    here = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "kit.mutations", str(folder), str(data), str(first), str(last)],
        cwd=here,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(here.parent), str(here)]),
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    before, *lines = done.stdout.splitlines()
    outcomes = [Outcome(**json.loads(line)) for line in lines]
    assert [one.seed for one in outcomes] == list(range(first, last)), done.stderr[-4000:]
    return int(before), outcomes


def main(folder: Path, data: Path, first: int, last: int) -> None:
    """Print the MiB held before, then a line of JSON for each mutation. Nothing is read here, so that forking is safe."""
    faulthandler.enable()
    sound = sound_files(folder, data)
    print(peak_bytes() >> 20, flush=True)
    for one in _in_children(folder, sound, first, last):
        print(json.dumps(asdict(one)), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
