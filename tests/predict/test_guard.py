"""The guard: what looks implausible is held back, told with its numbers, and published when somebody has looked at it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from click.testing import CliRunner
from kit.oracle import seeded_bundle
from kit.scenes import AT_UTM, noise, write_scene
from shapely.geometry import MultiPolygon, box

from geoseg.cli import main
from geoseg.config import GuardConfig, Job, PredictConfig, load_job
from geoseg.errors import ConfigError, NothingReadableError
from geoseg.model.light import NUM_STEPS, SceneLight, count_light, novelty
from geoseg.nightly import run_nightly, run_release, run_retry
from geoseg.predict.bundles import load_bundle
from geoseg.predict.ground import Ground, usual_shares
from geoseg.predict.guard import Guard, MaskBefore, UsualShare
from geoseg.predict.index import Known, read_index
from geoseg.predict.light import window_light
from geoseg.predict.plan import MadeFrom, plan_scene
from geoseg.predict.predictor import network_spec
from geoseg.predict.reading import read_window
from geoseg.predict.record import RunReport, read_record
from geoseg.raster import store
from geoseg.raster.scene import SceneRef
from geoseg.status import explain_scene, output_status

RANGE = (0.0, 255.0)


def town(seed: int, *, height: int = 40, width: int = 53) -> npt.NDArray[np.uint8]:
    """Return pixels (band, row, col) of middling light and little contrast."""
    rng = np.random.default_rng(seed)
    return np.clip(rng.normal(120, 12, (3, height, width)), 0, 255).astype(np.uint8)


def light_of(pixels: npt.NDArray[Any]) -> SceneLight:
    flat = (pixels[:, :, :-1].reshape(3, -1), pixels[:, :, 1:].reshape(3, -1))
    return SceneLight.of("town", count_light(*flat, RANGE))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained bundle that says it was trained on towns."""
    light = tuple(light_of(town(100 + seed, height=64, width=64)) for seed in range(6))
    return seeded_bundle(tmp_path_factory.mktemp("bundle"), light=light)


def scene_light(path: Path, bundle: Path, **settings: Any) -> npt.NDArray[np.int64]:
    """Add up the counts of all windows, as publishing does."""
    description = load_bundle(str(bundle)).description
    spec = network_spec(load_bundle(str(bundle)), PredictConfig(**settings))
    plan = plan_scene(SceneRef("scene", store.normalize_uri(str(path))), spec)
    reader = plan.reader()
    total = np.zeros((2, 3, NUM_STEPS), np.int64)
    for window in plan.windows(reader):
        around, valid = read_window(plan, reader, window)
        if around is not None:
            total += window_light(around, valid, plan.stitching, window, description, spec.config.scale)
    return total


@pytest.mark.parametrize("resolution", ["native", 0.8, 1.3, 0.35])
def test_the_light_of_a_scene_does_not_depend_on_how_it_is_cut(
    resolution: float | str, bundle: Path, tmp_path: Path
) -> None:
    valid = np.random.default_rng(1).random((1100, 1301)) > 0.2
    path = write_scene(tmp_path / "scene.tif", noise(3, 1100, 1301), valid=valid, tiled=True)
    counts = [scene_light(path, bundle, resolution=resolution, window=window) for window in (512, 1024, 2048)]
    assert counts[0].sum() > 0
    assert (counts[0] == counts[1]).all()
    assert (counts[0] == counts[2]).all()


def test_every_fourth_pixel_that_is_valid_counts_as_numpy_has_it(bundle: Path, tmp_path: Path) -> None:
    pixels = noise(3, 600, 530)
    valid = np.random.default_rng(1).random((600, 530)) > 0.2
    path = write_scene(tmp_path / "scene.tif", pixels, valid=valid, tiled=True)
    counts = scene_light(path, bundle, window=512)
    pixels = np.pad(pixels, ((0, 0), (0, 0), (0, 1)), "reflect")
    both = valid & np.pad(valid, ((0, 0), (0, 1)), "reflect")[:, 1:]
    both = both[::4, ::4]
    for band in range(3):
        here = pixels[band, ::4, :-1:4][both].astype(float)
        beside = pixels[band, ::4, 1::4][:, : both.shape[1]][both].astype(float)
        assert (counts[0, band] == np.histogram(here, bins=32, range=RANGE)[0]).all()
        steps = np.floor(4 * np.log2(1 + np.abs(here - beside))).astype(int).clip(0, 31)
        assert (counts[1, band] == np.bincount(steps, minlength=32)).all()


