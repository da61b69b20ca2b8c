"""Runs of geoseg that meet in the worlds of ``kit.interleaved``, and what must be true of their output at any time."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import pytest

from geoseg.config import load_job
from geoseg.errors import OutputHeldError, StoreError
from geoseg.predict import ledger as ledger_module
from geoseg.predict import local, publish
from geoseg.predict.bundles import keep_bundle
from geoseg.predict.drain import Drain
from geoseg.predict.failure import Failure
from geoseg.predict.lease import Lease
from geoseg.predict.ledger import Ledger, list_windows, prepare_scene
from geoseg.predict.parts import part_uri
from geoseg.predict.plan import RunSpec, ScenePlan
from geoseg.predict.progress import Progress
from geoseg.predict.reading import Task, WindowDone
from geoseg.predict.turns import Turn
from geoseg.predict.worker import Worker
from geoseg.raster import store
from geoseg.raster.scene import SceneRef
from geoseg.raster.seal import SEAL
from geoseg.run import make_run_spec
from kit.interleaved import ROOT, Actor, Process, Stroke, Weather, World, lead_here, paths_of, this_process
from kit.oracle import seeded_bundle
from kit.scenes import noise, write_scene

OUT = ROOT + "out"
LEASE = OUT + "/_geoseg/lease.json"
_T = TypeVar("_T")


@dataclass
class Given:
    """Scenes, a run with each of three bundles, and the plans, parts and undisturbed worlds of each, made once."""

    refs: list[SceneRef]
    runs: list[RunSpec] = field(default_factory=list)
    plans: dict[tuple[str, str], ScenePlan] = field(default_factory=dict)
    parts: dict[str, bytes] = field(default_factory=dict)
    calm: list[World] = field(default_factory=list)


@contextmanager
def given_runs(folder: Path) -> Iterator[Given]:
    """Make scenes, bundles and parts in a folder; within the block geoseg's functions lead to the worlds of ``kit.interleaved``."""
    for seed, name in enumerate(("a", "b")):
        write_scene(folder / f"{name}.tif", noise(3, 30, 520 if name == "a" else 40, seed=seed))
    made = Given([SceneRef(name, str(folder / f"{name}.tif")) for name in ("a", "b")])
    for seed in range(3):
        bundle = seeded_bundle(folder / f"bundle-{seed}", seed=seed)
        values = {"scenes": [f"{folder}/"], "out": str(folder / f"out-{seed}"), "bundle": str(bundle)}
        run = make_run_spec(load_job(None, {**values, "predict": {"window": 512}}))
        keep_bundle(run)
        _make(made, run)
    with pytest.MonkeyPatch.context() as patch:
        lead_here(patch)
        patch.setattr(ledger_module, "plan_scene", lambda ref, run: made.plans[ref.id, run.bundle_digest])
        patch.setattr(local, "Worker", lambda run, **_: PartsAtHand(run, made))
        patch.setattr(local, "try_to_publish", publish_somewhere)
        patch.setattr(publish, "make_item", _remembered(publish.make_item))
        patch.setattr(ledger_module, "_footprint", _remembered(ledger_module._footprint))
        for run in made.runs:
            made.calm.append(undisturbed(made, run))
        yield made


def _remembered(pure: Callable[..., _T]) -> Callable[..., _T]:
    """The same function, which works an answer out once: those for many worlds are alike."""
    answers: dict[str, _T] = {}

    def called(*args: Any, **settings: Any) -> _T:
        key = repr((args, settings))
        if key not in answers:
            answers[key] = pure(*args, **settings)
        return answers[key]

    return called


def _make(given: Given, run: RunSpec) -> None:
    """Let a real worker make the parts of all scenes, and keep them by the names that they get in the model."""
    there = replace(run, out=OUT)
    worker = Worker(run)
    for ref in given.refs:
        plan = prepare_scene(ref, run)
        assert isinstance(plan, ScenePlan)
        given.plans[ref.id, run.bundle_digest] = plan
        found = list_windows(run, plan, only_todo=False)
        assert not isinstance(found, Failure)
        for done in worker.run(Task(plan, window) for window in found.each):
            assert done.failure is None
            window = done.task.window
            given.parts[part_uri(there, plan, window)] = store.read(part_uri(run, plan, window))
    worker.close()
    given.runs.append(there)


class PartsAtHand:
    """A worker whose network has answered before: it stores the parts that are not there."""

    num_gpus = 0

    def __init__(self, run: RunSpec, given: Given) -> None:
        self._run, self._given = run, given

    def run(self, tasks: Iterator[Task]) -> Iterator[WindowDone]:
        for task in tasks:
            uri = part_uri(self._run, task.plan, task.window)
            try:
                skipped = store.exists(uri)
                if not skipped:
                    store.write(uri, self._given.parts[uri])
            except StoreError as error:
                yield WindowDone(task=task, failure=Failure(sentence=str(error), again=True))
            else:
                yield WindowDone(task=task, skipped=skipped)

    def close(self) -> None:
        """Nothing is open."""


