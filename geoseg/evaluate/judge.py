"""Labelled scenes and a network in, counts out, window by window, so that a scene of any size needs little memory.

Each window is predicted as ``geoseg predict`` does it, with a little more around it for the distances; what is counted does
not depend on how a scene is cut, nor on who does which windows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from geoseg.errors import SceneReadError
from geoseg.predict.failure import Failure, attempt
from geoseg.predict.mask import class_mask, class_probabilities, to_scene_pixels
from geoseg.predict.plan import NetworkSpec, ScenePlan, plan_scene
from geoseg.predict.predictor import Predictor
from geoseg.predict.reading import read_window
from geoseg.raster.geotiff import SceneReader, keep_decoded
from geoseg.raster.raster import Raster
from geoseg.raster.scene import SceneRef
from geoseg.raster.stack import StackReader
from geoseg.raster.window import Window
from geoseg.raster.work import WorkGrid, work_grid
from geoseg.train.codes import UNLABELLED, LabelCodes
from geoseg.train.labels import find_labels, found_classes
from geoseg.train.metrics import HALO, Counts, count_window
from geoseg.train.objects import Objects, find_objects, join_objects
from geoseg.train.sources import SourceConfig

_JOINED_AT_ONCE = 32


class Labels(Protocol):
    """What tells the codes (row, col) on a window of a scene's grid; UNLABELLED outside the scene."""

    def read(self, work: WorkGrid, window: Window) -> NDArray[np.uint8]:
        """The codes of a window."""


@dataclass(frozen=True, slots=True)
class EvaluationScene:
    """A scene as it is to be predicted, and its labels; ``labelled`` are the classes that they find wherever they are.

    Background is among them when all others are. The other classes are not scored on this scene.
    """

    source: str
    plan: ScenePlan
    labels: Labels
    codes: LabelCodes
    labelled: tuple[int, ...]

    @property
    def own_grid(self) -> WorkGrid:
        """The scene's own pixels, on which masks and labels are compared."""
        return work_grid(self.plan.scene.levels, 1.0)


def find_scene(ref: SceneRef, source: SourceConfig, spec: NetworkSpec, codes: LabelCodes) -> EvaluationScene | Failure:
    """A scene of a source with its labels, or why there is none; pixels are not read yet."""

    def found() -> EvaluationScene:
        plan = plan_scene(ref, spec)
        classes = tuple(one.name for one in spec.description.classes)
        labels = find_labels(source.labels, plan.scene, classes, codes)
        return EvaluationScene(source.name, plan, labels, codes, found_classes(source.labels, classes, codes))

    return attempt(found, ref.id, "planning")


@dataclass(frozen=True, slots=True)
class Tally:
    """What was counted in some windows of a scene: counts, and objects of each class from 1 on (none when it was quick)."""

    counts: Counts
    objects: tuple[Objects, ...]

    @classmethod
    def joined(cls, tallies: Sequence[Tally], num_classes: int, *, complete: bool = False) -> Tally:
        """The tally of all; ``complete``: no more of the scene will come, so that its objects are counted."""
        counts = sum((tally.counts for tally in tallies), Counts.zero(num_classes))
        by_class = zip(*(tally.objects for tally in tallies if tally.objects), strict=True)
        objects = tuple(join_objects(each, complete=complete) for each in by_class)
        if complete and objects:
            return cls(counts.with_objects([one.settled for one in objects]), ())
        return cls(counts, objects)


@dataclass(frozen=True, slots=True)
class SeenWindow:
    """A window's labels (row, col) and what the network says of its pixels: logits (class, row, col) and which have data."""

    labels_hw: NDArray[np.uint8]
    logits_chw: Tensor
    valid_hw: NDArray[np.bool_]
    around: Raster
    around_off: tuple[int, int]


@dataclass(frozen=True, slots=True)
class JudgedWindow:
    """A window's mask and labels (row, col), the tally, and what the network saw: a core's pixels and its place."""

    window: Window
    mask_hw: NDArray[np.uint8]
    labels_hw: NDArray[np.uint8]
    tally: Tally
    around: Raster
    around_off: tuple[int, int]


