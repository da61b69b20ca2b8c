"""What stands in an output, from one listing of it: items, the files beside them, unfinished work, records of runs."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from geoseg.predict.parts import WORK_FOLDER
from geoseg.predict.publish import ITEM_NAME, VECTORS_NAME
from geoseg.predict.record import RECORD_NAME, RUNS_FOLDER
from geoseg.raster import store


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """``items`` by scene; ``beside`` and ``parts`` have the URIs of a scene's other files and of its unfinished windows.

    ``vectors`` are the items of what was traced of scenes; these are beside, too. ``runs`` are the ids of the runs with a
    record, the oldest first.
    """

    root: str
    items: dict[str, store.ObjectInfo]
    beside: dict[str, list[str]]
    parts: dict[str, list[str]]
    runs: tuple[str, ...]
    vectors: dict[str, store.ObjectInfo] = field(default_factory=dict)


def list_output(root: str) -> Output:
    """List everything below an output (a normalised URI). Raises AccessDeniedError, ConfigError, StoreError."""
    items: dict[str, store.ObjectInfo] = {}
    beside: dict[str, list[str]] = defaultdict(list)
    parts: dict[str, list[str]] = defaultdict(list)
    vectors: dict[str, store.ObjectInfo] = {}
    runs = []
    for info in store.walk(root + "/"):
        match info.uri[len(root) + 1 :].split("/"):
            case [scene_id, name] if name == ITEM_NAME:
                items[scene_id] = info
            case [scene_id, name] if scene_id != WORK_FOLDER:
                beside[scene_id].append(info.uri)
                if name == VECTORS_NAME:
                    vectors[scene_id] = info
            case [folder, "parts", scene_id, _, *_] if folder == WORK_FOLDER:
                parts[scene_id].append(info.uri)
            case [folder, runs_folder, run_id, name] if (folder, runs_folder, name) == (
                WORK_FOLDER,
                RUNS_FOLDER,
                RECORD_NAME,
            ):
                runs.append(run_id)
            case _:
                pass
    return Output(
        root=root, items=items, beside=dict(beside), parts=dict(parts), runs=tuple(sorted(runs)), vectors=vectors
    )
