"""Scaling: how much more 2, 4 and 8 nodes do than one, where it bends, the tail of a run, and what a window costs the driver.

    python tests/benchmarks/scaling.py [--nodes 1 2 4 8] [--window-ms 400 100 25] [--seconds 60]

Nodes are simulated on this machine (``ray.cluster_utils``), each with one GPU that is none: a device actor that sleeps for the
time a GPU would take for a window, and neither reads nor writes; publishing is left out too. Planning, listing the windows of a
real GeoTIFF, Ray's operators, shares and the ledger are those of a run. Efficiency is windows per second of n nodes by n times
those of the first, from when all workers stand until the last window, so the tail is in it. ``driver`` is the CPU time of the
driver's process per window. The second table is of one long scene and fifty short ones: the share of the workers' time in which
they have nothing to do, from when all stand until the end. On few cores the nodes' own processes compete for them.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import sleeping
from kit.big import write_repeated
from kit.scenes import tiny_bundle

import geoseg.cluster.predict
from geoseg.config import load_job
from geoseg.predict.drain import Drain
from geoseg.predict.ledger import Ledger
from geoseg.predict.progress import Progress
from geoseg.predict.turns import take_turns
from geoseg.raster.synthetic import synthetic_image
from geoseg.raster.versions import Versions
from geoseg.run import list_refs, make_run_spec

WINDOW = 512


@contextmanager
def nodes(num: int) -> Iterator[None]:
    """A cluster of a head without a GPU and so many nodes with one each."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": 128 << 20})
    try:
        for _ in range(num):
            cluster.add_node(num_cpus=1, num_gpus=1, object_store_memory=96 << 20)
        paths = [str(Path(__file__).resolve().parents[at]) for at in (1, 2)]
        ray.init(
            address=cluster.address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": {"PYTHONPATH": ":".join(paths)}},
        )
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


class Watched(Progress):
    """Notes when workers stood and windows ended."""

    def __init__(self, num_scenes: int) -> None:
        super().__init__(num_scenes, quiet=True)
        self.ready_at: set[float] = set()
        self.ended_at: list[float] = []

    def ready(self, at: float | None = None) -> None:
        """See ``Progress``."""
        super().ready(at)
        self.ready_at.add(at or time.time())

    def window_done(self, **told: Any) -> None:
        """See ``Progress``."""
        super().window_done(**told)
        self.ended_at.append(time.time())


@dataclass(frozen=True)
class Ran:
    """Windows, workers, windows per second and the share of idle time since all workers stood, start-up, the driver's CPU time."""

    windows: int
    rate: float
    idle: float
    startup_s: float
    driver_us: float


def run(scenes: list[Path], bundle: str, out: Path, *, num: int, window_ms: float) -> Ran:
    """Run scenes on the cluster that is up, with workers that sleep."""
    values = {"scenes": [str(path) for path in scenes], "out": str(out), "bundle": bundle}
    job = load_job(None, {**values, "predict": {"window": WINDOW}, "cluster": {"engine": "ray"}})
    spec = make_run_spec(job)
    refs = list_refs(job, spec)
    versions = Versions()
    versions.look_up(uri for ref in refs for uri in ref.uris)
    progress = Watched(len(refs))
    ledger = Ledger(progress)
    began, cpu = time.time(), time.process_time()
    with pytest.MonkeyPatch.context() as patch:
        sleeping.use(patch, window_ms / 1000)
        geoseg.cluster.predict.predict_on_cluster(
            take_turns(refs, versions),
            spec,
            ledger,
            cluster=job.cluster,
            run_id=out.name,
            check=lambda: None,
            drain=Drain(),
        )
    cpu = time.process_time() - cpu
    assert [report.status for report in ledger.reports] == ["published"] * len(refs), ledger.reports
    since, until = max(progress.ready_at), progress.ended_at[-1]
    ended = sum(at > since for at in progress.ended_at)
    rate = ended / (until - since)
    return Ran(
        windows=len(progress.ended_at),
        rate=rate,
        idle=1 - rate * window_ms / 1000 / num,
        startup_s=since - began,
        driver_us=cpu / len(progress.ended_at) * 1e6,
    )


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--window-ms", nargs="+", type=float, default=[400, 100, 25])
    parser.add_argument(
        "--seconds", type=float, default=60, help="that the sleeps of a run take at each number of nodes"
    )
    parser.add_argument("--no-tail", action="store_true", help="leave the second table out")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="geoseg-scaling-") as name:
        folder = Path(name)
        block = synthetic_image(512, 512, seed=1, nodata_fraction=0).pixels_bhw
        bundle = tiny_bundle(folder / "bundle")
        ran: dict[tuple[int, float], Ran] = {}
        tails: list[str] = []
        print(
            f"{'nodes':>5} {'ms/window':>9} {'windows':>8} {'per s':>8} {'efficiency':>10} {'start-up s':>10} {'driver us':>9}"
        )
        for num in options.nodes:
            with nodes(num):
                for window_ms in options.window_ms:
                    side = max(1, round((options.seconds * num * 1000 / window_ms) ** 0.5))
                    scene = write_repeated(folder / f"{num}-{window_ms}.tif", block, side * WINDOW)
                    done = run([scene], bundle, folder / f"out-{num}-{window_ms}", num=num, window_ms=window_ms)
                    ran[num, window_ms] = done
                    first = ran[options.nodes[0], window_ms]
                    efficiency = done.rate / first.rate / num * options.nodes[0]
                    print(
                        f"{num:>5} {window_ms:>9.4g} {done.windows:>8} {done.rate:>8.1f} {efficiency:>10.3f} "
                        f"{done.startup_s:>10.1f} {done.driver_us:>9.0f}",
                        flush=True,
                    )
                if not options.no_tail:
                    window_ms = options.window_ms[0]
                    windows = options.seconds * num * 1000 / window_ms
                    long = max(2, round((windows / 2) ** 0.5))
                    short = max(1, round((windows / 100) ** 0.5))
                    mixed = [write_repeated(folder / f"tail-{num}-a.tif", block, long * WINDOW)]
                    names = [folder / f"tail-{num}-s{number}.tif" for number in range(50)]
                    mixed += [write_repeated(path, block, short * WINDOW) for path in names]
                    done = run(mixed, bundle, folder / f"tail-{num}", num=num, window_ms=window_ms)
                    tails.append(f"{num:>5} {long**2:>5} + 50 x {short**2:<4} {done.rate:>8.1f} {done.idle:>7.3f}")
        if tails:
            print(f"\n{'nodes':>5} {'windows':>17} {'per s':>8} {'idle':>7}   ({options.window_ms[0]:g} ms a window)")
            print("\n".join(tails))


if __name__ == "__main__":
    main()
