"""The demo's page in a real browser: from a caption to a saved picture, a wrong upload, ten visitors, what is closed.

Needs the `demo` extra, selenium, and a Chromium with its driver; `make test-browser` gets them.
"""

import base64
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import build_pipeline, build_reranker
from tiny_browser import ask, list_addresses, open_browser, request, save_screenshot, wait_for
from tiny_processes import finish, fork, wait_until

from hf_dalle import cli
from hf_dalle.provenance import read_provenance


pytestmark = pytest.mark.browser

ROOT = Path(__file__).parents[1]
JOIN = "/gradio_api/queue/join"
JSON = {"Content-Type": "application/json"}
PROMPT = "a <b>fox"
# Values are set as by a person: the page hears of each.
SET = """
const field = document.querySelector(arguments[0]), kind = field.tagName === "TEXTAREA" ? "TextArea" : "Input";
Object.getOwnPropertyDescriptor(window[`HTML${kind}Element`].prototype, "value").set.call(field, arguments[1]);
for (const name of ["input", "change", "pointerup"]) field.dispatchEvent(new Event(name, {bubbles: true}));
field.blur();
"""
SAID = "document.querySelector('#said')?.textContent ?? ''"


def run_demo(arguments):
    """`hf-dalle demo` in the new process."""
    sys.exit(cli.main(["demo", *arguments]))


@contextmanager
def serve(folder, *options, checkpoint=None, **parts):
    """The address of a page, by default of a tiny pipeline; it ends, as by Ctrl-C, with the block."""
    if checkpoint is None:
        checkpoint = folder / "tiny"
        build_pipeline(**parts).save_pretrained(checkpoint)
    log, temporary = folder / "server.txt", folder / "temporary"
    log.touch()
    temporary.mkdir(exist_ok=True)
    process = fork(
        run_demo,
        [str(checkpoint), "--device", "cpu", *options],
        output=log,
        # onnxruntime, of the extra `safety`, else keeps a telemetry session there when diffusers imports it
        environment={"TMPDIR": str(temporary), "ORT_DISABLE_TELEMETRY": "1"},
        preload="hf_dalle.gradio_app",
    )
    try:
        wait_until(lambda: "Open on http" in log.read_text(), process, timeout=600)
        yield re.search(r"Open on (http://\S+?)/?\s", log.read_text())[1]
    finally:
        os.kill(process.pid, signal.SIGINT)
        assert finish(process, timeout=60) == [0]
    assert "fox" not in log.read_text() and "Traceback" not in log.read_text(), log.read_text()
    assert [path for path in temporary.rglob("*") if path.is_file()] == []


def set_value(browser, selector, value):
    browser.execute_script(SET, selector, str(value))


def open_page(browser, url):
    browser.get(url)
    wait_for(lambda: ask(browser, "[...document.querySelectorAll('#draw')].some((button) => button.offsetParent)"))


def draw(browser, prompt, seed=None):
    """Asks as a visitor does."""
    set_value(browser, "#prompt textarea, #prompt input", prompt)
    if seed is not None:
        if ask(browser, "document.querySelector('#new-seed input').checked"):
            browser.execute_script("document.querySelector('#new-seed input').click()")
        set_value(browser, "#seed input", seed)
    browser.execute_script("document.querySelector('#draw').click()")


def read_files(browser):
    """The PNG files of a gallery that is whole."""
    wait_for(lambda: ask(browser, "document.querySelectorAll('#gallery a').length") > 0)
    addresses = ask(browser, "[...document.querySelectorAll('#gallery a')].map((link) => link.href)")
    assert addresses == ask(browser, "[...document.querySelectorAll('#gallery img')].map((image) => image.src)")
    return [decode(address) for address in addresses]


def decode(address):
    kind, content = address.split(",")
    assert kind == "data:image/png;base64"
    return base64.b64decode(content)


def redraw(pipe, file):
    provenance = read_provenance(io.BytesIO(file))
    return provenance, np.asarray(pipe(**provenance.to_arguments()).images[provenance.index])


def read(file):
    return np.asarray(Image.open(io.BytesIO(file)))


