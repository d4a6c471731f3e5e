"""A small Hub on loopback: the calls that huggingface_hub makes to create, upload, commit, list and download.

Repositories are kept in memory. Large files go the way of Git LFS, in one part or several; what was uploaded is kept
when a commit does not come about, as on the Hub.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

TOKEN = "hf_standin"
#: What the Hub keeps as LFS objects whatever its size, and from which size on it does so with the rest.
LARGE_SUFFIX, LARGE_BYTES = ".safetensors", 10 << 20


@dataclass
class Repository:
    """Branches, and what each commit holds: a path to (bytes, LFS oid or None)."""

    private: bool = True
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, tuple[bytes, str | None]]] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, tuple[bytes, str | None]]) -> str:
        names = json.dumps([sorted((path, hashlib.sha256(data).hexdigest()) for path, (data, _) in files.items())])
        oid = hashlib.sha1(f"{len(self.commits)}{branch}{names}".encode()).hexdigest()
        self.commits[oid], self.branches[branch] = files, oid
        return oid

    def files(self, revision: str) -> tuple[str, dict[str, tuple[bytes, str | None]]] | None:
        oid = self.branches.get(revision, revision)
        return (oid, self.commits[oid]) if oid in self.commits else None


@dataclass
class StandIn:
    """A running stand-in.

    Attributes:
        requests: method and path of each, in order.
        uploaded: LFS oids in the order in which they arrived.
        refuse_upload: oids whose upload is refused.
        break_after: bytes of an LFS object after which its next download breaks off.
        part_bytes: size of a part of an upload; None sends each object in one.
        ranges: the Range headers of downloads.
    """

    endpoint: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    parts: dict[str, dict[int, bytes]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    uploaded: list[str] = field(default_factory=list)
    refuse_upload: set[str] = field(default_factory=set)
    break_after: int | None = None
    part_bytes: int | None = None
    ranges: list[str] = field(default_factory=list)

    def counted(self, pattern: str) -> int:
        return sum(bool(re.search(pattern, request)) for request in self.requests)


@contextmanager
def standin() -> Iterator[StandIn]:
    state = StandIn()

    class Handler(_Handler):
        hub = state

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: StandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._route("GET")

    def do_HEAD(self) -> None:
        self._route("HEAD")

    def do_POST(self) -> None:
        self._route("POST")

    def do_PUT(self) -> None:
        self._route("PUT")

    def _route(self, method: str) -> None:
        path = urllib.parse.urlsplit(self.path).path
        self.hub.requests.append(f"{method} {path}")
        for wanted, pattern, act in _ROUTES:
            found = re.fullmatch(pattern, path)
            if method in wanted.split() and found:
                act(self, **{name: urllib.parse.unquote(value) for name, value in found.groupdict().items()})
                return
        self._json(404, {"error": f"no such call: {method} {path}"})

    @property
    def _may_write(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            pieces = []
            while size := int(self.rfile.readline(), 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _json(self, status: int, value: Any, **headers: str) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **headers})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _missing(self, code: str) -> None:
        self._send(404, b"", {"X-Error-Code": code, "X-Error-Message": code})

    def _repository(self, repo: str) -> Repository | None:
        found = self.hub.repositories.get(repo)
        if found is None or (found.private and not self._may_write):
            self._send(401, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
            return None
        return found

    def _files(self, repo: str, revision: str) -> tuple[str, dict[str, tuple[bytes, str | None]]] | None:
        repository = self._repository(repo)
        if repository is None:
            return None
        found = repository.files(revision)
        if found is None:
            self._missing("RevisionNotFound")
        return found

    def create(self) -> None:
        value = json.loads(self._body())
        repo = f"{value['organization']}/{value['name']}"
        if not self._may_write:
            self._json(401, {"error": "Invalid username or password."})
        elif repo in self.hub.repositories:
            self._json(409, {"error": "You already created this model repo", "url": f"{self.hub.endpoint}/{repo}"})
        else:
            made = self.hub.repositories[repo] = Repository(value.get("visibility") == "private")
            made.commit("main", {".gitattributes": (b"*.safetensors filter=lfs\n", None)})
            self._json(200, {"url": f"{self.hub.endpoint}/{repo}", "name": repo})

    def validate(self) -> None:
        """As the Hub: the front matter must be YAML, and a base model a repository's id."""
        content = json.loads(self._body())["content"]
        problem = ""
        try:
            front = yaml.safe_load(content.split("---\n")[1])
            if "/" not in front.get("base_model", "a/b"):
                problem = '"base_model" is not valid. Use a model id from https://hf.co/models.'
        except (yaml.YAMLError, IndexError) as error:
            problem = f"Invalid YAML: {error}"
        self._json(400 if problem else 200, {"errors": [{"message": problem}] if problem else [], "warnings": []})

    def branch(self, repo: str, branch: str) -> None:
        self._body()
        repository = self._repository(repo)
        if repository is None:
            return
        if branch in repository.branches:
            self._json(409, {"error": "branch exists"})
            return
        repository.branches[branch] = repository.branches["main"]
        self._json(200, {})

    def info(self, repo: str, revision: str = "main") -> None:
        if found := self._files(repo, revision):
            oid, files = found
            value = {"id": repo, "sha": oid, "siblings": [{"rfilename": path} for path in files]}
            self._json(200, value | {"private": True, "tags": [], "downloads": 0, "likes": 0})

    def tree(self, repo: str, revision: str) -> None:
        if found := self._files(repo, revision):
            self._json(200, [self._entry(path, *held) for path, held in found[1].items()])

    @staticmethod
    def _entry(path: str, data: bytes, oid: str | None) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": _blob_id(data)}
        return entry | ({"lfs": {"oid": oid, "size": len(data), "pointerSize": 130}} if oid else {})

    def preupload(self, repo: str, revision: str) -> None:
        files = json.loads(self._body())["files"]
        if not self._may_write:
            self._json(403, {"error": "You have no right to write"})
        elif found := self._files(repo, revision):
            answers = []
            for file in files:
                large = file["path"].endswith(LARGE_SUFFIX) or file["size"] > LARGE_BYTES
                held = found[1].get(file["path"])
                remote = None if held is None else held[1] or _blob_id(held[0])
                mode = "lfs" if large else "regular"
                answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": remote})
            self._json(200, {"files": answers})

    def batch(self, repo: str) -> None:
        objects = []
        for item in json.loads(self._body())["objects"]:
            oid, size = item["oid"], item["size"]
            made: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in self.hub.objects:
                place = f"{self.hub.endpoint}/lfs/{oid}"
                upload: dict[str, Any] = {"href": place}
                if (part := self.hub.part_bytes) is not None and size > part:
                    header = {str(index + 1): f"{place}/{index + 1}" for index in range(-(-size // part))}
                    upload = {"href": f"{place}/complete", "header": header | {"chunk_size": str(part)}}
                made["actions"] = {"upload": upload, "verify": {"href": f"{place}/verify"}}
            objects.append(made)
        self._json(200, {"transfer": "basic", "objects": objects})

    def put(self, oid: str, part: str = "") -> None:
        data = self._body()
        if oid in self.hub.refuse_upload:
            self._json(403, {"error": "refused"})
        elif part:
            self.hub.parts.setdefault(oid, {})[int(part)] = data
            self._send(200, b"", {"ETag": f'"{part}"'})
        else:
            self._keep(oid, data)

    def complete(self, oid: str) -> None:
        told = json.loads(self._body())["parts"]
        parts = self.hub.parts.pop(oid)
        self._keep(oid, b"".join(parts[item["partNumber"]] for item in told))

    def _keep(self, oid: str, data: bytes) -> None:
        if hashlib.sha256(data).hexdigest() != oid:
            self._json(400, {"error": "the object has another digest"})
            return
        self.hub.objects[oid] = data
        self.hub.uploaded.append(oid)
        self._json(200, {})

    def verify(self, oid: str) -> None:
        wanted = json.loads(self._body())
        held = self.hub.objects.get(oid)
        self._json(200 if held is not None and len(held) == wanted["size"] else 404, {})

    def commit(self, repo: str, revision: str) -> None:
        lines = [json.loads(line) for line in self._body().splitlines()]
        if not (found := self._files(repo, revision)):
            return
        files = dict(found[1])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = (base64.b64decode(value["content"]), None)
            elif line["key"] == "lfsFile":
                files[value["path"]] = (self.hub.objects[value["oid"]], value["oid"])
            else:
                del files[value["path"]]
        oid = self.hub.repositories[repo].commit(revision, files)
        url = f"{self.hub.endpoint}/{repo}/commit/{oid}"
        self._json(200, {"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

    def resolve(self, repo: str, revision: str, path: str) -> None:
        if not (found := self._files(repo, revision)):
            return
        commit, files = found
        if path not in files:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            return
        data, oid = files[path]
        if oid is None:
            self._send(200, data, {"ETag": f'"{_blob_id(data)}"', "X-Repo-Commit": commit})
            return
        headers = {"X-Repo-Commit": commit, "X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(data))}
        elsewhere = self.hub.endpoint.replace("127.0.0.1", "localhost")  # the Hub's large files lie on another host
        self._send(302, b"", headers | {"Location": f"{elsewhere}/cdn/{oid}"})

    def download(self, oid: str) -> None:
        data, start = self.hub.objects[oid], 0
        if asked := self.headers.get("Range"):
            self.hub.ranges.append(asked)
            start = int(asked.removeprefix("bytes=").partition("-")[0])
        stop, self.hub.break_after = self.hub.break_after, None
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[start:] if stop is None else data[start : start + stop])
            if stop is not None:
                self.close_connection = True


def _blob_id(data: bytes) -> str:
    """Git's name of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


_REPO = r"(?P<repo>[^/]+/[^/]+)"
_ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("GET", f"/api/models/{_REPO}", _Handler.info),
    ("GET", f"/api/models/{_REPO}/revision/(?P<revision>.+)", _Handler.info),
    ("GET", f"/api/models/{_REPO}/tree/(?P<revision>.+)", _Handler.tree),
    ("POST", f"/api/models/{_REPO}/branch/(?P<branch>.+)", _Handler.branch),
    ("POST", f"/api/models/{_REPO}/preupload/(?P<revision>.+)", _Handler.preupload),
    ("POST", f"/api/models/{_REPO}/commit/(?P<revision>.+)", _Handler.commit),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]+)", _Handler.put),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]+)/(?P<part>[0-9]+)", _Handler.put),
    ("POST", "/lfs/(?P<oid>[0-9a-f]+)/complete", _Handler.complete),
    ("POST", "/lfs/(?P<oid>[0-9a-f]+)/verify", _Handler.verify),
    ("GET HEAD", f"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
    ("GET HEAD", "/cdn/(?P<oid>[0-9a-f]+)", _Handler.download),
]
