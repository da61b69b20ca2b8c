"""The page of a run: all of it is there, whatever scenes are called; nothing is loaded; it stays small; a browser likes it."""

from __future__ import annotations

import io
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import product
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import boto3
import numpy as np
import pytest
from affine import Affine
from kit.browser import Look, look_at
from kit.object_store import ObjectStore
from kit.oracle import seeded_bundle
from kit.scenes import noise, write_scene
from PIL import Image

from geoseg.config import Job, load_job
from geoseg.nightly import run_nightly
from geoseg.predict import ledger, page, publish
from geoseg.predict.ledger import SceneReport
from geoseg.predict.page import render
from geoseg.predict.record import GoneScene, RunReport, read_record, record_uri, write_record
from geoseg.predict.scene_map import MappedScene, draw_map
from geoseg.predict.thumbnails import MOST, Thumbnail, choose, thumbnails_of
from geoseg.raster import store
from geoseg.run import make_run_spec, run_job

HOSTILE = "<img src=x onerror=\"document.title='owned'\">\"'&<script>alert(1)</script>"


class Page(HTMLParser):
    """What a browser would make of a page: elements with their attributes, and the text of all."""

    def __init__(self, body: bytes) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.counts = {
            name: int(num.replace(",", ""))
            for name, num in re.findall(r'data-outcome="(\w+)"><b>([\d,]+)</b>', body.decode())
        }
        self.feed(body.decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str, css: str = "") -> list[dict[str, str]]:
        return [at for name, at in self.elements if name == tag and css in [*at.get("class", "").split(), ""]]


def square(west: float, south: float, side: float = 0.1) -> str:
    east, north = west + side, south + side
    return f"POLYGON (({west} {south}, {east} {south}, {east} {north}, {west} {north}, {west} {south}))"


def picture(name: str, side: int = 32) -> Thumbnail:
    bodies = []
    for kind, seed in (("JPEG", 0), ("PNG", 1)):
        out = io.BytesIO()
        Image.fromarray(noise(3, side, side, seed=seed).transpose(1, 2, 0)).save(out, kind)
        bodies.append(out.getvalue())
    return Thumbnail(name, *bodies)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return seeded_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture
def recorded(bundle: Path) -> Any:
    """Give the record of a run with these scenes, as it is written."""
    job = load_job(None, {"scenes": ["memory://in/"], "out": "memory://page/out", "bundle": str(bundle)})
    run = make_run_spec(job)

    def made(scenes: list[SceneReport], **values: Any) -> dict[str, Any]:
        report = RunReport(
            kind="nightly",
            run_id="20261127T0200",
            out="memory://page/out",
            engine="local",
            scenes=tuple(scenes),
            **values,
        )
        write_record(report, job, run, {})
        return read_record(report.out, report.run_id)

    return made


def scene(name: str, status: Any, **values: Any) -> SceneReport:
    item = f"memory://page/out/{name}/item.json" if status == "published" else ""
    return SceneReport(
        id=name, uri=f"memory://in/{name}.tif", status=status, item=item, reasons=("new",), seconds=1.5, **values
    )


def every_outcome() -> list[SceneReport]:
    return [
        *(scene(f"good-{place}", "published", footprint=square(8 + place / 4, 47)) for place in range(3)),
        scene("kept", "held", sentence="kept: too many seams", footprint=square(8, 47.3)),
        scene("torn", "refused", sentence="torn: it is cut short"),
        scene("lost", "failed", sentence="lost: the store gave up", footprint=square(8.3, 47.3)),
    ]


GONE = (
    GoneScene(id="away", sources=("memory://in/away.tif",), footprint=square(8.6, 47.3)),
    GoneScene(id="swept", sources=("memory://in/swept.tif",), removed=True, footprint=square(8.9, 47.3)),
)


