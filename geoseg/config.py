"""Settings as values: TOML in, checked objects out; an unknown key is an error that names the likely one."""

from __future__ import annotations

import difflib
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    ValidationError,
    ValidationInfo,
    field_serializer,
    field_validator,
    model_validator,
)

from geoseg.errors import ConfigError
from geoseg.interval import parse_interval
from geoseg.redaction import redact

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_T = TypeVar("_T", bound=BaseModel)
DEFAULT_BUNDLE = "roads-buildings"
_Metres = Annotated[FiniteFloat, Field(ge=0)]


def _different(values: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(values)) != len(values):
        raise ValueError("each is named once")
    return values


_Names = Annotated[tuple[str, ...], AfterValidator(_different)]
_CAME_LATER = frozenset(
    {
        "warp_stacks",
        "prune",
        "flips_and_turns",
        "pyramid",
        "resampling",
        "tile",
        "uncertainty",
        "precision",
        "coarse",
        "coarse_threshold",
    }
)
_COARSE_THRESHOLD = 0.05


class Section(BaseModel):
    """Settings that do not change once made; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class PredictConfig(Section):
    """What decides the pixels of a mask, and how large the pieces of work are (which does not).

    ``resolution``: ``bundle`` reads a scene at the bundle's pixel size unless it is within a factor 1.5 of it,
    ``native`` at the scene's own, a number at that many metres. ``bands``: places of the bundle's bands in the scene,
    counted from 1. ``scale``: raw values that correspond to the ends of the bundle's value range, for scenes of another
    dtype. ``aoi``: URI of a GeoJSON file; outside its polygons the mask is nodata. ``warp_stacks``: read the
    scenes of a stack on the grid of its first, where they do not share it. ``prune``: run a U-Net++ at this smaller
    depth, by the head that it has there. ``flips_and_turns``: take the mean of
    the logits of the eight ways to flip and turn a scene. ``pyramid``: take the mean of the logits of the scene
    down-sampled by each of these factors; (2,) alone is a detour over half the resolution. ``resampling``: how a pyramid
    goes down and back up; ``bilinear`` unless said otherwise. ``tile``: side of the squares on which a network from
    outside is run, in pixels of the work grid. ``max_seam_score``: a scene whose tiles disagree more times as often
    at their borders as inside is not published. ``probabilities``: publish those of each class too. ``uncertainty``: publish
    how unsure the network is of each pixel, by the ``entropy`` of the classes' probabilities or the ``margin`` between the
    two largest. ``coarse``: run the network on the scene down-sampled by this factor first, and at full resolution only in and
    close to the parts where that gives any class but the first a probability of at least ``coarse_threshold``; elsewhere
    the mask is of the first class. ``precision``: the numbers in which the network computes; each worker takes ``bfloat16``
    where its device has arithmetic for it and the network is one of geoseg's, ``float32`` elsewhere, unless it is said here.
    ``window``: side of a write window in pixels of the scene. ``batch``: windows per forward pass.
    """

    resolution: Literal["bundle", "native"] | Annotated[FiniteFloat, Field(gt=0)] = "bundle"
    bands: tuple[Annotated[int, Field(ge=1)], ...] | None = None
    scale: tuple[FiniteFloat, FiniteFloat] | None = None
    nodata: float | None = None
    assume_crs: str | None = None
    sidecar_mask: bool = False
    aoi: str | None = None
    warp_stacks: bool = False
    prune: Annotated[int, Field(ge=1)] | None = None
    flips_and_turns: bool = False
    pyramid: tuple[Literal[1, 2, 4, 8], ...] | None = None
    resampling: Annotated[Literal["bilinear", "nearest"] | None, Field(validate_default=True)] = None
    tile: Annotated[int, Field(ge=2, le=8192)] | None = None
    max_seam_score: Annotated[FiniteFloat, Field(gt=0)] | None = None
    probabilities: bool = False
    uncertainty: Literal["entropy", "margin"] | None = None
    precision: Literal["float32", "bfloat16"] | None = None
    coarse: Literal[2, 4, 8] | None = None
    coarse_threshold: Annotated[FiniteFloat | None, Field(gt=0, lt=1, validate_default=True)] = None
    window: Literal[512, 1024, 2048, 4096, 8192] | None = None
    batch: Annotated[int, Field(ge=1, le=256)] | None = None

    @field_validator("scale")
    @classmethod
    def _scale_rises(cls, scale: tuple[float, float] | None) -> tuple[float, float] | None:
        if scale is not None and not scale[0] < scale[1]:
            raise ValueError(f"scale must be two rising values, got {scale[0]} and {scale[1]}")
        return scale

    @field_validator("pyramid")
    @classmethod
    def _pyramid_rises(cls, pyramid: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if pyramid is not None and (pyramid in ((), (1,)) or [*pyramid] != sorted(set(pyramid))):
            raise ValueError(
                "a pyramid must be rising factors, for example 1,2,4, or 2 alone; leave it out for 1 alone"
            )
        return pyramid

    @field_validator("resampling")
    @classmethod
    def _resampling_of_a_pyramid(cls, resampling: str | None, info: ValidationInfo) -> str | None:
        pyramid = info.data.get("pyramid")
        if pyramid is None and resampling is not None:
            raise ValueError("resampling has no effect without a pyramid; say its factors too, for example 1,2,4")
        return resampling if pyramid is None else resampling or "bilinear"

    @field_validator("coarse_threshold")
    @classmethod
    def _threshold_of_a_coarse_pass(cls, threshold: float | None, info: ValidationInfo) -> float | None:
        coarse = info.data.get("coarse")
        if coarse is None and threshold is not None:
            raise ValueError("coarse_threshold has no effect without a coarse pass; say its factor too, for example 4")
        return threshold if coarse is None else threshold or _COARSE_THRESHOLD

    @field_serializer("nodata", when_used="json")
    def _nodata_in_json(self, nodata: float | None) -> float | str | None:
        """JSON has no NaN and no infinity; they are written as text, which reads back as the number."""
        return nodata if nodata is None or math.isfinite(nodata) else str(nodata)

    def pixel_settings(self) -> dict[str, Any]:
        """The settings that change pixels, for the fingerprint; window, batch and limits are not among them.

        One that came later and is not in use is left out, so that what was published before keeps its fingerprint.
        """
        settings = self.model_dump(mode="json", exclude={"window", "batch", "aoi", "max_seam_score"})
        return {key: value for key, value in settings.items() if value or key not in _CAME_LATER}


class ClusterConfig(Section):
    """Where the work runs.

    ``engine``: ``local`` is a plain loop, ``ray`` a Ray Data chain, ``auto`` takes the loop for small work without an
    ``address``. ``workers``: device actors. ``gpus``: of a GPU for each worker; a cluster that grows from nothing has none
    yet, and gets those it is asked for. By default they share those there are.
    ``read``: ``actor`` reads pixels where they are used, ``tasks`` on CPU tasks before, for hosts whose CPUs cannot feed
    their GPU. ``read_threads``: threads that read ahead in a worker; they share the blocks they decode.
    ``object_store_mib``: ceiling for what the chain keeps in Ray's object store.
    """

    engine: Literal["auto", "local", "ray"] = "auto"
    address: str | None = None
    workers: Annotated[int, Field(ge=1)] | None = None
    gpus: Annotated[FiniteFloat, Field(gt=0)] | None = None
    read: Literal["actor", "tasks"] = "actor"
    read_threads: Annotated[int, Field(ge=1, le=64)] = 1
    object_store_mib: Annotated[int, Field(ge=64)] = 512

    @model_validator(mode="after")
    def _says_how_many(self) -> ClusterConfig:
        if self.gpus is not None and self.workers is None:
            raise ValueError("gpus is for each worker; say how many workers there are to be at most")
        return self


class GuardConfig(Section):
    """When a mask looks so implausible that it is held back until somebody has looked: ``geoseg release`` publishes it.

    ``max_novelty``: the scene's light lies at most so many times as far from the nearest scene of the bundle's training as those
    lie from each other. ``max_change``: the share of no class is more than so many times as large or as small as in the last
    mask of the same ground. ``max_deviation``: no share lies more than so many spreads from the median of the output's masks of
    the same bundle, once there are 20. 0 switches one off. ``hold``: otherwise what looks implausible is told and
    published all the same.
    """

    max_novelty: Annotated[FiniteFloat, Field(ge=0)] = 4.0
    max_change: Annotated[FiniteFloat, Field(ge=0)] = 4.0
    max_deviation: Annotated[FiniteFloat, Field(ge=0)] = 6.0
    hold: bool = True

    @field_validator("max_change")
    @classmethod
    def _is_a_factor(cls, factor: float) -> float:
        if 0 < factor <= 1:
            raise ValueError("max_change is a factor above 1, or 0 for none")
        return factor


class PolygonsConfig(Section):
    """Which classes of a mask become polygons, and how much these may differ from its pixels.

    ``classes``: names of the bundle's classes, [] for none; ``building``, where there is one, unless said. ``min_area_m2``:
    smaller polygons are left out, in square metres on the ellipsoid; holes of any size stay. ``simplify_px``: how far outlines
    are smoothed, in pixels of the mask: corners go whose triangle with their neighbours is no larger than its square; 0 keeps
    the sides of the pixels, and from 2 on polygons less than that apart may come to overlap. ``square``: give outlines right
    angles, each by itself, so that polygons which touch may come to overlap by a pixel or leave a gap.
    """

    classes: _Names | None = None
    min_area_m2: Annotated[FiniteFloat, Field(ge=0)] = 10.0
    simplify_px: Annotated[FiniteFloat, Field(ge=0, le=100)] = 1.0
    square: bool = False


class RoadsConfig(Section):
    """Which classes are roads, and what counts as one; lengths in metres on the ground.

    ``classes``: names of the bundle's classes that together are the network, [] for none; ``road``, where there is one, unless
    said. ``resolution_m``: largest pixel on
    which is traced; smaller ones are put together by twos as long as they do not get larger than this. ``max_width_m``: what is
    wider is no road but an area that is crossed on the shortest way. ``max_hole_m``: holes in a road with no longer side are
    filled, those of one pixel always. ``min_spur_m``: dead ends that reach less far beyond the edge of the road they leave are
    dropped. ``max_gap_m``: gaps in the mask up to this length are closed, if the way over them turns off by at most
    ``max_gap_angle_deg`` degrees from the road's direction (at both ends, where two ends meet; half as much where one meets the
    side of a road). ``min_length_m``: pieces of the network with less length in all are dropped. ``simplify_px``: how far a line
    may leave its smoothed course to have fewer corners, in traced pixels.
    """

    classes: _Names | None = None
    resolution_m: Annotated[FiniteFloat, Field(gt=0)] = 1.0
    max_width_m: Annotated[FiniteFloat, Field(gt=0)] = 60.0
    max_hole_m: _Metres = 8.0
    min_spur_m: _Metres = 8.0
    max_gap_m: _Metres = 20.0
    max_gap_angle_deg: Annotated[FiniteFloat, Field(ge=0, le=90)] = 35.0
    min_length_m: _Metres = 20.0
    simplify_px: _Metres = 0.6


class VectorsConfig(Section):
    """What is traced from masks: polygons of ``buildings``, the network of ``roads``.

    ``formats``: beside GeoParquet: FlatGeobuf, GeoPackage, PMTiles. ``window``: side of the squares that are traced at once, in
    pixels; nothing else depends on it.
    """

    buildings: PolygonsConfig = PolygonsConfig()
    roads: RoadsConfig = RoadsConfig()
    formats: Annotated[tuple[Literal["fgb", "gpkg", "pmtiles"], ...], AfterValidator(_different)] = ()
    window: Literal[512, 1024, 2048, 4096, 8192] = 2048


class StackConfig(Section):
    """A stack by name: the scene at each date, in order, "" for one that is missing."""

    name: Annotated[str, Field(min_length=1)]
    scenes: Annotated[tuple[str, ...], Field(min_length=1)]


class SceneSource(Section):
    """Scenes that a list or a catalogue names, as ``[[source]]`` in a job file.

    One of ``manifest`` (a GeoJSON, ItemCollection or (STAC) GeoParquet file), ``catalog`` (the catalog.json or collection.json
    of a static STAC catalogue) and ``api`` (the root of a STAC API). Of the items those of ``collections`` count, at the time
    ``datetime`` (``2026-11-01/..``, ``2026-11-01/2026-11-30``, ``last 3 days``), that touch ``bbox`` (west, south, east, north)
    or the polygons of the GeoJSON file ``area``. ``assets``: keys of the assets to predict; without them an item's one GeoTIFF
    asset with one of the ``roles``. ``allow``: prefixes where a catalogue's links may lead and assets may lie, beside the
    catalogue's own folder; without it the assets of a manifest may lie anywhere. ``rewrite``: beginnings of addresses and what
    to put in their place, such as those of a web server before a bucket. ``token_env``: name of the environment variable with
    the API's bearer token. ``checksums``: read each file whole first and refuse a scene that is not what its item's
    ``file:checksum`` says, or whose item has none.
    """

    manifest: str | None = None
    catalog: str | None = None
    api: str | None = None
    collections: tuple[str, ...] = ()
    datetime: str | None = None
    bbox: tuple[FiniteFloat, FiniteFloat, FiniteFloat, FiniteFloat] | None = None
    area: str | None = None
    assets: tuple[str, ...] = ()
    roles: Annotated[tuple[str, ...], Field(min_length=1)] = ("data",)
    allow: tuple[str, ...] = ()
    rewrite: dict[str, str] = Field(default_factory=dict)
    token_env: str | None = None
    checksums: bool = False

    @property
    def name(self) -> str:
        """Which source it is, in messages."""
        return self.manifest or self.catalog or self.api or ""

    @field_validator("datetime")
    @classmethod
    def _is_an_interval(cls, text: str | None) -> str | None:
        if text is not None:
            parse_interval(text, now=datetime.now(timezone.utc))
        return text

    @field_validator("api")
    @classmethod
    def _is_a_url(cls, api: str | None) -> str | None:
        if api is not None and not api.startswith(("https://", "http://")):
            raise ValueError("an API is written https://host/path")
        if api is not None and (not urlsplit(api).hostname or urlsplit(api).port == 0):
            raise ValueError("an API is written https://host/path, with a host and a port that can be")
        return api

    @model_validator(mode="after")
    def _is_one_thing(self) -> SceneSource:
        if sum(one is not None for one in (self.manifest, self.catalog, self.api)) != 1:
            raise ValueError("a source has one of manifest, catalog and api")
        if self.api is not None and not self.allow:
            raise ValueError("a source with an api needs allow: the prefixes below which its assets may lie")
        if self.bbox is not None and self.area is not None:
            raise ValueError("bbox and area say the same thing; leave one out")
        if self.token_env is not None and self.api is None:
            raise ValueError("token_env has no effect without an api")
        return self


class Job(Section):
    """A whole prediction: which scenes, which bundle, where to, and how.

    ``source``: lists and catalogues, as ``[[source]]``. For bundles of several dates: ``stack_by`` is a regular expression on the
    URIs of the scenes, whose groups ``stack`` and ``date`` tell which belong together and in which order; ``stacks`` names them
    one by one. ``guard``: a nightly run has one in any case, other runs where the job has this section. ``vectors``: also trace
    what was published.
    """

    scenes: tuple[str, ...] = ()
    source: tuple[SceneSource, ...] = ()
    out: str
    stack_by: str | None = None
    stacks: tuple[StackConfig, ...] = ()
    bundle: str = DEFAULT_BUNDLE
    predict: PredictConfig = PredictConfig()
    cluster: ClusterConfig = ClusterConfig()
    guard: GuardConfig | None = None
    vectors: VectorsConfig | None = None

    @model_validator(mode="after")
    def _has_scenes(self) -> Job:
        if not self.scenes and not self.stacks and not self.source:
            raise ValueError("name at least one scene, folder, prefix, list of scenes or source")
        return self


def load_job(path: str | None, overrides: dict[str, Any]) -> Job:
    """The job of a TOML file (or none) with the command line's values on top. Raises ConfigError."""
    return load_settings(Job, path, overrides)


