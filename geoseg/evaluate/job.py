"""A whole evaluation: the scenes of each source through the network, and tables, maps and pictures of what came of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, islice
from operator import itemgetter
from typing import Annotated

from pydantic import Field, model_validator

from geoseg.config import DEFAULT_BUNDLE, ClusterConfig, PredictConfig, Section
from geoseg.errors import ConfigError
from geoseg.evaluate.judge import EvaluationScene, Judge, Tally, error_codes, error_map, find_scene, joined_as_they_come
from geoseg.evaluate.picture import Sample, error_colors, reliability_picture, sample, scene_picture
from geoseg.evaluate.report import Evaluation, SceneResult
from geoseg.model.bundle import Bundle
from geoseg.model.description import ClassName
from geoseg.predict.bundles import load_bundle
from geoseg.predict.failure import Failure, attempt
from geoseg.predict.memory import set_memory_up
from geoseg.predict.predictor import Predictor, default_device, network_spec
from geoseg.raster import store
from geoseg.raster.cog import Block, CogAssembler, CogProfile, encode_window
from geoseg.raster.scene import SceneRef
from geoseg.raster.stack import list_sources
from geoseg.raster.window import Window
from geoseg.train.codes import LabelCodes
from geoseg.train.labels import labelled_classes
from geoseg.train.sources import SourceConfig

REPORT_NAME, RELIABILITY_NAME = "evaluation.json", "reliability.png"
_AT_ONCE = 16


class EvaluationJob(Section):
    """Which labelled scenes, which bundle, where to, and how; ``predict`` and ``cluster`` as in a prediction."""

    source: Annotated[tuple[SourceConfig, ...], Field(min_length=1)]
    out: str
    bundle: str = DEFAULT_BUNDLE
    predict: PredictConfig = PredictConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _names_differ(self) -> EvaluationJob:
        names = [source.name for source in self.source]
        if len(set(names)) < len(names):
            raise ValueError(f"sources need names of their own, got {', '.join(names)}")
        idle = [
            name
            for name in ("probabilities", "uncertainty", "batch", "coarse", "max_seam_score")
            if getattr(self.predict, name)
        ]
        if idle:
            raise ValueError(f"predict's {' and '.join(idle)} have no effect on an evaluation; leave them out")
        return self


@dataclass(frozen=True, slots=True)
class JudgedPart:
    """What is left of some windows of a scene: their tally, the blocks of the error map, pixels for the picture."""

    tally: Tally
    blocks: list[Block]
    samples: list[Sample]


def judge_part(
    judge: Judge, scene: EvaluationScene, windows: Sequence[Window], value_range: tuple[float, float]
) -> JudgedPart | Failure:
    """Windows of a scene judged, or why they are not; pictures go from black to white over ``value_range``."""

    def judged_part() -> JudgedPart:
        tallies: list[Tally] = []
        blocks: list[Block] = []
        samples: list[Sample] = []
        for judged in judge.windows(scene, windows, quick=False):
            tallies.append(judged.tally)
            errors_hw = error_map(judged.mask_hw, judged.labels_hw, scene.codes)
            blocks += encode_window(errors_hw[None], judged.window, scene.plan.window)
            few = sample(scene, judged, value_range)
            samples += [few] if few is not None else []
        return JudgedPart(joined_as_they_come(tallies, scene.codes.num_classes), blocks, samples)

    return attempt(judged_part, scene.plan.scene.id, "evaluating")


def list_parts(scene: EvaluationScene, at_once: int) -> Iterator[list[Window] | Failure]:
    """The windows of a scene, some together, once none when it has none; or why they cannot be listed."""
    listed = attempt(lambda: scene.plan.windows(scene.plan.reader()), scene.plan.scene.id, "listing its windows")
    if isinstance(listed, Failure):
        yield listed
        return
    yield list(islice(listed, at_once))
    while some := list(islice(listed, at_once)):
        yield some


Engine = Callable[[Bundle, PredictConfig, Sequence[EvaluationScene]], Iterator[tuple[int, JudgedPart | Failure]]]


def judge_locally(
    bundle: Bundle, config: PredictConfig, scenes: Sequence[EvaluationScene]
) -> Iterator[tuple[int, JudgedPart | Failure]]:
    """The plain loop: parts of scene after scene, with the scene's place."""
    judge = Judge(Predictor(bundle, config, device=default_device()))
    value_range = config.scale or bundle.description.value_range
    for place, scene in enumerate(scenes):
        for windows in list_parts(scene, _AT_ONCE):
            part = windows if isinstance(windows, Failure) else judge_part(judge, scene, windows, value_range)
            yield place, part
            if isinstance(part, Failure):
                break


