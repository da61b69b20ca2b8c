"""The night's start on Kubernetes: a suspended RayJob is copied under a dated name and followed to its end."""

from __future__ import annotations

import json
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geoseg.errors import AccessDeniedError, ConfigError, StopError, StoreError

_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_COPIED_LABELS = ("app.kubernetes.io/name",)
_GIVE_UP_S = 600.0  # without an answer; the pod that follows is started again then
_MAX_NAME = 47  # KubeRay's limit for a RayJob


@dataclass(frozen=True, slots=True)
class ApiServer:
    """The API server as a pod's account sees it: its URL, the account's token (read anew each time: it changes), its CA."""

    url: str
    namespace: str
    token_file: Path
    ca_file: Path | None

    @classmethod
    def of_this_pod(cls, environment: dict[str, str]) -> ApiServer:
        """The one that a pod is told of. Raises ConfigError outside a pod."""
        host, port = environment.get("KUBERNETES_SERVICE_HOST"), environment.get("KUBERNETES_SERVICE_PORT", "443")
        if not host or not (_ACCOUNT / "token").is_file():
            raise ConfigError(
                "this command is for a pod with a service account (infra/kubernetes/nightly/cronjob.yaml)"
            )
        namespace = (_ACCOUNT / "namespace").read_text().strip()
        host = f"[{host}]" if ":" in host else host
        return cls(f"https://{host}:{port}", namespace, _ACCOUNT / "token", _ACCOUNT / "ca.crt")

    def ray_jobs(self, name: str = "", *, body: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        """The status and answer of a GET for one RayJob, or of a POST with ``body``. Raises StoreError without an answer."""
        url = f"{self.url}/apis/ray.io/v1/namespaces/{self.namespace}/rayjobs" + (f"/{name}" if name else "")
        request = urllib.request.Request(  # noqa: S310 - the URL is ours
            url,
            data=None if body is None else json.dumps(body).encode(),
            headers={
                "Authorization": f"Bearer {self.token_file.read_text().strip()}",
                "Content-Type": "application/json",
            },
        )
        context = ssl.create_default_context(cafile=str(self.ca_file)) if self.ca_file else None
        try:
            with urllib.request.urlopen(request, timeout=30, context=context) as answer:  # noqa: S310
                return int(answer.status), json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                text = error.read().decode(errors="replace")
            if error.code in (401, 403):
                raise AccessDeniedError(f"the API server refuses {request.get_method()} {url}: {text[:300]}") from error
            if error.code >= 500 or error.code == 429:
                raise StoreError(f"the API server answers {error.code}: {text[:300]}") from error
            return error.code, {"message": text[:300]}
        except (OSError, ValueError) as error:
            raise StoreError(f"the API server does not answer: {error}") from error


def start_ray_job(
    server: ApiServer,
    template: str,
    name: str,
    *,
    owner: tuple[str, str] | None,
    tell: Callable[[str], None],
    sleep: Callable[[float], None] = time.sleep,
    poll_s: float = 30.0,
) -> int:
    """Copy the RayJob ``template`` as ``name`` and follow it to its end; the exit code that tells how it went.

    One that is there already under that name is followed instead: it was started before this process was. ``owner``
    (name and uid of a Job) takes the copy along when it is removed. Raises StopError kinds.
    """
    assert len(name) <= _MAX_NAME, name
    status, found = _patiently(lambda: server.ray_jobs(template), sleep)
    if status == 404:
        raise ConfigError(f"there is no RayJob {template} in {server.namespace} to copy; apply infra/kubernetes first")
    body = _copy(found, template, name, owner)
    status, answer = _patiently(lambda: server.ray_jobs(body=body), sleep)
    if status == 409:
        tell(f"{name} was started already; following it")
    elif status not in (200, 201):
        raise StopError(f"{name} was not taken: {answer.get('message')}")
    else:
        tell(f"{name} started")
    last = ""
    while True:
        status, found = _patiently(lambda: server.ray_jobs(name), sleep)
        if status == 404:
            raise StopError(f"{name} was removed before it had ended")
        state = found.get("status") or {}
        now = state.get("jobDeploymentStatus") or "New"
        if now != last:
            tell(f"{name}: {now} {state.get('jobStatus') or ''} {state.get('message') or ''}".rstrip())
            last = now
        if now == "Complete" and state.get("jobStatus") in ("SUCCEEDED", None):
            return 0
        if now in ("Complete", "Failed"):
            return 1
        sleep(poll_s)


def _copy(template: dict[str, Any], of: str, name: str, owner: tuple[str, str] | None) -> dict[str, Any]:
    labels = (template.get("metadata") or {}).get("labels") or {}
    metadata: dict[str, Any] = {
        "name": name,
        "labels": {key: labels[key] for key in _COPIED_LABELS if key in labels},
        "annotations": {"geoseg/copied-from": of},
    }
    if owner is not None:
        metadata["ownerReferences"] = [
            {"apiVersion": "batch/v1", "kind": "Job", "name": owner[0], "uid": owner[1], "blockOwnerDeletion": False}
        ]
    spec = {**template["spec"], "suspend": False, "jobId": name}
    return {"apiVersion": template["apiVersion"], "kind": template["kind"], "metadata": metadata, "spec": spec}


def _patiently(
    ask: Callable[[], tuple[int, dict[str, Any]]], sleep: Callable[[float], None]
) -> tuple[int, dict[str, Any]]:
    """Ask again, ever more slowly, while the API server does not answer. Raises StoreError when that lasts."""
    waited, wait_s = 0.0, 1.0
    while True:
        try:
            return ask()
        except StoreError:
            if waited >= _GIVE_UP_S:
                raise
            sleep(wait_s)
            waited += wait_s
            wait_s = min(2 * wait_s, 60.0)
