"""The page of ``geoseg view`` in a real browser: what it shows, what it does by mouse and keys, and what it never does."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import numpy.typing as npt
import pytest
import rasterio
from kit.browser import Look, look_at
from kit.published import CORNER, PIXEL_M, SIDE, predicted, put_layers
from kit.scenes import ROTATED, noise, tiny_bundle, write_scene
from PIL import Image
from shapely.geometry import LineString, box

from geoseg.config import load_job
from geoseg.raster import store
from geoseg.run import run_job
from geoseg.view.catalogue import Catalogue
from geoseg.view.server import ViewServer

pytestmark = pytest.mark.slow
EVIL = "<img src=x onerror=document.title='owned'>\"'&<script>document.title='owned'<"
LONG = "a-name-that-goes-on" * 12
DRAWN = "document.querySelector('#map').getAttribute('aria-busy') === 'false' && document.querySelector('#note').textContent === ''"
WAIT = {"wait": f"!document.querySelector('#layers').hidden && {DRAWN}"}
LISTED = "[...document.querySelectorAll('#list button')].map(one => one.dataset.id)"
COUNTS = "[...document.querySelectorAll('#vector-rows label:not([hidden]) .count')].map(one => one.textContent)"
CARD = "document.querySelector('#card').hidden ? null : Object.fromEntries("
CARD += "[...document.querySelectorAll('#card dt')].map(one => [one.textContent, one.nextSibling.textContent]))"
BUSY = {"wait": "new Promise(done => setTimeout(() => done(true), 400))"}


def pixel_of(x: float, y: float) -> str:
    """Where a place on the ground is in the window, as an expression."""
    corner = "document.querySelector('#map').getBoundingClientRect()"
    return f"((at, to) => [at.left + to[0], at.top + to[1]])({corner}, map.getPixelFromCoordinate([{x}, {y}]))"


def go_to(x: float, y: float) -> dict[str, str]:
    """Put a place on the ground into the middle of the map; a step."""
    return {"wait": f"map.getView().setCenter([{x}, {y}]), true"}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output with two scenes side by side, one held back, one with rotated rows, and one with a hostile name."""
    root = tmp_path_factory.mktemp("page")
    made, _ = predicted(str(root), "alpha", "beta", "night", dark=["night"])
    write_scene(root / "turned" / "turned.tif", noise(3, 300, 410), transform=ROTATED)
    values = {
        "scenes": [f"{root}/turned/"],
        "out": made,
        "bundle": tiny_bundle(root / "tiny"),
        "cluster": {"engine": "local"},
    }
    run_job(load_job(None, values))
    out = Path(made)
    for name in (EVIL, LONG):
        shutil.copytree(out / "beta", out / name)
        item = json.loads((out / name / "item.json").read_text())
        item["properties"]["geoseg:bundle"]["name"] = EVIL
        item["properties"]["datetime"] = EVIL
        item["assets"][EVIL] = {"href": "./" + item["assets"]["mask"]["href"].removeprefix("./")}
        item["assets"]["mask"]["classification:classes"][1]["name"] = EVIL
        (out / name / "item.json").write_text(json.dumps(item))
    put_layers(made, "alpha", buildings=buildings("one", 1), roads=roads())
    put_layers(made, EVIL, buildings=buildings(EVIL, EVIL))
    return out


def buildings(name: str, kind: int | str) -> geopandas.GeoDataFrame:
    """Give a square in the middle of the scenes, with a name, and one that is far from it."""
    x, y = CORNER[0] + SIDE * PIXEL_M / 2, CORNER[1] - SIDE * PIXEL_M / 2
    told = {
        "id": [name, "far"],
        "class": [kind, kind],
        "area_m2": [1600.0, 4.0],
        "confidence": [0.875, 0.5],
        "pixels": [4444, 11],
    }
    return geopandas.GeoDataFrame(
        told, geometry=[box(x - 20, y - 20, x + 20, y + 20), box(x + 120, y, x + 122, y + 2)], crs=25832
    )


def roads() -> geopandas.GeoDataFrame:
    x, y = CORNER[0] + 20, CORNER[1] - 20
    told = {
        "id": ["road"],
        "class": [2],
        "from": [1],
        "to": [2],
        "length_m": [300.5],
        "width_m": [7.25],
        "confidence": [0.5],
    }
    return geopandas.GeoDataFrame(told, geometry=[LineString([(x, y), (x + 300, y)])], crs=25832)


