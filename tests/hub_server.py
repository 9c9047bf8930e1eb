"""A small Hugging Face Hub on this machine, so that the real client can be tested over real HTTP.

It speaks the part of the Hub's protocol that publishing and loading use: create a repository, pre-upload, LFS batch and
PUT, one atomic commit, branches and tags, model info, tree, and `resolve` with ETags, redirects to a second host
(`localhost` stands for the CDN, `127.0.0.1` for the Hub) and byte ranges. Repositories may be private. Faults are made
on demand: `hub.fault("PUT", "/lfs/", "cut")`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub
import pytest
import transformers
import yaml
from huggingface_hub import constants
from transformers import dynamic_module_utils

from hub_repositories import Fault, File, Repository

LFS_SUFFIXES = (".safetensors", ".bin", ".png")


class HubServer:
    """The server, its repositories, and a log of what was asked of it.

    Attributes:
        url: of the Hub, for `HF_ENDPOINT`.
        tokens: tokens that may write, by the namespace that they belong to.
        requests: method, path and whether a token came with it, of every request so far.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.lfs: dict[str, bytes] = {}
        self.tokens = {"hf_writer": "org", "hf_other": "other"}
        self.requests: list[tuple[str, str, bool]] = []
        self._faults: list[Fault] = []
        self._lock = threading.RLock()
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        port = self._server.server_address[1]
        self.url, self.cdn = f"http://127.0.0.1:{port}", f"http://localhost:{port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def files(self, repository: str, revision: str = "main") -> dict[str, bytes]:
        """The content of every file of a repository."""
        found = self.repositories[repository]
        return {path: file.content for path, file in found.commits[found.resolve(revision) or ""].items()}

    def fault(self, method: str, path: str, kind: str, times: int = 1) -> None:
        """Let the next `times` requests that match go wrong; see `Fault`."""
        self._faults.append(Fault(method, path, kind, times))

    def stop_faults(self) -> None:
        """Let nothing go wrong any more."""
        self._faults.clear()

    def take_fault(self, method: str, path: str) -> str | None:
        with self._lock:
            for fault in self._faults:
                if fault.times and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault.kind
        return None


@contextmanager
def hub_server() -> Iterator[HubServer]:
    server = HubServer()
    try:
        yield server
    finally:
        server.close()


