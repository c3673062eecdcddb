"""A server on loopback that speaks as much of the hub's protocol as huggingface_hub's client uses here.

Files lie in memory: {repo: {file: bytes}}. Requests are kept as (method, path, Range header).

    python -m tests.converters.hub_server FOLDER    # as user/NAME; prints the address, and ends when stdin does
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_RESOLVE = re.compile(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)")
_API = re.compile(r"/api/models/([^/]+/[^/]+)(/.*)?")


class Hub(ThreadingHTTPServer):
    """The server, and its files. ranges: whether range requests are answered. failures: so many of them fail first."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.uploads: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.ranges, self.failures = True, 0

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def hub() -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or a body waits for the answer to its headers

    def log_message(self, *_: object) -> None:
        """Nothing: pytest shows what fails."""

    def do_HEAD(self) -> None:
        self._file()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        found = _API.fullmatch(path)
        if found is None:
            self._file()
            return
        self._note()
        files = self.server.files.get(found[1])
        if files is None:
            self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        elif (found[2] or "").startswith("/tree"):
            self._json([{"type": "file", "path": name, "size": len(data), "oid": "0"} for name, data in files.items()])
        else:
            siblings = [{"rfilename": name} for name in files]
            self._json({"id": found[1], "sha": COMMIT, "siblings": siblings, "private": False})

    def do_POST(self) -> None:
        self._note()
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        if path == "/api/repos/create":
            wanted = json.loads(body)
            repo = f"{wanted.get('organization') or 'user'}/{wanted['name']}"
            self.server.files.setdefault(repo, {})
            self._json({"url": f"{self.server.address}/{repo}", "name": repo, "id": repo})
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif path.endswith("/preupload/main"):
            modes = [
                {"path": each["path"], "uploadMode": "lfs" if each["size"] > 4096 else "regular", "shouldIgnore": False}
                for each in json.loads(body)["files"]
            ]
            self._json({"files": modes})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for each in objects:
                each["actions"] = {"upload": {"href": f"{self.server.address}/upload/{each['oid']}", "header": {}}}
            self._json({"transfer": "basic", "objects": objects})
        elif path.endswith("/commit/main"):
            self._commit(path, body)
        else:
            self._json({"error": path}, 404)

    def do_PUT(self) -> None:
        self._note()
        data = self.rfile.read(int(self.headers["Content-Length"]))
        oid = self.path.rpartition("/")[2]
        right = hashlib.sha256(data).hexdigest() == oid
        self.server.uploads[oid] = data
        self._json({}, 200 if right else 400)

    def _commit(self, path: str, body: bytes) -> None:
        found = _API.fullmatch(path)
        assert found is not None
        repo = self.server.files[found[1]]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                repo[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repo[value["path"]] = self.server.uploads[value["oid"]]
        self._json({"commitUrl": f"{self.server.address}/{found[1]}/commit/{COMMIT}", "commitOid": COMMIT})

    def _file(self) -> None:
        self._note()
        found = _RESOLVE.fullmatch(unquote(urlsplit(self.path).path))
        files = {} if found is None else self.server.files.get(found[1], {})
        if found is None or found[2] not in files:
            self._json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
            return
        data = files[found[2]]
        etag = hashlib.sha256(data).hexdigest()
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        status = 200
        if wanted is not None and self.server.failures:
            self.server.failures -= 1
            self._json({"error": "out of order"}, 500)
            return
        if wanted is not None and self.server.ranges:
            start, end = int(wanted[1]), min(int(wanted[2] or len(data) - 1) + 1, len(data))
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
            data, status = data[start:end], 206
        self._send(data, status, {**headers, "Content-Length": str(len(data))})

    def _note(self) -> None:
        self.server.requests.append((self.command, self.path, self.headers.get("Range")))

    def _json(self, content: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(content).encode()
        own = {"Content-Type": "application/json", "Content-Length": str(len(data))}
        self._send(data, status, own | (headers or {}))

    def _send(self, data: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":  # a body here would be read as the next answer
            self.wfile.write(data)


def main() -> None:
    folder = Path(sys.argv[1])
    with hub() as server:
        server.files[f"user/{folder.name}"] = {path.name: path.read_bytes() for path in folder.iterdir()}
        print(server.address, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
