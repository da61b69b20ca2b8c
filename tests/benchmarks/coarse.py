"""What a coarse pass finds, and what it saves: recall, IoU and the CPU of the network, at each factor and threshold.

    python tests/benchmarks/coarse.py [--side 4096] [--window 2048] [--factors 2,4,8] [--thresholds 0.02,0.05,0.1,0.2,0.5]
                                      [--bundle roads-buildings]

The default bundle on generated land of --side pixels with a few places in it (``empty``), and on the scenes that it was validated
with. Fine: pixels in cells that were seen at full resolution. Network: CPU time of its passes, coarse ones included; all: that of
the whole run, reading included; each over what it is without a coarse pass. Recall: of the pixels that are of a class without a
coarse pass, those that still are. Alone: the same by objects, as if each stood alone: the pixels of those (8-connected, of either
class) on or beside which the coarse pass sees something; a city says nothing about a farm, this does. IoU: against the labels,
the difference to that without. One thread.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import rasterio
import torch
from doubt import BUILDING, ROAD, read, sources
from numpy.typing import NDArray
from rasterio.enums import Resampling
from scipy import ndimage

sys.path.insert(0, str(Path(__file__).parents[1]))

from kit.oracle import write_scene

import geoseg
from geoseg.config import PredictConfig
from geoseg.predict.bundles import load_bundle
from geoseg.predict.plan import plan_scene
from geoseg.predict.predictor import Predictor, network_spec
from geoseg.raster.scene import SceneRef
from geoseg.raster.synthetic import synthetic_image
from geoseg.raster.window import Window

CLASSES = (BUILDING, ROAD)
NODATA = 255
PLACE_PX, PLACES_PER_MPX = 300, 1.0


@dataclass(frozen=True)
class Source:
    """Scenes of one kind; their labels (row, col) with 255 where nothing is known, and the classes that these tell of."""

    scenes: list[Path]
    labels: list[NDArray[np.uint8]]
    classes: tuple[int, ...]


@dataclass
class Run:
    """The masks (row, col) of a source's scenes, pixels seen at full resolution of how many, and CPU seconds."""

    masks: list[NDArray[np.uint8]] = field(default_factory=list)
    fine: float = 0.0
    valid: int = 0
    network_s: float = 0.0
    all_s: float = 0.0


def validation() -> Iterator[tuple[str, Source]]:
    """The scenes that the default bundle was validated with."""
    for name, source in sources().items():
        labels = []
        for scene in source.scenes:
            told_hw = read(scene.with_name(f"{scene.stem}{source.labels}.tif"))
            unlabelled = NODATA not in source.values
            labels_hw = np.where((told_hw == NODATA) & unlabelled, np.uint8(NODATA), np.uint8(0))
            for value, code in source.values.items():
                labels_hw[told_hw == value] = code
            labels.append(labels_hw)
        yield name, Source(source.scenes, labels, source.classes)


def empty_land(folder: Path, side: int) -> Source:
    """Fields and bare ground with a few places in them; with overviews."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)

    def waves(step: int) -> NDArray[np.float32]:
        rough = torch.randn(1, 1, side // step + 2, side // step + 2)
        size = (rough.shape[-1] * step,) * 2
        smooth = torch.nn.functional.interpolate(rough, size=size, mode="bilinear")[0, 0, :side, :side]
        return smooth.numpy()

    bareness = 1 / (1 + np.exp(-3 * waves(512)))
    light = 10 * waves(64) + 5 * waves(16) + 3 * rng.normal(size=(side, side))
    colors = zip((90, 110, 70), (150, 130, 100), strict=True)
    pixels = [np.clip(green + (bare - green) * bareness + light, 1, 255).astype(np.uint8) for green, bare in colors]
    pixels_bhw, labels_hw = np.stack(pixels), np.zeros((side, side), np.uint8)
    town = synthetic_image(1024, 1024, seed=3, nodata_fraction=0)
    for _ in range(max(1, round(PLACES_PER_MPX * side * side / 1e6))):
        size = int(rng.integers(PLACE_PX // 6, PLACE_PX))
        row, col = rng.integers(0, side - size, 2)
        from_row, from_col = rng.integers(0, 1024 - size, 2)
        there = slice(row, row + size), slice(col, col + size)
        taken = slice(from_row, from_row + size), slice(from_col, from_col + size)
        pixels_bhw[(slice(None), *there)] = town.pixels_bhw[(slice(None), *taken)]
        labels_hw[there] = town.classes_hw[taken]
    scene = write_scene(folder / "empty.tif", pixels_bhw, blockxsize=512, blockysize=512)
    with rasterio.open(scene, "r+") as dataset:
        dataset.build_overviews([2, 4, 8], Resampling.average)
    return Source([scene], [labels_hw], CLASSES)


@contextmanager
def clocked() -> Iterator[list[float]]:
    """Within the block the CPU seconds of the network's passes are noted."""
    noted: list[float] = []
    run = Predictor.core_logits

    def core_logits(self: Predictor, around: Any) -> Any:
        start = time.thread_time()
        logits = run(self, around)
        noted.append(time.thread_time() - start)
        return logits

    with mock.patch.object(Predictor, "core_logits", core_logits):
        yield noted


def predict(source: Source, **settings: Any) -> Run:
    """Predict all scenes of a source."""
    done = Run()
    with tempfile.TemporaryDirectory(prefix="geoseg-coarse-") as out, clocked() as noted:
        start = time.process_time()
        report = geoseg.predict(list(map(str, source.scenes)), out, engine="local", **settings)
        done.all_s, done.network_s = time.process_time() - start, sum(noted)
        assert report.exit_code == 0, report.scenes
        by_id = {scene.id: scene for scene in report.scenes}
        for path in source.scenes:
            scene = by_id[path.stem]
            done.masks.append(read(Path(scene.mask)))
            done.valid += sum(scene.classes)
            done.fine += sum(scene.classes) * (1 if scene.fine_share is None else scene.fine_share)
    return done


