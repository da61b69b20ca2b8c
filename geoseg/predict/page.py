"""The page of a run, for people: from its record and a few pictures to one HTML file that loads nothing from anywhere."""

from __future__ import annotations

import base64
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, StrictUndefined, Template

from geoseg.predict.failure import Failure, attempt
from geoseg.predict.parts import WORK_FOLDER
from geoseg.predict.plan import RunSpec
from geoseg.predict.record import RECORD_NAME, RUNS_FOLDER, RunReport
from geoseg.predict.scene_map import OUTCOMES, MappedScene, draw_map
from geoseg.predict.thumbnails import Thumbnail, thumbnails_of
from geoseg.progress import duration
from geoseg.raster import store

PAGE_NAME = "report.html"
_TILES = ("published", "unchanged", "held", "refused", "failed", "gone", "removed")
_BAD = OUTCOMES[:3]
_MOST_SHOWN, _MOST_ROWS, _MOST_IDS, _MOST_SLOW, _MOST_LINES = 15, 200, 8, 10, 30
_LONGEST_SENTENCE, _LONGEST_JOB = 600, 20_000
_KINDS = {"nightly": "Nightly run", "predict": "Prediction", "retry": "Retry", "release": "Release"}
_VERDICTS = {
    0: ("good", "All scenes stand"),
    1: ("some", "Some scenes were held back, refused or failed"),
    3: ("bad", "Not one scene could be read"),
    4: ("bad", "Every scene was denied"),
    130: ("some", "A signal ended the run before all was done"),
}


def page_uri(out: str, run_id: str) -> str:
    """Where the page of a run is."""
    return store.join(out, WORK_FOLDER, RUNS_FOLDER, run_id, PAGE_NAME)


def write_page(report: RunReport, record: Mapping[str, Any], run: RunSpec, standing: Mapping[str, str]) -> RunReport:
    """Write the page of a run beside its record; the report says where, or why not: a run never fails by its page.

    ``standing`` has the footprints of the unchanged scenes that the record does not list, by id.
    """
    uri = page_uri(report.out, report.run_id)

    def write() -> None:
        body = render(record, thumbnails_of(report.scenes, run), standing)
        store.write(uri, body, content_type="text/html; charset=utf-8")

    done = attempt(write, store.redact(uri), "writing the page")
    if isinstance(done, Failure):
        return replace(report, remarks=(*report.remarks, done.sentence))
    return replace(report, page=store.redact(uri))


def render(record: Mapping[str, Any], pictures: Sequence[Thumbnail], standing: Mapping[str, str]) -> bytes:
    """The page of a run from its record (redacted, as it is written); the same arguments give the same bytes."""
    scenes, counts, figures = record["scenes"], record["counts"], record["figures"]
    by_id = {scene["id"]: scene for scene in scenes}
    causes = _causes(scenes)
    slow = sorted((one for one in scenes if one["seconds"]), key=lambda one: (-one["seconds"], one["id"]))
    verdict, told = _VERDICTS.get(record["exit_code"], ("bad", "The run ended badly"))
    return (
        _template()
        .render(
            title=_KINDS.get(record["kind"], record["kind"]),
            record=record,
            record_name=RECORD_NAME,
            out=record["job"]["out"],
            verdict=verdict,
            verdict_text=told,
            took=duration(figures["listing_s"] + figures["startup_s"] + figures["working_s"]),
            tiles=[(name, counts.get(name, 0)) for name in _TILES],
            shares=[(name, counts.get(name, 0)) for name in _TILES[:5] if counts.get(name, 0)],
            causes=[causes[:_MOST_SHOWN], causes[_MOST_SHOWN:_MOST_ROWS]],
            num_more_causes=len(causes[_MOST_ROWS:]),
            gone=record["gone"][:_MOST_ROWS],
            num_more_gone=len(record["gone"][_MOST_ROWS:]),
            remarks=[_clipped(sentence) for sentence in record["remarks"][:_MOST_LINES]],
            num_more_remarks=len(record["remarks"][_MOST_LINES:]),
            map=draw_map(_mapped(record, standing)),
            outcomes=OUTCOMES,
            pictures=[_picture(one, by_id[one.id]) for one in pictures if one.image or one.mask],
            slow=[_row(one) for one in slow[:_MOST_SLOW]],
            figures=_figures(figures),
            job=_clipped(json.dumps(record["job"], indent=1), _LONGEST_JOB),
        )
        .encode()
    )


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(Path(__file__).with_name("page.html").read_text())


