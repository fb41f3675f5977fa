"""A small Hub on this machine, for tests with the real huggingface_hub client: no account, no network, any failure.

It answers the requests that huggingface_hub 2.4 makes for model and dataset repositories, in one of three modes:
"xet" (the client's own way with large files), "lfs" (the older way) and "inline" (every file inside the commit).

    with Hub("lfs", tmp_path) as hub:
        hub.put("org/agent", {"config.json": b"{}"})
        hub.faults.append(Fault("GET", "/resolve/", 500, times=1))
        subprocess.run([...], env={**os.environ, **hub.environment(), "HF_HOME": str(tmp_path / "home")})
        assert hub.files("org/agent") == {...}
"""

import base64
import hashlib
import http.client
import json
import re
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LARGE_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".zip", ".mp4", ".hdf5", ".h5", ".parquet", ".arrow", ".npz", ".onnx")
LARGE_BYTES = 10_000_000
LONG_AGO = "1970-01-01T00:00:00.000Z"
Files = dict[str, "File"]


@dataclass(frozen=True)
class File:
    """One file of a commit: its bytes (None where only Xet's store has them), and a sha256 if it is a large file."""

    content: bytes | None
    size: int
    sha256: str | None = None
    xet_hash: str | None = None

    @property
    def pointer(self) -> bytes:
        """The few lines that git itself keeps of a large file."""
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()

    @property
    def blob_id(self) -> str:
        stored = self.pointer if self.sha256 else self.content or b""
        return hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()


def regular(content: bytes) -> File:
    return File(content, len(content))


@dataclass(frozen=True)
class Commit:
    title: str
    files: Files
    parent: str | None


class Repository:
    """The history of one repository: commits by their sha, and the branches and tags that point at them."""

    def __init__(self, name: str, kind: str, private: bool = False, gated: bool = False) -> None:
        self.name, self.kind, self.private, self.gated = name, kind, private, gated
        self.commits: dict[str, Commit] = {}
        self.branches: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        attributes = "".join(f"*{ending} filter=lfs diff=lfs merge=lfs -text\n" for ending in LARGE_ENDINGS)
        self.commit("main", {".gitattributes": regular(attributes.encode())}, "initial commit")

    def commit(self, branch: str, files: Files, title: str) -> str:
        parent = self.branches.get(branch)
        sha = hashlib.sha1(f"{self.kind}/{self.name} {title} {parent} {time.time_ns()}".encode()).hexdigest()
        self.commits[sha] = Commit(title, files, parent)
        self.branches[branch] = sha
        return sha

    def resolve(self, revision: str) -> str:
        """The sha that a branch, tag or sha names."""
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        if sha not in self.commits:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    def files(self, revision: str) -> Files:
        return self.commits[self.resolve(revision)].files

    def card(self, revision: str = "main") -> dict[str, Any]:
        """The YAML at the head of README.md: what the Hub searches by."""
        readme = self.files(revision).get("README.md", regular(b"")).content or b""
        head = re.match(r"---\r?\n(.*?)\r?\n---", readme.decode(), re.DOTALL)
        return (yaml.safe_load(head[1]) if head else None) or {}

    def labels(self) -> list[str]:
        card = self.card()
        plain = [*(card.get("tags") or []), card.get("library_name"), card.get("pipeline_tag")]
        return [*filter(None, plain), *(f"dataset:{name}" for name in card.get("datasets") or [])]


@dataclass
class Fault:
    """What goes wrong with requests whose method and path (with its query) fit: see `RequestHandler.misbehave`.

    `times` counts down, None is for ever. A file's bytes come from /_lfs/<sha256> when it is a large one and from
    /resolve/ when not; Xet's store is a folder, so what the client reads and writes there meets no fault.
    """

    method: str
    path: str
    action: "int | str | Callable[[RequestHandler], object]"
    times: int | None = None


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: dict[str, str]
    size: int


@dataclass
class Answer:
    """What a route returns. A body that is not bytes is sent as JSON."""

    body: Any = field(default_factory=dict)
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


