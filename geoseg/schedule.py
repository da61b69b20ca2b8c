"""A job file and a time of the night in, the manifest of a scheduler out: the examples in ``infra/``, filled in."""

from __future__ import annotations

import base64
import json
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import yaml
from cronsim import CronSim, CronSimError

from geoseg.errors import ConfigError
from geoseg.jobfile import JobFile

# What Kubernetes, cron and Airflow all take; cronsim alone takes more, such as L for the last day.
_FOUND_IN_ALL = re.compile(r"(?:\*|\d+|[A-Za-z]{3})(?:[-/,](?:\*|\d+|[A-Za-z]{3}))*")
_HIDDEN = ("/home", "/root", "/run/user")  # from a unit with ProtectHome=yes
_CONFIG_MAP_BYTES = 1 << 20
_EXAMPLE_CRON, _EXAMPLE_TIMEZONE, _EXAMPLE_COMMAND = "0 2 * * *", "Etc/UTC", "geoseg nightly /etc/geoseg/nightly.toml"
_BEFORE_IT = (
    "# once, before this: kubectl apply -k infra/kubernetes/overlays/aws-spot-gpu; then this: kubectl apply -f -"
)
_WEEKDAYS = ("Sun", "Mon", "Tue", "Wed", "Thu", "Fri", "Sat")


@dataclass(frozen=True, slots=True)
class When:
    """A time that comes back: five fields of cron, and the time zone they are meant in. Raises ConfigError."""

    cron: str
    timezone: str

    def __post_init__(self) -> None:
        fields = self.cron.split()
        if len(fields) != 5 or not all(_FOUND_IN_ALL.fullmatch(field) for field in fields):
            raise ConfigError(
                f"--cron {self.cron!r}: wanted five fields (minute hour day month weekday), for example '0 2 * * *'"
            )
        try:
            next(CronSim(self.cron, datetime(2024, 1, 1)))  # noqa: DTZ001 - the clock on the wall
        except (CronSimError, StopIteration) as error:
            raise ConfigError(f"--cron {self.cron!r}: {str(error).lower() or 'it never comes'}") from error
        try:
            ZoneInfo(self.timezone)
        except (ZoneInfoNotFoundError, ValueError, OSError) as error:
            raise ConfigError(f"--timezone {self.timezone!r}: wanted a name like Europe/Zurich or Etc/UTC") from error

    def skipped(self, since: datetime) -> datetime | None:
        """The first time within a year that the clock on the wall jumps over, when summer time begins."""
        zone, start = ZoneInfo(self.timezone), since.replace(tzinfo=None)
        tick: datetime
        for tick in CronSim(self.cron, start):
            if tick > start + timedelta(days=366):
                return None
            through = tick.replace(tzinfo=zone).astimezone(timezone.utc).astimezone(zone)
            if through.replace(tzinfo=None) != tick:
                return tick
        return None

    def on_calendar(self) -> str:
        """The same for a timer of systemd. Raises ConfigError for a day of the month or of the week, which it cannot say."""
        parsed = CronSim(self.cron, datetime(2024, 1, 1))  # noqa: DTZ001
        _, _, day, _, weekday = self.cron.split()
        if not day.startswith("*") and not weekday.startswith("*"):
            raise ConfigError(
                f"--cron {self.cron!r}: cron runs on either of the two days, which a timer of systemd cannot say; name one of them"
            )
        days = sorted({one % 7 for one in parsed.weekdays if isinstance(one, int)})  # all are: no 1#2 comes this far
        weekdays = "" if len(days) == 7 else ",".join(_WEEKDAYS[number] for number in days) + " "
        months, monthdays = _listed(parsed.months, range(1, 13)), _listed(parsed.days, range(1, 32))
        hours, minutes = _listed(parsed.hours, range(24)), _listed(parsed.minutes, range(60))
        return f"{weekdays}*-{months}-{monthdays} {hours}:{minutes}:00 {self.timezone}"


def _listed(values: Any, every: range) -> str:
    numbers = sorted(int(value) for value in values)
    return "*" if numbers == list(every) else ",".join(map(str, numbers))


@dataclass(frozen=True, slots=True, kw_only=True)
class Night:
    """What is to run, and when. ``path``: where the job file will lie. ``address``: of a cluster to submit to, if any.

    ``program``: geoseg as the scheduler finds it, which looks in fewer places than a shell.
    """

    job: JobFile
    path: Path
    when: When
    image: str | None = None
    namespace: str = "geoseg"
    address: str | None = None
    program: str = "geoseg"

    @property
    def command(self) -> str:
        """The command of a machine's own scheduler. Raises ConfigError for a job that counts on a working directory."""
        if self.job.files:
            raise ConfigError(
                f"{self.path}: it names {self.job.files[0][0]} by a relative path, and a scheduler runs it elsewhere; name it "
                "by an absolute path or a URI"
            )
        if self.address is None:
            return shlex.join([self.program, "nightly", str(self.path)])
        return shlex.join([self.program, "submit", str(self.path), "--address", self.address])


