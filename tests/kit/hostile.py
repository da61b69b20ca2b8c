"""Files that mean harm, made on the spot: disguises, sidecars, bombs, damaged structures, and mutations by seed.

Run as a script it reads mutations one after the other and prints a line for each, so that a crash or a hang ends the
child and not the test: ``python -m kit.hostile FOLDER FIRST LAST``.
"""

from __future__ import annotations

import contextlib
import faulthandler
import random
import resource
import socket
import struct
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rasterio

from geoseg.errors import GeosegError
from geoseg.raster.geotiff import ReadOptions, SceneReader, describe
from geoseg.raster.scene import SceneRef
from geoseg.raster.window import Window
from kit.scenes import noise, write_scene

BOMB_SIDE = 32768
NUM_FIELDS = 1000
_SHORT, _LONG = 3, 4
_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _SAMPLES, _PLANAR = 256, 257, 258, 259, 262, 277, 284
_SUBFILE, _TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS, _TILE_BYTES = 254, 322, 323, 324, 325
_DEFLATE = 8
_READ_PIXELS = 1 << 22


@dataclass(frozen=True, slots=True)
class Place:
    """Where a field of a classic little-endian TIFF stands: its entry, its type, how many values and where these are."""

    entry_at: int
    kind: int
    count: int
    at: int


def fields(data: bytes, offset: int) -> tuple[dict[int, Place], int]:
    """Return the fields of the directory at ``offset``, and the position of the pointer to the next one."""
    (count,) = struct.unpack_from("<H", data, offset)
    found: dict[int, Place] = {}
    for index in range(count):
        at = offset + 2 + 12 * index
        tag, kind, num = struct.unpack_from("<HHI", data, at)
        size = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 12: 8}.get(kind, 4) * num
        value_at = at + 8 if size <= 4 else struct.unpack_from("<I", data, at + 8)[0]
        found[tag] = Place(at, kind, num, value_at)
    return found, offset + 2 + 12 * count


def first_directory(data: bytes) -> int:
    """Return the position of the first directory."""
    return int(struct.unpack_from("<I", data, 4)[0])


def directory(values: dict[int, tuple[int, int, int]]) -> bytes:
    """Return a directory of fields (type, count, value or position) that is the last of its file."""
    body = b"".join(struct.pack("<HHII", tag, *values[tag]) for tag in sorted(values))
    return struct.pack("<H", len(values)) + body + struct.pack("<I", 0)


def appended(data: bytes, addition: Callable[[int], bytes]) -> bytes:
    """Return a file whose chain of directories goes on with what ``addition`` makes for the file position it gets."""
    at = first_directory(data)
    while True:
        _, pointer = fields(data, at)
        (at,) = struct.unpack_from("<I", data, pointer)
        if not at:
            break
    start = len(data) + len(data) % 2
    out = bytearray(data.ljust(start, b"\0"))
    struct.pack_into("<I", out, pointer, start)
    return bytes(out + addition(start))


