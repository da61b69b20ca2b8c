"""Bundles by name or URI: the ones that come with geoseg, and any folder or prefix with the two files."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import geoseg.model
from geoseg.errors import BundleError
from geoseg.model.bundle import DESCRIPTION_NAME, WEIGHTS_NAME, Bundle
from geoseg.raster import store

_SHIPPED = Path(geoseg.model.__file__).parent / "bundles"


def shipped_bundles() -> list[str]:
    """Names of the bundles that come with geoseg."""
    return sorted(path.name for path in _SHIPPED.iterdir() if (path / DESCRIPTION_NAME).exists())


def load_bundle(uri: str) -> Bundle:
    """The bundle of a shipped name, a folder or a prefix, as it is now; the last few versions are kept.

    Raises BundleError, AccessDeniedError, StoreError.
    """
    where = str(_SHIPPED / uri) if uri in shipped_bundles() else store.normalize_uri(uri)
    try:
        files = tuple(store.head(store.join(where, name)) for name in (DESCRIPTION_NAME, WEIGHTS_NAME))
        return _load(files, store.redact(uri))
    except store.ObjectMissingError as error:
        raise BundleError(
            f"{store.redact(uri)}: no bundle there; a bundle is a folder with {DESCRIPTION_NAME} and {WEIGHTS_NAME}, or one of "
            f"the names {', '.join(shipped_bundles())}"
        ) from error


@lru_cache(maxsize=4)
def _load(files: tuple[store.ObjectInfo, ...], origin: str) -> Bundle:
    """The bundle of two files, each in the version that was looked at."""
    description, weights = (store.read(file.uri) for file in files)
    return Bundle.from_bytes(description, weights, origin=origin)


def save_bundle(bundle: Bundle, uri: str) -> None:
    """Write the two files of a bundle below ``uri``; the description last, so that it never stands alone."""
    where = store.normalize_uri(uri)
    store.write(store.join(where, WEIGHTS_NAME), bundle.weights)
    store.write(store.join(where, DESCRIPTION_NAME), bundle.description_json())


def keep_bundle(bundle: Bundle, uri: str) -> None:
    """``save_bundle`` below a ``uri`` that follows from the bundle's digest, unless it is there already."""
    if not store.exists(store.join(uri, DESCRIPTION_NAME)):
        save_bundle(bundle, uri)
