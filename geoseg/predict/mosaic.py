"""Masks of an output by what their items say in, virtual mosaics that a GIS opens as one layer out: VRT, and tile indexes.

A mosaic has the masks of one CRS and one list of classes, in the classes' colours. Where masks overlap, the one of the newest
scene lies on top, and of two of one time the one whose id comes last; where it has no data, those below show. The pixels of a
mosaic are as large as the smallest of its masks: on masks of one lattice they are theirs, others are shown by the nearest pixel.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from xml.sax.saxutils import escape

from geoseg.raster.cog import NODATA

PREFIX = "mosaic-"
_MOST_PIXELS = 2**31 - 1  # GDAL counts the pixels of a side in 32 bits
_SAME_PLACE_PX = 1e-3
_SMALLEST_OVERVIEW = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskTile:
    """A mask as its item describes it: ``href`` below the output, size in pixels, geotransform, and classes by value.

    ``crs`` is ``EPSG:...`` or WKT; ``classes`` are names and colours (RRGGBB), ``moment`` is the (last) time of its scene.
    """

    scene_id: str
    href: str
    crs: str
    height: int
    width: int
    geotransform: tuple[float, float, float, float, float, float]
    classes: tuple[tuple[str, str], ...]
    moment: str

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """West, south, east and north in the CRS, of a mask whose rows run from west to east and come from the north."""
        a, _, west, _, e, north = self.geotransform
        return west, north + e * self.height, west + a * self.width, north

    @property
    def lies_straight(self) -> bool:
        """Whether its rows run from west to east and come from the north: others a mosaic cannot hold."""
        a, b, _, d, e, _ = self.geotransform
        return b == d == 0 and a > 0 > e


def mask_tile(scene_id: str, item: dict[str, Any]) -> MaskTile:
    """The mask of an item. Raises KeyError, TypeError, ValueError for an item that does not describe one."""
    properties, mask = item["properties"], item["assets"]["mask"]
    a, b, c, d, e, f = (float(value) for value in properties["proj:transform"][:6])
    height, width = (int(side) for side in properties["proj:shape"])
    named = [one for one in mask["classification:classes"] if not one.get("nodata")]
    if [one["value"] for one in named] != [*range(len(named))]:
        raise ValueError("the classes of its mask are not counted from 0")
    return MaskTile(
        scene_id=scene_id,
        href=f"{scene_id}/{str(mask['href']).removeprefix('./')}",
        crs=str(properties.get("proj:code") or properties["proj:wkt2"]),
        height=height,
        width=width,
        geotransform=(a, b, c, d, e, f),
        classes=tuple((str(one["name"]), str(one["color_hint"])) for one in named),
        moment=str(properties.get("datetime") or properties.get("end_datetime") or ""),
    )


@dataclass(frozen=True)
class Mosaic:
    """Masks of one CRS and one list of classes, the lowest first; ``name`` is that of its files, without a suffix."""

    name: str
    tiles: tuple[MaskTile, ...]

    @cached_property
    def resolution(self) -> tuple[float, float]:
        """Width and height of a pixel in units of the CRS: the smallest of its masks'."""
        return min(one.geotransform[0] for one in self.tiles), min(-one.geotransform[4] for one in self.tiles)

    @cached_property
    def bounds(self) -> tuple[float, float, float, float]:
        """West, south, east, north: on whole pixels, counted from the north-west corner."""
        wests, souths, easts, norths = zip(*(one.bounds for one in self.tiles), strict=True)
        west, north = min(wests), max(norths)
        width, height = self._pixels(max(easts) - west, 0), self._pixels(north - min(souths), 1)
        return west, north - height * self.resolution[1], west + width * self.resolution[0], north

    @property
    def width(self) -> int:
        """Columns."""
        return self._pixels(self.bounds[2] - self.bounds[0], 0)

    @property
    def height(self) -> int:
        """Rows."""
        return self._pixels(self.bounds[3] - self.bounds[1], 1)

    @property
    def is_too_large(self) -> bool:
        """Whether it has more rows or columns than GDAL counts."""
        return max(self.width, self.height) > _MOST_PIXELS

    def _pixels(self, extent: float, axis: int) -> int:
        return -int(-(extent / self.resolution[axis] - _SAME_PLACE_PX) // 1)

    def vrt(self) -> bytes:
        """The mosaic as a VRT beside the scenes' folders: relative names, colours, class names, overviews of the masks'."""
        a, e = self.resolution
        west, _, _, north = self.bounds
        factors: list[str] = []
        while max(self.width, self.height) / 2 ** len(factors) > _SMALLEST_OVERVIEW:
            factors.append(str(2 ** (len(factors) + 1)))
        classes = self.tiles[0].classes
        lines = [
            f'<VRTDataset rasterXSize="{self.width}" rasterYSize="{self.height}">',
            f"  <SRS>{escape(self.tiles[0].crs)}</SRS>",
            f"  <GeoTransform>{west!r}, {a!r}, 0.0, {north!r}, 0.0, {-e!r}</GeoTransform>",
            *([f'  <OverviewList resampling="nearest">{" ".join(factors)}</OverviewList>'] if factors else []),
            '  <VRTRasterBand dataType="Byte" band="1">',
            "    <Description>class</Description>",
            f"    <NoDataValue>{NODATA}</NoDataValue>",
            "    <ColorInterp>Palette</ColorInterp>",
            "    <ColorTable>",
            *('      <Entry c1="{}" c2="{}" c3="{}" c4="255"/>'.format(*bytes.fromhex(color)) for _, color in classes),
            "    </ColorTable>",
            "    <CategoryNames>",
            *(f"      <Category>{escape(name)}</Category>" for name, _ in classes),
            "    </CategoryNames>",
            *(self._source(tile) for tile in self.tiles),
            "  </VRTRasterBand>",
            "</VRTDataset>",
        ]
        return ("\n".join(lines) + "\n").encode()

    def _source(self, tile: MaskTile) -> str:
        (a, e), (west, _, _, north) = self.resolution, self.bounds
        off = self._snapped((tile.geotransform[2] - west) / a), self._snapped((north - tile.geotransform[5]) / e)
        size = (
            self._snapped(tile.geotransform[0] * tile.width / a),
            self._snapped(-tile.geotransform[4] * tile.height / e),
        )
        return (
            '    <ComplexSource><SourceFilename relativeToVRT="1">'
            f"{escape(tile.href)}</SourceFilename><SourceBand>1</SourceBand>"
            f'<SourceProperties RasterXSize="{tile.width}" RasterYSize="{tile.height}" DataType="Byte" BlockXSize="512" '
            f'BlockYSize="512"/><SrcRect xOff="0" yOff="0" xSize="{tile.width}" ySize="{tile.height}"/>'
            f'<DstRect xOff="{off[0]:.17g}" yOff="{off[1]:.17g}" xSize="{size[0]:.17g}" ySize="{size[1]:.17g}"/>'
            f"<NODATA>{NODATA}</NODATA></ComplexSource>"
        )

    def _snapped(self, pixels: float) -> float:
        return round(pixels) if abs(pixels - round(pixels)) < _SAME_PLACE_PX else pixels

    def index_settings(self) -> dict[str, str]:
        """What GDAL's tile index driver (GTI) wants to know beside the places of the tiles."""
        west, south, east, north = self.bounds
        return {
            "RESX": repr(self.resolution[0]),
            "RESY": repr(self.resolution[1]),
            "MINX": repr(west),
            "MINY": repr(south),
            "MAXX": repr(east),
            "MAXY": repr(north),
            "SORT_FIELD": "place",
            "SORT_FIELD_ASC": "YES",
        }


def make_mosaics(tiles: Iterable[MaskTile]) -> Iterator[Mosaic]:
    """The mosaics of masks that lie straight, by name. The CRS is in the name, and the classes where one CRS has several."""
    groups: dict[str, dict[tuple[tuple[str, str], ...], list[MaskTile]]] = defaultdict(lambda: defaultdict(list))
    for tile in tiles:
        groups[tile.crs][tile.classes].append(tile)
    named = {}
    for crs, by_classes in groups.items():
        name = PREFIX + (crs.replace(":", "-") if crs.startswith("EPSG:") else f"crs-{_short(crs)}")
        for classes, members in by_classes.items():
            suffix = f"-{_short(repr(classes))}" if len(by_classes) > 1 else ""
            named[name + suffix] = members
    for name, members in sorted(named.items()):
        yield Mosaic(name, tuple(sorted(members, key=lambda one: (one.moment, one.scene_id))))


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
