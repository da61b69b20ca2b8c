"""Runs of geoseg as threads that go on one at a time, from store call to store call, in an order and at times that a seed says.

A ``World`` has a store in memory with the semantics of S3 (conditional writes; an ETag is the MD5 of the bytes) and its own
time. Processes are paused, killed and cut off from answers; a request that is on its way arrives late, or after the death of
who sent it. The code that runs is geoseg's: its functions of the store, its clock, its threads and process ids lead here.
"""

from __future__ import annotations

import hashlib
import math
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest

from geoseg.errors import GeosegError, StoreError
from geoseg.predict import lease
from geoseg.raster import store

ROOT = "memory://model/"
_MOMENT = datetime(2026, 1, 1, tzinfo=timezone.utc)
_T = TypeVar("_T")
_current = threading.local()


class Killed(BaseException):
    """This process is dead; nothing of it may run on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weather:
    """What goes wrong in a world. Probabilities are per store call, times in seconds of the world."""

    latency_s: float = 0.05
    late: float = 0.0
    failed: float = 0.0  # no effect, or an effect without an answer, or an effect that is asked for twice
    paused: float = 0.0
    killed: float = 0.0
    longest_s: float = 60.0  # of what is late or paused

    @classmethod
    def of(cls, chance: random.Random) -> Weather:
        """Draw one."""
        return cls(
            latency_s=chance.choice((0.01, 0.2, 1.5)),
            late=chance.choice((0, 0, 0.02)),
            failed=chance.choice((0, 0, 0.02, 0.1)),
            paused=chance.choice((0, 0.01, 0.04)),
            killed=chance.choice((0, 0, 0.01)),
            longest_s=chance.choice((30, 60, 200)),
        )


@dataclass(slots=True, kw_only=True)
class Stroke:
    """A blow to one process, when ``left`` more of its requests and answers are on their way: it is killed or stands still."""

    process: str
    left: int
    kills: bool = False
    pause_s: float = 0.0


class Bucket:
    """Objects by URI, as S3 keeps them."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}

    def version(self, uri: str) -> store.Version:
        """The version that stands. Raises ObjectMissingError."""
        if uri not in self.objects:
            raise store.ObjectMissingError(f"{uri}: there is no such object")
        return store.Version(f'"{hashlib.md5(self.objects[uri], usedforsecurity=False).hexdigest()}"')

    def head(self, uri: str) -> store.ObjectInfo:
        """As ``store.head``."""
        version = self.version(uri)
        return store.ObjectInfo(uri, len(self.objects[uri]), store.bare(version), _MOMENT, version)

    def read_version(self, uri: str) -> tuple[bytes, store.Version]:
        """As ``store.read_version``."""
        version = self.version(uri)
        return self.objects[uri], version

    def write(
        self, uri: str, data: bytes, *, create: bool = False, replaces: store.Version | None = None, **_: Any
    ) -> store.Version:
        """As ``store.write``."""
        if (create and uri in self.objects) or (replaces and self.version(uri) != replaces):
            raise store.ObjectExistsError(f"{uri}: was changed by somebody else")
        self.objects[uri] = data
        return self.version(uri)

    def write_stream(self, uri: str, chunks: Any) -> None:
        """As ``store.write_stream``."""
        self.objects[uri] = b"".join(chunks)

    def delete(self, uris: Sequence[str]) -> None:
        """As ``store.delete``."""
        for uri in uris:
            self.objects.pop(uri, None)

    def walk(self, uri: str) -> list[store.ObjectInfo]:
        """As ``store.walk``, whole."""
        return [self.head(one) for one in sorted(self.objects) if one.startswith(uri.rstrip("/") + "/")]


@dataclass(eq=False)
class Process:
    """A process of the world: where it runs, how fast its clock goes; ``epoch``: how many runs have had the lease so far."""

    world: World
    name: str
    machine: str
    pid: int
    rate: float = 1.0
    offset_s: float = 0.0
    epoch: int = 0
    paused_until: float = 0.0
    is_dead: bool = False
    lease: lease.Lease | None = None

    def clock(self) -> float:
        """Seconds, as this process counts them."""
        return self.offset_s + self.rate * self.world.now


@dataclass(eq=False)
class Actor:
    """A thread of a process, which goes on when ``is_ready`` or when it is ``until``."""

    process: Process
    until: float = 0.0
    is_ready: Callable[[], bool] = field(default=lambda: False)
    go: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    is_done: bool = False
    result: Any = None
    error: BaseException | None = None

    def at(self) -> float:
        """When it may go on."""
        process = self.process
        if process.is_dead:
            return process.world.now
        return max(process.paused_until, process.world.now if self.is_ready() else self.until)