class _Answer(Exception):
    """An answer that ends the handling of a request."""

    def __init__(self, status: int, error: str = "", **headers: str) -> None:
        self.status, self.error, self.headers = status, error, headers


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or every answer waits 40 ms for an acknowledgement
    wbufsize = -1
    server_hub: HubServer

    def log_message(self, *_: Any) -> None:
        """Say nothing on standard error."""

    def do_GET(self) -> None:
        self._handle()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    # ---- one request ----

    def _handle(self) -> None:
        hub, split = self.server_hub, urlsplit(self.path)
        self.route, self.query = unquote(split.path), parse_qs(split.query)
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ").strip() or None
        body = self._body()
        hub.requests.append((self.command, self.route, self.token is not None))
        self.fault = hub.take_fault(self.command, self.route)
        try:
            if self.fault == "cut" and self.command in ("PUT", "POST"):
                self.close_connection = True
                return
            if self.fault and self.fault.isdigit():
                raise _Answer(int(self.fault), "made up by the test")
            with hub._lock:
                self._dispatch(body)
        except _Answer as answer:
            headers = {name.replace("_", "-"): value for name, value in answer.headers.items()}
            self._send(answer.status, json.dumps({"error": answer.error}).encode(), headers)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _dispatch(self, body: bytes) -> None:
        routes: list[tuple[str, str, Callable[..., None]]] = [
            ("POST", r"/api/repos/create", self._create),
            ("POST", r"/api/validate-yaml", self._validate_yaml),
            ("GET", r"/api/whoami-v2", self._who_am_i),
            ("POST", r"/api/models/([^/]+/[^/]+)/preupload/(.+)", self._preupload),
            ("POST", r"/api/models/([^/]+/[^/]+)/commit/(.+)", self._commit),
            ("POST", r"/api/models/([^/]+/[^/]+)/(?:branch|tag)/(.+)", self._name_commit),
            ("GET", r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", self._tree),
            ("GET", r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", self._info),
            ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self._lfs_batch),
            ("PUT", r"/lfs/(\w+)", self._lfs_upload),
            ("GET", r"/cdn/(\w+)", self._cdn),
            ("GET", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._resolve),
        ]
        command = "GET" if self.command == "HEAD" else self.command
        for method, pattern, function in routes:
            match = re.fullmatch(pattern, self.route)
            if match and method == command:
                groups = [part for part in match.groups() if part is not None]
                function(*groups, **({"body": body} if method in ("POST", "PUT") else {}))
                return
        raise _Answer(404, f"no such route: {self.route}")

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault == "cut":
            body, self.close_connection = body[: len(body) // 2], True
        self.wfile.write(body)

    def _json(self, content: Any, status: int = 200) -> None:
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    # ---- who may do what ----

    def _writer(self, namespace: str) -> None:
        if self.token is None or self.token not in self.server_hub.tokens:
            raise _Answer(401, "Invalid username or password.")
        if self.server_hub.tokens[self.token] != namespace:
            raise _Answer(403, f"You don't have the rights to write under the namespace {namespace!r}")

    def _repository(self, name: str, write: bool = False) -> Repository:
        repository = self.server_hub.repositories.get(name)
        namespace = name.split("/")[0]
        known = self.token in self.server_hub.tokens
        if repository is None or (repository.private and self.server_hub.tokens.get(self.token or "") != namespace):
            raise _Answer(404 if known else 401, "Repository not found", X_Error_Code="RepoNotFound")
        if write:
            self._writer(namespace)
        return repository

    def _at(self, name: str, revision: str, write: bool = False) -> tuple[Repository, str]:
        repository = self._repository(name, write)
        commit = repository.resolve(revision)
        if commit is None:
            raise _Answer(404, f"Invalid rev id: {revision}", X_Error_Code="RevisionNotFound")
        return repository, commit

    # ---- the API ----

    def _create(self, body: bytes) -> None:
        wanted = json.loads(body)
        if self.token not in self.server_hub.tokens:
            raise _Answer(401, "Invalid username or password.")
        namespace = wanted.get("organization") or self.server_hub.tokens[self.token or ""]
        self._writer(namespace)
        name = f"{namespace}/{wanted['name']}"
        if name in self.server_hub.repositories:
            self._json({"error": "You already created this model repo", "url": f"{self.server_hub.url}/{name}"}, 409)
            return
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        repository = self.server_hub.repositories[name] = Repository(private)
        repository.commit("main", {".gitattributes": File(b"*.safetensors filter=lfs\n", False)})
        self._json({"url": f"{self.server_hub.url}/{name}", "name": name})

    def _validate_yaml(self, body: bytes) -> None:
        text = json.loads(body)["content"]
        match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
        errors = []
        try:
            metadata = yaml.safe_load(match[1]) if match else {}
            if not isinstance(metadata.get("tags", []), list):
                errors.append({"message": '"tags" must be an array'})
        except yaml.YAMLError as error:
            errors.append({"message": str(error)})
        self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def _who_am_i(self) -> None:
        if self.token not in self.server_hub.tokens:
            raise _Answer(401, "Invalid username or password.")
        self._json({"type": "user", "name": self.server_hub.tokens[self.token or ""], "orgs": []})

    def _preupload(self, name: str, revision: str, body: bytes) -> None:
        repository, commit = self._at(name, revision, write=True)
        files = repository.commits[commit]
        answers = [
            {
                "path": path,
                "uploadMode": "lfs" if path.endswith(LFS_SUFFIXES) else "regular",
                "shouldIgnore": False,
                "oid": files[path].oid if path in files else None,
            }
            for path in (file["path"] for file in json.loads(body)["files"])
        ]
        self._json({"files": answers})

    def _lfs_batch(self, name: str, body: bytes) -> None:
        self._repository(name, write=True)
        objects: list[dict[str, Any]] = []
        for wanted in json.loads(body)["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.server_hub.lfs:
                answer["actions"] = {"upload": {"href": f"{self.server_hub.cdn}/lfs/{wanted['oid']}"}}
            objects.append(answer)
        self._json({"transfer": "basic", "objects": objects})

    def _lfs_upload(self, oid: str, body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise _Answer(400, "the content does not have the announced sha256")
        self.server_hub.lfs[oid] = body
        self._send(200, b"")

    def _commit(self, name: str, branch: str, body: bytes) -> None:
        repository = self._repository(name, write=True)
        if branch not in repository.refs:
            raise _Answer(404, f"Invalid rev id: {branch}", X_Error_Code="RevisionNotFound")
        files = dict(repository.commits[repository.refs[branch]])
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), False)
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.server_hub.lfs:
                    raise _Answer(400, f"LFS pointer to a file that was not uploaded: {value['path']}")
                files[value["path"]] = File(self.server_hub.lfs[value["oid"]], True)
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        commit = repository.commit(branch, files)
        self._json({"success": True, "commitOid": commit, "commitUrl": f"{self.server_hub.url}/{name}/commit/{commit}"})

    def _name_commit(self, name: str, ref: str, body: bytes) -> None:
        repository = self._repository(name, write=True)
        wanted = json.loads(body or b"{}")
        if "tag" in wanted:  # the path has the commit, the body the tag
            repository.refs[wanted["tag"]] = repository.resolve(ref) or ""
        elif ref in repository.refs:
            raise _Answer(409, "Reference already exists")
        else:
            repository.refs[ref] = repository.resolve(wanted.get("startingPoint", "main")) or ""
        self._send(200, b"")

    def _info(self, name: str, revision: str = "main") -> None:
        repository, commit = self._at(name, revision)
        files = repository.commits[commit]
        siblings = [{"rfilename": path} for path in files]
        self._json({"id": name, "modelId": name, "sha": commit, "private": repository.private, "siblings": siblings})

    def _tree(self, name: str, revision: str) -> None:
        repository, commit = self._at(name, revision)
        entries = []
        for path, file in repository.commits[commit].items():
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(file.content), "oid": file.oid}
            if file.lfs:
                entry["lfs"] = {"oid": file.oid, "size": len(file.content), "pointerSize": 134}
            entries.append(entry)
        self._json(entries)

    # ---- downloads ----

    def _resolve(self, name: str, revision: str, path: str) -> None:
        repository, commit = self._at(name, revision)
        file = repository.commits[commit].get(path)
        if file is None:
            raise _Answer(404, "Entry not found", X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{file.oid}"'}
        if not file.lfs:
            self._send_content(file.content, headers)
            return
        headers |= {"X-Linked-ETag": f'"{file.oid}"', "X-Linked-Size": str(len(file.content))}
        self._send(302, b"", headers | {"Location": f"{self.server_hub.cdn}/cdn/{file.oid}"})

    def _cdn(self, oid: str) -> None:
        if self.token is not None:
            raise _Answer(400, "a token must not be sent to the CDN")
        self._send_content(self.server_hub.lfs[oid], {"ETag": f'"{oid}"'})

    def _send_content(self, content: bytes, headers: dict[str, str]) -> None:
        if self.fault == "short":
            content = content[: len(content) // 2]
        if self.fault == "flipped":
            content = content[:-1] + bytes([content[-1] ^ 1])
        asked = re.match(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if asked:
            start = int(asked[1])
            whole = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self._send(206, content[start:], headers | {"Content-Range": whole})
        else:
            self._send(200, content, headers)


def use_hub(server: HubServer, monkeypatch: pytest.MonkeyPatch, home: Path, token: str | None = "hf_writer") -> None:
    """Point the client in this process, which reads the environment only once, at `server`, with caches in `home`."""
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(home / "modules"))
    monkeypatch.syspath_prepend(home / "modules")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    pause = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: pause(min(seconds, 0.01)))  # the client waits before it retries
