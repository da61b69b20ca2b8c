"""A disk that fills up: the path is named, nothing half is to be seen, and with room the next run goes on."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kit.oracle import seeded_bundle
from kit.scenes import noise, write_scene
from kit.watcher import results, watching

import geoseg
from geoseg.errors import StoreError
from geoseg.predict.verify import verify_output
from geoseg.raster import cog, upload

# The bundle does not fit; nor does the second scene; nor what is put together of the parts.
ROOM_KIB = (16, 400, 700, 1000, 2500)


class Disk:
    """A file system of a few KiB."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def resize(self, kib: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={kib}k", self.folder], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A disk with 16 KiB; skips the test where none can be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if os.geteuid() != 0 or mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield Disk(folder)
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture
def asked(tmp_path: Path) -> dict[str, Any]:
    for number in range(3):
        write_scene(tmp_path / "in" / f"s{number}.tif", noise(3, 600, 600, seed=number))
    return {"bundle": str(seeded_bundle(tmp_path / "bundle")), "engine": "local", "window": 512, "probabilities": True}


@pytest.mark.slow
@pytest.mark.chaos
def test_a_full_output_is_named_and_the_next_run_goes_on(
    disk: Disk, asked: dict[str, Any], tmp_path: Path, figure: Callable[..., None]
) -> None:
    out = str(disk.folder)
    geoseg.predict(str(tmp_path / "in"), str(tmp_path / "calm"), **asked)
    unnamed, codes = [], []
    with watching(out) as watcher:
        for kib in ROOM_KIB:
            disk.resize(kib)
            try:
                report = geoseg.predict(str(tmp_path / "in"), out, **asked)
            except StoreError as error:
                codes.append(error.exit_code)
                sentences = [str(error)]
            else:
                codes.append(report.exit_code)
                sentences = [scene.sentence for scene in report.scenes if scene.status != "published"]
                assert all("make room" in sentence for sentence in sentences), sentences
            unnamed += [one for one in sentences if out not in one or "No space left" not in one]
            if watcher.num_items:
                assert verify_output(out).faults == ()
        disk.resize(40_000)
        assert geoseg.predict(str(tmp_path / "in"), out, **asked).exit_code == 0
    figure(
        "R11",
        f"corrupt or partial scenes to be seen on a disk that was full {len(ROOM_KIB)} times",
        watcher.num_partial,
        goal="0",
    )
    figure("R11", "errors that do not name the path", len(unnamed), goal="0")
    assert unnamed == []
    assert watcher.faults == []
    assert all(codes), "a run that found no room says so by its exit code"
    assert results(out) == results(str(tmp_path / "calm"))


def failures(scenes: Path, out: Path, asked: dict[str, Any]) -> list[str]:
    """Why scenes failed; a run whose record found no room either says that."""
    try:
        report = geoseg.predict(str(scenes), str(out), **asked)
    except StoreError as error:
        return [str(error)]
    return [scene.sentence for scene in report.scenes if scene.status != "published"]


def test_a_disk_that_fills_up_where_blocks_wait(disk: Disk, asked: dict[str, Any], tmp_path: Path) -> None:
    """The blocks of a mask wait in a temporary file until all are there."""
    disk.resize(64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cog, "_SPOOL_BYTES", 1000)
        patch.setattr(tempfile, "tempdir", str(disk.folder))
        failed = failures(tmp_path / "in", tmp_path / "out", asked)
        assert len(failed) == 3
        assert all(f"make room, also in {disk.folder}" in sentence for sentence in failed), failed
    assert failures(tmp_path / "in", tmp_path / "out", asked) == []


def test_a_file_that_is_written_in_pieces_is_named(disk: Disk) -> None:
    under_way = upload.begin(f"{disk.folder}/mask.tif", 200_000, f"{disk.folder}/upload-mask.tif")
    with pytest.raises(OSError, match=r"No space left on device: '.*/upload-mask.tif-"):
        under_way.write(1, 0, bytes(200_000))
    under_way.give_up()
    assert list(disk.folder.iterdir()) == []
