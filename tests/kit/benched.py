"""What benchmarks of whole runs share: a generated scene where a run finds it, and the bare forward pass over its windows."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from geoseg.config import load_job
from geoseg.model.costs import count_costs
from geoseg.predict.bundles import bundle_of
from geoseg.predict.plan import plan_scene
from geoseg.predict.predictor import network_to_run
from geoseg.predict.reading import Task
from geoseg.predict.worker import Worker
from geoseg.raster import store
from geoseg.raster.scene import SceneRef
from geoseg.raster.synthetic import synthetic_image
from geoseg.run import make_run_spec
from kit.object_store import is_installed, running_store
from kit.oracle import write_scene

STORES = ("bucket", "folder")
_BUCKET = "geoseg-bench"


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchedScene:
    """A scene: its URI, its file, the URI below which results go, and the environment of programs that read it there."""

    uri: str
    path: Path
    root: str
    environment: Mapping[str, str]


@contextmanager
def benched_scene(side: int, *, where: str) -> Iterator[BenchedScene]:
    """A generated scene of ``side`` x ``side`` pixels in the real object store or in a folder, for the length of the block.

    Meanwhile the ``AWS_`` variables of this process lead to the store. Raises SystemExit when it is not installed.
    """
    made = synthetic_image(side, side, seed=1, nodata_fraction=0)
    # geoseg has set GDAL up for itself in this process.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GDAL_")}
    with tempfile.TemporaryDirectory(prefix="geoseg-bench-") as folder:
        path = write_scene(Path(folder) / "scene.tif", made.pixels_bhw, blockxsize=512, blockysize=512)
        if where == "folder":
            yield BenchedScene(uri=str(path), path=path, root=f"{folder}/out", environment=environment)
            return
        if not is_installed():
            raise SystemExit(
                "a real S3 server is not installed; get it with: infra/object-store.sh install, or say --store folder"
            )
        with running_store(Path(folder) / "store") as server:
            for_clients = server.environment()
            os.environ.update(for_clients)
            server.make_bucket(_BUCKET)
            uri = f"s3://{_BUCKET}/scenes/scene.tif"
            store.write(uri, path.read_bytes())
            for_gdal = {
                "AWS_S3_ENDPOINT": urlsplit(server.endpoint).netloc,
                "AWS_HTTPS": "NO",
                "AWS_VIRTUAL_HOSTING": "FALSE",
            }
            yield BenchedScene(
                uri=uri, path=path, root=f"s3://{_BUCKET}", environment={**environment, **for_clients, **for_gdal}
            )


class BarePass:
    """The network alone over every fourth window of a scene, as a run with these settings would cut it, pixels in memory.

    ``computed_per_kept``: operations for a pixel of a window with its margin, against those for a pixel of an endless image.
    """

    def __init__(self, scene: str, *, bundle: str, predict: Mapping[str, Any]) -> None:
        run = make_run_spec(
            load_job(None, {"scenes": [scene], "out": f"{scene}.bare", "bundle": bundle, "predict": dict(predict)})
        )
        plan = plan_scene(SceneRef("scene", scene), run)
        tasks = [Task(plan, window) for window in plan.windows(plan.reader())][::4]
        self._worker = Worker(run)
        self._around = [around for task in tasks if (around := self._worker.reader.read(task).around) is not None]
        self._pixels = sum(task.window.width * task.window.height for task in tasks)
        network = network_to_run(bundle_of(run), run.config)
        costs = count_costs(network, run.description.num_channels, core=plan.window)
        self.window = plan.window
        self.computed_per_kept = costs.flops_in_window / costs.flops_per_pixel
        self._worker.predictor.core_logits(self._around[:1])

    def rate(self) -> tuple[float, float]:
        """Pixels per second, and CPU seconds per pixel."""
        start, start_cpu = time.perf_counter(), time.process_time()
        for raster in self._around:
            self._worker.predictor.core_logits([raster])
        seconds, cpu_s = time.perf_counter() - start, time.process_time() - start_cpu
        return self._pixels / seconds, cpu_s / self._pixels