@pytest.fixture(scope="module")
def url(out: Path) -> Iterator[str]:
    with ViewServer(Catalogue(str(out))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.url
        server.shutdown()


def seen(path: Path) -> npt.NDArray[np.int64]:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def test_image_and_mask_lie_on_each_other_and_come_in_pieces(url: str, out: Path, tmp_path: Path) -> None:
    steps = [
        {"focus": "#opacity"}, {"key": "End"}, {"click": "#image-on"}, WAIT, {"picture": str(tmp_path / "mask.png")},
        {"click": "#image-on"}, {"focus": "#opacity"}, {"key": "Home"}, WAIT, BUSY, {"picture": str(tmp_path / "image.png")},
        {"key": "End"}, *[{"key": "ArrowLeft"}] * 10, BUSY, {"picture": str(tmp_path / "half.png")},
    ]  # fmt: skip
    steps = [WAIT, BUSY, *steps, WAIT]
    ask = {
        "corner": pixel_of(*CORNER),
        "opposite": pixel_of(CORNER[0] + SIDE * PIXEL_M, CORNER[1] - SIDE * PIXEL_M),
        "opacity": "document.querySelector('#opacity-told').textContent",
    }
    (one,) = look_at([Look(url=f"{url}#alpha", width=1300, height=900, steps=steps, ask=ask)])
    assert one["trouble"] == []
    assert one["answers"]["opacity"] == "50 %"

    item = json.loads((out / "alpha" / "item.json").read_text())
    size = item["assets"]["mask"]["file:size"]
    ranges = [told for address, told in one["ranges"] if "/scenes/alpha/files/mask-" in address]
    assert len(ranges) >= 2
    assert all(told.endswith(f"/{size}") for told in ranges)
    assert not [address for address in one["requests"] if "/mask/" in address], "the browser draws it, not the server"

    (left, top), (right, bottom) = one["answers"]["corner"], one["answers"]["opposite"]
    with rasterio.open(out / "alpha" / item["assets"]["mask"]["href"]) as dataset:
        codes = dataset.read(1)
    with rasterio.open(out.parent / "in" / "alpha.tif") as dataset:
        pixels = dataset.read()
    colors = {
        one["value"]: list(bytes.fromhex(one["color_hint"]))
        for one in item["assets"]["mask"]["classification:classes"][1:3]
    }
    pictures = {name: seen(tmp_path / f"{name}.png") for name in ("mask", "image", "half")}
    checked = dict.fromkeys(colors, 0)
    for row, col in np.random.default_rng(1).integers(8, SIDE - 8, (6000, 2)):
        around = np.unique(codes[row - 5 : row + 6, col - 5 : col + 6])
        x, y = round(left + (col + 0.5) / SIDE * (right - left)), round(top + (row + 0.5) / SIDE * (bottom - top))
        if len(around) > 1 or int(around[0]) not in colors or not 60 < x - 320 < 660 or y < 180:
            continue  # near a border of classes, or under a panel
        color = np.array(colors[int(around[0])])
        checked[int(around[0])] += 1
        assert np.abs(pictures["mask"][y, x] - color).max() <= 2
        assert np.abs(pictures["half"][y, x] - (pictures["image"][y, x] + color) / 2).max() <= 3, "opacity of a half"
        near = pixels[:, row - 3 : row + 4, col - 3 : col + 4].reshape(3, -1).astype(int)
        assert (pictures["image"][y, x] >= near.min(1) - 25).all()
        assert (pictures["image"][y, x] <= near.max(1) + 25).all()
    assert min(checked.values()) >= 20


def test_swipe_moves_by_mouse_and_by_keys(url: str, tmp_path: Path) -> None:
    now = "document.querySelector('#handle').getAttribute('aria-valuenow')"
    steps = [WAIT, {"click": "#swipe-on"}, {"picture": str(tmp_path / "half.png")}, {"ask": "first", "of": now}]
    steps += [
        {"focus": "#handle"},
        {"key": "ArrowRight"},
        {"key": "ArrowRight"},
        {"key": "PageDown"},
        {"ask": "keys", "of": now},
    ]
    steps += [
        {"drag": ["#handle", 500, 500]},
        {"ask": "drag", "of": now},
        {"focus": "#handle"},
        {"key": "End"},
        {"picture": str(tmp_path / "image.png")},
    ]
    steps += [{"key": "Home"}, {"picture": str(tmp_path / "mask.png")}]
    (one,) = look_at([Look(url=f"{url}#beta", width=1300, steps=steps)])
    assert one["trouble"] == []
    assert one["answers"] == {"first": "50", "keys": "44", "drag": "18"}
    half, image, mask = (seen(tmp_path / f"{name}.png") for name in ("half", "image", "mask"))
    middle, rows = 320 + 980 // 2, slice(200, 420)
    left, right = (rows, slice(400, middle - 60)), (rows, slice(middle + 60, 980))
    assert (half[left] == image[left]).all()
    assert (half[right] == mask[right]).all()
    assert (image[left] != mask[left]).any()
    assert (image[right] != mask[right]).any()


def test_scenes_are_found_by_id_and_status_and_chosen_by_keys(url: str) -> None:
    title = "document.querySelector('#title').textContent"
    steps = [
        WAIT, {"ask": "all", "of": LISTED}, {"ask": "first", "of": title},
        {"focus": "#search"}, {"type": "HELD"}, {"ask": "held", "of": LISTED},
        {"ask": "found", "of": "document.querySelector('#found').textContent"},
        *[{"key": "Backspace"}] * 4, {"type": "alp"}, {"ask": "alp", "of": LISTED}, *[{"key": "Backspace"}] * 3,
        {"click": "#statuses [data-status=held]"}, {"ask": "pressed", "of": LISTED}, {"click": "#statuses [data-status=held]"},
        {"focus": "#search"}, {"type": "t"}, {"key": "ArrowDown"}, {"key": "End"}, {"key": "ArrowUp"}, {"key": "Enter"}, WAIT,
        {"ask": "chosen", "of": title}, {"ask": "hash", "of": "location.hash"},
        {"ask": "current", "of": "document.querySelector('#list [aria-current=true]').dataset.id"},
        {"focus": "#search"}, {"type": " nothing has this"}, {"ask": "none", "of": LISTED},
    ]  # fmt: skip
    (one,) = look_at([Look(url=f"{url}#alpha", width=1200, steps=steps)])
    assert one["trouble"] == []
    told = one["answers"]
    assert set(told["all"]) == {"alpha", "beta", "night", "turned", EVIL, LONG}
    assert told["held"] == told["pressed"] == ["night"]
    assert told["found"] == "1 of 6 scenes"
    assert (told["first"], told["alp"], told["none"]) == ("alpha", ["alpha"], [])
    assert (told["chosen"], told["hash"], told["current"]) == ("night", "#night", "night")


def test_polygons_and_lines_tell_their_attributes_by_click_and_by_key(url: str) -> None:
    x, y = CORNER[0] + SIDE * PIXEL_M / 2, CORNER[1] - SIDE * PIXEL_M / 2
    there = [WAIT, {"wait": f"{COUNTS}.every(Boolean)"}, {"ask": "counts", "of": COUNTS}]
    card = [{"focus": "#map"}, {"key": "Enter"}]
    by_key = [
        *there, go_to(x, y), BUSY, *card, {"ask": "building", "of": CARD}, {"key": "Escape"}, {"ask": "closed", "of": CARD},
        go_to(CORNER[0] + 60, CORNER[1] - 20), BUSY, *card, {"ask": "road", "of": CARD}, {"click": "#card-close"},
        {"click": "#roads-on"}, *card, {"ask": "hidden", "of": CARD},
    ]  # fmt: skip
    by_click = [
        *there,
        go_to(x, y),
        BUSY,
        {"click": [320 + 440, 473]},
        BUSY,
        {"ask": "building", "of": CARD},
    ]
    first, second = look_at([Look(url=f"{url}#alpha", width=1200, steps=steps) for steps in (by_key, by_click)])
    assert first["trouble"] == second["trouble"] == []
    told = first["answers"]
    assert told["counts"] == ["2 in view", "1 in view"]
    assert told["building"] == {
        "id": "one",
        "class": "building",
        "area": "1,600 m²",
        "confidence": "0.875",
        "pixels": "4,444",
    }
    assert told["road"] == {
        "id": "road",
        "class": "road",
        "from": "1",
        "to": "2",
        "length": "300.5 m",
        "width": "7.25 m",
        "confidence": "0.5",
    }
    assert told["closed"] is None
    assert told["hidden"] is None
    assert second["answers"]["building"] == told["building"]


def test_hostile_names_do_nothing(url: str, tmp_path: Path, figure: Callable[..., None]) -> None:
    middle = go_to(CORNER[0] + SIDE * PIXEL_M / 2, CORNER[1] - SIDE * PIXEL_M / 2)
    show = "[...document.querySelectorAll('#list button')].find(one => one.dataset.id.startsWith('{}')).click(), true"
    steps = [
        WAIT,
        {"wait": show.format("<img")},
        {"wait": "document.querySelector('#title').textContent.startsWith('<img')"},
        WAIT,
    ]
    steps += [{"wait": f"{COUNTS}.every(Boolean)"}, middle, BUSY, {"focus": "#map"}, {"key": "Enter"}]
    ask = {
        "title": "document.querySelector('#title').textContent",
        "page": "document.title",
        "made": "document.querySelectorAll('main img, header img, script:not([src]), [onerror]').length",
        "card": CARD,
        "classes": "[...document.querySelectorAll('#legend .name')].map(one => one.textContent)",
        "links": "[...document.querySelectorAll('#links a')].map(one => [one.textContent, one.pathname.split('/').length])",
    }
    wide = "document.documentElement.scrollWidth - innerWidth"
    long = [
        WAIT,
        {"wait": show.format("a-name")},
        {"wait": "document.querySelector('#title').textContent.startsWith('a-name')"},
        WAIT,
    ]
    looks = [Look(url=f"{url}#alpha", width=1200, steps=steps, ask=ask)]
    looks += [
        Look(
            url=f"{url}#alpha",
            width=360,
            height=740,
            steps=long,
            ask={"wider": wide},
            picture=str(tmp_path / "long.png"),
        )
    ]
    looks += [
        Look(url=f"{url}#{bad}", width=1200, steps=[WAIT], ask={"title": ask["title"]})
        for bad in ("%E0%A4%A", "../../etc", "%3Cimg")
    ]
    evil, narrow, *odd = look_at(looks)
    for one in (evil, narrow, *odd):
        assert one["trouble"] == []
    told = evil["answers"]
    assert told["title"] == EVIL
    assert told["page"].startswith(EVIL)
    figure("S13", "elements and scripts that hostile names made in Chromium", told["made"], goal="0")
    assert told["made"] == 0
    assert (told["card"]["id"], told["card"]["class"]) == (EVIL, EVIL)
    assert EVIL in told["classes"]
    assert [EVIL, 6] in told["links"]
    assert narrow["answers"]["wider"] <= 0
    assert all(one["answers"]["title"] for one in odd), "a hash that names no scene shows the first"


def test_a_rotated_scene_is_drawn_in_its_place(url: str) -> None:
    ask = {"told": "document.querySelector('#sentence').textContent", "corners": "chosen.grid.corners"}
    (one,) = look_at([Look(url=f"{url}#turned", width=1200, steps=[WAIT, BUSY], ask=ask)])
    assert one["trouble"] == []
    assert "drawn by geoseg view" in one["answers"]["told"]
    assert one["answers"]["corners"][2] == list(
        ROTATED @ (410, 300) if hasattr(ROTATED, "__matmul__") else ROTATED * (410, 300)
    )
    assert [address for address in one["requests"] if "/scenes/turned/mask/" in address]
    assert [address for address in one["requests"] if "/scenes/turned/image/" in address]


def test_a_scene_that_is_held_back_shows_its_image_and_the_mask_that_waits(url: str) -> None:
    layers = "map.getLayers().getArray().map(one => one.getClassName())"
    (one,) = look_at(
        [
            Look(
                url=f"{url}#night",
                width=1200,
                steps=[WAIT],
                ask={"layers": layers, "sentence": "document.querySelector('#sentence').textContent"},
            )
        ]
    )
    assert one["trouble"] == []
    assert {"image-layer", "held-layer"} <= set(one["answers"]["layers"])
    assert "max_novelty" in one["answers"]["sentence"]


def test_without_its_image_the_mask_is_shown_and_the_page_says_so(out: Path, tmp_path: Path) -> None:
    shutil.copytree(out / "alpha", tmp_path / "out" / "alpha")
    item = json.loads((tmp_path / "out" / "alpha" / "item.json").read_text())
    item["links"][0]["href"] = "/nowhere/alpha.tif"
    (tmp_path / "out" / "alpha" / "item.json").write_text(json.dumps(item))
    ask = {
        "told": "document.querySelector('#image-told').textContent",
        "off": "document.querySelector('#image-on').disabled",
    }
    with ViewServer(Catalogue(str(tmp_path / "out"))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        (one,) = look_at([Look(url=server.url, width=1200, steps=[WAIT], ask=ask)])
        server.shutdown()
    assert one["trouble"] == []
    assert "not where it was" in one["answers"]["told"]
    assert one["answers"]["off"]
    assert one["ranges"]


SEEN = {
    "wider": "document.documentElement.scrollWidth - innerWidth",
    "paper": "getComputedStyle(document.body).backgroundColor",
    "cut": "[...document.querySelectorAll('button, label, summary, h2, .ol-scale-line')].filter(one => one.checkVisibility() && "
    "(box => box.width && (box.right > innerWidth + 1 || box.left < -1))(one.getBoundingClientRect())).map(one => one.textContent)",
    "nameless": "[...document.querySelectorAll('button, input, [role=slider], [tabindex=\"0\"]')].filter(one => "
    "!(one.textContent.trim() || one.getAttribute('aria-label') || one.labels?.length)).map(one => one.outerHTML)",
    "scale": "document.querySelector('.ol-scale-line').textContent",
}


def test_wide_and_narrow_light_and_dark_and_never_away_from_this_machine(url: str, tmp_path: Path) -> None:
    looks = [
        Look(
            url=f"{url}#alpha",
            width=width,
            height=740,
            dark=dark,
            steps=[WAIT, {"click": "#layers summary"} if width < 700 else BUSY],
            ask=SEEN,
        )
        for width, dark in product((1200, 360), (False, True))
    ]
    found = look_at(looks)
    for one in found:
        assert one["trouble"] == []
        assert one["answers"]["wider"] <= 0
        assert one["answers"]["cut"] == []
        assert one["answers"]["nameless"] == []
        assert one["answers"]["scale"].endswith(" m")
        assert all(address.startswith(url) for address in one["requests"])
    assert len({one["answers"]["paper"] for one in found}) == 2


def test_tab_reaches_everything_and_shows_where_it_is(url: str) -> None:
    here = "(one => one.id || one.className || one.dataset.id || one.dataset.status || one.tagName)(document.activeElement)"
    ring = "getComputedStyle(document.activeElement).outlineStyle"
    steps: list[dict[str, Any]] = [WAIT, {"focus": "#search"}]
    for place in range(24):
        steps += [{"key": "Tab"}, {"ask": f"at {place}", "of": here}, {"ask": f"ring {place}", "of": ring}]
    (one,) = look_at([Look(url=f"{url}#alpha", width=1200, steps=steps)])
    assert one["trouble"] == []
    reached = [one["answers"][f"at {place}"] for place in range(24)]
    for wanted in ("map", "ol-zoom-in", "image-on", "mask-on", "opacity", "swipe-on", "buildings-on", "roads-on"):
        assert wanted in reached
    assert sum(name in ("alpha", "beta", "night") for name in reached) <= 1, (
        "the list is one stop, arrows go on from there"
    )
    bare = [name for place, name in enumerate(reached) if one["answers"][f"ring {place}"] == "none" and name != "BODY"]
    assert bare == []


def test_the_page_and_the_library_are_as_they_were_checked() -> None:
    folder = Path(store.__file__).parents[1] / "view"
    page, script = (
        (folder / "page.html").read_text(),
        (folder / "page.js").read_text() + (folder / "cog.js").read_text(),
    )
    for word in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "new Function",
        "http://",
        "https://",
    ):
        assert word not in script
    assert "onclick" not in page
    assert "style=" not in page
    assert "sourceMappingURL" not in (folder / "vendor" / "ol.js").read_text()[-200:]
    assert "10.11.0" in (folder / "vendor" / "README.md").read_text()
    assert "BSD 2-Clause" in (folder / "vendor" / "LICENSE.md").read_text()
