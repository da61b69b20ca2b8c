"""From sources to scenes: found, described, with labels that fit, split by place, their cells counted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import shapely

from geoseg.errors import BandError, ConfigError, NothingReadableError, SceneError, StackError
from geoseg.raster import store
from geoseg.raster.geotiff import ReadOptions, describe
from geoseg.raster.grid import Grid
from geoseg.raster.scene import Scene, SceneRef
from geoseg.raster.stack import describe_stack, list_sources
from geoseg.raster.window import Window
from geoseg.raster.work import WorkGrid
from geoseg.train.chips import ChipReader, Place, Sampler, TrainScene
from geoseg.train.codes import LabelCodes
from geoseg.train.index import CellTable, count_cells, kept_table
from geoseg.train.job import ModelConfig, TrainJob, TrainSource
from geoseg.train.labels import find_labels, found_classes, labelled_classes
from geoseg.train.stages import Stage

_CELL_PX = 64  # at the bundle's resolution
_MEASURED_CHIPS = 64
_MEASURED_AS = 1 << 20  # a stage that no training has
_FOLDER = "index"
_THREADS = 8
_A = TypeVar("_A")
_B = TypeVar("_B")


@dataclass(frozen=True, slots=True)
class Found:
    """The scenes of a job. ``skipped`` are sentences on those that cannot be used."""

    codes: LabelCodes
    train: tuple[TrainScene, ...]
    validate: tuple[TrainScene, ...]
    skipped: tuple[str, ...]


def find_scenes(job: TrainJob) -> Found:
    """The scenes of all sources, each with its labels.

    A scene that cannot be used is skipped with a sentence. Raises NothingReadableError when a source has none left, ConfigError for
    what is wrong with a source as a whole and for validation scenes that share ground with training scenes.
    """
    names = tuple(one.name for one in job.model.classes)
    codes = LabelCodes.for_sources(len(names), [labelled_classes(source.labels, names) for source in job.source])
    train: list[TrainScene] = []
    validate: list[TrainScene] = []
    skipped: list[str] = []
    for number, source in enumerate(job.source):
        scenes: list[TrainScene] = []
        for found in in_threads(_Describe(number, source, job.model, codes), _refs(source, job.out)):
            if isinstance(found, TrainScene):
                scenes.append(found)
            else:
                skipped.append(f"source {source.name}: {found}")
        if not scenes:
            raise NothingReadableError(f"source {source.name}: none of its scenes can be used. {skipped[-1]}")
        held_out = hold_out(scenes, source.hold_out, seed=job.seed) if source.hold_out is not None else set()
        for scene in scenes:
            into = validate if source.use == "validate" or scene.scene.id in held_out else train
            into.append(scene)
    _check_places_apart(train, validate)
    return Found(codes, tuple(train), tuple(validate), tuple(skipped))


def in_threads(function: Callable[[_A], _B], items: Iterable[_A]) -> Iterator[_B]:
    """``function`` over ``items`` in order, in threads apart from the store's, which the function may wait for."""
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="scenes") as threads:
        yield from threads.map(function, items)


def _refs(source: TrainSource, out: str) -> list[SceneRef]:
    return list_sources(source.scenes, source.stack_by, out=store.normalize_uri(out).rstrip("/"))


