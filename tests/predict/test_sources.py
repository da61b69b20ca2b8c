"""Scenes from lists, static STAC catalogues and STAC APIs: the right ones, and nothing that was not allowed."""

from __future__ import annotations

import contextlib
import io
import json
import re
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rasterio
import shapely
from kit.scenes import noise, tiny_bundle, write_scene
from shapely.geometry import mapping

from geoseg.config import load_job
from geoseg.errors import AccessDeniedError, ConfigError, StoreError
from geoseg.interval import parse_interval
from geoseg.nightly import run_nightly
from geoseg.predict.sources import Listing, list_job
from geoseg.raster import stac_api, store


def sources(root: str, *each: dict[str, Any], **values: Any) -> Listing:
    return list_job(load_job(None, {"source": list(each), "out": f"{root}/out", **values}), f"{root}/out")


def ids(listing: Listing) -> list[str]:
    return sorted(ref.id for ref in listing.refs)


def item(name: str, day: str, *, west: float = 10, hrefs: dict[str, str] | None = None, **more: Any) -> dict[str, Any]:
    corners = [[west, 50], [west + 1, 50], [west + 1, 51], [west, 51], [west, 50]]
    assets = {key: {"href": href, "roles": ["data"]} for key, href in (hrefs or {"image": f"./{name}.tif"}).items()}
    return {
        "type": "Feature",
        "stac_version": "1.1.0",
        "id": name,
        "properties": {"datetime": f"{day}T10:00:00Z"},
        "geometry": {"type": "Polygon", "coordinates": [corners]},
        "links": [],
        "assets": assets | {"thumbnail": {"href": f"./{name}.png", "roles": ["thumbnail"], "type": "image/png"}},
        **more,
    }


def put(uri: str, document: dict[str, Any]) -> None:
    store.write(uri, json.dumps(document).encode())


def links(*hrefs: str, rel: str = "item") -> list[dict[str, str]]:
    return [{"rel": rel, "href": href} for href in hrefs]


@pytest.fixture
def catalog(root: str) -> str:
    """A catalogue with two collections and four items; links go up, down, in a circle and away."""
    at = f"{root}/cat"
    away = links(f"{root}/secret/item.json", "../secret/item.json", "/etc/passwd", "https://there/x.json")
    put(f"{at}/catalog.json", {"type": "Catalog", "id": "c", "links": [
        *links("./one/collection.json", "two/collection.json", rel="child"), *links("catalog.json", rel="root"), *away,
    ]})  # fmt: skip
    put(f"{at}/one/collection.json", {"type": "Collection", "id": "one", "links": [
        *links("a.json", "b.json"), *links("../catalog.json", rel="child"),
    ]})  # fmt: skip
    put(
        f"{at}/two/collection.json",
        {"type": "Collection", "id": "two", "links": links("c.json", "d.json", "lost.json")},
    )
    put(f"{at}/one/a.json", item("a", "2026-10-30", collection="one"))
    put(f"{at}/one/b.json", item("b", "2026-11-01", collection="one"))
    put(f"{at}/two/c.json", item("c", "2026-11-05", collection="two", west=30))
    put(f"{at}/two/d.json", item("d", "2026-11-05", collection="two", hrefs={"image": f"{root}/secret/d.tif"}))
    put(f"{root}/secret/item.json", item("secret", "2026-11-05"))
    return f"{at}/catalog.json"


def test_a_catalogue_is_walked_within_its_folder(catalog: str, root: str) -> None:
    listing = sources(root, {"catalog": catalog})
    assert {ref.id: ref.uri for ref in listing.refs} == {
        "a": f"{root}/cat/one/a.tif",
        "b": f"{root}/cat/one/b.tif",
        "c": f"{root}/cat/two/c.tif",
    }
    told = "\n".join(listing.remarks)
    assert "4 of its links lead out" in told
    assert "1 assets lie outside" in told
    assert "lost.json: there is no such file" in told
    assert len(listing.remarks) == 3
    allowed = sources(root, {"catalog": catalog, "allow": [f"{root}/secret"]})
    assert ids(allowed) == ["a", "b", "c", "d", "secret"]


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ({"datetime": "2026-11-01/.."}, "bc"),
        ({"datetime": "../2026-10-31"}, "a"),
        ({"datetime": "2026-11-01"}, "b"),
        ({"datetime": "2026-10-30/2026-11-01"}, "ab"),
        ({"collections": ["two"]}, "c"),
        ({"bbox": [30.5, 50.5, 40, 60]}, "c"),
        ({"bbox": [170, 40, 11, 60]}, "ab"),
        ({"area": "area.geojson"}, "c"),
        ({"assets": ["thumbnail"]}, "abcd"),
        ({"assets": ["nothing"]}, ""),
        ({"roles": ["thumbnail"]}, ""),
        ({"datetime": "last 2 days"}, ""),
    ],
)
def test_a_source_is_filtered_by_time_place_and_asset(
    asked: dict[str, Any], found: str, catalog: str, root: str
) -> None:
    if "area" in asked:
        asked = {"area": f"{root}/area.geojson"}
        put(
            asked["area"],
            {"type": "Polygon", "coordinates": [[[30.1, 50.1], [30.2, 50.1], [30.2, 50.2], [30.1, 50.1]]]},
        )
    assert "".join(ids(sources(root, {"catalog": catalog, **asked}))) == found


