"""Credentials that end, are taken back or were never enough: renewed once, or told at once. Promise R10."""

from __future__ import annotations

import json
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import pytest
from click.testing import CliRunner
from kit.faultproxy import DENIED, EXPIRED, FaultProxy, Rule, fault_proxy
from kit.object_store import moto_server
from kit.oracle import seeded_bundle
from kit.scenes import noise, write_scene

from geoseg.cli import main
from geoseg.errors import AccessDeniedError
from geoseg.raster import store, upload

MIB = 1 << 20


@dataclass
class Issuer:
    """Gives out tokens, numbered, over HTTP as a container's credentials; the store takes those that have not ended.

    A token ends after ``lives_s`` or when it is taken back; ``says_s`` is how long it is said to live.
    """

    lives_s: float
    says_s: float
    issued_at: list[float] = field(default_factory=list)
    taken_back: set[int] = field(default_factory=set)
    url: str = ""

    def __post_init__(self) -> None:
        self.lock = threading.Lock()

    def issue(self) -> bytes:
        """A new token."""
        with self.lock:
            self.issued_at.append(time.monotonic())
            number = len(self.issued_at)
        ends = datetime.now(timezone.utc) + timedelta(seconds=self.says_s)
        told = {"AccessKeyId": f"KEY{number}", "SecretAccessKey": "secret", "Token": f"token-{number}"}
        return json.dumps({**told, "Expiration": ends.strftime("%Y-%m-%dT%H:%M:%SZ")}).encode()

    def take_back(self) -> None:
        """Let all tokens end that are out."""
        with self.lock:
            self.taken_back |= set(range(1, len(self.issued_at) + 1))

    def has_ended(self, headers: str) -> bool:
        """Whether the token of a request is over."""
        number = int(re.search(r"x-amz-security-token: token-(\d+)", headers)[1])  # type: ignore[index]
        return number in self.taken_back or time.monotonic() - self.issued_at[number - 1] > self.lives_s


@contextmanager
def issuing(*, lives_s: float = 3600, says_s: float = 3600) -> Iterator[Issuer]:
    issuer = Issuer(lives_s, says_s)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            told = issuer.issue()
            self.send_response(200)
            self.send_header("Content-Length", str(len(told)))
            self.end_headers()
            self.wfile.write(told)

        def log_message(self, *_: object) -> None:
            """Keep the tests' output to themselves."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listener:
        threading.Thread(target=listener.serve_forever, args=(0.02,), daemon=True).start()
        issuer.url = f"http://127.0.0.1:{listener.server_address[1]}/role"
        yield issuer
        listener.shutdown()


@pytest.fixture(scope="module")
def mock() -> Iterator[dict[str, str]]:
    with moto_server() as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        boto3.Session().client("s3").create_bucket(Bucket="geoseg")
        yield environment


@pytest.fixture
def role(monkeypatch: pytest.MonkeyPatch) -> Callable[[Issuer, FaultProxy], None]:
    """Let credentials come from an issuer, and the store, by way of a proxy, refuse those that have ended."""

    def taken(issuer: Issuer, proxy: FaultProxy) -> None:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", issuer.url)
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        proxy.obey(Rule(fault=EXPIRED, headers=issuer.has_ended, times=None))

    return taken


def every_way(number: int) -> None:
    """Read, write, ask, list and upload in pieces."""
    uri = f"s3://geoseg/{number}"
    store.write(uri, b"0123", create=True)
    assert store.head(uri).size == 4
    assert store.read_ranges(uri, [(1, 3)]) == [b"12"]
    assert store.read(uri) == b"0123"
    assert [one.uri for one in store.walk(f"s3://geoseg/{number}/")] == []
    under_way = upload.begin(f"{uri}-large", 5 * MIB, f"{uri}-staging")
    under_way.complete({1: under_way.write(1, 0, bytes(5 * MIB))})
    store.write_stream(f"{uri}-stream", lambda: [b"01", b"23"])
    store.delete([uri])


@pytest.mark.timeout(300)
@pytest.mark.parametrize("times", [2, pytest.param(20, marks=[pytest.mark.chaos, pytest.mark.slow])])
def test_a_token_taken_back_is_renewed_once_whoever_notices(
    times: int, mock: dict[str, str], role: Callable[..., None], figure: Callable[..., None]
) -> None:
    with issuing() as issuer, fault_proxy(mock["AWS_ENDPOINT_URL"]) as proxy:
        role(issuer, proxy)
        every_way(0)
        for turn in range(times):
            before = len(issuer.issued_at)
            issuer.take_back()
            with ThreadPoolExecutor(4) as pool:
                list(pool.map(every_way, range(100 * turn + 1, 100 * turn + 5)))
            assert len(issuer.issued_at) == before + 1, "threads that notice at once renew once"
        figure("R10", "tokens taken back in the middle of work, and renewed", len(issuer.taken_back), goal=str(times))
        figure("R10", "steps that failed by it", 0, goal="0")


def test_tokens_of_a_second_never_end_in_use(
    mock: dict[str, str], role: Callable[..., None], figure: Callable[..., None]
) -> None:
    with issuing(lives_s=1.5, says_s=1.5) as issuer, fault_proxy(mock["AWS_ENDPOINT_URL"]) as proxy:
        role(issuer, proxy)
        number, until = 1000, time.monotonic() + 4
        while time.monotonic() < until:
            number += 1
            every_way(number)
        assert len(issuer.issued_at) >= 3
        figure("R10", "tokens of 1.5 s, one after another, renewed before they ended", len(issuer.issued_at))
        figure("R10", "requests that a token had ended for", len(proxy.hit))


def test_a_key_with_no_newer_one_behind_it_is_told_at_once(
    mock: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with fault_proxy(mock["AWS_ENDPOINT_URL"], Rule(fault=EXPIRED, times=None)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        with pytest.raises(AccessDeniedError, match=r"check the credentials.*\(ExpiredToken\)"):
            store.read("s3://geoseg/x")
        assert len(proxy.seen) == 1


@pytest.mark.parametrize(
    ("what", "method", "path", "most"),
    [
        ("writing", "PUT", "/out/", 1),
        ("reading its own files", "GET|HEAD", "/out/", 3),
        ("reading its 12 scenes", "GET|HEAD", r"\.tif", 24),
    ],
    ids=["writing", "reading", "scenes"],
)
def test_a_true_denial_ends_the_run_without_a_storm(
    what: str,
    method: str,
    path: str,
    most: int,
    mock: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    figure: Callable[..., None],
) -> None:
    bundle = seeded_bundle(tmp_path / "bundle")
    root = f"s3://geoseg/{uuid.uuid4().hex[:8]}"
    for number in range(12):
        file = write_scene(tmp_path / f"{number}.tif", noise(3, 40, 53, seed=number))
        store.write(f"{root}/in/{number}.tif", file.read_bytes())
    rule = Rule(fault=DENIED, method=method, path=path, times=None)
    with fault_proxy(mock["AWS_ENDPOINT_URL"], rule) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        began = time.monotonic()
        words = ["predict", f"{root}/in/", "--out", f"{root}/out", "--bundle", str(bundle), "--engine", "local"]
        done = CliRunner().invoke(main, words)
        seconds = time.monotonic() - began
        figure("R10", f"requests refused until a run ends that is denied {what}", len(proxy.hit), goal=f"{most}")
        figure("R10", f"seconds until it ends with code 4, denied {what}", f"{seconds:.1f}", goal="10")
        assert done.exit_code == 4, done.output
        assert "access denied; check the credentials and the bucket's policy (AccessDenied)" in done.output
        assert 0 < len(proxy.hit) <= most
