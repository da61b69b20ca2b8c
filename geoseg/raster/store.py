"""Bytes by URI: a folder, memory and buckets (S3, Google, Azure) behind the same few functions.

URIs are plain text: ``s3://bucket/key``, ``gs://``, ``az://``, ``memory://name/key``, ``file:///path`` or a path.
Credentials for S3 come from boto3's chain; endpoint, region and path style from the standard AWS variables.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

import obstore
from obstore import exceptions as failures
from obstore.store import LocalStore, MemoryStore

from geoseg.errors import (
    AccessDeniedError,
    ConfigError,
    GeosegError,
    SceneChangedError,
    SceneDeniedError,
    SceneReadError,
    SceneTooCostlyError,
    StoreError,
)
from geoseg.raster.buckets import (
    CHANGED,
    SCHEMES,
    DamagedAnswerError,
    ObjectExistsError,
    ObjectMissingError,
    Tries,
    bucket,
    s3_client,
)
from geoseg.redaction import redact, redacted

__all__ = ["ObjectExistsError", "ObjectMissingError", "redact", "redacted"]  # beside what is defined here

_SCHEMES = (*SCHEMES, "memory", "file")
_CONCURRENCY = 16
_PART_BYTES = 8 << 20  # also those of the AWS tools
_OBSTORE_PART_BYTES = 5 << 20
_REFUSALS = ("400 Bad Request", "403 Forbidden")
_NOT_A_NAME = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff\ufffd]")
_T = TypeVar("_T")


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


def _locate(uri: str, *, stream: bool = False) -> tuple[Any, str]:
    """The obstore store of a normalised URI (``stream``: see ``bucket``) and the key or prefix within it."""
    scheme, name, key = _split(uri)
    if not scheme:
        return LocalStore(), key
    if scheme not in _SCHEMES:
        raise ObjectNameError(
            f"{redact(uri)}: geoseg reads {', '.join(_SCHEMES)} URIs and plain paths, not {scheme}://"
        )
    if scheme == "memory":
        return _memory(name), key
    return bucket(uri, stream=stream), key


def _object(uri: str, *, stream: bool = False) -> tuple[Any, str]:
    """The store and key of one object. Raises ObjectNameError, and ObjectMissingError for a bucket as such."""
    _check_name(uri)
    store, key = _locate(uri, stream=stream)
    if not key or key.endswith("/"):
        raise ObjectMissingError(f"{redact(uri)}: is a folder or bucket, not an object in it")
    return store, key


def _ask(
    uri: str, action: str, request: Callable[[Any, str], _T], *, denied: type[GeosegError] = AccessDeniedError
) -> _T:
    """What ``request`` gets from the store for the key, asked again while that may help. Raises what ``Tries`` raises."""
    answer: _T = Tries(uri, action, denied=denied).run(lambda: request(*_object(uri)))
    return answer


def head(uri: str) -> ObjectInfo:
    """Size, ETag and time of one object.

    Raises ObjectMissingError, ObjectNameError, SceneDeniedError when this object is denied, AccessDeniedError when the
    credentials are, StoreError.
    """
    if "://" not in uri and not os.path.isfile(uri) and Path(uri).exists():
        raise ObjectMissingError(f"{uri}: is no file")  # who opens a pipe waits for its other end
    try:
        return _head(uri)
    except GeosegError as error:
        if not any(refusal in str(error.__cause__) for refusal in _REFUSALS):
            raise
        _fetch(uri, {"range": (0, 1)})  # the answer to a HEAD has no body that would say why
    return _head(uri)  # that has renewed the credentials


def _head(uri: str) -> ObjectInfo:
    return _info(uri, _ask(uri, "reading", obstore.head, denied=SceneDeniedError))


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
    seen = set()
    try:
        for info in _list(uri):
            seen.add(info.uri)
            yield info
    except failures.InvalidPathError as error:  # obstore ends its listing at a name that it cannot address
        if not uri.startswith(("s3://", "/")):
            Tries(uri, "listing").failed(error)
        for info in _walk_bucket(uri) if "://" in uri else _walk_folder(uri):
            if info.uri not in seen:
                yield info


def _list(uri: str) -> Iterator[ObjectInfo]:
    """What obstore lists; begun again behind the last name when a page fails. Raises its InvalidPathError besides."""
    _, prefix = _locate(uri)
    root = uri.removesuffix(prefix).rstrip("/") + "/"
    tries, last = Tries(uri, "listing"), None
    while True:
        tries.begin()
        try:
            store, _ = _locate(uri)
            for batch in obstore.list(store, prefix.rstrip("/") or None, offset=last, chunk_size=1000):
                tries.went_well()
                for meta in batch:
                    yield _info(root + meta["path"], meta)
                    last = meta["path"]
        except (GeosegError, failures.InvalidPathError):
            raise
        except Exception as error:  # noqa: BLE001 - ``failed`` sorts them
            tries.failed(error)
        else:
            return


def _walk_bucket(uri: str) -> Iterator[ObjectInfo]:
    _, name, prefix = _split(uri)
    asked = {"Bucket": name, "Prefix": prefix.rstrip("/") + "/" if prefix else ""}
    while asked:
        page = ask_s3(uri, "listing", "list_objects_v2", **asked)
        for told in page.get("Contents", []):
            version = Version(told["ETag"])
            key = f"s3://{name}/{told['Key']}"
            yield ObjectInfo(key, told["Size"], told["ETag"].strip('"'), told["LastModified"], version)
        asked = {**asked, "ContinuationToken": page["NextContinuationToken"]} if page["IsTruncated"] else {}


def ask_s3(uri: str, action: str, operation: str, **asked: Any) -> Any:
    """What boto3's client of S3 answers to an operation, for what obstore does not do; ``action`` is done with ``uri``.

    It is asked again while that may help. Raises ObjectMissingError (of an upload too), AccessDeniedError, ConfigError for a
    bucket that is not there, StoreError.
    """
    return Tries(uri, action).run(lambda: getattr(s3_client(uri), operation)(**asked))


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


def read_version(uri: str, *, max_bytes: int | None = None) -> tuple[bytes, Version]:
    """All bytes of a (small) object and the version that has these bytes.

    Of S3 they are compared with the ETag, which is made of the MD5 of what was uploaded, in one piece or in parts of the usual
    sizes; where it is another sum (of other parts, or of what is encrypted with a key of KMS) two equal answers count. Raises
    ObjectMissingError, ObjectNameError, AccessDeniedError, StoreError, and SceneTooCostlyError, before a byte is fetched, for
    more than ``max_bytes``.
    """
    before: tuple[bytes, Version] | None = None

    def request(store: Any, key: str) -> tuple[bytes, Version]:
        nonlocal before
        answer = obstore.get(store, key)
        size = int(answer.meta["size"])
        if max_bytes is not None and size > max_bytes:
            raise SceneTooCostlyError(
                f"{redact(uri)}: has {size} bytes, more than the {max_bytes} that are read of such a file"
            )
        found = bytes(answer.bytes()), _version(answer.meta)
        if not uri.startswith("s3://") or found == before or _is_sum(bare(found[1]), found[0]):
            return found
        before = found
        raise DamagedAnswerError("what it sent is not what its own sum says")

    return _ask(uri, "reading", request)


def _is_sum(etag: str, data: bytes) -> bool:
    return etag == _md5(data).hex() or any(
        etag
        == f"{_md5(b''.join(_md5(data[at : at + size]) for at in range(0, len(data), size))).hex()}-{-(-len(data) // size)}"
        for size in (_OBSTORE_PART_BYTES, _PART_BYTES)
        if "-" in etag
    )


def _md5(data: bytes) -> bytes:
    return hashlib.md5(data, usedforsecurity=False).digest()


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
            body, size = _fetch(uri, options)
        except ObjectExistsError as error:
            raise SceneChangedError(
                f"{redact(uri)}: was replaced while the run was reading it; run again to take the new version"
            ) from error
        if size < span[1]:
            raise StoreError(f"{redact(uri)}: asked for bytes {span[0]} to {span[1]}, it has {size}")
        return body

    if len(ranges) == 1:
        return [fetch(ranges[0])]
    return list(_readers().map(fetch, ranges))


def read_start(uri: str, num_bytes: int) -> tuple[bytes, int]:
    """The first ``num_bytes`` of an object, or all when it has no more, and its size. Raises as ``head`` does."""
    return _fetch(uri, {"range": (0, num_bytes)})


def _fetch(uri: str, options: Any) -> tuple[bytes, int]:
    """The bytes of a range, less where it passes the end, and the object's size."""
    start, end = options["range"]

    def request(store: Any, key: str) -> tuple[bytes, int]:
        answer = obstore.get(store, key, options=options)
        body, size = bytes(answer.bytes()), int(answer.meta["size"])
        if len(body) != min(end, size) - start:  # some servers cut a body and call it complete
            raise DamagedAnswerError(f"asked for bytes {start} to {end} of {size}, it sent {len(body)}")
        return body, size

    return _ask(uri, "reading", request, denied=SceneDeniedError)


