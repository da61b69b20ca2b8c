"""Items of a STAC API: its search, page after page."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from http.client import HTTPException
from string import punctuation
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlencode, urljoin, urlsplit, urlunsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from geoseg.errors import AccessDeniedError, ConfigError, StoreError
from geoseg.raster import store
from geoseg.raster.geotiff import printable
from geoseg.raster.stac_files import links_of

_PAGE = 250
_PAGE_BYTES = 64 << 20
_TIMEOUT_S = 60
_WAITS_S = (0.5, 2.0, 8.0)
_MOST_PAGES = 100_000
_AGAIN = (408, 429, 500, 502, 503, 504)


def search(api: str, parameters: dict[str, str], *, token: str | None = None) -> Iterator[Any]:
    """The items that ``GET <api>/search`` finds, following the pages' ``next`` links on the API's own host alone.

    They come as the API gives them, unchecked. ``token`` is sent as a bearer's. Raises ConfigError for what is no STAC API or
    refuses the question, AccessDeniedError, StoreError when it keeps failing.
    """
    url = _encoded(f"{api.rstrip('/')}/search?{urlencode({'limit': str(_PAGE), **parameters})}")
    body: dict[str, Any] | None = None
    seen = set[bytes]()
    for _ in range(_MOST_PAGES):
        page = _ask(url, body, token)
        features = page.get("features")
        if not isinstance(features, list):
            raise ConfigError(f"{store.redact(url)}: the answer is no page of STAC items; give the API's root as api")
        yield from features
        try:
            following = _following(page, url, body)
            if following is None:
                return
            next_url, body = following
            key = hashlib.sha256(f"{next_url} {json.dumps(body, sort_keys=True)}".encode()).digest()
        except (ValueError, TypeError, RecursionError) as error:
            raise ConfigError(
                f"{store.redact(url)}: it cannot be told where its next page is: {error}; tell those who run the API"
            ) from error
        if _origin(next_url) != _origin(api):
            raise ConfigError(
                f"{store.redact(api)}: its next page is on another host, {printable(store.redact(next_url))}; not followed"
            )
        if key in seen:
            raise ConfigError(f"{store.redact(api)}: its pages go round in a circle at {store.redact(next_url)}")
        seen.add(key)
        url = next_url
    raise ConfigError(
        f"{store.redact(api)}: more than {_MOST_PAGES} pages; narrow the search by datetime, bbox or collections"
    )


def _following(page: dict[str, Any], url: str, body: dict[str, Any] | None) -> tuple[str, dict[str, Any] | None] | None:
    """Address and body (None for GET) of the page after the one of ``url`` and ``body``; None on the last.

    Raises ValueError and TypeError.
    """
    link = next((link for link in links_of(page) if link.get("rel") == "next"), None)
    if link is None:
        return None
    if not isinstance(link.get("href"), str):
        raise TypeError(f"its next link needs an href, got {link!r:.80}")
    next_url = _encoded(urljoin(url, link["href"]))
    if str(link.get("method", "GET")).upper() != "POST":
        return next_url, None
    told = link.get("body") or {}
    if not isinstance(told, dict):
        raise TypeError(f"the body of its next link is no object, got {told!r:.80}")
    return next_url, {**(body or {}), **told} if link.get("merge") else told


def _encoded(url: str) -> str:
    """A URL as it may be sent: in its path and query what is not ASCII, or blank, is percent-encoded. Raises ValueError."""
    parts = urlsplit(url)
    path, query = (quote(part, safe=punctuation) for part in (parts.path, parts.query))
    return urlunsplit(parts._replace(path=path, query=query, fragment=""))


def _origin(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc


class _SameHost(HTTPRedirectHandler):
    """Follows a redirection on the same host, where the token may go, and nowhere else."""

    def redirect_request(self, req: Request, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Request | None:
        if _origin(newurl) != _origin(req.full_url):
            raise ConfigError(
                f"{store.redact(req.full_url)}: is redirected to another host, {store.redact(newurl)}; name that one as api"
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _ask(url: str, body: dict[str, Any] | None, token: str | None) -> dict[str, Any]:
    headers = {"Accept": "application/geo+json, application/json", "User-Agent": "geoseg"}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    data = json.dumps(body).encode() if body is not None else None
    if data is not None:
        headers["Content-Type"] = "application/json"
    request = Request(url, data=data, headers=headers)  # noqa: S310 - the job's check lets http and https through alone
    opener = build_opener(_SameHost())
    told = ""
    for wait_s in (*_WAITS_S, None):
        try:
            with opener.open(request, timeout=_TIMEOUT_S) as answer:
                text = answer.read(_PAGE_BYTES + 1)
            return _page(url, text)
        except HTTPError as error:
            if error.code in (401, 403):
                raise AccessDeniedError(
                    f"{store.redact(url)}: access denied ({error.code}); check the source's token_env"
                ) from error
            if error.code not in _AGAIN:
                raise ConfigError(
                    f"{store.redact(url)}: the API refused the search: {error.code} {error.reason}"
                ) from error
            told = f"{error.code} {error.reason}"
        except (URLError, HTTPException, OSError) as error:
            told = store.redact(str(error))
        except ValueError as error:
            raise ConfigError(f"{store.redact(url)}: leads to an address that cannot be asked: {error}") from error
        if wait_s is not None:
            time.sleep(wait_s)
    raise StoreError(f"{store.redact(url)}: the API failed {len(_WAITS_S) + 1} times: {told}")


def _page(url: str, text: bytes) -> dict[str, Any]:
    if len(text) > _PAGE_BYTES:
        raise ConfigError(
            f"{store.redact(url)}: a page of more than {_PAGE_BYTES >> 20} MiB; geoseg reads no such pages"
        )
    try:
        page = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{store.redact(url)}: the answer is not JSON; give the API's root as api") from error
    return page if isinstance(page, dict) else {}
