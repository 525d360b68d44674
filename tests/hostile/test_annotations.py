"""Annotations that claim huge sizes, hold values of another type or multiply: an error with the file, within bounds.

`BOUNDED` are inputs of a few kilobytes that would take gigabytes or minutes; they are checked in a process that may
take 1.5 GiB beyond its imports. `REFUSED` are wrong values, names and options.
"""

import base64
import io
import json
import os
import re
import resource
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hf_segvit.data.archives import Location, read_json
from hf_segvit.data.checking import check_dataset
from hf_segvit.data.class_lists import label_rule, read_classes, similar_names
from hf_segvit.data.reading import load_segmentation_dataset
from hf_segvit.lookup import parse_key_values, parse_yaml
from hf_segvit.models.mask_encoding import decode_mask, encode_mask

from ..data_folders import SIZE, coco_content, mask_folder, write_image, write_json, write_mask

H, W = SIZE
HUGE = 10**400
DEEP = "[" * 100_000 + "]" * 100_000
BOMB = "&a [x, x, x, x, x, x, x, x, x]\n" + "\n".join(
    f"{chr(98 + level)}: &{chr(98 + level)} [{', '.join(['*' + chr(97 + level)] * 9)}]" for level in range(9)
)


def zigzag(points: int, height: int, width: int) -> list[float]:
    return [value for index in range(points) for value in (index * width / points, height * (index % 2))]


def coco(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], str]:
    def write(root: Path) -> str:
        content = coco_content()
        change(content)
        write_image(root / "train" / "a.jpg")
        write_json(root / "annotations" / "instances_train.json", content)
        return f"coco_folder:{root}"

    return write


def claimed(size: tuple[int, int], *outlines: Any) -> Callable[[Path], str]:
    def change(content: dict[str, Any]) -> None:
        content["images"][0].update(height=size[0], width=size[1])
        rows = [{"id": number, "image_id": 5, "category_id": 3} for number in range(len(outlines))]
        content["annotations"] = [{**row, "segmentation": outline} for row, outline in zip(rows, outlines, strict=True)]

    return coco(change)


def labelme(*shapes: dict[str, Any], size: Any = SIZE, text: str | None = None) -> Callable[[Path], str]:
    def write(root: Path) -> str:
        write_image(root / "a.jpg")
        content = {"shapes": shapes, "imagePath": "a.jpg", "imageHeight": size[0], "imageWidth": size[1]}
        (root / "a.json").write_text(json.dumps(content) if text is None else text)
        return f"labelme:{root}"

    return write


def shape(points: Any, label: Any = "cat", kind: Any = "polygon", **more: Any) -> dict[str, Any]:
    return {"label": label, "points": points, "shape_type": kind, **more}


def yolo(lines: str = "0 0.1 0.1 0.9 0.1 0.9 0.9", names: str = "[cat, dog]", **more: str) -> Callable[[Path], str]:
    def write(root: Path) -> str:
        write_image(root / "images" / "train" / "a.jpg")
        (root / "labels" / "train").mkdir(parents=True)
        (root / "labels" / "train" / "a.txt").write_text(lines)
        settings = {"train": "images/train", "names": names, **more}
        (root / "data.yaml").write_text("\n".join(f"{key}: {value}" for key, value in settings.items()))
        return f"yolo:{root}"

    return write


def masks(mask: Any, classes: Any, numbers: Any = None) -> Callable[[Path], str]:
    def write(root: Path) -> str:
        spec = mask_folder(root, classes=classes)
        (root / "annotations" / "train" / "one.png").unlink()
        write_mask(root / "annotations" / "train" / "one.tif", mask)
        if numbers is not None:
            write_mask(root / "instances" / "train" / "one.tif", numbers)
        return spec

    return write


