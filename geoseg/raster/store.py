"""Bytes by URI: a folder, memory and buckets (S3, Google, Azure) behind the same few functions.

URIs are plain text: ``s3://bucket/key``, ``gs://``, ``az://``, ``memory://name/key``, ``file:///path`` or a path.
Credentials for S3 come from boto3's chain; endpoint, region and path style from the standard AWS variables.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta, timezone
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

import obstore
from obstore import exceptions as failures
from obstore.store import AzureStore, GCSStore, LocalStore, MemoryStore, S3Store

from geoseg import redaction
from geoseg.errors import (
    AccessDeniedError,
    ConfigError,
    GeosegError,
    SceneChangedError,
    SceneDeniedError,
    SceneReadError,
    StoreError,
)

_SCHEMES = ("s3", "gs", "az", "memory", "file")
_CONCURRENCY = 16
_PART_BYTES = 8 << 20
_WRONG_KEY = (
    "SignatureDoesNotMatch",
    "InvalidAccessKeyId",
    "ExpiredToken",
    "InvalidToken",
    "RequestTimeTooSkewed",
    "AuthenticationFailed",
)
_REFUSALS = ("400 Bad Request", "403 Forbidden")
_NO_ACCESS = "access denied; check the credentials and the bucket's policy"
_CHANGED = "was changed by somebody else in the meantime"
_NOT_A_NAME = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff\ufffd]")
_T = TypeVar("_T")

redact, redacted = redaction.redact, redaction.redacted


@dataclass(frozen=True, slots=True)
class Version:
    """One state of an object, word for word as its store names it: what a conditional write hands back.

    Some stores compare the ``e_tag`` (S3, Azure), Google compares its ``version``.
    """

    e_tag: str | None = None
    version: str | None = None


def bare(version: Version) -> str:
    """The ETag of a version as ``ObjectInfo`` has it: without quotes, "" when the store gives none."""
    return (version.e_tag or "").strip('"')


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """What a store says of an object without its bytes; ``etag`` is without quotes, ``version`` as the store gave it."""

    uri: str
    size: int
    etag: str
    modified: datetime
    version: Version


class ObjectExistsError(GeosegError):
    """A create-only write found an object in its place, or a conditional one found another version."""


class ObjectMissingError(SceneReadError):
    """There is no object of this name."""


class ObjectNameError(SceneReadError):
    """The name is none under which the store's client would find this very object."""


def normalize_uri(text: str | os.PathLike[str]) -> str:
    """The URI in the one form used throughout: an absolute path for a folder or file, else ``scheme://bucket/key``.

    After the bucket every character stands for itself, ``?``, ``#`` and ``%`` too. Raises ConfigError for a scheme that
    geoseg does not read (``http`` is one of them, ``vrt://`` and the like too) and for a name that it cannot address.
    """
    text = os.fspath(text)
    if not text.strip():
        raise ConfigError(f"{text!r} is not a path or URI")
    scheme, bucket, key = _split(text)
    if not scheme:
        uri = os.path.abspath(os.path.expanduser(text))
    elif scheme not in _SCHEMES:
        raise ConfigError(f"{redact(text)}: geoseg reads {', '.join(_SCHEMES)} URIs and plain paths, not {scheme}://")
    elif scheme == "file" and bucket in ("", "localhost"):
        uri = os.path.abspath("/" + unquote(key))
    elif scheme == "file" or not bucket:
        wanted = "file:///folder/file" if scheme == "file" else f"{scheme}://bucket/key"
        raise ConfigError(f"{redact(text)}: such a URI is written {wanted}")
    else:
        uri = f"{scheme}://{bucket}/{key}" if key else f"{scheme}://{bucket}"
    try:
        _check_name(uri)
    except ObjectNameError as error:
        raise ConfigError(str(error)) from error
    return uri


