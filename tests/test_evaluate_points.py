"""Evaluation of a point classifier: which points, which truth, whose answers; generators and other label orders."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import distance_transform_edt
from torch import nn

from hf_segvit.data.generated_scenes import GeneratedScenes
from hf_segvit.data.reading import describe, load_segmentation_dataset
from hf_segvit.evaluation.points import (
    InteriorPoints,
    MaximumPoints,
    RandomPoints,
    evaluate_points,
    labelled_segments,
    point_source,
)
from hf_segvit.inference.point_classifier import PointClassifier
from hf_segvit.inference.segmenter import Segmenter
from hf_segvit.metrics.accumulation import ImageMetric
from hf_segvit.models.configuration_vit_p import ViTPConfig
from hf_segvit.models.image_decoding import to_rgb
from hf_segvit.models.image_processing_eomt import EoMTImageProcessor
from hf_segvit.models.image_processing_vit_p import ViTPImageProcessor
from hf_segvit.models.modeling_vit_p import ViTPForPointClassification
from tests.tiny_models import randomize, tiny_eomt

LABELS = {0: "disc", 1: "sky", 2: "grass", 3: "square", 4: "water", 5: "triangle"}


def tiny_vit_p(**overrides):
    torch.manual_seed(0)
    settings = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "image_size": 56,
        "id2label": LABELS,
        "label2id": {name: label for label, name in LABELS.items()},
    }
    return randomize(ViTPForPointClassification(ViTPConfig(**{**settings, **overrides}))).eval()


def predictor_of(model) -> PointClassifier:
    return PointClassifier(model, ViTPImageProcessor(size=56))


def scenes(number: int = 5, **options):
    return load_segmentation_dataset(f"generated:easy?num_scenes={number}&size=48", split="val", **options)


def cells(points, size):
    return (points[:, 1] * size[0]).long().numpy(), (points[:, 0] * size[1]).long().numpy()


def test_random_points_are_those_of_the_classes_and_always_the_same():
    entry = GeneratedScenes(1, "val", size=(40, 60))[0]
    segment_map, labels = labelled_segments(entry)
    asked = RandomPoints(200, seed=3)(entry, 0)
    np.testing.assert_array_equal(labels[segment_map[cells(asked.points, (40, 60))]], asked.labels.numpy())
    assert torch.equal(asked.points, RandomPoints(200, seed=3)(entry, 0).points)
    assert not torch.equal(asked.points, RandomPoints(200, seed=3)(entry, 1).points)
    counts = np.unique(asked.labels, return_counts=True)[1] / 200
    np.testing.assert_allclose(counts, 1 / len(counts), atol=0.12)


def test_interior_points_are_the_innermost_of_every_segment():
    entry = GeneratedScenes(3, "val", size=(40, 60), difficulty="hard")[2]
    segment_map, labels = labelled_segments(entry)
    asked = InteriorPoints()(entry, 0)
    assert asked.labels.tolist() == labels.tolist()
    for place, (row, column) in enumerate(zip(*cells(asked.points, (40, 60)), strict=True)):
        depth = distance_transform_edt(np.pad(segment_map == place, 1))[1:-1, 1:-1]
        assert depth[row, column] == depth.max()


class FixedGenerator(nn.Module):
    """Stands for any segmentation model: masks with one high cell each, and classes that it is more or less sure of."""

    def __init__(self, places, class_logits, grid):
        super().__init__()
        self.masks = torch.full((1, len(places), *grid), -5.0)
        for query, (row, column) in enumerate(places):
            self.masks[0, query, row, column] = 3.0
        self.classes = torch.tensor(class_logits)[None]
        self.config = tiny_eomt().config

    def forward(self, pixel_values, **kwargs):
        outputs = type("Outputs", (), {})()
        outputs.class_queries_logits, outputs.masks_queries_logits = self.classes, self.masks
        return outputs


def test_maximum_points_are_the_generators_and_the_truth_is_the_pixels():
    # An image of 32 x 64 fills the upper half of the input of 64 x 64, whose masks have 16 x 16 cells.
    segment_map = np.full((32, 64), -1, np.int32)
    segment_map[:, :32] = 0
    segment_map[:16, 32:] = 1
    rows = [{"id": 0, "label_id": 2, "is_crowd": False}, {"id": 1, "label_id": 1, "is_crowd": False}]
    entry = {"image": np.zeros((32, 64, 3), np.uint8), "image_id": 0, "segment_map": segment_map, "segments": rows}
    sure, unsure, nothing = [0.0, 9.0, 0.0, 0.0], [0.1, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 9.0]
    places = [(1, 2), (1, 12), (6, 12), (3, 3), (4, 4)]
    model = FixedGenerator(places, [sure, sure, sure, unsure, nothing], (16, 16))
    processor = EoMTImageProcessor(task="panoptic", size={"height": 64, "width": 64})
    asked = MaximumPoints(Segmenter(model, processor, task="panoptic"))(entry, 0)
    # Cell (r, c) has its middle at (r + 0.5) / 8 of the image's height, as the image has but 8 rows of cells.
    torch.testing.assert_close(
        asked.points, torch.tensor([[2.5 / 16, 1.5 / 8], [12.5 / 16, 1.5 / 8], [12.5 / 16, 6.5 / 8]])
    )
    assert asked.labels.tolist() == [2, 1, -100]
    torch.testing.assert_close(asked.rival, torch.tensor(sure[:3]).softmax(-1).expand(3, 3))
    turned = MaximumPoints(Segmenter(model, processor, task="panoptic"), np.array([2, 0, 1]))(entry, 0)
    assert turned.rival.argmax(-1).tolist() == [0, 0, 0]


def test_the_score_is_that_of_the_models_answers():
    dataset, model = scenes(), tiny_vit_p()
    for batch_size in (1, 3):
        result = evaluate_points(predictor_of(model), dataset, LABELS, RandomPoints(9, seed=1), batch_size=batch_size)
        right, by_image = 0, {}
        for index in range(len(dataset)):
            asked = RandomPoints(9, seed=1)(dataset[index], index)
            inputs = ViTPImageProcessor(size=56)(dataset[index]["image"])
            prompts = torch.cat([asked.points, torch.zeros(9, 2)], dim=1)[None]
            with torch.no_grad():
                answers = model(inputs["pixel_values"], prompts).logits[0].argmax(-1)
            by_image[index] = float((answers == asked.labels).float().mean())
            right += int((answers == asked.labels).sum())
        assert result.metrics["top_1"] == pytest.approx(right / 45)
        assert result.num_images == 5
        assert {row.index: row.score for row in result.images} == pytest.approx(by_image)
        assert [row.score for row in result.images] == sorted(row.score for row in result.images)
    assert sum(row["points"] for row in result.classes) == 45
    losses = [row["loss"] for row in result.classes]
    assert losses == sorted(losses, reverse=True)


def test_a_models_own_order_of_classes_changes_nothing():
    model, turned = tiny_vit_p(), tiny_vit_p(id2label={i: LABELS[(i + 2) % 6] for i in range(6)})
    order = torch.tensor([(i + 2) % 6 for i in range(6)])
    turned.load_state_dict(model.state_dict())
    turned.classifier.weight.data, turned.classifier.bias.data = (
        model.classifier.weight[order].clone(),
        model.classifier.bias[order].clone(),
    )
    results = [evaluate_points(predictor_of(one), scenes(), LABELS, InteriorPoints()) for one in (model, turned)]
    # The head's rows are multiplied in another order.
    for name, value in results[0].metrics.items():
        assert results[1].metrics[name] == pytest.approx(value, abs=1e-6), name


def test_the_generator_is_scored_at_the_same_points():
    dataset = scenes(3, task="panoptic")
    generator = Segmenter(tiny_eomt(id2label=LABELS), EoMTImageProcessor(size=64), task="panoptic")
    source = point_source("maximum", describe(dataset).id2label, generator=generator)
    source.threshold = 0.0
    result = evaluate_points(predictor_of(tiny_vit_p()), dataset, LABELS, source, batch_size=2)
    if result.metrics["num_points"]:
        assert 0 <= result.metrics["generator_top_1"] <= 1
        assert "generator_class_balanced" in result.metrics
    source.threshold = 1.1
    nothing = evaluate_points(predictor_of(tiny_vit_p()), dataset, LABELS, source)
    assert math.isnan(nothing.metrics["top_1"])


class Sureness(ImageMetric):
    """Mean of the largest logit; a metric as a user writes it."""

    def __init__(self, id2label, stuff_classes):
        super().__init__()

    def _no_counts(self):
        return {"sums": np.zeros(2)}

    def _count(self, prediction, reference, name, image_id):
        return {"sums": np.array([prediction.amax(-1).sum().item(), len(reference)])}

    def compute(self):
        total, points = self.counts["sums"]
        return {"sureness": total / points if points else math.nan}


def test_a_metric_of_ones_own_gets_the_logits_at_points():
    dataset, source, predictor = scenes(3), RandomPoints(9, seed=1), predictor_of(tiny_vit_p())
    result = evaluate_points(predictor, dataset, LABELS, source, batch_size=2, metrics=[Sureness])
    images = [to_rgb(dataset[index]["image"]) for index in range(3)]
    points = [source(dataset[index], index).points for index in range(3)]
    expected = torch.cat(predictor(images, points)).amax(-1).mean().item()
    assert result.metrics["sureness"] == pytest.approx(expected, rel=1e-6)
    assert result.metrics["num_points"] == 27
    with pytest.raises(ValueError, match="boundaries are scored for the tasks semantic and instance, not for points"):
        evaluate_points(predictor, dataset, LABELS, source, more_metrics=["boundary"])


def test_an_interrupted_evaluation_goes_on(tmp_path):
    dataset = scenes(task="panoptic")
    generator = Segmenter(tiny_eomt(id2label=LABELS), EoMTImageProcessor(size=64), task="panoptic")
    source = point_source("maximum", describe(dataset).id2label, generator=generator)
    source.threshold = 0.0
    whole = evaluate_points(predictor_of(tiny_vit_p()), dataset, LABELS, source)
    assert whole.metrics["num_points"]
    assert "generator_top_1" in whole.metrics

    class Breaking(PointClassifier):
        asked, most = 0, 3

        def __call__(self, images, points):
            if self.asked == self.most:
                raise RuntimeError("out of memory")
            self.asked += 1
            return super().__call__(images, points)

    settings = {"partial_folder": tmp_path / "partial", "about": {"model": "m"}, "chunk_size": 2}
    breaking = Breaking(tiny_vit_p(), ViTPImageProcessor(size=56))
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluate_points(breaking, dataset, LABELS, source, **settings)
    assert len(list((tmp_path / "partial").iterdir())) == 1
    breaking.asked = 0  # two of the five were counted, three may be asked
    result = evaluate_points(breaking, dataset, LABELS, source, **settings)
    # Confidences are summed in another order.
    assert result.metrics == pytest.approx(whole.metrics, rel=1e-12)
    assert (result.classes, result.images, result.num_images) == (whole.classes, whole.images, 5)
    with pytest.raises(ValueError, match=r"another evaluation \(model 'm' != 'other'\)"):
        evaluate_points(breaking, dataset, LABELS, source, **(settings | {"about": {"model": "other"}}))


def test_corner_models_are_asked_half_a_pixel_to_the_left():
    image, points = Image.new("RGB", (10, 20)), torch.tensor([[0.45, 0.475]])
    for origin, expected in (("center", [0.45, 0.475]), ("corner", [0.4, 0.45])):
        predictor = predictor_of(tiny_vit_p(point_origin=origin))
        assert predictor._prompts(image, points)[0].tolist() == pytest.approx([*expected, 0.0, 0.0])


def test_what_cannot_be_asked_is_refused():
    with pytest.raises(ValueError, match="choose one of random, interior, maximum"):
        point_source("centre", LABELS)
    with pytest.raises(ValueError, match="masks of a generator"):
        point_source("maximum", LABELS)
    with pytest.raises(ValueError, match="batch_size is 0"):
        evaluate_points(predictor_of(tiny_vit_p()), scenes(), LABELS, InteriorPoints(), batch_size=0)
    overlapping = {"id": 0, "label_id": 0, "is_crowd": False, "rle": {"size": [4, 4], "counts": "02>"}}
    entry = {"image": np.zeros((4, 4, 3), np.uint8), "image_id": 7, "segment_map": None, "segments": [overlapping]}
    with pytest.raises(ValueError, match="image 7 has segments that may overlap"):
        InteriorPoints()(entry, 0)
