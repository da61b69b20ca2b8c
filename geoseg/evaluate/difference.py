"""Two masks of one scene in, which class became which out, in counts that add up; window by window, so memory is flat.

Classes are matched by name: both masks are read in the codes of a common list, whatever order their bundles have them in.
Legend of axes: b classes before, a classes after; the last of either is no data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from geoseg.errors import ConfigError, SceneReadError
from geoseg.model.description import ClassName
from geoseg.raster import store
from geoseg.raster.cog import NODATA
from geoseg.raster.geotiff import ReadOptions, SceneReader, describe
from geoseg.raster.scene import SceneRef
from geoseg.raster.window import BLOCK, Window, plan_windows

_WINDOW = 1024


@dataclass(frozen=True)
class ClassMatch:
    """The classes of two bundles in their own orders. Raises ConfigError when a mask cannot hold all of them."""

    before: tuple[ClassName, ...]
    after: tuple[ClassName, ...]

    def __post_init__(self) -> None:
        if len(self.all) >= NODATA:
            raise ConfigError(f"the two bundles have {len(self.all)} classes together, at most 254 can be compared")

    @cached_property
    def all(self) -> tuple[ClassName, ...]:
        """The classes before, then those that only the new bundle has; a class's code is its place here."""
        names = {one.name for one in self.before}
        return (*self.before, *(one for one in self.after if one.name not in names))

    @property
    def common(self) -> tuple[str, ...]:
        """Names that both have."""
        return tuple(one.name for one in self.before if one.name in {other.name for other in self.after})

    def codes(self, own: Sequence[ClassName]) -> NDArray[np.uint8]:
        """A table (256) from one bundle's codes to those of ``all``; what is no code of the bundle's becomes 254."""
        names = [one.name for one in self.all]
        table = np.full(256, NODATA - 1, np.uint8)
        table[: len(own)] = [names.index(one.name) for one in own]
        table[NODATA] = NODATA
        return table

    def sentence(self) -> str:
        """What cannot be compared because only one of the two knows it; nothing when the sets are the same."""
        sides = (("the published masks", self.before), ("the canary", self.after))
        alone = [
            f"{', '.join(names)} in {where} alone"
            for where, classes in sides
            if (names := [one.name for one in classes if one.name not in self.common])
        ]
        if not alone:
            return ""
        common = ", ".join(self.common) or "none"
        return f"the two bundles differ in their classes ({'; '.join(alone)}); compared are those in common: {common}"


class MaskPair:
    """Reads two masks of one scene, in the codes of ``ClassMatch.all``.

    Raises SceneError, StoreError; SceneReadError when the masks do not lie on one grid or hold what is no class.
    """

    def __init__(self, scene_id: str, uris: tuple[str, str], match: ClassMatch) -> None:
        scenes = [describe(SceneRef(scene_id, uri), ReadOptions()) for uri in uris]
        if scenes[0].grid != scenes[1].grid:
            raise SceneReadError(
                f"{scene_id}: its two masks do not lie on one grid; geoseg verify tells which is damaged"
            )
        self.scene_id, self.grid = scene_id, scenes[0].grid
        self._readers = [SceneReader(scene) for scene in scenes]
        self._tables = match.codes(match.before), match.codes(match.after)

    def read(self, window: Window) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """The codes (row, col) of a window before and after, 255 where there is no data."""
        before, after = (
            self._codes(reader, table, window) for reader, table in zip(self._readers, self._tables, strict=True)
        )
        return before, after

    def _codes(self, reader: SceneReader, table: NDArray[np.uint8], window: Window) -> NDArray[np.uint8]:
        read = reader.read(window, (0,))
        codes: NDArray[np.uint8] = table[np.where(read.valid, read.pixels[0], NODATA)]
        if (codes == NODATA - 1).any():
            raise SceneReadError(
                f"{self.scene_id}: {store.redact(reader.scene.uri)} holds values that are no class of its bundle's; geoseg "
                "verify tells more"
            )
        return codes


