"""How much of a bundle's quality is left when imagery looks unlike what it was trained on.

    python tests/benchmarks/robustness.py                                # the shipped bundle
    python tests/benchmarks/robustness.py --bundle runs/default/bundle --out robustness --json

The validation scenes of the shipped recipes (the imagery lies where GEOSEG_TEST_DATA says; of many scenes of a source every
so many, Kampala at 0.6 m) are written anew: in another light, blurred, at other pixel sizes, in 16 bits, with a collar. Each
is scored as ``geoseg evaluate`` does it: planned, read, predicted and compared with its labels on its own pixels. Told is the
IoU of each source and class, and its change against the clean row; rows with a collar are held against a clean image whose
labels are left out under the collar. Lengths in metres are on the ground.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import torch
from affine import Affine
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from rasterio.enums import Resampling

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kit.data import recipe
from kit.scenes import write_scene

from geoseg.config import DEFAULT_BUNDLE, PredictConfig, check
from geoseg.evaluate.judge import evaluate_scenes, find_scene
from geoseg.model.bundle import Bundle
from geoseg.model.pictures import INK, PAPER, png
from geoseg.predict.bundles import load_bundle
from geoseg.predict.failure import Failure
from geoseg.predict.predictor import Predictor, default_device, network_spec
from geoseg.raster.stack import list_sources
from geoseg.train.codes import LabelCodes
from geoseg.train.labels import labelled_classes
from geoseg.train.metrics import Counts, class_scores, mean_iou
from geoseg.train.sources import SourceConfig

MOST_SCENES = 7  # of a source
FINEST_M = 0.5  # finer scenes are read at COARSER_M, so that a blur or noise of a pixel is one to the network too
COARSER_M = 0.6
COLLAR = 0.08  # of a scene's sides, on each side
NOT_LABELLED = 254
FULL_HEAT = 0.3

Pixels = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Picture:
    """A scene's pixels (band, row, col; 0 to 255), which of them are valid, their size on the ground, and where they lie."""

    pixels_khw: Pixels
    valid_hw: NDArray[np.bool_]
    pixel_m: float
    affine: Affine
    crs: Any


@dataclass(frozen=True, slots=True)
class Change:
    """What is done to each scene. ``pixel_m``: read at this pixel size; ``factor``: written as uint16, so many times the value.

    ``collar``: ``unlabelled`` leaves the labels of a collar out, ``tagged`` blackens it too and says that 0 is no data, ``black``
    and ``white`` say nothing.
    """

    name: str
    light: Callable[[Picture, np.random.Generator], Pixels] = lambda picture, _: picture.pixels_khw
    pixel_m: float | None = None
    factor: int | None = None
    collar: str | None = None
    against: str = "clean"


def hazy(share: float) -> Callable[..., Pixels]:
    """Towards white."""
    return lambda picture, _: picture.pixels_khw * (1 - share) + share * 255


def gained(*gains: float) -> Callable[..., Pixels]:
    """Each band times its own factor."""
    return lambda picture, _: picture.pixels_khw * np.array(gains, np.float32)[:, None, None]


def contrasted(factor: float) -> Callable[..., Pixels]:
    """Away from the mean of each band, or towards it."""

    def change(picture: Picture, _: np.random.Generator) -> Pixels:
        mean_khw = picture.pixels_khw[:, picture.valid_hw].mean(1)[:, None, None]
        return (picture.pixels_khw - mean_khw) * factor + mean_khw

    return change


def bent(gamma: float) -> Callable[..., Pixels]:
    """The tone curve: below 1 shadows are lifted."""
    return lambda picture, _: 255 * (picture.pixels_khw / 255) ** gamma


def blurred(sigma_m: float) -> Callable[..., Pixels]:
    """Under a Gaussian; what is not valid has no say."""

    def change(picture: Picture, _: np.random.Generator) -> Pixels:
        sigma = sigma_m / picture.pixel_m
        reach = math.ceil(3 * sigma)
        taps = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2).astype(np.float32)
        seen_hw = picture.valid_hw.astype(np.float32)
        sums = [smoothed(band_hw, taps) for band_hw in (seen_hw, *(picture.pixels_khw * seen_hw))]
        return np.stack(sums[1:]) / np.maximum(sums[0], 1e-6)

    return change


