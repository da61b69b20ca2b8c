"""A whole training but for its engine: from a job to a plan, and a worker's share of the plan to weights."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError

from geoseg.config import PredictConfig, what_is_wrong
from geoseg.errors import ConfigError, SceneError, StopError
from geoseg.evaluate.calibrate import calibrated
from geoseg.evaluate.judge import EvaluationScene, evaluate_scenes
from geoseg.model.bundle import Bundle
from geoseg.model.description import BundleDescription, OutsideVariant, UNetVariant
from geoseg.model.light import NUM_MEASURES, NUM_STEPS, SceneLight, count_light
from geoseg.model.outside import Outside, measured
from geoseg.model.variants import build
from geoseg.predict.bundles import load_bundle, save_bundle
from geoseg.predict.failure import Failure
from geoseg.predict.mask import class_mask
from geoseg.predict.plan import NetworkSpec, plan_scene
from geoseg.predict.predictor import Predictor, network_spec
from geoseg.raster import store
from geoseg.raster.raster import Raster
from geoseg.train.augment import AugmentConfig
from geoseg.train.checkpoint import Position
from geoseg.train.chips import ChipReader, Place, Sampler, TrainScene
from geoseg.train.data import Found, check_classes, find_scenes, in_threads, keep_table, measure_light, table_uri
from geoseg.train.index import CellTable
from geoseg.train.job import TrainJob
from geoseg.train.log import MetricsLog
from geoseg.train.loop import Feed, Group, Trainer
from geoseg.train.loss import LossConfig
from geoseg.train.memory import keep_freed_memory
from geoseg.train.metrics import Counts, class_scores, mean_iou
from geoseg.train.plan import TrainPlan
from geoseg.train.report import ExampleChip
from geoseg.train.stages import Stage, check_workers, resolve_stages, warnings_of

WEIGHTS_VERSION = 1

_EXAMPLES = 8
_SHOWN_AS, _LIT_AS = 1 << 21, 1 << 22  # stages that no training has
_LIT_SCENES, _LIT_CHIPS = 64, 16

KeepTables = Callable[[Sequence[tuple[str, TrainScene]], float, int], list[CellTable | str]]
Tell = Callable[[str, Any], None]


@dataclass(frozen=True, slots=True)
class Prepared:
    """A plan, the scenes it is validated on, the names of the job's sources, and sentences on what is left out or has no effect."""

    plan: TrainPlan
    sources: tuple[str, ...]
    validate: tuple[TrainScene, ...]
    warnings: tuple[str, ...]


def prepare(job: TrainJob, *, keep_tables: KeepTables) -> Prepared:
    """All that can be known before the first step; ``keep_tables`` counts chip indexes, in threads or on a cluster.

    Raises ConfigError, NothingReadableError, BundleError, AccessDeniedError, StoreError.
    """
    out = store.normalize_uri(job.out).rstrip("/")
    found = find_scenes(job)
    model = job.model
    names = tuple(one.name for one in model.classes)
    start = load_bundle(model.start) if model.start is not None else None
    variant = _measured_variant(job)
    network = build(variant, len(model.bands), len(names), dates=model.dates)
    scenes, tables, uris, unreadable = _tables(found, out, job, keep_tables)
    check_classes(tables, names)
    labelled_m2 = sum(
        float(table.labelled.sum()) * scene.scene.grid.resolution_m**2
        for scene, table in zip(scenes, tables, strict=True)
    )
    stages = resolve_stages(
        job.stage, resolution_m=model.resolution_m, labelled_m2=labelled_m2, stride=network.stride, classes=names
    )
    check_workers(stages, job.cluster.most_workers)
    weights = tuple(source.weight if source.use != "validate" else 0.0 for source in job.source)
    chip_dtype = "uint8" if model.dtype == "uint8" and all(one.scale is None for one in scenes) else "float32"
    mean, std = model.mean, model.std
    if start is not None and mean is None:
        mean, std = start.description.mean, start.description.std
    if mean is None or std is None:
        sampler = Sampler(scenes, tables, weights, seed=job.seed)
        reader = ChipReader(scenes, dtype=chip_dtype, value_range=model.value_range)
        plain = _plain(stages[-1], model.resolution_m)
        mean, std = measure_light(sampler, plain, reader, num_bands=len(model.bands))
    description = _description(job, variant, mean, std)
    _check_start(start, description)
    plan = TrainPlan(
        out=out,
        seed=job.seed,
        description=description,
        codes=found.codes,
        scenes=scenes,
        tables=uris,
        weights=weights,
        stages=stages,
        optimizer=job.optimizer,
        start=model.start,
        checkpoint_every=job.checkpoint_every,
        margin=network.margin if not isinstance(network, Outside) else 0,
        settings="",
        chip_dtype=chip_dtype,
    )
    plan = replace(plan, settings=_digest(plan, found.validate, start))
    remarks = [f"{scene.scene.id}: {remark}" for scene in (*scenes, *found.validate) for remark in scene.labels.remarks]
    sources = tuple(source.name for source in job.source)
    told = [
        *found.skipped,
        *unreadable,
        *remarks,
        *warnings_of(job.stage, stages, has_validation=bool(found.validate)),
        *_stages_without_instances(plan, sources),
        *_costly_stages(plan),
    ]
    return Prepared(plan, sources, found.validate, tuple(told))


