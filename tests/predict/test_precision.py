"""The numbers a network computes in: chosen by the device or by the settings, told in the item, and the same all over a run."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kit.oracle import published_mask, seeded_bundle, whole_logits, whole_mask
from kit.scenes import noise, write_scene

import geoseg
from geoseg.config import PredictConfig, load_job
from geoseg.errors import ConfigError
from geoseg.model.blocks import Head
from geoseg.model.precision import check_precision, natural_precision
from geoseg.predict.bundles import load_bundle
from geoseg.predict.plan import plan_scene
from geoseg.predict.predictor import Predictor
from geoseg.predict.reading import Task
from geoseg.predict.worker import Worker
from geoseg.raster.scene import SceneRef
from geoseg.reproduce import reproduce_item
from geoseg.run import make_run_spec

NATURAL = natural_precision(torch.device("cpu"))
bfloat16_only = pytest.mark.skipif(NATURAL != "bfloat16", reason="this processor does not compute in bfloat16")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(seeded_bundle(tmp_path_factory.mktemp("bundle")))


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    """Three windows of 512."""
    return write_scene(tmp_path / "in" / "a.tif", noise(3, 40, 1100), nodata=0)


def properties(out: Path) -> dict[str, Any]:
    return json.loads((out / "a" / "item.json").read_text())["properties"]


def predict(scene: Path, out: Path, bundle: str, **settings: Any) -> np.ndarray[Any, Any]:
    report = geoseg.predict(str(scene), str(out), bundle=bundle, engine="local", window=512, **settings)
    assert report.exit_code == 0, report.scenes
    return published_mask(report.scenes[0].mask)


def test_the_device_chooses_and_the_item_tells(scene: Path, bundle: str, tmp_path: Path) -> None:
    mask = predict(scene, tmp_path / "out", bundle)
    told = properties(tmp_path / "out")
    assert told["geoseg:precision"] == [NATURAL]
    assert "precision" not in told["geoseg:settings"], "what nobody asked for is in no fingerprint"
    np.testing.assert_array_equal(mask, whole_mask(load_bundle(bundle), scene))


def test_the_settings_overrule_it(scene: Path, bundle: str, tmp_path: Path) -> None:
    mask = predict(scene, tmp_path / "out", bundle, precision="float32")
    told = properties(tmp_path / "out")
    assert (told["geoseg:precision"], told["geoseg:settings"]["precision"]) == (["float32"], "float32")
    np.testing.assert_array_equal(mask, whole_mask(load_bundle(bundle), scene, precision="float32"))


@bfloat16_only
def test_bfloat16_rounds_logits_a_little_and_classes_hardly(bundle: str) -> None:
    loaded = load_bundle(bundle)
    image, valid = noise(3, 256, 256), np.ones((256, 256), np.bool_)
    exact, fast = (whole_logits(loaded, image, valid, precision=one) for one in ("float32", "bfloat16"))
    assert fast.dtype == torch.float32
    assert 0 < (fast - exact).abs().max() < 0.1 * exact.std()
    assert (fast.argmax(0) != exact.argmax(0)).float().mean() < 0.01


@bfloat16_only
def test_the_head_stays_exact(bundle: str) -> None:
    network = Predictor(load_bundle(bundle), PredictConfig()).network
    heads = {weights for module in network.modules() if isinstance(module, Head) for weights in module.parameters()}
    assert {weights.dtype for weights in heads} == {torch.float32}
    assert {weights.dtype for weights in network.parameters() if weights not in heads} == {torch.bfloat16}


@bfloat16_only
def test_a_mask_by_devices_of_two_kinds_says_so(scene: Path, bundle: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    values = {"scenes": [str(scene)], "out": str(out), "bundle": bundle, "predict": {"window": 512}}
    run = make_run_spec(load_job(None, values))
    plan = plan_scene(SceneRef("a", str(scene)), run)
    worker = Worker(run, precision="float32")
    assert len(list(worker.run(Task(plan, window) for window in islice(plan.windows(plan.reader()), 1)))) == 1
    worker.close()
    predict(scene, out, bundle)
    assert properties(out)["geoseg:precision"] == ["bfloat16", "float32"]
    again = reproduce_item(str(out / "a"), quiet=True)
    assert any("devices of several kinds" in remark for remark in again.remarks)


@pytest.mark.parametrize("precision", [None, "float32"])
def test_it_is_made_again_as_it_was_made(precision: str | None, scene: Path, bundle: str, tmp_path: Path) -> None:
    predict(scene, tmp_path / "out", bundle, precision=precision)
    again = reproduce_item(str(tmp_path / "out" / "a"), quiet=True)
    assert again.is_equal
    assert not again.remarks


@pytest.mark.parametrize("precision", [None, "bfloat16"])
def test_what_was_made_in_bfloat16_is_made_again_where_there_is_none(
    precision: str | None, scene: Path, bundle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("geoseg.model.precision._computes_bfloat16", lambda _: True)
    predict(scene, tmp_path / "out", bundle, precision=precision)
    assert properties(tmp_path / "out")["geoseg:precision"] == ["bfloat16"]
    monkeypatch.setattr("geoseg.model.precision._computes_bfloat16", lambda _: False)
    again = reproduce_item(str(tmp_path / "out" / "a"), quiet=True)
    assert (again.obstacles, again.windows) == ((), again.windows_in_all)
    assert again.different < again.pixels / 100
    assert "bfloat16, in which this device does not compute" in again.remarks[0]


def test_an_item_from_before_was_made_in_float32(scene: Path, bundle: str, tmp_path: Path) -> None:
    predict(scene, tmp_path / "out", bundle, precision="float32")
    path = tmp_path / "out" / "a" / "item.json"
    item = json.loads(path.read_text())
    del item["properties"]["geoseg:precision"], item["properties"]["geoseg:settings"]["precision"]
    path.write_text(json.dumps(item))
    assert reproduce_item(str(path), quiet=True).is_equal


def test_what_a_device_cannot_do_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("geoseg.model.precision._computes_bfloat16", lambda _: False)
    assert natural_precision(torch.device("cpu")) == "float32"
    with pytest.raises(ConfigError, match="this processor does not compute in it; leave the setting out"):
        check_precision("bfloat16", torch.device("cpu"))