def coarse_chances(source: Source, factor: int, bundle: str) -> list[NDArray[np.float32]]:
    """The largest probability of a class but the first at each pixel (row, col) of each scene's coarse grid."""
    loaded, config = load_bundle(bundle), PredictConfig(coarse=factor)
    spec, predictor = network_spec(loaded, config), Predictor(loaded, config)
    told = []
    for path in source.scenes:
        plan = plan_scene(SceneRef(path.stem, str(path)), spec)
        assert plan.coarse is not None
        core = plan.coarse.core(Window(0, 0, plan.scene.grid.width, plan.scene.grid.height))
        logits_chw = predictor.core_logits([plan.coarse.read_core(plan.reader(), core, plan.bands)])[0]
        chances_hw = (logits_chw / loaded.description.temperature).softmax(0)[1:].max(0).values.numpy()
        told.append(chances_hw[: plan.coarse.work_shape[0], : plan.coarse.work_shape[1]])
    return told


def recall_alone(masks: Sequence[NDArray[np.uint8]], chances: Sequence[NDArray[np.float32]], threshold: float) -> float:
    """Of the pixels of objects, the share in those that the coarse pass sees something of."""
    found = total = 0
    for mask_hw, chances_hw in zip(masks, chances, strict=True):
        likely_hw = ndimage.maximum_filter(chances_hw, 3) >= threshold
        rows, cols = (
            np.arange(size) * small // size for size, small in zip(mask_hw.shape, chances_hw.shape, strict=True)
        )
        objects_hw, num = ndimage.label(np.isin(mask_hw, CLASSES), np.ones((3, 3)))
        sizes = np.bincount(objects_hw.ravel(), minlength=num + 1)
        seen = np.unique(objects_hw[likely_hw[rows[:, None], cols[None, :]]])
        found += int(sizes[seen[seen > 0]].sum())
        total += int(sizes[1:].sum())
    return found / max(1, total)


def recall(full: Run, coarse: Run, code: int) -> float:
    """Of the pixels of a class in the full masks, the share that has it in the others."""
    kept = sum(
        int(((one == code) & (other == code)).sum()) for one, other in zip(full.masks, coarse.masks, strict=True)
    )
    return kept / max(1, sum(int((one == code).sum()) for one in full.masks))


def iou(source: Source, run: Run, code: int) -> float:
    """Intersection over union of a class with the labels, where both know something."""
    both = either = 0
    for mask_hw, labels_hw in zip(run.masks, source.labels, strict=True):
        known_hw = (mask_hw != NODATA) & (labels_hw != NODATA)
        one, other = (mask_hw == code) & known_hw, (labels_hw == code) & known_hw
        both += int((one & other).sum())
        either += int((one | other).sum())
    return both / max(1, either)


def compare(name: str, source: Source, options: argparse.Namespace) -> None:
    """Print a line for each factor and threshold."""
    settings = {"bundle": options.bundle, "window": options.window}
    full = predict(source, **settings)
    has = {code: iou(source, full, code) if code in source.classes else None for code in CLASSES}
    in_full = "".join(f"{f'{value:.3f}' if value is not None else '':>9}" for value in has.values())
    print(f"{name:<14} full resolution, {full.network_s:.1f} s and {full.all_s:.1f} s{'':<30}{in_full}", flush=True)
    for factor in options.factors:
        chances = coarse_chances(source, factor, options.bundle)
        for threshold in options.thresholds:
            run = predict(source, coarse=factor, coarse_threshold=threshold, **settings)
            recalls = "".join(f"{recall(full, run, code):>9.4f}" for code in CLASSES)
            gains = [f"{iou(source, run, code) - was:+.4f}" if was is not None else "" for code, was in has.items()]
            print(
                f"{name:<14} {factor:>6} {threshold:>9g} {run.fine / run.valid:>6.2f} "
                f"{run.network_s / full.network_s:>8.2f} {run.all_s / full.all_s:>6.2f} {recalls} "
                f"{recall_alone(full.masks, chances, threshold):>8.4f}{''.join(f'{gain:>9}' for gain in gains)}",
                flush=True,
            )


def main() -> None:
    """Predict, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=4096)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--bundle", default="roads-buildings")
    parser.add_argument("--factors", type=lambda text: [int(one) for one in text.split(",")], default=[2, 4, 8])
    parser.add_argument(
        "--thresholds",
        type=lambda text: [float(one) for one in text.split(",")],
        default=[0.02, 0.05, 0.1, 0.2, 0.5],
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"{'':<14} {'':>6} {'':>9} {'':>6} {'':>8} {'':>6} {'recall':>18} {'':>8}{'IoU':>18}\n"
        f"{'source':<14} {'factor':>6} {'threshold':>9} {'fine':>6} {'network':>8} {'all':>6} {'building':>9}{'road':>9} "
        f"{'alone':>8}{'building':>9}{'road':>9}"
    )
    with tempfile.TemporaryDirectory(prefix="geoseg-coarse-") as folder:
        compare("empty", empty_land(Path(folder), options.side), options)
        for name, source in validation():
            compare(name, source, options)


if __name__ == "__main__":
    try:
        main()
    except BaseException as error:
        if type(error).__name__ != "Skipped":
            raise
        print(error)
