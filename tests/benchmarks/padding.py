"""What valid convolutions save: the U-Net of 2015 on a window and its context, padded="valid" against padded="same".

    python tests/benchmarks/padding.py [--width 32] [--rounds 3]

Both give the same logits of the core. Padded, the context is rounded up to the stride and its border is computed and thrown
away. Operations are counted while it runs; the times of the two ways are taken in turns and their ratios' median is printed.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from geoseg.model.network import Network
from geoseg.model.unet import UNet


def run(network: Network, image: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Logits of the core and seconds."""
    start = time.perf_counter()
    with torch.inference_mode():
        logits = network.core_logits(image)
    return logits, time.perf_counter() - start


def main() -> None:
    """Print a line for each side of a window."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.manual_seed(0)
    network = UNet(3, 3, width=options.width, norm="batch").eval().folded()
    print(
        f"{'window':>6} {'GFLOP same':>11} {'valid':>7} {'ratio':>6} {'s same':>7} {'valid':>6} {'ratio':>6} {'differ by':>10}"
    )
    for window in (512, 1024):
        side = window + 2 * network.margin
        image = torch.randn(1, 3, side, side).to(memory_format=torch.channels_last)
        flops, seconds, logits = {}, {"same": [], "valid": []}, {}
        for padding in ("same", "valid"):
            with network.padded(padding), FlopCounterMode(display=False) as counter:
                logits[padding], _ = run(network, image)
            flops[padding] = counter.get_total_flops() / 1e9
        for _ in range(options.rounds):
            for padding, times in seconds.items():
                with network.padded(padding):
                    times.append(run(network, image)[1])
        ratio = statistics.median(v / s for v, s in zip(seconds["valid"], seconds["same"], strict=True))
        differ = float((logits["valid"] - logits["same"]).abs().max())
        same, valid = (statistics.median(seconds[padding]) for padding in ("same", "valid"))
        print(
            f"{window:>6} {flops['same']:>11.0f} {flops['valid']:>7.0f} {flops['valid'] / flops['same']:>6.2f} "
            f"{same:>7.2f} {valid:>6.2f} {ratio:>6.2f} {differ:>10.1e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
