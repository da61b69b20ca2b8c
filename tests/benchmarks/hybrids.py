"""What it costs to look at a scene more than once: the time of a window against that of the network alone.

    python tests/benchmarks/hybrids.py [--window 1024] [--rounds 3] [--threads 1]

The default bundle on random pixels, which are in memory; each window carries the margin that its way needs. Machines drift,
so each round runs all ways in turn, and a ratio is to the same round's network alone; the medians are printed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy as np
import torch

from geoseg.config import DEFAULT_BUNDLE, PredictConfig
from geoseg.predict.bundles import load_bundle
from geoseg.predict.memory import set_memory_up
from geoseg.predict.predictor import Predictor
from geoseg.raster.raster import Raster

ALONE = "the network alone"
WAYS: dict[str, dict[str, Any]] = {
    ALONE: {},
    "--pyramid 2": {"pyramid": (2,)},
    "--pyramid 1,2": {"pyramid": (1, 2)},
    "--pyramid 1,2,4": {"pyramid": (1, 2, 4)},
    "--flips-and-turns": {"flips_and_turns": True},
    "both, 1,2,4": {"flips_and_turns": True, "pyramid": (1, 2, 4)},
}


def seconds(predictor: Predictor, window: int) -> float:
    """The time of one window."""
    side = window + 2 * predictor.network.margin
    pixels = np.random.default_rng(0).integers(0, 256, (3, side, side), dtype=np.uint8)
    around = Raster(pixels, np.ones((side, side), np.bool_))
    start = time.perf_counter()
    predictor.core_logits([around])
    return time.perf_counter() - start


def main() -> None:
    """Run the rounds and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    set_memory_up()
    torch.set_num_threads(options.threads)
    bundle = load_bundle(DEFAULT_BUNDLE)
    predictors = {name: Predictor(bundle, PredictConfig(**settings)) for name, settings in WAYS.items()}
    for predictor in predictors.values():
        seconds(predictor, options.window)
    rounds = [
        {name: seconds(predictor, options.window) for name, predictor in predictors.items()}
        for _ in range(options.rounds)
    ]
    print(f"{'way':<20} {'Mpx/s':>7} {'times as long':>14} {'margin':>7}")
    for name, predictor in predictors.items():
        rate = options.window**2 / statistics.median(each[name] for each in rounds) / 1e6
        ratio = statistics.median(each[name] / each[ALONE] for each in rounds)
        print(f"{name:<20} {rate:>7.2f} {ratio:>14.2f} {predictor.network.margin:>7}")


if __name__ == "__main__":
    main()
