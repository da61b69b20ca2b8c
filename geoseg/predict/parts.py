"""Parts: the encoded blocks of one window, kept in the output store until their scene is published.

A part's name says which scene, fingerprint, window size and window it belongs to, and its bytes follow from them, so a
retry writes the same object again and a resumed run takes up what an earlier one left.
"""

from __future__ import annotations

import re

from geoseg.predict.plan import RunSpec, ScenePlan
from geoseg.raster import store
from geoseg.raster.window import Window, WindowSet

WORK_FOLDER = "_geoseg"
_PART = re.compile(r"r(\d+)c(\d+)")


def part_folder(run: RunSpec, plan: ScenePlan) -> str:
    """The prefix of a scene's parts."""
    return store.join(_all_parts(run, plan.scene.id), f"{plan.fingerprint[:32]}-{plan.window}")


def part_uri(run: RunSpec, plan: ScenePlan, window: Window) -> str:
    """The name of a window's part; those of further layers add ``.`` and the layer's name and are written before it."""
    return store.join(part_folder(run, plan), f"r{window.row_off // plan.window}c{window.col_off // plan.window}")


def finished_parts(run: RunSpec, plan: ScenePlan) -> WindowSet:
    """The windows whose parts are there."""
    finished = WindowSet()
    for info in store.walk(part_folder(run, plan)):
        place = _PART.fullmatch(store.base_name(info.uri))
        if place:
            finished.add(int(place[1]) * plan.window, int(place[2]) * plan.window)
    return finished


def delete_parts(run: RunSpec, scene_id: str) -> None:
    """Remove all parts of a scene, those also that were made for another version, window size or setting.

    One run at a time holds an output. A run that lost it and deletes parts of its successor's costs that one a second
    look at the scene, no more: what is missing is made again.
    """
    store.delete([info.uri for info in store.walk(_all_parts(run, scene_id))])


def _all_parts(run: RunSpec, scene_id: str) -> str:
    return store.join(run.out, WORK_FOLDER, "parts", scene_id)
