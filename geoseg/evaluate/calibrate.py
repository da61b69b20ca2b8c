"""A bundle and labelled scenes in, the same bundle with a temperature and thresholds out.

The temperature is the one at which the labels are likeliest (Guo et al. 2017, arXiv:1706.04599). The thresholds are those with the
highest IoU, the mean over classes and over the sources that label them, so that a large source does not decide alone. Both
are fitted to pixels on a lattice, one in so many, which are the same however scenes are cut.
Legend of axes: c classes, n pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from geoseg.evaluate.judge import EvaluationScene, Judge, SeenWindow
from geoseg.model.bundle import Bundle
from geoseg.model.description import BundleDescription
from geoseg.predict.predictor import Predictor
from geoseg.raster.window import Window
from geoseg.train.codes import UNLABELLED, LabelCodes
from geoseg.train.metrics import known_classes

TEMPERATURES: tuple[float, ...] = tuple(round(2.0 ** (step / 12), 3) for step in range(-12, 25))  # 0.5 to 4
MOST_PIXELS = 1 << 20
_OFFSETS = np.arange(-32, 33) / 8  # what may be added to a class's logits over the temperature
_ROUNDS = 2


@dataclass(frozen=True, slots=True)
class _Pixels:
    """Pixels of one source: logits (c, n), label codes (n), and the ``classes`` that its labels find wherever they are."""

    logits_cn: NDArray[np.float32]
    labels_n: NDArray[np.uint8]
    classes: tuple[int, ...]


class Calibration:
    """Holds pixels of labelled windows, one in ``every`` x ``every``; says the temperature and the thresholds."""

    def __init__(self, codes: LabelCodes, *, every: int = 1) -> None:
        self._possible = codes.possible
        self._known = known_classes(codes)
        self._every = every
        self._pixels: dict[str, list[_Pixels]] = {}

    def add(self, seen: SeenWindow, window: Window, *, source: str, classes: Sequence[int]) -> None:
        """Take in a window of a source whose labels find ``classes``."""
        row, col = (-off % self._every for off in (window.row_off, window.col_off))
        on = slice(row, None, self._every), slice(col, None, self._every)
        labels_hw = seen.labels_hw[on]
        says_hw = seen.valid_hw[on] & (labels_hw != UNLABELLED)
        logits_cn = seen.logits_chw[:, on[0], on[1]].float().cpu().numpy()[:, says_hw]
        self._pixels.setdefault(source, []).append(_Pixels(logits_cn, labels_hw[says_hw], tuple(classes)))

    def temperature(self) -> float:
        """The temperature at which the labels are likeliest."""
        losses = np.zeros(len(TEMPERATURES))
        for pixels in (one for each in self._pixels.values() for one in each):
            may_be_cn = self._possible[pixels.labels_n].T
            lead_cn = pixels.logits_cn - pixels.logits_cn.max(0)
            for index, temperature in enumerate(TEMPERATURES):
                chances_cn = np.exp(lead_cn / np.float32(temperature), dtype=np.float64)
                within_n = np.where(may_be_cn, chances_cn, 0).sum(0)
                losses[index] += np.log(chances_cn.sum(0) / np.maximum(within_n, np.finfo(np.float64).tiny)).sum()
        return TEMPERATURES[int(losses.argmin())]

    def thresholds(self, temperature: float) -> tuple[float, ...]:
        """The threshold of each class at a temperature; 0.5 of the first and of those that no label finds.

        One class after the other takes the best offset at the others' offsets, the least change of equals, twice in turn.
        """
        offsets = np.zeros(self._known.shape[1], np.float32)
        found = {value for each in self._pixels.values() for one in each for value in one.classes} - {0}
        tries = np.array(sorted(_OFFSETS * temperature, key=abs), np.float32)
        for value in sorted(found) * _ROUNDS:
            offsets[value] = tries[int(np.argmax(self._scores(value, tries, offsets)))]
        return tuple(round(1 / (1 + math.exp(offset / temperature)), 4) for offset in offsets.tolist())

    def _scores(self, value: int, tries: NDArray[np.float32], offsets: NDArray[np.float32]) -> NDArray[np.float64]:
        """The mean IoU over sources and their classes but the first, for each of the offsets that a class may have.

        A pixel is of the class from some offset on, which its lead over the best other class tells, and before that of the other,
        so running sums over the sorted offsets count for all of them at once.
        """
        order = np.argsort(tries)
        ious: list[NDArray[np.float64]] = []
        for each in self._pixels.values():
            right, either = (np.zeros((self._known.shape[1], len(tries))) for _ in range(2))
            for pixels in each:
                logits_cn = pixels.logits_cn + offsets[:, None]
                logits_cn[value] = -np.inf
                other_n = logits_cn.argmax(0)
                from_n = np.searchsorted(tries[order], logits_cn.max(0) - pixels.logits_cn[value], side="right")
                for one in set(pixels.classes) - {0}:
                    known_n, true_n = self._known[pixels.labels_n, one], pixels.labels_n == one
                    if one == value:
                        taken, hit = (_from_on(from_n[mask], len(tries)) for mask in (known_n, true_n))
                    else:
                        known_n &= other_n == one
                        hit_n = true_n & (other_n == one)
                        taken, hit = (mask.sum() - _from_on(from_n[mask], len(tries)) for mask in (known_n, hit_n))
                    right[one] += hit
                    either[one] += taken + true_n.sum() - hit
            ious += [right[one] / either[one] for one in range(1, len(right)) if either[one].all()]
        scores = np.empty(len(tries))
        scores[order] = np.mean(ious, axis=0) if ious else 0.0
        return scores


def _from_on(from_n: NDArray[np.intp], num: int) -> NDArray[np.int64]:
    """How many of the numbers are at most 0, 1, 2 and so on up to ``num`` - 1."""
    counted: NDArray[np.int64] = np.cumsum(np.bincount(from_n, minlength=num + 1)[:num])
    return counted


def calibrated(bundle: Bundle, groups: Sequence[tuple[Predictor, Sequence[EvaluationScene]]]) -> Bundle:
    """The bundle with the temperature and the thresholds that fit the scenes best; its weights stay.

    ``groups``: scenes with the predictor that they are for. Raises SceneError, StoreError.
    """
    scenes = [scene for _, each in groups for scene in each]
    if not scenes:
        return bundle
    num_pixels = sum(math.prod(scene.plan.stitching.scene_shape) for scene in scenes)
    calibration = Calibration(scenes[0].codes, every=math.ceil(math.sqrt(num_pixels / MOST_PIXELS)))
    for predictor, each in groups:
        judge = Judge(predictor)
        for scene, window, seen in _seen(judge, each):
            calibration.add(seen, window, source=scene.source, classes=scene.labelled)
    temperature = calibration.temperature()
    description = bundle.description
    classes = [
        one.model_copy(update={"threshold": threshold})
        for one, threshold in zip(description.classes, calibration.thresholds(temperature), strict=True)
    ]
    told = description.model_copy(update={"temperature": temperature, "classes": tuple(classes)})
    return Bundle(description=BundleDescription.model_validate(told.model_dump()), weights=bundle.weights)


def _seen(judge: Judge, scenes: Iterable[EvaluationScene]) -> Iterable[tuple[EvaluationScene, Window, SeenWindow]]:
    for scene in scenes:
        for window in scene.plan.windows(judge.reader(scene.plan)):
            seen = judge.see(scene, window)
            if seen is not None:
                yield scene, window, seen
