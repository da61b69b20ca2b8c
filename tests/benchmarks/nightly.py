"""A night with little to do costs little: requests, seconds and bytes of a run with 1 % new scenes against the first one's.

    python tests/benchmarks/nightly.py [--scenes 1000] [--side 256] [--predicted 1000]

Scenes of noise lie in the real object store; an untrained bundle of a few kB predicts them in the plain loop, so that next to
nothing but the store's answers is measured. A relay counts every request and byte between geoseg and the store, in both
directions, repeats and signatures included. The night without work and the one without the index are told too.

With fewer ``--predicted`` than scenes the first night is measured on those and its figures are multiplied; the others get
copies of their images, files and items under names of their own before the nights that follow. A fingerprint follows from the
bytes of an image, so those nights find what they would have found.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import boto3
import torch
from kit.counting import CountingRelay, counting_relay
from kit.object_store import ObjectStore
from kit.scenes import noise, tiny_bundle, write_scene

from geoseg.config import load_job
from geoseg.nightly import run_nightly
from geoseg.raster import store

BUCKET = "nightly-benchmark"


def put_scenes(folder: Path, first: int, num: int, side: int) -> None:
    """Upload scenes of other noise each, past the relay."""
    names = range(first, first + num)

    def put(number: int) -> None:
        path = write_scene(folder / f"{number}.tif", noise(3, side, side, seed=number))
        store.write(f"s3://{BUCKET}/in/{number:05}.tif", path.read_bytes())
        path.unlink()

    for _ in store.in_parallel(put, names):
        pass


def put_copies(predicted: int, scenes: int) -> None:
    """Copy predicted scenes, and what was published of them, until there are as many as wanted; past the relay."""
    client = boto3.Session().client("s3")
    published = [info.uri.removeprefix(f"s3://{BUCKET}/") for info in store.walk(f"s3://{BUCKET}/out/")]
    files = defaultdict(list)
    for key in published:
        files[key.split("/")[1]].append(key)

    def copy(number: int) -> None:
        old, new = f"{number % predicted:05}", f"{number:05}"
        for key in (f"in/{old}.tif", *files[old]):
            if key.endswith("/item.json"):
                item = store.read(f"s3://{BUCKET}/{key}").replace(old.encode(), new.encode())
                store.write(f"s3://{BUCKET}/out/{new}/item.json", item)
            else:
                client.copy_object(Bucket=BUCKET, Key=key.replace(old, new), CopySource={"Bucket": BUCKET, "Key": key})

    for _ in store.in_parallel(copy, range(predicted, scenes)):
        pass


def night(bundle: str, relay: CountingRelay) -> tuple[float, float, float, str]:
    """Requests, seconds and MB of one run, and what it says of the scenes."""
    job = load_job(
        None,
        {
            "scenes": [f"s3://{BUCKET}/in/"],
            "out": f"s3://{BUCKET}/out",
            "bundle": bundle,
            "cluster": {"engine": "local", "read_threads": 4},
        },
    )
    before, start = relay.counts(), time.perf_counter()
    report = run_nightly(job, quiet=True)
    seconds, passed = time.perf_counter() - start, relay.counts() - before
    assert report.exit_code == 0, report.summary()
    return passed.requests, seconds, passed.num_bytes / 1e6, report.summary().splitlines()[0]


def main() -> None:
    """Run the nights and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--predicted", type=int, help="of these scenes, those of the first night")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    predicted = options.predicted or options.scenes
    one_percent = max(1, options.scenes // 100)
    with tempfile.TemporaryDirectory(prefix="geoseg-bench-") as name:
        folder = Path(name)
        server = ObjectStore.on_free_ports(folder / "store")
        try:
            server.start()
            os.environ |= server.environment()
            server.make_bucket(BUCKET)
            bundle = tiny_bundle(folder / "bundle")
            put_scenes(folder, 0, predicted, options.side)
            with counting_relay(server.endpoint) as relay:
                through = {"AWS_ENDPOINT_URL": relay.endpoint}
                print(f"{'night':<24} {'requests':>9} {'seconds':>9} {'MB':>9}   share of the first")
                first: tuple[float, ...] = ()
                for title in ("first, all new", "1 % new", "nothing new", "nothing new, no index"):
                    os.environ |= server.environment()
                    if title == "1 % new":
                        put_scenes(folder, options.scenes, one_percent, options.side)
                    elif title.endswith("no index"):
                        store.delete([f"s3://{BUCKET}/out/_geoseg/index.json.gz"])
                    os.environ |= through
                    *figures, told = night(bundle, relay)
                    if not first:
                        first = tuple(figure * options.scenes / predicted for figure in figures)
                        os.environ |= server.environment()
                        put_copies(predicted, options.scenes)
                        os.environ |= through
                        if predicted < options.scenes:
                            night(bundle, relay)
                    shares = " ".join(f"{100 * one / whole:6.2f} %" for one, whole in zip(figures, first, strict=True))
                    print(
                        f"{title:<24} {figures[0]:>9} {figures[1]:>9.1f} {figures[2]:>9.1f}   {shares}   {told}",
                        flush=True,
                    )
        finally:
            server.wipe()


if __name__ == "__main__":
    main()
