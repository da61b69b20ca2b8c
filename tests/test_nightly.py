"""Nights on a real bucket and on folders: what is done, what is left alone, what is told, whatever happened in between."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from kit.data import data_folder
from kit.nights import job, objects, put
from kit.scenes import write_scene

from geoseg.cli import main
from geoseg.errors import NothingReadableError, OutputHeldError
from geoseg.nightly import run_nightly, run_retry
from geoseg.predict import ledger, outcomes, plan
from geoseg.predict.index import read_index
from geoseg.predict.lease import Lease
from geoseg.predict.record import RunReport, find_record, read_record
from geoseg.predict.selection import select
from geoseg.predict.sources import list_job
from geoseg.predict.verify import verify_output
from geoseg.raster import store
from geoseg.run import make_run_spec
from geoseg.status import explain_scene, output_status

FIRST = [f"{number:02}" for number in range(6)]


@pytest.fixture(params=["folder", pytest.param("bucket", marks=pytest.mark.bucket)])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "store") if request.param == "folder" else f"s3://{request.getfixturevalue('bucket')}"


def night(root: str, bundle: Path, *, remove_gone: bool = False, **values: Any) -> RunReport:
    return run_nightly(job(root, bundle, **values), remove_gone=remove_gone, quiet=True)


def told(report: RunReport) -> dict[str, Any]:
    return read_record(report.out, report.run_id)


def reasons(report: RunReport) -> dict[str, list[str]]:
    return {scene["id"]: scene["reasons"] for scene in told(report)["scenes"]}


def test_three_nights_and_a_new_bundle(root: str, bundles: tuple[Path, Path], pixels: Any) -> None:
    one, two = bundles
    put(root, pixels, *FIRST)
    first = night(root, one)
    assert first.counts == {"published": 6}
    assert reasons(first) == {name: ["new"] for name in FIRST}
    put(root, pixels, "06", "07", "08")
    put(root, pixels, "01", "04", seed=100)
    second = night(root, one)
    assert second.counts == {"published": 5, "unchanged": 4}
    assert reasons(second) == {
        "01": ["source changed"],
        "04": ["source changed"],
        **{name: ["new"] for name in ("06", "07", "08")},
    }
    assert second.windows == 5
    stood = objects(root)
    third = night(root, one)
    assert (third.windows, third.gpu_hours, third.cpu_hours, third.exit_code) == (0, 0, 0, 0)
    assert told(third)["counts"] == {
        "published": 0, "unchanged": 9, "held": 0, "refused": 0, "failed": 0, "gone": 0, "removed": 0,
    }  # fmt: skip
    assert told(third)["scenes"] == []
    assert objects(root) == stood, "a night without work leaves its record and nothing else"
    fourth = night(root, two)
    assert fourth.counts == {"published": 9}
    assert told(fourth)["reasons"] == {"bundle changed": 9}
    assert night(root, two, predict={"probabilities": True}).reasons == {"settings changed": 9}
    checked = verify_output(f"{root}/out")
    assert (checked.num_items, checked.faults) == (9, ())
    assert len(output_status(f"{root}/out").last_run["counts"]) == 7


def test_a_night_reads_no_header_of_a_scene_that_stands(
    root: str, bundles: tuple[Path, Path], pixels: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(root, pixels, *FIRST)
    night(root, bundles[0])
    put(root, pixels, "06")
    planned = []
    original = ledger.plan_scene
    monkeypatch.setattr(ledger, "plan_scene", lambda ref, run: planned.append(ref.id) or original(ref, run))
    read: list[str] = []
    read_version = store.read_version
    monkeypatch.setattr(store, "read_version", lambda uri: read.append(uri) or read_version(uri))
    assert night(root, bundles[0]).counts == {"published": 1, "unchanged": 6}
    assert planned == ["06"]
    items = {uri for uri in read if uri.endswith("/item.json")}
    assert items <= {f"{root}/out/06/item.json"}, "the index knows the others"


@pytest.mark.sample("bucket-damaged", "bucket-of other items")
@pytest.mark.parametrize("index", ["missing", "damaged", "of another time", "of other items"])
def test_the_items_are_the_truth_whatever_the_index_says(
    index: str, root: str, bundles: tuple[Path, Path], pixels: Any
) -> None:
    put(root, pixels, *FIRST)
    night(root, bundles[0])
    uri = f"{root}/out/_geoseg/index.json.gz"
    body = store.read(uri)
    if index == "missing":
        store.delete([uri])
    elif index == "damaged":
        store.write(uri, body[: len(body) // 2])
    elif index == "of another time":
        night(root, bundles[1])
        store.write(uri, body)
        assert night(root, bundles[0]).counts == {"published": 6}, "the index tells of masks that are there no more"
    else:
        store.delete([f"{root}/out/02/item.json"])
        assert night(root, bundles[0]).counts == {"published": 1, "unchanged": 5}, "a scene without an item is none"
    again = night(root, bundles[0])
    assert (again.counts, again.scenes) == ({"unchanged": 6}, ())
    assert read_index(f"{root}/out").keys() == set(FIRST)
    assert night(root, bundles[1]).reasons == {"bundle changed": 6}


def area(root: str, east: float) -> str:
    ring = [[14.9, 47.8], [east, 47.8], [east, 47.9], [14.9, 47.9], [14.9, 47.8]]
    store.write(f"{root}/area.geojson", json.dumps({"type": "Polygon", "coordinates": [ring]}).encode())
    return f"{root}/area.geojson"


@pytest.mark.parametrize("indexed", [True, False])
def test_a_mask_beside_a_scene_and_an_area_count_too(
    indexed: bool, root: str, bundles: tuple[Path, Path], pixels: Any, tmp_path: Path
) -> None:
    def again(east: float) -> RunReport:
        if not indexed:
            store.delete([f"{root}/out/_geoseg/index.json.gz"])
        return night(root, bundles[0], predict={"sidecar_mask": True, "aoi": area(root, east)})

    put(root, pixels, "00", "01")
    mask = np.full((1, 40, 53), 255, np.uint8)
    store.write(f"{root}/in/00.tif.msk", write_scene(tmp_path / "mask.tif", mask).read_bytes())
    assert again(15.1).counts == {"published": 2}
    standing = again(15.1)
    assert (standing.counts, standing.scenes) == ({"unchanged": 2}, ()), "listings tell of the mask as well"
    mask[:, :20] = 0
    store.write(f"{root}/in/00.tif.msk", write_scene(tmp_path / "mask.tif", mask).read_bytes())
    assert reasons(again(15.1)) == {"00": ["source changed"]}
    assert reasons(again(15.2)) == {"00": ["settings changed"], "01": ["settings changed"]}
    store.delete([f"{root}/in/00.tif.msk"])
    assert reasons(again(15.2)) == {"00": ["source changed"]}


def test_masks_that_an_area_cut_are_made_again_by_new_rules_and_it_is_said(
    bundles: tuple[Path, Path], pixels: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = str(tmp_path)
    put(root, pixels, "00")
    cut = {"predict": {"aoi": area(root, 15.1)}}
    night(root, bundles[0], **cut)
    assert "leave it as it is" in explain_scene(f"{root}/out", "00").verdict
    monkeypatch.setattr(plan, "AREA_VERSION", 0)
    assert "do it again: geoseg changed" in explain_scene(f"{root}/out", "00").verdict
    assert reasons(night(root, bundles[0], **cut)) == {"00": ["geoseg changed"]}


@pytest.mark.parametrize(("score", "stands"), [(None, True), (4.0, True), (6.0, False)])
def test_a_limit_of_seams_is_held_against_what_stands(
    score: float | None, stands: bool, bundles: tuple[Path, Path], pixels: Any, tmp_path: Path
) -> None:
    root = str(tmp_path)
    put(root, pixels, "00")
    night(root, bundles[0])
    listing = list_job(job(root, bundles[0]), f"{root}/out")
    run = make_run_spec(job(root, bundles[0]))
    limited = replace(run, config=run.config.model_copy(update={"max_seam_score": 5.0}))
    known = {name: replace(one, seam_score=score) for name, one in read_index(f"{root}/out").items()}
    selection = select(listing.refs, listing.versions, limited, known)
    assert (selection.num_unchanged, len(selection.todo)) == ((1, 0) if stands else (0, 1))


def test_a_scene_that_is_gone_is_told_and_removed_when_asked(
    root: str, bundles: tuple[Path, Path], pixels: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(root, pixels, *FIRST)
    night(root, bundles[0])
    store.delete([f"{root}/in/03.tif"])
    stood = objects(root)
    report = night(root, bundles[0])
    assert [(one.id, one.removed) for one in report.gone] == [("03", False)]
    assert report.exit_code == 0
    assert any("--remove-gone" in sentence for sentence in told(report)["next"])
    assert objects(root) == stood
    delete = store.delete

    def stop_after_the_item(uris: list[str]) -> None:
        delete(uris)
        if f"{root}/out/03/item.json" in uris:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store, "delete", stop_after_the_item)
        with pytest.raises(KeyboardInterrupt):
            night(root, bundles[0], remove_gone=True)
    left = {name for name in objects(root) if name.startswith("03/")}
    assert left, "it was stopped half-way"
    assert "03/item.json" not in left
    report = night(root, bundles[0], remove_gone=True)
    assert not any(name.startswith("03/") for name in objects(root)), "what was left half-way is removed too"
    assert report.counts == {"unchanged": 5}
    checked = verify_output(f"{root}/out")
    assert (checked.num_items, checked.orphans) == (5, ())


def test_nothing_goes_with_a_scene_that_is_not_of_its_making(
    bundles: tuple[Path, Path], pixels: Any, tmp_path: Path
) -> None:
    """The output lies in the input, where a scene is called like a folder of others."""
    root = str(tmp_path / "in")
    for name in ("town", "town/2024", "rest"):
        store.write(f"{root}/{name}.tif", pixels(len(name)))
    store.write(f"{root}/town/notes.txt", b"mine")
    values = {"scenes": [f"{root}/"], "out": root}
    assert night(root, bundles[0], **values).counts == {"published": 3}
    store.delete([f"{root}/town.tif"])
    assert night(root, bundles[0], remove_gone=True, **values).counts == {"unchanged": 2}
    assert sorted(path.name for path in (tmp_path / "in" / "town").iterdir()) == ["2024.tif", "notes.txt"]


@pytest.mark.parametrize("left", [b"", b'{"schema": 99}'], ids=["nothing", "a newer version"])
def test_a_record_that_cannot_be_read_stops_no_night(
    left: bytes, root: str, bundles: tuple[Path, Path], pixels: Any
) -> None:
    put(root, pixels, *FIRST[:2])
    store.write(f"{root}/in/bad.tif", b"no image")
    night(root, bundles[0])
    second = night(root, bundles[0])
    store.write(f"{root}/out/_geoseg/runs/{second.run_id}/summary.json", left)
    status = output_status(f"{root}/out")
    assert (status.refused, status.last_run) == (1, None)
    assert explain_scene(f"{root}/out", "bad").verdict.startswith("refused")
    again = run_retry(f"{root}/out", quiet=True)
    assert again is not None
    assert again.counts == {"refused": 1}
    assert night(root, bundles[0]).counts == {"unchanged": 2, "refused": 1}


def test_a_night_of_other_sources_hides_no_scene_that_is_to_be_tried_again(
    root: str, bundles: tuple[Path, Path], pixels: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(root, pixels, *FIRST[:2])
    store.write(f"{root}/in/bad.tif", b"no image")
    store.write(f"{root}/elsewhere/a.tif", pixels(50))
    night(root, bundles[0])
    for _ in range(2):
        night(root, bundles[0], scenes=[f"{root}/elsewhere/"])
        assert output_status(f"{root}/out").refused == 1
    assert reasons(night(root, bundles[0])) == {"bad": ["retried"]}
    store.write(f"{root}/in/bad.tif", pixels(9))
    with monkeypatch.context() as patch:
        asked = []
        patch.setattr(outcomes, "find_record", lambda *run: asked.append(run) or find_record(*run))
        night(root, bundles[0])
    assert len(asked) == 1, "the last night of these sources tells all that this one wants to know"
    night(root, bundles[0], scenes=[f"{root}/elsewhere/"])
    assert output_status(f"{root}/out").refused == 0
    assert run_retry(f"{root}/out", quiet=True) is None


def test_what_a_job_does_not_ask_for_is_not_judged(root: str, bundles: tuple[Path, Path], pixels: Any) -> None:
    put(root, pixels, *FIRST)
    night(root, bundles[0])
    store.write(f"{root}/elsewhere/a.tif", pixels(50))
    stood = objects(root)
    report = night(root, bundles[0], scenes=[f"{root}/elsewhere/"], remove_gone=True)
    assert (report.counts, report.gone) == ({"published": 1}, ())
    assert stood.items() <= (objects(root) | {"_geoseg/index.json.gz": stood["_geoseg/index.json.gz"]}).items()


def test_scenes_by_name_are_gone_when_they_are_not_there(root: str, bundles: tuple[Path, Path], pixels: Any) -> None:
    put(root, pixels, *FIRST)
    named = {"scenes": [f"{root}/list.txt"]}
    store.write(f"{root}/list.txt", "\n".join(f"{root}/in/{name}.tif" for name in FIRST).encode())
    assert night(root, bundles[0], **named).counts == {"published": 6}
    assert night(root, bundles[0], **named).counts == {"unchanged": 6}


def test_failed_scenes_alone_are_tried_again(
    root: str, bundles: tuple[Path, Path], pixels: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(root, pixels, *FIRST)
    store.write(f"{root}/in/bad.tif", b"no image")

    def broken(run: Any, plan: Any, **settings: Any) -> bytes:
        if plan.scene.id in ("02", "05"):
            raise RuntimeError("the publisher is broken tonight")
        return make_item(run, plan, **settings)

    from geoseg.predict import publish

    make_item = publish.make_item
    with monkeypatch.context() as patch:
        patch.setattr(publish, "make_item", broken)
        first = night(root, bundles[0])
    assert first.exit_code == 1
    assert first.counts == {"published": 4, "failed": 2, "refused": 1}
    status = output_status(f"{root}/out")
    assert (status.published, status.failed, status.refused, status.unfinished) == (4, 2, 1, 0)
    assert "geoseg retry" in "\n".join(status.lines())
    put(root, pixels, "06")
    planned = []
    original = ledger.plan_scene
    monkeypatch.setattr(ledger, "plan_scene", lambda ref, run: planned.append(ref.id) or original(ref, run))
    again = run_retry(f"{root}/out", quiet=True)
    assert again is not None
    assert sorted(planned) == ["02", "05", "bad"]
    assert {scene.id: scene.status for scene in again.scenes} == {
        "02": "published",
        "05": "published",
        "bad": "refused",
    }
    assert told(again)["reasons"] == {"retried": 3}
    assert again.windows == 0, "their windows stood already"
    third = night(root, bundles[0])
    assert third.counts == {"published": 1, "unchanged": 6, "refused": 1}
    assert reasons(third) == {"06": ["new"], "bad": ["retried"]}
    store.write(f"{root}/in/bad.tif", pixels(9))
    mended = run_retry(f"{root}/out", quiet=True)
    assert mended is not None
    assert mended.counts == {"published": 1}
    assert run_retry(f"{root}/out", quiet=True) is None


def test_why_tells_a_scenes_story(root: str, bundles: tuple[Path, Path], pixels: Any) -> None:
    put(root, pixels, *FIRST)
    store.write(f"{root}/in/bad.tif", b"no image")
    night(root, bundles[0])
    put(root, pixels, "01", seed=100)
    night(root, bundles[0])
    why = explain_scene(f"{root}/out", f"{root}/in/01.tif")
    assert why.id == "01"
    assert [one["reasons"] for one in why.outcomes] == [["source changed"], ["new"]]
    assert [part.is_same for part in why.parts] == [True] * 5
    assert "leave it as it is" in why.verdict
    put(root, pixels, "02", seed=100)
    changed = explain_scene(f"{root}/out", "02")
    assert [part.name for part in changed.parts if not part.is_same] == ["input"]
    assert "do it again: source changed" in changed.verdict
    assert "not a GeoTIFF" in "\n".join(explain_scene(f"{root}/out", "bad").lines())
    store.delete([f"{root}/in/03.tif", f"{root}/in/04.tif"])
    assert "its source is gone" in explain_scene(f"{root}/out", "03").verdict
    told_of = night(root, bundles[0]).run_id
    store.delete([f"{root}/out/04/item.json"])
    removed_by = night(root, bundles[0], remove_gone=True).run_id
    assert f"removed by run {removed_by}" in explain_scene(f"{root}/out", "03").verdict
    by_hand = explain_scene(f"{root}/out", "04").verdict
    assert f"its source was gone in run {told_of}, and no item stands" in by_hand
    assert "removed by run" not in by_hand
    with pytest.raises(NothingReadableError, match="has no item nobody"):
        explain_scene(f"{root}/out", "nobody")


def test_one_night_at_a_time(root: str, bundles: tuple[Path, Path], pixels: Any) -> None:
    put(root, pixels, "00")
    with Lease(f"{root}/out", beat_s=0.2) as lease:
        status = output_status(f"{root}/out")
        assert (status.lease or {})["run"] == lease.run_id
        with pytest.raises(OutputHeldError, match="is writing to this output") as error:
            night(root, bundles[0])
    assert error.value.exit_code == 5
    assert night(root, bundles[0]).counts == {"published": 1}


def test_the_command_line(bundles: tuple[Path, Path], pixels: Any, tmp_path: Path) -> None:
    root = str(tmp_path)
    put(root, pixels, "00", "01")
    file = tmp_path / "job.toml"
    file.write_text(
        f'scenes = ["{root}/in/"]\nout = "{root}/out"\nbundle = "{bundles[0]}"\n[cluster]\nengine = "local"\n'
    )

    def geoseg(*words: str, code: int = 0) -> str:
        done = CliRunner().invoke(main, list(words))
        assert done.exit_code == code, done.output
        return done.stdout

    assert "published: 00 (new)" in geoseg("nightly", str(file), "--quiet")
    assert json.loads(geoseg("nightly", str(file), "--quiet", "--json"))["counts"]["unchanged"] == 2
    store.write(f"{root}/in/bad.tif", b"no image")
    assert "refused: bad (new): " in geoseg("nightly", str(file), "--quiet", code=1)
    assert "1 scene refused" in geoseg("status", f"{root}/out")
    assert json.loads(geoseg("status", f"{root}/out", "--json"))["refused"] == 1
    assert geoseg("why", f"{root}/out", "bad").startswith("bad: refused by the last run")
    assert json.loads(geoseg("why", f"{root}/out", "00", "--json"))["parts"][0]["same"] is True
    assert json.loads(geoseg("retry", f"{root}/out", "--quiet", "--json", code=3))["kind"] == "retry"
    (tmp_path / "in" / "bad.tif").unlink()
    assert "nothing is published" not in geoseg("nightly", str(file), "--quiet")
    assert geoseg("retry", f"{root}/out").startswith("nothing to retry")


@pytest.mark.slow
def test_the_job_that_is_shown_runs_on_the_data_beside_the_project(tmp_path: Path) -> None:
    configs, data = Path(__file__).parents[1] / "jobs" / "configs", data_folder()
    for name in ("nightly.toml", "nightly.geojson"):
        text = (configs / name).read_text()
        for beside in ("../../../shared/data", "../shared/data"):
            text = text.replace(beside, str(data))
        (tmp_path / name).write_text(text.replace("jobs/configs/", ""))
    for counts in ({"published": 3, "unchanged": 0}, {"published": 0, "unchanged": 3}):
        command = [sys.executable, "-m", "geoseg", "nightly", "nightly.toml", "--json", "--quiet", "--engine", "local"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout)
        assert counts.items() <= told["counts"].items()
    assert {info.name for info in (tmp_path / "runs" / "nightly").iterdir()} == {
        "_geoseg", "dubai_1", "dubai_2", "mass_1014",
    }  # fmt: skip


@pytest.mark.ray
@pytest.mark.usefixtures("shared_ray")
@pytest.mark.slow
def test_a_night_on_ray_is_told_like_one_in_a_loop(bundles: tuple[Path, Path], pixels: Any, tmp_path: Path) -> None:
    reports = []
    for engine in ("ray", "local"):
        root = str(tmp_path / engine)
        put(root, pixels, *FIRST)
        store.write(f"{root}/in/bad.tif", b"no image")
        night(root, bundles[0])
        put(root, pixels, "01", seed=100)
        put(root, pixels, "06")
        reports.append(told(night(root, bundles[0], cluster={"engine": engine, "workers": 1})))
    ours = [
        {scene["id"]: (scene["status"], scene["reasons"], scene["fingerprint"] != "") for scene in report["scenes"]}
        for report in reports
    ]
    assert ours[0] == ours[1] == {
        "01": ("published", ["source changed"], True),
        "06": ("published", ["new"], True),
        "bad": ("refused", ["retried"], False),
    }  # fmt: skip
    indexes = [read_index(str(tmp_path / engine / "out")).keys() for engine in ("ray", "local")]
    assert indexes[0] == indexes[1] == {*FIRST, "06"}
    assert reports[0]["figures"]["cpu_hours"] > 0