@dataclass(frozen=True, slots=True, eq=False)
class MaskDifference:
    """Pixels of a scene by class before and after (b, a), whole numbers, and the block in which most of them changed.

    ``pixel_m2`` is the ground under a pixel at the scene's centre.
    """

    pixels_ba: NDArray[np.int64]
    pixel_m2: float
    place: Window

    @property
    def km2_ba(self) -> NDArray[np.float64]:
        """The same as ground in km2."""
        return self.pixels_ba * np.float64(self.pixel_m2 / 1e6)


def compare_masks(pair: MaskPair, match: ClassMatch, *, window: int = _WINDOW) -> MaskDifference:
    """What differs between two masks; the same for any size of ``window``. Raises as ``MaskPair``."""
    grid, num = pair.grid, len(match.all)
    codes = [*range(num), NODATA]
    counts = np.zeros(1 << 16, np.int64)
    is_changed = np.zeros((256, 256), np.bool_)
    is_changed[:num, :num] = ~np.eye(num, dtype=np.bool_)
    changed = np.zeros((-(-grid.height // BLOCK), -(-grid.width // BLOCK)), np.int64)
    for each in plan_windows(grid.height, grid.width, window):
        before_hw, after_hw = pair.read(each)
        pairs_hw = before_hw.astype(np.uint16) << 8 | after_hw
        counts += np.bincount(pairs_hw.ravel(), minlength=len(counts))
        rows, cols = (range(0, size, BLOCK) for size in pairs_hw.shape)
        of_rows = np.add.reduceat(is_changed.ravel()[pairs_hw], rows, axis=0, dtype=np.int64)
        row, col = each.row_off // BLOCK, each.col_off // BLOCK
        changed[row : row + len(rows), col : col + len(cols)] = np.add.reduceat(of_rows, cols, axis=1)
    row, col = (int(place) * BLOCK for place in np.unravel_index(changed.argmax(), changed.shape))
    place = Window(col, row, min(BLOCK, grid.width - col), min(BLOCK, grid.height - row))
    return MaskDifference(counts.reshape(256, 256)[np.ix_(codes, codes)], grid.resolution_m**2, place)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassDifference:
    """Ground of a class in km2 where both masks have data: of the class in both, in the new alone, in the old alone."""

    name: str
    same_km2: float
    gained_km2: float
    lost_km2: float

    @property
    def before_km2(self) -> float:
        """Its ground before."""
        return self.same_km2 + self.lost_km2

    @property
    def after_km2(self) -> float:
        """Its ground after."""
        return self.same_km2 + self.gained_km2

    @property
    def iou(self) -> float | None:
        """Agreement: intersection over union of the two masks; None when neither has the class."""
        union = self.same_km2 + self.gained_km2 + self.lost_km2
        return self.same_km2 / union if union else None


@dataclass(frozen=True, slots=True, kw_only=True)
class GroundDifference:
    """Ground in km2: ``both_km2`` has data in both masks, ``one_km2`` in one alone, ``changed_km2`` another class."""

    both_km2: float
    one_km2: float
    changed_km2: float
    classes: tuple[ClassDifference, ...]

    @property
    def changed(self) -> float:
        """Share of the ground whose class is another one."""
        return self.changed_km2 / self.both_km2 if self.both_km2 else 0.0


def ground_difference(km2_ba: NDArray[np.float64], match: ClassMatch) -> GroundDifference:
    """The ground by class before and after (b, a) as what differs in all and of the classes in common."""
    with_data, same = km2_ba[:-1, :-1], np.diag(km2_ba)
    others = np.where(np.eye(len(with_data), dtype=np.bool_), 0.0, with_data)
    return GroundDifference(
        both_km2=float(with_data.sum()),
        one_km2=float(km2_ba[-1, :-1].sum() + km2_ba[:-1, -1].sum()),
        changed_km2=float(others.sum()),
        classes=tuple(
            ClassDifference(
                name=one.name,
                same_km2=float(same[code]),
                gained_km2=float(others[:, code].sum()),
                lost_km2=float(others[code].sum()),
            )
            for code, one in enumerate(match.all)
            if one.name in match.common
        ),
    )
