"""A stand-in for the dataset hub on the loopback interface: serves ROOT/<owner>/<name>/ to an unmodified `load_dataset`."""
import contextlib
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef" * 2 + "01234567"
REPOSITORY = r"([^/]+/[^/]+)"


def entry(root, path):
    "How the hub describes a file or folder of a repository."
    name = path.relative_to(root).as_posix()
    if path.is_dir():
        return {"type": "directory", "oid": "0" * 40, "size": 0, "path": name}
    return {"type": "file", "oid": hashlib.sha1(path.read_bytes()).hexdigest(), "size": path.stat().st_size, "path": name}


def description(root, name):
    "What the hub says about a repository."
    files = [{"rfilename": path.relative_to(root).as_posix()} for path in sorted(root.rglob("*")) if path.is_file()]
    date = "2024-01-01T00:00:00.000Z"
    return {"_id": "1", "id": name, "sha": COMMIT, "private": False, "gated": False, "disabled": False, "downloads": 0,
            "likes": 0, "tags": [], "lastModified": date, "createdAt": date, "siblings": files}


class Hub(BaseHTTPRequestHandler):
    "The four requests that `datasets` makes: describe, list, list by name, read."
    protocol_version = "HTTP/1.1"
    root: Path
    requests: list

    def log_message(self, *arguments):
        pass

    def answer(self, code, body=b"", **headers):
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body))} | {k.replace("_", "-"): v for k, v in headers.items()}
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def missing(self, kind):
        self.answer(404, {"error": kind}, X_Error_Code=kind, X_Repo_Commit=COMMIT)

    def do_GET(self):
        url = urlsplit(self.path)
        path = unquote(url.path)
        self.requests.append((self.command, path, self.headers.get("Range")))
        if match := re.fullmatch(rf"/api/datasets/{REPOSITORY}(?:/revision/[^/]+)?", path):
            folder = self.root / match[1]
            return self.answer(200, description(folder, match[1])) if folder.is_dir() else self.missing("RepoNotFound")
        if match := re.fullmatch(rf"/api/datasets/{REPOSITORY}/tree/[^/]+(?:/(.*))?", path):
            return self.listing(self.root / match[1], match[2] or "", parse_qs(url.query))
        if match := re.fullmatch(rf"/datasets/{REPOSITORY}/resolve/[^/]+/(.*)", path):
            return self.content(self.root / match[1] / match[2])
        self.missing("EntryNotFound")

    do_HEAD = do_GET

    def listing(self, root, below, query):
        folder = root / below
        if not folder.is_dir():
            return self.missing("EntryNotFound")
        deep = query.get("recursive", ["false"])[0].lower() in ("true", "1")
        self.answer(200, [entry(root, path) for path in sorted(folder.rglob("*") if deep else folder.iterdir())])

    def content(self, file):
        if not file.is_file():
            return self.missing("EntryNotFound")
        data, kind = file.read_bytes(), "application/octet-stream"
        common = {"X_Repo_Commit": COMMIT, "ETag": f'"{hashlib.sha1(data).hexdigest()}"', "Accept_Ranges": "bytes", "Content_Type": kind}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
            return self.answer(206, data[start:end + 1], Content_Range=f"bytes {start}-{end}/{len(data)}", **common)
        self.answer(200, data, **common)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.requests.append(("POST", unquote(self.path), None))
        if match := re.fullmatch(rf"/api/datasets/{REPOSITORY}/paths-info/[^/]+", unquote(self.path)):
            root = self.root / match[1]
            return self.answer(200, [entry(root, root / name) for name in json.loads(body)["paths"] if (root / name).exists()])
        self.missing("EntryNotFound")


@contextlib.contextmanager
def serve(root):
    "Serve a folder while the block runs; gives the address and the list of requests (method, path, range)."
    requests = []
    handler = type("Handler", (Hub,), {"root": Path(root), "requests": requests})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
