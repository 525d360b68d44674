"""Jobs of `hf-segvit segment`: the pipeline keeps order, and a job goes on after whatever ended it."""

import json
import os
import signal
import subprocess
import sys
import threading
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import hf_segvit
from hf_segvit import EoMTImageProcessor, Segmenter
from hf_segvit.cli import main
from hf_segvit.inference.input_files import ImageFile
from hf_segvit.inference.jobs import Job, Shard, manifests, read_lines
from hf_segvit.inference.pipeline import Encoded, Steps, run_pipeline
from hf_segvit.inference.segmented_image import ImageFault
from hf_segvit.inference.segmenter import NonFiniteOutputs, refuse_non_finite

from .tiny_models import tiny_eomt


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "panoptic"
    eomt = tiny_eomt(num_queries=9)
    with torch.no_grad():
        eomt.class_predictor.weight *= 4
    eomt.save_pretrained(folder)
    settings = {"threshold": 0.3, "overlap_mask_area_threshold": 0.05, "stuff_classes": [4]}
    EoMTImageProcessor(task="panoptic", size={"height": 64, "width": 64}, **settings).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for index in range(12):
        draw(folder / f"{index:02}.png", index)
    return folder


def draw(path: Path, seed: int, size: tuple[int, int] = (48, 64)) -> None:
    blocks = np.random.default_rng(seed).integers(0, 256, (size[0] // 8, size[1] // 8, 3), dtype=np.uint8)
    Image.fromarray(blocks.repeat(8, 0).repeat(8, 1)).save(path)


def segment(images, output, model, *options) -> int:
    words = ["segment", images, "--output", output, "--model", model, "--device", "cpu", *options]
    return main([str(word) for word in words])


def contents(folder: Path) -> dict[str, bytes]:
    """All results of a job by name; the manifest is left out."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".hf-segvit-job")}


def recorded(folder: Path) -> list[str]:
    lines = [line for path in manifests(folder) for line in read_lines(path)]
    return [Path(line["source"]).name for line in lines if "name" in line]


class TestPipeline:
    def steps(self, finish, load=None):
        return Steps(
            load or (lambda item: Encoded(item, 1)),
            lambda item, content: np.full((8, 8, 3), content, np.uint8),
            finish,
            lambda item: f"number {item}",
        )

    def test_order_is_kept_whichever_is_finished_first(self, model):
        segmenter = Segmenter.from_pretrained(str(model), device="cpu")
        second_done = threading.Event()

        def finish(item, image, answer, before):
            if item == 0:
                assert second_done.wait(60)
            if item == 1:
                second_done.set()
            return item, int(image[0, 0, 0]), answer.segment_map.shape

        for batch_size in (1, 3):
            second_done.clear()
            outcomes = list(run_pipeline(segmenter, range(10), self.steps(finish), batch_size=batch_size, writers=3))
            assert [outcome.item for outcome in outcomes] == list(range(10))
            assert [outcome.value for outcome in outcomes] == [(i, i, (8, 8)) for i in range(10)]

    def test_few_are_in_flight_and_failures_cost_one_image(self, model):
        segmenter = Segmenter.from_pretrained(str(model), device="cpu")
        taken = []

        def finish(item, image, answer, before):
            if item == 4:
                raise ImageFault("number 4: no")
            return item

        def load(item):
            if item == 7:
                raise OSError("gone")
            return Encoded(item, 1)

        def items():
            for item in range(100):
                taken.append(item)
                yield item

        most, failures = 0, {}
        for done, outcome in enumerate(
            run_pipeline(segmenter, items(), self.steps(finish, load), workers=2, writers=2)
        ):
            most = max(most, len(taken) - done)
            if outcome.error is not None:
                failures[outcome.item] = str(outcome.error)
        assert done == 99
        assert most <= 12
        assert failures == {4: "number 4: no", 7: "number 7: gone"}

    def test_a_source_that_breaks_off_is_told_after_what_it_gave(self, model):
        segmenter = Segmenter.from_pretrained(str(model), device="cpu")

        def items():
            yield from range(5)
            raise ValueError("the archive ends here")

        outcomes = run_pipeline(segmenter, items(), self.steps(lambda item, *_: item))
        assert [next(outcomes).value for _ in range(5)] == [0, 1, 2, 3, 4]
        with pytest.raises(ValueError, match="the archive ends here"):
            next(outcomes)

    def test_an_error_of_a_writer_ends_it_after_what_was_before(self, model):
        segmenter = Segmenter.from_pretrained(str(model), device="cpu")

        def finish(item, *_):
            if item == 3:
                raise ValueError("the disk is full")
            return item

        outcomes = run_pipeline(segmenter, range(50), self.steps(finish))
        assert [next(outcomes).value for _ in range(3)] == [0, 1, 2]
        with pytest.raises(ValueError, match="the disk is full"):
            next(outcomes)


class TestResuming:
    def test_what_is_complete_is_left_out_and_what_changed_is_not(self, model, images, tmp_path, capsys):
        mine, output = tmp_path / "mine", tmp_path / "out"
        mine.mkdir()
        for path in images.iterdir():
            (mine / path.name).write_bytes(path.read_bytes())
        assert segment(mine, output, model) == 0
        first = contents(output)
        assert segment(mine, output, model) == 0
        assert "12 of 12 images segmented (12 of them before)" in capsys.readouterr().out
        draw(mine / "03.png", 99)
        os.utime(mine / "03.png", ns=(1, 1))
        (output / "05.segments.json").unlink()  # not the presence of files decides
        assert segment(mine, output, model) == 0
        assert "(11 of them before)" in capsys.readouterr().out
        changed = {name for name, content in contents(output).items() if content != first[name]}
        assert changed
        assert {name.partition(".")[0] for name in changed} == {"03"}
        assert segment(mine, output, model, "--no-resume") == 0
        assert "12 of 12 images segmented;" in capsys.readouterr().out
        assert "05.segments.json" in contents(output)

    @pytest.mark.parametrize(
        "moment",
        [pytest.param("before", marks=pytest.mark.slow), "half a line", pytest.param("after", marks=pytest.mark.slow)],
    )
    def test_a_kill_loses_what_was_in_flight_and_nothing_else(self, moment, model, images, tmp_path, capsys):
        """SIGKILL while the sixth image is recorded."""
        code = f"""
import os, signal, sys
from hf_segvit.cli import main
from hf_segvit.inference.input_files import ImageFile
from hf_segvit.inference.jobs import Job
record, count = Job.record, []

def killed(self, source, version, row):
    count.append(1)
    if len(count) == 6:
        if {moment!r} == "half a line":
            self._file.write(b'{{"source": "/half')
            self._file.flush()
        elif {moment!r} == "after":
            record(self, source, version, row)
        os.kill(os.getpid(), signal.SIGKILL)
    record(self, source, version, row)

Job.record = killed
main(sys.argv[1:])
"""
        words = ["segment", images, "--output", tmp_path / "out", "--model", model, "--device", "cpu"]
        environment = {**os.environ, "PYTHONPATH": str(Path(hf_segvit.__file__).parents[1])}
        done = subprocess.run([sys.executable, "-c", code, *map(str, words)], env=environment, check=False)
        assert done.returncode == -signal.SIGKILL
        before = 6 if moment == "after" else 5
        assert recorded(tmp_path / "out") == [f"{index:02}.png" for index in range(before)]
        assert segment(images, tmp_path / "out", model) == 0
        assert f"12 of 12 images segmented ({before} of them before)" in capsys.readouterr().out
        assert sorted(recorded(tmp_path / "out")) == [f"{index:02}.png" for index in range(12)]
        assert segment(images, tmp_path / "undisturbed", model) == 0
        # What a killed writer was at is beside its destination, never in it.
        left = {name: text for name, text in contents(tmp_path / "out").items() if ".partial" not in name}
        assert left == contents(tmp_path / "undisturbed")

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_a_signal_ends_it_with_75_and_the_same_command_goes_on(
        self, number, model, images, tmp_path, capsys, monkeypatch
    ):
        record, count = Job.record, []

        def signalled(self, *arguments):
            record(self, *arguments)
            count.append(1)
            if len(count) == 2:
                signal.raise_signal(number)

        monkeypatch.setattr(Job, "record", signalled)
        many = tmp_path / "many"
        many.mkdir()
        for index in range(60):
            draw(many / f"{index:02}.png", index)
        assert segment(many, tmp_path / "out", model) == 75
        printed = capsys.readouterr()
        assert f"stopped by {number.name}; the same command goes on with the rest" in printed.err
        assert 2 < len(count) < 60
        assert len(recorded(tmp_path / "out")) == len(count) == len(list((tmp_path / "out").glob("*.segments.json")))
        assert segment(many, tmp_path / "out", model) == 0
        assert len(recorded(tmp_path / "out")) == 60

    def test_a_full_disk_ends_it_and_it_goes_on(self, model, images, tmp_path, capsys, monkeypatch):
        from hf_segvit.inference import segmented_image

        written = segmented_image.write_json

        def full(path, content):
            if path.name == "04.segments.json":
                raise ValueError(f"cannot write {path}: No space left on device; check its folder and the disk")
            written(path, content)

        monkeypatch.setattr(segmented_image, "write_json", full)
        assert segment(images, tmp_path / "out", model) == 2
        assert "No space left on device" in capsys.readouterr().err
        assert recorded(tmp_path / "out") == ["00.png", "01.png", "02.png", "03.png"]
        monkeypatch.undo()
        assert segment(images, tmp_path / "out", model) == 0
        assert "(4 of them before)" in capsys.readouterr().out

    def test_other_settings_are_refused_by_name(self, model, images, tmp_path, capsys):
        assert segment(images / "00.png", tmp_path / "out", model, "--threshold", "0.3") == 0
        for options, told in (
            (("--threshold", "0.4"), "threshold was 0.3, is 0.4"),
            (("--threshold", "0.3", "--task", "semantic"), "threshold=0.3: in semantic"),
            (("--task", "semantic"), "task was panoptic, is semantic"),
            (("--threshold", "0.3", "--outputs", "json"), "outputs was None, is ['json']"),
        ):
            capsys.readouterr()
            assert segment(images / "01.png", tmp_path / "out", model, *options) == 2
            assert told in capsys.readouterr().err
        other = tiny_eomt(num_queries=9)
        other.save_pretrained(tmp_path / "other")
        Segmenter.from_pretrained(str(model), device="cpu").processor.save_pretrained(tmp_path / "other")
        with torch.no_grad():
            other.class_predictor.bias += 1
        other.save_pretrained(tmp_path / "other")
        assert segment(images / "01.png", tmp_path / "out", tmp_path / "other", "--threshold", "0.3") == 2
        error = capsys.readouterr().err
        assert "weights was" in error
        assert "--no-resume" in error
        assert "01.segments.json" not in contents(tmp_path / "out")

    def test_two_jobs_in_one_folder(self, model, images, tmp_path, capsys):
        (tmp_path / "out").mkdir()
        with Job(tmp_path / "out"):
            assert segment(images, tmp_path / "out", model) == 2
            assert "another job is working on it" in capsys.readouterr().err
            assert segment(images, tmp_path / "out", model, "--shard", "1/2") == 2
            assert "another job is working in it" in capsys.readouterr().err
        with Job(tmp_path / "out", Shard(1, 2)):
            assert segment(images, tmp_path / "out", model, "--shard", "1/2") == 2
            assert segment(images, tmp_path / "out", model, "--shard", "2/3") == 2
            assert segment(images, tmp_path / "out", model) == 2
            assert segment(images, tmp_path / "out", model, "--shard", "2/2") == 0

    def test_a_damaged_manifest_is_named(self, tmp_path):
        with Job(tmp_path) as job:
            job.begin({"model": "m"})
            job.record("a", "1-1", {"name": "a"})
        path = manifests(tmp_path)[0]
        path.write_text(path.read_text().replace('"source"', '"sauce"'))
        with pytest.raises(ValueError, match=r"line 2: damaged; --no-resume starts anew"):
            Job(tmp_path)
        path.write_text(json.dumps({"format": "hf-segvit job", "version": 2, "settings": {}}) + "\n")
        with pytest.raises(ValueError, match="is of another version"):
            Job(tmp_path)


class TestShards:
    def test_parts_are_disjoint_and_complete_wherever_the_folder_is(self):
        names = [f"folder/{index}.jpg" for index in range(2000)]
        parts = [{name for name in names if Shard(index, 7).has(name)} for index in range(1, 8)]
        assert sorted(name for part in parts for name in part) == sorted(names)
        assert min(map(len, parts)) > 200
        # Never another rule: machines of several versions may share a list.
        assert [name for name in names[:10] if Shard(2, 3).has(name)] == EXPECTED_OF_SECOND_THIRD

    def test_shards_make_one_whole(self, model, images, tmp_path, capsys):
        for index in (1, 2, 3):
            assert segment(images, tmp_path / "out", model, "--shard", f"{index}/3") == 0
        assert segment(images, tmp_path / "whole", model) == 0
        assert contents(tmp_path / "out") == contents(tmp_path / "whole")
        capsys.readouterr()
        assert segment(images, tmp_path / "out", model) == 0
        assert "(12 of them before)" in capsys.readouterr().out

    @pytest.mark.parametrize(("text", "told"), [("0/3", "out of range"), ("4/3", "out of range"), ("1", "give I/N")])
    def test_out_of_range(self, text, told, model, images, tmp_path, capsys):
        assert segment(images, tmp_path / "out", model, "--shard", text) == 2
        assert told in capsys.readouterr().err


EXPECTED_OF_SECOND_THIRD = ["folder/0.jpg", "folder/5.jpg", "folder/6.jpg"]


def test_outputs_are_chosen(model, images, tmp_path, capsys):
    options = ("--outputs", "overlay,json", "--overlay-format", "jpg", "--no-labels")
    assert segment(images / "00.png", tmp_path / "out", model, *options) == 0
    assert sorted(contents(tmp_path / "out")) == ["00.overlay.jpg", "00.segments.json"]
    expected = BytesIO()
    Segmenter.from_pretrained(str(model), device="cpu")(images / "00.png").plot(labels=False).save(
        expected, "JPEG", quality=90
    )
    assert (tmp_path / "out" / "00.overlay.jpg").read_bytes() == expected.getvalue()
    assert segment(images / "00.png", tmp_path / "none", model, "--outputs", "jsn") == 2
    assert "there is no 'jsn'; did you mean json" in capsys.readouterr().err


def test_a_file_that_changes_while_it_is_read(model, tmp_path, capsys, monkeypatch):
    mine = tmp_path / "a.png"
    draw(mine, 1)
    read = ImageFile.read

    def changing(self):
        content = read(self)
        os.utime(mine, ns=(5, 5))
        return content

    monkeypatch.setattr(ImageFile, "read", changing)
    assert segment(mine, tmp_path / "out", model) == 1
    assert "a.png: changed while it was read" in capsys.readouterr().err
    monkeypatch.undo()
    assert segment(mine, tmp_path / "out", model) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_logits_that_are_no_numbers_are_told_from_large_ones(dtype):
    masks = torch.full((3, 4, 200, 200), torch.finfo(dtype).max / 2, dtype=dtype)  # their sum is no number
    outputs = SimpleNamespace(class_queries_logits=torch.zeros(3, 4, 5), masks_queries_logits=masks)
    refuse_non_finite(outputs)
    for value in (torch.nan, torch.inf, -torch.inf):
        masks[1, 2, 100, 3] = value
        with pytest.raises(NonFiniteOutputs, match="for 1 of 3 inputs"):
            refuse_non_finite(outputs)
