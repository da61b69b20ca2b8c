"""The STAC item of a published mask: where it lies, what its codes mean, what it was made from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import pystac
import shapely
from pystac.extensions.classification import Classification, ClassificationExtension
from pystac.extensions.file import FileExtension
from pystac.extensions.mlm import (  # type: ignore[attr-defined]
    AssetGeneralMLMExtension,
    DataType,
    InputStructure,
    MLMExtension,
    ModelInput,
    ModelOutput,
    ResultStructure,
    TaskType,
    ValueScaling,
    ValueScalingType,
)
from pystac.extensions.projection import ProjectionExtension
from pystac.extensions.raster import DataType as RasterDataType
from pystac.extensions.raster import RasterBand, RasterExtension
from shapely import affinity
from shapely.geometry import Polygon, box, mapping, shape

from geoseg import __version__
from geoseg.predict.plan import RunSpec, ScenePlan
from geoseg.predict.seams import Seams
from geoseg.raster import store
from geoseg.raster.cog import NODATA
from geoseg.raster.grid import Grid
from geoseg.raster.seal import sealed

_PROCESSING = "https://stac-extensions.github.io/processing/v1.2.0/schema.json"
_STEP = 1 / 254
UNCERTAINTIES = {
    "entropy": "Uncertainty: entropy of the classes' probabilities over that of chance",
    "margin": "Uncertainty: 1 less the margin between the two largest probabilities",
}
_MEDIA = {
    "thumbnail": (pystac.MediaType.PNG, ["thumbnail"]),
    "uncertainty": (pystac.MediaType.COG, ["data", "uncertainty"]),
}
BLOCKS_SUM = "geoseg:blocks_sha256"
_BRIEF = 0.005  # of a footprint's extent: more than its edges bend in longitude and latitude


def make_item(
    run: RunSpec,
    plan: ScenePlan,
    *,
    classes: list[int],
    unsure: list[int],
    seams: Seams | None,
    looked_at: Mapping[str, Any],
    assets: dict[str, dict[str, Any]],
) -> bytes:
    """The item's JSON. ``classes`` are pixel counts; ``assets`` give name, size and ``sha256`` of each published file.

    A large file has ``blocks_sha256`` instead (see ``geoseg.raster.cog.blocks_sum``).

    ``unsure`` are the sums of the uncertainty, in steps of 1/254, over the pixels of each class.

    ``seams`` are those of a network that is blended. ``looked_at`` has, each None or empty where there is none, the ``novelty`` of
    the scene's light to the bundle (``geoseg.model.light``), the ``precision`` in which the network computed, more than one where
    workers' devices were not of one kind, and the ``fine_share`` of pixels at full resolution after a coarse pass.

    The same scene, bundle, settings, precision and revision give the same bytes: no time of processing, no host, no credentials.
    """
    grid, scene = plan.scene.grid, plan.scene
    moments = sorted(datetime.strptime(one.datetime, "%Y-%m-%dT%H:%M:%S%z") for one in plan.scenes)
    geometry, bbox = footprint(grid)
    item = pystac.Item(
        id=scene.id,
        geometry=geometry,
        bbox=bbox,
        datetime=None if plan.stack else moments[0],
        start_datetime=moments[0] if plan.stack else None,
        end_datetime=moments[-1] if plan.stack else None,
        properties={
            "gsd": round(grid.resolution_m, 6),
            "processing:level": "L4",
            "processing:lineage": f"classes of {', '.join(store.base_name(one.uri) for one in plan.scenes)} by the bundle "
            f"{run.description.name}",
            "processing:software": {"geoseg": __version__},
            "geoseg:fingerprint": plan.fingerprint,
            "geoseg:revision": plan.revision,
            "geoseg:input_etag": [one.etag for one in plan.scenes] if plan.stack else scene.etag,
            "geoseg:bundle": {"name": run.description.name, "sha256": run.bundle_digest},
            "geoseg:settings": run.config.pixel_settings(),
            **_beside_the_scene(run, plan),
            **(_seam_properties(seams) if seams is not None else {}),
            **{f"geoseg:{key}": value for key, value in looked_at.items() if value not in (None, [])},
            **({"geoseg:uncertainty": _uncertainty(run, classes, unsure)} if run.config.uncertainty else {}),
            **({"geoseg:released": True} if run.is_released(plan) else {}),
        },
    )
    item.stac_extensions.append(_PROCESSING)
    for one in plan.scenes:
        item.add_link(pystac.Link("derived_from", store.redact(one.uri), media_type=pystac.MediaType.GEOTIFF))
    projection = ProjectionExtension.ext(item, add_if_missing=True)
    epsg = grid.crs.to_epsg()
    projection.apply(
        code=f"EPSG:{epsg}" if epsg else None,
        wkt2=None if epsg else grid.crs_wkt,
        shape=[grid.height, grid.width],
        transform=list(grid.geotransform),
        bbox=_corners(grid),
    )
    _describe_model(item, run)
    for key, told in assets.items():
        _add_asset(item, key, told, run, classes)
    _add_model(item, run)
    document = item.to_dict(include_self_link=False, transform_hrefs=False)
    document["properties"] = {"datetime": None, **_without_nulls(document["properties"])}
    return sealed(store.redacted(document))


def content_sum(asset: dict[str, Any]) -> str:
    """What an asset of ours is named by (hex): the SHA-256 of its bytes, or of a large one that over its blocks.

    Raises KeyError when it has neither.
    """
    return str(asset[BLOCKS_SUM] if BLOCKS_SUM in asset else asset["file:checksum"]).removeprefix("1220")


def _beside_the_scene(run: RunSpec, plan: ScenePlan) -> dict[str, Any]:
    """The versions of what else decided the pixels, where there is any: masks beside scenes, the area of interest."""
    told: dict[str, Any] = {}
    if any(one.mask_etag is not None for one in plan.scenes):
        masks = [one.mask_etag or "" for one in plan.scenes]
        told["geoseg:mask_etag"] = masks if plan.stack else masks[0]
    if run.area is not None:
        told["geoseg:aoi_sha256"] = run.area.sha256
    return told


def _seam_properties(seams: Seams) -> dict[str, float]:
    return {
        "geoseg:seam_score": seams.score,
        "geoseg:blend_error": seams.at_rim,
        "geoseg:blend_error_inside": seams.inside,
    }


def _uncertainty(run: RunSpec, classes: list[int], unsure: list[int]) -> dict[str, Any]:
    """Means over the scene's valid pixels and over those of each class that it has."""
    means = {
        one.name: _mean(total, count)
        for one, total, count in zip(run.description.classes, unsure, classes, strict=True)
        if count
    }
    told = {"kind": run.config.uncertainty, "classes": means}
    return {**told, "mean": _mean(sum(unsure), sum(classes))} if means else told


