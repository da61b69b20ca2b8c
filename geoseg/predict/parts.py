"""Parts: the encoded blocks of one window, kept in the output store until their scene is published.

A part's name says which scene, fingerprint, window size and window it belongs to, and its bytes follow from them, so a
retry writes the same object again and a resumed run takes up what an earlier one left.
"""

from __future__ import annotations

from collections.abc import Iterator

from geoseg.predict.plan import RunSpec, ScenePlan
from geoseg.raster import store
from geoseg.raster.window import Window

WORK_FOLDER = "_geoseg"


def part_folder(run: RunSpec, plan: ScenePlan) -> str:
    """The prefix of a scene's parts."""
    return store.join(run.out, WORK_FOLDER, "parts", plan.scene.id, f"{plan.fingerprint[:32]}-{plan.window}")


def part_uri(run: RunSpec, plan: ScenePlan, window: Window) -> str:
    """The name of a window's part; the part with probabilities adds ``.probabilities`` and is written before it."""
    return store.join(part_folder(run, plan), f"r{window.row_off // plan.window}c{window.col_off // plan.window}")


def finished_parts(run: RunSpec, plan: ScenePlan) -> set[str]:
    """URIs of the parts that are there."""
    return {info.uri for info in store.walk(part_folder(run, plan))}


def delete_parts(run: RunSpec, plan: ScenePlan) -> None:
    """Remove a published scene's parts."""
    store.delete(list(_all(run, plan)))


def _all(run: RunSpec, plan: ScenePlan) -> Iterator[str]:
    for info in store.walk(part_folder(run, plan)):
        yield info.uri
