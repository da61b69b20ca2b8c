"""What putting a large mask together costs the process that publishes it, and what others can do for it.

    python tests/benchmarks/publishing.py [--side 16384 ...] [--window 1024] [--workers 2] [--root URI] [--piece-mib 32]

The parts of a made-up mask lie in the store. ``whole``: one process reads them, makes the overviews and streams the file.
``pieces``: ``geoseg.raster.splice`` with its steps dealt to worker processes. Each way runs in a process of its own. Printed
are wall seconds, CPU seconds of that process (the serial share) and of its workers (a second of which is their start), its
peak memory beyond the start, the bytes that it read from and sent to the store, dealt to its workers and had back from them,
and whether both files are the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import pickle
import resource
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from kit.cogs import blobs, grid, profile
from kit.measured import peak_bytes

from geoseg.raster import cog, store
from geoseg.raster.cog import CogAssembler, encode_window, pack_blocks
from geoseg.raster.splice import PartNames, SplicedCog, read_part
from geoseg.raster.upload import Upload
from geoseg.raster.window import Window, WindowSet, plan_windows

MIB = 2**20
_KINDS = 8  # windows that differ
_NOISE = 0.02  # of the pixels, so that a block has some 12 kB, as those of masks of towns have


def make_parts(side: int, names: PartNames) -> int:
    """Store the parts of a mask of ``side`` pixels a side, of a few windows over and over; their bytes."""
    size = names.window
    pixels = blobs(1, size + 64 * _KINDS, size + 64 * _KINDS)
    pixels[np.random.default_rng(0).random(pixels.shape) < _NOISE] = 2
    kinds = [
        encode_window(pixels[:, 64 * kind :, 64 * kind :][:, :size, :size], Window(0, 0, size, size), size)
        for kind in range(_KINDS)
    ]

    def put(place: tuple[int, int]) -> int:
        row, col = place
        moved = [
            (level, one + (row * size >> level) // 512, other + (col * size >> level) // 512, body)
            for level, one, other, body in kinds[(3 * row + col) % _KINDS]
        ]
        data = pack_blocks({"classes": [1, 2, 3]}, moved)
        store.write(names.of_window(*place), data)
        return len(data)

    return sum(store.in_parallel(put, np.ndindex(side // size, side // size)))


def whole(side: int, names: PartNames, uri: str, _deal: Any) -> None:
    """One process."""
    uris = (names.of_window(*place) for place in np.ndindex(side // names.window, side // names.window))
    with CogAssembler(grid(side, side), profile(1)) as assembler:
        for _, blocks in store.in_parallel(read_part, uris):
            assembler.add(blocks)
        assembler.make_overviews(names.window)
        assembler.top_pixels()
        file = assembler.finish()
        file.sums()
        store.write_stream(uri, file.chunks)


def pieces(side: int, names: PartNames, uri: str, deal: Any) -> None:
    """Several."""
    windows = WindowSet()
    for window in plan_windows(side, side, names.window):
        windows.add(window.row_off, window.col_off)
    spliced = SplicedCog(grid(side, side), profile(1), names)
    for _ in spliced.gather(windows, len, deal):
        pass
    spliced.top_pixels()
    file = spliced.finish()
    file.sums()
    file.write(uri, store.join(names.folder, "upload-mask.tif"), deal)


def dealt_to(
    pool: Executor, at_once: int, counted: Counter[str]
) -> Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]:
    """Steps go to the pool; counted is what goes there and comes back."""

    def deal(step: Callable[[Any], Any], jobs: Iterable[Any]) -> Iterator[Any]:
        waiting: deque[Any] = deque()

        def next_result() -> Any:
            result = waiting.popleft().result()
            counted["back"] += len(pickle.dumps(result))
            return result

        for job in jobs:
            counted["dealt"] += len(pickle.dumps(job))
            waiting.append(pool.submit(step, job))
            if len(waiting) >= at_once:
                yield next_result()
        while waiting:
            yield next_result()

    return deal


def count_bytes() -> Counter[str]:
    """Count, from now on, what this process reads from the store and writes there."""
    counted: Counter[str] = Counter()
    reading, fetching, streaming = store.read, store.read_start, store.write_stream
    ranges, writing, sending = store.read_ranges, store.write, Upload.write

    def told(kind: str, data: bytes) -> bytes:
        counted[kind] += len(data)
        return data

    store.read = lambda uri: told("read", reading(uri))  # type: ignore[assignment]
    store.read_start = lambda *args: (told("read", (got := fetching(*args))[0]), got[1])  # type: ignore[assignment]
    store.read_ranges = lambda *args, **how: [told("read", one) for one in ranges(*args, **how)]  # type: ignore[assignment]
    store.write = lambda uri, data, **how: writing(uri, told("written", data), **how)  # type: ignore[assignment]
    store.write_stream = lambda uri, chunks: streaming(uri, lambda: (told("written", one) for one in chunks()))  # type: ignore[assignment]
    Upload.write = lambda self, number, offset, data: sending(self, number, offset, told("written", data))  # type: ignore[method-assign]
    return counted


def cpu_s(whose: int) -> float:
    used = resource.getrusage(whose)
    return used.ru_utime + used.ru_stime


def set_piece_bytes(piece_bytes: int) -> None:
    """Before a worker's first step."""
    cog.PIECE_BYTES = piece_bytes