def test_several_fitting_assets_are_asked_about(root: str) -> None:
    bands = {"red": "./r.tif", "nir": "./n.tif"}
    put(f"{root}/cat/catalog.json", {"type": "Catalog", "links": links("a.json")})
    put(f"{root}/cat/a.json", item("a", "2026-11-01", hrefs=bands))
    source = {"catalog": f"{root}/cat/catalog.json"}
    with pytest.raises(
        ConfigError, match=r"item 'a' has 2 GeoTIFF assets of the role data \('red', 'nir'\); say which"
    ):
        sources(root, source)
    assert ids(sources(root, {**source, "assets": ["nir"]})) == ["a"]
    assert ids(sources(root, {**source, "assets": ["nir", "red"]})) == ["a-nir", "a-red"]
    put(f"{root}/cat/a.json", item("\x1b[2Ja\n", "2026-11-01", hrefs={"\x1b]0;red\x07": "./r.tif", "\r": "./n.tif"}))
    with pytest.raises(ConfigError, match="say which") as caught:
        sources(root, source)
    assert str(caught.value).isprintable()


def test_lists_name_scenes_in_each_format(root: str) -> None:
    hrefs = {"data": f"{root}/in/x.tif"}
    put(f"{root}/items.geojson", {"type": "FeatureCollection", "features": [item("x", "2026-11-01", hrefs=hrefs)]})
    feature = {
        "type": "Feature",
        "properties": {"location": f"{root}/in/y.tif", "datetime": "2026-11-02"},
        "geometry": None,
    }
    put(f"{root}/index.geojson", {"type": "FeatureCollection", "features": [feature]})
    tables = {
        "plain": pa.table({"uri": [f"{root}/in/z.tif"], "datetime": [datetime(2026, 11, 3, tzinfo=timezone.utc)]}),
        "stac": pa.table(
            {
                "id": ["w"],
                "datetime": [datetime(2026, 11, 4, tzinfo=timezone.utc)],
                "geometry": [shapely.to_wkb(shapely.box(10, 50, 11, 51))],
                "assets": [{"image": {"href": f"{root}/in/w.tif", "roles": ["data"]}}],
            }
        ),
    }
    for name, table in tables.items():
        body = io.BytesIO()
        pq.write_table(table, body)
        store.write(f"{root}/{name}.parquet", body.getvalue())
    manifests = [
        {"manifest": f"{root}/{name}"} for name in ("items.geojson", "index.geojson", "plain.parquet", "stac.parquet")
    ]
    assert {ref.id: ref.uri for ref in sources(root, *manifests).refs} == {
        one: f"{root}/in/{one}.tif" for one in "wxyz"
    }
    later = [{**manifest, "datetime": "2026-11-03/.."} for manifest in manifests]
    assert ids(sources(root, *later)) == ["w", "z"]
    put(
        f"{root}/none.geojson", {"type": "FeatureCollection", "features": [{"type": "Feature", "properties": {"a": 1}}]}
    )
    with pytest.raises(ConfigError, match=r"none.geojson: not a list of scenes: wanted .* uri, href, location, url"):
        sources(root, {"manifest": f"{root}/none.geojson"})