def _mapped(record: Mapping[str, Any], standing: Mapping[str, str]) -> list[MappedScene]:
    looked_at = [MappedScene(one["id"], one["status"], one["footprint"]) for one in record["scenes"]]
    gone = [MappedScene(one["id"], "removed" if one["removed"] else "gone", one["footprint"]) for one in record["gone"]]
    unseen = [MappedScene(scene_id, "unchanged", footprint) for scene_id, footprint in standing.items()]
    return [*looked_at, *gone, *unseen]


def _row(scene: Mapping[str, Any]) -> dict[str, Any]:
    """A scene's line in a table."""
    return {
        "id": scene["id"],
        "status": scene["status"],
        "reasons": ", ".join(scene["reasons"]),
        "seconds": f"{scene['seconds']:,.1f}",
        "area": f"{scene['area_km2']:,.3g}" if scene["area_km2"] else "",
        "item": _item_href(scene),
    }


def _causes(scenes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What keeps scenes from being published, and which: those of one cause together, the most first in each outcome."""
    together: dict[tuple[str, str], list[str]] = defaultdict(list)
    for one in scenes:
        if one["status"] in _BAD:
            together[one["status"], str(one["sentence"]).removeprefix(f"{one['id']}: ")].append(one["id"])
    ordered = sorted(together.items(), key=lambda item: (_BAD.index(item[0][0]), -len(item[1]), item[0][1], item[1]))
    return [
        {"status": status, "sentence": _clipped(sentence), "num": len(ids), "ids": sorted(ids)[:_MOST_IDS]}
        for (status, sentence), ids in ordered
    ]


def _item_href(scene: Mapping[str, Any]) -> str:
    """Where a scene's item is, from the page's own place; "" when none stands."""
    return f"../../../{quote(scene['id'], safe='')}/{store.base_name(scene['item'])}" if scene["item"] else ""


def _picture(one: Thumbnail, scene: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **_row(scene),
        "image": _data_uri("image/jpeg", one.image),
        "mask": _data_uri("image/png", one.mask),
    }


def _data_uri(media: str, body: bytes) -> str:
    return f"data:{media};base64,{base64.b64encode(body).decode()}" if body else ""


def _figures(told: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values with their units."""
    working_s, mpx = told["working_s"], told["pixels"] / 1e6
    return [
        ("ground", f"{told['area_km2']:,.3g} km²"),
        ("ground in an hour", f"{told['km2_per_h']:,.3g} km²/h"),
        ("pixels", f"{mpx:,.1f} Mpx"),
        ("pixels in a second", f"{mpx / working_s:,.2f} Mpx/s"),
        ("windows", f"{told['windows']:,}"),
        ("read", f"{told['bytes_read'] / 1e6:,.1f} MB"),
        ("GPU hours", f"{told['gpu_hours']:,.3f}"),
        ("CPU hours", f"{told['cpu_hours']:,.3f}"),
        ("listing", f"{told['listing_s']:,.1f} s"),
        ("start-up", f"{told['startup_s']:,.1f} s"),
        ("working", f"{working_s:,.1f} s"),
        ("engine", str(told["engine"])),
    ]


def _clipped(text: str, longest: int = _LONGEST_SENTENCE) -> str:
    return text if len(text) <= longest else text[:longest].rstrip() + " …"