def _split(uri: str) -> tuple[str, str, str]:
    """Scheme, bucket and key of a URI; of a path no scheme, no bucket, and the path without its first slash."""
    scheme, mark, rest = uri.partition("://")
    if not mark or not re.fullmatch("[A-Za-z][A-Za-z0-9+.-]*", scheme):
        return "", "", uri.removeprefix("/")
    bucket, _, key = rest.partition("/")
    return scheme.lower(), bucket, key


def _check_name(uri: str) -> None:
    """Raises ObjectNameError for keys that obstore would refuse, or take for another key."""
    scheme, _, key = _split(uri)
    odd = scheme and key and any(part in ("", ".", "..") for part in key.removesuffix("/").split("/"))
    if odd or _NOT_A_NAME.search(uri):
        raise ObjectNameError(
            f"{redact(uri)!r}: a name with an empty part, '.', '..', a control character or bytes that are not UTF-8 cannot be "
            "addressed; copy the object to another name"
        )


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
    try:
        if scheme == "gs":
            return GCSStore(bucket, client_options=options, retry_config=retries)
        if scheme == "az":
            return AzureStore(container_name=bucket, client_options=options, retry_config=retries)
    except failures.BaseError as error:
        raise AccessDeniedError(
            f"{scheme}://{bucket}: the credentials in the environment cannot be used: {str(error).splitlines()[0]}"
        ) from error
    import boto3
    from botocore.exceptions import BotoCoreError
    from obstore.auth.boto3 import Boto3CredentialProvider

    try:
        session = boto3.Session()
        credentials = session.get_credentials()
    except BotoCoreError as error:
        raise AccessDeniedError(f"s3://{bucket}: the AWS credentials cannot be had: {error}") from error
    settings: dict[str, Any] = {"region": session.region_name or "us-east-1"}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        settings["endpoint"] = endpoint
        options["allow_http"] = endpoint.startswith("http://")
    if _is_unsigned():
        settings["skip_signature"] = True
    elif credentials is None:
        raise AccessDeniedError(
            f"s3://{bucket}: no AWS credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE, "
            "give the machine a role, or set AWS_NO_SIGN_REQUEST=YES for a public bucket"
        )
    else:
        settings["credential_provider"] = Boto3CredentialProvider(session)
    return S3Store(bucket, client_options=options, retry_config=retries, **settings)


def _is_unsigned() -> bool:
    return os.environ.get("AWS_NO_SIGN_REQUEST", "").lower() in ("1", "yes", "true")


def _locate(uri: str) -> tuple[Any, str]:
    """The obstore store of a normalised URI and the key or prefix within it."""
    scheme, bucket, key = _split(uri)
    if not scheme:
        return LocalStore(), key
    if scheme not in _SCHEMES:
        raise ObjectNameError(
            f"{redact(uri)}: geoseg reads {', '.join(_SCHEMES)} URIs and plain paths, not {scheme}://"
        )
    if scheme == "memory":
        return _memory(bucket), key
    return _bucket(scheme, bucket, _environment()), key


def _environment() -> tuple[tuple[str, str], ...]:
    return tuple(sorted((k, v) for k, v in os.environ.items() if k.startswith(("AWS_", "GOOGLE_", "AZURE_"))))


def _object(uri: str) -> tuple[Any, str]:
    """The store and key of one object. Raises ObjectNameError, and ObjectMissingError for a bucket as such."""
    _check_name(uri)
    store, key = _locate(uri)
    if not key or key.endswith("/"):
        raise ObjectMissingError(f"{redact(uri)}: is a folder or bucket, not an object in it")
    return store, key


@contextmanager
def _speaking_of(uri: str, action: str, *, denied: type[GeosegError] = AccessDeniedError) -> Iterator[None]:
    """Turn what the store's client raises into one sentence of ours; ``denied`` is for a refusal that blames no key."""
    try:
        yield
    except GeosegError:
        raise
    except (failures.BaseError, OSError, ValueError) as error:
        raise _as_ours(error, redact(uri), action, denied) from error