def _mean(total: int, count: int) -> float:
    return float(f"{total / count * _STEP:.6g}")


def _without_nulls(value: Any) -> Any:
    """What pystac's extensions leave open they write as null, which their schemas do not all allow."""
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value


def _add_asset(item: pystac.Item, key: str, told: dict[str, Any], run: RunSpec, classes: list[int]) -> None:
    media, roles = _MEDIA.get(key, (pystac.MediaType.COG, ["data"]))
    asset = pystac.Asset(href=f"./{told['name']}", media_type=media, roles=roles, title=told["title"])
    if key == "uncertainty":
        asset.description = "0 where the network is sure, 1 where it might as well guess"
    item.add_asset(key, asset)
    file = FileExtension.ext(asset, add_if_missing=True)
    if "sha256" in told:
        file.apply(size=told["size"], checksum="1220" + told["sha256"])
    else:
        file.apply(size=told["size"])
        asset.extra_fields[BLOCKS_SUM] = told["blocks_sha256"]
    if key == "thumbnail":
        return
    named = run.description.classes
    scale = _STEP if key != "mask" else None
    band = RasterBand.create(nodata=NODATA, data_type=RasterDataType.UINT8, bits_per_sample=8, scale=scale)
    RasterExtension.ext(asset, add_if_missing=True).apply([band] * (len(named) if key == "probabilities" else 1))
    if key == "mask":
        ClassificationExtension.ext(asset, add_if_missing=True).apply(
            [
                Classification.create(
                    value=value, name=one.name, color_hint="{:02X}{:02X}{:02X}".format(*one.color), count=classes[value]
                )
                for value, one in enumerate(named)
            ]
            + [Classification.create(value=NODATA, name="nodata", nodata=True)]
        )