def write(
    uri: str, data: bytes, *, create: bool = False, replaces: Version | None = None, content_type: str | None = None
) -> Version:
    """Put an object whole, so that no reader ever sees a part of it, and return its version.

    ``content_type`` is what a bucket tells a browser; files have none. With ``create`` it must not exist yet, with
    ``replaces`` it must still be that version (of files: as far as the processes of one machine are concerned); otherwise
    ObjectExistsError. Raises AccessDeniedError and StoreError besides.
    """
    if "://" not in uri and (create or replaces):
        return _ask(uri, "writing", lambda *_: _put_file(uri, data, replaces))
    mode: Any = "create" if create else "overwrite"
    if replaces:
        mode = {name: value for name, value in asdict(replaces).items() if value}
        if uri.startswith("s3://"):  # some S3 servers compare without the quotes, and AWS does either way
            mode["e_tag"] = mode["e_tag"].strip('"')
    attributes: Any = {"Content-Type": content_type} if content_type and "://" in uri else None
    multipart = False if create or replaces or len(data) < _PART_BYTES else None
    tries = Tries(uri, "writing")

    def request() -> Version:
        store, key = _object(uri, stream=multipart is None)
        return _version(obstore.put(store, key, data, mode=mode, use_multipart=multipart, attributes=attributes))

    try:
        version: Version = tries.run(request)
    except ObjectMissingError:
        if multipart is False:
            raise
        version = tries.run(request)  # as in ``write_stream``
    except ObjectExistsError:
        if tries.num_failed:  # an earlier try may have done it, and its answer was lost
            with suppress(ObjectMissingError):
                standing, version = read_version(uri)
                if standing == data:
                    return version
        raise
    return version


