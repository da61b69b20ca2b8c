"""The server of ``geoseg view``: the bytes asked for and no others, to nobody but the page, whatever is asked."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import geopandas
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kit.object_store import ObjectStore
from kit.published import CORNER, PIXEL_M, SIDE, predicted, put_layers
from PIL import Image
from shapely.geometry import box

from geoseg.errors import NothingReadableError
from geoseg.raster import store
from geoseg.view.catalogue import Catalogue
from geoseg.view.ranges import UnsatisfiableRangeError, parse_range
from geoseg.view.server import ViewServer

CANARY = b"the canary that must not be sung"


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def told(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Served:
    """A server that is asked word for word, as no browser would."""

    server: ViewServer

    def ask(self, path: str, *, method: str = "GET", bare: bool = False, **headers: str) -> Reply:
        """Ask for a path below the token; ``bare`` leaves the token out, underscores in names of headers are dashes."""
        path = "".join(one if one.isascii() else quote(one) for one in path)
        connection = http.client.HTTPConnection("127.0.0.1", self.server.server_port, timeout=20)
        sent = {"Host": self.server.hosts[0], **{name.replace("_", "-"): value for name, value in headers.items()}}
        with contextlib.closing(connection):
            connection.putrequest(method, path if bare else f"/{self.server.token}/{path}", skip_host=True)
            for name, value in sent.items():
                if value:
                    connection.putheader(name, value)
            connection.endheaders()
            answer = connection.getresponse()
            return Reply(answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read())

    def mask(self, scene: str = "alpha") -> str:
        """The path of a scene's mask."""
        return f"scenes/{scene}/files/{self.ask(f'scenes/{scene}/scene.json').told['files']['mask']}"


