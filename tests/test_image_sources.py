"""Sources of `hf-segvit segment`: whatever holds an image, the results are those of the image as a file."""

import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from hf_segvit.inference import containers
from hf_segvit.inference.input_files import find_images

from .test_bulk_segmentation import contents, draw, model, segment  # noqa: F401

NAMES = ("a.png", "deep/b.png", "c.png")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images") / "set"
    (folder / "deep").mkdir(parents=True)
    for seed, name in enumerate(NAMES):
        draw(folder / name, seed)
    return folder


def tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def container(kind: str, images: Path, folder: Path) -> str:
    """The images in a container called `set`, with things that are no images."""
    files = {name: (images / name).read_bytes() for name in NAMES}
    if kind == "zip":
        with zipfile.ZipFile(folder / "set.zip", "w") as archive:
            for name, content in {**files, "notes.txt": b"no image", "__MACOSX/._a.png": b"x"}.items():
                archive.writestr(name, content)
    elif kind == "tar":
        tar(folder / "set.tar", {**files, "a.json": b"{}"})
    elif kind == "parquet":
        rows = [{"bytes": content, "path": name} for name, content in files.items()]
        table = pyarrow.table({"label": [1, 2, 3], "image": rows})
        parquet.write_table(table, folder / "set.parquet", row_group_size=2)
    return str(folder / f"set.{kind}")


@pytest.mark.parametrize("kind", ["zip", "tar", "parquet"])
def test_containers_are_read_in_place(kind, model, images, tmp_path, capsys):  # noqa: F811
    source = container(kind, images, tmp_path)
    assert segment(source, tmp_path / "out", model, "--outputs", "panoptic,overlay") == 0
    assert segment(images, tmp_path / "expected", model, "--outputs", "panoptic,overlay") == 0
    assert contents_below(tmp_path / "out" / "set") == contents_below(tmp_path / "expected")
    capsys.readouterr()
    assert segment(tmp_path / f"*.{kind}", tmp_path / "out", model, "--outputs", "panoptic,overlay") == 0
    assert "3 of 3 images segmented (3 of them before)" in capsys.readouterr().out


def contents_below(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_parquet_with_paths_or_plain_bytes(model, images, tmp_path, capsys):  # noqa: F811
    parquet.write_table(pyarrow.table({"path": list(NAMES)}), images / "paths.parquet")
    table = pyarrow.table({"jpg": [(images / name).read_bytes() for name in NAMES]})
    parquet.write_table(table, tmp_path / "plain.parquet")
    expected = [(images / name).read_bytes() for name in NAMES]
    for source in (images / "paths.parquet", tmp_path / "plain.parquet"):
        found, _ = find_images([str(source)])
        assert [file.read() for file in found] == expected
        assert [str(file.relative_path) for file in found] == [f"{source.stem}/row-0000000{row}" for row in range(3)]
    (images / "paths.parquet").unlink()
    parquet.write_table(pyarrow.table({"number": [1]}), tmp_path / "none.parquet")
    with pytest.raises(ValueError, match=r"no column of images among number"):
        find_images([str(tmp_path / "none.parquet")])
    (tmp_path / "text.parquet").write_text("no table")
    with pytest.raises(ValueError, match="not a readable Parquet file"):
        find_images([str(tmp_path / "text.parquet")])


def test_data_sets(images, tmp_path):
    import datasets

    rows = {"image": [str(images / name) for name in NAMES], "label": [0, 1, 2]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    dataset = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"val": dataset}).save_to_disk(tmp_path / "stored")
    found, empty = find_images([f"dataset:{tmp_path / 'stored'}@val"])
    assert not empty
    for file, name in zip(found, NAMES, strict=True):
        assert file.read() == (images / name).read_bytes()
    with pytest.raises(ValueError, match="there are val"):
        find_images([f"dataset:{tmp_path / 'stored'}@train"])


def test_lists(images, tmp_path):
    listed = tmp_path / "list.txt"
    listed.write_text(f"{images / 'a.png'}\n\n{images / 'deep'}\nnowhere.png\n")
    for patterns, stdin in (([f"@{listed}"], None), (["-"], io.StringIO(listed.read_text()))):
        found, empty = find_images(patterns, stdin)
        assert [str(file.relative_path) for file in found] == ["a.png", "b.png"]
        assert empty == ["nowhere.png"]
    with pytest.raises(ValueError, match="the list cannot be read"):
        find_images([f"@{tmp_path / 'none.txt'}"])
    (tmp_path / "binary").write_bytes(b"\0\1\n")
    with pytest.raises(ValueError, match="no list of paths"):
        find_images([f"@{tmp_path / 'binary'}"])


