"""A small Hugging Face Hub on the loopback interface, for tests that push and load over real HTTP.

It speaks what `huggingface_hub` and Transformers ask for: creating repositories and branches, pre-upload, LFS batch and
upload, commits, pull requests, listing, and resolving files, with tokens, private repositories, ETags and ranges.
Files are stored per commit in memory. Xet is never advertised; clients must run with
`HF_HUB_DISABLE_XET=1`.

    with HubServer() as hub:
        subprocess.run([...], env=hub.environment(cache_folder, token=WRITE_TOKEN))
"""

import base64
import hashlib
import json
import os
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub
import yaml

OWNER = "tester"
WRITE_TOKEN, READ_TOKEN = "hf_writer", "hf_reader"  # READ_TOKEN belongs to somebody else and may only read
LFS_SUFFIXES = (".safetensors", ".bin", ".png")


@dataclass(frozen=True)
class File:
    """One file of a commit."""

    data: bytes
    lfs: bool

    @property
    def etag(self) -> str:
        """What the Hub calls the file: its SHA-256 in LFS, its git object id otherwise."""
        if self.lfs:
            return hashlib.sha256(self.data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()


@dataclass
class Repository:
    """Commits by id, and branches (or pull requests) that name one of them."""

    private: bool = False
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        self.commit("main", {})

    def commit(self, branch: str, files: dict[str, File]) -> str:
        """Put a new commit on a branch and return its id."""
        state = repr((branch, len(self.commits), sorted((name, file.etag) for name, file in files.items())))
        commit = hashlib.sha1(state.encode()).hexdigest()
        self.commits[commit] = files
        self.branches[branch] = commit
        return commit

    def find(self, revision: str) -> str | None:
        """The commit that a branch or a commit id means."""
        return self.branches.get(revision) or (revision if revision in self.commits else None)


class HubServer:
    """The server, running in a thread of this process while its `with` block lasts.

    Attributes:
        url: `http://127.0.0.1:PORT`.
        repositories: by `owner/name`.
        requests: every request served, as `(method, path)`.
    """

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # LFS uploads by SHA-256
        self.requests: list[tuple[str, str]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "HubServer":
        self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Names and contents of a repository's files."""
        repository = self.repositories[repo_id]
        return {name: file.data for name, file in repository.commits[repository.find(revision)].items()}

    def add(self, repo_id: str, folder: Path, private: bool = False, branch: str = "main") -> str:
        """Publish a folder without going through a client; returns the commit."""
        repository = self.repositories.setdefault(repo_id, Repository(private=private))
        files = {p.name: File(p.read_bytes(), p.name.endswith(LFS_SUFFIXES)) for p in folder.iterdir() if p.is_file()}
        return repository.commit(branch, files)

    def stand_in(self, monkeypatch, cache: Path) -> None:
        """Make `huggingface_hub` in this process take this server for the Hub, and no token from this machine."""
        values = {
            "ENDPOINT": self.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(cache),
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_OFFLINE": False,
            "HF_TOKEN_PATH": str(cache / "no-token"),
        }
        for name, value in values.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)

    def environment(self, home: Path, token: str | None = None, offline: bool = False) -> dict[str, str]:
        """Environment variables of a process that shall take this server for the Hub."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
        environment |= {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1", "HF_HUB_OFFLINE": str(int(offline))}
        environment |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1"}
        return environment | ({"HF_TOKEN": token} if token else {})


class _Error(Exception):
    def __init__(self, status: int, code: str, message: str, commit: str | None = None):
        super().__init__(message)
        self.status, self.code, self.commit = status, code, commit


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every answer waits 40 ms for the client's acknowledgement

    ROUTES = (
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("POST", r"/api/repos/create", "create_repository"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)(?:/revision/(?P<revision>[^/]+))?", "repository_info"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)", "list_tree"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/branch/(?P<revision>[^/]+)", "create_branch"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)", "commit"),
        ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_upload"),
        ("POST", r"/lfs/verify", "lfs_verify"),
        ("GET", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    )

    def do_GET(self):
        self._serve("GET")

    def do_HEAD(self):
        self._serve("GET")

    def do_POST(self):
        self._serve("POST")

    def do_PUT(self):
        self._serve("PUT")

    def log_message(self, *arguments):
        pass

    def _serve(self, method: str) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.hub.requests.append((self.command, url.path))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            for route_method, pattern, name in self.ROUTES:
                match = re.fullmatch(pattern, url.path) if method == route_method else None
                if match:
                    self.token = self._check_token()
                    getattr(self, name)(body, **{k: v and unquote(v) for k, v in match.groupdict().items()})
                    return
            raise _Error(404, "NotFound", f"the test server has no route for {self.command} {url.path}")
        except _Error as error:
            headers = {"X-Error-Code": error.code, "X-Error-Message": str(error)}
            headers |= {"X-Repo-Commit": error.commit} if error.commit else {}
            self._answer(json.dumps({"error": str(error)}).encode(), error.status, **headers)

    def _answer(self, data: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _answer_json(self, value, status: int = 200) -> None:
        self._answer(json.dumps(value).encode(), status, **{"Content-Type": "application/json"})

    def _check_token(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        if token not in (None, WRITE_TOKEN, READ_TOKEN):
            raise _Error(401, "", "Invalid credentials in Authorization header")
        return token

    def _repository(self, repo: str, write: bool = False) -> Repository:
        repository = self.hub.repositories.get(repo)
        if repository is None or (repository.private and self.token != WRITE_TOKEN):
            # As on the Hub, the anonymous learn nothing about what exists.
            raise _Error(404 if self.token else 401, "RepoNotFound", "Repository not found")
        if write and self.token != WRITE_TOKEN:
            raise _Error(403, "", "Forbidden: you don't have the rights to write to this repository")
        return repository

    def _commit(self, repository: Repository, revision: str | None) -> str:
        commit = repository.find(revision or "main")
        if commit is None:
            raise _Error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def validate_yaml(self, body: bytes) -> None:
        content = json.loads(body)["content"]
        front_matter = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        metadata = yaml.safe_load(front_matter[1]) if front_matter else {}
        errors = [] if isinstance(metadata, dict) else [{"message": "the metadata is no mapping"}]
        for result in metadata.get("model-index", []) if not errors else ():
            if not {"name", "results"} <= set(result):
                errors.append({"message": "model-index needs name and results"})
        self._answer_json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def create_repository(self, body: bytes) -> None:
        request = json.loads(body)
        if self.token is None:
            raise _Error(401, "", "Invalid username or password.")
        repo = f"{request.get('organization') or OWNER}/{request['name']}"
        if self.token != WRITE_TOKEN or not repo.startswith(f"{OWNER}/"):
            raise _Error(403, "", "You don't have the rights to create a model under this namespace")
        private = request.get("visibility") == "private" or bool(request.get("private"))
        exists = repo in self.hub.repositories
        if not exists:
            self.hub.repositories[repo] = Repository(private=private)
        self._answer_json({"url": f"{self.hub.url}/{repo}", "name": repo}, 409 if exists else 200)

    def repository_info(self, body: bytes, repo: str, revision: str | None) -> None:
        repository = self._repository(repo)
        commit = self._commit(repository, revision)
        siblings = [{"rfilename": name} for name in repository.commits[commit]]
        self._answer_json(
            {
                "id": repo,
                "modelId": repo,
                "sha": commit,
                "private": repository.private,
                "siblings": siblings,
                "tags": [],
            }
        )

    def list_tree(self, body: bytes, repo: str, revision: str) -> None:
        repository = self._repository(repo)
        files = repository.commits[self._commit(repository, revision)]
        entries = [
            {"type": "file", "path": name, "size": len(file.data), "oid": File(file.data, lfs=False).etag}
            | ({"lfs": {"oid": file.etag, "size": len(file.data), "pointerSize": 134}} if file.lfs else {})
            for name, file in files.items()
        ]
        self._answer_json(entries)

    def create_branch(self, body: bytes, repo: str, revision: str) -> None:
        repository = self._repository(repo, write=True)
        if revision in repository.branches:
            raise _Error(409, "", "Reference already exists")
        start = json.loads(body or b"{}").get("startingPoint")
        repository.branches[revision] = self._commit(repository, start)
        self._answer_json({})

    def preupload(self, body: bytes, repo: str, revision: str) -> None:
        repository = self._repository(repo, write=True)
        present = repository.commits[self._commit(repository, revision)]
        files = []
        for entry in json.loads(body)["files"]:
            mode = "lfs" if entry["path"].endswith(LFS_SUFFIXES) else "regular"
            answer = {"path": entry["path"], "uploadMode": mode, "shouldIgnore": False}
            files.append(answer | ({"oid": present[entry["path"]].etag} if entry["path"] in present else {}))
        self._answer_json({"files": files})

    def lfs_batch(self, body: bytes, repo: str) -> None:
        self._repository(repo, write=True)
        objects = []
        for entry in json.loads(body)["objects"]:
            answer = {"oid": entry["oid"], "size": entry["size"]}
            if entry["oid"] not in self.hub.objects:
                upload = {"href": f"{self.hub.url}/lfs/{entry['oid']}"}
                answer["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.url}/lfs/verify"}}
            objects.append(answer)
        self._answer_json({"transfer": "basic", "objects": objects})

    def lfs_upload(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise _Error(400, "", "the content does not have the SHA-256 that was announced")
        self.hub.objects[oid] = body
        self._answer(b"")

    def lfs_verify(self, body: bytes) -> None:
        request = json.loads(body)
        if len(self.hub.objects.get(request["oid"], b"")) != request["size"]:
            raise _Error(404, "", "no such object")
        self._answer_json({})

    def commit(self, body: bytes, repo: str, revision: str) -> None:
        repository = self._repository(repo, write=True)
        files = dict(repository.commits[self._commit(repository, revision)])
        for line in body.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), lfs=False)
            elif key == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise _Error(400, "", f"LFS object of {value['path']} was never uploaded")
                files[value["path"]] = File(self.hub.objects[value["oid"]], lfs=True)
            elif key == "deletedFile" and files.pop(value["path"], None) is None:
                raise _Error(404, "EntryNotFound", "A file with this name doesn't exist")
        answer = {}
        if "create_pr" in self.query:
            number = sum(name.startswith("refs/pr/") for name in repository.branches) + 1
            revision = f"refs/pr/{number}"
            answer["pullRequestUrl"] = f"{self.hub.url}/{repo}/discussions/{number}"
        commit = repository.commit(revision, files)
        self._answer_json({"commitOid": commit, "commitUrl": f"{self.hub.url}/{repo}/commit/{commit}", **answer})

    def resolve(self, body: bytes, repo: str, revision: str, path: str) -> None:
        repository = self._repository(repo)
        commit = self._commit(repository, revision)
        file = repository.commits[commit].get(path)
        if file is None:
            raise _Error(404, "EntryNotFound", "Entry not found", commit=commit)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{file.etag}"'}
        if file.lfs:
            headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(len(file.data))}
        self._answer_range(file.data, headers)

    def _answer_range(self, data: bytes, headers: dict[str, str]) -> None:
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not match:
            self._answer(data, 200, **{"Accept-Ranges": "bytes", **headers})
            return
        start, stop = int(match[1]), min(int(match[2] or len(data) - 1) + 1, len(data))
        content_range = {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}
        self._answer(data[start:stop], 206, **content_range, **headers)