def test_a_document_of_a_catalogue_is_not_as_large_as_images_are(tmp_path: Path) -> None:
    root = str(tmp_path)
    put(f"{root}/cat/catalog.json", {"type": "Catalog", "links": links("image.tif", "a.json")})
    put(f"{root}/cat/a.json", item("a", "2026-11-01"))
    with Path(root, "cat/image.tif").open("wb") as image:
        image.truncate((64 << 20) + 1)
    listing = sources(root, {"catalog": f"{root}/cat/catalog.json"})
    assert ids(listing) == ["a"]
    (remark,) = listing.remarks
    assert "image.tif: has 67108865 bytes, more than the 67108864 that are read of such a file" in remark
    Path(root, "cat/image.tif").replace(f"{root}/cat/catalog.json")
    with pytest.raises(ConfigError, match=r"catalog.json: has 67108865 bytes"):
        sources(root, {"catalog": f"{root}/cat/catalog.json"})


def test_the_pages_of_an_api_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A next link may carry a body of any size, and there may be many pages."""
    size, pages = 1 << 20, iter(range(20, -1, -1))

    def ask(_url: str, _body: Any, _token: Any) -> dict[str, Any]:
        left = next(pages)
        return page(href="?", method="POST", body={"token": "x" * size, "left": left}) if left else page()

    monkeypatch.setattr(stac_api, "_ask", ask)
    tracemalloc.start()
    try:
        assert list(stac_api.search("http://x", {})) == []
        assert tracemalloc.get_traced_memory()[1] < 10 * size
    finally:
        tracemalloc.stop()


UTM_33 = rasterio.crs.CRS.from_epsg(32633)
IN_ZONE_33 = {"in": shapely.box(500_000, 5_300_000, 500_400, 5_300_400), "out": shapely.box(700_000, 0, 700_400, 400)}


def table_of(shapes: dict[str, Any], name: str = "geometry", **geo: Any) -> bytes:
    """A GeoParquet file of images ``s3://x/<id>.tif`` by their footprints, WKB or what is to be none."""
    wkb = [one if isinstance(one, bytes) or one is None else shapely.to_wkb(one) for one in shapes.values()]
    table = pa.table({"id": list(shapes), "uri": [f"s3://x/{one}.tif" for one in shapes], name: wkb})
    told = {"version": "1.1.0", "primary_column": name, "columns": {name: {"encoding": "WKB", **geo}}}
    body = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({"geo": json.dumps(told)}), body)
    return body.getvalue()


def features_of(shapes: dict[str, Any], **more: Any) -> bytes:
    """The same as GeoJSON."""
    features = [
        {"type": "Feature", "id": name, "properties": {"uri": f"s3://x/{name}.tif"}, "geometry": one and mapping(one)}
        for name, one in shapes.items()
    ]
    return json.dumps({"type": "FeatureCollection", "features": features, **more}).encode()


def crs_named(name: str) -> dict[str, Any]:
    return {"crs": {"type": "name", "properties": {"name": name}}}


LISTS = {
    "UTM.parquet": table_of(IN_ZONE_33, crs=UTM_33.to_dict(projjson=True)),
    "geom.parquet": table_of(IN_ZONE_33, "geom", crs=UTM_33.to_dict(projjson=True)),
    "UTM.geojson": features_of(IN_ZONE_33, **crs_named("urn:ogc:def:crs:EPSG::32633")),
    "short.geojson": features_of(IN_ZONE_33, **crs_named("EPSG:32633")),
    "null.parquet": table_of(IN_ZONE_33, crs=None),
    "unknown.parquet": table_of(IN_ZONE_33, crs={"type": "ProjectedCRS"}),
    "unknown.geojson": features_of(IN_ZONE_33, **crs_named("/etc/passwd")),
    "linked.geojson": features_of(IN_ZONE_33, crs={"type": "link", "properties": {"href": "http://x/crs"}}),
}


def list_at(root: str, name: str, **asked: Any) -> Listing:
    store.write(f"{root}/{name}", LISTS[name])
    return sources(root, {"manifest": f"{root}/{name}", **asked})


@pytest.mark.parametrize("name", LISTS)
def test_the_crs_of_a_list_counts_where_a_place_is_asked_for(name: str, tmp_path: Path) -> None:
    root = str(tmp_path)
    assert ids(list_at(root, name)) == ["in", "out"]
    near = {"bbox": [15.001, 47.84, 15.002, 47.86]}
    if "UTM" in name or name in ("geom.parquet", "short.geojson"):
        listing = list_at(root, name, **near)
        assert (ids(listing), listing.remarks) == (["in"], ())
    else:
        with pytest.raises(ConfigError, match=rf"{name}: .*CRS.*; write it again in longitude and latitude"):
            list_at(root, name, **near)


