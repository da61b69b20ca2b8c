"""Three nights and a new bundle on the real object store, with sixty scenes cut from real imagery."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import rasterio
from kit.data import cut_scenes

from geoseg.config import load_job
from geoseg.model.bundle import Bundle
from geoseg.nightly import run_nightly
from geoseg.predict.bundles import load_bundle, save_bundle
from geoseg.predict.record import RunReport, read_record
from geoseg.predict.verify import verify_output
from geoseg.raster import store

pytestmark = [pytest.mark.bucket, pytest.mark.slow, pytest.mark.chaos]


def other_bundle(uri: str) -> str:
    """Save the bundle that ships, as one that wants more before it calls something a building."""
    bundle = load_bundle("roads-buildings")
    classes = [
        one.model_copy(update={"threshold": 0.6 if one.name == "building" else one.threshold})
        for one in bundle.description.classes
    ]
    description = bundle.description.model_copy(update={"name": "roads-buildings-2", "classes": tuple(classes)})
    save_bundle(Bundle(description=description, weights=bundle.weights), uri)
    return uri


def results(bucket: str) -> dict[str, str]:
    """ETag of each object of the output, without the records of runs and the lease."""
    return {
        info.uri: info.etag
        for info in store.walk(f"s3://{bucket}/masks/")
        if "/_geoseg/runs/" not in info.uri and not info.uri.endswith("/_geoseg/lease.json")
    }


def test_three_nights_and_a_new_bundle(bucket: str, tmp_path: Path) -> None:
    scenes = cut_scenes(tmp_path, 63)
    first, later = scenes[:60], scenes[60:]

    def put(name: str, path: Path) -> None:
        store.write(f"s3://{bucket}/in/{name}.tif", path.read_bytes())

    def night(**values: str) -> RunReport:
        told = {"scenes": [f"s3://{bucket}/in/"], "out": f"s3://{bucket}/masks", "cluster": {"engine": "local"}}
        return run_nightly(load_job(None, {**told, **values}), quiet=True)

    def reasons(report: RunReport) -> dict[str, int]:
        told = read_record(report.out, report.run_id)["reasons"]
        assert isinstance(told, dict)
        return told

    for path in first:
        put(path.stem, path)
    one = night()
    assert (one.counts, reasons(one)) == ({"published": 60}, {"new": 60}), [s.sentence for s in one.scenes]
    assert one.windows == 60

    for path in later:
        put(path.stem, path)
    changed = sorted(path.stem for path in first)[10:12]
    for name in changed:
        with rasterio.open(tmp_path / f"{name}.tif", "r+") as scene:
            scene.write(np.clip(scene.read().astype(int) + 5, 0, 255).astype(np.uint8))
        put(name, tmp_path / f"{name}.tif")
    two = night()
    assert (two.counts, reasons(two)) == (
        {"published": 5, "unchanged": 58},
        {"new": 3, "source changed": 2},
    ), [scene.sentence for scene in two.scenes]
    assert two.windows == 5
    assert sorted(scene.id for scene in two.scenes if scene.reasons == ("source changed",)) == changed

    before = results(bucket)
    three = night()
    assert (three.counts, three.windows, three.gpu_hours, three.cpu_hours) == ({"unchanged": 63}, 0, 0.0, 0.0)
    assert results(bucket) == before, "no new object, none changed"

    four = night(bundle=other_bundle(f"s3://{bucket}/bundles/2"))
    assert (four.counts, reasons(four)) == ({"published": 63}, {"bundle changed": 63}), [
        s.sentence for s in four.scenes
    ]
    verified = verify_output(f"s3://{bucket}/masks")
    assert (verified.num_items, verified.faults) == (63, ())
