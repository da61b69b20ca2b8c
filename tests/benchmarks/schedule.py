"""Does the progressive schedule pay? Fixed full resolution against coarse stages first: same data, network, seeds and loss.

    python tests/benchmarks/schedule.py                    # three seeds, fixed and progressive in turn
    python tests/benchmarks/schedule.py --seeds 0 --share 0.2

Each seed trains at full resolution from the first step to the last, then progressively; told is what the progressive run had
spent when it first reached the IoU (mean of building and road on the validation scene) with which the fixed one ended: in
operations, and in seconds of CPU, as shares of what the fixed run took in all. Evaluations are not counted in either.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import rasterio.shutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kit.data import data_folder

from geoseg.config import check
from geoseg.train.feed import feed_from_threads
from geoseg.train.job import TrainJob
from geoseg.train.log import MetricsLog
from geoseg.train.loop import Group
from geoseg.train.report import curves_png
from geoseg.training import keep_tables_in_threads, prepare, train_share

CLASSES = [
    {"name": "background", "color": [0, 0, 0]},
    {"name": "building", "color": [230, 85, 60]},
    {"name": "road", "color": [250, 200, 60]},
]
LABELS = [{"uri": "{folder}/{stem}_classes.tif", "values": {"building": [1], "road": [2]}, "unlabelled": [255]}]
LOSS = {"terms": [{"loss": {"name": "cross_entropy"}}, {"loss": {"name": "dice", "classes": [1, 2]}, "factor": 0.5}]}
AUGMENT = {"scale": [0.8, 1.25], "brightness": 0.1, "contrast": 0.2, "color": 0.1}
FULL = {"chip": 256, "batch": 4, "learning_rate": 3e-3, "warmup_steps": 10, "loss": LOSS, "augment": AUGMENT}
# Chips of 154 m at each resolution: a step has 262,144 pixels at 0.6 m, 65,536 at 1.2 m and 32,768 at 2.4 m.
RISING = [
    {**FULL, "resolution_m": 2.4, "chip": 64, "batch": 8},
    {**FULL, "resolution_m": 1.2, "chip": 128, "batch": 4},
]
SHARES = (0.1, 0.9)  # of the pixels of a progressive run, stage by stage


def with_overviews(folder: Path) -> Path:
    """Copies of the scenes as Cloud-Optimized GeoTIFFs with overviews, as buckets hold them, and of their labels."""
    for path in sorted((data_folder() / "dubai").glob("*.tif")):
        is_image = not path.stem.endswith("_classes")
        options = {"compress": "jpeg", "quality": 92} if is_image else {"compress": "deflate"}
        resampling = "average" if is_image else "nearest"
        rasterio.shutil.copy(path, folder / path.name, driver="COG", overview_resampling=resampling, **options)
    return folder


def job(scenes: Path, out: Path, *, seed: int, stages: list[dict[str, Any]], width: int, precision: str) -> TrainJob:
    """A training on the scenes of ``scenes`` with ``stages``."""
    of_use = {"train": f"{scenes}/dubai_[13567].tif", "validate": f"{scenes}/dubai_2.tif"}
    values = {
        "out": str(out),
        "seed": seed,
        "model": {
            "name": out.name.replace("-", " seed "),
            "variant": {"name": "unet", "depth": 3, "width": width, "norm": "batch"},
            "resolution_m": 0.6,
            "classes": CLASSES,
        },
        "source": [{"name": use, "use": use, "scenes": [pattern], "labels": LABELS} for use, pattern in of_use.items()],
        "stage": stages,
        "optimizer": {"ema": 0.97, "precision": precision},
        "cluster": {"read_threads": 1},
    }
    return check(TrainJob, values, where="schedule.py")


def progressive(num_steps: int, share: float, *, looks: int) -> list[dict[str, Any]]:
    """Stages with ``share`` of the pixels of ``num_steps`` steps at full resolution, each evaluated ``looks`` times."""
    full_px = FULL["batch"] * FULL["chip"] ** 2
    stages = []
    for stage, part in zip(RISING, SHARES, strict=True):
        steps = max(12, round(num_steps * share * part * full_px / (stage["batch"] * stage["chip"] ** 2)))
        stages.append({**stage, "steps": steps, "evaluate_every": max(1, steps // looks)})
    return stages


def run(job: TrainJob, *, device: str = "cpu") -> list[dict[str, Any]]:
    """The records of a training, with the CPU seconds of its steps under ``cpu_s``."""
    prepared = prepare(job, keep_tables=keep_tables_in_threads)
    used = _CpuSeconds()

    def tell(kind: str, what: Any) -> None:
        if kind in ("stepped", "evaluated"):
            used.note(what)

    feed = partial(feed_from_threads, threads=job.cluster.read_threads)
    train_share(prepared, feed, tell, group=Group(), device=device)
    records = MetricsLog.load(prepared.plan.out, up_to=(len(prepared.plan.stages), prepared.plan.num_steps)).records
    return [{**record, "cpu_s": used.at[record["kind"], record["step"]]} for record in records]


class _CpuSeconds:
    """CPU seconds of training steps up to each record; those of evaluations are left out."""

    def __init__(self) -> None:
        self.at: dict[tuple[str, int], float] = {}
        self._sum = 0.0
        self._since = time.process_time()

    def note(self, record: dict[str, Any]) -> None:
        now = time.process_time()
        if record["kind"] == "train":
            self._sum += now - self._since
        self._since = now
        self.at[record["kind"], record["step"]] = self._sum


def looks_of(records: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The evaluations."""
    return (record for record in records if record["kind"] == "validate")