@pytest.mark.parametrize("crs", [{}, {"crs": UTM_33.to_dict(projjson=True)}], ids=["degrees", "UTM"])
def test_entries_without_a_place_are_told_where_one_is_asked_for(crs: dict[str, Any], tmp_path: Path) -> None:
    root = str(tmp_path)
    inside = IN_ZONE_33["in"] if crs else shapely.box(10, 50, 11, 51)
    shapes = {"a": inside, "b": None, "c": b"no WKB", "d": shapely.Polygon(), "e": shapely.Point(1e300, 1e300)}
    store.write(f"{root}/list.parquet", table_of(shapes, **crs))
    source = {"manifest": f"{root}/list.parquet"}
    assert ids(sources(root, source)) == list("abcde")
    listing = sources(root, {**source, "bbox": [5, 45, 20, 55]})
    assert ids(listing) == ["a"]
    (remark,) = listing.remarks
    assert f"{4 if crs else 3} items have no geometry that can be read" in remark


def put_list(uri: str, *hrefs: str) -> dict[str, Any]:
    features = [{"type": "Feature", "properties": {"href": href}, "geometry": None} for href in hrefs]
    put(uri, {"type": "FeatureCollection", "features": features})
    return {"manifest": uri}


def test_a_list_may_name_any_place_unless_allow_says_which(tmp_path: Path) -> None:
    root = str(tmp_path)
    source = put_list(f"{root}/list.geojson", f"{root}/in/a.tif", "s3://bucket/b.tif", f"{root}/index/c.tif")
    free = sources(root, source)
    assert (ids(free), free.remarks) == (["a", "b", "c"], ())
    kept = sources(root, {**source, "allow": [f"{root}/in", "s3://bucket/"]})
    assert ids(kept) == ["a", "b"]
    (remark,) = kept.remarks
    assert f"1 assets lie outside {root}/in, s3://bucket and were left aside" in remark


def test_addresses_of_a_list_that_are_not_read_are_told(tmp_path: Path) -> None:
    root = str(tmp_path)
    source = put_list(
        f"{root}/list.geojson", "https://u:pw@web/\x1b[2J/a.tif", "https://web/b.tif", "s3://bucket/c.tif"
    )
    listing = sources(root, source)
    assert ids(listing) == ["c"]
    (remark,) = listing.remarks
    assert "2 of its addresses are none that geoseg reads, the first 'https://***@web/\\x1b[2J/a.tif'" in remark
    assert "in the source's rewrite" in remark
    assert "allow" not in remark
    mended = sources(root, {**source, "rewrite": {"https://web/": "s3://bucket/"}})
    assert ids(mended) == ["b", "c"]


