"""YOLO data sets as tools export them and people lay them out: what is read, and what is said about the rest."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hf_segvit.data.checking import check_dataset
from hf_segvit.data.problems import ProblemList
from hf_segvit.data.reading import available_splits, describe, load_segmentation_dataset
from hf_segvit.models.mask_encoding import decode_mask

from ..data_folders import SIZE, write_image, write_json

HEIGHT, WIDTH = SIZE
LEFT = "0.1 0.2 0.5 0.2 0.5 0.8 0.1 0.8"  # 12 x 12 pixels of 30 x 20
RIGHT = "0.6 0.2 0.9 0.2 0.9 0.8 0.6 0.8"  # 9 x 12
AREA, RIGHT_AREA = 144, 108


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def pair(root: Path, image: str, labels: str, line: str = f"0 {LEFT}", seed: int = 0) -> None:
    write_image(root / image, seed=seed)
    write(root / labels, f"{line}\n")


def areas(spec: str, **options: Any) -> dict[str, list[int]]:
    """Areas of the objects by image id."""
    return {
        row["image_id"]: [int(decode_mask(segment["rle"]).sum()) for segment in row["segments"]]
        for row in load_segmentation_dataset(spec, **options)
    }


def messages(spec: str, **options: Any) -> list[str]:
    return [str(problem) for problem in check_dataset(spec, **options).problems]


def names_of(spec: str, **options: Any) -> list[str]:
    return list(describe(load_segmentation_dataset(spec, **options)).id2label.values())


def test_labels_beside_images_are_read_where_ultralytics_reads_them(tmp_path: Path) -> None:
    write(tmp_path / "data.yaml", "train: [plain, more/images, ok/images]\nnames: [dog]\n")
    for number in range(2):
        pair(tmp_path, f"plain/p{number}.jpg", f"plain/p{number}.txt", seed=number)
        pair(tmp_path, f"more/images/m{number}.jpg", f"more/images/m{number}.txt", seed=2 + number)
        pair(tmp_path, f"ok/images/o{number}.jpg", f"ok/labels/o{number}.txt", seed=4 + number)
    found = areas(f"yolo:{tmp_path}")
    assert found == {"p0": [AREA], "p1": [AREA], "m0": [], "m1": [], "o0": [AREA], "o1": [AREA]}
    (message,) = messages(f"yolo:{tmp_path}")
    assert "more/images: label files that are not read: m0.txt, m1.txt" in message
    assert "read from more/labels" in message
    assert "2 of these images count as without objects" in message


def test_label_files_of_no_image_are_named_by_folder(tmp_path: Path) -> None:
    write(tmp_path / "data.yaml", "train: images/train\nval: images/val\nnames: [dog]\n")
    for number in range(6):
        pair(tmp_path, f"images/train/a{number}.jpg", f"labels/train/a{number}_gt.txt", seed=number)
    pair(tmp_path, "images/val/b.jpg", "labels/val/b.txt", seed=9)
    pair(tmp_path, "elsewhere/c.jpg", "elsewhere/c.txt", seed=10)
    write(tmp_path / "README.txt", "0 is a dog\n")
    write(tmp_path / "requirements.txt", "torch\n")
    found = messages(f"yolo:{tmp_path}")
    told = "none of its images has a label file; that of images/train/a0.jpg would be labels/train/a0.txt"
    assert any(told in text for text in found)
    (text,) = [text for text in found if "labels/train: " in text]
    assert "not read: a0_gt.txt, a1_gt.txt, a2_gt.txt and 3 more" in text
    assert "images of that folder have no label file" in text
    (text,) = [text for text in found if "elsewhere" in text]
    assert "c.txt; their images are in no split" in text
    assert not any("README" in text or "requirements" in text for text in found)


@pytest.mark.parametrize(
    ("entries", "image", "labels"),
    [
        ("images/train/a.jpg\n", "images/train/a.jpg", "labels/train/a.txt"),
        ("./images/train/a.jpg", "images/train/a.jpg", "labels/train/a.txt"),
        ("data/images/train/a.jpg\r\n\r\n", "images/train/a.jpg", "labels/train/a.txt"),
        ("data/obj_train_data/a.jpg\n", "obj_train_data/a.jpg", "obj_train_data/a.txt"),
        ("/home/someone/set/images/train/a.jpg\n", "images/train/a.jpg", "labels/train/a.txt"),
        ("C:\\work\\set\\images\\train\\a.jpg\n", "images/train/a.jpg", "labels/train/a.txt"),
        ("../set/images/train/a.jpg\n", "images/train/a.jpg", "labels/train/a.txt"),
    ],
)
def test_a_split_is_a_list_of_images(tmp_path: Path, entries: str, image: str, labels: str) -> None:
    pair(tmp_path, image, labels)
    write_image(tmp_path / Path(image).with_name("unlisted.jpg"), seed=1)
    write(tmp_path / "train.txt", entries)
    write(tmp_path / "data.yaml", "path: ./\ntrain: train.txt\nval:\ntest: null\nnames:\n  0: apple\n")
    assert available_splits(f"yolo:{tmp_path}") == ["train"]
    assert areas(f"yolo:{tmp_path}") == {image.removesuffix(".jpg"): [AREA]}


def test_a_list_beside_its_images_and_faults_in_it(tmp_path: Path) -> None:
    pair(tmp_path, "lists/images/a.jpg", "lists/labels/a.txt")
    listing = write(tmp_path / "lists" / "train.txt", "./images/a.jpg\n")
    write(tmp_path / "data.yaml", "train: lists/train.txt\nnames: [apple]\n")
    assert areas(f"yolo:{tmp_path}") == {"lists/images/a": [AREA]}
    write(listing, "./images/a.jpg\n./images/absent.jpg\n")
    with pytest.raises(ValueError, match=r"train\.txt: line 2 is '\./images/absent\.jpg', which is not there"):
        load_segmentation_dataset(f"yolo:{tmp_path}")
    write(listing, "/etc/passwd\n")
    with pytest.raises(ValueError, match=r"line 1: '/etc/passwd' is absolute or leaves its folder"):
        load_segmentation_dataset(f"yolo:{tmp_path}")
    write(listing, "\n")
    with pytest.raises(ValueError, match="no images in it"):
        load_segmentation_dataset(f"yolo:{tmp_path}")


@pytest.mark.parametrize("stated", ["train: /content/set/train/images", "path: ../sets\ntrain: ../train/images"])
def test_paths_of_another_machine(tmp_path: Path, stated: str) -> None:
    pair(tmp_path, "train/images/a.jpg", "train/labels/a.txt")
    write(tmp_path / "data.yaml", f"{stated}\nnames: [apple]\n")
    assert areas(f"yolo:{tmp_path}") == {"a": [AREA]}


def test_a_path_below_the_settings(tmp_path: Path) -> None:
    pair(tmp_path, "fruit/images/train/a.jpg", "fruit/labels/train/a.txt")
    write(tmp_path / "fruit.yaml", "path: fruit\ntrain: images/train\nnames: [apple]\n")
    assert areas(f"yolo:{tmp_path}") == {"a": [AREA]}


@pytest.mark.parametrize("has_notes", [False, True])
def test_label_studio(tmp_path: Path, has_notes: bool) -> None:
    pair(tmp_path, "images/1f3a-photo.jpg", "labels/1f3a-photo.txt", f"1 {LEFT}")
    if has_notes:
        categories = [{"id": 1, "name": "pear"}, {"id": 0, "name": "apple"}]
        write_json(tmp_path / "notes.json", {"categories": categories, "info": {"year": 2024}})
    else:
        write(tmp_path / "classes.txt", "apple\r\npear\r\n")
    spec = f"yolo:{tmp_path}"
    assert available_splits(spec) == ["all"]
    assert names_of(spec) == ["apple", "pear"]
    assert areas(spec) == {"1f3a-photo": [AREA]}
    assert load_segmentation_dataset(spec)[0]["segments"][0]["label_id"] == 1
    assert messages(spec) == []


def test_an_export_as_a_zip_archive_with_a_top_folder(tmp_path: Path) -> None:
    root = tmp_path / "files" / "export"
    pair(root, "images/a.jpg", "labels/a.txt")
    write(root / "classes.txt", "apple\n")
    shutil.make_archive(str(tmp_path / "export"), "zip", tmp_path / "files")
    assert areas(f"yolo:{tmp_path / 'export.zip'}") == {"a": [AREA]}


def test_folders_show_the_splits_without_settings(tmp_path: Path) -> None:
    for split in ("train", "valid"):
        pair(tmp_path, f"{split}/images/a.jpg", f"{split}/labels/a.txt")
    with pytest.raises(ValueError, match=r"no data\.yaml and no classes\.txt"):
        available_splits(f"yolo:{tmp_path}")
    write(tmp_path / "classes.txt", "apple\n")
    assert available_splits(f"yolo:{tmp_path}") == ["train", "valid"]
    assert areas(f"yolo:{tmp_path}", split="valid") == {"a": [AREA]}
    (tmp_path / "classes.txt").unlink()
    names = write(tmp_path.parent / "names.txt", "pear\n")
    assert names_of(f"yolo:{tmp_path}?classes={names}") == ["pear"]


def test_older_cvat_export(tmp_path: Path) -> None:
    pair(tmp_path, "obj_train_data/a.jpg", "obj_train_data/a.txt")
    write(tmp_path / "obj.names", "apple\n")
    write(tmp_path / "obj.data", "classes = 1\ntrain = data/train.txt\n")
    write(tmp_path / "train.txt", "data/obj_train_data/a.jpg\n")
    assert areas(f"yolo:{tmp_path}", split="train") == {"obj_train_data/a": [AREA]}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("{0: no, 1: yes}", ["no", "yes"]),
        ("[on, off, y, n]", ["on", "off", "y", "n"]),
        ("[1e3, 007, 0x1f, 1_000, 12:30, 2024-01-31]", ["1e3", "007", "0x1f", "1_000", "12:30", "2024-01-31"]),
        ("[null, true, .inf, 2024-13-45]", ["null", "true", ".inf", "2024-13-45"]),
        ("{'1': pear, '0': apple}", ["apple", "pear"]),
        ("['no ', ' Ja ']", ["no", "Ja"]),
        ("\n  - 猫\n  - Äpfel", ["猫", "Äpfel"]),
    ],
)
def test_names_are_read_as_written(tmp_path: Path, names: str, expected: list[str]) -> None:
    pair(tmp_path, "images/train/a.jpg", "labels/train/a.txt")
    write(tmp_path / "data.yaml", f"train: images/train\nnames: {names}\n")
    assert names_of(f"yolo:{tmp_path}") == expected


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("[car, 'car ']", "list every class once"),
        ("{0: car, 0: bus}", "the key 0 occurs twice"),
        ("{1: car, 2: bus}", "numbered from 0"),
        ("{car: 0, bus: 1}", "numbered from 0"),
        ("[car, [bus]]", "list every class once"),
        ("[car, ' ']", "list every class once"),
        ("", "names is None"),
    ],
)
def test_names_that_cannot_be_meant(tmp_path: Path, names: str, message: str) -> None:
    pair(tmp_path, "images/train/a.jpg", "labels/train/a.txt")
    write(tmp_path / "data.yaml", f"train: images/train\nnames: {names}\n")
    with pytest.raises(ValueError, match=rf"data\.yaml: .*{message}"):
        load_segmentation_dataset(f"yolo:{tmp_path}")


def test_settings_and_labels_in_other_encodings(tmp_path: Path) -> None:
    write_image(tmp_path / "images" / "train" / "a.jpg")
    labels = tmp_path / "labels" / "train" / "a.txt"
    labels.parent.mkdir(parents=True)
    labels.write_text(f"0 {LEFT}\n", encoding="utf-16")
    (tmp_path / "data.yaml").write_text("train: images/train\nnames: [Äpfel]\n", encoding="utf-8-sig")
    assert areas(f"yolo:{tmp_path}") == {"a": [AREA]}
    (tmp_path / "data.yaml").write_text("train: images/train\nnames: [Äpfel]\n", encoding="cp1252")
    with pytest.raises(ValueError, match=r"data\.yaml: no UTF-8 text; save it as UTF-8"):
        load_segmentation_dataset(f"yolo:{tmp_path}")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0 0.5 0.5 0.2 0.2", "a box, not an outline"),
        ("0 0.5 0.5 0.2 0.2 0.1 0.1 2 0.2 0.2 0 0.3 0.3 1", "a box and keypoints, not an outline"),
        (f"0 {LEFT} 0.93", "9 numbers after the class"),
    ],
)
def test_other_kinds_of_labels_are_told(tmp_path: Path, line: str, message: str) -> None:
    pair(tmp_path, "images/train/a.jpg", "labels/train/a.txt", line)
    write(tmp_path / "data.yaml", "train: images/train\nnames: [apple]\n")
    with pytest.raises(ValueError, match=rf"a\.txt: line 1: {message}"):
        load_segmentation_dataset(f"yolo:{tmp_path}")


def test_settings_of_poses_and_oriented_boxes(tmp_path: Path) -> None:
    # A square on its corner: 6 pixels to each side of (15, 10).
    turned = " ".join(f"{x / WIDTH} {y / HEIGHT}" for x, y in ((15, 4), (21, 10), (15, 16), (9, 10)))
    pair(tmp_path, "images/train/a.jpg", "labels/train/a.txt", f"0 {LEFT}\n0 {turned}")
    write(tmp_path / "data.yaml", "train: images/train\nnames: [apple]\n")
    (message,) = messages(f"yolo:{tmp_path}")
    assert "all outlines are rectangles, some of them turned; if these are oriented boxes (OBB)" in message
    write(tmp_path / "labels/train/a.txt", f"0 {LEFT}\n")
    assert messages(f"yolo:{tmp_path}") == []
    write(tmp_path / "data.yaml", "train: images/train\nkpt_shape: [17, 3]\nnames: [apple]\n")
    with pytest.raises(ValueError, match="kpt_shape says that these are labels of poses"):
        load_segmentation_dataset(f"yolo:{tmp_path}")


def test_a_line_that_is_there_twice_counts_once(tmp_path: Path) -> None:
    pair(tmp_path, "images/train/a.jpg", "labels/train/a.txt", f"0 {LEFT}\n0 {RIGHT}\n0 {LEFT}")
    write(tmp_path / "data.yaml", "train: images/train\nnames: [apple]\n")
    problems = ProblemList()
    assert len(load_segmentation_dataset(f"yolo:{tmp_path}", problems=problems)[0]["segments"]) == 2
    assert [str(problem).split("a.txt: ")[1] for problem in problems] == ["line 3: the same as line 1; it is left out"]


def two_classes(root: Path) -> str:
    pair(root, "images/train/a.jpg", "labels/train/a.txt", f"0 {LEFT}\n1 {RIGHT}\n1 {LEFT}")
    write_image(root / "images" / "train" / "empty.jpg", seed=1)
    write(root / "data.yaml", "train: images/train\nnames: [sky, car, unused]\n")
    return f"yolo:{root}"


def test_uncovered_pixels_in_the_semantic_task(tmp_path: Path) -> None:
    spec = two_classes(tmp_path)
    first, empty = load_segmentation_dataset(spec, task="semantic")
    assert dict(zip(*np.unique(first["segment_map"], return_counts=True), strict=True)) == {
        -1: HEIGHT * WIDTH - AREA - RIGHT_AREA,
        1: AREA + RIGHT_AREA,
    }
    assert (empty["segment_map"] == -1).all()
    first, empty = load_segmentation_dataset(f"{spec}?background=ground&drop=unused", task="semantic")
    assert names_of(f"{spec}?background=ground&drop=unused", task="semantic") == ["ground", "sky", "car"]
    assert int((first["segment_map"] == 0).sum()) == HEIGHT * WIDTH - AREA - RIGHT_AREA
    assert int((first["segment_map"] == 2).sum()) == AREA + RIGHT_AREA
    assert (empty["segment_map"] == 0).all(), "an image without labels is background"
    voided = load_segmentation_dataset(f"{spec}?background=ground&void=car", task="semantic")[0]
    assert int((voided["segment_map"] == -1).sum()) == AREA + RIGHT_AREA


def test_one_class_gets_a_background_in_the_semantic_task(tmp_path: Path) -> None:
    pair(tmp_path, "images/train/a.jpg", "labels/train/a.txt")
    write(tmp_path / "data.yaml", "train: images/train\nnames: [crack]\n")
    spec = f"yolo:{tmp_path}"
    assert names_of(spec) == ["crack"]
    assert names_of(spec, task="semantic") == ["background", "crack"]
    assert int((load_segmentation_dataset(spec, task="semantic")[0]["segment_map"] == 1).sum()) == AREA
    with pytest.raises(ValueError, match="nothing can be learnt"):
        load_segmentation_dataset(f"{spec}?background=void", task="semantic")


def test_panoptic_with_stuff(tmp_path: Path) -> None:
    pair(tmp_path, "images/train/a.jpg", "labels/train/a.txt", f"1 {LEFT}\n1 {RIGHT}\n0 {LEFT}\n0 {RIGHT}")
    write(tmp_path / "data.yaml", "train: images/train\nnames: [sky, car]\n")
    dataset = load_segmentation_dataset(f"yolo:{tmp_path}?stuff=sky&background=ground", task="panoptic")
    description = describe(dataset)
    assert description.id2label == {0: "ground", 1: "sky", 2: "car"}
    assert description.stuff_classes == [0, 1]
    found = [
        (segment["label_id"], int((dataset[0]["segment_map"] == segment["id"]).sum()))
        for segment in dataset[0]["segments"]
    ]
    # Objects lie on top of stuff, whichever was outlined first.
    assert sorted(found) == [(0, HEIGHT * WIDTH - AREA - RIGHT_AREA), (2, RIGHT_AREA), (2, AREA)]
    with pytest.raises(ValueError, match="stuff=skye is no class; did you mean sky"):
        load_segmentation_dataset(f"yolo:{tmp_path}?stuff=skye", task="panoptic")


def test_images_of_one_name_have_ids_of_their_own(tmp_path: Path) -> None:
    pair(tmp_path, "one/images/a.jpg", "one/labels/a.txt")
    pair(tmp_path, "two/images/a.jpg", "two/labels/a.txt", f"0 {RIGHT}", seed=1)
    write_image(tmp_path / "two/images/a.png", seed=2)
    write(tmp_path / "data.yaml", "train: [one/images, two/images]\nnames: [apple]\n")
    assert areas(f"yolo:{tmp_path}") == {
        "one/images/a": [AREA],
        "two/images/a.jpg": [RIGHT_AREA],
        "two/images/a.png": [RIGHT_AREA],
    }


def test_a_test_split_that_was_not_exported_does_not_end_the_check(tmp_path: Path) -> None:
    pair(tmp_path, "train/images/a.jpg", "train/labels/a.txt")
    settings = "train: ../train/images\ntest: ../test/images\nnames: [apple]\n"
    write(tmp_path / "data.yaml", settings)
    report = check_dataset(f"yolo:{tmp_path}")
    assert [split.images for split in report.splits] == [1]
    (problem,) = report.problems
    assert (problem.severity, problem.item) == ("warning", "split 'test'")
    write(tmp_path / "data.yaml", settings.replace("test", "val"))
    (problem,) = check_dataset(f"yolo:{tmp_path}").problems
    assert problem.severity == "error"
    assert "val is '../val/images', which is not there" in problem.message
