"""Check every request before the API sees it: host, key, type and size of the body.

It is written against ASGI itself, because a body must be bounded before it is read.
"""

import asyncio
import base64
import binascii
import hmac
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

_BODY_TIMEOUT = 30.0
"""Seconds within which the next part of a body must arrive."""
_LOCAL = ("localhost", "127.0.0.1", "::1")


def error_body(message: str, *, kind: str = "invalid_request_error") -> dict[str, Any]:
    """Return an error in OpenAI's shape."""
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


@dataclass(frozen=True)
class Guard:
    """Wrap an ASGI application.

    Args:
        keys: accepted as bearer tokens, and as passwords of any name; none means that anybody may
            ask.
        hosts: names by which the server may be addressed; none means any.
        most_bytes: of a body.
        origins: sites, beside the server's own, whose pages may send bodies from a browser.
    """

    app: Any
    keys: Sequence[str]
    hosts: Sequence[str]
    most_bytes: int
    origins: Sequence[str] = ()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return  # there are no websockets
        headers = {name.lower(): value for name, value in scope["headers"]}
        refused = self._refused(scope, headers)
        if refused is not None:
            await _respond(send, *refused)
            return
        body = _Body(receive, send, self.most_bytes)
        try:
            await self.app(scope, body.receive, body.send)
        finally:
            await body.finish()

    def _refused(self, scope: Any, headers: dict[bytes, bytes]) -> tuple[int, str] | None:
        own = headers.get(b"host", b"").decode("latin-1")
        host = _host_name(own)
        if self.hosts and host not in (*self.hosts, *_LOCAL):
            return 400, f"the host {host!r} is not this server's; add it with --allow-host"
        if self.keys and scope["path"] != "/health" and not self._has_key(headers):
            return 401, "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'"
        if scope["method"] in ("POST", "PUT", "PATCH", "DELETE"):
            # Browsers send a form of any site, with the key that the user gave to this one.
            origin = headers.get(b"origin", b"").decode("latin-1")
            known = origin.partition("://")[2] == own or {origin, "*"} & set(self.origins)
            if origin and not known:
                return 403, f"the site {origin[:100]!r} may not ask; add it with --allow-origin"
        if scope["method"] in ("POST", "PUT", "PATCH"):
            kind = headers.get(b"content-type", b"").decode("latin-1").partition(";")[0].strip()
            # A form of another site in a browser could send the other types without asking.
            if kind.lower() not in ("application/json", "multipart/form-data"):
                return 415, f"the content type is {kind!r}; send application/json"
            length = headers.get(b"content-length", b"0")
            if not length.isdigit() or int(length) > self.most_bytes:
                return 413, (
                    f"the body has {length.decode('latin-1')} bytes and the limit is "
                    f"{self.most_bytes:,}; send less"
                )
        return None

    def _has_key(self, headers: dict[bytes, bytes]) -> bool:
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() == b"basic":  # a browser, which asks its user for a name and a password
            try:
                key = base64.b64decode(key, validate=True).partition(b":")[2]
            except binascii.Error:
                return False
        elif scheme.lower() != b"bearer":
            return False
        matches = [hmac.compare_digest(key.strip(), one.encode()) for one in self.keys]
        return any(matches)


def _host_name(address: str) -> str:
    """Return the name in a `Host` header, without its port; empty if there is none."""
    try:
        return urlsplit(f"//{address}").hostname or ""
    except ValueError:  # an opening bracket alone, for example
        return ""


class _Body:
    """Count the bytes of a body as they arrive, and limit the time between two parts.

    The application sees a body that ends too early; what it answers is replaced.
    """

    def __init__(self, receive: Any, send: Any, most_bytes: int) -> None:
        self._receive, self._send, self._left = receive, send, most_bytes
        self._complete = False
        self._refused: tuple[int, str] | None = None

    async def receive(self) -> Any:
        if self._complete:
            return await self._receive()  # waits until the client leaves
        try:
            message = await asyncio.wait_for(self._receive(), _BODY_TIMEOUT)
        except TimeoutError:
            return self._refuse(408, f"no more of the body came in {_BODY_TIMEOUT:g} s")
        if message["type"] == "http.request":
            self._left -= len(message.get("body", b""))
            self._complete = not message.get("more_body", False)
            if self._left < 0:
                return self._refuse(413, "the body is larger than the limit; send less")
        return message

    def _refuse(self, status: int, message: str) -> Any:
        self._refused = status, message
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if self._refused is None:
            await self._send(message)

    async def finish(self) -> None:
        """Answer in place of the application if the body was refused."""
        if self._refused is not None:
            await _respond(self._send, *self._refused)


async def _respond(send: Any, status: int, message: str) -> None:
    data = json.dumps(error_body(message)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(data))]
    if status == 401:
        headers.append((b"www-authenticate", b'Bearer, Basic realm="the key is the password"'))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": data})
