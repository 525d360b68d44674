"""Which class of the data set each of a model's classes is: by name, by synonym, by order, or an error."""

import pytest

from hf_segvit.data.label_tables import label_table
from hf_segvit.models.label_spaces import match_labels
from hf_segvit.models.published_labels import ADE20K_LABELS, CITYSCAPES_LABELS, COCO_PANOPTIC_LABELS

LABELS = {0: "cat", 1: "Dog", 2: "sea  lion"}


@pytest.mark.parametrize(
    ("data_labels", "table"),
    [
        ({0: "CAT", 1: "dog", 2: "sea lion"}, None),
        ({0: "cat, house cat", 1: "dog;hound", 2: "sea_lion"}, None),
        ({0: "sea-lion", 1: "cat", 2: "dog"}, [1, 2, 0]),
        ({2: "cat", 0: "dog, hound", 1: "sea lion"}, [2, 0, 1]),
    ],
)
def test_names_decide(data_labels, table):
    match = match_labels(LABELS, data_labels)
    assert (match.table if table is None else match.table.tolist()) == table
    assert match.by_order == []
    assert match.warning == ""


def test_words_that_publishers_differ_in_are_names_too():
    match = match_labels({0: "tv", 1: "cat"}, {0: "cat", 1: "television receiver"})
    assert (match.table.tolist(), match.warning) == ([1, 0], "")


def test_what_names_leave_is_matched_in_order_and_told():
    match = match_labels(LABELS, {0: "seal", 1: "cat", 2: "hound"})
    assert match.table.tolist() == [1, 0, 2]
    assert match.by_order == [("Dog", "seal"), ("sea  lion", "hound")]
    assert match.warning.startswith("2 of the model's classes have names that the data set lacks")
    assert "'Dog' as 'seal', 'sea  lion' as 'hound'" in match.warning
    strangers = match_labels({i: f"a{i}" for i in range(9)}, {i: f"b{i}" for i in range(9)})
    assert strangers.table is None
    assert "'a4' as 'b4' and 4 more" in strangers.warning


def test_a_model_without_names_is_matched_by_order_silently():
    match = match_labels({0: "LABEL_0", 1: "LABEL_1"}, {0: "road", 1: "car"})
    assert (match.table, match.warning) == (None, "")


def test_classes_with_the_same_first_word_are_not_confused():
    ours = {0: "screen, monitor", 1: "screen, silver screen"}
    assert match_labels(ours, {0: "screen, silver screen", 1: "screen, monitor"}).table.tolist() == [1, 0]
    # Shortened, both are "screen": nothing but their order is left, and that is told.
    match = match_labels(ours, {0: "screen", 1: "crt"})
    assert (match.table, len(match.by_order)) == (None, 2)


def test_another_number_of_classes_is_an_error():
    with pytest.raises(ValueError, match=r"3 classes and the data set 2.*model alone has \['sea  lion'\]"):
        match_labels(LABELS, {0: "cat", 1: "dog"})


@pytest.mark.parametrize(
    ("table", "names"),
    [("coco_panoptic", COCO_PANOPTIC_LABELS), ("ade20k", ADE20K_LABELS), ("cityscapes", CITYSCAPES_LABELS)],
)
def test_published_models_fit_our_readers(table, names):
    match = match_labels(dict(enumerate(names)), label_table(table).id2label)
    assert (match.table, match.by_order) == (None, [])
