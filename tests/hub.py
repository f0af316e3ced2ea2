"""A loopback Hugging Face hub that serves folders, so that the real download code runs in tests. Nothing here imports featpatch.

The client libraries read HF_ENDPOINT when they are imported: run them in a subprocess with `Hub.environment`.
"""

import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

REPO = r"/(?P<repo>[^/]+(?:/[^/]+)?)"
RESOLVE = re.compile(REPO + r"/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
API = re.compile(r"/api/models" + REPO + r"(?:/(?P<kind>revision|tree)/(?P<revision>[^/]+)(?:/(?P<path>.+))?)?")


@dataclass(frozen=True)
class Hub:
    """A hub that is being served; `requests` are "METHOD path", in order."""

    url: str
    requests: list[str] = field(default_factory=list)

    def environment(self, home: Path) -> dict[str, str]:
        """Of a subprocess that knows no other hub, no token and no proxy, and caches below `home`."""
        foreign = re.compile(r"(HF|HUGGINGFACE|HUGGING_FACE|TRANSFORMERS)_.*|.*_PROXY", re.IGNORECASE)
        kept = {name: value for name, value in os.environ.items() if not foreign.fullmatch(name)}
        switches = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
        return {**kept, **switches, "HF_ENDPOINT": self.url, "HF_HOME": str(home)}


@contextmanager
def serving(repos: Mapping[str, Path]) -> Iterator[Hub]:
    """Serve each folder as the revision `main` of the repository of that name; later changes of a folder are a new commit."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.repos = dict(repos)  # type: ignore[attr-defined]
    server.hub = hub = Hub(f"http://127.0.0.1:{server.server_port}")  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Missing(Exception):  # noqa: N818
    """What the hub answers instead of a result: status, X-Error-Code and X-Error-Message."""


class _Handler(BaseHTTPRequestHandler):
    server: Any

    def do_GET(self) -> None:
        self.server.hub.requests.append(f"{self.command} {self.path}")
        url = urlsplit(self.path)
        try:
            if match := RESOLVE.fullmatch(url.path):
                self._resolve(**{name: unquote(part) for name, part in match.groupdict().items()})
            elif match := API.fullmatch(url.path):
                parts = {name: unquote(part or "") for name, part in match.groupdict().items()}
                self._answer(
                    200, json.dumps(self._api(**parts, query=url.query)).encode(), {"Content-Type": "application/json"}
                )
            else:
                raise _Missing(404, "", "Sorry, we can't find the page you are looking for.")
        except _Missing as missing:
            status, code, message, *commit = missing.args
            headers = {"X-Error-Code": code, "X-Error-Message": message, "X-Repo-Commit": "".join(commit)}
            self._answer(status, json.dumps({"error": message}).encode(), {k: v for k, v in headers.items() if v})

    do_HEAD = do_GET  # noqa: N815

    def _resolve(self, repo: str, revision: str, path: str) -> None:
        files, commit = self._repository(repo, revision)
        if path not in files:
            raise _Missing(404, "EntryNotFound", "Entry not found", commit)
        content, status = files[path], 200
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_blob(content)}"', "Accept-Ranges": "bytes"}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, stop = int(wanted[1]), min(int(wanted[2] or len(content)) + 1, len(content))
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
            content, status = content[start:stop], 206
        self._answer(status, content, headers)

    def _api(self, repo: str, kind: str, revision: str, path: str, query: str) -> Any:
        files, commit = self._repository(repo, revision or "main")
        if kind != "tree":
            siblings = [{"rfilename": name} for name in files]
            return {
                "_id": commit[:24],
                "id": repo,
                "modelId": repo,
                "sha": commit,
                "tags": [],
                "private": False,
                "siblings": siblings,
            }
        below = {name: content for name, content in files.items() if name.startswith(f"{path}/" if path else "")}
        if not below:
            raise _Missing(404, "EntryNotFound", f"{path} does not exist on {revision!r}", commit)
        folders = {str(folder) for name in below for folder in Path(name).parents if len(folder.parts) > len(Path(path).parts)}
        tree = [{"type": "directory", "oid": _blob(name.encode()), "size": 0, "path": name} for name in sorted(folders)]
        tree += [{"type": "file", "oid": _blob(content), "size": len(content), "path": name} for name, content in below.items()]
        depth = len(Path(path).parts) + 1
        return [entry for entry in tree if "recursive=true" in query.lower() or len(Path(str(entry["path"])).parts) == depth]

    def _repository(self, repo: str, revision: str) -> tuple[dict[str, bytes], str]:
        """Files by name, and the commit. To a stranger the hub says 401, not 404, of a repository that is not there."""
        if repo not in self.server.repos:
            raise _Missing(401, "RepoNotFound", "Invalid username or password.")
        folder = self.server.repos[repo]
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
        commit = hashlib.sha1(repr([(name, _blob(content)) for name, content in files.items()]).encode()).hexdigest()
        if revision not in ("main", commit):
            raise _Missing(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return files, commit

    def _answer(self, status: int, content: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


def _blob(content: bytes) -> str:
    """Git's name of a file with this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
