"""Oracle labels: wrong labels become right, wrong masks stay wrong, for every metric."""

import numpy as np
import pytest
import torch

from hf_segvit.data.generated_scenes import GeneratedScenes
from hf_segvit.evaluation.oracle import OracleClassification, relabel_instances, relabel_regions, relabel_segments
from hf_segvit.metrics.boundary import BoundaryIoU
from hf_segvit.metrics.mask_average_precision import MaskAveragePrecision
from hf_segvit.metrics.mean_iou import MeanIoU
from hf_segvit.metrics.panoptic_quality import PanopticQuality


def scenes_with_wrong_labels():
    """Predictions whose masks are the truth but for a shift of a pixel, with labels drawn at random; and references."""
    generator = np.random.default_rng(0)
    predictions, right, references = [], [], []
    scenes = GeneratedScenes(6, size=(64, 80))
    for index in range(6):
        entry = scenes[index]
        segment_map = np.roll(entry["segment_map"], 1, axis=1)
        rows = [{**row, "score": 0.9} for row in entry["segments"]]
        wrong = [{**row, "label_id": int(generator.integers(6))} for row in rows]
        references.append({"segmentation": entry["segment_map"], "segments_info": entry["segments"]})
        right.append({"segmentation": segment_map, "segments_info": rows})
        predictions.append({"segmentation": torch.from_numpy(segment_map), "segments_info": wrong})
    return predictions, right, references, scenes.stuff_classes


def label_map(side):
    table = {row["id"]: row["label_id"] for row in side["segments_info"]}
    return np.vectorize(lambda value: table.get(value, -1))(np.asarray(side["segmentation"]))


def score(metric, predictions, references, name):
    metric.add_batch(predictions=predictions, references=references)
    return metric.compute()[name]


def test_panoptic_quality_of_wrong_labels_is_that_of_right_ones():
    predictions, right, references, stuff = scenes_with_wrong_labels()
    oracle = score(OracleClassification(PanopticQuality(6, stuff)), predictions, references, "pq")
    assert oracle == pytest.approx(score(PanopticQuality(6, stuff), right, references, "pq"), rel=1e-12)
    assert oracle > 0.8
    assert score(PanopticQuality(6, stuff), predictions, references, "pq") < 0.3


def test_average_precision_of_wrong_labels_is_that_of_right_ones():
    predictions, right, references, _ = scenes_with_wrong_labels()
    oracle = score(OracleClassification(MaskAveragePrecision(6)), predictions, references, "ap")
    assert oracle == score(MaskAveragePrecision(6), right, references, "ap")
    assert oracle > 0.5
    assert score(MaskAveragePrecision(6), predictions, references, "ap") < 0.3


def test_mean_iou_of_wrong_labels_is_that_of_right_ones():
    predictions, right, references, _ = scenes_with_wrong_labels()
    truth = [label_map(side) for side in references]
    oracle = score(OracleClassification(MeanIoU(6)), predictions, truth, "mean_iou")
    assert oracle == score(MeanIoU(6), [label_map(side) for side in right], truth, "mean_iou")
    assert oracle > 0.8
    assert score(MeanIoU(6), [label_map(side) for side in predictions], truth, "mean_iou") < 0.4


def test_stuff_that_gets_the_same_label_is_merged():
    truth = {"segmentation": np.zeros((4, 6), int), "segments_info": [{"id": 0, "label_id": 2}]}
    segmentation = np.repeat([[7, 7, 9, 9, 9, -1]], 4, axis=0)
    guess = {"segmentation": segmentation, "segments_info": [{"id": 7, "label_id": 0}, {"id": 9, "label_id": 1}]}
    merged = relabel_segments(guess, truth, stuff_classes=[2])
    assert merged["segments_info"] == [{"id": 7, "label_id": 2}]
    assert merged["segmentation"].tolist() == np.repeat([[7, 7, 7, 7, 7, -1]], 4, axis=0).tolist()
    apart = relabel_segments(guess, truth)
    assert apart["segments_info"] == [{"id": 7, "label_id": 2}, {"id": 9, "label_id": 2}]
    assert [row["label_id"] for row in guess["segments_info"]] == [0, 1]  # the prediction itself is left alone


