"""The progressive schedule: stages of rising resolution, each with its chips, batch, learning rate, loss and end."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, FiniteFloat, field_validator, model_validator

from geoseg.config import Section
from geoseg.errors import ConfigError
from geoseg.train.augment import AugmentConfig
from geoseg.train.loss import LossConfig

_Positive = Annotated[FiniteFloat, Field(gt=0)]
_Count = Annotated[int, Field(ge=1)]


class BorderConfig(Section):
    """Border weights of the U-Net paper between the instances of the class ``label``; ``w0`` and ``sigma`` (in pixels) as there."""

    label: str = "building"
    w0: _Positive = 10.0
    sigma: _Positive = 5.0


class PlateauConfig(Section):
    """A stage ends early after ``patience`` evaluations in a row without a score better by more than ``gain``."""

    patience: _Count = 3
    gain: Annotated[FiniteFloat, Field(ge=0)] = 0.0


class StageConfig(Section):
    """One stage, as it stands under ``[[stage]]``.

    ``resolution_m``: ground size of a pixel in metres, the bundle's when left out; several are drawn in equal shares.
    ``chip``: side of a chip in pixels of that size. ``batch``: chips of one step, over all workers; when left out as many as
    have the pixels of the last stage's batch. ``chips_per_pass``: chips of one forward pass, whose gradients a step sums up;
    batch norm sees one pass at a time, so results do not depend on how passes are dealt out to workers. ``steps`` or
    ``epochs`` (one epoch: as many chips as cover the labelled ground once). ``learning_rate``: when left out that of the last
    stage times the square root of the ratio of the batches (the rule for adaptive optimisers of Malladi et al. 2022,
    arXiv:2205.10287). ``warmup_steps`` rise to it in a line; then it stays, or falls in a line or half a cosine to
    ``final_share`` of it. ``padding`` ``valid`` gives the network real context around each chip and trains on what it
    computes from that alone, as prediction does. ``focus``: share of chips drawn around a pixel of a class, each class equally
    often; the others are drawn evenly over the labelled ground. ``evaluate_every``: steps between evaluations on the
    validation scenes, of which there is one at the end of a stage in any case.
    """

    resolution_m: _Positive | Annotated[tuple[_Positive, ...], Field(min_length=1)] | None = None
    chip: Annotated[int, Field(ge=16, le=8192)]
    batch: _Count | None = None
    chips_per_pass: _Count | None = None
    steps: _Count | None = None
    epochs: _Positive | None = None
    learning_rate: _Positive | None = None
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    final_share: Annotated[FiniteFloat, Field(ge=0, le=1)] | None = None
    padding: Literal["same", "valid"] = "same"
    loss: LossConfig = LossConfig()
    border: BorderConfig | None = None
    augment: AugmentConfig = AugmentConfig()
    focus: Annotated[FiniteFloat, Field(ge=0, le=1)] = 0.5
    evaluate_every: _Count | None = None
    plateau: PlateauConfig | None = None

    @field_validator("resolution_m")
    @classmethod
    def _each_once(cls, resolution_m: float | tuple[float, ...] | None) -> float | tuple[float, ...] | None:
        if isinstance(resolution_m, tuple) and len(set(resolution_m)) < len(resolution_m):
            raise ValueError("each resolution of a stage is named once")
        return resolution_m

    @model_validator(mode="after")
    def _has_one_length(self) -> StageConfig:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("a stage wants either steps or epochs")
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A stage with all its numbers known. ``num_passes``: forward passes of a step, each of ``chips_per_pass`` chips."""

    resolutions_m: tuple[float, ...]
    chip: int
    chips_per_pass: int
    num_passes: int
    steps: int
    learning_rate: float
    schedule: Literal["constant", "linear", "cosine"]
    warmup_steps: int
    final_share: float
    padding: Literal["same", "valid"]
    loss: LossConfig
    border: BorderConfig | None
    augment: AugmentConfig
    focus: float
    evaluate_every: int
    plateau: PlateauConfig | None

    @property
    def batch(self) -> int:
        """Chips of a step."""
        return self.chips_per_pass * self.num_passes

    @property
    def bundle_resolution_m(self) -> float:
        """The resolution of the bundles that come out of the stage: its finest."""
        return min(self.resolutions_m)

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of step 0, 1 and so on of the stage."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        share = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        fallen = {"constant": 0.0, "linear": share, "cosine": 0.5 * (1 - math.cos(math.pi * share))}[self.schedule]
        return self.learning_rate * (1 - (1 - self.final_share) * fallen)

    def is_evaluated_after(self, step: int) -> bool:
        """Whether the validation scenes are looked at after a step, counted from 0."""
        return (step + 1) % self.evaluate_every == 0 or step + 1 == self.steps


