"""From the scene's bytes to the published ones: a scene replaced meanwhile, bits flipped on the way up, bits that rot.

Promises R9 and R15.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import pytest
from kit.faultproxy import Before, FaultProxy, Flip, Rule, fault_proxy
from kit.oracle import seeded_bundle, write_scene

import geoseg
from geoseg.predict.publish import read_item
from geoseg.predict.verify import verify_output
from geoseg.raster import buckets, store, upload
from geoseg.raster.synthetic import synthetic_image

pytestmark = pytest.mark.bucket

NAMED = re.compile(
    "(failed|refused): scene: .*was replaced while the run was reading it; run again to take the new version.*"
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(seeded_bundle(tmp_path_factory.mktemp("bundle")))


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Two scenes of one size whose masks differ."""
    folder = tmp_path_factory.mktemp("versions")
    made = [synthetic_image(700, 1100, seed=seed).pixels_bhw for seed in (1, 2)]
    return [
        write_scene(folder / f"{at}.tif", pixels, nodata=0, compress="none").read_bytes()
        for at, pixels in enumerate(made)
    ]


def predict(root: str, bundle: str) -> Any:
    return geoseg.predict(f"{root}/in/", f"{root}/out", bundle=bundle, engine="local", window=512)


def mask_sum(root: str, scene: str) -> str:
    """The name of the mask that stands, which follows from its bytes; "" when there is none."""
    uri = f"{root}/out/{scene}/item.json"
    if not store.exists(uri):
        return ""
    body, version = store.read_version(uri)
    return store.base_name(read_item(scene, uri, version, body).published.mask_uri)


def replaced_at(at: int, root: str, bundle: str, versions: list[bytes], proxy: FaultProxy) -> tuple[str, str, int]:
    """Replace a scene before the request number ``at`` for it: status and sentence, mask, requests until its item."""
    store.write(f"{root}/in/scene.tif", versions[0])
    bucket, _, key = f"{root}/in/scene.tif".removeprefix("s3://").partition("/")
    direct = boto3.Session().client("s3", endpoint_url=proxy.server)
    swap = Before(lambda: direct.put_object(Bucket=bucket, Key=key, Body=versions[1]))
    proxy.obey(Rule(fault=swap, path=f"{re.escape(key)}$", skip=at))
    (told,) = predict(root, bundle).scenes
    asked = [(method, path) for method, path in proxy.seen if path.endswith((key, "scene/item.json"))]
    item = [at for at, (method, path) in enumerate(asked) if method == "PUT" and path.endswith("item.json")]
    num = sum(path.endswith(key) for _, path in asked[: item[0] if item else None])
    return f"{told.status}: {told.sentence}", mask_sum(root, "scene"), num


@pytest.mark.timeout(900)
@pytest.mark.parametrize("every", [0, pytest.param(1, marks=[pytest.mark.chaos, pytest.mark.slow])])
def test_a_scene_replaced_between_two_requests_never_gives_a_mixed_mask(
    every: int,
    bucket: str,
    bundle: str,
    versions: list[bytes],
    monkeypatch: pytest.MonkeyPatch,
    figure: Callable[..., None],
) -> None:
    root = f"s3://{bucket}"
    with fault_proxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        told, old, num = replaced_at(1000, f"{root}/calm", bundle, versions, proxy)
        assert told == "published: "
        assert num >= 6
        tries = range(1, num, every) if every else [num // 2]
        came = {at: replaced_at(at, f"{root}/{at}", bundle, versions, proxy)[:2] for at in tries}
        new = replaced_at(0, f"{root}/first", bundle, versions, proxy)[1] if every else ""
    assert old != new
    mixed = {at: told for at, (told, mask) in came.items() if mask not in ("", old, new)}
    named = [at for at, (told, mask) in came.items() if not mask and NAMED.fullmatch(told)]
    figure("R9", "masks of two versions of a scene that was replaced before one of its requests", len(mixed), goal="0")
    figure("R9", "scenes replaced before a request after the first, failed with a clear word",
           f"{len(named)} of {len(came)}", goal=f"{len(came)} of {len(came)}")  # fmt: skip
    assert not mixed
    assert {at: told for at, told in came.items() if at not in named} == {}


def put_whole(root: str, data: bytes) -> str:
    store.write(f"{root}/whole", data)
    return f"{root}/whole"


def put_stream(root: str, data: bytes) -> str:
    store.write_stream(f"{root}/stream", lambda: [data])
    return f"{root}/stream"


def put_pieces(root: str, data: bytes) -> str:
    under_way = upload.begin(f"{root}/pieces", len(data), f"{root}/staging")
    under_way.complete({1: under_way.write(1, 0, data)})
    return f"{root}/pieces"


@pytest.mark.timeout(300)
@pytest.mark.parametrize("num", [4, pytest.param(60, marks=[pytest.mark.chaos, pytest.mark.slow])])
@pytest.mark.parametrize("put", [put_whole, put_stream, put_pieces])
def test_a_bit_flipped_on_the_way_up_is_noticed(
    put: Callable[[str, bytes], str],
    num: int,
    bucket: str,
    monkeypatch: pytest.MonkeyPatch,
    figure: Callable[..., None],
) -> None:
    chance = random.Random(11)
    monkeypatch.setattr(buckets, "LIMITS", buckets.Limits(first_pause_s=0.01, longest_pause_s=0.05))
    with fault_proxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        noticed = 0
        for at in range(num):
            data = chance.randbytes(chance.randrange(1, 200_000))
            proxy.obey(
                Rule(fault=Flip(chance.randrange(8 * len(data)), up=True), method="PUT", path="whole|partNumber")
            )
            uri = put(f"s3://{bucket}/{at}", data)
            assert len(proxy.hit) == 1
            noticed += store.read_ranges(uri, [(0, store.head(uri).size)])[0] == data
        figure("R15", f"bits flipped on the way up that were noticed, {put.__name__.replace('_', ' ')}",
               f"{noticed} of {num}", goal=f"{num} of {num}")  # fmt: skip
        assert noticed == num


@pytest.mark.timeout(600)
@pytest.mark.parametrize("num", [6, pytest.param(120, marks=[pytest.mark.chaos, pytest.mark.slow])])
def test_bits_that_rot_are_found(
    num: int, bundle: str, tmp_path: Path, versions: list[bytes], figure: Callable[..., None]
) -> None:
    root = str(tmp_path)
    for at, version in enumerate(versions):
        store.write(f"{root}/in/{at}.tif", version)
    predict(root, bundle)
    out = f"{root}/out"
    assert verify_output(out).faults == ()
    files = sorted(file for file in Path(out).rglob("*") if file.is_file() and "_geoseg/r" not in str(file))
    files = [file for file in files if file.name.startswith(("mask-", "thumbnail-", "item"))]
    assert len(files) == 6
    chance, found, flipped = random.Random(12), dict[str, int](), dict[str, int]()
    for _ in range(num):
        file = chance.choice(files)
        kind = file.name.split("-")[0]
        whole = file.read_bytes()
        file.write_bytes(Flip(chance.randrange(8 * len(whole))).of(whole))
        flipped[kind] = flipped.get(kind, 0) + 1
        found[kind] = found.get(kind, 0) + bool(verify_output(out).faults)
        file.write_bytes(whole)
    figure("R15", "bits flipped in published objects that geoseg verify found",
           f"{sum(found.values())} of {num}", goal=f"{num} of {num}")  # fmt: skip
    assert found == flipped