class Refusal(Exception):
    """An error answer, with the code by which the client chooses its exception."""

    def __init__(self, status: int, code: str, message: str = "", **headers: str) -> None:
        super().__init__(message)
        # a header is one line: the client prints the message from it, or else from the body
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        self.answer = Answer(
            {"error": message or code}, status, {"X-Error-Code": code, "X-Error-Message": message or code, **headers}
        )


class Listener(ThreadingHTTPServer):
    """One thread per connection; remembers them, because a killed server also drops the calls in progress."""

    daemon_threads = True

    def __init__(self, hub: "Hub", port: int) -> None:
        self.hub = hub
        self.connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", port), RequestHandler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # a client that hung up is no news, a fault of ours is
            super().handle_error(request, client_address)


class Hub:
    """The server and all that it stores. Whoever has `token` or `read_only_token` may see every repository."""

    token, read_only_token, stranger_token = "hf_test", "hf_read_only", "hf_stranger"

    def __init__(self, mode: str, folder: Path) -> None:
        if mode not in ("xet", "lfs", "inline"):
            raise ValueError(f"no mode {mode!r}: xet, lfs or inline")
        self.mode, self.xet_folder, self.port = mode, Path(folder).resolve() / "xet-store", 0
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.large_files: dict[str, bytes] = {}  # by sha256, whichever repository they are in
        self.log: list[Request] = []
        self.faults: list[Any] = []  # of Fault, or tuples of the same four
        self.stall_seconds = 3.0
        self.stopped = threading.Event()
        self.lock = threading.RLock()

    def __enter__(self) -> "Hub":
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def start(self) -> None:
        """Also after `stop`: on the same port, with all that was stored."""
        self.stopped.clear()
        self.listener = Listener(self, self.port)
        self.port = self.listener.server_address[1]
        threading.Thread(target=self.listener.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """End as a killed server does, in the middle of whatever is going on; a fault's function may call it too."""
        with self.lock:
            if self.stopped.is_set():
                return
            self.stopped.set()
        self.listener.shutdown()
        self.listener.server_close()
        for connection in list(self.listener.connections):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # the client was faster

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def environment(self) -> dict[str, str]:
        """What a client process needs before it imports huggingface_hub, apart from a HF_HOME of its own."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": self.token,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_XET": "0" if self.mode == "xet" else "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }

    def repository(self, name: str, kind: str = "models") -> Repository:
        return self.repositories[kind, name]

    def put(self, name: str, files: dict[str, bytes], revision: str = "main", kind: str = "models", lfs: bool = False) -> str:
        """Add files in one commit without a client; the repository and the branch are made where they are missing."""
        with self.lock:
            repository = self.repositories.setdefault((kind, name), Repository(name, kind))
            repository.branches.setdefault(revision, repository.branches["main"])
            added = {path: self.store_large(content) if lfs else regular(content) for path, content in files.items()}
            return repository.commit(revision, {**repository.files(revision), **added}, "seed")

    def files(self, name: str, revision: str = "main", kind: str = "models") -> dict[str, bytes]:
        """Every file's bytes at a revision; those that came through Xet are read from its store by another process."""
        with self.lock:
            files = dict(self.repositories[kind, name].files(revision))
        missing = {path: file for path, file in files.items() if file.content is None}
        contents = {path: file.content for path, file in files.items() if file.content is not None}
        return contents | (self.read_xet(missing) if missing else {})

    def store_large(self, content: bytes) -> File:
        sha256 = hashlib.sha256(content).hexdigest()
        self.large_files[sha256] = content
        return File(content, len(content), sha256)

    def find_large(self, sha256: str) -> File:
        """An object that a client says it has uploaded, by either way."""
        if sha256 in self.large_files:
            return self.store_large(self.large_files[sha256])
        xet_hash, size = self.xet_objects().get(sha256, (None, 0))
        if xet_hash is None:
            raise Refusal(400, "BadRequest", f"large file {sha256} was never uploaded")
        return File(None, size, sha256, xet_hash)

    def xet_objects(self) -> dict[str, tuple[str, int]]:
        """Xet's hash and the size of each file in its store, by sha256.

        A commit names files by sha256 only, and Xet never tells the Hub its own hash: the pairs are in the index
        files of the store. After 48 bytes, each file has a record of 48 bytes, then one per segment (twice that if
        bit 31 of its flags is set) and, if bit 30 is set, one that begins with the sha256. A hash of ones ends them.
        """
        found = {}
        for path in self.xet_folder.rglob("xorbs/shards/*.mdb"):
            data, position = path.read_bytes(), 48
            while data[position : position + 32] != b"\xff" * 32:
                xet_hash, flags, segments = struct.unpack_from("<32sII", data, position)
                position += 48
                size = sum(struct.unpack_from("<I", data, position + 48 * index + 36)[0] for index in range(segments))
                position += 48 * segments * (2 if flags >> 31 else 1)
                if flags & 1 << 30:
                    found[xet_name(data[position : position + 32])] = (xet_name(xet_hash), size)
                    position += 48
        return found

    def read_xet(self, files: Files) -> dict[str, bytes]:
        with tempfile.TemporaryDirectory() as folder:
            wanted = [[file.xet_hash, file.size, str(Path(folder, str(i)))] for i, file in enumerate(files.values())]
            command = [sys.executable, "-c", READ_XET, f"local://{self.xet_folder}", json.dumps(wanted)]
            subprocess.run(command, check=True, timeout=60)
            return {path: Path(folder, str(i)).read_bytes() for i, path in enumerate(files)}

    def next_action(self, method: str, path: str) -> Any:
        """The action of the first fault that fits this request, or None."""
        with self.lock:
            self.faults[:] = [fault if isinstance(fault, Fault) else Fault(*fault) for fault in self.faults]
            for fault in self.faults:
                if fault.times != 0 and re.fullmatch(fault.method, method) and re.search(fault.path, path):
                    fault.times = None if fault.times is None else fault.times - 1
                    return fault.action
        return None


READ_XET = """
import json, sys
from hf_xet import XetFileInfo, XetSession
with XetSession().new_file_download_group(endpoint=sys.argv[1]) as group:
    for xet_hash, size, path in json.loads(sys.argv[2]):
        group.start_download_file(XetFileInfo(xet_hash, size), path)
"""


def xet_name(raw: bytes) -> str:
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", raw))


PARTS = {
    "kind": "models|datasets|spaces",
    "prefix": "(?:datasets/|spaces/)?",  # the pages of a dataset begin with its kind, those of a model do not
    "name": "[^/]+/[^/]+",
    "revision": "[^/]+",
    "path": ".*",
    "sha256": "[0-9a-f]{64}",
    "access": "read|write",
}
Route = Callable[..., Answer]
ROUTES: list[tuple[str, re.Pattern[str], Route]] = []


def route(method: str, template: str) -> Callable[[Route], Route]:
    """Enter a method of the handler in the table; it is called with the parts of the path by name."""
    pattern = re.compile(re.sub(r"{(\w+)}", lambda part: f"(?P<{part[1]}>{PARTS[part[1]]})", template))

    def enter(function: Route) -> Route:
        ROUTES.append((method, pattern, function))
        return function

    return enter


class RequestHandler(BaseHTTPRequestHandler):
    """Reads a request, lets a fault have its way with it, and else answers by the first route that fits."""

    protocol_version = "HTTP/1.1"
    server: Listener

    def setup(self) -> None:
        super().setup()
        self.hub = self.server.hub
        self.server.connections.add(self.connection)

    def finish(self) -> None:
        self.server.connections.discard(self.connection)
        super().finish()

    def log_message(self, format: str, *args: Any) -> None:
        """The log is `Hub.log`."""

    def handle_request(self) -> None:
        self.body, self.answered, self.damage = self.read_body(), False, ""
        address = urlsplit(self.path)
        self.query = parse_qs(address.query)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.may_write = token == self.hub.token
        self.may_see = token in (self.hub.token, self.hub.read_only_token)
        self.known = self.may_see or token == self.hub.stranger_token
        self.hub.log.append(Request(self.command, self.path, dict(self.headers), len(self.body)))
        action = self.hub.next_action(self.command, self.path)
        if action is not None:
            self.misbehave(action)
        if self.hub.stopped.is_set():
            self.hang_up()
        if not self.answered:
            self.send(self.real_answer(address.path))

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    def read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while length := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(length)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def misbehave(self, action: "int | str | Callable[[RequestHandler], object]") -> None:
        """A number is answered as the status. A function may `send` an answer, or stop the hub; if not, all goes on.

        "drop" hangs up without a word, "truncate" after half of the real body, "corrupt" flips one byte of it (so
        its sha256 no longer fits), "stall" answers `Hub.stall_seconds` later.
        """
        if callable(action):
            action(self)
        elif isinstance(action, int):
            self.send(Refusal(action, "InjectedFault", http.client.responses.get(action, "fault")).answer)
        elif action == "drop":
            self.hang_up()
        elif action == "stall":
            self.hub.stopped.wait(self.hub.stall_seconds)
        elif action in ("truncate", "corrupt"):
            self.damage = action
        else:
            raise ValueError(f"no fault {action!r}")

    def real_answer(self, path: str) -> Answer:
        method = "GET" if self.command == "HEAD" else self.command
        try:
            with self.hub.lock:
                for allowed, pattern, function in ROUTES:
                    if method == allowed and (match := pattern.fullmatch(path)):
                        return function(self, **{name: unquote(part) for name, part in match.groupdict().items()})
            raise Refusal(404, "NoSuchRoute", f"{method} {path} is not a request that this test server knows")
        except Refusal as refusal:
            return refusal.answer

    def hang_up(self) -> None:
        self.answered = self.close_connection = True

    def send(self, answer: Answer) -> None:
        self.answered = True
        body = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body, default=str).encode()
        if self.damage == "corrupt" and body:
            body = body[:-1] + bytes([body[-1] ^ 1])
        self.send_response(answer.status)
        kind = "application/octet-stream" if isinstance(answer.body, bytes) else "application/json"
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.damage == "truncate":
            body, self.close_connection = body[: len(body) // 2], True
        if self.command != "HEAD":
            self.wfile.write(body)

    # What the routes share

    def need_write(self) -> None:
        if not self.known:
            raise Refusal(401, "Unauthorized", "Invalid username or password.")
        if not self.may_write:
            raise Refusal(403, "Forbidden", "This token has no permission to write here.")

    def find(self, kind: str, name: str) -> Repository:
        """A repository that the caller may see. To others it is as absent as one that is not there."""
        repository = self.hub.repositories.get((kind, name))
        if repository is None or (repository.private and not self.may_see):
            raise Refusal(404 if self.known else 401, "RepoNotFound", "Repository not found")
        return repository

    def find_readable(self, kind: str, name: str) -> Repository:
        """The same for its files: a gated repository shows everybody that it exists, but not what it holds."""
        repository = self.find(kind, name)
        if repository.gated and not self.may_see:
            raise Refusal(403 if self.known else 401, "GatedRepo", f"Access to {name} is restricted.")
        return repository

    def find_to_write(self, kind: str, name: str) -> Repository:
        repository = self.find(kind, name)
        self.need_write()
        return repository

    def json(self) -> dict[str, Any]:
        return dict(json.loads(self.body or b"{}"))

    # Accounts and whole repositories

    @route("GET", "/api/whoami-v2")
    def whoami(self) -> Answer:
        if not self.known:
            raise Refusal(401, "Unauthorized", "Invalid user token.")
        access = {"accessToken": {"displayName": "test", "role": "write" if self.may_write else "read"}}
        return Answer({"type": "user", "name": "tester" if self.may_see else "stranger", "orgs": [], "auth": access})

    @route("POST", "/api/validate-yaml")
    def validate_card(self) -> Answer:
        return Answer({"errors": [], "warnings": []})

    @route("POST", "/api/repos/create")
    def create(self) -> Answer:
        self.need_write()
        kind, name, wanted = *self.named(), self.json()
        page = f"{self.hub.url}/{'' if kind == 'models' else kind + '/'}{name}"
        if (kind, name) in self.hub.repositories:
            return Answer({"error": "You already created this repo", "url": page}, 409)
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        self.hub.repositories[kind, name] = Repository(name, kind, private)
        return Answer({"url": page, "name": name, "id": name})

    @route("DELETE", "/api/repos/delete")
    def delete(self) -> Answer:
        self.find_to_write(*self.named())
        del self.hub.repositories[self.named()]
        return Answer()

    def named(self) -> tuple[str, str]:
        wanted = self.json()
        return (wanted.get("type") or "model") + "s", f"{wanted.get('organization') or 'tester'}/{wanted['name']}"

    @route("GET", "/api/{kind}")
    def search(self, kind: str) -> Answer:
        author, words = self.query.get("author", [""])[0], self.query.get("search", [""])[0].lower()
        found = []
        for (its_kind, name), repository in self.hub.repositories.items():
            visible = its_kind == kind and (self.may_see or not repository.private)
            fits = name.startswith(f"{author}/" if author else "") and words in name.lower()
            if visible and fits and set(self.query.get("filter", [])) <= set(repository.labels()):
                found.append(self.describe(repository, "main"))
        return Answer(found)

    @route("GET", "/api/{kind}/{name}")
    @route("GET", "/api/{kind}/{name}/revision/{revision}")
    def info(self, kind: str, name: str, revision: str = "main") -> Answer:
        return Answer(self.describe(self.find(kind, name), revision))

    def describe(self, repository: Repository, revision: str) -> dict[str, Any]:
        siblings: list[dict[str, Any]] = []
        for path, file in sorted(repository.files(revision).items()):
            siblings.append({"rfilename": path})
            if "blobs" in self.query:
                siblings[-1] |= {"size": file.size, "blobId": file.blob_id}
                if file.sha256:
                    siblings[-1]["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": len(file.pointer)}
        name, card = repository.name, repository.card(revision)
        return {
            **{"_id": "0" * 24, "id": name, "modelId": name, "author": name.split("/")[0], "downloads": 0, "likes": 0},
            **{"sha": repository.resolve(revision), "createdAt": LONG_AGO, "lastModified": LONG_AGO, "disabled": False},
            **{"private": repository.private, "gated": "manual" if repository.gated else False, "siblings": siblings},
            **{"tags": repository.labels(), "library_name": card.get("library_name"), "cardData": card},
        }

    # Revisions

    @route("GET", "/api/{kind}/{name}/refs")
    def refs(self, kind: str, name: str) -> Answer:
        repository = self.find(kind, name)
        listed = {"branches": ("heads", repository.branches), "tags": ("tags", repository.tags)}
        answer: dict[str, list[dict[str, str]]] = {"converts": []}
        for key, (folder, refs) in listed.items():
            answer[key] = [{"name": ref, "ref": f"refs/{folder}/{ref}", "targetCommit": sha} for ref, sha in refs.items()]
        return Answer(answer)

    @route("GET", "/api/{kind}/{name}/commits/{revision}")
    def commits(self, kind: str, name: str, revision: str) -> Answer:
        repository, found = self.find(kind, name), []
        sha: str | None = repository.resolve(revision)
        while sha:
            commit = repository.commits[sha]
            found.append({"id": sha, "title": commit.title, "message": "", "date": LONG_AGO, "authors": []})
            sha = commit.parent
        return Answer(found)

    @route("POST", "/api/{kind}/{name}/tag/{revision}")
    def create_tag(self, kind: str, name: str, revision: str) -> Answer:
        repository, tag = self.find_to_write(kind, name), self.json()["tag"]
        return self.add_ref(repository.tags, tag, repository.resolve(revision))

    @route("POST", "/api/{kind}/{name}/branch/{revision}")
    def create_branch(self, kind: str, name: str, revision: str) -> Answer:
        repository = self.find_to_write(kind, name)
        return self.add_ref(repository.branches, revision, repository.resolve(self.json().get("startingPoint") or "main"))

    def add_ref(self, refs: dict[str, str], name: str, sha: str) -> Answer:
        if name in refs:
            raise Refusal(409, "Conflict", f"Reference {name} exists already")
        refs[name] = sha
        return Answer()

    # Uploads

    @route("POST", "/api/{kind}/{name}/preupload/{revision}")
    def choose_ways(self, kind: str, name: str, revision: str) -> Answer:
        """Say which files come inside the commit ("regular"), and which are there already (their `oid`)."""
        repository = self.find_to_write(kind, name)
        present, answer = repository.files(revision), []
        for wanted in self.json()["files"]:
            path = wanted["path"]
            large = self.hub.mode != "inline" and (path.endswith(LARGE_ENDINGS) or wanted["size"] > LARGE_BYTES)
            answer.append({"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False})
            if path in present:
                answer[-1]["oid"] = present[path].sha256 or present[path].blob_id
        return Answer({"files": answer, "commitOid": repository.resolve(revision)})

    @route("POST", "/{prefix}{name}.git/info/lfs/objects/batch")
    def offer_upload(self, prefix: str, name: str) -> Answer:
        self.find_to_write(prefix.rstrip("/") or "models", name)
        objects = []
        for wanted in self.json()["objects"]:
            address = f"{self.hub.url}/_lfs/{wanted['oid']}"
            ways = {"upload": {"href": address, "header": {}}, "verify": {"href": f"{address}/verify", "header": {}}}
            missing = wanted["oid"] not in self.hub.large_files
            objects.append({"oid": wanted["oid"], "size": wanted["size"], **({"actions": ways} if missing else {})})
        return Answer({"transfer": "basic", "objects": objects})

    @route("PUT", "/_lfs/{sha256}")
    def receive_large(self, sha256: str) -> Answer:
        if hashlib.sha256(self.body).hexdigest() != sha256:
            raise Refusal(422, "Unprocessable", "the body is not what its sha256 says")
        self.hub.store_large(self.body)
        return Answer(b"", headers={"ETag": f'"{sha256}"'})

    @route("POST", "/_lfs/{sha256}/verify")
    def verify_large(self, sha256: str) -> Answer:
        if len(self.hub.large_files.get(sha256, b"")) != self.json()["size"]:
            raise Refusal(404, "EntryNotFound", "not uploaded")
        return Answer()

    @route("GET", "/api/{kind}/{name}/xet-{access}-token/{revision}")
    def xet_token(self, kind: str, name: str, access: str, revision: str) -> Answer:
        """Send the client to a folder: Xet's own library then does without a storage server."""
        repository = (self.find_to_write if access == "write" else self.find_readable)(kind, name)
        repository.resolve(revision)
        if self.hub.mode != "xet":
            raise Refusal(404, "NoXet", "this server is not in xet mode")
        store, until = f"local://{self.hub.xet_folder}", int(time.time()) + 3600
        headers = {"X-Xet-Cas-Url": store, "X-Xet-Access-Token": "any", "X-Xet-Token-Expiration": str(until)}
        return Answer({"casUrl": store, "accessToken": "any", "exp": until}, headers=headers)

    @route("POST", "/api/{kind}/{name}/commit/{revision}")
    def commit(self, kind: str, name: str, revision: str) -> Answer:
        """All of the operations or, where one is refused, none of them."""
        repository = self.find_to_write(kind, name)
        head = repository.branches.get(revision)
        if head is None:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files, title = dict(repository.files(head)), ""
        for operation in map(json.loads, filter(None, self.body.split(b"\n"))):
            key, value = operation["key"], operation["value"]
            if key == "header":
                title = value["summary"]
                if value.get("parentCommit") and not head.startswith(value["parentCommit"]):
                    raise Refusal(412, "PreconditionFailed", "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                files[value["path"]] = regular(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                files[value["path"]] = self.hub.find_large(value["oid"])
            elif key == "deletedFile":
                files.pop(value["path"], None)
            elif key == "deletedFolder":
                folder = value["path"].rstrip("/") + "/"
                files = {path: file for path, file in files.items() if not path.startswith(folder)}
            else:
                raise Refusal(400, "BadRequest", f"no commit operation {key}")
        sha = repository.commit(revision, files, title)
        return Answer({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "hookOutput": ""})

    # Downloads

    @route("GET", "/api/{kind}/{name}/tree/{revision}")
    @route("GET", "/api/{kind}/{name}/tree/{revision}/{path}")
    def tree(self, kind: str, name: str, revision: str, path: str = "") -> Answer:
        start = path.strip("/") + "/" if path.strip("/") else ""
        inside = {key: file for key, file in self.find(kind, name).files(revision).items() if key.startswith(start)}
        if start and not inside:
            raise Refusal(404, "EntryNotFound", f"no folder {path}")
        deep = self.query.get("recursive", [""])[0].lower() in ("true", "1")
        entries: dict[str, dict[str, Any]] = {}
        for key, file in sorted(inside.items()):
            steps = key.removeprefix(start).split("/")
            for depth in range(1, len(steps) if deep else min(len(steps), 2)):
                folder = start + "/".join(steps[:depth])
                folder_id = hashlib.sha1(folder.encode()).hexdigest()
                entries[folder] = {"type": "directory", "oid": folder_id, "size": 0, "path": folder}
            if deep or len(steps) == 1:
                entries[key] = self.entry(key, file)
        return Answer(list(entries.values()))

    @route("POST", "/api/{kind}/{name}/paths-info/{revision}")
    def some_paths(self, kind: str, name: str, revision: str) -> Answer:
        files = self.find(kind, name).files(revision)
        return Answer([self.entry(key, files[key]) for key in parse_qs(self.body.decode())["paths"] if key in files])

    def entry(self, path: str, file: File) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "oid": file.blob_id, "size": file.size, "path": path}
        if file.sha256:
            entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": len(file.pointer)}
        return entry | ({"xetHash": file.xet_hash} if file.xet_hash else {})

    @route("GET", "/{prefix}{name}/resolve/{revision}/{path}")
    def download(self, prefix: str, name: str, revision: str, path: str) -> Answer:
        """A regular file, or where to get a large one: under another host name, as from the real Hub.

        The client follows a redirect to the same host at once, and then misses the headers of this answer.
        """
        kind = prefix.rstrip("/") or "models"
        repository = self.find_readable(kind, name)
        sha = repository.resolve(revision)
        file = repository.files(sha).get(path)
        if file is None:
            raise Refusal(404, "EntryNotFound", "Entry not found", X_Repo_Commit=sha)
        headers = {"X-Repo-Commit": sha, "ETag": f'"{file.sha256 or file.blob_id}"'}
        if file.sha256 is None:
            return self.bytes_answer(file.content or b"", headers)
        headers["Location"] = f"http://localhost:{self.hub.port}/_lfs/{file.sha256}"
        headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)}
        if file.xet_hash:
            headers["X-Xet-Hash"] = file.xet_hash
            headers["X-Xet-Refresh-Route"] = f"{self.hub.url}/api/{kind}/{name}/xet-read-token/{sha}"
        return Answer(b"", 302, headers)

    @route("GET", "/_lfs/{sha256}")
    def download_large(self, sha256: str) -> Answer:
        if sha256 not in self.hub.large_files:
            raise Refusal(404, "EntryNotFound", "not stored here")
        return self.bytes_answer(self.hub.large_files[sha256], {"ETag": f'"{sha256}"'})

    def bytes_answer(self, content: bytes, headers: dict[str, str]) -> Answer:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            return Answer(content, headers={"Accept-Ranges": "bytes", **headers})
        first, last = int(wanted[1]), min(int(wanted[2] or len(content) - 1), len(content) - 1)
        part = content[first : last + 1]
        return Answer(part, 206, {"Content-Range": f"bytes {first}-{last}/{len(content)}", **headers})