def publish_somewhere(run: RunSpec, plan: ScenePlan) -> Any:
    """Publish in this process, or as on a cluster in one beside it, which is given up and tried again when it does not answer."""
    world, process = _here()
    if not process.name.endswith("+"):
        return publish.try_to_publish(run, plan)
    for _ in range(2):
        beside = world.process(f"{process.name}p", epoch=process.epoch)
        task = world.start(beside, lambda: publish.try_to_publish(run, plan))
        world.wait(world.chance.uniform(5, 100), lambda task=task: task.is_done)  # type: ignore[misc]
        if task.result is not None:
            return task.result
    return Failure(sentence=f"{plan.scene.id}: publishing ended the process it ran in", again=True)


def _here() -> tuple[World, Process]:
    process = this_process()
    return process.world, process


def work(given: Given, run: RunSpec) -> str:
    """A run as ``geoseg predict`` does it, from the lease on; how it ended in a word."""
    world, process = _here()
    book = Ledger(Progress(len(given.refs), quiet=True))
    try:
        with Lease(run.out) as lease:
            process.lease = lease

            def check() -> None:
                lease.check()
                holder = json.loads(world.bucket.objects.get(LEASE, b"{}"))
                assert holder.get("run") == lease.run_id, (
                    f"{process.name} passed a check of a lease that {holder} holds"
                )

            turns = [Turn(ref) for ref in given.refs]
            local.predict_locally(turns, run, book, read_threads=1, check=check, drain=Drain())
    except (OutputHeldError, StoreError) as error:
        return type(error).__name__
    finally:
        process.lease = None
    for report in book.reports:
        if report.status in ("published", "unchanged"):
            assert (report.id, report.item_etag) in committed(world), f"{report} was never there"
    return " ".join(report.status for report in book.reports)


def work_patiently(given: Given, run: RunSpec) -> str:
    """The same, begun anew a few times when another run has the output."""
    world, _ = _here()
    for _ in range(3):
        ended = work(given, run)
        if ended != "OutputHeldError":
            break
        world.wait(world.chance.uniform(0, 30))
    return ended


@dataclass
class Watched:
    """What was seen so far: items that were committed, of which run (by its place in the order of leases), and files."""

    items: dict[str, tuple[int, str]] = field(default_factory=dict)
    ever: set[tuple[str, str]] = field(default_factory=set)
    files: dict[str, bytes] = field(default_factory=dict)
    holder: str = ""
    epoch: int = 0


_WATCHED: dict[World, Watched] = {}


def committed(world: World) -> set[tuple[str, str]]:
    """Scene and ETag of each item that ever stood."""
    return _WATCHED[world].ever


def watch(world: World, name: str, uri: str, process: Process) -> None:
    """Look at the output right after a store call. Raises AssertionError for what must never be seen."""
    seen = _WATCHED.setdefault(world, Watched())
    if name.startswith(("write", "delete")):
        _watch_change(seen, world, name, uri, process)
    believers = [one.name for one in world.processes if one.lease is not None and _believes(one)]
    assert len(believers) <= 1, f"{believers} hold the lease"


def _believes(process: Process) -> bool:
    lease = process.lease
    assert lease is not None
    since = process.clock() - lease._held_since
    return not (process.is_dead or lease._lost or lease._is_over) and since < 2 * lease._beat_s


def _watch_change(seen: Watched, world: World, name: str, uri: str, process: Process) -> None:
    objects = world.bucket.objects
    if uri == LEASE:
        holder = json.loads(objects.get(uri, b"{}")).get("run", "")
        if holder not in ("", seen.holder):
            seen.holder, seen.epoch = holder, seen.epoch + 1
            process.epoch = seen.epoch
        return
    if uri.startswith(OUT + "/_geoseg/"):
        return
    assert name.startswith("write"), f"{process.name} deleted {uri}"
    if not uri.endswith("/item.json"):
        assert seen.files.setdefault(uri, objects[uri]) == objects[uri], f"{process.name} changed {uri}"
        return
    scene_id = uri.split("/")[-2]
    epoch, _ = seen.items.get(uri, (0, ""))
    etag = world.bucket.head(uri).etag
    assert process.epoch >= epoch, f"{process.name}, run {process.epoch}, replaced the item of run {epoch}"
    for asset in json.loads(objects[uri])["assets"].values():
        if "_geoseg" in asset["href"]:
            continue
        body = objects[f"{OUT}/{scene_id}/{asset['href'].removeprefix('./')}"]
        assert len(body) == asset["file:size"]
        assert asset["file:checksum"] == "1220" + hashlib.sha256(body).hexdigest()
    seen.items[uri] = (process.epoch, etag)
    seen.ever.add((scene_id, etag))


