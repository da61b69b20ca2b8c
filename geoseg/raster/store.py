"""Bytes by URI: a folder, memory and buckets (S3, Google, Azure) behind the same few functions.

URIs are plain text: ``s3://bucket/key``, ``gs://``, ``az://``, ``memory://name/key``, ``file:///path`` or a path.
Credentials for S3 come from boto3's chain; endpoint, region and path style from the standard AWS variables.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

import obstore
from obstore import exceptions as failures
from obstore.store import AzureStore, GCSStore, LocalStore, MemoryStore, S3Store

from geoseg.errors import (
    AccessDeniedError,
    ConfigError,
    GeosegError,
    SceneChangedError,
    SceneReadError,
    StoreError,
)

_SCHEMES = ("s3", "gs", "az", "memory", "file")
_CONCURRENCY = 16
_PART_BYTES = 8 << 20
_DENIED = ("SignatureDoesNotMatch", "InvalidAccessKeyId", "AccessDenied", "403 Forbidden")
_NO_ACCESS = "access denied; check the credentials and the bucket's policy"
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """What a store says of an object without its bytes."""

    uri: str
    size: int
    etag: str
    modified: datetime


class ObjectExistsError(GeosegError):
    """A create-only write found an object in its place, or a conditional one found another version."""


class ObjectMissingError(SceneReadError):
    """There is no object of this name."""


def normalize_uri(text: str | os.PathLike[str]) -> str:
    """The URI in the one form used throughout: an absolute path for a folder or file, else ``scheme://...``.

    Raises ConfigError for a scheme that geoseg does not read; ``http`` is one of them, ``vrt://`` and the like too.
    """
    text = os.fspath(text)
    if "\0" in text or not text.strip():
        raise ConfigError(f"{text!r} is not a path or URI")
    scheme = urlsplit(text).scheme if re.match(r"^[A-Za-z][A-Za-z0-9+.-]*://", text) else ""
    if not scheme:
        return os.path.abspath(os.path.expanduser(text))
    if scheme not in _SCHEMES:
        raise ConfigError(f"{redact(text)}: geoseg reads {', '.join(_SCHEMES)} URIs and plain paths, not {scheme}://")
    if scheme == "file":
        return os.path.abspath(unquote(urlsplit(text).path))
    return text


def redact(text: str) -> str:
    """The text without user names, passwords or signatures of URLs."""
    text = re.sub(r"://[^/@\s]+@", "://***@", text)
    return re.sub(r"(?i)(signature|sig|token|credential|secret|accesskeyid)=[^&\s]+", r"\1=***", text)


def join(uri: str, *names: str) -> str:
    """The URI of something below ``uri``."""
    return "/".join([uri.rstrip("/"), *names])


def base_name(uri: str) -> str:
    """The last part of a URI."""
    return uri.rstrip("/").rsplit("/", 1)[-1]


@lru_cache(maxsize=64)
def _memory(name: str) -> MemoryStore:  # noqa: ARG001 - one store for each name
    return MemoryStore()


@lru_cache(maxsize=64)
def _bucket(scheme: str, bucket: str, _environment: tuple[tuple[str, str], ...]) -> Any:
    options: Any = {"timeout": "60s", "connect_timeout": "10s"}
    retries: Any = {"max_retries": 8, "retry_timeout": timedelta(seconds=90)}
    if scheme == "gs":
        return GCSStore(bucket, client_options=options, retry_config=retries)
    if scheme == "az":
        return AzureStore(container_name=bucket, client_options=options, retry_config=retries)
    import boto3
    from obstore.auth.boto3 import Boto3CredentialProvider

    session = boto3.Session()
    settings: dict[str, Any] = {"region": session.region_name or "us-east-1"}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        settings["endpoint"] = endpoint
        options["allow_http"] = endpoint.startswith("http://")
    if os.environ.get("AWS_NO_SIGN_REQUEST", "").lower() in ("1", "yes", "true"):
        settings["skip_signature"] = True
    elif session.get_credentials() is None:
        raise AccessDeniedError(
            f"s3://{bucket}: no AWS credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE, "
            "give the machine a role, or set AWS_NO_SIGN_REQUEST=YES for a public bucket"
        )
    else:
        settings["credential_provider"] = Boto3CredentialProvider(session)
    return S3Store(bucket, client_options=options, retry_config=retries, **settings)


def _locate(uri: str) -> tuple[Any, str]:
    """The obstore store of a normalised URI and the key within it."""
    if "://" not in uri:
        return LocalStore(), uri.lstrip("/")
    parts = urlsplit(uri)
    key = uri.split("://", 1)[1].partition("/")[2]
    if parts.scheme == "memory":
        return _memory(parts.netloc), key
    environment = tuple(sorted((k, v) for k, v in os.environ.items() if k.startswith(("AWS_", "GOOGLE_", "AZURE_"))))
    return _bucket(parts.scheme, parts.netloc, environment), key


@contextmanager
def _speaking_of(uri: str, action: str) -> Iterator[None]:
    """Turn what the store's client raises into one sentence of ours."""
    try:
        yield
    except GeosegError:
        raise
    except (failures.BaseError, OSError, ValueError) as error:
        raise _as_ours(error, redact(uri), action) from error


