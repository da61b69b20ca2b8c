"""Is a network of ours worth it beside a ready-made one? The same training, the same operations, two networks.

    python tests/benchmarks/ready_made.py --out ready-made                # three seeds, default-coarse.toml as it stands
    python tests/benchmarks/ready_made.py --steps 0.1 --seeds 0           # a tenth of its steps; 500 are 500 in all
    python tests/benchmarks/ready_made.py --encoder mobilenet_v2 --width 24 --depth 3

Sources, stages, steps, losses, augmentation, chips and seeds are those of the recipe, for both. The ready-made network is the U-Net
of segmentation_models.pytorch with random weights; its decoder is as wide as makes a chip cost as many operations as it does in
ours. A step is counted as three forward passes, for torch counts too many in the gradients of grouped convolutions. Told are the
operations, the CPU seconds of the steps, the parameters, and the IoU of each source and class at the end of training, not at its
best: mean of the seeds, the least and the largest. The records of each finished training are kept in --out, and the same command
goes on after the last of them. Learning rates are those that our network was given; --rate 0.3 is for those who doubt that they
suit the other.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kit.data import recipe
from kit.encoders import real_encoders
from schedule import looks_of, mean_of, run

from geoseg.config import check
from geoseg.model.costs import shadow_of
from geoseg.model.variants import build
from geoseg.train.job import ModelConfig, StageConfig, TrainJob
from geoseg.train.report import curves_png

DECODER = (256, 128, 64, 32, 16)  # the library's own
LEAST_CHANNELS, ROUNDED_TO = 8, 4  # fewer before the head would be a handicap
WIDEST, HALVINGS = 4.0, 9
PASSES = 3  # one forward, two for the gradients of weights and features
OURS, THEIRS = "ours", "ready-made"


def network_gflop(model: ModelConfig, side: int) -> tuple[float, int]:
    """Billions of operations of a forward pass over a chip, and the number of parameters."""
    network = shadow_of(build(model.variant, len(model.bands), len(model.classes)))
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        network(torch.empty(1, len(model.bands), side, side, device="meta"))
    return counter.get_total_flops() / 1e9, sum(weights.numel() for weights in network.parameters())


def ready_made(encoder: str, model: dict[str, Any], *, side: int, gflop: float) -> dict[str, Any]:
    """The ready-made variant whose decoder is so wide that a chip costs about ``gflop``."""

    def scaled(factor: float) -> dict[str, Any]:
        channels = [max(LEAST_CHANNELS, round(one * factor / ROUNDED_TO) * ROUNDED_TO) for one in DECODER]
        return {"name": "smp", "architecture": "Unet", "encoder": encoder, "options": {"decoder_channels": channels}}

    def off(variant: dict[str, Any]) -> float:
        return network_gflop(check(ModelConfig, {**model, "variant": variant}, where=encoder), side)[0] - gflop

    low, high = 0.0, WIDEST
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if off(scaled(middle)) > 0 else (middle, high)
    return min((scaled(low), scaled(high)), key=lambda variant: abs(off(variant)))


def shortened(stages: list[dict[str, Any]], steps: float, rate: float, looks: int | None) -> list[dict[str, Any]]:
    """The stages with a share of their steps (up to 1) or so many in all, and with ``rate`` times their learning rates.

    ``looks``: evaluations of each stage, the recipe's when None.
    """
    share = steps if steps <= 1 else steps / sum(stage["steps"] for stage in stages)
    cut = []
    for stage in stages:
        num = max(2, round(stage["steps"] * share))
        cut.append(
            {
                **stage,
                "steps": num,
                "warmup_steps": min(num - 1, round(stage["warmup_steps"] * share)),
                "evaluate_every": -(-num // looks) if looks else max(1, round(stage["evaluate_every"] * share)),
                "learning_rate": stage["learning_rate"] * rate,
            }
        )
    return cut


def costs(values: dict[str, Any]) -> dict[str, Any]:
    """What a training costs by its settings: parameters, and operations of a chip of the last stage, of each step and in all."""
    model = check(ModelConfig, values["model"], where="ready_made.py")
    stages = [check(StageConfig, stage, where="ready_made.py") for stage in values["stage"]]
    chips = [PASSES * network_gflop(model, stage.chip)[0] for stage in stages]
    steps = [chip * (stage.batch or 1) for chip, stage in zip(chips, stages, strict=True)]
    return {
        "variant": values["model"]["variant"],
        "parameters": network_gflop(model, stages[-1].chip)[1],
        "gflop_of_a_chip": chips[-1],
        "gflop_of_a_step": steps,
        "tflop": sum(step * (stage.steps or 0) for step, stage in zip(steps, stages, strict=True)) / 1e3,
    }


def trained(values: dict[str, Any], seed: int, device: str) -> dict[str, Any]:
    """The records of a training, and the seconds that it took with its evaluations."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        job = check(TrainJob, {**values, "seed": seed, "out": f"{folder}/out"}, where="ready_made.py")
        return {"seed": seed, "records": run(job, device=device), "wall_s": time.perf_counter() - started}


def ends_of(runs: list[dict[str, Any]]) -> dict[str, list[float]]:
    """For each score the last of each run."""
    ends = [list(looks_of(one["records"]))[-1] for one in runs]
    return {name: [end[name] for end in ends] for name in sorted(ends[0]) if name == "score" or name.count("/") == 2}