@contextlib.contextmanager
def serving(out: str) -> Iterator[Served]:
    with ViewServer(Catalogue(out)) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield Served(server)
        server.shutdown()


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output with two masks, buildings, a scene that is held back, and files that no item names."""
    root = tmp_path_factory.mktemp("view")
    made, _ = predicted(str(root), "alpha", "beta", "night", dark=["night"])
    put_layers(made, "alpha", buildings=houses(1000))
    (root / "secret.txt").write_bytes(CANARY)
    for folder in ("out", "out/alpha", "out/_geoseg"):
        (root / folder / "canary.tif").write_bytes(CANARY)
    return Path(made)


@pytest.fixture(scope="module")
def served(out: Path) -> Iterator[Served]:
    with serving(str(out)) as one:
        yield one


def houses(num: int, *, seed: int = 1) -> geopandas.GeoDataFrame:
    """Give small squares on the first scene, in rows of ten by ten places, so that row groups lie apart."""
    rng = np.random.default_rng(seed)
    cells = np.arange(num) * 100 // num
    side = SIDE * PIXEL_M / 10
    xs = CORNER[0] + (cells % 10 + rng.random(num) * 0.8) * side
    ys = CORNER[1] - (cells // 10 + 0.2 + rng.random(num) * 0.8) * side
    told = {"id": np.arange(num), "class": 1, "area_m2": 9.0, "confidence": rng.random(num).round(3), "pixels": 25}
    return geopandas.GeoDataFrame(
        told, geometry=[box(x, y, x + 3, y + 3) for x, y in zip(xs, ys, strict=True)], crs=25832
    )


# ---- ranges


@pytest.mark.parametrize(
    ("header", "status", "span"),
    [
        ("bytes=0-0", 206, (0, 1)),
        ("bytes=0-65535", 206, (0, None)),
        ("bytes=100-199", 206, (100, 200)),
        ("bytes=100-", 206, (100, None)),
        ("bytes=-7", 206, (-7, None)),
        ("bytes=-99999999999", 206, (0, None)),
        ("bytes=10-99999999999999999999999999999999999999", 206, (10, None)),
        ("Bytes=3-4", 206, (3, 5)),
        ("bytes=99999999999-", 416, None),
        ("bytes=-0", 416, None),
        ("bytes=5-3", 200, (0, None)),
        ("bytes=-", 200, (0, None)),
        ("bytes=0-1,4-5", 200, (0, None)),
        ("items=0-1", 200, (0, None)),
        ("bytes=" + "9" * 5000 + "-", 200, (0, None)),
        ("bytes=0x10-0x20", 200, (0, None)),
        ("bytes=\u00b2-\u00b3", 200, (0, None)),
    ],
)
def test_a_range_is_the_bytes_of_the_file(
    header: str, status: int, span: tuple[int, int | None] | None, served: Served, out: Path
) -> None:
    whole = (out / served.mask().replace("scenes/", "").replace("files/", "")).read_bytes()
    reply = served.ask(served.mask(), Range=header)
    assert reply.status == status
    if span is None:
        assert reply.headers["content-range"] == f"bytes */{len(whole)}"
        assert b"II*" not in reply.body
        return
    assert reply.body == whole[span[0] : span[1]]
    assert int(reply.headers["content-length"]) == len(reply.body)
    assert reply.headers["accept-ranges"] == "bytes"
    if status == 206:
        start = span[0] % len(whole)
        assert reply.headers["content-range"] == f"bytes {start}-{start + len(reply.body) - 1}/{len(whole)}"


@given(st.integers(0, 300), st.one_of(st.none(), st.integers(0, 400)), st.one_of(st.none(), st.integers(0, 400)))
def test_a_range_means_what_a_slice_means(size: int, first: int | None, last: int | None) -> None:
    whole = bytes(place % 251 for place in range(size))
    header = f"bytes={'' if first is None else first}-{'' if last is None else last}"
    if first is None:
        wanted = whole if last is None else whole[max(0, size - last) :]
    elif last is not None and last < first:
        wanted = whole
    else:
        wanted = whole[first : None if last is None else last + 1]
    try:
        span = parse_range(header, size)
    except UnsatisfiableRangeError:
        assert not wanted
        return
    assert whole[slice(*span) if span else slice(None)] == wanted


def test_what_changed_is_sent_whole_and_what_did_not_is_not_sent(served: Served) -> None:
    path = served.mask()
    first = served.ask(path, Range="bytes=0-9")
    etag = first.headers["etag"]
    assert served.ask(path, Range="bytes=0-9", If_Range=etag).status == 206
    assert served.ask(path, Range="bytes=0-9", If_Range='"another"').status == 200
    kept = served.ask(path, If_None_Match=f'"other", {etag}')
    assert (kept.status, kept.body) == (304, b"")


def test_head_tells_what_get_would_and_sends_no_body(served: Served) -> None:
    for path in (served.mask(), "scenes.json", "", "scenes/alpha/thumbnail"):
        told, sent = served.ask(path, method="HEAD"), served.ask(path)
        assert (told.status, told.body) == (200, b"")
        assert int(told.headers["content-length"]) == len(sent.body) > 0
        assert told.headers["content-type"] == sent.headers["content-type"]


def test_head_ends_with_its_headers(served: Served) -> None:
    with socket.create_connection(("127.0.0.1", served.server.server_port), timeout=20) as raw:
        address, host = f"/{served.server.token}/{served.mask()}", served.server.hosts[0]
        raw.sendall(f"HEAD {address} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        told = b"".join(iter(lambda: raw.recv(65536), b""))
    assert told.startswith(b"HTTP/1.1 200")
    assert told.endswith(b"\r\n\r\n")


def test_a_large_file_comes_in_pieces(served: Served, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("geoseg.view.server._PIECE_BYTES", 1000)
    asked = []
    read_ranges = store.read_ranges

    def noted(uri: str, ranges: Any, **options: Any) -> list[bytes]:
        asked.extend(ranges)
        return read_ranges(uri, ranges, **options)

    monkeypatch.setattr(store, "read_ranges", noted)
    whole = (out / "alpha" / served.mask().rsplit("/", 1)[1]).read_bytes()
    assert served.ask(served.mask()).body == whole
    assert max(end - start for start, end in asked) == 1000


# ---- who is answered


def test_without_the_token_there_is_nothing(served: Served) -> None:
    token = served.server.token
    assert len(token) >= 32
    paths = [
        "/",
        "/page.js",
        "/scenes.json",
        f"/{token[:-1]}/",
        f"/{token}x/",
        f"/{token.swapcase()}/",
        "//",
        f"/{token}",
    ]
    paths += [f"/../{token}/", f"/x/{token}/", "*", "\\", f"http://evil.example/{token}/", "/%2e%2e/", "/\u00e9/"]
    for path in paths:
        reply = served.ask(path, bare=True)
        assert reply.status in (400, 404), path
        assert token.encode() not in reply.body


@pytest.mark.parametrize(
    "host",
    ["evil.example", "127.0.0.1", "127.0.0.1:1", "evil.example:{port}", "127.0.0.1.evil.example:{port}", ""],
)
def test_a_foreign_name_that_leads_here_is_refused(host: str, served: Served) -> None:
    reply = served.ask("scenes.json", Host=host.format(port=served.server.server_port))
    assert reply.status == 403
    assert b"alpha" not in reply.body


def test_localhost_is_this_machine_too(served: Served) -> None:
    assert served.ask("scenes.json", Host=f"localhost:{served.server.server_port}").status == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "PROPFIND", "get"])
def test_nothing_but_get_and_head(method: str, served: Served) -> None:
    reply = served.ask("scenes.json", method=method)
    assert reply.status in (405, 501)
    assert b"alpha" not in reply.body


def test_it_listens_on_loopback_alone(served: Served) -> None:
    assert served.server.server_address[0] == "127.0.0.1"
    with socket.socket() as probe:
        probe.settimeout(2)
        own = socket.gethostbyname(socket.gethostname())
        if not own.startswith("127."):
            assert probe.connect_ex((own, served.server.server_port)) != 0


def test_each_answer_says_what_a_browser_must_not_do(served: Served) -> None:
    for path in ("", "page.js", "vendor/ol.js", "scenes.json", served.mask(), "nothing", "scenes/alpha/image/0/0/0"):
        headers = served.ask(path).headers
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'self';")
        assert "unsafe" not in policy
        assert "http" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert "access-control-allow-origin" not in headers


# ---- what is found


@pytest.mark.parametrize(
    "path",
    [
        "..",
        "../secret.txt",
        "../../secret.txt",
        "%2e%2e/%2e%2e/secret.txt",
        "..%2f..%2fsecret.txt",
        "scenes/../secret.txt",
        "scenes/alpha/files/",
        "scenes/alpha/files/canary.tif",
        "scenes/alpha/files/item.json",
        "scenes/alpha/files/vectors.json",
        "scenes/alpha/files/../canary.tif",
        "scenes/alpha/files/..%2fcanary.tif",
        "scenes/alpha/files/%2e%2e%2f_geoseg%2fcanary.tif",
        "scenes/alpha/files/..%5ccanary.tif",
        "scenes/alpha/files/canary.tif%00.tif",
        "scenes/alpha/files/model.safetensors",
        "scenes/%2e%2e/files/secret.txt",
        "scenes/..%2f..%2f/files/secret.txt",
        "scenes/alpha%2f..%2fbeta/scene.json",
        "scenes/_geoseg/scene.json",
        "scenes/nobody/scene.json",
        "scenes/nobody/thumbnail",
        "scenes/night/mask/0/0/0",
        "scenes/alpha/image/0/0/-1",
        "scenes/alpha/image/0/0/\u0663",
        "scenes/alpha/image/0/0/99999999999999999999",
        "scenes/alpha/features/buildings",
        "scenes/alpha/features/buildings?bbox=0,0,1",
        "scenes/alpha/features/buildings?bbox=0,0,1,inf",
        "scenes/alpha/features/roads?bbox=0,0,1,1",
        "scenes/alpha/features/mask?bbox=0,0,1,1",
        "vendor/",
        "vendor/README.md",
        "server.py",
        "__init__.py",
        "page.html",
        "vendor/../server.py",
        "vendor%2fol.js",
        "/etc/passwd",
        "%2fetc%2fpasswd",
    ],
)
def test_what_no_item_names_is_not_there(path: str, served: Served) -> None:
    reply = served.ask(path)
    assert reply.status == 404
    assert CANARY not in reply.body
    assert b"<" not in reply.body, "no listing, no page of an error"


PARTS = (
    "..",
    ".",
    "",
    "%2e%2e",
    "%2f",
    "scenes",
    "alpha",
    "files",
    "canary.tif",
    "secret.txt",
    "_geoseg",
    "~",
    "%00",
    "C:",
)


def test_no_path_leads_out(served: Served, figure: Callable[..., None]) -> None:
    tries = 0

    @settings(max_examples=150, deadline=None)
    @given(st.lists(st.sampled_from(PARTS) | st.text(max_size=6), max_size=8))
    def ask(names: list[str]) -> None:
        nonlocal tries
        tries += 1
        reply = served.ask("/".join(quote(name, safe="%:~") for name in names))
        assert CANARY not in reply.body
        assert reply.status == 404 or names in ([], [""]) or reply.headers["content-type"] != "application/octet-stream"

    ask()
    figure("S13", f"requests that led out of the output, of {tries:,}", 0, goal="0")


@pytest.fixture
def copied(out: Path, tmp_path: Path) -> Path:
    """An output of its own, to be spoilt."""
    return Path(shutil.copytree(out, tmp_path / "out"))


def edit(path: Path, change: Any) -> None:
    item = json.loads(path.read_text())
    change(item)
    path.write_text(json.dumps(item))


@pytest.mark.parametrize(
    "href",
    [
        "../../secret.txt",
        "/etc/hostname",
        "file:///etc/hostname",
        "./../canary.tif",
        ".hidden",
        "s3://else/where",
        "..\\canary.tif",
    ],
)
def test_what_an_item_names_outside_of_its_folder_is_not_there(href: str, copied: Path) -> None:
    edit(copied / "alpha" / "item.json", lambda item: item["assets"].update(extra={"href": href, "type": "text/html"}))
    (copied.parent / "secret.txt").write_bytes(CANARY)
    with serving(str(copied)) as served:
        assert "extra" not in served.ask("scenes/alpha/scene.json").told["files"]
        assert served.ask(f"scenes/alpha/files/{quote(href.rsplit('/', 1)[-1])}").status == 404


def test_a_link_out_of_the_output_is_not_followed(copied: Path) -> None:
    (copied.parent / "secret.txt").write_bytes(CANARY)
    (copied / "alpha" / "link.tif").symlink_to(copied.parent / "secret.txt")
    edit(copied / "alpha" / "item.json", lambda item: item["assets"].update(extra={"href": "./link.tif"}))
    with serving(str(copied)) as served:
        reply = served.ask("scenes/alpha/files/link.tif")
        assert (reply.status, CANARY in reply.body) == (404, False)


def test_a_file_is_never_something_that_a_browser_runs(copied: Path) -> None:
    (copied / "alpha" / "evil.html").write_bytes(b"<script>alert(1)</script>")
    told = {"href": "./evil.html", "type": "text/html\r\nX-Injected: yes"}
    edit(copied / "alpha" / "item.json", lambda item: item["assets"].update(extra=told))
    with serving(str(copied)) as served:
        reply = served.ask("scenes/alpha/files/evil.html")
        assert (reply.status, reply.headers["content-type"]) == (200, "application/octet-stream")
        assert "x-injected" not in reply.headers


@pytest.mark.parametrize(
    "body",
    [
        b"no json",
        b"[]",
        b"{}",
        b'{"assets": 3, "properties": {}, "links": []}',
        b'{"assets": {}, "properties": {}, "links": []}',
    ],
)
def test_an_item_that_is_none_is_told_and_the_others_stand(body: bytes, copied: Path) -> None:
    (copied / "beta" / "item.json").write_bytes(body)
    with serving(str(copied)) as served:
        assert {one["id"] for one in served.ask("scenes.json").told["scenes"]} == {"alpha", "beta", "night"}
        reply = served.ask("scenes/beta/scene.json")
        assert reply.status == 422
        assert "beta" in reply.told["sentence"]
        assert served.ask("scenes/alpha/scene.json").status == 200


def test_how_scenes_stand_is_what_the_last_run_says(served: Served) -> None:
    told = served.ask("scenes.json").told
    scenes = {one["id"]: one for one in told["scenes"]}
    assert {name: one["status"] for name, one in scenes.items()} == {
        "alpha": "published",
        "beta": "published",
        "night": "held",
    }
    assert "max_novelty" in scenes["night"]["sentence"]
    assert (scenes["alpha"]["vectors"], scenes["beta"]["vectors"], scenes["night"]["mask"]) == (True, False, False)
    assert served.ask("scenes/night/thumbnail").body.startswith(b"\x89PNG"), "the mask that waits to be looked at"


def test_a_mask_that_is_held_back_shows_the_classes_asked_for(served: Served) -> None:
    told = served.ask("scenes/night/scene.json").told
    colors = {tuple(one["color"]): one["value"] for one in told["classes"]}
    whole, some = (
        np.asarray(Image.open(io.BytesIO(served.ask(path).body)).convert("RGBA"))
        for path in ("scenes/night/thumbnail", "scenes/night/held?show=1")
    )
    codes = np.array([[colors.get(tuple(one[:3]), 255) if one[3] else 255 for one in row] for row in whole.tolist()])
    assert set(np.unique(codes)) >= {0, 1}
    assert (some == np.where((codes == 1)[..., None], whole, 0)).all()
    assert served.ask("scenes/alpha/held?show=1").status == 404


def test_a_new_scene_and_a_new_mask_are_seen_without_a_new_server(copied: Path) -> None:
    with serving(str(copied)) as served:
        old = served.mask("beta")
        assert served.ask(old).status == 200
        shutil.copytree(copied / "alpha", copied / "gamma")
        (copied / "beta" / "mask-0000000000000000.tif").write_bytes(b"II*\0 new")
        edit(
            copied / "beta" / "item.json",
            lambda item: item["assets"]["mask"].update(href="./mask-0000000000000000.tif"),
        )
        assert "gamma" in [one["id"] for one in served.ask("scenes.json").told["scenes"]]
        assert served.ask(served.mask("beta")).body == b"II*\0 new"
        assert served.ask(old).status == 404, "the old name never gives new bytes"


def test_a_file_that_is_replaced_under_its_name_is_not_mixed(copied: Path) -> None:
    with serving(str(copied)) as served:
        path = served.mask("beta")
        assert served.ask(path, Range="bytes=0-9").status == 206
        file = copied / "beta" / path.rsplit("/", 1)[1]
        file.write_bytes(bytes(file.stat().st_size))
        assert served.ask(path, Range="bytes=10-19").status == 422


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NothingReadableError, match="--out"):
        Catalogue(str(tmp_path))


# ---- buckets, and the command


@pytest.mark.bucket
def test_a_bucket_is_shown_and_its_key_stays_here(bucket: str, object_store: ObjectStore, out: Path) -> None:
    for path in out.rglob("*"):
        if path.is_file():
            store.write(f"s3://{bucket}/night/{path.relative_to(out)}", path.read_bytes())
    with serving(f"s3://{bucket}/night") as served:
        mask = served.mask()
        whole = (out / "alpha" / mask.rsplit("/", 1)[1]).read_bytes()
        replies = [served.ask(mask, Range="bytes=100-1999"), served.ask(mask), served.ask(mask, Range="bytes=-100")]
        assert [reply.body for reply in replies] == [whole[100:2000], whole, whole[-100:]]
        box_ = ",".join(map(str, (CORNER[0], CORNER[1] - 400, CORNER[0] + 400, CORNER[1])))
        paths = ["", "scenes.json", "scenes/alpha/scene.json", "scenes/alpha/image.json", "scenes/alpha/image/0/0/0"]
        paths += [
            "scenes/alpha/mask/0/0/0?show=1",
            "scenes/alpha/thumbnail",
            f"scenes/alpha/features/buildings?bbox={box_}",
        ]
        replies += [served.ask(path) for path in (*paths, "scenes/alpha/files/nothing.tif")]
        assert [reply.status for reply in replies] == [206, 200, 206, *[200] * len(paths), 404]
        for reply in replies:
            everything = repr(reply.headers).encode() + reply.body
            for secret in (object_store.secret, object_store.key, object_store.endpoint, "X-Amz", "Authorization"):
                assert secret.encode() not in everything


def test_the_command_tells_its_address_and_ends_on_ctrl_c(out: Path) -> None:
    command = [sys.executable, "-m", "geoseg", "view", str(out), "--no-open"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    ) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:")
        address, _, path = url.removeprefix("http://").partition("/")
        connection = http.client.HTTPConnection(address, timeout=20)
        connection.request("GET", f"/{path}scenes.json")
        assert len(json.loads(connection.getresponse().read())["scenes"]) == 3
        connection.close()
        process.send_signal(signal.SIGINT)
        rest, trouble = process.communicate(timeout=20)
    assert (process.returncode, trouble) == (0, "")
    assert rest.strip() == "ended"
