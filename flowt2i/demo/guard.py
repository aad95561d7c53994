"""What stands in front of the page and the API: only the routes they need, only small requests, only so many at once, and a password where one is set.

Gradio serves files, uploads, proxies and every function by a route of its own; this page uses none of them, so they are closed, not configured.
"""

import asyncio
import base64
import hmac
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, MutableMapping
from typing import Any
from urllib.parse import parse_qsl

Scope = MutableMapping[str, Any]
Receive = Callable[[], Any]
Send = Callable[[Any], Any]

LARGEST_BODY = 64 * 1024  # bytes; the longest prompt twice, in any script, and room for the rest
SLOWEST_BODY = 10.0  # seconds that a request may take to arrive
CONNECTIONS = {"listening": 200, "requests": 200}  # at once; a page listens while it waits or is drawn for
LISTENERS = 2  # of one session (a page that lost its connection comes back before it is missed); those of all mailboxes are fewer than may listen
HERE = frozenset({"127.0.0.1", "localhost", "[::1]"})  # the names of this machine, to itself

LISTENING = "/gradio_api/queue/data"  # stays open, so it is counted apart; heartbeats, which would too, this page needs none of
READ = ("/config", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt", "/pwa_icon", "/gradio_api/startup-events", "/gradio_api/info",
        "/gradio_api/theme.css", LISTENING, "/api/health", "/api/models")  # fmt: skip
READ_UNDER = ("/assets/", "/static/", "/svelte/", "/pwa_icon/")
WRITE = ("/gradio_api/queue/join", "/gradio_api/cancel", "/gradio_api/reset", "/api/generate")
CLOSED_TO_ALL_BUT_THE_SERVER = "/gradio_api/startup-events"  # which asks it of itself, before the first visitor, without a password

HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    # the page loads nothing from elsewhere and sends nothing elsewhere
    (b"content-security-policy", b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; form-action 'self'; base-uri 'self'; object-src 'none'; "
                                 b"frame-ancestors 'self'"),
]  # fmt: skip


class Guard:
    """ASGI middleware. functions: says which of the page's functions may be called; auth: (user, password) or None; hosts: the names the server may be
    called by (None: any), so that no foreign page reaches it by a name of its own that points to this machine (DNS rebinding)."""

    def __init__(
        self, app: Any, functions: Callable[[], Collection[int]], auth: tuple[str, str] | None = None, hosts: Collection[str] | None = HERE,
    ):  # fmt: skip
        self.app, self.functions, self.hosts = app, functions, hosts
        self.expected = base64.b64encode(":".join(auth).encode()) if auth else None
        self.open: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # the page needs no websocket
            await send({"type": "websocket.close", "code": 1008})
            return
        kinds = kinds_of(scope)
        if any(self.open[kind] >= CONNECTIONS.get(kind, LISTENERS) for kind in kinds):
            await refuse(send, 429, "too many requests at once: come back in a minute", [(b"retry-after", b"30")])
            return
        self.open.update(kinds)
        try:
            await self._serve(scope, receive, send)
        finally:
            self.open.subtract(kinds)
            self.open = +self.open  # without those of which none is left

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, method = scope["path"], scope["method"]
        if self.hosts is not None and host(scope) not in self.hosts:
            await refuse(send, 403, "this server answers to 127.0.0.1 and localhost only")
            return
        if self.expected and path != CLOSED_TO_ALL_BUT_THE_SERVER and not self._known(scope):
            await refuse(send, 401, "a user name and a password are needed", [(b"www-authenticate", b'Basic realm="flowt2i"')])
            return
        if not allowed(method, path):
            await refuse(send, 403, "closed")
            return
        if method == "POST":
            body = await read(receive)
            if body is None:
                await refuse(send, 413, f"a request may have {LARGEST_BODY:,} bytes and take {SLOWEST_BODY:.0f} s to arrive", [(b"connection", b"close")])
                return
            wrong = problem(path, body, self.functions)
            if wrong:
                await refuse(send, 400, wrong)
                return
            receive = replay(body, receive)
        await self.app(scope, receive, with_headers(send))

    def _known(self, scope: Scope) -> bool:
        for name, value in scope["headers"]:
            if name == b"authorization":
                kind, _, given = value.partition(b" ")
                return kind.lower() == b"basic" and hmac.compare_digest(given.strip(), self.expected or b"")
        return False


def kinds_of(scope: Scope) -> list[str]:
    """As what a connection is counted: a request, or one that listens, for all and for its session."""
    if scope["path"] != LISTENING:
        return ["requests"]
    return ["listening", "session " + dict(parse_qsl(scope["query_string"].decode("latin-1"))).get("session_hash", "")[:64]]


def host(scope: Scope) -> str:
    """The name a request calls the server by, without the port; "" where it names none, or several."""
    names = [value.decode("latin-1").strip().lower() for name, value in scope["headers"] if name == b"host"]
    return re.sub(r":\d*$", "", names[0]) if len(names) == 1 else ""


def allowed(method: str, path: str) -> bool:
    """Whether a route is one of those that the page and the API need."""
    if ".." in path or "\\" in path or "\0" in path:
        return False
    if method in ("GET", "HEAD"):
        return path == "/" or path in READ or path.startswith(READ_UNDER)
    return method == "POST" and path in WRITE


async def read(receive: Receive) -> bytes | None:
    """The whole body; None where it is too large or too slow."""
    parts, size = [], 0
    try:
        async with asyncio.timeout(SLOWEST_BODY):
            while True:
                message = await receive()
                if message["type"] != "http.request":
                    return None
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > LARGEST_BODY:
                    return None
                if not message.get("more_body"):
                    return b"".join(parts)
    except TimeoutError:
        return None


def replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that hands out a body already read, then whatever comes after it (that the client has gone)."""
    given = False

    async def again() -> Any:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def problem(path: str, body: bytes, functions: Callable[[], Collection[int]]) -> str | None:
    """What is wrong with a body, or None. What the page sends is checked for its form here; the values in it are checked where they are used."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return "the body is not JSON"
    if not isinstance(content, dict):
        return "the body must be a JSON object"
    if path.startswith("/gradio_api/"):
        for name in ("event_id",) if path.endswith("/reset") else ("session_hash",):
            if not isinstance(content.get(name), str) or not 1 <= len(content[name]) <= 64:
                return f"{name} is missing"
        if path.endswith("/join") and (not isinstance(content.get("data"), list) or len(content["data"]) > 32):
            return "data must be a list"
        function = content.get("fn_index")
        if not path.endswith("/reset") and (type(function) is not int or function not in functions()):
            return "no such function"
    return None


async def refuse(send: Send, status: int, why: str, headers: list[tuple[bytes, bytes]] | None = None) -> None:
    """A short answer in JSON."""
    body = json.dumps({"error": why}).encode()
    fixed = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": fixed + (headers or [])})
    await send({"type": "http.response.body", "body": body})


def with_headers(send: Send) -> Send:
    """Add `HEADERS` to the answer."""

    async def sending(message: Any) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), *HEADERS]}
        await send(message)

    return sending
