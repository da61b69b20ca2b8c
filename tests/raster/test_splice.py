"""A large COG put together in the store, piece by piece: the bytes are those of one process, and nothing half-done is seen."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
import rasterio
import rasterio.shutil
from kit.cogs import blobs, splice, write_parts
from kit.object_store import deny
from rio_cogeo import cog_validate

from geoseg.errors import AccessDeniedError, StoreError
from geoseg.predict.parts import remove_parts
from geoseg.raster import cog, store, upload
from geoseg.raster.splice import PartNames, SpliceError, in_turn, read_part

MIB = 2**20


@pytest.mark.parametrize(
    ("shape", "size", "piece", "big"),
    [
        ((1, 3000, 2111), 1024, 5000, False), ((1, 3000, 2111), 1024, 5000, True), ((3, 513, 600), 512, 1, False),
        ((1, 4096, 512), 512, 5000, True), ((3, 8200, 1024), 512, 30_000, False), ((1, 4100, 5001), 512, 20_000, False),
        ((1, 5000, 1), 512, 2000, False), ((3, 1, 6000), 512, 1, True), ((1, 1030, 513), 2048, 5000, False),
    ],
)  # fmt: skip
def test_the_bytes_are_those_of_one_process(
    shape: tuple[int, ...], size: int, piece: int, big: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cog, "PIECE_BYTES", piece)
    monkeypatch.setattr(cog, "_CLASSIC_LIMIT", 0 if big else cog._CLASSIC_LIMIT)
    names, path = PartNames(str(tmp_path / "parts"), ".layer", size), tmp_path / "out" / "mask.tif"
    pixels = blobs(*shape)
    whole, sums = write_parts(pixels, names)
    file = splice(shape, names)
    assert file.num_pieces > 2
    file.write(str(path), str(tmp_path / "parts" / "upload-mask"), in_turn)
    assert path.read_bytes() == whole
    assert whole.startswith(b"II+\0") == big
    assert (file.size, file.sums()) == (len(whole), sums)
    assert cog.read_blocks_sum(lambda start, end: whole[start:end], len(whole)) == sums["blocks_sha256"]
    assert not list(tmp_path.rglob("upload-*"))
    if min(shape[1:]) > 1:  # what is one pixel wide has no overviews
        assert cog_validate(path, strict=True) == (True, [], [])


def test_every_level_has_the_pixels_of_gdals_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cog, "PIECE_BYTES", 20_000)
    names, path = PartNames(str(tmp_path / "parts"), "", 512), tmp_path / "mask.tif"
    pixels = blobs(1, 4992, 4608)
    write_parts(pixels, names)
    splice(pixels.shape, names).write(str(path), str(tmp_path / "upload-mask"), in_turn)
    theirs = tmp_path / "gdal.tif"
    rasterio.shutil.copy(path, theirs, driver="COG", OVERVIEW_RESAMPLING="NEAREST", OVERVIEWS="IGNORE_EXISTING")
    with rasterio.open(path) as dataset:
        np.testing.assert_array_equal(dataset.read(), pixels)
        assert dataset.overviews(1) == [2, 4, 8, 16]
    for level in range(4):
        with rasterio.open(path, overview_level=level) as ours, rasterio.open(theirs, overview_level=level) as gdals:
            np.testing.assert_array_equal(ours.read(), gdals.read())


def test_what_has_no_data_needs_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cog, "PIECE_BYTES", 1000)
    names, path = PartNames(str(tmp_path / "parts"), "", 512), tmp_path / "mask.tif"
    pixels = np.full((1, 6000, 9000), 255, np.uint8)
    pixels[0, 5130:5200, 3000:8300] = 1
    whole, _ = write_parts(pixels, names)
    file = splice(pixels.shape, names, only=[(10, col) for col in range(5, 17)])
    file.write(str(path), str(tmp_path / "upload-mask"), in_turn)
    assert path.read_bytes() == whole
    assert cog_validate(path, strict=True) == (True, [], [])


def test_a_small_file_is_named_by_its_sha256_however_it_is_made(tmp_path: Path) -> None:
    names = PartNames(str(tmp_path), "", 512)
    whole, sums = write_parts(blobs(1, 700, 900), names)
    file = splice((1, 700, 900), names)
    assert file.sums() == sums
    assert list(sums) == ["sha256"]
    file.write(f"memory://{tmp_path.name}/mask.tif", "unused", in_turn)
    assert store.read(f"memory://{tmp_path.name}/mask.tif") == whole


SHAPE = (1, 4096, 4000)


@pytest.fixture(scope="module")
def parts() -> tuple[dict[str, bytes], bytes]:
    """Parts by name and the file they make; of pixels that nothing compresses, as a bucket's pieces have 5 MiB at least."""
    pixels = np.random.default_rng(0).integers(0, 255, SHAPE, dtype=np.uint8)
    names = PartNames(f"memory://{uuid.uuid4().hex}/parts", "", 2048)
    whole, _ = write_parts(pixels, names)
    return {store.base_name(info.uri): store.read(info.uri) for info in store.walk(names.folder)}, whole


