"""The manifests are ones that Kubernetes and KubeRay take, and what they make is closed, frugal and runs one night at a time."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from kit.tools import tool

KUBERNETES = Path(__file__).resolve().parents[2] / "infra" / "kubernetes"
BUILT = ["base", "nightly", "overlays/aws-spot-gpu", "overlays/cpu-only", "overlays/long-lived"]
RAY_KINDS = ("RayJob", "RayCluster")
# The fields of ray.io/v1 that are used here, as KubeRay 1.6 has them; its CRDs are a megabyte each.
RAY_JOB = {
    "suspend", "entrypoint", "submissionMode", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "jobId",
    "activeDeadlineSeconds", "backoffLimit", "submitterPodTemplate", "rayClusterSpec",
}  # fmt: skip
RAY_CLUSTER = {
    "rayVersion", "authOptions", "enableInTreeAutoscaling", "autoscalerOptions", "headGroupSpec", "workerGroupSpecs",
}  # fmt: skip
AUTOSCALER = {"version", "idleTimeoutSeconds", "resources", "securityContext", "volumeMounts", "env", "upscalingMode"}
HEAD = {"serviceType", "rayStartParams", "template"}
WORKERS = {"groupName", "minReplicas", "maxReplicas", "replicas", "rayStartParams", "template"}


@cache
def built(folder: str) -> list[dict[str, Any]]:
    command = [tool("kubectl", "apt-get install kubernetes-client"), "kustomize", str(KUBERNETES / folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def of_kind(folder: str, *kinds: str) -> list[dict[str, Any]]:
    return [each for each in built(folder) if each["kind"] in kinds]


def clusters(folder: str) -> list[dict[str, Any]]:
    return [each["spec"].get("rayClusterSpec", each["spec"]) for each in of_kind(folder, *RAY_KINDS)]


def pod_templates(folder: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for each in built(folder):
        spec, name = each.get("spec", {}), f"{each['kind']} {each['metadata']['name']}"
        if each["kind"] == "CronJob":
            yield name, spec["jobTemplate"]["spec"]["template"]
        if each["kind"] in RAY_KINDS:
            cluster = spec.get("rayClusterSpec", spec)
            yield f"{name}: head", cluster["headGroupSpec"]["template"]
            for group in cluster["workerGroupSpecs"]:
                yield f"{name}: {group['groupName']}", group["template"]
            if "submitterPodTemplate" in spec:
                yield f"{name}: submitter", spec["submitterPodTemplate"]


def valid(document: dict[str, Any]) -> None:
    kubernetes_validate = pytest.importorskip(
        "kubernetes_validate", reason="get it with: pip install kubernetes-validate"
    )
    kubernetes_validate.validate(document, "1.34", strict=True)


@pytest.mark.parametrize("folder", BUILT)
def test_kubernetes_takes_the_manifests(folder: str) -> None:
    for document in built(folder):
        assert document["kind"] == "Namespace" or document["metadata"]["namespace"] == "geoseg", document["metadata"]
        if document["kind"] not in RAY_KINDS:
            valid(document)
    for name, template in pod_templates(folder):
        valid(
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {**template.get("metadata", {}), "name": "x"},
                "spec": template["spec"],
            }
        )
        volumes = {volume["name"] for volume in template["spec"].get("volumes", [])}
        for container in template["spec"]["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes, name


def test_the_check_sees_a_wrong_word() -> None:
    pytest.importorskip("kubernetes_validate")
    (cron_job,) = of_kind("nightly", "CronJob")
    with pytest.raises(Exception, match="concurencyPolicy"):
        valid({**cron_job, "spec": {**cron_job["spec"], "concurencyPolicy": "Forbid"}})


@pytest.mark.parametrize("folder", [folder for folder in BUILT if folder != "nightly"])
def test_kuberay_knows_every_field(folder: str) -> None:
    for each in of_kind(folder, "RayJob"):
        assert set(each["spec"]) <= RAY_JOB
        assert len(each["metadata"]["name"]) <= 47
    for cluster in clusters(folder):
        assert set(cluster) <= RAY_CLUSTER
        assert set(cluster["autoscalerOptions"]) <= AUTOSCALER
        assert set(cluster["headGroupSpec"]) <= HEAD
        for group in cluster["workerGroupSpecs"]:
            assert set(group) <= WORKERS
            assert 0 == group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        for params in (
            cluster["headGroupSpec"]["rayStartParams"],
            *(group["rayStartParams"] for group in cluster["workerGroupSpecs"]),
        ):
            assert all(isinstance(value, str) for value in params.values())


@pytest.mark.parametrize("folder", BUILT)
def test_pods_have_no_rights_to_spare(folder: str) -> None:
    for name, template in pod_templates(folder):
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec), name
        assert not [volume for volume in spec.get("volumes", []) if "hostPath" in volume], name
        for container in spec["containers"]:
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"] is True, name
            assert context["allowPrivilegeEscalation"] is False, name
            assert context["capabilities"] == {"drop": ["ALL"]}, name
            assert container["resources"]["requests"].keys() >= {"cpu", "memory"}, name
            assert "memory" in container["resources"]["limits"], name
            for variable in container.get("env", []):
                assert "TOKEN" not in variable["name"] or "secretKeyRef" in variable["valueFrom"], name
    automounted = [
        name for name, template in pod_templates(folder) if template["spec"].get("automountServiceAccountToken", True)
    ]
    assert all(name.endswith(": head") or name.startswith("CronJob") for name in automounted)
    for role in of_kind(folder, "Role"):
        assert role["rules"] == [{"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["get", "create"]}]
    assert not of_kind(folder, "ClusterRole", "ClusterRoleBinding", "Ingress", "Secret")


@pytest.mark.parametrize("folder", [folder for folder in BUILT if folder != "nightly"])
def test_a_cluster_is_closed_and_starts_from_nothing(folder: str) -> None:
    for cluster in clusters(folder):
        assert cluster["authOptions"] == {"mode": "token", "secretName": "geoseg-ray-token"}
        head = cluster["headGroupSpec"]
        assert head["serviceType"] == "ClusterIP"
        assert head["rayStartParams"]["num-cpus"] == "0", "no task lands on the head"
        for group in (head, *cluster["workerGroupSpecs"]):
            (container,) = group["template"]["spec"]["containers"]
            environment = {variable["name"]: variable.get("value") for variable in container["env"]}
            assert environment["RAY_AUTH_MODE"] == "token"
            drain_s = float(environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] or 0)
            assert 0 < drain_s < group["template"]["spec"]["terminationGracePeriodSeconds"] < 120, (
                "a spot notice is 120 s ahead"
            )
            assert not [port for port in container["ports"] if "hostPort" in port]
    policies = {policy["metadata"]["name"]: policy["spec"] for policy in of_kind(folder, "NetworkPolicy")}
    assert policies["deny-all"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for policy in policies.values():
        for rule in policy.get("ingress", []):
            assert all("ipBlock" not in source for source in rule["from"])


def test_gpus_are_on_spot_and_the_head_is_not() -> None:
    for folder in ("overlays/aws-spot-gpu", "overlays/long-lived"):
        for cluster in clusters(folder):
            (workers,) = cluster["workerGroupSpecs"]
            spec = workers["template"]["spec"]
            assert spec["nodeSelector"]["karpenter.sh/capacity-type"] == "spot"
            assert {each["key"] for each in spec["tolerations"]} == {"nvidia.com/gpu", "geoseg.io/spot"}
            assert spec["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
            head = cluster["headGroupSpec"]["template"]["spec"]
            assert head["nodeSelector"]["karpenter.sh/capacity-type"] == "on-demand"
            assert "tolerations" not in head
    assert len(of_kind("overlays/long-lived", "RayCluster")) == 1
    (night, stays) = clusters("overlays/long-lived")
    assert night == stays, "one description of pods for both"


def test_one_night_at_a_time() -> None:
    (cron_job,) = of_kind("nightly", "CronJob")
    (night,) = of_kind("base", "RayJob")
    assert cron_job["spec"]["concurrencyPolicy"] == "Forbid"
    assert cron_job["spec"]["startingDeadlineSeconds"] > 100, (
        "the controller gives up after 100 missed ticks, one each ten seconds"
    )
    assert cron_job["spec"]["timeZone"] == "Etc/UTC"
    assert night["spec"]["suspend"] is True, "the template itself never runs"
    assert night["spec"]["shutdownAfterJobFinishes"] is True
    assert night["spec"]["backoffLimit"] >= 1
    (starter,) = cron_job["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    assert starter["command"][:3] == ["geoseg", "start-rayjob", night["metadata"]["name"]]
    assert cron_job["spec"]["jobTemplate"]["spec"]["activeDeadlineSeconds"] > night["spec"]["activeDeadlineSeconds"]
    selectors = [budget["spec"]["selector"]["matchLabels"] for budget in of_kind("base", "PodDisruptionBudget")]
    labels = [template["metadata"]["labels"] for _, template in pod_templates("base")]
    assert all(any(selector.items() <= label.items() for label in labels) for selector in selectors)


def test_files_are_tidy() -> None:
    command = [tool("yamllint", "pip install yamllint"), "--strict", "-d", YAMLLINT, str(KUBERNETES.parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout


YAMLLINT = """
extends: default
rules:
  document-start: disable
  line-length: {max: 132}
  braces: {max-spaces-inside: 0}
  comments: {min-spaces-from-content: 2}
  truthy: {check-keys: false}
"""
