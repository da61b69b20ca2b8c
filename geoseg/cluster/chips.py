"""Chips through Ray Data: passes as descriptors -> chips read on CPUs -> batches in order, on the worker that wants them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.data import DataIterator, Dataset, Datasource, ReadTask, TaskPoolStrategy
from ray.data.block import BlockMetadata
from ray.train import DataConfig

from geoseg.errors import StopError
from geoseg.train.checkpoint import last_step
from geoseg.train.chips import Place
from geoseg.train.feed import ChipBatch, batch_of, chip_maker, columns_of, places_of
from geoseg.train.plan import TrainPlan
from geoseg.train.stages import Stage

_CHIPS_PER_TASK = 32
_READS_AHEAD = 2
_PASS = pa.schema([("step", pa.int64()), ("position", pa.int64())])
_BYTES_PER_ROW = 16
_RETRIES = 3


class Passes(Datasource):
    """A row for each chip that a worker takes in a stage, in order, from a step on; a block for each read."""

    def __init__(self, stage: Stage, number: int, *, step: int, rank: int, world: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._read = partial(_blocks, stage, number, step=step, rank=rank, world=world)
        self._num_chips = (stage.steps - step) * stage.batch // world

    def estimate_inmemory_data_size(self) -> int | None:
        """A guess for Ray's planner."""
        return self._num_chips * _BYTES_PER_ROW

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """One task: it counts, and its blocks stream."""
        del parallelism, data_context
        metadata = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(self._read, metadata, schema=_PASS, per_task_row_limit=per_task_row_limit)]


def _blocks(stage: Stage, number: int, *, step: int, rank: int, world: int) -> Iterator[pa.Table]:
    passes_per_task = max(1, _CHIPS_PER_TASK // stage.chips_per_pass)
    rows: list[dict[str, int]] = []
    for places in places_of(stage, number, step=step, rank=rank, world=world):
        rows += [{"step": place.step, "position": place.position} for place in places]
        if len(rows) >= passes_per_task * stage.chips_per_pass:
            yield pa.Table.from_pylist(rows, schema=_PASS)
            rows = []
    if rows:
        yield pa.Table.from_pylist(rows, schema=_PASS)


def read_chips(rows: dict[str, np.ndarray[Any, Any]], held: Any, number: int) -> Iterator[dict[str, Any]]:
    """Descriptors in, the same with pixels, labels, validity and weights out, a block for each pass."""
    plan = ray.get(held[0])
    maker, num = chip_maker(plan), plan.stages[number].chips_per_pass
    steps, positions = rows["step"].tolist(), rows["position"].tolist()
    for first in range(0, len(steps), num):
        places = [
            Place(number, *one) for one in zip(steps[first : first + num], positions[first : first + num], strict=True)
        ]
        yield {
            "step": np.array([place.step for place in places]),
            "position": np.array([place.position for place in places]),
            **columns_of([maker.make(place) for place in places]),
        }


def chips_of(held: Any, plan: TrainPlan, number: int, *, step: int, rank: int, world: int, read_cpus: int) -> Dataset:
    """The chips of one worker in one stage, in the order in which it takes them; ``held`` is the plan in Ray's store, in a list."""
    rows: Dataset = ray.data.read_datasource(
        Passes(plan.stages[number], number, step=step, rank=rank, world=world), override_num_blocks=1
    )
    chips: Dataset = rows.map_batches(
        partial(read_chips, held=held, number=number),
        batch_size=None,
        batch_format="numpy",
        compute=TaskPoolStrategy(max(1, read_cpus // world)),
        num_cpus=1,
        max_retries=_RETRIES,
    )
    return chips


class ChipData(DataConfig):
    """Gives each worker its own chips of each stage, in order, instead of whatever comes first."""

    def __init__(self, held: Any, *, read_cpus: int) -> None:
        super().__init__(datasets_to_split=[])
        self._held, self._read_cpus = held, read_cpus

    def configure(
        self, datasets: dict[str, Dataset], world_size: int, *_args: Any, **_more: Any
    ) -> list[dict[str, DataIterator]]:
        """The chips of each worker, from the last checkpoint on."""
        plan = ray.get(self._held[0])
        shares: list[dict[str, DataIterator]] = [{} for _ in range(world_size)]
        for name in datasets:
            number = int(name.removeprefix(STAGE))
            step = last_step(plan.out, number)
            for rank, share in enumerate(shares):
                chips = chips_of(
                    self._held, plan, number, step=step, rank=rank, world=world_size, read_cpus=self._read_cpus
                )
                chips.context.execution_options = self.default_ingest_options()
                chips.context.execution_options.preserve_order = True
                chips.context.target_max_block_size = 1  # blocks stay as they are made
                share[name] = chips.iterator()
        return shares


STAGE = "stage-"


def feed_from_ray(plan: TrainPlan, number: int, *, step: int, rank: int, world: int) -> Iterator[ChipBatch]:
    """The batches of this worker in a stage. Raises StopError when they are not those of the places that come next."""
    shard = ray.train.get_dataset_shard(f"{STAGE}{number}")
    batches = shard.iter_torch_batches(
        batch_size=plan.stages[number].chips_per_pass, prefetch_batches=_READS_AHEAD, drop_last=True, collate_fn=_batch
    )
    wanted = places_of(plan.stages[number], number, step=step, rank=rank, world=world)
    for places, (got, batch) in zip(wanted, batches, strict=True):
        if [(place.step, place.position) for place in places] != got:
            raise StopError(
                f"stage {number + 1}: the chips of step {places[0].step + 1} were due, those of {got[0]} came"
            )
        yield batch


def _batch(columns: dict[str, np.ndarray[Any, Any]]) -> tuple[list[tuple[int, int]], ChipBatch]:
    places = zip(columns["step"].tolist(), columns["position"].tolist(), strict=True)
    return list(places), batch_of(columns)
