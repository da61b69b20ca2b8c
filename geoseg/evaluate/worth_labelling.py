"""A published output with uncertainty in, the squares most worth labelling out, as GeoParquet and as a picture.

Labels where the network is least certain teach it more than labels where it is sure (uncertainty sampling: Lewis and Gale
1994); squares from many places teach it more than as many from one, so a scene gives a share of them at most.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray
from PIL import Image
from shapely.geometry import shape

from geoseg.config import PredictConfig
from geoseg.errors import ConfigError, NothingReadableError, SceneChangedError, SceneError
from geoseg.evaluate.squares import STEPS, Lattice, Square, UncertainScene, best_squares
from geoseg.model.description import ClassName
from geoseg.model.pictures import NO_DATA, Rgb, as_rgb, colored, page, swatch
from geoseg.predict.failure import Failure, attempt
from geoseg.predict.output import list_output
from geoseg.predict.stac import footprint
from geoseg.raster import store
from geoseg.raster.geotiff import ReadOptions, SceneReader, describe
from geoseg.raster.grid import Grid
from geoseg.raster.scene import SceneRef

SHOWN = 12
_MOST, _SMALLEST, _LARGEST, _WIDEST = 10_000, 16, 2048, 8
_AT_ONCE = 4
_NAMED = 5
_ROWS = 1000  # of a row group
_SIDE = 256
_QUALITY = 88
_HEAT = ((0, 0, 4), (66, 10, 104), (147, 38, 103), (221, 81, 58), (252, 165, 10), (252, 255, 164))  # dark is sure


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Which squares are wanted; raises ConfigError for what makes no sense.

    ``top``: how many. ``chip``: their side in pixels of the scene; or ``chip_m``, in metres, so that squares of scenes with
    pixels of different sizes show as much ground. ``spacing``: pixels between two of one scene, at least; with 0 they may
    touch. ``scene_share``: the most that one scene gives, as far as there are others. ``min_valid``: least share of pixels
    that are valid.
    """

    top: int = 50
    chip: int = 256
    chip_m: float | None = None
    spacing: int = 1
    scene_share: float = 0.2
    min_valid: float = 0.5

    def __post_init__(self) -> None:
        for name, value, low, high in (
            ("top", self.top, 1, _MOST),
            ("chip", self.chip, _SMALLEST, _LARGEST),
            ("spacing", self.spacing, 0, _WIDEST * self.chip),
            ("scene-share", self.scene_share, 0, 1),
            ("min-valid", self.min_valid, 0, 1),
        ):
            if not low <= value <= high:
                raise ConfigError(f"--{name} must be {low} to {high}, got {value:g}")
        if self.chip % 2:
            raise ConfigError(f"--chip must be even, since squares lie half of one apart, got {self.chip}")
        if self.chip_m is not None and not 0 < self.chip_m < np.inf:
            raise ConfigError(f"--chip-m must be metres, more than 0, got {self.chip_m:g}")

    def lattice(self, grid: Grid, scene_id: str) -> Lattice:
        """Where a scene's squares lie. Raises SceneError when they would be of too few or too many pixels."""
        chip = self.chip if self.chip_m is None else 2 * round(self.chip_m / grid.resolution_m / 2)
        if not _SMALLEST <= chip <= _LARGEST:
            raise SceneError(
                f"{scene_id}: --chip-m {self.chip_m:g} are {chip} pixels of {grid.resolution_m:.3g} m there, and squares have "
                f"{_SMALLEST} to {_LARGEST}"
            )
        return Lattice(chip=chip, spacing=self.spacing, min_valid=self.min_valid)

    def most_per_scene(self, num_scenes: int) -> int:
        """The most squares that a scene gives: its share, or an even one when there are too few scenes for that."""
        return max(1, -int(-self.scene_share * self.top // 1), -(-self.top // num_scenes))


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedScene:
    """What an item tells of a scene that has uncertainty. ``sources``, ``etag``: its images (redacted), version of the first."""

    id: str
    item: str
    kind: str
    uncertainty: str
    mask: str
    classes: tuple[ClassName, ...]
    sources: tuple[str, ...]
    etag: str
    bands: tuple[str, ...]
    settings: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorthSquare:
    """A square that was chosen, its scene, the scene's grid, and where it lies in longitude and latitude (None: not on Earth)."""

    square: Square
    scene: PublishedScene
    grid: Grid
    outline: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Worth:
    """The squares most worth labelling, the first first. ``remarks``: what was left out; ``num_failed``: scenes not readable."""

    squares: tuple[WorthSquare, ...]
    kind: str
    num_scenes: int
    num_failed: int
    remarks: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        """The process's exit code."""
        return 1 if self.num_failed else 0

    def lines(self) -> list[str]:
        """The list for a person."""
        wide = max((len(one.scene.id) for one in self.squares), default=0)
        chosen_from = len({one.scene.id for one in self.squares})
        lines = [f"{len(self.squares)} squares from {chosen_from} of {self.num_scenes} scenes, by mean {self.kind}"]
        for rank, one in enumerate(self.squares, 1):
            window = one.square.window
            lines.append(
                f"{rank:>5}  {one.square.score:.3f}  {one.scene.id:{wide}}  {window.width} x {window.height} at column "
                f"{window.col_off}, row {window.row_off}"
            )
        return lines


def list_worth_labelling(out: str, wanted: Wanted, *, to: str, picture: str | None = None) -> Worth:
    """Find the squares of an output that are most worth labelling, write them to ``to``, draw the first into ``picture``.

    Raises ConfigError for names that do not end as they should, and without geopandas; as ``find_worth_labelling`` besides.
    """
    if not to.lower().endswith(".parquet"):
        raise ConfigError(f"{store.redact(to)}: the list is GeoParquet; give it a name that ends in .parquet")
    if picture is not None and not picture.lower().endswith((".jpg", ".jpeg", ".png")):
        raise ConfigError(
            f"{store.redact(picture)}: a picture is a JPEG or a PNG; give it a name that ends in .jpg or .png"
        )
    if find_spec("geopandas") is None:
        raise ConfigError("GeoParquet is written by geopandas, which is missing: pip install 'geoseg[vector]'")
    worth = find_worth_labelling(out, wanted)
    _write_table(worth, to)
    remarks = _write_picture(worth, picture) if picture is not None else []
    return replace(worth, remarks=(*worth.remarks, *remarks))


def find_worth_labelling(out: str, wanted: Wanted) -> Worth:
    """The squares of an output of whose pixels its networks are least certain.

    Squares are taken in the order of their mean uncertainty, of a scene no more than its share, and none that overlaps or
    touches one of another scene. The same output gives the same list. Memory holds a few squares of each scene.

    Raises NothingReadableError when nothing is published there, nothing with uncertainty, or no square has enough valid
    pixels; AccessDeniedError, ConfigError, StoreError. What cannot be read of one scene is told.
    """
    root = store.normalize_uri(out).rstrip("/")
    scenes, remarks = _scenes_with_uncertainty(root)
    most = wanted.most_per_scene(len(scenes))
    found: list[tuple[Square, PublishedScene, Grid]] = []
    num_failed = 0
    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="squares") as pool:
        for scene, got in zip(
            scenes, pool.map(partial(_try_to_look, wanted=wanted, most=2 * most), scenes), strict=True
        ):
            if isinstance(got, Failure):
                got.raise_if_stop()
                num_failed += 1
                remarks.append(got.sentence)
            else:
                grid, squares = got
                found += [(square, scene, grid) for square in squares]
    if not found:
        raise NothingReadableError(
            f"{store.redact(root)}: no square has {wanted.min_valid:.0%} of its pixels valid; take a smaller --chip or "
            f"--min-valid{''.join(f'. {one}' for one in remarks)}"
        )
    chosen = _choose(found, wanted.top, most)
    if len(chosen) < wanted.top:
        remarks.append(
            f"no more squares are apart from these, {wanted.min_valid:.0%} valid, and within the {most} that a scene may give; "
            "take a smaller --chip, --spacing or --min-valid, or a larger --scene-share"
        )
    return Worth(
        squares=tuple(chosen),
        kind=scenes[0].kind,
        num_scenes=len(scenes),
        num_failed=num_failed,
        remarks=tuple(remarks),
    )


def _scenes_with_uncertainty(root: str) -> tuple[list[PublishedScene], list[str]]:
    """The scenes of an output whose uncertainty is of the kind that most have, by id, and what is left out."""
    output = list_output(root)
    if not output.items:
        raise NothingReadableError(f"{store.redact(root)}: nothing is published there; check the output's name")
    items = [(scene_id, info.uri) for scene_id, info in sorted(output.items.items())]
    read = list(store.in_parallel(_try_to_read, items))
    remarks = []
    for one in read:
        if isinstance(one, Failure):
            one.raise_if_stop()
            remarks.append(one.sentence)
    with_it = [one for one in read if isinstance(one, PublishedScene)]
    without = [scene_id for (scene_id, _), one in zip(items, read, strict=True) if one is None]
    remedy = "predict them with --uncertainty entropy, which does them again"
    if not with_it:
        raise NothingReadableError(f"{store.redact(root)}: no scene has a layer of uncertainty; {remedy}")
    if without:
        remarks.append(f"left out, since they have no layer of uncertainty: {_some(without)}; {remedy}")
    counts = Counter(one.kind for one in with_it)
    kind = min(counts, key=lambda name: (-counts[name], name))
    others = [one.id for one in with_it if one.kind != kind]
    if others:
        remarks.append(f"left out, since their uncertainty is not the {kind}, as that of most: {_some(others)}")
    return [one for one in with_it if one.kind == kind], remarks


def _some(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _try_to_read(item: tuple[str, str]) -> PublishedScene | Failure | None:
    scene_id, uri = item
    return attempt(lambda: _read_item(scene_id, uri), scene_id, "reading its item")


def _read_item(scene_id: str, uri: str) -> PublishedScene | None:
    """What a scene's item tells; None when it has no uncertainty. Raises SceneError when it is not geoseg's."""
    try:
        item = json.loads(store.read(uri))
        assets, properties = item["assets"], item["properties"]
        if "uncertainty" not in assets:
            return None
        folder = uri.rsplit("/", 1)[0]
        uncertainty, mask = (
            store.join(folder, assets[key]["href"].removeprefix("./")) for key in ("uncertainty", "mask")
        )
        etags = properties["geoseg:input_etag"]
        return PublishedScene(
            id=scene_id,
            item=uri,
            kind=properties["geoseg:settings"]["uncertainty"],
            uncertainty=uncertainty,
            mask=mask,
            classes=tuple(
                ClassName(name=one["name"], color=_rgb(one["color_hint"]))
                for one in assets["mask"]["classification:classes"]
                if "count" in one
            ),
            sources=tuple(link["href"] for link in item["links"] if link["rel"] == "derived_from"),
            etag=etags[0] if isinstance(etags, list) else etags,
            bands=tuple(properties["mlm:input"][0]["bands"]),
            settings=properties["geoseg:settings"],
        )
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise SceneError(f"{scene_id}: {store.redact(uri)} is not an item of geoseg's; move it away") from error


def _rgb(color_hint: str) -> Rgb:
    red, green, blue = bytes.fromhex(color_hint)
    return red, green, blue


def _try_to_look(scene: PublishedScene, *, wanted: Wanted, most: int) -> tuple[Grid, list[Square]] | Failure:
    return attempt(lambda: _look(scene, wanted, most), scene.id, "reading its uncertainty")


def _look(scene: PublishedScene, wanted: Wanted, most: int) -> tuple[Grid, list[Square]]:
    layers = UncertainScene(scene.id, uncertainty=scene.uncertainty, mask=scene.mask, num_classes=len(scene.classes))
    return layers.grid, best_squares(layers, wanted.lattice(layers.grid, scene.id), most)


def _choose(found: Iterable[tuple[Square, PublishedScene, Grid]], top: int, most_per_scene: int) -> list[WorthSquare]:
    chosen: list[WorthSquare] = []
    taken = Counter[str]()
    for square, scene, grid in sorted(found, key=lambda one: one[0].place):
        if len(chosen) == top:
            break
        if taken[scene.id] == most_per_scene:
            continue
        geometry, _ = footprint(grid.crop(square.window))
        outline = shape(geometry) if geometry is not None else None
        elsewhere = [one.outline for one in chosen if one.scene.id != scene.id]
        if outline is None or not shapely.intersects(outline, np.array(elsewhere, dtype=object)).any():
            taken[scene.id] += 1
            chosen.append(WorthSquare(square=square, scene=scene, grid=grid, outline=outline))
    return chosen


def _write_table(worth: Worth, to: str) -> None:
    """Write the squares as GeoParquet 1.1 in longitude and latitude, with a bounding box for each, the first first.

    ``share_of_<class>`` is the share of a class among a square's valid pixels, empty where the scene's mask has no such class.
    Raises StoreError, AccessDeniedError.
    """
    import geopandas  # noqa: PLC0415 - an extra

    names = dict.fromkeys(one.name for each in worth.squares for one in each.scene.classes)
    rows = []
    for rank, one in enumerate(worth.squares, 1):
        square, window = one.square, one.square.window
        shares = {
            each.name: count / square.valid for each, count in zip(one.scene.classes, square.classes, strict=True)
        }
        rows.append(
            {
                "rank": rank,
                "scene": one.scene.id,
                "score": square.score,
                "share_valid": square.share_valid,
                **{f"share_of_{name}": shares.get(name, np.nan) for name in names},
                "col_off": window.col_off,
                "row_off": window.row_off,
                "width": window.width,
                "height": window.height,
                "uncertainty": worth.kind,
                "source": "; ".join(one.scene.sources),
                "item": store.redact(one.scene.item),
            }
        )
    frame = geopandas.GeoDataFrame(rows, geometry=[one.outline for one in worth.squares], crs="EPSG:4326")
    out = io.BytesIO()
    frame.to_parquet(out, index=False, write_covering_bbox=True, schema_version="1.1.0", row_group_size=_ROWS)
    store.write(store.normalize_uri(to), out.getvalue())


def _write_picture(worth: Worth, to: str) -> list[str]:
    """Draw the first twelve squares: image, mask, uncertainty; a JPEG, or a PNG when its name ends so.

    Returns a sentence for each image that could not be read. Raises StoreError, AccessDeniedError.
    """
    shown = worth.squares[:SHOWN]
    classes = list({one.name: one for each in shown for one in each.scene.classes[1:]}.values())
    rows, captions, remarks = [], [], []
    for rank, one in enumerate(shown, 1):
        image = attempt(partial(_image, one), one.scene.id, "reading its image")
        if isinstance(image, Failure):
            image.raise_if_stop()
            remarks.append(f"not shown: {image.sentence}")
            image = np.full((one.square.window.height, one.square.window.width, 3), NO_DATA, np.uint8)
        layers = UncertainScene(
            one.scene.id,
            uncertainty=one.scene.uncertainty,
            mask=one.scene.mask,
            num_classes=len(one.scene.classes),
        )
        unsure_hw, mask_hw = layers.read(one.square.window)
        rows.append([image, colored(mask_hw, one.scene.classes), _heat_table()[unsure_hw]])
        captions.append(f"{rank}: {one.scene.id}, mean {worth.kind} {one.square.score:.3f}")
    legend = [(one.name, swatch(one.color)) for one in classes]
    legend += [(name, swatch(_heat(share))) for name, share in (("sure", 0.0), ("half", 0.5), ("guess", 1.0))]
    drawn = page(["image", "mask", "uncertainty"], rows, legend, side=_SIDE, captions=captions)
    if not to.lower().endswith(".png"):
        out = io.BytesIO()
        with Image.open(io.BytesIO(drawn)) as picture:
            picture.convert("RGB").save(out, "JPEG", quality=_QUALITY, optimize=True)
        drawn = out.getvalue()
    store.write(store.normalize_uri(to), drawn)
    return remarks


def _image(one: WorthSquare) -> NDArray[np.uint8]:
    """The square's image (row, col, rgb), of a stack that of its first date. Raises SceneError, StoreError."""
    scene, config = one.scene, PredictConfig(**one.scene.settings)
    options = ReadOptions(assume_crs=config.assume_crs, nodata=config.nodata, sidecar_mask=config.sidecar_mask)
    source = describe(SceneRef(scene.id, scene.sources[0]), options)
    if source.etag != scene.etag:
        raise SceneChangedError(f"{scene.id}: its image was replaced since it was predicted; predict it again")
    bands = source.band_indexes(scene.bands, config.bands)
    read = SceneReader(source).read(one.square.window, bands)
    return as_rgb(read.pixels, read.valid)


def _heat(share: float) -> Rgb:
    """The colour of an uncertainty of 0 to 1."""
    at = np.linspace(0, 1, len(_HEAT))
    red, green, blue = (round(float(np.interp(share, at, channel))) for channel in zip(*_HEAT, strict=True))
    return red, green, blue


def _heat_table() -> NDArray[np.uint8]:
    """Colours (256, rgb) of steps; the last is no data."""
    return np.array([*(_heat(step / STEPS) for step in range(STEPS + 1)), NO_DATA], np.uint8)
