"""Files that mean harm, made on the spot: disguises, sidecars, bombs, blocks that unpack to more than they say."""

from __future__ import annotations

import contextlib
import gzip
import json
import lzma
import os
import socket
import struct
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import rasterio

from geoseg.errors import GeosegError
from geoseg.raster import tiff
from geoseg.raster.geotiff import ReadOptions, SceneReader, describe
from geoseg.raster.scene import SceneRef
from geoseg.raster.window import Window
from kit.measured import peak_bytes
from kit.scenes import noise, write_scene

BOMB_SIDE = 32768
NUM_FIELDS = 1000
_SHORT, _LONG = 3, 4
_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _SAMPLES, _PLANAR = 256, 257, 258, 259, 262, 277, 284
_SUBFILE, _TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS, _TILE_BYTES = 254, 322, 323, 324, 325
_DEFLATE = 8
_GEO_KEYS, _GEO_TEXTS, _METADATA = 34735, 34737, 42112
_SIDE = 512
SEVEN = 7
TERMINAL = "\x1b]0;owned\x07\x1b[2J\nred\r"
# By codec the side of a block that is written in about a second.
CODECS = {
    "deflate": 8192,
    "packbits": 8192,
    "zstd": 8192,
    "lzw": 4096,
    "jpeg": 4096,
    "lerc": 4096,
    "lerc_deflate": 4096,
    "lerc_zstd": 4096,
    "lzma": 2048,
    "webp": 1024,
}


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


def tile_index_of(source: str) -> bytes:
    """Return the description of a tile index, whose tiles are other files."""
    return (
        f"<GDALTileIndexDataset><IndexDataset>{source}</IndexDataset><LocationField>location</LocationField>"
        "</GDALTileIndexDataset>"
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
        "tile index": tile_index_of(str(canary)),
        "capabilities": f"<WMTS_Service><Url>{url}/WMTSCapabilities.xml</Url></WMTS_Service>".encode(),
        "coverage service": f"<WCS_GDAL><ServiceURL>{url}</ServiceURL><CoverageName>x</CoverageName></WCS_GDAL>".encode(),
    }
    paths = {}
    for name, body in made.items():
        paths[name] = folder / f"{name.replace(' ', '-')}.tif"
        paths[name].write_bytes(body)
    return paths


def others(folder: Path, *, canary: Path) -> dict[str, Path]:
    """Write what is called ``.tif`` and is a file of another kind, or no file at all."""
    made = {
        "zip with a scene": b"PK\x03\x04" + bytes(60),
        "gzip of a scene": gzip.compress(plain(folder / "gzipped.tif")),
        "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(600),
        "vrt behind a TIFF header": b"II*\0\x08\0\0\0" + vrt_of(str(canary)),
        "BigTIFF of nine bytes": b"II+\0\x08\0\0\0\0",
        "nothing": b"",
    }
    (folder / "gzipped.tif").unlink()
    paths = {name: folder / f"{name.replace(' ', '-')}.tif" for name in made}
    for name, body in made.items():
        paths[name].write_bytes(body)
    for name, target in {
        "link to passwd": "/etc/passwd",
        "link to zeros": "/dev/zero",
        "link to nowhere": "nowhere",
    }.items():
        paths[name] = folder / f"{name.replace(' ', '-')}.tif"
        paths[name].symlink_to(target)
    paths["pipe"], paths["folder"] = folder / "pipe.tif", folder / "folder.tif"
    os.mkfifo(paths["pipe"])
    paths["folder"].mkdir()
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


# --- fields of a true GeoTIFF that lead elsewhere --------------------------------------------------------------------


def with_fields(path: Path, fields: dict[int, tiff.Entry], *, blocks: list[bytes] | None = None) -> Path:
    """Write a GeoTIFF of one block anew with other fields, and with other bytes for its blocks."""
    data = path.read_bytes()
    one, *_ = tiff.read_directories(lambda start, end: data[start:end], len(data))
    index = tiff.block_index(one, len(data))
    bodies = [data[start:end] for start, end in index.ranges(0, index.places(0, one.height, 0, one.width, plane=0))]
    changed = tiff.Directory({**one.entries, **fields}, one.byte_order)
    path.write_bytes(tiff.excerpt(changed, blocks or bodies, one.height, one.width))
    return path


def text(told: str) -> tiff.Entry:
    """Return a field of text."""
    return tiff.Entry(2, len(told) + 1, told.encode() + b"\0")


def shorts(*values: int) -> tiff.Entry:
    """Return a field of whole numbers."""
    return tiff.Entry(_SHORT, len(values), struct.pack(f"<{len(values)}H", *values))


