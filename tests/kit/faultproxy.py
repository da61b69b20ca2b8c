"""A loopback proxy before an S3 server that does to chosen requests and answers what networks and stores do.

A rule says which requests (method, path, headers, the how manyeth) and which fault. The first rule that fits acts. With a
certificate it speaks TLS, and a bit that flips on the way down flips in what goes over the wire, not in what was said.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import random
import re
import socket
import ssl
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

import boto3

_AWAY_S = 0.02
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Say:
    """Answer with an error of S3's; with ``after`` the server has done what was asked all the same."""

    status: int
    code: str
    after: bool = False


SLOW_DOWN = Say(503, "SlowDown")
FAILED_AFTER = Say(500, "InternalError", after=True)
CONFLICT = Say(409, "ConditionalRequestConflict")
EXPIRED = Say(403, "ExpiredToken")
DENIED = Say(403, "AccessDenied")


@dataclass(frozen=True, slots=True)
class Cut:
    """Do as asked and end the connection at byte ``at`` of the answer, headers included; below 0 counts from its end.

    ``reset``: by RST instead of FIN. ``stall_s``: hold it that long first, with nothing said.
    """

    at: int
    reset: bool = False
    stall_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Short:
    """Send so many bytes too few, with a length header that is true of them."""

    num_bytes: int


@dataclass(frozen=True, slots=True)
class Whole:
    """Ignore the range that was asked for: 200 and the whole object."""


@dataclass(frozen=True, slots=True)
class Flip:
    """Flip a bit, counted through the body, on the way ``up`` to the server or down from it."""

    bit: int
    up: bool = False

    def of(self, body: bytes) -> bytes:
        """The body with the bit flipped, an empty one as it is."""
        made = bytearray(body)
        if made:
            made[self.bit // 8 % len(made)] ^= 1 << self.bit % 8
        return bytes(made)


@dataclass(frozen=True, slots=True)
class Without:
    """Let headers of this name not get through."""

    header: str


@dataclass(frozen=True, slots=True)
class Before:
    """Let something else happen before the request arrives, which is then done as asked."""

    happens: Callable[[], None]


Fault = Say | Cut | Short | Whole | Flip | Without | Before


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """Regular expressions for the method and the path with its query, a test of the headers ("name: value" lines); which of those.

    Of the requests that fit the first ``skip`` pass, then ``times`` are hit (None: all), each with a ``chance``.
    """

    fault: Fault
    method: str = ""
    path: str = ""
    headers: Callable[[str], bool] | None = None
    skip: int = 0
    times: int | None = 1
    chance: float = 1.0


@dataclass
class FaultProxy:
    """``endpoint`` leads to the server by way of the proxy; ``seen`` and ``hit`` list requests (method, path)."""

    server: str
    rules: Sequence[Rule] = ()
    seed: int = 0
    certificate: Path | None = None
    seen: list[tuple[str, str]] = field(default_factory=list)
    hit: list[tuple[str, str]] = field(default_factory=list)
    port: int = 0

    def __post_init__(self) -> None:
        self.tls: ssl.SSLContext | None = None
        if self.certificate:
            self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self.tls.load_cert_chain(self.certificate)
        self._lock = threading.Lock()
        self._chance = random.Random(self.seed)
        self._ending = threading.Event()
        self._connections: set[socket.socket] = set()
        self._listener: ThreadingHTTPServer | None = None
        self.obey(*self.rules)

    @property
    def endpoint(self) -> str:
        """The URL of the proxy."""
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}"

    def obey(self, *rules: Rule) -> None:
        """Follow these rules from now on, and count anew."""
        with self._lock:
            self.rules = rules
            self._fitting = [0] * len(rules)
            self.seen, self.hit = [], []

    def fault_for(self, method: str, path: str, headers: str) -> Fault | None:
        """Note a request, and say what is to be done to it."""
        with self._lock:
            self.seen.append((method, path))
            for at, rule in enumerate(self.rules):
                fits = re.fullmatch(rule.method or ".*", method) and re.search(rule.path, path)
                if not fits or not (rule.headers is None or rule.headers(headers)):
                    continue
                self._fitting[at] += 1
                past = self._fitting[at] - rule.skip
                if past > 0 and (rule.times is None or past <= rule.times) and self._chance.random() < rule.chance:
                    self.hit.append((method, path))
                    return rule.fault
            return None

    def serve(self) -> None:
        """Begin to accept connections, on the port of before."""
        listener = ThreadingHTTPServer(("127.0.0.1", self.port), _handler(self))
        listener.daemon_threads = True
        self._listener, self.port = listener, listener.server_address[1]
        threading.Thread(target=listener.serve_forever, args=(_AWAY_S,), daemon=True).start()

    def refuse(self) -> None:
        """End all connections and refuse new ones, until ``serve``."""
        if self._listener is not None:
            self._listener.shutdown()
            self._listener.server_close()
            self._listener = None
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    @contextlib.contextmanager
    def refusing(self, *, for_s: float | None = None) -> Iterator[None]:
        """Refuse connections while the block runs, or for so many seconds of it."""
        self.refuse()
        back = threading.Timer(for_s or 0, self.serve)
        if for_s is not None:
            back.start()
        try:
            yield
        finally:
            if for_s is None:
                self.serve()
            else:
                back.join()

    def end(self) -> None:
        """Refuse for good, and let go of whoever was stalled."""
        self._ending.set()
        self.refuse()

    def hold(self, seconds: float) -> None:
        """Wait, but not beyond the end."""
        self._ending.wait(seconds)

    @contextlib.contextmanager
    def connected(self, connection: socket.socket) -> Iterator[None]:
        """Know of a connection as long as it is served."""
        with self._lock:
            self._connections.add(connection)
        try:
            yield
        finally:
            with self._lock:
                self._connections.discard(connection)


