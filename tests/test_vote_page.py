"""The page of people's votes in a real browser: several voters at once, a killed server, keys, and what is not served.

Needs the `demo` extra, selenium, and a Chromium with its driver; `make test-browser` gets them.
"""

import base64
import io
import json
from collections import Counter
from contextlib import ExitStack
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import pytest
from evaluation.votes import read_votes
from PIL import Image
from tiny_browser import ask, list_addresses, open_browser, request, save_screenshot, wait_for
from tiny_votes import CAPTION, COLOURS, MODELS, serve, start_server, write_pictures


pytestmark = pytest.mark.browser

# A voter of a page's own: answers by clicks, as fast as the page lets it, presses the button again where nothing
# happened for some seconds, and remembers what was confirmed.
AUTOPILOT = """
window.confirmed = []; window.mistakes = []; window.done = false;
let caption = null, count = null, answered = null, pressed = 0;
window.pilot = setInterval(() => {
  const shown = document.querySelector("#caption")?.textContent;
  const [said, progress] = [...document.querySelectorAll("#progress p")].map((line) => line.textContent.trim());
  if (!shown || !progress) return;
  if (count !== null && progress !== count) {
    if (said === "Saved.") confirmed.push(caption); else mistakes.push(said);
    answered = caption; count = null;
  }
  if (shown === "Thank you!") { window.done = true; return; }
  const radios = [...document.querySelectorAll("#realism input, #match input")].filter((radio) => radio.offsetParent);
  if (count !== null && Date.now() > pressed + 3000) {
    pressed = Date.now();
    document.querySelector("#save").click();
  }
  if (count !== null || shown === answered || radios.length !== 5) return;
  const places = answers[confirmed.length % answers.length];
  radios[places[0]].click(); radios[2 + places[1]].click();
  if (radios.filter((radio) => radio.checked).length !== 2) return;
  caption = shown; count = progress; pressed = Date.now();
  document.querySelector("#save").click();
}, 50);
"""


def open_voters(browser, url, names):
    """A window for each, under hosts of their own, since a browser's memory is a host's; gives the handles."""
    handles = []
    for name in names:
        browser.switch_to.new_window("window")
        browser.get(url.replace("127.0.0.1", f"{name}.test"))
        handles.append(browser.current_window_handle)
    return handles


def read_caption(browser):
    """The caption that the page shows, once its answers can be chosen, or its thanks."""
    ready = "[...document.querySelectorAll('#realism input')].some((r) => r.offsetParent)"
    thanks = "document.querySelector('#caption')?.textContent === 'Thank you!'"
    wait_for(lambda: ask(browser, f"{ready} || {thanks}"))
    return ask(browser, "document.querySelector('#caption').textContent")


def read_sides(browser):
    """The models whose pictures stand on the left and on the right, by the colours of the pixels that are shown."""
    script = """
    return [...document.querySelectorAll("#ballot img")].map((image) => {
      const canvas = document.createElement("canvas"), pen = canvas.getContext("2d");
      canvas.width = canvas.height = 1; pen.drawImage(image, 0, 0, 1, 1);
      return pen.getImageData(0, 0, 1, 1).data[0] > 128 ? "red" : "blue";
    });"""
    of_colour = {colour: name for name, colour in COLOURS.items()}
    return [of_colour[colour] for colour in browser.execute_script(script)]


def test_a_voter_with_the_keyboard_alone(tmp_path):
    from selenium.webdriver import ActionChains, Keys

    write_pictures(tmp_path)
    answers = {"row-0": "13", "row-1": "24", "row-2": "15", "row-3": "23"}
    expected = {}
    with serve(tmp_path, "--port", "0") as url, open_browser() as browser:
        browser.get(url)
        for number in range(4):
            row = f"row-{read_caption(browser).rsplit(' ', 1)[1]}"
            sides = read_sides(browser)
            assert sorted(sides) == sorted(MODELS) and row not in expected
            if number == 0:
                save_screenshot(browser, "page")
                # the caption is text, whatever it holds; both pictures have one size, and say nothing of their models
                assert ask(browser, "document.querySelector('#caption').textContent") == CAPTION.format(row[4:])
                assert ask(browser, "document.querySelectorAll('#caption *').length") == 0
                sizes = ask(browser, "[...document.querySelectorAll('#ballot img')].map((i) => i.naturalWidth)")
                assert sizes == [16, 16]
                ActionChains(browser).send_keys(Keys.ENTER).perform()  # nothing is chosen yet
                wait_for(lambda: "answer both" in ask(browser, "document.querySelector('#said').textContent"))
            first, second = answers[row]
            ActionChains(browser).send_keys(first, second).perform()
            wait_for(lambda: ask(browser, "document.querySelectorAll('input:checked').length") == 2)
            if number == 1:
                save_screenshot(browser, "answered")
            ActionChains(browser).send_keys(Keys.ENTER).perform()
            expected[row] = (sides["12".index(first)], [*sides, "neither"]["345".index(second)], sides[0])
            wait_for(
                lambda n=number: f"{n + 1} of 4" in ask(browser, "document.querySelector('#progress').textContent")
            )
            if number < 3:
                assert ask(browser, "document.querySelectorAll('input:checked').length") == 0
                assert ask(browser, "document.querySelector('#said').textContent") == "Saved."
        assert read_caption(browser) == "Thank you!"
        save_screenshot(browser, "thanks")
        browser.refresh()  # the browser remembers its voter
        assert read_caption(browser) == "Thank you!"
        source = browser.page_source
        addresses = list_addresses(browser)
        assert browser.get_log("browser") == []
    assert addresses and [address for address in addresses if not address.startswith((url, "data:"))] == []
    assert not any(name in text for name in (*MODELS, str(tmp_path)) for text in (source, *addresses))
    _, votes, num_cut = read_votes(tmp_path / "votes.jsonl")
    assert num_cut == 0 and len({vote["voter"] for vote in votes}) == 1
    assert {vote["row"]: (vote["realism"], vote["match"], vote["left"]) for vote in votes} == expected


