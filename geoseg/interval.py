"""A span of time as people write it: two dates with a slash between them, one day, or "last 3 days"."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone

_RELATIVE = re.compile(r"last (\d{1,5}) (hour|day|week)s?")
_OPEN = ("..", "")


@dataclass(frozen=True, slots=True)
class Interval:
    """From ``start`` to ``end``, both included, in UTC; None where it is open."""

    start: datetime | None
    end: datetime | None

    def overlaps(self, start: datetime, end: datetime) -> bool:
        """Whether any moment from ``start`` to ``end`` lies inside."""
        return (self.end is None or start <= self.end) and (self.start is None or end >= self.start)

    def text(self) -> str:
        """As a STAC API takes it."""
        told = (moment.strftime("%Y-%m-%dT%H:%M:%SZ") if moment else ".." for moment in (self.start, self.end))
        return "/".join(told)


def parse_interval(text: str, *, now: datetime) -> Interval:
    """The interval of ``2026-11-01/..``, ``2026-11-01/2026-11-30``, ``2026-11-01`` or ``last 3 days``. Raises ValueError.

    A date stands for its whole day, a moment without a zone for one in UTC.
    """
    relative = _RELATIVE.fullmatch(text.strip())
    if relative:
        return Interval(now - timedelta(**{relative[2] + "s": int(relative[1])}), None)
    first, slash, last = text.strip().partition("/")
    if not slash:
        last = first
    start = None if first in _OPEN else moment(first)
    end = None if last in _OPEN else moment(last, end_of_day=True)
    if start is None and end is None:
        raise ValueError(f"{text!r} says no time; write 2026-11-01/.., 2026-11-01/2026-11-30 or last 3 days")
    if start is not None and end is not None and end < start:
        raise ValueError(f"{text!r} ends before it begins")
    return Interval(start, end)


def moment(text: str, *, end_of_day: bool = False) -> datetime:
    """A date or a moment as UTC; of a date its first moment, or its last. Raises ValueError."""
    told = datetime.fromisoformat(text.strip().replace("Z", "+00:00").replace("z", "+00:00"))
    if end_of_day and re.fullmatch(r"\d{4}-\d{2}-\d{2}", text.strip()):
        told += timedelta(days=1, seconds=-1)
    try:
        return told.replace(tzinfo=timezone.utc) if told.tzinfo is None else told.astimezone(timezone.utc)
    except OverflowError as error:
        raise ValueError(f"{text!r} lies outside the years 1 to 9999 of UTC") from error