def smoothed(band_hw: Pixels, taps: Pixels) -> Pixels:
    """Taps along rows and columns; beyond the edge there is nothing."""
    reach = len(taps) // 2
    for _ in range(2):
        wide_hw = np.pad(band_hw, ((reach, reach), (0, 0)))
        band_hw = sum(tap * wide_hw[at : at + len(band_hw)] for at, tap in enumerate(taps)).T
    return band_hw


def noisy(deviation: float) -> Callable[..., Pixels]:
    """Noise of each pixel and band by itself, of this standard deviation."""

    def change(picture: Picture, rng: np.random.Generator) -> Pixels:
        return picture.pixels_khw + rng.normal(0, deviation, picture.pixels_khw.shape).astype(np.float32)

    return change


def compressed(quality: int) -> Callable[..., Pixels]:
    """Through a JPEG with colours at half the size."""

    def change(picture: Picture, _: np.random.Generator) -> Pixels:
        image, file = Image.fromarray(as_bytes(picture.pixels_khw).transpose(1, 2, 0).copy()), io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        return np.asarray(Image.open(file), np.float32).transpose(2, 0, 1)

    return change


CHANGES = (
    Change("clean"),
    Change("brightness x 0.7", gained(0.7, 0.7, 0.7)),
    Change("brightness x 1.3", gained(1.3, 1.3, 1.3)),
    Change("contrast x 0.6", contrasted(0.6)),
    Change("contrast x 1.5", contrasted(1.5)),
    Change("haze 20 %", hazy(0.2)),
    Change("haze 40 %", hazy(0.4)),
    Change("red x 1.2", gained(1.2, 1, 1)),
    Change("green x 1.2", gained(1, 1.2, 1)),
    Change("blue x 1.2", gained(1, 1, 1.2)),
    Change("red x 0.8", gained(0.8, 1, 1)),
    Change("green x 0.8", gained(1, 0.8, 1)),
    Change("blue x 0.8", gained(1, 1, 0.8)),
    Change("gamma 0.6", bent(0.6)),
    Change("gamma 1.6", bent(1.6)),
    Change("blur of 0.6 m", blurred(0.6)),
    Change("blur of 1.2 m", blurred(1.2)),
    Change("noise of 8", noisy(8)),
    Change("noise of 16", noisy(16)),
    Change("JPEG quality 50", compressed(50)),
    Change("JPEG quality 30", compressed(30)),
    Change("pixels of 0.3 m", pixel_m=0.3),
    Change("pixels of 0.5 m", pixel_m=0.5),
    Change("pixels of 0.6 m", pixel_m=0.6),
    Change("pixels of 0.8 m", pixel_m=0.8),
    Change("pixels of 1.2 m", pixel_m=1.2),
    Change("uint16, 0 to 65535", factor=257),
    Change("uint16, 0 to 4080", factor=16),
    Change("clean in a collar", collar="unlabelled"),
    Change("collar, nodata 0", collar="tagged", against="clean in a collar"),
    Change("collar, black", collar="black", against="clean in a collar"),
    Change("collar, white", collar="white", against="clean in a collar"),
)


def as_bytes(pixels_khw: Pixels) -> NDArray[np.uint8]:
    """Rounded, within 0 and 255."""
    return pixels_khw.round().clip(0, 255).astype(np.uint8)


