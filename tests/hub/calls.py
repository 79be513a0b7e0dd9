"""Requests, answers and errors of the stand-in, and how a request finds the function that carries it out."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from .repository import Commit, Repository

if TYPE_CHECKING:
    from .standin import HubStandIn

LOGIN = "Invalid username or password."
BAD_TOKEN = "Invalid credentials in Authorization header"


@dataclass
class Request:
    """One request as it went. `status` is None where no answer was sent; the counts are of body bytes."""

    method: str
    path: str
    headers: dict[str, str]  # names in lower case
    status: int | None = None
    received: int = 0
    sent: int = 0


@dataclass(frozen=True)
class Answer:
    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


class Refused(Exception):  # noqa: N818
    """An answer that is an error of the Hub."""

    def __init__(self, status: int, message: str, code: str | None = None, **more: Any) -> None:
        super().__init__(message)
        self.answer = refusal(status, message, code, more)


class Dropped(Exception):  # noqa: N818
    """The connection ends here."""

    def __init__(self, reset: bool) -> None:
        super().__init__()
        self.reset = reset


def refusal(status: int, message: str, code: str | None, more: Mapping[str, Any]) -> Answer:
    headers = {"Content-Type": "application/json; charset=utf-8", "X-Error-Message": message}
    if code is not None:
        headers["X-Error-Code"] = code
    return Answer(status, json.dumps({"error": message, **more}).encode(), headers)


def json_answer(value: Any, status: int = 200, **headers: str) -> Answer:
    return Answer(status, json.dumps(value).encode(), {"Content-Type": "application/json; charset=utf-8", **headers})


@dataclass(frozen=True)
class Call:
    """What a route is given: the caller, the path's parts by name, the query and the body."""

    method: str
    user: str | None
    may_write: bool
    parts: Mapping[str, str]
    query: Mapping[str, str]
    body: bytes
    headers: Mapping[str, str]

    def json(self) -> Any:
        try:
            return json.loads(self.body or b"{}")
        except ValueError as error:
            raise Refused(400, f"Invalid JSON: {error}") from error

    @property
    def kind(self) -> str:
        return (self.parts.get("kind") or "models").strip("/")[:-1]


Route = Callable[["HubStandIn", Call], Answer]
_ROUTES: list[tuple[str, re.Pattern[str], Route]] = []
API = r"/api/(?P<kind>models|datasets|spaces)/(?P<repo>[^/]+/[^/]+)"
WEB = r"/(?P<kind>datasets/|spaces/)?(?P<repo>[^/]+/[^/]+)"


def route(methods: str, path: str) -> Callable[[Route], Route]:
    def keep(function: Route) -> Route:
        _ROUTES.extend((method, re.compile(path), function) for method in methods.split())
        return function

    return keep


def find_route(method: str, path: str) -> tuple[Route, dict[str, str]]:
    for wanted, pattern, function in _ROUTES:
        if wanted == method and (match := pattern.fullmatch(path)):
            return function, {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
    raise Refused(404, f"Sorry, the stand-in knows no {method} {path}")


def commit_at(repo: Repository, revision: str) -> Commit:
    oid = repo.find(revision)
    if oid is None:
        raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    return repo.commits[oid]


def kind_prefix(kind: str) -> str:
    return "" if kind == "model" else f"{kind}s/"
