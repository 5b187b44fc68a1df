"""Requests and responses, as routes see them: plain values, nothing of sockets or of h11.

A route is a function from a `Request` to a `Response`; `server` calls it and turns `OmniError`s that
it raises into error responses, so a route says what is wrong in the words of `omnistore.errors`.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from omnistore.errors import OmniError

Headers: TypeAlias = Sequence[tuple[str, str]]

JSON: Final = "application/json"
TEXT: Final = "text/plain; charset=utf-8"


@dataclass(frozen=True, slots=True)
class Request:
    """One request, its body taken in."""

    method: str
    """Upper case: `GET`, `HEAD`, `POST`, …"""
    path: str
    """Percent-decoded, without the query; begins with `/`."""
    query: Mapping[str, str] = field(default_factory=dict)
    """Of a name given several times, the first."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Names in lower case; values of one name joined by commas."""
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class Response:
    """What a route answers."""

    status: int = 200
    body: bytes | memoryview | AsyncIterator[bytes | memoryview] = b""
    """Whole, or in pieces. If the iterator raises, the connection is cut, so that the other side can tell."""
    content_type: str = TEXT
    headers: Headers = ()
    """Beyond `Content-Type` and the length, which `server` writes."""


App: TypeAlias = Callable[[Request], Awaitable[Response]]
"""A whole site. `server` answers HEAD by running it and leaving the body out."""


def json_response(document: Any, status: int = 200, headers: Headers = ()) -> Response:
    """A document as JSON; what JSON does not know is written as its text."""
    return Response(status, json.dumps(document, default=str).encode() + b"\n", JSON, headers)


def text_response(text: str, status: int = 200, headers: Headers = ()) -> Response:
    """A line for a person."""
    return Response(status, text.encode() + b"\n", TEXT, headers)


def error_response(error: OmniError) -> Response:
    """The diagnosis of an error, under its own status."""
    return text_response(error.diagnosis(), error.http_status)