def main() -> None:
    """Train, compare, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=360, help="of the fixed run, 262,144 pixels each")
    parser.add_argument("--share", type=float, default=1 / 3, help="pixels of the progressive run, of the fixed one's")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--out", type=Path, help="folder for records and the picture; without one they are not kept")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    runs: dict[str, list[list[dict[str, Any]]]] = {"fixed": [], "progressive": []}
    with tempfile.TemporaryDirectory() as folder:
        scenes = with_overviews(Path(folder))
        for seed in arguments.seeds:
            stages = {
                "fixed": [{**FULL, "steps": arguments.steps, "evaluate_every": max(1, arguments.steps // 8)}],
                "progressive": progressive(arguments.steps, arguments.share, looks=4),
            }
            for name, each in runs.items():
                out = Path(folder) / f"{name}-{seed}"
                each.append(
                    run(
                        job(
                            scenes,
                            out,
                            seed=seed,
                            stages=stages[name],
                            width=arguments.width,
                            precision=arguments.precision,
                        )
                    )
                )
            rows.append(compared(seed, runs["fixed"][-1], runs["progressive"][-1]))
            print(told(rows[-1]), flush=True)
            if arguments.out is not None:
                arguments.out.mkdir(parents=True, exist_ok=True)
                (arguments.out / "records.json").write_text(json.dumps(runs))
                means = {name: mean_of(each) for name, each in runs.items()}
                (arguments.out / "schedule.png").write_bytes(curves_png(means, x="gflop"))
    for name in ("flop_share", "cpu_share"):
        known = [row[name] for row in rows if row[name] is not None]
        print(f"median {name}: {statistics.median(known):.2f}" if known else f"{name}: never reached")


def mean_of(runs: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The records of several seeds as one, with the means of their numbers."""
    return [
        {
            name: statistics.mean(one[name] for one in each) if isinstance(value, float) else value
            for name, value in each[0].items()
        }
        for each in zip(*runs, strict=True)
    ]


def compared(seed: int, fixed: list[dict[str, Any]], rising: list[dict[str, Any]]) -> dict[str, Any]:
    """What the progressive run had spent when it was as good as the fixed one at its end."""
    end = list(looks_of(fixed))[-1]
    reached = next((look for look in looks_of(rising) if look["score"] >= end["score"]), None)
    return {
        "seed": seed,
        "fixed": end["score"],
        "progressive": list(looks_of(rising))[-1]["score"],
        "flop_share": reached["gflop"] / end["gflop"] if reached else None,
        "cpu_share": reached["cpu_s"] / end["cpu_s"] if reached else None,
        "whole_flop_share": rising[-1]["gflop"] / end["gflop"],
        "whole_cpu_share": rising[-1]["cpu_s"] / end["cpu_s"],
    }


def told(row: dict[str, Any]) -> str:
    """A line of the table."""
    shares = [
        "never" if row[name] is None else f"{row[name]:.2f}"
        for name in ("flop_share", "cpu_share", "whole_flop_share", "whole_cpu_share")
    ]
    return (
        f"seed {row['seed']}  mean IoU fixed {row['fixed']:.3f} progressive {row['progressive']:.3f}  reached after "
        f"{shares[0]} of the FLOPs, {shares[1]} of the CPU seconds (whole run: {shares[2]}, {shares[3]})"
    )


if __name__ == "__main__":
    main()