class World:
    """Where the processes are. ``watch`` sees each store call right after its effect, and may raise what is wrong."""

    def __init__(self, seed: int, weather: Weather, watch: Callable[[World, str, str, Process], None]) -> None:
        self.chance = random.Random(seed)
        self.weather, self._watch = weather, watch
        self._wrong: BaseException | None = None
        self.bucket = Bucket()
        self.now = 0.0
        self.processes: list[Process] = []
        self.trace: list[str] = []
        self.stroke: Stroke | None = None
        self._actors: list[Actor] = []
        self._orphans: list[tuple[float, Process, str, str, Callable[[], Any]]] = []
        self._back = threading.Semaphore(0)

    def process(self, name: str, **settings: Any) -> Process:
        """A new process, on one of two machines, with a clock of its own."""
        chance = self.chance
        made = Process(
            self,
            name,
            machine=chance.choice("mn"),
            pid=len(self.processes) + 2,
            rate=chance.uniform(0.85, 1.2),
            offset_s=chance.choice((-3600.0, 0.0, 3600.0)),
            **settings,
        )
        self.processes.append(made)
        return made

    def start(self, process: Process, does: Callable[[], Any], *, at: float = 0.0) -> Actor:
        """Let a process do something from then on, in a thread."""
        actor = Actor(process, until=max(at, self.now))

        def run() -> None:
            _current.actor = actor
            actor.go.acquire()
            try:
                if not process.is_dead:
                    actor.result = does()
            except Killed:
                pass
            except BaseException as error:  # noqa: BLE001 - it is raised in the thread of the test
                actor.error = error
            actor.is_done = True
            self._back.release()

        threading.Thread(target=run, daemon=True).start()
        self._actors.append(actor)
        return actor

    def run(self) -> None:
        """Go on until everybody is done and nothing is on its way. Raises what a process raised."""
        while self._actors or self._orphans:
            actor = min(self._actors, key=lambda one: (one.at(), self.chance.random()), default=None)
            at = actor.at() if actor else math.inf
            self._orphans.sort(key=lambda one: one[0])
            if self._orphans and self._orphans[0][0] <= at:
                self._arrive(*self._orphans.pop(0))
                continue
            assert actor is not None
            assert at < math.inf, "everybody waits for somebody"
            self.now = max(self.now, at)
            actor.go.release()
            self._back.acquire()
            if actor.is_done:
                self._actors.remove(actor)
                self._wrong = self._wrong or actor.error
            if self._wrong is not None:
                self._end()
                raise self._wrong

    def _look(self, name: str, uri: str, process: Process) -> None:
        try:
            self._watch(self, name, uri, process)
        except AssertionError as error:  # the process that did it would go on with other scenes
            self._wrong = self._wrong or error

    def _end(self) -> None:
        for actor in self._actors:
            actor.process.is_dead = True
            while not actor.is_done:
                actor.go.release()
                self._back.acquire()

    def _arrive(self, at: float, process: Process, name: str, uri: str, effect: Callable[[], Any]) -> None:
        self.now = max(self.now, at)
        try:
            effect()
        except GeosegError:
            return
        self.trace.append(f"{self.now:.2f} {process.name} (dead) {name} {uri.removeprefix(ROOT)}")
        self._look(name, uri, process)

    def wait(self, seconds: float, is_ready: Callable[[], bool] = lambda: False) -> None:
        """Let the others go on for so long, or until it ``is_ready``. Raises Killed when that was the end of this process."""
        actor: Actor = _current.actor
        if actor.process.is_dead:
            raise Killed
        actor.until, actor.is_ready = self.now + seconds, is_ready
        self._back.release()
        actor.go.acquire()
        if actor.process.is_dead:
            raise Killed

    def request(self, name: str, uri: str, effect: Callable[[], _T]) -> _T:
        """A store call: on its way, its effect, its answer on the way, with whatever goes wrong."""
        process: Process = _current.actor.process
        chance, weather = self.chance, self.weather
        fault = chance.choice(("before", "after", "again")) if chance.random() < weather.failed else ""
        for _ in range(2 if fault == "again" else 1):
            self._travel(process, name, uri, effect)
            if fault == "before":
                raise StoreError(f"{uri}: the store did not answer")
            answer, error = self._effect(process, name, uri, effect)
            self._travel(process)
        if fault == "after":
            raise StoreError(f"{uri}: the store's answer was lost")
        if error is not None:
            raise error
        return answer  # type: ignore[return-value]

    def _effect(
        self, process: Process, name: str, uri: str, effect: Callable[[], _T]
    ) -> tuple[_T | None, GeosegError | None]:
        try:
            answer = effect()
        except GeosegError as error:
            self.trace.append(f"{self.now:.2f} {process.name} {name} {uri.removeprefix(ROOT)} {type(error).__name__}")
            return None, error
        self.trace.append(f"{self.now:.2f} {process.name} {name} {uri.removeprefix(ROOT)}")
        self._look(name, uri, process)
        return answer, None

    def _travel(self, process: Process, *request: Any) -> None:
        """The time that a request or an answer takes; its process may be paused or killed meanwhile."""
        chance, weather = self.chance, self.weather
        seconds = chance.expovariate(1 / weather.latency_s)
        if self.stroke is not None and self.stroke.process == process.name:
            self.stroke.left -= 1
            if self.stroke.left == 0:
                process.is_dead = self.stroke.kills
                process.paused_until = self.now + self.stroke.pause_s
                self.trace.append(f"{self.now:.2f} {process.name} struck")
        if chance.random() < weather.late:
            seconds += chance.uniform(0, weather.longest_s)
        if chance.random() < weather.paused:
            process.paused_until = self.now + chance.uniform(0, weather.longest_s)
            self.trace.append(f"{self.now:.2f} {process.name} paused until {process.paused_until:.2f}")
        if chance.random() < weather.killed and not process.is_dead:
            process.is_dead = True
            self.trace.append(f"{self.now:.2f} {process.name} killed")
            if request and chance.random() < 0.5:
                self._orphans.append((self.now + seconds, process, *request))
        self.wait(seconds)

    def is_alive(self, machine: str, pid: int) -> bool:
        """Whether there is such a process."""
        return any(
            one.pid == pid
            and one.machine == machine
            and not one.is_dead
            and any(a.process is one for a in self._actors)
            for one in self.processes
        )