def one(asked: dict[str, Any]) -> None:
    """Go one way in this process and print what it took, as JSON."""
    set_piece_bytes(asked["piece_bytes"])
    names = PartNames(asked["folder"], "", asked["window"])
    counted = count_bytes()
    way = {"whole": whole, "pieces": pieces}[asked["way"]]
    pool = ProcessPoolExecutor(
        asked["workers"],
        mp_context=multiprocessing.get_context("spawn"),
        initializer=set_piece_bytes,
        initargs=(asked["piece_bytes"],),
    )
    with pool:
        list(pool.map(abs, range(4 * asked["workers"])))  # they stand before the clock runs
        before, cpu = peak_bytes(), cpu_s(resource.RUSAGE_SELF)
        start = time.perf_counter()
        way(asked["side"], names, asked["uri"], dealt_to(pool, 2 * asked["workers"], counted))
        seconds = time.perf_counter() - start
        cpu = cpu_s(resource.RUSAGE_SELF) - cpu
    peak = peak_bytes() - before
    workers = cpu_s(resource.RUSAGE_CHILDREN)
    print(json.dumps({"wall_s": seconds, "cpu_s": cpu, "workers_cpu_s": workers, "peak": peak, **counted}))


def sha256(uri: str) -> str:
    digest, size = hashlib.sha256(), store.head(uri).size
    for start in range(0, size, 8 * MIB):
        digest.update(store.read_ranges(uri, [(start, min(size, start + 8 * MIB))])[0])
    return digest.hexdigest()


def compare(side: int, root: str, asked: argparse.Namespace) -> None:
    """Make the parts, go both ways, print a line for each."""
    names = PartNames(f"{root}/{side}/parts", "", asked.window)
    part_bytes = make_parts(side, names)
    sums = {}
    for way in ("whole", "pieces"):
        uri = f"{root}/{side}/{way}.tif"
        told = {"way": way, "side": side, "window": asked.window, "folder": names.folder, "uri": uri}
        told |= {"workers": asked.workers, "piece_bytes": int(asked.piece_mib * MIB)}
        command = [sys.executable, __file__, "--one", json.dumps(told)]
        took = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        sums[way] = sha256(uri)
        print(
            f"{side:>7} {way:>7} {store.head(uri).size / MIB:>8.1f} {part_bytes / MIB:>9.1f} {took['wall_s']:>7.1f} "
            f"{took['cpu_s']:>9.2f} {took['workers_cpu_s']:>11.2f} {took['peak'] / MIB:>8.0f} "
            f"{took.get('read', 0) / MIB:>8.2f} {took.get('written', 0) / MIB:>8.2f} "
            f"{took.get('dealt', 0) / MIB:>9.2f} {took.get('back', 0) / MIB:>8.2f}",
            flush=True,
        )
    print(f"{side:>7} the files are {'the same' if sums['whole'] == sums['pieces'] else 'DIFFERENT'}", flush=True)


def main() -> None:
    """Compare both ways at each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, nargs="+", default=[16384, 65536, 131072])
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--piece-mib", type=float, default=32)
    parser.add_argument("--root", help="an empty folder or prefix; else a temporary folder")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        one(asked.one)
        return
    columns = (
        "file MiB",
        "parts MiB",
        "wall s",
        "its CPU s",
        "workers CPU",
        "peak MiB",
        "MiB read",
        "MiB sent",
        "MiB dealt",
        "MiB back",
    )
    print(f"{'side':>7} {'way':>7} " + " ".join(f"{name:>{len(name)}}" for name in columns), flush=True)
    with tempfile.TemporaryDirectory(prefix="geoseg-publishing-") as folder:
        root = f"{asked.root}/{uuid.uuid4().hex[:8]}" if asked.root else folder
        for side in asked.side:
            compare(side, root, asked)


if __name__ == "__main__":
    main()
