"""A Hub on loopback for tests: repositories in memory behind the routes that the genuine client asks for.

What leaves the machine can be read from it: `HubServer.log` has every request with its body, `HubServer.received`
every content of a file, whole or in part, whichever route it took. No check on names, sizes or kinds of files is made
here, so that a test sees what a careless client would give away.
"""

import base64
import hashlib
import json
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qsl, unquote

USER = "someone"
# Of the shape of real ones, by which a scan for secrets finds them.
TOKEN, READ_TOKEN = "hf_" + "Wr1teToken" * 3 + "abcd", "hf_" + "ReadToken5" * 3 + "abcd"
ROLES = {TOKEN: "write", READ_TOKEN: "read"}
MAIN = "main"
# The Hub stores these as LFS objects, and whatever is large or not text.
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".onnx", ".npz")
LFS_SIZE = 10 * 2**20


class Request(NamedTuple):
    """One request as it was answered; `status` is 0 where the connection was dropped."""

    method: str
    path: str
    status: int
    body: bytes


class Call(NamedTuple):
    """What an answer may depend on, beside the parts of the path."""

    body: bytes
    query: dict[str, str]
    token: str | None
    byte_range: str


@dataclass
class Received:
    """Content that arrived; `route` is card, sample, file or lfs.

    An LFS object is known by its hash `oid` alone until a commit gives it a path.
    """

    repo_id: str | None
    path: str | None
    content: bytes
    route: str
    oid: str | None = None


@dataclass
class Repository:
    """Commits by hash, each a dict of contents by path, and their messages; branches by name; LFS objects by sha256."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes], message: str = "initial commit") -> str:
        """Put `files` on a branch as its new state."""
        sha = os.urandom(20).hex()
        self.commits[sha], self.messages[sha], self.branches[branch] = files, message, sha
        return sha

    def resolve(self, revision: str) -> str:
        sha = self.branches.get(revision, revision)
        if sha not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    def files(self, revision: str = MAIN) -> dict[str, bytes]:
        return self.commits[self.resolve(revision)]


class HubError(Exception):
    """An answer other than success: its status, the message of its body, and its X-Error-Code."""

    def __init__(self, status: int, message: str, code: str | None = None, **body):
        super().__init__(message)
        self.status, self.body = status, {"error": message, **body}
        # The client tells a bad token from a missing repository by the message in the header.
        named = "Invalid credentials in Authorization header" if code == "InvalidToken" else message
        self.headers = {"X-Error-Message": named} | ({} if code in (None, "InvalidToken") else {"X-Error-Code": code})


def is_lfs(path: str, content: bytes, size: int) -> bool:
    return path.endswith(LFS_SUFFIXES) or size > LFS_SIZE or b"\0" in content[:512]


def object_id(path: str, content: bytes) -> str:
    """By which the client finds that a file has not changed: sha256 of an LFS object, git's hash of another file."""
    if is_lfs(path, content, len(content)):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def entry(path: str, content: bytes) -> dict:
    """A file in a listing."""
    found = {"type": "file", "path": path, "size": len(content), "oid": object_id(path, content)}
    if is_lfs(path, content, len(content)):
        found["lfs"] = {"oid": object_id(path, content), "size": len(content), "pointerSize": 134}
    return found


def _contents(answer: str, body: bytes, parts: dict[str, str]) -> list[tuple]:
    """The contents of files in the body of a request: fields of `Received` behind `repo_id`."""
    if answer == "validate_card":
        return [("README.md", json.loads(body)["content"].encode(), "card")]
    if answer == "preupload":
        return [(asked["path"], base64.b64decode(asked["sample"]), "sample") for asked in json.loads(body)["files"]]
    if answer == "lfs_put":
        return [(None, body, "lfs", parts["oid"])]
    if answer == "commit":
        values = [line["value"] for line in map(json.loads, body.splitlines()) if line["key"] == "file"]
        return [(value["path"], base64.b64decode(value["content"]), "file") for value in values]
    return []


