"""Flat memory: peak of a worker for scenes of 4096, 16384 and 65536 pixels a side, and a sparse one of 400,000.

    python tests/benchmarks/memory.py [SIDE ...]

Each scene is predicted in a process of its own with a tiny network. Printed are the peak of resident memory beyond what
Python, torch and the libraries take before the first window, and the rate.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from kit.measured import peak_bytes

MIB = 2**20
SPARSE = 400_000


def one(side: int, folder: Path) -> None:
    """Predict one scene in this process and print what it took, as JSON."""
    import rasterio
    import torch
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
    torch.nn.Conv2d(3, 3, 3)(torch.rand(1, 3, 64, 64))
    before = peak_bytes()
    start = time.perf_counter()
    values = {"scenes": [str(scene)], "out": str(folder / "out"), "bundle": str(bundle), "cluster": {"engine": "local"}}
    report = run_job(load_job(None, {**values, "predict": {"window": 1024}}), quiet=not sys.stderr.isatty())
    seconds = time.perf_counter() - start
    assert report.exit_code == 0, report.scenes
    mask = report.scenes[0].mask
    with rasterio.open(mask) as dataset:
        assert dataset.shape == (side, side)
    told = {"peak": peak_bytes() - before, "before": before, "seconds": seconds, "mask": Path(mask).stat().st_size}
    print(json.dumps({**told, "pixels": report.pixels, "input": scene.stat().st_size}))


def main() -> None:
    """Run each size in its own process and print a table."""
    if sys.argv[1:2] == ["--one"]:
        one(int(sys.argv[2]), Path(sys.argv[3]))
        return
    print(
        f"{'side':>8} {'peak MiB':>9} {'before':>7} {'Mpx':>8} {'seconds':>8} {'Mpx/s':>6} {'mask MB':>8}", flush=True
    )
    for side in [int(text) for text in sys.argv[1:]] or [4096, 16384, 65536, SPARSE]:
        with tempfile.TemporaryDirectory(prefix="geoseg-memory-") as folder:
            command = [sys.executable, __file__, "--one", str(side), folder]
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        told = json.loads(out.splitlines()[-1])
        mpx = told["pixels"] / 1e6
        print(
            f"{side:>8} {told['peak'] / MIB:>9.0f} {told['before'] / MIB:>7.0f} {mpx:>8.0f} {told['seconds']:>8.1f} "
            f"{mpx / told['seconds']:>6.1f} {told['mask'] / 1e6:>8.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