def test_every_outcome_is_counted_and_stands_on_the_map(recorded: Any) -> None:
    told = recorded(every_outcome(), num_skipped=2, gone=GONE, remarks=("a source was slow",))
    seen = Page(render(told, [picture("good-0"), picture("lost")], {"old-1": square(8, 46.8), "old-2": ""}))
    assert seen.counts == {
        "published": 3, "unchanged": 2, "held": 1, "refused": 1, "failed": 1, "gone": 2, "removed": 1,
    }  # fmt: skip
    drawn = Counter(at["class"].split()[1] for at in seen.all("path", "mark"))
    assert drawn == {"published": 3, "unchanged": 1, "held": 1, "failed": 1, "gone": 1, "removed": 1}
    for words in (
        "exit code 1", "2 scenes are not on the map", "too many seams", "it is cut short", "the store gave up",
        "geoseg retry memory://page/out", "a source was slow", "memory://in/away.tif", "km²/h", "Mpx/s", "GPU hours",
        "seed-0", "new 6",
    ):  # fmt: skip
        assert words in seen.text
    assert [at["alt"] for at in seen.all("img")] == [
        "Image of good-0",
        "Mask of good-0",
        "Image of lost",
        "Mask of lost",
    ]


def test_a_night_without_work_has_a_page_too(recorded: Any) -> None:
    seen = Page(
        render(recorded([], num_skipped=3), [], {"a": square(8, 47), "b": square(8.2, 47), "c": square(8.4, 47)})
    )
    assert seen.counts["unchanged"] == 3
    assert len(seen.all("path", "mark")) == 3
    assert "All scenes stand" in seen.text
    assert Page(render(recorded([]), [], {})).counts["published"] == 0


def test_names_and_sentences_stay_text(recorded: Any) -> None:
    scenes = [
        scene(HOSTILE, "published", footprint=square(8, 47)),
        scene("b" + HOSTILE, "failed", sentence=HOSTILE, footprint=square(9, 47)),
    ]
    gone = (GoneScene(id=HOSTILE, sources=(HOSTILE,), footprint=square(8, 48)),)
    told = recorded(scenes, gone=gone, remarks=(HOSTILE,), num_skipped=1)
    told["bundle"]["name"] = told["job"]["out"] = told["kind"] = told["figures"]["engine"] = HOSTILE
    told["next"], told["reasons"] = [HOSTILE], {HOSTILE: 1}
    plain = Page(render(recorded(every_outcome(), gone=GONE), [picture("good-0")], {}))
    seen = Page(render(told, [picture(HOSTILE)], {HOSTILE + "2": square(7, 47)}))
    assert {tag for tag, _ in seen.elements} <= {tag for tag, _ in plain.elements} | {"ul", "h3"}
    assert not any(name.startswith("on") for _, attributes in seen.elements for name in attributes)
    assert all(at["src"].startswith("data:image/") for at in seen.all("img"))
    assert seen.text.count("alert(1)") > 8


