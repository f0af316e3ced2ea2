"""A loopback Hugging Face hub that serves folders, so that tests run the real download code. Nothing here imports featpatch.

The client libraries read HF_ENDPOINT when they are imported: run them in a subprocess, with `Hub.environment`.
"""

import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

REPO = r"/(?P<repo>[^/]+(?:/[^/]+)?)"
FILE = re.compile(REPO + r"/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
INFO = re.compile("/api/models" + REPO + r"(?:/revision/(?P<revision>[^/]+))?")
TREE = re.compile("/api/models" + REPO + r"/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?")


@dataclass(frozen=True)
class Hub:
    """A hub that is being served; `requests` are "METHOD path", in order."""

    url: str
    requests: list[str] = field(default_factory=list)

    def environment(self, home: Path) -> dict[str, str]:
        """For a subprocess that knows no other hub, no token and no proxy, and caches below `home`."""
        foreign = re.compile(r"(HF|HUGGINGFACE|HUGGING_FACE|TRANSFORMERS)_.*|.*_PROXY", re.IGNORECASE)
        kept = {name: value for name, value in os.environ.items() if not foreign.fullmatch(name)}
        switches = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
        return {**kept, **switches, "HF_ENDPOINT": self.url, "HF_HOME": str(home)}


@contextmanager
def serving(repos: Mapping[str, Path]) -> Iterator[Hub]:
    """Serve each folder as the revision `main` of the repository of that name; a changed folder is a new commit."""
    with _Server(repos) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield server.hub
        finally:
            server.shutdown()
            thread.join()


class _Server(ThreadingHTTPServer):
    def __init__(self, repos: Mapping[str, Path]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos, self.hub = dict(repos), Hub(f"http://127.0.0.1:{self.server_port}")


class _HubError(Exception):
    """An answer that is a refusal: status, X-Error-Code, X-Error-Message and perhaps X-Repo-Commit."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        self.server.hub.requests.append(f"{self.command} {self.path}")
        routes: dict[re.Pattern[str], Callable[..., None]] = {FILE: self._file, INFO: self._info, TREE: self._tree}
        try:
            for pattern, route in routes.items():
                if match := pattern.fullmatch(urlsplit(self.path).path):
                    return route(**{name: unquote(part or "") for name, part in match.groupdict().items()})
            raise _HubError(404, "", "Sorry, we can't find the page you are looking for.", "")
        except _HubError as error:
            status, code, message, commit = error.args
            headers = {"X-Error-Code": code, "X-Error-Message": message, "X-Repo-Commit": commit}
            self._answer(status, b"", {name: value for name, value in headers.items() if value})

    do_HEAD = do_GET  # noqa: N815

    def _file(self, repo: str, revision: str, path: str) -> None:
        files, commit = self._files(repo, revision)
        if path not in files:
            raise _HubError(404, "EntryNotFound", "Entry not found", commit)
        status, content = 200, files[path]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_blob(content)}"', "Accept-Ranges": "bytes"}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, stop = int(wanted[1]), min(int(wanted[2] or len(content)) + 1, len(content))
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
            status, content = 206, content[start:stop]
        self._answer(status, content, headers)

    def _info(self, repo: str, revision: str) -> None:
        files, commit = self._files(repo, revision or "main")
        siblings = [{"rfilename": name} for name in files]
        self._json({"id": repo, "sha": commit, "private": False, "tags": [], "siblings": siblings})

    def _tree(self, repo: str, revision: str, path: str) -> None:
        files, commit = self._files(repo, revision)
        top = PurePosixPath(path)
        if path and not any(top in PurePosixPath(name).parents for name in files):
            raise _HubError(404, "EntryNotFound", f"{path} does not exist on {revision!r}", commit)
        folders = {str(folder) for name in files for folder in PurePosixPath(name).parents}
        tree = [{"type": "directory", "path": name, "oid": _blob(name.encode()), "size": 0} for name in sorted(folders)]
        tree += [{"type": "file", "path": name, "oid": _blob(file), "size": len(file)} for name, file in files.items()]
        deep = "recursive=true" in self.path.lower()
        above = [list(PurePosixPath(str(entry["path"])).parents) for entry in tree]
        self._json([entry for entry, up in zip(tree, above, strict=True) if top in (up if deep else up[:1])])

    def _files(self, repo: str, revision: str) -> tuple[dict[str, bytes], str]:
        """Files by name, and the commit. To a stranger the hub says 401 of a repository that is not there."""
        if repo not in self.server.repos:
            raise _HubError(401, "RepoNotFound", "Invalid username or password.", "")
        folder = self.server.repos[repo]
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
        commit = hashlib.sha1(repr([(name, _blob(file)) for name, file in files.items()]).encode()).hexdigest()
        if revision not in ("main", commit):
            raise _HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}", "")
        return files, commit

    def _json(self, value: Any) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

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
