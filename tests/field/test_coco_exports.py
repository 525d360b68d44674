"""COCO files as labelling tools export them, made here, with the classes, areas and ids that must be read from them.

CVAT, Label Studio, Roboflow, Supervisely and Datumaro, VGG Image Annotator and FiftyOne, in a folder or zipped; several
splits with different categories; numbers stored as text; crowds; and semantic and panoptic maps from outlines.
"""

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from hf_segvit.data.checking import check_dataset
from hf_segvit.data.folders import FileList, find_elsewhere
from hf_segvit.data.problems import ProblemList
from hf_segvit.data.reading import available_splits, describe, load_segmentation_dataset
from hf_segvit.models.mask_encoding import decode_mask

from ..data_folders import colored, write_image, write_json, write_mask

HEIGHT, WIDTH = 48, 64
RECTANGLE = [10, 8, 40, 8, 40, 28, 10, 28]  # 600 pixels
CORNER = [44, 30, 54, 30, 54, 40, 44, 40]  # 100 pixels, apart from it
INSIDE = [20, 12, 30, 12, 30, 22, 20, 22]  # 100 pixels within it


def annotation(number: int, category: Any = 1, image: Any = 0, outline: Any = None, **fields: Any) -> dict[str, Any]:
    outline = [RECTANGLE] if outline is None else outline
    row = {"id": number, "image_id": image, "category_id": category, "segmentation": outline, "iscrowd": 0}
    return {**row, "bbox": [10, 8, 30, 20], "area": 600, **fields}


def content(
    *annotations: dict[str, Any],
    names: tuple[str, ...] = ("apple", "pear"),
    files: tuple[str, ...] = ("a.jpg",),
    **fields: Any,
) -> dict[str, Any]:
    images = [{"id": n, "file_name": name, "height": HEIGHT, "width": WIDTH} for n, name in enumerate(files)]
    categories = [{"id": n, "name": name, "supercategory": ""} for n, name in enumerate(names, start=1)]
    rows = list(annotations) or [annotation(1)]
    return {"info": {}, "licenses": [], "categories": categories, "images": images, "annotations": rows, **fields}


def photo(path: Path, seed: int = 0) -> Path:
    return write_image(path, (HEIGHT, WIDTH), seed)


def simple(root: Path, json_content: dict[str, Any], options: str = "") -> str:
    photo(root / "images" / "train" / "a.jpg")
    write_json(root / "annotations" / "instances_train.json", json_content)
    return f"coco_folder:{root}{options}"


def areas(dataset: Any) -> list[list[tuple[str, int]]]:
    """(class, pixels) of each segment of each image."""
    names = describe(dataset).id2label
    found = []
    for sample in dataset:
        if sample["segment_map"] is None:
            masks = [decode_mask(row["rle"]) for row in sample["segments"]]
        else:
            masks = [sample["segment_map"] == row["id"] for row in sample["segments"]]
        pairs = zip(sample["segments"], masks, strict=True)
        found.append([(names[row["label_id"]], int(mask.sum())) for row, mask in pairs])
    return found


def zipped(root: Path, archive: Path) -> str:
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(root.rglob("*")):
            if path.is_file():
                file.write(path, str(path.relative_to(root)))
    return f"coco_folder:{archive}"


