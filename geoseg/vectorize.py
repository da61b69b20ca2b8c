"""Polygons and a road graph of what an output has published: traced, written beside the masks, or joined over scenes."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq
from pydantic import model_validator

from geoseg.config import ClusterConfig, Section, VectorsConfig, check, read_toml
from geoseg.errors import ConfigError, ConflictError, NothingReadableError, SceneError, StoreError
from geoseg.predict.collection import union_bbox
from geoseg.predict.failure import Failure, attempt
from geoseg.predict.lease import Lease
from geoseg.predict.output import Output, list_output
from geoseg.predict.parts import WORK_FOLDER
from geoseg.predict.publish import ITEM_NAME, VECTORS_NAME, read_item
from geoseg.predict.stac import content_sum
from geoseg.raster import store
from geoseg.raster.geotiff import ReadOptions, describe
from geoseg.raster.scene import Scene, SceneRef

try:
    from geoseg.vector.item import LayerFile, TracedFrom, make_vectors_item
    from geoseg.vector.layers import LayerSpool, convert
    from geoseg.vector.sheet import Sheet, join_scenes, lattice_name, of_scene
    from geoseg.vectorizing import Engine, Layers, Target, TracingProgress, trace_groups, trace_locally
except ModuleNotFoundError as missing:
    raise ConfigError(
        f"tracing needs {missing.name}, which is not installed: pip install 'geoseg[vector]'"
    ) from missing

_CHUNK = 8 << 20
_JOINED_FOLDER = "layers"
_SMALL_WINDOWS = 256
_NOT_JOINED = (
    "nothing was joined: a layer without this scene would take the place of the one that stands; mend it and run again"
)
_SEVERAL = "{} layers: scenes of another CRS, on another lattice of pixels or with other classes are not joined"
_FIGURES = ("buildings", "buildings_km2", "roads", "roads_km", "road_nodes")
Status = Literal["made", "unchanged", "failed"]


class VectorsJob(Section):
    """Which output's masks are traced, how, and where it runs.

    ``scenes``: ids; all without any. ``join``: neighbouring scenes on one lattice of pixels become one, in one file for each
    layer, in ``to`` (by default a folder of the output that no listing of results looks into); otherwise each scene has its
    own, beside its mask. ``overlap``: whose mask counts where scenes that are joined overlap.
    """

    out: str
    scenes: tuple[str, ...] = ()
    join: bool = False
    to: str | None = None
    overlap: Literal["newest", "oldest"] = "newest"
    vectors: VectorsConfig = VectorsConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _says_what_counts(self) -> VectorsJob:
        if self.to is not None and not self.join:
            raise ValueError("to has no effect without join: layers of a scene lie beside its mask")
        if self.join and self.scenes and self.to is None:
            raise ValueError("some scenes joined need a place of their own beside the layer of all: say it with --to")
        if self.cluster.engine == "local" and (self.cluster.address or (self.cluster.workers or 1) > 1):
            raise ValueError("--engine local is one process: leave out --address and --workers, or take --engine ray")
        return self


def load_vectors_job(out: str, scenes: Sequence[str], config: str | None, options: Mapping[str, Any]) -> VectorsJob:
    """The job of the command line; ``config``: a job file of which ``[vectors]`` and ``[cluster]`` count. Raises ConfigError."""
    told = read_toml(config) if config is not None else {}
    options = {key: value for key, value in options.items() if value not in (None, ())}
    vectors = _with(told.get("vectors", {}), {key: options[key] for key in ("formats", "window") if key in options})
    named = {"min_area": "min_area_m2", "square": "square"}
    buildings = {name: options[key] for key, name in named.items() if key in options}
    if isinstance(vectors, dict):
        vectors = {**vectors, "buildings": _with(vectors.get("buildings", {}), buildings)}
    cluster = {key: options[key] for key in ("workers", "address", "engine") if key in options}
    values: dict[str, Any] = {
        "out": out,
        "scenes": tuple(scenes),
        "vectors": vectors,
        "cluster": _with(told.get("cluster", {}), cluster),
        **{key: options[key] for key in ("join", "overlap", "to") if key in options},
    }
    return check(VectorsJob, values, where=config or "the command line")


def _with(section: Any, options: Mapping[Any, Any]) -> Any:
    """A section of a file with options on top; what is no section stays, to be told."""
    return {**section, **options} if isinstance(section, dict) else section


@dataclass(frozen=True, slots=True, kw_only=True)
class Traced:
    """What came of a scene, or of scenes that were joined: the URI of its item and its figures, or why there is none."""

    name: str
    status: Status
    item: str = ""
    figures: dict[str, float]
    sentence: str = ""

    def line(self) -> str:
        """One line for a person."""
        told = ", ".join(f"{value:,.10g} {key.replace('_', ' ')}" for key, value in self.figures.items())
        return f"{self.status}: {self.name}: {self.sentence or told}"


@dataclass(frozen=True, slots=True, kw_only=True)
class VectorsReport:
    """What was traced. ``exit_code`` is 1 when something failed, 0 otherwise."""

    traced: tuple[Traced, ...]
    remarks: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        """The process's exit code."""
        return int(any(one.status == "failed" for one in self.traced))

    def lines(self) -> list[str]:
        """A line for each, and what there is to remark."""
        return [*(one.line() for one in self.traced), *self.remarks]

    def summary(self) -> list[str]:
        """What failed, and one line for all others."""
        failed = [one.line() for one in self.traced if one.status == "failed"]
        counts = Counter(one.status for one in self.traced)
        made = [one for one in self.traced if one.status == "made"]
        sums = Counter[str]()
        for one in made:
            sums.update(one.figures)
        told = ", ".join(f"{value:,.10g} {key.replace('_', ' ')}" for key, value in sums.items())
        in_all = f"vectors: {counts['made']} made, {counts['unchanged']} unchanged" + (f" ({told})" if told else "")
        return [*failed, in_all]

    def to_json(self) -> str:
        """The same as JSON."""
        told = [
            {"name": one.name, "status": one.status, "item": one.item, "figures": one.figures, "sentence": one.sentence}
            for one in self.traced
        ]
        return json.dumps(store.redacted({"traced": told, "remarks": self.remarks}), indent=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """A published mask: its item, and the parts of it that are traced."""

    scene_id: str
    item: dict[str, Any]
    mask: str
    shares: str

    @property
    def sums(self) -> tuple[str, str]:
        """The SHA-256 of mask and probabilities as the item has them."""
        assets = self.item["assets"]
        mask, probabilities = (content_sum(assets[key]) if key in assets else "" for key in ("mask", "probabilities"))
        return mask, probabilities

    @property
    def classes(self) -> tuple[tuple[str, int], ...]:
        """The names of the classes and their codes."""
        told = self.item["assets"]["mask"]["classification:classes"]
        return tuple((str(one["name"]), int(one["value"])) for one in told if not one.get("nodata"))

    @property
    def moment(self) -> str:
        """The (last) time of its imagery."""
        properties = self.item["properties"]
        return str(properties.get("datetime") or properties.get("end_datetime") or "")

    def headers(self) -> tuple[Scene, Scene | None]:
        """The headers of mask and probabilities, as they stand."""
        mask = describe(SceneRef(self.scene_id, self.mask), ReadOptions())
        return mask, describe(SceneRef(self.scene_id, self.shares), ReadOptions()) if self.shares else None


def run_vectorize(job: VectorsJob, *, quiet: bool = False) -> VectorsReport:
    """Trace what an output has published, as far as its vectors are not what would be made now.

    Raises NothingReadableError when nothing is published or a scene that is named is not, ConfigError, OutputHeldError and other
    StopError kinds. A scene that cannot be traced is told, the others go on; the vectors of before stay until the new ones stand.
    """
    root = store.normalize_uri(job.out).rstrip("/")
    with Lease(root) as lease:
        output = list_output(root)
        wanted = _wanted(output, job.scenes)
        return trace_scenes(job, output, wanted, lease, quiet=quiet)


def trace_scenes(
    job: VectorsJob, output: Output, scene_ids: Sequence[str], lease: Lease, *, quiet: bool
) -> VectorsReport:
    """Trace these scenes of an output under the lease held on it. Raises StopError kinds alone."""
    read = list(store.in_parallel(partial(_read_source, output), scene_ids))
    failed = [one for one in read if isinstance(one, Traced)]
    sources = [one for one in read if isinstance(one, _Source)]
    remarks: list[str] = []
    traced: list[Traced] = []
    if job.join and failed:
        remarks = [_NOT_JOINED]
    elif job.join:
        traced, remarks = _trace_joined(job, output.root, sources, lease, quiet=quiet)
    else:
        traced = _trace_each(job, output, sources, lease, quiet=quiet)
    return VectorsReport(traced=tuple(sorted([*failed, *traced], key=lambda one: one.name)), remarks=tuple(remarks))


def _wanted(output: Output, scenes: Sequence[str]) -> list[str]:
    if not output.items:
        raise NothingReadableError(f"{store.redact(output.root)}: nothing is published there; run geoseg predict first")
    missing = [scene for scene in scenes if scene not in output.items]
    if missing:
        raise NothingReadableError(
            f"{store.redact(output.root)}: {missing[0]} is not published there; geoseg status tells what is"
        )
    return list(scenes) or sorted(output.items)


def _read_source(output: Output, scene_id: str) -> _Source | Traced:
    uri = output.items[scene_id].uri

    def read() -> _Source:
        body, version = store.read_version(uri)
        read_item(scene_id, uri, version, body)
        item = json.loads(body)
        assets = item["assets"]
        hrefs = [assets[key]["href"].removeprefix("./") if key in assets else "" for key in ("mask", "probabilities")]
        mask, shares = (store.join(output.root, scene_id, name) if name else "" for name in hrefs)
        return _Source(scene_id=scene_id, item=item, mask=mask, shares=shares)

    found = attempt(read, scene_id, "reading its item")
    return _failed(scene_id, found) if isinstance(found, Failure) else found


def _failed(name: str, failure: Failure) -> Traced:
    failure.raise_if_stop()
    return Traced(name=name, status="failed", figures={}, sentence=failure.sentence)


def _settings(job: VectorsJob) -> dict[str, Any]:
    """What decides the vectors and their files; the size of a window does not."""
    told = job.vectors.model_dump(mode="json", exclude={"window"})
    return {**told, "overlap": job.overlap} if job.join else told


def _trace_each(job: VectorsJob, output: Output, sources: list[_Source], lease: Lease, *, quiet: bool) -> list[Traced]:
    """Each scene by itself, in files beside its mask."""
    done: list[Traced] = []
    todo: list[_Group] = []
    known = [store.join(output.root, source.scene_id) for source in sources if source.scene_id in output.vectors]
    standing = dict(zip(known, store.in_parallel(_try_standing, known), strict=True))
    for source in sources:
        folder = store.join(output.root, source.scene_id)
        made = TracedFrom(masks=(source.sums,), settings=_settings(job))
        stands = standing.get(folder)
        if isinstance(stands, Failure):
            done.append(_failed(source.scene_id, stands))
            continue
        if stands is not None and stands.fingerprint == made.fingerprint:
            done.append(_unchanged(source.scene_id, folder, stands))
            continue
        found = attempt(partial(_target, job, source), source.scene_id, "reading its mask")
        if isinstance(found, Failure):
            done.append(_failed(source.scene_id, found))
            continue
        todo.append(_Group(source.scene_id, folder, (source,), ("./item.json",), made, stands, (found,)))
    return [*done, *_trace_groups(job, todo, lease, quiet=quiet)]


def _target(job: VectorsJob, source: _Source) -> Target:
    """A scene's mask as something to trace. Raises SceneError, also for classes that it does not have, and StoreError."""
    return _checked(Target(source.scene_id, of_scene(*source.headers()), source.classes, job.vectors))


def _checked(target: Target) -> Target:
    try:
        target.num_pieces  # noqa: B018 - it tells whether the mask has what is asked for
    except ConfigError as error:
        raise SceneError(f"{target.name}: {error}") from error
    return target


def _trace_joined(
    job: VectorsJob, root: str, sources: list[_Source], lease: Lease, *, quiet: bool
) -> tuple[list[Traced], list[str]]:
    """Scenes on one lattice and with the same classes in one file for each layer; nothing where one cannot be read."""
    place = _place(job, root)
    headers: list[tuple[_Source, tuple[Scene, Scene | None]]] = []
    for source in sorted(sources, key=lambda one: (one.moment, one.scene_id), reverse=job.overlap == "newest"):
        found = attempt(source.headers, source.scene_id, "reading its mask")
        if isinstance(found, Failure):
            return [_failed(source.scene_id, found)], [_NOT_JOINED]
        headers.append((source, found))
    done: list[Traced] = []
    todo = []
    groups = _by_lattice(headers)
    for name, members, sheets in groups:
        made = TracedFrom(masks=tuple(source.sums for source in members), settings=_settings(job))
        folder = store.join(place, name)
        stands = _try_standing(folder)
        if isinstance(stands, Failure):
            done.append(_failed(name, stands))
            continue
        if stands is not None and stands.fingerprint == made.fingerprint:
            done.append(_unchanged(name, folder, stands))
            continue
        targets = attempt(partial(_targets, job, name, members[0], sheets), name, "reading its masks")
        if isinstance(targets, Failure):
            done.append(_failed(name, targets))
            continue
        hrefs = tuple(_href(place, root, source.scene_id) for source in members)
        todo.append(_Group(name, folder, tuple(members), hrefs, made, stands, targets))
    remarks = [_SEVERAL.format(len(groups))] if len(groups) > 1 else []
    return [*done, *_trace_groups(job, todo, lease, quiet=quiet)], remarks


def _targets(job: VectorsJob, name: str, source: _Source, sheets: Sequence[Sheet]) -> tuple[Target, ...]:
    return tuple(_checked(Target(name, sheet, source.classes, job.vectors)) for sheet in sheets)


def _place(job: VectorsJob, root: str) -> str:
    """The folder of joined layers. Raises ConfigError for one where an output's results lie."""
    if job.to is None:
        return store.join(root, WORK_FOLDER, _JOINED_FOLDER)
    place = store.normalize_uri(job.to).rstrip("/")
    inside = f"{place}/".startswith(f"{root}/") and not f"{place}/".startswith(f"{root}/{WORK_FOLDER}/")
    if inside or list_output(place).items:
        raise ConfigError(
            f"{store.redact(place)}: results lie there, among which layers would be lost; name another folder"
        )
    return place


def _href(place: str, root: str, scene_id: str) -> str:
    """Where the item of a scene is, seen from a folder below ``place``."""
    if not place.startswith(f"{root}/"):
        return store.redact(store.join(root, scene_id, ITEM_NAME))
    up = place.removeprefix(f"{root}/").count("/") + 2
    return "/".join([*[".."] * up, scene_id, ITEM_NAME])


def _by_lattice(
    headers: list[tuple[_Source, tuple[Scene, Scene | None]]],
) -> list[tuple[str, list[_Source], list[Sheet]]]:
    """Scenes by CRS, classes and lattice, in their order: a name that a folder can have, the scenes, their sheets.

    The name is the CRS where it says enough, else also a few letters that follow from classes and lattice.
    """
    kinds: dict[tuple[str, tuple[tuple[str, int], ...]], list[tuple[_Source, tuple[Scene, Scene | None]]]] = {}
    for source, found in headers:
        grid = found[0].grid
        epsg = grid.crs.to_epsg()
        crs = f"EPSG-{epsg}" if epsg else f"crs-{hashlib.sha256(grid.crs_wkt.encode()).hexdigest()[:8]}"
        kinds.setdefault((crs, source.classes), []).append((source, found))
    groups = []
    for (crs, classes), members in kinds.items():
        by_mask = {id(found[0]): source for source, found in members}
        for sheets in join_scenes([found for _, found in members]):
            masks = {id(piece.mask) for sheet in sheets for piece in sheet.pieces}
            mine = [by_mask[id(found[0])] for _, found in members if id(found[0]) in masks]
            told = hashlib.sha256(repr((classes, lattice_name(sheets[0].grid))).encode()).hexdigest()[:8]
            groups.append((crs, told, mine, sheets))
    alike = Counter((crs, told) for crs, told, *_ in groups)  # lattices whose short names are the same
    for place, (crs, told, mine, sheets) in enumerate(groups):
        if alike[crs, told] > 1:
            first = hashlib.sha256(min(source.scene_id for source in mine).encode()).hexdigest()[:8]
            groups[place] = (crs, f"{told}-{first}", mine, sheets)
    several = Counter(crs for crs, *_ in groups)
    named = [(crs if several[crs] == 1 else f"{crs}-{told}", mine, sheets) for crs, told, mine, sheets in groups]
    return sorted(named, key=lambda one: one[0])


@dataclass(frozen=True, slots=True)
class _Standing:
    """Vectors that stand: their fingerprint, the version of their item, what it tells."""

    fingerprint: str
    version: store.Version
    properties: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Group:
    """What goes into the same files: their folder, the masks they are traced from and where these are, and what is traced.

    ``stands`` is what stood there when the work began.
    """

    name: str
    folder: str
    sources: tuple[_Source, ...]
    hrefs: tuple[str, ...]
    made: TracedFrom
    stands: _Standing | None
    targets: tuple[Target, ...]


def _trace_groups(job: VectorsJob, groups: list[_Group], lease: Lease, *, quiet: bool) -> Iterator[Traced]:
    targets = [target for group in groups for target in group.targets]
    progress = TracingProgress(targets, quiet=quiet)
    with tempfile.TemporaryDirectory(prefix="geoseg-vectors-") as scratch:
        outcomes = trace_groups([group.targets for group in groups], _engine(job, targets), Path(scratch), progress)
        for group, outcome in zip(groups, outcomes, strict=True):
            if isinstance(outcome, Failure):
                yield _failed(group.name, outcome)
                continue
            done = attempt(partial(_publish, group, outcome, job.vectors, lease), group.name, "publishing its vectors")
            yield _failed(group.name, done) if isinstance(done, Failure) else done


def _engine(job: VectorsJob, targets: Sequence[Target]) -> Engine:
    """The plain loop, or Ray where the job says so or there is an address, several workers or much work."""
    cluster = job.cluster
    large = sum(target.num_pieces for target in targets) > _SMALL_WINDOWS
    if cluster.engine == "ray" or (
        cluster.engine == "auto"
        and (cluster.address or (cluster.workers or 1) > 1 or (large and cluster.workers is None))
    ):
        from geoseg.cluster.vectorize import trace_on_cluster

        return partial(trace_on_cluster, cluster=cluster)
    return trace_locally


def _try_standing(folder: str) -> _Standing | Failure | None:
    """The vectors that stand in a folder, None without any, or why that cannot be told."""
    return attempt(partial(_standing, folder), store.base_name(folder), "reading its vectors")


def _standing(folder: str) -> _Standing | None:
    uri = store.join(folder, VECTORS_NAME)
    try:
        body, version = store.read_version(uri)
        properties = json.loads(body)["properties"]
        return _Standing(str(properties["geoseg:fingerprint"]), version, properties)
    except store.ObjectMissingError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ConflictError(f"{store.redact(uri)}: is not an item of geoseg's; move it away") from error


def _unchanged(name: str, folder: str, stands: _Standing) -> Traced:
    told = stands.properties
    figures = {key: told[f"geoseg:{key}"] for key in _FIGURES if f"geoseg:{key}" in told}
    return Traced(name=name, status="unchanged", item=store.join(folder, VECTORS_NAME), figures=figures)


def _publish(group: _Group, layers: Layers, config: VectorsConfig, lease: Lease) -> Traced:
    """Put the files of the layers, then the item, which is the commit; files that an older item names stay, as masks do."""
    crs_wkt = group.targets[0].sheet.grid.crs_wkt
    files: list[LayerFile] = []
    figures: dict[str, float] = {}
    for spool in layers.spools.values():
        parquet = layers.folder / f"{spool.kind.name}.parquet"
        spool.write_parquet(parquet, crs_wkt)
        figures |= _figures(spool, parquet)
        files.append(_put(group.folder, parquet, spool))
        for suffix in config.formats:
            other = parquet.with_suffix(f".{suffix}")
            convert(parquet, other, spool.kind)
            files.append(_put(group.folder, other, spool))
            other.unlink()
        parquet.unlink()
    items = [source.item for source in group.sources]
    bbox = union_bbox([item["bbox"] for item in items if item.get("bbox")])
    name = f"{group.name}-vectors"
    body = make_vectors_item(name, items, group.made, files, hrefs=[*group.hrefs], bbox=bbox, figures=figures)
    uri = store.join(group.folder, VECTORS_NAME)
    lease.check()
    before = group.stands.version if group.stands is not None else None
    try:
        store.write(uri, body, create=before is None, replaces=before)
    except store.ObjectExistsError as error:
        raise ConflictError(f"{group.name}: other work has written its vectors meanwhile; run again") from error
    return Traced(name=group.name, status="made", item=uri, figures=figures)


def _figures(spool: LayerSpool, parquet: Path) -> dict[str, float]:
    """How many there are, and how much, added up in the order of the file."""
    name = spool.kind.name
    told: dict[str, float] = {name: spool.num_features}
    for column, key, unit in (("area_m2", "km2", 1e6), ("length_m", "km", 1e3)):
        if column in spool.kind.columns.names:
            values = pq.read_table(parquet, columns=[column])[column].to_numpy()
            told[f"{name}_{key}"] = round(float(values.sum()) / unit, 6)
    return told


def _put(folder: str, path: Path, spool: LayerSpool) -> LayerFile:
    """Put a file under a name made from its content, unless it is there, and check that the store holds all of it."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    size, sha256 = path.stat().st_size, digest.hexdigest()
    name = f"{spool.kind.name}-{sha256[:16]}{path.suffix}"
    uri = store.join(folder, name)
    if not (store.exists(uri) and store.head(uri).size == size):
        if size <= _CHUNK:
            store.write(uri, path.read_bytes())
        else:
            store.write_stream(uri, partial(_chunks, path))
    stored = store.head(uri).size
    if stored != size:
        raise StoreError(f"{store.redact(uri)}: should have {size} bytes, the store holds {stored}")
    return LayerFile(kind=spool.kind, name=name, size=size, sha256=sha256, num_features=spool.num_features)


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk
