"""A whole training run: prepare, choose an engine, show how it goes, and put out the bundle and pictures of what came of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from geoseg.errors import ConfigError
from geoseg.predict.bundles import load_bundle, save_bundle
from geoseg.predict.lease import Lease
from geoseg.predict.predictor import default_device
from geoseg.raster import store
from geoseg.train.checkpoint import Position
from geoseg.train.feed import feed_from_threads
from geoseg.train.job import TrainClusterConfig, TrainJob
from geoseg.train.log import MetricsLog
from geoseg.train.loop import Group
from geoseg.train.progress import StageWork, TrainProgress
from geoseg.train.report import chips_png, curves_png
from geoseg.training import (
    Prepared,
    Validation,
    bundle_uri,
    example_chips,
    keep_tables_in_threads,
    prepare,
    train_share,
    with_light,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingReport:
    """What came of a training: where its bundle and pictures are, the last scores, and what it took."""

    bundle: str
    temperature: float
    thresholds: tuple[tuple[str, float], ...]
    curves: str
    chips: str
    steps: int
    seconds: float
    gflop: float
    scores: Mapping[str, int | float | str | None]
    waiting: float

    def lines(self) -> list[str]:
        """The report for a person."""
        scores = ", ".join(
            f"{name.removeprefix('iou/')} {value:.3f}"
            for name, value in self.scores.items()
            if name.startswith("iou/") and isinstance(value, float)
        )
        thresholds = ", ".join(f"{name} {value:.3f}" for name, value in self.thresholds)
        return [
            f"{self.steps} steps in {self.seconds:.1f} s, {self.gflop / 1e3:.1f} TFLOP, {self.waiting:.1%} of it waiting for chips",
            *([f"IoU      {scores} (on the validation scenes)"] if scores else []),
            *([f"fitted   temperature {self.temperature:g}, thresholds {thresholds}"] if self.thresholds else []),
            f"bundle   {self.bundle}",
            f"curves   {self.curves}",
            f"chips    {self.chips}",
        ]


def run_training(job: TrainJob, *, warn: Callable[[str], None], quiet: bool = False) -> TrainingReport:
    """Run a training, or go on with it, to its end; ``warn`` is told what is left out and what has no effect.

    Raises StopError kinds, StoreError; KeyboardInterrupt passes through, and the same job goes on from the last checkpoint.
    """
    out = store.normalize_uri(job.out).rstrip("/")
    with Lease(out) as lease:
        shown = _Shown(warn, lease.check, quiet=quiet)
        if _engine(job.cluster) == "ray":
            prepared = _train_on_ray(job, shown)
        else:
            prepared = _prepare(job, shown, keep_tables_in_threads)
            train_share(
                prepared,
                partial(feed_from_threads, threads=job.cluster.read_threads),
                shown.tell,
                group=Group(),
                device=default_device(),
            )
        shown.end()
        return _finish(prepared, calibrated=job.calibrate and bool(prepared.validate))


def _engine(cluster: TrainClusterConfig) -> str:
    several = cluster.workers != 1
    if cluster.engine == "auto":
        return "ray" if cluster.address or several else "local"
    if cluster.engine == "local" and (cluster.address or several):
        raise ConfigError("engine = 'local' is one process: leave out address and workers, or take engine = 'ray'")
    return cluster.engine


def _train_on_ray(job: TrainJob, shown: _Shown) -> Prepared:
    from geoseg.cluster.session import session
    from geoseg.cluster.train import keep_tables_on_cluster, train_on_cluster

    cluster = job.cluster
    with session(cluster.address, workers=cluster.most_workers, spare_cpus=cluster.read_cpus) as can_grow:
        prepared = _prepare(job, shown, keep_tables_on_cluster)
        train_on_cluster(prepared, cluster, shown.tell, can_grow=can_grow)
    return prepared


def _prepare(job: TrainJob, shown: _Shown, keep_tables: Any) -> Prepared:
    prepared = prepare(job, keep_tables=keep_tables)
    plan = prepared.plan
    shown.begin(prepared)
    told = {
        "job": job.model_dump(mode="json", by_alias=True),
        "settings": plan.settings,
        "stages": [asdict(stage) | {"loss": stage.loss.model_dump(mode="json")} for stage in plan.stages],
        "mean": plan.description.mean,
        "std": plan.description.std,
        "train": [scene.scene.id for scene in plan.scenes],
        "validate": [scene.scene.id for scene in prepared.validate],
        "warnings": prepared.warnings,
    }
    text = json.dumps(store.redacted(told), indent=1, allow_nan=False, default=_plain)
    store.write(store.join(plan.out, "job.json"), text.encode())
    return prepared


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json")


def _finish(prepared: Prepared, *, calibrated: bool) -> TrainingReport:
    """Put out the bundle, the best of the last stage, on request calibrated, and the pictures."""
    plan = prepared.plan
    last = len(plan.stages) - 1
    bundle = load_bundle(bundle_uri(plan.out, last, "best" if prepared.validate else "last"))
    scores: Mapping[str, int | float | str | None] = {}
    if calibrated:
        validation = Validation(prepared, device=default_device())
        bundle = validation.calibrated(bundle)
        scores = validation.scores(bundle, Group())
    bundle = with_light(prepared, bundle)
    report_uris = {name: store.join(plan.out, f"{name}.png") for name in ("curves", "chips")}
    target = store.join(plan.out, "bundle")
    save_bundle(bundle, target)
    records = MetricsLog.load(plan.out, up_to=(len(plan.stages), plan.num_steps)).records
    store.write(report_uris["curves"], curves_png({plan.description.name: records}))
    chips = example_chips(prepared, bundle, device=default_device())
    store.write(report_uris["chips"], chips_png(chips, plan.description.classes, plan.codes))
    steps = [record for record in records if record["kind"] == "train"]
    of_last = [record for record in records if record["kind"] == "validate" and record["stage"] == last]
    waited = sum(_number(record, "waited_s") for record in steps)
    return TrainingReport(
        bundle=target,
        temperature=bundle.description.temperature,
        thresholds=tuple((one.name, one.threshold) for one in bundle.description.classes[1:]) if calibrated else (),
        curves=report_uris["curves"],
        chips=report_uris["chips"],
        steps=len(steps),
        seconds=_number(steps[-1], "seconds"),
        gflop=_number(steps[-1], "gflop"),
        scores=scores or max(of_last, key=lambda record: _number(record, "score"), default={}),
        waiting=waited / max(1e-9, _number(steps[-1], "seconds")),
    )


def _number(record: Mapping[str, int | float | str | None], name: str) -> float:
    value = record.get(name)
    return float(value) if isinstance(value, (int, float)) else 0.0


class _Shown:
    """What a person sees of a training while it runs."""

    def __init__(self, warn: Callable[[str], None], check: Callable[[], None], *, quiet: bool) -> None:
        self._warn, self._check, self._quiet = warn, check, quiet
        self._progress: TrainProgress | None = None
        self._stage = -1
        self._chips: list[int] = []

    def begin(self, prepared: Prepared) -> None:
        """The plan is there."""
        for sentence in prepared.warnings:
            self._warn(sentence)
        stages = prepared.plan.stages
        self._chips = [stage.batch for stage in stages]
        self._progress = TrainProgress(
            [StageWork(stage.bundle_resolution_m, stage.steps, stage.batch * stage.chip**2) for stage in stages],
            quiet=self._quiet,
        )

    def tell(self, kind: str, what: Any) -> None:
        """What training tells."""
        self._check()
        progress = self._progress
        assert progress is not None
        if kind == "warned":
            self._warn(what)
        elif kind == "resumed":
            self._resumed(what, progress)
        elif kind == "stepped":
            if what["stage"] != self._stage:
                self._stage = what["stage"]
                progress.stage_started(self._stage, steps_done=what["stage_step"] - 1)
            progress.step_done(what["loss"], num_chips=self._chips[self._stage], waited_s=what["waited_s"])
        else:
            iou = {name.removeprefix("iou/"): value for name, value in what.items() if name.count("/") == 1}
            progress.validated(iou)

    def _resumed(self, position: Position, progress: TrainProgress) -> None:
        if position.stage < len(self._chips):
            self._stage = position.stage
            progress.stage_started(position.stage, steps_done=position.step)
        if position.total_steps:
            self._warn(f"going on from the checkpoint of step {position.step} of stage {position.stage + 1}")

    def end(self) -> None:
        """Training is done."""
        if self._progress is not None and self._stage >= 0:
            self._progress.show(last=True)
