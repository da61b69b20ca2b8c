"""Fit the small U-Net that ships with geoseg until a properly trained one does; out come the two files of a bundle.

A label names the set of classes that a pixel may belong to, one bit per class. Imagery with roads alone leaves
"background or building" for the rest, and an unlabelled pixel may be anything; the loss asks for the probability of the
set, so nothing unknown is taught.

Legend of axes: b batch, k bands or classes, h rows, w columns.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rasterio
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from rasterio.enums import Resampling
from torch import Tensor

from geoseg.model.bundle import DESCRIPTION_NAME, WEIGHTS_NAME, Bundle
from geoseg.model.description import BundleDescription, ClassName, UNetVariant
from geoseg.model.normalize import Normalization
from geoseg.model.unet import UNet
from geoseg.raster.synthetic import synthetic_image
from geoseg.train.memory import keep_freed_memory

CLASSES = (
    ClassName(name="background", color=(0, 0, 0)),
    ClassName(name="building", color=(230, 85, 60)),
    ClassName(name="road", color=(250, 200, 60)),
)
ANY, BUILDING, ROAD = 0b111, 0b010, 0b100
BOTH_KNOWN = {0: 0b001, 1: BUILDING, 2: ROAD}
BUILDINGS_KNOWN = {0: 0b101, 255: BUILDING}
ROADS_KNOWN = {0: 0b011, 2: ROAD}
RESOLUTION_M = 0.6
CHIP, BATCH, SEED = 192, 8, 20261
SHARES = {"synthetic": 0.3, "dubai": 0.4, "mass_roads": 0.16, "hot_buildings": 0.14}
ORIGIN = (
    "A stand-in, fitted in minutes on one CPU core until a properly trained bundle takes its place; do not rely on it. "
    "Fitted to scenes that geoseg generates, to Humans in the Loop's aerial imagery of Dubai (CC0; buildings, roads), "
    "to a part of the Massachusetts Roads data set (V. Mnih 2013, imagery MassGIS, no licence stated; roads) and to "
    "OpenAerialMap imagery of Zanzibar and Nairobi (CC-BY-4.0) with buildings of OpenStreetMap (ODbL)."
)


@dataclass(frozen=True, slots=True, eq=False)
class LabelledScene:
    """Pixels uint8 (3, h, w), sets of possible classes uint8 (h, w), valid bool (h, w) with True for data."""

    pixels_bhw: NDArray[np.uint8]
    sets_hw: NDArray[np.uint8]
    valid_hw: NDArray[np.bool_]


def labelled(
    pixels_bhw: NDArray[np.uint8], labels_hw: NDArray[np.uint8], valid_hw: NDArray[np.bool_], sets: dict[int, int]
) -> LabelledScene:
    """``sets`` gives the set of possible classes of a label; with other labels or no data a pixel may be anything."""
    table = np.full(256, ANY, np.uint8)
    table[list(sets)] = list(sets.values())
    return LabelledScene(pixels_bhw, np.where(valid_hw, table[labels_hw], np.uint8(ANY)), valid_hw)


def read(stem: Path, labels: str, sets: dict[int, int], *, scale: float = 1.0) -> LabelledScene:
    """The scene of ``stem``.tif and ``stem``_``labels``.tif, ``scale`` times as many pixels per side."""
    with rasterio.open(f"{stem}.tif") as source, rasterio.open(f"{stem}_{labels}.tif") as truth:
        shape = round(source.height * scale), round(source.width * scale)
        resampling = Resampling.average if scale < 1 else Resampling.bilinear
        pixels_bhw = source.read((1, 2, 3), out_shape=(3, *shape), resampling=resampling)
        valid_hw = source.dataset_mask(out_shape=shape) == 255
        labels_hw = truth.read(1, out_shape=shape, resampling=Resampling.nearest)
    return labelled(pixels_bhw, labels_hw, valid_hw, sets)


def scenes_of(data: Path) -> Iterator[tuple[str, bool, LabelledScene]]:
    """Source, whether it is for training, and scene, of generated scenes and all imagery under ``data``."""
    for seed in (*range(30), 1000, 1001, 1002):
        image = synthetic_image(640, 640, seed=seed)
        yield "synthetic", seed < 1000, labelled(image.pixels_bhw, image.classes_hw, image.valid_hw, BOTH_KNOWN)
    for number in (1, 2, 3, 5, 6, 7):
        stem = data / "dubai" / f"dubai_{number}"
        yield "dubai", number != 2, read(stem, "classes", BOTH_KNOWN)
    labels = sorted((data / "mass_roads").glob("*_classes.tif"), key=lambda path: path.stem.removesuffix("_classes"))
    for index, path in enumerate(labels):
        stem = path.with_name(path.stem.removesuffix("_classes"))
        yield "mass_roads", index < len(labels) - 14, read(stem, "classes", ROADS_KNOWN, scale=1 / RESOLUTION_M)
    for place in ("zanzibar_tz", "nairobi_ke", "kampala_ug"):
        stem = data / "hot_buildings" / f"{place}_z20"
        yield "hot_buildings", place != "kampala_ug", read(stem, "buildings", BUILDINGS_KNOWN, scale=1 / 4)


def draw_chip(scene: LabelledScene, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """A chip of at least half valid pixels, zoomed, turned or mirrored, and with other light: pixels, sets, valid.

    Three chips in five are drawn until they hold some building or road, where the scene has it.
    """
    height, width = scene.valid_hw.shape
    side = round(CHIP * rng.choice([1.0, rng.uniform(0.75, 1.3)]))
    least = 0.08 if rng.random() < 0.6 else 0.0
    for _ in range(60):
        row, col = rng.integers(height - side + 1), rng.integers(width - side + 1)
        cut = slice(row, row + side), slice(col, col + side)
        if scene.valid_hw[cut].mean() > 0.5 and np.isin(scene.sets_hw[cut], (BUILDING, ROAD)).mean() >= least:
            break
    pixels = torch.from_numpy(scene.pixels_bhw[(slice(None), *cut)].astype(np.float32))
    others = torch.from_numpy(np.stack([scene.sets_hw[cut], scene.valid_hw[cut]]).astype(np.float32))
    if side != CHIP:
        pixels = F.interpolate(pixels[None], size=(CHIP, CHIP), mode="bilinear", antialias=True)[0]
        others = F.interpolate(others[None], size=(CHIP, CHIP), mode="nearest-exact")[0]
    quarter_turns, mirrored = int(rng.integers(4)), rng.random() < 0.5
    pixels, others = (torch.rot90(part, quarter_turns, (1, 2)) for part in (pixels, others))
    if mirrored:
        pixels, others = pixels.flip(2), others.flip(2)
    gain = torch.from_numpy((rng.uniform(0.8, 1.25) * rng.uniform(0.94, 1.06, (3, 1, 1))).astype(np.float32))
    middle = pixels.mean()
    pixels = ((pixels - middle) * rng.uniform(0.8, 1.25) + middle) * gain + rng.uniform(-8, 8)
    return pixels.clamp(0, 255), others[0].to(torch.int64), others[1] > 0


def loss_of(logits_bkhw: Tensor, sets_bhw: Tensor) -> Tensor:
    """Cross entropy of the sets of possible classes, plus soft Dice of each class where the sets decide on it."""
    log_prob_bkhw = logits_bkhw.float().log_softmax(1)
    bits = 1 << torch.arange(logits_bkhw.shape[1])
    possible_bkhw = (sets_bhw[:, None] & bits[:, None, None]) > 0
    of_set_bhw = log_prob_bkhw.masked_fill(~possible_bkhw, -math.inf).logsumexp(1)
    loss = -of_set_bhw.sum() / (sets_bhw != ANY).sum().clamp(min=1)
    prob_bkhw = log_prob_bkhw.exp()
    for index, bit in ((1, BUILDING), (2, ROAD)):
        is_class = (sets_bhw == bit).float()
        prob = prob_bkhw[:, index] * (is_class + (~possible_bkhw[:, index]).float())
        loss = loss + 0.5 * (1 - (2 * (prob * is_class).sum() + 100) / (prob.sum() + is_class.sum() + 100))
    return loss


def fit(scenes: dict[str, list[LabelledScene]], normalize: Normalization, *, minutes: float) -> UNet:
    """A network fitted for ``minutes`` minutes; the learning rate follows the clock down half a cosine."""
    rng = np.random.default_rng(SEED)
    torch.manual_seed(SEED)
    network = UNet(3, len(CLASSES), depth=3, width=16, norm="batch")
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.0, weight_decay=1e-3)
    names = list(scenes)
    shares = np.array([SHARES[name] for name in names])
    areas = {name: np.array([scene.valid_hw.sum() for scene in scenes[name]], float) for name in names}
    weights = {name: area / area.sum() for name, area in areas.items()}
    start, step, share, running = time.monotonic(), 0, 0.0, math.nan
    while share < 1:
        drawn = rng.choice(names, BATCH, p=shares / shares.sum())
        chips = [draw_chip(scenes[name][rng.choice(len(scenes[name]), p=weights[name])], rng) for name in drawn]
        pixels_bkhw, sets_bhw, valid_bhw = (torch.stack(part) for part in zip(*chips, strict=True))
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * share))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits_bkhw = network(normalize(pixels_bkhw, valid_bhw))
        loss = loss_of(logits_bkhw, sets_bhw)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        running = loss.item() if step == 0 else 0.98 * running + 0.02 * loss.item()
        step, share = step + 1, (time.monotonic() - start) / (60 * minutes)
        if step % 100 == 0:
            print(f"step {step}, {100 * share:.0f} % of the time, loss {running:.3f}", flush=True)
    print(f"{step} steps in {minutes} minutes, loss {running:.3f}", flush=True)
    network.eval()
    return network


@torch.inference_mode()
def score(network: UNet, normalize: Normalization, scenes: list[LabelledScene]) -> tuple[float, float]:
    """Intersection over union of building and of road over all ``scenes``, NaN where no pixel is labelled so."""
    hits, unions = np.zeros(2), np.zeros(2)
    for scene in scenes:
        rows, cols = (size // network.stride * network.stride for size in scene.valid_hw.shape)
        pixels_bkhw = torch.from_numpy(scene.pixels_bhw[None, :, :rows, :cols])
        valid_bhw = torch.from_numpy(scene.valid_hw[None, :rows, :cols])
        mask_hw = network(normalize(pixels_bkhw, valid_bhw))[0].max(0).indices.numpy()
        sets_hw = scene.sets_hw[:rows, :cols]
        for index, bit in enumerate((BUILDING, ROAD)):
            known_hw = (sets_hw == bit) | (sets_hw & bit == 0)
            found_hw, true_hw = (mask_hw == index + 1) & known_hw, sets_hw == bit
            hits[index] += (found_hw & true_hw).sum()
            unions[index] += (found_hw | true_hw).sum() if true_hw.any() else 0
    building, road = np.where(unions > 0, hits / np.maximum(unions, 1), math.nan)
    return float(building), float(road)


def main() -> None:
    """Read, fit, score, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="folder with dubai/, mass_roads/ and hot_buildings/")
    parser.add_argument("--out", type=Path, required=True, help="folder for model.json and model.safetensors")
    parser.add_argument("--minutes", type=float, default=25.0, help="time for the fit itself")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    training: dict[str, list[LabelledScene]] = {}
    held_out: dict[str, list[LabelledScene]] = {}
    for source, is_for_training, scene in scenes_of(arguments.data):
        (training if is_for_training else held_out).setdefault(source, []).append(scene)
    pixels = [scene.pixels_bhw[:, scene.valid_hw][:, ::16] for group in training.values() for scene in group[:5]]
    description = BundleDescription(
        name="roads-buildings",
        variant=UNetVariant(depth=3, width=16, norm="batch"),
        bands=("red", "green", "blue"),
        resolution_m=RESOLUTION_M,
        mean=tuple(np.mean([part.mean(1) for part in pixels], axis=0).round(1).tolist()),
        std=tuple(np.mean([part.std(1) for part in pixels], axis=0).round(1).tolist()),
        classes=CLASSES,
        origin=ORIGIN,
    )
    network = fit(training, description.normalization, minutes=arguments.minutes)
    bundle = Bundle.from_network(network, description)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / WEIGHTS_NAME).write_bytes(bundle.weights)
    (arguments.out / DESCRIPTION_NAME).write_bytes(bundle.description_json())
    print(f"{'held out':16}{'building IoU':>14}{'road IoU':>10}")
    for source, scenes in held_out.items():
        building, road = score(bundle.network(), description.normalization, scenes)
        print(f"{source:16}{building:14.3f}{road:10.3f}")


if __name__ == "__main__":
    main()
