"""Downloading the pictures of a list: what is fetched, what is gone and why, what is refused, and going on."""

import io
import json
import shutil
import ssl
import subprocess
import threading
import time
from multiprocessing import get_context

import pytest
from download_images import find_rows, main
from fetching import Fetcher, Limits, Unavailable, check_url, is_public
from picture_server import PICTURES, serve
from PIL import Image

from hf_dalle.data import load_rows


QUICK = {"timeout": 0.5, "max_seconds": 1.5, "num_retries": 0, "allow_local_addresses": True}
OPTIONS = ("--timeout", "0.5", "--max_seconds", "1.5", "--num_threads", "4", "--image_size", "16")


@pytest.fixture(scope="module")
def server():
    with serve() as server:
        yield server


def write_list(path, server, names, captions=None):
    captions = captions or [f"picture {index}" for index in range(len(names))]
    lines = [f"{text}\t{server.url}/{name}\n" for text, name in zip(captions, names, strict=True)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines), encoding="utf-8")
    return path


def list_options(url_list, output_dir, *options):
    folders = ("--url_list", str(url_list), "--output_dir", str(output_dir))
    return [*folders, *OPTIONS, "--allow_local_addresses", *options]


def download(url_list, output_dir, *options):
    main(list_options(url_list, output_dir, *options))
    return json.loads((output_dir / "train.report.json").read_text())