class TestBadArchives:
    def test_one_that_ends_early(self, images, tmp_path):
        path = Path(container("tar", images, tmp_path))
        whole = path.read_bytes()
        path.write_bytes(whole[:600])
        with pytest.raises(ValueError, match=r"ends early, within a\.png|not a whole tar archive"):
            find_images([str(path)])
        path.write_bytes(whole)
        found, _ = find_images([str(path)])
        path.write_bytes(whole[:600])  # between listing and reading
        with pytest.raises(ValueError, match="the archive ends early"):
            found[0].read()

    def test_names_that_leave_it_and_bombs(self, tmp_path, monkeypatch):
        for name in ("/etc/a.png", "../a.png"):
            with pytest.raises(ValueError, match="outside the archive"):
                find_images([str(tar(tmp_path / "x.tar", {name: b"1"}))])
        monkeypatch.setattr(containers, "MAX_IMAGE_BYTES", 10)
        found, _ = find_images([str(tar(tmp_path / "large.tar", {"a.png": b"1" * 11}))])
        with pytest.raises(ValueError, match="more than the limit of 10"):
            found[0].read()

    def test_links_are_left_out_and_compressed_ones_refused(self, tmp_path):
        with tarfile.open(tmp_path / "links.tar", "w") as archive:
            info = tarfile.TarInfo("a.png")
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(info)
        assert find_images([str(tmp_path / "links.tar")]) == ([], [str(tmp_path / "links.tar")])
        with tarfile.open(tmp_path / "small.tar", "w:gz"):
            pass
        with pytest.raises(ValueError, match="without compression"):
            find_images([str(tmp_path / "small.tar")])


class TestVideos:
    @pytest.fixture
    def video(self, tmp_path) -> Path:
        av = pytest.importorskip("av")
        path = tmp_path / "film.mkv"
        with av.open(str(path), "w") as file:
            stream = file.add_stream("ffv1", rate=10)  # without loss
            stream.width, stream.height, stream.pix_fmt = 64, 48, "bgr0"
            for index in range(7):
                frame = av.VideoFrame.from_ndarray(self.pixels(index), format="rgb24")
                file.mux(stream.encode(frame.reformat(format="bgr0")))
            file.mux(stream.encode())
        return path

    def pixels(self, index: int) -> np.ndarray:
        blocks = np.random.default_rng(index).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        return blocks.repeat(8, 0).repeat(8, 1)

    def test_frames_are_images(self, video, model, tmp_path, capsys):  # noqa: F811
        assert segment(video, tmp_path / "out", model, "--every", 3, "--outputs", "panoptic,overlay") == 0
        assert "3 of 3 images segmented" in capsys.readouterr().out
        frames = tmp_path / "frames"
        frames.mkdir()
        for index in (0, 3, 6):
            Image.fromarray(self.pixels(index)).save(frames / f"film.frame-{index:06}.png")
        assert segment(frames, tmp_path / "expected", model, "--outputs", "panoptic,overlay") == 0
        assert contents(tmp_path / "out") == contents(tmp_path / "expected")

    def test_one_that_breaks_off_keeps_what_it_gave(self, video, model, tmp_path, capsys, monkeypatch):  # noqa: F811
        whole = video.read_bytes()
        draw(tmp_path / "z.png", 1)
        video.write_bytes(b"no video")
        assert segment(video, tmp_path / "out", model) == 1
        assert "film.mkv: the video breaks off" in capsys.readouterr().err
        video.write_bytes(whole)

        def broken(path, every):
            for index, frame in enumerate(self.pixels(number) for number in range(3)):
                yield index, Image.fromarray(frame)
            raise ValueError(f"{path}: the video breaks off after 3 of 7 frames; copy it again")

        monkeypatch.setattr("hf_segvit.inference.bulk.frames_of", broken)
        assert segment(video, tmp_path / "out", model) == 1
        printed = capsys.readouterr()
        assert "3 of 4 images segmented" in printed.out
        assert "breaks off after 3 of 7 frames" in printed.err
        assert len(list((tmp_path / "out").glob("*.segments.json"))) == 3

    @pytest.mark.parametrize(
        ("name", "options", "told"),
        [
            ("film.mkv", {}, "after frame {last}, at {seconds:.1f} of 3.0 s"),
            ("film.mp4", {"movflags": "+faststart"}, "after frame {last} "),
            ("film.avi", {}, "after {count} of 30 frames"),
        ],
    )
    def test_files_that_are_cut_short(self, name, options, told, model, tmp_path, capsys):  # noqa: F811
        av = pytest.importorskip("av")
        path = tmp_path / name
        with av.open(str(path), "w", options=options) as file:
            stream = file.add_stream("mjpeg", rate=10)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
            for index in range(30):
                file.mux(stream.encode(av.VideoFrame.from_ndarray(self.pixels(index), format="rgb24")))
            file.mux(stream.encode())
        whole = path.read_bytes()
        assert segment(path, tmp_path / "whole", model, "--outputs", "panoptic") == 0
        path.write_bytes(whole[: len(whole) // 2])
        assert segment(path, tmp_path / "out", model, "--outputs", "panoptic") == 1
        kept, before = contents(tmp_path / "out"), contents(tmp_path / "whole")
        assert 10 < len(kept) < len(before) == 30
        end = told.format(count=len(kept), last=len(kept) - 1, seconds=(len(kept) - 1) / 10)
        assert f"{name}: the video breaks off {end}" in capsys.readouterr().err
        last = max(kept)  # decoders give what there is of the frame in which the file ends
        assert {key: before[key] for key in kept if key != last} == {key: kept[key] for key in kept if key != last}
