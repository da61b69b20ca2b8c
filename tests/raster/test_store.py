"""One behaviour of folders, memory and buckets: what is written is read, what is compared is compared, errors are named."""

from __future__ import annotations

import multiprocessing
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import obstore
import pytest
from kit.object_store import deny, moto_server
from obstore.store import MemoryStore

from geoseg.errors import (
    AccessDeniedError,
    ConfigError,
    SceneChangedError,
    SceneDeniedError,
    SceneError,
    SceneTooCostlyError,
    StoreError,
)
from geoseg.raster import store

NAMES = [
    "a b.tif",
    "a#b.tif",
    "a?b.tif",
    "a%b.tif",
    "a%20b.tif",
    "ä/é.tif",
    "a*[b].tif",
    "a+b&c=d;e,f.tif",
    "~{a}|'b\".tif",
]
ODD_KEYS = ["a//b.tif", "./b.tif", "a/../b.tif", "/b.tif", "a\nb.tif"]


def s3() -> Any:
    return boto3.Session().client("s3")


@pytest.mark.parametrize("name", NAMES)
def test_a_name_stands_for_itself(name: str, root: str) -> None:
    uri = store.normalize_uri(f"{root}/in/{name}")
    store.write(uri, name.encode())
    store.write(f"{root}/in2/other.tif", b"")
    assert store.read(uri) == name.encode()
    assert store.read_ranges(uri, [(0, 1)]) == [b"~" if name[0] == "~" else name.encode()[:1]]
    info = store.head(uri)
    assert (info.uri, info.size) == (uri, len(name.encode()))
    assert [(one.uri, one.etag, one.size) for one in store.walk(f"{root}/in")] == [(uri, info.etag, info.size)]
    store.delete([uri])
    assert not store.exists(uri)


def test_walking_lists_what_lies_below_and_nothing_beside(root: str) -> None:
    below = {f"{root}/in/{name}" for name in ("a.tif", "b/c.tif", "b/d/e.txt")}
    for uri in (*below, f"{root}/in.tif", f"{root}/in2/a.tif"):
        store.write(uri, b"1")
    assert {info.uri for info in store.walk(f"{root}/in")} == {info.uri for info in store.walk(f"{root}/in/")} == below
    assert len(list(store.walk(root))) == 5, "the root itself, with or without a slash at its end"
    assert {info.uri for info in store.walk(root + "/")} == {info.uri for info in store.walk(root)} > below
    assert list(store.walk(f"{root}/nothing")) == []


def test_what_is_not_there_is_missing(root: str) -> None:
    assert not store.exists(f"{root}/x")
    for access in (store.head, store.read, store.read_version, lambda uri: store.read_ranges(uri, [(0, 1)])):
        with pytest.raises(store.ObjectMissingError, match="there is no such file or object"):
            access(f"{root}/x")
    store.delete([f"{root}/x"])


@pytest.mark.parametrize("of", ["", "/", "/in", "/in/"])
def test_a_folder_or_bucket_is_not_an_object(of: str, root: str) -> None:
    store.write(f"{root}/in/a.tif", b"1")
    uri = root + of
    assert not store.exists(uri)
    for access in (store.head, store.read):
        with pytest.raises(store.ObjectMissingError):
            access(uri)


def test_ranges_come_in_the_order_asked_for(root: str) -> None:
    uri, content = f"{root}/x", bytes(range(256))
    store.write(uri, content)
    ranges = [(200, 256), (0, 1), (7, 90), (7, 8)]
    assert store.read_ranges(uri, ranges) == [content[start:end] for start, end in ranges]


def test_what_lies_past_the_end_is_not_there(root: str) -> None:
    store.write(f"{root}/x", b"0123")
    with pytest.raises(StoreError, match="asked for bytes 2 to 9, it has 4"):
        store.read_ranges(f"{root}/x", [(2, 9)])


def test_what_is_larger_than_asked_for_is_not_fetched(root: str) -> None:
    store.write(f"{root}/a", b"12345")
    assert store.read_version(f"{root}/a", max_bytes=5)[0] == b"12345"
    with pytest.raises(SceneTooCostlyError, match="a: has 5 bytes, more than the 4 that are read of such a file"):
        store.read_version(f"{root}/a", max_bytes=4)


