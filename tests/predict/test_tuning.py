"""What a device was measured to be fastest with is remembered and taken, and no pixel knows of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from kit.oracle import digests, seeded_bundle
from kit.scenes import noise, write_scene

import geoseg
from geoseg.cli import main
from geoseg.config import PredictConfig, load_job
from geoseg.model.costs import peak_bytes, shadow_of
from geoseg.model.variants import STACK_VARIANTS, VARIANTS
from geoseg.predict import tuning
from geoseg.predict.bundles import load_bundle
from geoseg.predict.measure import fastest, measure
from geoseg.predict.plan import peak_of_window, plan_scene
from geoseg.predict.predictor import network_spec
from geoseg.predict.tuning import Measured, remember, remembered
from geoseg.predict.worker import Worker
from geoseg.raster.scene import SceneRef
from geoseg.run import make_run_spec

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _own_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(seeded_bundle(tmp_path_factory.mktemp("bundle"), depth=1, width=2))


def test_the_smallest_of_the_fastest_is_taken() -> None:
    rates = {(512, 1): 70.0, (1024, 1): 98.0, (1024, 4): 99.0, (2048, 1): 100.0}
    measured = [Measured(window=one[0], batch=one[1], pixels_per_s=rate) for one, rate in rates.items()]
    assert fastest(measured) == measured[1]


def test_what_is_remembered_is_taken_and_no_byte_changes(
    bundle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = write_scene(tmp_path / "in" / "a.tif", noise(3, 600, 1600))
    geoseg.predict(str(scene), str(tmp_path / "before"), bundle=bundle, engine="local")
    remember(Measured(window=2048, batch=3, pixels_per_s=1.0), digest=load_bundle(bundle).digest, device=CPU)
    run = make_run_spec(load_job(None, {"scenes": [str(scene)], "out": str(tmp_path / "after"), "bundle": bundle}))
    assert plan_scene(SceneRef("a", str(scene)), run).window == 1024, "a scene has a few windows if it can"
    large = write_scene(tmp_path / "large.tif", np.zeros((3, 4100, 4100), np.uint8))
    assert plan_scene(SceneRef("large", str(large)), run).window == 2048
    worker = Worker(run)
    worker.close()
    assert worker.batch == 3
    geoseg.predict(str(scene), str(tmp_path / "after"), bundle=bundle, engine="local")
    assert digests(tmp_path / "before") == digests(tmp_path / "after")
    monkeypatch.setattr(tuning, "device_name", lambda _: "another device")
    assert remembered(load_bundle(bundle).digest, CPU) is None


def test_a_damaged_memory_is_none(bundle: str, tmp_path: Path) -> None:
    path = remember(Measured(window=512, batch=1, pixels_per_s=1.0), digest="d", device=CPU)
    assert remembered("d", CPU) == Measured(window=512, batch=1, pixels_per_s=1.0)
    for damaged in ("{", "[1]", path.read_text().replace("512", '"x"')):
        path.write_text(damaged)
        assert remembered("d", CPU) is None


def test_the_command_measures_and_remembers(bundle: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("geoseg.predict.measure.WINDOWS", (512, 1024))
    told = CliRunner().invoke(main, ["tune", "--bundle", bundle], catch_exceptions=False)
    assert told.exit_code == 0, told.output
    kept = remembered(load_bundle(bundle).digest, CPU)
    assert kept is not None
    assert f"window = {kept.window}" in told.output
    assert kept.pixels_per_s > 0


def test_windows_beyond_the_memory_are_not_tried(bundle: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_bundle(bundle)
    spec = network_spec(loaded, PredictConfig())
    monkeypatch.setattr("geoseg.predict.measure.window_bytes", lambda: peak_of_window(spec, 1024))
    tried = [one.window for one in measure(loaded, device="cpu")]
    assert tried == [512, 1024]


@pytest.mark.parametrize("name", [*VARIANTS, *STACK_VARIANTS])
def test_a_window_holds_no_more_than_it_is_said_to(name: str, tmp_path: Path) -> None:
    dates = 4 if name in STACK_VARIANTS else 1
    loaded = load_bundle(str(seeded_bundle(tmp_path / "b", name=name, depth=3, width=8, dates=dates)))
    spec, network = network_spec(loaded, PredictConfig()), loaded.network()
    shadow = shadow_of(network)
    shadow.padding = "valid"
    side = 1024 + 2 * spec.margin
    counted = peak_bytes(shadow, (1, loaded.description.num_channels, side, side))
    assert 0.6 * peak_of_window(spec, 1024) < counted <= peak_of_window(spec, 1024)
