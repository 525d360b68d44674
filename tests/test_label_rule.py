"""The one rule for labels: which names are classes, void and background, with each option that changes it."""

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from hf_segvit.data.class_lists import VOID, label_rule, listed_names, read_classes, similar_names, union_of_splits
from hf_segvit.data.decoding import PaintedPanoptic, PaintedPolygons


@pytest.mark.parametrize(
    ("names", "task", "options", "classes", "background", "labels"),
    [
        # One class: the rest is background in the semantic task only.
        (["crack"], "semantic", {}, ("background", "crack"), 0, {"crack": 1}),
        (["crack"], "instance", {}, ("crack",), None, {"crack": 0, "_background_": None}),
        (["crack"], "semantic", {"background": "wall"}, ("wall", "crack"), 0, {"crack": 1, "_background_": 0}),
        # Several classes: void unless an option says otherwise.
        (["a", "b"], "semantic", {}, ("a", "b"), None, {"a": 0, "b": 1, "_background_": VOID, "__ignore__": VOID}),
        (["a", "b"], "semantic", {"background": "true"}, ("background", "a", "b"), 0, {"a": 1, "b": 2}),
        (["a", "b"], "semantic", {"background": True}, ("background", "a", "b"), 0, {"a": 1}),
        (["a", "b"], "semantic", {"background": 1}, ("background", "a", "b"), 0, {"a": 1}),
        (["a", "b"], "semantic", {"background": "void"}, ("a", "b"), None, {"b": 1}),
        (["a", "b"], "semantic", {"background": "b"}, ("a", "b"), 1, {"b": 1}),
        # labelme's own list of labels.
        (["__ignore__", "_background_", "c"], "semantic", {}, ("_background_", "c"), 0, {"_background_": 0, "c": 1}),
        (["__ignore__", "_Background_", "c"], "instance", {}, ("c",), None, {"_Background_": None, "__ignore__": -1}),
        (["_background_", "c", "d"], "panoptic", {}, ("c", "d"), None, {"_background_": None, "d": 1}),
        (["_background_", "c"], "panoptic", {"background": "rest"}, ("rest", "c"), 0, {"_background_": 0, "c": 1}),
        (["_background_", "c", "d"], "semantic", {"background": "void"}, ("c", "d"), None, {"_background_": VOID}),
        (["_background_", "c", "d"], "semantic", {"background": "sky"}, ("sky", "c", "d"), 0, {"_background_": 0}),
        (["c", "_background_", "d"], "semantic", {"background": "d"}, ("c", "d"), 1, {"_background_": 1, "d": 1}),
        # A class of that name without underscores can have objects.
        (["Background", "c"], "semantic", {}, ("Background", "c"), 0, {"c": 1}),
        (["background", "c"], "instance", {}, ("background", "c"), None, {"background": 0}),
        # Void, left out, blanks.
        (["a ", "Void", " b"], "instance", {}, ("a", "b"), None, {"Void": VOID, "void": VOID, "b": 1, " a ": 0}),
        (["a", "b", "c"], "instance", {"void": "a,b"}, ("c",), None, {"a": VOID, "b": VOID, "c": 0}),
        (["a", "b", "7"], "instance", {"drop": 7}, ("a", "b"), None, {"7": None}),
        (["a", "b", "c"], "semantic", {"drop": ["b"]}, ("a", "c"), None, {"b": None, "c": 1}),
        (
            ["void", "root", "c", "d"],
            "instance",
            {"drop": "unused", "used": {"c", "d"}},
            ("c", "d"),
            None,
            {"root": None},
        ),
    ],
)
def test_rule(
    names: list[str],
    task: str,
    options: dict[str, Any],
    classes: tuple[str, ...],
    background: int | None,
    labels: dict[str, int | None],
) -> None:
    rule = label_rule(names, task, **options)
    assert rule.names == classes
    assert rule.background == background
    assert {name: rule.label_of(name) for name in labels} == labels


