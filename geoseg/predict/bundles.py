"""Bundles by name or URI: the ones that come with geoseg, and any folder or prefix with the two files."""

from __future__ import annotations

from functools import lru_cache

from geoseg.config import SHIPPED_BUNDLES
from geoseg.errors import AccessDeniedError, BundleError, SceneDeniedError, StopError
from geoseg.model.bundle import DESCRIPTION_NAME, WEIGHTS_NAME, Bundle
from geoseg.model.costs import Costs, count_costs
from geoseg.model.description import OutsideVariant
from geoseg.model.outside import measured
from geoseg.model.tiling import tiling
from geoseg.predict.plan import RunSpec
from geoseg.raster import store


def shipped_bundles() -> list[str]:
    """Names of the bundles that come with geoseg."""
    return sorted(path.name for path in SHIPPED_BUNDLES.iterdir() if (path / DESCRIPTION_NAME).exists())


def load_bundle(uri: str) -> Bundle:
    """The bundle of a shipped name, a folder or a prefix, as it is now; the last few versions are kept.

    Raises BundleError, AccessDeniedError, StoreError.
    """
    where = str(SHIPPED_BUNDLES / uri) if uri in shipped_bundles() else store.normalize_uri(uri)
    try:
        files = tuple(store.head(store.join(where, name)) for name in (DESCRIPTION_NAME, WEIGHTS_NAME))
        return _load(files, store.redact(uri))
    except SceneDeniedError as error:
        raise AccessDeniedError(str(error)) from error
    except store.ObjectMissingError as error:
        raise BundleError(
            f"{store.redact(uri)}: no bundle there; a bundle is a folder with {DESCRIPTION_NAME} and {WEIGHTS_NAME}, or one of "
            f"the names {', '.join(shipped_bundles())}"
        ) from error


def bundle_costs(uri: str, *, core: int) -> dict[str, Costs]:
    """The costs of a bundle's network, by the bundle's name. Raises as ``load_bundle``."""
    bundle = load_bundle(uri)
    return {bundle.description.name: count_costs(bundle.network(), bundle.description.num_channels, core=core)}


@lru_cache(maxsize=4)
def _load(files: tuple[store.ObjectInfo, ...], origin: str) -> Bundle:
    """The bundle of two files, each in the version that was looked at."""
    description, weights = (store.read(file.uri) for file in files)
    return Bundle.from_bytes(description, weights, origin=origin)


def put_together(description: str, weights: str, out: str) -> Bundle:
    """The bundle of a description and of weights, each by its URI, saved below ``out``; a network from outside is measured.

    Raises BundleError, ConfigError, AccessDeniedError, StoreError.
    """
    try:
        files = [store.read(store.normalize_uri(uri)) for uri in (description, weights)]
    except SceneDeniedError as error:
        raise AccessDeniedError(str(error)) from error
    except store.ObjectMissingError as error:
        raise BundleError(f"no bundle can be made: {error}") from error
    bundle = Bundle.from_bytes(files[0], files[1], origin=store.redact(description))
    variant = bundle.description.variant
    if isinstance(variant, OutsideVariant):
        told = bundle.description.model_copy(update={"variant": measured(variant, len(bundle.description.bands))})
        bundle = Bundle(description=told, weights=bundle.weights)
    save_bundle(bundle, out)
    return bundle


def describe_network(bundle: Bundle) -> str:
    """The network and its margin in words."""
    variant, network = bundle.description.variant, bundle.network()
    if not isinstance(variant, OutsideVariant):
        return f"{variant.title}, stride {network.stride}, margin {network.margin} derived from its layers"
    tiles = tiling(network.stride, variant.margin)
    how = "none that is exact, so it is blended" if tiles.is_blended else f"{variant.margin} measured"
    return f"{variant.title}, stride {network.stride}, margin {how}; tiles of {tiles.tile}"


def save_bundle(bundle: Bundle, uri: str) -> None:
    """Write the two files of a bundle below ``uri``; the description last, so that it never stands alone."""
    where = store.normalize_uri(uri)
    store.write(store.join(where, WEIGHTS_NAME), bundle.weights)
    store.write(store.join(where, DESCRIPTION_NAME), bundle.description_json())


def bundle_of(run: RunSpec) -> Bundle:
    """The bundle that a run began with. Raises StopError when another stands in its place by now."""
    bundle = load_bundle(run.bundle_uri)
    if bundle.digest != run.bundle_digest:
        raise StopError(f"{run.bundle_uri}: the bundle was changed while the run was going on; start the run again")
    return bundle


def keep_bundle(run: RunSpec) -> None:
    """Keep the run's bundle with its results, where their items say it is, unless it is there already."""
    folder = store.join(run.out, run.model.path.rsplit("/", 1)[0])
    if not store.exists(store.join(folder, DESCRIPTION_NAME)):
        save_bundle(bundle_of(run), folder)
