"""The door before a page that strangers open: which requests are let in, how large, how many, of plain values only.

Here too what of Gradio's own such a page goes without. What a page shows is its own file's: the demo's,
`gradio_app.py`.
"""

import ipaddress
import json
import re
import time
from collections import Counter
from collections.abc import Callable
from typing import Any


MAX_OPEN = 1000  # requests at once, among them a page's lasting ones
MAX_OPEN_EACH = 150  # of one address
# Options of a Gradio page: no links to elsewhere, nothing kept, no further server or app beside it.
PLAIN_PAGE: dict[str, Any] = {
    "footer_links": [],
    **dict.fromkeys(("run_history", "ssr_mode", "mcp_server", "pwa"), False),
}
# Of its theme: the visitor's own fonts, none is fetched from elsewhere.
OWN_FONTS: dict[str, Any] = {"font": ("system-ui", "sans-serif"), "font_mono": ("ui-monospace", "monospace")}
WORDS = {
    400: "This request is not one that the page makes.",
    404: "There is nothing here.",
    411: "The request does not say how long it is.",
    413: "This is too large.",
    429: "Too many requests from your address: please wait a minute.",
    503: "Too many visitors at once: please try again.",
}


class Door:
    """
    Lets in what a page needs, and nothing else, as an ASGI application before another. Addresses are held in memory
    only, for a minute.

    A body that is let in is a JSON object, the items of whose `data` are plain values. Gradio would take an object
    there for a file, and fetch it from whatever address stands in it.

    Args:
        app: the ASGI application behind it.
        let_in (`dict[str, str]`): for each HTTP method a regular expression of whole paths.
        counted (`str`): a regular expression of the paths whose POST requests are counted.
        max_per_minute (`int`): counted requests from one address (one network of IPv6); more are refused for a while.
        max_body_bytes (`int`): of a POST request's body.
        clock (`Callable`, *optional*): gives seconds.
    """

    def __init__(
        self,
        app: Any,
        let_in: dict[str, str],
        counted: str,
        max_per_minute: int,
        max_body_bytes: int,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.app, self.let_in, self.counted = app, let_in, counted
        self.max_per_minute, self.max_body_bytes, self.clock = max_per_minute, max_body_bytes, clock
        self.since = clock()
        self.counts: Counter = Counter()
        self.open: Counter = Counter()

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        address = find_network(scope)
        self.open[address] += 1
        try:
            refusal = self.judge(scope, address)
            if refusal is None and scope["method"] == "POST":
                body = await read_body(receive, self.max_body_bytes)
                receive = repeat_body(body, receive)
                refusal = None if is_plain(body) else 400
            if refusal is not None:
                return await refuse(refusal, send)
            return await self.app(scope, receive, send)
        finally:
            self.open[address] -= 1
            self.open += Counter()  # drops what is 0

    def judge(self, scope: dict, address: str) -> int | None:
        """The HTTP status to refuse a request with, by all but its body, or `None`."""
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        if not re.fullmatch(self.let_in.get(method, "(?!)"), scope["path"]):
            return 404
        if self.open.total() > MAX_OPEN or self.open[address] > MAX_OPEN_EACH:
            return 503
        if method == "POST":
            length = dict(scope["headers"]).get(b"content-length", b"")
            if not length.isdigit():
                return 411
            if int(length) > self.max_body_bytes:
                return 413
            if re.fullmatch(self.counted, scope["path"]) and self.is_too_often(address):
                return 429
        return None

    def is_too_often(self, address: str) -> bool:
        """Counts this request; whether it is one too many of this minute."""
        if self.clock() - self.since >= 60:
            self.since, self.counts = self.clock(), Counter()
        self.counts[address] += 1
        return self.counts[address] > self.max_per_minute


def find_network(scope: dict) -> str:
    """Where a request comes from: an address, or of IPv6 the network of 2**64 that a household has."""
    host = (scope.get("client") or ("",))[0]
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    return host if address.version == 4 else str(ipaddress.ip_network((address.packed[:8] + bytes(8), 64)))


async def read_body(receive: Any, max_bytes: int) -> bytes:
    """A request's body. The server holds it to the length that it announced; at most `max_bytes` + 1 are kept."""
    body, is_more = b"", True
    while is_more and len(body) <= max_bytes:
        message = await receive()
        body += message.get("body", b"")
        is_more = message["type"] == "http.request" and message.get("more_body", False)
    return body[: max_bytes + 1]


def repeat_body(body: bytes, receive: Any) -> Any:
    """`receive` that gives a body which was read already, and then what comes after it."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> dict:
        return messages.pop() if messages else await receive()

    return receive_again


def is_plain(body: bytes) -> bool:
    """Whether a body is a JSON object, with nothing but strings, numbers, booleans and nulls in its `data`."""
    try:
        message = json.loads(body)
    except (ValueError, RecursionError):
        return False
    data = message.get("data", []) if isinstance(message, dict) else None
    return isinstance(data, list) and not any(isinstance(value, dict | list) for value in data)


async def refuse(status: int, send: Any) -> None:
    """Answers with a status and its words, where the page looks for them."""
    body = json.dumps({"detail": WORDS[status]}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