def test_ranges_are_of_the_version_that_was_named(root: str) -> None:
    uri = f"{root}/x"
    store.write(uri, b"0123")
    etag = store.head(uri).etag
    assert store.read_ranges(uri, [(1, 2), (3, 4)], etag=etag) == [b"1", b"3"]
    store.write(uri, b"45678")
    with pytest.raises(SceneChangedError, match="run again"):
        store.read_ranges(uri, [(1, 2), (3, 4)], etag=etag)


def test_an_object_is_created_once(root: str) -> None:
    uri = f"{root}/deep/x"
    version = store.write(uri, b"first", create=True)
    with pytest.raises(store.ObjectExistsError, match="exists already"):
        store.write(uri, b"second", create=True)
    assert store.read_version(uri) == (b"first", version)


def test_a_version_is_replaced_once(root: str) -> None:
    uri = f"{root}/x"
    first = store.write(uri, b"first")
    assert store.head(uri).version == store.read_version(uri)[1] == first
    second = store.write(uri, b"second", replaces=first)
    assert second != first
    with pytest.raises(store.ObjectExistsError, match="changed by somebody else"):
        store.write(uri, b"third", replaces=first)
    assert store.read_version(uri) == (b"second", second)


@pytest.mark.parametrize("name", ["x", "deep/x"])
def test_what_is_gone_is_not_replaced(name: str, root: str) -> None:
    uri = f"{root}/x"
    version = store.write(uri, b"first")
    store.delete([uri])
    with pytest.raises(store.ObjectExistsError, match="changed by somebody else"):
        store.write(f"{root}/{name}", b"second", replaces=version)
    assert not store.exists(f"{root}/{name}")


def test_pieces_become_one_object(root: str) -> None:
    uri, pieces = f"{root}/x", [bytes([number]) * (5 << 20) for number in range(4)]
    store.write_stream(uri, lambda: iter(pieces))
    assert store.head(uri).size == 20 << 20
    assert store.read(uri) == b"".join(pieces)
    version = store.head(uri).version
    store.write(uri, b"after", replaces=version)
    assert store.read(uri) == b"after"


def test_threads_that_replace_one_version_have_one_winner(root: str) -> None:
    uri = f"{root}/x"
    for _ in range(5):
        version = store.write(uri, b"before")
        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(lambda number, seen=version: _replaces(uri, number, seen), range(8)))
        assert won.count(True) == 1
        assert store.read(uri) == str(won.index(True)).encode()


def _replaces(uri: str, number: int, version: store.Version | None) -> bool:
    try:
        store.write(uri, str(number).encode(), create=version is None, replaces=version)
    except store.ObjectExistsError:
        return False
    return True


def _race(folder: str, number: int, barrier: Any, told: Any) -> None:
    for turn in range(20):
        uri = f"{folder}/{turn}"
        version = store.head(uri).version if turn % 2 else None  # every other round they create instead
        barrier.wait(60)
        told.put((turn, number, _replaces(uri, number, version)))


def test_processes_that_change_one_file_have_one_winner(tmp_path: Path) -> None:
    folder = str(tmp_path)
    for turn in range(1, 20, 2):
        store.write(f"{folder}/{turn}", b"before")
    context = multiprocessing.get_context("spawn")
    barrier, told = context.Barrier(8), context.Queue()
    racers = [context.Process(target=_race, args=(folder, number, barrier, told)) for number in range(8)]
    for racer in racers:
        racer.start()
    outcomes = [told.get(timeout=120) for _ in range(160)]
    for racer in racers:
        racer.join()
    for turn in range(20):
        (winner,) = [number for at, number, won in outcomes if at == turn and won]
        assert store.read(f"{folder}/{turn}") == str(winner).encode()
    assert {file.name for file in tmp_path.iterdir()} == {str(turn) for turn in range(20)}, "no lock file stays"