def test_values_count_as_the_bundle_takes_them_whatever_a_scene_calls_them() -> None:
    values = np.random.default_rng(0).integers(0, 256, (3, 500)).astype(np.float64)
    right = np.roll(values, 1, axis=1)
    as_trained = count_light(values, right, RANGE)
    assert (count_light(values * 8 + 100, right * 8 + 100, RANGE, (100.0, 100 + 255 * 8.0)) == as_trained).all()
    values[:, 0] = np.nan
    assert count_light(values, right, RANGE).sum() == as_trained.sum() - 6


def test_what_is_like_the_training_is_nearer_than_what_is_not() -> None:
    known = [light_of(town(seed, height=64, width=64)) for seed in range(8)]

    def new(pixels: npt.NDArray[Any]) -> float:
        flat = (pixels[:, :, :-1].reshape(3, -1), pixels[:, :, 1:].reshape(3, -1))
        found = novelty(count_light(*flat, RANGE), known)
        assert found is not None
        return found

    like = town(99, height=64, width=64)
    assert new(like) < 2
    dark, black, flat, grain = like // 4, like * 0, like * 0 + 120, noise(3, 64, 64)
    assert [new(pixels) > 5 for pixels in (dark, black, flat, grain)] == [True] * 4
    assert novelty(count_light(*(np.zeros((3, 9)),) * 2, RANGE), []) is None, "nothing is known"
    assert novelty(np.zeros((2, 3, NUM_STEPS), np.int64), known) is None, "no pixel is valid"
    assert new(town(0, height=64, width=64)) < 0.05


def test_a_bundle_keeps_its_light_and_one_without_says_nothing_of_it(bundle: Path) -> None:
    told = json.loads((bundle / "model.json").read_text())
    assert len(told["light"]) == 6
    assert sum(map(int, told["light"][0]["values"][0].split())) == pytest.approx(10_000, abs=16)
    assert load_bundle("roads-buildings").description.light, "the one that ships has it"
    without = load_bundle(str(bundle)).description.model_copy(update={"light": ()})
    assert "light" not in without.model_dump(mode="json")


CLASSES = {"background": 800, "building": 150, "road": 50}


@pytest.mark.parametrize(
    ("classes", "before", "told"),
    [
        (CLASSES, CLASSES, None),
        (CLASSES, {**CLASSES, "building": 0}, "building covers 15.0% of it, and 0.0% of"),
        ({**CLASSES, "road": 2}, CLASSES, None),  # 5 % of the ground to 0.2 %: hardly a third with 2 % added to both
        ({**CLASSES, "building": 9000}, CLASSES, "building covers 91.4% of it, and 15.0% of"),
        (CLASSES, {"background": 1, "water": 9}, "background covers 80.0% of it, and 10.0% of"),
        (CLASSES, dict.fromkeys(CLASSES, 0), None),
        (dict.fromkeys(CLASSES, 0), CLASSES, None),
    ],
)
def test_shares_are_held_against_the_mask_before(
    classes: dict[str, int], before: dict[str, int], told: str | None
) -> None:
    guard = Guard(limits=GuardConfig())
    for name, where in (("scene", "the mask that stands"), ("other", "the mask of other on the same ground")):
        found = guard.objections("scene", classes, None, MaskBefore(id=name, classes=tuple(before.items())))
        assert bool(found) == (told is not None)
        assert all(where in sentence for sentence in found)
        assert told is None or any(told in sentence for sentence in found)
    off = Guard(limits=GuardConfig(max_change=0))
    assert off.objections("scene", classes, None, MaskBefore(id="scene", classes=tuple(before.items()))) == []


def known(classes: dict[str, int], *, bundle: str = "b", footprint: str = "", moment: str = "") -> Known:
    made = MadeFrom(etags=("e",), mask_etags=("",), bundle=bundle, settings="", aoi="")
    return Known(
        item_etag="i",
        fingerprint="f",
        sources=("s",),
        made=made,
        classes=tuple(classes.items()),
        footprint=footprint,
        moment=moment,
    )


def test_what_is_usual_needs_twenty_masks_of_the_same_bundle() -> None:
    masks = [known({**CLASSES, "building": 100 + 5 * number}) for number in range(20)]
    assert usual_shares([*masks[:19], known(CLASSES, bundle="other")], bundle="b") == ()
    usual = usual_shares([*masks, known(dict.fromkeys(CLASSES, 0))], bundle="b")
    assert [(one.name, one.num) for one in usual] == [("background", 20), ("building", 20), ("road", 20)]
    guard = Guard(limits=GuardConfig(), usual=usual)
    assert guard.objections("scene", {**CLASSES, "building": 150}, None, None) == []
    told = guard.objections("scene", {**CLASSES, "building": 5000}, None, None)
    assert len(told) == 2, "background is as unusual as building is"
    assert "building covers 85.5% of it, 14" in told[1]
    assert Guard(limits=GuardConfig(max_deviation=0), usual=usual).objections("s", {"building": 1}, None, None) == []
    assert isinstance(usual[0], UsualShare)


