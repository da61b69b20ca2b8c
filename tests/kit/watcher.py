"""A reader that looks at an output again and again while it is written, and at what nobody must ever see in it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from typing import Any

from geoseg.predict.stac import BLOCKS_SUM
from geoseg.raster import store


class Watcher:
    """Lists an output and reads what is new in it. ``faults`` has a sentence for each thing that must not be.

    ``num_partial`` of them are of scenes that were to be seen in part.

    Each item that is visible must be complete in the listing that shows it: every asset there, of its size and its bytes. No item
    may go or come back in an earlier version, no published file may change its bytes. The lease has one holder at a time: a
    run that another one came after never holds it again, and its beats only grow.
    """

    def __init__(self, out: str) -> None:
        self.num_listings = self.num_items = self.num_holders = self.num_partial = 0
        self.faults: list[str] = []
        self._out = out.rstrip("/")
        self._items: dict[str, list[str]] = {}
        self._bodies: dict[tuple[str, str], dict[str, Any]] = {}
        self._read: set[tuple[str, str]] = set()
        self._sums: dict[str, str] = {}
        self._holders: list[str] = []
        self._beat = -1
        self._lease_etag = ""

    def look(self) -> None:
        """One listing, and a look into each object of it that was not seen before."""
        listed = {info.uri.removeprefix(self._out + "/"): info for info in store.walk(f"{self._out}/")}
        self.num_listings += 1
        for name in self._items.keys() - listed.keys():
            if not store.exists(f"{self._out}/{name}"):
                self._fault(f"{name}: the item was visible and is gone")
        for name, info in listed.items():
            if name.endswith("/item.json"):
                self._look_at_item(name, info, listed)
        lease = listed.get("_geoseg/lease.json")
        if lease is not None and lease.etag != self._lease_etag:
            self._look_at_lease()

    def _look_at_item(self, name: str, info: store.ObjectInfo, listed: dict[str, store.ObjectInfo]) -> None:
        body = self._bodies.get((name, info.etag))
        if body is None:
            data, version = store.read_version(info.uri)
            body, sha256 = json.loads(data), hashlib.sha256(data).hexdigest()
            before = self._items.setdefault(name, [])
            if sha256 not in before:
                before.append(sha256)
                self.num_items += 1
            elif before[-1] != sha256:
                self._fault(f"{name}: stands in an earlier version again")
            self._bodies[name, store.bare(version)] = body
        for key, asset in body["assets"].items():
            uri = _address(self._out, name, asset["href"])
            there = listed.get(uri.removeprefix(self._out + "/")) or self._head(uri)
            if there is None:
                self._partial(f"{name}: is visible without its {key}, {asset['href']}")
            elif there.size != asset["file:size"]:
                self._partial(f"{name}: its {key} has {there.size} bytes, not {asset['file:size']}")
            else:
                self._look_at_bytes(name, key, asset, there)

    def _head(self, uri: str) -> store.ObjectInfo | None:
        """A folder is listed while it changes, so what a listing lacks is asked for."""
        try:
            return store.head(uri)
        except store.ObjectMissingError:
            return None

    def _look_at_bytes(self, name: str, key: str, asset: dict[str, Any], there: store.ObjectInfo) -> None:
        if (there.uri, there.etag) in self._read:
            return
        self._read.add((there.uri, there.etag))
        sha256 = hashlib.sha256(store.read(there.uri)).hexdigest()
        if BLOCKS_SUM not in asset and asset["file:checksum"] != f"1220{sha256}":
            self._partial(f"{name}: its {key} has other bytes than its checksum says")
        if self._sums.setdefault(there.uri, sha256) != sha256:
            self._fault(f"{there.uri}: its bytes were changed after an item named it")

    def _look_at_lease(self) -> None:
        try:
            body, version = store.read_version(f"{self._out}/_geoseg/lease.json")
        except store.ObjectMissingError:
            return
        self._lease_etag = store.bare(version)
        told = json.loads(body)
        run, beat = str(told["run"]), int(told["beat"])
        if run not in self._holders:
            self._holders.append(run)
            self.num_holders += 1
        elif run != self._holders[-1]:
            self._fault(f"run {run} holds the lease again after run {self._holders[-1]}")
        elif beat < self._beat:
            self._fault(f"run {run} beats {beat} after {self._beat}")
        self._beat = beat

    def _partial(self, sentence: str) -> None:
        self.num_partial += 1
        self._fault(sentence)

    def _fault(self, sentence: str) -> None:
        if sentence not in self.faults:
            self.faults.append(sentence)


def _address(out: str, item: str, href: str) -> str:
    folder = item.rpartition("/")[0]
    return (
        f"{out}/{href.removeprefix('../')}" if href.startswith("../") else f"{out}/{folder}/{href.removeprefix('./')}"
    )


def results(out: str) -> dict[str, str]:
    """SHA-256 of each object of an output by name, without what tells of runs: their records and the lease."""
    found = [info.uri for info in store.walk(f"{out}/")]
    told = re.compile(r"/_geoseg/(?:runs/.*|lease\.json)")
    names = {name: uri for uri in found if not told.fullmatch(name := uri.removeprefix(out))}
    return {name: hashlib.sha256(store.read(uri)).hexdigest() for name, uri in names.items()}


@contextlib.contextmanager
def watching(out: str, *, pause_s: float = 0.01) -> Iterator[Watcher]:
    """Watch an output in a thread for the length of the block, and once more after it. Raises what ended the thread."""
    watcher, stop, errors = Watcher(out), threading.Event(), list[BaseException]()

    def watch() -> None:
        try:
            while not stop.wait(pause_s):
                watcher.look()
        except BaseException as error:  # noqa: BLE001 - told to whoever waits
            errors.append(error)

    thread = threading.Thread(target=watch, name="watcher", daemon=True)
    thread.start()
    try:
        yield watcher
    finally:
        stop.set()
        thread.join()
    if errors:
        raise errors[0]
    watcher.look()
