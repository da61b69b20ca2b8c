"""What a catalogue says of a file is compared with the file, where a source asks for it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kit.scenes import noise, tiny_bundle, write_scene

from geoseg.config import load_job
from geoseg.nightly import run_nightly, run_retry
from geoseg.predict.sources import list_job
from geoseg.predict.turns import take_turns
from geoseg.raster import store, sums
from geoseg.raster.scene import SceneRef
from geoseg.raster.stack import group_scenes
from geoseg.raster.sums import ChecksumError, check_sums
from geoseg.raster.versions import Versions
from geoseg.run import plan_job, run_job

KINDS = {"md5": "d50110", "sha1": "1114", "sha256": "1220", "sha384": "2030", "sha512": "1340"}


def multihash(kind: str, data: bytes) -> str:
    return KINDS[kind] + hashlib.new(kind, data).hexdigest()


@pytest.fixture
def bundle(tmp_path: Path) -> str:
    return str(tiny_bundle(tmp_path / "bundle"))


@pytest.fixture
def catalogue(root: str, tmp_path: Path) -> Callable[[dict[str, str | None]], dict[str, Any]]:
    """Put scenes and their items; the job over them. Each scene's ``file:checksum`` is as told, or right where "" is."""

    def put(told: dict[str, str | None]) -> dict[str, Any]:
        features = []
        for seed, (name, checksum) in enumerate(told.items()):
            body = write_scene(tmp_path / "made.tif", noise(3, 60, 70, seed=seed)).read_bytes()
            store.write(f"{root}/in/{name}.tif", body)
            asset = {"href": f"{root}/in/{name}.tif", "roles": ["data"]}
            if checksum is not None:
                asset["file:checksum"] = checksum or multihash("sha256", body)
            features.append({"type": "Feature", "id": name, "properties": {}, "geometry": None, "assets": {"a": asset}})
        listed = {"type": "FeatureCollection", "features": features}
        store.write(f"{root}/list.json", json.dumps(listed).encode())
        return {"source": [{"manifest": f"{root}/list.json", "checksums": True}], "out": f"{root}/out"}

    return put


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_sum_is_compared(kind: str, root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sums, "_RANGE_BYTES", 1000)
    data = bytes(range(256)) * 40
    store.write(f"{root}/a.tif", data)
    info = store.head(f"{root}/a.tif")
    versions = {info.uri: (info.etag, info.size)}
    right = multihash(kind, data)
    check_sums(SceneRef("a", info.uri, sums=(right,)), versions)
    check_sums(SceneRef("a", info.uri, sums=(right.upper(),)), versions)
    other = multihash(kind, data[:-1] + b"x")
    with pytest.raises(ChecksumError, match=rf"a: .*its {kind} is {right[len(KINDS[kind]) :][:16]}.*damaged"):
        check_sums(SceneRef("a", info.uri, sums=(other,)), versions)


@pytest.mark.parametrize("told", ["1220abcd", "ff01", "x", "1220" + 63 * "0"])
def test_what_is_no_sum_is_refused(told: str) -> None:
    with pytest.raises(ChecksumError, match="wanted a multihash in hex of md5, sha1, sha256, sha384, sha512"):
        check_sums(SceneRef("a", "a.tif", sums=(told,)), {})


def test_scenes_that_are_not_what_their_items_say_are_refused_and_the_others_done(
    catalogue: Callable[[dict[str, str | None]], dict[str, Any]], bundle: str, root: str
) -> None:
    other = multihash("sha256", b"other")
    values = {**catalogue({"bad": other, "good": "", "none": None}), "bundle": bundle}
    told = {scene.id: scene for scene in run_job(load_job(None, values), quiet=True).scenes}
    assert {name: one.status for name, one in told.items()} == {
        "bad": "refused",
        "good": "published",
        "none": "refused",
    }
    assert "bad.tif: its sha256 is " in told["bad"].sentence
    assert other[4:20] in told["bad"].sentence
    assert "its item has no file:checksum" in told["none"].sentence
    again = run_retry(values["out"], quiet=True)
    assert {scene.id: scene.sentence for scene in again.scenes} == {
        name: told[name].sentence for name in ("bad", "none")
    }
    values["source"][0]["checksums"] = False
    report = run_nightly(load_job(None, values), quiet=True)
    assert sorted(scene.id for scene in report.scenes if scene.status == "published") == ["bad", "none"]


def test_a_plan_reads_no_file_whole(
    catalogue: Callable[[dict[str, str | None]], dict[str, Any]], bundle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {**catalogue({"a": ""}), "bundle": bundle}
    monkeypatch.setattr(sums, "_digest", None)
    assert "1 of 1 windows" in plan_job(load_job(None, values)).scenes[0]


def test_scenes_of_a_stack_keep_their_sums(
    catalogue: Callable[[dict[str, str | None]], dict[str, Any]], root: str
) -> None:
    values = catalogue({"t1_2025": "", "t1_2026": "1220" + 64 * "0", "t2_2026": None})
    without = {**values["source"][0], "checksums": False}
    pattern = r"(?P<stack>t\d)_(?P<date>\d+)"
    job = load_job(None, {**values, "source": [without, *values["source"]], "stack_by": pattern})
    one, two = sorted(list_job(job, f"{root}/out").refs, key=lambda ref: ref.id)
    assert [told[:6] for told in one.sums] == [multihash("sha256", store.read(one.uris[0]))[:6], "122000"]
    assert len(one.dates) == 2
    assert (two.dates, two.sums) == (("", two.uri), ("none",))


def test_a_date_without_a_sum_keeps_its_place() -> None:
    refs = [SceneRef("a", "t_1.tif"), SceneRef("b", "t_2.tif", sums=("1220",)), SceneRef("c", "u_1.tif")]
    stack, other = group_scenes(refs, r"(?P<stack>[tu])_(?P<date>\d)")
    assert (stack.sums, other.sums) == (("", "1220"), ())


def test_a_scene_with_sums_comes_in_one_turn(tmp_path: Path) -> None:
    (tmp_path / "a.tif").write_bytes(bytes(10_000))
    versions = Versions()
    (uri,) = versions.walk(f"{tmp_path}/")
    assert len(take_turns([SceneRef("a", uri), *map(SceneRef, "bcd", "bcd")], versions, turn_bytes=1000)) == 10 + 3
    checked = SceneRef("a", uri, sums=("1220",))
    assert len(take_turns([checked, *map(SceneRef, "bcd", "bcd")], versions, turn_bytes=1000)) == 1 + 3