def test_the_last_mask_of_the_same_ground_is_found() -> None:
    here, near, far = (box(west, 50.0, west + 0.1, 50.1).wkt for west in (10.0, 10.005, 10.05))
    over = MultiPolygon([box(179.9, 50, 180, 50.1), box(-180, 50, -179.9, 50.1)]).wkt
    ground = Ground(
        {
            "monday": known({"road": 1}, footprint=here, moment="2026-11-02T00:00:00Z"),
            "tuesday": known({"road": 2}, footprint=near, moment="2026-11-03T00:00:00Z"),
            "elsewhere": known({"road": 3}, footprint=far, moment="2026-11-04T00:00:00Z"),
            "placeless": known({"road": 4}, moment="2026-11-05T00:00:00Z"),
            "over the date line": known({"road": 5}, footprint=over),
        }
    )
    assert ground.before("wednesday", here) == MaskBefore(id="tuesday", classes=(("road", 2),))
    assert ground.before("monday", here) == MaskBefore(id="monday", classes=(("road", 1),))
    assert ground.before("friday", over) == MaskBefore(id="over the date line", classes=(("road", 5),))
    assert ground.before("wednesday", box(20, 50, 20.1, 50.1).wkt) is None
    assert ground.before("wednesday", "") is None
    assert Ground({}).before("wednesday", here) is None


@pytest.fixture(params=["folder", pytest.param("bucket", marks=pytest.mark.bucket)])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "store") if request.param == "folder" else f"s3://{request.getfixturevalue('bucket')}"


def put(root: str, tmp_path: Path, name: str, pixels: npt.NDArray[Any], *, east_m: float = 0) -> None:
    geotransform = AT_UTM.translation(east_m, 0) @ AT_UTM
    path = write_scene(tmp_path / "made.tif", pixels, transform=geotransform)
    store.write(f"{root}/in/{name}.tif", path.read_bytes())


def job(root: str, bundle: Path, **values: Any) -> Job:
    told = {"scenes": [f"{root}/in/"], "out": f"{root}/out", "bundle": str(bundle), "cluster": {"engine": "local"}}
    return load_job(None, {**told, **values})


def night(root: str, bundle: Path, **values: Any) -> RunReport:
    return run_nightly(job(root, bundle, **values), quiet=True)


def statuses(report: RunReport | None) -> dict[str, str]:
    assert report is not None
    return {scene.id: scene.status for scene in report.scenes}


def test_a_strange_scene_is_held_listed_and_released(root: str, bundle: Path, tmp_path: Path) -> None:
    out = f"{root}/out"
    put(root, tmp_path, "town", town(1))
    put(root, tmp_path, "black", town(2) * 0, east_m=1000)
    first = night(root, bundle)
    assert statuses(first) == {"black": "held", "town": "published"}
    assert first.exit_code == 1
    (held,) = [scene for scene in first.scenes if scene.status == "held"]
    assert "max_novelty allows" in held.sentence
    assert held.novelty is not None
    assert store.read(held.thumbnail).startswith(b"\x89PNG")
    assert not store.exists(f"{out}/black/item.json")
    assert json.loads(store.read(f"{out}/town/item.json"))["properties"]["geoseg:novelty"] < 4
    assert output_status(out).held == 1
    assert "geoseg release" in "\n".join(first.next_steps())

    second = night(root, bundle)
    assert second.windows == 0
    assert second.engine == "none", "nothing of it was looked at again"
    assert [(scene.id, scene.sentence) for scene in second.scenes] == [("black", held.sentence)]
    assert "held by the last run" in explain_scene(out, "black").verdict

    listed = CliRunner().invoke(main, ["release", out])
    assert (listed.exit_code, listed.output.splitlines()) == (
        0,
        [held.sentence, f"    {store.redact(held.uri)}", f"    {held.thumbnail}"],
    )
    with pytest.raises(NothingReadableError, match="town is not held back"):
        run_release(out, ["town"], quiet=True)
    released = run_release(out, ["black"], quiet=True)
    assert statuses(released) == {"black": "published"}
    assert released is not None
    assert released.windows == 0, "its windows stood already"
    assert read_record(out, released.run_id)["reasons"] == {"released": 1}
    assert json.loads(store.read(f"{out}/black/item.json"))["properties"]["geoseg:released"] is True
    assert not store.exists(held.thumbnail)
    assert output_status(out).held == 0
    assert run_release(out, quiet=True) is None
    assert night(root, bundle).counts == {"unchanged": 2}
    assert set(read_index(out)) == {"black", "town"}


