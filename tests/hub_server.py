"""A small Hub on loopback: repositories, commits, LFS and tokens, as huggingface_hub's client asks for them.

What the client sends and reads is the real protocol over real HTTP; what a commit holds is kept in memory instead of
git. `Cut` drops or holds a connection in the middle of a request. Uploads come over Xet (`hub_xet.py`), the client's
default, or over LFS where it is told `HF_HUB_DISABLE_XET=1`; downloads are plain HTTP.
"""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from hub_metadata import find_faults
from hub_xet import XetStore


SRC = Path(__file__).parent.parent / "src"
TOKENS = {"hf_write": ("me", "write"), "hf_read": ("me", "read"), "hf_stranger": ("stranger", "write")}
REPOSITORY = r"(?P<name>[\w.-]+/[\w.-]+)"
ROUTES = [
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create_repository"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("GET", rf"/api/models/{REPOSITORY}(/revision/(?P<revision>[^/]+))?", "model_info"),
    ("GET", rf"/api/models/{REPOSITORY}/auth-check(?P<write>/write)?", "auth_check"),
    ("GET", rf"/api/models/{REPOSITORY}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", "list_tree"),
    ("GET", rf"/api/models/{REPOSITORY}/refs", "list_refs"),
    ("POST", rf"/api/models/{REPOSITORY}/paths-info/(?P<revision>[^/]+)", "paths_info"),
    ("POST", rf"/api/models/{REPOSITORY}/(?P<kind>branch|tag)/(?P<revision>[^/]+)", "create_ref"),
    ("POST", rf"/api/models/{REPOSITORY}/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", rf"/api/models/{REPOSITORY}/commit/(?P<revision>[^/]+)", "commit"),
    ("GET", rf"/api/models/{REPOSITORY}/xet-write-token/(?P<revision>[^/]+)", "xet_token"),
    ("POST", rf"/{REPOSITORY}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_put"),
    ("HEAD|GET", r"/cdn/(?P<oid>[0-9a-f]{64})", "lfs_get"),
    ("HEAD|GET", rf"/{REPOSITORY}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
]


class Refusal(Exception):
    """An answer that is an error, with the headers by which the client tells errors apart."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.code = status, code


@dataclass
class File:
    content: bytes
    is_lfs: bool

    @property
    def oid(self) -> str:
        """Git's name of the blob; of an LFS file its sha256."""
        if self.is_lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    def describe(self, path: str) -> dict:
        about = {"type": "file", "path": path, "size": len(self.content), "oid": self.oid}
        if self.is_lfs:
            about["lfs"] = {"oid": self.oid, "size": len(self.content), "pointerSize": 134}
            about["oid"] = hashlib.sha1(self.oid.encode()).hexdigest()
        return about


@dataclass
class Repository:
    private: bool
    commits: dict[str, dict] = field(default_factory=dict)  # id -> {"files": {path: File}, "message": str}
    refs: dict[str, str] = field(default_factory=dict)  # main, tags and branches, refs/pr/1 -> id
    tags: set[str] = field(default_factory=set)

    def add_commit(self, ref: str, files: dict[str, File], message: str) -> str:
        name = f"{len(self.commits)} {ref} {message} {sorted((path, file.oid) for path, file in files.items())}"
        oid = hashlib.sha1(name.encode()).hexdigest()
        self.commits[oid] = {"files": files, "message": message}
        self.refs[ref] = oid
        return oid

    def resolve(self, revision: str | None) -> str:
        oid = self.refs.get(revision or "main", revision)
        if oid not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid


@dataclass
class Cut:
    """A request that does not get through: it is dropped at `fraction` of its body, or held there till `release`."""

    method: str
    path: str  # a regular expression
    fraction: float = 0.5
    is_held: bool = False
    num_passed: int = 0  # how many such requests get through before
    times: int = 1
    reached: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)


