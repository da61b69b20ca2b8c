"""Windows that do not fit the memory: the batch is halved, then the scene is named, and the others are done."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kit.oracle import digests, seeded_bundle
from kit.scenes import noise, write_scene

import geoseg
from geoseg.predict.predictor import Predictor

WINDOWS, ROUNDS, BATCH = 9, 2, 8
# A first run takes what libraries take once; what the second one may take on top fits a small window, not a large one.
UNDER_A_LIMIT = """
import json, resource, sys
from pathlib import Path
import torch
import geoseg
torch.set_num_threads(1)
scenes, small, out, bundle, spare_mib = sys.argv[1:]
asked = {"bundle": bundle, "engine": "local", "window": 2048, "batch": 1}
geoseg.predict(small, out + "/first", **asked)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (int(spare_mib) << 20), resource.RLIM_INFINITY))
report = geoseg.predict(scenes, out + "/limited", **asked)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(json.dumps({scene.id: [scene.status, scene.sentence] for scene in report.scenes} | {"exit": report.exit_code}))
"""


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError()])
def test_what_never_fits_is_named_and_comes_to_an_end(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figure: Callable[..., None]
) -> None:
    write_scene(tmp_path / "in" / "large.tif", noise(3, 1030, 1500))
    for number in range(2):
        write_scene(tmp_path / "in" / f"small-{number}.tif", noise(3, 40, 53, seed=number))
    asked: dict[str, Any] = {"bundle": str(seeded_bundle(tmp_path / "bundle")), "engine": "local", "window": 512}
    geoseg.predict(str(tmp_path / "in"), str(tmp_path / "calm"), **asked)
    original, sizes = Predictor.core_logits, list[int]()

    def core_logits(self: Predictor, around: list[Any]) -> Any:
        if max(around[0].pixels.shape) > 200:
            sizes.append(len(around))
            raise error
        return original(self, around)

    monkeypatch.setattr(Predictor, "core_logits", core_logits)
    report = geoseg.predict(str(tmp_path / "in"), str(tmp_path / "out"), **asked, batch=BATCH)
    told = {scene.id: (scene.status, scene.sentence) for scene in report.scenes}
    most = ROUNDS * (2 * WINDOWS - 1)
    kind = type(error).__name__
    figure("R12", f"forward passes over {WINDOWS} windows that never fit ({kind})", len(sizes), goal=f"<= {most}")
    assert len(sizes) <= most, "each window alone at last, and once more in the last round; then it is over"
    assert sizes.count(1) == ROUNDS * WINDOWS
    status, sentence = told.pop("large")
    assert status == "failed"
    assert sentence.startswith("large: ")
    assert "smaller --window" in sentence
    assert {status for status, _ in told.values()} == {"published"}
    assert report.exit_code == 1
    calm = digests(tmp_path / "calm")
    assert digests(tmp_path / "out") == {name: one for name, one in calm.items() if not name.startswith("large/")}


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
@pytest.mark.slow
@pytest.mark.chaos
def test_a_limit_of_the_system_names_the_scene(tmp_path: Path, figure: Callable[..., None]) -> None:
    """The same scene is done by the next run, with smaller windows."""
    write_scene(tmp_path / "in" / "large.tif", noise(3, 2048, 2048), tiled=True)
    for number in range(4):
        write_scene(tmp_path / "in" / f"small-{number}.tif", noise(3, 300, 300, seed=number))
    bundle = str(seeded_bundle(tmp_path / "bundle"))
    done = subprocess.run(
        [
            sys.executable, "-c", UNDER_A_LIMIT, str(tmp_path / "in"), str(tmp_path / "in" / "small-0.tif"),
            str(tmp_path / "out"), bundle, "200",
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    status, sentence = told["large"]
    others = [told[f"small-{number}"][0] for number in range(4)]
    figure(
        "R12",
        "other scenes done beside one that does not fit the memory",
        f"{others.count('published')} of 4",
        goal="4 of 4",
    )
    assert status == "failed", told
    assert sentence.startswith("large: ")
    assert "there was not enough memory: take a smaller --window" in sentence
    assert others == ["published"] * 4
    assert told["exit"] == 1
    again = geoseg.predict(
        str(tmp_path / "in"), str(tmp_path / "out" / "limited"), bundle=bundle, engine="local", window=512
    )
    assert again.exit_code == 0, again.scenes