# Path of the JSON file, path of the image, `file_name`, and the split that they are.
EXPORTS = {
    "cvat": ("annotations/instances_default.json", "images/default/a.jpg", "a.jpg", "default"),
    "cvat subset": ("annotations/instances_Train.json", "images/Train/a.jpg", "a.jpg", "train"),
    "cvat other subset": ("annotations/instances_Night.json", "images/Night/a.jpg", "a.jpg", "Night"),
    "cvat subfolder": ("annotations/instances_Train.json", "images/Train/Data/a.jpg", "Data/a.jpg", "train"),
    "label studio": ("result.json", "images/cb06abcd-cat.jpg", "images/cb06abcd-cat.jpg", "all"),
    "label studio on windows": ("result.json", "images/cb06abcd-cat.jpg", "images\\cb06abcd-cat.jpg", "all"),
    "roboflow": ("valid/_annotations.coco.json", "valid/a.jpg", "a.jpg", "valid"),
    "supervisely": ("train/annotations/instances.json", "train/images/a.jpg", "a.jpg", "train"),
    "datumaro": ("annotations/instances_val.json", "images/val/a.jpg", "a.jpg", "val"),
    "fiftyone": ("labels.json", "data/a.jpg", "a.jpg", "all"),
    "vgg": ("via_export_coco.json", "a.jpg", "a.jpg", "all"),
    "makesense": ("labels_my-project_2024-01-01-10-00-00.json", "a.jpg", "a.jpg", "all"),
    "named by hand": ("annotations/train_annotations.json", "train/a.jpg", "a.jpg", "train"),
    "beside each other": ("train.json", "a.jpg", "a.jpg", "train"),
}


@pytest.mark.parametrize("form", EXPORTS)
@pytest.mark.parametrize("packing", ["folder", "wrapped folder", "zip", "zip inside", "wrapped zip"])
def test_exports_are_read_as_delivered(form: str, packing: str, tmp_path: Path) -> None:
    json_path, image_path, file_name, split = EXPORTS[form]
    root = tmp_path / "export"
    photo(root / image_path)
    write_json(root / json_path, content(files=(file_name,)))
    spec = f"coco_folder:{root}"
    if packing == "wrapped folder":
        spec = f"coco_folder:{tmp_path}"
    elif packing == "zip":
        spec = zipped(root, tmp_path / "export.zip")
    elif packing == "wrapped zip":
        spec = zipped(tmp_path, tmp_path.with_suffix(".zip"))
    elif packing == "zip inside":
        (tmp_path / "downloads").mkdir()
        zipped(root, tmp_path / "downloads" / "export.zip")
        spec = f"coco_folder:{tmp_path / 'downloads'}"
    assert available_splits(spec) == [split]
    problems = ProblemList()
    assert areas(load_segmentation_dataset(spec, split=split, problems=problems)) == [[("apple", 600)]]
    assert list(problems) == []


def test_annotations_and_images_may_have_an_archive_each(tmp_path: Path) -> None:
    write_json(tmp_path / "made" / "annotations" / "instances_train.json", content())
    photo(tmp_path / "photos" / "a.jpg")
    (tmp_path / "data").mkdir()
    zipped(tmp_path / "made", tmp_path / "data" / "annotations.zip")
    zipped(tmp_path / "photos", tmp_path / "data" / "images.zip")
    assert areas(load_segmentation_dataset(f"coco_folder:{tmp_path / 'data'}")) == [[("apple", 600)]]
    # Only the images are still packed.
    (tmp_path / "data" / "annotations.zip").unlink()
    write_json(tmp_path / "data" / "annotations" / "instances_train.json", content())
    assert areas(load_segmentation_dataset(f"coco_folder:{tmp_path / 'data'}")) == [[("apple", 600)]]


def test_splits_are_found_in_any_case(tmp_path: Path) -> None:
    photo(tmp_path / "images" / "TRAIN" / "a.jpg")
    write_json(tmp_path / "annotations" / "instances_Train.json", content())
    for split in ("train", "Train", "TRAIN"):
        assert areas(load_segmentation_dataset(f"coco_folder:{tmp_path}", split=split)) == [[("apple", 600)]]


def test_files_of_other_tasks_are_no_splits(tmp_path: Path) -> None:
    spec = simple(tmp_path, content())
    for name in ("captions_train", "person_keypoints_train", "image_info_test", "stuff_train", "labels_train"):
        write_json(tmp_path / "annotations" / f"{name}.json", content())
    write_json(tmp_path / "annotations" / "notes.json", {"author": "x"})
    write_json(tmp_path / "classes.json", ["apple", "pear"])
    assert available_splits(spec) == ["train"]


