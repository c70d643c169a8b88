"""A model hub of a test's own, on this machine: what huggingface_hub asks for, for repositories that the test makes."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class Hub:
    """Serves `repos`: by name, branches; by branch, files and their bytes. `asked` lists what was asked for.

    A branch's commit is a hash of its name and content, and goes on being served when the branch moves.
    """

    def __init__(self) -> None:
        self.branches: dict[str, dict[str, str]] = {}
        self.commits: dict[str, dict[str, bytes]] = {}
        self.asked: list[tuple[str, str, str | None]] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                hub._answer(self, body=True)

            def do_HEAD(self):
                hub._answer(self, body=False)

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def push(self, repo: str, branch: str, files: dict[str, bytes]) -> str:
        commit = hashlib.sha1(repr((repo, branch, sorted(files.items()))).encode()).hexdigest()
        self.commits[commit] = files
        self.branches.setdefault(repo, {"main": commit})[branch] = commit
        return commit

    def fetched(self) -> list[str]:
        """Weights that were asked for whole; of headers only the first bytes are."""
        return [path for method, path, part in self.asked if method == "GET" and "/resolve/" in path and not part]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, request, *, body: bool) -> None:
        path = unquote(urlsplit(request.path).path)
        status, headers, content = self._found(path, request.headers.get("Range"))
        self.asked.append((request.command, path, request.headers.get("Range")))
        request.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            request.send_header(name, value)
        request.end_headers()
        if body:
            request.wfile.write(content)

    def _found(self, path: str, wanted: str | None):
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            repo, rest = "/".join(parts[2:4]), parts[4:]
            if repo not in self.branches:
                return 401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "no such repository"}, b""
            if rest == ["refs"]:
                refs = [
                    {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit}
                    for name, commit in self.branches[repo].items()
                ]
                return self._json({"branches": refs, "tags": [], "converts": []})
            commit = self._commit(repo, rest[1] if len(rest) > 1 else "main")
            if rest[:1] == ["tree"]:
                files = self.commits[commit]
                return self._json([
                    {"type": "file", "oid": "0" * 40, "size": len(content), "path": name}
                    for name, content in files.items()
                ])  # fmt: skip
            return self._json({"id": repo, "sha": commit, "siblings": [], "private": False, "tags": []})
        repo, commit = "/".join(parts[:2]), self._commit("/".join(parts[:2]), parts[3])
        content = self.commits[commit].get("/".join(parts[4:]))
        if content is None:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        headers = {
            "X-Repo-Commit": commit,
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "Accept-Ranges": "bytes",
        }
        if wanted:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            end = min(int(last) if last else len(content) - 1, len(content) - 1)
            headers["Content-Range"] = f"bytes {int(first)}-{end}/{len(content)}"
            return 206, headers, content[int(first) : end + 1]
        return 200, headers, content

    def _commit(self, repo: str, revision: str) -> str:
        return self.branches[repo].get(revision, revision)

    @staticmethod
    def _json(value):
        return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()
