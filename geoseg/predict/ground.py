"""What stands in an output when a run begins, to hold new masks against: those of the same ground, and what is usual."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import shapely

from geoseg.predict.guard import MaskBefore, UsualShare, doublings, shares
from geoseg.predict.index import Known

_SAME_GROUND = 0.8
_LEAST_MASKS = 20
_LEAST_SPREAD = 0.25  # in doublings
_OF_NORMAL = 1.4826  # standard deviation over median absolute deviation, of a normal distribution


def usual_shares(masks: Iterable[Known], *, bundle: str) -> tuple[UsualShare, ...]:
    """What masks made with a bundle (its digest) have of each class; nothing when there are fewer than 20."""
    found = [shares(dict(one.classes)) for one in masks if one.made.bundle == bundle]
    found = [one for one in found if one]
    if len(found) < _LEAST_MASKS:
        return ()
    told = []
    for name in found[0]:
        values = np.array([doublings(one[name]) for one in found if name in one])
        median = float(np.median(values))
        spread = _OF_NORMAL * float(np.median(np.abs(values - median)))
        told.append(UsualShare(name=name, median=median, spread=max(spread, _LEAST_SPREAD), num=len(values)))
    return tuple(told)


class Ground:
    """Finds the latest mask of the same ground among those that stand when a run begins."""

    def __init__(self, masks: Mapping[str, Known]) -> None:
        placed = [(scene_id, one) for scene_id, one in masks.items() if one.classes and one.footprint]
        self._placed = sorted(placed, key=lambda each: (each[1].moment, each[0]))
        self._numbers = {scene_id: number for number, (scene_id, _) in enumerate(self._placed)}
        footprints = shapely.from_wkt([one.footprint for _, one in self._placed], on_invalid="ignore")
        self._tree = shapely.STRtree(shapely.make_valid(footprints))

    def before(self, scene_id: str, footprint: str) -> MaskBefore | None:
        """The latest mask whose footprint (WKT) is a scene's, to four fifths; the scene's own comes before all others."""
        if not footprint:
            return None
        ours = shapely.make_valid(shapely.from_wkt(footprint))
        near = sorted(self._tree.query(ours).tolist(), reverse=True)  # of a place there may be masks of years
        own = self._numbers.get(scene_id)
        for number in [own, *near] if own in near else near:
            theirs = self._tree.geometries[number]
            whole = shapely.union(ours, theirs).area
            if whole and shapely.intersection(ours, theirs).area >= _SAME_GROUND * whole:
                other_id, other = self._placed[number]
                return MaskBefore(id=other_id, classes=other.classes)
        return None