def resolve_stages(
    configs: tuple[StageConfig, ...], *, resolution_m: float, labelled_m2: float, stride: int, classes: tuple[str, ...]
) -> tuple[Stage, ...]:
    """The stages with what they leave out filled in.

    ``resolution_m`` is the bundle's, ``labelled_m2`` the labelled ground of the training scenes in square metres, ``stride`` the
    network's, of which a chip's side must be a multiple. Raises ConfigError, which names the stage (counted from 1).
    """
    last = configs[-1]
    if last.batch is None or last.learning_rate is None:
        raise ConfigError("the last stage must name its batch and its learning_rate, for the others follow from them")
    stages = []
    for number, config in enumerate(configs, 1):
        if config.chip % stride:
            raise ConfigError(
                f"stage {number}: a chip's side must be a multiple of {stride} for this network, got {config.chip}"
            )
        if config.border is not None and config.border.label not in classes:
            raise ConfigError(
                f"stage {number}: border.label {config.border.label!r} is none of the classes {', '.join(classes)}"
            )
        named = config.resolution_m or resolution_m
        resolutions_m = named if isinstance(named, tuple) else (named,)
        batch = config.batch or max(1, round(last.batch * (last.chip / config.chip) ** 2))
        per_pass = min(config.chips_per_pass or batch, batch)
        num_passes = -(-batch // per_pass)
        if num_passes * per_pass != batch and config.batch is not None:
            raise ConfigError(f"stage {number}: a batch of {batch} is not made of whole passes of {per_pass} chips")
        batch = num_passes * per_pass
        rate = config.learning_rate or last.learning_rate * math.sqrt(batch / last.batch)
        chip_m2 = sum((config.chip * one) ** 2 for one in resolutions_m) / len(resolutions_m)
        steps = config.steps or max(1, math.ceil((config.epochs or 0) * labelled_m2 / (chip_m2 * batch)))
        if config.warmup_steps >= steps:
            raise ConfigError(f"stage {number}: warmup_steps {config.warmup_steps} leave nothing of its {steps} steps")
        stages.append(
            Stage(
                resolutions_m=resolutions_m,
                chip=config.chip,
                chips_per_pass=per_pass,
                num_passes=num_passes,
                steps=steps,
                learning_rate=rate,
                schedule=config.schedule,
                warmup_steps=config.warmup_steps,
                final_share=config.final_share or 0.0,
                padding=config.padding,
                loss=config.loss,
                border=config.border,
                augment=config.augment,
                focus=config.focus,
                evaluate_every=config.evaluate_every or steps,
                plateau=config.plateau,
            )
        )
    return tuple(stages)


def check_workers(stages: tuple[Stage, ...], workers: int) -> None:
    """Raise ConfigError when a step of a stage has fewer passes than there may be workers, for some would have none."""
    for number, stage in enumerate(stages, 1):
        if stage.num_passes < workers:
            raise ConfigError(
                f"stage {number}: {workers} workers share {stage.num_passes} passes of a step, so some would have none; lower "
                f"chips_per_pass (it is {stage.chips_per_pass}) or take fewer workers"
            )


def warnings_of(configs: tuple[StageConfig, ...], stages: tuple[Stage, ...], *, has_validation: bool) -> list[str]:
    """A sentence for each setting that has no effect."""
    told = []
    for number, (config, stage) in enumerate(zip(configs, stages, strict=True), 1):
        if config.final_share is not None and config.schedule == "constant":
            told.append(f"stage {number}: final_share has no effect with a constant schedule")
        if config.evaluate_every is not None and (config.evaluate_every >= stage.steps or not has_validation):
            why = "there are no validation scenes" if not has_validation else f"the stage has {stage.steps} steps"
            told.append(f"stage {number}: evaluate_every has no effect: {why}")
        if config.plateau is not None:
            num = -(-stage.steps // stage.evaluate_every)
            if not has_validation:
                told.append(f"stage {number}: plateau has no effect: there are no validation scenes")
            elif num <= config.plateau.patience:
                told.append(
                    f"stage {number}: plateau has no effect: the stage has {num} evaluations; lower evaluate_every"
                )
    return told
