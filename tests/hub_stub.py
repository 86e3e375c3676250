"""A small stand-in for the hub's HTTP interface, both directions, on a port of this machine.

It keeps repositories in memory as lists of commits and does what the real one does where that is
seen from outside: ids it does not know and private ones are RepoNotFound, files of a gated one are
GatedRepo, large files lie at an address of their own that must not be given the token, uploads of
large files go there before the commit that names them.
"""

import base64
import dataclasses
import hashlib
import http.server
import json
import os
import re
import threading
import urllib.parse

TOKEN = "hf_of_me"
OWNER = "me"
LARGE = (".safetensors", ".bin")


@dataclasses.dataclass
class Commit:
    message: str
    files: dict[str, bytes]

    @property
    def sha(self) -> str:
        content = [(path, hashlib.sha1(data).hexdigest()) for path, data in self.files.items()]
        return hashlib.sha1(json.dumps([self.message, *content]).encode()).hexdigest()


@dataclasses.dataclass
class Repository:
    commits: list[Commit]
    private: bool = False
    gated: bool = False  # and nobody has been let in

    def at(self, revision: str) -> Commit | None:
        if revision == "main":
            return self.commits[-1]
        return next((c for c in self.commits if c.sha == revision), None)


@dataclasses.dataclass(frozen=True)
class Request:
    method: str
    path: str
    authorization: str | None


class Refusal(Exception):
    def __init__(self, status: int, code: str = "", message: str = ""):
        self.status, self.code, self.message = status, code, message


