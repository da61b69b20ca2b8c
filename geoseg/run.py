"""A whole prediction run: list the scenes, choose an engine, keep the output to oneself, tell what came of it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

from geoseg.config import ClusterConfig, Job, load_job
from geoseg.errors import ConfigError, OutputHeldError, StopError
from geoseg.evaluate.job import EvaluationJob, evaluate, judge_locally
from geoseg.evaluate.report import Evaluation
from geoseg.model.bundle import WEIGHTS_NAME
from geoseg.model.costs import peak_bytes, shadow_of
from geoseg.model.network import Network
from geoseg.predict.bundles import keep_bundle, load_bundle
from geoseg.predict.check import Checked, check_scene
from geoseg.predict.coarse import STRIP_ROWS
from geoseg.predict.drain import Drain
from geoseg.predict.failure import Failure
from geoseg.predict.ground import Ground, usual_shares
from geoseg.predict.guard import Guard
from geoseg.predict.index import Known, known_items, read_index
from geoseg.predict.lease import Lease
from geoseg.predict.ledger import Ledger, MaskFinder, PlannedWindows, SceneReport, prepare_windows
from geoseg.predict.local import predict_locally
from geoseg.predict.mask import uncertainty_bytes
from geoseg.predict.memory import set_memory_up
from geoseg.predict.output import list_output
from geoseg.predict.page import write_page
from geoseg.predict.parts import WORK_FOLDER, parts_of_scenes, sweep
from geoseg.predict.plan import ModelFile, RunSpec, ScenePlan
from geoseg.predict.predictor import network_spec, network_to_run
from geoseg.predict.progress import Progress
from geoseg.predict.record import RunReport, write_record
from geoseg.predict.sources import list_job
from geoseg.predict.turns import take_turns
from geoseg.raster import store
from geoseg.raster.geotiff import cache_bytes
from geoseg.raster.scene import SceneRef
from geoseg.raster.versions import Versions
from geoseg.raster.window import Window

_SMALL_WINDOWS = 256
_LOOK_AHEAD_SCENES = 16
_WAITING = 3  # batches whose layers are in hand: one is computed, up to two wait to be stored
_OF_LIBRARIES = 112 << 20  # scratch memory of a forward pass, encoders, what is in flight


def predict_from_settings(scenes: str | Sequence[str], out: str, **settings: Any) -> RunReport:
    """``geoseg.predict``: sorts keyword settings into the sections of a job. Raises ConfigError for unknown ones."""
    sources = [os.fspath(scenes)] if isinstance(scenes, (str, os.PathLike)) else [os.fspath(scene) for scene in scenes]
    values: dict[str, Any] = {"scenes": sources, "out": os.fspath(out), "predict": {}, "cluster": {}}
    for key, value in settings.items():
        section = "cluster" if key in ClusterConfig.model_fields else "predict"
        if key == "bundle":
            values["bundle"] = os.fspath(value)
        elif key in ("stack_by", "stacks"):
            values[key] = value
        else:
            values[section][key] = value
    return run_job(load_job(None, values), quiet=True)


def make_run_spec(job: Job) -> RunSpec:
    """What the scenes of a job share. Raises BundleError, ConfigError."""
    set_memory_up()
    if job.vectors is not None:  # whether it can be had is better known before the run
        import geoseg.vectorize  # noqa: F401
    bundle = load_bundle(job.bundle)
    network = network_spec(bundle, job.predict)
    return RunSpec(
        **{field.name: getattr(network, field.name) for field in fields(network)},
        out=store.normalize_uri(job.out).rstrip("/"),
        bundle_uri=job.bundle,
        model=ModelFile(
            path=f"{WORK_FOLDER}/bundles/{bundle.digest[:16]}/{WEIGHTS_NAME}",
            size=len(bundle.weights),
            sha256=hashlib.sha256(bundle.weights).hexdigest(),
        ),
        guard=Guard(limits=job.guard) if job.guard else None,
    )


def on_guard(run: RunSpec, masks: Mapping[str, Known]) -> tuple[RunSpec, MaskFinder | None]:
    """The run with what masks that stand usually look like, and how to find the last one of a scene's ground."""
    if run.guard is None:
        return run, None
    usual = usual_shares(masks.values(), bundle=run.bundle_digest)
    return replace(run, guard=replace(run.guard, usual=usual)), Ground(masks).before