def read_toml(path: str) -> dict[str, Any]:
    """The values of a TOML file, unchecked. Raises ConfigError."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: there is no such file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path}: not a readable TOML file: {error}") from error


def load_settings(model: type[_T], path: str | None, overrides: dict[str, Any]) -> _T:
    """The ``model`` of a TOML file (or none) with the values of ``overrides`` on top. Raises ConfigError."""
    values = read_toml(path) if path is not None else {}
    for key, value in overrides.items():
        if isinstance(value, dict):
            section = values.setdefault(key, {})
            if isinstance(section, dict):  # the check says what is wrong with another value
                section.update({k: v for k, v in value.items() if v is not None})
        elif value is not None:
            values[key] = value
    return check(model, values, where=path or "the command line")


def check(model: type[_T], values: dict[str, Any], *, where: str) -> _T:
    """``values`` as a ``model``; a ConfigError says in one sentence which key is wrong and what was wanted."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{where}: {what_is_wrong(error, model, values)}") from error


def what_is_wrong(
    error: ValidationError, model: type[BaseModel], values: Mapping[str, Any], *, below: tuple[str, ...] = ()
) -> str:
    """The first thing that is wrong with ``values`` as a ``model``, in a sentence; ``below`` is where in the file they stand."""
    first, keys = _first(error, values)
    place = _place((*below, *keys))
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        name, known = str(first["loc"][-1]), _known_keys(model)
        near = difflib.get_close_matches(name, known, n=1) if name not in known else []
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"there is no setting {place!r}{hint}"
    if first["type"] == "missing":
        return f"the setting {place!r} is missing"
    told = str(first["ctx"]["error"]) if first["type"] == "value_error" else first["msg"]
    got = "" if isinstance(first["input"], (dict, BaseModel)) else f", got {_short(first['input'])}"
    return f"{place}: {told}{got}" if place else f"{told}{got}"