def zeros_deflated(num_bytes: int) -> bytes:
    """Return a DEFLATE stream of ``num_bytes`` zeros (a multiple of 16 MiB), about a thousandth of their size."""
    piece = bytes(16 << 20)
    packer = zlib.compressobj(1)
    first = packer.compress(piece) + packer.flush(zlib.Z_FULL_FLUSH)
    again = packer.compress(piece) + packer.flush(zlib.Z_FULL_FLUSH)
    return first + again * (num_bytes // len(piece) - 1) + packer.flush()


def plain(path: Path, *, side: int = 256) -> bytes:
    """Write a sound little GeoTIFF and return its bytes."""
    write_scene(path, noise(3, side, side), tiled=True, blockxsize=128, blockysize=128, compress="deflate")
    return path.read_bytes()


# --- disguises: text that GDAL would follow to other files and hosts -------------------------------------------------


def vrt_of(source: str) -> bytes:
    """Return a VRT whose pixels are those of another raster."""
    return (
        '<VRTDataset rasterXSize="64" rasterYSize="64"><SRS>EPSG:32633</SRS>'
        "<GeoTransform>500000,1,0,5300000,0,-1</GeoTransform>"
        '<VRTRasterBand dataType="Byte" band="1"><SimpleSource>'
        f'<SourceFilename relativeToVRT="0">{source}</SourceFilename><SourceBand>1</SourceBand>'
        "</SimpleSource></VRTRasterBand></VRTDataset>"
    ).encode()


def raw_vrt_of(source: str) -> bytes:
    """Return a VRT whose pixels are the bytes of any file."""
    return (
        '<VRTDataset rasterXSize="16" rasterYSize="4"><VRTRasterBand dataType="Byte" band="1" subClass="VRTRawRasterBand">'
        f'<SourceFilename relativetoVRT="0">{source}</SourceFilename><ImageOffset>0</ImageOffset>'
        "<PixelOffset>1</PixelOffset><LineOffset>16</LineOffset></VRTRasterBand></VRTDataset>"
    ).encode()


def wms_of(url: str) -> bytes:
    """Return the description of a map service, which GDAL asks for tiles."""
    return (
        f'<GDAL_WMS><Service name="TMS"><ServerUrl>{url}/${{z}}/${{x}}/${{y}}.png</ServerUrl></Service><DataWindow>'
        "<UpperLeftX>-2e7</UpperLeftX><UpperLeftY>2e7</UpperLeftY><LowerRightX>2e7</LowerRightX><LowerRightY>-2e7"
        "</LowerRightY><TileLevel>3</TileLevel><YOrigin>top</YOrigin></DataWindow><Projection>EPSG:3857</Projection>"
        "<BlockSizeX>256</BlockSizeX><BlockSizeY>256</BlockSizeY><BandsCount>3</BandsCount></GDAL_WMS>"
    ).encode()


def disguises(folder: Path, *, canary: Path, url: str) -> dict[str, Path]:
    """Write files called ``.tif`` that are descriptions of other files: none may be followed."""
    made = {
        "vrt to a file": vrt_of(str(canary)),
        "vrt to a URL": vrt_of(f"/vsicurl/{url}/x.tif"),
        "vrt to raw bytes": raw_vrt_of("/etc/passwd"),
        "indented vrt": b"\n   " + vrt_of(str(canary)),
        "map service": wms_of(url),
        "item collection": f'{{"type": "FeatureCollection", "features": [], "links": [{{"href": "{url}"}}]}}'.encode(),
    }
    paths = {}
    for name, body in made.items():
        paths[name] = folder / f"{name.replace(' ', '-')}.tif"
        paths[name].write_bytes(body)
    return paths


HOSTILE_NAMES = (
    "vrt://{canary}",
    "zip+http://{host}/x.zip!x.tif",
    "http://{host}/x.tif",
    "https://{host}/x.tif",
    "ftp://{host}/x.tif",
    "/vsicurl/http://{host}/x.tif",
    "/vsizip//vsicurl/http://{host}/x.zip/x.tif",
    "/vsis3/bucket/x.tif",
    "GTIFF_DIR:1:{canary}",
    "GTIFF_RAW:{canary}",
    "WMS:http://{host}",
    "DERIVED_SUBDATASET:LOGAMPLITUDE:{canary}",
    "<VRTDataset><VRTRasterBand><SourceFilename>{canary}</SourceFilename></VRTRasterBand></VRTDataset>",
    "<GDAL_WMS><Service name='TMS'><ServerUrl>http://{host}</ServerUrl></Service></GDAL_WMS>",
    "",
    "\0",
)


# --- bombs: little on disk, much in memory or in time ----------------------------------------------------------------


def block_bomb(path: Path) -> Path:
    """Write a 1 MB file whose one tile of 32768 x 32768 unpacks to a GiB."""
    write_scene(path, np.zeros((1, 16, 16), np.uint8), tiled=True, blockxsize=16, blockysize=16, compress="deflate")
    out = bytearray(path.read_bytes())
    place, _ = fields(out, first_directory(out))
    body = zeros_deflated(BOMB_SIDE**2)
    for tag in (_WIDTH, _HEIGHT, _TILE_WIDTH, _TILE_HEIGHT):
        kind = place[tag].kind
        struct.pack_into("<H" if kind == _SHORT else "<I", out, place[tag].at, BOMB_SIDE)
    struct.pack_into("<I", out, place[_TILE_OFFSETS].at, len(out))
    _put(out, place[_TILE_BYTES], len(body))
    path.write_bytes(bytes(out) + body)
    return path


def overview_bomb(path: Path) -> Path:
    """Write a sound image whose overview is one tile of 32768 x 32768 that unpacks to a GiB."""
    image = write_scene(
        path,
        np.zeros((1, 2048, 2048), np.uint8),
        tiled=True,
        blockxsize=512,
        blockysize=512,
        compress="deflate",
    ).read_bytes()
    body = zeros_deflated(BOMB_SIDE**2)

    def overview(start: int) -> bytes:
        fields_of = {
            _SUBFILE: (_LONG, 1, 1),
            _WIDTH: (_LONG, 1, 1024),
            _HEIGHT: (_LONG, 1, 1024),
            _BITS: (_SHORT, 1, 8),
            _COMPRESSION: (_SHORT, 1, _DEFLATE),
            _PHOTOMETRIC: (_SHORT, 1, 1),
            _SAMPLES: (_SHORT, 1, 1),
            _PLANAR: (_SHORT, 1, 1),
            _TILE_WIDTH: (_LONG, 1, BOMB_SIDE),
            _TILE_HEIGHT: (_LONG, 1, BOMB_SIDE),
            _TILE_OFFSETS: (_LONG, 1, 0),
            _TILE_BYTES: (_LONG, 1, len(body)),
        }
        fields_of[_TILE_OFFSETS] = (_LONG, 1, start + len(directory(fields_of)))
        return directory(fields_of) + body

    path.write_bytes(appended(image, overview))
    return path


def shared_blocks(path: Path, *, side: int = 65536) -> Path:
    """Write a small file that declares ``side`` x ``side`` pixels: all its tiles are the same bytes."""
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        count=1,
        height=side,
        width=side,
        dtype="uint8",
        crs="EPSG:32633",
        transform=rasterio.Affine(0.5, 0, 500_000, 0, -0.5, 5_300_000),
        tiled=True,
        blockxsize=512,
        blockysize=512,
        compress="deflate",
        SPARSE_OK=True,
    ) as dataset:
        dataset.write(np.full((1, 512, 512), 7, np.uint8), window=((0, 512), (0, 512)))
    out = bytearray(path.read_bytes())
    place, _ = fields(out, first_directory(out))
    for tag in (_TILE_OFFSETS, _TILE_BYTES):
        kind, count, at = place[tag].kind, place[tag].count, place[tag].at
        one = out[at : at + (2 if kind == _SHORT else 4)]
        out[at : at + len(one) * count] = one * count
    path.write_bytes(out)
    return path


