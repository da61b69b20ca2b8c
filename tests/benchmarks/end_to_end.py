"""Little is wasted: the rate of a whole run against the bare forward pass over the same windows.

    python tests/benchmarks/end_to_end.py [--side 8192] [--rounds 2]

A generated scene is predicted with the default bundle: by the plain loop, by Ray with one worker and with two. The bare
pass runs the same network on the same windows, batch and number of threads, with the pixels in memory already and the
logits thrown away. Rounds alternate, the best of each is kept; start-up is reported apart. A ratio of 1 wastes nothing.
"""

from __future__ import annotations

import argparse
import logging
import os
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


def bare_pass(scene: Path, out: Path) -> float:
    """Pixels per second of the network alone over the scene's windows."""
    run = make_run_spec(load_job(None, job_values(scene, out)))
    plan = plan_scene(SceneRef("scene", str(scene)), run)
    reader = SceneReader(plan.scene)
    tasks = [Task(plan, window) for window in plan.windows(reader)]
    worker = Worker(run)
    around = [worker.reader.read(task).around for task in tasks]
    worker.predictor.core_logits(around[:1])
    start = time.perf_counter()
    for raster in around:
        worker.predictor.core_logits([raster])
    seconds = time.perf_counter() - start
    worker.close()
    return sum(task.window.width * task.window.height for task in tasks) / seconds


def whole_run(scene: Path, out: Path, **cluster: Any) -> tuple[float, float]:
    """Pixels per second of a run from the first window to the last item, and the seconds before."""
    report = run_job(load_job(None, job_values(scene, out, **cluster)), quiet=True)
    assert report.exit_code == 0, report.scenes
    return report.pixels / report.working_s, report.startup_s


def main() -> None:
    """Run the rounds and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    cores = os.cpu_count() or 1
    torch.set_num_threads(cores)
    engines: dict[str, dict[str, Any]] = {
        "plain loop": {"engine": "local"},
        "Ray, 1 worker": {"engine": "ray", "workers": 1},
        f"Ray, {cores} workers": {"engine": "ray", "workers": cores},
    }
    best = dict.fromkeys(["bare forward pass", *engines], 0.0)
    startup = dict.fromkeys(best, float("inf"))
    with tempfile.TemporaryDirectory(prefix="geoseg-bench-") as folder:
        made = synthetic_image(options.side, options.side, seed=1, nodata_fraction=0)
        scene = write_scene(Path(folder) / "scene.tif", made.pixels_bhw, blockxsize=512, blockysize=512)
        for turn in range(options.rounds):
            best["bare forward pass"] = max(best["bare forward pass"], bare_pass(scene, Path(folder) / "bare"))
            for name, cluster in engines.items():
                rate, before = whole_run(scene, Path(folder) / f"out-{turn}-{name.replace(' ', '')}", **cluster)
                best[name], startup[name] = max(best[name], rate), min(startup[name], before)
    print(f"{'way':<20} {'Mpx/s':>7} {'ratio':>6} {'start-up s':>11}")
    for name, rate in best.items():
        before = f"{startup[name]:.1f}" if name in engines else ""
        print(f"{name:<20} {rate / 1e6:>7.2f} {rate / best['bare forward pass']:>6.2f} {before:>11}")


if __name__ == "__main__":
    main()
