"""A loopback server with the hub's API for uploads and downloads.

Files live in memory: ``repositories[name][path] = bytes``. Every upload is plain (no LFS, no Xet).
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class HubStub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories, self.tokens = {}, set()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()

    def commit_of(self, name):
        """A made-up commit that changes with the content."""
        digest = hashlib.sha1()
        for path, data in sorted(self.repositories[name].items()):
            digest.update(path.encode() + data)
        return digest.hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def _answer(self, status=200, body=None, headers=None):
        data = body if isinstance(body, bytes) else json.dumps(body if body is not None else {}).encode()
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _missing(self, code):
        self._answer(404, {"error": code}, {"X-Error-Code": code, "X-Error-Message": code})

    def do_POST(self):  # noqa: N802
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.tokens.add(self.headers.get("Authorization"))
        path = unquote(urlsplit(self.path).path)
        if path == "/api/repos/create":
            name = f"{json.loads(body)['organization']}/{json.loads(body)['name']}"
            exists = name in self.server.repositories
            self.server.repositories.setdefault(name, {})
            return self._answer(409 if exists else 200, {"url": f"{self.server.url}/{name}", "name": name})
        if path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        found = re.fullmatch(r"/api/models/(.+?)/(preupload|commit)/(.+)", path)
        if not found:
            return self._missing("RepoNotFound")
        files = self.server.repositories[found[1]]
        if found[2] == "preupload":
            plain = {"uploadMode": "regular", "shouldIgnore": False}
            return self._answer(200, {"files": [{"path": f["path"], **plain} for f in json.loads(body)["files"]]})
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        commit = self.server.commit_of(found[1])
        url = f"{self.server.url}/{found[1]}/commit/{commit}"
        return self._answer(200, {"commitUrl": url, "commitOid": commit, "success": True})

    def do_GET(self):  # noqa: N802
        path = unquote(urlsplit(self.path).path)
        info = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/[^/]+)?", path)
        if info:
            if info[1] not in self.server.repositories:
                return self._missing("RepoNotFound")
            names = [{"rfilename": name} for name in sorted(self.server.repositories[info[1]])]
            about = {"id": info[1], "sha": self.server.commit_of(info[1]), "siblings": names, "private": False}
            return self._answer(200, about)
        tree = re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", path)
        if tree and tree[1] in self.server.repositories:
            inside = f"{tree[3]}/" if tree[3] else ""
            rows = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in sorted(self.server.repositories[tree[1]].items())
                if name.startswith(inside)
            ]
            return self._answer(200, rows) if rows else self._missing("EntryNotFound")
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
        if not file or file[1] not in self.server.repositories:
            return self._missing("RepoNotFound")
        data = self.server.repositories[file[1]].get(file[2])
        if data is None:
            return self._missing("EntryNotFound")
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": self.server.commit_of(file[1])}
        return self._answer(200, data, headers)

    do_HEAD = do_GET  # noqa: N815