@dataclass(frozen=True, slots=True)
class _Describe:
    """A scene with its labels, or why it cannot be used."""

    number: int
    source: TrainSource
    model: ModelConfig
    codes: LabelCodes

    def __call__(self, ref: SceneRef) -> TrainScene | str:
        try:
            return self._describe(ref)
        except SceneError as error:
            return str(error)

    def _describe(self, ref: SceneRef) -> TrainScene:
        source, model = self.source, self.model
        options = ReadOptions(assume_crs=source.assume_crs, nodata=source.nodata, sidecar_mask=source.sidecar_mask)
        dates = len(ref.dates) or 1
        if source.warp_stacks and model.dates == 1:
            raise ConfigError(f"source {source.name}: warp_stacks has no effect with a model of one date")
        if dates != model.dates:
            raise StackError(f"{ref.id}: has {dates} dates, the model takes {model.dates}; group scenes with stack_by")
        scene, stack = (
            describe_stack(ref, options, warp=source.warp_stacks) if ref.dates else (describe(ref, options), ())
        )
        for one in stack or (scene,):
            if one is not None and one.dtype != model.dtype and source.scale is None:
                low, high = model.value_range
                raise BandError(
                    f"{one.id}: the model takes {model.dtype} from {low:g} to {high:g}, the scene has {one.dtype}; say which of "
                    "its values stand for these two, for example scale = [0, 2047] in its [[source]]"
                )
        names = tuple(one.name for one in model.classes)
        labels = find_labels(source.labels, scene, names, self.codes)
        bands = scene.band_indexes(model.bands, source.bands)
        found = found_classes(source.labels, names, self.codes)
        return TrainScene(
            self.number, ref, options, scene, stack, bands, labels, found, source.scale, source.warp_stacks
        )


def hold_out(scenes: Sequence[TrainScene], share: float, *, seed: int) -> set[str]:
    """Ids of scenes with about ``share`` of the ground, chosen by the seed; scenes that share ground stay together.

    At least one group is held out and one is left. Raises ConfigError when there is one group alone.
    """
    places = _Places([scene.scene.grid for scene in scenes])
    groups = places.groups()
    if len(groups) < 2:
        raise ConfigError(
            f"scene {scenes[0].scene.id}: all scenes of its source share ground, so none can be held out; name validation "
            "scenes of another place"
        )
    groups.sort(key=lambda group: hashlib.sha256(f"{seed}:{scenes[group[0]].scene.id}".encode()).hexdigest())
    areas = [sum(_area_m2(scenes[number].scene.grid) for number in group) for group in groups]
    wanted, held = share * sum(areas), 0.0
    chosen: set[str] = set()
    for group, area in list(zip(groups, areas, strict=True))[:-1]:
        if chosen and held + area / 2 > wanted:
            break
        held += area
        chosen |= {scenes[number].scene.id for number in group}
    return chosen


class _Places:
    """Footprints on the ground, to be asked which of them overlap."""

    def __init__(self, grids: Sequence[Grid]) -> None:
        self._grids = grids
        self._shapes = [_footprint(grid) for grid in grids]
        self._tree = shapely.STRtree(self._shapes)

    def overlapping(self, others: Sequence[Grid]) -> npt.NDArray[np.int64]:
        """Pairs (2, n) of an ``others`` and one of ours that share more than an edge."""
        shapes = [_footprint(grid) for grid in others]
        pairs = self._tree.query(shapes, predicate="intersects")
        shared = [
            shapely.area(shapely.intersection(shapes[one], self._shapes[other])) > 1e-6 * shapely.area(shapes[one])
            for one, other in pairs.T
        ]
        return np.asarray(pairs[:, np.array(shared, np.bool_)])

    def groups(self) -> list[list[int]]:
        """Those that hang together by shared ground."""
        root = list(range(len(self._shapes)))

        def find(number: int) -> int:
            while root[number] != number:
                number = root[number]
            return number

        for one, other in self.overlapping(self._grids).T:
            low, high = sorted((find(int(one)), find(int(other))))
            root[high] = low
        groups: dict[int, list[int]] = {}
        for number in range(len(root)):
            groups.setdefault(find(number), []).append(number)
        return list(groups.values())


def _footprint(grid: Grid) -> shapely.Polygon:
    ring = grid.outline_lonlat()
    if ring is None:
        corners = [(0, 0), (0, grid.height), (grid.width, grid.height), (grid.width, 0)]
        ring = [grid.affine * corner for corner in corners]
    return shapely.Polygon(ring)


def _area_m2(grid: Grid) -> float:
    return grid.height * grid.width * grid.resolution_m**2


