"""Jobs on a Ray cluster: every image is answered exactly once, whichever node dies and whatever is wrong with an image.

The slow test runs a cluster of three nodes in a process of its own, whose group ends with it.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

import hf_segvit
from hf_segvit.cli import main
from hf_segvit.inference import ray_jobs
from hf_segvit.inference.input_files import find_images, output_names
from hf_segvit.inference.ray_jobs import JOB_FILE, RemoteImage, _read_images, _Store, _write_rows, find_remote
from hf_segvit.inference.row_segmenter import RowSegmenter, row_schema

from .test_bulk_segmentation import draw
from .test_row_segmenter import save_model

pytest.importorskip("ray", reason="needs the extra ray")
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(save_model(tmp_path_factory.mktemp("models") / "panoptic"))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for index in range(4):
        draw(folder / f"{index}.png", index)
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:60])
    return folder


def remote_images(folder: Path) -> list[RemoteImage]:
    found, _ = find_images([str(folder)])
    names = output_names([file.relative_path for file in found])
    return [RemoteImage.of(file, name) for file, name in zip(found, names, strict=True)]


def rows_of(output: Path, folder: str = "segments") -> list[dict]:
    return [row for path in (output / folder).glob("*.parquet") for row in parquet.read_table(path).to_pylist()]


def work_table(images: list[RemoteImage]) -> pyarrow.Table:
    return pyarrow.Table.from_pylist([vars(image) for image in images])


class TestStages:
    """What the tasks do, without a cluster."""

    def test_read_segment_write(self, model, images, tmp_path):
        work = work_table([*remote_images(images), RemoteImage("gone", str(images / "gone.png"), "gone")])
        (read,) = _read_images(work)
        assert read["bytes"].to_pylist()[0] == (images / "0.png").read_bytes()
        assert read["error"].to_pylist()[:4] == [None] * 4
        assert "gone.png" in read["error"].to_pylist()[4]
        rows = RowSegmenter(model, device="cpu")(read)
        (told,) = _write_rows(rows, str(tmp_path / "out")).to_pylist()
        assert (told["done"], told["failed"], len(told["keys"])) == (3, 2, 5 * 12)
        assert ["2.png" in told["errors"][0], "gone.png" in told["errors"][1]] == [True, True]
        expected = RowSegmenter(model, device="cpu").rows(read.to_pylist())
        assert rows_of(tmp_path / "out") == [row for row in expected if not row["error"]]
        assert [row["source"] for row in rows_of(tmp_path / "out", "failures")] == [str(images / "2.png"), "gone"]
        # A task that runs again writes the same files; nothing partial is left.
        before = sorted(path.name for path in (tmp_path / "out").rglob("*"))
        assert _write_rows(rows.take([4, 3, 2, 1, 0]), str(tmp_path / "out")).num_rows == 1
        assert sorted(path.name for path in (tmp_path / "out").rglob("*")) == before
        assert len(rows_of(tmp_path / "out")) == 3

    def test_members_pages_and_addresses(self, images, tmp_path):
        import zipfile

        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            archive.write(images / "1.png", "deep/1.png")
        (image,) = remote_images(tmp_path / "a.zip")
        assert (image.member, image.page) == ('"deep/1.png"', 0)
        found = find_remote(images.as_uri())
        assert [image.name for image in found] == ["0", "1", "2", "3"]
        (read,) = _read_images(work_table([image, found[3], *find_remote(f"{images.as_uri()}/1.png")]))
        contents = [(images / name).read_bytes() for name in ("1.png", "3.png", "1.png")]
        assert read["bytes"].to_pylist() == contents
        odd = tmp_path / "odd"
        odd.mkdir()
        (odd / "a b#1%20?.png").write_bytes(b"1")
        (found,) = find_remote(odd.as_uri())
        assert (found.name, found.source) == ("a b#1%20?", f"file://{odd}/a b#1%20?.png")
        (read,) = _read_images(work_table([found]))
        assert (read["bytes"].to_pylist(), read["path"].to_pylist()) == ([b"1"], [found.source])
        with pytest.raises(ValueError, match="no address that can be opened"):
            find_remote("nothing://bucket/x")
        with pytest.raises(ValueError, match="cannot be listed"):
            find_remote(f"{tmp_path.as_uri()}/missing")

    def test_blocks_are_bounded(self, images, monkeypatch):
        monkeypatch.setattr(ray_jobs, "_BLOCK_BYTES", 1)
        blocks = list(_read_images(work_table(remote_images(images))))
        assert [block.num_rows for block in blocks] == [1, 1, 1, 1]


class TestStore:
    def write(self, output: Path, sources: list[str]) -> None:
        rows = [{**dict.fromkeys(row_schema().names), "source": source} for source in sources]
        _Store(str(output)).write("segments", pyarrow.Table.from_pylist(rows, schema=row_schema()))

    def test_going_on(self, tmp_path):
        output = tmp_path / "out"
        assert _Store(str(output)).begin({"model": "m", "tta_scales": (1, 2)}, True) == set()
        self.write(output, ["a", "b"])
        self.write(output, ["c"])
        half = output / "segments" / "part-half.parquet"
        half.write_bytes(next((output / "segments").glob("part-*")).read_bytes()[:-30])
        (output / "segments" / ".0a1b.partial-part-x.parquet").write_bytes(b"")
        (output / "failures").mkdir()
        (output / "failures" / "part-x.parquet").write_bytes(b"")
        found = _Store(str(output)).begin({"model": "m", "tta_scales": (1, 2)}, True)
        assert found == {ray_jobs.digest_of(source) for source in "abc"}
        assert not half.exists()
        assert len(list((output / "segments").iterdir())) == 2
        assert not list((output / "failures").iterdir())
        with pytest.raises(ValueError, match=r"other settings \(model was m, is n\); .* --no-resume"):
            _Store(str(output)).begin({"model": "n", "tta_scales": (1, 2)}, True)
        assert _Store(str(output)).begin({"model": "n"}, False) == set()
        assert not rows_of(output)

    def test_what_is_not_ours_is_refused(self, tmp_path):
        self.write(tmp_path / "out", ["a"])
        with pytest.raises(ValueError, match="holds segments, but no job"):
            _Store(str(tmp_path / "out")).begin({}, True)
        for content in ("{", '{"format": "x", "version": 1}', json.dumps({"format": ray_jobs.FORMAT, "version": 9})):
            (tmp_path / "out" / JOB_FILE).write_text(content)
            with pytest.raises(ValueError, match="--no-resume starts anew"):
                _Store(str(tmp_path / "out")).begin({}, True)
        (tmp_path / "out" / ".hf-segvit-job.jsonl").write_text("")
        with pytest.raises(ValueError, match="a job without --engine ray"), _Store(str(tmp_path / "out")).locked():
            pass

    def test_two_jobs(self, tmp_path):
        refused = pytest.raises(ValueError, match="another job is working on it")
        with _Store(str(tmp_path)).locked(), refused, _Store(str(tmp_path)).locked():
            pass
        with _Store(str(tmp_path)).locked():
            pass


class TestCommand:
    def run(self, capsys, model, source, output, *options) -> str:
        words = ["segment", source, "--output", output, "--model", model, *options]
        assert main([str(word) for word in words]) == 2
        return capsys.readouterr().err

    def test_clusters_that_are_not_there(self, model, images, tmp_path, capsys, monkeypatch):
        ray = ("--engine", "ray", "--address")
        for address, told in (
            ("nonsense", "no address of a Ray cluster; give HOST:PORT"),
            ("127.0.0.1:1", "no Ray cluster is there"),
            ("no-such-host.invalid:6379", "no Ray cluster is there"),
        ):
            assert told in self.run(capsys, model, images, tmp_path / "out", *ray, address)
        with socket.socket() as listener:  # has the port, and says nothing
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            monkeypatch.setattr(ray_jobs, "_PROBE_SECONDS", 0.5)
            address = f"127.0.0.1:{listener.getsockname()[1]}"
            error = self.run(capsys, model, images, tmp_path / "out", *ray, address)
        assert "does not answer as a Ray cluster within" in error
        assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_a_signal_ends_it_with_75(self, number, model, images, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(ray_jobs, "run_ray_job", lambda *_, **__: signal.raise_signal(number))
        words = ["segment", str(images), "--output", str(tmp_path / "out"), "--model", model, "--engine", "ray"]
        assert main(words) == 75
        assert f"stopped by {number.name}; the same command goes on with the rest" in capsys.readouterr().err

    def test_options_that_do_not_fit(self, model, images, tmp_path, capsys):
        for options, told in (
            (("--engine", "ray", "--outputs", "overlay"), "writes Parquet only"),
            (("--engine", "ray", "--compare", "--classifier", "x"), "writes Parquet only"),
            (("--actors", "2"), "--actors is for --engine ray"),
            (("--engine", "ray", "--actors", "0"), "--actors"),
        ):
            assert told in self.run(capsys, model, images, tmp_path / "out", *options)
        assert "only --engine ray writes to addresses" in self.run(capsys, model, images, "s3://bucket/x")
        assert "no images match" in self.run(capsys, model, tmp_path / "none", tmp_path / "out", "--engine", "ray")
        (tmp_path / "a.mp4").write_bytes(b"")
        error = self.run(capsys, model, tmp_path / "a.mp4", tmp_path / "out", "--engine", "ray")
        assert "takes no videos" in error
        (tmp_path / "of-ray").mkdir()
        (tmp_path / "of-ray" / JOB_FILE).write_text("{}")
        assert "a job with --engine ray" in self.run(capsys, model, images, tmp_path / "of-ray")

    @pytest.mark.parametrize("has", [{"CPU": 4.0}, {"CPU": 4.0, "GPU": 1.0}])
    def test_what_a_cluster_lacks(self, has, monkeypatch):
        import ray

        monkeypatch.setattr(ray, "cluster_resources", lambda: has)
        shares = ray_jobs._shares
        if "GPU" not in has:
            assert shares(ray_jobs.Resources(cpus=2), None) == (2, 0.0)
            for resources in (ray_jobs.Resources(device="cuda"), ray_jobs.Resources(gpus=0.5)):
                with pytest.raises(ValueError, match=r"the cluster at h:1 has no GPUs, only 4 CPUs; .* --device cpu"):
                    shares(resources, "h:1")
            with pytest.raises(ValueError, match="lower --gpus-per-actor or --cpus-per-actor"):
                shares(ray_jobs.Resources(cpus=5), None)
        else:
            assert shares(ray_jobs.Resources(), None) == (1, 1.0)
            assert shares(ray_jobs.Resources(gpus=0.25), None) == (4, 0.25)
            assert shares(ray_jobs.Resources(device="cpu"), None) == (4, 0.0)
            with pytest.raises(ValueError, match="too few for an actor with 2"):
                shares(ray_jobs.Resources(gpus=2), None)


# Three nodes; the third is killed, without warning, once the first file is written.
CLUSTER = """
import json, os, sys
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_health_check_period_ms"] = "500"
os.environ["RAY_health_check_failure_threshold"] = "4"
import ray
from ray.cluster_utils import Cluster
from hf_segvit.cli import main
from hf_segvit.inference import ray_jobs