def test_a_scene_that_changed_since_it_was_held_is_judged_anew(bundle: Path, tmp_path: Path) -> None:
    root = str(tmp_path)
    put(root, tmp_path, "one", town(2) * 0)
    assert statuses(night(root, bundle)) == {"one": "held"}
    put(root, tmp_path, "one", town(3) * 0 + 255)
    assert statuses(run_release(f"{root}/out", ["one"], quiet=True)) == {"one": "held"}, "not what was looked at"
    put(root, tmp_path, "one", town(4))
    assert statuses(night(root, bundle)) == {"one": "published"}


def test_other_limits_look_again_and_none_hold_nothing(bundle: Path, tmp_path: Path) -> None:
    root = str(tmp_path)
    put(root, tmp_path, "one", town(2) * 0)
    assert statuses(night(root, bundle)) == {"one": "held"}
    told = night(root, bundle, guard={"hold": False})
    assert statuses(told) == {"one": "published"}
    assert "max_novelty allows" in told.scenes[0].sentence, "it is told all the same"
    put(root, tmp_path, "two", town(2) * 0, east_m=1000)
    assert statuses(night(root, bundle, guard={"max_novelty": 0})) == {"two": "published"}


def test_a_changed_scene_is_held_against_its_own_mask_and_a_new_one_against_its_ground(
    bundle: Path, tmp_path: Path
) -> None:
    """Untrained networks call half of any noise building; a limit close to 1 notices that two noises differ."""
    root, limits = str(tmp_path), {"max_novelty": 0, "max_change": 1.001}
    put(root, tmp_path, "one", town(1))
    assert statuses(night(root, bundle, guard=limits)) == {"one": "published"}
    item = store.read(f"{root}/out/one/item.json")
    put(root, tmp_path, "one", noise(3, 40, 53))
    put(root, tmp_path, "next-year", noise(3, 40, 53, seed=1))
    put(root, tmp_path, "far", noise(3, 40, 53, seed=1), east_m=5000)
    report = night(root, bundle, guard=limits)
    assert statuses(report) == {"far": "published", "next-year": "held", "one": "held"}
    told = {scene.id: scene.sentence for scene in report.scenes}
    assert "of the mask that stands" in told["one"]
    assert "of the mask of one on the same ground" in told["next-year"]
    assert store.read(f"{root}/out/one/item.json") == item, "the old mask stays"
    assert "held back by run" in explain_scene(f"{root}/out", "one").verdict
    assert statuses(run_release(f"{root}/out", quiet=True)) == {"next-year": "published", "one": "published"}
    assert store.read(f"{root}/out/one/item.json") != item
    assert "would leave it as it is" in explain_scene(f"{root}/out", "one").verdict


def test_predict_has_a_guard_where_its_job_has_one_and_retry_has_that_of_its_run(bundle: Path, tmp_path: Path) -> None:
    root = str(tmp_path)
    put(root, tmp_path, "one", town(2) * 0)
    store.write(f"{root}/in/two.tif", b"no image")
    assert statuses(night(root, bundle)) == {"one": "held", "two": "refused"}
    put(root, tmp_path, "two", town(2) * 0 + 255, east_m=1000)
    assert statuses(run_retry(f"{root}/out", quiet=True)) == {"two": "held"}
    assert output_status(f"{root}/out").held == 2
    from geoseg.run import run_job

    assert set(statuses(run_job(job(root, bundle, guard={}), quiet=True)).values()) == {"held"}
    assert set(statuses(run_job(job(root, bundle), quiet=True)).values()) == {"published"}


def test_masks_of_predict_are_those_that_the_next_run_goes_by(bundle: Path, tmp_path: Path) -> None:
    """Nobody wrote an index: the items themselves tell what a mask of this ground had."""
    from geoseg.run import run_job

    root = str(tmp_path)
    guard = {"max_novelty": 0, "max_change": 1.01, "max_deviation": 0}
    put(root, tmp_path, "one", town(2))
    assert statuses(run_job(job(root, bundle, guard=guard), quiet=True)) == {"one": "published"}
    put(root, tmp_path, "two", noise(3, 40, 53, seed=3))
    told = run_job(job(root, bundle, guard=guard), quiet=True)
    assert statuses(told) == {"one": "unchanged", "two": "held"}
    assert "one" in told.scenes[1].sentence


