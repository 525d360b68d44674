"""Segment images on a cluster with Ray Data, from encoded files to Parquet.

`run_ray_job` goes through three stages, which run at once on all nodes. Tasks that need no processor read encoded
images; actors, each with a `RowSegmenter` and perhaps a GPU, decode and segment them; tasks write the rows. The output,
a folder that all nodes see or a bucket, has `segments/*.parquet` and, for images with an error, `failures/*.parquet`.

A file of rows appears whole or not at all, under a name that follows from its rows, so a task that runs again after its
node has died writes the same file. The files themselves say what is complete. Ray's own `CheckpointConfig` is not used:
it takes images that failed for complete, forgets what it knows once a job has succeeded, knows no settings of a job,
and needs a gigabyte for each of its filters (Ray 2.60).
"""

import hashlib
import json
import logging
import os
import posixpath
import socket
import subprocess
import sys
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from .input_files import IMAGE_SUFFIXES, RESULT_ENDINGS, ImageFile
from .jobs import PREFIX, digest_of, refuse_other_settings, try_lock
from .row_segmenter import RowSegmenter, row_schema

FORMAT, VERSION = "hf-segvit ray job", 1
JOB_FILE = "_hf_segvit_job.json"  # readers of Parquet folders leave out names that begin so
_CONNECT_SECONDS, _PROBE_SECONDS = 10.0, 60.0
_BLOCK_BYTES = 32 * 2**20  # of encoded images that travel together
_MOST_ROWS = 256  # of a block of work
_KEY_BYTES = 12


@dataclass(frozen=True)
class RemoteImage:
    """An image to segment: `path` is a file that all nodes see or an address such as s3://bucket/cat.jpg."""

    source: str
    path: str
    name: str
    member: str = ""  # of a container, as JSON
    page: int = 0

    @classmethod
    def of(cls, file: ImageFile, name: str) -> "RemoteImage":
        """An image that was found in files, with the name of its results."""
        path = str(file.path) if file.source.startswith("dataset:") else os.path.abspath(file.path)
        member = "" if file.member is None else json.dumps(file.member)
        try:
            file.source.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{file.path!a}: its name is not UTF-8, which tables need; rename it") from error
        return cls(file.source, path, name, member, file.page)


@dataclass(frozen=True)
class Resources:
    """What the actors get.

    Attributes:
        actors: the most of them; `None`: as many as there are GPUs, or cores for their threads.
        gpus: of each, perhaps a part of one; `None`: one where the cluster has GPUs.
        cpus: of each, for decoding and post-processing in threads.
        device: `cpu` or `cuda` to insist on it; `None`: GPUs where there are some.
    """

    actors: int | None = None
    gpus: float | None = None
    cpus: int = 1
    device: str | None = None


@dataclass
class Counts:
    """Images of a job: complete before it, and segmented and failed in it."""

    complete: int = 0
    done: int = 0
    failed: int = 0


def run_ray_job(
    images: Sequence[RemoteImage],
    segmenter: RowSegmenter,
    output: str,
    *,
    settings: Mapping[str, Any],
    address: str | None = None,
    resources: Resources | None = None,
    rows_per_file: int = 512,
    resume: bool = True,
    told: Callable[[Counts, list[str]], None] | None = None,
) -> Counts:
    """Segment images on a Ray cluster, each exactly once, however often nodes die or the job is started again.

    Args:
        images: with sources that differ.
        output: a folder that all nodes see, or an address of an object store, such as s3://bucket/folder.
        settings: what decides about the results; the output keeps them and refuses others.
        address: of the cluster; `None`: one of this process or this machine, which is started and ends with the job.
        resources: for the actors.
        rows_per_file: the most that a Parquet file holds, and that a kill of the whole job loses of each writer.
        resume: go on with what is complete; False deletes it.
        told: hears of each written file: the counts, and the errors of its images.

    Raises:
        ValueError: no cluster answers, it lacks GPUs, the output holds or is in use by another job, or an actor cannot
            load the model.
    """
    resources, store = resources or Resources(), _Store(output)
    with store.locked(), connected(address) as address:
        actors, gpus = _shares(resources, address)
        complete = store.begin(settings, resume)
        remaining = [image for image in images if digest_of(image.source) not in complete]
        counts = Counts(complete=len(images) - len(remaining))
        if not remaining:
            return counts
        answered: set[bytes] = set()
        for row in _results(remaining, segmenter, output, actors, gpus, resources, rows_per_file):
            answered.update(row["keys"][start : start + _KEY_BYTES] for start in range(0, len(row["keys"]), _KEY_BYTES))
            counts.done += row["done"]
            counts.failed += row["failed"]
            if told is not None:
                told(counts, list(row["errors"]))
        if not len(answered) == counts.done + counts.failed == len(remaining):
            raise ValueError(
                f"{output}: {len(remaining)} images gave {counts.done + counts.failed} rows of {len(answered)} images; "
                "give each image once, and run the same command again for the rest"
            )
        return counts