@pytest.mark.parametrize(
    ("uri", "version", "mode"),
    [
        ("s3://b/x", store.Version('"abc"'), {"e_tag": "abc"}),
        ("s3://b/x", store.Version('"abc"', "v1"), {"e_tag": "abc", "version": "v1"}),
        ("gs://b/x", store.Version('"CJ=="', "1700000000000001"), {"e_tag": '"CJ=="', "version": "1700000000000001"}),
        ("az://b/x", store.Version('"0x8D"', None), {"e_tag": '"0x8D"'}),
        ("az://b/x", store.Version('"0x8D"', "2026-01"), {"e_tag": '"0x8D"', "version": "2026-01"}),
    ],
)
def test_a_store_gets_back_the_version_that_it_gave(
    uri: str, version: store.Version, mode: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def record(*args: Any, **options: Any) -> dict[str, str]:
        asked.append((args[1:], options["mode"]))
        return {"e_tag": '"new"', "version": "2"}

    monkeypatch.setattr(obstore, "put", record)
    monkeypatch.setattr(store, "bucket", lambda *_, **__: MemoryStore())
    assert store.write(uri, b"data", replaces=version) == store.Version('"new"', "2")
    assert asked == [(("x", b"data"), mode)]


def test_the_mock_of_aws_compares_versions_too(monkeypatch: pytest.MonkeyPatch) -> None:
    with moto_server() as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        s3().create_bucket(Bucket="geoseg")
        test_an_object_is_created_once("s3://geoseg")
        test_a_version_is_replaced_once("s3://geoseg/a")
        test_what_is_gone_is_not_replaced("x", "s3://geoseg/b")


@pytest.mark.bucket
@pytest.mark.parametrize("prefix", ["", "in/"], ids=["bucket", "prefix"])
def test_keys_that_cannot_be_addressed_are_listed_and_refused(prefix: str, bucket: str) -> None:
    for key in (*ODD_KEYS, "good.tif", "dir/"):
        s3().put_object(Bucket=bucket, Key=prefix + key, Body=b"1")
    s3().put_object(Bucket=bucket, Key="in2.tif", Body=b"1")
    found = {info.uri for info in store.walk(f"s3://{bucket}/{prefix}")}
    expected = {f"s3://{bucket}/{prefix}{key}" for key in (*ODD_KEYS, "good.tif", "dir/")}
    assert found == (expected if prefix else expected | {f"s3://{bucket}/in2.tif"})
    for key in ODD_KEYS:
        uri = f"s3://{bucket}/{prefix}{key}"
        for access in (store.head, store.exists, store.read, lambda uri: store.read_ranges(uri, [(0, 1)])):
            with pytest.raises(
                store.ObjectNameError, match="cannot be addressed; copy the object to another name"
            ) as error:
                access(uri)
            assert isinstance(error.value, SceneError)
        with pytest.raises(ConfigError, match="cannot be addressed"):
            store.normalize_uri(uri)


def test_files_that_cannot_be_addressed_are_listed_and_refused(tmp_path: Path) -> None:
    odd = [os.fsencode(tmp_path) + name for name in (b"/a\nb.tif", b"/\xff.tif")]
    for path in (*odd, os.fsencode(tmp_path / "good.tif")):
        Path(os.fsdecode(path)).write_bytes(b"1")
    (tmp_path / "nowhere.tif").symlink_to(tmp_path / "none")
    found = {info.uri: info for info in store.walk(str(tmp_path))}
    assert set(found) == {f"{tmp_path}/good.tif", f"{tmp_path}/a\nb.tif", f"{tmp_path}/\ufffd.tif"}
    assert found[f"{tmp_path}/good.tif"] == store.head(f"{tmp_path}/good.tif")
    for uri in set(found) - {f"{tmp_path}/good.tif"}:
        with pytest.raises(store.ObjectNameError, match="cannot be addressed"):
            store.read(uri)


@pytest.mark.parametrize(
    ("text", "uri"),
    [
        ("s3://b", "s3://b"),
        ("s3://b/", "s3://b"),
        ("S3://b/x/", "s3://b/x/"),
        ("s3://b/x?y#z%20.tif", "s3://b/x?y#z%20.tif"),
        ("s3://b/x@y.tif", "s3://b/x@y.tif"),
        ("file:///x/a%20b.tif", "/x/a b.tif"),
        ("file:///x/a#b?c.tif", "/x/a#b?c.tif"),
        ("file://localhost/x", "/x"),
        ("/x//y/../z/", "/x/z"),
        (Path("/x/a://b"), "/x/a:/b"),
    ],
)
def test_a_uri_has_one_form(text: str, uri: str) -> None:
    assert store.normalize_uri(text) == uri
    assert store.normalize_uri(uri) == uri


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "not a path or URI"),
        (" ", "not a path or URI"),
        ("/x\0y", "cannot be addressed"),
        ("http://host/x", "not http://"),
        ("https://me:secret@host/x?sig=abc", r"https://\*\*\*@host/x\?sig=\*\*\*"),
        ("vrt:///x", "not vrt://"),
        ("s3://", "written s3://bucket/key"),
        ("s3:///x", "written s3://bucket/key"),
        ("file://host/x", "written file:///folder/file"),
        ("s3://b/x//y", "cannot be addressed"),
        ("s3://b//x", "cannot be addressed"),
        ("s3://b/x//", "cannot be addressed"),
        ("s3://b/./x", "cannot be addressed"),
    ],
)
def test_a_uri_that_cannot_be_used_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as error:
        store.normalize_uri(text)
    assert "secret" not in str(error.value)