def summary(runs: dict[str, list[dict[str, Any]]], told: dict[str, Any]) -> dict[str, Any]:
    """Scores and seconds of both networks, over the seeds that both have finished."""
    both = min(len(each) for each in runs.values())
    return {
        name: {
            **told[name],
            "cpu_s": [one["records"][-1]["cpu_s"] for one in each[:both]],
            "wall_s": [one["wall_s"] for one in each[:both]],
            "scores": ends_of(each[:both]),
        }
        for name, each in runs.items()
    }


def table(told: dict[str, Any]) -> list[str]:
    """What both cost, and a line for each score."""
    lines = [f"{'':34} {OURS:>22} {THEIRS:>22}"]

    def line(title: str, *cells: str) -> None:
        lines.append(f"{title:34} " + " ".join(f"{cell:>22}" for cell in cells))

    sides = [told[OURS], told[THEIRS]]
    line("parameters", *(f"{one['parameters']:,}" for one in sides))
    line("GFLOP of a chip and its gradient", *(f"{one['gflop_of_a_chip']:.2f}" for one in sides))
    line("TFLOP of all steps", *(f"{one['tflop']:.1f}" for one in sides))
    line("CPU s of all steps", *(spread(one["cpu_s"], "{:.0f}") for one in sides))
    line("wall s with evaluations", *(spread(one["wall_s"], "{:.0f}") for one in sides))
    for name in told[OURS]["scores"]:
        ours, theirs = (one["scores"][name] for one in sides)
        differences = [one - other for one, other in zip(ours, theirs, strict=True)]
        title = "mean IoU" if name == "score" else name.removeprefix("iou/")
        line(title, spread(ours, "{:.3f}"), spread(theirs, "{:.3f}"), spread(differences, "{:+.3f}"))
    lines[0] += f" {'ours less theirs':>22}"
    return lines


def spread(numbers: list[float], form: str) -> str:
    """The mean, and the least and the largest where there are several."""
    mean = form.format(statistics.mean(numbers))
    return mean if len(numbers) == 1 else f"{mean} ({form.format(min(numbers))}..{form.format(max(numbers))})"


def both_values(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The settings of both trainings."""
    told = recipe()
    own = {"name": "unet", "depth": arguments.depth, "width": arguments.width}
    own = {**told["model"]["variant"], **{key: value for key, value in own.items() if value is not None}}
    side = told["stage"][-1]["chip"]
    gflop, _ = network_gflop(check(ModelConfig, {**told["model"], "variant": own}, where="default.toml"), side)
    other = ready_made(arguments.encoder, told["model"], side=side, gflop=gflop)
    stages = shortened(told["stage"], arguments.steps, arguments.rate, arguments.looks)
    share = sum(stage["steps"] for stage in stages) / sum(stage["steps"] for stage in told["stage"])
    optimizer = {**told["optimizer"], "ema": told["optimizer"]["ema"] ** (1 / share)}  # as long a memory, for its steps
    more = {"stage": stages, "optimizer": optimizer, "cluster": {"read_threads": arguments.threads}}
    return {
        name: {**told, **more, "calibrate": False, "model": {**told["model"], "name": name, "variant": variant}}
        for name, variant in ((OURS, own), (THEIRS, other))
    }


def main() -> None:
    """Match, train, compare, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, help="folder for records, results and the picture; without one none are kept"
    )
    parser.add_argument(
        "--steps", type=float, default=1.0, help="a share of the recipe's up to 1, or their number in all"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--encoder", default="resnet18", help="of the ready-made network; tu-... are timm's")
    parser.add_argument("--width", type=int, help="of our network; the recipe's when left out")
    parser.add_argument("--depth", type=int, help="of our network; the recipe's when left out")
    parser.add_argument("--looks", type=int, help="evaluations of each stage; the recipe's when left out")
    parser.add_argument("--rate", type=float, default=1.0, help="factor of the learning rates of both")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="that read chips")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with real_encoders():
        values = both_values(arguments)
        told = {name: costs(one) for name, one in values.items()}
        runs: dict[str, list[dict[str, Any]]] = {OURS: [], THEIRS: []}
        kept = arguments.out / "records.json" if arguments.out is not None else None
        if kept is not None and kept.exists():
            before = json.loads(kept.read_text())
            if before["costs"] != json.loads(json.dumps(told)) or before["stages"] != values[OURS]["stage"]:
                raise SystemExit(f"{kept} has trainings of other settings; name another folder")
            runs = before["runs"]
        for seed in arguments.seeds:
            for name, each in runs.items():
                if seed not in {one["seed"] for one in each}:
                    each.append(trained(values[name], seed, arguments.device))
                    end = each[-1]["records"][-1]
                    print(
                        f"seed {seed} {name}: {end['score']:.3f} after {end['cpu_s']:.0f} CPU s",
                        file=sys.stderr,
                        flush=True,
                    )
                    if kept is not None:
                        kept.parent.mkdir(parents=True, exist_ok=True)
                        text = json.dumps({"costs": told, "stages": values[OURS]["stage"], "runs": runs})
                        kept.write_text(text)
    results = summary(runs, told)
    print("\n".join(table(results)))
    if arguments.out is not None:
        (arguments.out / "ready_made.json").write_text(json.dumps(results, indent=1) + "\n")
        means = {name: mean_of([one["records"] for one in each]) for name, each in runs.items()}
        (arguments.out / "ready_made.png").write_bytes(curves_png(means))


if __name__ == "__main__":
    main()
