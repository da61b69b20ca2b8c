"""Sixteen processes begin at once on one output: one works, the rest leave with a sentence; one that stood still notices."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta, tzinfo
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest
from kit import forked
from kit.oracle import seeded_bundle
from kit.scenes import noise, write_scene

from geoseg.cli import main
from geoseg.errors import OutputHeldError
from geoseg.predict import lease as lease_module
from geoseg.predict.lease import Lease
from geoseg.raster import store

pytestmark = [pytest.mark.bucket, pytest.mark.slow, pytest.mark.chaos, pytest.mark.timeout(1800)]

PROCESSES = 16
ROUNDS, SCENES = 5, 16  # enough that one is at work until the slowest has asked
STARTS, BEAT_S = 50, 0.5


def start(job: Path, log: Path, barrier: Any) -> None:
    """Be one of those processes: its output goes to a file, its exit code is geoseg's."""
    with log.open("w") as told:
        os.dup2(told.fileno(), 1)
        os.dup2(told.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    barrier.wait(60)
    main(["nightly", str(job), "--quiet"])


def test_one_of_sixteen_works(bucket: str, tmp_path: Path, figure: Callable[..., None]) -> None:
    bundle = seeded_bundle(tmp_path / "bundle", depth=3, width=16)
    source = write_scene(tmp_path / "scene.tif", noise(3, 1024, 1024), tiled=True)
    codes, left = [], []
    for number in range(ROUNDS):
        folder = tmp_path / str(number)
        folder.mkdir()
        job = folder / "job.toml"
        scenes = [f"{tmp_path}/in/{number}/{scene}.tif" for scene in range(SCENES)]
        for uri in scenes:
            Path(uri).parent.mkdir(parents=True, exist_ok=True)
            Path(uri).hardlink_to(source)
        job.write_text(
            f'scenes = {scenes}\nout = "s3://{bucket}/{number}"\nbundle = "{bundle}"\n[cluster]\nengine = "local"\n'
        )
        barrier = forked.CONTEXT.Barrier(PROCESSES)
        started = [forked.start(start, job, folder / f"{one}.log", barrier, daemon=True) for one in range(PROCESSES)]
        for process in started:
            process.join(300)
        codes.append(sorted(process.exitcode for process in started))
        logs = [(folder / f"{one}.log").read_text() for one in range(PROCESSES)]
        for process, log in zip(started, logs, strict=True):
            if process.exitcode == 5:
                left.append(log)
            else:
                assert log.count("published: ") == SCENES, log
        items = [info for info in store.walk(f"s3://{bucket}/{number}/") if info.uri.endswith("/item.json")]
        assert len(items) == SCENES
    assert codes == [[0] + [5] * (PROCESSES - 1)] * ROUNDS
    assert len(left) == (PROCESSES - 1) * ROUNDS
    assert all("is writing to this output" in log and "Traceback" not in log for log in left)
    figure(
        "R7", "starts of 16 processes with the same whole job of which more than one worked", 0, goal=f"0 of {ROUNDS}"
    )


def _now_with(offset_s: float) -> type[datetime]:
    class Skewed(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
            return datetime.now(tz) + timedelta(seconds=offset_s)

    return Skewed


def contend(orders: Connection, barrier: Any, over: Any, offset_s: float) -> None:
    """Be one of those that want the lease, again and again, with clocks that are wrong by so much.

    Told are: "holds" and the time, as soon as it is had; at the end the times at which it was had for sure, and why it ended. All
    are seconds of this machine's own clock.
    """
    right = lease_module._now
    lease_module._now = lambda: right() + offset_s
    lease_module.datetime = _now_with(offset_s)  # type: ignore[attr-defined]
    for out, together in iter(orders.recv, None):
        if together:
            barrier.wait(120)
        sure: list[float] = []
        told = "let go"
        try:
            with Lease(out, beat_s=BEAT_S) as lease:
                sure.append(right())
                orders.send(("holds", right()))
                while not over.wait(0.01):
                    lease.check()
                    sure.append(right())
        except OutputHeldError as error:
            told = str(error)
        orders.send((told, sure))


@dataclass
class Contenders:
    """Sixteen such processes, and what they told of being sure: (from, to) of each time that one held a lease."""

    barrier: Any
    over: Any
    processes: dict[Connection, Any] = field(default_factory=dict)
    spans: list[tuple[float, float]] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)

    def begin(self, out: str, among: Sequence[Connection], *, together: bool = True) -> None:
        """Let these try."""
        for one in among:
            one.send((out, together))

    def until_decided(self, among: Sequence[Connection]) -> Connection:
        """Wait until all but one of these have left, and return the one that holds the lease."""
        left, holders = list(among), list[Connection]()
        while len(left) > 1 or left[0] not in holders:
            for one in self._heard(left):
                word, what = one.recv()
                if word == "holds":
                    holders.append(one)
                else:
                    self._note(word, what)
                    left.remove(one)
        (holder,) = left
        return holder

    def end(self, holder: Connection) -> str:
        """What a holder says in the end."""
        (one,) = self._heard([holder])
        word, what = one.recv()
        self._note(word, what)
        return str(word)

    def _heard(self, among: Sequence[Connection]) -> list[Any]:
        heard = wait(among, 120)
        assert heard, "nobody said anything for two minutes"
        return heard

    def _note(self, word: str, sure: list[float]) -> None:
        if sure:
            self.spans.append((sure[0], sure[-1]))
        if word != "let go":
            self.refusals.append(word)

    def most_at_once(self) -> int:
        """How many were sure at the same time, at most."""
        edges = sorted([(start, 1) for start, _ in self.spans] + [(end, -1) for _, end in self.spans])
        most = now = 0
        for _, change in edges:
            now += change
            most = max(most, now)
        return most


@contextmanager
def contenders() -> Iterator[Contenders]:
    """Start them; clocks of a third of them are an hour behind, of another third an hour ahead."""
    made = Contenders(forked.CONTEXT.Barrier(PROCESSES), forked.CONTEXT.Event())
    for number in range(PROCESSES):
        ours, theirs = forked.CONTEXT.Pipe()
        offset_s = (number % 3 - 1) * 3600.0
        made.processes[ours] = forked.start(contend, theirs, made.barrier, made.over, offset_s, daemon=True)
    try:
        yield made
    finally:
        for process in made.processes.values():
            process.kill()
            process.join()


def test_one_of_sixteen_holds_the_lease(bucket: str, figure: Callable[..., None]) -> None:
    late: list[float] = []
    with contenders() as all_of_them:
        among = list(all_of_them.processes)
        for number in range(STARTS):
            out = f"s3://{bucket}/{number}"
            all_of_them.over.clear()
            all_of_them.begin(out, among)
            holder = all_of_them.until_decided(among)
            if number % 5 == 0:
                late.append(_stand_still(all_of_them, out, holder))
            else:
                all_of_them.over.set()
                assert all_of_them.end(holder) == "let go"
        assert all_of_them.most_at_once() == 1, sorted(all_of_them.spans)
        assert len(all_of_them.spans) >= STARTS + len(late)
        assert all(
            "is writing to this output" in word or "taken this output over" in word for word in all_of_them.refusals
        )
        figure("R7", f"holders of a lease at once, over {STARTS} starts of {PROCESSES} processes", 1, goal="1")
        figure(
            "R7", "holders that stood still for 3 leases, and were sure of it afterwards", 0, goal=f"0 of {len(late)}"
        )
        figure("R7", "leases until a holder that stands still is replaced, at most", round(max(late), 1))


def _stand_still(all_of_them: Contenders, out: str, holder: Connection) -> float:
    """Stop a holder while the others try, let it go on after three leases; how many leases passed until it was replaced."""
    pid, lease_s = all_of_them.processes[holder].pid, lease_module.MISSED_BEATS * BEAT_S
    others = [one for one in all_of_them.processes if one is not holder]
    os.kill(pid, signal.SIGSTOP)
    try:
        began = lease_module._now()
        all_of_them.begin(out, others, together=False)
        successor = all_of_them.until_decided(others)
        replaced_after = (lease_module._now() - began) / lease_s
        time.sleep(max(0.0, began + 3 * lease_s - lease_module._now()))
    finally:
        os.kill(pid, signal.SIGCONT)
    assert "taken this output over" in all_of_them.end(holder)
    all_of_them.over.set()
    assert all_of_them.end(successor) == "let go"
    return replaced_after


def test_a_holder_that_is_killed_is_replaced(bucket: str, figure: Callable[..., None]) -> None:
    """Beside it at once; from another machine, which cannot see that its process is gone, after three beats."""
    took_s: dict[str, float] = {}
    for where in ("this machine", "another machine"):
        ours, theirs = forked.CONTEXT.Pipe()
        process = forked.start(hold, theirs, f"s3://{bucket}/{where[:4]}", where, daemon=True)
        assert ours.recv() == "holds"
        process.kill()
        process.join()
        began = time.monotonic()
        with Lease(f"s3://{bucket}/{where[:4]}") as lease:
            lease.check()
            took_s[where] = time.monotonic() - began
    assert took_s["another machine"] >= lease_module.MISSED_BEATS * lease_module.BEAT_S
    for where, seconds in took_s.items():
        figure("R7", f"seconds until a holder that is killed is replaced from {where}", round(seconds, 1), goal="<= 20")


def hold(told: Connection, out: str, where: str) -> None:
    """Hold a lease until this process is killed."""
    if where == "another machine":
        lease_module._here = lambda: where
    with Lease(out):
        told.send("holds")
        signal.pause()
