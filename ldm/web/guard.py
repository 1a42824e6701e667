"""Who may ask, from where, and how much: looked at before a request's body is read."""

from __future__ import annotations

import asyncio
import hmac
from base64 import b64decode
from collections.abc import Collection
from dataclasses import dataclass
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ldm.errors import UserError
from ldm.web.limits import Limits

MB = 10**6
SHORTEST = 12  # letters of a token or password
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}

MORE = {401: {"WWW-Authenticate": 'Basic realm="ldm", charset="UTF-8"'}, 503: {"Retry-After": "5"}}  # with a status


@dataclass(frozen=True)
class Gate:
    """A token, or a user and a password; nothing at all lets everyone in who reaches the address."""

    token: str = ""
    user: str = ""
    password: str = ""

    def __post_init__(self) -> None:
        if bool(self.user) != bool(self.password):
            raise UserError("a user needs a password and a password a user; give both")
        for name, secret in (("token", self.token), ("password", self.password)):
            if secret and len(secret) < SHORTEST:
                raise UserError(f"the {name} has {len(secret)} letters; choose one of {SHORTEST} or more")

    @property
    def closed(self) -> bool:
        return bool(self.token or self.password)

    def opens(self, authorization: str) -> bool:
        """Whether a header says the token (as a bearer's, or as a password of any user) or user and password."""
        kind, _, given = authorization.partition(" ")
        if kind.lower() == "bearer":
            return bool(self.token) and _same(given.strip(), self.token)
        try:
            user, _, password = b64decode(given, validate=True).decode().partition(":")
        except ValueError:
            return False
        if kind.lower() != "basic":
            return False
        by_token = bool(self.token) and _same(password, self.token)
        return by_token or (bool(self.password) and _same(user, self.user) & _same(password, self.password))


@dataclass(eq=False)
class Guard:
    """ASGI middleware. `hosts`: names that the server is reached by, beside localhost and addresses in numbers, which
    no foreign name can be bound to."""

    app: ASGIApp
    limits: Limits
    gate: Gate
    hosts: Collection[str] = ()
    held: int = 0  # bytes of the bodies of requests that are not answered yet

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def headed(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        headers = Headers(scope=scope)
        length = headers.get("content-length", "0")
        if refused := self._refuse(headers) or self._refuse_length(length):
            return await refuse(Request(scope), refused)(scope, receive, headed)
        self.held += int(length)
        reading = _Reading(self, receive, int(length), asyncio.get_running_loop().time() + self.limits.slow_seconds)
        try:
            await self.app(scope, reading, headed)
        finally:
            self.held -= reading.taken

    def _refuse(self, headers: Headers) -> HTTPException | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self._known(host):
            said = f"this server is not known as {host[:60]!r}; start it with --allow-host to have it answer to that"
            return HTTPException(421, said)
        if origin is not None and origin.partition("://")[2] != host:
            return HTTPException(403, f"pages of {origin[:60]!r} may not use this server; open its own page")
        if self.gate.closed and not self.gate.opens(headers.get("authorization", "")):
            return HTTPException(401, "who are you? Give the token, or user and password, that the server was given")
        return None

    def _refuse_length(self, length: str) -> HTTPException | None:
        if not length.isascii() or not length.isdecimal() or len(length) > 15:
            return HTTPException(400, "the content's length is not a number; leave it to your client")
        return self.too_much(int(length), int(length))

    def too_much(self, own: int, more: int) -> HTTPException | None:
        """What is wrong with `own` bytes in one body, and `more` than now in all bodies."""
        if own > self.limits.most_megabytes * MB:
            return HTTPException(413, f"a request may have {self.limits.most_megabytes} MB; make its pictures smaller")
        if self.held + more > self.limits.all_megabytes * MB:
            return HTTPException(503, "too many large requests wait for their turns; try again later")
        return None

    def _known(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
            if name == "localhost" or name in self.hosts:
                return True
            return bool(ip_address(name))
        except ValueError:
            return False


class _Reading:
    """A request's body as it comes in: bounded in time, and in bytes where it did not say before how many it has."""

    def __init__(self, guard: Guard, receive: Receive, length: int, end: float) -> None:
        self._guard, self._receive, self._end = guard, receive, end
        self._whole = False
        self._said = length
        self.taken = length

    async def __call__(self) -> Message:
        if self._whole:  # all that may come is that the client goes away
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._end):
                message = await self._receive()
        except TimeoutError:
            raise HTTPException(408, "the request took too long to come; try a better line") from None
        more = 0 if self._said else len(message.get("body", b""))
        if refused := self._guard.too_much(self.taken + more, more):
            raise refused
        self.taken += more
        self._guard.held += more
        self._whole = not message.get("more_body", False)
        return message


def refuse(request: Request, error: Exception) -> JSONResponse:
    """The answer to a request that is refused: a status, and a sentence."""
    assert isinstance(error, HTTPException)  # HEADERS too: what answers for a fault of our own stands outside Guard
    return JSONResponse({"error": error.detail}, error.status_code, HEADERS | MORE.get(error.status_code, {}))


def _same(given: str, wanted: str) -> bool:
    return hmac.compare_digest(given.encode(errors="replace"), wanted.encode(errors="replace"))
