"""A whole run on folders and a real bucket: where scenes and masks may lie, what ends it, what its record tells."""

from __future__ import annotations

import json
import re
from pathlib import Path

import boto3
import pytest
from affine import Affine
from kit.scenes import noise, tiny_bundle, write_scene

import geoseg
from geoseg.config import load_job
from geoseg.errors import StopError
from geoseg.predict.verify import verify_output
from geoseg.raster import store
from geoseg.run import RunReport, check_job

ODD_NAME = "a b#c?d%20é[1].tif"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_scene(tmp_path_factory.mktemp("scene") / "scene.tif", noise(3, 70, 50)).read_bytes()


@pytest.fixture(params=["folder", pytest.param("bucket", marks=pytest.mark.bucket)])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "folder" else f"s3://{request.getfixturevalue('bucket')}"


def predict(scenes: str, out: str, bundle: str) -> RunReport:
    return geoseg.predict(scenes, out, bundle=bundle, engine="local", probabilities=True)


@pytest.mark.parametrize("out", ["/masks", "", "/"])
def test_an_output_inside_the_input_is_no_input(out: str, root: str, scene: bytes, bundle: str) -> None:
    store.write(f"{root}/{ODD_NAME}", scene)
    for status in ("published", "unchanged"):
        report = predict(root, root + out, bundle)
        assert [(one.uri, one.status) for one in report.scenes] == [(f"{root}/{ODD_NAME}", status)]
    checked = verify_output(root + out)
    assert (checked.num_items, checked.faults) == (1, ())


def test_the_record_of_a_run_is_json_without_secrets(root: str, scene: bytes, bundle: str) -> None:
    names = ["sig=a.tif", 'x?sig=b"c.tif', "y&token=d,e.tif"]
    for name in names:
        store.write(f"{root}/in/{name}", scene)
    predict(f"{root}/in", f"{root}/out", bundle)
    page, record = sorted(info.uri for info in store.walk(f"{root}/out/_geoseg/runs"))
    text = store.read(record).decode()
    told = json.loads(text)
    assert len(told["scenes"]) == len(names)
    assert f"{root}/in/sig=a.tif" in [one["uri"] for one in told["scenes"]]
    assert "sig=b" not in text
    assert "sig=b" not in store.read(page).decode()
    assert told["job"]["scenes"] == [f"{root}/in"]


def deny(bucket: str, *keys: str) -> None:
    arns = [f"arn:aws:s3:::{bucket}/{key}" for key in keys]
    statement = {"Effect": "Deny", "Principal": "*", "Action": ["s3:GetObject"], "Resource": arns}
    policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
    boto3.Session().client("s3").put_bucket_policy(Bucket=bucket, Policy=policy)


@pytest.mark.bucket
def test_scenes_that_are_denied_are_refused_and_the_others_go_on(bucket: str, scene: bytes, bundle: str) -> None:
    for name in ("closed.tif", "open.tif"):
        store.write(f"s3://{bucket}/in/{name}", scene)
    deny(bucket, "in/closed.tif")
    report = predict(f"s3://{bucket}/in", f"s3://{bucket}/out", bundle)
    assert [(one.id, one.status) for one in report.scenes] == [("closed", "refused"), ("open", "published")]
    assert re.search(r"closed\.tif: access denied.*\(AccessDenied\)", report.scenes[0].sentence)
    assert report.exit_code == 1
    assert store.exists(report.scenes[1].mask)
    store.write(f"s3://{bucket}/in/open.tif.msk", b"")  # stands for one that is not there: AWS denies both alike
    deny(bucket, "in/closed.tif", "in/open.tif.msk")
    assert predict(f"s3://{bucket}/in", f"s3://{bucket}/out2", bundle).scenes[1].status == "published", (
        "without the right to list, a bucket denies what it does not hold"
    )
    deny(bucket, "in/*")
    report = predict(f"s3://{bucket}/in", f"s3://{bucket}/out", bundle)
    assert [one.status for one in report.scenes] == ["refused", "refused"]
    assert report.exit_code == 4, "when every scene is denied, the scheduler should look at the credentials"


@pytest.mark.bucket
def test_a_bundle_that_is_denied_ends_the_run(bucket: str, scene: bytes, bundle: str) -> None:
    for file in Path(bundle).iterdir():
        store.write(f"s3://{bucket}/bundle/{file.name}", file.read_bytes())
    store.write(f"s3://{bucket}/in/a.tif", scene)
    deny(bucket, "bundle/*")
    with pytest.raises(StopError, match="access denied") as error:
        predict(f"s3://{bucket}/in", f"s3://{bucket}/out", f"s3://{bucket}/bundle")
    assert error.value.exit_code == 4


@pytest.mark.bucket
def test_a_key_that_cannot_be_addressed_is_refused_and_the_others_go_on(bucket: str, scene: bytes, bundle: str) -> None:
    for key in ("in/a//b.tif", "in/c.tif"):
        boto3.Session().client("s3").put_object(Bucket=bucket, Key=key, Body=scene)
    report = predict(f"s3://{bucket}", f"s3://{bucket}/out", bundle)
    assert [one.status for one in report.scenes] == ["refused", "published"]
    assert f"'s3://{bucket}/in/a//b.tif': a name with an empty part" in report.scenes[0].sentence
    assert report.exit_code == 1


def test_check_tells_of_pixels_that_are_not_square_on_the_ground(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "bundle")
    told = {}
    for name, across in (("square", 1.08e-5), ("squeezed", 5.4e-6)):
        transform = Affine(across, 0, 10.0, 0, -5.4e-6, 60.0)
        uri = write_scene(tmp_path / f"{name}.tif", noise(3, 40, 53), crs="EPSG:4326", transform=transform)
        (checked,) = check_job(
            load_job(None, {"scenes": [str(uri)], "out": str(tmp_path / "out"), "bundle": str(bundle)})
        )
        told[name] = checked.text
    assert "px of 0.6021 m on the ground, EPSG:4326" in told["square"]
    assert "px of 0.301 x 0.602 m on the ground (not square" in told["squeezed"]
