"""A Hub on loopback, written from the Hub's protocol, for huggingface_hub's own client.

It keeps repositories with branches, commits, pull requests and large files, and refuses what the
Hub refuses: sizes and hashes that are wrong, a parent commit that is no longer the tip, a token
without the right. Two servers, as in truth: the Hub, and a storage on another origin, to which
large files go and from which they come by signed addresses, without the token.

Each request that comes in is numbered from 1 on, and a :class:`Fault` can be set for any of them.
Nothing in the package knows that this is here: a client is led to it by HF_ENDPOINT.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml

LARGE = ("*.safetensors", "*.bin", "*.png", "*.pt", "*.pkl", "*.gguf")
ATTRIBUTES = "".join(
    f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LARGE
).encode()
PAGE = 2  # models per page of a listing, so that a client has to turn pages


@dataclass(frozen=True)
class Fault:
    """What happens to some requests instead of a proper answer.

    Attributes:
        first: number of the first request that it befalls.
        last: number of the last one.
        status: this answer is given, and nothing done.
        cut: the connection is closed: "before" anything is done, "after" all is done, or "midway"
            through the answer.
        headers: headers of the answer.
        path: only requests whose path has this in it.
    """

    first: int = 1
    last: int = 10**9
    status: int | None = None
    cut: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    path: str = ""


@dataclass(frozen=True)
class Answer:
    """What a request is answered with; JSON unless it is bytes."""

    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)


class Refusal(Exception):
    """A request is answered with an error, as the Hub does."""

    def __init__(self, status: int, message: str, code: str | None = None, **body: str) -> None:
        super().__init__(message)
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.answer = Answer(status, {"error": message, **body}, headers)


@dataclass(frozen=True)
class Commit:
    """A commit: for each path the content, and whether it is a large file."""

    oid: str
    parent: str | None
    message: str
    tree: dict[str, tuple[bytes, bool]]


class Repo:
    """A model repository, which begins with one commit, as on the Hub."""

    def __init__(self, name: str, private: bool = False) -> None:
        self.name = name
        self.private = private
        self.gated = False
        self.commits: dict[str, Commit] = {}
        self.refs: dict[str, str] = {}
        self.pull_requests = 0
        self.add("main", {".gitattributes": (ATTRIBUTES, False)}, "initial commit")

    def add(self, ref: str, tree: dict[str, tuple[bytes, bool]], message: str) -> Commit:
        """Put a commit on a branch or another ref."""
        parent = self.refs.get(ref)
        text = f"{self.name} {len(self.commits)} {parent} {message} {sorted(tree)}"
        commit = Commit(hashlib.sha1(text.encode()).hexdigest(), parent, message, dict(tree))
        self.commits[commit.oid] = commit
        self.refs[ref] = commit.oid
        return commit

    def put(self, files: dict[str, bytes]) -> Commit:
        """Commit files to the main branch, past the protocol."""
        tree = self.at("main").tree | {
            path: (content, is_large(path, content)) for path, content in files.items()
        }
        return self.add("main", tree, "put")

    def at(self, revision: str) -> Commit:
        """Find a commit by branch, tag, ref or hash."""
        oid = self.refs.get(revision, revision)
        if oid not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[oid]

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Read all files of a commit, but those that the Hub makes itself."""
        tree = self.at(revision).tree
        return {path: raw for path, (raw, _) in tree.items() if path != ".gitattributes"}


def is_large(path: str, sample: bytes) -> bool:
    """Tell whether a file belongs into the storage: by its name, or because it is binary."""
    return any(fnmatch(path, pattern) for pattern in LARGE) or b"\0" in sample[:512]


def oid_of(content: bytes, large: bool) -> str:
    """Name a content as the Hub does: sha256 of a large file, git's hash of another."""
    if large:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def pointer_oid(content: bytes) -> str:
    """Name the pointer that stands for a large file in git."""
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid_of(content, True)}\n"
    return oid_of(f"{text}size {len(content)}\n".encode(), False)