class HubServer:
    """Answers on a free port of loopback while it is entered; gone with its threads when left.

    Attributes:
        repositories: `Repository` by id; a test may put one there.
        log: every request.
        received: every content of a file that arrived.
        fail_after_puts: with a number, only so many LFS objects are still taken; the connection of each further one is
            dropped in the middle of its body. `mark` sets it from the client's process.
    """

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.log: list[Request] = []
        self.received: list[Received] = []
        self.fail_after_puts: int | None = None
        self._lock = threading.Lock()

    def __enter__(self):
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        # Waits for them at its end.
        self._server.daemon_threads = False
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def section(self, name: str) -> list[Request]:
        """Requests from a client's `mark(name)` to its next one."""
        paths = [request.path for request in self.log]
        first = next(place for place, path in enumerate(paths) if path.startswith(f"/mark/{name}/")) + 1
        length = next((place for place, path in enumerate(paths[first:]) if path.startswith("/mark/")), len(paths))
        return self.log[first : first + length]

    def answer(self, request: Request, asked: Message) -> tuple[int, dict, bytes]:
        """Status, headers and body of the answer to a request with the headers `asked`; logs it."""
        path, _, query = request.path.partition("?")
        token = (asked["Authorization"] or "").removeprefix("Bearer ") or None
        call = Call(request.body, dict(parse_qsl(query)), token, asked["Range"] or "")
        with self._lock:
            try:
                headers, body = self._route(request.method, path, call)
                status = 206 if "Content-Range" in headers else 200
            except HubError as error:
                status, headers, body = error.status, error.headers, error.body
            self.log.append(request._replace(status=status))
        if not isinstance(body, bytes):
            headers, body = {"Content-Type": "application/json", **headers}, json.dumps(body).encode()
        return status, headers, body

    def drops(self, request: Request, read: Callable[[int], bytes], length: int) -> bool:
        """Whether this PUT is to be dropped; the first half of its body is then read, and noted."""
        with self._lock:
            if request.method != "PUT" or self.fail_after_puts is None:
                return False
            if self.fail_after_puts > 0:
                self.fail_after_puts -= 1
                return False
            half = read(length // 2)
            self.log.append(request._replace(body=half))
            self.received.append(Received(request.path.split("/lfs/")[0][1:], None, half, "lfs", request.path[-64:]))
        return True

    def _route(self, method, path, call):
        for methods, pattern, answer in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method in methods:
                parts = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
                # Refused or not, it has left the machine.
                self.received += [
                    Received(parts.get("repo_id"), *found) for found in _contents(answer, call.body, parts)
                ]
                # Links of LFS objects are signed: they are asked for without a token.
                if "repo_id" in parts and method != "PUT":
                    self._check(parts["repo_id"], call.token, writes=method == "POST" and answer != "paths_info")
                if "repo_id" in parts:
                    parts["repo"] = self.repositories[parts["repo_id"]]
                found = getattr(self, f"_{answer}")(call=call, **parts)
                return found if isinstance(found, tuple) else ({}, found)
        raise HubError(404, f"no such route: {method} {path}")

    def _check(self, repo_id, token, writes=False):
        """Refuse a token that is unknown or may not do this, and a repository that is missing or hidden."""
        if token is not None and token not in ROLES:
            raise HubError(401, "Invalid username or password.", "InvalidToken")
        repo = self.repositories.get(repo_id)
        if repo_id is not None and (repo is None or (repo.private and token is None)):
            raise HubError(404 if token else 401, "Repository not found", "RepoNotFound")
        if writes and token is None:
            raise HubError(401, "Invalid username or password.")
        if writes and ROLES[token] != "write":
            raise HubError(403, f"you must use a write token to write to {repo_id or 'this namespace'}")

    def _whoami(self, call, **_):
        if call.token not in ROLES:
            raise HubError(401, "Invalid username or password.", "InvalidToken")
        access = {"displayName": "test", "role": ROLES[call.token]}
        return {"type": "user", "name": USER, "orgs": [], "auth": {"type": "access_token", "accessToken": access}}

    def _validate_card(self, **_):
        return {"errors": [], "warnings": []}

    def _create(self, call, **_):
        asked = json.loads(call.body)
        self._check(None, call.token, writes=True)
        if asked.get("organization") not in (None, USER):
            raise HubError(403, f'You don\'t have the rights to create a model under "{asked["organization"]}"')
        repo_id = f"{USER}/{asked['name']}"
        if repo_id in self.repositories:
            raise HubError(409, "You already created this model repo", url=f"{self.url}/{repo_id}")
        repo = self.repositories[repo_id] = Repository(private=asked.get("visibility") == "private")
        repo.commit(MAIN, {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})
        return {"url": f"{self.url}/{repo_id}", "name": repo_id, "id": repo_id}

    def _preupload(self, call, repo_id, repo, revision, **_):
        files, answers = repo.files(revision), []
        for asked in json.loads(call.body)["files"]:
            path, sample = asked["path"], base64.b64decode(asked["sample"])
            mode = "lfs" if is_lfs(path, sample, asked["size"]) else "regular"
            known = {"oid": object_id(path, files[path])} if path in files else {}
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **known})
        return {"files": answers, "commitOid": repo.resolve(revision)}

    def _lfs_batch(self, call, repo_id, repo, **_):
        objects = [{"oid": asked["oid"], "size": asked["size"]} for asked in json.loads(call.body)["objects"]]
        for found in objects:
            if found["oid"] not in repo.objects:
                href = f"{self.url}/{repo_id}/lfs/{found['size']}/{found['oid']}"
                found["actions"] = {"upload": {"href": href, "header": {}}}
        return {"transfer": "basic", "objects": objects}

    def _lfs_put(self, call, repo_id, repo, size, oid, **_):
        if len(call.body) != int(size) or hashlib.sha256(call.body).hexdigest() != oid:
            raise HubError(400, f"{len(call.body)} bytes are not the object {oid} of {size} bytes")
        repo.objects[oid] = call.body
        return {}

    def _commit(self, call, repo_id, repo, revision, **_):
        if revision not in repo.branches:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        files, message = dict(repo.files(revision)), ""
        for line in map(json.loads, call.body.splitlines()):
            key, value = line["key"], line["value"]
            if key == "header":
                message = value["summary"]
                if value.get("parentCommit") not in (None, repo.branches[revision]):
                    raise HubError(412, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in repo.objects:
                    raise HubError(400, f"the object of {value['path']} was not uploaded")
                files[value["path"]] = repo.objects[value["oid"]]
                for item in self.received:
                    if item.oid == value["oid"] and item.repo_id == repo_id:
                        item.path = value["path"]
            elif key == "deletedFile" and files.pop(value["path"], None) is None:
                raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
        sha = repo.commit(revision, files, message)
        return {"success": True, "commitOid": sha, "commitUrl": f"{self.url}/{repo_id}/commit/{sha}"}

    def _create_branch(self, call, repo, revision, **_):
        if revision in repo.branches:
            raise HubError(409, f"Reference already exists: refs/heads/{revision}")
        start = json.loads(call.body or b"{}").get("startingPoint", MAIN)
        repo.branches[revision] = repo.resolve(start)
        return {}

    def _info(self, repo_id, repo, revision=MAIN, **_):
        sha = repo.resolve(revision)
        siblings = [{"rfilename": path} for path in sorted(repo.commits[sha])]
        return {
            "id": repo_id,
            "modelId": repo_id,
            "sha": sha,
            "private": repo.private,
            "siblings": siblings,
            "tags": [],
        }

    def _refs(self, repo, **_):
        branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": sha} for n, sha in repo.branches.items()]
        return {"branches": branches, "converts": [], "tags": []}

    def _tree(self, call, repo, revision, path="", **_):
        prefix, found = f"{path}/" if path else "", {}
        for name, content in sorted(repo.files(revision).items()):
            if name.startswith(prefix):
                first, *deeper = name[len(prefix) :].split("/")
                if deeper:
                    found[prefix + first] = {"type": "directory", "path": prefix + first, "size": 0, "oid": "0" * 40}
                if not deeper or call.query.get("recursive") == "true":
                    found[name] = entry(name, content)
        if path and not found:
            raise HubError(404, f"{path} does not exist on {revision}", "EntryNotFound")
        return list(found.values())

    def _paths_info(self, call, repo, revision, **_):
        files, asked = repo.files(revision), parse_qsl(call.body.decode())
        return [entry(path, files[path]) for name, path in asked if name == "paths" and path in files]

    def _resolve(self, call, repo, revision, path, **_):
        sha = repo.resolve(revision)
        headers = {"X-Repo-Commit": sha}
        if path not in repo.commits[sha]:
            raise HubError(404, "Entry not found", "EntryNotFound")
        content = repo.commits[sha][path]
        headers |= {"ETag": f'"{object_id(path, content)}"', "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", call.byte_range)
        if asked:
            start, stop = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1) + 1
            if start >= len(content):
                raise HubError(416, "Range not satisfiable")
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
            content = content[start:stop]
        return headers, content

    def _mark(self, count, **_):
        self.fail_after_puts = None if count == "none" else int(count)
        return {}