class Judge:
    """A network that judges itself on windows of labelled scenes; keeps the block index of the last scene."""

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor
        self._known: tuple[ScenePlan, SceneReader | StackReader] | None = None

    def reader(self, plan: ScenePlan) -> SceneReader | StackReader:
        """The reader of a scene. Raises SceneError."""
        if self._known is None or self._known[0] != plan:
            self._known = plan, plan.reader()
            keep_decoded(plan.decoded_bytes)
        return self._known[1]

    def windows(self, scene: EvaluationScene, windows: Iterable[Window], *, quick: bool) -> Iterator[JudgedWindow]:
        """The windows that hold something to count. Raises SceneError, StoreError."""
        for window in windows:
            judged = self._window(scene, window, quick=quick)
            if judged is not None:
                yield judged

    def see(self, scene: EvaluationScene, window: Window, *, unlabelled: bool = False) -> SeenWindow | None:
        """What the network says of a window; None when there is no pixel or, unless ``unlabelled`` ones are wanted, no label.

        Raises SceneError, StoreError.
        """
        plan, stitching = scene.plan, scene.plan.stitching
        labels_hw = scene.labels.read(scene.own_grid, window)
        if not unlabelled and (labels_hw == UNLABELLED).all():
            return None
        around, valid_hw = read_window(plan, self.reader(plan), window)
        if around is None:
            return None
        at, margin = stitching.core(window), stitching.margin
        logits_chw = to_scene_pixels(self._predictor.cores([around])[0][0], stitching, at, window)
        return SeenWindow(labels_hw, logits_chw, valid_hw, around, (at.row_off - margin, at.col_off - margin))

    def _window(self, scene: EvaluationScene, window: Window, *, quick: bool) -> JudgedWindow | None:
        plan, codes, stitching = scene.plan, scene.codes, scene.plan.stitching
        # Cores on the scene's own pixels begin on multiples of the stride.
        halo = 0 if quick else -(-HALO // stitching.stride) * stitching.stride
        grown = _clipped(window.grown(halo), stitching.scene_shape)
        seen = self.see(scene, grown, unlabelled=not quick)
        if seen is None:
            return None
        labels_hw, description = seen.labels_hw, self._predictor.description
        mask_hw = class_mask(seen.logits_chw, seen.valid_hw, description)
        if mask_hw is None:
            raise SceneReadError(f"{plan.scene.id}: the network answered with numbers that are not finite at {grown}")
        top, left = window.row_off - grown.row_off, window.col_off - grown.col_off
        core = slice(top, top + window.height), slice(left, left + window.width)
        steps_chw = class_probabilities(seen.logits_chw, seen.valid_hw, description)
        counts = count_window(mask_hw, labels_hw, codes, core=core, steps_chw=steps_chw, quick=quick)
        counts = counts.only(scene.labelled)
        mask_hw, labels_hw = mask_hw[core], labels_hw[core]
        objects = [
            find_objects(mask_hw, labels_hw, codes, value, window=window, scene_shape=stitching.scene_shape)
            if value in scene.labelled
            else Objects.none()
            for value in range(1, 1 if quick else codes.num_classes)
        ]
        return JudgedWindow(window, mask_hw, labels_hw, Tally(counts, tuple(objects)), seen.around, seen.around_off)


def _clipped(window: Window, shape: tuple[int, int]) -> Window:
    row_off, col_off = max(0, window.row_off), max(0, window.col_off)
    return Window(col_off, row_off, min(window.col_end, shape[1]) - col_off, min(window.row_end, shape[0]) - row_off)


def evaluate_scenes(
    predictor: Predictor, scenes: Sequence[EvaluationScene], *, share: tuple[int, int] = (0, 1), quick: bool
) -> list[Tally | Failure]:
    """A tally of each scene, or why there is none.

    ``share`` is (rank, world): this is one of ``world`` workers that deal the windows out among them, and what they count adds
    up. ``quick``: IoU, precision, recall and calibration alone, of windows with labels alone; of these a plain sum of
    ``Tally.counts`` is all. Other tallies of a scene are put together by ``Tally.joined``, as ``complete`` once all are there.
    """
    judge = Judge(predictor)
    return [
        attempt(
            partial(_tally, judge, scene, ((share[0] - place) % share[1], share[1]), quick=quick),
            scene.plan.scene.id,
            "evaluating",
        )
        for place, scene in enumerate(scenes)
    ]


def _tally(judge: Judge, scene: EvaluationScene, share: tuple[int, int], *, quick: bool) -> Tally:
    windows = islice(scene.plan.windows(judge.reader(scene.plan)), share[0], None, share[1])
    return joined_as_they_come(
        (judged.tally for judged in judge.windows(scene, windows, quick=quick)), scene.codes.num_classes
    )


def joined_as_they_come(tallies: Iterable[Tally], num_classes: int) -> Tally:
    """The tally of all, a few held at a time."""
    held: list[Tally] = []
    for tally in tallies:
        held.append(tally)
        if len(held) == _JOINED_AT_ONCE:
            held = [Tally.joined(held, num_classes)]
    return Tally.joined(held, num_classes)


def error_codes(num_classes: int) -> dict[str, int]:
    """The codes of an error map beside the classes: a pixel that is right has its class, one that is not known 255."""
    return {"missed": num_classes, "false": num_classes + 1, "wrong class": num_classes + 2}


def error_map(mask_hw: NDArray[np.uint8], labels_hw: NDArray[np.uint8], codes: LabelCodes) -> NDArray[np.uint8]:
    """What is right and wrong at each pixel (uint8, row, col), see ``error_codes``.

    Missed: the label is a class and the mask background; false: the mask is a class where the label rules that class out
    and names no other; wrong class: both are classes and differ. A mask that a label leaves open is not known.
    """
    num, named = codes.num_classes, error_codes(codes.num_classes)
    table: NDArray[Any] = np.where(codes.possible, 255, named["false"]).astype(np.uint8)  # (label, mask)
    table[1:num, 1:] = named["wrong class"]
    table[1:num, 0] = named["missed"]
    table[range(num), range(num)] = range(num)
    has_data = mask_hw != 255
    found: NDArray[np.uint8] = np.where(has_data, table[labels_hw, np.where(has_data, mask_hw, 0)], np.uint8(255))
    return found
