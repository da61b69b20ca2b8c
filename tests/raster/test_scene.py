"""Which objects are scenes, and under which ids: by file, folder, prefix, glob and list, on a folder and a real bucket."""

from __future__ import annotations

import json
import re

import boto3
import pytest

from geoseg.errors import AccessDeniedError, ConfigError, NothingReadableError, SceneDeniedError
from geoseg.raster import store
from geoseg.raster.geotiff import ReadOptions, describe
from geoseg.raster.scene import list_scenes

TREE = ["a.tif", "b.TIF", "c.tiff", "d.GTiff", "e.cog", "f.jp2", "g.tif.aux.xml", "s/a.tif", "s/t/b.tif", ".x.tif"]


def fill(root: str, *names: str) -> None:
    for name in names:
        store.write(f"{root}/{name}", b"1")


def listed(root: str, *sources: str, out: str | None = None) -> dict[str, str]:
    """Name below the root and id of each scene."""
    refs = list_scenes([f"{root}/{source}" for source in sources], out=out)
    assert [ref.uri for ref in refs] == sorted({ref.uri for ref in refs})
    assert len({ref.id.lower() for ref in refs}) == len(refs)
    return {ref.uri.removeprefix(f"{root}/"): ref.id for ref in refs}


@pytest.mark.parametrize("source", ["in", "in/", "", "/"])
def test_a_folder_prefix_or_bucket_holds_its_scenes(source: str, root: str) -> None:
    at = "in/" if "in" in source else ""
    fill(root, *(at + name for name in TREE))
    if at:
        fill(root, "in2/z.tif", "in.tif")
    refs = list_scenes([f"{root}/{source}" if source not in ("", "/") else root + source])
    assert {ref.uri.removeprefix(f"{root}/{at}"): ref.id for ref in refs} == {
        "a.tif": "a",
        "b.TIF": "b",
        "c.tiff": "c",
        "d.GTiff": "d",
        "e.cog": "e",
        "s/a.tif": "s-a",
        "s/t/b.tif": "s-t-b",
    }


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("in/a.tif", ["in/a.tif"]),
        ("in/f.jp2", ["in/f.jp2"]),
        ("in/.x.tif", ["in/.x.tif"]),
        ("in/*.tif", ["in/.x.tif", "in/a.tif", "in/s/a.tif", "in/s/t/b.tif"]),
        ("in/?.tif", ["in/a.tif"]),
        ("in/[ab].[tT][iI][fF]", ["in/a.tif", "in/b.TIF"]),
        ("in/[!a].t*", ["in/c.tiff", "in/g.tif.aux.xml"]),
        ("in/s/*/b.tif", ["in/s/t/b.tif"]),
        ("i*/a.tif", ["in/a.tif", "in/s/a.tif"]),
        ("*.jp2", ["in/f.jp2"]),
    ],
)
def test_a_file_or_glob_names_its_scenes(source: str, names: list[str], root: str) -> None:
    fill(root, *(f"in/{name}" for name in TREE))
    assert list(listed(root, source)) == names


@pytest.mark.parametrize("name", ["a[1].tif", "a*.tif", "a?.tif", "x[1]/b.tif", "a b#c%20?.tif", "é.tif"])
def test_a_name_that_exists_is_taken_as_it_is(name: str, root: str) -> None:
    fill(root, name, "a1.tif", "x1/b.tif")
    assert list(listed(root, name)) == [name]
    if "/" in name:
        assert listed(root, "x[1]") == listed(root, "x[1]/") == {name: "b"}


def test_a_list_names_files_folders_and_globs(root: str) -> None:
    fill(root, "a.tif", "b#c.tif", "d e.tif", "s/f.tif", "s/g.tif", "t1.tif", "t2.tif")
    lines = [
        "\ufeff# scenes",
        f"  {root}/a.tif  ",
        "",
        f"{root}/b#c.tif",
        f"{root}/d e.tif # why",
        f"{root}/s/",
        f"{root}/t?.tif",
    ]
    store.write(f"{root}/LIST.txt", "\r\n".join(lines).encode())
    expected = {"a.tif": "a", "b#c.tif": "b-c-d31c2a74", "d e.tif": "d-e-ec2e8e11", "s/f.tif": "f", "s/g.tif": "g"}
    assert listed(root, "LIST.txt") == expected | {"t1.tif": "t1", "t2.tif": "t2"}


def test_a_list_names_no_list(root: str) -> None:
    fill(root, "a.tif")
    store.write(f"{root}/list.txt", f"{root}/a.tif\n{root}/list.txt\n".encode())
    with pytest.raises(ConfigError, match=r"may not name another list, .*list\.txt"):
        listed(root, "list.txt")


@pytest.mark.parametrize("source", ["none", "none/", "none.tif", "none*.tif", "in", "empty.txt"])
def test_a_source_without_a_scene_is_named(source: str, root: str) -> None:
    fill(root, "in/a.png", "a.tif")
    store.write(f"{root}/empty.txt", b"# nothing\n")
    with pytest.raises(NothingReadableError, match=rf"{re.escape(source)}: no scene found there \(looked for \.tif"):
        listed(root, "a.tif", source)


