"""Ways from a scene in a bucket to a COG of its classes there, each in a process of its own; all with the same network.

    python tests/benchmarks/ways.py WAY TASK      # TASK is a ``Task`` as JSON; what came of it is printed as JSON

Written as most people write them, or as the project's own documentation has it; ``end_to_end.py`` and ``peers.py`` run them.
Each imports what it needs and loads the network before it calls ``begin``: that is the start-up.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import rasterio
import torch
from kit.measured import run_measured
from kit.vision_operators import declare_vision_operators
from numpy.typing import NDArray
from torch import Tensor

from geoseg.model.bundle import DESCRIPTION_NAME, WEIGHTS_NAME, Bundle

_Begin = Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class Task:
    """What to do. ``scene`` and ``out`` (a prefix) are URIs, ``bundle`` is a folder, or for geoseg a name.

    ``window`` and ``overlap``, in pixels, are for the peers, ``predict`` and ``cluster``, sections of a job, for geoseg.
    ``cores``: how many actors a peer on Ray gets.
    """

    scene: str
    out: str
    bundle: str
    window: int = 512
    overlap: int = 64
    cores: int = 1
    predict: Mapping[str, Any] = field(default_factory=dict)
    cluster: Mapping[str, Any] = field(default_factory=dict)

    @property
    def mask(self) -> str:
        """Where a peer puts its mask."""
        return f"{self.out}/mask.tif"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a way did. ``mask`` is a URI; ``seconds`` from when it began until its mask stood; ``peak_bytes`` in all.

    ``cpu_s`` are those of all its processes since it began: of the program's own, imports are left out. ``computed``: pixels
    that went through the network, None where that is not counted; ``startup_s``, ``working_s``: until geoseg's first worker
    stood, and from then on.
    """

    mask: str
    seconds: float
    cpu_s: float
    peak_bytes: int
    computed: int | None = None
    startup_s: float = 0.0
    working_s: float = 0.0


def run_way(way: str, task: Task, *, environment: Mapping[str, str]) -> Outcome:
    """Run a way in a process of its own. Raises CalledProcessError."""
    command = [sys.executable, __file__, way, json.dumps(asdict(task))]
    out, cost = run_measured(command, environment=environment)
    told = json.loads(out.splitlines()[-1])
    return Outcome(cpu_s=cost.cpu_s - told.pop("imports_cpu_s"), peak_bytes=cost.peak_bytes, **told)


