"""One run at a time on an output: a lease in the store, renewed by a beating thread."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from typing import Any

from typing_extensions import Self

from geoseg.errors import GeosegError, OutputHeldError
from geoseg.predict.parts import WORK_FOLDER
from geoseg.raster import store

BEAT_S = 5.0
MISSED_BEATS = 3


class Lease:
    """Holds ``<out>/_geoseg/lease.json`` while the block runs. Raises OutputHeldError when another run does.

    A holder is taken for dead when its counter stands still for three beats as seen from here (no clocks are compared),
    or at once when it was a process of this host that is gone.
    """

    def __init__(self, out: str, *, beat_s: float = BEAT_S) -> None:
        self.uri = store.join(out, WORK_FOLDER, "lease.json")
        self.run_id = uuid.uuid4().hex[:12]
        self._beat_s = beat_s
        self._beat = 0
        self._etag = ""
        self._stop = threading.Event()
        self._lost = ""
        self._thread = threading.Thread(target=self._keep_beating, name="lease", daemon=True)

    def __enter__(self) -> Self:
        try:
            self._write(create=True)
        except store.ObjectExistsError:
            self._take_over()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if not self._lost:
            with suppress(GeosegError):  # what may not be deleted is taken for dead after three beats
                store.delete([self.uri])

    def check(self) -> None:
        """Raises OutputHeldError when the lease was lost to another run."""
        if self._lost:
            raise OutputHeldError(self._lost)

    def _body(self) -> bytes:
        told = {"run": self.run_id, "beat": self._beat, "host": socket.gethostname(), "pid": os.getpid()}
        return json.dumps(told).encode()

    def _write(self, *, create: bool = False, replaces: str | None = None) -> None:
        store.write(self.uri, self._body(), create=create, replaces=replaces)
        self._etag = store.head(self.uri).etag

    def _seen(self) -> tuple[dict[str, Any], str] | None:
        try:
            etag = store.head(self.uri).etag
            return json.loads(store.read(self.uri)), etag
        except store.ObjectMissingError:
            return None
        except ValueError:
            return {}, etag

    def _take_over(self) -> None:
        first = self._seen()
        deadline = time.monotonic() + MISSED_BEATS * self._beat_s
        while first is not None and not _is_gone(first[0]) and time.monotonic() < deadline:
            time.sleep(self._beat_s / 5)
            now = self._seen()
            if now is None:
                break
            if now[0] != first[0]:
                holder = now[0]
                raise OutputHeldError(
                    f"{store.redact(self.uri)}: run {holder.get('run')} on {holder.get('host')} (process {holder.get('pid')}) is "
                    "writing to this output; wait for it to end, or write to another output"
                )
        try:
            self._write(create=first is None or self._seen() is None, replaces=first[1] if first else None)
        except store.ObjectExistsError as error:
            raise OutputHeldError(f"{store.redact(self.uri)}: another run has just begun on this output") from error

    def _keep_beating(self) -> None:
        while not self._stop.wait(self._beat_s):
            self._beat += 1
            try:
                seen = self._seen()
                lost = seen is None or seen[0].get("run") != self.run_id
                if not lost:
                    self._write(replaces=self._etag)
            except store.ObjectExistsError:
                lost = True
            except GeosegError:
                continue  # the store is away for a moment; the next beat tries again
            if lost:
                self._lost = f"{store.redact(self.uri)}: another run has taken this output over; this one ends"
                return


def _is_gone(holder: dict[str, Any]) -> bool:
    if not holder:
        return True
    if holder.get("host") != socket.gethostname() or not isinstance(holder.get("pid"), int):
        return False
    if holder["pid"] == os.getpid():
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
