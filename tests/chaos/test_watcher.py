"""The watcher of the other tests sees what it is there to see."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable

import pytest
from kit.watcher import Watcher

from geoseg.raster import store

BODY, OTHER = b"a mask", b"b mask"


class Output:
    """An output with one scene, complete, and a lease."""

    def __init__(self) -> None:
        self.root = f"memory://{uuid.uuid4().hex}/out"
        self.put("a/mask.tif", BODY)
        self.item(BODY)
        self.lease("one", 3)

    def put(self, name: str, body: bytes) -> None:
        store.write(f"{self.root}/{name}", body)

    def delete(self, name: str) -> None:
        store.delete([f"{self.root}/{name}"])

    def item(self, body: bytes, **more: str) -> None:
        checksum = "1220" + hashlib.sha256(body).hexdigest()
        asset = {"href": "./mask.tif", "file:size": len(body), "file:checksum": checksum}
        self.put("a/item.json", json.dumps({"assets": {"mask": asset}, **more}).encode())

    def lease(self, run: str, beat: int) -> None:
        self.put("_geoseg/lease.json", json.dumps({"run": run, "beat": beat}).encode())


def change_bytes(out: Output) -> None:
    out.put("a/mask.tif", OTHER)
    out.item(OTHER, revision="2")


def go_back(out: Output, watcher: Watcher) -> None:
    first = store.read(f"{out.root}/a/item.json")
    out.item(BODY, revision="2")
    watcher.look()
    out.put("a/item.json", first)


def take_back(out: Output, watcher: Watcher) -> None:
    out.lease("two", 1)
    watcher.look()
    out.lease("one", 4)


@pytest.mark.parametrize(
    ("harm", "sentence", "partial"),
    [
        (lambda out, _: out.delete("a/mask.tif"), "visible without its mask", 1),
        (lambda out, _: out.put("a/mask.tif", BODY[:-1]), "its mask has 5 bytes, not 6", 1),
        (lambda out, _: out.put("a/mask.tif", OTHER), "other bytes than its checksum says", 1),
        (lambda out, _: change_bytes(out), "its bytes were changed after an item named it", 0),
        (lambda out, _: out.delete("a/item.json"), "the item was visible and is gone", 0),
        (go_back, "stands in an earlier version again", 0),
        (take_back, "run one holds the lease again after run two", 0),
        (lambda out, _: out.lease("one", 2), "run one beats 2 after 3", 0),
    ],
)
def test_it_sees_harm(harm: Callable[[Output, Watcher], None], sentence: str, partial: int) -> None:
    out = Output()
    watcher = Watcher(out.root)
    watcher.look()
    assert (watcher.faults, watcher.num_items, watcher.num_holders) == ([], 1, 1)
    harm(out, watcher)
    watcher.look()
    assert any(sentence in fault for fault in watcher.faults), watcher.faults
    assert watcher.num_partial == partial


def test_it_sees_no_harm_in_what_goes_on() -> None:
    out = Output()
    watcher = Watcher(out.root)
    watcher.look()
    out.put("b/mask.tif", OTHER)
    out.item(BODY, revision="2")
    out.lease("one", 4)
    watcher.look()
    out.lease("two", 1)
    watcher.look()
    assert (watcher.faults, watcher.num_items, watcher.num_listings) == ([], 2, 3)
