"""No name that a file, an item or a job chooses leads out of where geoseg was told to write or allowed to read."""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from geoseg.config import SceneSource, check
from geoseg.errors import ConfigError
from geoseg.predict.lease import Lease
from geoseg.predict.publish import ITEM_NAME
from geoseg.predict.sources import _uri
from geoseg.raster import store
from geoseg.raster.scene import slug
from geoseg.raster.stack import make_stack

FEW, MANY = 200, 10_000
SIZES = [
    pytest.param(FEW, id="some"),
    pytest.param(MANY, id="many", marks=(pytest.mark.chaos, pytest.mark.slow)),
]
PARTS = (
    "..", ".", "", "~", "/", "//", "\\", "..\\..", "%2e%2e", "%2f", "%00", "\0", "a", "b.tif", ".tif", "_geoseg", "item.json",
    "etc", "passwd", "C:", "CON", "file:", "s3://else", "\u202e", "\uff0e\uff0e", "\r\n", "x" * 300, "-", "--", "\ud800", "a?b#c",
)  # fmt: skip
NAMES = st.lists(st.sampled_from(PARTS) | st.text(max_size=5), max_size=8).flatmap(
    lambda parts: st.sampled_from(("/", "", "\\", " ")).map(lambda between: between.join(parts))
)
HREFS = st.tuples(st.sampled_from(("", "./", "../", "/", "file://", "s3://bucket/", "{root}/", "{root}")), NAMES).map(
    "".join
)


def _tried(num: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=num, deadline=None, derandomize=True, database=None, suppress_health_check=quiet)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("num", SIZES)
def test_what_is_written_for_a_scene_lies_below_the_output(
    num: int, tmp_path: Path, figure: Callable[..., None]
) -> None:
    """A scene's item and a mask under ids of any names, in a folder and as keys of a bucket."""
    around, tries = tmp_path / "around", 0
    root, keys = around / "out", f"memory://{uuid.uuid4().hex}"
    root.mkdir(parents=True)

    @_tried(num)
    @given(NAMES)
    def write(name: str) -> None:
        nonlocal tries
        stack = make_stack(name or "x", [str(root / "a.tif"), str(root / "b.tif")]).id
        for scene_id in (slug(name), stack):
            assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", scene_id), (name, scene_id)
            for out in (str(root), f"{keys}/out"):
                for file in (ITEM_NAME, "mask-0123456789abcdef.tif"):
                    uri = store.join(out, scene_id, file)
                    store.write(uri, b"")
                    tries += 1
                    assert store.normalize_uri(uri) == uri

    write()
    outside = [path for path in around.rglob("*") if path.is_file() and len(path.relative_to(root).parts) != 2]
    outside += [path for path in around.iterdir() if path != root]
    beyond = [info.uri for info in store.walk(f"{keys}/") if not re.fullmatch(rf"{keys}/out/[^/]+/[^/]+", info.uri)]
    figure("S6", f"writes outside the output in {tries:,} tries", len(outside) + len(beyond), goal="0 of >= 10,000")
    assert tries >= num
    assert not outside
    assert not beyond


@pytest.mark.timeout(600)
@pytest.mark.parametrize("num", SIZES)
def test_an_href_leads_nowhere_but_where_it_may(num: int, tmp_path: Path, figure: Callable[..., None]) -> None:
    """Links and assets of a catalogue are followed below its folder and the prefixes of ``allow`` alone."""
    root = tmp_path / "catalogue"
    allow = [str(root), "s3://bucket/open"]
    source = check(SceneSource, {"catalog": f"{root}/catalog.json", "allow": allow}, where="the test")
    followed = tries = 0

    @_tried(num)
    @given(HREFS)
    def lead(href: str) -> None:
        nonlocal followed, tries
        tries += 1
        uri = _uri({"href": href.replace("{root}", str(root))}, f"{root}/items/a.json", source, allow)
        if uri is None:
            return
        followed += 1
        if "://" in uri:
            assert uri.startswith("s3://bucket/open/"), (href, uri)
            assert ".." not in uri.split("/"), (href, uri)
        else:
            assert Path(os.path.normpath(uri)).is_relative_to(root), (href, uri)

    lead()
    figure("S6", f"hrefs followed out of what is allowed, in {tries:,} tries", 0, goal="0")
    assert tries >= num
    assert 0 < followed < tries, "some lead inside, and some do not"


@pytest.mark.parametrize(
    "text", ["s3://bucket/../other/x", "s3://bucket/a/%2e%2e/../x", "memory://a/../b", "s3://../x/.."]
)
def test_a_uri_that_climbs_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="cannot be addressed"):
        store.normalize_uri(text)


@pytest.mark.parametrize("place", ["scene", "_geoseg/parts", "_geoseg"])
def test_a_link_out_of_the_output_ends_a_run_before_it_writes(place: str, tmp_path: Path) -> None:
    """A link to another place of the output, and the output being a link itself, are nobody's harm."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out" / "there").mkdir(parents=True)
    (tmp_path / "out" / "here").symlink_to(tmp_path / "out" / "there")
    (tmp_path / "link").symlink_to(tmp_path / "out")
    with Lease(str(tmp_path / "link")):
        pass
    link = tmp_path / "out" / place
    link.parent.mkdir(exist_ok=True)
    if link.is_dir():
        shutil.rmtree(link)
    link.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="is a link that leads out of"), Lease(str(tmp_path / "out")):
        pass
    assert not list((tmp_path / "elsewhere").iterdir())
