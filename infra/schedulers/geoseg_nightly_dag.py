"""An Airflow DAG (Airflow 3): every night, masks of the scenes that are new or changed."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

from airflow.providers.standard.operators.bash import BashOperator
from airflow.sdk import DAG
from airflow.timetables.trigger import CronTriggerTimetable

CRON = "0 2 * * *"
TIMEZONE = "Etc/UTC"
COMMAND = "geoseg nightly /etc/geoseg/nightly.toml"

with DAG(
    dag_id="geoseg_nightly",
    schedule=CronTriggerTimetable(CRON, timezone=TIMEZONE),
    start_date=datetime(2026, 1, 1, tzinfo=timezone.utc),
    catchup=False,  # a run takes whatever is missing, so nights that were missed need no runs of their own
    max_active_runs=1,
    tags=["geoseg"],
):
    BashOperator(
        task_id="nightly",
        bash_command=COMMAND,
        append_env=True,  # credentials come from the worker's own environment or role, not from the DAG
        retries=2,  # what is published already is left alone
        retry_delay=timedelta(minutes=10),
        execution_timeout=timedelta(hours=10),
        skip_on_exit_code=5,  # another run is at work on the same output
    )
