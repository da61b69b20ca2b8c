"""What losses and border weights cost beside reading a chip and a step of the network, in one thread.

    python tests/benchmarks/losses.py

Chips of 512 x 512 pixels of Kampala at about 0.15 m and 0.3 m (the imagery lies where GEOSEG_TEST_DATA says); milliseconds per
chip, the median over chips of the median of rounds, and the slowest chip. The step and the losses, forward and backward,
are those of one such chip with three classes.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import rasterio
import torch
from kit.buildings import HELD_OUT, BuildingScene, read_buildings
from kit.data import data_folder
from numpy.typing import NDArray
from rasterio.windows import Window

from geoseg.model.unet import UNet
from geoseg.pieces import connected
from geoseg.train.border import border_weights, cut_touching
from geoseg.train.codes import UNLABELLED
from geoseg.train.loss import ClDice, CrossEntropy, Dice, Focal, Loss, Lovasz, Tversky

SIDE = 512


def milliseconds(work: Callable[..., object], *given: object, rounds: int = 15) -> float:
    """The median of rounds, after one that does not count."""
    work(*given)
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        work(*given)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken) * 1e3


def chips(scene: BuildingScene, step: int) -> Iterator[tuple[slice, slice]]:
    """Places of chips with image on a third of them or more."""
    height, width = scene.labels_hw.shape
    for row in range(0, height - SIDE + 1, step):
        for col in range(0, width - SIDE + 1, step):
            cut = slice(row, row + SIDE), slice(col, col + SIDE)
            if (scene.labels_hw[cut] != UNLABELLED).mean() > 1 / 3:
                yield cut


def told(name: str, each: list[float]) -> None:
    """One line."""
    print(f"{name:<34} {statistics.median(each):>7.1f} {max(each):>7.1f}", flush=True)


def labels_of(scene: BuildingScene) -> list[tuple[NDArray[np.uint8], NDArray[np.int32]]]:
    """Labels and instances of each chip."""
    step = SIDE if scene.size_m < 0.2 else SIDE // 2
    return [
        (np.ascontiguousarray(scene.labels_hw[cut]), np.ascontiguousarray(scene.instances_hw[cut]))
        for cut in chips(scene, step)
    ]


def one_step(network: torch.nn.Module, loss: Loss, image: torch.Tensor, labels: torch.Tensor) -> None:
    """Forward and backward."""
    loss(network(image), labels).backward()


def read(path: Path, window: Window) -> None:
    """The pixels; the file is opened and closed, so that no decoded block is kept."""
    with rasterio.open(path) as source:
        source.read((1, 2, 3), window=window)


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    folder = data_folder()
    print(f"{'':<34} {'median':>7} {'slowest':>7}")
    for coarser in (1, 2):
        scene = read_buildings(folder, HELD_OUT, coarser=coarser)
        drawn = labels_of(scene)
        where = f"{scene.size_m:.2f} m"
        counts = [len(np.unique(instances)) - 1 for _, instances in drawn]
        print(f"{where}: {len(drawn)} chips, {min(counts)} to {max(counts)} buildings")
        told("border_weights", [milliseconds(border_weights, *chip) for chip in drawn])
        told("connected", [milliseconds(connected, chip[0] == 1) for chip in drawn])
        told("cut_touching", [milliseconds(cut_touching, *chip) for chip in drawn])
        if coarser == 1:
            path = folder / "hot_buildings" / f"{HELD_OUT}_z20.tif"
            windows = [Window(cut[1].start, cut[0].start, SIDE, SIDE) for cut in chips(scene, SIDE)]
            told("read and decode, 3 bands, deflate", [milliseconds(read, path, window) for window in windows])
    print("one chip of 512 x 512, three classes, forward and backward")
    image, labels = torch.randn(1, 3, SIDE, SIDE), torch.randint(0, 3, (1, SIDE, SIDE))
    network = UNet(3, 3, depth=4, width=16, norm="batch")
    told("U-Net, depth 4, width 16", [milliseconds(one_step, network, CrossEntropy(), image, labels, rounds=3)])
    logits = torch.randn(1, 3, SIDE, SIDE, requires_grad=True)
    for loss in (CrossEntropy(), Focal(), Dice(), Tversky(), Lovasz(), ClDice(classes=(2,))):
        told(type(loss).__name__, [milliseconds(one_step, torch.nn.Identity(), loss, logits, labels)])


if __name__ == "__main__":
    main()
