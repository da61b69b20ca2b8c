"""A word from the driver to all workers of a run, through Ray's own table of keys: begin no window any more."""

from __future__ import annotations

import time

from ray.experimental import internal_kv

_NAMESPACE = b"geoseg"
_LOOK_EVERY_S = 0.5


def let_workers_rest(run_id: str) -> None:
    """Ask the workers of a run to begin nothing new."""
    internal_kv._internal_kv_put(_key(run_id), b"1", namespace=_NAMESPACE)  # noqa: SLF001 - Ray has no other table


def forget(run_id: str) -> None:
    """Take the word back when the run is over."""
    internal_kv._internal_kv_del(_key(run_id), namespace=_NAMESPACE)  # noqa: SLF001


class RestSign:
    """A worker's view of it: looks now and then, in well under a millisecond."""

    def __init__(self, run_id: str) -> None:
        self._key = _key(run_id)
        self._looked_at = float("-inf")
        self._is_up = False

    def is_up(self) -> bool:
        """Whether to begin nothing new."""
        if not self._is_up and time.monotonic() - self._looked_at > _LOOK_EVERY_S:
            self._is_up = bool(internal_kv._internal_kv_exists(self._key, namespace=_NAMESPACE))  # noqa: SLF001
            self._looked_at = time.monotonic()
        return self._is_up


def _key(run_id: str) -> bytes:
    return f"rest:{run_id}".encode()
