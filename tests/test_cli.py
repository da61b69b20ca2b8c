"""The command line: what a person types, what comes back, and with which exit code."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from kit.oracle import seeded_bundle, write_scene

import geoseg
import geoseg.errors
from geoseg.cli import main
from geoseg.predict.lease import read_holder
from geoseg.predict.progress import Progress
from geoseg.raster.synthetic import synthetic_image

GEOSEG = [sys.executable, "-m", "geoseg"]


def run(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [*GEOSEG, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return seeded_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = synthetic_image(700, 600, seed=1)
    return write_scene(tmp_path_factory.mktemp("scene") / "a.tif", made.pixels_bhw, nodata=0)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from geoseg.cli import main; main(['--help'], standalone_mode=False); "
        "print(sorted({'torch', 'ray', 'rasterio', 'numpy', 'pydantic', 'boto3'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "[]"
    assert "geoseg demo" in out


def test_an_error_of_another_kind_tells_where_it_arose_and_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> list[str]:
        raise ValueError("Invalid header value b'Bearer canary'")

    monkeypatch.setattr("geoseg.doctor.examine", lambda _: fail())
    done = CliRunner().invoke(main, ["doctor"])
    assert (done.exit_code, type(done.exception)) == (1, SystemExit)
    assert "in fail\n" in done.output
    assert done.output.endswith("ValueError: Invalid header value b'Bearer ***'\n")


def test_predict_says_what_it_did(scene: Path, bundle: Path, tmp_path: Path) -> None:
    done = run("predict", scene, "--out", tmp_path, "--bundle", bundle, "--probabilities", "--window", 512)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("published: a: ")
    assert "Mpx/s" in done.stderr
    assert "km2/h" in done.stderr
    names = {file.name.split("-")[0] for file in (tmp_path / "a").iterdir()}
    assert names == {"mask", "probabilities", "thumbnail", "item.json"}
    again = run("predict", scene, "--out", tmp_path, "--bundle", bundle, "--probabilities")
    assert again.stdout.startswith("unchanged: a: ")
    assert run("verify", tmp_path).returncode == 0


def test_a_scene_is_looked_at_as_the_options_say(scene: Path, bundle: Path, tmp_path: Path) -> None:
    words = ["predict", str(scene), "--out", str(tmp_path), "--bundle", str(bundle), "--engine", "local"]
    done = CliRunner().invoke(main, [*words, "--flips-and-turns", "--pyramid", "1,2", "--resampling", "nearest"])
    assert done.exit_code == 0, done.output
    settings = json.loads((tmp_path / "a" / "item.json").read_text())["properties"]["geoseg:settings"]
    assert (settings["flips_and_turns"], settings["pyramid"], settings["resampling"]) == (True, [1, 2], "nearest")
    for wrong, sentence in (
        (["--resampling", "nearest"], "geoseg: the command line: predict.resampling: .*no effect without a pyramid"),
        (["--pyramid", "4,2"], "geoseg: the command line: predict.pyramid: .*rising factors"),
        (["--pyramid", "1,x"], "wants numbers with commas"),
    ):
        refused = CliRunner().invoke(main, [*words, *wrong])
        assert refused.exit_code == 2
        assert re.search(sentence, refused.output), refused.output


def test_probabilities_agree_with_the_mask(scene: Path, bundle: Path, tmp_path: Path) -> None:
    import rasterio

    report = geoseg.predict(str(scene), str(tmp_path), bundle=str(bundle), probabilities=True, engine="local")
    item = json.loads(Path(report.scenes[0].item).read_text())
    with rasterio.open(report.scenes[0].mask) as dataset:
        mask = dataset.read(1)
    with rasterio.open(tmp_path / "a" / item["assets"]["probabilities"]["href"]) as dataset:
        chances = dataset.read().astype(int)
        assert dataset.descriptions == ("background", "building", "road")
        assert dataset.scales == (1 / 254,) * 3
    data = mask != 255
    assert ((chances == 255).all(0) == ~data).all()
    assert np.abs(chances[:, data].sum(0) - 254).max() <= 1
    best = np.take_along_axis(chances, np.where(data, mask, 0)[None].astype(int), 0)[0]
    assert (best[data] == chances.max(0)[data]).all()


def test_plan_writes_nothing(scene: Path, bundle: Path, tmp_path: Path) -> None:
    done = run("predict", scene, "--out", tmp_path / "out", "--bundle", bundle, "--plan")
    assert done.returncode == 0
    assert "600 x 700 px of 0.6 m, 1 of 1 windows" in done.stdout
    assert "to read" in done.stdout
    assert "at peak in a worker" in done.stdout
    assert not (tmp_path / "out").exists()


def test_plan_tells_the_bytes_that_are_read(bundle: Path, tmp_path: Path) -> None:
    from geoseg.config import load_job
    from geoseg.run import plan_job, run_job

    fresh = write_scene(tmp_path / "in" / "b.tif", synthetic_image(700, 600, seed=2).pixels_bhw, nodata=0)
    job = load_job(None, {"scenes": [str(fresh)], "out": str(tmp_path / "out"), "bundle": str(bundle)})
    planned = plan_job(job).bytes_to_read
    read = run_job(job, quiet=True).bytes_read
    assert planned <= read <= planned + 200_000, "the header's pages come on top"


@pytest.mark.sample(
    "words0-2-'out' is missing", "words10-3-not a GeoTIFF", "words11-1-not a GeoTIFF", "words13-0-600 x 700 px"
)
@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["predict", "{scene}"], 2, "'out' is missing"),
        (["predict", "{scene}", "--out", "o", "--window", "500"], 2, "predict.window"),
        (["predict", "{scene}", "--out", "o", "--bands", "1,x"], 2, "wants numbers"),
        (["predict", "{scene}", "--out", "o", "--bands", "1"], 2, "must name 3 bands"),
        (["predict", "{scene}", "--out", "o", "--bundle", "nothing"], 2, "no bundle there"),
        (["predict", "{scene}", "--out", "o", "--aoi", "nothing.json"], 2, "no such file"),
        (["predict", "{scene}", "--out", "o", "--engine", "local", "--workers", "3"], 2, "one process"),
        (["predict", "{scene}", "--out", "o", "--config", "nothing.toml"], 2, "no such file"),
        (["predict", "nothing.tif", "--out", "o"], 3, "no scene found"),
        (["predict", "http://there/a.tif", "--out", "o"], 2, "not http://"),
        (["predict", "{text}", "--out", "o"], 3, "not a GeoTIFF"),
        (["predict", "{text}", "{scene}", "--out", "o"], 1, "not a GeoTIFF"),
        (["check", "{text}"], 3, "not a GeoTIFF"),
        (["check", "{scene}"], 0, "600 x 700 px"),
        (["verify", "empty"], 3, "nothing is published"),
    ],
)
def test_exit_codes_and_sentences(words: list[str], code: int, sentence: str, scene: Path, tmp_path: Path) -> None:
    (tmp_path / "text.tif").write_text("no image")
    (tmp_path / "empty").mkdir()
    names = {"scene": str(scene), "text": str(tmp_path / "text.tif")}
    command = [*GEOSEG, *(word.format(**names) for word in words)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    assert sentence in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_an_interrupted_run_says_how_to_go_on(bundle: Path, tmp_path: Path) -> None:
    made = synthetic_image(1024, 1024, seed=1, nodata_fraction=0)
    big = write_scene(tmp_path / "in" / "big.tif", np.tile(made.pixels_bhw, (1, 6, 6)))
    command = [*GEOSEG, "predict", str(big), "--out", str(tmp_path / "out"), "--bundle", str(bundle), "--window", "512"]
    process = subprocess.Popen(
        [*command, "--engine", "local"],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - in the background it is ignored
    )
    parts = tmp_path / "out" / "_geoseg" / "parts"
    deadline = time.monotonic() + 120
    while sum(1 for _ in parts.rglob("r*c*")) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 130, told
    assert "goes on from there" in told
    assert not (tmp_path / "out" / "big").exists(), "nothing half-done is visible"
    assert read_holder(str(tmp_path / "out")) is None


def test_an_area_of_interest_hides_the_rest(scene: Path, bundle: Path, tmp_path: Path) -> None:
    import rasterio
    from rasterio.warp import transform_geom

    with rasterio.open(scene) as dataset:
        corners = [dataset.transform * (col, row) for col, row in ((100, 50), (500, 50), (301, 650), (100, 50))]
        polygon = transform_geom(dataset.crs, "EPSG:4326", {"type": "Polygon", "coordinates": [corners]}, precision=12)
        inside = rasterio.features.geometry_mask(
            [{"type": "Polygon", "coordinates": [corners]}], dataset.shape, dataset.transform, invert=True
        )
        valid = dataset.dataset_mask() != 0
    area = tmp_path / "area.geojson"
    area.write_text(json.dumps({"type": "Feature", "properties": {}, "geometry": polygon}))
    masks = []
    for window in (512, 1024):
        out = tmp_path / str(window)
        report = geoseg.predict(str(scene), str(out), bundle=str(bundle), aoi=str(area), window=window, engine="local")
        with rasterio.open(report.scenes[0].mask) as dataset:
            masks.append(dataset.read(1))
    np.testing.assert_array_equal(masks[0], masks[1])
    assert ((masks[0] != 255) != (inside & valid)).mean() < 1e-4, "the edge may differ by 1/256 pixel"


@pytest.mark.parametrize("text", ["{}", "[1]", '{"type": "Point", "coordinates": [1, 2]}', "no json"])
def test_an_area_that_is_none_is_refused(text: str, scene: Path, tmp_path: Path) -> None:
    (tmp_path / "area.json").write_text(text)
    with pytest.raises(geoseg.errors.ConfigError, match=r"area.json: (not a GeoJSON|holds no polygon)"):
        geoseg.predict(str(scene), str(tmp_path / "out"), aoi=str(tmp_path / "area.json"), engine="local")


def test_doctor_finds_this_machine_healthy(tmp_path: Path) -> None:
    done = run("doctor", tmp_path)
    assert done.returncode == 0, done.stdout
    assert "refuses to overwrite" in done.stdout


def test_progress_in_a_log_has_a_rate_and_an_eta(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(2)
    progress.ready()
    progress.windows_planned, progress.pixels_planned, progress.scenes_planned = 10, 10_000_000, 2
    progress.window_done(pixels=1_000_000, area_km2=0.5, bytes_fetched=1, failed=False)
    progress.show(last=True)
    line = capsys.readouterr().err
    assert "windows 1/10" in line
    assert "Mpx/s" in line
    assert "km2/h" in line
    assert "ETA" in line
    assert line.endswith("\n")
