"""Killing by seed: processes below one that the test started, and no other."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from kit.measured import processes, stat_of


def descendants(root: int) -> set[int]:
    """The processes below one, at the moment."""
    parents = {pid: int(told[1]) for pid in processes() if (told := stat_of(pid)) is not None and told[0] != "Z"}
    found, last = {root}, 0
    while len(found) > last:
        last = len(found)
        found |= {pid for pid, parent in parents.items() if parent in found}
    return found - {root}


def title(pid: int) -> str:
    """How a process calls itself, "" when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().partition(b"\0")[0].decode(errors="replace")
    except OSError:
        return ""


def named(root: int, part: str) -> list[int]:
    """The processes below one whose names hold this."""
    return [pid for pid in sorted(descendants(root)) if part in title(pid)]


def is_at_work(name: str) -> bool:
    """Whether this is the name of a process in which Ray runs something of ours; it names its own agents alike."""
    return re.match(r"ray::(?:Map|Read|Publisher|_do)", name) is not None


class Killer:
    """Kills one worker below ``root`` after the other, chosen by ``seed``; ``killed`` has their names.

    ``progress`` counts what is done; between two kills it grows, by ``steps[0]`` to ``steps[1]``: kills by the clock
    would leave a busy machine no time to start workers again.
    """

    def __init__(self, root: int, *, seed: int, progress: Callable[[], int], steps: tuple[int, int]) -> None:
        self.killed: list[str] = []
        self._root, self._progress, self._steps = root, progress, steps
        self._chance = random.Random(seed)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="killer", daemon=True)

    def _run(self) -> None:
        due = self._progress() + self._chance.randint(*self._steps)
        while not self._stop.wait(0.05):
            if self._progress() >= due and self._kill_one():
                due = self._progress() + self._chance.randint(*self._steps)

    def _kill_one(self) -> bool:
        victims = {pid: name for pid in sorted(descendants(self._root)) if is_at_work(name := title(pid))}
        if not victims:
            return False
        pid = self._chance.choice(list(victims))
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return False
        self.killed.append(victims[pid])
        return True


@contextlib.contextmanager
def killing(root: int, *, seed: int, progress: Callable[[], int], steps: tuple[int, int]) -> Iterator[Killer]:
    """Kill workers below a process for the length of the block."""
    killer = Killer(root, seed=seed, progress=progress, steps=steps)
    killer._thread.start()
    try:
        yield killer
    finally:
        killer._stop.set()
        killer._thread.join()


def kill_group(group: int, *, wait_s: float = 60) -> None:
    """Kill a process group, and wait until all that stood below its leader is gone too; what is left then is killed."""
    below = descendants(group)
    os.killpg(group, signal.SIGKILL)
    give_up = time.monotonic() + wait_s
    while (left := {pid for pid in below if (told := stat_of(pid)) is not None and told[0] != "Z"}) and (
        time.monotonic() < give_up
    ):
        time.sleep(0.05)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    if left:
        raise TimeoutError(f"{len(left)} processes outlived their driver by {wait_s} s")
