"""A training with everything found, measured and counted: what travels to the workers. Small, picklable, without secrets."""

from __future__ import annotations

from dataclasses import dataclass

from geoseg.model.description import BundleDescription
from geoseg.train.chips import TrainScene
from geoseg.train.codes import LabelCodes
from geoseg.train.job import OptimizerConfig
from geoseg.train.stages import Stage


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainPlan:
    """What the workers of a training share.

    ``tables`` are the URIs of the scenes' chip indexes, ``weights`` those of the sources. ``start`` is the bundle that the weights
    come from at first, or None. ``settings``: digest (hex) of all that decides the weights. ``chip_dtype``: that of all chips.
    """

    out: str
    seed: int
    description: BundleDescription
    codes: LabelCodes
    scenes: tuple[TrainScene, ...]
    tables: tuple[str, ...]
    weights: tuple[float, ...]
    stages: tuple[Stage, ...]
    optimizer: OptimizerConfig
    start: str | None
    checkpoint_every: int
    margin: int
    settings: str
    chip_dtype: str

    @property
    def num_steps(self) -> int:
        """Steps of all stages, unless one ends early."""
        return sum(stage.steps for stage in self.stages)

    def context(self, stage: Stage) -> int:
        """Pixels that the network is given around a chip."""
        return self.margin if stage.padding == "valid" else 0

    def border_class(self, stage: Stage) -> int | None:
        """The class whose instances are kept apart, if any."""
        if stage.border is None:
            return None
        return [one.name for one in self.description.classes].index(stage.border.label)

    def description_at(self, stage: Stage) -> BundleDescription:
        """The description of the bundles that come out of a stage: at its own resolution."""
        return self.description.model_copy(update={"resolution_m": stage.bundle_resolution_m})