def list_refs(job: Job, run: RunSpec) -> list[SceneRef]:
    """The scenes and stacks of a job, sorted by URI, each id once. Raises StopError kinds, NothingReadableError."""
    return list_job(job, run.out).refs


def run_job(job: Job, *, quiet: bool = False) -> RunReport:
    """Run a job to its end. Raises StopError kinds alone; KeyboardInterrupt passes through, finished work stays."""
    run = make_run_spec(job)
    listing = list_job(job, run.out)
    with Lease(run.out) as lease:
        run, before = on_guard(run, known_items(list_output(run.out), read_index(run.out)) if run.guard else {})
        report = predict_refs(
            job, run, listing.refs, lease, versions=listing.versions, kind="predict", quiet=quiet, before=before
        )
        report = with_vectors(replace(report, remarks=listing.remarks), job, lease, quiet=quiet)
        record = write_record(report, job, run, {ref.id: ref for ref in listing.refs})
        return write_page(report, record, run, {})


def with_vectors(report: RunReport, job: Job, lease: Lease, *, quiet: bool) -> RunReport:
    """The report of a run whose job has ``[vectors]``, with what it published traced under the run's lease.

    Traced are the scenes of the report, and those of the output whose vectors are missing or no newer than their item: a run
    before may have ended before it came to them. What keeps them from being traced is told. Raises OutputHeldError.
    """
    if job.vectors is None or report.num_left:
        return report
    from geoseg.vectorize import VectorsJob, trace_scenes

    output = list_output(report.out)
    looked_at = {scene.id for scene in report.scenes if scene.status in ("published", "unchanged")}
    late = {
        scene_id
        for scene_id, item in output.items.items()
        if scene_id not in output.vectors or output.vectors[scene_id].modified <= item.modified
    }
    wanted = sorted((looked_at & output.items.keys()) | late)
    vectors_job = VectorsJob(out=job.out, vectors=job.vectors, cluster=job.cluster)
    try:
        done = trace_scenes(vectors_job, output, wanted, lease, quiet=quiet)
    except OutputHeldError:
        raise
    except (StopError, KeyboardInterrupt) as error:
        told = f"vectors: {error}" if isinstance(error, StopError) else "vectors: interrupted while they were traced"
        return replace(report, remarks=(*report.remarks, told), num_untraced=len(wanted))
    failed = [one for one in done.traced if one.status == "failed"]
    return replace(report, remarks=(*report.remarks, *done.summary()), num_untraced=len(failed))


def run_evaluation(job: EvaluationJob) -> Evaluation:
    """Evaluate a bundle, on Ray when an address or several workers are named. Raises StopError kinds alone."""
    cluster = job.cluster
    if cluster.engine == "ray" or (cluster.engine == "auto" and (cluster.address or (cluster.workers or 1) > 1)):
        from geoseg.cluster.evaluate import judge_on_cluster

        return evaluate(job, partial(judge_on_cluster, cluster=cluster))
    return evaluate(job, judge_locally)


def choose_engine(job: Job, run: RunSpec, refs: Sequence[SceneRef]) -> str:
    """``local`` or ``ray``: what the job says, else Ray for an address, several workers or much work.

    Starting Ray costs about ten seconds; a loop is done by then with small work.
    """
    cluster = job.cluster
    if cluster.engine != "auto":
        if cluster.engine == "local" and (cluster.address or (cluster.workers or 1) > 1):
            raise ConfigError("--engine local is one process: leave out --address and --workers, or take --engine ray")
        return cluster.engine
    if cluster.address or (cluster.workers or 1) > 1 or len(refs) > _SMALL_WINDOWS:
        return "ray"
    windows = 0
    for ref in refs[:_LOOK_AHEAD_SCENES]:
        found = prepare_windows(replace(ref, sums=()), run, only_todo=True)
        windows += found.num if isinstance(found, PlannedWindows) else 0
    return "ray" if windows * len(refs) / min(len(refs), _LOOK_AHEAD_SCENES) > _SMALL_WINDOWS else "local"