KEY_ID = "AKIA" + "IOSFODNN7EXAMPLE"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:secret@host/x", "https://***@host/x"),
        ("https://token@host/x", "https://***@host/x"),
        ('["s3://b/x","me@host"]', '["s3://b/x","me@host"]'),
        ("https://h/x?X-Amz-Credential=a%2Fb&X-Amz-Date=1", "https://h/x?X-Amz-Credential=***&X-Amz-Date=1"),
        ("https://h/x?a=1&X-Amz-Signature=0a1b", "https://h/x?a=1&X-Amz-Signature=***"),
        ("https://h/x?X-Amz-Security-Token=a/b+c==", "https://h/x?X-Amz-Security-Token=***"),
        ("https://h/x?X-Goog-Signature=0a1b", "https://h/x?X-Goog-Signature=***"),
        (
            "https://h/x?AWSAccessKeyId=me&Signature=a%3D&Expires=1",
            "https://h/x?AWSAccessKeyId=***&Signature=***&Expires=1",
        ),
        ("https://h/x?sv=2024&sig=a%2Fb%3D", "https://h/x?sv=2024&sig=***"),
        ("failed on 'https://h/x?sig=a', then again", "failed on 'https://h/x?sig=***', then again"),
        ('{"url": "https://h/x?token=a", "n": 1}', '{"url": "https://h/x?token=***", "n": 1}'),
        ("aws_secret_access_key=a/b+c region=x", "aws_secret_access_key=*** region=x"),
        ("AccountName=me;AccountKey=a+b==;Suffix=net", "AccountName=me;AccountKey=***;Suffix=net"),
        ("Authorization: Bearer a.b-c", "Authorization: Bearer ***"),
        ("authorization: Basic YTpi==", "authorization: Basic ***"),
        ("{'Authorization': 'abc', 'Host': 'h'}", "{'Authorization': '***', 'Host': 'h'}"),
        (
            f"Authorization: AWS4-HMAC-SHA256 Credential={KEY_ID}/2026/s3, SignedHeaders=host, Signature=0a",
            "Authorization: AWS4-HMAC-SHA256 ***, SignedHeaders=host, Signature=***",
        ),
        (f"the key {KEY_ID} is unknown", "the key *** is unknown"),
        ("x-amz-security-token: a/b+c== x-amz-date: 1", "x-amz-security-token: *** x-amz-date: 1"),
        ("{'X-Auth-Token': 'abc', 'Host': 'h'}", "{'X-Auth-Token': '***', 'Host': 'h'}"),
        ('{"SecretAccessKey": "a/b", "Code": "x"}', '{"SecretAccessKey": "***", "Code": "x"}'),
        ("y-token-d-e: is unchanged", "y-token-d-e: is unchanged"),
        ("my-secret-place/a.tif", "my-secret-place/a.tif"),
        ("s3://b/sig=a.tif", "s3://b/sig=a.tif"),
        ("s3://b/year=2026/token=a/x.tif", "s3://b/year=2026/token=a/x.tif"),
        ("/home/me/design=1/x.tif", "/home/me/design=1/x.tif"),
        *(
            (f"https://h/x?{name}=ab12&n=1", f"https://h/x?{name}=***&n=1")
            for name in ("api_key", "apikey", "subscription-key", "key", "pwd", "sas", "passwd", "passphrase")
        ),
        ("no such key=in/a.tif", "no such key=in/a.tif"),
        ("Authorization: Token abcd1234", "Authorization: Token ***"),
        ("Authorization: Own abcd1234 Host: h", "Authorization: *** Host: h"),
        ("authorization: abcd1234 x-amz-date: 1", "authorization: *** x-amz-date: 1"),
        ("{'Authorization': 'SharedKeyLite me:a+b=', 'n': 1}", "{'Authorization': 'SharedKeyLite ***', 'n': 1}"),
        ("https://u:p@w@host/a@b", "https://***@host/a@b"),
        ("Invalid header value b'Bearer xyz\\n'", "Invalid header value b'Bearer ***'"),
        ("the header is basic dXNlcjpodW50ZXIy, and wrong", "the header is basic ***, and wrong"),
        ("a basic network, a bearer of news", "a basic network, a bearer of news"),
    ],
)
def test_secrets_are_not_shown(text: str, shown: str) -> None:
    assert store.redact(text) == shown
    assert store.redact(shown) == shown


