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
        placed = [(scene_id, one) for scene_id, one in sorted(masks.items()) if one.classes and _is_plain_box(one.bbox)]
        self._placed = placed
        self._tree = shapely.STRtree([shapely.box(*one.bbox) for _, one in placed])

    def before(self, scene_id: str, bbox: tuple[float, ...]) -> MaskBefore | None:
        """The latest mask whose bounding box is that of a scene, to four fifths; the scene's own comes before all others."""
        if not _is_plain_box(bbox):
            return None
        box = shapely.box(*bbox)
        found = []
        for number in self._tree.query(box):
            other_id, other = self._placed[number]
            theirs = self._tree.geometries[number]
            if box.intersection(theirs).area >= _SAME_GROUND * box.union(theirs).area:
                found.append((other_id == scene_id, other.moment, other_id, other))
        if not found:
            return None
        _, _, other_id, other = max(found, key=lambda one: one[:3])
        return MaskBefore(id=other_id, classes=other.classes)


def _is_plain_box(bbox: tuple[float, ...]) -> bool:
    """Whether a bounding box is one, and does not go over the antimeridian."""
    return len(bbox) == 4 and bbox[0] < bbox[2] and bbox[1] < bbox[3]