@pytest.mark.parametrize(
    ("names", "task", "options", "message"),
    [
        (["a"], "semantic", {"background": "void"}, "one class and void only, and nothing can be learnt"),
        (["a", "_background_"], "semantic", {"background": False}, "nothing can be learnt"),
        (["a"], "semantic", {"background": "a"}, "no class is left besides void and background"),
        (["_background_", "__ignore__"], "instance", {}, "no class is left"),
        (["a", "a "], "instance", {}, "my.json: two classes are called 'a'; name them differently"),
        (["a", " "], "instance", {}, "class 1 has no name"),
        (["a", "b"], "instance", {"background": "c"}, "background=c is for the tasks semantic and panoptic"),
        (["tree", "b"], "instance", {"drop": "tre"}, "drop=tre is no class; did you mean tree"),
        (["tree", "b"], "instance", {"void": "x"}, "void=x is no class; choose one of tree, b"),
        (["a", "b"], "instance", {"crowd": "thing"}, "give crowd=ignore or crowd=objects"),
        (["a", "b"], "instance", {"drop": "unused"}, "cannot tell which classes are unused"),
    ],
)
def test_refused(names: list[str], task: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        label_rule(names, task, source="my.json", **options)


def test_decisions_are_said_with_the_option_that_changes_them() -> None:
    assert "background=background makes them a class" in label_rule(["a", "b"], "semantic").decisions[0]
    assert "since with one class" in label_rule(["a"], "semantic").decisions[0]
    rule = label_rule(["a", "b", "void", "c"], "instance", crowd="objects", drop="c")
    assert rule.crowds_are_objects
    assert [text.split(":")[0] for text in rule.decisions] == [
        "void, neither trained nor scored",
        "left out by drop=",
        "crowds are read as single objects (crowd=objects)",
    ]


def test_an_unlisted_label_suggests_one() -> None:
    with pytest.raises(ValueError, match="'buliding' is not in the list of classes; add it there, or did you mean bui"):
        label_rule(["building", "car"], "instance").label_of("buliding")


def test_similar_names() -> None:
    names = ["building", "buliding", "traffic light", "Traffic_Light", "car", "cat", "lane1", "lane2", "tree", "wheel"]
    assert similar_names([*names, "wheels"]) == [
        ("building", "buliding"),
        ("traffic light", "Traffic_Light"),
        ("wheel", "wheels"),
    ]


def test_union_of_splits() -> None:
    names, remarks = union_of_splits({"train": ["b", "a"], "val": ["c", "a"]})
    assert names == ["b", "a", "c"]
    assert remarks == [
        "the class 'b' is listed in train, but not in val",
        "the class 'c' is listed in val, but not in train",
    ]


def test_read_classes_follows_the_rule() -> None:
    labelme = ["__ignore__", "_background_", "crack"]  # labelme numbers these from -1 in masks
    assert read_classes(labelme).labels == {255: VOID, -1: VOID, 0: 0, 1: 1}
    assert listed_names(labelme) == tuple(labelme)
    assert read_classes(["a", "b", "c"], void="b,-100,2").labels == {0: 0, 1: VOID, 2: VOID, -100: VOID, 255: VOID}
    with pytest.raises(ValueError, match="two classes are called 'car'"):
        read_classes({"0": "car ", "1": "car"})
    with pytest.raises(ValueError, match="void=d is no class and no value"):
        read_classes(["a"], void="d")


def _row(segment_id: int, label: int, left: int, right: int) -> dict[str, Any]:
    polygon = [left, 0, right, 0, right, 4, left, 4]
    rle = {"size": [4, 12], "counts": None}
    return {"id": segment_id, "label_id": label, "is_crowd": False, "polygons": [polygon], "rle": rle}


def test_painted_maps() -> None:
    rows = [_row(2**40, 1, 2, 6), _row(7, 0, 0, 4), _row(8, 0, 8, 10), _row(9, VOID, 9, 10)]
    label_map, segments = PaintedPolygons(background=2)([], rows, "a.jpg")
    assert label_map[0].tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 0, -1, 2, 2]
    assert [row["label_id"] for row in segments] == [0, 1, 2]
    id_map, segments = PaintedPanoptic(frozenset({0, 2}), background=2)([], rows, "a.jpg")
    label_of = {row["id"]: row["label_id"] for row in segments} | {VOID: VOID}
    labels = np.vectorize(label_of.get)(id_map[0])
    assert labels.tolist() == [0, 0, 1, 1, 1, 1, 2, 2, 0, -1, 2, 2], "objects are on top of stuff"
    assert len(segments) == 3, "stuff is one segment"


def test_no_torch() -> None:
    code = "import sys, hf_segvit.data.class_lists; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
