"""One large object from pieces that several processes write: a multipart upload in a bucket, a file written in place.

A process begins the object, any process writes pieces of it, in any order and twice if need be, and one completes it;
nobody sees it before. The object's name must follow from its content: then pieces that an earlier attempt left are those
that this one would write, and who begins it again goes on with them.

Google's and Azure's stores have no such upload behind obstore or boto3; ``takes_pieces`` says so, and one process streams.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from geoseg.errors import AccessDeniedError, GeosegError, StoreError
from geoseg.raster import store

MOST_PIECES = 10_000  # that a bucket takes


@dataclass(frozen=True, slots=True)
class Upload:
    """An object of ``size`` bytes on its way to ``uri``.

    ``staging`` is where it is until then: the file itself, or, of a bucket, a marker that knows the upload's ``id``.
    """

    uri: str
    size: int
    staging: str
    id: str = ""

    def write(self, number: int, offset: int, data: bytes) -> str:
        """Write piece ``number`` (from 1 on) where it belongs; what ``complete`` wants to know of it.

        Pieces in a bucket are at least 5 MiB but for the last. Raises StoreError, also when the upload was completed or given
        up meanwhile, AccessDeniedError.
        """
        if not self.id:
            return self._write_file(offset, data)
        sum_ = base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
        try:
            told = store.ask_s3(
                self.uri,
                "writing a piece",
                "upload_part",
                **self._named(),
                PartNumber=number,
                Body=data,
                ContentMD5=sum_,
            )
        except store.ObjectMissingError as error:
            raise StoreError(f"{error}: it was completed or given up by other work; run again") from error
        return str(told["ETag"])

    def _write_file(self, offset: int, data: bytes) -> str:
        try:
            descriptor = os.open(self.staging, os.O_WRONLY)
            try:
                view = memoryview(data)
                while view:
                    num = os.pwrite(descriptor, view, offset)
                    view, offset = view[num:], offset + num
            finally:
                os.close(descriptor)
        except FileNotFoundError as error:
            raise StoreError(
                f"{store.redact(self.uri)}: the file in the making is gone, completed or removed by other work; run again"
            ) from error
        except OSError as error:
            raise OSError(error.errno, error.strerror, self.staging) from error  # which of a descriptor's has no name
        return ""

    def written(self) -> dict[int, tuple[str, int]]:
        """The pieces that stand by number: what ``write`` told of them, and their sizes. Of a file nobody knows.

        Raises ObjectMissingError when the upload was completed or given up, StoreError; one that may not ask is told of none.
        """
        if not self.id:
            return {}
        found: dict[int, tuple[str, int]] = {}
        asked: dict[str, Any] = self._named()
        with suppress(AccessDeniedError):
            while asked:
                page = store.ask_s3(self.uri, "listing its pieces", "list_parts", **asked)
                found |= {one["PartNumber"]: (one["ETag"], one["Size"]) for one in page.get("Parts", [])}
                asked = {**asked, "PartNumberMarker": page["NextPartNumberMarker"]} if page["IsTruncated"] else {}
        return found

    def complete(self, pieces: Mapping[int, str]) -> None:
        """Make it the object: ``pieces`` are all that were written, no less and no more, with what ``write`` told of each.

        Raises StoreError when one is missing, AccessDeniedError.
        """
        if not self.id:
            try:
                Path(self.staging).replace(self.uri)
            except FileNotFoundError:
                self._check_stands()
            return
        told = [{"PartNumber": number, "ETag": pieces[number]} for number in sorted(pieces)]
        try:
            store.ask_s3(
                self.uri,
                "completing its upload",
                "complete_multipart_upload",
                **self._named(),
                MultipartUpload={"Parts": told},
            )
        except store.ObjectMissingError:
            self._check_stands()  # an earlier attempt of ours, whose answer was lost, or one beside us
        store.delete([self.staging])

    def give_up(self) -> None:
        """Abort it and remove what stands of it; no harm when it was completed. Raises AccessDeniedError, StoreError."""
        if self.id:
            with suppress(store.ObjectMissingError):
                store.ask_s3(self.uri, "giving its upload up", "abort_multipart_upload", **self._named())
        store.delete([self.staging])

    def _check_stands(self) -> None:
        if not (store.exists(self.uri) and store.head(self.uri).size == self.size):
            raise StoreError(f"{store.redact(self.uri)}: its upload was given up by other work; run again")

    def _named(self) -> dict[str, str]:
        bucket, _, key = self.uri.removeprefix("s3://").partition("/")
        return {"Bucket": bucket, "Key": key, "UploadId": self.id}


def takes_pieces(uri: str) -> bool:
    """Whether several processes may write one object there: in folders and in S3 and its like."""
    return "://" not in uri or uri.startswith("s3://")


def begin(uri: str, size: int, staging: str) -> Upload:
    """Begin an object, or go on with one that was begun with the same ``staging``, a name in the same store.

    Raises AccessDeniedError, ConfigError for a bucket that is not there, StoreError.
    """
    if "://" not in uri:
        return _begin_file(Upload(uri, size, staging))
    with suppress(store.ObjectMissingError):
        standing = unfinished(staging)
        standing.written()
        return standing
    store.delete([staging])
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    told = store.ask_s3(uri, "beginning its upload", "create_multipart_upload", Bucket=bucket, Key=key)
    upload = Upload(uri, size, staging, told["UploadId"])
    try:
        marker = {"uri": uri, "size": size, "id": upload.id}
        store.write(staging, json.dumps(marker).encode(), create=True)
    except GeosegError as error:
        with suppress(GeosegError):
            replace(upload, staging=staging + "-").give_up()  # nobody would know of it
        if isinstance(error, store.ObjectExistsError):
            raise StoreError(f"{store.redact(uri)}: other work has begun it in the same moment; run again") from error
        raise
    return upload


def _begin_file(upload: Upload) -> Upload:
    """A file of its own for each attempt: nobody knows which of its pieces an earlier one has written."""
    upload = replace(upload, staging=f"{upload.staging}-{uuid.uuid4().hex[:8]}")
    for path in (upload.staging, upload.uri):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(upload.staging, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        os.truncate(descriptor, upload.size)
    finally:
        os.close(descriptor)
    return upload


def unfinished(staging: str) -> Upload:
    """What was begun with ``staging`` and not completed. Raises ObjectMissingError when there is none, StoreError."""
    if "://" not in staging:
        return Upload("", 0, staging)
    told = json.loads(store.read(staging))
    return Upload(str(told["uri"]), int(told["size"]), staging, str(told["id"]))
