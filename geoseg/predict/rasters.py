"""The rasters that are published of a scene: what they say of themselves, and how they are put together from its parts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from geoseg.model.light import NUM_MEASURES, NUM_STEPS
from geoseg.predict.parts import part_names
from geoseg.predict.plan import RunSpec, ScenePlan
from geoseg.predict.seams import Seams, sum_seams
from geoseg.predict.stac import UNCERTAINTIES
from geoseg.raster import cog, store
from geoseg.raster.cog import NODATA, CogAssembler, CogProfile
from geoseg.raster.splice import Deal, SplicedCog, read_part
from geoseg.raster.window import WindowSet, plan_windows


@dataclass(frozen=True, slots=True)
class PublishedRaster:
    """Its key among the item's assets, the name of its parts' layer ("" for the mask), what the file says, a title."""

    key: str
    layer: str
    profile: CogProfile
    title: str


def mask_raster(run: RunSpec) -> PublishedRaster:
    """The mask."""
    named = run.description.classes
    tags = [(f"CLASS_{value}", one.name) for value, one in enumerate(named)] + [(f"CLASS_{NODATA}", "nodata")]
    colors = tuple(one.color for one in named)
    profile = CogProfile(num_bands=1, colors=colors, tags=tuple(tags), band_names=("class",), scale=None)
    return PublishedRaster("mask", "", profile, "Class of each pixel")


def further_rasters(run: RunSpec) -> Iterator[PublishedRaster]:
    """What else a run asks for."""
    config = run.config
    if config.probabilities:
        names = tuple(one.name for one in run.description.classes)
        profile = CogProfile(num_bands=len(names), colors=None, tags=(), band_names=names, scale=1 / 254)
        title = "Probability of each class in steps of 1/254"
        yield PublishedRaster("probabilities", "probabilities", profile, title)
    if config.uncertainty:
        profile = CogProfile(num_bands=1, colors=None, tags=(), band_names=(config.uncertainty,), scale=1 / 254)
        title = f"{UNCERTAINTIES[config.uncertainty]}, in steps of 1/254"
        yield PublishedRaster("uncertainty", "uncertainty", profile, title)


@dataclass(frozen=True, slots=True, kw_only=True)
class PartSums:
    """What the headers of parts say together: pixels by class, light, uncertainty by class, seams, precisions, fine pixels.

    ``with_data`` are the places (row, col) of those windows that have pixels of a class.
    """

    classes: npt.NDArray[np.int64] | int = 0
    light: npt.NDArray[np.int64] | int = 0
    unsure: npt.NDArray[np.int64] | int = 0
    seams: Seams = field(default_factory=Seams)
    precisions: frozenset[str] = frozenset()
    num_fine: int = 0
    with_data: tuple[tuple[int, int], ...] = ()


def sum_up(headers: list[tuple[int, int, dict[str, Any]]]) -> PartSums:
    """The sum of headers of the mask's parts, each with the place of its window."""
    told = [header for _, _, header in headers]

    def added(key: str) -> npt.NDArray[np.int64] | int:
        return sum((np.asarray(one[key], np.int64) for one in told if key in one), start=0)

    return PartSums(
        classes=added("classes"),
        light=added("light"),
        unsure=added("uncertainty"),
        seams=sum_seams([one["seams"] for one in told if "seams" in one]),
        num_fine=sum(one.get("fine", 0) for one in told),
        precisions=frozenset(one["precision"] for one in told if "precision" in one),
        with_data=tuple((row, col) for row, col, one in headers if any(one["classes"])),
    )


class SceneSums:
    """The sums of all parts of a scene's mask; ``with_data`` are its windows that have pixels of a class."""

    def __init__(self, run: RunSpec, plan: ScenePlan) -> None:
        description = run.description
        self.classes = np.zeros(len(description.classes), np.int64)
        self.unsure = np.zeros_like(self.classes)
        self.light = np.zeros((NUM_MEASURES, len(description.bands), NUM_STEPS), np.int64)
        self.seams = Seams()
        self.precisions = set[str]()
        self.num_fine = 0
        self.with_data = WindowSet()
        self._window = plan.window

    def add(self, sums: PartSums) -> None:
        """Add those of some parts."""
        self.classes += sums.classes
        self.unsure += sums.unsure
        self.light += sums.light
        self.seams += sums.seams
        self.precisions |= sums.precisions
        self.num_fine += sums.num_fine
        for row, col in sums.with_data:
            self.with_data.add(row * self._window, col * self._window)


def _nothing(_: Any) -> PartSums:
    return PartSums()


Cog = CogAssembler | SplicedCog


def raster_in_the_making(
    run: RunSpec, plan: ScenePlan, raster: PublishedRaster, num_bytes: int
) -> AbstractContextManager[Cog]:
    """Where a raster is put together whose parts have ``num_bytes`` together: here if they are few, else in the store."""
    if num_bytes <= cog.PIECE_BYTES:
        return CogAssembler(plan.scene.grid, raster.profile)
    return nullcontext(SplicedCog(plan.scene.grid, raster.profile, part_names(run, plan, raster.layer)))


def collect(
    run: RunSpec, plan: ScenePlan, raster: PublishedRaster, windows: WindowSet, *, into: Cog, deal: Deal
) -> Iterator[PartSums]:
    """Put the parts of ``windows`` into a raster and make its overviews; the sums of the mask's headers, bit by bit.

    Raises SpliceError, StoreError.
    """
    add_up = _nothing if raster.layer else sum_up
    if isinstance(into, SplicedCog):
        yield from into.gather(windows, add_up, deal)
        return
    names, grid = part_names(run, plan, raster.layer), plan.scene.grid
    cut = plan_windows(grid.height, grid.width, plan.window)
    inside = (window for window in cut if windows.has(window.row_off, window.col_off))
    places = [(window.row_off // plan.window, window.col_off // plan.window) for window in inside]
    parts = store.in_parallel(read_part, (names.of_window(*place) for place in places))
    for place, (header, blocks) in zip(places, parts, strict=True):
        into.add(blocks)
        yield add_up([(*place, header)])
    into.make_overviews(plan.window)