def _handler(proxy: FaultProxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def handle(self) -> None:
            with proxy.connected(self.connection), contextlib.suppress(OSError):
                if proxy.tls:
                    stream = _Tls(self.connection, proxy.tls)
                    self.rfile, self.wfile = io.BufferedReader(stream), stream  # type: ignore[assignment]
                super().handle()

        def forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            headers = dict(self.headers.items())
            told = "\n".join(f"{name.lower()}: {value}" for name, value in headers.items())
            fault = proxy.fault_for(self.command, self.path, told)
            if isinstance(fault, Flip) and not fault.up and isinstance(self.wfile, _Tls):
                self.wfile.damage, fault = fault, None
            self._answer(_done_with(fault, proxy.server, self.command, self.path, body, headers), fault)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = forward  # noqa: N815 - http.server's names

        def _answer(self, told: bytes, cut: Fault | None) -> None:
            if not isinstance(cut, Cut):
                self.wfile.write(told)
                return
            self.close_connection = True
            self.wfile.write(told[: cut.at])
            proxy.hold(cut.stall_s)
            if cut.reset:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()

        def log_message(self, *_: object) -> None:
            """Keep the tests' output to themselves."""

    return Handler


class _Tls(io.RawIOBase):
    """The server's side of a TLS connection; ``damage`` is done to what is sent from then on."""

    def __init__(self, connection: socket.socket, context: ssl.SSLContext) -> None:
        self.damage: Flip | None = None
        self._connection = connection
        self._came, self._leaves = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._came, self._leaves, server_side=True)
        self._with_the_peer(self._tls.do_handshake)

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            found = self._with_the_peer(lambda: self._tls.read(len(buffer)))
        except (ssl.SSLZeroReturnError, ConnectionError):
            return 0
        buffer[: len(found)] = found
        return len(found)

    def write(self, data: Any) -> int:
        num = self._tls.write(data)
        self._send()
        return num

    def _with_the_peer(self, step: Callable[[], _T]) -> _T:
        while True:
            try:
                done = step()
            except ssl.SSLWantReadError:
                self._send()
                came = self._connection.recv(1 << 16)
                if not came:
                    raise ConnectionResetError("the client has left") from None
                self._came.write(came)
            else:
                self._send()
                return done

    def _send(self) -> None:
        leaves = self._leaves.read()
        self._connection.sendall(self.damage.of(leaves) if self.damage else leaves)


