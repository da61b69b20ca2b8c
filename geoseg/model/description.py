"""What a bundle says of itself: the network's shape, its bands, resolution, normalisation and classes. Knows no torch."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Discriminator, Field, FiniteFloat, Tag, field_validator, model_validator

from geoseg.model.light import SceneLight
from geoseg.model.normalize import Normalization

EVEN_THRESHOLD = 0.5
_NOT_FOR_OPTIONS = ("encoder_name", "encoder_weights", "in_channels", "classes", "activation", "aux_params")


class Frozen(BaseModel):
    """Values that do not change once made; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


_OwnName = Literal["unet", "attention-unet", "resunet", "unet++", "unet3d", "vnet"]
_OWN = get_args(_OwnName)


class UNetVariant(Frozen):
    """The network's shape: variant name and widths."""

    name: _OwnName = "unet"
    depth: Annotated[int, Field(ge=1, le=8)] = 4
    width: Annotated[int, Field(ge=1, le=512)] = 64
    norm: Literal["none", "batch"] = "batch"

    @property
    def title(self) -> str:
        """The network in a word."""
        return self.name


class OutsideVariant(Frozen):
    """A network of segmentation_models.pytorch: its architecture, its encoder (``tu-...`` are timm's), further options.

    ``options`` go to ``smp.create_model`` as they are. ``margin`` is the context in pixels that was measured (see
    ``geoseg.model.outside.measure_margin``); None for a network without an exact one, which is blended.
    """

    name: Literal["smp"]
    architecture: str = "Unet"
    encoder: str
    options: dict[str, bool | int | float | str | tuple[int, ...] | None] = {}
    margin: Annotated[int, Field(ge=0)] | None = None

    @field_validator("options")
    @classmethod
    def _options_are_the_network_s(cls, options: dict[str, Any]) -> dict[str, Any]:
        taken = sorted(set(options) & set(_NOT_FOR_OPTIONS))
        if taken:
            raise ValueError(
                f"options cannot set {', '.join(taken)}: the encoder has a field of its own, bands and classes follow from the "
                "description, weights come with the bundle, and logits are wanted"
            )
        return options

    def __hash__(self) -> int:
        return hash(self.model_dump_json())  # a dict has none of its own

    @property
    def title(self) -> str:
        """The network in a few words."""
        return f"{self.architecture} of {self.encoder}"


def _kind_of(variant: Any) -> str:
    name = variant.get("name") if isinstance(variant, dict) else getattr(variant, "name", None)
    return "smp" if name == "smp" else "own" if name in _OWN or not isinstance(name, str) else "none"


Variant = Annotated[
    Annotated[UNetVariant, Tag("own")] | Annotated[OutsideVariant, Tag("smp")],
    Discriminator(
        _kind_of,
        custom_error_type="no_such_network",
        custom_error_message=f"its name is one of {', '.join(_OWN)}, or smp for a network from outside",
    ),
]


class ClassName(Frozen):
    """One class of the mask: its value is its place in the list.

    ``threshold``: what the class's share of its own and the first class's probability must reach for a pixel to be of the class
    rather than of the first; at 0.5 for all, each pixel has its most probable class.
    """

    name: Annotated[str, Field(pattern=r"^[0-9A-Za-z_-]+$")]  # what STAC's classification extension allows
    color: tuple[int, int, int]
    threshold: Annotated[FiniteFloat, Field(gt=0, lt=1, exclude_if=lambda value: value == EVEN_THRESHOLD)] = (
        EVEN_THRESHOLD
    )


class BundleDescription(Frozen):
    """What ``model.json`` says: enough to run the weights on a scene and to refuse a scene they do not fit.

    ``resolution_m`` is the size of a pixel on the ground in metres that the network was trained at; None takes any.
    ``dates``: how many dates, of each of which it takes the bands; more than one for a stack's network.
    ``value_range`` is the range of raw values that the training imagery could take (0 to 255 for 8-bit imagery).
    ``temperature`` divides logits before they become probabilities (Guo et al. 2017, arXiv:1706.04599).
    ``light``: of the scenes that it was trained on, to tell how new others are to it.
    """

    format: Literal["geoseg-bundle/1"] = "geoseg-bundle/1"
    name: Annotated[str, Field(pattern=r"^[a-zA-Z][a-zA-Z0-9_. -]+[a-zA-Z0-9]$")]  # what STAC's MLM extension allows
    variant: Variant
    dates: Annotated[int, Field(ge=1, le=64)] = 1
    bands: tuple[str, ...]
    dtype: Literal["uint8", "uint16", "int16", "float32"] = "uint8"
    value_range: tuple[float, float] = (0.0, 255.0)
    resolution_m: Annotated[float, Field(gt=0)] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[ClassName, ...]
    temperature: Annotated[FiniteFloat, Field(gt=0, exclude_if=lambda value: value == 1)] = 1.0
    light: Annotated[tuple[SceneLight, ...], Field(exclude_if=lambda light: not light)] = ()
    origin: str

    @model_validator(mode="after")
    def _lengths_agree(self) -> BundleDescription:
        if not len(self.bands) == len(self.mean) == len(self.std):
            raise ValueError(f"bands, mean and std must be equally many, got {self.bands} {self.mean} {self.std}")
        if (self.dates > 1) != (self.variant.name in ("unet3d", "vnet")):
            raise ValueError(
                f"unet3d and vnet take 2 dates or more, the others one, got {self.dates} for {self.variant.name}"
            )
        if not 2 <= len(self.classes) <= 254:
            raise ValueError(f"a mask has 2 to 254 classes, got {len(self.classes)}")
        if self.classes[0].threshold != EVEN_THRESHOLD:
            raise ValueError(f"the first class has no threshold of its own, got {self.classes[0].threshold}")
        if self.value_range[0] >= self.value_range[1]:
            raise ValueError(f"value_range must rise, got {self.value_range}")
        if any(len(each) != len(self.bands) for one in self.light for each in (one.values, one.contrasts)):
            raise ValueError(f"light has histograms of each of the {len(self.bands)} bands")
        return self

    @property
    def num_channels(self) -> int:
        """Channels of the network's input: the bands, of a stack those of all dates and a validity for each."""
        return len(self.bands) if self.dates == 1 else self.dates * (len(self.bands) + 1)

    @property
    def offsets(self) -> tuple[float, ...]:
        """What is added to each class's logits before the largest decides, so that thresholds hold.

        At a threshold t the class is as good as the first one when p / (p + p0) = t, so when its logit is lower by
        temperature * log((1 - t) / t).
        """
        odds = [(1 - one.threshold) / one.threshold for one in self.classes]
        return tuple(self.temperature * math.log(one) for one in odds)

    @property
    def normalization(self) -> Normalization:
        """The function from raw bands to network input."""
        return Normalization(mean=self.mean, std=self.std)
