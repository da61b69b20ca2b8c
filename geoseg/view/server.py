"""The output's page on this machine alone: requests from the browser in, the page's files, ranges, tiles and features out.

It answers on 127.0.0.1, under a path with a random token, to GET and HEAD. A name in a request is looked up among those that the
output's items tell; no path is ever made of it. The store's credentials stay in this process.
"""

from __future__ import annotations

import hmac
import json
import math
import os
import secrets
import sys
import traceback
import webbrowser
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from threading import BoundedSemaphore
from typing import Any
from urllib.parse import parse_qs, unquote

from geoseg.errors import AccessDeniedError, GeosegError, SceneDeniedError, SceneError
from geoseg.raster import store
from geoseg.view.catalogue import Catalogue
from geoseg.view.ranges import UnsatisfiableRangeError, parse_range

LOOPBACK = "127.0.0.1"
_PIECE_BYTES = 4 << 20
_IDLE_S = 60
_JSON = "application/json"
_PAGE_FILES = {
    ("",): "text/html; charset=utf-8",
    ("page.js",): "text/javascript; charset=utf-8",
    ("cog.js",): "text/javascript; charset=utf-8",
    ("page.css",): "text/css; charset=utf-8",
    ("vendor", "ol.js"): "text/javascript; charset=utf-8",
    ("vendor", "ol.css"): "text/css; charset=utf-8",
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; object-src 'none'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


@dataclass(frozen=True)
class _Answer:
    """What is sent: a status, headers, and the body in pieces of which ``size`` bytes come."""

    status: int
    media: str
    size: int
    pieces: Iterator[bytes]
    headers: dict[str, str] = field(default_factory=dict)


class _NotHereError(Exception):
    """There is nothing under this path."""


_STATUSES: tuple[tuple[tuple[type[Exception], ...], int], ...] = (
    ((_NotHereError, store.ObjectMissingError), 404),
    ((AccessDeniedError, SceneDeniedError), 403),
    ((SceneError,), 422),
    ((GeosegError,), 502),
)


class ViewServer(ThreadingHTTPServer):
    """Serves the page of an output on loopback; ``url`` is the one way in."""

    daemon_threads = True

    def __init__(self, catalogue: Catalogue, *, port: int = 0) -> None:
        self.catalogue, self.token = catalogue, secrets.token_urlsafe(24)
        self.drawing = BoundedSemaphore(os.cpu_count() or 2)
        super().__init__((LOOPBACK, port), _Handler)

    @property
    def url(self) -> str:
        """The address of the page."""
        return f"http://{LOOPBACK}:{self.server_port}/{self.token}/"

    @property
    def hosts(self) -> tuple[str, ...]:
        """What a browser that was led here by our address says it looks for; a foreign name is another site's trick."""
        return f"{LOOPBACK}:{self.server_port}", f"localhost:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away in the middle is nothing to tell of."""
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: ViewServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "geoseg", ""
    timeout = _IDLE_S

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        """Nothing: the page says what goes wrong."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """A refusal by the base class, without a page of its own."""
        del explain
        self.close_connection = True
        self._send(_refusal(code, message or "this request cannot be answered"))

    def do_GET(self) -> None:
        if "Content-Length" in self.headers or "Transfer-Encoding" in self.headers:
            self.close_connection = True  # a body is not read, and must not be taken for the next request
        self._send(self._answer())

    do_HEAD = do_GET  # noqa: N815 - the base class's name

    def _refuse(self) -> None:
        self.close_connection = True  # its body is not read
        self._send(_refusal(405, "this server is read with GET and HEAD alone", {"Allow": "GET, HEAD"}))

    do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = do_TRACE = do_CONNECT = _refuse  # noqa: N815

    def _send(self, answer: _Answer) -> None:
        self.send_response(answer.status)
        for name, value in {**_HEADERS, **answer.headers}.items():
            self.send_header(name, value)
        if answer.status != 304:
            self.send_header("Content-Type", answer.media)
            self.send_header("Content-Length", str(answer.size))
        self.end_headers()
        if self.command == "HEAD" or answer.status == 304:
            return
        try:
            for piece in answer.pieces:
                self.wfile.write(piece)
        except GeosegError:
            self.close_connection = True  # shorter than was said, so that the browser sees that it is not whole

    def _answer(self) -> _Answer:
        if self.headers.get("Host", "").lower() not in self.server.hosts:
            return _refusal(403, "this server answers under its own address alone")
        path, _, query = self.path.partition("?")
        first, token, *names = [unquote(name) for name in path.split("/", 9)] + [""] * ("/" not in path)
        if first or not names or not hmac.compare_digest(token.encode(), self.server.token.encode()):
            return _refusal(404, "there is nothing here")
        try:
            return self._find(tuple(names), parse_qs(query))
        except (_NotHereError, GeosegError) as error:
            status = next(status for kinds, status in _STATUSES if isinstance(error, kinds))
            return _refusal(status, str(error) or "there is nothing here")
        except Exception:  # noqa: BLE001 - one bad request must not end the others; the terminal has the rest
            traceback.print_exc()
            return _refusal(500, "this went wrong; the terminal of geoseg view says more")

    def _find(self, names: tuple[str, ...], query: dict[str, list[str]]) -> _Answer:
        if names in _PAGE_FILES:
            body = files("geoseg.view").joinpath(*names if names != ("",) else ("page.html",)).read_bytes()
            return _whole(body, _PAGE_FILES[names])
        match names:
            case ("scenes.json",):
                return _json(self.server.catalogue.scenes())
            case ("scenes", scene, *rest):
                return self._find_of(scene, rest, query)
        raise _NotHereError

    def _find_of(self, scene: str, names: list[str], query: dict[str, list[str]]) -> _Answer:
        """What is asked for of one scene."""
        catalogue = self.server.catalogue
        match names:
            case ["scene.json"]:
                answer = _json(catalogue.scene(scene))
            case ["image.json"]:
                answer = _json(catalogue.image(scene))
            case ["thumbnail"]:
                answer = self._object(*catalogue.thumbnail(scene))
            case ["held"]:
                answer = _whole(catalogue.held_mask(scene, _shown(query)), "image/png")
            case ["files", name]:
                answer = self._object(*catalogue.file(scene, name))
            case ["image" | "mask" as what, level, col, row]:
                answer = self._tile(scene, what, _whole_numbers(level, col, row), query)
            case ["features", layer]:
                answer = _whole(catalogue.features(scene, layer).read(_box(query)), "application/geo+json")
            case _:
                raise _NotHereError
        return answer

    def _tile(self, scene: str, what: str, place: tuple[int, int, int], query: dict[str, list[str]]) -> _Answer:
        with self.server.drawing:
            if what == "image":
                return _whole(*self.server.catalogue.image_picture(scene).tile(*place))
            shown = _shown(query)
            picture, classes = self.server.catalogue.mask_picture(scene)
            colors = {one["value"]: (*one["color"], 255) for one in classes if one["value"] in shown}
            return _whole(*picture.tile(*place, colors=colors))

    def _object(self, info: store.ObjectInfo, media: str) -> _Answer:
        """A stored object, or the one range of it that is asked for."""
        etag = f'"{info.etag}"'
        headers = {"Accept-Ranges": "bytes", "ETag": etag}
        if etag in [one.strip() for one in self.headers.get("If-None-Match", "").split(",")]:
            return _Answer(304, media, 0, iter(()), headers)
        asked = self.headers.get("Range")
        if self.headers.get("If-Range", etag) != etag:
            asked = None
        try:
            span = parse_range(asked, info.size)
        except UnsatisfiableRangeError as error:
            return _refusal(416, str(error), {**headers, "Content-Range": f"bytes */{info.size}"})
        start, end = span or (0, info.size)
        if span:
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{info.size}"
        pieces = _pieces(info, start, end)
        first = next(pieces, b"")  # so that what cannot be read is refused and not begun
        return _Answer(206 if span else 200, media, end - start, _chained(first, pieces), headers)


def _pieces(info: store.ObjectInfo, start: int, end: int) -> Iterator[bytes]:
    for at in range(start, end, _PIECE_BYTES):
        yield store.read_ranges(info.uri, [(at, min(end, at + _PIECE_BYTES))], etag=info.etag)[0]


def _chained(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    yield first
    yield from rest


def _whole(body: bytes, media: str) -> _Answer:
    return _Answer(200, media, len(body), iter((body,)))


def _json(told: Any) -> _Answer:
    return _whole(json.dumps(told, allow_nan=False).encode(), _JSON)


def _refusal(status: int, sentence: str, headers: dict[str, str] | None = None) -> _Answer:
    body = json.dumps({"sentence": sentence}).encode()
    return _Answer(status, _JSON, len(body), iter((body,)), headers or {})


def _whole_numbers(*texts: str) -> tuple[int, int, int]:
    if not all(text.isascii() and text.isdigit() and len(text) <= 9 for text in texts):
        raise _NotHereError
    level, col, row = map(int, texts)
    return level, col, row


def _shown(query: dict[str, list[str]]) -> set[int]:
    """The class codes that are to be seen."""
    codes = query.get("show", [""])[0].split(",")
    return {int(code) for code in codes if code.isascii() and code.isdigit() and len(code) <= 3}


def _box(query: dict[str, list[str]]) -> tuple[float, float, float, float]:
    try:
        xmin, ymin, xmax, ymax = map(float, query["bbox"][0].split(","))
    except (KeyError, ValueError) as error:
        raise _NotHereError from error
    if not all(map(math.isfinite, (xmin, ymin, xmax, ymax))):
        raise _NotHereError
    return xmin, ymin, xmax, ymax


def view(out: str, *, port: int = 0, tell: Callable[[str], None], open_browser: bool = True) -> None:
    """Serve the page of an output until Ctrl-C; ``tell`` is given lines for a person, the address among them.

    Raises NothingReadableError, ConfigError, AccessDeniedError, StoreError, and OSError when the port is taken.
    """
    with ViewServer(Catalogue(out), port=port) as server:
        tell(server.url)
        if open_browser and _has_screen():
            webbrowser.open(server.url)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            tell("ended")


def _has_screen() -> bool:
    """Whether there is a screen for a window; a browser in the terminal would take it over."""
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