def test_limits_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"guard\.max_change: max_change is a factor above 1, or 0 for none"):
        load_job(None, {"scenes": ["a.tif"], "out": "o", "guard": {"max_change": 0.5}})


def test_a_release_hides_no_failure_and_a_record_of_before_is_read(bundle: Path, tmp_path: Path) -> None:
    root = str(tmp_path)
    put(root, tmp_path, "one", town(2) * 0)
    store.write(f"{root}/in/two.tif", b"no image")
    first = night(root, bundle)
    record = tmp_path / "out" / "_geoseg" / "runs" / first.run_id / "summary.json"
    told = json.loads(record.read_text())
    del told["job"]["guard"]
    record.write_text(json.dumps(told))
    again = night(root, bundle)
    assert statuses(again) == {"one": "held", "two": "refused"}, "judged anew, for its limits are not known"
    assert statuses(run_release(f"{root}/out", quiet=True)) == {"one": "published"}
    status = output_status(f"{root}/out")
    assert (status.held, status.refused, status.unfinished) == (0, 1, 0)
    assert statuses(run_retry(f"{root}/out", quiet=True)) == {"two": "refused"}
    assert night(root, bundle).counts == {"unchanged": 1, "refused": 1}


def test_what_was_held_counts_no_more_once_its_source_is_as_it_was(bundle: Path, tmp_path: Path) -> None:
    root = str(tmp_path)
    put(root, tmp_path, "one", town(1))
    night(root, bundle)
    good = (tmp_path / "in" / "one.tif").read_bytes()
    put(root, tmp_path, "one", town(2) * 0)
    assert statuses(night(root, bundle)) == {"one": "held"}
    held = night(root, bundle)
    assert (statuses(held), held.reasons, [scene.seconds for scene in held.scenes]) == ({"one": "held"}, {}, [0.0])
    store.write(f"{root}/in/one.tif", good)
    counts = night(root, bundle).counts
    assert counts in ({"unchanged": 1}, {"published": 1}), "a folder tells versions by time"
    assert output_status(f"{root}/out").held == 0
    assert run_release(f"{root}/out", quiet=True) is None


def test_a_mask_that_stands_above_a_new_limit_of_seams_is_told_and_nothing_to_release(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from geoseg import nightly
    from geoseg.predict import predictor

    root = str(tmp_path)
    put(root, tmp_path, "one", town(1))
    night(root, bundle)
    item = tmp_path / "out" / "one" / "item.json"
    told = json.loads(item.read_text())
    told["properties"]["geoseg:seam_score"] = 6.0
    item.write_text(json.dumps(told))
    original = nightly.make_run_spec

    def limited(job: Job) -> Any:
        run = original(job)
        return replace(run, config=run.config.model_copy(update={"max_seam_score": 5.0}))

    monkeypatch.setattr(nightly, "make_run_spec", limited)
    monkeypatch.setattr(predictor, "tiling_to_run", lambda *_: None)  # else: such a network has no seams
    report = night(root, bundle)
    assert statuses(report) == {"one": "held"}
    assert read_record(report.out, report.run_id)["counts"]["held"] == 1
    assert "allow more" in "\n".join(report.next_steps())
    assert run_release(f"{root}/out", quiet=True) is None, "it stands"


@pytest.mark.thorough
@pytest.mark.ray
@pytest.mark.usefixtures("shared_ray")
@pytest.mark.slow
def test_ray_holds_back_what_the_loop_does(bundle: Path, tmp_path: Path) -> None:
    told = []
    for engine in ("local", "ray"):
        root = str(tmp_path / engine)
        put(root, tmp_path, "town", town(1))
        night(root, bundle)
        put(root, tmp_path, "town-again", noise(3, 40, 53))
        put(root, tmp_path, "black", town(2) * 0, east_m=1000)
        put(root, tmp_path, "town-2", town(3), east_m=2000)
        report = night(root, bundle, cluster={"engine": engine, "workers": 1}, guard={"max_change": 1.001})
        told.append(
            {scene.id: (scene.status, scene.sentence, scene.novelty, scene.footprint) for scene in report.scenes}
        )
    assert told[0] == told[1]
    assert {name: one[0] for name, one in told[0].items()} == {
        "black": "held",
        "town-2": "published",
        "town-again": "held",
    }
    assert "on the same ground" in told[0]["town-again"][1]