def test_the_page_fits_a_telephone(tmp_path):
    write_pictures(tmp_path)
    with serve(tmp_path, "--port", "0") as url, open_browser() as browser:
        browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride", {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
        )
        browser.get(url)
        read_caption(browser)
        save_screenshot(browser, "telephone")
        assert ask(browser, "document.documentElement.scrollWidth") <= 360
        assert browser.get_log("browser") == []


def start_pilots(browser, url, num_voters, answers):
    handles = open_voters(browser, url, [f"voter-{number}" for number in range(num_voters)])
    for number, handle in enumerate(handles):
        browser.switch_to.window(handle)
        read_caption(browser)
        own = answers[number:] + answers[:number]
        browser.execute_script(f"const answers = {json.dumps(own)}; {AUTOPILOT}")
    return handles


def collect(browser, handles):
    """What each window's voter was told that it was saved, and what else it was told."""
    confirmed, mistakes = [], []
    for handle in handles:
        browser.switch_to.window(handle)
        wait_for(lambda: ask(browser, "window.done"))
        confirmed += ask(browser, "window.confirmed")
        mistakes += ask(browser, "window.mistakes")
    return confirmed, mistakes


def test_voters_at_once_in_two_browsers_lose_nothing(tmp_path):
    write_pictures(tmp_path, num_captions=12)
    answers = [[0, 0], [1, 2], [1, 1], [0, 2], [0, 1]]
    with serve(tmp_path, "--port", "0") as url, ExitStack() as stack:
        browsers = [stack.enter_context(open_browser()) for _ in range(2)]
        handles = [start_pilots(browser, url, 3, answers) for browser in browsers]
        told = [collect(browser, own) for browser, own in zip(browsers, handles, strict=True)]
        for browser in browsers:
            assert browser.get_log("browser") == []
    study, votes, num_cut = read_votes(tmp_path / "votes.jsonl")
    assert [mistakes for _, mistakes in told] == [[], []] and num_cut == 0
    assert Counter(vote["row"] for vote in votes) == dict.fromkeys(study.captions, 5)
    assert len({(vote["row"], vote["voter"]) for vote in votes}) == len(votes) == sum(len(own) for own, _ in told)
    assert 5 <= len({vote["voter"] for vote in votes}) <= 6
    assert {vote["left"] for vote in votes} == {*MODELS}


def test_a_killed_server_keeps_every_confirmed_vote(tmp_path):
    write_pictures(tmp_path, num_captions=30)
    path = tmp_path / "votes.jsonl"
    process, url = start_server(tmp_path, "--port", "0")
    port = str(urlsplit(url).port)
    with ExitStack() as stack:
        stack.callback(lambda: process.kill())  # the last one
        browser = stack.enter_context(open_browser())
        handles = start_pilots(browser, url, 3, [[0, 0], [1, 2], [1, 1]])
        confirmed = []
        for round_ in range(2):
            wait_for(lambda n=round_: len(path.read_bytes().splitlines()) > 8 * (n + 1))
            process.kill()
            process.join()
            for handle in handles:
                browser.switch_to.window(handle)
                confirmed += ask(browser, "window.confirmed")
                wait_for(lambda: "reconnection" in ask(browser, "document.body.innerText"))  # the page says so
            votes = read_votes(path)[1]
            of_caption = Counter(CAPTION.format(vote["row"][4:]) for vote in votes)
            assert not Counter(confirmed) - of_caption  # each that was confirmed is there
            process, _ = start_server(tmp_path, "--port", port)
            for handle in handles:
                browser.switch_to.window(handle)
                wait_for(lambda: ask(browser, "!window.confirmed"))  # it has loaded again by itself
                read_caption(browser)
                browser.execute_script(f"const answers = [[0, 2], [1, 0]]; {AUTOPILOT}")
        more, _ = collect(browser, handles)
    study, votes, _ = read_votes(path)
    assert Counter(vote["row"] for vote in votes) == dict.fromkeys(study.captions, 3)  # three voters, each once
    assert len({(vote["row"], vote["voter"]) for vote in votes}) == len(votes) >= len(confirmed) + len(more)
    assert len({vote["voter"] for vote in votes}) == 3  # known again


