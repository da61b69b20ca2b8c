"""What it costs to look at a scene more than once: the time of a window against that of the network alone.

    python tests/benchmarks/hybrids.py [--window 1024] [--rounds 5]

The default bundle on random pixels, which are in memory; each window carries the margin that its way needs. Processor time
of one thread, the least of all rounds, since other work on the machine only adds to it.
"""

from __future__ import annotations

import argparse
import math
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
    """Processor time of one window."""
    side = window + 2 * predictor.network.margin
    pixels = np.random.default_rng(0).integers(0, 256, (3, side, side), dtype=np.uint8)
    around = Raster(pixels, np.ones((side, side), np.bool_))
    start = time.process_time()
    predictor.core_logits([around])
    return time.process_time() - start


def main() -> None:
    """Run the rounds and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    set_memory_up()
    torch.set_num_threads(1)
    bundle = load_bundle(DEFAULT_BUNDLE)
    predictors = {name: Predictor(bundle, PredictConfig(**settings)) for name, settings in WAYS.items()}
    least = dict.fromkeys(WAYS, math.inf)
    for name in [*WAYS] * options.rounds:
        least[name] = min(least[name], seconds(predictors[name], options.window))
    print(f"{'way':<20} {'s / Mpx':>8} {'times as long':>14} {'margin':>7}")
    for name, taken in least.items():
        per_mpx, ratio = taken / options.window**2 * 1e6, taken / least[ALONE]
        print(f"{name:<20} {per_mpx:>8.2f} {ratio:>14.2f} {predictors[name].network.margin:>7}")


if __name__ == "__main__":
    main()