def test_nothing_is_loaded_from_anywhere(recorded: Any) -> None:
    body = render(recorded(every_outcome(), gone=GONE), [picture("good-0")], {})
    seen = Page(body)
    policy = next(at["content"] for at in seen.all("meta") if at.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:; ")
    assert "script" not in policy
    assert not seen.all("script")
    links = [
        value for _, at in seen.elements for name, value in at.items() if name in ("src", "href", "srcset", "action")
    ]
    assert links
    assert all(re.match(r"data:|\.\./|summary\.json$", link) for link in links)
    assert not re.search(rb"url\(|@import|https?://", body)


def test_the_links_lead_to_what_is_published(bundle: Path, tmp_path: Path) -> None:
    write_scene(tmp_path / "in" / "a b#1.tif", noise(3, 40, 53))
    report = run_job(job_on(str(tmp_path), bundle), quiet=True)
    file = Path(report.page)
    links = [at["href"] for at in Page(file.read_bytes()).all("a")]
    assert len(links) == 3
    assert all((file.parent / unquote(link)).is_file() for link in links)


def test_secrets_stay_out(recorded: Any) -> None:
    told = recorded(
        [
            replace(
                scene("a", "failed", sentence="the store said password=hunter2"),
                uri="s3://b/a.tif?X-Amz-Signature=feed",
            )
        ],
        gone=(GoneScene(id="g", sources=("https://me:hunter2@host/g.tif",)),),
        remarks=("AKIAIOSFODNN7EXAMPLE was refused",),
    )
    body = render(told, [], {}).decode()
    assert not re.search("hunter2|feed|AKIAIOS", body)
    assert "password=***" in body


def test_the_same_record_gives_the_same_bytes(recorded: Any) -> None:
    told = recorded(every_outcome(), num_skipped=3, gone=GONE)
    standing = {f"old-{place}": square(8 + place, 46) for place in range(3)}
    pictures = [picture("good-0")]
    first = render(told, pictures, standing)
    assert render(told, pictures, dict(reversed(standing.items()))) == first
    assert (
        render({**told, "scenes": told["scenes"][::-1], "gone": told["gone"][::-1][::-1]}, pictures, standing) == first
    )
    assert render(json.loads(json.dumps(told)), pictures, standing) == first


def test_twenty_thousand_scenes_stay_small(recorded: Any) -> None:
    told = recorded([scene("a", "failed", sentence="x" * 5000)], remarks=("y" * 5000,) * 500)
    (one,) = told["scenes"]
    rng = np.random.default_rng(0)
    places = [square(round(x, 5), round(y, 5)) for x, y in rng.uniform((-179, -80), (179, 80), (20_000, 2))]
    told["scenes"] = [
        {**one, "id": f"{'long' * 20}-{number}", "status": status, "sentence": f"{number} {'x' * 1000}",
         "footprint": places[number]}
        for number, status in zip(range(2_000), ("failed", "published") * 1000, strict=True)
    ]  # fmt: skip
    told["gone"] = [{"id": f"g{n}", "sources": ["s" * 90], "removed": False, "footprint": ""} for n in range(5000)]
    told["job"]["scenes"] = ["s3://bucket/a-scene.tif"] * 50_000
    standing = {f"old-{number}": places[-number] for number in range(18_000)}
    shown = [replace(picture("", 256), id=one["id"]) for one in told["scenes"][:MOST]]
    size = len(render(told, shown, standing)) - sum(len(one.image) + len(one.mask) for one in shown) * 4 / 3
    assert size < 1_500_000


class TestMap:
    def test_both_sides_of_the_antimeridian_lie_side_by_side(self) -> None:
        across = (
            "MULTIPOLYGON (((179.95 -17, 180 -17, 180 -16.9, 179.95 -16.9, 179.95 -17)), "
            "((-180 -17, -179.95 -17, -179.95 -16.9, -180 -16.9, -180 -17)))"
        )
        told = [
            MappedScene("west", "published", square(179.7, -17)),
            MappedScene("across", "held", across),
            MappedScene("east", "published", square(-179.8, -17)),
        ]
        (panel,) = draw_map(told).panels
        lefts = {mark.title: [float(x) for x in re.findall(r"[ML]([\d.]+) ", mark.path)] for mark in panel.marks}
        assert max(lefts["west: published"]) < min(lefts["across: held"])
        assert max(lefts["across: held"]) < min(lefts["east: published"])
        assert next(mark for mark in panel.marks if mark.outcome == "held").path.count("M") == 1, (
            "its halves are joined"
        )
        assert [tick.text for tick in panel.meridians] == ["179.8° E", "180°", "179.8° W"]

    def test_groups_that_would_be_specks_have_maps_of_their_own(self) -> None:
        told = [
            *(MappedScene(f"dubai-{place}", "published", square(55 + place / 50, 25, 0.01)) for place in range(5)),
            MappedScene("boston", "failed", square(-71, 42, 0.01)),
            MappedScene("kampala", "unchanged", square(32.6, 0.3, 0.01)),
        ]
        whole, *details = draw_map(told).panels
        assert [name for name, _, _ in whole.letters] == ["A", "B", "C"] == [panel.letter for panel in details]
        assert [panel.num_scenes for panel in details] == [1, 1, 5], "from west to east"
        assert all(mark.is_dot for mark in whole.marks)
        assert not any(mark.is_dot for panel in details for mark in panel.marks)
        assert details[0].scale.text == "500 m"

    def test_scenes_of_one_place_are_one_mark_and_bad_ones_lie_on_top(self) -> None:
        told = [MappedScene(f"day-{day:03}", "published", square(8, 47)) for day in range(300)]
        told.append(MappedScene("today", "failed", square(8, 47)))
        (panel,) = draw_map(told).panels
        assert draw_map(reversed(told)).panels == (panel,)
        assert [(mark.outcome, mark.title) for mark in panel.marks] == [
            ("failed", "today: failed"),
            ("published", "300 scenes published: day-000, day-001, day-002 and 297 more"),
        ]

    def test_what_cannot_be_placed_is_counted(self) -> None:
        texts = ["", "POLYGON EMPTY", "POLYGON ((0 0, 1", square(8, 47)]
        drawn = draw_map(MappedScene(str(place), "published", text) for place, text in enumerate(texts))
        assert (drawn.num_unplaced, drawn.panels[0].num_scenes) == (3, 1)
        assert draw_map([]).panels == ()


class TestPictures:
    def test_bad_scenes_come_first_and_good_ones_are_taken_evenly(self) -> None:
        told = [scene(f"good-{place:03}", "published") for place in range(500)]
        told += [
            scene(f"bad-{place}", status) for place, status in enumerate(("held", "failed", "refused", "unchanged"))
        ]
        chosen = choose(told)
        assert len(chosen) == MOST
        assert [one.id for one in chosen[:2]] == ["bad-1", "bad-0"]
        assert [chosen[2].id, chosen[-1].id] == ["good-000", "good-499"]
        assert choose(reversed(told)) == chosen
        assert len(choose(scene(f"bad-{place}", "failed") for place in range(500))) == MOST // 2

    def test_they_are_small_and_show_the_scene(self, bundle: Path, tmp_path: Path) -> None:
        pixels = np.zeros((3, 700, 900), np.uint16)
        pixels[0, :, 450:] = 3000
        write_scene(tmp_path / "in" / "a.tif", pixels, overviews=(2, 8), compress="deflate", photometric="rgb")
        job = job_on(str(tmp_path), bundle, predict={"scale": [0, 3000], "window": 512})
        report = run_job(job, quiet=True)
        (one,) = thumbnails_of(report.scenes, make_run_spec(job))
        for body, kind in ((one.image, "JPEG"), (one.mask, "PNG")):
            (tmp_path / "shown").write_bytes(body)
            with Image.open(tmp_path / "shown") as shown:
                assert (shown.format, shown.size) == (kind, (256, 199))
                if kind == "JPEG":
                    left, right = (np.asarray(shown)[:, cols, 0].mean() for cols in (slice(0, 120), slice(136, None)))
                    assert (left < 20, right > 230) == (True, True)

    def test_a_source_that_is_gone_costs_a_blank(self, bundle: Path, tmp_path: Path) -> None:
        write_scene(tmp_path / "in" / "a.tif", noise(3, 40, 53))
        job = job_on(str(tmp_path), bundle)
        report = run_job(job, quiet=True)
        (tmp_path / "in" / "a.tif").unlink()
        (one,) = thumbnails_of(report.scenes, make_run_spec(job))
        assert (one.image, one.mask != b"") == (b"", True)
        store.delete([report.scenes[0].item])
        assert thumbnails_of(report.scenes, make_run_spec(job)) == [Thumbnail("a", b"", b"")]

    def test_a_scene_that_would_cost_much_is_not_read(
        self, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name, overviews in (("whole", ()), ("with-overview", (2, 4))):
            write_scene(tmp_path / "in" / f"{name}.tif", np.zeros((3, 600, 900), np.uint8), overviews=overviews)
        job = job_on(str(tmp_path), bundle)
        scenes, run = run_job(job, quiet=True).scenes, make_run_spec(job)
        for limit, shown in ((100_000, []), (600_000, ["with-overview"]), (2_000_000, ["whole", "with-overview"])):
            monkeypatch.setattr("geoseg.predict.thumbnails._MOST_BYTES", limit)
            assert [one.id for one in thumbnails_of(scenes, run) if one.image] == shown


def job_on(root: str, bundle: Path, **values: Any) -> Job:
    told = {"scenes": [f"{root}/in/"], "out": f"{root}/out", "bundle": str(bundle), "cluster": {"engine": "local"}}
    return load_job(None, {**told, **values})


def put(root: str, tmp_path: Path, *names: int) -> None:
    for name in names:
        moved = Affine(0.5, 0, 500_000.25 + name * 50, 0, -0.5, 5_300_000.75)
        body = write_scene(tmp_path / "made.tif", noise(3, 40, 53, seed=name), transform=moved).read_bytes()
        store.write(f"{root}/in/{name}.tif", body)


def test_a_nights_page_places_what_stands_without_asking_for_it(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = str(tmp_path / "store")
    put(root, tmp_path, *range(6))
    job = job_on(root, bundle)
    run_nightly(job, quiet=True)
    put(root, tmp_path, 6)
    store.delete([f"{root}/in/2.tif"])
    asked: list[str] = []
    read_version, head, fetch = store.read_version, store.head, store._fetch
    monkeypatch.setattr(store, "read_version", lambda uri: asked.append(uri) or read_version(uri))
    monkeypatch.setattr(store, "head", lambda uri: asked.append(uri) or head(uri))
    monkeypatch.setattr(store, "_fetch", lambda uri, options: asked.append(uri) or fetch(uri, options))
    report = run_nightly(job, quiet=True)
    assert report.page == f"{root}/out/_geoseg/runs/{report.run_id}/report.html"
    seen = Page(store.read(report.page))
    assert Counter(at["class"].split()[1] for at in seen.all("path", "mark")) == {
        "published": 1,
        "unchanged": 5,
        "gone": 1,
    }
    assert "on the map" not in seen.text
    assert len(seen.all("img")) == 2
    assert not any(re.search(rf"/(?:in|out)/{standing}[./]", uri) for standing in (0, 1, 2, 3, 4, 5) for uri in asked)


@pytest.mark.parametrize("broken", ["render", "thumbnails_of"])
def test_a_run_never_fails_by_its_page(
    broken: str, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(str(tmp_path), tmp_path, 0)

    def fail(*_: Any) -> bytes:
        raise RuntimeError("no ink")

    monkeypatch.setattr(page, broken, fail)
    report = run_nightly(job_on(str(tmp_path), bundle), quiet=True)
    assert (report.exit_code, report.page) == (0, "")
    assert "no ink" in report.remarks[-1]
    assert store.exists(record_uri(report.out, report.run_id))


def test_a_run_never_fails_by_a_footprint(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(str(tmp_path), tmp_path, 0)

    def fail(_: Any) -> str:
        raise RuntimeError("no such place")

    monkeypatch.setattr(ledger, "footprint", fail)
    report = run_nightly(job_on(str(tmp_path), bundle), quiet=True)
    assert report.counts == {"published": 1}
    assert "1 scene is not on the map" in Page(Path(report.page).read_bytes()).text


def test_colours_can_be_told_from_what_lies_behind() -> None:
    style = Path(page.__file__).with_name("page.html").read_text()
    light, dark = (
        dict(re.findall(r"--(\w+): (#\w+);", block)) for block in re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    )

    def brightness(color: str) -> float:
        parts = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    texts = ("ink", "soft", "link", "published", "unchanged", "held", "refused", "failed", "gone", "removed")
    for theme, text, behind in product((light, dark), texts, ("paper", "card", "sea")):
        low, high = sorted((brightness(theme[text]), brightness(theme[behind])))
        assert (high + 0.05) / (low + 0.05) >= 4.5, f"{text} {theme[text]} on {behind} {theme[behind]} (WCAG 2.2, AA)"


ASK = {
    "tiles": "Object.fromEntries([...document.querySelectorAll('.tiles li')]"
    ".map(one => [one.dataset.outcome, +one.firstChild.textContent]))",
    "marks": "document.querySelectorAll('svg .mark, svg g').length",
    "seen": "[...document.querySelectorAll('svg .mark')].every(one => one.getBoundingClientRect().width > 1)",
    "images": "[...document.images].filter(one => one.complete && one.naturalWidth > 0).length",
    "wider": "document.documentElement.scrollWidth - innerWidth",
    "paper": "getComputedStyle(document.body).backgroundColor",
    "title": "document.title",
}


@pytest.fixture
def shown(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the page of a night with every outcome but held, and a hostile sentence."""
    root = str(tmp_path)
    put(root, tmp_path, 0, 1)
    run_nightly(job_on(root, bundle), quiet=True)
    put(root, tmp_path, 2, 3, 4)
    (tmp_path / "in" / "1.tif").unlink()
    (tmp_path / "in" / "torn.tif").write_bytes(b"no image")
    make_item = publish.make_item

    def broken(run: Any, plan: Any, **settings: Any) -> bytes:
        if plan.scene.id == "4":
            raise RuntimeError(HOSTILE)
        return make_item(run, plan, **settings)

    monkeypatch.setattr(publish, "make_item", broken)
    return Path(run_nightly(job_on(root, bundle), quiet=True).page)


@pytest.fixture
def served(shown: Path) -> Iterator[str]:
    """Yield the page's URL on a plain web server."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    folder = shown.parents[3]
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/{shown.relative_to(folder)}"
        server.shutdown()


@pytest.mark.slow
def test_a_browser_shows_it_from_disk_and_from_a_server(shown: Path, served: str) -> None:
    looks = [
        Look(url=url, width=width, dark=dark, ask=ASK)
        for url, (width, dark) in product((shown.as_uri(), served), ((1200, False), (360, True)))
    ]
    found = look_at(looks)
    for look, one in zip(looks, found, strict=True):
        assert one["trouble"] == []
        assert one["requests"] == [look.url], "nothing else is asked for"
        answers = one["answers"]
        assert answers["tiles"] == {
            "published": 2, "unchanged": 1, "held": 0, "refused": 1, "failed": 1, "gone": 1, "removed": 0,
        }  # fmt: skip
        assert (answers["marks"], answers["seen"], answers["images"]) == (5, True, 5)
        assert answers["wider"] <= 0
        assert answers["title"].startswith("Nightly run")
    assert len({one["answers"]["paper"] for one in found}) == 2, "dark where the reader wants it dark"


@pytest.mark.bucket
@pytest.mark.slow
def test_a_browser_shows_it_from_a_bucket(bucket: str, object_store: ObjectStore, bundle: Path, tmp_path: Path) -> None:
    put(f"s3://{bucket}", tmp_path, 0, 1)
    report = run_nightly(job_on(f"s3://{bucket}", bundle), quiet=True)
    client = boto3.Session().client("s3", endpoint_url=object_store.endpoint)
    at = {"Bucket": bucket, "Key": report.page.removeprefix(f"s3://{bucket}/")}
    assert client.head_object(**at)["ContentType"] == "text/html; charset=utf-8"
    (one,) = look_at([Look(url=client.generate_presigned_url("get_object", at), width=1200, ask=ASK)])
    assert one["trouble"] == []
    assert (one["answers"]["tiles"]["published"], one["answers"]["marks"], one["answers"]["images"]) == (2, 2, 4)
