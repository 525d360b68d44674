"""Hostile images: damaged files, files that claim more than they hold, and what is no file at all."""

import os
import random
import socket
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hf_segvit import EoMTConfig, EoMTForUniversalSegmentation, EoMTImageProcessor
from hf_segvit.cli import main
from hf_segvit.data.archives import read_location
from hf_segvit.data.decoding import image_in_frame, upright_size
from hf_segvit.data.entries import image_pixels
from hf_segvit.data.mask_files import color_ids, index_map
from hf_segvit.drawing.segments import draw_segments
from hf_segvit.inference.input_files import find_images, output_names
from hf_segvit.inference.segmenter import NonFiniteOutputs, Segmenter
from hf_segvit.models.image_claims import claims_of
from hf_segvit.models.image_decoding import few_values, open_image, to_rgb
from hf_segvit.models.image_files import count_pages, open_image_file, orientation
from hf_segvit.models.image_tensors import image_tensor

from .image_attacks import attacks, gif, png, saved, sound_files

SOUND = sound_files()
READERS = {
    "open_image": lambda content: open_image(content, "bad.img"),
    "page 2": lambda content: open_image_file(content, "bad.img", page=1),
    "image_in_frame": lambda content: image_in_frame(content, "bad.img"),
    "image_pixels": lambda content: image_pixels(content, "bad.img"),
    "index_map": lambda content: index_map(content, "bad.img"),
    "color_ids": lambda content: color_ids(content, "bad.img"),
}


REMEDIES = ("save", "ask for", "pip install", "check", "split", "read it", "scale", "Save")


def read_by_all(content: bytes) -> None:
    """Every way to read an image gives pixels, or a `ValueError` that names the file and a remedy."""
    for name, read in READERS.items():
        try:
            read(content)
        except ValueError as error:
            text = str(error)
            assert text.startswith("bad.img: "), (name, text)
            assert any(word in text for word in ("again", "convert", *REMEDIES))
    count_pages(content)
    few_values(content)


@pytest.mark.parametrize("name", SOUND)
def test_sound_files_are_read_by_all(name: str) -> None:
    content = SOUND[name]
    with Image.open(BytesIO(content)) as image:
        frames = getattr(image, "n_frames", 1)
        expected = to_rgb(image)
    assert np.array_equal(np.asarray(open_image(content)), np.asarray(expected))
    assert count_pages(content) == frames


