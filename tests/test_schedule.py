"""What `geoseg schedule` prints is what is checked in infra/, with the job and the time in it."""

from __future__ import annotations

import ast
import shutil
import subprocess
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from geoseg.cli import main
from geoseg.errors import ConfigError
from geoseg.jobfile import load_job_file
from geoseg.schedule import SCHEDULERS, Night, When

INFRA = Path(__file__).resolve().parents[1] / "infra"
JOB = 'scenes = ["s3://imagery/"]  # new ones\nout = "s3://masks/2026"\n'


def night(
    folder: Path, *, cron: str = "30 3 * * 1-5", timezone: str = "Europe/Zurich", text: str = JOB, **where: str
) -> Night:
    path = folder / "a job.toml"
    path.write_text(text)
    return Night(job=load_job_file(str(path), folder=folder), path=path, when=When(cron, timezone), **where)


def test_the_examples_are_what_is_printed_for_their_own_time_and_job() -> None:
    """One source: nothing of the examples is lost or added."""
    example = yaml.safe_load((INFRA / "kubernetes" / "nightly" / "job.yaml").read_text())["data"]["job.toml"]
    path = Path("/etc/geoseg/nightly.toml")
    job = load_job_file_of(example)
    told = Night(job=job, path=path, when=When("0 2 * * *", "Etc/UTC"), image="geoseg", namespace="geoseg")
    read = {name: (INFRA / "schedulers" / name).read_text() for name in SCHEDULER_FILES}
    assert SCHEDULERS["systemd"](told) == read["geoseg-nightly.service"] + "\n" + read["geoseg-nightly.timer"]
    assert SCHEDULERS["crontab"](told) == read["geoseg-nightly.crontab"]
    assert SCHEDULERS["airflow"](told) == read["geoseg_nightly_dag.py"]
    config, cron_job = yaml.safe_load_all(SCHEDULERS["kubernetes"](told))
    for printed, name in ((config, "job.yaml"), (cron_job, "cronjob.yaml")):
        assert printed["metadata"].pop("namespace") == "geoseg"
        assert printed == yaml.safe_load((INFRA / "kubernetes" / "nightly" / name).read_text())


SCHEDULER_FILES = ("geoseg-nightly.service", "geoseg-nightly.timer", "geoseg-nightly.crontab", "geoseg_nightly_dag.py")


def load_job_file_of(text: str):
    from geoseg.jobfile import JobFile

    return JobFile("nightly.toml", text, {})


