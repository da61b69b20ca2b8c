"""The stack is one that AWS takes, and its worker role can do what a run does and nothing more."""

from __future__ import annotations

import os
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import click
import pytest
import yaml
from botocore.exceptions import ClientError
from kit.object_store import REGION, moto_server
from kit.oracle import seeded_bundle, write_scene
from kit.tools import tool

import geoseg
from geoseg.cli import main
from geoseg.predict.verify import verify_output
from geoseg.raster.synthetic import synthetic_image

AWS = Path(__file__).resolve().parents[2] / "infra" / "aws"
TEMPLATE = AWS / "geoseg.cfn.yaml"
IMAGERY, RESULTS = "example-imagery", "example-results"


def lint(template: Path) -> subprocess.CompletedProcess[str]:
    command = [tool("cfn-lint", "pip install cfn-lint"), "--regions", "eu-central-1", "--", str(template)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_the_template_is_clean() -> None:
    done = lint(TEMPLATE)
    assert done.returncode == 0, done.stdout


def test_the_linter_sees_a_wrong_word(tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text(TEMPLATE.read_text().replace("BucketEncryption:", "BucketEncription:"))
    assert "BucketEncription" in lint(broken).stdout


def test_the_launcher_file_is_one_that_ray_takes() -> None:
    util = pytest.importorskip("ray.autoscaler._private.util")
    cluster = yaml.safe_load((AWS / "cluster.yaml").read_text())
    util.validate_config(util.prepare_config(cluster))
    with pytest.raises(Exception, match="max_wrkers"):
        util.validate_config(util.prepare_config({**cluster, "max_wrkers": 3}))


def test_nodes_keep_to_themselves() -> None:
    cluster = yaml.safe_load((AWS / "cluster.yaml").read_text())
    for name, node in cluster["available_node_types"].items():
        config = node["node_config"]
        assert config["MetadataOptions"]["HttpTokens"] == "required", name
        assert config["MetadataOptions"]["HttpPutResponseHopLimit"] == 1, name
        assert config["SecurityGroupIds"], f"{name}: Ray would make a group that is open to SSH from everywhere"
        assert all(disk["Ebs"]["Encrypted"] for disk in config["BlockDeviceMappings"]), name
    head, worker = cluster["available_node_types"]["head"], cluster["available_node_types"]["spot-gpu"]
    assert head["resources"]["CPU"] == 0
    assert "InstanceMarketOptions" not in head["node_config"]
    assert worker["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
    assert worker["min_workers"] == 0
    starts = [*cluster["head_start_ray_commands"], *cluster["worker_start_ray_commands"]]
    assert all("RAY_AUTH_MODE=token" in command for command in starts if "ray start" in command)
    assert "--dashboard-host=127.0.0.1" in " ".join(starts)
    (watch,) = [command for command in starts if "geoseg" in command]
    assert watch in cluster["worker_start_ray_commands"], "spot nodes get notices, the head does not"
    assert watch.endswith("&"), "or the node would never be up"
    assert main.get_command(click.Context(main), watch.partition("geoseg ")[2].split()[0]) is not None


@pytest.fixture(scope="module")
def as_worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Any]]:
    """The stack deployed to moto, scenes and a bundle in place; from here on every call is judged by the worker's role."""
    with moto_server() as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        endpoint = environment["AWS_ENDPOINT_URL"]

        def client(service: str) -> Any:
            return boto3.Session().client(service, endpoint_url=endpoint, region_name=REGION)

        client("s3").create_bucket(Bucket=IMAGERY)
        client("s3").create_bucket(Bucket="of-another-team")
        deploy(client)
        folder = tmp_path_factory.mktemp("aws")
        seeded_bundle(folder / "bundle")
        for path in (folder / "bundle").iterdir():
            client("s3").upload_file(str(path), RESULTS, f"bundles/one/{path.name}")
        for seed in range(2):
            scene = write_scene(folder / f"scene{seed}.tif", synthetic_image(300, 200, seed=seed).pixels_bhw)
            client("s3").upload_file(str(scene), IMAGERY, f"2026/{scene.name}")
        arn = client("iam").get_role(RoleName="geoseg-worker")["Role"]["Arn"]
        keys = client("sts").assume_role(RoleArn=arn, RoleSessionName="worker")["Credentials"]
        patch.setenv("AWS_ACCESS_KEY_ID", keys["AccessKeyId"])
        patch.setenv("AWS_SECRET_ACCESS_KEY", keys["SecretAccessKey"])
        patch.setenv("AWS_SESSION_TOKEN", keys["SessionToken"])
        judge = urllib.request.Request(
            f"{endpoint}/moto-api/reset-auth", data=b"0", headers={"Content-Type": "text/plain"}
        )
        with urllib.request.urlopen(judge, timeout=10):
            yield client


def deploy(client: Callable[[str], Any]) -> None:
    vpc = client("ec2").create_vpc(CidrBlock="10.0.0.0/16")["Vpc"]["VpcId"]
    parameters = {"InputBucketName": IMAGERY, "OutputBucketName": RESULTS, "VpcId": vpc}
    told = [{"ParameterKey": key, "ParameterValue": value} for key, value in parameters.items()]
    client("cloudformation").create_stack(
        StackName="geoseg", TemplateBody=TEMPLATE.read_text(), Parameters=told, Capabilities=["CAPABILITY_NAMED_IAM"]
    )
    (stack,) = client("cloudformation").describe_stacks(StackName="geoseg")["Stacks"]
    assert stack["StackStatus"] == "CREATE_COMPLETE", stack


@pytest.mark.slow
def test_a_whole_run_passes_under_the_workers_role(as_worker: Callable[[str], Any]) -> None:
    assert os.environ["AWS_SESSION_TOKEN"]
    settings = {"bundle": f"s3://{RESULTS}/bundles/one", "engine": "local", "window": 512}
    report = geoseg.predict(f"s3://{IMAGERY}/2026/", f"s3://{RESULTS}/masks", **settings)
    assert {scene.id: (scene.status, scene.sentence) for scene in report.scenes} == {
        "scene0": ("published", ""),
        "scene1": ("published", ""),
    }
    tidy_up_one_by_one(as_worker("s3"))
    again = geoseg.predict(f"s3://{IMAGERY}/2026/", f"s3://{RESULTS}/masks", **settings)
    assert again.counts == {"unchanged": 2}
    assert not verify_output(f"s3://{RESULTS}/masks").faults
    upload = as_worker("s3").create_multipart_upload(Bucket=RESULTS, Key="masks/large/mask.tif")["UploadId"]
    as_worker("s3").upload_part(
        Bucket=RESULTS, Key="masks/large/mask.tif", UploadId=upload, PartNumber=1, Body=b"x" * (5 << 20)
    )
    as_worker("s3").abort_multipart_upload(Bucket=RESULTS, Key="masks/large/mask.tif", UploadId=upload)


def tidy_up_one_by_one(s3: Any) -> None:
    """Delete what the run could not: it asks for several at once, which AWS judges by their keys but moto by the bucket."""
    found = s3.list_objects_v2(Bucket=RESULTS, Prefix="masks/_geoseg/")["Contents"]
    left = [told["Key"] for told in found if "/parts/" in told["Key"]]
    assert len(left) == 2
    for key in left:
        s3.delete_object(Bucket=RESULTS, Key=key)


FORBIDDEN: dict[str, Callable[[Callable[[str], Any]], object]] = {
    "remove a scene": lambda aws: aws("s3").delete_object(Bucket=IMAGERY, Key="2026/scene0.tif"),
    "overwrite a scene": lambda aws: aws("s3").put_object(Bucket=IMAGERY, Key="2026/scene0.tif", Body=b"x"),
    "remove an item": lambda aws: aws("s3").delete_object(Bucket=RESULTS, Key="masks/scene0/item.json"),
    "replace a bundle": lambda aws: aws("s3").put_object(Bucket=RESULTS, Key="bundles/one/model.json", Body=b"{}"),
    "write beside the prefix": lambda aws: aws("s3").put_object(Bucket=RESULTS, Key="elsewhere/x", Body=b"x"),
    "open the bucket": lambda aws: aws("s3").put_bucket_policy(Bucket=RESULTS, Policy="{}"),
    "change how long things are kept": lambda aws: aws("s3").put_bucket_lifecycle_configuration(
        Bucket=RESULTS, LifecycleConfiguration={"Rules": []}
    ),
    "list another team's bucket": lambda aws: aws("s3").list_objects_v2(Bucket="of-another-team"),
    "read another team's bucket": lambda aws: aws("s3").get_object(Bucket="of-another-team", Key="x"),
    "start machines": lambda aws: aws("ec2").run_instances(ImageId="ami-12345678", MinCount=1, MaxCount=1),
    "give itself rights": lambda aws: aws("iam").attach_role_policy(
        RoleName="geoseg-worker", PolicyArn="arn:aws:iam::aws:policy/AdministratorAccess"
    ),
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_a_worker_may_not(what: str, as_worker: Callable[[str], Any]) -> None:
    with pytest.raises(ClientError) as denied:
        FORBIDDEN[what](as_worker)
    assert denied.value.response["Error"]["Code"] in ("AccessDenied", "UnauthorizedOperation"), denied.value


class _Loader(yaml.SafeLoader):
    """Reads a template with its short forms (!Ref, !Sub) as what they hold."""


def _held(loader: yaml.SafeLoader, _tag: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.ScalarNode):
        return loader.construct_scalar(node)
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    return loader.construct_mapping(node, deep=True)


_Loader.add_multi_constructor("!", _held)


def test_what_moto_does_not_judge_stands_in_the_template() -> None:
    """Conditions, encryption, lifecycle: moto takes any."""
    resources = yaml.load(TEMPLATE.read_text(), _Loader)["Resources"]  # noqa: S506 - it is a safe one
    statements = {each["Sid"]: each for each in resources["WorkerPolicy"]["Properties"]["PolicyDocument"]["Statement"]}
    assert statements["ListResults"]["Condition"]["StringLike"]["s3:prefix"] == [
        "${OutputPrefix}/*",
        "${BundlePrefix}/*",
    ]
    for each in statements.values():
        actions = each["Action"] if isinstance(each["Action"], list) else [each["Action"]]
        assert not [action for action in actions if "*" in action or "Policy" in action or "Version" in action]
        assert each["Resource"] != "*"
    bucket = resources["OutputBucket"]["Properties"]
    assert all(bucket["PublicAccessBlockConfiguration"].values())
    assert resources["OutputBucket"]["DeletionPolicy"] == "Retain"
    expires = [rule["Prefix"] for rule in bucket["LifecycleConfiguration"]["Rules"] if "ExpirationInDays" in rule]
    assert expires == ["${OutputPrefix}/_geoseg/parts/"], "nothing but leftovers ever expires"
    assert any("AbortIncompleteMultipartUpload" in rule for rule in bucket["LifecycleConfiguration"]["Rules"])
    ingress = resources["ClusterSecurityGroup"]["Properties"]["SecurityGroupIngress"]
    assert [(rule["FromPort"], rule["CidrIp"]) for rule in ingress] == [(22, "AdminCidr")]
