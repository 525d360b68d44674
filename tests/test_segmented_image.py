"""Answers in memory: what a segmenter takes, and what can be had of its results."""

from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from hf_segvit import EoMTImageProcessor, Segmenter

from .test_outlines import filled
from .tiny_models import tiny_eomt

CATEGORIES = {index: index + 10 for index in range(5)}
SETTINGS = {"panoptic": {"threshold": 0.3}, "instance": {"instance_threshold": 0.02}, "semantic": {}}


@pytest.fixture(scope="module")
def segmenters() -> dict[str, Segmenter]:
    model = tiny_eomt(num_queries=9)
    with torch.no_grad():
        model.class_predictor.weight *= 4
    return {
        task: Segmenter(
            model,
            EoMTImageProcessor(
                task=task, size={"height": 64, "width": 64}, stuff_classes=[4], overlap_mask_area_threshold=0.05, **more
            ),
            device="cpu",
        )
        for task, more in SETTINGS.items()
    }


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)


def test_all_kinds_of_images_are_the_same_image(segmenters, pixels, tmp_path):
    path, stored = tmp_path / "a.png", BytesIO()
    image = Image.fromarray(pixels)
    image.save(path)
    image.save(stored, "PNG")
    segmenter = segmenters["panoptic"]
    expected = segmenter([image])[0]
    assert len(expected) > 2
    chw = torch.from_numpy(pixels).permute(2, 0, 1)
    for source in (path, str(path), stored.getvalue(), BytesIO(stored.getvalue()), image, pixels, chw, chw / 255):
        answer = segmenter(source)
        assert np.array_equal(answer.segment_map, expected.segment_map)
        assert answer.segments == expected.segments
        assert (
            answer.source == (str(path) if source in (path, str(path)) else "") if not hasattr(source, "shape") else 1
        )
    for many in ([path, image], (pixels, chw), np.stack([pixels, pixels]), torch.stack([chw, chw])):
        answers = segmenter(many)
        assert isinstance(answers, list)
        assert [len(answer) for answer in answers] == [len(expected)] * 2
    assert segmenter([]) == []
    lazily = segmenter(iter([path, pixels, chw]))
    assert iter(lazily) is lazily
    assert [answer.segments for answer in lazily] == [expected.segments] * 3
    grey = segmenter(pixels[..., 0])
    assert np.array_equal(grey.segment_map, segmenter(Image.fromarray(pixels[..., 0])).segment_map)


@pytest.mark.parametrize(
    ("source", "told"),
    [
        (np.zeros((4, 4, 3), np.float32), r"images\[0\]: an array of float32 and shape \(4, 4, 3\); give uint8"),
        (torch.full((3, 4, 4), 1.5), r"images\[0\]: floats from 1.5 to 1.5; give values in \[0, 1\]"),
        (torch.full((3, 4, 4), torch.nan), r"images\[0\]: floats from nan"),
        (b"", r"images\[0\]: empty"),
        ("nowhere.png", r"nowhere.png: "),
    ],
)
def test_what_is_no_image(source, told, segmenters):
    with pytest.raises(ValueError, match=told):
        segmenters["panoptic"](source)
    with pytest.raises(ValueError, match=told):
        list(segmenters["panoptic"].stream([source]))


def test_a_stream_is_lazy_and_may_leave_out_failures(segmenters, pixels):
    taken, failures = [], []

    def sources():
        for index in range(200):
            taken.append(index)
            yield b"no image" if index == 3 else np.roll(pixels, index, 0)

    stream = segmenters["instance"].stream(
        sources(), workers=2, writers=2, failed=lambda source, error: failures.append((source, str(error)))
    )
    first = next(stream)
    assert len(taken) < 20
    rest = list(stream)
    assert len(rest) == 198
    assert failures == [(b"no image", failures[0][1])]
    assert failures[0][1].startswith("images[3]: not an image")
    assert first.segments == segmenters["instance"](pixels).segments
    assert rest[-1].segments == segmenters["instance"](np.roll(pixels, 199, 0)).segments


@pytest.mark.parametrize("task", list(SETTINGS))
def test_masks_boxes_and_polygons_belong_together(task, segmenters, pixels):
    answer = segmenters[task](pixels)
    assert len(answer) > 1
    assert answer.masks.shape == (len(answer), *answer.segment_map.shape)
    for segment, mask, box, parts, row in zip(
        answer.segments,
        answer.masks,
        answer.boxes,
        answer.polygons,
        answer.to_coco(7, {0: 10, 1: 11, 2: 12, 3: 13, 4: 14}),
        strict=True,
    ):
        assert mask.sum() == segment.area == row["area"]
        y, x = mask.nonzero()
        assert box.tolist() == [x.min(), y.min(), x.max() + 1, y.max() + 1]
        covered = np.zeros_like(mask)
        for part in parts:
            for ring in (part.exterior, *part.holes):
                covered ^= filled(ring, mask.shape)
        assert np.array_equal(covered, mask)
        assert np.array_equal(coco_mask.decode(row["segmentation"]), mask)
        assert (row["image_id"], row["category_id"]) == (7, segment.label_id + 10)
        assert row["score"] == (1.0 if segment.score is None else segment.score)
        if task != "instance":
            assert np.array_equal(mask, answer.segment_map == segment.id)
    if task != "semantic":
        assert [segment.id for segment in answer.segments] == list(range(1, len(answer) + 1))


def test_crops_and_plots(segmenters, pixels):
    answer = segmenters["panoptic"](pixels)
    segment = answer.segments[1]
    x, y, width, height = segment.bbox
    assert np.array_equal(np.asarray(answer.crop(segment)), pixels[y : y + height, x : x + width])
    cut = np.asarray(answer.crop(segment, transparent=True))
    assert (cut[..., 3] == 255).sum() == segment.area
    assert answer.plot().size == (72, 48)
    assert np.array_equal(
        np.asarray(answer.plot(alpha=0, labels=False))[answer.segment_map < 0], pixels[answer.segment_map < 0]
    )


def test_saved_ids_are_those_in_memory(segmenters, pixels, tmp_path):
    answer = segmenters["panoptic"](pixels)
    paths = answer.save(tmp_path / "deep" / "a")
    assert [path.name for path in paths] == ["a.overlay.png", "a.panoptic.png", "a.segments.json"]
    stored = np.asarray(Image.open(tmp_path / "deep" / "a.panoptic.png")).astype(int) @ [1, 256, 65536]
    for segment in answer.segments:
        assert np.array_equal(stored == segment.id, answer.mask(segment))
    assert ((stored == 0) == (answer.segment_map < 0)).all()


def test_supervision(segmenters, pixels):
    pytest.importorskip("supervision")
    answer = segmenters["instance"](pixels)
    detections = answer.to_supervision()
    assert len(detections) == len(answer)
    assert np.array_equal(detections.mask, answer.masks)
    assert detections.class_id.tolist() == [segment.label_id for segment in answer.segments]
    assert detections.data["class_name"].tolist() == [segment.label for segment in answer.segments]
    assert detections.area.tolist() == [segment.area for segment in answer.segments]
