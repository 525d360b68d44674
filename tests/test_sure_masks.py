"""The masks that the oracle labels: right ones reach a perfect score whatever they are called, in every task."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers.utils.generic import ModelOutput

from hf_segvit import EoMTImageProcessor
from hf_segvit.evaluation import evaluate
from hf_segvit.evaluation.oracle import mask_owners, sure_outputs
from hf_segvit.inference.segmenter import Segmenter
from hf_segvit.inference.views import Views

from .tiny_models import tiny_eomt

LABELS = {0: "cat", 1: "dog", 2: "grass"}


class Halves(nn.Module):
    """Draws dark and bright pixels as two exact masks, and gives both the same class probabilities."""

    def __init__(self, probabilities):
        super().__init__()
        self.config = type("Config", (), {"id2label": LABELS, "patch_size": 1})()
        self.probabilities = torch.tensor(probabilities)

    def forward(self, pixel_values, content_sizes):
        gray = 20 * pixel_values.mean(1)
        classes = self.probabilities.log().expand(len(gray), 2, 4)
        return ModelOutput(class_queries_logits=classes, masks_queries_logits=torch.stack([-gray, gray], dim=1))


def entry():
    bright = np.zeros((64, 64), dtype=bool)
    bright[:, 40:] = True
    return {
        "image_id": "a",
        "image": Image.fromarray(np.where(bright, 255, 0).astype(np.uint8)).convert("RGB"),
        "segment_map": bright.astype(np.int32),
        "segments": [{"id": 0, "label_id": 0, "is_crowd": False}, {"id": 1, "label_id": 1, "is_crowd": False}],
    }


@pytest.mark.parametrize(("task", "headline"), [("panoptic", "pq"), ("instance", "ap"), ("semantic", "mean_iou")])
@pytest.mark.parametrize("probabilities", [[0.9, 0.05, 0.04, 0.01], [0.4, 0.3, 0.29, 0.01]])
def test_right_masks_of_wrong_names_reach_a_perfect_score(task, headline, probabilities):
    """Two masks of one name would be one region; two thirds of doubt would fall below the threshold of 0.8."""
    processor = EoMTImageProcessor(size=64)
    predictor = Segmenter(Halves(probabilities), processor, task=task)
    result = evaluate(predictor, [entry()], LABELS, more_metrics=["oracle"])
    assert result.metrics[headline] < 0.8
    assert result.metrics[f"oracle_{headline}"] == pytest.approx(1.0)


def test_what_was_no_object_stays_so():
    processor = EoMTImageProcessor(size=64)
    predictor = Segmenter(Halves([0.1, 0.1, 0.1, 0.7]), processor, task="panoptic")
    assert evaluate(predictor, [entry()], LABELS, more_metrics=["oracle"]).metrics["oracle_pq"] == 0


def test_object_probability_goes_to_one_class():
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 4)
    outputs = ModelOutput(class_queries_logits=logits, masks_queries_logits=torch.randn(2, 5, 3, 3))
    sure = sure_outputs(outputs).class_queries_logits.softmax(-1)
    torch.testing.assert_close(sure[..., -1], logits.softmax(-1)[..., -1])
    torch.testing.assert_close(sure.amax(-1), torch.maximum(sure[..., -1], 1 - sure[..., -1]))
    assert torch.equal(sure[..., :-1].argmax(-1), logits[..., :-1].argmax(-1))
    assert ((sure > 0).sum(-1) == 2).all()
    fused = ModelOutput(**outputs, generator_class_queries_logits=logits.flip(-2))
    assert torch.equal(sure_outputs(fused).class_queries_logits.softmax(-1), sure.flip(-2))


@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.parametrize("views", [Views(), Views((0.5, 1.0), flip=True)])
def test_owners_are_those_of_a_plain_loop(windows, views):
    torch.manual_seed(0)
    model = tiny_eomt(id2label=LABELS, num_queries=6)
    processor = EoMTImageProcessor(task="semantic", size=64, do_split_image=windows)
    noise = np.random.default_rng(0).integers(0, 256, (60, 100, 3), dtype=np.uint8)
    image = Image.fromarray(noise)

    def ask(view):
        settings = {} if view.size is None else {"size": view.size}
        outputs = model(**processor(images=view.images, return_tensors="pt", **settings))
        masks = outputs.masks_queries_logits
        outputs.masks_queries_logits = (masks - masks.mean((2, 3), keepdim=True)) / masks.std((2, 3), keepdim=True)
        return replace(view, outputs=outputs)

    with torch.no_grad():
        asked = [ask(view) for view in views.of([image], processor)]
    (found,) = mask_owners(processor, asked, [(60, 100)])
    planes, labels = [], []
    for view in asked:  # every query alone, as the only class that has any probability
        outputs = view.outputs
        for row, classes in enumerate(outputs.class_queries_logits):
            for query, logits in enumerate(classes):
                alone = torch.full_like(outputs.class_queries_logits, -torch.inf)
                alone[..., -1] = 0
                certain = logits.softmax(-1)
                alone[row, query] = torch.tensor([1 - certain[-1], 0, 0, certain[-1]]).log()
                one = type(outputs)(**{**outputs, "class_queries_logits": alone})
                settings = {} if view.size is None else {"size": view.size}
                (answer,) = processor.post_process_semantic_segmentation(
                    one, target_sizes=[(60, 100)], return_segmentation_scores=True, **settings
                )
                score = answer["segmentation_scores"][0]
                planes.append(score.flip(-1) if view.flipped else score)
                labels.append(int(logits[:-1].argmax()))
    expected = torch.stack(planes).argmax(0)
    assert len(expected.unique()) > 3
    assert (found["segmentation"] == expected).float().mean() > 0.999  # ties, and sums in another order
    assert {row["id"]: row["label_id"] for row in found["segments_info"]} == {
        place: labels[place] for place in found["segmentation"].unique().tolist()
    }
