"""One line that tells how far a run is: kept in place on a terminal, said every few seconds in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

_LOG_EVERY_S = 5.0
_SHOW_EVERY_S = 0.2


class StatusLine:
    """Where the line goes (stderr unless told otherwise; nowhere when ``quiet``) and when it is time for it."""

    def __init__(self, *, stream: TextIO | None = None, quiet: bool = False) -> None:
        self._stream = stream or sys.stderr
        self._quiet = quiet
        self._live = not quiet and self._stream.isatty()
        self._shown = time.perf_counter()
        self._width = 0

    def show(self, line: Callable[[], str], *, last: bool = False) -> None:
        """Show the line if it is time to; the ``last`` one always."""
        now = time.perf_counter()
        every = _SHOW_EVERY_S if self._live else _LOG_EVERY_S
        if self._quiet or (not last and now - self._shown < every):
            return
        self._shown = now
        text = line()
        if self._live:
            self._stream.write("\r" + text.ljust(self._width) + ("\n" if last else ""))
            self._width = len(text)
        else:
            self._stream.write(text + "\n")
        self._stream.flush()


def duration(seconds: float) -> str:
    """A time to wait, to two digits or so."""
    seconds = max(0, round(seconds))
    if seconds < 90:
        return f"{seconds} s"
    if seconds < 5400:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h"
