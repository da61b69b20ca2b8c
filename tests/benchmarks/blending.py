"""What blending costs in pixels: masks of a network that sees its whole input, in tiles, against one pass over the scene.

    python tests/benchmarks/blending.py [--steps 160] [--tiles 256 512 1024]

A U-Net with the encoder efficientnet-b0 of segmentation_models.pytorch, whose squeeze-and-excitation blocks take a mean over all
that they see; fitted for a few minutes on dubai_1, dubai_3 and dubai_5, held against one pass over the whole of dubai_2. Cut:
tiles side by side without overlap, as a loop over a scene is often written.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import rasterio
import torch
from numpy.typing import NDArray
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from kit.data import data_folder
from kit.encoders import real_encoders

from geoseg.model.description import OutsideVariant
from geoseg.model.normalize import Normalization
from geoseg.model.outside import Outside, build_outside, measured
from geoseg.model.tiling import Tiling, tiling
from geoseg.predict.seams import Seams, count_seams
from geoseg.predict.stitch import Stitching
from geoseg.predict.tiles import run_tiles
from geoseg.raster.resample import mirrored
from geoseg.raster.window import Window

TRAINING, HELD_OUT = ("dubai_1", "dubai_3", "dubai_5"), "dubai_2"
VARIANT = OutsideVariant(name="smp", encoder="efficientnet-b0", options={"decoder_channels": (64, 32, 16, 16, 8)})
NORMALIZE = Normalization(mean=(115.5, 116.0, 105.8), std=(49.7, 47.0, 48.8))
CHIP, BATCH, NUM_CLASSES, NODATA = 256, 4, 3, 255
CLASS_WEIGHTS = torch.tensor([0.5, 2.0, 2.0])  # or so few steps would call everything background


def read(name: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Pixels (band, row, col) of a scene, and its labels, 255 where nothing is told."""
    with rasterio.open(data_folder() / "dubai" / f"{name}.tif") as source:
        pixels_bhw, valid_hw = source.read((1, 2, 3)), source.dataset_mask() != 0
    with rasterio.open(data_folder() / "dubai" / f"{name}_classes.tif") as source:
        labels_hw = source.read(1)
    return pixels_bhw, np.where(valid_hw & (labels_hw < NUM_CLASSES), labels_hw, NODATA).astype(np.uint8)


def network_input(pixels_bhw: NDArray[np.uint8]) -> Tensor:
    """Network input (1, band, row, col) of pixels that are all valid."""
    image_bkhw = torch.from_numpy(np.ascontiguousarray(pixels_bhw))[None]
    return NORMALIZE(image_bkhw, torch.ones(1, *image_bkhw.shape[2:], dtype=torch.bool))


def fit(network: Outside, steps: int) -> None:
    """Fit a network on chips from the training scenes."""
    rng = np.random.default_rng(0)
    scenes = [read(name) for name in TRAINING]
    optimiser = torch.optim.AdamW(network.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps)
    network.train()
    for _ in range(steps):
        images, labels = [], []
        while len(images) < BATCH:
            pixels_bhw, labels_hw = scenes[rng.integers(len(scenes))]
            row, col = (int(rng.integers(size - CHIP)) for size in labels_hw.shape)
            cut = (slice(row, row + CHIP), slice(col, col + CHIP))
            if (labels_hw[cut] != NODATA).any():
                images.append(network_input(pixels_bhw[(slice(None), *cut)]))
                labels.append(torch.from_numpy(labels_hw[cut].astype(np.int64)))
        loss = torch.nn.functional.cross_entropy(
            network(torch.cat(images)), torch.stack(labels), CLASS_WEIGHTS, ignore_index=NODATA
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    network.eval()


def in_tiles(network: Outside, pixels_bhw: NDArray[np.uint8], tiles: Tiling) -> tuple[NDArray[np.int64], Seams | None]:
    """The classes of a scene in tiles, and what those that overlap disagree about; mirrored outside."""
    rows, cols = pixels_bhw.shape[1:]
    reached = [-(-size // tiles.step) * tiles.step for size in (rows, cols)]
    places = [
        mirrored(-tiles.margin, end + tiles.margin, size) for end, size in zip(reached, (rows, cols), strict=True)
    ]
    image_bkhw = network_input(pixels_bhw[:, places[0][:, None], places[1][None, :]])
    logits_chw, differ_ahw = run_tiles(network, image_bkhw, tiles)
    classes_hw = logits_chw[:, :rows, :cols].argmax(0).numpy()
    if differ_ahw is None:
        return classes_hw, None
    stitching = Stitching((rows, cols), (rows, cols), 0, (rows, cols), tiles.step, tiles.margin)
    write = Window(0, 0, cols, rows)
    return classes_hw, count_seams(
        differ_ahw, tiles, stitching, stitching.core(write), write, np.ones((rows, cols), np.bool_)
    )


@torch.inference_mode()
def compare(network: Outside, sides: list[int]) -> None:
    """Print a line for each way to cut the scene."""
    pixels_bhw, labels_hw = read(HELD_OUT)
    stride = network.stride
    whole_px = max(-(-size // stride) * stride for size in labels_hw.shape)
    whole_hw, _ = in_tiles(network, pixels_bhw, Tiling(whole_px, whole_px, 0, is_blended=False))
    known = labels_hw != NODATA
    print(f"one pass: {(whole_hw == labels_hw)[known].mean():.3f} of the pixels right")
    print(f"{'tile':>5} {'way':<8} {'not as in one pass':>18} {'right':>6} {'at rims':>8} {'inside':>8} {'score':>6}")
    for side in sides:
        for tiles in (Tiling(side, side, 0, is_blended=False), tiling(stride, None, side)):
            classes_hw, seams = in_tiles(network, pixels_bhw, tiles)
            told = f"{seams.at_rim:>8.4f} {seams.inside:>8.4f} {seams.score:>6.2f}" if seams is not None else ""
            print(
                f"{side:>5} {'blended' if tiles.is_blended else 'cut':<8} {(classes_hw != whole_hw).mean():>18.4f} "
                f"{(classes_hw == labels_hw)[known].mean():>6.3f} {told}",
                flush=True,
            )


def main() -> None:
    """Fit and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--tiles", type=int, nargs="+", default=[256, 512, 1024])
    options = parser.parse_args()
    with real_encoders():
        torch.manual_seed(0)
        start = time.perf_counter()
        network = build_outside(measured(VARIANT, 3), 3, NUM_CLASSES)
        fit(network, options.steps)
        margin = "none" if network.measured_margin is None else network.measured_margin
        print(f"{VARIANT.title}: margin {margin}; {options.steps} steps in {time.perf_counter() - start:.0f} s")
        compare(network, options.tiles)


if __name__ == "__main__":
    try:
        main()
    except BaseException as error:
        if type(error).__name__ != "Skipped":
            raise
        print(error)
