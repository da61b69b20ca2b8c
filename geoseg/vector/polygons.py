"""Groups of whole components in, polygons on the ground with their attributes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import shapely
from numpy.typing import NDArray
from pydantic import Field, FiniteFloat, field_validator

from geoseg.config import Section
from geoseg.errors import ConfigError
from geoseg.raster.grid import Grid
from geoseg.vector.ground import areas_m2
from geoseg.vector.join import Groups
from geoseg.vector.rings import link_rings
from geoseg.vector.simplify import simplify_groups

_SHARE_STEPS = 254
_INT32 = np.iinfo(np.int32)


class PolygonsConfig(Section):
    """Which classes of a mask become polygons, and how much these may differ from its pixels.

    ``classes``: names of the bundle's classes. ``min_area_m2``: smaller polygons are left out, in square metres on the
    ellipsoid; holes of any size stay. ``simplify_px``: how far outlines are smoothed, in pixels of the mask: corners go whose
    triangle with their neighbours is no larger than its square; 0 keeps the sides of the pixels, and from 2 on polygons less than
    that apart may come to overlap. ``square``: give outlines right angles, each by itself, so that polygons which touch may come
    to overlap by a pixel or leave a gap.
    """

    classes: tuple[str, ...] = ("building",)
    min_area_m2: Annotated[FiniteFloat, Field(ge=0)] = 10.0
    simplify_px: Annotated[FiniteFloat, Field(ge=0, le=100)] = 1.0
    square: bool = False

    @field_validator("classes")
    @classmethod
    def _names_some(cls, classes: tuple[str, ...]) -> tuple[str, ...]:
        if not classes or len(set(classes)) != len(classes):
            raise ValueError('classes must be one or more different names, for example ["building"]')
        return classes


@dataclass(frozen=True, slots=True, eq=False)
class Polygons:
    """Polygons as columns, in no promised order.

    ``id`` int64 and unique in its scene, the class's ``name``, ``area_m2`` float64 of the geometry, ``confidence`` float32 from 0
    to 1, the mean probability of the class over its pixels (NaN for none), ``pixels`` int64 of the mask, ``geometry`` shapely
    polygons in the CRS of the grid, exteriors against the clock.
    """

    id: NDArray[np.int64]
    name: NDArray[np.str_]
    area_m2: NDArray[np.float64]
    confidence: NDArray[np.float32]
    pixels: NDArray[np.int64]
    geometry: NDArray[np.object_]

    def __len__(self) -> int:
        return len(self.id)


def class_values(classes: Sequence[str], names: Mapping[int, str]) -> tuple[int, ...]:
    """The values of ``classes`` among the ``names`` by value. Raises ConfigError for one that is not there."""
    by_name = {name: value for value, name in names.items()}
    for name in classes:
        if not by_name.get(name):
            known = ", ".join(name for value, name in names.items() if value)
            raise ConfigError(f"there is no class {name!r} to make polygons of; the mask has {known}")
    return tuple(by_name[name] for name in classes)


def lattice_id(
    rows: NDArray[np.integer], cols: NDArray[np.integer], origin_row: int, origin_col: int
) -> NDArray[np.int64]:
    """One int64 for each pixel of a lattice: its row in the upper 32 bits, its column in the lower, both signed.

    ``rows`` and ``cols`` are counted from the pixel of the lattice at ``origin_row`` and ``origin_col``. Raises ConfigError
    for a lattice too large.
    """
    row, col = rows.astype(np.int64) + origin_row, cols.astype(np.int64) + origin_col
    for what in (row, col):
        if len(what) and not _INT32.min <= what.min() <= what.max() <= _INT32.max:
            raise ConfigError(
                f"the pixels of the lattice reach from {what.min()} to {what.max()}, and ids have 32 bits for each way; choose an "
                "origin nearer to the scenes"
            )
    return (row << 32) | (col & 0xFFFFFFFF)


def finish_polygons(
    groups: Groups,
    grid: Grid,
    config: PolygonsConfig,
    names: Mapping[int, str],
    *,
    origin: tuple[int, int] = (0, 0),
) -> Polygons:
    """The polygons of whole groups of components; ``grid`` is the scene's, ``names`` are the classes by value.

    ``origin`` is the (row, col) of the scene's first pixel on the lattice that several scenes share. An id tells a component's
    first pixel, the least (row, col). A grid that is not of the Earth has its areas in the plane, in the unit of its CRS.
    Groups that a joiner handed out with ``together`` off can only be finished with ``simplify_px`` 0.
    """
    rings = link_rings(groups.records, len(groups), straight=config.simplify_px > 0)
    # The first vertex of a component is the corner of its first pixel.
    first = np.append(0, rings.ends)[np.append(0, rings.component_ends)[:-1]]
    ids = lattice_id(rings.row[first], rings.col[first], *origin)
    outlines = shapely.from_ragged_array(
        shapely.GeometryType.POLYGON,
        np.stack([rings.col, rings.row], axis=1).astype(np.float64),
        (np.append(0, rings.ends), np.append(0, rings.component_ends)),
    )
    order = np.lexsort((ids, groups.group))
    outlines, group = outlines[order], groups.group[order]
    if config.simplify_px > 0:
        outlines = simplify_groups(outlines, group, config.simplify_px)
    if config.square:
        from geoseg.vector.square import square  # noqa: PLC0415 - geopandas, which not every run needs

        outlines = square(outlines, grid.pixel_size_m)
    a, b, c, d, e, f = grid.geotransform
    col, row = shapely.get_coordinates(outlines).T
    placed = shapely.set_coordinates(outlines, np.stack([a * col + b * row + c, d * col + e * row + f], axis=1))
    placed = shapely.orient_polygons(placed)
    area_m2 = areas_m2(placed, grid.crs_wkt)
    if area_m2 is None:
        across, down = grid.pixel_size_m
        area_m2 = shapely.area(placed) * (across * down / abs(a * e - b * d))
    kept = np.flatnonzero(area_m2 >= config.min_area_m2)
    where = order[kept]
    known = groups.known[where]
    shares = np.where(known > 0, groups.shares[where], np.nan) / (np.maximum(known, 1) * _SHARE_STEPS)
    return Polygons(
        id=ids[where],
        name=np.array([names.get(value, "") for value in range(256)])[groups.value[where]],
        area_m2=area_m2[kept],
        confidence=shares.astype(np.float32),
        pixels=groups.pixels[where],
        geometry=placed[kept],
    )
