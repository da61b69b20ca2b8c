"""A scene: one georeferenced image and what is known of it before a pixel is read; and the listing of many."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property

from geoseg.errors import BandError, ConfigError, NothingReadableError, SceneDeniedError
from geoseg.raster import store
from geoseg.raster.grid import Grid
from geoseg.raster.versions import Versions

_SUFFIXES = (".tif", ".tiff", ".gtiff", ".cog")
_MAX_ID = 100
ALPHA = "alpha"  # the name of a band
_MAGIC = re.compile(r"[*?\[]")
_ASSET = re.compile(r"(?:mask|probabilities|uncertainty)-[0-9a-f]{16}\.tif")


@dataclass(frozen=True, slots=True)
class SceneRef:
    """Where a scene lies and the id under which its mask is published.

    For a stack ``dates`` has the URI of the scene at each date, "" where there is none, and ``uri`` is the first of them.
    ``sums`` are multihashes in hex, one for each of ``uris``, where files are to be compared with them (``geoseg.raster.sums``).
    """

    id: str
    uri: str
    dates: tuple[str, ...] = ()
    sums: tuple[str, ...] = field(default=(), compare=False)

    @property
    def uris(self) -> tuple[str, ...]:
        """Where the images are that make it up."""
        return tuple(uri for uri in self.dates if uri) or (self.uri,)


@dataclass(frozen=True)
class Scene:
    """A scene whose header was read: grid, bands and the version (ETag) that all later reads must see.

    ``bands`` names the bands in file order (``red``, ``gray``, ``alpha``, ``undefined`` ...), ``levels`` the sizes
    (row, col) of the full image and then of each overview whose validity is known, ``nodata`` the value of each band
    that marks no data, ``nodata_tags`` what the file says of it: beside a mask or an alpha band that does not count.
    ``mask_etag`` is the version of the mask beside it (``mask_uri``), None when there is none.
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
    nodata_tags: tuple[float | None, ...]
    has_mask: bool
    mask_etag: str | None
    block_shape: tuple[int, int]
    datetime: str

    @cached_property
    def alpha(self) -> int | None:
        """Place of the alpha band (from 0), if there is one."""
        return self.bands.index(ALPHA) if ALPHA in self.bands else None

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
            kept = tuple(name for name in self.bands if name != ALPHA)
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


def list_scenes(sources: Iterable[str], *, out: str | None = None, versions: Versions | None = None) -> list[SceneRef]:
    """The scenes of the sources, sorted by URI, each once.

    A source is a GeoTIFF, a folder or prefix (every ``.tif``, ``.tiff``, ``.gtiff`` or ``.cog`` below it), a glob (``*``,
    ``?``, ``[...]``; ``*`` also crosses folders) or a ``.txt`` file with a source per line (``#`` at its beginning or after
    a space begins a comment). A name that exists is taken as it is, whatever characters it has. What was published under
    ``out`` is no scene, unless it is named itself. A scene's id is its path below the source, without the suffix; no two
    differ in case alone. ``versions`` gets to know what was listed on the way.

    Raises NothingReadableError when a source has none, ConfigError, AccessDeniedError, StoreError.
    """
    names: dict[str, str] = {}
    versions = Versions() if versions is None else versions
    for source in sources:
        found = dict(_expand(source, out, versions))
        if not found:
            raise NothingReadableError(
                f"{store.redact(source)}: no scene found there (looked for {', '.join(_SUFFIXES)}); check the path or prefix"
            )
        names = found | names
    ids = {uri: slug(name) for uri, name in names.items()}
    taken = Counter(one.lower() for one in ids.values())
    refs = [SceneRef(one if taken[one.lower()] == 1 else _with_hash(one, uri), uri) for uri, one in ids.items()]
    return sorted(refs, key=lambda ref: ref.uri)


def _expand(source: str, out: str | None, versions: Versions) -> Iterator[tuple[str, str]]:
    """URI and name (path below the source) of each scene of a source."""
    uri = store.normalize_uri(source)
    if uri.lower().endswith(".txt"):
        lines = list(_lines(uri))
        versions.list_folders(store.normalize_uri(line) for line in lines if line.lower().endswith(_SUFFIXES))
        for line in lines:
            yield from _expand(line, out, versions)
    elif versions.etag(uri) or _is_object(uri):
        yield uri, store.base_name(uri)
    else:
        root = uri.rstrip("/") + "/"
        found = [one for one in _below(root, out, versions) if _looks_like_a_scene(one.removeprefix(root))]
        if not found and _MAGIC.search(uri):
            root = _MAGIC.split(uri, maxsplit=1)[0].rpartition("/")[0] + "/"
            found = [one for one in _below(root, out, versions) if fnmatchcase(one, uri)]
        for one in found:
            yield one, one.removeprefix(root)


def _looks_like_a_scene(below: str) -> bool:
    return below.lower().endswith(_SUFFIXES) and not below.startswith(("_geoseg/", "."))


def _is_object(uri: str) -> bool:
    try:
        return store.exists(uri)
    except SceneDeniedError:
        return uri.lower().endswith(_SUFFIXES)


def _below(root: str, out: str | None, versions: Versions) -> Iterator[str]:
    """The objects below a folder or prefix, but for the assets beside the items that were published under ``out``.

    What geoseg keeps there for itself is left out too: a canary's masks are no scenes of the next night.
    """
    uris = versions.walk(root)
    published = {uri.rpartition("/")[0] for uri in uris if uri.endswith("/item.json")}
    for uri in uris:
        folder, _, name = uri.rpartition("/")
        is_asset = folder in published and folder.rpartition("/")[0] == out and _ASSET.fullmatch(name)
        if not is_asset and not uri.startswith(f"{out}/_geoseg/"):
            yield uri


def _lines(uri: str) -> Iterator[str]:
    for line in store.read(uri).decode("utf-8-sig", errors="replace").splitlines():
        text = re.split(r"(?:^|\s)#", line, maxsplit=1)[0].strip()
        if text.lower().endswith(".txt"):
            raise ConfigError(f"{store.redact(uri)}: a list of scenes may not name another list, {text}")
        if text:
            yield text


def slug(name: str) -> str:
    """A name as an id: without suffix, with nothing but letters, digits, dots, dashes and underscores."""
    stem = name
    for suffix in _SUFFIXES:
        if stem.lower().endswith(suffix):
            stem = stem[: -len(suffix)]
            break
    made = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).rstrip("-.").lstrip("-._") or "scene"
    return made if made == stem.replace("/", "-") and len(made) <= _MAX_ID else _with_hash(made[:_MAX_ID], name)


def _with_hash(name: str, text: str) -> str:
    digest = hashlib.sha256(text.encode(errors="surrogatepass"))  # JSON may hold what UTF-8 does not
    return f"{name}-{digest.hexdigest()[:8]}"
