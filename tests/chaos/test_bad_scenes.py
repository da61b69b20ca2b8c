"""Bad scenes in a run of hundreds: each is told with its cause, and all others are done."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from affine import Affine
from kit import hostile
from kit.oracle import seeded_bundle
from kit.scenes import noise, write_scene
from PIL import Image

import geoseg
from geoseg.predict.verify import verify_output

ALL, SAMPLE = 413, 24


def photo(path: Path) -> None:
    made = io.BytesIO()
    Image.fromarray(noise(3, 40, 53).transpose(1, 2, 0)).save(made, "JPEG")
    path.write_bytes(made.getvalue())


def with_a_hole(path: Path) -> None:
    body = bytearray(hostile.plain(path))
    middle = len(body) // 2
    body[middle : middle + 4000] = bytes(4000)
    path.write_bytes(body)


COARSE, SINGULAR = Affine(30, 0, 500_000, 0, -30, 5_300_000), Affine(0.5, 0, 500_000, 0, 0, 5_300_000)
BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "description": (lambda path: path.write_bytes(hostile.vrt_of("/etc/hostname")), "a GDAL VRT"),
    "bomb": (hostile.block_bomb, "1024 MiB each, the limit is 64 MiB"),
    "giant": (hostile.giant, "the block index is damaged"),
    "cut": (lambda path: path.write_bytes(hostile.plain(path)[:90_000]), "block index points past the end of the file"),
    "hole": (with_a_hole, "cannot be decoded"),
    "empty": (lambda path: path.write_bytes(b""), "the file has 0 bytes"),
    "photo": (photo, "a JPEG image, not a GeoTIFF"),
    "nowhere": (lambda path: write_scene(path, noise(3, 40, 53), crs=None), "it has no CRS"),
    "singular": (lambda path: write_scene(path, noise(3, 40, 53), transform=SINGULAR), "the geotransform is singular"),
    "coarse": (lambda path: write_scene(path, noise(3, 40, 53), transform=COARSE), "30 m on the ground"),
    "gray": (lambda path: write_scene(path, noise(1, 40, 53)), r"the scene has 1 band\(s\) of uint8"),
    "deep": (lambda path: write_scene(path, noise(3, 40, 53, dtype="uint16")), r"3 band\(s\) of uint16"),
}


@pytest.mark.parametrize("num", [SAMPLE, pytest.param(ALL, marks=[pytest.mark.slow, pytest.mark.chaos])])
def test_all_others_are_done_and_each_cause_is_right(num: int, tmp_path: Path, figure: Callable[..., None]) -> None:
    scenes, good = tmp_path / "in", num - len(BAD)
    kinds = [write_scene(tmp_path / "kind.tif", noise(3, 40, 53, seed=seed)).read_bytes() for seed in range(8)]
    scenes.mkdir()
    for number in range(good):
        (scenes / f"s{number:03}.tif").write_bytes(kinds[number % len(kinds)])
    for name, (make, _) in BAD.items():
        make(scenes / f"{name}.tif")
    bundle = seeded_bundle(tmp_path / "bundle", resolution_m=0.5)
    report = geoseg.predict(str(scenes), str(tmp_path / "out"), bundle=str(bundle), engine="local")
    done = {scene.id for scene in report.scenes if scene.status == "published"}
    told = {scene.id: scene.sentence for scene in report.scenes if scene.status in ("refused", "failed")}
    right = {name for name, (_, cause) in BAD.items() if re.search(f"^{name}: .*{cause}", told.get(name, ""))}
    if num == ALL:
        figure("R13", f"good scenes done beside {len(BAD)} bad ones", f"{len(done)} of {good}", goal="401 of 401")
        figure("R13", "causes of bad scenes told right", f"{len(right)} of {len(BAD)}", goal="12 of 12")
    assert done == {f"s{number:03}" for number in range(good)}
    assert right == told.keys() == BAD.keys(), told
    assert report.exit_code == 1
    checked = verify_output(str(tmp_path / "out"))
    assert (checked.num_items, checked.faults) == (good, ())
