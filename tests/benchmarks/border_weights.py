"""Neighbours are kept apart: a small U-Net trained with and without the border weights, on real buildings.

    python tests/benchmarks/border_weights.py [--steps 400] [--seeds 3] [--picture weights.png]

Measured on Kampala, which is dense, at about 0.3 m, in two folds: its block of 512 x 512 stored pixels with the most buildings,
and its other blocks. A network that is measured on one was trained on the other, and on Zanzibar and Nairobi at 0.3 and
0.6 m. For each seed each way sees the same chips, from the same first weights of the network, in the same order; only the
weights of pixels differ:

    classes  w_c alone, which balances ground and buildings over all the training pixels
    even     w_c, and on ground the mean that the border term has there in that chip: as much weight, not between buildings
    border   w_c and the border term, as in the U-Net paper

``pairs apart`` is the share of pairs of buildings with a gap of 4 pixels or less of which both are found, and no piece of
the prediction joins them. A building is found when half of it is predicted; a piece joins two when it covers a fifth of
each. ``of found`` has the pairs of which both are found for its whole. ``matched`` is the share of buildings that have a piece
of the prediction with an IoU of 0.5 or more, ``IoU`` that of the class. Buildings that reach beyond the image are left out.
The imagery lies where GEOSEG_TEST_DATA says. ``--picture`` draws the weights of the densest chip and does nothing else.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import shapely
import torch
from kit.buildings import HELD_OUT, TRAINING, BuildingScene, read_buildings
from kit.data import data_folder
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from geoseg.model.normalize import Normalization
from geoseg.model.unet import UNet
from geoseg.pieces import connected
from geoseg.train.border import balanced, border_weights
from geoseg.train.codes import UNLABELLED
from geoseg.train.loss import CrossEntropy

CHIP, BATCH, GAP = 128, 4, 4.0
WAYS = ("classes", "even", "border")


def draw_chip(
    scenes: list[BuildingScene], whole: list[NDArray[np.intp]], rng: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.int32]]:
    """Pixels, labels and instances around a building, turned and mirrored; every other one of the first scene."""
    place = 0 if rng.random() < 0.5 else rng.integers(len(scenes))
    scene = scenes[place]
    height, width = scene.labels_hw.shape
    middle = scene.outlines[rng.choice(whole[place]) - 1].centroid
    row, col = (int(at - rng.uniform(0.2, 0.8) * CHIP) for at in (middle.y, middle.x))
    row, col = int(np.clip(row, 0, height - CHIP)), int(np.clip(col, 0, width - CHIP))
    cut = slice(row, row + CHIP), slice(col, col + CHIP)
    turns, mirrored = rng.integers(4), rng.random() < 0.5
    parts = [
        np.rot90(one[(..., *cut)], turns, (-2, -1)) for one in (scene.pixels_bhw, scene.labels_hw, scene.instances_hw)
    ]
    pixels, labels, instances = (np.ascontiguousarray(one[..., ::-1] if mirrored else one) for one in parts)
    return pixels, labels, instances


def pixel_weights(
    way: str, labels_hw: NDArray[np.uint8], instances_hw: NDArray[np.int32], class_weights: tuple[float, ...]
) -> NDArray[np.float32]:
    """The weights of one chip."""
    w0 = 0.0 if way == "classes" else 10.0
    weights_hw = border_weights(labels_hw, instances_hw, class_weights=class_weights, w0=w0)
    ground_hw = labels_hw == 0
    if way == "even" and ground_hw.any():
        weights_hw[ground_hw] = weights_hw[ground_hw].mean()
    return weights_hw


def fit(scenes: list[BuildingScene], normalize: Normalization, way: str, *, seed: int, steps: int) -> UNet:
    """A network trained one way."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    network = UNet(3, 2, depth=3, width=8, norm="batch")
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=6e-3, total_steps=steps)
    loss = CrossEntropy()
    whole = [whole_buildings(scene) for scene in scenes]
    each = [np.bincount(scene.labels_hw.ravel(), minlength=256)[:2] for scene in scenes]
    class_weights = balanced(np.sum(each, axis=0).tolist())
    for _ in range(steps):
        drawn = [draw_chip(scenes, whole, rng) for _ in range(BATCH)]
        weights = np.stack([pixel_weights(way, *chip[1:], class_weights) for chip in drawn])
        pixels, labels = (torch.from_numpy(np.stack([chip[part] for chip in drawn])) for part in (0, 1))
        light = torch.from_numpy(rng.uniform(0.75, 1.3, (BATCH, 1, 1, 1)) * rng.uniform(0.9, 1.1, (BATCH, 3, 1, 1)))
        logits = network(normalize((pixels * light).float().clamp(0, 255), labels != UNLABELLED))
        optimizer.zero_grad()
        loss(logits, labels, weights_bhw=torch.from_numpy(weights)).backward()
        optimizer.step()
        schedule.step()
    return network.eval()