def validation_sources() -> list[tuple[SourceConfig, list[Path]]]:
    """The sources of the recipe to validate on, with the scenes that are taken; NOT_LABELLED leaves their labels out."""
    taken = []
    for told in recipe()["source"]:
        if told.get("use") == "validate":
            labels = [{**one, "unlabelled": [*one.get("unlabelled", []), NOT_LABELLED]} for one in told["labels"]]
            values = {"name": told["name"], "scenes": told["scenes"], "labels": labels}
            source = check(SourceConfig, values, where="default.toml")
            paths = sorted(Path(ref.uri.removeprefix("file://")) for ref in list_sources(source.scenes, None))
            taken.append((source, paths[:: -(-len(paths) // MOST_SCENES)]))
    return taken


def read(path: Path, pixel_m: float | None) -> Picture:
    """A scene at a pixel size, or at its own unless that is finer than ``FINEST_M``; the extent stays what it is."""
    with rasterio.open(path) as source:
        own_m = math.sqrt(abs(source.transform.determinant))
        wanted_m = pixel_m or (own_m if own_m >= FINEST_M else COARSER_M)
        height, width = (max(1, round(side * own_m / wanted_m)) for side in source.shape)
        kind = Resampling.average if wanted_m > own_m else Resampling.bilinear
        pixels_khw = source.read((1, 2, 3), out_shape=(3, height, width), resampling=kind).astype(np.float32)
        valid_hw = source.dataset_mask(out_shape=(height, width)) != 0
        affine = source.transform * Affine.scale(source.width / width, source.height / height)
        return Picture(pixels_khw, valid_hw, wanted_m, affine, source.crs)


def rim(shape: tuple[int, int]) -> NDArray[np.bool_]:
    """The collar of a scene (row, col)."""
    rows, cols = (round(COLLAR * side) for side in shape)
    rim_hw = np.ones(shape, np.bool_)
    rim_hw[rows : shape[0] - rows, cols : shape[1] - cols] = False
    return rim_hw


def write_changed(change: Change, path: Path, folder: Path) -> Path:
    """The scene as it is after a change, beside it its labels."""
    picture = read(path, change.pixel_m)
    rng = np.random.default_rng(zlib.crc32(path.stem.encode()))
    pixels_khw: NDArray[Any] = as_bytes(change.light(picture, rng))
    profile: dict[str, Any] = {"photometric": "rgb", "tiled": True, "blockxsize": 256, "blockysize": 256}
    rim_hw = rim(picture.valid_hw.shape)
    if change.collar == "tagged":
        pixels_khw, profile["nodata"] = np.where(rim_hw & picture.valid_hw, 0, np.maximum(pixels_khw, 1)), 0
        pixels_khw = np.where(picture.valid_hw, pixels_khw, 0).astype(np.uint8)
    elif change.collar in ("black", "white"):
        pixels_khw = np.where(rim_hw, np.uint8(255 if change.collar == "white" else 0), pixels_khw)
    if change.factor is not None:
        pixels_khw = (pixels_khw.astype(np.uint32) * change.factor).astype(np.uint16)
    valid_hw = None if picture.valid_hw.all() or change.collar == "tagged" else picture.valid_hw
    for labels in path.parent.glob(f"{path.stem}_*.tif"):
        with rasterio.open(labels) as source:
            codes_hw = source.read(1)
            if change.collar is not None:
                codes_hw[rim(codes_hw.shape)] = NOT_LABELLED
            write_scene(
                folder / labels.name, codes_hw[None], crs=source.crs, transform=source.transform, compress="deflate"
            )
    return write_scene(
        folder / path.name, pixels_khw, valid=valid_hw, crs=picture.crs, transform=picture.affine, **profile
    )


def counted(
    bundle: Bundle, change: Change, sources: list[tuple[SourceConfig, list[Path]]], folder: Path
) -> dict[str, Counts]:
    """The counts of each source after a change; 16 bits are declared by the scale, as ``--scale`` does it."""
    config = PredictConfig(scale=(0.0, 255.0 * change.factor) if change.factor else None)
    spec, names = network_spec(bundle, config), [one.name for one in bundle.description.classes]
    codes = LabelCodes.for_sources(len(names), [labelled_classes(source.labels, names) for source, _ in sources])
    predictor = Predictor(bundle, config, device=default_device())
    counts = {source.name: Counts.zero(len(names)) for source, _ in sources}
    for source, paths in sources:
        for path in paths:
            (ref,) = list_sources((str(write_changed(change, path, folder / source.name)),), None)
            found = find_scene(ref, source, spec, codes)
            (tally,) = [found] if isinstance(found, Failure) else evaluate_scenes(predictor, [found], quick=True)
            if isinstance(tally, Failure):
                raise SystemExit(f"{change.name}: {tally.sentence}")
            counts[source.name] += tally.counts
    return counts


def row_of(change: Change, counts: dict[str, Counts], names: list[str]) -> dict[str, Any]:
    """The scores of a change; those of classes that a source does not label are left out."""
    each = {
        f"{source}/{name}": {key: getattr(score, key) for key in ("iou", "precision", "recall", "ece")}
        for source, one in counts.items()
        for name, score in list(zip(names, class_scores(one), strict=True))[1:]
        if not math.isnan(score.iou)
    }
    return {"change": change.name, "against": change.against, "score": mean_iou(counts.values()), "scores": each}


def differences(rows: list[dict[str, Any]]) -> list[dict[str, float]]:
    """What each row has less or more than the one that it is held against: the IoU of each source and class, and the score."""
    by_name = {row["change"]: iou_of(row) for row in rows}
    return [
        {name: iou - by_name[row["against"]].get(name, math.nan) for name, iou in iou_of(row).items()} for row in rows
    ]


def iou_of(row: dict[str, Any]) -> dict[str, float]:
    """The numbers of a row that are told."""
    return {**{name: one["iou"] for name, one in row["scores"].items()}, "mean": row["score"]}


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """A heading and a line for each row."""
    columns = list(iou_of(rows[0]))
    wide = max(len(row["change"]) for row in rows)
    yield " ".join([" " * wide, *(f"{name:>{max(13, len(name))}}" for name in columns)])
    for row, differs in zip(rows, differences(rows), strict=True):
        cells = [f"{iou:.3f} {differs[name]:+.3f}" if name in differs else "-" for name, iou in iou_of(row).items()]
        yield " ".join(
            [
                f"{row['change']:{wide}}",
                *(f"{cell:>{max(13, len(name))}}" for name, cell in zip(columns, cells, strict=True)),
            ]
        )


def heat_map(rows: list[dict[str, Any]]) -> bytes:
    """A PNG: IoU in each cell, red where it is lower than in the row that it is held against, blue where it is higher."""
    font, columns = ImageFont.load_default(15), list(iou_of(rows[0]))
    left = 16 + max(int(font.getlength(row["change"])) for row in rows)
    width = 24 + max(int(font.getlength(name)) for name in columns)
    canvas = Image.new("RGB", (left + width * len(columns) + 12, 36 + 24 * len(rows)), PAPER)
    draw = ImageDraw.Draw(canvas)
    for place, name in enumerate(columns):
        draw.text((left + (place + 0.5) * width, 8), name, INK, font, anchor="ma")
    for line, (row, differs) in enumerate(zip(rows, differences(rows), strict=True)):
        top = 32 + 24 * line
        draw.text((8, top + 3), row["change"], INK, font)
        for place, name in enumerate(columns):
            corner = left + place * width
            draw.rectangle((corner, top, corner + width - 3, top + 21), heat(differs.get(name, 0.0)))
            text = f"{iou_of(row)[name]:.3f}  {differs[name]:+.3f}" if name in differs else "-"
            draw.text((corner + width / 2 - 1, top + 3), text, INK, font, anchor="ma")
    return png(canvas)


def heat(difference: float) -> tuple[int, int, int]:
    """The colour of a difference in IoU; those of 0.3 and more are as red or as blue as it gets."""
    share = min(1.0, abs(difference) / FULL_HEAT)
    end = np.array((214, 96, 77) if difference < 0 else (67, 147, 195))
    red, green, blue = (round(one) for one in (np.array((240, 238, 232)) * (1 - share) + end * share).tolist())
    return red, green, blue


def main() -> None:
    """Change, score, tell, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", default=DEFAULT_BUNDLE, help="name or URI")
    parser.add_argument(
        "--out", type=Path, help="folder for robustness.json and robustness.png; without one they are not kept"
    )
    parser.add_argument("--json", action="store_true", help="print the JSON in place of the table")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="WORD", help="changes whose names have one of these words"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    bundle, sources = load_bundle(arguments.bundle), validation_sources()
    names = [one.name for one in bundle.description.classes]
    wanted = {
        change.name for change in CHANGES if not arguments.only or any(one in change.name for one in arguments.only)
    }
    wanted |= {change.against for change in CHANGES if change.name in wanted}
    rows = []
    for change in CHANGES:
        if change.name in wanted:
            with tempfile.TemporaryDirectory() as folder:
                rows.append(row_of(change, counted(bundle, change, sources, Path(folder)), names))
            print(f"{change.name}: {rows[-1]['score']:.3f}", file=sys.stderr, flush=True)
    told = {
        "bundle": {"name": bundle.description.name, "sha256": bundle.digest},
        "scenes": {source.name: [path.stem for path in paths] for source, paths in sources},
        "rows": [{**row, "difference": one} for row, one in zip(rows, differences(rows), strict=True)],
    }
    text = json.dumps(told, indent=1)
    print(text if arguments.json else "\n".join(table(rows)))
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "robustness.json").write_text(text + "\n")
        (arguments.out / "robustness.png").write_bytes(heat_map(rows))


if __name__ == "__main__":
    main()