_KINDS: tuple[tuple[tuple[type[Exception], ...], type[GeosegError], str], ...] = (
    (
        (FileNotFoundError, NotADirectoryError, failures.NotFoundError),
        ObjectMissingError,
        "there is no such file or object",
    ),
    ((failures.AlreadyExistsError, FileExistsError), ObjectExistsError, "exists already"),
    ((failures.PreconditionError,), ObjectExistsError, _CHANGED),
    ((failures.UnauthenticatedError,), AccessDeniedError, _NO_ACCESS),
    (
        (failures.InvalidPathError,),
        ConfigError,
        "holds a name that cannot be listed (an empty part, '.', '..', a control character); rename it, or list scenes in a .txt",
    ),
)


def _as_ours(error: Exception, name: str, action: str, denied: type[GeosegError]) -> GeosegError:
    text = str(error).strip()
    told = re.search(r"<Code>(\w+)</Code>|An error occurred \((\w+)\)", text)
    code = (told[1] or told[2]) if told else ""
    if code == "NoSuchBucket":
        return ConfigError(f"{name}: there is no such bucket")
    if code == "NoSuchUpload":
        return ObjectMissingError(f"{name}: there is no such upload any more")
    if code in _WRONG_KEY:
        return AccessDeniedError(f"{name}: {_NO_ACCESS} ({code})")
    if (
        isinstance(error, (PermissionError, failures.PermissionDeniedError))
        or code == "AccessDenied"
        or "403 Forbidden" in text
    ):
        return denied(f"{name}: {_NO_ACCESS}" + (f" ({code})" if code else ""))
    for kinds, ours, sentence in _KINDS:
        if isinstance(error, kinds):
            return ours(f"{name}: {sentence}")
    first_line = redact(text.splitlines()[0]) if text else type(error).__name__
    return StoreError(f"{name}: the store failed on {action}: {first_line}")


def head(uri: str) -> ObjectInfo:
    """Size, ETag and time of one object.

    Raises ObjectMissingError, ObjectNameError, SceneDeniedError when this object is denied, AccessDeniedError when the
    credentials are, StoreError.
    """
    store, key = _object(uri)
    if "://" not in uri and not os.path.isfile(uri) and Path(uri).exists():
        raise ObjectMissingError(f"{uri}: is no file")  # who opens a pipe waits for its other end
    try:
        with _speaking_of(uri, "reading", denied=SceneDeniedError):
            meta = obstore.head(store, key)
    except GeosegError as error:
        if any(refusal in str(error.__cause__) for refusal in _REFUSALS):
            _fetch(uri, {"range": (0, 1)})  # the answer to a HEAD has no body that would say why
        raise
    return _info(uri, meta)


def _info(uri: str, meta: Any) -> ObjectInfo:
    return ObjectInfo(uri, int(meta["size"]), bare(_version(meta)), meta["last_modified"], _version(meta))


def _version(meta: Any) -> Version:
    return Version(meta["e_tag"], meta["version"])


def exists(uri: str) -> bool:
    """Whether there is an object of this name; of a file, nothing but its name is looked at. Raises as ``head`` does."""
    if "://" not in uri:
        return os.path.isfile(uri)
    try:
        head(uri)
    except ObjectMissingError:
        return False
    return True


def walk(uri: str) -> Iterator[ObjectInfo]:
    """Every object below a folder or prefix, in the store's order; also those of which reading says that it cannot be.

    Raises AccessDeniedError, StoreError, and ConfigError for a bucket that is not there.
    """
    store, prefix = _locate(uri)
    root = uri.removesuffix(prefix).rstrip("/") + "/"
    seen = set()
    with _speaking_of(uri, "listing"):
        try:
            for batch in obstore.list(store, prefix.rstrip("/") or None, chunk_size=1000):
                for meta in batch:
                    info = _info(root + meta["path"], meta)
                    seen.add(info.uri)
                    yield info
        except failures.InvalidPathError:  # obstore ends its listing at a name that it cannot address
            if not uri.startswith(("s3://", "/")):
                raise
            for info in _walk_bucket(uri) if "://" in uri else _walk_folder(uri):
                if info.uri not in seen:
                    yield info


