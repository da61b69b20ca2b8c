"""One run at a time on an output: a lease in the store, renewed by a beating thread."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from typing_extensions import Self

from geoseg.errors import ConfigError, GeosegError, OutputHeldError
from geoseg.predict.parts import WORK_FOLDER
from geoseg.raster import store

BEAT_S = 5.0
MISSED_BEATS = 3


class Lease:
    """Holds ``<out>/_geoseg/lease.json`` while the block runs. Raises OutputHeldError when another run does.

    Raises ConfigError for a store without conditional writes, and for a folder in which a link leads out of it.

    A holder is taken for dead when its lease stays the same version for three beats as seen from here (no clocks are
    compared), or at once when it was a process beside this one that is gone. Every write says which version it replaces, so
    of several runs that wait for a dead one the store lets one through.
    """

    def __init__(self, out: str, *, beat_s: float = BEAT_S) -> None:
        self._out = out
        self.uri = store.join(out, WORK_FOLDER, "lease.json")
        began = datetime.now(timezone.utc)
        self.run_id = f"{began:%Y%m%dT%H%M%S}.{began.microsecond // 1000:03}Z-{uuid.uuid4().hex[:6]}"  # sorts by time
        self._beat_s = beat_s
        self._beat = 0
        self._version: store.Version | None = None
        self._stop = threading.Event()
        self._lost = ""
        self._thread = threading.Thread(target=self._keep_beating, name="lease", daemon=True)

    def __enter__(self) -> Self:
        store.refuse_links_out(self._out, below=("", WORK_FOLDER))
        if not self._claim():
            self._take_over()
        self._see_conditions_kept()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        with suppress(GeosegError):  # what may not be deleted is taken for dead after three beats
            holder, _version = self._read()
            if holder.get("run") == self.run_id:
                store.delete([self.uri])

    def check(self) -> None:
        """Raises OutputHeldError when the lease was lost to another run."""
        if self._lost:
            raise OutputHeldError(self._lost)

    def _see_conditions_kept(self) -> None:
        """Raises ConfigError when the store accepts what no condition allows: it cannot keep two runs apart, nor two items."""
        claimed = self._version
        self._beat += 1
        if not self._claim():
            raise self._held_by(self._read()[0])
        for header, create, replaces in (("If-None-Match", True, None), ("If-Match", False, claimed)):
            with suppress(store.ObjectExistsError):
                store.write(self.uri, self._body(), create=create, replaces=replaces)
                store.delete([self.uri])
                raise ConfigError(
                    f"{store.redact(self.uri)}: this store ignores {header} on writes, so it could keep neither two runs nor two "
                    "masks of a scene apart; write to a store that heeds it, as AWS S3 and Ceph do"
                )

    def _body(self) -> bytes:
        told = {"run": self.run_id, "beat": self._beat, "host": socket.gethostname(), "pid": os.getpid(), "in": _here()}
        return json.dumps(told).encode()

    def _claim(self) -> bool:
        """Write the lease in place of the version seen last, or where there was none; whether it is this run's now."""
        try:
            self._version = store.write(self.uri, self._body(), create=self._version is None, replaces=self._version)
        except store.ObjectExistsError:
            holder, self._version = self._read()
            return holder.get("run") == self.run_id  # it was written by this run, and the answer was lost
        return True

    def _read(self) -> tuple[dict[str, Any], store.Version | None]:
        """Who holds the lease (nothing when there is none, or no word of ours in it) and its version."""
        try:
            body, version = store.read_version(self.uri)
        except store.ObjectMissingError:
            return {}, None
        try:
            told = json.loads(body)
        except ValueError:
            told = None
        return told if isinstance(told, dict) else {}, version

    def _take_over(self) -> None:
        """Wait until the lease is gone, or has not changed for three beats, and claim it."""
        holder, standing = self._read()
        self._version = standing
        deadline = time.monotonic() + MISSED_BEATS * self._beat_s
        while self._version is not None and not _is_gone(holder) and time.monotonic() < deadline:
            time.sleep(self._beat_s / 5)
            holder, self._version = self._read()
            if self._version not in (None, standing):
                raise self._held_by(holder)
        if not self._claim():
            raise self._held_by(self._read()[0])

    def _held_by(self, holder: dict[str, Any]) -> OutputHeldError:
        who = (
            f"run {holder.get('run')} on {holder.get('host')} (process {holder.get('pid')})"
            if holder
            else "another run"
        )
        return OutputHeldError(
            f"{store.redact(self.uri)}: {who} is writing to this output; wait for it to end, or write to another output"
        )

    def _keep_beating(self) -> None:
        while not self._stop.wait(self._beat_s):
            self._beat += 1
            try:
                held = self._claim()
            except GeosegError:
                continue  # the store is away for a moment; the next beat tries again
            if not held:
                self._lost = f"{store.redact(self.uri)}: another run has taken this output over; this one ends"
                return


def read_holder(out: str) -> dict[str, Any] | None:
    """What the holder of an output's lease wrote of itself, None when there is none. Raises AccessDeniedError, StoreError."""
    try:
        told = json.loads(store.read(store.join(out, WORK_FOLDER, "lease.json")))
    except store.ObjectMissingError:
        return None
    except ValueError:
        return {}
    return told if isinstance(told, dict) else {}


def _here() -> str:
    """Where a process id means something: this boot of this machine and, of its containers, this one."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # no Linux, so no containers of processes either
        return socket.gethostname()


def _is_gone(holder: dict[str, Any]) -> bool:
    """Whether a holder is certainly dead. An id that another process got meanwhile is not; the three beats tell."""
    pid = holder.get("pid")
    if not holder:
        return True
    if holder.get("in") != _here() or not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except OSError as error:
        return isinstance(error, ProcessLookupError)
    return False
