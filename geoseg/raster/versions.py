"""Which objects are there and in which version, from listings: a request for a thousand of them, not one for each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Literal

from geoseg.errors import GeosegError
from geoseg.raster import store

_MANY = 16  # objects of one folder or prefix for which listing it is worth a try
_SLASHES_OF_A_BUCKET = 3  # s3://bucket/
_LISTED_FOR_ONE = 100  # a page of a listing has a thousand: a tenth of the requests that asking for each would take


class Versions:
    """ETags and sizes by URI as the stores told them. Below a prefix that was listed to its end, what is absent is known too."""

    def __init__(self) -> None:
        self._etags: dict[str, str] = {}
        self._sizes: dict[str, int] = {}
        self._absent: set[str] = set()
        self._roots: set[str] = set()

    def walk(self, root: str) -> list[str]:
        """The URIs of all objects below a folder or prefix that ends in a slash. Raises as ``store.walk`` does."""
        found = []
        for info in store.walk(root):
            self._note(info)
            found.append(info.uri)
        self._roots.add(root)
        return found

    def etag(self, uri: str) -> str:
        """The object's ETag, "" when it is not known or not there."""
        return self._etags.get(uri, "")

    def size(self, uri: str) -> int:
        """The object's bytes, 0 when they are not known or it is not there."""
        return self._sizes.get(uri, 0)

    def is_absent(self, uri: str) -> bool:
        """Whether it is known that there is no such object."""
        return uri in self._absent or (uri not in self._etags and self.covers(uri))

    def covers(self, uri: str) -> bool:
        """Whether all objects of a folder or prefix around it were listed."""
        end = uri.rfind("/")
        while end > 0:
            if uri[: end + 1] in self._roots:
                return True
            end = uri.rfind("/", 0, end)
        return False

    def look_up(self, uris: Iterable[str]) -> None:
        """Find out about objects by name: many of one folder by listing it, the others each by itself.

        What the store does not tell of an object stays unknown.
        """
        unknown = self._unknown(uris)
        self.list_folders(unknown)
        left = self._unknown(unknown)
        for uri, info in zip(left, store.in_parallel(_info_of, left), strict=True):
            if info is None:
                self._absent.add(uri)
            elif info:
                self._note(info)
            else:
                self._etags[uri] = ""

    def list_folders(self, uris: Iterable[str]) -> None:
        """Find out about those objects of which many lie below one folder, where listing it takes fewer requests.

        The prefix that holds enough of them and is the closest to them is listed: catalogues give each image its own folder.
        On a disk, where asking is cheap, that is the very folder or none.
        """
        left = {uri: _parent(uri) for uri in self._unknown(uris)}
        while left:
            folders = defaultdict(list)
            for uri, folder in left.items():
                folders[folder].append(uri)
            left = {}
            for folder, members in folders.items():
                if len(members) >= _MANY:
                    self._list(folder, most=_LISTED_FOR_ONE * len(members))
                elif "://" in folder and folder.count("/") > _SLASHES_OF_A_BUCKET:
                    left |= dict.fromkeys(members, _parent(folder[:-1]))

    def _unknown(self, uris: Iterable[str]) -> list[str]:
        return [uri for uri in dict.fromkeys(uris) if uri not in self._etags and not self.is_absent(uri)]

    def _list(self, folder: str, *, most: int) -> None:
        """List a folder, but give up where it holds too much that nobody asked for, or may not be listed."""
        try:
            for count, info in enumerate(store.walk(folder)):
                if count >= most:
                    return
                self._note(info)
        except GeosegError:
            return
        self._roots.add(folder)

    def _note(self, info: store.ObjectInfo) -> None:
        self._etags[info.uri] = info.etag
        self._sizes[info.uri] = info.size


def _parent(uri: str) -> str:
    return uri.rpartition("/")[0] + "/"


def _info_of(uri: str) -> store.ObjectInfo | Literal[False] | None:
    """What the store tells of an object; None when it is not there, False when the store does not tell."""
    try:
        return store.head(uri)
    except store.ObjectMissingError:
        return None
    except GeosegError:
        return False