def predict_refs(
    job: Job,
    run: RunSpec,
    refs: Sequence[SceneRef],
    lease: Lease,
    *,
    versions: Versions,
    kind: str,
    quiet: bool,
    before: MaskFinder | None = None,
) -> RunReport:
    """Predict and publish these scenes under the lease held on the output. Raises StopError kinds alone.

    ``versions`` gets to know how large they are, ``before`` finds the last mask of a scene's ground. A signal ends it in good
    order: see ``Drain``.
    """
    if not refs:
        return RunReport(kind=kind, run_id=lease.run_id, out=run.out, engine="none", scenes=())
    engine = choose_engine(job, run, refs)
    progress = Progress(len(refs), quiet=quiet)
    keep_bundle(run)
    versions.look_up(uri for ref in refs for uri in ref.uris)
    turns, ledger = take_turns(refs, versions), Ledger(progress, before=before)
    if engine == "ray":
        from geoseg.cluster.predict import predict_on_cluster

        predict = partial(predict_on_cluster, cluster=job.cluster, run_id=lease.run_id)
    else:
        predict = partial(predict_locally, read_threads=job.cluster.read_threads)
    with Drain() as drain:
        try:
            predict(turns, run, ledger, check=lease.check, drain=drain)
        except KeyboardInterrupt:
            if not drain.is_late:
                raise
    sweep(
        parts_of_scenes(run.out),
        {one.id: one.fingerprint for one in ledger.reports if one.status in ("published", "unchanged")},
    )
    if progress.windows_done:
        progress.show(last=True)
    working_h = progress.working_s / 3600
    return RunReport(
        kind=kind,
        run_id=lease.run_id,
        out=run.out,
        engine=engine,
        scenes=tuple(sorted(ledger.reports, key=lambda report: report.uri)),
        num_left=len(refs) - len(ledger.reports),
        windows=progress.windows_done,
        pixels=progress.pixels_done,
        area_km2=progress.area_km2,
        bytes_read=progress.bytes_fetched,
        gpu_hours=progress.num_gpus * working_h,
        cpu_hours=progress.num_cpus * working_h,
        startup_s=progress.startup_s,
        working_s=progress.working_s,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class JobPlan:
    """What a job would do: a line for each scene, and in sum. Sizes in bytes."""

    scenes: tuple[str, ...]
    windows: int
    pixels: int
    bytes_to_read: int
    bytes_to_write: int
    memory_bytes: int

    def lines(self) -> list[str]:
        """The plan for a person, a line for each scene and one in sum."""
        in_sum = (
            f"in sum: {len(self.scenes)} scenes, {self.windows} windows, {self.pixels / 1e6:.1f} Mpx, about "
            f"{self.bytes_to_read / 1e6:.1f} MB to read, {self.bytes_to_write / 1e6:.1f} MB to write, "
            f"{self.memory_bytes / 2**20:.0f} MiB at peak in a worker beside Python and torch"
        )
        return [*self.scenes, in_sum]


def plan_job(job: Job) -> JobPlan:
    """What ``run_job`` would do. Reads headers and block indexes alone and writes nothing."""
    run = make_run_spec(job)
    shadow = shadow_of(network_to_run(load_bundle(job.bundle), job.predict))
    if run.tiling is None:
        shadow.padding = "valid"
    told: list[str] = []
    windows = pixels = bytes_to_read = memory_bytes = 0
    for ref in list_refs(job, run):
        found = prepare_windows(replace(ref, sums=()), run, only_todo=True)
        if isinstance(found, Failure):
            found.raise_if_stop()
            told.append(f"{ref.id}: refused. {found.sentence}")
        elif isinstance(found, SceneReport):
            told.append(f"{ref.id}: {found.status}")
        else:
            plan, grid = found.plan, found.plan.scene.grid
            told.append(_told(found))
            windows += found.num
            pixels += grid.width * grid.height * found.num // plan.num_windows
            bytes_to_read += _bytes_to_read(found)
            memory_bytes = max(memory_bytes, _memory_bytes(plan, run, shadow))
    return JobPlan(
        scenes=tuple(told),
        windows=windows,
        pixels=pixels,
        bytes_to_read=bytes_to_read,
        bytes_to_write=pixels // 25 * (1 + 5 * _num_probabilities(run)) + pixels * bool(run.config.uncertainty),
        memory_bytes=memory_bytes,
    )


def _told(found: PlannedWindows) -> str:
    plan, grid, work = found.plan, found.plan.scene.grid, found.plan.stitching.work_shape
    read_at = (
        "its own pixels" if plan.stitching.is_native else f"{work[1]} x {work[0]} from overview {plan.stitching.level}"
    )
    if plan.coarse is not None:
        rows, cols = plan.coarse.work_shape
        read_at = f"{cols} x {rows} from overview {plan.coarse.level}, then where that sees something on {read_at}"
    return (
        f"{plan.scene.id}: {grid.width} x {grid.height} px of {grid.resolution_m:.3g} m, {found.num} of {plan.num_windows} "
        f"windows of {plan.window} to do, network on {read_at}"
    )


def _bytes_to_read(found: PlannedWindows) -> int:
    """Bytes of the blocks under the windows to do, at the levels read, each block once, and their share of the mask."""
    reader = found.plan.reader()
    levels = {found.plan.stitching.level} | ({found.plan.coarse.level} if found.plan.coarse is not None else set())
    return int(sum(reader.stored_bytes(window, level=level) for window in found.each for level in levels))


def _memory_bytes(plan: ScenePlan, run: RunSpec, shadow: Network) -> int:
    """Peak of a worker: the network's tensors for one batch, the pixels read ahead, caches."""
    grid = plan.scene.grid
    core = plan.stitching.core(Window(0, 0, min(plan.window, grid.width), min(plan.window, grid.height)))
    around = core.grown(run.margin)
    shape = (run.config.batch or 1, run.description.num_channels, around.height, around.width)
    tiled_bytes = 0
    if run.tiling is not None:  # the network sees a tile, beside it stand the window's image and the logits
        tiled_bytes = 4 * around.height * around.width * (run.description.num_channels + len(run.description.classes))
        shape = (1, run.description.num_channels, run.tiling.tile, run.tiling.tile)
    read_ahead = 6 * around.height * around.width * (len(plan.bands) + 1) * run.description.dates
    caches = cache_bytes(plan.decoded_bytes)
    beside = tiled_bytes + read_ahead + _layer_bytes(plan, run) + _coarse_bytes(plan, run) + caches + _OF_LIBRARIES
    return peak_bytes(shadow, shape) + beside


def _coarse_bytes(plan: ScenePlan, run: RunSpec) -> int:
    """What a coarse pass adds: its pixels read ahead, a strip of them in the making, and logits that wait for finer ones."""
    grid, coarse = plan.scene.grid, plan.coarse
    if coarse is None:
        return 0
    window = Window(0, 0, min(plan.window, grid.width), min(plan.window, grid.height))
    around = coarse.core(window).grown(coarse.margin)
    num_bands = (len(plan.bands) + 1) * run.description.dates
    rows, cols = (have / want for have, want in zip(coarse.level_shape, coarse.work_shape, strict=True))
    strip = min(STRIP_ROWS, around.height) * around.width * rows * cols
    waiting = len(run.description.classes) * window.height * window.width * (run.config.batch or 1)
    return 6 * around.height * around.width * num_bands + int(4 * 4 * strip * num_bands) + 4 * waiting


def _layer_bytes(plan: ScenePlan, run: RunSpec) -> int:
    """Layers beside the mask: of the windows that wait to be stored, and the doubles from which uncertainty is made."""
    grid = plan.scene.grid
    height, width = min(plan.window, grid.height), min(plan.window, grid.width)
    num_bands = _num_probabilities(run) + bool(run.config.uncertainty)
    waiting = num_bands * height * width * _WAITING * (run.config.batch or 1)
    return waiting + uncertainty_bytes(width, len(run.description.classes)) * bool(run.config.uncertainty)


def _num_probabilities(run: RunSpec) -> int:
    return len(run.description.classes) if run.config.probabilities else 0


def check_job(job: Job) -> list[Checked]:
    """What geoseg sees in each scene of a job and what it would refuse."""
    run = make_run_spec(job)
    return [check_scene(ref, run) for ref in list_refs(job, run)]