class HubServer:
    """The Hub and its storage, each at a port of loopback.

    Attributes:
        url: the Hub's address, for HF_ENDPOINT.
        repos: the repositories by name.
        faults: what goes wrong, and when.
        log: what was asked, in order of arrival: method and path.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.users: dict[str, tuple[str, bool]] = {}
        self.stored: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.log: list[str] = []
        self.on_commit: Callable[[], None] | None = None
        self._lock = threading.RLock()
        self._servers = [self._serve(), self._serve()]
        self.url, self.storage = (f"http://127.0.0.1:{s.server_address[1]}" for s in self._servers)

    def close(self) -> None:
        """Stop answering."""
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def add_user(self, name: str, token: str, may_write: bool = True) -> str:
        """Let a token in."""
        self.users[token] = (name, may_write)
        return token

    def add_repo(self, name: str, files: dict[str, bytes] | None = None, **how: bool) -> Repo:
        """Make a repository with files on its main branch, past the protocol."""
        repo = self.repos[name] = Repo(name, how.get("private", False))
        repo.gated = how.get("gated", False)
        if files:
            repo.put(files)
        return repo

    def reset_count(self) -> None:
        """Number the next request 1, and set no fault."""
        self.log.clear()
        self.faults.clear()

    def arrive(self, method: str, path: str) -> Fault | None:
        """Number a request, and tell what is to go wrong with it."""
        with self._lock:
            self.log.append(f"{method} {path}")
            number = len(self.log)
        for fault in self.faults:
            if fault.first <= number <= fault.last and fault.path in path:
                return fault
        return None

    def _serve(self) -> ThreadingHTTPServer:
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": self}))
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return server

    # --- who may do what --------------------------------------------------------------------

    def user(self, request: _Request) -> tuple[str, bool] | None:
        """Tell who asks; None if nobody says so."""
        authorization = request.headers.get("authorization")
        if authorization is None:
            return None
        user = self.users.get(authorization.removeprefix("Bearer "))
        if user is None:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return user

    def readable(self, request: _Request, name: str, files: bool = False) -> Repo:
        """Find a repository that the asker may see, and whose files, if that is asked."""
        user, repo = self.user(request), self.repos.get(name)
        hidden = repo is None or (repo.private and (user is None or not owns(user, name)))
        if repo is None or hidden:
            raise Refusal(401 if user is None else 404, "Repository not found", "RepoNotFound")
        if files and repo.gated and (user is None or not owns(user, name)):
            message = f"Access to model {name} is restricted."
            raise Refusal(401 if user is None else 403, message, "GatedRepo")
        return repo

    def writable(self, request: _Request, name: str) -> Repo:
        """Find a repository that the asker may write to; by a pull request anybody may."""
        user, repo = self.user(request), self.readable(request, name)
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        if not request.query.get("create_pr") and not (owns(user, name) and user[1]):
            raise Refusal(403, "Forbidden: you must use a write token to upload to a repository.")
        return repo

    # --- the Hub's answers ------------------------------------------------------------------

    def whoami(self, request: _Request) -> Answer:
        user = self.user(request)
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        role = "write" if user[1] else "read"
        auth = {"accessToken": {"role": role}}
        return Answer(body={"type": "user", "name": user[0], "orgs": [], "auth": auth})

    def create_repo(self, request: _Request) -> Answer:
        user, new = self.user(request), request.json()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        name = f"{new.get('organization') or user[0]}/{new['name']}"
        if not (owns(user, name) and user[1]):
            raise Refusal(403, "You don't have the rights to create a model under this namespace")
        if name in self.repos:
            raise Refusal(409, "You already created this model repo", url=f"{self.url}/{name}")
        private = new.get("visibility") == "private" or bool(new.get("private"))
        self.repos[name] = Repo(name, private)
        return Answer(body={"url": f"{self.url}/{name}", "name": name, "id": name})

    def validate_yaml(self, request: _Request) -> Answer:
        try:
            card_data(request.json()["content"].encode())
        except yaml.YAMLError as error:
            body = {"errors": [{"message": str(error)}], "warnings": []}
            return Answer(400, body)
        return Answer(body={"errors": [], "warnings": []})

    def list_models(self, request: _Request) -> Answer:
        tags, start = request.query.get("filter", []), int(request.query.get("cursor", ["0"])[0])
        visible = []
        for name, repo in sorted(self.repos.items()):
            user = self.user(request)
            if repo.private and (user is None or not owns(user, name)):
                continue
            info = self.describe(repo, repo.at("main"))
            if set(tags) <= set(info["tags"]):
                visible.append(info)
        headers = {}
        if start + PAGE < len(visible):
            query = "&".join(
                f"{key}={quote(value)}"
                for key, values in request.query.items()
                for value in values
                if key != "cursor"
            )
            following = f"{self.url}/api/models?{query}&cursor={start + PAGE}"
            headers["Link"] = f'<{following}>; rel="next"'
        return Answer(body=visible[start : start + PAGE], headers=headers)

    def model_info(self, request: _Request, name: str, revision: str = "main") -> Answer:
        repo = self.readable(request, name)
        return Answer(body=self.describe(repo, repo.at(revision)))

    def describe(self, repo: Repo, commit: Commit) -> dict[str, Any]:
        """Say of a commit what the Hub makes of its files and its card."""
        card = card_data(commit.tree.get("README.md", (b"", False))[0])
        bases = card.get("base_model") or []
        tags = [*(card.get("tags") or []), *filter(None, [card.get("library_name")])]
        for base in [bases] if isinstance(bases, str) else bases:
            tags += [f"base_model:{base}", f"base_model:{card['base_model_relation']}:{base}"]
        return {
            "_id": hashlib.sha1(repo.name.encode()).hexdigest()[:24],
            "id": repo.name,
            "modelId": repo.name,
            "author": repo.name.split("/")[0],
            "sha": commit.oid,
            "lastModified": "2026-01-02T03:04:05.000Z",
            "createdAt": "2026-01-01T00:00:00.000Z",
            "private": repo.private,
            "gated": "manual" if repo.gated else False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": tags,
            "pipeline_tag": card.get("pipeline_tag"),
            "library_name": card.get("library_name"),
            "cardData": {key: value for key, value in card.items() if key != "model-index"},
            "model-index": card.get("model-index"),
            "siblings": [{"rfilename": path} for path in sorted(commit.tree)],
        }

    def tree(self, request: _Request, name: str, revision: str) -> Answer:
        repo = self.readable(request, name)
        entries = [entry(path, *file) for path, file in sorted(repo.at(revision).tree.items())]
        return Answer(body=entries)

    def paths_info(self, request: _Request, name: str, revision: str) -> Answer:
        tree = self.readable(request, name).at(revision).tree
        paths = parse_qs(request.body.decode()).get("paths", [])
        return Answer(body=[entry(path, *tree[path]) for path in paths if path in tree])

    def refs(self, request: _Request, name: str) -> Answer:
        repo = self.readable(request, name)
        branches = [
            {"name": ref, "ref": f"refs/heads/{ref}", "targetCommit": oid}
            for ref, oid in repo.refs.items()
            if not ref.startswith("refs/")
        ]
        return Answer(body={"branches": branches, "tags": [], "converts": []})

    def branch(self, request: _Request, name: str, branch: str) -> Answer:
        repo = self.writable(request, name)
        if branch in repo.refs:
            raise Refusal(409, "Reference already exists")
        start = request.json().get("startingPoint", "main") if request.body else "main"
        repo.refs[branch] = repo.at(start).oid
        return Answer(body={})

    def preupload(self, request: _Request, name: str, revision: str) -> Answer:
        tree = self.writable(request, name).at(revision).tree
        files = []
        for file in request.json()["files"]:
            path, large = file["path"], is_large(file["path"], base64.b64decode(file["sample"]))
            there = oid_of(*tree[path]) if path in tree else None
            mode = "lfs" if large else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": there})
        return Answer(body={"files": files})

    def lfs_batch(self, request: _Request, name: str) -> Answer:
        self.readable(request, name)
        if self.user(request) is None:
            raise Refusal(401, "Invalid username or password.")
        objects = []
        for pointer in request.json()["objects"]:
            oid, size, actions = pointer["oid"], pointer["size"], None
            if oid not in self.stored:
                upload = {"href": f"{self.storage}/put/{oid}/{size}", "header": {}}
                verify = {"href": f"{self.url}/{name}.git/info/lfs/verify", "header": {}}
                actions = {"actions": {"upload": upload, "verify": verify}}
            objects.append({"oid": oid, "size": size} | (actions or {}))
        return Answer(body={"transfer": "basic", "objects": objects})

    def lfs_verify(self, request: _Request, name: str) -> Answer:
        self.readable(request, name)
        pointer = request.json()
        if len(self.stored.get(pointer["oid"], b"")) != pointer["size"]:
            raise Refusal(404, "Object not found in storage, or of another size")
        return Answer(body={"message": "verified"})

    def commit(self, request: _Request, name: str, revision: str) -> Answer:
        if self.on_commit is not None:
            self.on_commit()
        with self._lock:
            repo = self.writable(request, name)
            header, *operations = map(json.loads, request.body.splitlines())
            base, parent = repo.at(revision), header["value"].get("parentCommit")
            to_branch = not request.query.get("create_pr")
            if to_branch and revision not in repo.refs:
                raise Refusal(404, f"Invalid ref: {revision}", "RevisionNotFound")
            if to_branch and parent not in (None, base.oid):
                raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            if not operations:
                raise Refusal(400, "Empty commit")
            tree = dict(repo.at(parent or revision).tree)
            for operation in operations:
                self.apply(tree, operation["key"], operation["value"])
            if not to_branch:
                repo.pull_requests += 1
                ref = f"refs/pr/{repo.pull_requests}"
                repo.refs[ref] = repo.at(parent or revision).oid
                made = repo.add(ref, tree, header["value"]["summary"])
                url = f"{self.url}/{name}/discussions/{repo.pull_requests}"
            else:
                made, url = repo.add(revision, tree, header["value"]["summary"]), None
        body = {"success": True, "commitOid": made.oid, "pullRequestUrl": url, "hookOutput": ""}
        return Answer(body=body | {"commitUrl": f"{self.url}/{name}/commit/{made.oid}"})

    def apply(self, tree: dict[str, tuple[bytes, bool]], key: str, value: dict[str, Any]) -> None:
        """Do one operation of a commit."""
        path = value["path"]
        if key == "file":
            content = base64.b64decode(value["content"], validate=True)
            if is_large(path, content) and content:
                raise Refusal(400, f"{path}: binary files belong into the large file storage")
            tree[path] = (content, False)
        elif key == "lfsFile":
            stored = self.stored.get(value["oid"])
            if value["algo"] != "sha256" or stored is None or len(stored) != value["size"]:
                raise Refusal(400, f"{path}: LFS pointer pointed to a file that does not exist")
            tree[path] = (stored, True)
        elif key == "deletedFile" and path in tree:
            del tree[path]
        else:
            raise Refusal(400, f"{path}: cannot do {key}")

    def resolve(self, request: _Request, name: str, revision: str, path: str) -> Answer:
        repo = self.readable(request, name, files=True)
        commit = repo.at(revision)
        headers = {"X-Repo-Commit": commit.oid}
        if path not in commit.tree:
            refusal = Refusal(404, "Entry not found", "EntryNotFound").answer
            return Answer(refusal.status, refusal.body, refusal.headers | headers)
        content, large = commit.tree[path]
        etag = f'"{oid_of(content, large)}"'
        if not large:
            return ranged(request, content, headers | {"ETag": etag})
        self.stored.setdefault(oid_of(content, True), content)
        headers |= {"X-Linked-ETag": etag, "X-Linked-Size": str(len(content))}
        headers["Location"] = f"{self.storage}/get/{oid_of(content, True)}"
        return Answer(302, b"", headers)

    # --- the storage's answers, to whom no token may come -----------------------------------

    def storage_put(self, request: _Request, oid: str, size: str) -> Answer:
        if len(request.body) != int(size) or oid_of(request.body, True) != oid:
            return Answer(400, b"<Error><Code>XAmzContentSHA256Mismatch</Code></Error>")
        self.stored[oid] = request.body
        return Answer(body=b"")

    def storage_get(self, request: _Request, oid: str) -> Answer:
        return ranged(request, self.stored[oid], {"ETag": f'"{oid}"'})


def owns(user: tuple[str, bool], repo: str) -> bool:
    """Tell whether a repository is in a user's namespace."""
    return repo.split("/")[0] == user[0]