def _tables(
    found: Found, out: str, job: TrainJob, keep_tables: KeepTables
) -> tuple[tuple[TrainScene, ...], list[CellTable], tuple[str, ...], list[str]]:
    """The training scenes whose chip index could be counted, the indexes and where they are kept; why others could not."""
    uris = [table_uri(out, scene, job.model.resolution_m) for scene in found.train]
    counted = keep_tables(list(zip(uris, found.train, strict=True)), job.model.resolution_m, len(job.model.classes))
    good = [number for number, table in enumerate(counted) if isinstance(table, CellTable)]
    bad = [one for one in counted if isinstance(one, str)]
    if not good:
        raise ConfigError(f"no training scene can be read. {bad[0]}")
    return (
        tuple(found.train[number] for number in good),
        [table for table in counted if isinstance(table, CellTable)],
        tuple(uris[number] for number in good),
        bad,
    )


def try_to_keep_table(kept: tuple[str, TrainScene], resolution_m: float, num_classes: int) -> CellTable | str:
    """The chip index of a scene at its URI, or why it cannot be counted."""
    uri, scene = kept
    try:
        return keep_table(uri, scene, resolution_m=resolution_m, num_classes=num_classes)
    except SceneError as error:
        return str(error)


def keep_tables_in_threads(
    kept: Sequence[tuple[str, TrainScene]], resolution_m: float, num_classes: int
) -> list[CellTable | str]:
    """The chip indexes of scenes, counted in this process."""
    return list(in_threads(lambda one: try_to_keep_table(one, resolution_m, num_classes), kept))


def _measured_variant(job: TrainJob) -> UNetVariant | OutsideVariant:
    """The variant of the model; of a network from outside with its margin, which takes seconds."""
    variant = job.model.variant
    if not isinstance(variant, OutsideVariant):
        return variant
    padded = [number for number, stage in enumerate(job.stage, 1) if stage.padding == "valid"]
    if padded:
        raise ConfigError(
            f"stage {padded[0]}: padding = 'valid' is for networks of ours, a {variant.title} pads as it was made to; leave it out"
        )
    try:
        return measured(variant, len(job.model.bands))
    except ConfigError as error:
        raise ConfigError(f"model.variant: {error}") from error


def _description(
    job: TrainJob, variant: UNetVariant | OutsideVariant, mean: tuple[float, ...], std: tuple[float, ...]
) -> BundleDescription:
    model = job.model
    trained_on = ", ".join(source.name for source in job.source if source.use != "validate")
    try:
        return BundleDescription(
            name=model.name,
            variant=variant,
            dates=model.dates,
            bands=model.bands,
            dtype=model.dtype,
            value_range=model.value_range,
            resolution_m=model.resolution_m,
            mean=mean,
            std=std,
            classes=model.classes,
            origin=model.origin or f"Trained by geoseg on {trained_on}.",
        )
    except ValidationError as error:
        sentence = what_is_wrong(error, BundleDescription, model.model_dump(), below=("model",))
        raise ConfigError(sentence) from error