class HubServer:
    """The Hub as a context manager; `endpoint` is what a client takes as `HF_ENDPOINT`."""

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.lfs_objects: dict[str, bytes] = {}
        self.has_stored = threading.Event()  # a first object over LFS, whole
        self.xet = XetStore()
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, token
        self.cuts: list[Cut] = []
        self.lock = threading.RLock()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.hub, self.http.daemon_threads = self, True
        self.endpoint = f"http://127.0.0.1:{self.http.server_port}"
        # Another host name than the Hub's: what is sent there must not carry a token.
        self.cdn = f"http://localhost:{self.http.server_port}/cdn"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        for cut in self.cuts:
            cut.release.set()
        self.http.shutdown()
        self.http.server_close()

    @staticmethod
    def name_of(content: bytes) -> str:
        """The name of an LFS object."""
        return File(content, is_lfs=True).oid

    def add_folder(self, name: str, folder: Path, ref: str = "main", private: bool = False) -> str:
        """Makes a folder's files a commit, with everything that was there before taken away; returns its id."""
        repository = self.repositories.setdefault(name, Repository(private))
        paths = [path for path in folder.rglob("*") if path.is_file()]
        files = {p.relative_to(folder).as_posix(): File(p.read_bytes(), p.suffix == ".safetensors") for p in paths}
        self.lfs_objects |= {file.oid: file.content for file in files.values() if file.is_lfs}
        return repository.add_commit(ref, files, "from a folder")

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """What anybody who downloads this revision gets."""
        repository = self.repositories[name]
        return {path: f.content for path, f in repository.commits[repository.resolve(revision)]["files"].items()}

    def find_object(self, oid: str) -> bytes | None:
        """A large file's content, uploaded over LFS or over Xet."""
        if oid not in self.lfs_objects and (content := self.xet.read(oid)) is not None:
            self.lfs_objects[oid] = content
        return self.lfs_objects.get(oid)

    def find_cut(self, method: str, path: str) -> Cut | None:
        """The cut that this request meets."""
        for cut in self.cuts:
            if cut.method == method and re.search(cut.path, path):
                cut.num_passed -= 1
                if cut.num_passed >= 0:
                    return None
                cut.times -= 1
                if cut.times == 0:
                    self.cuts.remove(cut)
                return cut
        return None