def read_all(folder):
    """The files of a folder with their bytes."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def reason_of(server, name, **limits):
    with pytest.raises(Unavailable) as caught:
        fetcher = Fetcher(Limits(**{**QUICK, **limits}))
        fetcher.shrink(fetcher.fetch(f"{server.url}/{name}"), 16)
    return caught.value.reason


def test_a_list_becomes_shards_that_training_reads(server, tmp_path):
    names = ["small.png", "404", "wide.jpg", "page.jpg", "small.webp", "redirect", "grey.gif", "sp ceé.png", "chunked"]
    url_list = write_list(tmp_path / "list.tsv", server, names)
    with url_list.open("a") as file:
        file.write("a line without a tab\n\t" + f"{server.url}/small.png\n")
    report = download(url_list, tmp_path / "data", "--rows_per_shard", "4")
    assert report == {
        "num_rows": 11,
        "num_kept": 7,
        "gone": {"broken line": 2, "HTTP 404": 1, "not a picture": 1},
        "num_unfinished_shards": 0,
    }
    shards = sorted(path.name for path in (tmp_path / "data").glob("*.parquet"))
    assert shards == [f"train-{index:05d}-of-00003.parquet" for index in range(3)]
    skipped = (tmp_path / "data" / "train-00000-of-00003.skipped.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in skipped] == [
        {"line": 2, "url": f"{server.url}/404", "reason": "HTTP 404"},
        {"line": 4, "url": f"{server.url}/page.jpg", "reason": "not a picture"},
    ]
    assert not (tmp_path / "data" / "train-00001-of-00003.skipped.jsonl").exists()
    rows = load_rows(str(tmp_path / "data"))
    assert rows["caption"][:] == [f"picture {index}" for index in (0, 2, 4, 5, 6, 7, 8)]
    assert [(row["width"], row["height"]) for row in rows][:3] == [(8, 10), (90, 60), (12, 9)]
    images = [row["image"]["bytes"] for row in rows]
    assert images[0] == images[3] == images[6] == PICTURES["small.png"] and images[2] == PICTURES["small.webp"]
    made = Image.open(io.BytesIO(images[1]))
    assert made.size == (24, 16) and made.format == "JPEG"  # the smaller side at --image_size
    assert all(abs(value - wanted) < 6 for value, wanted in zip(made.getpixel((12, 8)), (0, 0, 255), strict=True))


def test_columns_of_the_other_order(server, tmp_path):
    (tmp_path / "list.tsv").write_text(f"{server.url}/small.png\ta red square\n")
    download(tmp_path / "list.tsv", tmp_path / "data", "--columns", "url", "caption")
    assert load_rows(str(tmp_path / "data"))["caption"][:] == ["a red square"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        *(("404", "HTTP 404"), ("500", "HTTP 500"), ("moved-to-nothing", "HTTP 404"), ("page.jpg", "not a picture")),
        *(("script.svg", "not a picture"), ("half.png", "broken picture"), ("opted-out", "opted out")),
        *(("loop", "redirects"), ("to-file", "redirects"), ("to-ftp", "not http"), ("cut", "connection")),
        *(("hang", "timeout"), ("drip", "timeout"), ("drip-body", "timeout")),
    ],
)
def test_why_a_picture_is_gone(server, name, reason):
    assert reason_of(server, name) == reason


def test_limits_of_bytes_and_pixels(server):
    assert reason_of(server, "endless", max_bytes=1 << 20) == "too many bytes"
    assert reason_of(server, "huge.png", max_pixels=100_000) == "too many pixels"
    assert Fetcher(Limits(**QUICK)).fetch(f"{server.url}/small.png") == PICTURES["small.png"]


def test_faults_that_may_pass_are_tried_again(server):
    fetcher = Fetcher(Limits(**{**QUICK, "num_retries": 1}))
    assert fetcher.fetch(f"{server.url}/flaky") == PICTURES["small.png"]
    for path in ("/404?retry", "/500?retry"):
        with pytest.raises(Unavailable):
            fetcher.fetch(server.url + path)
    assert (server.counts["/flaky"], server.counts["/404?retry"], server.counts["/500?retry"]) == (2, 1, 2)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        *(("file:///etc/hostname", "not http"), ("ftp://example.com/a.png", "not http"), ("data:,a", "not http")),
        *(("nothing", "not http"), ("", "not http"), ("http://", "broken address"), ("http://[::1", "broken address")),
        ("http://example.com:a/", "broken address"),
    ],
)
def test_addresses_that_are_none(url, reason):
    with pytest.raises(Unavailable) as caught:
        check_url(url)
    assert caught.value.reason == reason


def test_addresses_are_sent_in_ascii():
    assert (
        check_url(" http://bücher.example/é b.png?q=ü#top") == "http://xn--bcher-kva.example/%C3%A9%20b.png?q=%C3%BC"
    )
    assert check_url("https://a.example:8080/%20a") == "https://a.example:8080/%20a"
    assert check_url("http://user:secret@a.example/") == "http://a.example/"


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "[::1]", "127.1", "2130706433", "0.0.0.0", "[::ffff:127.0.0.1]"]
)
def test_this_machine_is_not_asked_unless_allowed(server, host):
    """However the address is written: it is looked at once it is resolved."""
    fetcher, path = (
        Fetcher(Limits(**{**QUICK, "allow_local_addresses": False})),
        f"/small.png?{len(host)}{host[-3:-1]}",
    )
    with pytest.raises(Unavailable) as caught:
        fetcher.fetch(f"http://{host}:{server.server_port}{path}")
    assert caught.value.reason in (
        "local address",
        "no such host",
        "connection",
    )  # not all systems resolve all of them
    assert server.counts[path] == 0
    if host in ("127.0.0.1", "localhost"):
        assert caught.value.reason == "local address"
        assert Fetcher(Limits(**QUICK)).fetch(f"http://{host}:{server.server_port}{path}")


def test_which_addresses_are_public():
    local = (
        "10.0.0.1",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "224.0.0.1",
        "::1",
        "fe80::1%eth0",
    )
    local += ("fd00::1", "::ffff:10.0.0.1", "2002:7f00:1::", "64:ff9b::7f00:1", "::")
    assert [address for address in local if is_public(address)] == []
    assert all(map(is_public, ("8.8.8.8", "2606:4700::1", "::ffff:8.8.8.8", "64:ff9b::808:808")))


def test_https(tmp_path, monkeypatch):
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost"
    command = [
        *command.split(),
        "-addext",
        "subjectAltName=DNS:localhost",
        "-keyout",
        str(key),
        "-out",
        str(certificate),
    ]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with serve() as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        url = f"https://localhost:{server.server_port}"
        with pytest.raises(Unavailable, match="certificate"):
            Fetcher(Limits(**QUICK)).fetch(f"{url}/small.png")
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        fetcher = Fetcher(Limits(**QUICK))
        assert fetcher.fetch(f"{url}/small.png") == PICTURES["small.png"]
        with pytest.raises(Unavailable, match="timeout"):
            fetcher.fetch(f"{url}/drip")


def test_a_picture_that_hangs_holds_back_no_more_than_the_window(server, tmp_path):
    """What waits behind it is bounded, so that memory is."""
    names = ["hang?window", *[f"small.png?window-{index}" for index in range(60)]]
    url_list = write_list(tmp_path / "list.tsv", server, names)
    options = list_options(url_list, tmp_path / "data", "--num_threads", "2", "--timeout", "20", "--max_seconds", "20")
    thread = threading.Thread(target=main, args=([*options, "--num_retries", "0"],))
    thread.start()
    counts, settled = -1, 0
    while settled < 5:  # until no more come
        time.sleep(0.2)
        now = sum(count for path, count in server.counts.items() if path.startswith("/small.png?window"))
        settled, counts = (settled + 1 if now == counts and now else 0), now
    assert counts == 2 * 4 - 1
    server.released.set()
    thread.join(30)
    server.released.clear()
    assert len(load_rows(str(tmp_path / "data"))) == 60


def test_it_goes_on_after_a_kill_with_the_same_bytes(server, tmp_path):
    names = ["slow"] * 4 + ["404"]
    url_list = write_list(tmp_path / "list.tsv", server, names * 4)
    options = ("--rows_per_shard", "5", "--num_threads", "1")
    download(url_list, tmp_path / "whole", *options)
    process = get_context("fork").Process(target=main, args=(list_options(url_list, tmp_path / "data", *options),))
    process.start()
    while not list((tmp_path / "data").glob("train-00000*.parquet")):
        time.sleep(0.02)
        assert process.is_alive()
    process.kill()
    process.join()
    found = sorted((tmp_path / "data").glob("train-*.parquet"))
    assert 1 <= len(found) < 4
    written = [path.stat().st_mtime_ns for path in found]
    report = download(url_list, tmp_path / "data", *options)
    assert [path.stat().st_mtime_ns for path in found] == written  # finished shards are not made again
    assert report["num_kept"] == 16 and report["gone"] == {"HTTP 404": 4}
    assert read_all(tmp_path / "data") == read_all(tmp_path / "whole")


def test_processes_share_the_shards(server, tmp_path, monkeypatch):
    url_list = write_list(tmp_path / "list.tsv", server, ["small.png", "wide.jpg", "404", "small.webp", "small.png"])
    options = ("--rows_per_shard", "1")
    url_list.write_text("".join(line for line in url_list.read_text().splitlines(True) if "404" not in line))
    download(url_list, tmp_path / "one", *options)
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in (2, 0, 1):
        monkeypatch.setenv("RANK", str(rank))
        report = download(url_list, tmp_path / "three", *options)
    assert report["num_unfinished_shards"] == 0 and read_all(tmp_path / "three") == read_all(tmp_path / "one")


def test_what_is_wrong_is_named(server, tmp_path, capsys):
    url_list = write_list(tmp_path / "list.tsv", server, ["404", "404", "page.jpg"])
    with pytest.raises(OSError, match=r"None of the 3 .* \(HTTP 404: 2, not a picture: 1\). Is this machine online"):
        download(url_list, tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []
    write_list(url_list, server, ["small.png"] * 4)
    download(url_list, tmp_path / "data", "--rows_per_shard", "2")
    with pytest.raises(ValueError, match="image_size 16, now 8"):
        download(url_list, tmp_path / "data", "--rows_per_shard", "2", "--image_size", "8")
    with pytest.raises(ValueError, match="holds train-00000-of-00002.parquet, but this run makes train.parquet"):
        download(url_list, tmp_path / "data")
    write_list(url_list, server, ["small.png"] * 3)
    with pytest.raises(ValueError, match="of other settings .url_list"):
        download(url_list, tmp_path / "data", "--rows_per_shard", "2")
    url_list.write_text("")
    with pytest.raises(ValueError, match="list.tsv is empty"):
        find_rows(url_list, 10)
    with pytest.raises(SystemExit):
        download(url_list, tmp_path / "data", "--columns", "caption", "image")
    assert "--columns takes caption and url" in capsys.readouterr().err