def _add_model(item: pystac.Item, run: RunSpec) -> None:
    """The weights that made the mask, kept beside it: MLM 1.4 wants an asset with the model and its bands by name."""
    model, description = run.model, run.description
    asset = pystac.Asset(
        href=f"../{model.path}", media_type="application/octet-stream", roles=["mlm:model"], title=description.name
    )
    item.add_asset("model", asset)
    FileExtension.ext(asset).apply(size=model.size, checksum="1220" + model.sha256)
    AssetGeneralMLMExtension.ext(asset).apply(artifact_type="safetensors")
    asset.extra_fields["raster:bands"] = [{"name": name, "data_type": description.dtype} for name in description.bands]


def _describe_model(item: pystac.Item, run: RunSpec) -> None:
    description = run.description
    dates = ([description.dates], ["time"]) if description.dates > 1 else ([], [])
    scaling = [
        ValueScaling.create(ValueScalingType.Z_SCORE, mean=mean, stddev=std)
        for mean, std in zip(description.mean, description.std, strict=True)
    ]
    MLMExtension.ext(item, add_if_missing=True).apply(
        name=description.name,
        architecture=description.variant.title,
        tasks=[TaskType.SEMANTIC_SEGMENTATION],
        framework="PyTorch",
        input=[
            ModelInput.create(
                name="bands",
                bands=list(description.bands),
                input=InputStructure.create(
                    shape=[-1, *dates[0], len(description.bands), -1, -1],
                    dim_order=["batch", *dates[1], "bands", "height", "width"],
                    data_type=DataType.FLOAT32,
                ),
            )
        ],
        output=[
            ModelOutput.create(
                name="logits",
                tasks=[TaskType.SEMANTIC_SEGMENTATION],
                result=ResultStructure.create(
                    shape=[-1, len(description.classes), -1, -1],
                    dim_order=["batch", "class", "height", "width"],
                    data_type=DataType.FLOAT32,
                ),
                classes=[
                    Classification.create(value=value, name=one.name) for value, one in enumerate(description.classes)
                ],
            )
        ],
    )
    item.properties["mlm:input"][0]["value_scaling"] = [entry.to_dict() for entry in scaling]


def _corners(grid: Grid) -> list[float]:
    a, b, c, d, e, f = grid.geotransform
    corners = [(col, row) for col in (0, grid.width) for row in (0, grid.height)]
    xs = [a * col + b * row + c for col, row in corners]
    ys = [d * col + e * row + f for col, row in corners]
    return [min(xs), min(ys), max(xs), max(ys)]


def footprint(grid: Grid) -> tuple[dict[str, Any] | None, list[float] | None]:
    """Geometry and bbox in longitude and latitude (RFC 7946); both None for what cannot be put on the Earth.

    A footprint over the antimeridian becomes two polygons, and its bbox has a west larger than its east.
    """
    ring = grid.outline_lonlat()
    if ring is None:
        return None, None
    whole = shapely.simplify(shapely.set_precision(shapely.make_valid(Polygon(ring)), 1e-9), 1e-7)
    if whole.is_empty or not whole.area:
        return None, None
    west, south, east, north = whole.bounds
    if east - west > 360 + 1e-6:
        return None, None
    pieces = []
    for turn in (-360, 0, 360):
        piece = shapely.intersection(affinity.translate(whole, turn), box(-180, -90, 180, 90))
        pieces += [
            part for part in getattr(piece, "geoms", [piece]) if part.geom_type == "Polygon" and part.area > 1e-12
        ]
    if not pieces:
        return None, None
    pieces = [shapely.orient_polygons(piece) for piece in pieces]
    geometry = pieces[0] if len(pieces) == 1 else shapely.MultiPolygon(pieces)
    bounds = (
        [_wrapped(west), max(-90.0, south), _wrapped(east), min(90.0, north)]
        if len(pieces) > 1
        else list(geometry.bounds)
    )
    return json.loads(json.dumps(mapping(geometry))), [float(value) for value in bounds]


def footprint_text(geometry: dict[str, Any] | None) -> str:
    """A footprint's geometry in few points, as WKT; "" for none."""
    whole = shape(geometry) if geometry is not None else None
    if whole is None or whole.is_empty:
        return ""
    west, south, east, north = whole.bounds
    return str(shapely.to_wkt(shapely.simplify(whole, _BRIEF * min(east - west, north - south)), rounding_precision=6))


def _wrapped(lon: float) -> float:
    return (lon + 180) % 360 - 180