class Handler(BaseHTTPRequestHandler):
    """One request: the routes above, each a method of its name."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def serve(self) -> None:
        self.hub: HubServer = self.server.hub
        url = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(url.query).items()}
        token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        with self.hub.lock:
            self.hub.requests.append((self.command, url.path, token))
            cut = self.hub.find_cut(self.command, url.path)
        try:
            body = self.read_body(cut)
        except ConnectionError:
            self.close_connection = True
            return
        try:
            with self.hub.lock:
                answer = self.find_answer(url.path, body, token)
        except Refusal as refusal:
            headers = {"X-Error-Message": str(refusal), **({"X-Error-Code": refusal.code} if refusal.code else {})}
            answer = (refusal.status, {"error": str(refusal)}, headers)
        self.send_answer(*answer)

    do_GET = do_HEAD = do_POST = do_PUT = serve

    def find_answer(self, path: str, body: bytes, token: str | None) -> tuple:
        self.user, self.role = (None, None) if token is None else TOKENS.get(token, (None, "refused"))
        if self.role == "refused":
            raise Refusal(401, "Invalid credentials in Authorization header")
        for methods, pattern, action in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in methods.split("|"):
                groups = {key: value and unquote(value) for key, value in match.groupdict().items()}
                return getattr(self, action)(body, **groups)
        raise Refusal(404, f"This small Hub has no {self.command} {path}")

    def read_body(self, cut: Cut | None) -> bytes:
        length = int(self.headers.get("Content-Length", 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            length = len(body)
        else:
            num_read = int(length * cut.fraction) if cut is not None else length
            body = self.rfile.read(num_read)
        if cut is not None:
            cut.reached.set()
            if cut.is_held:
                cut.release.wait(900)
            raise ConnectionAbortedError
        if len(body) < length:
            raise ConnectionAbortedError
        return body

    def send_answer(self, status: int, content: dict | list | bytes = b"", headers: dict | None = None) -> None:
        is_json = not isinstance(content, bytes)
        data = json.dumps(content).encode() if is_json else content
        headers = {"Content-Type": "application/json" if is_json else "application/octet-stream", **(headers or {})}
        self.send_response(status)
        for key, value in {"Content-Length": len(data), **headers}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # ------------------------------------------------------------------------------------------------- who may what

    def check_write(self, owner: str) -> None:
        if self.user is None:
            raise Refusal(401, "Invalid username or password.")
        if self.user != owner or self.role != "write":
            raise Refusal(403, f"You don't have the rights to write under the namespace {owner}")

    def open(self, name: str, do_write: bool = False, is_request: bool = False) -> Repository:
        """The repository, if this user may see it, and write to it or at least open a pull request."""
        repository = self.hub.repositories.get(name)
        owner = name.split("/")[0]
        if repository is None or (repository.private and self.user != owner):
            raise Refusal(401 if self.user is None else 404, "Repository not found", "RepoNotFound")
        if do_write:
            self.check_write(self.user if is_request else owner)
        return repository

    def whoami(self, body):
        if self.user is None:
            raise Refusal(401, "Invalid username or password.")
        token = {"displayName": "test", "role": self.role}
        return 200, {"type": "user", "name": self.user, "orgs": [], "auth": {"accessToken": token}}

    def auth_check(self, body, name, write):
        self.open(name, do_write=bool(write))
        return (200, {})

    # ------------------------------------------------------------------------------------------------------ writing

    def create_repository(self, body):
        settings = json.loads(body)
        owner = settings.get("organization") or self.user
        self.check_write(owner)
        name = f"{owner}/{settings['name']}"
        if name in self.hub.repositories:
            return 409, {"error": "You already created this model repo", "url": f"{self.hub.endpoint}/{name}"}
        repository = Repository(private=settings.get("visibility") == "private")
        repository.add_commit("main", {".gitattributes": File(b"*.safetensors filter=lfs\n", False)}, "initial commit")
        self.hub.repositories[name] = repository
        return 200, {"url": f"{self.hub.endpoint}/{name}", "name": name}

    def validate_yaml(self, body):
        content = json.loads(body)["content"]
        block = re.match(r"---\s*\n(.*?)\n---\s*\n", content, re.DOTALL)
        if block is None:
            return 200, {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}
        if faults := find_faults(block.group(1)):
            errors = [{"message": fault} for fault in faults]
            return 400, {"error": "Invalid metadata", "errors": errors, "warnings": []}
        return 200, {"errors": [], "warnings": []}

    def create_ref(self, body, name, kind, revision):
        repository, settings = self.open(name, do_write=True), json.loads(body or b"{}")
        ref = revision if kind == "branch" else settings["tag"]
        if ref in repository.refs:
            return 409, {"error": f"Reference {ref} exists already"}
        start = settings.get("startingPoint", "main") if kind == "branch" else revision
        repository.refs[ref] = repository.resolve(start)
        if kind == "tag":
            repository.tags.add(ref)
        return 200, {}

    def preupload(self, body, name, revision):
        repository = self.open(name, do_write=True, is_request="create_pr" in self.query)
        known = repository.commits[repository.resolve(revision)]["files"]
        files = []
        for about in json.loads(body)["files"]:
            path, old = about["path"], known.get(about["path"])
            is_lfs = path.endswith((".safetensors", ".bin")) or about["size"] > 10_000_000
            kind = {"uploadMode": "lfs" if is_lfs else "regular", "oid": old.oid if old else None}
            files.append({"path": path, "shouldIgnore": False, **kind})
        return 200, {"files": files, "commitOid": repository.resolve(revision)}

    def lfs_batch(self, body, name):
        self.open(name, do_write=True, is_request=True)  # what it is for, the client does not say
        objects = []
        for wanted in json.loads(body)["objects"]:
            if wanted["oid"] not in self.hub.lfs_objects:
                wanted = {**wanted, "actions": {"upload": {"href": f"{self.hub.endpoint}/lfs/{wanted['oid']}"}}}
            objects.append(wanted)
        return 200, {"transfer": "basic", "objects": objects}

    def lfs_put(self, body, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refusal(422, "The content does not have this sha256")
        self.hub.lfs_objects[oid] = body
        self.hub.has_stored.set()
        return (200,)

    def xet_token(self, body, name, revision):
        self.open(name, do_write=True, is_request="create_pr" in self.query)
        return 200, {"casUrl": self.hub.xet.url, "accessToken": "xet", "exp": int(time.time()) + 3600}

    def commit(self, body, name, revision):
        is_request = "create_pr" in self.query
        repository = self.open(name, do_write=True, is_request=is_request)
        files = dict(repository.commits[repository.resolve(revision)]["files"])
        for line in body.decode().splitlines():
            item = json.loads(line)
            kind, value = item["key"], item["value"]
            if kind == "header":
                message = value["summary"]
            elif kind == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), False)
            elif kind == "lfsFile" and (content := self.hub.find_object(value["oid"])) is not None:
                files[value["path"]] = File(content, True)
            elif kind == "deletedFile" and value["path"] in files:
                del files[value["path"]]
            else:
                raise Refusal(400, f"Cannot commit {kind} {value['path']}: it was not uploaded, or is not there")
        number = sum(ref.startswith("refs/pr/") for ref in repository.refs) + 1
        oid = repository.add_commit(f"refs/pr/{number}" if is_request else revision, files, message)
        answer = {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.endpoint}/{name}/commit/{oid}"}
        if is_request:
            answer["pullRequestUrl"] = f"{self.hub.endpoint}/{name}/discussions/{number}"
        return 200, answer

    # ------------------------------------------------------------------------------------------------------ reading

    def model_info(self, body, name, revision):
        repository = self.open(name)
        oid = repository.resolve(revision)
        siblings = [{"rfilename": path} for path in sorted(repository.commits[oid]["files"])]
        about = {"id": name, "modelId": name, "private": repository.private, "sha": oid, "siblings": siblings}
        return 200, {"_id": "0", "tags": [], "downloads": 0, "likes": 0, **about}

    def list_tree(self, body, name, revision, folder):
        repository = self.open(name)
        files = repository.commits[repository.resolve(revision)]["files"]
        inside = f"{folder}/" if folder else ""
        rows = [file.describe(path) for path, file in sorted(files.items()) if path.startswith(inside)]
        if self.query.get("recursive", "").lower() != "true":
            rows = [row for row in rows if "/" not in row["path"].removeprefix(inside)]
        return (200, rows)

    def paths_info(self, body, name, revision):
        repository = self.open(name)
        files = repository.commits[repository.resolve(revision)]["files"]
        fields = parse_qs(body.decode()) if not body.startswith(b"{") else json.loads(body)
        return 200, [files[path].describe(path) for path in fields["paths"] if path in files]

    def list_refs(self, body, name):
        repository = self.open(name)
        rows = {"branches": [], "tags": [], "converts": [], "pullRequests": []}
        for ref, oid in repository.refs.items():
            kind = "pullRequests" if ref.startswith("refs/pr/") else "tags" if ref in repository.tags else "branches"
            rows[kind].append({"name": ref, "ref": ref, "targetCommit": oid})
        return 200, rows

    def resolve(self, body, name, revision, path):
        repository = self.open(name)
        oid = repository.resolve(revision)
        file = repository.commits[oid]["files"].get(path)
        if file is None:
            answer = {"X-Repo-Commit": oid, "X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return 404, {"error": "Entry not found"}, answer
        headers = {"X-Repo-Commit": oid, "ETag": f'"{file.oid}"'}
        if not file.is_lfs:
            return 200, file.content, headers
        place = f"{self.hub.cdn}/{file.oid}"
        linked = {"X-Linked-ETag": f'"{file.oid}"', "X-Linked-Size": len(file.content), "Location": place}
        return 302, b"", {**headers, **linked}

    def lfs_get(self, body, oid):
        content, start = self.hub.lfs_objects[oid], 0
        if wanted := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(wanted.group(1))
        headers = {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        return 206 if start else 200, content[start:], headers


def client_environment(hub: HubServer, home: Path, token: str | None = "hf_write", **changes: str) -> dict[str, str]:
    """What a process needs to take this server for the Hub, with an empty cache in `home`."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    kept |= dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1,localhost")
    tokens = {"HF_TOKEN": token} if token is not None else {}
    settings = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "PYTHONPATH": str(SRC)}
    return {**kept, **settings, "HF_HUB_DISABLE_TELEMETRY": "1", **tokens, **changes}


def start_client(script: str, environment: dict[str, str], *arguments: str) -> subprocess.Popen:
    """Starts Python on `script` as a user of the Hub."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run_client(script: str, environment: dict[str, str], *arguments: str) -> str:
    """What `script` prints; where it fails, its error is the test's."""
    process = start_client(script, environment, *arguments)
    output, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors
    return output
