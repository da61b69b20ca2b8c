"""Little is wasted: the rate of a whole run against the bare forward pass over the same windows.

    python tests/benchmarks/end_to_end.py [--side 8192] [--rounds 3]

A generated scene is predicted with the default bundle: by the plain loop, by Ray with one worker and with two. The bare
pass runs the same network on the same windows, batch and number of threads, with the pixels in memory already and the
logits thrown away. Machines drift, so each run lies between two bare passes over a quarter of the windows, and its ratio is
to their mean; the medians of all rounds are printed. Start-up is reported apart. A ratio of 1 wastes nothing.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from kit.oracle import write_scene

from geoseg.config import load_job
from geoseg.predict.plan import plan_scene
from geoseg.predict.reading import Task
from geoseg.predict.worker import Worker
from geoseg.raster.geotiff import SceneReader
from geoseg.raster.scene import SceneRef
from geoseg.raster.synthetic import synthetic_image
from geoseg.run import make_run_spec, run_job

WINDOW = 1024


def job_values(scene: Path, out: Path, **cluster: Any) -> dict[str, Any]:
    """A job of the default bundle."""
    return {"scenes": [str(scene)], "out": str(out), "predict": {"window": WINDOW}, "cluster": cluster}


class BarePass:
    """The network alone over every fourth window of a scene, with the pixels in memory."""

    def __init__(self, scene: Path, out: Path) -> None:
        run = make_run_spec(load_job(None, job_values(scene, out)))
        plan = plan_scene(SceneRef("scene", str(scene)), run)
        tasks = [Task(plan, window) for window in plan.windows(SceneReader(plan.scene))][::4]
        self._worker = Worker(run)
        self._around = [self._worker.reader.read(task).around for task in tasks]
        self._pixels = sum(task.window.width * task.window.height for task in tasks)
        self._worker.predictor.core_logits(self._around[:1])

    def rate(self) -> float:
        """Pixels per second."""
        start = time.perf_counter()
        for raster in self._around:
            self._worker.predictor.core_logits([raster])
        return self._pixels / (time.perf_counter() - start)


def whole_run(scene: Path, out: Path, **cluster: Any) -> tuple[float, float]:
    """Pixels per second of a run from the first window to the last item, and the seconds before."""
    report = run_job(load_job(None, job_values(scene, out, **cluster)), quiet=True)
    assert report.exit_code == 0, report.scenes
    return report.pixels / report.working_s, report.startup_s


def main() -> None:
    """Run the rounds and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    cores = os.cpu_count() or 1
    torch.set_num_threads(cores)
    engines: dict[str, dict[str, Any]] = {
        "plain loop": {"engine": "local"},
        "Ray, 1 worker": {"engine": "ray", "workers": 1},
        f"Ray, {cores} workers": {"engine": "ray", "workers": cores},
    }
    rates: dict[str, list[float]] = {name: [] for name in ["bare forward pass", *engines]}
    ratios: dict[str, list[float]] = {name: [] for name in engines}
    startup: dict[str, list[float]] = {name: [] for name in engines}
    with tempfile.TemporaryDirectory(prefix="geoseg-bench-") as folder:
        made = synthetic_image(options.side, options.side, seed=1, nodata_fraction=0)
        scene = write_scene(Path(folder) / "scene.tif", made.pixels_bhw, blockxsize=512, blockysize=512)
        bare = BarePass(scene, Path(folder) / "bare")
        for turn in range(options.rounds):
            bares = [bare.rate()]
            for name, cluster in engines.items():
                rate, before = whole_run(scene, Path(folder) / f"out-{turn}-{name.replace(' ', '')}", **cluster)
                bares.append(bare.rate())
                rates[name].append(rate)
                ratios[name].append(rate / statistics.mean(bares[-2:]))
                startup[name].append(before)
            rates["bare forward pass"] += bares
    print(f"{'way':<20} {'Mpx/s':>7} {'ratio':>6} {'of each round':>20} {'start-up s':>11}")
    for name, each in rates.items():
        print(f"{name:<20} {statistics.median(each) / 1e6:>7.2f}", end="")
        if name in engines:
            told = " ".join(f"{ratio:.2f}" for ratio in ratios[name])
            print(
                f" {statistics.median(ratios[name]):>6.2f} {told:>20} {statistics.median(startup[name]):>11.1f}", end=""
            )
        print()


if __name__ == "__main__":
    main()
