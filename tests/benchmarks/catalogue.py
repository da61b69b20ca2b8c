"""A catalogue is made in flat memory: seconds, bytes and peak memory for more and more items, and what GDAL needs to open it.

    python tests/benchmarks/catalogue.py [--items 100 1000 10000]

One scene is predicted by an untrained bundle; the others get copies of its files under names and in places of their own, side by
side. Each catalogue is made in a process of its own, whose peak resident memory is told with and without what importing costs.
GDAL then opens the mosaic in a process with all its drivers, reads 512 x 512 pixels in its middle, and the whole at 256 pixels.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from kit.scenes import noise, tiny_bundle, write_scene

from geoseg.config import load_job
from geoseg.run import run_job

_MAKE = """
import sys, time
import stac_geoparquet.arrow
from geoseg.catalogue import make_catalogue
peak = lambda: next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
before, start = peak(), time.perf_counter()
made = make_catalogue(sys.argv[1], quiet=True)
print(f"{made.num_items} items: {time.perf_counter() - start:.1f} s, peak {peak():.0f} MiB, {before:.0f} MiB of it imports; "
      + ", ".join(f"{name} {size / 1e6:.2f} MB" for name, size in made.files))
"""
_OPEN = """
import sys, time, rasterio
from rasterio.windows import Window
peak = lambda: next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
start = time.perf_counter()
with rasterio.open(sys.argv[1]) as dataset:
    opened = time.perf_counter()
    dataset.read(1, window=Window(dataset.width // 2, dataset.height // 2, 512, 512))
    middle = time.perf_counter()
    dataset.read(1, out_shape=(256, 256))
    end = time.perf_counter()
    print(f"  {dataset.driver} {dataset.width} x {dataset.height}: open {opened - start:.2f} s, middle {middle - opened:.2f} s, "
          f"whole {end - middle:.2f} s, {peak():.0f} MiB")
"""


def copies(out: Path, num: int) -> None:
    """Copy the one scene's folder until there are ``num``, in rows of 100, 60 m apart."""
    document = json.loads((out / "0/item.json").read_text())
    properties, (west, south, east, north) = document["properties"], document["bbox"]
    a, b, c, d, e, f = properties["proj:transform"]
    for number in range(1, num):
        row, col = divmod(number, 100)
        folder = out / f"{number}"
        folder.mkdir()
        for file in (out / "0").iterdir():
            if file.name != "item.json":
                os.link(file, folder / file.name)
        document["id"] = f"{number}"
        properties["proj:transform"] = [a, b, c + 60 * col, d, e, f - 60 * row]
        shift = 60 / 111_000
        document["bbox"] = [west + shift * col, south - shift * row, east + shift * col, north - shift * row]
        ring = [[document["bbox"][x], document["bbox"][y]] for x, y in ((0, 1), (2, 1), (2, 3), (0, 3), (0, 1))]
        document["geometry"] = {"type": "Polygon", "coordinates": [ring]}
        (folder / "item.json").write_text(json.dumps(document))


def main() -> None:
    """Print a line for each number of items, and one for each mosaic."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, nargs="+", default=[100, 1000, 10_000])
    everything = {key: value for key, value in os.environ.items() if not key.startswith("GDAL_")}
    for num in parser.parse_args().items:
        with tempfile.TemporaryDirectory(prefix="geoseg-benchmark-") as name:
            folder = Path(name)
            write_scene(folder / "in/0.tif", noise(3, 120, 120))
            bundle = tiny_bundle(folder / "bundle")
            values = {
                "scenes": [f"{folder}/in"],
                "out": f"{folder}/out",
                "bundle": bundle,
                "cluster": {"engine": "local"},
            }
            run_job(load_job(None, values), quiet=True)
            copies(folder / "out", num)
            subprocess.run([sys.executable, "-c", _MAKE, str(folder / "out")], check=True)
            for mosaic in sorted((folder / "out").glob("mosaic-*")):
                subprocess.run([sys.executable, "-c", _OPEN, str(mosaic)], check=True, env=everything)


if __name__ == "__main__":
    main()
