"""Parts: the encoded blocks of one window, kept in the output store until their scene is published.

A part's name says which scene, fingerprint, window size and window it belongs to, and its bytes follow from them, so a
retry writes the same object again and a resumed run takes up what an earlier one left. Files that are published in pieces
are on their way beside them.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress

from geoseg.errors import GeosegError
from geoseg.predict.plan import RunSpec, ScenePlan
from geoseg.raster import store
from geoseg.raster.splice import PartNames
from geoseg.raster.upload import unfinished
from geoseg.raster.window import Window, WindowSet

WORK_FOLDER = "_geoseg"
_PART = re.compile(r"r(\d+)c(\d+)")
_PART_OF_LAYER = re.compile(r"r\d+c\d+(?:\.(\w+))?")
_UPLOAD = "upload-"


def part_folder(run: RunSpec, plan: ScenePlan) -> str:
    """The prefix of a scene's parts."""
    return store.join(_all_parts(run, plan.scene.id), f"{_of_fingerprint(plan.fingerprint)}{plan.window}")


def _of_fingerprint(fingerprint: str) -> str:
    return f"{fingerprint[:32]}-"


def part_names(run: RunSpec, plan: ScenePlan, layer: str = "") -> PartNames:
    """The names of the parts of a layer, "" for the mask; those of further layers are written before it."""
    return PartNames(part_folder(run, plan), f".{layer}" if layer else "", plan.window)


def part_uri(run: RunSpec, plan: ScenePlan, window: Window, layer: str = "") -> str:
    """The name of a window's part."""
    return part_names(run, plan, layer).of_window(window.row_off // plan.window, window.col_off // plan.window)


def staging_uri(run: RunSpec, plan: ScenePlan, name: str) -> str:
    """The name under which a file that is published in pieces is on its way."""
    return store.join(part_folder(run, plan), _UPLOAD + name)


def finished_parts(run: RunSpec, plan: ScenePlan) -> WindowSet:
    """The windows whose parts are there."""
    finished = WindowSet()
    for info in store.walk(part_folder(run, plan)):
        place = _PART.fullmatch(store.base_name(info.uri))
        if place:
            finished.add(int(place[1]) * plan.window, int(place[2]) * plan.window)
    return finished


def bytes_in_parts(run: RunSpec, plan: ScenePlan) -> Counter[str]:
    """How many bytes the parts of each layer have together, "" for the mask."""
    found: Counter[str] = Counter()
    for info in store.walk(part_folder(run, plan)):
        part = _PART_OF_LAYER.fullmatch(store.base_name(info.uri))
        if part:
            found[part[1] or ""] += info.size
    return found


def delete_parts(run: RunSpec, scene_id: str) -> None:
    """Remove all parts of a scene, those also that were made for another version, window size or setting.

    One run at a time holds an output. A run that lost it and deletes parts of its successor's costs that one a second
    look at the scene, no more: what is missing is made again.
    """
    remove_parts([info.uri for info in store.walk(_all_parts(run, scene_id))])


def parts_of_scenes(out: str) -> dict[str, list[str]]:
    """The URIs of all parts in an output, by scene; none when the store does not tell."""
    found: dict[str, list[str]] = defaultdict(list)
    folder = store.join(out, WORK_FOLDER, "parts")
    with suppress(GeosegError):
        for info in store.walk(folder):
            found[info.uri[len(folder) + 1 :].split("/")[0]].append(info.uri)
    return dict(found)


def sweep(parts: Mapping[str, Sequence[str]], standing: Mapping[str, str]) -> None:
    """Remove the parts of which items were made that stand; ``standing`` has the fingerprint of each by its scene.

    A run may have ended after the item and before it had tidied up, or a worker was lost with windows that were told, and another
    made them again when their scene stood. A run that may not delete goes on all the same.
    """
    with suppress(GeosegError):
        remove_parts(
            uri
            for scene_id, uris in parts.items()
            if scene_id in standing
            for uri in uris
            if f"/{scene_id}/{_of_fingerprint(standing[scene_id])}" in uri
        )


def remove_parts(uris: Iterable[str]) -> None:
    """Remove parts, and give up the files that are on their way beside them."""
    for _ in store.in_parallel(_remove, uris):
        pass


def _remove(uri: str) -> None:
    if store.base_name(uri).startswith(_UPLOAD):
        try:
            unfinished(uri).give_up()
        except store.ObjectMissingError:
            return
    else:
        store.delete([uri])


def _all_parts(run: RunSpec, scene_id: str) -> str:
    return store.join(run.out, WORK_FOLDER, "parts", scene_id)