class _Lock:
    def __init__(self) -> None:
        self._is_held = False

    def __enter__(self) -> None:
        if self._is_held:
            _world().wait(math.inf, lambda: not self._is_held)
        self._is_held = True

    def __exit__(self, *_: object) -> None:
        self._is_held = False


class _Event:
    def __init__(self) -> None:
        self._is_set = False

    def set(self) -> None:
        self._is_set = True

    def wait(self, seconds: float) -> bool:
        _sleep(seconds, lambda: self._is_set)
        return self._is_set


class _Thread:
    def __init__(self, *, target: Callable[[], None], name: str, daemon: bool) -> None:
        del name, daemon
        self._target = target

    def start(self) -> None:
        self._actor = _world().start(this_process(), self._target)

    def join(self) -> None:
        _world().wait(math.inf, lambda: self._actor.is_done)


def this_process() -> Process:
    """The process whose thread this is."""
    process: Process = _current.actor.process
    return process


def _world() -> World:
    return this_process().world


def _sleep(seconds: float, is_ready: Callable[[], bool] = lambda: False) -> None:
    _world().wait(seconds / this_process().rate, is_ready)


def _kill(pid: int, signal: int) -> None:
    assert signal == 0
    if not _world().is_alive(this_process().machine, pid):
        raise ProcessLookupError


def lead_here(patch: pytest.MonkeyPatch) -> None:
    """Lead geoseg's store functions, clock, threads and process ids to the world of the thread that calls them.

    Paths, and threads of no world, find what they always did.
    """
    for name in ("head", "read_version", "write", "write_stream", "delete", "walk"):
        patch.setattr(store, name, _led(name, getattr(store, name)))
    patch.setattr(store, "in_parallel", map)
    patch.setattr(lease, "_now", lambda: this_process().clock())
    patch.setattr(lease, "_here", lambda: this_process().machine)
    patch.setattr(lease, "time", SimpleNamespace(sleep=_sleep))
    patch.setattr(lease, "threading", SimpleNamespace(Lock=_Lock, Event=_Event, Thread=_Thread))
    patch.setattr(lease, "os", SimpleNamespace(getpid=lambda: this_process().pid, kill=_kill))


def _led(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
    def called(where: Any, *args: Any, **settings: Any) -> Any:
        uri = where[0] if name == "delete" and where else where
        if not str(uri).startswith(ROOT) or not hasattr(_current, "actor"):
            return real(where, *args, **settings)
        world = _world()
        return world.request(name, uri, lambda: getattr(world.bucket, name)(where, *args, **settings))

    return called


def paths_of(bucket: Bucket, folder: str) -> Iterator[str]:
    """The URIs below a folder."""
    return (uri for uri in sorted(bucket.objects) if uri.startswith(folder + "/"))