def evaluate(job: EvaluationJob, engine: Engine) -> Evaluation:
    """Run an evaluation to its end and write what came of it, the report last. Raises StopError kinds alone."""
    set_memory_up()
    out, bundle = store.normalize_uri(job.out).rstrip("/"), load_bundle(job.bundle)
    spec, names = network_spec(bundle, job.predict), [one.name for one in bundle.description.classes]
    codes = LabelCodes.for_sources(len(names), [labelled_classes(source.labels, names) for source in job.source])
    scenes: list[EvaluationScene] = []
    results: dict[tuple[str, str], SceneResult] = {}
    for source in job.source:
        for ref in _refs(source, out):
            found = find_scene(ref, source, spec, codes)
            results[source.name, ref.id] = SceneResult(source=source.name, id=ref.id, uri=ref.uri)
            if isinstance(found, Failure):
                results[source.name, ref.id] = _not_judged(results[source.name, ref.id], found)
            else:
                scenes.append(found)
    for place, parts in groupby(engine(bundle, job.predict, scenes), key=itemgetter(0)):
        scene = scenes[place]
        key, each = (scene.source, scene.plan.scene.id), (part for _, part in parts)
        put = attempt(
            partial(_put_together, results[key], scene, each, bundle.description.classes, out),
            key[1],
            "storing its maps",
        )
        results[key] = _not_judged(results[key], put) if isinstance(put, Failure) else put
    evaluation = Evaluation(bundle=bundle, config=job.predict, sources=job.source, scenes=tuple(results.values()))
    classes = bundle.description.classes
    store.write(store.join(out, RELIABILITY_NAME), reliability_picture(evaluation.counts_of(None), classes))
    store.write(store.join(out, REPORT_NAME), evaluation.to_json().encode())
    return evaluation


def _refs(source: SourceConfig, out: str) -> list[SceneRef]:
    refs = list_sources(source.scenes, source.stack_by, out=out)
    twice = [name for name, num in Counter(ref.id for ref in refs).items() if num > 1]
    if twice:
        raise ConfigError(f"source {source.name}: has two scenes or stacks {twice[0]}; give one of them another name")
    return sorted(refs, key=lambda ref: ref.uri)


def _not_judged(result: SceneResult, failure: Failure) -> SceneResult:
    failure.raise_if_stop()
    return replace(result, sentence=failure.sentence, denied=failure.denied)


def _put_together(
    result: SceneResult,
    scene: EvaluationScene,
    parts: Iterator[JudgedPart | Failure],
    classes: tuple[ClassName, ...],
    out: str,
) -> SceneResult:
    """A scene's counts, its error map and its picture, from its parts."""
    plan, samples = scene.plan, list[Sample]()
    failures: list[Failure] = []
    with CogAssembler(plan.scene.grid, _error_profile(classes)) as assembler:

        def tallies() -> Iterator[Tally]:
            for part in parts:
                if isinstance(part, Failure):
                    failures.append(part)
                else:
                    assembler.add(part.blocks)
                    samples.extend(part.samples)
                    yield part.tally

        tally = joined_as_they_come(tallies(), len(classes))
        if failures:
            return _not_judged(result, failures[0])
        assembler.make_overviews(plan.window)
        map_name = f"errors/{result.source}/{result.id}.tif"
        store.write_stream(store.join(out, map_name), assembler.finish().chunks)
    picture_name = f"pictures/{result.source}/{result.id}.png"
    picture = scene_picture(plan.stitching.scene_shape, samples, classes)
    store.write(store.join(out, picture_name), picture)
    return replace(
        result,
        resolution_m=plan.scene.grid.resolution_m,
        counts=Tally.joined([tally], len(classes), complete=True).counts,
        files=(("error_map", map_name), ("picture", picture_name)),
    )


def _error_profile(classes: tuple[ClassName, ...]) -> CogProfile:
    names = [*(f"{one.name}, right" for one in classes), *error_codes(len(classes))]
    tags = tuple((f"CODE_{code}", name) for code, name in enumerate(names))
    return CogProfile(
        num_bands=1,
        colors=error_colors(classes),
        tags=(*tags, ("CODE_255", "not known")),
        band_names=("errors",),
        scale=None,
    )