def test_from_a_caption_to_a_saved_picture_to_a_finished_one(tmp_path):
    pipe, downloads = build_pipeline(), tmp_path / "downloads"
    downloads.mkdir()
    with serve(tmp_path) as url, open_browser() as browser:
        behaviour = {"behavior": "allow", "downloadPath": str(downloads)}
        browser.execute_cdp_cmd("Browser.setDownloadBehavior", behaviour)
        open_page(browser, url)
        draw(browser, PROMPT)
        files = read_files(browser)
        save_screenshot(browser, "drawn")
        # the caption is text, whatever it holds; the seed that was taken is shown
        said = ask(browser, SAID)
        (seed,) = {provenance.seed for provenance, _ in (redraw(pipe, file) for file in files)}
        assert said.startswith(f"4 of “{PROMPT}”, seed {seed}, ") and len(files) == 4
        assert ask(browser, "document.querySelectorAll('#gallery b').length") == 0
        wait_for(lambda: ask(browser, "document.querySelector('#seed input').value") == str(seed))
        for file in files:
            assert np.array_equal(read(file), redraw(pipe, file)[1])
        shown = "document.querySelector('#gallery img')"
        assert ask(browser, f"[{shown}.naturalWidth, {shown}.width]") == [16, 256]
        assert ask(browser, f"getComputedStyle({shown}).imageRendering") == "pixelated"
        browser.execute_script("document.querySelectorAll('#gallery a')[1].click()")
        saved = wait_for(lambda: list(downloads.glob("*.png")))[0]
        assert saved.name == f"a-b-fox-{seed}-2.png" and saved.read_bytes() == files[1]

        # its top row stays, the rest is drawn anew
        browser.execute_script("document.querySelector('#finish button').click()")
        wait_for(lambda: ask(browser, "!!document.querySelector('#given-file')"))
        browser.find_element("id", "given-file").send_keys(str(saved))
        wait_for(lambda: ask(browser, "document.querySelector('#given img').naturalWidth") == 16)
        set_value(browser, "#rows input[type=number]", 1)
        wait_for(lambda: "0.25" in ask(browser, "document.querySelector('#given .frame').style.cssText"))
        save_screenshot(browser, "given")
        draw(browser, "a blue bird", seed=11)
        wait_for(lambda: "seed 11," in ask(browser, SAID))
        save_screenshot(browser, "finished")
        for file in read_files(browser):
            provenance, again = redraw(pipe, file)
            top = pipe.encode_image_prefix(Image.open(saved), 1, 1)[0].tolist()
            assert provenance.prefix_tokens == [top] and np.array_equal(read(file), again)

        addresses = list_addresses(browser)
        assert browser.get_log("browser") == []
    assert addresses and [address for address in addresses if not address.startswith((url, "data:"))] == []


def test_wrong_uploads_and_captions_are_answered_in_words(tmp_path):
    wrong = tmp_path / "picture.png"
    wrong.write_text("no picture")
    with serve(tmp_path, "--max_per_minute", "4") as url, open_browser() as browser:
        open_page(browser, url)
        draw(browser, " ")
        wait_for(lambda: "write a caption" in ask(browser, SAID))
        draw(browser, "fox " * 40)
        wait_for(lambda: "this model reads 12" in ask(browser, SAID))
        browser.execute_script("document.querySelector('#finish button').click()")
        wait_for(lambda: ask(browser, "!!document.querySelector('#given-file')"))
        browser.find_element("id", "given-file").send_keys(str(wrong))
        words = "document.querySelector('#given-words').textContent"
        wait_for(lambda: ask(browser, words) == "picture.png cannot be read as a picture: please choose another.")
        assert ask(browser, "document.querySelector('#given .frame').hidden")
        save_screenshot(browser, "refused")
        # one that a page of its own sends
        script = "document.querySelector('#given img').setAttribute('src', 'data:image/png;base64,bm8=')"
        browser.execute_script(script)
        draw(browser, "a red fox")
        wait_for(lambda: "damaged, or is none" in ask(browser, SAID))
        browser.execute_script("document.querySelector('#given-remove').click()")
        draw(browser, "a red fox", seed=1)
        assert len(read_files(browser)) == 4
        assert browser.get_log("browser") == []
        draw(browser, "a red fox", seed=2)  # the fifth in a minute
        wait_for(lambda: "please wait a minute" in ask(browser, "document.body.innerText"))
        save_screenshot(browser, "too-often")


def test_ten_visitors_at_once(tmp_path):
    pipe = build_pipeline()
    with serve(tmp_path) as url, open_browser() as browser:
        handles = []
        for number in range(10):
            browser.switch_to.new_window("window")
            open_page(browser, url.replace("127.0.0.1", f"visitor-{number}.test"))
            handles.append(browser.current_window_handle)
        for number, handle in enumerate(handles):
            browser.switch_to.window(handle)
            draw(browser, f"a red fox {number}", seed=number)
        for number, handle in enumerate(handles):
            browser.switch_to.window(handle)
            for file in read_files(browser):
                provenance, again = redraw(pipe, file)
                assert (provenance.prompt, provenance.seed) == (f"a red fox {number}", number)
                assert np.array_equal(read(file), again)
        assert browser.get_log("browser") == []


