"""A huge scene beside many small ones: when the small ones are published, by URI (the huge one first) and in turns.

    python tests/benchmarks/fairness.py [--side 8192] [--small 60] [--window 512] [--workers 2] [--engines local ray]

Scenes of noise lie in a folder; an untrained bundle of a few kB predicts them. Shares are of the time from the first window's
part to the last item, as the files' times tell; 0 % is when work begins, 100 % when everything is published.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import rasterio
import torch
from kit.oracle import digests
from kit.scenes import AT_UTM, UTM, noise, tiny_bundle, write_scene
from rasterio.windows import Window

import geoseg
from geoseg.predict.turns import Turn
from geoseg.run import RunReport

HUGE = "a-huge"


def write_huge(path: Path, side: int) -> None:
    """Write a scene of noise piece by piece."""
    path.parent.mkdir(parents=True)
    rng = np.random.default_rng(0)
    with rasterio.open(
        path, "w", driver="GTiff", count=3, height=side, width=side, dtype="uint8", crs=UTM, transform=AT_UTM,
        tiled=True, blockxsize=512, blockysize=512, photometric="rgb", BIGTIFF="YES",
    ) as dataset:  # fmt: skip
        for row in range(0, side, 512):
            height = min(512, side - row)
            dataset.write(rng.integers(1, 255, (3, height, side), dtype="uint8"), window=Window(0, row, side, height))


class FirstPart:
    """When the first window's part of a run stands."""

    def __init__(self, out: Path) -> None:
        self.at = 0.0
        self._parts = out / "_geoseg" / "parts"
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not any(self._parts.rglob("r*c*")):
            time.sleep(0.01)
        self.at = time.time()


def shares(out: Path, report: RunReport, began: float) -> list[float]:
    """Share of the work's time at which each small scene was published, in order."""
    at = {scene.id: (out / scene.id / "item.json").stat().st_mtime for scene in report.scenes}
    end = max(at.values())
    return sorted((one - began) / (end - began) for scene, one in at.items() if scene != HUGE)


def run(scenes: Path, out: Path, bundle: str, in_turns: bool, **settings: object) -> tuple[RunReport, float, float]:
    """One run from nothing: what it says, its seconds, and when its first part stood."""
    shutil.rmtree(out, ignore_errors=True)
    by_uri = mock.patch("geoseg.run.take_turns", lambda refs, _: [Turn(ref) for ref in refs])
    first, start = FirstPart(out), time.perf_counter()
    if in_turns:
        report = geoseg.predict(str(scenes), str(out), bundle=bundle, **settings)
    else:
        with by_uri:
            report = geoseg.predict(str(scenes), str(out), bundle=bundle, **settings)
    assert report.exit_code == 0, report.summary()
    return report, time.perf_counter() - start, first.at


def main() -> None:
    """Run both orders on each engine and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=8192)
    parser.add_argument("--small", type=int, default=60)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--engines", nargs="+", default=["local", "ray"])
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="geoseg-bench-") as name:
        folder = Path(name)
        bundle = tiny_bundle(folder / "bundle")
        write_huge(folder / "in" / f"{HUGE}.tif", options.side)
        for number in range(options.small):
            side = 256 + 64 * (number % 5)
            write_scene(folder / "in" / f"b{number:03}.tif", noise(3, side, side, seed=number))
        print(f"{'engine':<7} {'order':<8} {'half of the small':>18} {'all small':>10} {'seconds':>8} {'MB read':>8}")
        made = set()
        for engine in options.engines:
            for order in ("by URI", "in turns"):
                settings = {"engine": engine, "window": options.window}
                settings |= {"workers": options.workers} if engine == "ray" else {}
                report, seconds, began = run(folder / "in", folder / "out", bundle, order == "in turns", **settings)
                small = shares(folder / "out", report, began)
                print(
                    f"{engine:<7} {order:<8} {small[len(small) // 2]:>18.1%} {small[-1]:>10.1%} {seconds:>8.1f} "
                    f"{report.bytes_read / 1e6:>8.1f}",
                    flush=True,
                )
                made.add(tuple(sorted(digests(folder / "out").items())))
        print(f"objects of all runs are the same: {len(made) == 1}")


if __name__ == "__main__":
    main()
