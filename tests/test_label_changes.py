"""What a classifier changed: found, told, drawn, and written by `hf-segvit segment --classifier --compare`."""

import json

import numpy as np
import pytest
from PIL import Image
from transformers import Mask2FormerImageProcessor

from hf_segvit import EoMTImageProcessor, ViTPImageProcessor
from hf_segvit.cli import main
from hf_segvit.inference.output_files import changes_text, label_changes, write_segment_files
from hf_segvit.inference.segmented_image import Segment, SegmentedImage
from hf_segvit.inference.segmenter import Segmenter

from .tiny_generators import LABELS, noise_images, tiny_classifier, tiny_generator

ROAD, GRASS, CAR, DOG, PERSON = LABELS


def answer(task, rows, labels, rles=None):
    """An image whose map is drawn with digits; `labels` are (label id, score) by digit, void is a dot."""
    ids = np.array([[-1 if cell == "." else int(cell) for cell in row] for row in rows], dtype=np.int32)
    segments = [
        Segment(
            number,
            label,
            LABELS[label],
            score,
            int((ids == number).sum()),
            (0, 0, len(rows[0]), len(rows)),
            rles and rles[number],
        )
        for number, (label, score) in labels.items()
    ]
    return SegmentedImage(task, ids, segments)


def told(before, after):
    sides = [(change.before, change.after, change.area) for change in label_changes(before, after)]
    return [
        (*((s.label, s.score) if s else (None, None)), *((t.label, t.score) if t else (None, None)), area)
        for s, t, area in sides
    ]


def test_a_panoptic_segment_that_was_renamed():
    before = answer("panoptic", ["0011", "0011", "22.."], {0: (ROAD, 0.9), 1: (DOG, 0.6), 2: (CAR, 0.8)})
    after = answer("panoptic", ["0011", "0011", "22.."], {0: (ROAD, 0.9), 1: (PERSON, 0.7), 2: (CAR, 0.3)})
    assert told(before, after) == [("dog", 0.6, "person", 0.7, 4)]
    assert told(before, before) == []


def test_stuff_that_was_merged_and_a_segment_that_moved():
    before = answer("panoptic", ["000111", "000111", "000122"], {0: (GRASS, 0.9), 1: (ROAD, 0.6), 2: (CAR, 0.5)})
    # The road became grass and part of that; the car took a pixel of it, which is not half of either.
    after = answer("panoptic", ["000000", "000000", "000111"], {0: (GRASS, 0.9), 1: (CAR, 0.5)})
    assert told(before, after) == [("road", 0.6, "grass", 0.9, 6)]


def test_segments_that_come_and_go():
    before = answer("panoptic", ["0011", "0011", "...."], {0: (ROAD, 0.9), 1: (DOG, 0.6)})
    after = answer("panoptic", ["00..", "00..", "1111"], {0: (ROAD, 0.9), 1: (CAR, 0.7)})
    assert sorted(told(before, after), key=str) == [("dog", 0.6, None, None, 4), (None, None, "car", 0.7, 4)]
    assert {str(change.as_row()["id"]) for change in label_changes(before, after)} == {"None", "1"}
    assert "dog 0.60 -> nothing" in changes_text(label_changes(before, after), 12)


def test_semantic_changes_are_of_classes():
    before = answer("semantic", ["0011", "0.11", "2222"], {ROAD: (ROAD, None), GRASS: (GRASS, None), CAR: (CAR, None)})
    after = answer("semantic", ["0033", "0.13", "0222"], {label: (label, None) for label in (ROAD, GRASS, CAR, DOG)})
    assert told(before, after) == [("grass", None, "dog", None, 3), ("car", None, "road", None, 1)]


def test_instances_are_compared_mask_by_mask_with_their_best_label():
    rles = [{"size": [1, 4], "counts": text} for text in ("a", "a", "b", "c")]
    before = answer("instance", ["0123"], {0: (CAR, 0.4), 1: (DOG, 0.5), 2: (CAR, 0.9), 3: (CAR, 0.3)}, rles)
    after = answer("instance", ["0121"], {0: (CAR, 0.6), 1: (DOG, 0.5), 2: (CAR, 0.8)}, rles)
    assert told(before, after) == [("dog", 0.5, "car", 0.6, 1), ("car", 0.3, None, None, 1)]


