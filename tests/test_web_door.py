"""The door before a page: what is let in, how large, how often, and that files cannot be named in a body."""

import asyncio
import json

import pytest

from hf_dalle import web_door
from hf_dalle.web_door import WORDS, Door, find_network, is_plain


LET_IN = {"GET": r"/|/assets(/\w[\w.-]*)+", "POST": r"/join|/cancel"}


async def echo(scope, receive, send):
    """Answers with the body that it got."""
    message = await receive() if scope["method"] == "POST" else {"body": b"page"}
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": message["body"]})


def make_door(app=echo, max_per_minute=100, max_body_bytes=1000, **options):
    return Door(app, LET_IN, "/join", max_per_minute, max_body_bytes, **options)


async def knock(door, method="GET", path="/", body=b"", address="1.2.3.4", headers=None, num_parts=1):
    size = -(-len(body) // num_parts) or 1
    parts = [body[start : start + size] for start in range(0, len(body), size)] or [b""]
    messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    messages[-1]["more_body"] = False
    answers = []

    async def receive():
        return messages.pop(0)

    async def send(message):
        answers.append(message)

    headers = [(b"content-length", str(len(body)).encode())] if headers is None else headers
    scope = {"type": "http", "method": method, "path": path, "headers": headers, "client": (address, 1)}
    await door(scope, receive, send)
    return answers[0]["status"], answers[1]["body"]


def ask(door, *args, **kwargs):
    return asyncio.run(knock(door, *args, **kwargs))


def post(door, *data, path="/join", **kwargs):
    return ask(door, "POST", path, json.dumps({"data": data, "fn_index": 0}).encode(), **kwargs)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        *(("GET", path) for path in ("/config", "/file=/etc/hostname", "/assets/../x", "/assets", "/join", "//")),
        *(("POST", path) for path in ("/", "/upload", "/join/", "/join\n")),
        *(("PUT", "/"), ("DELETE", "/join"), ("OPTIONS", "/")),
    ],
)
def test_nothing_else_is_let_in(method, path):
    status, body = ask(make_door(), method, path, b"{}")
    assert status == 404 and json.loads(body) == {"detail": WORDS[404]}


def test_what_the_page_needs_is_let_in():
    assert ask(make_door()) == (200, b"page") == ask(make_door(), "HEAD")
    assert ask(make_door(), "GET", "/assets/a/b.js") == (200, b"page")
    body = json.dumps({"data": ["a", 1, 0.5, None, True], "session_hash": "x"}).encode()
    for num_parts in (1, 3):
        assert ask(make_door(), "POST", "/join", body, num_parts=num_parts) == (200, body)
    assert ask(make_door(), "POST", "/cancel", b'{"event_id": "x"}')[0] == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"no json",
        b"[]",
        b"[" * 900,
        b'{"data": null}',
        b'{"data": {"path": "x"}}',
        b'{"data": [[]]}',
        json.dumps({"data": ["a", {"path": "http://x/y", "meta": {"_type": "gradio.FileData"}}]}).encode(),
        b'{"data": [1], "data": [{"path": "http://x/y"}]}',
    ],
)
def test_files_cannot_be_named(body):
    assert not is_plain(body)
    assert ask(make_door(), "POST", "/join", body)[0] == 400


def test_sizes():
    door = make_door(max_body_bytes=40)
    assert post(door, "x" * 9)[0] == 200 and post(door, "x" * 99)[0] == 413
    for headers in ([], [(b"content-length", b"-1")], [(b"content-length", b"a")]):
        assert ask(door, "POST", "/join", b"{}", headers=headers)[0] == 411
    # one that says less than it sends
    assert (
        ask(door, "POST", "/join", b'{"data": ["' + b"x" * 90 + b'"]}', headers=[(b"content-length", b"9")])[0] == 400
    )


def test_requests_a_minute_from_one_address():
    seconds = [0.0]
    door = make_door(max_per_minute=2, clock=lambda: seconds[0])
    assert [post(door)[0] for _ in range(4)] == [200, 200, 429, 429]
    assert json.loads(post(door)[1])["detail"] == WORDS[429]
    assert post(door, address="5.6.7.8")[0] == 200
    assert ask(door)[0] == 200 == post(door, path="/cancel")[0]  # not counted
    seconds[0] = 61.0
    assert post(door)[0] == 200 and door.counts.total() == 1  # addresses are forgotten


def test_networks():
    assert find_network({"client": ("1.2.3.4", 5)}) == "1.2.3.4"
    same = {find_network({"client": (f"2001:db8::{end}", 5)}) for end in ("1", "2", "ffff:1")}
    assert same == {"2001:db8::/64"} and find_network({"client": ("2001:db8:0:1::1", 5)}) not in same
    assert find_network({"client": None}) == "" and find_network({"client": ("unix:", 0)}) == "unix:"


def test_requests_at_once(monkeypatch):
    monkeypatch.setattr(web_door, "MAX_OPEN_EACH", 2)
    monkeypatch.setattr(web_door, "MAX_OPEN", 3)

    async def run():
        gate = asyncio.Event()

        async def wait(scope, receive, send):
            await gate.wait()
            await echo(scope, receive, send)

        door = make_door(wait)
        waiting = [asyncio.create_task(knock(door)) for _ in range(2)]
        await asyncio.sleep(0)
        assert (await knock(door))[0] == 503  # of one address
        waiting.append(asyncio.create_task(knock(door, address="b")))
        await asyncio.sleep(0)
        assert (await knock(door, address="c"))[0] == 503  # of all
        gate.set()
        assert [status for status, _ in await asyncio.gather(*waiting)] == [200] * 3
        assert (await knock(door))[0] == 200 and not door.open

    asyncio.run(run())


def test_an_error_behind_the_door_is_counted_off():
    async def fail(scope, receive, send):
        raise RuntimeError

    door = make_door(fail)
    with pytest.raises(RuntimeError):
        ask(door)
    assert not door.open


def test_web_sockets_are_closed_and_the_lifespan_goes_through():
    sent, scopes = [], []

    async def keep(scope, receive, send):
        scopes.append(scope["type"])

    async def send(message):
        sent.append(message)

    door = make_door(keep)
    asyncio.run(door({"type": "websocket", "path": "/"}, None, send))
    assert sent == [{"type": "websocket.close", "code": 1008}] and scopes == []
    asyncio.run(door({"type": "lifespan"}, None, send))
    assert scopes == ["lifespan"]