def test_reranking_and_a_telephone(tmp_path):
    with serve(tmp_path, "--no_metadata", **build_reranker()) as url, open_browser() as browser:
        browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride", {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
        )
        open_page(browser, url)
        browser.execute_script("document.querySelector('#rerank input').click()")
        draw(browser, "a red fox", seed=3)
        files = read_files(browser)
        save_screenshot(browser, "telephone")
        assert "the best of 16, seed 3" in ask(browser, SAID)
        assert ask(browser, "document.documentElement.scrollWidth") <= 360
        assert browser.get_log("browser") == []
    pipe = build_pipeline(**build_reranker())
    generator = torch.Generator().manual_seed(3)
    images = pipe("a red fox", num_images_per_prompt=4, num_candidates=16, generator=generator).images
    assert [np.array_equal(read(file), image) for file, image in zip(files, images, strict=True)] == [True] * 4
    assert Image.open(io.BytesIO(files[0])).info == {}


def make_body(*data, number=0):
    return json.dumps({"data": data, "fn_index": number, "session_hash": "abc", "trigger_id": 1}).encode()


def list_values(prompt, picture=""):
    """What the page sends with a drawing; rows, rerank and candidates at the end."""
    return (prompt, 9, 1, False, 1, 1, 2, False, 2, picture)


def test_nothing_else_is_served_and_the_queue_is_bounded(tmp_path):
    with serve(tmp_path, "--max_waiting", "1", "--max_per_minute", "60") as url:
        for path in (
            *("/gradio_api/file=/etc/hostname", "/file=/etc/hostname", "/static/../../../../etc/hostname"),
            *("/assets/%2fetc/hostname", "/config", "/gradio_api/info", "/gradio_api/openapi.json", "/docs"),
            *("/monitoring", "/gradio_api/runs", "/gradio_api/proxy=https://example.com", "/gradio_api/call/draw/x"),
            "/gradio_api/upload_progress?upload_id=1",
        ):
            assert request(url, "GET", path)[0] == 404, path
        for path in ("/gradio_api/upload", "/gradio_api/run/predict", "/gradio_api/call/draw", "/login", "/"):
            assert request(url, "POST", path, b"{}", JSON)[0] == 404, path
        number = find_drawing(url)
        file = {"path": "http://example.com/a.png", "meta": {"_type": "gradio.FileData"}}
        assert request(url, "POST", JOIN, make_body(*list_values(file), number=number), JSON)[0] == 400
        assert request(url, "POST", JOIN, b"x" * 300_000, JSON)[0] == 413
        body = make_body(*list_values("a red fox"), number=number)
        codes = [request(url, "POST", JOIN, body, JSON)[0] for _ in range(30)]
        assert codes[0] == 200 and {*codes} == {200, 503}
        codes = [request(url, "POST", JOIN, body, JSON)[0] for _ in range(40)]
        assert codes[-1] == 429 and request(url, "GET", "/")[0] == 200


def find_drawing(url):
    """The number of the one event that the server takes part in."""
    page = request(url, "GET", "/")[1].decode()
    config = json.loads(re.search(r"window\.gradio_config = (\{.*?\});?</script>", page, re.DOTALL)[1])
    (number,) = (event["id"] for event in config["dependencies"] if event["backend_fn"])
    return number


def test_the_space_runs_as_it_is(tmp_path):
    space = tmp_path / "space"
    shutil.copytree(ROOT / "demo", space)
    shutil.copytree(ROOT / "src" / "hf_dalle", space / "hf_dalle")
    build_pipeline().save_pretrained(space / "checkpoint")
    log = tmp_path / "space.txt"
    with log.open("w") as output:
        process = subprocess.Popen([sys.executable, "app.py"], cwd=space, stdout=output, stderr=output)
    try:
        wait_for(lambda: "Open on" in log.read_text() or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        url = re.search(r"Open on (http://\S+?)/\s", log.read_text())[1].replace("localhost", "127.0.0.1")
        assert request(url, "GET", "/")[0] == 200
        # visitors are told apart by what the proxy says, not by what they say themselves
        body = make_body(number=99)
        headers = [{**JSON, "X-Forwarded-For": f"{number}.0.0.1, 8.8.8.8"} for number in range(1, 32)]
        codes = [request(url, "POST", JOIN, body, each)[0] for each in headers]
        assert codes[-1] == 429 and 429 not in codes[:-1]
        assert request(url, "POST", JOIN, body, {**JSON, "X-Forwarded-For": "9.9.9.9"})[0] != 429
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def test_emoji_mini_as_in_the_readme(tmp_path):
    """HF_DALLE_SCREENSHOTS=docs leaves the README's picture, demo.png."""
    with serve(tmp_path, checkpoint=ROOT / "checkpoints" / "emoji-mini") as url, open_browser() as browser:
        browser.set_window_size(1280, 1130)
        open_page(browser, url)
        browser.execute_script("document.querySelectorAll('#examples button')[2].click()")
        wait_for(lambda: ask(browser, "document.querySelector('#prompt textarea, #prompt input').value"))
        prompt = ask(browser, "document.querySelector('#prompt textarea, #prompt input').value")
        draw(browser, prompt, seed=0)
        assert len(read_files(browser)) == 4
        save_screenshot(browser, "demo")
        assert browser.get_log("browser") == []
