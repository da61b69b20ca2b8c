"""What can go wrong, by what the caller should do about it: skip the scene, try again, or stop the job."""

from __future__ import annotations

from geoseg.redaction import redact


class GeosegError(Exception):
    """Base of every error that geoseg raises on purpose; its text is one sentence meant for a person, without secrets."""

    exit_code = 1

    def __init__(self, sentence: str) -> None:
        super().__init__(redact(sentence))


class SceneError(GeosegError):
    """This scene cannot be processed as it is; the rest of the run goes on without it."""


class NotGeoTiffError(SceneError):
    """The object is not a GeoTIFF, whatever its name says."""


class GeoreferenceError(SceneError):
    """The scene cannot be placed on the ground: no CRS, control points alone, or a broken geotransform."""


class BandError(SceneError):
    """The scene's bands or their dtype are not what the bundle takes."""


class ResolutionError(SceneError):
    """The scene's pixels are much larger on the ground than those the bundle was made for."""


class SceneTooCostlyError(SceneError):
    """Reading the scene would need more memory than a worker is given (blocks too large, too many bands)."""


class SceneReadError(SceneError):
    """The scene's bytes are damaged, cut short or gone."""


class SceneChangedError(SceneError):
    """The scene was replaced in its store while it was being read."""


class SceneDeniedError(SceneError):
    """The store refused this one object (its policy, its owner, its archive class); the credentials as such are good.

    The exit code is that of an object which the run itself needs: no boundary of a scene is around it then.
    """

    exit_code = 4


class StackError(SceneError):
    """The scenes of a stack do not fit each other, or a stack does not fit the bundle."""


class LabelError(SceneError):
    """The labels of the scene are missing, cannot be read, or do not lie where the scene does."""


class ConflictError(SceneError):
    """Another scene or another run has published under the same id in the meantime."""


class OvertakenError(ConflictError):
    """Another run has published or removed this scene since it was planned; planned anew it may be published."""


class StoreError(GeosegError):
    """The object store did not answer as it should; trying again later may help."""


class StopError(GeosegError):
    """The job as a whole cannot go on."""


class ConfigError(StopError):
    """The request itself is wrong: an unknown key, a value out of range, a contradiction."""

    exit_code = 2


class BundleError(ConfigError):
    """The bundle is missing, damaged, or not one that this version of geoseg can read."""


class NothingReadableError(StopError):
    """No scene was found, or not one of them could be read."""

    exit_code = 3


class AccessDeniedError(StopError):
    """The store refused the credentials; no scene would fare better."""

    exit_code = 4


class OutputHeldError(StopError):
    """Another run is writing to this output."""

    exit_code = 5


def stop_error(kind: str, sentence: str) -> StopError:
    """The error of a kind that was told by name, as it comes back from a worker in another process."""
    kinds = {
        one.__name__: one
        for one in (ConfigError, BundleError, NothingReadableError, AccessDeniedError, OutputHeldError)
    }
    return kinds.get(kind, StopError)(sentence)