class Segmenter(torch.nn.Module):
    """A bundle's network with its normalisation before it: pixels (b, band, row, col) in, logits (b, class, row, col) out.

    Pixels are float32 as the file has them, divided by ``scale``. The largest logit tells the class by the bundle's thresholds.
    ``computed`` counts the pixels that went through.
    """

    def __init__(
        self, folder: str, *, scale: float = 1, fold: bool = False, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        description_json, weights = ((Path(folder) / name).read_bytes() for name in (DESCRIPTION_NAME, WEIGHTS_NAME))
        bundle = Bundle.from_bytes(description_json, weights, origin=folder)
        network = bundle.network()
        with torch.no_grad():  # the bundle's thresholds
            network.head.bias += torch.tensor(bundle.description.offsets)
        self.network = (network.folded() if fold else network).to(dtype)
        self.dtype = dtype
        self.register_buffer("mean", torch.tensor(bundle.description.mean)[:, None, None] / scale)
        self.register_buffer("std", torch.tensor(bundle.description.std)[:, None, None] / scale)
        self.class_names = [one.name for one in bundle.description.classes]
        self.computed = 0

    def forward(self, image_bkhw: Tensor) -> Tensor:
        """Logits in the network's dtype."""
        self.computed += image_bkhw.numel() // image_bkhw.shape[1]
        return self.network(((image_bkhw - self.mean) / self.std).to(self.dtype))


def gdal_path(uri: str) -> str:
    """The name of an object in a bucket for GDAL."""
    return uri.replace("s3://", "/vsis3/", 1)


def windows(shape: tuple[int, int], side: int, overlap: int) -> Iterator[tuple[int, int]]:
    """First rows and columns of windows that cover a scene; the last lie against its far edges. Sides are at least ``side``."""
    rows, cols = ([*range(0, size - side, side - overlap), size - side] for size in shape)
    return ((row, col) for row in rows for col in cols)


def place(mask_hw: NDArray[np.uint8], classes_hw: NDArray[Any], row: int, col: int, *, trim: int) -> None:
    """Write a window's classes to the mask without ``trim`` pixels on the sides that do not lie on or beyond the scene's edge."""
    to, of = [], []
    for first, size, end in zip((row, col), classes_hw.shape, mask_hw.shape, strict=True):
        start = first + trim if first > 0 else 0
        stop = first + size - trim if first + size < end else end
        to.append(slice(start, stop))
        of.append(slice(start - first, stop - first))
    mask_hw[tuple(to)] = classes_hw[tuple(of)]


def publish(mask_hw: NDArray[np.uint8], scene_profile: Mapping[str, Any], uri: str) -> None:
    """Write a mask with GDAL's COG driver and upload it."""
    import boto3

    height, width = mask_hw.shape
    georeference = {key: scene_profile[key] for key in ("crs", "transform")}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mask.tif"
        with rasterio.open(
            path,
            "w",
            driver="COG",
            dtype="uint8",
            count=1,
            height=height,
            width=width,
            compress="deflate",
            overview_resampling="nearest",
            **georeference,
        ) as out:
            out.write(mask_hw, 1)
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        boto3.Session().client("s3").upload_file(str(path), bucket, key)


def plain(task: Task, begin: _Begin) -> dict[str, Any]:
    """The loop over rasterio and torch that most people write: float32, one window after the other, the mask in memory."""
    network = Segmenter(task.bundle)
    begin()
    trim = task.overlap // 2
    with torch.inference_mode(), rasterio.open(gdal_path(task.scene)) as scene:
        profile, mask_hw = scene.profile, np.zeros(scene.shape, np.uint8)
        for row, col in windows(scene.shape, task.window, task.overlap):
            window = rasterio.windows.Window(col, row, task.window, task.window)
            image_bkhw = torch.from_numpy(scene.read(window=window).astype(np.float32))[None]
            classes_hw = network(image_bkhw).argmax(1)[0].numpy()
            place(mask_hw, classes_hw, row, col, trim=trim)
    publish(mask_hw, profile, task.mask)
    return {"mask": task.mask, "computed": network.computed}


def tuned(task: Task, begin: _Begin) -> dict[str, Any]:
    """The same loop tuned by hand.

    Batch norm is folded, bfloat16 taken where the CPU multiplies in it, channels last, windows of 1024 pixels with 64 around
    them, the largest of the logits by ``max``, the next window read while one is computed, COG with DEFLATE.
    """
    has_bf16 = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    dtype = torch.bfloat16 if has_bf16 else torch.float32
    network = Segmenter(task.bundle, fold=True, dtype=dtype)
    begin()
    core, halo = 1024, 64
    with (
        torch.inference_mode(),
        rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR"),
        rasterio.open(gdal_path(task.scene)) as scene,
        ThreadPoolExecutor(1) as reader,
    ):
        height, width = scene.shape
        profile, mask_hw = scene.profile, np.zeros(scene.shape, np.uint8)

        def read(row: int, col: int) -> tuple[int, int, Any]:
            top, left = max(row - halo, 0), max(col - halo, 0)
            bottom, right = min(row + core + halo, height), min(col + core + halo, width)
            return row, col, scene.read(window=((top, bottom), (left, right)))

        places = [(row, col) for row in range(0, height, core) for col in range(0, width, core)]
        waiting = reader.submit(read, *places[0])
        for following in [*places[1:], None]:
            row, col, pixels_bhw = waiting.result()
            if following is not None:
                waiting = reader.submit(read, *following)
            image_bkhw = torch.from_numpy(pixels_bhw)[None].to(torch.float32, memory_format=torch.channels_last)
            classes_hw = network(image_bkhw).max(1).indices[0].to(torch.uint8).numpy()
            top, left = min(row, halo), min(col, halo)
            mask_hw[row : row + core, col : col + core] = classes_hw[top : top + core, left : left + core]
    publish(mask_hw, profile, task.mask)
    return {"mask": task.mask, "computed": network.computed}


def torchgeo(task: Task, begin: _Begin) -> dict[str, Any]:
    """TorchGeo's RasterDataset and GridGeoSampler behind a DataLoader; it has no stitcher, so windows are placed as in the loop."""
    from torch.utils.data import DataLoader

    declare_vision_operators()
    from torchgeo.datasets import RasterDataset, stack_samples
    from torchgeo.samplers import GridGeoSampler

    network = Segmenter(task.bundle)
    begin()
    path = gdal_path(task.scene)
    dataset = RasterDataset(paths=[path])
    sampler = GridGeoSampler(dataset, size=task.window, stride=task.window - task.overlap)
    with rasterio.open(path) as scene:
        profile, mask_hw = scene.profile, np.zeros(scene.shape, np.uint8)
        geotransform = scene.transform
    with torch.inference_mode():
        for batch in DataLoader(dataset, sampler=sampler, batch_size=1, collate_fn=stack_samples):
            classes_hw = network(batch["image"]).argmax(1)[0].numpy()
            x, y, _ = batch["bounds"][0]
            col, row = ~geotransform * (x.start, y.stop)
            place(mask_hw, classes_hw, round(row), round(col), trim=task.overlap // 2)
    publish(mask_hw, profile, task.mask)
    return {"mask": task.mask, "computed": network.computed}


def monai(task: Task, begin: _Begin) -> dict[str, Any]:
    """MONAI's sliding_window_inference over the whole scene in memory, with its own blend of overlaps."""
    from monai.inferers import sliding_window_inference

    network = Segmenter(task.bundle)
    begin()
    with rasterio.open(gdal_path(task.scene)) as scene:
        profile = scene.profile
        image_bkhw = torch.from_numpy(scene.read().astype(np.float32))[None]
    overlap = task.overlap / task.window
    with torch.inference_mode():
        logits_bchw = sliding_window_inference(image_bkhw, task.window, 1, network, overlap=overlap)
        mask_hw = logits_bchw.argmax(1)[0].to(torch.uint8).numpy()
    publish(mask_hw, profile, task.mask)
    return {"mask": task.mask, "computed": network.computed}


def rastervision(task: Task, begin: _Begin) -> dict[str, Any]:
    """Raster Vision's sliding-window dataset, learner and smooth labels, as its documentation predicts a scene."""
    declare_vision_operators()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TMPDIR"] = folder  # it downloads the scene, to below /opt unless told, and would do so once
        from rastervision.core.data import ClassConfig, SemanticSegmentationLabels
        from rastervision.pytorch_learner import (
            SemanticSegmentationGeoDataConfig,
            SemanticSegmentationLearner,
            SemanticSegmentationLearnerConfig,
            SemanticSegmentationSlidingWindowGeoDataset,
        )

        network = Segmenter(task.bundle, scale=255)  # it gives the network pixels between 0 and 1
        begin()
        classes = ClassConfig(names=network.class_names)
        dataset = SemanticSegmentationSlidingWindowGeoDataset.from_uris(
            image_uri=task.scene, class_config=classes, size=task.window, stride=task.window - task.overlap
        )
        data = SemanticSegmentationGeoDataConfig(class_config=classes, num_workers=0)
        learner = SemanticSegmentationLearner(
            SemanticSegmentationLearnerConfig(data=data), model=network, training=False
        )
        scores = learner.predict_dataset(dataset, numpy_out=True, progress_bar=False, dataloader_kw={"batch_size": 1})
        extent = dataset.scene.extent
        labels = SemanticSegmentationLabels.from_predictions(
            dataset.windows, scores, smooth=True, extent=extent, num_classes=len(classes)
        )
    with rasterio.open(gdal_path(task.scene)) as scene:
        profile = scene.profile
    publish(labels.get_label_arr(extent).astype(np.uint8), profile, task.mask)
    return {"mask": task.mask, "computed": network.computed}


def ray_data(task: Task, begin: _Begin) -> dict[str, Any]:
    """Ray Data as its documentation has batch inference: windows as rows, pixels by ``map``, an actor class by ``map_batches``."""
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    begin()
    with rasterio.open(gdal_path(task.scene)) as scene:
        profile, mask_hw = scene.profile, np.zeros(scene.shape, np.uint8)
    places = [{"row": row, "col": col} for row, col in windows(mask_hw.shape, task.window, task.overlap)]
    with tempfile.TemporaryDirectory(prefix="ways-ray-") as folder:
        ray.init(
            address="local",
            num_cpus=task.cores + 2,  # the actors hold one each, and windows have to be read besides
            include_dashboard=False,
            logging_level=logging.ERROR,
            log_to_driver=False,
            _temp_dir=folder,
        )
        try:
            DataContext.get_current().enable_progress_bars = False
            pixels = ray.data.from_items(places).map(_read_row, fn_kwargs={"task": task})
            masks = pixels.map_batches(
                _Segment, fn_constructor_args=(task,), batch_size=1, compute=ActorPoolStrategy(size=task.cores)
            )
            for row in masks.iter_rows():
                place(mask_hw, row["classes_hw"], row["row"], row["col"], trim=task.overlap // 2)
        finally:
            ray.shutdown()
    publish(mask_hw, profile, task.mask)
    return {"mask": task.mask, "computed": len(places) * task.window**2}


def _read_row(row: dict[str, Any], *, task: Task) -> dict[str, Any]:

    with rasterio.open(gdal_path(task.scene)) as scene:
        window = rasterio.windows.Window(row["col"], row["row"], task.window, task.window)
        return {**row, "pixels_bhw": scene.read(window=window)}


class _Segment:
    """The network in an actor of Ray Data."""

    def __init__(self, task: Task) -> None:
        self._network = Segmenter(task.bundle)

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        with torch.inference_mode():
            logits_bchw = self._network(torch.from_numpy(batch.pop("pixels_bhw").astype(np.float32)))
        return {**batch, "classes_hw": logits_bchw.argmax(1).to(torch.uint8).numpy()}


def geoseg(task: Task, begin: _Begin) -> dict[str, Any]:
    """Our own, with its defaults or what the task's sections say."""
    from geoseg.config import load_job
    from geoseg.run import run_job

    if task.cluster.get("engine") == "ray":
        import geoseg.cluster.predict  # noqa: F401 - else imported once it has begun

    told = {"predict": dict(task.predict), "cluster": dict(task.cluster)}
    job = load_job(None, {"scenes": [task.scene], "out": task.out, "bundle": task.bundle, **told})
    begin()
    report = run_job(job, quiet=True)
    assert report.exit_code == 0, report.scenes
    return {"mask": report.scenes[0].mask, "startup_s": report.startup_s, "working_s": report.working_s}


WAYS: dict[str, Callable[[Task, _Begin], dict[str, Any]]] = {
    way.__name__: way for way in (plain, tuned, torchgeo, monai, rastervision, ray_data, geoseg)
}


def main() -> None:
    """Run the way that the command line names."""
    logging.disable(logging.WARNING)
    way, task = sys.argv[1], Task(**json.loads(sys.argv[2]))
    began: list[float] = []
    told = WAYS[way](task, lambda: began.extend((time.perf_counter(), time.process_time())))
    print(json.dumps({**told, "seconds": time.perf_counter() - began[0], "imports_cpu_s": began[1]}))


if __name__ == "__main__":
    from ways import main as main_of_module  # by whose name Ray's actors find what they run

    main_of_module()