def entry(path: str, content: bytes, large: bool) -> dict[str, Any]:
    """Describe a file as a listing of the Hub does."""
    file: dict[str, Any] = {"type": "file", "path": path, "size": len(content)}
    if not large:
        return file | {"oid": oid_of(content, False)}
    lfs = {"oid": oid_of(content, True), "size": len(content), "pointerSize": 130}
    return file | {"oid": pointer_oid(content), "lfs": lfs}


def ranged(request: _Request, content: bytes, headers: dict[str, str]) -> Answer:
    """Answer with a content, with a part of it, or with the news that it is unchanged."""
    if request.headers.get("if-none-match") == headers["ETag"]:
        return Answer(304, b"", headers)
    part = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
    headers = headers | {"Accept-Ranges": "bytes"}
    if part is None:
        return Answer(200, content, headers)
    first, last = int(part[1]), int(part[2] or len(content) - 1)
    if first >= len(content):
        return Answer(416, b"", headers | {"Content-Range": f"bytes */{len(content)}"})
    headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
    return Answer(206, content[first : last + 1], headers)


def card_data(readme: bytes) -> dict[str, Any]:
    """Read the metadata of a card."""
    metadata = re.match(r"---\r?\n(.*?)\r?\n---", readme.decode(), re.DOTALL)
    return (yaml.safe_load(metadata[1]) or {}) if metadata else {}