def kubernetes(night: Night) -> str:
    """A ConfigMap with the job file and the files it names, and the CronJob that starts it. Raises ConfigError."""
    if night.image is None:
        raise ConfigError(
            "--as kubernetes needs --image: the one you built from infra/docker/Dockerfile, where the cluster finds it"
        )
    (config,) = _documents("kubernetes/nightly/job.yaml")
    (cron_job,) = _documents("kubernetes/nightly/cronjob.yaml")
    told = {"job.toml": night.job.text.encode(), **dict(night.job.files)}
    if sum(map(len, told.values())) > _CONFIG_MAP_BYTES:
        raise ConfigError(
            "the job file and the files it names are more than a ConfigMap holds (1 MiB); put the large ones into a bucket"
        )
    deeper = next((name for name in told if "/" in name), None)
    if deeper is not None:
        raise ConfigError(
            f"{deeper}: a ConfigMap has no folders; put the files that the job names beside it, or into a bucket"
        )
    config["data"], binary = {}, {}
    for name, content in told.items():
        try:
            config["data"][name] = content.decode()
        except UnicodeDecodeError:
            binary[name] = base64.b64encode(content).decode()
    if binary:
        config["binaryData"] = binary
    cron_job["spec"] |= {"schedule": night.when.cron, "timeZone": night.when.timezone}
    (container,) = cron_job["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    container["image"] = night.image
    container["command"] = [
        night.when.timezone if before == "--timezone" else word
        for before, word in zip(["", *container["command"]], container["command"], strict=False)
    ]
    for document in (config, cron_job):
        document["metadata"]["namespace"] = night.namespace
    printed: str = yaml.dump_all([config, cron_job], Dumper=_Blocks, sort_keys=False, width=120)
    return f"{_BEFORE_IT}\n{printed}"


def systemd(night: Night) -> str:
    """A service and its timer, one after the other, each headed by the path it belongs to.

    Raises ConfigError for a program or a job file where the unit cannot see it.
    """
    command = night.command.replace("%", "%%").replace("$", "$$")
    for told, path in (("the program", night.program), ("the job file", str(night.path))):
        if any(Path(path).is_relative_to(hidden) for hidden in _HIDDEN):
            raise ConfigError(
                f"--as systemd: {told} is {path}, and the unit sees no home (ProtectHome=yes); put it elsewhere, such as below "
                "/opt or /etc/geoseg"
            )
    out = str(night.job.values.get("out", ""))
    filled = {f"ExecStart={_EXAMPLE_COMMAND}": f"ExecStart={command}"}
    if out.startswith("/") and night.address is None:
        path = out.replace("%", "%%").replace("\\", "\\\\").replace('"', '\\"')
        filled["PrivateTmp=yes\n"] = (
            f'PrivateTmp=yes\n# It must be there when the unit starts.\nReadWritePaths="{path}"\n'
        )
    service = _filled("geoseg-nightly.service", filled)
    timer = _filled(
        "geoseg-nightly.timer",
        {
            f"OnCalendar={When(_EXAMPLE_CRON, _EXAMPLE_TIMEZONE).on_calendar()}": f"OnCalendar={night.when.on_calendar()}"
        },
    )
    return f"{service}\n{timer}"


def crontab(night: Night) -> str:
    """Lines for cron."""
    command = night.command.replace("%", r"\%")
    return _filled(
        "geoseg-nightly.crontab",
        {
            f"CRON_TZ={_EXAMPLE_TIMEZONE}\n": f"CRON_TZ={night.when.timezone}\n",
            f"{_EXAMPLE_CRON} geoseg": f"{night.when.cron} geoseg",
            f" {_EXAMPLE_COMMAND}\n": f" {command}\n",
        },
    )


def airflow(night: Night) -> str:
    """A file for Airflow's folder of DAGs."""
    return _filled(
        "geoseg_nightly_dag.py",
        {
            f'CRON = "{_EXAMPLE_CRON}"': f"CRON = {json.dumps(night.when.cron)}",
            f'TIMEZONE = "{_EXAMPLE_TIMEZONE}"': f"TIMEZONE = {json.dumps(night.when.timezone)}",
            f'COMMAND = "{_EXAMPLE_COMMAND}"': f"COMMAND = {json.dumps(night.command)}",
        },
    )


SCHEDULERS: dict[str, Callable[[Night], str]] = {
    "kubernetes": kubernetes,
    "systemd": systemd,
    "crontab": crontab,
    "airflow": airflow,
}


def _example(name: str) -> str:
    """A file of ``infra/``: of the checkout, or as it was put into the wheel."""
    installed = Path(__file__).parent / "_infra"
    folder = installed if installed.is_dir() else Path(__file__).parents[1] / "infra"
    return (folder / name).read_text(encoding="utf-8")


def _documents(name: str) -> list[Any]:
    return [document for document in yaml.safe_load_all(_example(name)) if document is not None]


def _filled(name: str, changes: dict[str, str]) -> str:
    text = _example(f"schedulers/{name}")
    for there, wanted in changes.items():
        assert text.count(there) == 1, f"{name} no longer says {there}"
        text = text.replace(there, wanted)
    return text


class _Blocks(yaml.SafeDumper):  # type: ignore[misc]
    """Writes texts of several lines as such, so that a person can read the job file in the manifest."""


def _text(dumper: yaml.SafeDumper, text: str) -> Any:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Blocks.add_representer(str, _text)
