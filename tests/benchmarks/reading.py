"""Reading: bytes and requests that a whole scene costs, and how fast its windows come, against decoding from memory.

    python tests/benchmarks/reading.py [--side 8192] [--rounds 3] [--layouts deflate-512 ...]    # needs infra/object-store.sh

Scenes lie in an S3 server on this machine, behind a relay that counts requests. Their windows are read in the plan's order, with
the margin of the shipped bundle, by the threads that a worker reads ahead with; no network runs. ``fetched`` is the bytes that
came by the bytes needed, which are the file's without its overviews; ``requests`` are all that planning and reading send;
``ratio`` is the rate by that of rasterio, which decodes each block once from memory with as many threads, and ``CPU`` the same of
CPU time in this process: where the server has no cores of its own, the first is mostly its work. A second table reads the same
scenes through Ray: the plain loop and two workers that are handed windows side by side, with a network of a few channels.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from rasterio.io import MemoryFile
from rasterio.shutil import copy

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.feeding import counted
from kit.counting import CountingRelay, counting_relay
from kit.object_store import ObjectStore, is_installed
from kit.oracle import AFFINE, UTM, seeded_bundle

from geoseg.config import load_job
from geoseg.predict.ledger import PlannedWindows, prepare_windows
from geoseg.predict.plan import RunSpec
from geoseg.predict.reading import Task, WindowPixels, WindowReader
from geoseg.raster import geotiff, store
from geoseg.raster.geotiff import GeoTiff
from geoseg.raster.scene import SceneRef
from geoseg.raster.synthetic import synthetic_image
from geoseg.run import make_run_spec, run_job

BUCKET = "reading"
_PIECE = 2048
_TILED = {"tiled": True, "interleave": "pixel"}
LAYOUTS: dict[str, dict[str, Any]] = {
    f"{compress}-{form}": {"compress": compress, **profile}
    for compress in ("deflate", "zstd", "jpeg", "none")
    for form, profile in (
        ("256", {**_TILED, "blockxsize": 256, "blockysize": 256}),
        ("512", {**_TILED, "blockxsize": 512, "blockysize": 512}),
        ("strips", {"tiled": False, "interleave": "pixel", "blockysize": 16}),
    )
} | {"deflate-cog": {"compress": "deflate", "cog": True}, "jpeg-cog": {"compress": "jpeg", "cog": True}}


def make_scene(path: Path, side: int, layout: str) -> Path:
    """Write a scene of generated ground, the same 2048 x 2048 pixels again and again."""
    pixels = synthetic_image(_PIECE, _PIECE, seed=1, nodata_fraction=0).pixels_bhw
    profile = dict(LAYOUTS[layout])
    cog = profile.pop("cog", False)
    settings = {"driver": "GTiff", "width": side, "height": side, "count": 3, "dtype": "uint8", "crs": UTM}
    if profile["compress"] in ("deflate", "zstd"):
        profile["predictor"] = 2
    if profile["compress"] == "jpeg":
        profile["photometric"] = "ycbcr"
    first = path.with_suffix(".plain.tif") if cog else path
    with rasterio.open(
        first, "w", **settings, transform=AFFINE, **({**_TILED, "compress": "none"} if cog else profile)
    ) as dataset:
        for row in range(0, side, _PIECE):
            # Rolled by another number of rows each, so that no codec meets the same bytes twice.
            pieces = [np.roll(pixels, 397 * (row + col) // _PIECE, axis=1) for col in range(0, side, _PIECE)]
            strip = np.concatenate(pieces, axis=2)[:, : side - row, :side]
            dataset.write(strip, window=rasterio.windows.Window(0, row, side, strip.shape[1]))
    if cog:
        options = {"predictor": "yes"} if profile["compress"] == "deflate" else {}
        copy(first, path, driver="COG", compress=profile["compress"], blocksize=512, **options)
        first.unlink()
    return path


def needed_bytes(uri: str) -> int:
    """Bytes of a file without the blocks of its overviews."""
    info = store.head(uri)
    found = GeoTiff(uri, size=info.size, etag=info.etag)
    return info.size - sum(int(found.index(level).counts.sum()) for level in range(1, len(found.levels())))


def run_of(uri: str, out: str, window: int) -> RunSpec:
    """A run of the shipped bundle."""
    return make_run_spec(load_job(None, {"scenes": [uri], "out": out, "predict": {"window": window}}))


@contextmanager
def nothing_known() -> Iterator[None]:
    """Within the block no block and no header is known from before, nor is there the room that was made for one."""
    geotiff._known.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(geotiff, "_DECODED", geotiff._DecodedBlocks(geotiff._CACHE_BYTES))
        yield


def read_scene(uri: str, run: RunSpec, *, threads: int) -> tuple[int, float, float]:
    """Plan a scene and read all of its windows; the bytes fetched, and the seconds of reading, by the clock and of CPU."""
    with nothing_known(), counted() as fetched, ThreadPoolExecutor(threads) as pool:
        found = prepare_windows(SceneRef("scene", uri), run, only_todo=False)
        assert isinstance(found, PlannedWindows), found
        reader = WindowReader(run)
        waiting: deque[Future[Any]] = deque()
        start, cpu = time.perf_counter(), time.process_time()
        for window in found.each:
            waiting.append(pool.submit(reader.read, Task(found.plan, window)))
            if len(waiting) > threads + 1:
                assert isinstance(waiting.popleft().result(), WindowPixels)
        for last in waiting:
            assert isinstance(last.result(), WindowPixels)
        return fetched[0], time.perf_counter() - start, time.process_time() - cpu


def decode_from_memory(data: bytes, *, threads: int) -> tuple[float, float]:
    """Seconds, by the clock and of CPU, in which rasterio decodes the full image once, in shares of its rows."""

    def share(start: int, end: int) -> None:
        with MemoryFile(data) as memory, memory.open(driver="GTiff") as dataset:
            for row in range(start, end, 1024):
                dataset.read(window=rasterio.windows.Window(0, row, dataset.width, min(1024, end - row)))

    with MemoryFile(data) as memory, memory.open(driver="GTiff") as dataset:
        height = dataset.height
    edges = np.linspace(0, height // 512, threads + 1).astype(int) * 512
    edges[-1] = height
    with ThreadPoolExecutor(threads) as pool:
        start, cpu = time.perf_counter(), time.process_time()
        list(pool.map(share, edges[:-1].tolist(), edges[1:].tolist()))
        return time.perf_counter() - start, time.process_time() - cpu


def plain(
    scenes: dict[str, Path], relay: CountingRelay, server: str, folder: Path, options: argparse.Namespace
) -> None:
    """Print the first table. Requests are counted in a round of their own, since the relay takes its time."""
    print(
        f"{'layout':<15} {'window':>6} {'threads':>7} {'MB':>7} {'fetched':>8} {'requests':>8} {'Mpx/s':>7} "
        f"{'ratio':>6} {'CPU':>5}",
        flush=True,
    )
    mpx = options.side**2 / 1e6
    for layout, path in scenes.items():
        uri, data = f"s3://{BUCKET}/{layout}.tif", path.read_bytes()
        needed = needed_bytes(uri)
        for window in options.windows:
            run = run_of(uri, str(folder / "none"), window)
            for threads in options.threads:
                before = relay.counts().requests
                num_bytes, *_ = read_scene(uri, run, threads=threads)
                requests = relay.counts().requests - before
                rates, ratios, of_cpu = [], [], []
                with pytest.MonkeyPatch.context() as patch:
                    patch.setenv("AWS_ENDPOINT_URL", server)
                    for _ in range(options.rounds):
                        from_memory, least_cpu = decode_from_memory(data, threads=threads)
                        _, seconds, cpu = read_scene(uri, run, threads=threads)
                        rates.append(mpx / seconds)
                        ratios.append(from_memory / seconds)
                        of_cpu.append(least_cpu / cpu)
                print(
                    f"{layout:<15} {window:>6} {threads:>7} {needed / 1e6:>7.1f} {num_bytes / needed:>8.3f} "
                    f"{requests:>8} {statistics.median(rates):>7.1f} {statistics.median(ratios):>6.2f} "
                    f"{statistics.median(of_cpu):>5.2f}",
                    flush=True,
                )


def through_ray(scenes: dict[str, Path], relay: CountingRelay, folder: Path, options: argparse.Namespace) -> None:
    """Print the second table."""
    bundle = str(seeded_bundle(folder / "bundle", depth=4, width=1))
    print(f"{'layout':<15} {'window':>6} {'engine':<14} {'fetched':>8} {'requests':>8}", flush=True)
    for layout in scenes:
        uri = f"s3://{BUCKET}/{layout}.tif"
        needed = needed_bytes(uri)
        for window in options.windows:
            for name, cluster in (
                ("plain loop", {"engine": "local"}),
                *((f"Ray, {num} workers", {"engine": "ray", "workers": num}) for num in options.workers),
            ):
                out = folder / f"out-{layout}-{window}-{name.replace(' ', '')}"
                values = {"scenes": [uri], "out": str(out), "bundle": bundle, "predict": {"window": window}}
                before = relay.counts().requests
                with nothing_known():
                    report = run_job(load_job(None, {**values, "cluster": cluster}), quiet=True)
                assert report.exit_code == 0, report.scenes
                requests = relay.counts().requests - before
                print(
                    f"{layout:<15} {window:>6} {name:<14} {report.bytes_read / needed:>8.3f} {requests:>8}", flush=True
                )


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--windows", nargs="+", type=int, default=[1024, 2048])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--workers", nargs="*", type=int, default=[2], help="of Ray; none leaves the second table out")
    parser.add_argument("--through-ray", nargs="+", choices=LAYOUTS, default=["deflate-256", "deflate-512"])
    options = parser.parse_args()
    if not is_installed():
        raise SystemExit("no S3 server here: infra/object-store.sh install")
    with tempfile.TemporaryDirectory(prefix="geoseg-reading-") as name:
        folder = Path(name)
        wanted = dict.fromkeys([*options.layouts, *(options.through_ray if options.workers else [])])
        scenes = {layout: make_scene(folder / f"{layout}.tif", options.side, layout) for layout in wanted}
        server = ObjectStore.on_free_ports(folder / "store")
        try:
            server.start()
            with counting_relay(server.endpoint) as relay, pytest.MonkeyPatch.context() as patch:
                for variable, value in (server.environment() | {"AWS_ENDPOINT_URL": relay.endpoint}).items():
                    patch.setenv(variable, value)
                server.make_bucket(BUCKET)
                for layout, path in scenes.items():
                    store.write(f"s3://{BUCKET}/{layout}.tif", path.read_bytes())
                plain({layout: scenes[layout] for layout in options.layouts}, relay, server.endpoint, folder, options)
                if options.workers:
                    through_ray({layout: scenes[layout] for layout in options.through_ray}, relay, folder, options)
        finally:
            server.wipe()


if __name__ == "__main__":
    main()
