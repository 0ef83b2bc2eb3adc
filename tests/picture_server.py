"""A web server on loopback with every kind of answer that a list of pictures meets: good, gone, slow, hostile.

`/NAME` answers as `ANSWERS[NAME]` or a method of the handler says; it counts the requests of each path.
"""

import threading
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import quote

from PIL import Image
from tiny_training import encode_picture


def draw(width, height, colour="red"):
    return Image.new("RGB", (width, height), colour)


PICTURES = {
    "small.png": encode_picture(draw(8, 10)),
    "small.webp": encode_picture(draw(12, 9), "WEBP"),
    "wide.jpg": encode_picture(draw(90, 60, "blue"), "JPEG"),
    "grey.gif": encode_picture(draw(9, 9).convert("P"), "GIF"),
    "huge.png": encode_picture(draw(400, 400)),
    "page.jpg": b"<html>Not found</html>",
    "script.svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "half.png": encode_picture(Image.effect_noise((40, 40), 50))[:300],
    "sp ce\u00e9.png": encode_picture(draw(7, 7)),
}


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        with self.server.lock:
            self.server.counts[self.path] += 1
        name = self.path.strip("/").partition("?")[0]
        if name in self.server.pictures:
            self.answer(200, self.server.pictures[name])
        elif name.isdecimal():
            self.answer(int(name))
        else:
            getattr(self, f"do_{name.replace('-', '_')}", lambda: self.answer(404))()

    def answer(self, status, content=b"", **headers):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_redirect(self):
        self.answer(302, Location="/small.png")

    def do_moved_to_nothing(self):
        self.answer(301, Location="/404")

    def do_loop(self):
        self.answer(302, Location="/loop")

    def do_to_file(self):
        self.answer(302, Location="file:///etc/hostname")

    def do_to_ftp(self):
        self.answer(302, Location="ftp://127.0.0.1/a.png")

    def do_opted_out(self):
        self.answer(200, PICTURES["small.png"], X_Robots_Tag="noai, noimageai")

    def do_flaky(self):
        is_first = self.server.counts[self.path] == 1
        self.answer(503) if is_first else self.answer(200, PICTURES["small.png"])

    def do_hang(self):
        self.server.released.wait(30)

    def do_drip(self):
        """A header that never ends, a byte before each timeout."""
        self.send_response(200)
        self.flush_headers()
        for _ in range(600):
            if self.server.released.wait(0.05):
                return
            self.wfile.write(b"a")

    def do_drip_body(self):
        self.send_response(200)
        self.end_headers()
        for _ in range(600):
            if self.server.released.wait(0.05):
                return
            self.wfile.write(b"a")

    def do_endless(self):
        self.send_response(200)
        self.end_headers()
        while not self.server.released.is_set():
            self.wfile.write(b"a" * 65536)

    def do_cut(self):
        """Fewer bytes than promised."""
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(PICTURES["small.png"])

    def do_chunked(self):
        self.protocol_version = "HTTP/1.1"
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for part in (PICTURES["small.png"][:20], PICTURES["small.png"][20:], b""):
            self.wfile.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")

    def do_slow(self):
        time.sleep(0.1)
        self.answer(200, PICTURES["small.png"])


@contextmanager
def serve():
    """The server: `url`, `counts` of requests by path, and `released`, set at the end to let hanging answers go."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.block_on_close = True, False
    server.counts, server.lock, server.released = Counter(), threading.Lock(), threading.Event()
    server.handle_error = lambda *args: None  # a client that hangs up is what is tested
    server.pictures = {quote(name): content for name, content in PICTURES.items()}
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        thread.join()
        server.server_close()
