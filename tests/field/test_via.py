"""VGG Image Annotator: projects and exports of its versions 2 and 3, written here, and the areas that must be read."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hf_segvit.cli import main
from hf_segvit.data.problems import ProblemList
from hf_segvit.data.readers.auto import recognise
from hf_segvit.data.reading import available_splits, describe, load_segmentation_dataset
from hf_segvit.models.mask_encoding import decode_mask

from ..data_folders import write_json
from .test_exports import AREAS, CAR, CAT, areas, delivered, flat, image, text, via_csv, via_json, via_regions

CLASSES = {
    "1": {"aname": "class", "anchor_id": "FILE1_Z0_XY1", "type": 4, "desc": "", "options": {"0": "car", "1": "cat"}},
    "2": {"aname": "note", "anchor_id": "FILE1_Z0_XY1", "type": 1, "desc": "", "options": {}},
}


def project_3(root: Path, *regions: tuple[list[float], dict[str, str]], **changes: Any) -> Path:
    """A project of VIA 3 with a.jpg; a region is `xy`, the number of its shape and coordinates, and `av`."""
    image(root / "a.jpg")
    metadata = {f"1_{n:06}": {"vid": "1", "flg": 0, "z": [], "xy": xy, "av": av} for n, (xy, av) in enumerate(regions)}
    content = {
        "project": {"pid": "__VIA_PROJECT_ID__", "pname": "x", "creator": "VGG Image Annotator", "vid_list": ["1"]},
        "config": {"file": {"loc_prefix": {"1": "", "2": "", "3": "", "4": ""}}, "ui": {"spatial_region_label": "1"}},
        "attribute": CLASSES,
        "file": {"1": {"fid": "1", "fname": "a.jpg", "type": 2, "loc": 1, "src": "blob:null/1"}},
        "metadata": metadata,
        "view": {"1": {"fid_list": ["1"]}},
    }
    write_json(root / "via_project_26Nov2026.json", {**content, **changes})
    return root


REGIONS_3 = (([7, *flat(CAR)], {"1": "0", "2": "red"}), ([2, 30, 20, 20, 16], {"1": "1"}))


def via_3(root: Path) -> None:
    project_3(root, *REGIONS_3)


@pytest.mark.parametrize("form", ["folder", "zip", "wrapped", "zip in a folder"])
def test_a_project_of_version_3_as_delivered(form: str, tmp_path: Path) -> None:
    path = delivered(tmp_path, via_3, form)
    assert recognise(str(path))[0] == "via"
    for task in ("instance", "semantic", "panoptic"):
        dataset = load_segmentation_dataset(f"auto:{path}", task=task)
        assert areas(dataset[0], describe(dataset).id2label) == AREAS
    assert available_splits(f"auto:{path}") == ["all"]


@pytest.mark.parametrize(
    ("xy", "area", "tolerance"),
    [
        ([2, 10, 10, 20, 5], 100, 0),
        ([3, 30, 20, 10], np.pi * 100, 5),
        ([4, 30, 20, 12, 6], np.pi * 72, 7),
        ([7, 0, 0, 20, 0, 0, 20], 200, 12),
        ([8, 10, 15, 20, 10, 30, 15, 20, 20], 200, 0),  # left, top, right, bottom
        ([9, 20, 20, 40, 20, 30, 30], np.pi * 100, 5),  # about (30, 20)
    ],
)
def test_shapes_of_version_3(xy: list[float], area: float, tolerance: float, tmp_path: Path) -> None:
    spec = f"via:{project_3(tmp_path, (xy, {'1': '0'}))}"
    (row,) = load_segmentation_dataset(spec)[0]["segments"]
    assert abs(int(decode_mask(row["rle"]).sum()) - area) <= tolerance


def test_what_has_no_area_in_version_3_is_told_and_is_no_class(tmp_path: Path) -> None:
    regions = [([7, *flat(CAR)], {"1": "0"}), ([1, 5, 5], {"1": "1"}), ([6, 1, 1, 5, 5, 9, 1], {"1": "1"})]
    problems = ProblemList()
    dataset = load_segmentation_dataset(f"via:{project_3(tmp_path, *regions)}", problems=problems)
    assert describe(dataset).id2label == {0: "car"}
    assert [(problem.severity, problem.message) for problem in problems] == [
        ("warning", "a region of shape 'point' has no area and is left out"),
        ("warning", "a region of shape 'polyline' has no area and is left out"),
    ]


@pytest.mark.parametrize(
    ("region", "changes", "message"),
    [
        (([2, 1, 2], {"1": "0"}), {}, r"region 0: a rect needs numbers x, y, width, height"),
        (([7, 1, 2, 3], {"1": "0"}), {}, r"lists of the same length"),
        (([9, 1, 1, 2, 2, 3, 3], {"1": "0"}), {}, r"a circle needs numbers"),
        (([8, "a", 1, 2, 2], {"1": "0"}), {}, r"a rect needs numbers"),
        (([2, 1, 2, 9, 9], {"1": "7"}), {}, r"no single 'class'; choose one in VIA"),
        (([2, 1, 2, 9, 9], {"1": "0,1"}), {}, r"no single 'class'; choose one in VIA"),
        (([2, 1, 2, 9, 9], {"1": "0"}), {"view": {"1": {"fid_list": ["1", "2"]}}}, r"view '1', which has no single"),
        (([2, 1, 2, 9, 9], {"1": "0"}), {"file": {"1": {"fname": "a.mp4", "type": 4}}}, r"'a.mp4' is no image"),
        (([2, 1, 2, 9, 9], {"1": "0"}), {"metadata": []}, r"'metadata' must be objects by number"),
    ],
)
def test_faults_of_version_3(region: Any, changes: Any, message: str, tmp_path: Path) -> None:
    spec = f"auto:{project_3(tmp_path, ([7, *flat(CAR)], {'1': '0'}), region, **changes)}"
    with pytest.raises(
        ValueError, match=rf"(?s)via_project_26Nov2026\.json.*{message.replace('region 0', 'region 1')}"
    ):
        load_segmentation_dataset(spec)


def test_parts_of_videos_and_labels_of_images_are_no_regions(tmp_path: Path) -> None:
    whole = {"vid": "1", "flg": 0, "z": [], "xy": [], "av": {"1": "1"}}
    path = project_3(tmp_path, REGIONS_3[0])
    file = path / "via_project_26Nov2026.json"
    content = json.loads(file.read_text())
    content["metadata"]["2_"] = whole
    content["metadata"]["3_"] = {**whole, "z": [0.5, 1.5]}
    write_json(file, content)
    dataset = load_segmentation_dataset(f"via:{path}")
    assert areas(dataset[0], describe(dataset).id2label) == {"car": 200}


def test_the_csv_of_version_3_is_refused_with_a_remedy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image(tmp_path / "a.jpg")
    header = "# CSV_HEADER = metadata_id,file_list,flags,temporal_coordinates,spatial_coordinates,metadata\n"
    text(
        tmp_path / "via3.csv",
        "# Exported using VGG Image Annotator\n" + header + '"1_x","[""a.jpg""]",0,"[]","[2,1,1,5,5]","{}"\n',
    )
    assert main(["check-data", f"auto:{tmp_path}"]) == 2
    assert "via3.csv: the CSV of VIA 3, whose labels are numbers; save the project instead" in capsys.readouterr().err


def test_exports_of_one_project_beside_each_other_count_once(tmp_path: Path) -> None:
    via_json(tmp_path)
    via_csv(tmp_path)
    problems = ProblemList()
    dataset = load_segmentation_dataset(f"via:{tmp_path}", problems=problems)
    assert len(dataset) == 1
    assert [str(problem.message) for problem in problems] == [
        f"listed in {tmp_path / 'via_project.json'}, too, with the same shapes; read once"
    ]


def test_two_files_that_differ_about_an_image_are_refused(tmp_path: Path) -> None:
    via_json(tmp_path)
    entry = {"filename": "a.jpg", "size": 1, "regions": via_regions()[:1], "file_attributes": {}}
    write_json(tmp_path / "old.json", {"a.jpg1": entry})
    with pytest.raises(
        ValueError, match=r"via_project\.json: image 'a': listed in .*old\.json, too, with other shapes"
    ):
        load_segmentation_dataset(f"via:{tmp_path}")


@pytest.mark.parametrize("name", ["https://example.org/photos/a.jpg", "C:\\photos\\a.jpg", "photos/a.jpg"])
def test_images_named_by_address_or_path(name: str, tmp_path: Path) -> None:
    image(tmp_path / "a.jpg")
    write_json(tmp_path / "via_region_data.json", {name: {"filename": name, "size": -1, "regions": via_regions()}})
    dataset = load_segmentation_dataset(f"auto:{tmp_path}")
    assert areas(dataset[0], describe(dataset).id2label) == AREAS


def test_classes_of_splits_are_the_same(tmp_path: Path) -> None:
    for split, number in (("train", 0), ("val", 1)):
        image(tmp_path / split / "a.jpg")
        regions = via_regions()[number : number + 1]
        write_json(tmp_path / split / "via_region_data.json", {"a.jpg1": {"filename": "a.jpg", "regions": regions}})
    for split, found in (("train", {"car": 200}), ("val", {"cat": 320})):
        dataset = load_segmentation_dataset(f"auto:{tmp_path}", split=split)
        assert describe(dataset).id2label == {0: "car", 1: "cat"}
        assert areas(dataset[0], describe(dataset).id2label) == found


def test_a_csv_of_something_else_is_left_alone(tmp_path: Path) -> None:
    via_csv(tmp_path)
    (tmp_path / "notes.csv").write_bytes("größe;farbe\n1;grün\n".encode("latin-1"))
    assert len(load_segmentation_dataset(f"auto:{tmp_path}")) == 1
    shutil.copy(tmp_path / "via_region_data.csv", tmp_path / "bad.csv")
    (tmp_path / "bad.csv").write_bytes((tmp_path / "bad.csv").read_bytes() + "ü".encode("latin-1"))
    with pytest.raises(ValueError, match=r"bad\.csv: no valid UTF-8 text"):
        load_segmentation_dataset(f"auto:{tmp_path}")


def test_cat_is_right_of_car(tmp_path: Path) -> None:
    via_3(tmp_path)
    semantic = load_segmentation_dataset(f"via:{tmp_path}?background=road", task="semantic")
    labels = {name: label for label, name in describe(semantic).id2label.items()}
    assert semantic[0]["segment_map"][CAT[0][1], CAT[0][0]] == labels["cat"]
    assert semantic[0]["segment_map"][CAR[0][1], CAR[0][0]] == labels["car"]
    assert semantic[0]["segment_map"][0, 0] == labels["road"]
