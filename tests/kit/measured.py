"""What a program costs: seconds, CPU seconds and peak memory of it and of all that it starts."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_TICK_S = 0.05
_SHARES_S = 1.0  # adding up what is shared costs the kernel a walk through all pages
_LINGER_S = 15.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of a program from its start to its end, that of the processes below it included.

    ``cpu_s`` is the larger of two counts, each of which may miss something: what the system adds up for processes that were
    waited for, which leaves out those that nobody waits for (workers of Ray), and the last that ``/proc`` told of each process,
    20 times a second. ``peak_bytes`` is the largest peak that the system keeps for one of them (VmHWM), or, where that is more, the
    most that they had resident together when looked at, once a second, a page that several share counted once (PSS).
    """

    wall_s: float
    cpu_s: float
    peak_bytes: int


def peak_bytes() -> int:
    """Peak of resident memory of this process (VmHWM)."""
    peak = _memory("self/status").get("VmHWM")
    if peak is None:
        raise OSError("this system does not tell a process's peak memory")
    return peak


def run_measured(command: Sequence[str], *, environment: Mapping[str, str]) -> tuple[str, Cost]:
    """Run a program to its end: its standard output and its cost. Shows its errors and raises CalledProcessError when it fails."""
    before = _cpu_of_ended()
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, env=dict(environment), stdout=out, stderr=errors)
        tree = _Tree(process.pid)
        status = process.wait()
        wall_s = time.perf_counter() - start
        cpu_s, peak = tree.end()
        out.seek(0)
        told = out.read()
        if status:
            errors.seek(0)
            sys.stderr.write(errors.read())
            raise subprocess.CalledProcessError(status, command, told)
    return told, Cost(wall_s=wall_s, cpu_s=max(cpu_s, _cpu_of_ended() - before), peak_bytes=peak)


def _cpu_of_ended() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


class _Tree:
    """A process and those below it, looked at again and again by a thread until ``end``."""

    def __init__(self, root: int) -> None:
        self._ours = {root: True, **dict.fromkeys(processes() - {root}, False)}
        self._cpu_s: dict[int, float] = {}
        self._peak = 0
        self._next_shares = 0.0
        self._root_ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def end(self) -> tuple[float, int]:
        """CPU seconds and peak in bytes, once the processes below have ended too or some seconds have passed."""
        self._root_ended.set()
        self._thread.join()
        return sum(self._cpu_s.values()), self._peak

    def _watch(self) -> None:
        give_up = None
        while True:
            num_living = self._look()
            if self._root_ended.is_set():
                give_up = give_up or time.monotonic() + _LINGER_S
                if not num_living or time.monotonic() > give_up:
                    return
            time.sleep(_TICK_S)

    def _look(self) -> int:
        """Take note of what each of the processes has used; how many of them run."""
        there = processes()
        for pid in self._ours.keys() - there:
            del self._ours[pid]
        living = []
        for pid in filter(self._is_ours, there):
            stat = stat_of(pid)
            if stat is not None:
                self._cpu_s[pid] = (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")
                living += [pid] * (stat[0] != "Z")
            self._peak = max(self._peak, _memory(f"{pid}/status").get("VmHWM", 0))
        if len(living) > 1 and time.monotonic() > self._next_shares:
            self._peak = max(self._peak, sum(_memory(f"{pid}/smaps_rollup").get("Pss", 0) for pid in living))
            self._next_shares = time.monotonic() + _SHARES_S
        return len(living)

    def _is_ours(self, pid: int) -> bool:
        if pid not in self._ours:
            stat = stat_of(pid)
            if stat is None:
                return False
            parent = int(stat[1])
            self._ours[pid] = parent > 0 and self._is_ours(parent)
        return self._ours[pid]


def processes() -> set[int]:
    return {int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()}


def stat_of(pid: int) -> list[str] | None:
    """The fields of ``/proc/PID/stat`` from the state on, None when the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def _memory(file: str) -> dict[str, int]:
    """The bytes that a file below ``/proc`` tells, by name; empty when the process is gone."""
    try:
        lines = Path(f"/proc/{file}").read_text().splitlines()
    except OSError:
        return {}
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")}