@contextlib.contextmanager
def served(answer: Callable[[str, Any], tuple[int, Any]]) -> Iterator[tuple[str, list[Any]]]:
    """Serve what ``answer`` makes of a path and a body on loopback; yield the URL and what was asked."""
    asked: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def reply(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"null")
            asked.append((self.path, body, self.headers.get("Authorization")))
            status, told = answer(self.path, body)
            self.send_response_only(status)
            if status == 302:
                self.send_header("Location", told)
            self.end_headers()
            self.wfile.write(told if isinstance(told, bytes) else json.dumps(told).encode())

        do_GET = do_POST = reply  # noqa: N815 - http.server's names

        def log_message(self, *_: object) -> None:
            """Keep the tests' output to themselves."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listener:
        serving = threading.Thread(target=listener.serve_forever, args=(0.05,), daemon=True)
        serving.start()
        try:
            yield f"http://127.0.0.1:{listener.server_address[1]}", asked
        finally:
            listener.shutdown()
            serving.join()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stac_api, "_WAITS_S", (0.0, 0.0, 0.0))


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_an_api_is_read_page_after_page(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = str(tmp_path)
    fails = iter([True])

    def answer(path: str, body: Any) -> tuple[int, Any]:
        if next(fails, False):
            return 503, {}
        following = (body or {}).get("page") or parse_qs(urlsplit(path).query).get("page")
        name = "b" if following else "a"
        link = {"rel": "next", "href": "/v1/search", "method": "POST", "body": {"page": 2}}
        if method == "GET":
            link = {"rel": "next", "href": "search?page=2"}
        found = item(name, "2026-11-02", collection="naip", hrefs={"image": f"https://web/imagery/{name}.tif"})
        return 200, {"type": "FeatureCollection", "features": [found], "links": [] if following else [link]}

    monkeypatch.setenv("STAC_TOKEN", "opensesame")
    with served(answer) as (url, asked):
        listing = sources(
            root,
            {
                "api": f"{url}/v1/",
                "collections": ["naip"],
                "datetime": "2026-11-01/..",
                "bbox": [9, 49, 12, 52],
                "allow": ["s3://imagery/"],
                "rewrite": {"https://web/imagery/": "s3://imagery/"},
                "token_env": "STAC_TOKEN",
            },
        )
    assert {ref.id: ref.uri for ref in listing.refs} == {"a": "s3://imagery/a.tif", "b": "s3://imagery/b.tif"}
    assert listing.remarks == ()
    first = parse_qs(urlsplit(asked[1][0]).query)
    assert (first["datetime"], first["bbox"], first["collections"]) == (
        ["2026-11-01T00:00:00Z/.."],
        ["9,49,12,52"],
        ["naip"],
    )
    assert [token for *_, token in asked] == ["Bearer opensesame"] * 3, "the first was answered with 503"


def page(*items: dict[str, Any], **link: Any) -> dict[str, Any]:
    return {"type": "FeatureCollection", "features": list(items), "links": [{"rel": "next", **link}] if link else []}


@pytest.mark.parametrize(
    ("answer", "error", "sentence"),
    [
        ((404, {}), ConfigError, "refused the search: 404"),
        ((401, {}), AccessDeniedError, r"access denied \(401\)"),
        ((503, {}), StoreError, "failed 4 times: 503"),
        ((200, b"<html>"), ConfigError, "not JSON"),
        ((200, {"hello": 1}), ConfigError, "no page of STAC items"),
        ((200, page(href="https://elsewhere/search")), ConfigError, "on another host"),
        ((200, page(href="/search")), ConfigError, "in a circle"),
        ((302, "http://elsewhere.invalid/search"), ConfigError, "redirected to another host"),
        ((302, "http://[x"), ConfigError, "address that cannot be asked"),
        ((200, page(href="http://[x")), ConfigError, "cannot be told where its next page is: Invalid IPv6 URL"),
        ((200, page(href="?\ud800")), ConfigError, "cannot be told where its next page is"),
        ((200, page(title="on")), ConfigError, "its next link needs an href, got {.*'title': 'on'"),
        ((200, page(href="?2", method="POST", body=[1], merge=True)), ConfigError, r"is no object, got \[1\]"),
        ((200, page() | {"links": ["?2"]}), ConfigError, r"no list of objects with rel and href, got \['\?2'\]"),
    ],
)
def test_what_an_api_may_not_do(answer: tuple[int, Any], error: type[Exception], sentence: str, tmp_path: Path) -> None:
    with served(lambda *_: answer) as (url, _), pytest.raises(error, match=sentence):
        sources(str(tmp_path), {"api": url, "allow": ["s3://x"]})


def test_what_is_no_item_of_an_api_is_left_aside(tmp_path: Path) -> None:
    hrefs = {"image": "s3://x/a.tif"}
    odd = [item("early", "2026-11-02", hrefs=hrefs), item("far", "2026-11-02", hrefs=hrefs)]
    odd[0]["properties"]["datetime"] = "0001-01-01T00:00:00+01:00"
    odd[1]["geometry"] = {"type": "Point", "coordinates": [10**400, 0]}
    told = {"features": [None, "\x1b[2J", *odd, item("a", "2026-11-02", hrefs=hrefs)], "links": None}
    with served(lambda *_: (200, told)) as (url, _):
        listing = sources(
            str(tmp_path),
            {"api": url, "allow": ["s3://x"], "datetime": "../2026-12-01", "bbox": [9, 49, 12, 52]},
        )
    assert ids(listing) == ["a"]
    wanted = ["gave None for an item", r"gave '\x1b[2J' for", "'early' is not valid STAC.*years 1 to 9999", "'far'"]
    for remark, sentence in zip(listing.remarks, wanted, strict=True):
        assert sentence in remark or re.search(sentence, remark), remark


def test_the_next_page_may_have_other_letters(tmp_path: Path) -> None:
    following = page(href="/größe of/search?token=é%C3%A9")

    def answer(path: str, _: Any) -> tuple[int, Any]:
        return 200, page() if "token" in path else following

    with served(answer) as (url, asked):
        assert ids(sources(str(tmp_path), {"api": f"{url}/größe of", "allow": ["s3://x"]}, scenes=[])) == []
    assert [path.partition("&")[0] for path, *_ in asked] == [
        "/gr%C3%B6%C3%9Fe%20of/search?limit=250",
        "/gr%C3%B6%C3%9Fe%20of/search?token=%C3%A9%C3%A9",
    ]


@pytest.mark.parametrize("child", [None, 3, ["a.json"], [None]])
def test_a_document_without_links_does_not_hold_up_the_others(child: Any, root: str) -> None:
    put(f"{root}/cat/catalog.json", {"type": "Catalog", "links": links("odd.json", "a.json")})
    put(f"{root}/cat/odd.json", {"type": "Catalog", "links": child})
    put(f"{root}/cat/a.json", item("a", "2026-11-01"))
    listing = sources(root, {"catalog": f"{root}/cat/catalog.json"})
    assert ids(listing) == ["a"]
    assert [remark.partition(": ")[2].partition(",")[0] for remark in listing.remarks] == (
        ["its links are no list of objects with rel and href"] if child else []
    )


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ({}, "one of manifest, catalog and api"),
        ({"api": "https://x"}, "needs allow"),
        ({"api": "file:///etc", "allow": ["s3://x"]}, "written https://"),
        ({"api": "http://[x", "allow": ["s3://x"]}, "source 1: api: Invalid IPv6 URL"),
        ({"api": "http://x:70000", "allow": ["s3://x"]}, "Port out of range"),
        ({"api": "https:///search", "allow": ["s3://x"]}, "written https://"),
        ({"catalog": "c.json", "datetime": "yesterday"}, "isoformat"),
        ({"catalog": "c.json", "datetime": "0001-01-01T00:00:00+01:00/.."}, "outside the years 1 to 9999"),
        ({"catalog": "c.json", "datetime": "2026-11-02/2026-11-01"}, "ends before it begins"),
        ({"catalog": "c.json", "datetime": "../.."}, "says no time"),
        ({"catalog": "c.json", "bbox": [1, 2, 3, 4], "area": "a"}, "leave one out"),
        ({"catalog": "c.json", "token_env": "X"}, "no effect without an api"),
        ({"catalog": "c.json", "colections": ["x"]}, "did you mean 'collections'"),
    ],
)
def test_a_source_that_makes_no_sense_is_refused(source: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        load_job(None, {"source": [source], "out": "out"})


def test_relative_times_count_from_now() -> None:
    now = datetime(2026, 11, 27, 2, tzinfo=timezone.utc)
    told = parse_interval("last 3 days", now=now)
    assert (told.start, told.end) == (now - timedelta(days=3), None)
    assert parse_interval("2026-11-01/2026-11-02", now=now).text() == "2026-11-01T00:00:00Z/2026-11-02T23:59:59Z"


def test_nights_on_a_catalogue_and_an_api(root: str, tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "bundle")
    names = ["a", "b", "c"]
    for number, name in enumerate(names):
        body = write_scene(tmp_path / "made.tif", noise(3, 40, 53, seed=number)).read_bytes()
        store.write(f"{root}/cat/{name}.tif", body)
        put(f"{root}/cat/{name}.json", item(name, "2026-11-02"))
    put(f"{root}/cat/catalog.json", {"type": "Catalog", "links": links("a.json", "b.json")})

    def answer(path: str, _: Any) -> tuple[int, Any]:
        found = [item(name, "2026-11-02", hrefs={"image": f"{root}/cat/{name}.tif"}) for name in names]
        return 200, page(found[2]) if "page=2" in path else page(*found[:2], href="search?page=2")

    with served(answer) as (url, _):
        values = {
            "source": [{"catalog": f"{root}/cat/catalog.json"}, {"api": url, "allow": [f"{root}/cat"]}],
            "out": f"{root}/out",
            "bundle": bundle,
            "cluster": {"engine": "local"},
        }
        job = load_job(None, values)
        assert run_nightly(job, quiet=True).counts == {"published": 3}, "those that both name are done once"
        assert run_nightly(job, quiet=True).counts == {"unchanged": 3}
        store.delete([f"{root}/cat/b.tif"])
        report = run_nightly(job, remove_gone=True, quiet=True)
    assert [(one.id, one.removed) for one in report.gone] == [("b", True)]
    assert not store.exists(f"{root}/out/b/item.json")
