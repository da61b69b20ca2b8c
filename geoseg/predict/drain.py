"""SIGINT and SIGTERM in, a run that ends in good order out: what is at work is finished, what is complete is published."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

from typing_extensions import Self

DRAIN_S = 30.0  # a spot notice gives 120 s, Kubernetes 30 s unless told otherwise
_TOLD = b"\ngeoseg: ending; windows at work are finished, complete scenes published; a second signal ends at once\n"


class Drain:
    """Within the block the first SIGINT or SIGTERM is noted in ``asked``; a second one raises KeyboardInterrupt.

    So does the end of ``most_s`` seconds after the first, and then ``is_late``. Signals reach the main thread alone, so in
    others nothing changes; a signal that is ignored stays so.
    """

    def __init__(self, *, most_s: float = DRAIN_S) -> None:
        self.asked = self.is_late = False
        self._before: dict[int, Any] = {}
        self._first = signal.SIGINT
        self._timer = threading.Timer(most_s, self._out_of_time)
        self._timer.daemon = True

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
            self._before = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}
            self.listen()
        return self

    def listen(self) -> None:
        """Take the signals; again where a library has taken them since, as Ray does when it starts."""
        for number in self._before:
            signal.signal(number, self._on_signal)

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.asked:
            raise KeyboardInterrupt
        self.asked, self._first = True, signal.Signals(number)
        os.write(2, _TOLD)  # printing is not safe here
        self._timer.start()

    def _out_of_time(self) -> None:
        self.is_late = True
        os.kill(os.getpid(), self._first)
