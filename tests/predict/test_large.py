"""A scene whose files are put together in pieces: the same bytes under names of their own, understood by all who read items."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from kit.oracle import seeded_bundle, write_scene

import geoseg
from geoseg.catalogue import make_catalogue
from geoseg.predict.verify import verify_output
from geoseg.raster import cog
from geoseg.raster.synthetic import synthetic_image
from geoseg.vectorize import VectorsJob, run_vectorize

RASTERS = ("mask", "probabilities", "uncertainty")


@pytest.fixture(scope="module")
def outs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two outputs with one scene: put together by one process, and in pieces of 5000 bytes."""
    folder = tmp_path_factory.mktemp("large")
    image = synthetic_image(1500, 1100, seed=3).pixels_bhw.copy()
    image[:, :600, :700] = 0  # a window without data, whose parts have no further layers
    scene, bundle = write_scene(folder / "scene.tif", image, nodata=0), seeded_bundle(folder / "bundle")
    asked: dict[str, Any] = {"engine": "local", "window": 512, "probabilities": True, "uncertainty": "entropy"}
    outs = {"whole": folder / "whole", "pieces": folder / "pieces"}
    for name, piece_bytes in (("whole", cog.PIECE_BYTES), ("pieces", 5000)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cog, "PIECE_BYTES", piece_bytes)
            report = geoseg.predict(str(scene), str(outs[name]), bundle=str(bundle), **asked)
            assert report.exit_code == 0, report.scenes
    return outs


def assets(out: Path) -> dict[str, Any]:
    item: dict[str, Any] = json.loads((out / "scene" / "item.json").read_text())
    return item["assets"]


def test_the_files_are_the_same_and_say_how_they_are_named(outs: dict[str, Path]) -> None:
    whole, pieces = assets(outs["whole"]), assets(outs["pieces"])
    for key in RASTERS:
        told, other = whole[key], pieces[key]
        paths = [outs[name] / "scene" / one["href"] for name, one in (("whole", told), ("pieces", other))]
        assert paths[0].read_bytes() == paths[1].read_bytes()
        assert "geoseg:blocks_sha256" not in told
        assert "file:checksum" not in other
        assert other["file:size"] == told["file:size"] == paths[1].stat().st_size
        assert paths[1].name == f"{key}-{other['geoseg:blocks_sha256'][:16]}.tif"
    assert whole["thumbnail"] == pieces["thumbnail"]
    assert (
        sorted(file.name for file in outs["pieces"].rglob("*") if "_geoseg/parts" in str(file) and file.is_file()) == []
    )


def test_readers_of_items_understand_both(outs: dict[str, Path]) -> None:
    for out in outs.values():
        run_vectorize(VectorsJob(out=str(out)), quiet=True)
        make_catalogue(str(out), quiet=True)
        checked = verify_output(str(out))
        assert checked.faults == ()
        assert checked.orphans == ()
        assert run_vectorize(VectorsJob(out=str(out)), quiet=True).traced[0].status == "unchanged"
    told = json.loads((outs["pieces"] / "collection.json").read_text())
    assert "geoseg:blocks_sha256" not in told["item_assets"]["mask"], "it is that of one file"


@pytest.mark.parametrize(
    ("at", "sentence"), [(20, "damaged or changed"), (-3, "SHA-256 is not the item's")], ids=["header", "last block"]
)
def test_verify_finds_damage_in_what_was_put_together_in_pieces(at: int, sentence: str, outs: dict[str, Path]) -> None:
    path = outs["pieces"] / "scene" / assets(outs["pieces"])["mask"]["href"]
    good = path.read_bytes()
    data = bytearray(good)
    data[at] ^= 1
    path.write_bytes(bytes(data))
    try:
        assert any(path.name in fault and sentence in fault for fault in verify_output(str(outs["pieces"])).faults)
    finally:
        path.write_bytes(good)
