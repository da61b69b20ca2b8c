"""A training as its user writes it: TRAIN.toml in, checked settings out."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, FiniteFloat, field_validator, model_validator

from geoseg.config import Section, load_settings
from geoseg.model.description import ClassName, UNetVariant, Variant
from geoseg.train.sources import SourceConfig
from geoseg.train.stages import StageConfig

_Count = Annotated[int, Field(ge=1)]


class ModelConfig(Section):
    """The bundle that is to come out; see ``BundleDescription`` for what its fields mean.

    The ``margin`` of a network from outside is measured, whatever stands there. ``mean`` and ``std`` of each band, in raw values,
    are measured on the training scenes when left out. ``start`` is the bundle (name or URI) whose weights training begins with,
    instead of random ones.
    """

    name: str
    variant: Variant = UNetVariant()
    dates: Annotated[int, Field(ge=1, le=64)] = 1
    bands: Annotated[tuple[str, ...], Field(min_length=1)] = ("red", "green", "blue")
    dtype: Literal["uint8", "uint16", "int16", "float32"] = "uint8"
    value_range: tuple[FiniteFloat, FiniteFloat] = (0.0, 255.0)
    resolution_m: Annotated[FiniteFloat, Field(gt=0)]
    mean: tuple[FiniteFloat, ...] | None = None
    std: tuple[Annotated[FiniteFloat, Field(gt=0)], ...] | None = None
    classes: tuple[ClassName, ...]
    origin: str = ""
    start: str | None = None

    @model_validator(mode="after")
    def _both_or_neither(self) -> ModelConfig:
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std are given both, or neither to have them measured")
        return self


class TrainSource(SourceConfig):
    """A source, what it is used for, and how its scenes are read.

    ``use``: to ``train`` on, to ``validate`` on, or ``split``: of its scenes the share ``hold_out`` is validated on, whole scenes,
    and those that share ground stay together. ``weight``: how often a chip comes from this source, as against the others.
    ``bands``, ``scale``, ``nodata``, ``assume_crs``, ``sidecar_mask`` and ``warp_stacks`` are those of ``[predict]``.
    """

    use: Literal["train", "validate", "split"] = "train"
    hold_out: Annotated[FiniteFloat, Field(gt=0, lt=1)] | None = None
    weight: Annotated[FiniteFloat, Field(ge=0)] = 1.0
    bands: tuple[Annotated[int, Field(ge=1)], ...] | None = None
    scale: tuple[FiniteFloat, FiniteFloat] | None = None
    nodata: float | None = None
    assume_crs: str | None = None
    sidecar_mask: bool = False
    warp_stacks: bool = False

    @model_validator(mode="after")
    def _share_of_a_split(self) -> TrainSource:
        if (self.use == "split") != (self.hold_out is not None):
            raise ValueError(f"hold_out belongs to use = 'split' and to nothing else, got use = {self.use!r}")
        return self


class OptimizerConfig(Section):
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101), clipping, and the average of weights that is evaluated and put out.

    ``weight_decay`` spares biases and norms. ``clip_norm``: largest norm of the gradient. ``ema``: share that the running average
    of the weights keeps at each step, less in the first steps; 0 for none. ``precision``: ``auto`` computes in bfloat16 on GPUs
    that have it, and in float32 elsewhere; weights and losses are float32 in any case. ``bfloat16`` is for CPUs that compute
    in it, but not for volumes (3D U-Net, V-Net), whose gradients came out as no numbers there.
    """

    weight_decay: Annotated[FiniteFloat, Field(ge=0)] = 0.01
    clip_norm: Annotated[FiniteFloat, Field(gt=0)] = 1.0
    ema: Annotated[FiniteFloat, Field(ge=0, lt=1)] = 0.99
    precision: Literal["auto", "float32", "bfloat16"] = "auto"


class TrainClusterConfig(Section):
    """Where training runs; none of it changes the weights but for rounding.

    ``engine``: ``local`` is one process with ``read_threads`` that read ahead, ``ray`` Ray Train with Ray Data; ``auto`` is Ray for
    an ``address`` or several workers. ``workers``: how many, or the least and the most of an elastic group, which begins with those
    that there is room for and goes on from the last checkpoint with more or fewer as nodes come and go. ``read_cpus``: of Ray's
    CPUs, those that read chips; elastic workers without GPUs read their own, in ``read_threads`` each. ``max_failures``: how often
    lost workers are replaced before the run gives up.
    """

    engine: Literal["auto", "local", "ray"] = "auto"
    address: str | None = None
    workers: _Count | tuple[_Count, _Count] = 1
    read_threads: _Count = 2
    read_cpus: _Count = 2
    max_failures: Annotated[int, Field(ge=0)] = 8

    @field_validator("workers")
    @classmethod
    def _rises(cls, workers: int | tuple[int, int]) -> int | tuple[int, int]:
        if isinstance(workers, tuple) and workers[0] > workers[1]:
            raise ValueError("workers wants the least and then the most")
        return workers

    @property
    def least_workers(self) -> int:
        """Without these training does not begin, nor go on."""
        return self.workers[0] if isinstance(self.workers, tuple) else self.workers

    @property
    def most_workers(self) -> int:
        """More there never are."""
        return self.workers[1] if isinstance(self.workers, tuple) else self.workers


class TrainJob(Section):
    """A whole training. ``source`` and ``stage`` stand as ``[[source]]`` and ``[[stage]]`` in TOML.

    ``seed`` decides the first weights and all chips. ``checkpoint_every``: steps between checkpoints. ``calibrate``: at the end fit
    the bundle's temperature and its thresholds to the validation scenes.
    """

    out: str
    seed: Annotated[int, Field(ge=0)] = 0
    model: ModelConfig
    source: Annotated[tuple[TrainSource, ...], Field(min_length=1)]
    stage: Annotated[tuple[StageConfig, ...], Field(min_length=1)]
    optimizer: OptimizerConfig = OptimizerConfig()
    cluster: TrainClusterConfig = TrainClusterConfig()
    checkpoint_every: _Count = 200
    calibrate: bool = True

    @model_validator(mode="after")
    def _has_something_to_learn(self) -> TrainJob:
        names = [source.name for source in self.source]
        if len(set(names)) < len(names):
            raise ValueError("two sources have the same name")
        if not any(source.use != "validate" and source.weight > 0 for source in self.source):
            raise ValueError("no source is there to train on; name one with use = 'train' and a weight above 0")
        return self


def load_train_job(path: str, overrides: dict[str, Any]) -> TrainJob:
    """The training of a TOML file with values of the command line on top. Raises ConfigError."""
    return load_settings(TrainJob, path, overrides)
