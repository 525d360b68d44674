"""Classes of two models matched by name."""

import pytest

from hf_segvit.data.label_tables import label_table
from hf_segvit.models.label_spaces import ALIASES, first_synonym, match_label_spaces
from hf_segvit.models.published_labels import ADE20K_LABELS, CITYSCAPES_LABELS, COCO_PANOPTIC_LABELS


def labels(*names):
    return dict(enumerate(names))


@pytest.mark.parametrize("name", ["coco_panoptic", "coco_instance", "coco_stuff", "ade20k", "cityscapes"])
def test_published_label_sets_match_themselves_in_any_order(name):
    ours = label_table(name).id2label
    backwards = labels(*reversed(ours.values()))
    assert match_label_spaces(ours, ours).class_matches == tuple(range(len(ours)))
    assert match_label_spaces(ours, backwards).class_matches == tuple(reversed(range(len(ours))))


@pytest.mark.parametrize(
    ("table", "published"),
    [("coco_panoptic", COCO_PANOPTIC_LABELS), ("ade20k", ADE20K_LABELS), ("cityscapes", CITYSCAPES_LABELS)],
)
def test_label_tables_and_published_configs_agree(table, published):
    result = match_label_spaces(labels(*published), label_table(table).id2label)
    assert result.class_matches == tuple(range(len(published)))


def test_case_separators_synonyms_and_aliases():
    ours = labels("Traffic_Light", "person", "tv", "Dining-Table", "sofa", "hair drier")
    theirs = labels(
        "couch", "person, individual, someone", "television receiver;tv", "hair dryer", "dining table ", "traffic light"
    )
    assert match_label_spaces(ours, theirs).class_matches == (5, 1, 2, 4, 0, 3)


def test_the_words_of_the_ade20k_lists_that_mask2former_and_oneformer_come_with():
    words = {
        "window ": "windowpane",
        "tub": "bathtub",
        "rail": "railing",
        "street lamp": "streetlight",
        "tv": "television receiver",
        "plane": "airplane",
        "clothes": "apparel",
        "pool": "swimming pool",
        "falls": "waterfall",
        "trash can": "ashcan",
        "toilet, can, commode, crapper, pot, potty, stool, throne": "toilet",
    }
    published = label_table("ade20k").id2label
    names = {first_synonym(name): label for label, name in published.items()}
    theirs = dict(published)
    for word, name in words.items():
        theirs[names[name]] = word
    assert match_label_spaces(theirs, published).class_matches == tuple(range(150))


def test_a_whole_name_wins_over_a_synonym():
    ours, theirs = labels("screen", "screen, projector"), labels("screen, projector", "screen")
    assert match_label_spaces(ours, theirs).class_matches == (1, 0)


def test_labels_read_from_json_have_strings_for_ids():
    ours = {str(number): f"class {number}" for number in range(12)}
    assert match_label_spaces(ours, labels(*ours.values())).class_matches == tuple(range(12))


def test_80_things_in_133_classes():
    panoptic, things = label_table("coco_panoptic").id2label, label_table("coco_instance").id2label
    result = match_label_spaces(panoptic, things, "keep")
    assert result.class_matches == (*range(80), *[-1] * 53)
    assert result.generator_only[0] == "banner"
    assert len(result.generator_only) == 53
    assert result.classifier_only == ()
    assert "only the generator knows 'banner'" in result.description
    back = match_label_spaces(things, panoptic, "keep")
    assert back.class_matches == tuple(range(80))
    assert len(back.classifier_only) == 53


def test_different_classes_are_an_error_that_names_them():
    with pytest.raises(ValueError, match=r"generator knows 'dog'; only the classifier knows 'cow'.*'keep'.* the 1 "):
        match_label_spaces(labels("cat", "dog"), labels("cow", "cat"))
    with pytest.raises(ValueError, match="'banner', 'blanket', 'bridge', 'cardboard', 'counter' and 48 more"):
        match_label_spaces(label_table("coco_panoptic").id2label, label_table("coco_instance").id2label)


def test_without_a_shared_class_there_is_nothing_to_fuse():
    with pytest.raises(ValueError, match=r"share no class: .*'cat'.*'dog'"):
        match_label_spaces(labels("cat"), labels("dog"), "keep")


def test_classes_without_names():
    generic = labels("LABEL_0", "LABEL_1")
    assert match_label_spaces(generic, generic).class_matches == (0, 1)
    for mismatch in ("error", "keep"):
        with pytest.raises(ValueError, match=r"classes of the classifier have no names \('cat', 'LABEL_0'\).*id2label"):
            match_label_spaces(labels("cat", "dog"), generic, mismatch)
    with pytest.raises(ValueError, match="the generator and the classifier have no names"):
        match_label_spaces(generic, labels("LABEL_0"))


def test_names_that_occur_twice_match_by_place_only_where_all_do():
    doubled = labels("road", "car", "car")
    assert match_label_spaces(doubled, doubled).class_matches == (0, 1, 2)
    with pytest.raises(ValueError, match="'car', 'car'"):
        match_label_spaces(doubled, labels("car", "road", "car"))


def test_unknown_mode():
    with pytest.raises(ValueError, match="label_mismatch='drop' is not one of 'error', 'keep'"):
        match_label_spaces(labels("cat"), labels("cat"), "drop")


def test_aliases_never_make_two_published_classes_one():
    """An alias and its value must not both be classes of one label set."""
    for table in ("coco_panoptic", "coco_stuff", "ade20k", "cityscapes"):
        names = {first_synonym(name) for name in label_table(table).id2label.values()}
        assert not [alias for alias, name in ALIASES.items() if alias in names and name in names]
