"""The dashboard and the alerts ask for what geoseg exports, by its names and labels, in words that Prometheus takes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from geoseg.cluster.metrics import COUNTERS

promql = pytest.importorskip("promql_parser", reason="get it with: pip install promql-parser")

GRAFANA = Path(__file__).resolve().parents[2] / "infra" / "grafana"
OURS = {f"ray_{name}_total": {"run", *labels} for name, (_, labels) in COUNTERS.items()}
OF_KUBE_STATE_METRICS = {"kube_job_status_failed", "kube_cronjob_status_last_successful_time"}


def dashboard() -> dict[str, Any]:
    return json.loads((GRAFANA / "geoseg.json").read_text())


def rules() -> list[dict[str, Any]]:
    return [
        rule for group in yaml.safe_load((GRAFANA / "alerts.yaml").read_text())["groups"] for rule in group["rules"]
    ]


def questions() -> Iterator[str]:
    for panel in dashboard()["panels"]:
        for target in panel["targets"]:
            yield target["expr"].replace("$__range", "1h").replace("$run", ".*")
    for rule in rules():
        yield rule["expr"]


def asked(expression: str) -> Iterator[tuple[str, set[str]]]:
    """Each series of a question, with the labels that it is chosen by."""
    told = promql.parse(expression).prettify()
    for name, _, matchers in re.findall(r"\b((?:ray|kube)_\w+)(\{([^}]*)\})?", told):
        yield name, set(re.findall(r"(\w+)\s*[=!]~?\s*\"", matchers))


def test_every_series_is_exported_under_that_name_with_those_labels() -> None:
    series = [each for question in questions() for each in asked(question)]
    for name, labels in series:
        assert name in OURS or name in OF_KUBE_STATE_METRICS, name
        assert labels <= OURS.get(name, {"namespace", "job_name", "cronjob"}), name
    assert {name for name, _ in series} >= set(OURS), "nothing is exported that no one looks at"


def test_sums_are_over_labels_that_are_there() -> None:
    for question in questions():
        for labels in re.findall(r"by \(([^)]*)\)", question):
            known = {"job_name"} if "kube_" in question else set().union(*(OURS[name] for name, _ in asked(question)))
            assert set(labels.split(", ")) <= known, question


def test_a_wrong_word_is_seen() -> None:
    with pytest.raises(ValueError, match="unclosed left parenthesis"):
        promql.parse("sum by (run (rate(ray_geoseg_pixels_total[2m]))")


def test_panels_can_be_read() -> None:
    told = dashboard()
    assert len({panel["id"] for panel in told["panels"]}) == len(told["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in told["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, f"{panel['title']} lies over another"
        assert max(x for x, _ in cells) < 24
        taken |= cells
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["description"], panel["title"]
        assert {target["datasource"]["uid"] for target in panel["targets"]} == {"${datasource}"}
    assert {variable["name"] for variable in told["templating"]["list"]} == {"datasource", "run"}


def test_alerts_say_what_to_do() -> None:
    for rule in rules():
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert len(rule["annotations"]["summary"]) > 40