def _check_start(start: Bundle | None, description: BundleDescription) -> None:
    if start is None:
        return
    for name in ("variant", "dates", "bands"):
        theirs, ours = getattr(start.description, name), getattr(description, name)
        if theirs != ours:
            raise ConfigError(
                f"model.start: {start.description.name} has {name} {theirs}, the model {ours}; give both the same"
            )
    if len(start.description.classes) != len(description.classes):
        raise ConfigError(
            f"model.start: {start.description.name} has {len(start.description.classes)} classes, the model has "
            f"{len(description.classes)}"
        )


def _digest(plan: TrainPlan, validate: Sequence[TrainScene], start: Bundle | None) -> str:
    """A digest (hex) of all that decides the weights, the best ones among them."""
    told = {
        "version": WEIGHTS_VERSION,
        "seed": plan.seed,
        "description": plan.description.model_dump(mode="json", exclude={"origin"}),
        "sets": plan.codes.sets,
        "stages": [repr(stage) for stage in plan.stages],
        "optimizer": plan.optimizer.model_dump(mode="json"),
        "start": start.digest if start is not None else None,
        "tables": [store.base_name(uri) for uri in plan.tables],
        "weights": plan.weights,
        "scales": [(scene.source, scene.bands, scene.scale) for scene in plan.scenes],
        "validate": [(scene.scene.etag, scene.labels.digest) for scene in validate],
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _stages_without_instances(plan: TrainPlan, sources: Sequence[str]) -> list[str]:
    """A sentence for each stage and source whose labels leave open where the class is that border weights are for."""
    told = []
    for number, stage in enumerate(plan.stages, 1):
        code = plan.border_class(stage)
        unknown = {scene.source for scene in plan.scenes if code not in scene.found} if code is not None else set()
        told += [
            f"stage {number}: border has no effect on chips of source {sources[source]}, whose labels leave open where a "
            f"{stage.border.label} is"
            for source in sorted(unknown)
            if stage.border is not None
        ]
    return told


def _costly_stages(plan: TrainPlan) -> list[str]:
    """A sentence for each coarse stage that reads far more pixels than its chips have, for want of overviews."""
    told = []
    for number, stage in enumerate(plan.stages, 1):
        for scene in plan.scenes:
            rows = round(scene.scene.grid.height * scene.scene.grid.resolution_m / max(stage.resolutions_m))
            fitting = [level for level in scene.levels if level[0] >= rows]
            ratio = (min(level[0] for level in fitting) / rows) ** 2 if fitting else 1.0
            if ratio > 4.5:
                told.append(
                    f"stage {number}: {scene.scene.id} has no overview near {max(stage.resolutions_m):g} m, so {ratio:.0f} times "
                    "the pixels are read that its chips have; add overviews with gdaladdo -r average, or write it with "
                    "gdal_translate -of COG"
                )
                break
    return told


class Recorder:
    """Keeps what a training tells: metrics and bundles below ``out``; and passes it on to ``tell``."""

    def __init__(self, plan: TrainPlan, tell: Tell) -> None:
        self._plan, self._tell = plan, tell
        self._log = MetricsLog()
        self._warned: set[str] = set()

    def resumed(self, position: Position) -> None:
        """See ``Observer``."""
        self._log = MetricsLog.load(self._plan.out, up_to=(position.stage, position.total_steps))
        self._tell("resumed", position)

    def stepped(self, record: dict[str, Any]) -> None:
        """See ``Observer``."""
        self._log.add(record)
        self._tell("stepped", record)

    def evaluated(self, record: dict[str, Any]) -> None:
        """See ``Observer``."""
        self._log.add(record)
        self._tell("evaluated", record)

    def warned(self, sentence: str) -> None:
        """See ``Observer``; each sentence is told once."""
        if sentence not in self._warned:
            self._warned.add(sentence)
            self._tell("warned", sentence)

    def kept(self) -> None:
        """See ``Observer``."""
        self._log.write(self._plan.out)

    def exported(self, bundle: Bundle, name: str, stage: int) -> None:
        """See ``Observer``."""
        save_bundle(bundle, bundle_uri(self._plan.out, stage, name))


def bundle_uri(out: str, stage: int, name: str) -> str:
    """Where the ``best`` or ``last`` bundle of a stage, counted from 0, is put."""
    return store.join(out, f"stage-{stage + 1}", name)


def train_share(prepared: Prepared, feed: Feed, tell: Tell, *, group: Group, device: str) -> None:
    """One worker's part of a training, from the last checkpoint to the end. Raises StopError kinds, StoreError."""
    keep_freed_memory()
    plan = prepared.plan
    Trainer(
        plan,
        feed,
        Recorder(plan, tell),
        group=group,
        device=device,
        start=load_bundle(plan.start) if plan.start is not None else None,
        evaluate=Validation(prepared, device=device).scores if prepared.validate else None,
    ).run()


_ByScale = dict[tuple[float, float] | None, list[EvaluationScene]]


class Validation:
    """The validation scenes of a training, read as ``geoseg predict`` reads them, planned once for each resolution."""

    def __init__(self, prepared: Prepared, *, device: str) -> None:
        self._prepared, self._device = prepared, device
        self._planned: dict[float | None, _ByScale] = {}

    def scores(self, bundle: Bundle, group: Group) -> dict[str, float]:
        """The scores of a bundle of the training's network; the workers of the group share the windows.

        ``iou/<class>`` over all scenes, NaN for a class without any labelled pixel, and where there are several sources
        ``iou/<class>/<source>``. ``score`` is the mean IoU over classes that are not background and the sources that label
        them, so that no source decides alone. Raises StopError, on all workers, when a scene cannot be read.
        """
        groups = self._as_predicted(bundle)
        scenes = [scene for _, each in groups for scene in each]
        tallies = [
            tally
            for predictor, each in groups
            for tally in evaluate_scenes(predictor, each, share=(group.rank, group.world), quick=True)
        ]
        failures = [tally for tally in tallies if isinstance(tally, Failure)]
        by_source = {scene.source: Counts.zero(len(bundle.description.classes)) for scene in scenes}
        for scene, tally in zip(scenes, tallies, strict=True):
            if not isinstance(tally, Failure):
                by_source[scene.source] += tally.counts
        vector = np.stack([np.append(counts.to_vector(), len(failures)) for counts in by_source.values()])
        summed = group.sum(torch.from_numpy(vector).to(self._device)).cpu().numpy()
        if summed[:, -1].any():
            sentence = failures[0].sentence if failures else "another worker could not read its part"
            raise StopError(
                f"a validation scene cannot be evaluated: {sentence}; the same command goes on from the last checkpoint"
            )
        counted = [Counts.from_vector(row[:-1]) for row in summed]
        names = [one.name for one in bundle.description.classes]
        pooled = class_scores(sum(counted[1:], counted[0]))
        told = {f"iou/{name}": one.iou for name, one in zip(names, pooled, strict=True)}
        if len(counted) > 1:
            for source, counts in zip(by_source, counted, strict=True):
                ious = [one.iou for one in class_scores(counts)]
                each = zip(names[1:], ious[1:], strict=True)
                told |= {f"iou/{name}/{source}": iou for name, iou in each if not math.isnan(iou)}
        return {"score": mean_iou(counted), **told}

    def calibrated(self, bundle: Bundle) -> Bundle:
        """The bundle with the temperature and the thresholds that fit the scenes. Raises SceneError, StoreError."""
        return calibrated(bundle, self._as_predicted(bundle))

    def _as_predicted(self, bundle: Bundle) -> list[tuple[Predictor, list[EvaluationScene]]]:
        """The scenes, with the predictor for those whose raw values mean the same."""
        resolution_m = bundle.description.resolution_m
        if resolution_m not in self._planned:
            self._planned[resolution_m] = self._plan(bundle)
        return [
            (Predictor(bundle, PredictConfig(scale=scale, precision="float32"), device=self._device), scenes)
            for scale, scenes in self._planned[resolution_m].items()
        ]

    def _plan(self, bundle: Bundle) -> _ByScale:
        by_scale: _ByScale = {}
        prepared = self._prepared
        specs: dict[PredictConfig, NetworkSpec] = {}  # each builds the network, and most scenes are read alike
        for scene in prepared.validate:
            config = PredictConfig(
                bands=tuple(band + 1 for band in scene.bands),
                scale=scene.scale,
                warp_stacks=scene.warp,
                **asdict(scene.options),
            )
            if config not in specs:
                specs[config] = network_spec(bundle, config)
            plan = plan_scene(scene.ref, specs[config])
            one = EvaluationScene(prepared.sources[scene.source], plan, scene.labels, prepared.plan.codes, scene.found)
            by_scale.setdefault(scene.scale, []).append(one)
        return by_scale


def with_light(prepared: Prepared, bundle: Bundle) -> Bundle:
    """The bundle with the light of its training scenes, of 64 of them when they are more: 16 chips each, evenly placed.

    Scenes of which nothing can be read are left out. Raises StoreError.
    """
    plan, description = prepared.plan, bundle.description
    assert description.resolution_m is not None
    stage = _plain(plan.stages[-1], description.resolution_m)
    every = math.ceil(len(plan.scenes) / _LIT_SCENES)
    kept = list(zip(plan.tables, plan.scenes, strict=True))[::every]
    tables = keep_tables_in_threads(kept, description.resolution_m, plan.codes.num_classes)
    light = []
    for (_, scene), table in zip(kept, tables, strict=True):
        if not isinstance(table, CellTable):
            continue
        sampler = Sampler((scene,), [table], [1.0] * len(prepared.sources), seed=plan.seed)
        reader = ChipReader((scene,), dtype=plan.chip_dtype, value_range=description.value_range)
        counts = np.zeros((NUM_MEASURES, len(description.bands), NUM_STEPS), np.int64)
        for position in range(_LIT_CHIPS):
            chip = reader.read(sampler.draw(stage, Place(_LIT_AS, 0, position)), stage)
            for one in Raster(chip.pixels, chip.valid).dates():
                both = one.valid[:, :-1] & one.valid[:, 1:]
                here, right = one.pixels[:, :, :-1][:, both], one.pixels[:, :, 1:][:, both]
                counts += count_light(here, right, description.value_range)
        if counts.sum(2).all():
            light.append(SceneLight.of(prepared.sources[scene.source], counts))
    return Bundle(description=description.model_copy(update={"light": tuple(light)}), weights=bundle.weights)


def _plain(stage: Stage, resolution_m: float) -> Stage:
    """A stage as it is without anything that changes pixels or prefers some ground."""
    return replace(
        stage,
        resolutions_m=(resolution_m,),
        augment=AugmentConfig(flips_and_turns=False),
        focus=0.0,
        loss=LossConfig(),
        border=None,
    )


def example_chips(prepared: Prepared, bundle: Bundle, *, device: str) -> list[ExampleChip]:
    """Chips around classes, of the validation scenes where there are some, with what the bundle makes of them."""
    plan = prepared.plan
    predictor = Predictor(bundle, PredictConfig(precision="float32"), device=device)
    resolution_m = bundle.description.resolution_m
    assert resolution_m is not None
    stage = replace(
        plan.stages[-1],
        resolutions_m=(resolution_m,),
        augment=AugmentConfig(flips_and_turns=False),
        border=None,
        focus=1.0,
    )
    scenes = prepared.validate or plan.scenes
    cells_m = plan.description.resolution_m or resolution_m
    kept = [(table_uri(plan.out, scene, cells_m), scene) for scene in scenes]
    tables = keep_tables_in_threads(kept, cells_m, plan.codes.num_classes)
    good = [(scene, table) for scene, table in zip(scenes, tables, strict=True) if isinstance(table, CellTable)]
    scenes = tuple(scene for scene, _ in good)
    sampler = Sampler(scenes, [table for _, table in good], [1.0] * len(plan.weights), seed=plan.seed)
    chip_dtype = "float32" if any(scene.scale is not None for scene in scenes) else plan.chip_dtype
    reader = ChipReader(scenes, dtype=chip_dtype, value_range=plan.description.value_range)
    margin = predictor.network.margin if predictor.tiling is None else 0  # a chip would be lost in a tile
    logits_of = predictor.core_logits if predictor.tiling is None else predictor.chip_logits
    num_bands = len(plan.description.bands)
    examples = []
    for position in range(_EXAMPLES):
        chip = reader.read(sampler.draw(stage, Place(_SHOWN_AS, 0, position)), stage, context=margin)
        side = chip.labels.shape[0]
        core = slice(margin, margin + side), slice(margin, margin + side)
        around = Raster(chip.pixels, chip.valid)
        valid = around.valid_at_all[core]
        mask = class_mask(logits_of([around])[0], valid, bundle.description)
        if mask is not None:
            examples.append(ExampleChip(chip.pixels[:num_bands, core[0], core[1]], valid, chip.labels, mask))
    return examples