def read_cookie(url, brought=""):
    """The voter's cookie that a visit gives, `None` where the visitor has one."""
    with urlopen(Request(url, headers={"Cookie": brought})) as answer:
        given = answer.headers.get("Set-Cookie")
    if given is None:
        return None
    cookie, *attributes = given.split("; ")
    assert {"HttpOnly", "SameSite=lax", "Path=/"} <= {*attributes}
    return cookie


def test_nothing_else_is_served_and_posts_are_bounded(tmp_path):
    write_pictures(tmp_path)
    picture = tmp_path / MODELS[0] / "row-0.png"
    join = {"Content-Type": "application/json"}
    predict = "/gradio_api/run/predict"
    with serve(tmp_path, "--port", "0", "--max_per_minute", "40") as url:
        for path in (
            *(f"/gradio_api/file={picture}", f"/file={picture}", "/gradio_api/file=/etc/hostname"),
            *("/static/../../../../etc/hostname", "/static/%2e%2e/%2e%2e/etc/hostname", "/assets/%2fetc/hostname"),
            *("/config", "/gradio_api/info", "/gradio_api/openapi.json", "/docs", "/monitoring", "/gradio_api/runs"),
            *("/votes.jsonl.key", "/gradio_api/proxy=https://example.com", "/gradio_api/upload_progress?upload_id=1"),
        ):
            assert request(url, "GET", path)[0] == 404, path
        for path in ("/gradio_api/upload", "/gradio_api/queue/join", "/gradio_api/call/save", "/login", "/"):
            assert request(url, "POST", path, b"{}", join)[0] == 404, path
        assert request(url, "PUT", "/")[0] == request(url, "DELETE", predict)[0] == 404
        cookie = read_cookie(url)
        assert read_cookie(url) != cookie and read_cookie(url, cookie) is None
        assert request(url, "POST", predict, b"x" * 20_000, join)[0] == 413
        assert request(url, "POST", predict, iter([b"{}"]), join)[0] == 411  # in chunks, of no length known before

        def post(number, *data, cookie=""):
            body = json.dumps({"fn_index": number, "data": data, "session_hash": "a"}).encode()
            status, answer = request(url, "POST", predict, body, {**join, "Cookie": cookie})
            return status, json.loads(answer) if status == 200 else answer

        # what no page sends is refused, and the server goes on
        for data in ((), ("x",), (None, None, None), ({"a": 1}, "left", "left"), ("x", "ours", "left")):
            for number in (0, 1, 2, 99):
                post(number, *data, cookie=cookie)
        file = {"path": "x", "url": url, "meta": {"_type": "gradio.FileData"}}  # which gradio would fetch
        assert post(1, file, "left", "left", cookie=cookie)[0] == 400
        assert read_votes(tmp_path / "votes.jsonl")[1] == []
        for wrong in ("", cookie[:-1], "voter=1"):
            status, answer = post(0, cookie=wrong)
            assert status == 200 and "cookie" in answer["data"][0] and "base64" not in answer["data"][0]
        status, answer = post(0, cookie=cookie)
        page = answer["data"][0]
        assert status == 200 and page.count("data:image/png;base64,") == 2
        encoded = page.split("base64,")[1].split('"')[0]
        image = Image.open(io.BytesIO(base64.b64decode(encoded)))
        assert image.size == (16, 16) and not image.info and not any(name in page for name in MODELS)
        ballot = page.split('data-ballot="')[1].split('"')[0]
        status, answer = post(1, ballot, "left", "neither", cookie=cookie)
        assert status == 200 and "Saved." in answer["data"][3]
        for _ in range(40):
            status, _ = post(1, ballot, "left", "neither", cookie=cookie)
        assert status == 429 == request(url, "GET", "/")[0]
        assert request(url, "GET", "/theme.css")[0] == 200
    assert len(read_votes(tmp_path / "votes.jsonl")[1]) == 1
    (log,) = tmp_path.glob("server-*.txt")
    assert "127.0.0.1" not in log.read_text().replace(url, "")  # no visitor's address
