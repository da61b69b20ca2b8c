"""What is looked at before a mask is published: is the scene like those of the training, the mask like the others there are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from geoseg.config import GuardConfig

_LITTLE = 0.02  # a share of the ground; one of 0.1 % is not ten times as much as one of 0.01 %


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskBefore:
    """An earlier mask of a scene's ground: the id of its scene, and its pixels by class."""

    id: str
    classes: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class UsualShare:
    """What masks of an output have of a class: median and spread of log2(share + 0.02), over ``num`` masks."""

    name: str
    median: float
    spread: float
    num: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Guard:
    """Limits, what masks of the output usually have of each class (empty while too few stand).

    ``released`` are the fingerprints of scenes that somebody has looked at.
    """

    limits: GuardConfig
    usual: tuple[UsualShare, ...] = ()
    released: frozenset[str] = frozenset()

    def objections(
        self, scene_id: str, classes: Mapping[str, int], novelty: float | None, before: MaskBefore | None
    ) -> list[str]:
        """Why a mask with these pixels by class looks implausible, a sentence each; empty when it does not."""
        told = [self._too_new(novelty), *self._too_changed(scene_id, classes, before), *self._too_unusual(classes)]
        return [sentence for sentence in told if sentence]

    def _too_new(self, novelty: float | None) -> str:
        limit = self.limits.max_novelty
        if novelty is None or not limit or novelty <= limit:
            return ""
        return (
            f"its pixels lie {novelty:.3g} times as far from the nearest scene that the bundle was trained on as those lie from "
            f"each other, {limit:g} is the most that max_novelty allows: look at its bands, its dtype and --scale"
        )

    def _too_changed(self, scene_id: str, classes: Mapping[str, int], before: MaskBefore | None) -> list[str]:
        limit = self.limits.max_change
        if before is None or not limit:
            return []
        now, then = shares(classes), shares(dict(before.classes))
        where = "the mask that stands" if before.id == scene_id else f"the mask of {before.id} on the same ground"
        return [
            f"{name} covers {now[name]:.1%} of it, and {then[name]:.1%} of {where}: a change by more than the factor {limit:g} "
            "that max_change allows"
            for name in now
            if name in then and abs(doublings(now[name]) - doublings(then[name])) > math.log2(limit)
        ]

    def _too_unusual(self, classes: Mapping[str, int]) -> list[str]:
        limit, now = self.limits.max_deviation, shares(classes)
        if not limit:
            return []
        return [
            f"{usual.name} covers {now[usual.name]:.1%} of it, {2**usual.median - _LITTLE:.1%} of half of the {usual.num} masks of "
            f"this bundle: {apart:.3g} spreads apart, {limit:g} is the most that max_deviation allows"
            for usual in self.usual
            if usual.name in now and (apart := abs(doublings(now[usual.name]) - usual.median) / usual.spread) > limit
        ]


def shares(classes: Mapping[str, int]) -> dict[str, float]:
    """The share of the valid pixels that each class has; of a mask without any no class has one."""
    total = sum(classes.values())
    return {name: count / total for name, count in classes.items()} if total else {}


def doublings(share: float) -> float:
    """A share on the scale on which shares are compared: how many doublings it is from the whole, small ones drawn together."""
    return math.log2(share + _LITTLE)
