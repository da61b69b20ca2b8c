"""Real imagery, folder to folder and bucket to bucket: each mask lies where its scene lies and hides what is not data."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import numpy as np
import pystac
import pytest
import rasterio
from kit.data import data_folder
from pystac.extensions.classification import ClassificationExtension
from pystac.extensions.file import FileExtension
from pystac.extensions.mlm import AssetGeneralMLMExtension, MLMExtension
from pystac.extensions.projection import ProjectionExtension
from pystac.extensions.raster import RasterExtension
from rio_cogeo import cog_validate

import geoseg
import geoseg.errors
import geoseg.run
from geoseg.predict.bundles import load_bundle
from geoseg.predict.verify import verify_output
from geoseg.raster import store

SOURCES = ("hot_buildings/*_z20.tif", "dubai/dubai_2.tif", "inria_austin/austin.tif")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def files() -> list[Path]:
    folder = data_folder()
    return sorted(path for source in SOURCES for path in folder.glob(source))


@pytest.fixture(scope="module")
def from_folder(files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> geoseg.run.RunReport:
    out = tmp_path_factory.mktemp("masks")
    return geoseg.predict([str(file) for file in files], str(out), engine="local")


def test_each_mask_lies_where_its_scene_lies(files: list[Path], from_folder: geoseg.run.RunReport) -> None:
    assert [scene.status for scene in from_folder.scenes] == ["published"] * len(files) == ["published"] * 5
    by_uri = {scene.uri: scene for scene in from_folder.scenes}
    for file in files:
        with rasterio.open(file) as source, rasterio.open(by_uri[str(file)].mask) as mask:
            assert mask.crs == source.crs
            assert mask.transform == source.transform
            assert mask.shape == source.shape
            assert mask.nodata == 255
            assert mask.colormap(1)[1] == (230, 85, 60, 255)
            assert mask.tags()["CLASS_2"] == "road"
            for _, window in source.block_windows(1):
                codes = mask.read(1, window=window)
                np.testing.assert_array_equal(codes == 255, source.dataset_mask(window=window) == 0)
                assert set(np.unique(codes)) <= {0, 1, 2, 255}


def test_each_mask_is_a_strict_cog(from_folder: geoseg.run.RunReport) -> None:
    for scene in from_folder.scenes:
        assert cog_validate(scene.mask, strict=True) == (True, [], [])


def test_each_item_validates(from_folder: geoseg.run.RunReport) -> None:
    for scene in from_folder.scenes:
        item = pystac.Item.from_file(scene.item)
        pystac.validation.validate_dict(item.to_dict(), extensions=[])  # the extensions' schemas are on the network
        mask = item.assets["mask"]
        with rasterio.open(scene.mask) as dataset:
            assert ProjectionExtension.ext(item).shape == list(dataset.shape)
            assert ProjectionExtension.ext(item).transform == list(dataset.transform)[:6]
            assert ProjectionExtension.ext(item).code == f"EPSG:{dataset.crs.to_epsg()}"
        assert RasterExtension.ext(mask).bands[0].nodata == 255
        assert [one.name for one in ClassificationExtension.ext(mask).classes] == [
            "background",
            "building",
            "road",
            "nodata",
        ]
        assert FileExtension.ext(mask).size == Path(scene.mask).stat().st_size
        assert MLMExtension.ext(item).architecture == "unet"
        # What MLM 1.4 asks beyond its fields: the model is an asset of the item and names the bands of its input.
        (model,) = (asset for asset in item.assets.values() if asset.has_role("mlm:model"))
        assert AssetGeneralMLMExtension.ext(model).artifact_type == "safetensors"
        assert [band["name"] for band in model.extra_fields["raster:bands"]] == ["red", "green", "blue"]
        kept = load_bundle(str(Path(model.get_absolute_href()).parent))
        assert kept.digest == item.properties["geoseg:bundle"]["sha256"], "the bundle can be run again from there"
    assert verify_output(from_folder.out).faults == ()


def test_a_second_run_publishes_nothing_and_reads_no_pixel(
    files: list[Path], from_folder: geoseg.run.RunReport
) -> None:
    before = {
        path: path.stat().st_mtime_ns for path in Path(from_folder.out).rglob("*.*") if "_geoseg" not in path.parts
    }
    again = geoseg.predict([str(file) for file in files], from_folder.out, engine="local")
    assert [scene.status for scene in again.scenes] == ["unchanged"] * 5
    assert [scene.mask for scene in again.scenes] == [scene.mask for scene in from_folder.scenes]
    assert (again.bytes_read, again.pixels) == (0, 0)
    after = {
        path: path.stat().st_mtime_ns for path in Path(from_folder.out).rglob("*.*") if "_geoseg" not in path.parts
    }
    assert after == before


@pytest.mark.thorough
@pytest.mark.bucket
@pytest.mark.ray
@pytest.mark.usefixtures("no_ray_yet")
def test_ray_from_bucket_to_bucket_gives_the_same_masks(
    files: list[Path], from_folder: geoseg.run.RunReport, bucket: str
) -> None:
    for file in files:
        store.write(f"s3://{bucket}/in/{file.name}", file.read_bytes())
    settings = {"engine": "ray", "workers": 2}
    report = geoseg.predict(f"s3://{bucket}/in/", f"s3://{bucket}/out", **settings)
    assert [scene.status for scene in report.scenes] == ["published"] * 5, report.scenes
    masks = {scene.id: Path(scene.mask).read_bytes() for scene in from_folder.scenes}
    assert {scene.id: store.read(scene.mask) for scene in report.scenes} == masks
    checked = verify_output(f"s3://{bucket}/out")
    assert (checked.num_items, checked.faults, checked.orphans) == (5, (), ())
    assert not list(store.walk(f"s3://{bucket}/out/_geoseg/parts"))

    standing = {info.uri: info.etag for info in store.walk(f"s3://{bucket}/out") if "/_geoseg/" not in info.uri}
    again = geoseg.predict(f"s3://{bucket}/in/", f"s3://{bucket}/out", engine="local")
    assert [scene.status for scene in again.scenes] == ["unchanged"] * 5
    assert again.bytes_read == 0
    assert {info.uri: info.etag for info in store.walk(f"s3://{bucket}/out") if "/_geoseg/" not in info.uri} == standing

    secret = os.environ["AWS_SECRET_ACCESS_KEY"].encode()
    for info in store.walk(f"s3://{bucket}/out"):
        assert secret not in store.read(info.uri), f"{info.uri} holds the secret key"


@pytest.mark.bucket
def test_a_changed_scene_and_a_changed_bundle_are_done_anew(files: list[Path], bucket: str, tmp_path: Path) -> None:
    from kit.oracle import seeded_bundle

    austin = next(file for file in files if file.name == "austin.tif")
    scene, out = f"s3://{bucket}/in/a.tif", f"s3://{bucket}/out"
    store.write(scene, austin.read_bytes())
    first = geoseg.predict(scene, out, engine="local").scenes[0]
    other = geoseg.predict(scene, out, engine="local", bundle=str(seeded_bundle(tmp_path / "bundle"))).scenes[0]
    assert (first.status, other.status) == ("published", "published")
    assert first.mask != other.mask
    with rasterio.open(austin) as dataset, io.BytesIO() as changed:
        pixels, profile = dataset.read(), dataset.profile
        pixels[:, 300:600, 300:600] = 0
        with rasterio.MemoryFile() as memory:
            with memory.open(**profile) as copy:
                copy.write(pixels)
            changed.write(memory.getbuffer())
        store.write(scene, changed.getvalue())
    third = geoseg.predict(scene, out, engine="local").scenes[0]
    assert third.status == "published"
    assert third.mask not in (first.mask, other.mask)
    item = json.loads(store.read(third.item))
    assert item["assets"]["mask"]["href"] == f"./{store.base_name(third.mask)}"
    assert verify_output(out).faults == ()


@pytest.mark.bucket
@pytest.mark.parametrize("wrong", ["secret", "bucket"])
def test_a_wrong_key_or_bucket_ends_the_run_with_its_exit_code(
    wrong: str, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = bucket
    if wrong == "secret":
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not the secret")
    else:
        target = "no-such-bucket-at-all"
    with pytest.raises(geoseg.errors.StopError) as caught:
        geoseg.predict(f"s3://{target}/in/", f"s3://{target}/out", engine="local")
    assert caught.value.exit_code == (4 if wrong == "secret" else 2)
    assert "access denied" in str(caught.value) or "no such bucket" in str(caught.value)