def constant(path: Path, *, side: int = 16, bands: int = 1, **profile: Any) -> Path:
    """Write a GeoTIFF of one tile whose pixels are all SEVEN."""
    profile = {"tiled": True, "blockxsize": side, "blockysize": side, "compress": "deflate", **profile}
    return write_scene(path, np.full((bands, side, side), SEVEN, np.uint8), **profile)


def shifted_by(path: Path, extension: str) -> Path:
    """Write a GeoTIFF whose CRS, in Esri's words, has an extension that may have PROJ open a file or a URL."""
    of_datum, of_crs = (f",{extension}", "") if "PROJ4_GRIDS" in extension else ("", f",{extension}")
    wkt = (
        f'PROJCS["x",GEOGCS["g",DATUM["d",SPHEROID["Bessel",6377397.155,299.15]{of_datum}],'
        'PRIMEM["Greenwich",0],UNIT["Degree",0.0174532925199433]],PROJECTION["Transverse_Mercator"],'
        'PARAMETER["central_meridian",15],PARAMETER["scale_factor",0.9996],PARAMETER["false_easting",500000],UNIT["metre",1]'
        f"{of_crs}]"
    )
    told = f"ESRI PE String = {wkt}|"
    keys = shorts(1, 1, 0, 4, 1024, 0, 1, 32767, 1025, 0, 1, 1, 3072, 0, 1, 32767, 3073, _GEO_TEXTS, len(told), 0)
    return with_fields(constant(path), {_GEO_TEXTS: text(told), _GEO_KEYS: keys})


def metadata_of(path: Path, items: str) -> Path:
    """Write a GeoTIFF with GDAL's own metadata in it."""
    return with_fields(constant(path), {_METADATA: text(f"<GDALMetadata>{items}</GDALMetadata>")})


def leading_elsewhere(folder: Path, *, canary: Path, url: str) -> dict[str, Path]:
    """Write true GeoTIFFs whose fields name other files, hosts, or more text than anybody wants."""
    laughs = "".join(f'<!ENTITY a{n} "{f"&a{n - 1};" * 10}">' for n in range(1, 10))
    proj4 = 'EXTENSION["PROJ4","+proj=utm +zone=33 +ellps=bessel +units=m {} +no_defs"]'
    overview = '<Item name="OVERVIEW_FILE" domain="OVERVIEWS">{}</Item>'
    return {
        "shifts from a file": shifted_by(folder / "shifts-file.tif", f'EXTENSION["PROJ4_GRIDS","{canary}"]'),
        "shifts from a URL": shifted_by(folder / "shifts-url.tif", f'EXTENSION["PROJ4_GRIDS","{url}/x.tif"]'),
        "a projection from a file": shifted_by(
            folder / "proj4.tif", proj4.format(f"+nadgrids=@null +geoidgrids={canary}")
        ),
        "no shifts": shifted_by(folder / "no-shifts.tif", proj4.format("+nadgrids=@null +wktext")),
        "overviews in a file": metadata_of(folder / "overview-file.tif", overview.format(canary)),
        "overviews at a URL": metadata_of(folder / "overview-url.tif", overview.format(f"/vsicurl/{url}/x.tif")),
        "a thousand million laughs": with_fields(
            constant(folder / "laughs.tif"),
            {_METADATA: text(f'<!DOCTYPE x [<!ENTITY a0 "ha">{laughs}]><GDALMetadata>&a9;</GDALMetadata>')},
        ),
        "an entity that is a file": with_fields(
            constant(folder / "entity.tif"),
            {_METADATA: text(f'<!DOCTYPE x [<!ENTITY f SYSTEM "file://{canary}">]><GDALMetadata>&f;</GDALMetadata>')},
        ),
        "a band name that drives a terminal": metadata_of(
            folder / "band-name.tif", f'<Item name="DESCRIPTION" sample="0" role="description">{TERMINAL}</Item>'
        ),
        "a date and nodata that are none": with_fields(
            constant(folder / "date.tif"), {306: text("9999:99:99 \x1b[2J"), 42113: text("1e999" * 1000)}
        ),
    }


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


def wide_claims(path: Path) -> Path:
    """Write a file of 8 GiB, on disk a few kB, with 32 fields that claim 127 MiB of it each."""
    claim = 127 << 20

    def claims(start: int) -> bytes:
        del start
        return directory({40_000 + index: (7, claim, 4096 + index * claim) for index in range(32)})

    path.write_bytes(appended(plain(path), claims))
    os.truncate(path, 8 << 30)
    return path


def many_bands(path: Path) -> Path:
    """Write a file that says it has 65535 bands."""
    return with_fields(constant(path), {_SAMPLES: shorts(65535)})


def largest_block(path: Path) -> Path:
    """Write a file of 64 kB that is one tile of 64 MiB, the largest that is read."""
    return constant(path, side=8192)