class HubStub:
    """`with HubStub() as hub:` serves until the block ends; `hub.requests` is what was asked."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.large: dict[str, bytes] = {}  # by SHA-256

    def add(self, repo_id: str, files: dict[str, bytes], **settings: bool) -> None:
        self.repositories[repo_id] = Repository([Commit("first", files)], **settings)
        for data in files.values():
            self.large[hashlib.sha256(data).hexdigest()] = data

    def __enter__(self) -> "HubStub":
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.store = f"http://localhost:{self._server.server_port}"  # another host to a client
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def asked(self, method: str, part: str) -> list[Request]:
        return [r for r in self.requests if r.method == method and part in r.path]


def environment(home: object, endpoint: str, **more: str) -> dict[str, str]:
    """What a process needs to talk to a stub, and to nothing else."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    return {
        **kept,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",  # another protocol, to other servers
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1,localhost",
        **more,
    }


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubStub

    def log_message(self, format: str, *args: object) -> None: ...

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        token = self.headers.get("Authorization")
        self.hub.requests.append(Request(self.command, path, token))
        verb = "GET" if self.command == "HEAD" else self.command
        try:
            for method, pattern, answer in _ROUTES:
                if method == verb and (found := re.fullmatch(pattern, path)):
                    if token not in (None, f"Bearer {TOKEN}"):
                        raise Refusal(401, message="Invalid credentials in Authorization header")
                    return answer(self, body, **found.groupdict())
            raise Refusal(404, "EntryNotFound", "no such page")
        except Refusal as refusal:
            headers = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message}
            said = json.dumps({"error": refusal.message}).encode()
            self._reply(said, refusal.status, **{k: v for k, v in headers.items() if v})

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _reply(self, content: bytes | dict | list, status: int = 200, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _known(self) -> bool:
        return self.headers.get("Authorization") is not None

    def _repository(self, repo: str) -> Repository:
        found = self.hub.repositories.get(repo)
        if found is None or (found.private and not self._known()):
            raise Refusal(404 if self._known() else 401, "RepoNotFound", "Repository not found")
        return found

    def _writable(self, repo: str) -> Repository:
        if not self._known():
            raise Refusal(401, message="Invalid username or password.")
        if repo.split("/")[0] != OWNER:
            raise Refusal(403, message=f"You don't have the rights to write to {repo}")
        return self._repository(repo)

    def _commit(self, repo: str, revision: str | None) -> Commit:
        commit = self._repository(repo).at(revision or "main")
        if commit is None:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    # ------------------------------------------------------------ reading

    def info(self, _: bytes, repo: str, revision: str | None = None) -> None:
        commit, private = self._commit(repo, revision), self._repository(repo).private
        files = [{"rfilename": path} for path in commit.files]
        self._reply({"id": repo, "sha": commit.sha, "private": private, "siblings": files})

    def tree(self, _: bytes, repo: str, revision: str) -> None:
        self._reply([_entry(*each) for each in self._commit(repo, revision).files.items()])

    def resolve(self, _: bytes, repo: str, revision: str, path: str) -> None:
        commit = self._commit(repo, revision)
        if self._repository(repo).gated:
            status = 403 if self._known() else 401
            raise Refusal(status, "GatedRepo", f"Access to model {repo} is restricted.")
        headers = {"X-Repo-Commit": commit.sha}
        if path not in commit.files:
            raise Refusal(404, "EntryNotFound", "Entry not found")
        entry = _entry(path, commit.files[path])
        if "lfs" not in entry:
            return self._reply(commit.files[path], ETag=f'"{entry["oid"]}"', **headers)
        oid = entry["lfs"]["oid"]
        headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(entry["size"])}
        return self._reply(b"", 302, Location=f"{self.hub.store}/store/{oid}", **headers)

    def stored(self, _: bytes, oid: str) -> None:
        self._reply(self.hub.large[oid], ETag=f'"{oid}"')

    # ------------------------------------------------------------ writing

    def create(self, body: bytes) -> None:
        wanted = json.loads(body)
        repo = f"{wanted.get('organization') or OWNER}/{wanted['name']}"
        url = {"url": f"{self.hub.url}/{repo}", "name": repo}
        if repo in self.hub.repositories:
            return self._reply({"error": "You already created this model repo", **url}, 409)
        new = Repository([Commit("initial commit", {".gitattributes": b""})])
        new.private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        if repo.split("/")[0] == OWNER and self._known():
            self.hub.repositories[repo] = new
        self._writable(repo)
        return self._reply(url)

    def card(self, body: bytes) -> None:
        whole = json.loads(body)["content"].startswith("---\n")
        said = [] if whole else [{"message": "empty or missing yaml metadata in repo card"}]
        self._reply({"errors": [], "warnings": said})

    def preupload(self, body: bytes, repo: str, revision: str) -> None:
        self._writable(repo)
        files = self._commit(repo, revision).files
        answers = []
        for path in (f["path"] for f in json.loads(body)["files"]):
            mode = "lfs" if path.endswith(LARGE) else "regular"
            answer = {"path": path, "uploadMode": mode, "shouldIgnore": False}
            if path in files:
                entry = _entry(path, files[path])
                answer["oid"] = entry.get("lfs", entry)["oid"]
            answers.append(answer)
        self._reply({"files": answers})

    def batch(self, body: bytes, repo: str) -> None:
        self._writable(repo)
        objects = json.loads(body)["objects"]
        for each in objects:
            if each["oid"] not in self.hub.large:
                place = {"href": f"{self.hub.store}/store/{each['oid']}"}
                check = {"href": f"{self.hub.url}/{repo}.git/info/lfs/verify"}
                each["actions"] = {"upload": place, "verify": check}
        self._reply({"transfer": "basic", "objects": objects})

    def store(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refusal(400, message=f"{len(body)} bytes that are not {oid}")
        self.hub.large[oid] = body
        self._reply(b"")

    def verify(self, body: bytes, repo: str) -> None:
        wanted = json.loads(body)
        if len(self.hub.large.get(wanted["oid"], b"")) != wanted["size"]:
            raise Refusal(404, message="not uploaded")
        self._reply({})

    def commit(self, body: bytes, repo: str, revision: str) -> None:
        repository = self._writable(repo)
        files, message = dict(self._commit(repo, revision).files), ""
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            match item["key"]:
                case "header":
                    message = value["summary"]
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.hub.large[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
        repository.commits.append(Commit(message, files))
        sha = repository.commits[-1].sha
        self._reply({"commitUrl": f"{self.hub.url}/{repo}/commit/{sha}", "commitOid": sha})


def _entry(path: str, data: bytes) -> dict:
    """A file of a tree's listing."""
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    entry = {"type": "file", "path": path, "size": len(data), "oid": blob}
    if path.endswith(LARGE):
        oid = hashlib.sha256(data).hexdigest()
        entry["lfs"] = {"oid": oid, "size": len(data), "pointerSize": 130}
    return entry


_ID, _REVISION = r"(?P<repo>[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
_ROUTES = (
    ("POST", "/api/repos/create", _Handler.create),
    ("GET", f"/api/models/{_ID}", _Handler.info),
    ("GET", f"/api/models/{_ID}/revision/{_REVISION}", _Handler.info),
    ("GET", f"/api/models/{_ID}/tree/{_REVISION}/?", _Handler.tree),
    ("GET", f"/{_ID}/resolve/{_REVISION}/(?P<path>.+)", _Handler.resolve),
    ("GET", "/store/(?P<oid>[0-9a-f]+)", _Handler.stored),
    ("POST", "/api/validate-yaml", _Handler.card),
    ("POST", f"/api/models/{_ID}/preupload/{_REVISION}", _Handler.preupload),
    ("POST", f"/{_ID}[.]git/info/lfs/objects/batch", _Handler.batch),
    ("POST", f"/{_ID}[.]git/info/lfs/verify", _Handler.verify),
    ("PUT", "/store/(?P<oid>[0-9a-f]+)", _Handler.store),
    ("POST", f"/api/models/{_ID}/commit/{_REVISION}", _Handler.commit),
)