def test_secrets_in_keys_are_not_shown() -> None:
    told = {"rewrite": {"https://me:secret@host/": "s3://b/"}, "n": [1, {"x?sig=a": None}]}
    assert store.redacted(told) == {"rewrite": {"https://***@host/": "s3://b/"}, "n": [1, {"x?sig=***": None}]}


@pytest.mark.timeout(60)  # linear, each takes a second at most; by the square of the length it would be hours
@pytest.mark.parametrize("word", ["token", "-token", "'token", "://u@", "Bearer ", "authorization: a ", "key=", "sig-"])
def test_long_words_take_no_longer_than_short_ones(word: str) -> None:
    assert store.redact(word * 200_000)


READS = [store.head, store.exists, lambda uri: store.read_ranges(uri, [(0, 1)])]


@pytest.mark.bucket
@pytest.mark.parametrize("access", READS, ids=["head", "exists", "ranges"])
def test_one_object_denied_concerns_one_scene(access: Any, bucket: str) -> None:
    for name in ("open.tif", "closed.tif"):
        store.write(f"s3://{bucket}/{name}", b"1")
    deny(bucket, "s3:GetObject", "closed.tif")
    access(f"s3://{bucket}/open.tif")
    with pytest.raises(SceneDeniedError, match=r"closed\.tif: access denied.*\(AccessDenied\)"):
        access(f"s3://{bucket}/closed.tif")
    with pytest.raises(AccessDeniedError, match=r"closed\.tif: access denied"):
        store.read(f"s3://{bucket}/closed.tif")


@pytest.mark.bucket
@pytest.mark.parametrize("access", [*READS, store.read, lambda uri: list(store.walk(uri))])
@pytest.mark.parametrize("wrong", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_a_wrong_key_concerns_the_whole_job(
    wrong: str, access: Any, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.write(f"s3://{bucket}/x.tif", b"1")
    monkeypatch.setenv(wrong, "wrong")
    with pytest.raises(AccessDeniedError, match="check the credentials"):
        access(f"s3://{bucket}/x.tif")


@pytest.mark.bucket
def test_listing_or_writing_denied_concerns_the_whole_job(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not asked again, which would pause."""
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("a denial was not taken for one"))
    uri = f"s3://{bucket}/x.tif"
    version = store.write(uri, b"1")
    deny(bucket, "s3:PutObject", "*")
    for write in (
        lambda: store.write(uri, b"2"),
        lambda: store.write(f"{uri}2", b"2", create=True),
        lambda: store.write(uri, b"2", replaces=version),
        lambda: store.write_stream(uri, lambda: [b"2"]),
    ):
        with pytest.raises(AccessDeniedError, match="access denied"):
            write()
    deny(bucket, "s3:DeleteObject", "*")
    with pytest.raises(AccessDeniedError, match="access denied"):
        store.delete([uri])
    deny(bucket, "s3:ListBucket")
    with pytest.raises(AccessDeniedError, match="access denied"):
        list(store.walk(f"s3://{bucket}/"))


@pytest.mark.bucket
def test_a_bucket_that_is_not_there_is_named(bucket: str) -> None:
    for access in (store.read, store.head, lambda uri: list(store.walk(uri)), lambda uri: store.write(uri, b"")):
        with pytest.raises((ConfigError, store.ObjectMissingError), match="there is no such"):
            access(f"s3://{bucket}-not/x")


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ("", "no AWS credentials found; set AWS_ACCESS_KEY_ID"),
        ("[default]\ncredential_process = false", "the AWS credentials cannot be had: Error when retrieving"),
        ("[profile other]", r"the AWS credentials cannot be had: The config profile \(mine\) could not be found"),
    ],
)
def test_without_credentials_the_remedies_are_named(
    config: str, sentence: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    (tmp_path / "config").write_text(config)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    if "other" in config:
        monkeypatch.setenv("AWS_PROFILE", "mine")
    with pytest.raises(AccessDeniedError, match=sentence):
        store.read("s3://b/x")
