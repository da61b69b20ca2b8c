"""Removing what was published of a scene: the item first, so that nothing ever stands with a part of its files."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection

from geoseg.predict.output import Output
from geoseg.predict.parts import remove_parts
from geoseg.raster import store

_ASSET = re.compile(
    r"vectors\.json|(?:mask|probabilities|uncertainty|thumbnail)-[0-9a-f]{16}\.(?:tif|png)"
    r"|(?:buildings|roads|road_nodes)-[0-9a-f]{16}\.(?:parquet|fgb|gpkg|pmtiles)"
)


def remove_scene(output: Output, scene_id: str, check: Callable[[], None]) -> None:
    """Remove a scene's item, then its other files and unfinished windows; ``check`` may end it before each step.

    What else lies in the folder is not geoseg's, such as scenes where the output lies in the input, and stays.
    Raises AccessDeniedError, StoreError; called again it goes on from there.
    """
    if scene_id in output.items:
        check()
        store.delete([output.items[scene_id].uri])
    check()
    ours = [uri for uri in output.beside.get(scene_id, ()) if _ASSET.fullmatch(store.base_name(uri))]
    beside = sorted(ours, key=lambda uri: not uri.endswith(".json"))  # vectors.json before its files
    store.delete(beside)
    remove_parts(output.parts.get(scene_id, ()))


def half_removed(output: Output, wanted: Collection[str]) -> list[str]:
    """Scenes without an item that nobody wants, of which files are left: somebody was stopped while removing them."""
    return [
        scene_id
        for scene_id, uris in output.beside.items()
        if scene_id not in output.items
        and scene_id not in wanted
        and all(_ASSET.fullmatch(store.base_name(uri)) for uri in uris)
    ]
