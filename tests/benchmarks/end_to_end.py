"""Little is wasted: the rate of a whole run against the bare forward pass over the same windows.

    python tests/benchmarks/end_to_end.py [--side 8192] [--rounds 3] [--store bucket] [--predict window=2048]

A generated scene is predicted with the default bundle and geoseg's defaults: by the plain loop, by Ray with one worker and with
one for each core, each in a process of its own; read from the real object store (or a folder) and published there. The bare
pass runs the same network on the same windows, batch and number of threads, with the pixels in memory already and the
logits thrown away. Machines drift, so each run lies between two bare passes over a quarter of the windows, and its ratio is
to their mean; the medians of all rounds are printed. Start-up (imports, Ray) is reported apart, and counts in CPU and peak:
the CPU seconds are those of the whole program and of what it starts, the object store's left out. A ratio of 1 wastes nothing.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from benchmarks.ways import Outcome, Task, run_way
from kit.benched import STORES, BarePass, benched_scene

from geoseg.config import DEFAULT_BUNDLE

MIB = 2**20


def setting(text: str) -> tuple[str, Any]:
    """A setting of ``[predict]`` from ``name=value``."""
    name, _, value = text.partition("=")
    return name, int(value) if value.isdigit() else value


def main() -> None:
    """Run the rounds and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--store", choices=STORES, default="bucket")
    parser.add_argument("--bundle", default=DEFAULT_BUNDLE)
    parser.add_argument("--predict", type=setting, nargs="*", default=[], metavar="NAME=VALUE")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    cores = len(os.sched_getaffinity(0))
    engines: dict[str, dict[str, Any]] = {
        "plain loop": {"engine": "local"},
        "Ray, 1 worker": {"engine": "ray", "workers": 1},
        f"Ray, {cores} workers": {"engine": "ray", "workers": cores},
    }
    bares: list[tuple[float, float]] = []
    runs: dict[str, list[Outcome]] = {name: [] for name in engines}
    ratios: dict[str, list[float]] = {name: [] for name in engines}
    mpx = options.side**2 / 1e6
    with benched_scene(options.side, where=options.store) as scene:
        predict = dict(options.predict)
        bare = BarePass(scene.uri, bundle=options.bundle, predict=predict)
        threads = torch.get_num_threads()
        told = f"{mpx:.0f} Mpx from and to a {options.store}, {options.bundle}, windows of {bare.window}, {threads} threads"
        print(told, flush=True)
        for turn in range(options.rounds):
            bares.append(bare.rate())
            for place, (name, cluster) in enumerate(engines.items()):
                out = f"{scene.root}/{turn}-{place}"
                task = Task(scene=scene.uri, out=out, bundle=options.bundle, predict=predict, cluster=cluster)
                runs[name].append(run_way("geoseg", task, environment=scene.environment))
                bares.append(bare.rate())
                between = statistics.mean(rate for rate, _ in bares[-2:])
                ratios[name].append(mpx * 1e6 / runs[name][-1].working_s / between)
    rate, cpu_s = (statistics.median(column) for column in zip(*bares, strict=True))
    print(
        f"{'way':<20} {'Mpx/s':>7} {'ratio':>6} {'of each round':>20} {'CPU s/Mpx':>10} {'peak MiB':>9} {'start-up s':>11}"
    )
    print(f"{'bare forward pass':<20} {rate / 1e6:>7.2f} {'':>27} {cpu_s * 1e6:>10.2f}")
    for name, each in runs.items():
        working_s, startup_s, used_s, peak = (
            statistics.median(getattr(run, key) for run in each)
            for key in ("working_s", "startup_s", "cpu_s", "peak_bytes")
        )
        told = " ".join(f"{ratio:.2f}" for ratio in ratios[name])
        print(
            f"{name:<20} {mpx / working_s:>7.2f} {statistics.median(ratios[name]):>6.2f} {told:>20} {used_s / mpx:>10.2f} "
            f"{peak / MIB:>9.0f} {startup_s:>11.1f}"
        )


if __name__ == "__main__":
    main()