_KINDS: tuple[tuple[tuple[type[Exception], ...], type[GeosegError], str], ...] = (
    (
        (FileNotFoundError, NotADirectoryError, failures.NotFoundError),
        ObjectMissingError,
        "there is no such file or object",
    ),
    ((failures.AlreadyExistsError, FileExistsError), ObjectExistsError, "exists already"),
    ((failures.PreconditionError,), ObjectExistsError, "was changed by somebody else in the meantime"),
    ((PermissionError, failures.PermissionDeniedError, failures.UnauthenticatedError), AccessDeniedError, _NO_ACCESS),
    ((failures.InvalidPathError,), ConfigError, "not a name that a store can hold"),
)


def _as_ours(error: Exception, name: str, action: str) -> GeosegError:
    text = str(error).strip()
    if "NoSuchBucket" in text:
        return ConfigError(f"{name}: there is no such bucket")
    if any(sign in text for sign in _DENIED):
        return AccessDeniedError(f"{name}: {_NO_ACCESS}")
    for kinds, ours, sentence in _KINDS:
        if isinstance(error, kinds):
            return ours(f"{name}: {sentence}")
    first_line = redact(text.splitlines()[0]) if text else type(error).__name__
    return StoreError(f"{name}: the store failed on {action}: {first_line}")


def head(uri: str) -> ObjectInfo:
    """Size, ETag and time of one object. Raises ObjectMissingError, AccessDeniedError, StoreError."""
    store, key = _locate(uri)
    with _speaking_of(uri, "reading"):
        meta = obstore.head(store, key)
    return _info(uri, meta)


def _info(uri: str, meta: Any) -> ObjectInfo:
    return ObjectInfo(uri, int(meta["size"]), (meta["e_tag"] or "").strip('"'), meta["last_modified"])


def exists(uri: str) -> bool:
    """Whether there is an object of this name; of a file, nothing but its name is looked at."""
    if "://" not in uri:
        return os.path.isfile(uri)
    try:
        head(uri)
    except ObjectMissingError:
        return False
    return True


def walk(uri: str) -> Iterator[ObjectInfo]:
    """Every object below a folder or prefix, in the store's order."""
    store, prefix = _locate(uri)
    base = uri[: len(uri) - len(prefix)]
    with _speaking_of(uri, "listing"):
        for batch in obstore.list(store, prefix.rstrip("/") or None, chunk_size=1000):
            for meta in batch:
                yield _info(base + meta["path"], meta)


def read(uri: str) -> bytes:
    """All bytes of a (small) object."""
    store, key = _locate(uri)
    with _speaking_of(uri, "reading"):
        return bytes(obstore.get(store, key).bytes())


@lru_cache(maxsize=1)
def _readers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_CONCURRENCY, thread_name_prefix="store")


def in_parallel(function: Callable[[Any], _T], items: Iterable[Any]) -> Iterator[_T]:
    """``function`` over ``items`` in the store's threads, in order; at most 64 results wait at a time."""
    waiting: list[Any] = []
    for item in items:
        waiting.append(_readers().submit(function, item))
        if len(waiting) >= 4 * _CONCURRENCY:
            yield waiting.pop(0).result()
    for future in waiting:
        yield future.result()


def read_ranges(uri: str, ranges: Sequence[tuple[int, int]], *, etag: str | None = None) -> list[bytes]:
    """The bytes of each ``(start, end)``, fetched side by side.

    With ``etag`` the object must still be that version, else SceneChangedError. A short answer is a StoreError: some
    servers cut a body and call it complete.
    """
    store, key = _locate(uri)

    def fetch(span: tuple[int, int]) -> bytes:
        options: Any = {"range": span}
        if etag:
            options["if_match"] = f'"{etag}"'
        try:
            with _speaking_of(uri, "reading"):
                body = bytes(obstore.get(store, key, options=options).bytes())
        except ObjectExistsError as error:
            raise SceneChangedError(
                f"{redact(uri)}: was replaced while the run was reading it; run again to take the new version"
            ) from error
        if len(body) != span[1] - span[0]:
            raise StoreError(f"{redact(uri)}: asked for bytes {span[0]} to {span[1]}, the store sent {len(body)}")
        return body

    if len(ranges) == 1:
        return [fetch(ranges[0])]
    return list(_readers().map(fetch, ranges))


def write(uri: str, data: bytes, *, create: bool = False, replaces: str | None = None) -> None:
    """Put an object whole: no reader ever sees a part of it.

    With ``create`` it must not exist yet, with ``replaces`` it must still have that ETag (a store that cannot compare
    overwrites it); otherwise ObjectExistsError.
    """
    store, key = _locate(uri)
    mode: Any = "create" if create else "overwrite"
    if replaces and "://" in uri:
        mode = {"e_tag": replaces}
    with _speaking_of(uri, "writing"):
        obstore.put(store, key, data, mode=mode, use_multipart=False if len(data) < _PART_BYTES else None)


def write_stream(uri: str, chunks: Iterable[bytes]) -> None:
    """Put a large object from pieces in flat memory (a multipart upload, or a temporary file renamed at the end)."""
    store, key = _locate(uri)
    with _speaking_of(uri, "writing"):
        obstore.put(store, key, iter(chunks), use_multipart=True, chunk_size=_PART_BYTES, max_concurrency=4)


def delete(uris: Sequence[str]) -> None:
    """Remove objects; one that is gone already is no error."""
    if not uris:
        return
    store, _ = _locate(uris[0])
    for uri in uris:
        try:
            with _speaking_of(uri, "deleting"):
                obstore.delete(store, _locate(uri)[1])
        except ObjectMissingError:
            continue