def _check_places_apart(train: Sequence[TrainScene], validate: Sequence[TrainScene]) -> None:
    if not train or not validate:
        return
    shared = _Places([scene.scene.grid for scene in train]).overlapping([scene.scene.grid for scene in validate])
    if shared.size:
        ours, theirs = validate[int(shared[0, 0])].scene, train[int(shared[1, 0])].scene
        raise ConfigError(
            f"validation scene {ours.id} shares ground with training scene {theirs.id}, so its scores would flatter; validate on "
            "another place, or let one source be split by place with use = 'split' and hold_out"
        )


def table_uri(out: str, scene: TrainScene, resolution_m: float) -> str:
    """Where the chip index of a scene is kept below ``out``; another version of scene or labels has another name."""
    told = [one.etag if one is not None else None for one in scene.stack or (scene.scene,)]
    key = json.dumps([told, scene.scene.mask_etag, scene.labels.digest, scene.bands, _side(scene.scene, resolution_m)])
    return store.join(out, _FOLDER, hashlib.sha256(key.encode()).hexdigest()[:32] + ".npz")


def keep_table(uri: str, scene: TrainScene, *, resolution_m: float, num_classes: int) -> CellTable:
    """The chip index of a scene, counted if it is not kept under ``uri`` yet. Raises SceneError, StoreError."""
    shape = (scene.scene.grid.height, scene.scene.grid.width)
    native = WorkGrid(shape, shape, 0, shape)

    def count() -> CellTable:
        reader = scene.reader()

        def read(window: Window) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
            return scene.labels.read(native, window), reader.read_valid(window, scene.bands)

        return count_cells(shape, _side(scene.scene, resolution_m), num_classes, read)

    return kept_table(uri, count)


def _side(scene: Scene, resolution_m: float) -> int:
    """Scene pixels along a cell."""
    return max(1, round(_CELL_PX * resolution_m / scene.grid.resolution_m))


def check_classes(tables: Iterable[CellTable], classes: Sequence[str]) -> None:
    """Raise ConfigError for a class, not background, that no labelled pixel of the training scenes has."""
    tables = list(tables)
    if not any(len(table.labelled) for table in tables):
        raise ConfigError(
            "no training scene has a single labelled pixel; look at labels and their values in [[source]]"
        )
    for code, name in enumerate(classes[1:], 1):
        if not any(table.of_class[:, code].any() for table in tables):
            raise ConfigError(
                f"no pixel of the training scenes is labelled {name!r}, so it cannot be learnt; look at the values of its labels, "
                "or leave the class out of model.classes"
            )


def measure_light(
    sampler: Sampler, stage: Stage, reader: ChipReader, *, num_bands: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each band over the valid pixels of chips drawn evenly over the labelled ground.

    In raw values; of a stack over all dates. Raises ConfigError when nothing could be read, or a band has one value alone.
    """
    totals = np.zeros((3, num_bands))
    failure = ""
    for position in range(_MEASURED_CHIPS):
        chip = reader.read(sampler.draw(stage, Place(_MEASURED_AS, 0, position)), stage)
        failure = chip.failure or failure
        for date, valid in enumerate(chip.valid if chip.valid.ndim == 3 else chip.valid[None]):
            values = chip.pixels[date * num_bands : (date + 1) * num_bands, valid].astype(np.float64)
            totals += np.stack([np.full(num_bands, values.shape[1]), values.sum(1), (values**2).sum(1)])
    if not totals[0].all():
        raise ConfigError(f"the light of the training scenes could not be measured, no valid pixel was read. {failure}")
    mean = totals[1] / totals[0]
    std = np.sqrt(np.maximum(totals[2] / totals[0] - mean**2, 0))
    if not std.all():
        raise ConfigError(
            f"band {int(np.argmin(std)) + 1} of the training scenes has one value alone ({mean[np.argmin(std)]:g})"
        )
    return tuple(float(f"{one:.6g}") for one in mean), tuple(float(f"{one:.6g}") for one in std)
