"""A scene: one georeferenced image and what is known of it before a pixel is read; and the listing of many."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property

from geoseg.errors import BandError, ConfigError, NothingReadableError
from geoseg.raster import store
from geoseg.raster.grid import Grid

_SUFFIXES = (".tif", ".tiff", ".gtiff", ".cog")
_MAX_ID = 100


@dataclass(frozen=True, slots=True)
class SceneRef:
    """Where a scene lies and the id under which its mask is published."""

    id: str
    uri: str


@dataclass(frozen=True)
class Scene:
    """A scene whose header was read: grid, bands and the version (ETag) that all later reads must see.

    ``bands`` names the bands in file order (``red``, ``gray``, ``alpha``, ``undefined`` ...), ``levels`` the sizes
    (row, col) of the full image and then of each overview whose validity is known, ``nodata`` the value of each band
    that marks no data. ``mask_etag`` is the version of the mask beside it (``mask_uri``), None when there is none.
    """

    id: str
    uri: str
    etag: str
    size: int
    grid: Grid
    bands: tuple[str, ...]
    dtype: str
    levels: tuple[tuple[int, int], ...]
    nodata: tuple[float | None, ...]
    has_mask: bool
    mask_etag: str | None
    block_shape: tuple[int, int]
    datetime: str

    @cached_property
    def alpha(self) -> int | None:
        """Place of the alpha band (from 0), if there is one."""
        return self.bands.index("alpha") if "alpha" in self.bands else None

    def band_indexes(self, wanted: tuple[str, ...], chosen: tuple[int, ...] | None) -> tuple[int, ...]:
        """Places (from 0) of the bands called ``wanted``, or ``chosen`` (from 1, as people count) instead.

        Raises BandError when they cannot be told apart.
        """
        if "palette" in self.bands and chosen is None:
            raise BandError(
                f"{self.id}: its band is an index into a colour table, not {', '.join(wanted)}; expand it first with "
                "gdal_translate -expand rgb, or name the bands to take as they are with --bands"
            )
        if chosen is not None:
            if len(chosen) != len(wanted) or not all(1 <= band <= len(self.bands) for band in chosen):
                raise BandError(
                    f"{self.id}: --bands must name {len(wanted)} of its {len(self.bands)} bands (counted from 1), got "
                    f"{','.join(map(str, chosen))}"
                )
            return tuple(band - 1 for band in chosen)
        if any(self.bands.count(name) != 1 for name in wanted):
            kept = tuple(name for name in self.bands if name != "alpha")
            if len(wanted) == len(kept) == 1:
                return (self.bands.index(kept[0]),)
            first = ",".join(str(1 + index % max(1, len(kept))) for index in range(len(wanted)))
            raise BandError(
                f"{self.id}: the bundle takes {', '.join(wanted)}, the scene has {len(self.bands)} band(s) of {self.dtype}"
                f" ({', '.join(self.bands)}); say which to take, for example --bands {first}"
            )
        return tuple(self.bands.index(name) for name in wanted)


def mask_uri(uri: str) -> str:
    """Where the mask beside a scene would lie."""
    return uri + ".msk"


def scene_is_unchanged(scene: Scene) -> bool:
    """Whether the scene, and the mask beside it if it has one, are the versions that were described."""
    try:
        if scene.mask_etag is not None and store.head(mask_uri(scene.uri)).etag != scene.mask_etag:
            return False
        return store.head(scene.uri).etag == scene.etag
    except store.ObjectMissingError:
        return False


def list_scenes(sources: Iterable[str]) -> list[SceneRef]:
    """The scenes of the sources, sorted by URI, each once.

    A source is a GeoTIFF, a folder or prefix (every ``.tif``, ``.tiff``, ``.gtiff`` or ``.cog`` below it), a glob (``*``,
    ``?``, ``[...]``; ``*`` also crosses folders) or a ``.txt`` file with a source per line (``#`` begins a comment).
    A scene's id is its path below the source, without the suffix. Raises NothingReadableError when a source has none.
    """
    names: dict[str, str] = {}
    for source in sources:
        found = dict(_expand(source))
        if not found:
            raise NothingReadableError(
                f"{store.redact(source)}: no scene found there (looked for {', '.join(_SUFFIXES)}); check the path or prefix"
            )
        names = found | names
    slugs = {uri: _slug(name) for uri, name in names.items()}
    taken = Counter(slugs.values())
    refs = [SceneRef(slug if taken[slug] == 1 else _with_hash(slug, uri), uri) for uri, slug in slugs.items()]
    return sorted(refs, key=lambda ref: ref.uri)


def _expand(source: str) -> Iterator[tuple[str, str]]:
    """URI and name (path below the source) of each scene of a source."""
    uri = store.normalize_uri(source)
    if uri.lower().endswith(".txt"):
        for listed in _lines(uri):
            yield from _expand(listed)
    elif not uri.endswith("/") and store.exists(uri):
        yield uri, store.base_name(uri)
    elif re.search(r"[*?\[]", uri):
        root = re.split(r"[*?\[]", uri, maxsplit=1)[0].rsplit("/", 1)[0]
        for info in store.walk(root + "/"):
            if fnmatchcase(info.uri, uri):
                yield info.uri, info.uri[len(root) + 1 :]
    else:
        root = uri.rstrip("/")
        for info in store.walk(root + "/"):
            below = info.uri[len(root) + 1 :]
            if below.lower().endswith(_SUFFIXES) and not below.startswith(("_geoseg/", ".")):
                yield info.uri, below


def _lines(uri: str) -> Iterator[str]:
    for line in store.read(uri).decode("utf-8-sig", errors="replace").splitlines():
        text = line.split("#", 1)[0].strip()
        if text.lower().endswith(".txt"):
            raise ConfigError(f"{store.redact(uri)}: a list of scenes may not name another list, {text}")
        if text:
            yield text


def _slug(name: str) -> str:
    stem = name
    for suffix in _SUFFIXES:
        if stem.lower().endswith(suffix):
            stem = stem[: -len(suffix)]
            break
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-.") or "scene"
    return slug if slug == stem.replace("/", "-") and len(slug) <= _MAX_ID else _with_hash(slug[:_MAX_ID], name)


def _with_hash(slug: str, text: str) -> str:
    return f"{slug}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
