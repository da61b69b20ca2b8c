"""Small pictures of a few scenes of a run, each with its mask: the image from an overview, the mask from its thumbnail."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from PIL import Image

from geoseg.model.pictures import NO_DATA, as_rgb, png
from geoseg.predict.failure import Failure, attempt
from geoseg.predict.ledger import SceneReport
from geoseg.predict.plan import RunSpec
from geoseg.raster import store
from geoseg.raster.geotiff import SceneReader, describe
from geoseg.raster.scene import SceneRef
from geoseg.raster.window import Window

MOST = 24
_MOST_BAD = 12
_SIDE = 256
_MOST_BYTES, _MOST_PIXELS = 8 << 20, 32 << 20  # what is read of one scene
_STRIP_PIXELS = 4 << 20
_QUALITY = 78
_COLORS = 32
_THREADS = 4


@dataclass(frozen=True, slots=True)
class Thumbnail:
    """A scene's image (JPEG) and mask (PNG), small; empty where there is none, or none that can be read cheaply."""

    id: str
    image: bytes
    mask: bytes


def thumbnails_of(scenes: Iterable[SceneReport], run: RunSpec) -> list[Thumbnail]:
    """Pictures of at most ``MOST`` scenes: held or failed ones first, then published ones, taken evenly from the list."""
    chosen = choose(scenes)
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="thumbnails") as pool:
        return list(pool.map(lambda scene: Thumbnail(scene.id, _image(scene, run), _mask(scene)), chosen))


def choose(scenes: Iterable[SceneReport]) -> list[SceneReport]:
    """The scenes to show; the same, whatever their order."""
    ordered = sorted(scenes, key=lambda scene: scene.uri)
    failed, held, good = ([one for one in ordered if one.status == told] for told in ("failed", "held", "published"))
    bad = _evenly([*failed, *held], _MOST_BAD)
    return bad + _evenly(good, MOST - len(bad))


def _evenly(scenes: Sequence[SceneReport], most: int) -> list[SceneReport]:
    if len(scenes) <= most:
        return list(scenes)
    return [scenes[place] for place in np.linspace(0, len(scenes) - 1, most).round().astype(int)]


def _image(scene: SceneReport, run: RunSpec) -> bytes:
    """A JPEG of the scene's first bands of the network, b"" when it cannot be had."""
    found = attempt(lambda: _read_image(SceneRef(scene.id, scene.uri), run), scene.id, "drawing its image")
    return b"" if isinstance(found, Failure) else found


def _read_image(ref: SceneRef, run: RunSpec) -> bytes:
    scene = describe(ref, run.read_options)
    reader = SceneReader(scene)
    level = max((place for place, shape in enumerate(scene.levels) if max(shape) >= _SIDE), default=0)
    height, width = scene.levels[level]
    bands = scene.band_indexes(run.description.bands, run.config.bands)
    bands = bands[:3] if len(bands) >= 3 else bands[:1]
    stored = reader.stored_bytes(Window(0, 0, scene.grid.width, scene.grid.height), level=level)
    if stored > _MOST_BYTES or height * width > _MOST_PIXELS:
        return b""
    step = max(1, max(height, width) // (2 * _SIDE))
    rows = step * max(1, _STRIP_PIXELS // (width * step))
    strips = [
        reader.read(Window(0, row, width, min(rows, height - row)), bands, level=level)
        for row in range(0, height, rows)
    ]
    pixels = np.concatenate([strip.pixels[:, ::step, ::step] for strip in strips], axis=1)
    valid = np.concatenate([strip.valid[::step, ::step] for strip in strips])
    out = io.BytesIO()
    _small(Image.fromarray(as_rgb(pixels, valid)), Image.Resampling.LANCZOS).save(
        out, "JPEG", quality=_QUALITY, optimize=True
    )
    return out.getvalue()


def _mask(scene: SceneReport) -> bytes:
    """A PNG of the mask that was published or is held back, b"" when there is none."""
    if not scene.item and not scene.thumbnail:
        return b""
    found = attempt(lambda: _read_mask(scene), scene.id, "drawing its mask")
    return b"" if isinstance(found, Failure) else found


def _read_mask(scene: SceneReport) -> bytes:
    uri = scene.thumbnail
    if not uri:
        name = store.base_name(json.loads(store.read(scene.item))["assets"]["thumbnail"]["href"])
        uri = store.join(scene.item.rsplit("/", 1)[0], name)
    with Image.open(io.BytesIO(store.read(uri))) as stored:
        small = _small(stored.convert("RGBA"), Image.Resampling.BOX)
    flat = Image.alpha_composite(Image.new("RGBA", small.size, (*NO_DATA, 255)), small).convert("RGB")
    return png(flat.quantize(_COLORS))


def _small(picture: Image.Image, kind: Image.Resampling) -> Image.Image:
    """The picture, its longer side at most ``_SIDE`` pixels."""
    scale = min(1.0, _SIDE / max(picture.size))
    width, height = (max(1, round(size * scale)) for size in picture.size)
    return picture.resize((width, height), kind)
