"""Versions of many objects: known from listings where that takes fewer requests, and never guessed."""

from __future__ import annotations

import pytest

from geoseg.raster import store, versions
from geoseg.raster.scene import list_scenes
from geoseg.raster.versions import Versions


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The URIs that were asked about one by one."""
    uris: list[str] = []
    for name in ("head", "exists"):
        original = getattr(store, name)
        monkeypatch.setattr(store, name, lambda uri, original=original: uris.append(uri) or original(uri))
    return uris


def fill(root: str, num: int) -> list[str]:
    uris = [f"{root}/in/{number:03}.tif" for number in range(num)]
    for uri in uris:
        store.write(uri, uri[-7:].encode())
    return uris


def test_many_of_a_folder_are_listed_and_few_are_asked_about(root: str, asked: list[str]) -> None:
    uris = fill(root, 20)
    etags = [store.head(uri).etag for uri in uris]
    asked.clear()
    known = Versions()
    known.look_up([*uris, f"{root}/in/none.tif"])
    assert [known.etag(uri) for uri in uris] == etags
    assert asked == []
    assert known.is_absent(f"{root}/in/none.tif")
    assert not known.is_absent(f"{root}/elsewhere.tif"), "nobody listed the folder above"
    few = Versions()
    few.look_up([*uris[:3], f"{root}/in/none.tif"])
    assert sorted(asked) == sorted([*uris[:3], f"{root}/in/none.tif"])
    assert [few.etag(uri) for uri in uris[:3]] == etags[:3]
    assert few.is_absent(f"{root}/in/none.tif")
    assert not few.is_absent(uris[5])


def test_objects_with_a_folder_each_are_listed_from_above(root: str, asked: list[str]) -> None:
    uris = [f"{root}/cat/{number}/deep/image.tif" for number in range(20)]
    for uri in [*uris, f"{root}/other/a.tif"]:
        store.write(uri, b"1")
    known = Versions()
    known.look_up([*uris, f"{root}/other/a.tif"])
    assert all(known.etag(uri) for uri in uris)
    assert asked == ([f"{root}/other/a.tif"] if "://" in root else [*uris, f"{root}/other/a.tif"])
    assert not known.covers(f"{root}/other/b.tif")


def test_a_folder_that_holds_too_much_is_given_up(root: str, asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    uris = fill(root, 40)
    monkeypatch.setattr(versions, "_LISTED_FOR_ONE", 1)
    known = Versions()
    known.look_up(uris[10:30])
    assert all(known.etag(uri) for uri in uris[10:30])
    assert asked, "what the listing did not get to is asked about"
    assert not known.is_absent(f"{root}/in/none.tif"), "the folder was not listed to its end"


def test_a_long_list_of_scenes_takes_a_listing(root: str, asked: list[str]) -> None:
    uris = fill(root, 20)
    store.write(f"{root}/list.txt", "\n".join(uris).encode())
    assert [ref.uri for ref in list_scenes([f"{root}/list.txt"])] == uris
    assert asked == []


def test_what_no_store_is_asked_about_stays_unknown() -> None:
    known = Versions()
    known.look_up(["https://there/a.tif", *(f"ftp://there/{number}.tif" for number in range(20))])
    assert known.etag("https://there/a.tif") == ""
    assert not known.is_absent("https://there/a.tif")
