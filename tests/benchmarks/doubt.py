"""Is uncertainty worth something? Errors by uncertainty, and what of them lies in the squares of which a network is least sure.

    python tests/benchmarks/doubt.py [--chip 128] [--bundle roads-buildings]

The default bundle on the scenes that it was validated with. A pixel is wrong when its mask differs from its label in the classes
that the source has labels of. Tenths: valid, labelled pixels in the order of their uncertainty, the surest first. Squares lie side
by side; of a source the tenth with the highest mean uncertainty is held against a random tenth (mean of 2000 draws, and what 95 of
100 of them stay below), and against the tenth with most errors, which nobody can know. Command: the error rate in the squares that
`geoseg worth-labelling` chooses, over that of the source.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rasterio
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1]))

from kit.data import data_folder

import geoseg
from geoseg.evaluate.worth_labelling import Wanted, find_worth_labelling

NODATA, BUILDING, ROAD = 255, 1, 2
KINDS = ("entropy", "margin")
DRAWS = 2000


@dataclass(frozen=True)
class Source:
    """Scenes and labels of one kind: their files, which codes of the labels are of which class, and the classes they tell."""

    scenes: list[Path]
    labels: str
    values: dict[int, int]
    classes: tuple[int, ...]


def sources() -> dict[str, Source]:
    """The validation scenes of the default bundle."""
    folder = data_folder()
    roads = sorted(path for path in (folder / "mass_roads").glob("mass_*.tif") if not path.stem.endswith("_classes"))
    roads = [path for path in roads if path.stem[5:].startswith(("8", "9")) and path.stem != "mass_80"]
    return {
        "dubai_2": Source([folder / "dubai" / "dubai_2.tif"], "_classes", {1: BUILDING, 2: ROAD}, (BUILDING, ROAD)),
        "massachusetts": Source(roads, "_classes", {2: ROAD}, (ROAD,)),
        "kampala": Source(
            [folder / "hot_buildings" / "kampala_ug_z20.tif"], "_buildings", {255: BUILDING}, (BUILDING,)
        ),
    }


@dataclass(frozen=True)
class Seen:
    """Of a scene: steps of uncertainty, whether the mask is wrong, and which pixels count, all (row, col)."""

    name: str
    steps_hw: NDArray[np.uint8]
    wrong_hw: NDArray[np.bool_]
    known_hw: NDArray[np.bool_]


def read(path: Path) -> NDArray[np.uint8]:
    """The first band of a file."""
    with rasterio.open(path) as dataset:
        pixels: NDArray[np.uint8] = dataset.read(1)
    return pixels


def seen(source: Source, scene: Path, published: Path) -> Seen:
    """What a published scene and its labels tell."""
    (mask,), (unsure,) = published.glob("mask-*.tif"), published.glob("uncertainty-*.tif")
    mask_hw, steps_hw = read(mask), read(unsure)
    told_hw = read(scene.with_name(f"{scene.stem}{source.labels}.tif"))
    labels_hw = np.zeros_like(told_hw)
    for value, code in source.values.items():
        labels_hw[told_hw == value] = code
    unlabelled_hw = (told_hw == NODATA) & (NODATA not in source.values)
    one, other = (np.where(np.isin(codes, source.classes), codes, 0) for codes in (mask_hw, labels_hw))
    return Seen(scene.stem, steps_hw, one != other, (mask_hw != NODATA) & ~unlabelled_hw)


def tenths(scenes: Sequence[Seen]) -> list[float]:
    """The error rate in each tenth of the pixels, the surest first."""
    steps = np.concatenate([one.steps_hw[one.known_hw] for one in scenes])
    wrong = np.concatenate([one.wrong_hw[one.known_hw] for one in scenes])
    return [float(part.mean()) for part in np.array_split(wrong[np.argsort(steps, kind="stable")], 10)]


def squares(scenes: Sequence[Seen], chip: int) -> NDArray[np.float64]:
    """Mean uncertainty and number of wrong pixels of each square with half of its pixels known (n, 2)."""
    found = []
    for one in scenes:
        for row, col in np.ndindex(one.steps_hw.shape[0] // chip, one.steps_hw.shape[1] // chip):
            part = slice(row * chip, (row + 1) * chip), slice(col * chip, (col + 1) * chip)
            known_hw = one.known_hw[part]
            if known_hw.mean() >= 0.5:
                found.append((one.steps_hw[part][known_hw].mean() / 254, (one.wrong_hw[part] & known_hw).sum()))
    return np.array(found, np.float64)


def shares(told: NDArray[np.float64]) -> tuple[float, float, float, float]:
    """Of all wrong pixels in squares, the share in the least certain tenth, a random one (mean, 95 %), the worst one."""
    wrong, count = told[:, 1], max(1, round(len(told) / 10))
    rng = np.random.default_rng(0)
    random = [wrong[rng.choice(len(told), count, replace=False)].sum() / wrong.sum() for _ in range(DRAWS)]
    unsure = wrong[np.argsort(-told[:, 0], kind="stable")[:count]].sum() / wrong.sum()
    return unsure, float(np.mean(random)), float(np.quantile(random, 0.95)), np.sort(wrong)[-count:].sum() / wrong.sum()


def by_command(out: Path, scenes: Sequence[Seen], chip: int) -> float:
    """The error rate in the squares that the command chooses over that of all pixels."""
    named = {one.name: one for one in scenes}
    wrong = known = 0
    for chosen in find_worth_labelling(str(out), Wanted(top=10, chip=chip)).squares:
        window, one = chosen.square.window, named[chosen.scene.id]
        part = slice(window.row_off, window.row_end), slice(window.col_off, window.col_end)
        wrong += int((one.wrong_hw[part] & one.known_hw[part]).sum())
        known += int(one.known_hw[part].sum())
    rate = sum((one.wrong_hw & one.known_hw).sum() for one in scenes) / sum(one.known_hw.sum() for one in scenes)
    return wrong / known / float(rate)


def main() -> None:
    """Predict, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chip", type=int, default=128)
    parser.add_argument("--bundle", default="roads-buildings")
    options = parser.parse_args()
    print(f"squares of {options.chip} pixels; errors in % of the pixels of each tenth, the surest first")
    print(
        f"{'source':<14} {'kind':<8} {'Mpx':>5} {'wrong':>6}  {' '.join(f'{tenth:>5}' for tenth in range(1, 11))}  "
        f"{'squares':>7} {'unsure':>7} {'random':>7} {'(95 %)':>7} {'worst':>6} {'command':>8}"
    )
    for name, source in sources().items():
        for kind in KINDS:
            with tempfile.TemporaryDirectory(prefix="geoseg-doubt-") as folder:
                report = geoseg.predict(
                    list(map(str, source.scenes)), folder, bundle=options.bundle, uncertainty=kind, engine="local"
                )
                assert report.exit_code == 0, report.scenes
                scenes = [seen(source, scene, Path(folder) / scene.stem) for scene in source.scenes]
                told = squares(scenes, options.chip)
                unsure, random, high, worst = shares(told)
                known = sum(int(one.known_hw.sum()) for one in scenes)
                wrong = sum(int((one.wrong_hw & one.known_hw).sum()) for one in scenes)
                print(
                    f"{name:<14} {kind:<8} {known / 1e6:>5.2f} {wrong / known:>6.1%}  "
                    f"{' '.join(f'{100 * rate:>5.1f}' for rate in tenths(scenes))}  {len(told):>7} {unsure:>7.1%} "
                    f"{random:>7.1%} {high:>7.1%} {worst:>6.1%} {by_command(Path(folder), scenes, options.chip):>7.2f}x",
                    flush=True,
                )


if __name__ == "__main__":
    try:
        main()
    except BaseException as error:
        if type(error).__name__ != "Skipped":
            raise
        print(error)
