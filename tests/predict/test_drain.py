"""A signal ends a run in good order: nothing that is complete is lost, nothing new is begun, and it does not take long."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from kit.oracle import digests
from kit.scenes import noise, tiny_bundle, write_scene

import geoseg
from geoseg.cli import main
from geoseg.predict.drain import Drain
from geoseg.predict.lease import Lease, read_holder
from geoseg.predict.progress import Progress
from geoseg.predict.verify import verify_output
from geoseg.run import RunReport

NUM = 12


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes of two windows each."""
    folder = tmp_path_factory.mktemp("scenes")
    for number in range(NUM):
        write_scene(folder / f"s{number:02}.tif", noise(3, 600, 60, seed=number))
    return folder


@pytest.fixture(scope="module")
def calm(scenes: Path, bundle: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("calm")
    predict(scenes, out, bundle)
    return digests(out)


def predict(scenes: Path, out: Path, bundle: str) -> RunReport:
    return geoseg.predict(str(scenes), str(out), bundle=bundle, engine="local", window=512, read_threads=1)


def send(monkeypatch: pytest.MonkeyPatch, *signals: int, after_windows: int) -> None:
    """Send signals to this process after so many windows, one after each."""
    left = [*[0] * after_windows, *signals]

    count = Progress.window_done

    def window_done(progress: Progress, **what: Any) -> None:
        count(progress, **what)
        number = left.pop(0) if left else 0
        if number:
            signal.raise_signal(number)

    monkeypatch.setattr(Progress, "window_done", window_done)


def records(out: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted((out / "_geoseg" / "runs").rglob("summary.json"))]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("after_windows", [0, 3, 8])
def test_what_is_complete_is_published_and_the_next_run_does_the_rest(
    number: int, after_windows: int, scenes: Path, bundle: str, calm: dict[str, str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    handlers = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        send(patch, number, after_windows=after_windows)
        report = predict(scenes, tmp_path, bundle)
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert "windows at work are finished" in capfd.readouterr().err
    assert report.exit_code == 130
    assert report.windows <= after_windows + 1 + 4, "no more windows than were read ahead"
    assert {scene.status for scene in report.scenes} <= {"published"}
    assert len(report.scenes) == report.windows // 2, "each scene whose windows are all done is published"
    assert report.num_left == NUM - len(report.scenes)
    checked = verify_output(str(tmp_path))
    assert (checked.num_items, checked.faults) == (len(report.scenes), ())
    assert read_holder(str(tmp_path)) is None
    (record,) = records(tmp_path)
    assert (record["exit_code"], record["left"]) == (130, report.num_left)
    assert record["counts"]["failed"] == 0, "what was not begun did not fail"
    again = predict(scenes, tmp_path, bundle)
    assert again.exit_code == 0
    assert again.windows == 2 * NUM - report.windows, "no window is done twice"
    assert digests(tmp_path) == calm


def test_a_second_signal_ends_a_run_at_once(
    scenes: Path, bundle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send(monkeypatch, signal.SIGTERM, signal.SIGTERM, after_windows=2)
    with pytest.raises(KeyboardInterrupt):
        predict(scenes, tmp_path, bundle)
    assert read_holder(str(tmp_path)) is None


def test_a_signal_after_the_last_window_changes_nothing(
    scenes: Path, bundle: str, calm: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send(monkeypatch, signal.SIGTERM, after_windows=2 * NUM - 1)
    report = predict(scenes, tmp_path, bundle)
    assert (report.exit_code, report.num_left) == (0, 0)
    assert digests(tmp_path) == calm


def test_a_drain_that_takes_too_long_ends_and_its_record_is_written(
    scenes: Path, bundle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("geoseg.run.Drain", lambda: Drain(most_s=0.3))
    count = 0

    def check(lease: Lease) -> None:
        nonlocal count
        count += 1
        if count == 3:
            signal.raise_signal(signal.SIGTERM)
            time.sleep(60)

    monkeypatch.setattr(Lease, "check", check)
    start = time.monotonic()
    report = predict(scenes, tmp_path, bundle)
    assert time.monotonic() - start < 30
    assert report.exit_code == 130
    assert [record["exit_code"] for record in records(tmp_path)] == [130]


def test_a_process_that_gets_sigterm_says_how_to_go_on(scenes: Path, bundle: str, tmp_path: Path) -> None:
    slowly = (
        "import sys, time\n"
        "from geoseg.cli import main\n"
        "from geoseg.predict.worker import Worker\n"
        "predict = Worker._predict\n"
        "Worker._predict = lambda *each: (time.sleep(0.2), predict(*each))[1]\n"
        "main(sys.argv[1:])\n"
    )
    arguments = [
        "predict",
        str(scenes),
        "--out",
        str(tmp_path),
        "--bundle",
        bundle,
        "--engine",
        "local",
        "--window",
        "512",
    ]
    process = subprocess.Popen(
        [sys.executable, "-c", slowly, *arguments, "--quiet"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("*/item.json")) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        told, complaint = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130, complaint
    assert told.count("published: ") == len(list(tmp_path.glob("*/item.json"))) >= 1
    assert complaint.splitlines()[-1] == (
        "geoseg: interrupted; what is finished stays, the same command goes on from there"
    )
    assert " left\n" in complaint
    assert read_holder(str(tmp_path)) is None
    assert [record["exit_code"] for record in records(tmp_path)] == [130]


def test_sigterm_before_the_work_begins_interrupts(
    scenes: Path, bundle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("geoseg.run.list_job", lambda *_: signal.raise_signal(signal.SIGTERM))
    try:
        ended = CliRunner().invoke(main, ["predict", str(scenes), "--out", str(tmp_path), "--bundle", bundle])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended.exit_code == 130
    assert "the same command goes on from there" in ended.output


def test_an_ignored_signal_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Drain() as drain:
            signal.raise_signal(signal.SIGINT)
            assert not drain.asked
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
