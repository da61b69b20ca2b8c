"""What chips cost to read, and whether they come in time.

    python tests/benchmarks/feeding.py          # needs the S3 server of infra/object-store.sh for the first table

First: bytes that one epoch fetches from an object store at a quarter, half and all of the resolution, against those of the
blocks that its chips touch, each counted once. Then: chips per second that threads read, those that a network takes in a step,
and the share of a training's time that it waits for chips, in one process and with Ray.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import boto3
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.schedule import CLASSES, FULL, LABELS, with_overviews
from kit.object_store import is_installed, running_store

from geoseg.config import check
from geoseg.raster import geotiff, tiff
from geoseg.raster.geotiff import RangeFile
from geoseg.run_training import run_training
from geoseg.train.feed import ChipMaker, feed_from_threads, places_of
from geoseg.train.job import TrainJob
from geoseg.train.log import MetricsLog
from geoseg.train.loop import Group
from geoseg.train.plan import TrainPlan
from geoseg.training import keep_tables_in_threads, prepare, train_share

BUCKET = "feeding"


def job(scenes: str, out: str, stages: list[dict[str, Any]], **more: Any) -> TrainJob:
    """A training on the scenes of Dubai below a folder or prefix."""
    values = {
        "out": out,
        "model": {
            "name": "feeding",
            "variant": {"name": "unet", "depth": 3, "width": 16, "norm": "batch"},
            "resolution_m": 0.6,
            "classes": CLASSES,
        },
        "source": [
            {
                "name": "dubai",
                "scenes": [f"{scenes}/dubai_{number}.tif" for number in (1, 3, 5, 6, 7)],
                "labels": LABELS,
            }
        ],
        "stage": stages,
    }
    return check(TrainJob, values | more, where="feeding.py")


@contextmanager
def counted() -> Iterator[list[int]]:
    """Bytes of scenes and labels fetched within the block, in a list of one."""
    total = [0]
    fetch = RangeFile.fetch

    def counting(self: RangeFile, ranges: Any) -> Any:
        before = self.bytes_fetched
        found = fetch(self, ranges)
        total[0] += self.bytes_fetched - before
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RangeFile, "fetch", counting)
        yield total


@contextmanager
def touched() -> Iterator[dict[tuple[int, int], int]]:
    """Bytes of each block that was asked for within the block, by where it lies."""
    blocks: dict[tuple[int, int], int] = {}
    ranges = tiff.BlockIndex.ranges

    def noting(self: tiff.BlockIndex, plane: int, places: Any) -> Any:
        found = ranges(self, plane, places)
        blocks.update({(id(self), start): end - start for start, end in found})
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiff.BlockIndex, "ranges", noting)
        yield blocks


def epoch(plan: TrainPlan, number: int, *, threads: int) -> tuple[int, float]:
    """Read all chips of a stage; how many, and the seconds."""
    maker = ChipMaker(plan)
    places = [place for one in places_of(plan.stages[number], number, step=0, rank=0, world=1) for place in one]
    started = time.perf_counter()
    with ThreadPoolExecutor(threads) as readers:
        chips = list(readers.map(lambda place: maker.make(place).failure, places))
    assert not any(chips)
    return len(places), time.perf_counter() - started


def bytes_of_an_epoch(scenes: Path, folder: Path) -> None:
    """Print the first table."""
    with running_store(folder / "store") as store, pytest.MonkeyPatch.context() as patch:
        for name, value in store.environment().items():
            patch.setenv(name, value)
        client = boto3.Session().client("s3")
        client.create_bucket(Bucket=BUCKET)
        for path in scenes.glob("*.tif"):
            client.upload_file(str(path), BUCKET, f"scenes/{path.name}")
        print("pixel m  chips  MB fetched  MB of blocks under them  fetched/needed  of full resolution")
        whole = None
        for resolution_m in (0.6, 1.2, 2.4):
            stage = {
                **FULL,
                "chip": 128,
                "batch": 4,
                "resolution_m": resolution_m,
                "epochs": 1.0,
                "warmup_steps": 0,
            }
            plan = prepare(
                job(f"s3://{BUCKET}/scenes", f"s3://{BUCKET}/{resolution_m}", [stage]),
                keep_tables=keep_tables_in_threads,
            ).plan
            plain = replace(plan.stages[0], augment=plan.stages[0].augment.model_copy(update={"scale": (1.0, 1.0)}))
            geotiff._DECODED = geotiff._DecodedBlocks(0)  # what counting the index has decoded is forgotten
            with counted() as fetched, touched() as blocks:
                num, _ = epoch(replace(plan, stages=(plain,)), 0, threads=2)
            need = sum(blocks.values())
            whole = whole or fetched[0]
            print(
                f"{resolution_m:7.1f} {num:6} {fetched[0] / 1e6:11.1f} {need / 1e6:24.1f} {fetched[0] / need:15.2f} "
                f"{fetched[0] / whole:19.3f}",
                flush=True,
            )


def in_time(scenes: Path, folder: Path, *, steps: int) -> None:
    """Print the second table."""
    torch.set_num_threads(1)
    rows = [
        ("2.4 m, 64 px", {"resolution_m": 2.4, "chip": 64, "batch": 16}),
        ("0.6 m, 256 px", {"chip": 256, "batch": 4}),
    ]
    print("stage          read by 1 thread  network takes  waits: threads   Ray")
    for place, (name, change) in enumerate(rows):
        stage = {**FULL, **change, "steps": steps}
        trained = job(str(scenes), str(folder / f"t{place}"), [stage])
        prepared = prepare(trained, keep_tables=keep_tables_in_threads)
        num, seconds = epoch(prepared.plan, 0, threads=1)
        train_share(prepared, partial(feed_from_threads, threads=1), lambda *_: None, group=Group(), device="cpu")
        waits, takes = waited(str(folder / f"t{place}"), prepared.plan)
        out = str(folder / f"r{place}")
        run_training(job(str(scenes), out, [stage], cluster={"engine": "ray"}), warn=lambda _: None, quiet=True)
        by_ray, _ = waited(out, prepared.plan)
        print(f"{name:14} {num / seconds:10.1f} chips/s {takes:6.1f} chips/s {waits:14.1%} {by_ray:6.1%}", flush=True)


def waited(out: str, plan: TrainPlan) -> tuple[float, float]:
    """The share of time that a training waited for chips, and the chips per second that its network took; not the first step."""
    records = [one for one in MetricsLog.load(out, up_to=(99, 10**9)).records if one["kind"] == "train"]
    seconds = records[-1]["seconds"] - records[0]["seconds"]
    waits = sum(record["waited_s"] for record in records[1:])
    return waits / seconds, (len(records) - 1) * plan.stages[0].batch / (seconds - waits)


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40, help="of each training of the second table")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "scenes").mkdir()
        scenes = with_overviews(folder / "scenes")
        if is_installed():
            bytes_of_an_epoch(scenes, folder)
        else:
            print("no S3 server here (infra/object-store.sh install), so no bytes of an epoch")
        in_time(scenes, folder, steps=arguments.steps)


if __name__ == "__main__":
    main()
