"""What geoseg sees in a scene before it reads a pixel, in words; for ``geoseg check``."""

from __future__ import annotations

from dataclasses import dataclass

from geoseg.predict.failure import Failure, attempt
from geoseg.predict.plan import RunSpec, plan_scene
from geoseg.raster import store
from geoseg.raster.geotiff import describe, printable
from geoseg.raster.grid import Grid
from geoseg.raster.scene import Scene, SceneRef

_SQUEEZED = 1.25  # longer one way than the other by so much


@dataclass(frozen=True, slots=True)
class Checked:
    """A scene's description, and whether it would be refused."""

    text: str
    refused: bool


def check_scene(ref: SceneRef, run: RunSpec) -> Checked:
    """What is seen in a scene and how it would be run, or why it would be refused. Raises StopError kinds alone."""
    seen = attempt(lambda: _seen_at_all_dates(ref, run), ref.id, "looking at it")
    if isinstance(seen, Failure):
        return _refused(ref, "", seen)
    plan = attempt(lambda: plan_scene(ref, run), ref.id, "planning")
    if isinstance(plan, Failure):
        return _refused(ref, f"\n{seen}", plan)
    names = ", ".join(
        f"{wanted} from band {place + 1}" for wanted, place in zip(run.description.bands, plan.bands, strict=True)
    )
    work = plan.stitching.work_shape
    at = (
        "at its own pixels"
        if plan.stitching.is_native
        else f"at {work[1]} x {work[0]} pixels, from overview {plan.stitching.level}"
    )
    return Checked(
        f"{store.redact(ref.uri)}\n{seen}\n  fits {run.description.name}: {names}; network {at}; {plan.num_windows} windows of "
        f"{plan.window}",
        refused=False,
    )


def _refused(ref: SceneRef, seen: str, failure: Failure) -> Checked:
    failure.raise_if_stop()
    return Checked(f"{store.redact(ref.uri)}{seen}\n  refused: {failure.sentence}", refused=True)


def _seen_at_all_dates(ref: SceneRef, run: RunSpec) -> str:
    lines = []
    for uri in ref.dates or (ref.uri,):
        told = f"  {store.redact(uri) or 'no scene at this date'}\n" if ref.dates else ""
        lines.append(told + (_seen(describe(SceneRef(ref.id, uri), run.read_options)) if uri else ""))
    return "\n".join(line.rstrip("\n") for line in lines)


def _seen(scene: Scene) -> str:
    grid = scene.grid
    epsg = grid.crs.to_epsg()
    crs = f"EPSG:{epsg}" if epsg else (printable(grid.crs_wkt.split('"')[1]) if '"' in grid.crs_wkt else "a CRS")
    valid = []
    if scene.has_mask:
        valid.append("an internal mask")
    elif scene.mask_etag is not None:
        valid.append("a mask beside it")
    elif scene.alpha is not None:
        valid.append("an alpha band")
    if any(value is not None for value in scene.nodata):
        valid.append(f"nodata {', '.join(dict.fromkeys(f'{value:g}' for value in scene.nodata if value is not None))}")
    blocks = f"blocks of {scene.block_shape[1]} x {scene.block_shape[0]}"
    return (
        f"  {grid.width} x {grid.height} px of {_pixel_size(grid)}, {crs}; {len(scene.bands)} band(s) of "
        f"{scene.dtype} ({', '.join(scene.bands)}); {blocks}, {len(scene.levels) - 1} overviews; valid by "
        f"{', '.join(valid) or 'default: every pixel'}"
    )


def _pixel_size(grid: Grid) -> str:
    across, down = grid.pixel_size_m
    if max(across, down) < _SQUEEZED * min(across, down):
        return f"{grid.resolution_m:.4g} m on the ground"
    return f"{across:.3g} x {down:.3g} m on the ground (not square, so the network sees the scene squeezed; better reproject it)"
