"""What tests of pages share: a headless Chromium, waiting, what it asked for, requests without it."""

import http.client
import json
import os
import shutil
import time
from contextlib import contextmanager
from urllib.parse import urlsplit

import pytest


PATIENCE = 600  # seconds; the machine may be busy


@contextmanager
def open_browser():
    """A headless Chromium of its own, with nothing but this machine within reach."""
    webdriver = pytest.importorskip("selenium.webdriver")
    binary = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    assert binary and driver, "chromium and chromedriver are not installed: make test-browser gets them"
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for option in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1000,1200",
        "--host-resolver-rules=MAP *.test 127.0.0.1, MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        "--disable-background-timer-throttling",
        "--disable-backgrounding-occluded-windows",
        "--disable-renderer-backgrounding",
    ):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    browser.set_page_load_timeout(PATIENCE)
    try:
        yield browser
    finally:
        browser.quit()


def wait_for(function):
    """What the function gives, as soon as that is true."""
    deadline = time.monotonic() + PATIENCE
    while True:
        value = function()
        if value:
            return value
        assert time.monotonic() < deadline
        time.sleep(0.1)


def ask(browser, script):
    return browser.execute_script(f"return {script}")


def save_screenshot(browser, name):
    """Where a person wants to look: HF_DALLE_SCREENSHOTS names a folder."""
    folder = os.environ.get("HF_DALLE_SCREENSHOTS")
    if folder:
        browser.save_screenshot(f"{folder}/{name}.png")


def list_addresses(browser):
    """Of all that the browser has asked for."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
    return [params["request"]["url"] for params in asked]


def request(url, method, path, body=b"", headers=None):
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=PATIENCE)
    try:
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()
