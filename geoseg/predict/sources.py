"""The scenes of a job, from every kind of source, with what the stores told of their versions on the way."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from geoseg.config import Job
from geoseg.errors import ConfigError
from geoseg.raster.scene import SceneRef
from geoseg.raster.stack import list_sources, make_stack
from geoseg.raster.versions import Versions


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """Scenes and stacks sorted by URI, each id once; what is known of versions; a sentence for each thing left aside."""

    refs: list[SceneRef]
    versions: Versions
    remarks: list[str] = field(default_factory=list)


def list_job(job: Job, out: str) -> Listing:
    """List the sources of a job that publishes under ``out``. Raises StopError kinds, NothingReadableError."""
    versions = Versions()
    refs = list_sources(job.scenes, job.stack_by, out=out, versions=versions)
    refs += [make_stack(stack.name, stack.scenes) for stack in job.stacks]
    twice = [name for name, num in Counter(ref.id.lower() for ref in refs).items() if num > 1]
    if twice:
        raise ConfigError(f"two scenes or stacks would be published as {twice[0]}; give one of them another name")
    return Listing(refs=sorted(refs, key=lambda ref: ref.uri), versions=versions)
