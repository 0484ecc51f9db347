"""A bucket of Google's storage on this machine: as much of its JSON API as gcsfs, TensorStore and
Google's own client ask for. Clients find it by the variables of `environment`."""

import http.server
import json
import re
import sys
import threading
import urllib.parse
from collections.abc import Callable
from typing import NamedTuple

NAME = "bucket"


class Answer(NamedTuple):
    code: int
    body: bytes = b""
    headers: dict[str, str] = {}


class Server(http.server.ThreadingHTTPServer):
    """Serves the one bucket while the context lasts.

    objects: content and generation by name. refuse: whether a request is forbidden, by its method
    and its path, behind which stands the name of what is uploaded. asked: method, path and client
    of every request.
    """

    daemon_threads, request_queue_size = True, 64

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, tuple[bytes, int]] = {}
        self.uploads: dict[str, tuple[str, bytes]] = {}
        self.refuse: Callable[[str, str], bool] = lambda method, path: False
        self.asked: list[tuple[str, str, str]] = []
        self.lock, self.count = threading.Lock(), 0

    def __enter__(self) -> "Server":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request, address) -> None:
        """gcsfs asks for a file and a folder at once, and hangs up on the slower one."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, address)

    @property
    def environment(self) -> dict[str, str]:
        url = f"http://127.0.0.1:{self.server_address[1]}"
        return {
            "STORAGE_EMULATOR_HOST": url,  # gcsfs and google-cloud-storage
            "TENSORSTORE_GCS_HTTP_URL": url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",  # TensorStore
            # The kind of a bucket is asked for over gRPC, which this is not.
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }

    def names(self, prefix: str = "") -> list[str]:
        with self.lock:
            return sorted(name for name in self.objects if name.startswith(prefix))

    def read(self, name: str) -> bytes:
        return self.objects[name][0]

    def put(self, name: str, data: bytes, match: str | None = None) -> Answer:
        with self.lock:
            if match is not None and int(match) != self.objects.get(name, (b"", 0))[1]:
                return Answer(412)
            self.count += 1
            self.objects[name] = data, self.count
            return _json(self.about(name))

    def about(self, name: str) -> dict[str, str]:
        data, generation = self.objects[name]
        return {
            "kind": "storage#object",
            "bucket": NAME,
            "name": name,
            "size": str(len(data)),
            "generation": str(generation),
            "metageneration": "1",
            "updated": "2026-01-01T00:00:00.000Z",
            "timeCreated": "2026-01-01T00:00:00.000Z",
        }


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *args) -> None:
        pass

    def do(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(size)
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        self.server.asked.append((self.command, self.path, self.headers.get("User-Agent", "")))
        named = re.search(rb'"name": "([^"]+)"', body[:1000])  # in the body of most uploads
        asked = urllib.parse.unquote(self.path) + (f" {named[1].decode()}" if named else "")
        if self.server.refuse(self.command, asked):
            answer = _json({"error": {"code": 403, "message": "not yours"}}, 403)
        else:
            parts = [urllib.parse.unquote(p) for p in url.path.strip("/").split("/")]
            answer = self.answer(parts, query, body)
        self.send_response(answer.code)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        self.wfile.write(answer.body)

    do_GET = do_POST = do_PUT = do_DELETE = do

    def answer(self, parts: list[str], query: dict[str, str], body: bytes) -> Answer:
        store = self.server
        kind = parts.pop(0) if parts[0] in ("upload", "download") else ""
        if parts[:3] != ["storage", "v1", "b"] or len(parts) < 4:
            return Answer(501)
        if parts[3] != NAME:
            return Answer(404)
        if kind == "upload":
            return self.uploaded(query, body)
        rest = parts[4:]
        if len(rest) > 1 and rest[1] not in store.objects:
            return Answer(404)
        match (self.command, *rest):
            case ("GET",):
                return _json({"kind": "storage#bucket", "name": NAME, "id": NAME, "location": "US"})
            case ("GET", "o"):
                return self.listed(query)
            case ("GET", "o", name) if query.get("alt") == "media":
                return self.content(name, query)
            case ("GET", "o", name):
                return _json(store.about(name))
            case ("DELETE", "o", name):
                with store.lock:
                    store.objects.pop(name, None)
                return Answer(204)
            case ("POST", "o", name, "moveTo", "o", other):
                with store.lock:
                    data, _ = store.objects.pop(name)
                return store.put(other, data)
        return Answer(501)

    def listed(self, query: dict[str, str]) -> Answer:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        first, last = query.get("startOffset", ""), query.get("endOffset", "\U0010ffff")
        items, folders = [], set()
        for name in self.server.names(prefix):
            if not first <= name < last:
                continue
            inside, cut, _ = name[len(prefix) :].partition(delimiter) if delimiter else ("", "", "")
            if cut:
                folders.add(prefix + inside + delimiter)
            else:
                items.append(self.server.about(name))
        return _json({"kind": "storage#objects", "items": items, "prefixes": sorted(folders)})

    def content(self, name: str, query: dict[str, str]) -> Answer:
        data, generation = self.server.objects[name]
        if query.get("ifGenerationNotMatch") == str(generation):
            return Answer(304)
        if query.get("ifGenerationMatch", str(generation)) != str(generation):
            return Answer(412)
        about = {"x-goog-generation": str(generation), "Content-Type": "application/octet-stream"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked is None:
            return Answer(200, data, about)
        start, end = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
        if start >= len(data):
            return Answer(416)
        about["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
        return Answer(206, data[start : end + 1], about)

    def uploaded(self, query: dict[str, str], body: bytes) -> Answer:
        match = query.get("ifGenerationMatch")
        if "upload_id" in query:  # the parts of a large file, in order
            name, before = self.server.uploads[query["upload_id"]]
            whole, total = before + body, self.headers["Content-Range"].split("/")[1]
            if total != "*" and len(whole) == int(total):
                return self.server.put(name, whole)
            self.server.uploads[query["upload_id"]] = name, whole
            return Answer(308, headers={"Range": f"bytes=0-{len(whole) - 1}"})
        match query["uploadType"]:
            case "media":
                return self.server.put(query["name"], body, match)
            case "multipart":
                mark = re.search('boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
                _, about, rest = body.split(b"--" + mark, 2)
                behind = lambda part: re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1]
                about, rest = behind(about), behind(rest)
                data = re.sub(rb"\r?\n--" + re.escape(mark) + rb"--\s*\Z", b"", rest)
                return self.server.put(json.loads(about)["name"], data, match)
            case "resumable":
                number = str(len(self.server.uploads))
                self.server.uploads[number] = query["name"], b""
                here = f"http://{self.headers['Host']}/upload/storage/v1/b/{NAME}/o"
                return Answer(200, headers={"Location": f"{here}?upload_id={number}"})
        return Answer(501)


def _json(content, code: int = 200) -> Answer:
    return Answer(code, json.dumps(content).encode(), {"Content-Type": "application/json"})
