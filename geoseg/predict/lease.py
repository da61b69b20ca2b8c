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

from geoseg.errors import ConfigError, GeosegError, OutputHeldError, StoreError
from geoseg.predict.parts import WORK_FOLDER
from geoseg.raster import store

BEAT_S = 5.0
MISSED_BEATS = 3
_FRESH_BEATS = 2  # one less than others wait, so that clocks may run at speeds that differ by half
_PATIENCE_S = 600.0


class Lease:
    """Holds ``<out>/_geoseg/lease.json`` while the block runs. Raises OutputHeldError when another run does.

    Raises ConfigError for a store without conditional writes, and for a folder in which a link leads out of it.

    A holder is taken for dead when its lease stays the same version for three beats as seen from here (no clocks are
    compared), or at once when it was a process beside this one that is gone. Every write says which version it replaces, so
    of several runs that wait for a dead one the store lets one through. At its end a run writes that it has let go; it deletes
    nothing, since a deletion has no condition and may come late, when the lease is another run's.
    """

    def __init__(self, out: str, *, beat_s: float = BEAT_S) -> None:
        self._out = out
        self.uri = store.join(out, WORK_FOLDER, "lease.json")
        began = datetime.now(timezone.utc)
        self.run_id = f"{began:%Y%m%dT%H%M%S}.{began.microsecond // 1000:03}Z-{uuid.uuid4().hex[:6]}"  # sorts by time
        self._beat_s = beat_s
        self._beat = 0
        self._version: store.Version | None = None
        self._held_since = 0.0
        self._is_over = False
        self._lock = threading.Lock()
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
        self._is_over = True
        with suppress(GeosegError):  # a lease that is not let go of is taken for dead after three beats
            self._renew()

    def check(self) -> None:
        """Raises OutputHeldError unless this run held the lease within the last two beats, so that no other can have it yet.

        A lease that was not renewed for so long, as when this process or the store stood still, is renewed first; if the store
        lets nothing through for ten minutes, that is an OutputHeldError too. Raises AccessDeniedError.

        No later run has written what was read before a check that passes. A write that replaces this very version, and no
        other, undoes nothing of theirs then, however late it comes.
        """
        give_up = _now() + _PATIENCE_S
        while not self._lost and not self._is_fresh():
            if _now() > give_up:
                self._lost = (
                    f"{store.redact(self.uri)}: the store let no renewal through for {_PATIENCE_S:g} s, so another run may have "
                    "this output; this one ends, run it again"
                )
            with suppress(StoreError):
                self._renew()
                continue
            time.sleep(self._beat_s / 5)
        if self._lost:
            raise OutputHeldError(self._lost)

    def _is_fresh(self) -> bool:
        return _now() - self._held_since < _FRESH_BEATS * self._beat_s

    def _see_conditions_kept(self) -> None:
        """Raises ConfigError when the store accepts what no condition allows: it cannot keep two runs apart, nor two items."""
        claimed = self._version
        self._beat += 1
        if not self._claim():
            raise self._held_by(self._read()[0])
        for header, create, replaces in (("If-None-Match", True, None), ("If-Match", False, claimed)):
            with suppress(store.ObjectExistsError, store.ObjectMissingError):
                store.write(self.uri, self._body() + b"\n", create=create, replaces=replaces)  # not what stands there
                store.delete([self.uri])
                raise ConfigError(
                    f"{store.redact(self.uri)}: this store ignores {header} on writes, so it could keep neither two runs nor two "
                    "masks of a scene apart; write to a store that heeds it, as AWS S3 and Ceph do"
                )

    def _body(self) -> bytes:
        told = {"run": self.run_id, "beat": self._beat, "host": socket.gethostname(), "pid": os.getpid(), "in": _here()}
        return json.dumps(told | ({"over": True} if self._is_over else {})).encode()

    def _renew(self) -> None:
        """The next beat, unless the lease is lost. Raises what the store does."""
        with self._lock:
            if self._lost:
                return
            self._beat += 1
            if not self._claim():
                self._lost = f"{store.redact(self.uri)}: another run has taken this output over; this one ends"

    def _claim(self) -> bool:
        """Write the lease in place of the version seen last, or where there was none; whether it is this run's now."""
        while True:
            began = _now()
            try:
                self._version = store.write(
                    self.uri, self._body(), create=self._version is None, replaces=self._version
                )
            except (store.ObjectExistsError, store.ObjectMissingError):
                holder, self._version = self._read()
                if holder.get("run") != self.run_id:
                    return False
                if holder.get("beat") != self._beat:
                    continue  # an earlier beat, whose answer was lost
            self._held_since = began
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
        deadline = _now() + MISSED_BEATS * self._beat_s
        while not _is_gone(holder) and _now() < deadline:
            time.sleep(self._beat_s / 5)
            holder, self._version = self._read()
            if self._version != standing and not _is_gone(holder):
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
        while not self._lost and not self._stop.wait(self._beat_s):
            with suppress(GeosegError):  # the store is away for a moment; the next beat tries again
                self._renew()


def read_holder(out: str) -> dict[str, Any] | None:
    """What the holder of an output's lease wrote of itself, None when nobody has it. Raises AccessDeniedError, StoreError."""
    try:
        told = json.loads(store.read(store.join(out, WORK_FOLDER, "lease.json")))
    except store.ObjectMissingError:
        return None
    except ValueError:
        return {}
    if not isinstance(told, dict):
        return {}
    return None if told.get("over") else told


def _now() -> float:
    """Seconds by the clock that goes on, where there is such a one, while the machine sleeps."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _here() -> str:
    """Where a process id means something: this boot of this machine and, of its containers, this one."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # no Linux, so no containers of processes either
        return socket.gethostname()


def _is_gone(holder: dict[str, Any]) -> bool:
    """Whether a holder is over or certainly dead. An id that another process got meanwhile is not; the three beats tell."""
    pid = holder.get("pid")
    if not holder or holder.get("over"):
        return True
    if holder.get("in") != _here() or not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except OSError as error:
        return isinstance(error, ProcessLookupError)
    return False
