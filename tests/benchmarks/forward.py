"""The forward pass: the ways to run it, and what the fast one changes.

    python tests/benchmarks/forward.py [--bundle B] [--core 1024] [--threads 1] [--rounds 3]    # the ways, side by side
    python tests/benchmarks/forward.py --scenes ../shared/data                                  # masks, float32 against bfloat16

First: CPU seconds per Mpx of a core for each way, interleaved, the median of the rounds; speed against the first, which is
how most write it; and the share of pixels with the class that float32 gives. Compiled ways need a C++ compiler, those of
other runtimes their package (pip install openvino onnxruntime onnx onnxscript); what is not there is left out. Ways run on a
padded window hold the halo for the whole window, as peers do; geoseg's compute no pixel that is thrown away.

Second: the scenes of jobs/configs/evaluate.toml by both precisions: pixels that get another class, among all and among
those that either calls an object, and the IoU with the labels of each.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kit.data import tomllib

from geoseg.config import DEFAULT_BUNDLE, PredictConfig, check
from geoseg.evaluate.job import EvaluationJob
from geoseg.evaluate.judge import EvaluationScene, Judge, find_scene
from geoseg.model.bundle import Bundle
from geoseg.model.network import Network
from geoseg.model.precision import Precision, natural_precision
from geoseg.predict.bundles import load_bundle
from geoseg.predict.failure import Failure
from geoseg.predict.mask import class_mask, class_probabilities
from geoseg.predict.memory import set_memory_up
from geoseg.predict.predictor import Predictor, network_spec
from geoseg.raster.stack import list_sources
from geoseg.raster.synthetic import synthetic_image
from geoseg.train.codes import LabelCodes
from geoseg.train.labels import labelled_classes
from geoseg.train.metrics import Counts, class_scores, count_window

RECIPE = Path(__file__).parents[2] / "jobs" / "configs" / "evaluate.toml"
Way = Callable[[], Tensor]


class Core(nn.Module):
    """A network as a function of the image alone, for runtimes that trace one."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, image_bkhw: Tensor) -> Tensor:
        """Logits of the core."""
        return self.network.core_logits(image_bkhw)


def ways(bundle: Bundle, image_bkhw: Tensor) -> dict[str, Way]:
    """Each way to the logits of the core of an image with its margin around it."""
    plain = bundle.network()
    valid = bundle.network().folded()
    half = bundle.network().folded(torch.bfloat16)
    valid.padding = half.padding = "valid"
    last_bkhw = image_bkhw.contiguous(memory_format=torch.channels_last)
    rim = plain.halo - plain.margin
    wide_bkhw = torch.nn.functional.pad(image_bkhw, (rim, rim, rim, rim))
    halo = plain.halo
    wide_last_bkhw = wide_bkhw.contiguous(memory_format=torch.channels_last)
    folded = bundle.network().folded()

    def cut(logits_bchw: Tensor) -> Tensor:
        return logits_bchw[..., halo : logits_bchw.shape[-2] - halo, halo : logits_bchw.shape[-1] - halo]

    found: dict[str, Way] = {
        "eager float32, padded": lambda: cut(plain(wide_bkhw)),
        "folded, channels last": lambda: cut(folded(wide_last_bkhw)),
        "geoseg float32": lambda: valid.core_logits(last_bkhw),
    }
    if natural_precision(torch.device("cpu")) == "bfloat16":
        found["geoseg bfloat16"] = lambda: half.core_logits(last_bkhw)
        found["inductor bfloat16"] = compiled(half, last_bkhw)
    found["inductor float32"] = compiled(valid, last_bkhw)
    with suppress(ImportError):
        found |= by_openvino(valid, image_bkhw)
    with suppress(ImportError):
        found |= by_onnxruntime(valid, image_bkhw)
    return found


def compiled(network: Network, image_bkhw: Tensor) -> Way:
    """By torch.compile, frozen."""
    import torch._inductor.config

    torch._inductor.config.freezing = True
    fast = torch.compile(network.logits)
    spare = network.margin - network.reach.shrinkage

    def run(image: Tensor) -> Tensor:
        logits_bchw = fast(image)
        return logits_bchw[..., spare : logits_bchw.shape[-2] - spare, spare : logits_bchw.shape[-1] - spare]

    return lambda: run(image_bkhw)


def by_openvino(network: Network, image_bkhw: Tensor) -> dict[str, Way]:
    """By OpenVINO's CPU plugin."""
    import openvino

    model = openvino.convert_model(Core(network), example_input=image_bkhw, input=list(image_bkhw.shape))
    found = {}
    for name, precision in (("float32", "f32"), ("bfloat16", "bf16")):
        settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
        pixels = image_bkhw.numpy()

        def run(request: Any = request, pixels: Any = pixels) -> Tensor:
            request.infer([pixels])
            return torch.from_numpy(request.get_output_tensor().data)

        found[f"OpenVINO {name}"] = run
    return found


def by_onnxruntime(network: Network, image_bkhw: Tensor) -> dict[str, Way]:
    """By ONNX Runtime's CPU provider."""
    import io

    import onnxruntime

    file = io.BytesIO()
    torch.onnx.export(Core(network), (image_bkhw,), file, dynamo=False, input_names=["image"])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    pixels = image_bkhw.numpy()
    return {"ONNX Runtime float32": lambda: torch.from_numpy(session.run(None, {"image": pixels})[0])}