def _put_file(path: str, data: bytes, replaces: Version | None) -> Version:
    """Put a file in place of ``replaces``, or where there is none, with the folder locked: a file system compares nothing."""
    folder = Path(path).parent
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if replaces and not (exists(path) and head(path).version == replaces):
            raise ObjectExistsError(f"{redact(path)}: {CHANGED}")
        return _version(obstore.put(*_locate(path), data, mode="overwrite" if replaces else "create"))
    finally:
        os.close(descriptor)


def write_stream(uri: str, chunks: Callable[[], Iterable[bytes]]) -> None:
    """Put a large object from pieces in flat memory (a multipart upload, or a temporary file renamed at the end).

    ``chunks`` gives the pieces, anew each time it is called. Raises AccessDeniedError, StoreError.
    """

    def request() -> None:
        store, key = _object(uri, stream=True)
        obstore.put(store, key, iter(chunks()), use_multipart=True, chunk_size=_PART_BYTES, max_concurrency=2)

    tries = Tries(uri, "writing")
    try:
        tries.run(request)
    except ObjectMissingError:  # the end of the upload was done, its answer lost, and there is no such upload any more
        tries.run(request)


def delete(uris: Sequence[str]) -> None:
    """Remove objects; one that is gone already is no error."""
    for uri in uris:
        with suppress(ObjectMissingError):
            _ask(uri, "deleting", obstore.delete)


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
