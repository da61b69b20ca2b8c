"""Flat: what a run costs does not grow with the side of a scene, the number of scenes or the number of windows.

    python tests/benchmarks/flat.py size [SIDE ...]                      # 4096 to 131072 pixels a side, a sparse one of 400,000
    python tests/benchmarks/flat.py scenes [NUM ...] [--engine ray]      # 10 to 10,000 scenes of 64 x 64 pixels
    python tests/benchmarks/flat.py windows [NUM ...]                    # a scene of 10,000 to 10 million windows, the driver alone

Each row is a process of its own, with a tiny network. ``size``: the rate, and the peak of resident memory beyond what Python, torch
and the libraries take before the first window. ``scenes``: milliseconds a scene takes in all, and the same peak of the process
that drives (with Ray the workers are others). ``windows``: another process lists the windows of a GeoTIFF of that size and tells
of each as a worker does that answers at once; printed are CPU seconds and memory that this takes of the driver, which unpacks
the rows and keeps the ledger. What Ray itself takes to bring the rows is in ``scaling.py``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from kit.measured import peak_bytes

MIB = 2**20
SPARSE = 400_000
SIDES = [4096, 16384, 65536, 131072, SPARSE]
SCENES = [10, 100, 1000, 10_000]
WINDOWS = [10_000, 1_000_000, 10_000_000]


def warm_up() -> int:
    """Load what a run loads; the peak of memory then."""
    import torch

    import geoseg.run  # noqa: F401

    torch.nn.Conv2d(3, 3, 3)(torch.rand(1, 3, 64, 64))
    return peak_bytes()


def size(side: int, folder: Path) -> dict[str, Any]:
    """Predict one scene in this process; what it took."""
    import rasterio
    from kit.big import write_repeated, write_sparse
    from kit.oracle import seeded_bundle

    from geoseg.config import load_job
    from geoseg.raster.synthetic import synthetic_image
    from geoseg.run import run_job

    block = synthetic_image(512, 512, seed=1, nodata_fraction=0).pixels_bhw
    bundle = seeded_bundle(folder / "bundle", depth=1, width=2)
    if side == SPARSE:
        places = [(row, col) for row in (0, 300, 780) for col in (1, 2, 400, 780)]
        scene = write_sparse(folder / "sparse.tif", block, side, places)
    else:
        scene = write_repeated(folder / "dense.tif", block, side)
    before, start = warm_up(), time.perf_counter()
    values = {"scenes": [str(scene)], "out": str(folder / "out"), "bundle": str(bundle), "cluster": {"engine": "local"}}
    report = run_job(load_job(None, {**values, "predict": {"window": 1024}}), quiet=not sys.stderr.isatty())
    seconds = time.perf_counter() - start
    assert report.exit_code == 0, report.scenes
    mask = report.scenes[0].mask
    with rasterio.open(mask) as dataset:
        assert dataset.shape == (side, side)
    mpx = report.pixels / 1e6
    return {
        "peak MiB": (peak_bytes() - before) // MIB,
        "before": before // MIB,
        "Mpx": round(mpx),
        "seconds": round(seconds, 1),
        "Mpx/s": round(mpx / seconds, 1),
        "mask MB": round(Path(mask).stat().st_size / 1e6, 1),
    }


def scenes(num: int, folder: Path, engine: str) -> dict[str, Any]:
    """Predict many tiny scenes, driven by this process; what it took."""
    from kit.oracle import seeded_bundle, write_scene

    from geoseg.config import load_job
    from geoseg.raster.synthetic import synthetic_image
    from geoseg.run import run_job

    made = write_scene(folder / "made.tif", synthetic_image(64, 64, seed=1, nodata_fraction=0).pixels_bhw).read_bytes()
    (folder / "in").mkdir()
    for number in range(num):
        (folder / "in" / f"{number:05}.tif").write_bytes(made)
    bundle = seeded_bundle(folder / "bundle", depth=1, width=2)
    values = {"scenes": [str(folder / "in")], "out": str(folder / "out"), "bundle": str(bundle)}
    before = warm_up()
    start, cpu = time.perf_counter(), time.process_time()
    report = run_job(load_job(None, {**values, "cluster": {"engine": engine}}), quiet=True)
    seconds = time.perf_counter() - start - report.startup_s
    cpu = time.process_time() - cpu
    assert report.exit_code == 0, report.scenes
    return {
        "peak MiB": (peak_bytes() - before) // MIB,
        "start-up s": round(report.startup_s, 1),
        "seconds": round(seconds, 1),
        "ms/scene": round(1000 * seconds / num, 1),
        "CPU ms/scene here": round(1000 * cpu / num, 1),
    }


def windows(num: int, folder: Path) -> dict[str, Any]:
    """Keep the ledger of one scene of about ``num`` windows that another process tells of; what it took."""
    from geoseg.cluster.driver import Driver
    from geoseg.cluster.rows import unpack
    from geoseg.predict.ledger import Ledger
    from geoseg.predict.progress import Progress

    ours, theirs = multiprocessing.Pipe(duplex=False)
    teller = multiprocessing.get_context("spawn").Process(target=tell, args=(num, folder, theirs))
    teller.start()
    theirs.close()
    progress = Progress(1, quiet=True)
    driver = Driver.__new__(Driver)  # one that no cluster stands behind
    driver.ledger = Ledger(progress)
    first = ours.recv_bytes()
    before, cpu, complete, received, num_bytes = peak_bytes(), time.process_time(), [], 0.0, 0
    start = time.perf_counter()
    while first:
        complete += driver._take(unpack(first))
        num_bytes += len(first)
        waited = time.process_time()
        first = ours.recv_bytes()
        received += time.process_time() - waited
    cpu = time.process_time() - cpu - received
    teller.join()
    assert len(complete) == 1
    return {
        "windows": progress.windows_done,
        "peak MiB": (peak_bytes() - before) // MIB,
        "CPU s": round(cpu, 1),
        "us/window": round(cpu / progress.windows_done * 1e6, 1),
        "bytes/window": round(num_bytes / progress.windows_done),
        "seconds, listing too": round(time.perf_counter() - start, 1),
        **json.loads(ours.recv_bytes()),
    }


def tell(num: int, folder: Path, pipe: Connection) -> None:
    """List the windows of a scene in shares, and tell of each as a device actor on a GPU would."""
    from kit.big import write_repeated
    from kit.scenes import tiny_bundle

    from geoseg.cluster.rows import Opened, Outcome, Share, Sizes, ended, list_scene_windows, pack, unpack
    from geoseg.config import load_job
    from geoseg.predict.ledger import prepare_scene
    from geoseg.predict.plan import ScenePlan
    from geoseg.predict.reading import Task, WindowDone
    from geoseg.predict.turns import Turn
    from geoseg.raster.scene import SceneRef
    from geoseg.raster.synthetic import synthetic_image
    from geoseg.run import make_run_spec

    side = 512 * round(num**0.5)
    scene = write_repeated(folder / "dense.tif", synthetic_image(512, 512, seed=1, nodata_fraction=0).pixels_bhw, side)
    bundle = tiny_bundle(folder / "bundle")
    job = load_job(
        None, {"scenes": [str(scene)], "out": str(folder / "out"), "bundle": bundle, "predict": {"window": 512}}
    )
    run, ref = make_run_spec(job), SceneRef("dense", str(scene))
    plan = prepare_scene(ref, run)
    assert isinstance(plan, ScenePlan)
    sizes = Sizes(least=32, most=512, workers=8)

    def outcomes(share: Share) -> Iterator[Outcome]:
        if share.opened:
            yield Outcome(1.0, share.opened)
        tasks: Iterator[Task] = iter(share.tasks())
        while some := list(islice(tasks, sizes.least)):
            done = [WindowDone(task=task, valid_pixels=512 * 512, bytes_fetched=12345) for task in some]
            yield Outcome(1.0, windows=tuple(ended(one.task, one) for one in done))

    def packed(table: Any) -> bytes:
        body: bytes = table["packed"][0].as_py()
        return body

    listing = 0.0
    tables = list_scene_windows(pack(Opened(Turn(ref), plan.to_json())), run, sizes=sizes, only_todo=False)
    while True:
        start = time.process_time()
        table = next(tables, None)
        listing += time.process_time() - start
        if table is None:
            break
        for outcome in outcomes(unpack(packed(table))):
            pipe.send_bytes(packed(pack(outcome)))
    pipe.send_bytes(b"")
    pipe.send_bytes(json.dumps({"listing CPU s": round(listing, 1), "its peak MiB": peak_bytes() // MIB}).encode())


def main() -> None:
    """Run each row in its own process and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["size", "scenes", "windows"])
    parser.add_argument("numbers", nargs="*", type=int)
    parser.add_argument("--engine", choices=["local", "ray"], default="local", help="of scenes")
    parser.add_argument("--in-folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.in_folder:
        folder, (number,) = Path(options.in_folder), options.numbers
        if options.what == "scenes":
            told = scenes(number, folder, options.engine)
        else:
            told = size(number, folder) if options.what == "size" else windows(number, folder)
        print(json.dumps(told))
        return
    heads: list[str] = []
    for number in options.numbers or {"size": SIDES, "scenes": SCENES, "windows": WINDOWS}[options.what]:
        with tempfile.TemporaryDirectory(prefix="geoseg-flat-") as name:
            command = [
                sys.executable,
                __file__,
                options.what,
                str(number),
                "--engine",
                options.engine,
                "--in-folder",
                name,
            ]
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        told = json.loads(out.splitlines()[-1])
        if not heads:
            heads = list(told)
            print("  ".join([f"{options.what:>10}", *heads]), flush=True)
        print("  ".join([f"{number:>10}", *(f"{told[head]:>{len(head)}}" for head in heads)]), flush=True)


if __name__ == "__main__":
    main()
