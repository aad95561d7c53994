"""A Hugging Face hub of one's own on 127.0.0.1: enough of its HTTP interface to push a model folder and to load it again."""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """files: repository id -> path -> bytes; private: ids of those; fetched: paths asked for; refuse: status with which a commit is answered, or 0."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.fetched: list[str] = []
        self.refuse = 0
        self.address = f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def _answer(self, body: bytes | dict | list, status: int = 200, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", "application/json")
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _missing(self, code: str) -> None:
        self._answer({"error": code}, 404, X_Error_Code=code)

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if path == "/api/whoami-v2":
            return self._answer({"name": "me", "type": "user", "orgs": [], "auth": {"type": "access_token"}})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(?:revision|tree)/[^/]+)?", path):
            files = self.server.files.get(found[1])
            if files is None:
                return self._missing("RepoNotFound")
            entries = [{"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()} for name, data in files.items()]
            info = {"id": found[1], "modelId": found[1], "sha": SHA, "private": found[1] in self.server.private}
            return self._answer(entries if "/tree/" in path else info | {"siblings": [{"rfilename": name} for name in files]})
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            data = self.server.files.get(found[1], {}).get(found[2])
            if data is None:
                return self._missing("EntryNotFound")
            if self.command == "GET":
                self.server.fetched.append(found[2])
            return self._answer(data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit=SHA)
        self._missing("EntryNotFound")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.split("?")[0]
        if path == "/api/repos/create":
            wanted = json.loads(body)
            id = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
            if id in self.server.files:
                return self._answer({"error": "You already created this model repo", "url": f"{self.server.address}/{id}"}, 409)
            self.server.files[id] = {}
            if wanted.get("visibility") == "private" or wanted.get("private"):  # newer and older versions of huggingface_hub
                self.server.private.add(id)
            return self._answer({"url": f"{self.server.address}/{id}", "name": id})
        if path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            return self._answer({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]]})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            if self.server.refuse:
                return self._answer({"error": "not yours"}, self.server.refuse)
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[found[1]][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "deletedFile":
                    del self.server.files[found[1]][line["value"]["path"]]
            return self._answer({"commitUrl": f"{self.server.address}/{found[1]}/commit/{SHA}", "commitOid": SHA, "pullRequestUrl": None})
        self._missing("EntryNotFound")


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