def test_kubernetes_gets_the_job_and_its_files(tmp_path: Path) -> None:
    (tmp_path / "town.geojson").write_text('{"type": "FeatureCollection", "features": []}\n')
    (tmp_path / "weights.bin").write_bytes(b"\xff\xfe\x00")
    text = JOB + 'bundle = "weights.bin"\n[predict]\naoi = "town.geojson"\n'
    told = night(tmp_path, text=text, image="registry/geoseg:1", namespace="maps")
    config, cron_job = yaml.safe_load_all(SCHEDULERS["kubernetes"](told))
    assert config["data"] == {"job.toml": text, "town.geojson": (tmp_path / "town.geojson").read_text()}
    assert config["binaryData"] == {"weights.bin": "//4A"}
    assert (cron_job["spec"]["schedule"], cron_job["spec"]["timeZone"]) == ("30 3 * * 1-5", "Europe/Zurich")
    pod = cron_job["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["image"] == "registry/geoseg:1"
    assert pod["containers"][0]["command"][-1] == "Europe/Zurich"
    assert {each["metadata"]["namespace"] for each in (config, cron_job)} == {"maps"}
    kubernetes_validate = pytest.importorskip(
        "kubernetes_validate", reason="get it with: pip install kubernetes-validate"
    )
    for document in (config, cron_job):
        kubernetes_validate.validate(document, "1.34", strict=True)


def test_systemd_gets_a_service_and_a_timer(tmp_path: Path) -> None:
    printed = SCHEDULERS["systemd"](night(tmp_path, address="http://head:8265"))
    assert f"ExecStart=geoseg submit '{tmp_path}/a job.toml' --address http://head:8265\n" in printed
    assert "OnCalendar=Mon,Tue,Wed,Thu,Fri *-*-* 3:30:00 Europe/Zurich\n" in printed
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not on this machine; get it with: apt-get install systemd")
    service, timer = printed.split("# /etc/systemd/system/geoseg-nightly.timer\n")
    service = service.replace("ExecStart=geoseg", "ExecStart=/bin/true").replace("User=geoseg", "User=root")
    (tmp_path / "geoseg-nightly.service").write_text(service)
    (tmp_path / "geoseg-nightly.timer").write_text(timer)
    units = [str(tmp_path / f"geoseg-nightly.{kind}") for kind in ("service", "timer")]
    command = ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", *units]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "geoseg-nightly" not in done.stderr, done.stderr


def test_a_unit_may_write_where_the_job_does_and_sees_no_home(tmp_path: Path) -> None:
    on_disk = f'scenes = ["{tmp_path}/in/"]\nout = "/data/my masks 5%"\n'
    printed = SCHEDULERS["systemd"](night(tmp_path, text=on_disk))
    assert 'ReadWritePaths="/data/my masks 5%%"\n' in printed
    assert "ReadWritePaths" not in SCHEDULERS["systemd"](night(tmp_path))
    with pytest.raises(ConfigError, match=r"the program is /home/anna/\.venv/bin/geoseg, and the unit sees no home"):
        SCHEDULERS["systemd"](night(tmp_path, program="/home/anna/.venv/bin/geoseg"))
    with pytest.raises(ConfigError, match=r"the job file is /root/a job\.toml"):
        SCHEDULERS["systemd"](replace(night(tmp_path), path=Path("/root/a job.toml")))


@pytest.mark.parametrize(
    ("cron", "calendar"),
    [
        ("0 2 * * *", "*-*-* 2:0:00"),
        ("*/20 1-3 * * *", "*-*-* 1,2,3:0,20,40:00"),
        ("5 4 1,15 * *", "*-*-1,15 4:5:00"),
        ("0 22 * 6-8 0", "Sun *-6,7,8-* 22:0:00"),
        ("0 22 * * 7", "Sun *-*-* 22:0:00"),
        ("* * * * *", "*-*-* *:*:00"),
    ],
)
def test_a_timer_says_what_cron_says(cron: str, calendar: str) -> None:
    assert When(cron, "Etc/UTC").on_calendar() == f"{calendar} Etc/UTC"
    if shutil.which("systemd-analyze"):
        subprocess.run(
            ["systemd-analyze", "calendar", f"{calendar} Etc/UTC"], check=True, capture_output=True, timeout=60
        )


def test_either_of_two_days_is_more_than_a_timer_can_say() -> None:
    with pytest.raises(ConfigError, match="name one of them"):
        When("0 2 13 * 5", "Etc/UTC").on_calendar()


def test_crontab_and_airflow_get_the_command(tmp_path: Path) -> None:
    told = night(tmp_path)
    lines = SCHEDULERS["crontab"](told).splitlines()
    assert "CRON_TZ=Europe/Zurich" in lines
    assert lines[-1].startswith("30 3 * * 1-5 geoseg flock ")
    assert lines[-1].endswith(f" geoseg nightly '{tmp_path}/a job.toml'")
    dag = ast.parse(SCHEDULERS["airflow"](told))
    constants = {node.targets[0].id: node.value.value for node in dag.body if isinstance(node, ast.Assign)}
    assert constants == {
        "CRON": "30 3 * * 1-5",
        "TIMEZONE": "Europe/Zurich",
        "COMMAND": f"geoseg nightly '{tmp_path}/a job.toml'",
    }


@pytest.mark.parametrize(
    "cron",
    [
        "", "0 2 * *", "61 2 * * *", "0 2 * * * *", "@daily", "0 2 31 2 *", "0 2 * * L", "0 2 * * MON#1", "0 2 * * 5L", "0 2 L * *",
        "0 2 LW * *", "0 2 * * MONDAY",
    ],
)  # fmt: skip
def test_a_time_that_not_all_schedulers_take_is_refused(cron: str) -> None:
    with pytest.raises(ConfigError, match="--cron"):
        When(cron, "Etc/UTC")


@pytest.mark.parametrize("timezone", ["Europe/Zürich", "CETT", "../etc/passwd", ""])
def test_a_time_zone_that_is_none_is_refused(timezone: str) -> None:
    with pytest.raises(ConfigError, match="--timezone"):
        When("0 2 * * *", timezone)


def test_an_hour_that_summer_time_jumps_over_is_told() -> None:
    since, jumped = datetime(2026, 11, 27), datetime(2027, 3, 28, 2)  # noqa: DTZ001 - clocks on walls
    assert When("0 2 * * *", "Europe/Zurich").skipped(since) == jumped
    assert When("0 4 * * *", "Europe/Zurich").skipped(since) is None
    assert When("0 2 * * *", "Etc/UTC").skipped(since) is None


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--image"):
        SCHEDULERS["kubernetes"](night(tmp_path))
    (tmp_path / "areas").mkdir()
    (tmp_path / "areas" / "town.geojson").write_text("{}")
    deeper = night(tmp_path, text=JOB + '[predict]\naoi = "areas/town.geojson"\n', image="x")
    with pytest.raises(ConfigError, match="has no folders"):
        SCHEDULERS["kubernetes"](deeper)
    with pytest.raises(ConfigError, match="by a relative path"):
        SCHEDULERS["crontab"](deeper)
    (tmp_path / "large.txt").write_text("x" * (1 << 20))
    with pytest.raises(ConfigError, match="more than a ConfigMap holds"):
        SCHEDULERS["kubernetes"](night(tmp_path, text='scenes = ["large.txt"]\nout = "s3://m/x"\n', image="x"))


def test_the_command_prints_and_warns(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text(JOB)
    arguments = ["schedule", str(tmp_path / "job.toml"), "--cron", "0 2 * * *", "--timezone", "Europe/Zurich"]
    done = CliRunner().invoke(main, [*arguments, "--image", "registry/geoseg:1"])
    assert done.exit_code == 0, done.output
    assert "timeZone: Europe/Zurich" in done.stdout
    assert "there is no 02:00 on" in done.stderr
    (tmp_path / "job.toml").write_text(JOB + 'aws_secret_access_key = "abcdefghijkl"\n')
    refused = CliRunner().invoke(main, [*arguments, "--as", "crontab"])
    assert refused.exit_code == 2
    assert "abcdefghijkl" not in refused.output