def field_bomb(path: Path, *, num_bytes: int = 1 << 20) -> Path:
    """Write a file with a thousand fields that each claim the same ``num_bytes`` of it: GiB from MiB."""

    def claims(start: int) -> bytes:
        del start
        return directory({40_000 + index: (7, num_bytes, 8) for index in range(NUM_FIELDS)})

    path.write_bytes(appended(plain(path) + bytes(num_bytes), claims))
    return path


def many_directories(path: Path, *, count: int = 100_000) -> Path:
    """Write a file with a chain of ``count`` directories of one field each."""

    def chain(start: int) -> bytes:
        one = 18
        return b"".join(
            struct.pack("<HHHIII", 1, _SUBFILE, _LONG, 1, 1, start + (index + 1) * one if index + 1 < count else 0)
            for index in range(count)
        )

    path.write_bytes(appended(plain(path), chain))
    return path


def looping(path: Path) -> Path:
    """Write a file whose last directory leads back to the first."""
    out = bytearray(plain(path))
    first = first_directory(out)
    _, pointer = fields(out, first)
    struct.pack_into("<I", out, pointer, first)
    path.write_bytes(out)
    return path


def giant(path: Path) -> Path:
    """Write a file of a few hundred bytes that declares 2 000 000 000 x 2 000 000 000 pixels."""
    out = bytearray(plain(path, side=16))
    place, _ = fields(out, first_directory(out))
    for tag in (_WIDTH, _HEIGHT):
        at = place[tag].at
        struct.pack_into("<H", out, at - 6, _LONG)
        struct.pack_into("<I", out, at, 2_000_000_000)
    path.write_bytes(out)
    return path


def _put(out: bytearray, place: Place, value: int) -> None:
    """Write the value of a field of one value, as a LONG."""
    struct.pack_into("<H", out, place.at - 6, _LONG)
    struct.pack_into("<I", out, place.at, value)


# --- witnesses -------------------------------------------------------------------------------------------------------