def test_the_message_lists_the_json_files_that_are_there(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_json(tmp_path / "annotations" / f"{name}.json", {"author": "x"})
    with pytest.raises(ValueError, match=r"the JSON files are annotations/one\.json, annotations/two\.json; expected"):
        available_splits(f"coco_folder:{tmp_path}")
    spec = simple(tmp_path / "other", content())
    (tmp_path / "other" / "annotations" / "instances_train.json").rename(
        tmp_path / "other" / "annotations" / "panoptic_train.json"
    )
    with pytest.raises(ValueError, match=r"no instance annotations of split 'train'.*panoptic_train\.json; expected"):
        load_segmentation_dataset(spec)


@pytest.mark.parametrize(
    "file_name",
    [
        "../../label-studio/label-studio/media/upload/4/cb06-cat.jpg",
        "/data/upload/4/cb06-cat.jpg",
        "/data/local-files/?d=cats/cb06-cat.jpg",
        "/data/local-files/?d=cb06-cat.jpg",
        "s3://bucket/photos/cb06-cat.jpg",
        "https://example.org/photos/cb06-cat.jpg?token=abc",
        "C:\\Users\\someone\\cb06-cat.jpg",
        "ab12cd34-cb06-cat.jpg",
        "elsewhere/cb06-cat.jpg",
    ],
)
def test_paths_of_other_machines_are_read_by_their_bare_names(file_name: str, tmp_path: Path) -> None:
    photo(tmp_path / "images" / "cb06-cat.jpg")
    photo(tmp_path / "images" / "b.jpg", seed=1)
    write_json(
        tmp_path / "result.json", content(annotation(1, 2), annotation(2, 1, 1), files=(file_name, "images/b.jpg"))
    )
    problems = ProblemList()
    dataset = load_segmentation_dataset(f"coco_folder:{tmp_path}", problems=problems)
    assert areas(dataset) == [[("pear", 600)], [("apple", 600)]]
    (warning,) = problems
    assert (warning.severity, "1 of 2 images are not where" in warning.message) == ("warning", True)
    assert "images/cb06-cat.jpg" in warning.message


def test_a_bare_name_that_is_not_unique_is_not_guessed(tmp_path: Path) -> None:
    for seed, folder in enumerate(("one", "two")):
        photo(tmp_path / "images" / folder / "cat.jpg", seed)
    write_json(tmp_path / "result.json", content(files=("/data/cat.jpg",)))
    with pytest.raises(ValueError, match=r"result\.json: image 0: the file name '/data/cat\.jpg' is absolute"):
        load_segmentation_dataset(f"coco_folder:{tmp_path}")
    # The end of the path decides between the two.
    write_json(tmp_path / "result.json", content(files=("s3://bucket/two/cat.jpg",)))
    dataset = load_segmentation_dataset(f"coco_folder:{tmp_path}", problems=ProblemList())
    assert dataset.with_format(None)[0]["image"]["member"].endswith("two/cat.jpg")


def test_two_entries_never_share_one_image(tmp_path: Path) -> None:
    photo(tmp_path / "images" / "cat.jpg")
    for files, kept in ((("/x/cat.jpg", "/y/cat.jpg"), 0), (("images/cat.jpg", "/y/cat.jpg"), 1)):
        write_json(tmp_path / "result.json", content(files=files))
        problems = ProblemList()
        assert len(load_segmentation_dataset(f"coco_folder:{tmp_path}", problems=problems)) == kept
        assert "image 1" in [problem.item for problem in problems.errors]


def test_a_missing_image_is_not_replaced_by_one_of_another_folder() -> None:
    files = FileList({name: {"archive": None, "member": name} for name in ("one/1.jpg", "one/2.jpg", "two/1.jpg")})
    assert find_elsewhere(files, "two/2.jpg") is None
    assert find_elsewhere(files, "three/2.jpg") == {"archive": None, "member": "one/2.jpg"}


def test_many_missing_images_are_one_problem(tmp_path: Path) -> None:
    files = ("a.jpg", *(f"missing{number}.jpg" for number in range(20)))
    rows = [annotation(number, image=number) for number in range(21)]
    photo(tmp_path / "images" / "train" / "renamed.jpg", seed=1)
    problems = ProblemList()
    dataset = load_segmentation_dataset(simple(tmp_path, content(*rows, files=files)), problems=problems)
    assert areas(dataset) == [[("apple", 600)]]
    (problem,) = problems
    assert problem.severity == "error"
    assert "20 of 21 images cannot be found" in problem.message
    assert "1 images of the folder are not listed, such as 'renamed.jpg'" in problem.message
    assert "image 1: there is no file 'missing0.jpg'; copy it there" in problem.message


RLE = coco_mask.encode(np.asfortranarray(np.pad(np.ones((20, 30), np.uint8), ((8, 20), (10, 24)))))
RLE_TEXT = {"size": [HEIGHT, WIDTH], "counts": RLE["counts"].decode()}
RUNS = [10 * HEIGHT + 8, *[20, 28] * 29, 20, 20 + 24 * HEIGHT]


@pytest.mark.parametrize(
    "change",
    [
        {"segmentation": [[str(number) for number in RECTANGLE]]},
        {"segmentation": [[f" {number}.0" for number in RECTANGLE]]},
        {"segmentation": [["1e1", *RECTANGLE[1:]]]},
        {"segmentation": json.dumps([RECTANGLE])},
        {"segmentation": {"size": [str(HEIGHT), str(WIDTH)], "counts": RLE_TEXT["counts"]}},
        {"segmentation": {"size": [HEIGHT, WIDTH], "counts": [str(run) for run in RUNS]}},
        {"bbox": ["10", "8", "30", "20"]},
        {"area": "600"},
    ],
)
def test_numbers_stored_as_text_are_read(change: dict[str, Any], tmp_path: Path) -> None:
    rows = [annotation(number, **change) for number in range(3)]
    problems = ProblemList()
    dataset = load_segmentation_dataset(simple(tmp_path, content(*rows)), problems=problems)
    assert areas(dataset) == [[("apple", 600)] * 3]
    assert [row["area"] for row in dataset[0]["segments"]] == [600.0] * 3
    (warning,) = problems
    assert warning.file.endswith("instances_train.json")
    assert (warning.item, warning.severity) == ("annotation 0", "warning")
    assert warning.message == "numbers are stored as text, and were read as numbers (and in 2 more annotations)"


def test_sizes_and_ids_stored_as_text_are_read(tmp_path: Path) -> None:
    written = content(annotation("7", category="2", image="0"))
    written["images"][0].update(height=str(HEIGHT), width=float(WIDTH))
    written["categories"][0]["id"] = "1"
    dataset = load_segmentation_dataset(simple(tmp_path, written))
    assert areas(dataset) == [[("pear", 600)]]
    assert dataset[0]["segments"][0]["id"] == 7


@pytest.mark.parametrize(
    ("outline", "message"),
    [
        ([["ten", *RECTANGLE[1:]]], "a polygon with 'ten', which is no number"),
        ([["10,5", *RECTANGLE[1:]]], "a polygon with '10,5', which is no number"),
        ([["nan", *RECTANGLE[1:]]], "a polygon with 'nan', which is no number"),
        ([[None, *RECTANGLE[1:]]], "a polygon with None, which is no number"),
        ([[[10, 8], [40, 8], [40, 28]]], "a polygon is a flat list of numbers"),
        ([5, None, 7, 8, 9, 10], "a polygon with None"),
        ([[10**400, *RECTANGLE[1:]]], "a coordinate that is NaN or infinite"),
        ([{"x": 1}], "a polygon is a flat list of numbers"),
        ("10 8 40 8", "its segmentation is a text"),
        ({"size": ["48", "x"], "counts": "a"}, "size is"),
        ({"size": [48, 64], "counts": ["x"]}, "counts are neither text nor a list"),
    ],
)
def test_other_texts_are_reported_and_the_rest_is_read(outline: Any, message: str, tmp_path: Path) -> None:
    spec = simple(tmp_path, content(annotation(3, outline=outline), annotation(4)))
    problems = ProblemList()
    assert areas(load_segmentation_dataset(spec, problems=problems)) == [[("apple", 600)]]
    (error,) = problems.errors
    assert error.file.endswith("instances_train.json")
    assert error.item == "annotation 3"
    assert message in error.message


def test_classes_that_occur_only_as_crowd_are_told_and_can_be_objects(tmp_path: Path) -> None:
    brush = annotation(5, 2, outline={"size": [HEIGHT, WIDTH], "counts": RUNS}, iscrowd=1)
    spec = simple(tmp_path, content(annotation(1), brush))
    problems = ProblemList()
    dataset = load_segmentation_dataset(spec, problems=problems)
    assert [row["is_crowd"] for row in dataset[0]["segments"]] == [False, True]
    (warning,) = problems
    assert (warning.item, warning.severity) == ("class 'pear'", "warning")
    assert "only as crowd" in warning.message
    assert "crowd=objects" in warning.message
    problems = ProblemList()
    dataset = load_segmentation_dataset(f"{spec}?crowd=objects", problems=problems)
    assert [row["is_crowd"] for row in dataset[0]["segments"]] == [False, False]
    assert areas(dataset) == [[("apple", 600), ("pear", 600)]]
    assert list(problems) == []
    with pytest.raises(ValueError, match="crowd is 'yes'; give crowd=ignore or crowd=objects"):
        load_segmentation_dataset(f"{spec}?crowd=yes")


def test_a_parent_category_without_objects_is_told_and_can_be_dropped(tmp_path: Path) -> None:
    categories = [{"id": 0, "name": "fruits", "supercategory": "none"}]
    categories += [{"id": n, "name": name, "supercategory": "fruits"} for n, name in ((1, "apple"), (2, "pear"))]
    spec = simple(tmp_path, content(annotation(1, 1), categories=categories))
    problems = ProblemList()
    dataset = load_segmentation_dataset(spec, problems=problems)
    assert list(describe(dataset).id2label.values()) == ["fruits", "apple", "pear"]
    (warning,) = problems
    assert (warning.item, "drop=fruits" in warning.message) == ("category 'fruits'", True)
    for drop, names in (("fruits", ["apple", "pear"]), ("unused", ["apple"])):
        problems = ProblemList()
        dataset = load_segmentation_dataset(f"{spec}?drop={drop}", problems=problems)
        assert list(describe(dataset).id2label.values()) == names
        assert areas(dataset) == [[("apple", 600)]]
        assert list(problems) == []
    # A parent with objects of its own is a class like any other.
    problems = ProblemList()
    load_segmentation_dataset(simple(tmp_path, content(annotation(1, 0), categories=categories)), problems=problems)
    assert list(problems) == []


def test_all_splits_have_the_classes_of_all_splits(tmp_path: Path) -> None:
    for split, rows in {
        "train": [(3, "dog"), (5, " cat ")],
        "valid": [(1, "cat"), (2, "bird")],
        "test": [(8, "dog"), (9, "cat"), (10, "bird")],
    }.items():
        photo(tmp_path / split / "a.jpg")
        categories = [{"id": category, "name": name} for category, name in rows]
        own = annotation(1, rows[0][0])
        write_json(tmp_path / split / "_annotations.coco.json", content(own, categories=categories))
    spec = f"coco_folder:{tmp_path}"
    found = {}
    for split in available_splits(spec):
        problems = ProblemList()
        dataset = load_segmentation_dataset(spec, split=split, problems=problems)
        assert describe(dataset).id2label == {0: "dog", 1: "cat", 2: "bird"}
        found[split] = (areas(dataset)[0][0][0], [problem.message.split(";")[0] for problem in problems])
    assert found == {
        "train": ("dog", ["the class 'bird' is listed in valid, test, but not in train"]),
        "valid": ("cat", ["the class 'dog' is listed in train, test, but not in valid"]),
        "test": ("dog", []),
    }
    for split in ("train", "valid"):
        dataset = load_segmentation_dataset(f"{spec}?drop=unused", split=split, problems=ProblemList())
        assert describe(dataset).id2label == {0: "dog", 1: "cat"}  # no split has a bird


def test_halves_of_characters_are_refused(tmp_path: Path) -> None:
    written = content(names=("apple", "pear\ud800"))
    with pytest.raises(ValueError, match=r"instances_train\.json: category .* half of a character"):
        load_segmentation_dataset(simple(tmp_path, written))
    written = content(annotation(1, image="\ud800"))
    written["images"][0]["id"] = "\ud800"
    problems = ProblemList()
    assert len(load_segmentation_dataset(simple(tmp_path, written), problems=problems)) == 0
    assert "give each image a number or a text" in problems.errors[0].message


def test_names_that_differ_in_blanks_only_are_duplicates(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"instances_train\.json: several categories are called 'apple'"):
        load_segmentation_dataset(simple(tmp_path, content(names=("apple", "apple "))))


def test_a_list_of_classes_decides_their_order(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("pear\nplum\n")
    spec = simple(tmp_path, content(annotation(1, 2), annotation(2, 1)), f"?classes={tmp_path / 'names.txt'}")
    problems = ProblemList()
    dataset = load_segmentation_dataset(spec, problems=problems)
    assert describe(dataset).id2label == {0: "pear", 1: "plum"}
    assert areas(dataset) == [[("pear", 600)]]
    assert [(problem.item, problem.severity) for problem in problems] == [("category 'apple'", "error")]


@pytest.mark.parametrize(
    ("names", "options", "expected"),
    [
        (("apple", "pear"), "", [("apple", 500), ("pear", 100)]),
        (("apple", "pear"), "?background=ground", [("ground", 2472), ("apple", 500), ("pear", 100)]),
        (("apple", "pear"), "?background=true", [("background", 2472), ("apple", 500), ("pear", 100)]),
        (("apple", "_background_"), "", [("apple", 500), ("_background_", 2572)]),
        (("apple", "void"), "", [("background", 2472), ("apple", 500)]),
        (("apple", "pear"), "?void=pear", [("background", 2472), ("apple", 500)]),
    ],
)
def test_semantic_maps_of_outlines(
    names: tuple[str, ...], options: str, expected: list[tuple[str, int]], tmp_path: Path
) -> None:
    rows = [annotation(1), annotation(2, 2, outline=[INSIDE])]
    dataset = load_segmentation_dataset(simple(tmp_path, content(*rows, names=names), options), task="semantic")
    assert areas(dataset) == [expected]
    # Crowds are regions like any other in the semantic task.
    rows[0] |= {"iscrowd": 1, "segmentation": RLE_TEXT}
    dataset = load_segmentation_dataset(simple(tmp_path, content(*rows, names=names), options), task="semantic")
    assert areas(dataset) == [expected]


def test_void_categories_are_no_objects(tmp_path: Path) -> None:
    spec = simple(tmp_path, content(annotation(1), annotation(2, 2), names=("apple", "ignore")))
    dataset = load_segmentation_dataset(spec)
    assert describe(dataset).id2label == {0: "apple"}
    assert areas(dataset) == [[("apple", 600)]]


def test_one_class_and_void_only_is_refused(tmp_path: Path) -> None:
    spec = simple(tmp_path, content(names=("apple",)))
    with pytest.raises(ValueError, match="nothing can be learnt"):
        load_segmentation_dataset(f"{spec}?background=void", task="semantic")


def test_panoptic_maps_of_outlines(tmp_path: Path) -> None:
    rows = [
        annotation(2**40, 2, outline=[INSIDE]),  # listed before the road around it
        annotation(2, 1),
        annotation(3, 1, outline=[CORNER]),
        annotation(4, 3, outline=[INSIDE], iscrowd=1),
    ]
    spec = simple(tmp_path, content(*rows[:3], names=("road", "car", "sky")))
    with pytest.raises(ValueError, match=r"which classes are stuff.*stuff=NAME,NAME, or give stuff=none"):
        load_segmentation_dataset(spec, task="panoptic")
    dataset = load_segmentation_dataset(f"{spec}?stuff=road,sky", task="panoptic")
    assert describe(dataset).stuff_classes == [0, 2]
    assert sorted(areas(dataset)[0]) == [("car", 100), ("road", 600)]
    assert sorted(areas(load_segmentation_dataset(f"{spec}?stuff=none", task="panoptic"))[0]) == [
        ("road", 100),
        ("road", 600),
    ]
    with pytest.raises(ValueError, match=r"instances_train\.json: stuff=tree is no class; choose one of"):
        load_segmentation_dataset(f"{spec}?stuff=tree", task="panoptic")
    # `isthing` says the same without an option.
    written = content(*rows[:3], names=("road", "car"))
    for entry, is_thing in zip(written["categories"], (0, 1), strict=True):
        entry["isthing"] = is_thing
    dataset = load_segmentation_dataset(simple(tmp_path, written), task="panoptic")
    assert describe(dataset).stuff_classes == [0]
    assert sorted(areas(dataset)[0]) == [("car", 100), ("road", 600)]


def panoptic(root: Path) -> str:
    ids = np.zeros((HEIGHT, WIDTH), dtype=np.int64)
    ids[:10], ids[10:20], ids[20:24] = 5, 6, 7
    photo(root / "train" / "a.jpg")
    write_mask(root / "annotations" / "panoptic_train" / "a.png", colored(ids))
    infos = [{"id": 5, "category_id": 1}, {"id": 6, "category_id": 1}, {"id": 7, "category_id": 2, "iscrowd": 1}]
    categories = [{"id": 1, "name": "car", "isthing": 1}, {"id": 2, "name": "dog", "isthing": 1}]
    entry = {"image_id": 0, "file_name": "a.png", "segments_info": infos}
    write_json(root / "annotations" / "panoptic_train.json", content(entry, categories=categories))
    return f"coco_folder:{root}"


def test_options_and_semantic_maps_of_panoptic_pngs(tmp_path: Path) -> None:
    spec = panoptic(tmp_path)
    problems = ProblemList()
    load_segmentation_dataset(spec, task="panoptic", problems=problems)
    assert ["only as crowd" in problem.message for problem in problems] == [True]
    dataset = load_segmentation_dataset(f"{spec}?crowd=objects", task="panoptic")
    assert [row["is_crowd"] for row in dataset[0]["segments"]] == [False] * 3
    dataset = load_segmentation_dataset(f"{spec}?void=dog", task="panoptic")
    assert areas(dataset) == [[("car", 640), ("car", 640)]]
    assert areas(load_segmentation_dataset(spec, task="semantic")) == [[("car", 1280), ("dog", 256)]]
    dataset = load_segmentation_dataset(f"{spec}?background=ground&void=dog", task="semantic")
    assert areas(dataset) == [[("ground", 1536), ("car", 1280)]]


def test_many_missing_panoptic_pngs_are_one_problem(tmp_path: Path) -> None:
    spec = panoptic(tmp_path)
    file = tmp_path / "annotations" / "panoptic_train.json"
    written = json.loads(file.read_text())
    for number in range(1, 21):
        photo(tmp_path / "train" / f"{number}.jpg", number)
        written["images"].append({**written["images"][0], "id": number, "file_name": f"{number}.jpg"})
        written["annotations"].append({**written["annotations"][0], "image_id": number, "file_name": f"{number}.png"})
    write_json(file, written)
    problems = ProblemList()
    assert len(load_segmentation_dataset(f"{spec}?crowd=objects", task="panoptic", problems=problems)) == 1
    (problem,) = problems
    assert "20 of 21 panoptic PNGs cannot be found: image 1: there is no file '1.png'" in problem.message


def test_check_data_of_an_export_reports_once(tmp_path: Path) -> None:
    for seed, split in enumerate(("train", "valid")):
        photo(tmp_path / split / "a.jpg", seed)
        names = ("cat", "dog")[: 2 if split == "train" else 1]
        write_json(tmp_path / split / "_annotations.coco.json", content(names=names))
    report = check_dataset(f"coco_folder:{tmp_path}")
    assert [problem.message.split(";")[0] for problem in report.problems] == [
        "the class 'dog' is listed in train, but not in valid"
    ]
