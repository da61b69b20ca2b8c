"""Sources: groups of scenes that are labelled alike."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from geoseg.config import Section
from geoseg.train.labels import LabelConfig


class SourceConfig(Section):
    """Scenes of one origin and what labels them.

    ``scenes``: files, folders, prefixes, globs or ``.txt`` lists, as in a job; ``stack_by`` groups them into stacks.
    """

    name: Annotated[str, Field(pattern=r"^[0-9A-Za-z][0-9A-Za-z_.-]*$")]
    scenes: Annotated[tuple[str, ...], Field(min_length=1)]
    labels: Annotated[tuple[LabelConfig, ...], Field(min_length=1)]
    stack_by: str | None = None
