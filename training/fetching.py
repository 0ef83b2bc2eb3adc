"""One picture from the web: fetched within limits, looked at, made small.

Only http and https, to public addresses alone (a list of URLs from elsewhere must not reach what this machine can), no
more bytes, pixels and seconds than set. Lists of URLs and the shards made of them are `download_images.py`'s.
"""

import contextlib
import heapq
import http.client
import io
import ipaddress
import itertools
import os
import socket
import ssl
import string
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass

from PIL import Image

from hf_dalle import __version__
from hf_dalle.image_processing_dalle import convert_to_rgb


FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # Pillow knows dozens more, each a way to fail
KEPT_FORMATS = ("JPEG", "PNG", "WEBP")
MAX_KEPT_BYTES = 1 << 20
OPT_OUTS = {"noai", "noimageai", "noindex", "noimageindex"}  # of the header X-Robots-Tag
CHUNK = 1 << 16


class Unavailable(Exception):
    """Why there is no picture: a few words, the same for all of a kind, so that they can be counted."""

    def __init__(self, reason: str, may_pass: bool = False):
        super().__init__(reason)
        self.reason, self.may_pass = reason, may_pass


@dataclass(frozen=True)
class Limits:
    """
    What one picture may cost.

    Args:
        timeout (`float`): seconds of silence.
        max_seconds (`float`): in all, for one attempt.
        max_bytes (`int`): as sent.
        max_pixels (`int`): as decoded.
        num_retries (`int`): after silence, a broken connection or an error of the server's.
        allow_local_addresses (`bool`): fetch from this machine and its networks too.
    """

    timeout: float = 10.0
    max_seconds: float = 60.0
    max_bytes: int = 20 << 20
    max_pixels: int = 50_000_000
    num_retries: int = 1
    allow_local_addresses: bool = False


class Watchdog(threading.Thread):
    """Cuts connections that are past their time. A socket's own timeout starts anew with every byte that drips in."""

    def __init__(self):
        super().__init__(daemon=True)
        self._queue, self._count, self._changed = [], itertools.count(), threading.Condition()
        self.start()

    def watch(self, connection: http.client.HTTPConnection, deadline: float):
        with self._changed:
            heapq.heappush(self._queue, (deadline, next(self._count), connection))
            self._changed.notify()

    def run(self):
        while True:
            with self._changed:
                while not self._queue or self._queue[0][0] > time.monotonic():
                    self._changed.wait(self._queue[0][0] - time.monotonic() if self._queue else None)
                _, _, connection = heapq.heappop(self._queue)
            if connection.sock is not None:
                with contextlib.suppress(OSError):  # closed meanwhile
                    socket.socket.shutdown(connection.sock, socket.SHUT_RDWR)


