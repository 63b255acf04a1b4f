"""Who may ask: a page of somebody else's in the same browser may not, nor a stranger without the token.

It stands before the application and knows nothing of what that does. No CORS header is ever sent, so a browser gives
no other page an answer; the Host list keeps out names that were pointed at this machine (DNS rebinding).
"""

import hmac
import ipaddress
import json
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any, NamedTuple, TypeAlias

from moelet.serve.limits import Refusal

Message: TypeAlias = MutableMapping[str, Any]  # ASGI's
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
Application: TypeAlias = Callable[[Message, Receive, Send], Awaitable[None]]

LOCAL = ("localhost", "127.0.0.1", "::1")
OPEN_PATHS = ("/", "/page.css", "/page.js")  # they hold nothing of a run: the page asks for the token itself
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}


class Rules(NamedTuple):
    """Who is let in."""

    hosts: frozenset[str]  # names that requests may call us by
    addresses: bool = False  # or by any address: only names can be pointed at this machine
    token: str | None = None


def name_of(authority: str) -> str:
    """Return the host of "host:port", lower case, an IPv6 address without its brackets; empty where it is none."""
    host, colon, port = authority.rpartition(":")
    if not colon or authority.endswith("]"):
        host, port = authority, "0"
    if not port.isdecimal():
        return ""
    if host.startswith("[") and host.endswith("]"):
        return host[1:-1].lower()
    return "" if ":" in host else host.lower().removesuffix(".")


def is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def refuse(scope: Message, rules: Rules) -> Refusal | None:
    """Return why a request isn't let in, None where it is."""
    headers: dict[str, list[str]] = {}
    for key, value in scope["headers"]:
        headers.setdefault(key.decode("latin-1").lower(), []).append(value.decode("latin-1"))
    hosts = headers.get("host", [])
    name = name_of(hosts[0]) if len(hosts) == 1 else ""
    if not (name in rules.hosts or (rules.addresses and is_address(name))):
        return Refusal(403, "this server isn't called that. Use the address it printed, or --allow-host.", "Host")
    for origin in headers.get("origin", []):
        if origin.partition("://")[2].lower() != hosts[0].lower():
            return Refusal(403, "another page's requests are not answered.", "Origin")
    if rules.token is None or scope["path"] in OPEN_PATHS:
        return None
    kind, _, given = headers.get("authorization", [""])[0].partition(" ")
    if kind.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), rules.token.encode()):
        return None
    return Refusal(401, "this server wants its token, as the API key.", "Authorization")


def guarded(app: Application, rules: Rules) -> Application:
    """Return `app` behind the rules; all that goes out has HEADERS."""

    async def answer(scope: Message, receive: Receive, send: Send) -> None:
        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *_encoded(HEADERS.items())]
            await send(message)

        if scope["type"] != "http":
            return
        refusal = refuse(scope, rules)
        if refusal is None:
            await app(scope, receive, send_safely)
            return
        body = json.dumps(refusal.body()).encode()
        # what was not read is not waited for: the connection ends with the answer
        pairs = (("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close"))
        await send_safely({"type": "http.response.start", "status": refusal.status, "headers": _encoded(pairs)})
        await send_safely({"type": "http.response.body", "body": body})

    return answer


def _encoded(pairs: Iterable[tuple[str, str]]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode()) for name, value in pairs]