class Listener:
    """A server on the loopback that answers nothing and counts who knocks."""

    def __init__(self) -> None:
        self.requests = 0
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.host = f"127.0.0.1:{self._socket.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                caller, _ = self._socket.accept()
            except OSError:
                return
            self.requests += 1
            caller.close()

    def close(self) -> None:
        """Stop listening."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(5)


@contextlib.contextmanager
def listener() -> Iterator[Listener]:
    """Yield a listener for the length of the block."""
    one = Listener()
    try:
        yield one
    finally:
        one.close()


# --- mutations -------------------------------------------------------------------------------------------------------


def seeds(folder: Path) -> list[bytes]:
    """Return sound GeoTIFFs of different build, a few kB each, that mutations start from."""
    made = []
    valid = np.ones((70, 53), np.bool_)
    valid[:20, :30] = False
    kinds = (
        ("uint8", 3, {"tiled": True, "blockxsize": 16, "blockysize": 16, "compress": "deflate"}, True),
        (
            "uint8",
            3,
            {"tiled": True, "blockxsize": 32, "blockysize": 32, "compress": "jpeg", "photometric": "ycbcr"},
            False,
        ),
        ("uint16", 3, {"interleave": "band", "compress": "lzw", "predictor": 2, "nodata": 0}, False),
        (
            "float32",
            1,
            {"BIGTIFF": "YES", "compress": "zstd", "tiled": True, "blockxsize": 32, "blockysize": 32},
            False,
        ),
        ("int16", 1, {"ENDIANNESS": "BIG", "compress": "packbits"}, True),
        ("uint8", 4, {"photometric": "rgb", "alpha": "unspecified", "compress": "lzw", "blockysize": 7}, False),
    )
    for index, (dtype, bands, settings, masked) in enumerate(kinds):
        path = folder / f"seed-{index}.tif"
        pixels = noise(bands, 70, 53, dtype=dtype, seed=index)
        write_scene(path, pixels, valid=valid if masked else None, overviews=(2,), **settings)
        made.append(path.read_bytes())
    return made


def mutated(sound: list[bytes], seed: int) -> bytes:
    """Return one of the files with a few bits flipped, bytes set, a hole, a cut or a piece of another one in it."""
    rng = random.Random(seed)
    out = bytearray(sound[seed % len(sound)])
    for _ in range(rng.choice((1, 1, 2, 4))):
        # Most of a small file's harm lies in its directories: look for them half of the time.
        first = first_directory(out) if out[:4] == b"II*\0" and len(out) > 8 else 0
        near = rng.random() < 0.5 and first < len(out)
        at = min(len(out) - 1, (first if near else 0) + rng.randrange(400 if near else len(out)))
        kind = rng.randrange(6)
        if kind <= 1:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            out[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
        elif kind == 3:
            end = min(len(out), at + rng.choice((4, 64, 1024)))
            out[at:end] = bytes(end - at)
        elif kind == 4:
            other = rng.choice(sound)
            begin = rng.randrange(len(other))
            piece = other[begin : begin + rng.choice((2, 4, 12, 100))]
            out[at : at + len(piece)] = piece
        elif len(out) > 64 and rng.random() < 0.5:
            del out[rng.randrange(32, len(out)) :]
    return bytes(out)


def outcome(path: Path) -> str:
    """Read a file's header and all its pixels at each level; return ``ok`` or the kind of error and its sentence."""
    try:
        scene = describe(SceneRef("mutant", str(path)), ReadOptions(assume_crs="EPSG:32633"))
        reader = SceneReader(scene)
        for level, (height, width) in enumerate(scene.levels):
            if 0 < height * width <= _READ_PIXELS:  # a mutant may say that it is large, and a sparse file may be
                reader.read(Window(0, 0, width, height), tuple(range(len(scene.bands))), level=level)
    except GeosegError as error:
        return f"{type(error).__name__}: {error}"
    return "ok"


def peak_mib() -> int:
    """Return the most memory that this process has held, in MiB.

    Linux hands the peak of ``getrusage`` down from the process that started this one; its own stands in /proc.
    """
    status = Path("/proc/self/status")
    if status.exists():
        told = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(told.split()[1]) >> 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> (20 if sys.platform == "darwin" else 10)


def main(folder: Path, first: int, last: int) -> None:
    """Print the peak of memory in MiB, then for each seed from ``first`` to ``last`` the seed, the peak and the outcome."""
    sound = seeds(folder)
    print(peak_mib(), flush=True)
    for seed in range(first, last):
        path = folder / "mutant.tif"
        path.write_bytes(mutated(sound, seed))
        faulthandler.dump_traceback_later(20, exit=True)
        try:
            told = outcome(path)
        except Exception as error:  # noqa: BLE001 - that is what the test is after
            told = f"UNEXPECTED {type(error).__name__}: {error}"
        faulthandler.cancel_dump_traceback_later()
        print(f"{seed}\t{peak_mib()}\t{told!r}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
