"""From places to batches: what a worker's share of each step is, and reading it ahead in threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from geoseg.raster import store
from geoseg.train.augment import Chips
from geoseg.train.chips import Chip, ChipReader, Place, Sampler
from geoseg.train.index import CellTable
from geoseg.train.plan import TrainPlan
from geoseg.train.stages import Stage

_PASSES_AHEAD = 2


@dataclass(frozen=True, slots=True)
class ChipBatch:
    """The chips of one forward pass; ``failures`` say why some of them hold nothing."""

    chips: Chips
    failures: tuple[str, ...] = ()


class ChipMaker:
    """Draws and reads the chip of a place; one for each process."""

    def __init__(self, plan: TrainPlan) -> None:
        self._plan = plan
        tables = [CellTable.from_bytes(data) for data in store.in_parallel(store.read, plan.tables)]
        self._sampler = Sampler(plan.scenes, tables, plan.weights, seed=plan.seed)
        self._reader = ChipReader(plan.scenes, dtype=plan.chip_dtype, value_range=plan.description.value_range)

    def make(self, place: Place) -> Chip:
        """The chip of a place. Raises StoreError kinds; what concerns its scene alone is in the chip."""
        stage = self._plan.stages[place.stage]
        draw = self._sampler.draw(stage, place)
        return self._reader.read(
            draw, stage, context=self._plan.context(stage), border_class=self._plan.border_class(stage)
        )


_MAKERS: dict[tuple[str, str], ChipMaker] = {}
_MAKING = threading.Lock()


def chip_maker(plan: TrainPlan) -> ChipMaker:
    """The process's own; scenes stay open from chip to chip."""
    key = (plan.out, plan.settings)
    with _MAKING:
        if key not in _MAKERS:
            _MAKERS.clear()
            _MAKERS[key] = ChipMaker(plan)
        return _MAKERS[key]


def passes_of(stage: Stage, *, rank: int, world: int) -> range:
    """The passes of a step that the worker ``rank`` of ``world`` computes: neighbours, as evenly as it goes."""
    return range(-(-rank * stage.num_passes // world), -(-(rank + 1) * stage.num_passes // world))


def places_of(stage: Stage, number: int, *, step: int, rank: int, world: int) -> Iterator[list[Place]]:
    """The places of each pass of a worker in a stage, which has this number, from a step on."""
    for at in range(step, stage.steps):
        for one in passes_of(stage, rank=rank, world=world):
            first = one * stage.chips_per_pass
            yield [Place(number, at, first + index) for index in range(stage.chips_per_pass)]


def columns_of(chips: Sequence[Chip]) -> dict[str, npt.NDArray[Any]]:
    """Chips of one shape as arrays by name, chip by chip along their first axis; ``weights`` only where chips have some."""
    columns = {
        "pixels": np.stack([chip.pixels for chip in chips]),
        "labels": np.stack([chip.labels for chip in chips]),
        "valid": np.stack([chip.valid for chip in chips]),
        "failure": np.array([chip.failure for chip in chips], object),
    }
    weights = [chip.weights for chip in chips if chip.weights is not None]
    return {**columns, "weights": np.stack(weights)} if weights else columns


def batch_of(columns: Mapping[str, npt.NDArray[Any]]) -> ChipBatch:
    """The batch of what ``columns_of`` gave; other names have no say."""
    tensors = {
        name: torch.as_tensor(np.ascontiguousarray(columns[name]))
        for name in ("pixels", "labels", "valid", "weights")
        if name in columns
    }
    chips = Chips(tensors["pixels"], tensors["labels"], tensors["valid"], tensors.get("weights"))
    return ChipBatch(chips, tuple(str(one) for one in columns["failure"] if one))


def feed_from_threads(
    plan: TrainPlan, number: int, *, step: int, rank: int, world: int, threads: int
) -> Iterator[ChipBatch]:
    """The batches of a worker in a stage, from a step on; ``threads`` read the next two passes while one is used."""
    maker = chip_maker(plan)
    with ThreadPoolExecutor(threads, thread_name_prefix="chips") as readers:
        waiting: list[list[Future[Chip]]] = []
        try:
            for places in places_of(plan.stages[number], number, step=step, rank=rank, world=world):
                waiting.append([readers.submit(maker.make, place) for place in places])
                if len(waiting) > _PASSES_AHEAD:
                    yield batch_of(columns_of([future.result() for future in waiting.pop(0)]))
            for futures in waiting:
                yield batch_of(columns_of([future.result() for future in futures]))
        finally:
            readers.shutdown(wait=False, cancel_futures=True)