@contextmanager
def connected(address: str | None) -> Iterator[str | None]:
    """A connection to the cluster at an address, or to one of this machine; ends with the block what it has started.

    Raises:
        ValueError: Ray is not installed, or nothing answers in time.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing that we start reports about its user
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ValueError(f"--engine ray needs Ray: pip install 'hf-segvit[ray]' ({error})") from error
    if ray.is_initialized():  # by the caller, who keeps it
        yield address
        return
    if address is not None:
        _refuse_absent(address)
    try:
        local: dict[str, Any] = {"include_dashboard": False} if address is None else {}
        ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **local)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        raise ValueError(f"--address {address}: no Ray cluster answers ({_line(error)}); start or name one") from error
    try:
        yield address
    finally:
        ray.shutdown()


def _refuse_absent(address: str) -> None:
    """Refuse an address at which no cluster answers, after a bounded time."""
    remedy = "give HOST:PORT of a running cluster (`ray start --head` prints it), or leave --address out"
    if address != "auto":
        host, _, port = address.removeprefix("ray://").rpartition(":")
        if not host or not port.isdigit():
            raise ValueError(f"--address {address}: no address of a Ray cluster; {remedy}")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
        except (OSError, OverflowError) as error:
            raise ValueError(f"--address {address}: no Ray cluster is there ({_line(error)}); {remedy}") from error
    # Ray tries for minutes to talk to whatever has the port, and then ends the process; so a process of its own asks.
    code = "import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False, logging_level='ERROR'); ray.shutdown()"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, address], capture_output=True, text=True, timeout=_PROBE_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise ValueError(
            f"--address {address}: what is there does not answer as a Ray cluster within {_PROBE_SECONDS:.0f} s; "
            f"{remedy}"
        ) from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["it ended without a word"]
        raise ValueError(f"--address {address}: no Ray cluster answers ({lines[-1][:300]}); {remedy}")


def _shares(resources: Resources, address: str | None) -> tuple[int, float]:
    """How many actors there may be, and GPUs for each."""
    import ray

    has = ray.cluster_resources()
    cpus, gpus = has.get("CPU", 0.0), has.get("GPU", 0.0)
    where = "this machine" if address is None else f"the cluster at {address}"
    wants_gpus = bool(resources.gpus) or str(resources.device).startswith("cuda")
    if wants_gpus and not gpus:
        raise ValueError(f"{where} has no GPUs, only {cpus:g} CPUs; add nodes with GPUs, or give --device cpu")
    share = 0.0 if resources.device == "cpu" or not gpus else (resources.gpus or 1.0)
    if share > gpus or resources.cpus > cpus:
        raise ValueError(
            f"{where} has {gpus:g} GPUs and {cpus:g} CPUs, too few for an actor with {share:g} and {resources.cpus}; "
            "lower --gpus-per-actor or --cpus-per-actor"
        )
    most = max(1, int(gpus // share)) if share else max(1, int(cpus // resources.cpus))
    return resources.actors or most, share


def _results(
    images: Sequence[RemoteImage],
    segmenter: RowSegmenter,
    output: str,
    actors: int,
    gpus: float,
    resources: Resources,
    rows_per_file: int,
) -> Iterator[dict[str, Any]]:
    """What the writers tell of each file, as soon as it is there."""
    import pyarrow
    import ray
    from ray.data import ActorPoolStrategy, DataContext, TaskPoolStrategy

    DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="The maximum number of concurrent tasks", module="ray.data")
    size = max(1, min(_MOST_ROWS, len(images) // (8 * actors)))
    work = [
        pyarrow.Table.from_pylist([asdict(image) for image in images[start : start + size]])
        for start in range(0, len(images), size)
    ]
    device = "cpu" if not gpus else resources.device or "cuda"
    settings = {**segmenter.settings, "device": device}
    threads = {**segmenter.threads, "workers": resources.cpus, "writers": resources.cpus}
    # Reading and writing need no core of their own, so that actors that hold all cores cannot starve them.
    write: Any = _write_rows
    files: dict[str, Any] = {"num_cpus": 0, "compute": TaskPoolStrategy(size=max(2, 2 * actors))}
    rows = (
        ray.data.from_arrow(work)
        .map_batches(_read_images, batch_size=None, batch_format="pyarrow", **files)
        .map_batches(
            RowSegmenter,
            batch_size=max(32, 4 * int(threads["batch_size"] or 1)),
            batch_format="pyarrow",
            compute=ActorPoolStrategy(min_size=1, max_size=actors),
            num_cpus=resources.cpus,
            num_gpus=gpus,
            fn_constructor_args=[segmenter.model],
            fn_constructor_kwargs={
                **settings,
                **threads,
                "value_range": segmenter.value_range,
                "bands": segmenter.bands,
            },
        )
        .map_batches(write, batch_size=rows_per_file, batch_format="pyarrow", fn_kwargs={"output": output}, **files)
    )
    try:
        yield from rows.iter_rows()
    except ray.exceptions.RayError as error:
        raise ValueError(f"the Ray job ended: {_line(error)}; the same command goes on with the rest") from error


def _read_images(work: Any) -> Iterator[Any]:
    """Rows with the bytes of images, or why there are none, in tables of a bounded size."""
    import pyarrow

    schema = pyarrow.schema(
        [
            *((name, pyarrow.string()) for name in ("source", "path", "name", "error")),
            ("page", pyarrow.int64()),
            ("bytes", pyarrow.large_binary()),
        ]
    )
    rows: list[dict[str, Any]] = []
    num_bytes = 0
    for image in work.to_pylist():
        path = image["source"] if is_remote(image["path"]) else image["path"]
        row = {"source": image["source"], "path": path, "name": image["name"], "page": image["page"]}
        try:
            row["bytes"] = _content(image)
            num_bytes += len(row["bytes"])
        except (ValueError, OSError) as error:
            row["error"] = str(error)
        rows.append(row)
        if num_bytes >= _BLOCK_BYTES:
            yield pyarrow.Table.from_pylist(rows, schema=schema)
            rows, num_bytes = [], 0
    if rows:
        yield pyarrow.Table.from_pylist(rows, schema=schema)


def _content(image: Mapping[str, Any]) -> bytes:
    """The bytes of an image, from a file, a container or an address."""
    path = image["path"]
    if is_remote(path):
        from pyarrow import fs

        from ..data.archives import MAX_IMAGE_BYTES

        system, inside = fs.FileSystem.from_uri(path)
        with system.open_input_file(inside) as file:
            if file.size() > MAX_IMAGE_BYTES:
                raise ValueError(
                    f"{image['source']}: {file.size():,} bytes, more than the limit of {MAX_IMAGE_BYTES:,}"
                )
            return file.read()
    member = json.loads(image["member"]) if image["member"] else None
    file = ImageFile(Path(path), Path(path), image["page"], tuple(member) if isinstance(member, list) else member)  # type: ignore[arg-type]
    version, content = file.version(), file.read()
    if file.version() != version:
        raise ValueError(f"{file.name}: changed while it was read; segment it again")
    return content if isinstance(content, bytes) else Path(content).read_bytes()


def _write_rows(rows: Any, output: str) -> Any:
    """Write rows into the output; a row that tells what is in the file."""
    import pyarrow

    if not rows.num_rows:
        return pyarrow.Table.from_pylist([])
    store, is_failed = _Store(output), rows["error"].is_valid()
    for folder, part in (
        ("segments", rows.filter(pyarrow.compute.invert(is_failed))),
        ("failures", rows.filter(is_failed)),
    ):
        if part.num_rows:
            store.write(folder, part.cast(row_schema()))
    errors = [error for error in rows["error"].to_pylist() if error is not None]
    keys = b"".join(map(digest_of, rows["source"].to_pylist()))
    told = {"keys": keys, "done": rows.num_rows - len(errors), "failed": len(errors), "errors": errors}
    schema = {"keys": pyarrow.binary(), "done": pyarrow.int64(), "failed": pyarrow.int64()}
    return pyarrow.Table.from_pylist(
        [told], schema=pyarrow.schema([*schema.items(), ("errors", pyarrow.list_(pyarrow.string()))])
    )


def find_remote(address: str) -> list[RemoteImage]:
    """The images below an address such as s3://bucket/folder, or the one that it is.

    Raises:
        ValueError: it cannot be listed.
    """
    from pyarrow import fs

    system, root = _file_system(address)
    try:
        info = system.get_file_info(root)
        found = [info] if info.is_file else system.get_file_info(fs.FileSelector(root, recursive=True))
    except OSError as error:
        raise ValueError(f"{address}: cannot be listed ({_line(error)}); check the address and your rights") from error
    start, _, rest = address.partition("?")
    scheme = address.partition("://")[0]
    images = []
    for each in sorted(found, key=lambda info: info.path):
        is_whole, name = each is info, each.path.lower()
        if not each.is_file or (not is_whole and (not name.endswith(IMAGE_SUFFIXES) or name.endswith(RESULT_ENDINGS))):
            continue
        below = posixpath.basename(each.path) if is_whole else posixpath.relpath(each.path, root)
        path = start if is_whole else posixpath.join(start, quote(below))
        path += f"?{rest}" if rest else ""
        # Without what follows the ?, and before an @, where keys may be.
        images.append(RemoteImage(f"{scheme}://{each.path}", path, posixpath.splitext(below)[0]))
    return images


def is_remote(text: str) -> bool:
    """Whether a text is an address of an object store or file system."""
    return "://" in text


def _file_system(address: str) -> tuple[Any, str]:
    from pyarrow import ArrowException, fs

    try:
        return (
            fs.FileSystem.from_uri(address) if is_remote(address) else (fs.LocalFileSystem(), os.path.abspath(address))
        )
    except (ArrowException, OSError, ValueError) as error:
        raise ValueError(
            f"{address}: no address that can be opened ({_line(error)}); give s3://BUCKET/FOLDER"
        ) from error


class _Store:
    """The output of a job, in a folder or an object store."""

    def __init__(self, output: str) -> None:
        from pyarrow import fs

        self.output = output
        self.system, root = _file_system(output)
        self.root = root.rstrip("/")
        self.is_local = isinstance(self.system, fs.LocalFileSystem)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep a second job out of a folder; object stores have no locks."""
        if not self.is_local:
            yield
            return
        Path(self.root).mkdir(parents=True, exist_ok=True)
        if any(Path(self.root).glob(f"{PREFIX}*")):
            raise ValueError(f"{self.output} holds results of a job without --engine ray; choose another --output")
        with open(Path(self.root) / "_hf_segvit_lock", "ab") as file:
            if not try_lock(file):
                raise ValueError(f"{self.output}: another job is working on it; wait, or choose another --output")
            yield

    def begin(self, settings: Mapping[str, Any], resume: bool) -> set[bytes]:
        """Keep or compare the settings, forget failures, and return the digests of complete sources."""
        import pyarrow
        from pyarrow import parquet

        path = f"{self.root}/{JOB_FILE}"
        settings = json.loads(json.dumps(settings))
        before = self._read_settings(path) if resume else None
        if before is None:
            self._forget("segments")
            self._put(path, json.dumps({"format": FORMAT, "version": VERSION, "settings": settings}).encode())
        else:
            refuse_other_settings(self.output, before, settings)
        self._forget("failures")  # they are tried again
        complete: set[bytes] = set()
        for each in self._files("segments"):
            if posixpath.basename(each).startswith("."):  # of a writer that was killed
                self.system.delete_file(each)
                continue
            try:
                with self.system.open_input_file(each) as file:
                    sources = parquet.read_table(file, columns=["source"]).column(0)
            except (pyarrow.ArrowException, OSError):  # half a file, of an object store that shows them
                self.system.delete_file(each)
                continue
            complete.update(map(digest_of, sources.to_pylist()))
        return complete

    def _read_settings(self, path: str) -> dict[str, Any] | None:
        try:
            with self.system.open_input_file(path) as file:
                content = json.loads(file.read())
            if content["format"] != FORMAT or content["version"] > VERSION:
                raise ValueError("another version")
            return content["settings"]
        except FileNotFoundError:
            if self._files("segments"):
                raise ValueError(f"{self.output} holds segments, but no job; choose another --output") from None
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.output}/{JOB_FILE} cannot be read ({error}); --no-resume starts anew") from error

    def write(self, folder: str, rows: Any) -> None:
        """Write rows as a file whose name follows from their sources."""
        import pyarrow
        from pyarrow import parquet

        name = hashlib.sha256("\0".join(sorted(rows["source"].to_pylist())).encode()).hexdigest()[:24]
        buffer = pyarrow.BufferOutputStream()
        parquet.write_table(rows, buffer, compression="zstd")
        self._put(f"{self.root}/{folder}/part-{name}.parquet", buffer.getvalue())

    def _put(self, path: str, content: Any) -> None:
        """Write a file at once: object stores show whole objects only, folders get it by renaming."""
        target = path
        if self.is_local:
            folder, _, name = path.rpartition("/")
            os.makedirs(folder, exist_ok=True)
            target = f"{folder}/.{uuid.uuid4().hex[:8]}.partial-{name}"
        try:
            with self.system.open_output_stream(target) as file:
                file.write(content)
            if target != path:
                os.replace(target, path)
        except OSError as error:
            if target != path:
                with suppress(OSError):
                    os.unlink(target)
            raise ValueError(f"cannot write {path}: {error.strerror or error}; check the place and its room") from error

    def _files(self, folder: str) -> list[str]:
        from pyarrow import fs

        selector = fs.FileSelector(f"{self.root}/{folder}", allow_not_found=True)
        return [info.path for info in self.system.get_file_info(selector) if info.base_name.endswith(".parquet")]

    def _forget(self, folder: str) -> None:
        for path in self._files(folder):
            self.system.delete_file(path)


def _line(error: BaseException) -> str:
    """An error in one line: of Ray, whose text is a traceback, the last one."""
    lines: Iterable[str] = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (list(lines) or [type(error).__name__])[-1][:400]