_REPO, _REVISION, _PATH = r"(?P<repo_id>[^/]+/[^/]+)", r"(?P<revision>[^/]+)", r"(?P<path>.+)"
# Methods, path without query, name of the method of `HubServer` that answers.
_ROUTES = (
    (("GET",), "/api/whoami-v2", "whoami"),
    (("POST",), "/api/validate-yaml", "validate_card"),
    (("POST",), "/api/repos/create", "create"),
    (("POST",), r"/mark/[^/]+/(?P<count>\d+|none)", "mark"),
    (("POST",), rf"/{_REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
    (("PUT",), rf"/{_REPO}/lfs/(?P<size>\d+)/(?P<oid>[0-9a-f]{{64}})", "lfs_put"),
    (("POST",), f"/api/models/{_REPO}/preupload/{_REVISION}", "preupload"),
    (("POST",), f"/api/models/{_REPO}/commit/{_REVISION}", "commit"),
    (("POST",), f"/api/models/{_REPO}/branch/{_REVISION}", "create_branch"),
    (("POST",), f"/api/models/{_REPO}/paths-info/{_REVISION}", "paths_info"),
    (("GET",), f"/api/models/{_REPO}/refs", "refs"),
    (("GET",), f"/api/models/{_REPO}(?:/revision/{_REVISION})?", "info"),
    (("GET",), f"/api/models/{_REPO}/tree/{_REVISION}(?:/{_PATH})?", "tree"),
    (("GET", "HEAD"), f"/{_REPO}/resolve/{_REVISION}/{_PATH}", "resolve"),
)


class _Handler(BaseHTTPRequestHandler):
    """HTTP around `HubServer.answer`. A connection is closed with its answer, so that no thread waits for another."""

    hub: HubServer

    def handle_request(self):
        length = int(self.headers.get("Content-Length") or 0)
        if self.hub.drops(Request(self.command, self.path, 0, b""), self.rfile.read, length):
            # Reset, as when the network goes away.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            return
        request = Request(self.command, self.path, 0, self.rfile.read(length))
        status, headers, content = self.hub.answer(request, self.headers)
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request  # noqa: N815 - names of the base class

    def log_message(self, *_):
        """Nothing to the terminal."""


ROOT = Path(__file__).parent.parent


def mark(name: str, fail_after_puts: int | None = None) -> None:
    """In a client's process: begin a section of the server's log, and say how many LFS objects it still takes."""
    count = "none" if fail_after_puts is None else fail_after_puts
    urllib.request.urlopen(f"{os.environ['HF_ENDPOINT']}/mark/{name}/{count}", data=b"").close()


def run_client(
    server: HubServer,
    script: str,
    *arguments: object,
    folder: Path,
    token: str | None = TOKEN,
    has_package: bool = True,
) -> tuple[str, str, int]:
    """Standard output, standard error and exit code of a script in a new process whose Hub is `server`.

    Args:
        folder: where it runs, and where its caches are.
        token: its HF_TOKEN.
        has_package: whether it can import this package and the modules beside this one; without, it is isolated from
            the environment and must itself see to it that an installed one is not found.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_"))}
    environment |= {"HF_ENDPOINT": server.url, "HF_HOME": str(folder / "cache"), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
    if token is not None:
        environment["HF_TOKEN"] = token
    if has_package:
        environment["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    command = [sys.executable, *([] if has_package else ["-I"]), "-c", script, *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    return run.stdout, run.stderr, run.returncode
