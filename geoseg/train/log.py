"""From the numbers of a training run to its log: JSON lines and TensorBoard events, in a folder or bucket."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import RecordWriter

from geoseg.errors import ConfigError
from geoseg.raster import store

Value = int | float | str | None
Record = dict[str, Value]

METRICS = "metrics.jsonl"
EVENTS = ("tensorboard", "events.out.tfevents.0.geoseg")
_NOT_DRAWN = ("step", "stage", "kind", "time")


class MetricsLog:
    """The records of a run, in memory and as often as ``write`` is called in a store.

    A record is flat: ``step`` (since the start of the run), ``stage`` (from 0), ``kind`` (``train`` or ``validate``), ``time``
    (seconds since 1970) and numbers by name, ``iou/building`` for one. A number that is not finite is None, null in JSON.
    Files are written whole, under fixed names, so no reader sees half a line and no run leaves a second event file. What was
    written once stays as it was at the front of them, so a TensorBoard that watches reads on.
    """

    def __init__(self, records: Iterable[Mapping[str, Value]] = ()) -> None:
        self._records: dict[tuple[Value, Value, Value], Record] = {}
        for record in records:
            self.add(record)

    def add(self, record: Mapping[str, Value]) -> None:
        """Take a record, in place of one of the same stage, step and kind; it gets the time of now if it has none."""
        plain: Record = {name: _finite(value) for name, value in record.items()}
        self._records[plain["stage"], plain["step"], plain["kind"]] = {**plain, "time": plain.get("time", time.time())}

    @property
    def records(self) -> list[Record]:
        """All records in the order in which they were made."""
        return list(self._records.values())

    def write(self, uri: str) -> None:
        """Put the log into the folder or prefix ``uri``. Raises as ``store.write`` does."""
        lines = (json.dumps(record, allow_nan=False) + "\n" for record in self.records)
        store.write(store.join(uri, METRICS), "".join(lines).encode())
        store.write(store.join(uri, *EVENTS), event_file(self.records))

    @classmethod
    def load(cls, uri: str, *, up_to: tuple[int, int]) -> MetricsLog:
        """The log that ``write`` put there, without what came after the stage and step of ``up_to``; empty if there is none.

        Raises ConfigError for a log that this version cannot read, and as ``store.read`` does.
        """
        place = store.join(uri, METRICS)
        try:
            lines = store.read(place).decode().splitlines()
            records = [json.loads(line) for line in lines]
            return cls(record for record in records if (record["stage"], record["step"]) <= up_to)
        except store.ObjectMissingError:
            return cls()
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{store.redact(place)}: each line must be a record with stage, step and kind, got {error!r}; move the file "
                "away to go on with a new log"
            ) from error


def event_file(records: Iterable[Mapping[str, Value]]) -> bytes:
    """TensorBoard's event file with a scalar ``kind/name`` for each number of each record; the same for the same records."""
    records = list(records)
    begin = Event(wall_time=_time_of(records[0]) if records else 0.0, file_version="brain.Event:2")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "events"
        writer = RecordWriter(str(path))
        for event in (begin, *map(_event, records)):
            writer.write(event.SerializeToString())
        writer.close()
        return path.read_bytes()


def _event(record: Mapping[str, Value]) -> Event:
    scalars = [
        Summary.Value(tag=f"{record['kind']}/{name}", simple_value=value)
        for name, value in record.items()
        if name not in _NOT_DRAWN and isinstance(value, int | float)
    ]
    return Event(wall_time=_time_of(record), step=record["step"], summary=Summary(value=scalars))


def _time_of(record: Mapping[str, Value]) -> float:
    at = record["time"]
    return at if isinstance(at, int | float) else 0.0


def _finite(value: Value) -> Value:
    return None if isinstance(value, float) and not math.isfinite(value) else value