def _first(error: ValidationError, values: Any) -> tuple[Any, list[str | int]]:
    """The first error and its keys; where several kinds were tried on a value, that of the kind which got furthest into it."""
    errors = [(one, _keys(one["loc"], values, is_missing=one["type"] == "missing")) for one in error.errors()]
    begun = errors[0][1]
    return max((one for one in errors if one[1][: len(begun)] == begun), key=lambda one: len(one[1]))


def _keys(loc: Sequence[str | int], values: Any, *, is_missing: bool) -> list[str | int]:
    """The keys and places of ``loc`` that ``values`` have; the others name what pydantic tried of several kinds."""
    keys: list[str | int] = []
    at: Any = values
    for part in loc:
        if part in at if isinstance(at, Mapping) else isinstance(at, (list, tuple)) and part in range(len(at)):
            keys.append(part)
            at = at[part]
    return [*keys, loc[-1]] if is_missing else keys


def _place(keys: Sequence[str | int]) -> str:
    """Keys with dots between them; tables and values of a list are counted from 1: ``stage 2: chip``."""
    place = ""
    for key in keys:
        if isinstance(key, int):
            place += f" {key + 1}:"
        else:
            place += ("" if not place else " " if place.endswith(":") else ".") + key
    return place.removesuffix(":")


def _short(value: object) -> str:
    text = redact(repr(value))
    return text if len(text) <= 80 else text[:77] + "..."


def _known_keys(annotation: Any) -> list[str]:
    """The keys of a model and of those below it, however they are held, dataclasses among them."""
    if is_dataclass(annotation):
        return [field.name for field in fields(annotation)]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        held = annotation.model_fields
        names = [field.alias or name for name, field in held.items()]
        return [*names, *(key for field in held.values() for key in _known_keys(field.annotation))]
    return [key for one in get_args(annotation) for key in _known_keys(one)]


def job_schema() -> str:
    """The JSON Schema of a job file, indented."""
    return json.dumps(Job.model_json_schema(), indent=2)