def uploads(root: str) -> list[Any]:
    bucket, _, _ = root.removeprefix("s3://").partition("/")
    client = boto3.Session().client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    return client.list_multipart_uploads(Bucket=bucket).get("Uploads", [])


class Made:
    """A large file whose parts lie below ``root``."""

    def __init__(self, root: str, parts: dict[str, bytes], whole: bytes) -> None:
        self.root, self.whole = root, whole
        self.names = PartNames(store.join(root, "parts"), "", 2048)
        self.uri, self.staging = store.join(root, "scene", "mask.tif"), store.join(root, "parts", "upload-mask.tif")
        for name, data in parts.items():
            store.write(store.join(self.names.folder, name), data)

    def write(self, deal: Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]) -> None:
        splice(SHAPE, self.names).write(self.uri, self.staging, deal)

    def left(self) -> list[str]:
        """What stands beside the parts: files, markers, uploads."""
        there = [
            info.uri for info in store.walk(self.root) if store.base_name(info.uri).startswith(("upload-", "mask"))
        ]
        return [*there, *(uploads(self.root) if "://" in self.root else [])]


@pytest.fixture(params=["folder", pytest.param("bucket", marks=pytest.mark.bucket)])
def made(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    parts: tuple[dict[str, bytes], bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> Made:
    monkeypatch.setattr(cog, "PIECE_BYTES", 5 * MIB)
    return Made(str(tmp_path) if request.param == "folder" else f"s3://{request.getfixturevalue('bucket')}", *parts)


WRITE_ONE_PIECE_AND_DIE = """
import os, signal, sys
from geoseg.raster import cog
from geoseg.raster.splice import PartNames
from kit.cogs import splice

def deal(step, pieces):
    for done, piece in enumerate(pieces):
        if done == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        yield step(piece)

cog.PIECE_BYTES = int(sys.argv[1])
splice((1, 4096, 4000), PartNames(sys.argv[2], "", 2048)).write(*sys.argv[3:], deal)
"""


def test_a_publisher_killed_between_pieces_is_gone_on_with(made: Made) -> None:
    command = [
        sys.executable,
        "-c",
        WRITE_ONE_PIECE_AND_DIE,
        str(cog.PIECE_BYTES),
        made.names.folder,
        made.uri,
        made.staging,
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run(command, env=environment, check=False).returncode == -signal.SIGKILL
    assert made.left(), "something must have been begun"
    assert not store.exists(made.uri)
    written = []

    def deal(step: Callable[[Any], Any], pieces: Iterable[Any]) -> Iterator[Any]:
        for piece in pieces:
            written.append(piece.number)
            yield step(piece)

    made.write(deal)
    assert store.read(made.uri) == made.whole
    assert written[0] == (2 if "://" in made.root else 1), "what a bucket has of an upload is not sent again"
    remove_parts(info.uri for info in store.walk(store.join(made.root, "parts")))
    assert made.left() == [made.uri]


def stop_after_one(step: Callable[[Any], Any], jobs: Iterable[Any]) -> Iterator[Any]:
    yield step(next(iter(jobs)))
    raise KeyboardInterrupt


def fail_after_one(step: Callable[[Any], Any], jobs: Iterable[Any]) -> Iterator[Any]:
    for job in jobs:
        yield step(job)
        raise StoreError("the store failed")


def test_what_fails_leaves_nothing_and_may_begin_anew(made: Made) -> None:
    with pytest.raises(StoreError, match="the store failed"):
        made.write(fail_after_one)
    assert made.left() == []
    made.write(in_turn)
    assert store.read(made.uri) == made.whole


def test_removing_the_parts_gives_up_what_was_begun(made: Made) -> None:
    with pytest.raises(KeyboardInterrupt):
        made.write(stop_after_one)
    assert made.left()
    remove_parts(info.uri for info in store.walk(store.join(made.root, "parts")))
    assert made.left() == []


def test_an_upload_that_was_cut_otherwise_is_given_up(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt):
        made.write(stop_after_one)
    monkeypatch.setattr(cog, "PIECE_BYTES", 7 * MIB)
    made.write(in_turn)
    assert store.read(made.uri) == made.whole


def test_two_publishers_at_once_leave_one_file(made: Made) -> None:
    """The second begins when the first has sent one piece; whoever is late finds the upload completed, or all of it there."""

    def second_in_between(step: Callable[[Any], Any], jobs: Iterable[Any]) -> Iterator[Any]:
        for place, job in enumerate(jobs):
            yield step(job)
            if place == 0:
                made.write(in_turn)

    try:
        made.write(second_in_between)
    except StoreError as error:
        assert "completed or given up by other work" in str(error)  # noqa: PT017 - a bucket refuses it, a folder does not
    assert store.read(made.uri) == made.whole
    assert made.left() == [made.uri]


def test_a_part_that_changed_since_its_head_was_read_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cog, "PIECE_BYTES", 5000)
    names = PartNames(str(tmp_path), "", 512)
    write_parts(blobs(1, 1500, 1500), names)
    file = splice((1, 1500, 1500), names)
    uri = names.of_window(2, 2)
    data = bytearray(store.read(uri))
    data[-1] ^= 1
    store.write(uri, bytes(data))
    with pytest.raises(SpliceError, match="damaged; run again to redo it"):
        file.write(str(tmp_path / "mask.tif"), str(tmp_path / "upload-mask"), in_turn)
    assert not store.exists(uri), "it must be made anew"
    assert not (tmp_path / "mask.tif").exists()


@pytest.mark.parametrize("damage", [b"", b"cut in the table", b"cut in a block", b"count"], ids=bytes.decode)
def test_a_part_whose_head_is_damaged_is_removed(damage: bytes, root: str) -> None:
    names = PartNames(f"{root}/parts", "", 512)
    write_parts(blobs(1, 1500, 1500), names)
    uri = names.of_window(1, 1)
    data = store.read(uri)
    num = struct.unpack_from("<I", data, 8)[0]
    damaged = {
        b"": b"",
        b"cut in the table": data[:40],
        b"cut in a block": data[:-5],
        b"count": data[:8] + struct.pack("<I", num + 10_000) + data[12:],
    }[damage]
    store.write(uri, damaged)
    with pytest.raises(SpliceError, match="damaged; run again to redo it"):
        splice((1, 1500, 1500), names)
    assert not store.exists(uri), "it must be made anew"


@pytest.mark.parametrize("damage", [None, b""], ids=["missing", "damaged"])
def test_of_a_window_that_lacks_a_layer_nothing_counts_as_done(damage: bytes | None, root: str) -> None:
    mask, layer = (PartNames(f"{root}/parts", suffix, 512) for suffix in ("", ".probabilities"))
    for names in (mask, layer):
        write_parts(blobs(1, 600, 600), names)
    store.delete([layer.of_window(1, 1)])
    if damage is not None:
        store.write(layer.of_window(1, 1), damage)
    with pytest.raises(SpliceError, match="run again to redo it"):
        read_part(layer.of_window(1, 1))
    assert not store.exists(mask.of_window(1, 1))
    assert store.exists(mask.of_window(0, 1))


@pytest.mark.bucket
def test_an_upload_of_which_no_marker_can_be_left_is_given_up(bucket: str) -> None:
    deny(bucket, "s3:PutObject", "parts/*")
    with pytest.raises(AccessDeniedError):
        upload.begin(f"s3://{bucket}/mask.tif", 6 * MIB, f"s3://{bucket}/parts/upload-mask.tif")
    assert uploads(f"s3://{bucket}") == []


def test_where_no_pieces_are_taken_the_file_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cog, "PIECE_BYTES", 5000)
    root = f"memory://{uuid.uuid4().hex}"
    names = PartNames(f"{root}/parts", "", 512)
    whole, _ = write_parts(blobs(1, 1500, 1500), names)
    splice((1, 1500, 1500), names).write(f"{root}/mask.tif", f"{root}/upload-mask", in_turn)
    assert store.read(f"{root}/mask.tif") == whole