images, model, output = sys.argv[1:]
node = {"num_cpus": 2, "num_gpus": 0, "object_store_memory": 200 * 2**20}
cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
nodes = [cluster.add_node(**node), cluster.add_node(**node)]
cluster.wait_for_nodes()
shares = ray_jobs._shares
run = ray_jobs.run_ray_job
killed = []

def killing(images, *arguments, told, **settings):
    def hears(counts, errors):
        if not killed:
            killed.append(counts.done)
            cluster.remove_node(nodes[1], allow_graceful=False)
        told(counts, errors)
    return run(images, *arguments, told=hears, **settings)

ray_jobs.run_ray_job = killing
words = ["segment", images, "--output", output, "--model", model, "--engine", "ray", "--address", cluster.address]
words += ["--rows-per-file", "25"]
codes = [main([*words, "--device", "cuda"]), main([*words, "--actors", "3"])]
ray_jobs.run_ray_job = run
codes.append(main([*words, "--actors", "1"]))
cluster.shutdown()
print(json.dumps({"codes": codes, "killed_after": killed}))
"""


@pytest.mark.slow
def test_a_node_dies_and_images_are_poisoned(model, tmp_path):
    images, output = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    for index in range(400):
        draw(images / f"{index:04}.png", index)
    poisoned = {"0123.png": b"no image", "0310.png": (images / "0310.png").read_bytes()[:60]}
    for name, content in poisoned.items():
        (images / name).write_bytes(content)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(hf_segvit.__file__).parents[1]), str(ROOT)])}
    process = subprocess.Popen(
        [sys.executable, "-c", CLUSTER, str(images), model, str(output)],
        env={**environment, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=900)
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
            left = True
        except ProcessLookupError:
            left = False
    assert process.returncode == 0, err[-3000:]
    told = json.loads(out.splitlines()[-1])
    assert told["codes"] == [2, 1, 1]
    assert "has no GPUs, only 6 CPUs" in err
    assert 0 < told["killed_after"][0] < 398
    assert f"398 of 400 images segmented; results in {output}" in out
    assert f"398 of 400 images segmented (398 of them before); results in {output}" in out
    done, failed = rows_of(output), rows_of(output, "failures")
    assert sorted(Path(row["path"]).name for row in failed) == sorted(poisoned)
    assert all(Path(row["path"]).name in row["error"] for row in failed)
    expected = sorted(str(path) for path in images.iterdir() if path.name not in poisoned)
    assert sorted(row["source"] for row in done) == expected
    some = sorted(done, key=lambda row: row["source"])[:20]
    again = RowSegmenter(model, device="cpu").rows([{"path": row["path"]} for row in some])
    assert [row["segments"] for row in some] == [row["segments"] for row in again]
    assert not left, "processes are left of the cluster"
