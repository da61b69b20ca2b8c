"""Secrets made up for tests, the places where they are put, and the search for them in all that was written."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import threading
from collections.abc import Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq

SECRETS = {
    "access key": "AKIA7CANARYKEYCANARY",
    "secret key": "cAnArY/sEcReT+kEy1234567890abcdefCANARY1",
    "session token": "FwoGZXcanarySessionToken//////////wEaDCANARY2==",
    "account key": "cAnArYaCcOuNtKeYcAnArYaCcOuNtKeYcAnArYCANARY3Q==",
    "bearer token": "eyJhbGciOiJjYW5hcnkifQ.canary-bearer-token-4",
    "password": "hunter2-canary-5",
    "signature": "c0ffee6c0ffee6c0ffee6c0ffee6c0ffee6c0ffee6c0ffee6c0ffee6c0ffee60",
    "shared access": "cAnArYsHaReDaCcEsS7cAnArYsHaReDaCcEsS7CANARY7",
}
SIGNED = (
    f"X-Amz-Credential={SECRETS['access key']}&X-Amz-Signature={SECRETS['signature']}"
    f"&sig={SECRETS['shared access']}&token={quote(SECRETS['bearer token'])}"
)
USER = f"me:{SECRETS['password']}"


def environment() -> dict[str, str]:
    """Return the variables that hold credentials of each store and of an API."""
    return {
        "AWS_ACCESS_KEY_ID": SECRETS["access key"],
        "AWS_SECRET_ACCESS_KEY": SECRETS["secret key"],
        "AWS_SESSION_TOKEN": SECRETS["session token"],
        "AZURE_STORAGE_ACCOUNT_NAME": "account",
        "AZURE_STORAGE_ACCOUNT_KEY": SECRETS["account key"],
        "STAC_TOKEN": SECRETS["bearer token"],
    }


def item(name: str, href: str) -> dict[str, Any]:
    """Return a STAC item of one GeoTIFF."""
    return {
        "type": "Feature",
        "stac_version": "1.0.0",
        "id": name,
        "geometry": None,
        "properties": {"datetime": "2026-11-01T00:00:00Z"},
        "links": [],
        "assets": {"image": {"href": href, "type": "image/tiff", "roles": ["data"]}},
    }


def manifest(path: Path, hrefs: dict[str, str]) -> Path:
    """Write a list of items with these hrefs."""
    features = [item(name, href) for name, href in hrefs.items()]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return path


_FORMS = {
    name: {
        secret.encode(),
        quote(secret, safe="").encode(),
        base64.b64encode(secret.encode()),
        repr(secret)[1:-1].encode(),
    }
    for name, secret in SECRETS.items()
}


def secrets_in(data: bytes, more: Iterable[str] = ()) -> list[str]:
    """Return the names of the secrets that stand in some bytes, plain, percent-encoded, in base64 or inside a Parquet file."""
    if data[:4] == b"PAR1":
        with contextlib.suppress(pa.ArrowException):
            data += str(pq.read_table(io.BytesIO(data)).to_pylist()).encode()
    found = [name for name, forms in _FORMS.items() if any(form in data for form in forms)]
    return found + [secret for secret in more if secret.encode() in data]


def search(folder: Path, more: Iterable[str] = ()) -> tuple[int, dict[str, list[str]]]:
    """Return how many files lie below a folder, and which of them hold which secrets."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    told = {str(path.relative_to(folder)): secrets_in(path.read_bytes(), more) for path in files}
    return len(files), {name: found for name, found in told.items() if found}


@contextlib.contextmanager
def telltale(status: int, code: str) -> Iterator[str]:
    """Serve errors that repeat the whole request, with its headers, as a helpless proxy would; the URL of the server."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            told = " ".join(f"{name}: {value}" for name, value in self.headers.items())
            path = self.path.replace("&", "&amp;")
            message = f"{path} {told} AWSAccessKeyId={SECRETS['access key']}"
            body = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_PUT = do_HEAD = do_POST = _answer  # noqa: N815 - the names that http.server looks for

        def log_message(self, *told: object) -> None:
            del told

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
