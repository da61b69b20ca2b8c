"""A run that dies at any step of its protocol leaves nothing half to be seen, and the next one ends with the same objects."""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import boto3
import pytest
from kit import crash
from kit.oracle import seeded_bundle
from kit.scenes import noise, write_scene
from kit.watcher import results, watching

pytestmark = pytest.mark.bucket

SMALL, LARGE, AGAIN, CATALOGUE = "small", "large", "again", "catalogue"
PIECE_BYTES = 5 << 20  # the least that a bucket takes
# Where a run dies: what it does, and the step. Of the small job each scene has two windows with two layers each.
POINTS = (
    (SMALL, "before put lease:1"),
    (SMALL, "after put lease:1"),
    (SMALL, "after put bundle:1"),
    (SMALL, "before put part:1"),
    (SMALL, "after put part:3"),
    (SMALL, "before put asset:1"),
    (SMALL, "after put asset:1"),
    (SMALL, "after put asset:3"),
    (SMALL, "before put item:1"),
    (SMALL, "after put item:1"),
    (SMALL, "before put item:3"),
    (SMALL, "before delete part:1"),
    (SMALL, "after delete part:2"),
    (SMALL, "after delete part:12"),
    (SMALL, "before put index:1"),
    (SMALL, "after put index:1"),
    (SMALL, "before put record:1"),
    (SMALL, "after put record:1"),
    (SMALL, "before put page:1"),
    (SMALL, "after put page:1"),
    (SMALL, "before release lease:1"),
    (SMALL, "after release lease:1"),
    (LARGE, "before begin upload:1"),
    (LARGE, "after begin upload:1"),
    (LARGE, "after put marker:1"),
    (LARGE, "before piece:1"),
    (LARGE, "after piece:1"),
    (LARGE, "before complete upload:1"),
    (LARGE, "after complete upload:1"),
    (LARGE, "after delete marker:1"),
    (AGAIN, "after put asset:2"),
    (AGAIN, "before put item:2"),
    (AGAIN, "after put item:2"),
    (CATALOGUE, "after put items:1"),
    (CATALOGUE, "before put collection:1"),
    (CATALOGUE, "after put collection:1"),
)
SAMPLE = ((SMALL, "after put asset:3"), (SMALL, "after put item:1"), (SMALL, "after delete part:2"))


@dataclass(frozen=True, slots=True)
class Place:
    """Scenes and bundles in a folder, outputs in a bucket."""

    folder: Path
    bucket: str

    def out(self, name: str) -> str:
        return f"s3://{self.bucket}/{name.replace(' ', '-').replace(':', '-')}"

    def command(self, work: str, out: str, *, bundle: str = "one") -> list[str]:
        if work == CATALOGUE:
            return ["catalogue", out, "--id", "masks", "--quiet"]
        job = self.folder / f"{hashlib.sha256(f'{work} {out} {bundle}'.encode()).hexdigest()[:16]}.toml"
        scenes = self.folder / (LARGE if work == LARGE else SMALL)
        job.write_text(
            f'scenes = ["{scenes}"]\nout = "{out}"\nbundle = "{self.folder / bundle}"\n'
            '[predict]\nwindow = 512\nprobabilities = true\n[cluster]\nengine = "local"\n'
        )
        return ["nightly", str(job), "--quiet"]

    def run(self, command: list[str], *, at: str = "") -> int | None:
        """Run a command, to its end or to where it is to die; its exit code, or the signal's number with a minus."""
        log = self.folder / "log"
        log.write_bytes(b"")
        told = {crash.CRASH_AT: at} if at else {}
        process = crash.start(command, log, **told, **{crash.PIECE_BYTES: str(PIECE_BYTES)})
        process.join()
        return process.exitcode

    def log(self) -> str:
        return (self.folder / "log").read_text()

    def before(self, work: str, out: str) -> None:
        """What stands already when the work begins."""
        if work in (AGAIN, CATALOGUE):
            assert self.run(self.command(SMALL, out)) == 0, self.log()

    def work(self, work: str, out: str, *, at: str = "") -> int | None:
        return self.run(self.command(work, out, bundle="two" if work == AGAIN else "one"), at=at)

    def uploads(self) -> list[str]:
        """The keys of uploads under way, which no listing of objects shows."""
        told = boto3.Session().client("s3").list_multipart_uploads(Bucket=self.bucket)
        return [one["Key"] for one in told.get("Uploads", [])]


@pytest.fixture
def place(bucket: str, tmp_path: Path) -> Place:
    for number in range(3):
        write_scene(tmp_path / SMALL / f"s{number}.tif", noise(3, 540, 60, seed=number))
    seeded_bundle(tmp_path / "one")
    seeded_bundle(tmp_path / "two", seed=1)
    return Place(tmp_path, bucket)


@dataclass(slots=True)
class Came:
    """What came of dying at points: how many ended with the right objects, what the watchers saw, what was wrong."""

    right: int = 0
    listings: int = 0
    partial: int = 0
    faults: list[str] = field(default_factory=list)


def die_and_go_on(place: Place, points: Sequence[tuple[str, str]]) -> Came:
    """Run to each point, then again to the end, and compare with what stands when nothing dies."""
    calm, came = {work: calm_results(place, work) for work in dict.fromkeys(work for work, _ in points)}, Came()
    for work, at in points:
        out = place.out(f"{work} {at}")
        place.before(work, out)
        with watching(out) as watcher:
            ended = place.work(work, out, at=at)
            faults = [] if ended == -signal.SIGKILL else [f"it ended with {ended}, not at this step: {place.log()}"]
            ended = place.work(work, out)
            faults += [] if ended == 0 else [f"the next run ended with {ended}: {place.log()}"]
        found = results(out)
        if found != calm[work]:
            faults.append(f"other objects than without a crash: {sorted(dict(found.items() ^ calm[work].items()))}")
        faults += watcher.faults
        came.right += not faults
        came.listings += watcher.num_listings
        came.partial += watcher.num_partial
        came.faults += [f"{work}, {at}: {fault}" for fault in faults]
    return came


def calm_results(place: Place, work: str) -> dict[str, str]:
    out = place.out(f"calm-{work}")
    place.before(work, out)
    assert place.work(work, out) == 0, place.log()
    return results(out)


def test_a_run_that_dies_at_a_step_is_gone_on_with(place: Place) -> None:
    came = die_and_go_on(place, SAMPLE)
    assert came.faults == []
    assert came.right == len(SAMPLE)


@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.timeout(1200)
def test_a_run_that_dies_at_any_step_is_gone_on_with(place: Place, figure: Callable[..., None]) -> None:
    write_scene(place.folder / LARGE / "large.tif", noise(3, 1536, 1536), tiled=True)
    came = die_and_go_on(place, POINTS)
    figure(
        "R5",
        "crash points after which the next run left the same objects",
        f"{came.right} of {len(POINTS)}",
        goal="12 of 12",
    )
    figure("R5", "listings while runs died at those points", came.listings)
    figure("R5", "partial scenes seen in them", came.partial, goal="0")
    assert came.faults == []
    nobodys = f"{LARGE}-after-begin-upload-1/"  # its marker was not written yet: a bucket's lifecycle rule aborts it
    assert [key for key in place.uploads() if not key.startswith(nobodys)] == []