@pytest.mark.parametrize("name", SOUND)
def test_files_that_end_anywhere(name: str) -> None:
    content = SOUND[name]
    step = max(1, len(content) // 25)
    for length in [*range(1, min(len(content), 40), 3), *range(40, len(content), step)]:
        read_by_all(content[:length])


def damaged(content: bytes, generator: random.Random) -> bytes:
    """A file with some of its bytes changed, removed or doubled, more often near its start."""
    changed = bytearray(content)
    for _ in range(generator.choice((1, 1, 2, 4, 8))):
        end = len(changed) if generator.random() < 0.5 else min(len(changed), 120)
        place = generator.randrange(end)
        kind = generator.random()
        if kind < 0.7:
            changed[place] = generator.choice((0, 1, 0x7F, 0x80, 0xFF, generator.randrange(256)))
        elif kind < 0.85:
            del changed[place : place + generator.randrange(1, 9)]
        else:
            changed[place:place] = changed[place : place + generator.randrange(1, 40)]
        if not changed:
            return b"\0"
    return bytes(changed)


def fuzz(name: str, count: int, seed: int) -> None:
    generator = random.Random(f"{name} {seed}")
    for _ in range(count):
        read_by_all(damaged(SOUND[name], generator))


@pytest.mark.parametrize("name", SOUND)
def test_damaged_bytes(name: str) -> None:
    fuzz(name, 25, 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", SOUND)
def test_damaged_bytes_by_thousands(name: str) -> None:
    fuzz(name, 600, 1)


LIMITED = """
import resource, sys, time
from pathlib import Path
import hf_segvit.data.entries, hf_segvit.data.mask_files
from tests.hostile.test_images import READERS
from hf_segvit.models.image_files import count_pages
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + 900 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
for path in sorted(Path(sys.argv[1]).iterdir()):
    content = path.read_bytes()
    for name, read in READERS.items():
        if name == "page 2" and count_pages(content) < 2:
            continue
        start = time.process_time()
        try:
            read(content)
            print(path.name, name, "read")
        except ValueError as error:
            assert "not enough memory" not in str(error), (path, name, error)
            print(path.name, name, str(error)[:160])
        assert time.process_time() - start < 10, (path, name)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and resource limits")
def test_small_files_that_claim_much_take_little(tmp_path: Path) -> None:
    """Within 900 MB above what the imports take, and without ever running out of it."""
    files = attacks()
    for name, content in files.items():
        assert len(content) < 2**20, (name, len(content))
        (tmp_path / name).write_bytes(content)
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root / 'src'}{os.pathsep}{root}", "OMP_NUM_THREADS": "1"}
    environment.pop("HF_SEGVIT_MAX_PIXELS", None)
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    read = [line for line in done.stdout.splitlines() if line.endswith(" read")]
    assert not read, read
    assert len(done.stdout.splitlines()) >= 5 * len(files)


def test_limits_are_for_small_files_only(monkeypatch: pytest.MonkeyPatch) -> None:
    blank = png(9000, 9000, color=0)
    with pytest.raises(ValueError, match=r"a\.png: 9000x9000 pixels in a file of only [\d,]+ bytes.*--max-pixels"):
        open_image_file(blank, "a.png")
    monkeypatch.setenv("HF_SEGVIT_MAX_PIXELS", "100000000")
    assert open_image_file(blank, "a.png").size == (9000, 9000)
    monkeypatch.delenv("HF_SEGVIT_MAX_PIXELS")
    assert open_image_file(png(8192, 8192, color=0), "a.png").size == (8192, 8192)
    with pytest.raises(ValueError, match="on 300 pages in a file of only"):
        open_image_file(gif(2000, 2000, 300), "a.gif")
    assert claims_of(gif(20, 30, 7)).pages == 7


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation_is_as_pillow_reads_it(form: str, turn: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    noise = Image.fromarray(np.random.default_rng(turn).integers(0, 256, (8, 16, 3), dtype=np.uint8))
    content = saved(noise, form, exif=exif)
    with Image.open(BytesIO(content)) as image:
        assert orientation(image) == turn
    size = (16, 8) if turn >= 5 else (8, 16)
    path_size = np.asarray(open_image(content)).shape[:2]
    assert path_size == size


class TestNoRegularFiles:
    @pytest.fixture
    def things(self, tmp_path: Path) -> dict[str, Path]:
        """What is no image file, by kind."""
        found = {"folder": tmp_path / "folder.png", "device": Path("/dev/zero")}
        found["folder"].mkdir()
        if hasattr(os, "mkfifo"):
            found["pipe"] = tmp_path / "pipe.png"
            os.mkfifo(found["pipe"])
        if sys.platform == "linux":
            found["socket"] = tmp_path / "socket.png"
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(str(found["socket"]))
        return {kind: path for kind, path in found.items() if path.exists()}

    def test_are_refused_without_waiting(self, things: dict[str, Path]) -> None:
        for kind, path in things.items():
            for read in (
                open_image,
                image_tensor,
                lambda file: read_location({"archive": None, "member": str(file)}),
                lambda file: upright_size({"archive": None, "member": str(file)}),
            ):
                with pytest.raises(ValueError, match=r"(is a folder|is a pipe, socket or device)"):
                    read(path)
            assert count_pages(path) == 1, kind

    def test_segment_reports_one_that_became_a_pipe(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        if not hasattr(os, "mkfifo"):
            pytest.skip("no named pipes here")
        images = photos(tmp_path / "images", "a.png", "b.png")

        def found_then_replaced(*arguments):
            found = find_images(*arguments)
            (images / "a.png").unlink()
            os.mkfifo(images / "a.png")
            return found

        monkeypatch.setattr("hf_segvit.cli.segment.find_images", found_then_replaced)
        assert segment(images, tmp_path) == 1
        captured = capsys.readouterr()
        assert "a.png: is a pipe, socket or device" in captured.err
        assert "1 of 2 images segmented" in captured.out

    @pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read anything")
    def test_unreadable_is_not_missing(self, tmp_path: Path) -> None:
        path = photos(tmp_path, "a.png") / "a.png"
        path.chmod(0)
        with pytest.raises(ValueError, match=r"a\.png: not readable: permission denied"):
            open_image(path)

    def test_unreadable_by_any_user(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refused(*_):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("hf_segvit.models.regular_files.os.open", refused)
        with pytest.raises(ValueError, match=r"a\.png: not readable: permission denied; check its permissions"):
            open_image(photos(tmp_path, "a.png") / "a.png")

    def test_names_with_nul(self) -> None:
        with pytest.raises(ValueError, match="holds a NUL character"):
            open_image("a\0.png")


def photos(folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for name in names:
        Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(folder / name, "PNG")
    return folder


def tiny(folder: Path, task: str = "semantic", names: tuple[str, str] = ("soil", "crop"), **changes: float) -> Path:
    """A tiny model; `changes` set all values of a parameter."""
    torch.manual_seed(0)
    config = EoMTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        patch_size=16,
        image_size=64,
        num_queries=5,
        num_query_layers=1,
        id2label=dict(enumerate(names)),
    )
    model = EoMTForUniversalSegmentation(config)
    with torch.no_grad():
        for name, value in changes.items():
            model.get_submodule(name).bias.fill_(value)
    model.save_pretrained(folder)
    EoMTImageProcessor(task=task, size=64, num_labels=2, overlap_mask_area_threshold=0.0).save_pretrained(folder)
    return folder


def segment(images: Path, folder: Path, *options: str, model: Path | None = None) -> int:
    model = model or tiny(folder / "model")
    words = ["segment", images, "--model", model, "--output", folder / "out", "--device", "cpu", *options]
    return main([str(word) for word in words])


class TestOutputsThatAreNotFinite:
    """The weights are finite, and overflow only when the model runs."""

    @pytest.mark.parametrize("task", ["semantic", "panoptic", "instance"])
    def test_segment_says_it_for_each_image(
        self, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        images = photos(tmp_path / "images", "a.png", "b.png", "c.png")
        model = tiny(tmp_path / "model", task)
        forward = EoMTForUniversalSegmentation.forward
        calls = []

        def overflowing(self, *args, **kwargs):
            outputs = forward(self, *args, **kwargs)
            calls.append(1)
            if len(calls) == 2:
                outputs.class_queries_logits[0, 0, 0] = torch.inf
            return outputs

        monkeypatch.setattr(EoMTForUniversalSegmentation, "forward", overflowing)
        assert segment(images, tmp_path, model=model) == 1
        captured = capsys.readouterr()
        assert "b.png: the model answers NaN or infinity instead of numbers" in captured.err
        assert "2 of 3 images segmented" in captured.out
        assert not (tmp_path / "out" / "b.segments.json").exists()

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    @pytest.mark.parametrize("name", ["class_queries_logits", "masks_queries_logits"])
    def test_all_kinds_are_refused(self, name: str, value: float, tmp_path: Path, monkeypatch) -> None:
        segmenter = Segmenter.from_pretrained(str(tiny(tmp_path / "model")), device="cpu")
        forward = segmenter.model.forward

        def overflowing(*args, **kwargs):
            outputs = forward(*args, **kwargs)
            outputs[name][0, 0] = value
            return outputs

        monkeypatch.setattr(segmenter.model, "forward", overflowing)
        with pytest.raises(NonFiniteOutputs):
            segmenter([Image.new("RGB", (60, 40))])

    def test_evaluate_refuses_to_score(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        data = tmp_path / "data"
        for split in ("train", "val"):
            (data / "images" / split).mkdir(parents=True)
            (data / "annotations" / split).mkdir(parents=True)
            photos(data / "images" / split, "first.png", "second.png")
            for name in ("first.png", "second.png"):
                mask = np.zeros((40, 60), np.uint8)
                mask[:, 30:] = 1
                Image.fromarray(mask).save(data / "annotations" / split / name)
        (data / "classes.json").write_text('["soil", "crop"]')
        forward = EoMTForUniversalSegmentation.forward

        def overflowing(self, *args, **kwargs):
            outputs = forward(self, *args, **kwargs)
            outputs.masks_queries_logits[:] = torch.nan
            return outputs

        monkeypatch.setattr(EoMTForUniversalSegmentation, "forward", overflowing)
        model = tiny(tmp_path / "model")
        assert main(["evaluate", "--model", str(model), "--data", f"mask_folder:{data}", "--device", "cpu"]) == 2
        captured = capsys.readouterr()
        assert "first" in captured.err
        assert "answers NaN or infinity" in captured.err
        assert "miou" not in captured.out.lower()


class TestMemory:
    def test_one_image_too_large_is_named_and_the_next_goes_on(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        images = photos(tmp_path / "images", "b.png")
        Image.new("RGB", (3000, 2000)).save(images / "a.png")
        model = tiny(tmp_path / "model", "panoptic")
        monkeypatch.setattr("hf_segvit.inference.memory.available_memory", lambda: 100_000_000)
        assert segment(images, tmp_path, model=model) == 1
        captured = capsys.readouterr()
        assert "a.png: " in captured.err
        assert "needs about 0.3 GB, but 0.1 GB of memory are free" in captured.err
        assert "1 of 2 images segmented" in captured.out

    @pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you")])
    def test_memory_that_runs_out_costs_one_image(
        self, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        images = photos(tmp_path / "images", "a.png", "b.png", "c.png")
        model, post_process, calls = tiny(tmp_path / "model"), Segmenter.post_process, []

        def failing(self, asked, *args, **kwargs):
            calls.append(1)
            if len(asked.sizes) > 1 or len(calls) == 3:
                raise error
            return post_process(self, asked, *args, **kwargs)

        monkeypatch.setattr(Segmenter, "post_process", failing)
        assert segment(images, tmp_path, "--batch-size", "3", model=model) == 1
        captured = capsys.readouterr()
        assert "b.png: the memory of cpu does not suffice" in captured.err
        assert "2 of 3 images segmented" in captured.out

    def test_a_line_is_not_cut_into_thousands_of_windows(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        images = photos(tmp_path / "images", "b.png")
        Image.new("RGB", (60_000, 20)).save(images / "a.png")
        assert segment(images, tmp_path) == 1
        captured = capsys.readouterr()
        assert "a.png: " in captured.err
        assert "1 of 2 images segmented" in captured.out


class TestNames:
    @pytest.mark.parametrize("stem", ["x" * 251, "漢" * 83])
    def test_long_ones_are_shortened_and_said(
        self, stem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        images = photos(tmp_path / "images", f"{stem}.png", f"{stem[:-1]}y.png")
        assert segment(images, tmp_path) == 0
        assert capsys.readouterr().err.count("its name is too long for results") == 2
        written = list((tmp_path / "out").glob("*.segments.json"))
        assert len(written) == 2
        assert all(path.name.startswith(stem[:40]) for path in written)

    def test_shortened_names_stay_unique(self) -> None:
        paths = [Path(f"{'a' * 220}{index}.png") for index in range(50)]
        names = output_names(paths)
        assert len(set(names)) == 50
        assert max(len(name) for name in names) <= 200

    def test_a_folder_with_the_name_of_a_result(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        images = photos(tmp_path / "images", "a.png", "b.png", "c.png")
        (tmp_path / "out" / "b.overlay.png").mkdir(parents=True)
        (tmp_path / "out" / "c.segments.json").mkdir()
        assert segment(images, tmp_path) == 1
        captured = capsys.readouterr()
        assert captured.err.count("it is a folder; move it") == 2
        assert "1 of 3 images segmented" in captured.out
        assert (tmp_path / "out" / "a.segments.json").is_file()

    def test_nothing_reaches_the_terminal_raw(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        bad = "a\x1b[2J\u202egnp\r\x07"
        images = photos(tmp_path / "images", f"{bad}.png")
        (images / f"damaged{bad}.png").write_bytes(b"\x89PNG\r\n\x1a\n")
        model = tiny(tmp_path / "model", names=(f"soil{bad}", f"crop{bad}"))
        assert segment(images, tmp_path, f"--font={tmp_path / bad}", model=model) == 2
        assert segment(images, tmp_path, model=model) == 1
        captured = capsys.readouterr()
        for text in (captured.out, captured.err):
            assert not set(text.replace("\x1b[A", "")) & {"\x1b", "\u202e", "\x07"}
        assert "damaged" in captured.err
        assert r"\x1b[2J\u202egnp\r\x07" in captured.err

    def test_drawing_of_endless_names_and_many_segments(self) -> None:
        names = {index: ("word " * 20_000 if index % 2 else "漢" * 100_000) for index in range(4)}
        ids = np.arange(90 * 90).reshape(90, 90).repeat(3, 0).repeat(3, 1)
        rows = [{"id": index, "label_id": index % 4} for index in range(90 * 90)]
        drawn = draw_segments(Image.new("RGB", (270, 270)), ids, rows, names)
        assert drawn.size == (270, 270)
        assert len(drawn.getcolors(100_000)) > 100


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs wait4")
@pytest.mark.parametrize("task", ["semantic", "panoptic", "instance"])
def test_segment_takes_under_a_gigabyte_and_a_half(task: str, tmp_path: Path) -> None:
    """Whatever small files say, the whole process stays small, and the sound one among them is segmented."""
    images = photos(tmp_path / "images", "sound.png")
    for name, content in {**attacks(), "largest.png": png(4096, 4096)}.items():
        (images / name).write_bytes(content)
    model = tiny(tmp_path / "model", task)
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    options = [] if task == "semantic" else ["--threshold", "0"]
    words = [str(images), "--model", str(model), "--output", str(tmp_path / "out"), "--device", "cpu", *options]
    with (tmp_path / "log").open("w") as log:
        child = subprocess.Popen([sys.executable, "-m", "hf_segvit", "segment", *words], env=environment, stderr=log)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    said = (tmp_path / "log").read_text()
    assert child.returncode == 1, said
    assert usage.ru_maxrss * 1024 < 1.5 * 2**30
    assert usage.ru_utime + usage.ru_stime < 60
    assert {path.name for path in (tmp_path / "out").glob("*.segments.json")} == {
        "sound.segments.json",
        "largest.segments.json",
    }
    for name in attacks():
        assert name in said
