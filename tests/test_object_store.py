"""What geoseg relies on in an S3 server reached through obstore, shown on a real server.

Two answers of the Ceph gateway differ from AWS and shape geoseg's code: If-Match holds only without the quotes around
the e_tag, and the end of a multipart upload returns an empty e_tag, so that ``head`` has to be asked for it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import boto3
import pytest
from kit.object_store import ObjectStore, is_open, moto_server
from obstore.auth.boto3 import Boto3CredentialProvider
from obstore.exceptions import AlreadyExistsError, GenericError, PermissionDeniedError, PreconditionError
from obstore.store import S3Store

pytestmark = pytest.mark.bucket

MIB = 2**20


def open_store(bucket: str) -> S3Store:
    return S3Store(
        bucket,
        endpoint=os.environ["AWS_ENDPOINT_URL"],
        client_options={"allow_http": True},
        virtual_hosted_style_request=False,
        credential_provider=Boto3CredentialProvider(boto3.Session()),
    )


@pytest.fixture
def store(bucket: str) -> S3Store:
    return open_store(bucket)


def read(store: S3Store, path: str) -> bytes:
    return bytes(store.get(path).bytes())


def e_tag_of(store: S3Store, path: str) -> str:
    e_tag = store.head(path)["e_tag"]
    assert e_tag is not None
    return e_tag


def pieces(content: bytes, size: int) -> Iterator[bytes]:
    for begin in range(0, len(content), size):
        yield content[begin : begin + size]


def noise(num_bytes: int) -> bytes:
    return hashlib.shake_128(b"geoseg").digest(num_bytes)


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def multipart_e_tag(content: bytes, part_size: int) -> str:
    digests = [bytes.fromhex(md5(part)) for part in pieces(content, part_size)]
    return f'"{md5(b"".join(digests))}-{len(digests)}"'


def test_an_object_is_created_once(store: S3Store) -> None:
    store.put("marker", b"first", mode="create")
    with pytest.raises(AlreadyExistsError):
        store.put("marker", b"second", mode="create")
    assert read(store, "marker") == b"first"


def test_of_racing_creators_one_wins(store: S3Store) -> None:
    num_writers, num_rounds = 8, 10
    barrier = Barrier(num_writers)

    def create(writer: int, path: str) -> bool:
        barrier.wait(timeout=30)
        try:
            store.put(path, str(writer).encode(), mode="create")
        except AlreadyExistsError:
            return False
        return True

    with ThreadPoolExecutor(num_writers) as pool:
        for i in range(num_rounds):
            path = f"lease-{i}"
            won = list(pool.map(create, range(num_writers), [path] * num_writers))
            assert won.count(True) == 1
            assert read(store, path) == str(won.index(True)).encode()


def test_an_update_holds_while_the_e_tag_does(store: S3Store) -> None:
    store.put("state", b"first")
    e_tag = e_tag_of(store, "state").strip('"')
    store.put("state", b"second", mode={"e_tag": e_tag})
    with pytest.raises(PreconditionError):
        store.put("state", b"third", mode={"e_tag": e_tag})
    assert read(store, "state") == b"second"


def test_of_racing_updaters_one_wins(store: S3Store) -> None:
    num_writers = 8
    store.put("state", b"before")
    e_tag = e_tag_of(store, "state").strip('"')
    barrier = Barrier(num_writers)

    def update(writer: int) -> bool:
        barrier.wait(timeout=30)
        try:
            store.put("state", str(writer).encode(), mode={"e_tag": e_tag})
        except PreconditionError:
            return False
        return True

    with ThreadPoolExecutor(num_writers) as pool:
        won = list(pool.map(update, range(num_writers)))
    assert won.count(True) == 1
    assert read(store, "state") == str(won.index(True)).encode()


def test_the_gateway_refuses_an_e_tag_in_quotes(store: S3Store) -> None:
    result = store.put("state", b"first")
    assert result["e_tag"] == e_tag_of(store, "state") == f'"{md5(b"first")}"'
    with pytest.raises(PreconditionError):
        store.put("state", b"second", mode={"e_tag": result["e_tag"]})


def test_an_update_of_a_missing_object_is_refused(store: S3Store) -> None:
    with pytest.raises(PreconditionError):
        store.put("state", b"first", mode={"e_tag": md5(b"")})
    with pytest.raises(FileNotFoundError):
        store.head("state")


@pytest.mark.parametrize("strip", ["", '"'], ids=["quoted", "bare"])
def test_the_mock_takes_an_e_tag_with_and_without_quotes(strip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with moto_server() as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        boto3.Session().client("s3").create_bucket(Bucket="geoseg")
        store = open_store("geoseg")
        store.put("state", b"first")
        e_tag = e_tag_of(store, "state").strip(strip)
        store.put("state", b"second", mode={"e_tag": e_tag})
        with pytest.raises(PreconditionError):
            store.put("state", b"third", mode={"e_tag": e_tag})
        assert read(store, "state") == b"second"


def test_ranges_are_the_bytes_asked_for(store: S3Store) -> None:
    content = noise(300_001)
    store.put("blocks", content)
    starts, ends = [0, 7, 299_990, 100_000], [1, 8192, 300_001, 250_000]
    expected = [content[start:end] for start, end in zip(starts, ends, strict=True)]
    assert [bytes(part) for part in store.get_ranges("blocks", starts=starts, ends=ends)] == expected


def test_a_range_stops_at_the_end_and_does_not_begin_after_it(store: S3Store) -> None:
    store.put("blocks", b"0123456789")
    assert bytes(store.get_range("blocks", start=8, end=100)) == b"89"
    with pytest.raises(GenericError, match="416"):
        store.get_range("blocks", start=100, end=200)


def test_a_multipart_upload_reads_back_equal(store: S3Store) -> None:
    content = noise(12 * MIB)
    result = store.put("scene", pieces(content, MIB), use_multipart=True, chunk_size=5 * MIB)
    assert result["e_tag"] == ""
    assert e_tag_of(store, "scene") == multipart_e_tag(content, 5 * MIB)
    assert store.head("scene")["size"] == 12 * MIB
    assert read(store, "scene") == content


def test_an_update_holds_by_the_e_tag_of_a_multipart_object(store: S3Store) -> None:
    store.put("scene", pieces(bytes(6 * MIB), MIB), use_multipart=True, chunk_size=5 * MIB)
    store.put("scene", b"second", mode={"e_tag": e_tag_of(store, "scene").strip('"')})
    assert read(store, "scene") == b"second"


def test_create_once_sends_a_large_object_in_one_request(store: S3Store) -> None:
    content = noise(6 * MIB)
    store.put("scene", pieces(content, MIB), use_multipart=True, chunk_size=5 * MIB, mode="create")
    assert e_tag_of(store, "scene") == f'"{md5(content)}"'
    with pytest.raises(AlreadyExistsError):
        store.put("scene", pieces(content, MIB), use_multipart=True, chunk_size=5 * MIB, mode="create")


READS: list[Callable[[S3Store], object]] = [
    lambda store: store.get("key"),
    lambda store: store.head("key"),
    lambda store: store.get_ranges("key", starts=[0], ends=[1]),
]


@pytest.mark.parametrize("access", READS, ids=["get", "head", "ranges"])
def test_a_missing_object_is_not_found(access: Callable[[S3Store], object], store: S3Store) -> None:
    with pytest.raises(FileNotFoundError):
        access(store)


def test_deleting_a_missing_object_is_no_error(store: S3Store) -> None:
    store.delete("key")


@pytest.mark.parametrize("access", [*READS, lambda store: store.put("key", b"")], ids=["get", "head", "ranges", "put"])
def test_a_missing_bucket_looks_like_a_missing_object(access: Callable[[S3Store], object], bucket: str) -> None:
    with pytest.raises(FileNotFoundError):
        access(open_store(f"{bucket}-not"))


def test_listing_a_missing_bucket_fails_unlike_an_empty_one(bucket: str) -> None:
    assert open_store(bucket).list().collect() == []
    with pytest.raises(GenericError, match="NoSuchBucket"):
        open_store(f"{bucket}-not").list().collect()


@pytest.mark.parametrize("access", [*READS, lambda store: store.put("key", b"")], ids=["get", "head", "ranges", "put"])
def test_a_wrong_secret_is_refused(
    access: Callable[[S3Store], object], bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(PermissionDeniedError):
        access(open_store(bucket))


def test_listing_with_a_wrong_secret_is_a_generic_error(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(GenericError, match="SignatureDoesNotMatch"):
        open_store(bucket).list().collect()


def test_an_unknown_key_is_refused(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    with pytest.raises(PermissionDeniedError, match="InvalidAccessKeyId"):
        open_store(bucket).get("key")


@pytest.mark.sample("crash")
@pytest.mark.slow
@pytest.mark.parametrize("end", [ObjectStore.kill9, ObjectStore.stop], ids=["crash", "stop"])
def test_objects_outlive_the_server(
    end: Callable[[ObjectStore], None], store: S3Store, object_store: ObjectStore
) -> None:
    small = {f"small-{i}": f"content {i}".encode() for i in range(20)}
    large = noise(6 * MIB)
    store.put("large", pieces(large, MIB), use_multipart=True, chunk_size=5 * MIB)
    for path, content in small.items():
        store.put(path, content)
    try:
        end(object_store)
        assert not is_open(object_store.port)
    finally:
        object_store.start()
    assert {path: read(store, path) for path in small} == small
    assert read(store, "large") == large
    assert sorted(meta["path"] for meta in store.list().collect()) == sorted(["large", *small])
