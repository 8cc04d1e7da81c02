"""A small hub on loopback: it speaks as much of the hub's HTTP as its real client asks for, from a folder of files."""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

COMMIT = "0" * 40


class _Handler(BaseHTTPRequestHandler):
    root: Path
    asked: list[str]

    def log_message(self, *args):
        """Keep the test's output clean; requests are in ``asked``."""

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
        found = re.match(r"/api/(models|datasets)/([^/]+/[^/]+)/paths-info/", self.path)
        folder = self.root / found[1] / found[2]
        wanted = body.get("paths", [])
        self.reply([entry for entry in entries(folder) if entry["path"] in wanted])

    def answer(self):
        path = unquote(urlparse(self.path).path)
        self.asked.append(f"{self.command} {path}")
        if found := re.match(r"/(datasets/)?([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            return self.send_file(self.root / ("datasets" if found[1] else "models") / found[2] / found[3])
        found = re.match(r"/api/(models|datasets)/([^/]+/[^/]+)(/tree/[^/]+)?(/revision/[^/]+)?(/.+)?$", path)
        folder = self.root / found[1] / found[2] if found else None
        if not folder or not folder.is_dir():
            return self.missing("RepoNotFound")
        if found[3]:
            below = (found[5] or "").strip("/")
            return self.reply([entry for entry in entries(folder) if entry["path"].startswith(below)])
        if found[5]:
            return self.missing("EntryNotFound")
        siblings = [{"rfilename": entry["path"]} for entry in entries(folder)]
        return self.reply({"id": found[2], "sha": COMMIT, "siblings": siblings, "tags": [], "private": False})

    def send_file(self, path):
        if not path.is_file():
            return self.missing("EntryNotFound")
        body = path.read_bytes()
        return self.reply(body, {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": COMMIT})

    def missing(self, code):
        self.reply({"error": code}, {"X-Error-Code": code}, 404)

    def reply(self, body, headers=None, status=200):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def entries(folder: Path) -> list[dict]:
    """Files below a folder, as the hub's tree lists them."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [
        {"type": "file", "path": str(p.relative_to(folder)), "size": p.stat().st_size, "oid": COMMIT} for p in files
    ]


class Hub:
    """``with Hub(folder) as hub:`` serves its ``models`` and ``datasets`` at ``hub.url``; ``asked`` lists requests."""

    def __init__(self, root: Path) -> None:
        handler = type("Handler", (_Handler,), {"root": root, "asked": []})
        self.root, self.asked = root, handler.asked
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.server.shutdown()
        self.server.server_close()