def more_than_it_says(path: Path, compression: str) -> Path:
    """Write a file of 16 x 16 pixels whose one block is one of ``CODECS[compression]`` pixels a side."""
    bands = 3 if compression == "webp" else 1
    large = constant(path, side=CODECS[compression], bands=bands, compress=compression)
    data = large.read_bytes()
    one, *_ = tiff.read_directories(lambda start, end: data[start:end], len(data))
    ((start, end),) = tiff.block_index(one, len(data)).ranges(0, [(0, 0)])
    sides = {tag: shorts(16) for tag in (_WIDTH, _HEIGHT, _TILE_WIDTH, _TILE_HEIGHT)}
    out = tiff.excerpt(tiff.Directory({**one.entries, **sides}, one.byte_order), [data[start:end]], 16, 16)
    path.write_bytes(out)
    return path


def wide_dictionary(path: Path, compression: str) -> Path:
    """Write a file whose one block asks its decoder for a dictionary of 4 GiB (LZMA) or 2 GiB (ZSTD)."""
    if compression == "lzma":
        body = bytearray(lzma.compress(bytes([SEVEN]) * 256))
        assert body[14:16] == b"\x21\x01", "a block header with the one filter LZMA2"
        body[16] = 40
        struct.pack_into("<I", body, 20, zlib.crc32(body[12:20]))
        return with_fields(constant(path), {_COMPRESSION: shorts(34925)}, blocks=[bytes(body)])
    window, one_run = bytes([21 << 3]), 1 | 1 << 1 | 256 << 3
    body = bytearray(b"\x28\xb5\x2f\xfd\0" + window + one_run.to_bytes(3, "little") + bytes([SEVEN]))
    return with_fields(constant(path), {_COMPRESSION: shorts(50000)}, blocks=[bytes(body)])


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


BOMBS: dict[str, Callable[[Path], Path]] = {
    "one block of 32768 x 32768": block_bomb,
    "an overview of one such block": overview_bomb,
    "fields that share their bytes": field_bomb,
    "fields of 4 GiB in a hollow file": wide_claims,
    "a hundred thousand directories": many_directories,
    "directories in a loop": looping,
    "2 000 000 000 pixels a side": giant,
    "65535 bands": many_bands,
    "tiles that share their bytes": shared_blocks,
    "the largest block that is read": largest_block,
    **{f"more than it says in {codec}": partial(more_than_it_says, compression=codec) for codec in CODECS},
    **{f"a wide dictionary of {codec}": partial(wide_dictionary, compression=codec) for codec in ("lzma", "zstd")},
}


def corpus(folder: Path, *, canary: Path, url: str) -> dict[str, Path]:
    """Write all hostile files into a folder, by what they are."""
    made = disguises(folder, canary=canary, url=url) | others(folder, canary=canary)
    made |= leading_elsewhere(folder, canary=canary, url=url)
    return made | {name: make(folder / f"bomb-{index}.tif") for index, (name, make) in enumerate(BOMBS.items())}


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


# --- reading -------------------------------------------------------------------------------------------------------


def outcome(path: Path) -> str:
    """Read a file's header and its first and last pixels at each level: ``ok`` and their values, or the kind of error and why."""
    try:
        scene = describe(SceneRef("mutant", str(path)), ReadOptions(assume_crs="EPSG:32633"))
        reader, values = SceneReader(scene), set[int]()
        for level, (height, width) in enumerate(scene.levels):
            for row, col in {(0, 0), (max(0, height - _SIDE), max(0, width - _SIDE))}:
                window = Window(col, row, min(_SIDE, width), min(_SIDE, height))
                values |= set(
                    np.unique(reader.read(window, tuple(range(len(scene.bands))), level=level).pixels).tolist()
                )
    except GeosegError as error:
        return f"{type(error).__name__}: {error}"
    return f"ok {sorted(values)[:5]}"


def main(paths: list[Path]) -> None:
    """Read each file in a forked child of its own; print a line of JSON with the MiB that it took beyond what was held before."""
    for path in paths:
        read_end, write_end = os.pipe()
        child = os.fork()
        if not child:
            before = peak_bytes()
            told = outcome(path)
            os.write(write_end, json.dumps([path.name, told, (peak_bytes() - before) >> 20]).encode())
            os._exit(0)
        os.close(write_end)
        with os.fdopen(read_end, "rb") as pipe:
            told_bytes = pipe.read()
        _, status = os.waitpid(child, 0)
        print(told_bytes.decode() or json.dumps([path.name, f"CRASH with status {status}", 0]), flush=True)


if __name__ == "__main__":
    main([Path(told) for told in sys.argv[1:]])
