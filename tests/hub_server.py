"""A local model hub that serves folders with the part of the Hugging Face Hub's API that downloads need."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

COMMIT = "c0ffee" + "0" * 34


class _Hub(BaseHTTPRequestHandler):
    """Serves `server.repositories`, whose every revision is COMMIT, and records requests in `server.asked`."""

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        kind, *parts = self.path.split("?")[0].strip("/").split("/")
        if kind == "api":  # /api/models/owner/name[/revision/REVISION | /tree/REVISION]
            self.of_repository("/".join(parts[1:3]), parts[3:])
            return
        name, revision, file = f"{kind}/{parts[0]}", parts[2], "/".join(parts[3:])  # /owner/name/resolve/REVISION/FILE
        self.server.asked.append((name, revision, file))
        path = self.server.repositories[name] / file
        content = path.read_bytes()
        tag = f'"{hashlib.sha256(content).hexdigest()}"'
        self.answer(content, {"X-Repo-Commit": COMMIT, "ETag": tag, "Content-Type": "application/octet-stream"})

    def of_repository(self, name, rest):
        self.server.asked.append((name, rest[-1] if rest else "main", ""))
        folder = self.server.repositories.get(name)
        if folder is None:
            self.answer(b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Not found"}, status=404)
            return
        files = sorted(path for path in folder.iterdir() if path.is_file())
        about = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": path.name} for path in files], "tags": []}
        listed = [{"type": "file", "path": path.name, "size": path.stat().st_size, "oid": "0"} for path in files]
        content = listed if rest and rest[0] == "tree" else about
        self.answer(json.dumps(content).encode(), {"Content-Type": "application/json"})

    def answer(self, content, headers, status=200):
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *args):
        pass


@contextmanager
def hub_of(
    repositories: dict[str, Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[tuple[str, str, str]]]:
    """Make huggingface_hub use this hub, with an empty cache; yields the requests as (repository, revision, file)."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.repositories, server.asked = repositories, []
    Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    files = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", files)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    try:
        yield server.asked
    finally:
        server.shutdown()
        server.server_close()