def _walk_bucket(uri: str) -> Iterator[ObjectInfo]:
    _, bucket, prefix = _split(uri)
    prefix = prefix.rstrip("/") + "/" if prefix else ""
    with speaking_to_s3(uri, "listing") as client:
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
            for told in page.get("Contents", []):
                version = Version(told["ETag"])
                name = f"s3://{bucket}/{told['Key']}"
                yield ObjectInfo(name, told["Size"], told["ETag"].strip('"'), told["LastModified"], version)


@contextmanager
def speaking_to_s3(uri: str, action: str) -> Iterator[Any]:
    """boto3's client of S3, for what obstore does not do, with its errors turned into ours; ``action`` is done with ``uri``.

    Raises ObjectMissingError (of an upload too), AccessDeniedError, ConfigError for a bucket that is not there, StoreError.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield _s3_client(os.getpid(), _environment())
    except (BotoCoreError, ClientError) as error:
        raise _as_ours(error, redact(uri), action, AccessDeniedError) from error


@lru_cache(maxsize=4)
def _s3_client(_pid: int, _environment: tuple[tuple[str, str], ...]) -> Any:
    """One for each process: after a fork two would talk over one connection."""
    import boto3
    from botocore import UNSIGNED
    from botocore.config import Config

    session = boto3.Session()
    config = Config(
        s3={"addressing_style": "path"},
        signature_version=UNSIGNED if _is_unsigned() else None,
        connect_timeout=10,
        read_timeout=60,
        retries={"mode": "standard", "total_max_attempts": 9},
        request_checksum_calculation="when_required",  # else each sum would have to be kept until the end of an upload
    )
    return session.client("s3", region_name=session.region_name or "us-east-1", config=config)


def _walk_folder(folder: str) -> Iterator[ObjectInfo]:
    for parent, _, names in os.walk(folder, followlinks=True):
        for name in names:
            path = join(parent, name)
            uri = os.fsencode(path).decode(errors="replace")
            try:
                yield head(uri)
            except ObjectNameError:
                told = os.lstat(path)
                yield ObjectInfo(uri, told.st_size, "", datetime.fromtimestamp(told.st_mtime, timezone.utc), Version())
            except GeosegError:
                continue  # a link to nowhere, or a file that is being written


def read(uri: str) -> bytes:
    """All bytes of a (small) object. Raises as ``read_version`` does."""
    return read_version(uri)[0]


def read_version(uri: str) -> tuple[bytes, Version]:
    """All bytes of a (small) object and the version that has these bytes.

    Raises ObjectMissingError, ObjectNameError, AccessDeniedError, StoreError.
    """
    store, key = _object(uri)
    with _speaking_of(uri, "reading"):
        answer = obstore.get(store, key)
        return bytes(answer.bytes()), _version(answer.meta)


@lru_cache(maxsize=1)
def _readers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_CONCURRENCY, thread_name_prefix="store")


def in_parallel(function: Callable[[Any], _T], items: Iterable[Any]) -> Iterator[_T]:
    """``function`` over ``items`` in the store's threads, in order; at most 32 results wait at a time."""
    waiting: list[Any] = []
    for item in items:
        waiting.append(_readers().submit(function, item))
        if len(waiting) >= 2 * _CONCURRENCY:
            yield waiting.pop(0).result()
    for future in waiting:
        yield future.result()