def test_the_best_segment_is_that_of_highest_iou():
    truth = np.zeros((1, 20), int)
    truth[0, 12:] = 1
    rows = [{"id": 0, "label_id": 4}, {"id": 1, "label_id": 5}]
    guess = np.full((1, 20), -1)
    guess[0, 7:16] = 3  # five pixels of the first and four of the second: 5 / 16 and 4 / 13
    guess[0, 0] = 8
    wrong = [{"id": 3, "label_id": 0}, {"id": 8, "label_id": 0}]
    reference = {"segmentation": truth, "segments_info": rows}
    labels = [
        row["label_id"]
        for row in relabel_segments({"segmentation": guess, "segments_info": wrong}, reference)["segments_info"]
    ]
    assert labels == [4, 4]
    truth[0, 17:] = -1  # now 5 / 16 and 4 / 10
    labels = [
        row["label_id"]
        for row in relabel_segments({"segmentation": guess, "segments_info": wrong}, reference)["segments_info"]
    ]
    assert labels == [5, 4]


def test_masks_on_nothing_keep_their_labels():
    void = {"segmentation": np.full((3, 3), -1), "segments_info": []}
    guess = {"segmentation": np.zeros((3, 3), int), "segments_info": [{"id": 0, "label_id": 1, "score": 0.5}]}
    assert relabel_segments(guess, void)["segments_info"] == guess["segments_info"]
    assert relabel_instances(guess, void, 2)["segments_info"] == guess["segments_info"]
    assert (relabel_regions(guess, np.full((3, 3), 255)) == 1).all()


def test_crowds_label_what_touches_nothing_else():
    masks = np.zeros((2, 4, 8), bool)
    masks[0, :, :6], masks[1, :, 5:] = True, True
    rows = [{"id": 0, "label_id": 3, "is_crowd": True}, {"id": 1, "label_id": 4, "is_crowd": False}]
    guesses = np.zeros((2, 4, 8), bool)
    guesses[0, :, :3], guesses[1, :, :7] = True, True
    wrong = [{"id": 0, "label_id": 0, "score": 0.5}, {"id": 1, "label_id": 0, "score": 0.5}]
    reference = {"segmentation": masks, "segments_info": rows}
    result = relabel_instances({"segmentation": guesses, "segments_info": wrong}, reference, 5)
    assert [row["label_id"] for row in result["segments_info"]] == [3, 4]


def test_regions_of_a_label_map_take_the_label_of_most_pixels():
    truth = np.array([[2, 2, 255, 255, 255], [2, 3, 3, 3, 3]])
    guess = np.array([[0, 0, 0, 0, 0], [0, -1, 1, 1, 1]])
    assert relabel_regions(guess, truth).tolist() == [[2, 2, 2, 2, 2], [2, -1, 3, 3, 3]]


def test_merging_and_bad_metrics():
    predictions, _, references, stuff = scenes_with_wrong_labels()
    whole, first, second = (OracleClassification(PanopticQuality(6, stuff)) for _ in range(3))
    whole.add_batch(predictions=predictions, references=references)
    first.add_batch(predictions=predictions[:2], references=references[:2])
    second.add_batch(predictions=predictions[2:], references=references[2:])
    first.merge(second)
    assert first.compute()["pq"] == pytest.approx(whole.compute()["pq"], rel=1e-12)
    first.reset()
    assert first.metric.num_images == 0
    with pytest.raises(ValueError, match="BoundaryIoU has no oracle"):
        OracleClassification(BoundaryIoU(3))
    with pytest.raises(ValueError, match=r"image 0: the prediction has.*\(2, 2\).*\(3, 3\)"):
        OracleClassification(MeanIoU(2)).add_batch(
            predictions=[np.zeros((2, 2), int)], references=[np.zeros((3, 3), int)]
        )