def predicted(network: UNet, normalize: Normalization, scene: BuildingScene) -> NDArray[np.bool_]:
    """Where the network sees buildings."""
    height, width = (size // network.stride * network.stride for size in scene.labels_hw.shape)
    pixels = torch.from_numpy(scene.pixels_bhw[None, :, :height, :width])
    valid = torch.from_numpy(scene.labels_hw[None, :height, :width] != UNLABELLED)
    found_hw = np.zeros(scene.labels_hw.shape, np.bool_)
    with torch.inference_mode():
        found_hw[:height, :width] = (network(normalize(pixels, valid)).argmax(1) == 1).numpy()[0]
    return found_hw & (scene.labels_hw != UNLABELLED)


def whole_buildings(scene: BuildingScene) -> NDArray[np.intp]:
    """Ids of the buildings of 20 pixels or more that lie in the image."""
    size = np.bincount(scene.instances_hw.ravel(), minlength=len(scene.outlines) + 1)
    in_image = np.bincount(scene.instances_hw[scene.labels_hw != UNLABELLED], minlength=len(size))
    area = np.array([0.0, *(one.area for one in scene.outlines)])
    ids = np.flatnonzero((size >= 20) & (size == in_image) & (size > 0.8 * area))
    return ids[ids > 0]


def neighbours(scene: BuildingScene) -> NDArray[np.intp]:
    """Pairs of ids (2, n) of whole buildings with a gap of at most ``GAP`` pixels."""
    ids = whole_buildings(scene)
    outlines = [scene.outlines[one - 1] for one in ids]
    first, second = shapely.STRtree(outlines).query(outlines, predicate="dwithin", distance=GAP)
    return ids[np.stack([first, second])[:, first < second]]


def counts(scene: BuildingScene, found_hw: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Pairs found and apart, pairs found, pairs; buildings matched, buildings; pixels of both, pixels of either."""
    pieces_hw = connected(found_hw)
    num_pieces, num = int(pieces_hw.max()) + 1, len(scene.outlines) + 1
    both = np.zeros((num, num_pieces), np.int64)
    np.add.at(both, (scene.instances_hw.ravel(), pieces_hw.ravel()), 1)
    size, size_of_piece = both.sum(1), both.sum(0)
    share = both[:, 1:] / np.maximum(size, 1)[:, None]
    is_found = share.sum(1) >= 0.5
    first, second = neighbours(scene)
    both_found = is_found[first] & is_found[second]
    joined = ((share[first] >= 0.2) & (share[second] >= 0.2)).any(1)
    iou = both[:, 1:] / np.maximum(size[:, None] + size_of_piece[None, 1:] - both[:, 1:], 1)
    whole = whole_buildings(scene)
    matched = (iou[whole] >= 0.5).any(1)
    truth_hw = scene.labels_hw == 1
    pairs = (both_found & ~joined).sum(), both_found.sum(), len(first)
    return np.array([*pairs, matched.sum(), len(whole), (found_hw & truth_hw).sum(), (found_hw | truth_hw).sum()])


def scores(counted: NDArray[np.int64]) -> tuple[float, float, float, float]:
    """``pairs apart``, ``of found``, ``matched``, ``IoU``."""
    apart, found, pairs, matched, buildings, of_both, of_either = counted.tolist()
    return apart / pairs, apart / max(found, 1), matched / buildings, of_both / of_either


def folds(scene: BuildingScene, block: int) -> tuple[BuildingScene, BuildingScene]:
    """The scene with labels in its densest block alone, and in the others alone."""
    height, width = scene.labels_hw.shape
    cuts = [
        (slice(row, row + block), slice(col, col + block))
        for row in range(0, height, block)
        for col in range(0, width, block)
    ]
    densest = max(cuts, key=lambda cut: len(np.unique(scene.instances_hw[cut])))
    inside, outside = np.full_like(scene.labels_hw, UNLABELLED), scene.labels_hw.copy()
    inside[densest] = scene.labels_hw[densest]
    outside[densest] = UNLABELLED
    return replace(scene, labels_hw=inside), replace(scene, labels_hw=outside)


def draw_picture(scene: BuildingScene, path: Path, *, side: int = 400, scale: int = 2) -> None:
    """The densest part of a scene: buildings, each in a shade of its own, and the weights, from white (1) to red."""
    height, width = scene.labels_hw.shape
    corners = [(row, col) for row in range(0, height - side, 16) for col in range(0, width - side, 16)]
    cuts = [(slice(row, row + side), slice(col, col + side)) for row, col in corners]
    cuts = [cut for cut in cuts if (scene.labels_hw[cut] != UNLABELLED).mean() > 0.98]
    cut = max(cuts, key=lambda cut: len(np.unique(scene.instances_hw[cut])))
    labels_hw, instances_hw = scene.labels_hw[cut], scene.instances_hw[cut]
    weights_hw = border_weights(labels_hw, instances_hw)
    shades = np.random.default_rng(1).integers(90, 215, (len(scene.outlines) + 1, 3)).astype(np.uint8)
    left = np.where((labels_hw == 1)[..., None], shades[instances_hw], 255)
    strength = np.clip((weights_hw - 1) / 10, 0, 1)[..., None] ** 0.7
    right = 255 - strength * (255 - np.array([170, 0, 30]))
    right = np.where((labels_hw == UNLABELLED)[..., None], 200, right)
    panels = [
        Image.fromarray(np.uint8(one)).resize((side * scale,) * 2, Image.Resampling.NEAREST) for one in (left, right)
    ]
    draw = ImageDraw.Draw(panels[1])
    for one in scene.outlines:
        moved = shapely.affinity.translate(one, -cut[1].start, -cut[0].start)
        draw.line([(x * scale, y * scale) for x, y in moved.exterior.coords], fill=(60, 60, 60))
    whole = Image.new("RGB", (2 * side * scale + 8, side * scale), "white")
    whole.paste(panels[0], (0, 0))
    whole.paste(panels[1], (side * scale + 8, 0))
    whole.quantize(128).save(path, optimize=True)


def main() -> None:
    """Train, measure, print a line per seed and way."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = data_folder()
    if options.picture:
        draw_picture(read_buildings(folder, HELD_OUT), options.picture)
        return
    others = [read_buildings(folder, place, coarser=times) for place in TRAINING for times in (2, 4)]
    densest, rest = folds(read_buildings(folder, HELD_OUT, coarser=2), block=256)
    valid = np.concatenate([scene.pixels_bhw[:, scene.labels_hw != UNLABELLED] for scene in others], axis=1)
    normalize = Normalization(mean=tuple(valid.mean(1).tolist()), std=tuple(valid.std(1).tolist()))
    for fold in (densest, rest):
        print(f"{neighbours(fold).shape[1]} pairs, {len(whole_buildings(fold))} buildings in a fold")
    print(f"{'seed':>4} {'weights':<8} {'pairs apart':>11} {'of found':>9} {'matched':>8} {'IoU':>6} {'s':>5}")
    every: dict[str, list[tuple[float, ...]]] = {way: [] for way in WAYS}
    for seed in range(options.seeds):
        for way in WAYS:
            start, counted = time.perf_counter(), np.zeros(7, np.int64)
            for seen, unseen in ((densest, rest), (rest, densest)):
                network = fit([seen, *others], normalize, way, seed=seed, steps=options.steps)
                counted += counts(unseen, predicted(network, normalize, unseen))
            every[way].append(scores(counted))
            told = "{:>11.3f} {:>9.3f} {:>8.3f} {:>6.3f}".format(*every[way][-1])
            print(f"{seed:>4} {way:<8} {told} {time.perf_counter() - start:>5.0f}", flush=True)
    for way in WAYS:
        told = "{:>11.3f} {:>9.3f} {:>8.3f} {:>6.3f}".format(*np.mean(every[way], axis=0))
        print(f"mean {way:<8} {told}")


if __name__ == "__main__":
    main()
