"""What tracing roads costs, and how much it loses: time and memory per megapixel, APLS, and lines burnt back.

    python tests/benchmarks/roads.py cost 4096 16384             # generated city, window by window, against the whole array
    python tests/benchmarks/roads.py width                       # how wide roads of known width come out
    python tests/benchmarks/roads.py real --pictures pictures    # Dubai 2 and validation scenes of Massachusetts
    python tests/benchmarks/roads.py real --set min_spur_m=12    # with other settings

``cost`` draws a city of streets (about 1 % of the pixels are centre lines) as it goes, so that nothing but the roads is held, and
runs each way in a process of its own: ours in windows of 2048 pixels, and scikit-image's ``skeletonize`` on the whole array with
a graph of Python lists and dicts as sknw makes it, which closes no gaps and knows no widths. ``real`` needs the imagery
beside the project (GEOSEG_TEST_DATA) and predicts it with the shipped bundle. There is no vector truth: a graph from the
truth's mask is held against one from the predicted mask (APLS), and the lines of each mask, burnt with their widths, against
that mask itself (IoU and F1 at 3 px).
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import rasterio
import shapely
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from rasterio.features import rasterize
from scipy import ndimage

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kit.data import data_folder
from kit.roads import drawn, traced, windows

from geoseg.raster.grid import Grid
from geoseg.raster.window import Window
from geoseg.vector.apls import RoadGraphGeometry, apls, on_a_plane
from geoseg.vector.roads import RoadEdges, RoadNodes, RoadsConfig, finish_roads, join_roads, reach_of, trace_roads
from geoseg.vector.skeleton import UNKNOWN, Reach, thin_window

ROAD = 2
WINDOW = 2048
_COLUMNS = (
    "scene      km truth    mask |  APLS t in p  p in t | IoU and F1 of: truth burnt | mask burnt | mask against truth"
)
UTM_40N = rasterio.crs.CRS.from_epsg(32640).to_wkt()


def city(window: Window, side: int) -> NDArray[np.uint8]:
    """Streets 9 and 14 pixels wide in two directions, bent a little, with gaps; outside a square scene unknown."""
    row = np.arange(window.row_off, window.row_end, dtype=np.float32)[:, None]
    col = np.arange(window.col_off, window.col_end, dtype=np.float32)[None]
    one = col * 0.966 + row * 0.259 + 40 * np.sin(row / 700)
    other = row * 0.966 - col * 0.259 + 40 * np.sin(col / 900)
    road = (np.abs(one % 190 - 95) < 4.5) | (np.abs(other % 260 - 130) < 7)
    road &= ~((np.abs(one % 1140 - 600) < 6) & (np.abs(other % 520 - 200) < 40))
    mask_hw = np.where(road, np.uint8(1), np.uint8(0))
    mask_hw[((row < 0) | (row >= side)) | ((col < 0) | (col >= side))] = UNKNOWN
    return mask_hw


def ours(side: int) -> dict[str, object]:
    grid = Grid(UTM_40N, (0.6, 0, 300_000, 0, -0.6, 2_800_000), side, side)
    config = RoadsConfig()
    reach = reach_of(grid, config)
    drawing_s = 0.0
    parts = []
    started = time.perf_counter()
    for window in windows((side, side), WINDOW):
        begun = time.perf_counter()
        mask_hw = city(window.grown(reach.halo), side)
        drawing_s += time.perf_counter() - begun
        parts.append(trace_roads(mask_hw, None, window, values=(1,), reach=reach))
    traced_s = time.perf_counter() - started - drawing_s
    graph = join_roads(parts, reach)
    edges, nodes = finish_roads(graph, grid, config, {1: "road"})
    total_s = time.perf_counter() - started - drawing_s
    return {
        "s": total_s,
        "of it windows": traced_s,
        "lines": len(edges.id),
        "nodes": len(nodes.id),
        "km": edges.length_m.sum() / 1e3,
    }


def peer(side: int) -> dict[str, object]:
    from skimage.morphology import skeletonize

    road_hw = np.zeros((side, side), np.bool_)
    for window in windows((side, side), WINDOW):
        road_hw[window.row_off : window.row_end, window.col_off : window.col_end] = city(window, side) == 1
    started = time.perf_counter()
    lines_hw = skeletonize(road_hw)
    thinned_s = time.perf_counter() - started
    pixels = set(map(tuple, np.argwhere(lines_hw).tolist()))
    beside = [(down, across) for down in (-1, 0, 1) for across in (-1, 0, 1) if down or across]
    near = {(r, c): [(r + d, c + a) for d, a in beside if (r + d, c + a) in pixels] for r, c in pixels}
    nodes = {pixel for pixel, others in near.items() if len(others) != 2}
    lines = defaultdict(list)
    for node in nodes:
        for first in near[node]:
            way = [node, first]
            while way[-1] not in nodes:
                way.append(next(one for one in near[way[-1]] if one != way[-2]))
            if way[0] <= way[-1]:
                lines[way[0], way[-1]].append(way)
    total_s = time.perf_counter() - started
    return {"s": total_s, "of it thinning": thinned_s, "lines": sum(map(len, lines.values())), "nodes": len(nodes)}


def cost(sides: list[int]) -> None:
    for side in sides:
        for way in ("ours", "peer"):
            told = json.loads(
                subprocess.run(
                    [sys.executable, __file__, "one", way, str(side)], check=True, capture_output=True, text=True
                ).stdout
            )
            rest = ", ".join(
                f"{key} {value:,.1f}" if isinstance(value, float) else f"{key} {value:,}" for key, value in told.items()
            )
            print(f"{side:6d} px {way}: {1e6 * told['s'] / side**2:.3f} s/Mpx; {rest}", flush=True)


def width() -> None:
    """Bias and spread of twice the distance to the next pixel that is no road, in pixels, for roads of 2 to 16 pixels."""
    rng = np.random.default_rng(1)
    reach = Reach(half_width=15, hole=1)
    told: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(300):
        wide, aligned, (down, across) = rng.uniform(2, 16), bool(rng.random() < 0.5), rng.uniform(0, 1, 2)
        angle = 0 if aligned else np.radians(rng.uniform(0, 45))
        start = 20 + down, across - 20
        mask_hw = drawn(
            (110, 110), [start, (start[0] + 160 * np.sin(angle), start[1] + 160 * np.cos(angle))], width=wide
        )
        thinned = thin_window(np.pad(mask_hw, reach.halo, constant_values=UNKNOWN), (1,), reach)
        inner = slice(reach.halo + 20, -reach.halo - 20)
        distances = np.sqrt(thinned.square_hw[inner, inner][thinned.lines_hw[inner, inner]]) if thinned else np.zeros(0)
        if len(distances) > 30:
            told[aligned].append(2 * float(np.median(distances)) - wide)
    for aligned, off in told.items():
        kind = "along rows" if aligned else "oblique"
        print(f"{kind}: {np.mean(off):+.2f} px, standard deviation {np.std(off):.2f}, {len(off)} roads")


def network(
    mask_hw: NDArray[np.uint8], grid: Grid, config: RoadsConfig, shares_hw: NDArray[np.uint8] | None = None
) -> tuple[RoadEdges, RoadNodes]:
    graph = traced(mask_hw, WINDOW, reach_of(grid, config), shares_hw=shares_hw, values=(ROAD,))
    return finish_roads(graph, grid, config, {ROAD: "road"})


def burnt(edges: RoadEdges, grid: Grid) -> NDArray[np.bool_]:
    """The lines with their widths, as pixels."""
    unit = grid.resolution_m / abs(grid.geotransform[0])
    shapes = shapely.buffer(edges.geometry, edges.width_m / 2 / unit, cap_style="round")
    return rasterize(
        shapes.tolist() or [shapely.Point(-1e9, -1e9)], (grid.height, grid.width), transform=grid.affine
    ).astype(np.bool_)


def agreement(
    one_hw: NDArray[np.bool_], truth_hw: NDArray[np.bool_], known_hw: NDArray[np.bool_]
) -> tuple[float, float]:
    """IoU, and F1 where a pixel counts as right within 3 pixels (V. Mnih, 2013)."""
    one_hw, truth_hw = one_hw & known_hw, truth_hw & known_hw
    iou = np.count_nonzero(one_hw & truth_hw) / max(1, np.count_nonzero(one_hw | truth_hw))
    near = [ndimage.distance_transform_edt(~hw) <= 3 if hw.any() else hw for hw in (truth_hw, one_hw)]
    precision = np.count_nonzero(one_hw & near[0]) / max(1, np.count_nonzero(one_hw))
    recall = np.count_nonzero(truth_hw & near[1]) / max(1, np.count_nonzero(truth_hw))
    return iou, 2 * precision * recall / max(1e-9, precision + recall)


def picture(
    path: Path, image: Path, mask_hw: NDArray[np.uint8], network_: tuple[RoadEdges, RoadNodes], grid: Grid
) -> None:
    """The lines in changing colours over the image, the mask in yellow under them, junctions blue, dead ends red."""
    with rasterio.open(image) as dataset:
        rgb = dataset.read([1, 2, 3]).transpose(1, 2, 0).astype(np.float32)
    rgb[mask_hw == ROAD] = 0.65 * rgb[mask_hw == ROAD] + 0.35 * np.array([255, 200, 0], np.float32)
    zoom = 2
    shown = Image.fromarray(rgb.astype(np.uint8)).resize((grid.width * zoom, grid.height * zoom))
    pen = ImageDraw.Draw(shown)
    colors = [(255, 0, 80), (0, 220, 255), (60, 255, 60), (255, 0, 255), (255, 255, 255)]
    back = ~grid.affine
    edges, nodes = network_
    for number, line in enumerate(edges.geometry):
        corners = [tuple(zoom * one for one in back @ corner) for corner in line.coords]
        pen.line(corners, fill=colors[number % len(colors)], width=2)
    for point, degree in zip(nodes.geometry, nodes.degree, strict=True):
        x, y = (zoom * one for one in back @ (point.x, point.y))
        pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=(255, 0, 0) if degree == 1 else (0, 0, 255))
    shown.save(path)


def real(config: RoadsConfig, pictures: Path | None, out: Path) -> None:
    folder = data_folder()
    mass = sorted((folder / "mass_roads").glob("*_classes.tif"), key=lambda path: path.name)[-14:]
    labels = [folder / "dubai" / "dubai_2_classes.tif", *mass]
    images = [path.with_name(path.name.replace("_classes", "")) for path in labels]
    command = [sys.executable, "-m", "geoseg", "predict", *map(str, images), "--out", str(out), "--probabilities"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    rows: dict[str, list[tuple[float, ...]]] = defaultdict(list)
    for label, image in zip(labels, images, strict=True):
        with rasterio.open(label) as dataset:
            t = dataset.transform
            grid = Grid(dataset.crs.to_wkt(), (t.a, t.b, t.c, t.d, t.e, t.f), dataset.height, dataset.width)
            truth_hw = dataset.read(1)
        with rasterio.open(next((out / image.stem).glob("mask-*.tif"))) as dataset:
            mask_hw = dataset.read(1)
        with rasterio.open(next((out / image.stem).glob("probabilities-*.tif"))) as dataset:
            shares_hw = dataset.read(ROAD + 1)
        mask_hw[truth_hw == UNKNOWN] = UNKNOWN
        started = time.perf_counter()
        both = network(truth_hw, grid, config), network(mask_hw, grid, config, shares_hw)
        seconds = time.perf_counter() - started
        graphs = [RoadGraphGeometry(e.geometry, np.stack([e.from_node, e.to_node], axis=1)) for e, _ in both]
        score = apls(*on_a_plane(grid.crs_wkt, *graphs)) if any(len(one.lines) for one in graphs) else apls(*graphs)
        known_hw = truth_hw != UNKNOWN
        lost = [
            agreement(burnt(e, grid), hw == ROAD, known_hw)
            for (e, _), hw in zip(both, (truth_hw, mask_hw), strict=True)
        ]
        km = [e.length_m.sum() / 1e3 for e, _ in both]
        masks = agreement(mask_hw == ROAD, truth_hw == ROAD, known_hw)
        told = (*km, score.score, score.truth_in_proposal, score.proposal_in_truth, *lost[0], *lost[1], *masks)
        if not rows:
            print(_COLUMNS)
        print(f"{image.stem:10} " + " ".join(f"{one:7.3f}" for one in told) + f"  ({seconds:.1f} s)", flush=True)
        rows[label.parent.name].append(told)
        if pictures is not None:
            pictures.mkdir(parents=True, exist_ok=True)
            for name, hw, one in zip(("truth", "mask"), (truth_hw, mask_hw), both, strict=True):
                picture(pictures / f"{image.stem}_{name}.png", image, hw, one, grid)
    for name, told in rows.items():
        table = np.array(told)
        weights = table[:, 0] / table[:, 0].sum()
        print(
            f"{name}: mean by km of truth: "
            + " ".join(f"{one:7.3f}" for one in np.nansum(table * weights[:, None], axis=0))
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ways = parser.add_subparsers(dest="way", required=True)
    ways.add_parser("cost").add_argument("sides", type=int, nargs="+")
    ways.add_parser("width")
    one = ways.add_parser("one")
    one.add_argument("which", choices=("ours", "peer"))
    one.add_argument("side", type=int)
    on_real = ways.add_parser("real")
    on_real.add_argument("--pictures", type=Path)
    on_real.add_argument("--predicted", type=Path, help="where masks are, or are put")
    on_real.add_argument("--set", nargs="*", default=[], help="settings of RoadsConfig, such as max_gap_m=0")
    arguments = parser.parse_args()
    if arguments.way == "cost":
        cost(arguments.sides)
    elif arguments.way == "width":
        width()
    elif arguments.way == "one":
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        told = ours(arguments.side) if arguments.which == "ours" else peer(arguments.side)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({**told, "MiB at start": before, "MiB at most": after}, default=float))
    else:
        config = RoadsConfig(**{key: float(value) for key, value in (one.split("=") for one in arguments.set)})
        with tempfile.TemporaryDirectory() as folder:
            real(config, arguments.pictures, arguments.predicted or Path(folder))


if __name__ == "__main__":
    main()
