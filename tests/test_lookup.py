"""Names that a user gives: near ones, import paths, entry points of other packages."""

import importlib.metadata
import re
import sys

import pytest

from hf_segvit.lookup import entry_points, import_object, is_import_path, parse_key_values, suggestion


def test_the_nearest_name_is_suggested():
    assert suggestion("panoptc", ["panoptic", "semantic"]) == "did you mean panoptic?"
    assert suggestion("bathc_size", ["batch_size", "steps"], 2) == "did you mean batch_size?"
    assert suggestion("Focal", ["FocalCriterion", "Mask"]) == "did you mean FocalCriterion?"
    assert suggestion("xyz", ["panoptic", "semantic"]) == "choose one of panoptic, semantic"
    assert suggestion(3, ["panoptic"]) == "choose one of panoptic"


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "segvit_lookup_example.py").write_text(
        "class Loss:\n    def forward(self): ...\n    class Inner: ...\n\nvalue = 3\n"
    )
    (tmp_path / "segvit_lookup_broken.py").write_text("import segvit_lookup_absent\n")
    (tmp_path / "segvit_lookup_failing.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("example", "broken", "failing"):
        sys.modules.pop(f"segvit_lookup_{name}", None)


def test_an_import_path_gives_the_class(module):
    loss = import_object("segvit_lookup_example:Loss", "criterion", ["forward"])
    assert loss.__name__ == "Loss"
    assert import_object("segvit_lookup_example:Loss.Inner", "criterion") is loss.Inner
    assert import_object("segvit_lookup_example:value", "x", is_class=False) == 3


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("segvit_lookup_example", r"criterion='segvit_lookup_example' is no import path; give package.module:Name"),
        ("a b:C", "no import path"),
        ("segvit_lookup_nowhere:Loss", "cannot be imported.*install its package or add its folder to PYTHONPATH"),
        ("segvit_lookup_broken:Loss", "No module named 'segvit_lookup_absent'.*; fix it"),
        ("segvit_lookup_failing:Loss", "ZeroDivisionError: division by zero.*; fix it"),
        ("segvit_lookup_example:Los", "segvit_lookup_example has no Los; did you mean Loss?"),
        ("segvit_lookup_example:value", "criterion=segvit_lookup_example:value is int and no class"),
        ("segvit_lookup_example:Loss", "has no method count_normalizers; add it, see docs/extending.md"),
    ],
)
def test_what_cannot_be_looked_up_is_named(module, path, message):
    with pytest.raises(ValueError, match=message):
        import_object(path, "criterion", ["count_normalizers"])


def test_import_paths_are_told_from_names():
    assert is_import_path("package.module:Class")
    assert not is_import_path("coco:/data/coco")
    assert not is_import_path("eomt")
    assert not is_import_path(None)


def test_two_packages_with_one_name_are_refused(monkeypatch):
    points = [
        importlib.metadata.EntryPoint("dicom", "one.reader", "group"),
        importlib.metadata.EntryPoint("dicom", "one.reader", "group"),
        importlib.metadata.EntryPoint("other", "two.reader", "group"),
    ]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points)
    assert sorted(entry_points("group")) == ["dicom", "other"]
    points.append(importlib.metadata.EntryPoint("dicom", "three.reader", "group"))
    with pytest.raises(ValueError, match=r"'dicom' in group: one\.reader and three\.reader; uninstall one"):
        entry_points("group")


def test_settings_are_yaml_or_text():
    words = [
        "a=4",
        "b=1e-5",
        "c=64,96",
        "d=[1, x]",
        "e=none",
        "f=True",
        "g=",
        "h='x,y'",
        "i.j={k: 1.5}",
        "l= two words ",
    ]
    assert parse_key_values(words) == {
        **{"a": 4, "b": 1e-5, "c": [64, 96], "d": [1, "x"], "e": "none", "f": True, "g": None, "h": "x,y"},
        **{"i.j": {"k": 1.5}, "l": "two words"},
    }
    assert parse_key_values(["a=2024", "b=x, [y]: #1=z", "c=null", "d=2024"], ("a", "b", "c")) == {
        **{"a": "2024", "b": "x, [y]: #1=z", "c": None, "d": 2024}
    }


def test_the_last_of_a_key_counts_and_stands_last():
    assert list(parse_key_values(["a.b=1", "a={}", "a.b=2"]).items()) == [("a", {}), ("a.b", 2)]


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("size", "'size' is no setting; give key=value"),
        ("=3", "give key=value"),
        ("a..b=3", "give key=value"),
        ("a=[", "the value of a: no valid YAML"),
        ("a={b: 1, b: 2}", "the key b occurs twice"),
        ("a=!!python/object/apply:os.getcwd []", "no valid YAML"),
    ],
)
def test_words_that_are_no_settings_are_refused(word, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        parse_key_values([word])