def read_ranges(uri: str, ranges: Sequence[tuple[int, int]], *, etag: str | None = None) -> list[bytes]:
    """The bytes of each ``(start, end)``, fetched side by side.

    With ``etag`` the object must still be that version, else SceneChangedError. A short answer is a StoreError: some
    servers cut a body and call it complete. Raises as ``head`` does besides.
    """

    def fetch(span: tuple[int, int]) -> bytes:
        options: dict[str, Any] = {"range": span}
        if etag:
            options["if_match"] = f'"{etag}"'
        try:
            body = _fetch(uri, options)
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


def read_start(uri: str, num_bytes: int) -> tuple[bytes, int]:
    """The first ``num_bytes`` of an object, or all when it has no more, and its size. Raises as ``head`` does."""
    store, key = _object(uri)
    with _speaking_of(uri, "reading", denied=SceneDeniedError):
        answer = obstore.get(store, key, options={"range": (0, num_bytes)})
        return bytes(answer.bytes()), int(answer.meta["size"])


def _fetch(uri: str, options: Any) -> bytes:
    store, key = _object(uri)
    with _speaking_of(uri, "reading", denied=SceneDeniedError):
        return bytes(obstore.get(store, key, options=options).bytes())


def write(
    uri: str, data: bytes, *, create: bool = False, replaces: Version | None = None, content_type: str | None = None
) -> Version:
    """Put an object whole, so that no reader ever sees a part of it, and return its version.

    ``content_type`` is what a bucket tells a browser; files have none. With ``create`` it must not exist yet, with
    ``replaces`` it must still be that version (of files: as far as the processes of one machine are concerned); otherwise
    ObjectExistsError. Raises AccessDeniedError and StoreError besides.
    """
    store, key = _object(uri)
    mode: Any = "create" if create else "overwrite"
    multipart = False if len(data) < _PART_BYTES else None
    with _speaking_of(uri, "writing"):
        if "://" not in uri and (create or replaces):
            return _put_file(uri, data, replaces)
        if replaces:
            mode = {name: value for name, value in asdict(replaces).items() if value}
            if uri.startswith("s3://"):  # some S3 servers compare without the quotes, and AWS does either way
                mode["e_tag"] = mode["e_tag"].strip('"')
        attributes: Any = {"Content-Type": content_type} if content_type and "://" in uri else None
        return _version(obstore.put(store, key, data, mode=mode, use_multipart=multipart, attributes=attributes))


def _put_file(path: str, data: bytes, replaces: Version | None) -> Version:
    """Put a file in place of ``replaces``, or where there is none, with the folder locked: a file system compares nothing."""
    folder = Path(path).parent
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if replaces and not (exists(path) and head(path).version == replaces):
            raise ObjectExistsError(f"{redact(path)}: {_CHANGED}")
        return _version(obstore.put(*_locate(path), data, mode="overwrite" if replaces else "create"))
    finally:
        os.close(descriptor)


def write_stream(uri: str, chunks: Iterable[bytes]) -> None:
    """Put a large object from pieces in flat memory (a multipart upload, or a temporary file renamed at the end)."""
    store, key = _object(uri)
    with _speaking_of(uri, "writing"):
        obstore.put(store, key, iter(chunks), use_multipart=True, chunk_size=_PART_BYTES, max_concurrency=2)


def delete(uris: Sequence[str]) -> None:
    """Remove objects; one that is gone already is no error."""
    for uri in uris:
        with suppress(ObjectMissingError), _speaking_of(uri, "deleting"):
            obstore.delete(*_object(uri))


def refuse_links_out(root: str, *, below: Sequence[str]) -> None:
    """Raises ConfigError when a link in one of these folders of a folder leads out of it; buckets have none."""
    if "://" in root:
        return
    inside = Path(root).resolve()
    for folder in (inside / name for name in below):
        with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_symlink() and not Path(entry.path).resolve().is_relative_to(inside):
                    raise ConfigError(
                        f"{entry.path}: is a link that leads out of {root}; remove it, or write to where it leads"
                    )