def test_a_scene_named_twice_is_listed_once_by_its_first_name(root: str) -> None:
    fill(root, "in/s/a.tif")
    assert listed(root, "in/s/a.tif", "in", "in/*") == {"in/s/a.tif": "a"}
    assert listed(root, "in", "in/s/a.tif") == {"in/s/a.tif": "s-a"}


def test_ids_are_apart(root: str) -> None:
    names = [
        "a.tif",
        "a.tiff",
        "s/a.tif",
        "s-a.tif",
        "B.tif",
        "t/b.tif",
        "_geoseg.tif",
        "-.tif",
        "a b.tif",
        "a-b.tif",
        "x" * 150 + ".tif",
    ]
    fill(root, *names)
    ids = {ref.uri.removeprefix(f"{root}/"): ref.id for ref in list_scenes([root, f"{root}/t"])}
    again = {ref.uri.removeprefix(f"{root}/"): ref.id for ref in list_scenes([f"{root}/t", root])}
    assert set(ids) == set(again) == set(names)
    for told in (ids, again):
        assert len({one.lower() for one in told.values()}) == len(names), "some stores do not tell a from A"
        assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,109}", one) for one in told.values()), told
    assert (ids["B.tif"], ids["a-b.tif"]) == ("B", "a-b")
    assert "b" not in again.values(), "t/b.tif, found as b, differs from B in case alone"


MASK, CHANCES, UNSURE = (f"{name}-0123456789abcdef.tif" for name in ("mask", "probabilities", "uncertainty"))


@pytest.mark.parametrize("out", ["in/masks", "in"])
def test_what_was_published_below_the_output_is_no_scene(out: str, root: str) -> None:
    ours = [f"{out}/a/{name}" for name in (MASK, CHANCES, UNSURE)]
    fill(root, "in/a.tif", f"{out}/a/item.json", *ours)
    theirs = [
        f"{out}/a/other.tif",
        f"{out}/a/mask-0123.tif",
        f"{out}/a/sub/{MASK}",
        f"{out}/b/{MASK}",  # no item stands beside it
        f"{out}/{MASK}",
        f"{out}2/a/{MASK}",
        "in/else/a/item.json",
        f"in/else/a/{MASK}",
    ]
    fill(root, *theirs)
    scenes = {"in/a.tif", *(name for name in theirs if name.endswith(".tif") and name.startswith("in/"))}
    assert set(listed(root, "in", out=f"{root}/{out}")) == scenes
    assert set(listed(root, "in/*.tif", out=f"{root}/{out}")) == scenes
    assert set(listed(root, "in", out=f"{root}/elsewhere")) == scenes | set(ours)
    assert set(listed(root, "in/a.tif", *ours, out=f"{root}/{out}")) == {"in/a.tif", *ours}, (
        "a file that is named is taken"
    )


@pytest.mark.parametrize("out", ["in/masks", "in"])
def test_what_geoseg_keeps_below_the_output_is_no_scene(out: str, root: str) -> None:
    tried = [f"{out}/_geoseg/canary/0123/a/item.json", f"{out}/_geoseg/canary/0123/a/{MASK}"]
    fill(root, "in/a.tif", "in/_geoseg2/b.tif", *tried)
    for source in ("in", "in/*.tif"):
        assert set(listed(root, source, out=f"{root}/{out}")) == {"in/a.tif", "in/_geoseg2/b.tif"}


@pytest.mark.bucket
def test_an_odd_key_is_a_scene_that_says_why_it_cannot_be_read(bucket: str) -> None:
    for key in ("in/a//b.tif", "in/good.tif"):
        boto3.Session().client("s3").put_object(Bucket=bucket, Key=key, Body=b"1")
    odd, good = list_scenes([f"s3://{bucket}/in"])
    assert (odd.uri, good.uri) == (f"s3://{bucket}/in/a//b.tif", f"s3://{bucket}/in/good.tif")
    with pytest.raises(store.ObjectNameError, match="cannot be addressed"):
        describe(odd, ReadOptions())


@pytest.mark.bucket
def test_a_scene_that_is_denied_is_listed_and_a_bucket_that_is_denied_is_not(bucket: str) -> None:
    client = boto3.Session().client("s3")
    fill(f"s3://{bucket}", "in/closed.tif")
    every = [f"arn:aws:s3:::{bucket}", f"arn:aws:s3:::{bucket}/*"]
    statement = {"Effect": "Deny", "Principal": "*", "Action": ["s3:GetObject", "s3:ListBucket"], "Resource": every}
    client.put_bucket_policy(Bucket=bucket, Policy=json.dumps({"Version": "2012-10-17", "Statement": [statement]}))
    (closed,) = list_scenes([f"s3://{bucket}/in/closed.tif"])
    with pytest.raises(SceneDeniedError, match="access denied"):
        describe(closed, ReadOptions())
    with pytest.raises(AccessDeniedError, match="access denied"):
        list_scenes([f"s3://{bucket}/in"])
