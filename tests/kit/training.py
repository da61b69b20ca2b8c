"""Labelled scenes with exact truth, and trainings on them that take a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from affine import Affine

from geoseg.config import check
from geoseg.raster.synthetic import synthetic_image
from geoseg.train.job import TrainJob
from kit.scenes import write_scene

CLASSES = ("background", "building", "road")
LABELS = {"uri": "{folder}/{stem}_classes.tif", "values": {"building": [1], "road": [2]}, "unlabelled": [255]}
COLORS = ((0, 0, 0), (230, 85, 60), (250, 200, 60))
PIXEL_M = 0.5


def labelled_scene(folder: Path, name: str, *, seed: int, size: int = 256, at: int = 0, overviews: bool = True) -> Path:
    """Write a generated scene of 0.5 m pixels with its classes beside it; ``at`` kilometres east of the first."""
    made = synthetic_image(size, size, seed=seed)
    transform = Affine(PIXEL_M, 0, 500_000 + 1000 * at, 0, -PIXEL_M, 5_300_000)
    levels = (2, 4) if overviews else ()
    classes = np.where(made.valid_hw, made.classes_hw, np.uint8(255))
    path = write_scene(
        folder / f"{name}.tif", made.pixels_bhw, transform=transform, overviews=levels, tiled=True, blockxsize=64,
        blockysize=64, nodata=0,
    )  # fmt: skip
    write_scene(folder / f"{name}_classes.tif", classes[None], transform=transform, nodata=255)
    return path


def scenes(folder: Path) -> Path:
    """Write two training scenes, ``a`` and ``b``, and one to validate on, ``v``."""
    for at, name in enumerate("abv"):
        labelled_scene(folder, name, seed=at, at=at)
    return folder


def values(folder: Path | str, out: Path | str, **more: Any) -> dict[str, Any]:
    """A training of two small stages as TOML would have it; ``more`` replaces what stands at the top."""
    told = {
        "out": str(out),
        "seed": 5,
        "checkpoint_every": 3,
        "model": {
            "name": "tiny",
            "variant": {"name": "unet", "depth": 2, "width": 4, "norm": "batch"},
            "resolution_m": PIXEL_M,
            "classes": [{"name": name, "color": color} for name, color in zip(CLASSES, COLORS, strict=True)],
        },
        "source": [
            {"name": "two", "scenes": [f"{folder}/[ab].tif"], "labels": [LABELS]},
            {"name": "other", "use": "validate", "scenes": [f"{folder}/v.tif"], "labels": [LABELS]},
        ],
        "stage": [
            {"resolution_m": 2 * PIXEL_M, "chip": 32, "steps": 5, "batch": 8, "chips_per_pass": 4, "evaluate_every": 3},
            {"chip": 32, "steps": 4, "batch": 8, "chips_per_pass": 2, "learning_rate": 0.01,
             "augment": {"scale": [0.8, 1.25], "brightness": 0.1, "color": 0.1}},
        ],
    }  # fmt: skip
    return told | more


def training(folder: Path | str, out: Path | str, **more: Any) -> TrainJob:
    """``values`` as a job."""
    return check(TrainJob, values(folder, out, **more), where="the test")
