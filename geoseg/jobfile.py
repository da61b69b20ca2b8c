"""A job file that travels: its settings, the small files it names, its name for the night, and no secrets in any of it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal, get_args

from geoseg.config import SHIPPED_BUNDLES, read_toml
from geoseg.errors import ConfigError
from geoseg.redaction import TELLING_NAMES, TELLING_WORDS

Kind = Literal["nightly", "predict", "train", "evaluate"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_MAX_NAMED_BYTES = 64 << 20  # Ray takes 100 MiB, zipped
_IMAGERY = frozenset({".tif", ".tiff", ".jp2", ".vrt"})
# The settings of all kinds of jobs that are a path or a URI, tables of a list by the list's name.
PATHS = frozenset(
    {
        "scenes",
        "source.scenes",
        "stacks.scenes",
        "bundle",
        "model.start",
        "predict.aoi",
        "source.manifest",
        "source.catalog",
        "source.area",
        "source.labels.uri",
        "source.labels.area",
    }
)
_BUNDLES = frozenset({"bundle", "model.start"})
# Names that are such a word as a whole or at an end: api_key and AWS_SECRET_ACCESS_KEY, not "monkey" or "tokens_seen".
_NAME = rf"(?:{TELLING_WORDS}|{TELLING_NAMES})"
_SECRET_NAME = re.compile(rf"(?i)(^|[_.-]){_NAME}([_-]?id)?$")
_SECRET_TEXT = (
    ("an AWS access key", re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b")),
    ("a user and password in a URL", re.compile(r"://[^/@\s\"'<>:]+:[^/@\s\"'<>]+@")),
    (
        "a signed URL",
        # "&" as JSON has it, too; what STAC APIs call token is the next page, and *** or {key} stands for what is not there
        re.compile(
            rf"(?i)(?:[?&;]|\\u0026)(?!token=(?:next|prev)\b)(?:(?:[\w-]*[_-])?{_NAME}|awsaccesskeyid|key)="
            r"(?!\*\*\*|\$?\{)[^&\s\"'<>]"
        ),
    ),
    ("a private key", re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----")),
    ("an authorization header", re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9+/_.=-]{16,}")),
    ("an account key", re.compile(r"(?i)\b(accountkey|sharedaccesssignature)=")),
    (
        "a token of a known form",
        re.compile(r"\b(gh[pousr]_[A-Za-z0-9]{20,}|xox[abprs]-[A-Za-z0-9-]{10,}|eyJ[\w-]+\.eyJ[\w-]+\.)"),
    ),
)
_ASSIGNMENT = re.compile(
    r"""(?m)(?<![\w.-])([\w.-]+)["']?[ \t]*[=:][ \t]*["'](?!\*\*\*|\$\{)[^"']|"""
    r"""^[ \t]*(?:export[ \t]+)?([\w.-]+)[ \t]*[=:][ \t]*(?!\*\*\*|\$\{)[^\s"'#]"""  # of .env and YAML
)


@dataclass(frozen=True, slots=True)
class JobFile:
    """A job file's name, text and settings, and the files it names by relative paths: (path there, bytes).

    A relative path travels with the job, as it is seen from the folder where the command is run. URIs and absolute paths
    are the cluster's own affair: a bucket, or a disk that all nodes share.
    """

    name: str
    text: str
    values: dict[str, Any]
    files: tuple[tuple[str, bytes], ...] = ()

    @property
    def digest(self) -> str:
        """SHA-256 of the settings, whatever their order and comments, and of the files they name."""
        told = json.dumps(self.values, sort_keys=True, default=str)
        hashed = hashlib.sha256(told.encode())
        for path, content in self.files:
            hashed.update(f"\0{path}\0{len(content)}\0".encode() + content)
        return hashed.hexdigest()

    def submission_id(self, kind: Kind, day: date) -> str:
        """The name of this job on that day: the same settings on the same day have the same one."""
        return f"geoseg-{kind}-{day:%Y-%m-%d}-{self.digest[:8]}"


def load_job_file(path: str, *, folder: Path | None = None) -> JobFile:
    """The job file at ``path`` with the files it names below ``folder`` (the working directory unless told otherwise).

    Raises ConfigError: no TOML, a secret in it or in a text that travels with it, a file that cannot travel, results that would
    stay on a node's disk.
    """
    folder = (folder or Path.cwd()).resolve()
    values = read_toml(path)
    text = Path(path).read_text(encoding="utf-8")
    refuse_secrets(path, text)
    files: dict[str, bytes] = {}
    for key, value in _strings(values):
        for name, content in _named(path, key, value, folder):
            files[name] = content
            if sum(map(len, files.values())) > _MAX_NAMED_BYTES:
                raise ConfigError(
                    f"{path}: with {key} = {value!r} it names more than {_MAX_NAMED_BYTES >> 20} MiB of files; put them into "
                    "a bucket and name them by their URI"
                )
    for file, content in files.items():
        _refuse_secrets_along(path, file, content)
    name = Path(path).name
    if name in files:
        raise ConfigError(f"{path}: it names a file that is called like itself; rename one of them")
    return JobFile(name, text, values, tuple(sorted(files.items())))


def refuse_secrets(path: str, text: str) -> None:
    """Raises ConfigError when a line looks like it holds a credential; the sentence says which line, not what it holds."""
    if found := _find_secret(text):
        raise ConfigError(
            f"{path}: {found}; a job file is shown in dashboards and logs, so take it out (comments too) and give the nodes a "
            "role, or variables from a Secret"
        )


def _refuse_secrets_along(job: str, name: str, content: bytes) -> None:
    """The same for a file that travels with a job, if it is text in UTF-8."""
    try:
        found = _find_secret(content.decode("utf-8"))
    except UnicodeDecodeError:
        return
    if found:
        raise ConfigError(
            f"{job}: {name} would travel with it, and there {found}; a cluster keeps what travels, so take it out of the file, "
            "or the file out of what the job names, and give the nodes a role, or variables from a Secret"
        )


def _find_secret(text: str) -> str:
    """Which line looks like it holds what, in words; "" when none does."""
    found = [(match.start(), told) for told, pattern in _SECRET_TEXT if (match := pattern.search(text))]
    for match in _ASSIGNMENT.finditer(text):
        name = match[1] or match[2]
        if _SECRET_NAME.search(name):
            found.append((match.start(match.lastindex or 0), f"a value of {name!r}"))
            break
    if not found:
        return ""
    place, told = min(found)
    return f"line {text.count(chr(10), 0, place) + 1} looks like it holds {told}"


def _strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, each in value.items():
            yield from _strings(each, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        for each in value:
            yield from _strings(each, key)


def _named(job: str, key: str, value: str, folder: Path) -> Iterator[tuple[str, bytes]]:
    """The files that travel because of one setting."""
    if not value or "://" in value or value.startswith("/") or key not in (*PATHS, "out"):
        return
    if key == "out":
        raise ConfigError(
            f"{job}: out = {value!r} is a folder on whichever node writes it; name a bucket (s3://...) or a path that all nodes "
            "share"
        )
    named = folder / value
    if key in _BUNDLES and _is_there(SHIPPED_BUNDLES / value):
        return
    if not _is_there(named):
        if key.rpartition(".")[2] == "scenes":
            raise ConfigError(
                f"{job}: {key} names {value!r}, which is relative and not a file here; the cluster finds scenes by URIs and by "
                "absolute paths"
            )
        return
    if not named.resolve().is_relative_to(folder) or ".." in Path(value).parts:
        raise ConfigError(f"{job}: {key} = {value!r} lies outside {folder}; run the command from a folder above both")
    for path in [named] if named.is_file() else sorted(each for each in named.rglob("*") if each.is_file()):
        if path.suffix.lower() in _IMAGERY:
            raise ConfigError(
                f"{job}: {key} = {value!r} names imagery on this machine ({path.name}), which the cluster does not see; put it "
                "into a bucket, or on a disk that all nodes share, and name it there"
            )
        if path.stat().st_size > _MAX_NAMED_BYTES:
            raise ConfigError(
                f"{job}: {key} = {value!r}: {path.name} is too large to travel with a job; put it into a bucket"
            )
        yield path.relative_to(folder).as_posix(), path.read_bytes()


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a long text, a NUL: no name of a file
        return False