ROUTES: list[tuple[str, str, Callable[..., Answer]]] = [
    ("GET", r"/api/whoami-v2", HubServer.whoami),
    ("POST", r"/api/repos/create", HubServer.create_repo),
    ("POST", r"/api/validate-yaml", HubServer.validate_yaml),
    ("GET", r"/api/models", HubServer.list_models),
    ("GET", r"/api/models/([^/]+/[^/]+)", HubServer.model_info),
    ("GET", r"/api/models/([^/]+/[^/]+)/revision/([^/]+)", HubServer.model_info),
    ("GET", r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", HubServer.tree),
    ("POST", r"/api/models/([^/]+/[^/]+)/paths-info/([^/]+)", HubServer.paths_info),
    ("GET", r"/api/models/([^/]+/[^/]+)/refs", HubServer.refs),
    ("POST", r"/api/models/([^/]+/[^/]+)/branch/([^/]+)", HubServer.branch),
    ("POST", r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", HubServer.preupload),
    ("POST", r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", HubServer.commit),
    ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", HubServer.lfs_batch),
    ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/verify", HubServer.lfs_verify),
    ("GET", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", HubServer.resolve),
    ("PUT", r"/put/([^/]+)/([^/]+)", HubServer.storage_put),
    ("GET", r"/get/([^/]+)", HubServer.storage_get),
]


@dataclass(frozen=True)
class _Request:
    """A request, read whole."""

    headers: dict[str, str]
    query: dict[str, list[str]]
    body: bytes

    def json(self) -> Any:
        """Read the body."""
        return json.loads(self.body)


class _Handler(BaseHTTPRequestHandler):
    """Reads requests, lets the Hub answer them, and lets faults befall them."""

    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def answer(self) -> None:
        """Answer one request, of any method."""
        parts = urlsplit(self.path)
        body = self._read()
        if parts.path == "/api/agent-harnesses":  # asked in the background, once a day
            return self._send(Answer(404, {"error": "Not here"}))
        fault = self.hub.arrive(self.command, parts.path)
        if fault is not None and fault.cut == "before":
            return self._cut()
        if fault is not None and fault.status is not None:
            error = {"error": f"The server says {fault.status}"}
            return self._send(Answer(fault.status, error, fault.headers))
        headers = {key.lower(): value for key, value in self.headers.items()}
        request = _Request(headers, parse_qs(parts.query), body)
        answer = self._find(parts.path, request)
        if fault is not None and fault.cut == "after":
            return self._cut()
        self._send(answer, midway=fault is not None)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def _find(self, path: str, request: _Request) -> Answer:
        method = "GET" if self.command == "HEAD" else self.command
        for known, pattern, answer in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and known == method:
                if path.startswith(("/put/", "/get/")) and "authorization" in request.headers:
                    return Answer(400, {"error": "a token was sent to the storage"})
                try:
                    return answer(self.hub, request, *map(unquote, match.groups()))
                except Refusal as refusal:
                    return refusal.answer
        return Answer(404, {"error": f"no such route: {self.command} {path}"})

    def _read(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", "0")))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _send(self, answer: Answer, midway: bool = False) -> None:
        raw = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        self.send_response(answer.status)
        for key, value in answer.headers.items():
            self.send_header(key, value)
        if not isinstance(answer.body, bytes):
            self.send_header("Content-Type", "application/json; charset=utf-8")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw[: len(raw) // 2] if midway else raw)
        if midway:
            self._cut()

    def _cut(self) -> None:
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_: object) -> None:
        """Say nothing."""