def make_certificate(file: Path) -> Path:
    """Write a key and a certificate for 127.0.0.1 that signs itself: what clients have to trust."""
    key = file.with_suffix(".key")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=127.0.0.1"
    extensions = ["-addext", "subjectAltName=IP:127.0.0.1", "-addext", "basicConstraints=critical,CA:FALSE"]
    made = [*command.split(), *extensions, "-keyout", str(key), "-out", str(file)]
    subprocess.run(made, check=True, capture_output=True, timeout=60)
    file.write_bytes(key.read_bytes() + file.read_bytes())
    return file


@dataclass(frozen=True, slots=True)
class _Answer:
    """Status, reason and headers of an answer, and its body."""

    status: int
    reason: str
    headers: tuple[tuple[str, str], ...]
    content: bytes


def _ask(server: str, method: str, path: str, body: bytes, headers: dict[str, str]) -> _Answer:
    upstream = http.client.HTTPConnection(urlsplit(server).netloc, timeout=60)
    try:
        upstream.request(method, path, body, headers)
        answer = upstream.getresponse()
        return _Answer(answer.status, answer.reason, tuple(answer.getheaders()), answer.read())
    finally:
        upstream.close()


def _done_with(fault: Fault | None, server: str, method: str, path: str, body: bytes, headers: dict[str, str]) -> bytes:
    """What goes back over the wire, but for where it is cut."""
    if isinstance(fault, Say) and not fault.after:
        return _said(fault, method)
    if isinstance(fault, Before):
        fault.happens()
    answer = _ask(server, method, path, *_on_the_way_up(fault, body, headers))
    if isinstance(fault, Say):
        return _said(fault, method)
    return _written(*_on_the_way_down(fault, answer, server, path), method)


def _on_the_way_up(fault: Fault | None, body: bytes, headers: dict[str, str]) -> tuple[bytes, dict[str, str]]:
    if isinstance(fault, Flip) and fault.up:
        body = fault.of(body)
    if isinstance(fault, Without):
        headers = {name: value for name, value in headers.items() if name.lower() != fault.header}
    return body, headers


def _on_the_way_down(fault: Fault | None, answer: _Answer, server: str, path: str) -> tuple[_Answer, bytes]:
    if isinstance(fault, Whole):
        return _whole(answer, server, path)
    content = answer.content
    if isinstance(fault, Flip) and not fault.up:
        content = fault.of(content)
    if isinstance(fault, Short):
        content = content[: max(0, len(content) - fault.num_bytes)]
    return answer, content


def _whole(answer: _Answer, server: str, path: str) -> tuple[_Answer, bytes]:
    """The object that the answer is a range of, asked for anew: the range was signed."""
    bucket, _, key = unquote(urlsplit(path).path).removeprefix("/").partition("/")
    whole = boto3.Session().client("s3", endpoint_url=server).get_object(Bucket=bucket, Key=key)["Body"].read()
    headers = tuple(one for one in answer.headers if one[0].lower() != "content-range")
    return replace(answer, status=200, reason="OK", headers=headers), whole


def _written(answer: _Answer, content: bytes, method: str) -> bytes:
    """The whole answer as it goes over the wire."""
    lengths = [value for name, value in answer.headers if name.lower() == "content-length"]
    length = (lengths or ["0"])[0] if method == "HEAD" else str(len(content))
    lines = [f"HTTP/1.1 {answer.status} {answer.reason}", f"Content-Length: {length}"]
    lines += [
        f"{name}: {value}"
        for name, value in answer.headers
        if name.lower() not in ("connection", "transfer-encoding", "content-length")
    ]
    return "\r\n".join([*lines, "", ""]).encode() + content


def _said(said: Say, method: str) -> bytes:
    content = f"<Error><Code>{said.code}</Code><Message>as the test asked</Message></Error>".encode()
    kind = (("Content-Type", "application/xml"), ("Content-Length", str(len(content))))
    return _written(_Answer(said.status, said.code, kind, content), b"" if method == "HEAD" else content, method)


@contextlib.contextmanager
def fault_proxy(server: str, *rules: Rule, seed: int = 0, certificate: Path | None = None) -> Iterator[FaultProxy]:
    """Run a proxy before the server with this URL for the length of the block; with a certificate it speaks TLS."""
    proxy = FaultProxy(server, rules, seed, certificate)
    proxy.serve()
    try:
        yield proxy
    finally:
        proxy.end()