def test_the_table():
    before = answer("panoptic", ["0001", "2233"], {i: (label, 0.5) for i, label in enumerate((ROAD, DOG, CAR, GRASS))})
    after = answer("panoptic", ["0001", "2233"], {i: (label, 0.75) for i, label in enumerate((CAR, CAR, DOG, GRASS))})
    text = changes_text(label_changes(before, after), 8, max_rows=2)
    assert text == "   37.5 %  road 0.50 -> car 0.75\n   25.0 %  car 0.50 -> dog 0.75\n  and 1 more"
    assert changes_text([], 8) == "  no label changed"


def test_other_questions_cannot_be_compared():
    with pytest.raises(ValueError, match="cannot be compared"):
        label_changes(answer("panoptic", ["0"], {0: (ROAD, 0.5)}), answer("semantic", ["0"], {0: (ROAD, None)}))


def test_the_drawing_shows_both_answers(tmp_path):
    image = Image.new("RGB", (240, 160), "gray")
    before, after = (answer("panoptic", ["0" * 240] * 160, {0: (label, 0.5)}) for label in (ROAD, CAR))
    about = {"model": "m", "threshold": 0.5, "picture": "one.png"}
    write_segment_files(tmp_path / "one", image, after, LABELS, about, before)
    with Image.open(tmp_path / "one.comparison.png") as sheet:
        assert sheet.width > 3 * 240
        thirds = [np.asarray(sheet)[100, round(sheet.width * share)] for share in (1 / 6, 1 / 2, 5 / 6)]
    assert thirds[0].tolist() == [128, 128, 128]
    assert np.ptp(thirds[1]) > 5
    assert abs(thirds[1].astype(int) - thirds[2]).max() > 20


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Tiny random parts, whose masks overlap so much that hardly any would keep 80 % of its own."""
    folder = tmp_path_factory.mktemp("parts")
    for kind in ("segvit_eomt", "mask2former"):
        tiny_generator(kind).save_pretrained(folder / kind)
    settings = {"threshold": 0.05, "overlap_mask_area_threshold": 0.05, "instance_threshold": 0.02}
    EoMTImageProcessor(size=64, stuff_classes=[ROAD, GRASS], **settings).save_pretrained(folder / "segvit_eomt")
    Mask2FormerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder / "mask2former")
    tiny_classifier().save_pretrained(folder / "vit_p")
    ViTPImageProcessor(size={"height": 56, "width": 56}).save_pretrained(folder / "vit_p")
    other = tiny_classifier({**LABELS, PERSON: "horse"})
    other.save_pretrained(folder / "others")
    ViTPImageProcessor(size={"height": 56, "width": 56}).save_pretrained(folder / "others")
    return folder


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "one.png"
    noise_images([(70, 50)])[0].save(path)
    return path


def segment(image, output, checkpoints, kind="segvit_eomt", *options):
    command = ["segment", image, "--model", checkpoints / kind, "--output", output, "--device", "cpu", *options]
    return main([str(word) for word in command])


@pytest.mark.parametrize("task", ["panoptic", "instance", "semantic"])
@pytest.mark.parametrize("kind", ["segvit_eomt", "mask2former"])
def test_the_command_lists_and_draws_what_changed(kind, task, checkpoints, image, tmp_path, capsys):
    threshold = {"panoptic": 0.2, "instance": 0.02, "semantic": None}[task]
    options = ["--classifier", checkpoints / "vit_p", "--alpha", 0.9, "--compare", "--task", task]
    options += [] if threshold is None else ["--threshold", threshold]
    assert segment(image, tmp_path / "out", checkpoints, kind, *options) == 0
    segmenter = Segmenter.from_pretrained(
        str(checkpoints / kind), task=task, device="cpu", classifier=str(checkpoints / "vit_p"), alpha=0.9
    )
    ((before, after),) = segmenter.compare([Image.open(image)], threshold)
    changes = label_changes(before, after)
    content = json.loads((tmp_path / "out" / "one.segments.json").read_text())
    assert [row["label"] for row in content["segments"]] == [segment.label for segment in after.segments]
    assert (content["classifier"], content["alpha"]) == (str(checkpoints / "vit_p"), 0.9)
    assert content["label_changes"] == [change.as_row() for change in changes]
    assert changes_text(changes, 70 * 50) in capsys.readouterr().out
    with Image.open(tmp_path / "out" / "one.comparison.png") as sheet:
        assert sheet.width > 3 * 70
    # The comparison's first side is alpha 0, and the second what a plain call says.
    assert np.array_equal(segmenter([Image.open(image)], threshold)[0].segment_map, after.segment_map)
    segmenter.model.config.alpha = 0.0
    (alone,) = segmenter([Image.open(image)], threshold)
    assert np.array_equal(alone.segment_map, before.segment_map)
    assert alone.segments == before.segments


def test_labels_do_change(checkpoints, image):
    """Or the test above would compare nothing."""
    segmenter = Segmenter.from_pretrained(
        str(checkpoints / "segvit_eomt"), device="cpu", classifier=str(checkpoints / "vit_p"), alpha=1.0
    )
    ((before, after),) = segmenter.compare([Image.open(image)], 0.1)
    assert label_changes(before, after)


def test_a_fused_checkpoint_needs_no_classifier(checkpoints, image, tmp_path):
    parts = Segmenter.from_pretrained(
        str(checkpoints / "mask2former"), device="cpu", classifier=str(checkpoints / "vit_p"), alpha=0.7
    )
    for part in (parts.model, parts.processor):
        part.save_pretrained(checkpoints / "fused")
    options = ["--threshold", 0.2]
    classifier = ["--classifier", checkpoints / "vit_p", "--alpha", 0.7]
    assert segment(image, tmp_path / "one", checkpoints, "fused", "--compare", *options) == 0
    assert segment(image, tmp_path / "two", checkpoints, "mask2former", "--compare", *classifier, *options) == 0
    contents = [json.loads((tmp_path / name / "one.segments.json").read_text()) for name in ("one", "two")]
    assert contents[0]["alpha"] == 0.7
    for name in ("segments", "label_changes"):
        assert contents[0][name] == contents[1][name]


def test_views_of_the_fused_model(checkpoints, image, tmp_path):
    options = ["--classifier", checkpoints / "vit_p", "--task", "semantic"]
    assert segment(image, tmp_path / "plain", checkpoints, "segvit_eomt", *options) == 0
    views = ["--tta-scales", "0.5,1,1.5", "--tta-flip"]
    assert segment(image, tmp_path / "views", checkpoints, "segvit_eomt", *options, *views) == 0
    maps = [np.asarray(Image.open(tmp_path / name / "one.semantic.png")) for name in ("plain", "views")]
    assert maps[0].shape == maps[1].shape
    assert not np.array_equal(*maps)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--compare"], "--compare shows what a classifier changes; name one with --classifier"),
        (["--classifier", "vit_p", "--alpha", "1.5"], "--alpha 1.5 is outside [0, 1]"),
        (["--alpha", "0.5"], "is no fused model (segvit_vit_p_fusion); name a classifier too"),
        (["--label-mismatch", "keep"], "--label-mismatch keep is about a --classifier; name one"),
        (["--classifier", "segvit_eomt"], "a model of type 'segvit_eomt'; this command classifies points"),
        (["--classifier", "others"], "horse"),
        (["--classifier", "others"], "; pass --label-mismatch keep to fuse"),
        (["--tta-flip"], "can be averaged for semantic segmentation only, not for panoptic; ask for --task semantic,"),
        (["--task", "semantic", "--tta-scales", "1,big"], "--tta-scales 1,big: give numbers separated by commas"),
        (["--task", "semantic", "--tta-scales", "0"], "scale 0.0 of a view is outside (0, 8]"),
    ],
)
def test_wrong_options_end_in_one_line(options, message, checkpoints, image, tmp_path, capsys):
    options = [checkpoints / option if (checkpoints / option).is_dir() else option for option in options]
    assert segment(image, tmp_path / "out", checkpoints, "segvit_eomt", *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_classes_that_only_the_generator_knows_are_kept_on_request(checkpoints, image, tmp_path):
    options = ["--classifier", checkpoints / "others", "--label-mismatch", "keep", "--threshold", 0.1]
    assert segment(image, tmp_path / "out", checkpoints, "segvit_eomt", *options) == 0
