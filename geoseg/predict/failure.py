"""The boundary around a step for one scene: what goes wrong there becomes a sentence, and the run goes on."""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from geoseg.errors import GeosegError, OvertakenError, SceneDeniedError, StopError, StoreError, stop_error
from geoseg.raster import store

_T = TypeVar("_T")
_DISK_HAS_NO_ROOM = tuple(f"(os error {number})" for number in (errno.ENOSPC, errno.EDQUOT))  # as obstore tells it
_TORCH_HAS_NO_MEMORY = ("CUDA out of memory", "not enough memory", "can't allocate memory")


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a step failed. ``stop`` names the kind of error when the whole job cannot go on; ``again``: a second try may do.

    ``denied``: the store keeps this scene from us.
    """

    sentence: str
    stop: str = ""
    again: bool = False
    denied: bool = False

    def raise_if_stop(self) -> None:
        """Raises the StopError that it was, if it was one."""
        if self.stop:
            raise stop_error(self.stop, self.sentence)


def attempt(step: Callable[[], _T], scene_id: str, doing: str) -> _T | Failure:
    """What ``step`` gives, or why it failed; ``doing`` says in a few words what was going on with the scene."""
    try:
        return step()
    except GeosegError as error:
        stop = type(error).__name__ if isinstance(error, StopError) else ""
        again, denied = isinstance(error, (StoreError, OvertakenError)), isinstance(error, SceneDeniedError)
        room = f"; {_make_room()}" if again and any(sign in str(error) for sign in _DISK_HAS_NO_ROOM) else ""
        return Failure(sentence=f"{error}{room}", stop=stop, again=again, denied=denied)
    except Exception as error:  # noqa: BLE001 - whatever one scene does to a library, the others go on
        remedy, again = _remedy(error)
        lines = store.redact(str(error)).strip().splitlines()
        kind = type(error).__name__ + (f" ({lines[0]})" if lines else "")
        return Failure(sentence=f"{scene_id}: {doing} failed with {kind}; {remedy}", again=again)


def _remedy(error: Exception) -> tuple[str, bool]:
    """What to do, and whether another try may go better by itself."""
    text = str(error)
    if isinstance(error, MemoryError) or any(sign in text for sign in _TORCH_HAS_NO_MEMORY):
        return (
            "there was not enough memory: take a smaller --window or --batch, or fewer workers for each machine",
            True,
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _make_room(), True
    return "geoseg did not foresee this: please report it, with the scene", isinstance(error, OSError)


def _make_room() -> str:
    return f"the disk is full: make room, also in {tempfile.gettempdir()}"