def tiny_png() -> str:
    file = io.BytesIO()
    Image.fromarray(np.full((2, 2), 255, dtype=np.uint8)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def with_value(value: int) -> np.ndarray:
    mask = np.zeros(SIZE, dtype=np.int32)
    mask[3] = value
    return mask


def zipped(change: Callable[[bytearray, int], object]) -> Callable[[Path], str]:
    """An archive whose last entry of the directory is changed; the function gets the content and its offset."""

    def write(root: Path) -> str:
        write_image(root / "a.jpg")
        with zipfile.ZipFile(root / "data.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.write(root / "a.jpg", "train/a.jpg")
            archive.writestr("annotations/instances_train.json", json.dumps(coco_content()))
        content = bytearray((root / "data.zip").read_bytes())
        change(content, content.rfind(b"PK\x01\x02"))
        (root / "data.zip").write_bytes(content)
        return f"coco_folder:{root / 'data.zip'}"

    return write


def _field(start: int, value: int) -> Callable[[bytearray, int], object]:
    def change(content: bytearray, entry: int) -> None:
        content[entry + start : entry + start + 4] = value.to_bytes(4, "little")

    return change


def many_categories(content: dict[str, Any]) -> None:
    content["categories"] += [{"id": number, "name": f"class {number}"} for number in range(100, 60_000)]


# What a writer makes, and what the check says of it.
BOUNDED: dict[str, tuple[Callable[[Path], str], str]] = {
    "zigzag": (
        claimed((13_000, 13_000), [zigzag(20_000, 13_000, 13_000)]),
        r"annotation 0: an outline of 260,000,000 pix",
    ),
    "zigzag 30,000": (claimed((30_000, 30_000), [zigzag(20_000, 30_000, 30_000)]), r"image 5: height and width"),
    "claimed size": (
        claimed((13_000, 13_000), *[[[0, 0, 13_000, 0, 0, 13_000]]] * 500),
        r"20 x 30 pixels but its mask 13000",
    ),
    "claimed runs": (
        claimed((13_000, 13_000), *[{"size": [13_000, 13_000], "counts": [5, 13_000**2 - 5]}] * 200),
        r"20 x 30 pixels but its mask 13000",
    ),
    "counts": (
        claimed(SIZE, {"size": [H, W], "counts": "0" * 2_000_000}),
        r"annotation 0: an RLE mask of 2,000,000 counts",
    ),
    "labelme zigzag": (
        labelme(shape(np.reshape(zigzag(20_000, 13_000, 13_000), (-1, 2)).tolist()), size=(13_000, 13_000)),
        r"a\.json: shapes\[0\]: an outline of 260,000,000 pixels",
    ),
    "labelme masks": (
        labelme(*[shape([[5, 5], [6, 6]], kind="mask", mask=tiny_png(), group_id=1)] * 200, size=(13_000, 13_000)),
        r"20 x 30 pixels but its mask 13000",
    ),
    "labelme thin": (
        labelme(*[shape([[0, y], [13_000, y + 0.01], [13_000, y]]) for y in range(2_000)], size=(13_000, 13_000)),
        r"shapes\[\d+\]: the outlines of this image have 20,\d+,\d+ pixels",
    ),
    "value of a mask": (masks(with_value(2_000_000_000), {"0": "road", "1": "car"}), r"the values \[2000000000\]"),
    "aliases": (yolo(names=BOMB), r"data\.yaml: no valid YAML \(aliases that stand for too many values"),
    "size of a member": (
        zipped(_field(24, 1_900 * 2**20)),
        r"instances_train\.json: \d+ bytes that unpack to 1,992,294,400",
    ),
    "packed size of a member": (zipped(_field(20, 400 * 2**20)), r"instances_train\.json: damaged \(its size is not"),
    "scenes": (
        lambda root: "generated:easy?num_scenes=1000000000000",
        r"num_scenes=1000000000000; give a whole number",
    ),
    "categories": (coco(many_categories), "^$"),
}


def outcome(write: Callable[[Path], str], root: Path) -> str:
    """All that a check of a data set says, as one text."""
    root.mkdir()
    try:
        return "\n".join(map(str, check_dataset(write(root)).problems.errors))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def print_bounded(folder: str) -> None:
    """Print the outcomes of `BOUNDED` as JSON, with 1.5 GiB of memory beyond what is taken now."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = taken + 3 * 2**29
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    print(json.dumps({name: outcome(write, Path(folder) / name) for name, (write, _) in BOUNDED.items()}))


@pytest.fixture(scope="module")
def bounded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs Linux' /proc to know the memory that the imports take")
    folder = str(tmp_path_factory.mktemp("bounded"))
    code = f"from tests.hostile.test_annotations import print_bounded; print_bounded({folder!r})"
    root = Path(__file__).parents[2]
    # Threads reserve gigabytes of addresses that they never use.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", list(BOUNDED))
def test_small_files_take_little_memory(bounded: dict[str, str], name: str) -> None:
    assert re.search(BOUNDED[name][1], bounded[name]), bounded[name]
    assert not re.match(r"(?!ValueError)\w*(Error|Exception): ", bounded[name])


def first(**changes: Any) -> Callable[[Path], str]:
    return coco(lambda content: content["annotations"][0].update(changes))


TRIANGLE = [[2, 2], [12, 2], [2, 12]]
REFUSED: dict[str, tuple[Callable[[Path], str], str]] = {
    "polygon": (
        first(segmentation=[[HUGE, 2, 12, 2, 2, 12]]),
        r"annotation 1: a polygon with a coordinate that is NaN",
    ),
    "polygon true": (
        first(segmentation=[[True, 2, 12, 2, 2, 12]]),
        r"annotation 1: a polygon with True, which is no number",
    ),
    "id": (first(id=HUGE), r"instances_train\.json: annotation inf: the annotation has no whole number as id"),
    "image id": (first(image_id=HUGE), r"annotation 1: it is for image inf, which `images` lacks"),
    "category": (
        first(category_id=2**70),
        r"annotation 1: category .* is not in the list",
    ),
    "runs": (
        first(segmentation={"size": [H, W], "counts": [HUGE]}),
        r"annotation 1: an RLE mask whose runs do not add up",
    ),
    "size of runs": (
        first(segmentation={"size": [HUGE, W], "counts": [1]}),
        r"annotation 1: an RLE mask whose size is",
    ),
    "size": (coco(lambda c: c["images"][0].update(height=HUGE)), r"image 5: height and width must be whole numbers"),
    "segmentation text": (first(segmentation=DEEP), r"annotation 1: its segmentation is a text"),
    "name": (
        coco(lambda c: c["categories"][0].update(name="x" * 100_000)),
        r"category 3: .*100,000 characters, more than the 500",
    ),
    "surrogate": (
        coco(lambda c: c["categories"][0].update(name="\ud800")),
        r"category 3: the name '.ud800': it holds half",
    ),
    "too many": (
        coco(lambda c: c.update(categories=[{"id": n, "name": str(n)} for n in range(70_000)])),
        r"70,000 categories, more than the limit of 65,536",
    ),
    "labelme number": (
        labelme(shape([[HUGE, 2], *TRIANGLE])),
        r"a\.json: shapes\[0\]: a polygon with a coordinate that is NaN",
    ),
    "labelme circle": (
        labelme(shape([[5, 5], [HUGE, 9]], kind="circle")),
        r"shapes\[0\]: a polygon with a coordinate that is NaN",
    ),
    "labelme points": (labelme(shape([[1, 2, 3, 4]] * 3)), r"shapes\[0\]: points must be a list of pairs"),
    "labelme label": (
        labelme(shape(TRIANGLE), shape(TRIANGLE, "\udfff")),
        r"shapes\[1\]: the label '.udfff': it holds half of a",
    ),
    "labelme long label": (
        labelme(shape(TRIANGLE), shape(TRIANGLE, "x" * 100_000)),
        r"shapes\[1\]: .*: it has 100,000 char",
    ),
    "labelme size": (
        labelme(shape(TRIANGLE), size=(HUGE, 3)),
        r"a\.json: imageHeight and imageWidth must be whole numbers",
    ),
    "labelme depth": (labelme(text=DEEP), r"a\.json: nested too deep"),
    "labelme value": (labelme(text='{"shapes": ' + DEEP + "}"), r"a\.json: nested too deep"),
    "yolo class": (
        yolo("inf 0.1 0.1 0.9 0.1 0.9 0.9"),
        r"a\.txt: line 1: the class is 'inf'; it must be a whole number",
    ),
    "yolo digits": (
        yolo("0 " + "9" * 6_000 + " 0.1 0.9 0.1 0.9 0.9"),
        r"a\.txt: line 1: a polygon with a coordinate that is NaN",
    ),
    "yolo mixed keys": (yolo(names="{0: cat, one: dog}"), r"data\.yaml: names is .* it must list every class once"),
    "yolo key": (yolo(names="{" + "9" * 600 + ": cat}"), r"data\.yaml: names is .* it must list every class once"),
    "yolo name": (yolo(names=f"[{'x' * 100_000}]"), r"data\.yaml: class 0, .*100,000 characters"),
    "yolo tag": (
        yolo(names="[!!bool cat]"),
        r"data\.yaml: no valid YAML \(the tag 'tag:yaml.org,2002:bool' is unknown",
    ),
    "yolo depth": (yolo(names=DEEP), r"data\.yaml: no valid YAML \(.*(nested too deep|nesting depth)"),
    "yolo path": (yolo(train="a/" * 60_000), r"data\.yaml: train: a path of 120,000 characters"),
    "object number": (
        masks(
            np.zeros(SIZE, np.uint8),
            {"classes": [{"value": 0, "name": "car", "is_thing": True}]},
            with_value(2**31 - 1),
        ),
        r"instances.*one\.tif: the mask holds the object number 2147483647",
    ),
    "class value": (
        masks(with_value(1), {"classes": [{"value": HUGE, "name": "a"}]}),
        r"classes\.json: .*the value inf is no whole",
    ),
    "class name": (masks(with_value(1), {"0": {"road": 1}}), r"classes\.json: .*the name \{'road': 1\} is no text"),
    "class color": (
        masks(with_value(1), [{"name": "a", "color": [HUGE, 0, 0]}]),
        r"classes\.json: the class 'a' has the colour",
    ),
    "no name": (
        zipped(lambda content, entry: content.__setitem__(slice(entry + 46, entry + 78), b"\0" * 32)),
        r"data\.zip: .*name",
    ),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_wrong_values_are_errors_with_file_and_entry(tmp_path: Path, name: str) -> None:
    write, message = REFUSED[name]
    root = tmp_path / "data"
    text = outcome(write, root)
    if name == "object number":  # the semantic task does not read it
        with pytest.raises(ValueError, match=message):
            load_segmentation_dataset(f"mask_folder:{root}", task="panoptic")[0]
        return
    assert re.search(message, text), text[:1000]
    assert not re.match(r"(?!ValueError)\w*(Error|Exception): ", text)
    assert len(text) < 3_000


@pytest.mark.parametrize("name", ["path", "split", "task", "spec", "problems", "wanted"])
@pytest.mark.parametrize("data_format", ["generated:easy", "coco_folder", "auto"])
def test_parameters_inside_are_no_options(tmp_path: Path, data_format: str, name: str) -> None:
    spec = data_format if ":" in data_format else f"{data_format}:{tmp_path}"
    if ":" not in data_format:
        coco(lambda content: None)(tmp_path)
    for read in (check_dataset, load_segmentation_dataset):
        with pytest.raises(ValueError, match=rf"format \w+ has no option '{name}'"):
            read(f"{spec}?{name}=x")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("generated:easy?num_scenes=-1", "num_scenes=-1; give a whole number from 0 to 1,000,000"),
        ("generated:easy?seed=-1", "seed=-1; give a whole number"),
        ("generated:easy?num_scenes=" + "9" * 5_000, "give a whole number from 0"),
        ("generated:easy?size=1000000", "size=1000000; give a number of pixels up to 8192"),
        ("generated:easy?num_scenes=2&num_scenes=3", "the option num_scenes occurs twice"),
        ("coco_folder:~nobody-of-this-name/x", "there is no such user's home"),
        ("auto:~nobody-of-this-name/x", "there is no such user's home"),
        ("labelme:" + "x" * 5_000, "no such file or folder"),
        ("yolo:a\0b", r"'a.x00b' is no path"),
        ("yolo:\ud800", r"'.ud800' is no path"),
    ],
)
def test_wrong_specifications(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_segmentation_dataset(spec)
    assert len(str(caught.value)) < 1_000


@pytest.mark.parametrize("file", ["/etc/passwd", "/dev/zero", "data.txt"])
def test_files_that_are_no_lists_of_classes(tmp_path: Path, file: str) -> None:
    (tmp_path / "data.txt").write_bytes(b"a\n\x00\x01\n")
    spec = masks(with_value(1), {"0": "road"})(tmp_path / "data")
    with pytest.raises(ValueError, match=r"(passwd|zero|data\.txt): (no list of|is a (folder|pipe), )"):
        load_segmentation_dataset(f"{spec}?classes={tmp_path / file}")


def test_tens_of_thousands_of_classes_are_read_in_linear_time() -> None:
    # By value: with comparisons of all pairs this test would take an hour.
    names = [f"class {number}" for number in range(60_000)]
    assert read_classes(names).labels[59_999] == 59_999
    rule = label_rule(names, "semantic", drop=names[:30_000], background=True)
    assert rule.labels["class 59999"] == 30_000
    words = ["".join(chr(97 + number // 26**place % 26) * 2 for place in range(4)) for number in range(60_000)]
    assert similar_names([*words, "aabbccddx", "Aa_bbCCdd"])[-1][1] in ("aabbccddx", "Aa_bbCCdd")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: !!bool foo", "line 1: a: 'foo' is no value of type bool"),
        ("x: 1\na:\n  b: !!timestamp no", "line 3: a.b: 'no' is no value of type timestamp"),
        ("- !!int ''", "line 1: '' is no value of type int"),
        ("a: !!float x", "a: 'x' is no value of type float"),
        ("a: 2024-13-01", "a: '2024-13-01' is no value of type timestamp"),
        (f"a: {'1' * 6_000}", "a: '1{60}' is no value of type int"),
        (f"a: {BOMB}", "aliases that stand for too many values"),
        ("a: &x [*x]", "the alias .x is inside of what it stands for"),
        (f"a: {DEEP}", "(nested too deep|nesting depth)"),
        ("? [1, 2]\n: 3", "a key that is a list or table, line 1"),
        ("a: 1\na: 2", "the key a occurs twice"),
    ],
)
def test_yaml(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"file\.yaml: no valid YAML \(.*{message}"):
        parse_yaml(text, "file.yaml")


def test_yaml_with_a_few_aliases_is_read() -> None:
    assert parse_yaml("a: &x [1, 2]\nb: *x\nc: {<<: {d: 1}, e: *x}", "f") == {
        "a": [1, 2],
        "b": [1, 2],
        "c": {"d": 1, "e": [1, 2]},
    }


def test_yaml_in_arguments() -> None:
    with pytest.raises(ValueError, match=r"the value of model\.size: no valid YAML"):
        parse_key_values(["model.size=!!int x"])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (f"[{HUGE}]", [float("inf")]),
        (f"[-{HUGE}, 1]", [float("-inf"), 1]),
        (f"[{2**63}, {2**63 - 1}, {-(2**63)}]", [2.0**63, 2**63 - 1, -(2**63)]),
        ("[1e999, NaN, 12345678901234567890123.5]", None),
    ],
)
def test_whole_numbers_of_more_than_64_bits_are_floats(tmp_path: Path, text: str, value: Any) -> None:
    (tmp_path / "a.json").write_text(text)
    read = read_json(Location(archive=None, member=str(tmp_path / "a.json")))
    assert [type(number) for number in read] == [type(number) for number in value or [1.0] * 3]
    assert value is None or read == value


def test_bytes_of_halves_of_characters_are_no_utf_8(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'["\xed\xa0\x80"]')
    with pytest.raises(ValueError, match=r"a\.json: no valid UTF-8 text"):
        read_json(Location(archive=None, member=str(tmp_path / "a.json")))


def test_part_of_a_mask_in_its_frame() -> None:
    rng = np.random.default_rng(0)
    for top, left, height, width in [(0, 0, 20, 30), (3, 4, 5, 6), (0, 7, 20, 3), (15, 24, 5, 6), (2, 2, 1, 1)]:
        part = rng.random((height, width)) < 0.6
        whole = np.zeros(SIZE, dtype=bool)
        whole[top : top + height, left : left + width] = part
        placed = encode_mask(part, SIZE, top, left)
        assert placed == encode_mask(whole)
        assert np.array_equal(decode_mask(placed), whole)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names themselves")
def test_file_names_that_are_no_text(tmp_path: Path) -> None:
    coco(lambda content: None)(tmp_path)
    (tmp_path / "train" / os.fsdecode(b"\xff.jpg")).write_bytes(b"x")
    with pytest.raises(ValueError, match=r"train: the file name '.udcff\.jpg' is not UTF-8; rename"):
        load_segmentation_dataset(f"coco_folder:{tmp_path}")