def standing(world: World) -> dict[str, bytes]:
    """The items of an output, without their numbers, and the files that they name."""
    found: dict[str, bytes] = {}
    for uri in paths_of(world.bucket, OUT):
        if uri.endswith("/item.json"):
            item = json.loads(world.bucket.objects[uri])
            for of_this_revision in ("geoseg:revision", SEAL):
                item["properties"].pop(of_this_revision)
            found[uri] = json.dumps(item).encode()
            for asset in item["assets"].values():
                name = f"{uri.rpartition('/')[0]}/{asset['href'].removeprefix('./')}"
                if "_geoseg" not in name:
                    found[name] = world.bucket.objects[name]
    return found


def undisturbed(given: Given, run: RunSpec) -> World:
    """A world in which nothing but this run was."""
    world = World(0, Weather(), watch)
    last = world.start(world.process("calm"), lambda: work(given, run))
    world.run()
    assert last.result == "published published"
    return world


def _take_up(world: World, calm: World) -> None:
    """Let a world go on from what stands in another."""
    world.bucket.objects.update(calm.bucket.objects)
    _WATCHED[world] = copy.deepcopy(_WATCHED[calm])


@dataclass
class Told:
    """What came of a world."""

    trace: str
    ends: list[str]
    num_calls: int


def interleave(given: Given, seed: int) -> Told:
    """Two to five runs at about the same time with any bundles, in any weather, and a calm one after them."""
    world = World(seed, Weather(), watch)
    chance = world.chance
    if chance.random() < 0.5:  # something stands already
        _take_up(world, chance.choice(given.calm))
    world.weather = Weather.of(chance)
    together = chance.random() < 0.3
    runs: list[Actor] = []
    for number in range(chance.randint(2, 5)):
        run = chance.choice(given.runs)
        process = world.process(f"run{number}" + chance.choice(("", "+")))
        at = world.now + (0.0 if together else chance.uniform(0, chance.choice((1, 20, 100))))
        runs.append(world.start(process, lambda run=run: work_patiently(given, run), at=at))  # type: ignore[misc]
    _end_well(given, world, f"seed {seed}, {world.weather}")
    return _told(world, runs)


def strike(given: Given, process: str, number: int, then: Sequence[int], *, kills: bool) -> Told | None:
    """A run that is struck at its request or answer of that number, and runs with bundles ``then`` which meanwhile do the work.

    None when it ends before.
    """
    world = World(number, Weather(), watch)
    _take_up(world, given.calm[0])
    world.stroke = Stroke(process=process, left=number, kills=kills, pause_s=0.0 if kills else 500.0)
    runs = [world.start(world.process(process.removesuffix("p")), lambda: work(given, given.runs[2]))]
    for place, run in enumerate(given.runs[one] for one in then):
        at = 20.0 + 60 * place
        runs.append(world.start(world.process(f"other{place}"), lambda run=run: work(given, run), at=at))  # type: ignore[misc]
    stroke = world.stroke
    _end_well(given, world, f"{stroke} at {number}, then {then}")
    return _told(world, runs) if stroke.left <= 0 else None


def _end_well(given: Given, world: World, situation: str) -> None:
    """Let all end, and a calm run after them. Raises AssertionError with what led to a state that may not be."""
    try:
        world.run()
        world.weather, world.stroke = Weather(), None
        wanted = world.chance.randrange(len(given.runs))
        last = world.start(world.process("last"), lambda: work(given, given.runs[wanted]))
        world.run()
        assert set(last.result.split()) <= {"published", "unchanged"}, last.result
        assert standing(world) == standing(given.calm[wanted])
    except BaseException as error:
        told = "\n".join(world.trace[-150:])
        raise AssertionError(f"{situation}: {error}\n{told}") from error
    finally:
        _WATCHED.pop(world, None)


def _told(world: World, runs: Iterable[Actor]) -> Told:
    names = "\n".join(line.partition(" ")[2] for line in world.trace)
    return Told(hashlib.sha256(names.encode()).hexdigest(), [str(one.result) for one in runs], len(world.trace))


def strike_everywhere(given: Given, *, step: int, begin: int = 1) -> list[Told]:
    """Strike a run, and the process beside it that publishes, at every ``step``-th of its requests and answers."""
    told = []
    for process in ("run", "run+", "run+p"):
        for kills in (False, True):
            for then in ((1,), (1, 0), (2,)):
                number = begin
                while (one := strike(given, process, number, then, kills=kills)) is not None:
                    told.append(one)
                    number += step
    return told


def interleave_all(folder: Path, seeds: Iterable[int]) -> list[Told]:
    """What came of the worlds of these seeds."""
    folder.mkdir()
    with given_runs(folder) as given:
        return [interleave(given, seed) for seed in seeds]