class Fetcher:
    """Fetches pictures; one object serves many threads."""

    def __init__(self, limits: Limits):
        self.limits, self._watchdog, self._local = limits, Watchdog(), threading.local()
        # Opened pictures are what takes memory: no more at once than there are cores to decode them.
        self._decoding = threading.Semaphore(os.cpu_count() or 1)
        context = ssl.create_default_context()

        class Connection(http.client.HTTPConnection):
            def connect(connection):
                connection.sock = self._connect(connection.host, connection.port)
                self._watchdog.watch(connection, self._local.deadline)

        class SecureConnection(http.client.HTTPSConnection):
            def connect(connection):
                plain, name = self._connect(connection.host, connection.port), connection.host
                connection.sock = context.wrap_socket(plain, server_hostname=name, do_handshake_on_connect=False)
                self._watchdog.watch(connection, self._local.deadline)
                connection.sock.do_handshake()

        class Handler(urllib.request.HTTPHandler):
            def http_open(handler, request):
                return handler.do_open(Connection, request)

        class SecureHandler(urllib.request.HTTPSHandler):
            def https_open(handler, request):
                return handler.do_open(SecureConnection, request, context=context)

        # `build_opener` would add file:, ftp: and data:, and proxies, which resolve names where none can look.
        self._opener = urllib.request.OpenerDirector()
        handlers = [Handler(), SecureHandler(), _Redirects(), urllib.request.HTTPErrorProcessor()]
        handlers += [urllib.request.HTTPDefaultErrorHandler(), urllib.request.UnknownHandler()]
        for handler in handlers:
            self._opener.add_handler(handler)

    def fetch(self, url: str) -> bytes:
        """
        What stands at an address.

        Raises:
            Unavailable: after all retries.
        """
        url = check_url(url)
        for attempt in itertools.count():
            try:
                return self._fetch_once(url)
            except Unavailable as error:
                if attempt == self.limits.num_retries or not error.may_pass:
                    raise
                time.sleep(attempt + 1)

    def _fetch_once(self, url: str) -> bytes:
        self._local.deadline = deadline = time.monotonic() + self.limits.max_seconds
        agent = f"hf-dalle/{__version__} (training/download_images.py)"
        request = urllib.request.Request(url, headers={"User-Agent": agent, "Accept": "image/*"})
        try:
            with self._opener.open(request, timeout=self.limits.timeout) as response:
                _check_opt_out(response.headers)
                content = self._read(response)
        except Unavailable:
            raise
        except urllib.error.HTTPError as error:
            error.close()
            raise Unavailable(f"HTTP {error.code}", may_pass=error.code == 429 or error.code >= 500) from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            cause = error.reason if isinstance(error, urllib.error.URLError) else error
            if isinstance(cause, Unavailable):
                raise cause from error
            is_late = isinstance(cause, TimeoutError) or time.monotonic() >= deadline
            raise Unavailable("timeout" if is_late else _name_fault(cause), may_pass=True) from error
        if time.monotonic() >= deadline:  # the watchdog's cut may look like the end
            raise Unavailable("timeout", may_pass=True)
        return content

    def _read(self, response: http.client.HTTPResponse) -> bytes:
        expected = response.headers.get("Content-Length", "")
        expected = int(expected) if expected.isdecimal() else None
        parts, num_bytes = [], 0
        while num_bytes != expected and (part := response.read1(CHUNK)):
            parts.append(part)
            num_bytes += len(part)
            if num_bytes > self.limits.max_bytes:
                raise Unavailable("too many bytes")
            if time.monotonic() >= self._local.deadline:
                raise Unavailable("timeout", may_pass=True)
        if expected is not None and num_bytes < expected:
            raise http.client.IncompleteRead(b"", expected - num_bytes)
        return b"".join(parts)

    def _connect(self, host: str, port: int) -> socket.socket:
        """
        A connection to the very address that was looked at: a name asked for twice may give two. Raises `Unavailable`
        where a name has no public one.
        """
        found = [place[4][:2] for place in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
        if not self.limits.allow_local_addresses:
            found = [place for place in found if is_public(place[0])]
            if not found:
                raise Unavailable("local address")
        for index, place in enumerate(found):
            try:
                connection = socket.create_connection(place, self.limits.timeout)
                break
            except OSError:
                if index == len(found) - 1:
                    raise
        return connection

    def shrink(self, encoded: bytes, image_size: int, quality: int = 95) -> tuple[bytes, int, int]:
        """
        A picture whose smaller side is at most `image_size`, and its width and height as it came. One that is small
        enough is kept as it is, byte for byte; none is enlarged.

        Raises:
            Unavailable: if it cannot be decoded, or has too many pixels.
        """
        with self._decoding:
            try:
                return self._shrink(encoded, image_size, quality)
            except Unavailable:
                raise
            except Image.DecompressionBombError as error:
                raise Unavailable("too many pixels") from error
            except Image.UnidentifiedImageError as error:
                raise Unavailable("not a picture") from error
            except Exception as error:  # broken bytes make Pillow's decoders raise almost anything
                raise Unavailable("broken picture") from error

    def _shrink(self, encoded: bytes, image_size: int, quality: int) -> tuple[bytes, int, int]:
        image = Image.open(io.BytesIO(encoded), formats=FORMATS)
        width, height = image.size
        if width * height > self.limits.max_pixels:
            raise Unavailable("too many pixels")
        is_small = min(width, height) <= image_size
        if not is_small:
            image.draft("RGB", (2 * image_size, 2 * image_size))  # a JPEG decodes to fewer pixels, never under these
        is_kept = is_small and image.format in KEPT_FORMATS and len(encoded) <= MAX_KEPT_BYTES
        rgb = convert_to_rgb(image)
        if is_kept:
            return encoded, width, height
        ratio = min(1.0, image_size / min(rgb.size))
        size = [max(1, round(side * ratio)) for side in rgb.size]
        file = io.BytesIO()
        rgb.resize(size, Image.Resampling.BOX).save(file, "JPEG", quality=quality)
        return file.getvalue(), width, height


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Each place that an answer points to is checked like the first."""

    max_redirections = 5

    def redirect_request(self, request, file, code, message, headers, url):
        return super().redirect_request(request, file, code, message, headers, check_url(url))

    def http_error_302(self, request, file, code, message, headers):
        try:
            return super().http_error_302(request, file, code, message, headers)
        except urllib.error.HTTPError as error:
            if error.code // 100 != 3:
                raise  # it led there, and there is nothing
            raise Unavailable("redirects") from error

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


def check_url(url: str) -> str:
    """
    An address in ASCII, as it goes over the line.

    Raises:
        Unavailable: if it is none of http or https.
    """
    try:
        parts = urllib.parse.urlsplit(url.strip())
        host, port = parts.hostname, parts.port
        if parts.scheme not in ("http", "https"):
            raise Unavailable("not http")
        if not host:
            raise ValueError("no host")
        host = host if ":" in host or host.isascii() else host.encode("idna").decode()
    except ValueError as error:
        raise Unavailable("broken address") from error
    host = f"[{host}]" if ":" in host else host
    rest = [urllib.parse.quote(part, safe=string.punctuation) for part in (parts.path, parts.query)]
    return urllib.parse.urlunsplit((parts.scheme, f"{host}:{port}" if port else host, *rest, ""))


def is_public(address: str) -> bool:
    """Whether an address is one of the open internet's, also where it wraps an IPv4 address."""
    place = ipaddress.ip_address(address.partition("%")[0])
    if place.version == 6:
        inside = place.ipv4_mapped or place.sixtofour
        if inside is None and place in ipaddress.ip_network("64:ff9b::/96"):
            inside = ipaddress.ip_address(place.packed[12:])
        place = inside or place
    return place.is_global and not place.is_multicast


def _check_opt_out(headers: http.client.HTTPMessage) -> None:
    for value in headers.get_all("X-Robots-Tag", []):
        words = {word.strip().lower() for word in value.rpartition(":")[2].split(",")}
        if words & OPT_OUTS:
            raise Unavailable("opted out")


def _name_fault(error: Exception) -> str:
    kinds = {socket.gaierror: "no such host", ssl.SSLError: "certificate", ConnectionRefusedError: "refused"}
    return next((words for kind, words in kinds.items() if isinstance(error, kind)), "connection")