def compare_ways(bundle: Bundle, *, core: int, rounds: int) -> None:
    """Run each way in turns and print a table."""
    margin = bundle.network().margin
    made = synthetic_image(core + 2 * margin, core + 2 * margin, seed=1, nodata_fraction=0)
    pixels = torch.from_numpy(made.pixels_bhw)[None]
    image_bkhw = bundle.description.normalization(pixels, torch.ones(1, *pixels.shape[-2:], dtype=torch.bool))
    image_bkhw = image_bkhw.contiguous()
    seconds: dict[str, list[float]] = {}
    classes: dict[str, np.ndarray[Any, Any]] = {}
    with torch.inference_mode():
        found = ways(bundle, image_bkhw)
        for name, run in found.items():
            classes[name] = run().max(1).indices.numpy()  # also compiles, and fills caches
        for _ in range(rounds):
            for name, run in found.items():
                before = time.process_time()
                run()
                seconds.setdefault(name, []).append((time.process_time() - before) / core**2 * 1e6)
    first = statistics.median(next(iter(seconds.values())))
    exact = classes["geoseg float32"]
    print(f"{bundle.description.name}, core {core}, {torch.get_num_threads()} threads, {rounds} rounds")
    print(f"{'way':<24} {'CPU s/Mpx':>9} {'of each round':>24} {'speed':>6} {'same class':>11}")
    for name, each in seconds.items():
        told = " ".join(f"{one:.2f}" for one in each)
        median = statistics.median(each)
        same = float(np.mean(classes[name] == exact))
        print(f"{name:<24} {median:>9.3f} {told:>24} {first / median:>6.2f} {same:>11.4%}")


def scenes_of(bundle: Bundle, folder: Path) -> list[EvaluationScene]:
    """The labelled scenes of the recipe, with the imagery in ``folder``."""
    told = tomllib.loads(RECIPE.read_text().replace("../shared/data", str(folder)))
    job = check(EvaluationJob, told, where=str(RECIPE))
    spec, names = network_spec(bundle, job.predict), [one.name for one in bundle.description.classes]
    codes = LabelCodes.for_sources(len(names), [labelled_classes(source.labels, names) for source in job.source])
    found = []
    for source in job.source:
        for ref in sorted(list_sources(source.scenes, source.stack_by), key=lambda ref: ref.uri):
            scene = find_scene(ref, source, spec, codes)
            if isinstance(scene, Failure):
                raise SystemExit(scene.sentence)
            found.append(scene)
    return found


def compare_masks(bundle: Bundle, folder: Path) -> None:
    """Both precisions on labelled scenes: what differs, and both IoU."""
    precisions: tuple[Precision, Precision] = ("float32", "bfloat16")
    judges = {name: Judge(Predictor(bundle, PredictConfig(), precision=name)) for name in precisions}
    names = [one.name for one in bundle.description.classes]
    zero = Counts.zero(len(names))
    counts: dict[str, dict[Precision, Counts]] = {}
    differ: dict[str, np.ndarray[Any, Any]] = {}
    for scene in scenes_of(bundle, folder):
        of_source = counts.setdefault(scene.source, dict.fromkeys(precisions, zero))
        told = differ.setdefault(scene.source, np.zeros(3, np.int64))
        for window in scene.plan.windows(judges["float32"].reader(scene.plan)):
            masks = {}
            for name, judge in judges.items():
                seen = judge.see(scene, window, unlabelled=True)
                if seen is None:
                    continue
                masks[name] = class_mask(seen.logits_chw, seen.valid_hw, bundle.description)
                steps = class_probabilities(seen.logits_chw, seen.valid_hw, bundle.description)
                all_of_it = slice(0, window.height), slice(0, window.width)
                one = count_window(
                    masks[name], seen.labels_hw, scene.codes, core=all_of_it, steps_chw=steps, quick=True
                )
                of_source[name] += one.only(scene.labelled)
            if len(masks) == len(precisions):
                exact, fast = masks.values()
                objects = ((exact > 0) | (fast > 0)) & seen.valid_hw
                told += [(exact != fast).sum(), objects.sum(), seen.valid_hw.sum()]
    print(f"{'source':<18} {'Mpx':>6} {'other class':>11} {'of objects':>10}   IoU in float32 and bfloat16, difference")
    for source, (changed, objects, pixels) in differ.items():
        scores = [class_scores(counts[source][name]) for name in precisions]
        ious = [
            f"{name} {exact.iou:.4f} {fast.iou:.4f} {fast.iou - exact.iou:+.5f}"
            for name, exact, fast in zip(names, *scores, strict=True)
            if exact.iou == exact.iou and name != names[0]
        ]
        print(
            f"{source:<18} {pixels / 1e6:>6.1f} {changed / pixels:>11.5%} {changed / objects:>10.4%}   {'; '.join(ious)}"
        )


def main() -> None:
    """Compare the ways, or masks on real scenes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", default=DEFAULT_BUNDLE)
    parser.add_argument("--core", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scenes", type=Path, help="folder of the labelled imagery: compare masks instead")
    options = parser.parse_args()
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", "/tmp/geoseg-inductor")
    set_memory_up()
    torch.set_num_threads(options.threads)
    bundle = load_bundle(options.bundle)
    if options.scenes:
        compare_masks(bundle, options.scenes)
    else:
        compare_ways(bundle, core=options.core, rounds=options.rounds)


if __name__ == "__main__":
    sys.exit(main())
