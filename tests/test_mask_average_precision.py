"""Mask AP: against pycocotools on COCO's sample and on random crowded scenes; forms of masks, merging, bad masks."""

import json

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_masks

from hf_segvit.metrics.mask_average_precision import MaskAveragePrecision
from tests.coco_instances import STATISTICS, metric_inputs, pycocotools_statistics


def random_coco(seed: int, num_images: int = 12, num_labels: int = 3, shift: int = 6) -> tuple[dict, list]:
    """Crowded scenes: several predictions for a truth, crowds, equal scores, masks of all sizes, empty images."""
    generator = np.random.default_rng(seed)
    height, width = 150, 120
    images, annotations, results = [], [], []

    def rectangle(y0, x0, h, w):
        mask = np.zeros((height, width), np.uint8, order="F")
        mask[max(y0, 0) : y0 + h, max(x0, 0) : x0 + w] = 1
        return mask

    def rle(mask):
        encoded = coco_masks.encode(mask)
        return {"size": encoded["size"], "counts": encoded["counts"].decode()}

    for image in range(num_images):
        images.append({"id": image * 7 % num_images + 1, "height": height, "width": width})
        for _ in range(generator.integers(0, 9) if image else 0):
            box = np.array([*generator.integers(0, 90, 2), *generator.integers(4, 110, 2)])
            mask = rectangle(*box)
            label = int(generator.integers(num_labels))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": images[-1]["id"],
                    "category_id": 10 * label + 1,
                    "iscrowd": int(generator.random() < 0.2),
                    "segmentation": rle(mask),
                    # A little off, as areas of polygons are.
                    "area": float(mask.sum()) * generator.uniform(0.9, 1.1),
                    "bbox": [0, 0, 1, 1],
                }
            )
            for _ in range(generator.integers(0, 5)):
                guess = rectangle(*(box + generator.integers(-shift, shift + 1, 4)))
                results.append((images[-1]["id"], label, guess))
        for _ in range(generator.integers(0, 4)):
            stray = rectangle(*generator.integers(0, 90, 2), *generator.integers(0, 60, 2))
            results.append((images[-1]["id"], int(generator.integers(num_labels)), stray))
    rows = [
        {
            "image_id": image,
            "category_id": 10 * label + 1,
            "segmentation": rle(mask),
            "score": float(np.round(generator.random(), 1)),
        }
        for image, label, mask in results
    ]
    categories = [{"id": 10 * label + 1, "name": str(label)} for label in range(num_labels + 1)]
    return {"images": images, "annotations": annotations, "categories": categories, "info": {}}, rows


def statistics(result: dict) -> np.ndarray:
    return np.array([result[name] for name in STATISTICS])


def evaluate(annotations: dict, rows: list) -> dict:
    metric = MaskAveragePrecision(num_labels=len(annotations["categories"]))
    metric.add_batch(**metric_inputs(annotations, rows))
    return metric.compute()


def test_equals_pycocotools_on_cocos_sample(sample_data):
    folder = sample_data / "coco_instances_sample"
    annotations = json.loads((folder / "instances_val2014_100.json").read_text())
    rows = json.loads((folder / "instances_val2014_fakesegm100_results.json").read_text())
    result = evaluate(annotations, rows)
    # Sums of the same numbers in another order.
    np.testing.assert_allclose(statistics(result), pycocotools_statistics(annotations, rows), rtol=0, atol=1e-14)
    assert [round(result[name], 3) for name in STATISTICS[:6]] == [0.320, 0.562, 0.299, 0.387, 0.310, 0.327]
    assert result["num_classes"] == 70


@pytest.mark.parametrize("seed", range(6))
def test_equals_pycocotools_on_crowded_scenes(seed):
    annotations, rows = random_coco(seed)
    result = evaluate(annotations, rows)
    np.testing.assert_allclose(statistics(result), pycocotools_statistics(annotations, rows), rtol=0, atol=1e-14)
    assert 0.1 < result["ap"] < 0.9


def test_only_the_best_hundred_predictions_of_a_class_count():
    annotations, _ = random_coco(0)
    one = annotations["annotations"][0] | {"iscrowd": 0}
    annotations["annotations"] = [one]
    stray = coco_masks.encode(np.asfortranarray(np.eye(150, 120, dtype=np.uint8)))["counts"].decode()
    row = {key: one[key] for key in ("image_id", "category_id", "segmentation")}
    for num_strays, expected in ((99, 0.01), (100, 0.0)):
        strays = [row | {"segmentation": {"size": [150, 120], "counts": stray}, "score": 0.9}] * num_strays
        results = [row | {"score": 0.5}, *strays]
        result = evaluate(annotations, [dict(r) for r in results])
        assert result["ap_50"] == pytest.approx(expected, abs=1e-12)
        np.testing.assert_allclose(statistics(result), pycocotools_statistics(annotations, [dict(r) for r in results]))


def test_all_forms_of_masks_give_the_same():
    generator = np.random.default_rng(0)
    id_map = generator.integers(-1, 4, (20, 30))
    binary = id_map == np.arange(4)[:, None, None]
    runs = []
    for mask in binary:
        column = mask.T.ravel()
        edges = np.flatnonzero(np.diff(column, prepend=False, append=not column[-1]))
        runs.append(np.diff(edges, prepend=0).tolist())
    rles = [coco_masks.encode(np.asfortranarray(mask.astype(np.uint8))) for mask in binary]
    forms = {
        "id map": torch.from_numpy(id_map),
        "float id map": torch.from_numpy(id_map).float(),
        "binary": torch.from_numpy(binary),
        "float binary": torch.from_numpy(binary).float(),
        "bytes": rles,
        "text": [{"size": rle["size"], "counts": rle["counts"].decode()} for rle in rles],
        "runs": [{"size": [20, 30], "counts": list(run)} for run in runs],
    }
    reference = {"segmentation": binary, "segments_info": [{"id": i, "label_id": i % 2} for i in range(4)]}
    rows = [{"id": i, "label_id": i % 2, "score": 0.5 + i / 10} for i in (0, 1, 2, 3)]
    for form, masks in forms.items():
        metric = MaskAveragePrecision(num_labels=2)
        metric.add_batch(predictions=[{"segmentation": masks, "segments_info": rows}], references=[reference])
        assert metric.compute()["ap"] == pytest.approx(1.0), form


def test_images_without_objects_or_predictions():
    metric = MaskAveragePrecision(num_labels=2)
    nothing = {"segmentation": torch.full((4, 4), -1), "segments_info": []}
    none = {"segmentation": [], "segments_info": []}
    empty = {"segmentation": np.zeros((0, 4, 4), bool), "segments_info": []}
    metric.add_batch(predictions=[nothing, none, empty], references=[none, empty, nothing])
    assert np.isnan(metric.compute()["ap"])
    one = {"segmentation": np.ones((1, 4, 4), bool), "segments_info": [{"id": 0, "label_id": 1, "score": 1.0}]}
    metric.add_batch(predictions=[nothing], references=[one])
    result = metric.compute()
    assert (result["ap"], result["ar_100"], result["num_classes"]) == (0.0, 0.0, 1)
    assert result["per_class"][1]["references"] == 1
    assert np.isnan(result["per_class"][0]["ap"])


def test_merging_in_any_order_equals_one_process():
    annotations, rows = random_coco(1)
    inputs = metric_inputs(annotations, rows)
    # Ids of both kinds; equal scores are many, so that the order of images matters.
    for ids in (inputs["image_ids"], [f"image {i}" for i in inputs["image_ids"]]):
        batch = inputs | {"image_ids": ids}
        whole, first, second = (MaskAveragePrecision(num_labels=4) for _ in range(3))
        whole.add_batch(**batch)
        first.add_batch(**{key: value[1::2] for key, value in batch.items()})
        second.add_batch(**{key: value[::2] for key, value in batch.items()})
        first.merge(second.state_dict())
        np.testing.assert_equal(first.compute(), whole.compute())
        with pytest.raises(ValueError, match="was counted already"):
            first.merge(second)


def test_records_do_not_hold_masks():
    annotations, rows = random_coco(2)
    metric = MaskAveragePrecision(num_labels=4)
    metric.add_batch(**metric_inputs(annotations, rows))
    size = sum(array.nbytes for array in metric.state_dict()["counts"].values())
    assert size < 50 * (len(rows) + len(annotations["annotations"]))


# What crashes pycocotools, or makes it answer with uninitialised memory, and other damage.
BAD_MASKS = {
    "too few runs": ({"size": [10, 10], "counts": [50]}, "add up to 50 pixels.*10 x 10 needs 100"),
    "too many runs": ({"size": [10, 10], "counts": [50, 100]}, "add up to 150 pixels"),
    "negative run": ({"size": [10, 10], "counts": [150, -50]}, "shortest -50"),
    "no runs": ({"size": [10, 10], "counts": b""}, "empty counts"),
    "no runs in a list": ({"size": [10, 10], "counts": []}, "empty counts"),
    "cut off": ({"size": [10, 10], "counts": "P"}, "malformed counts"),
    "foreign characters": ({"size": [10, 10], "counts": "\x01\x02"}, "malformed counts"),
    "not ASCII": ({"size": [10, 10], "counts": "ä"}, "malformed counts"),
    "endless run": ({"size": [10, 10], "counts": "P" * 50 + "0"}, "a number of 51 digits"),
    "size on its side": ({"size": [20, 5], "counts": [100]}, r"different sizes \[\(10, 10\), \(20, 5\)\]"),
    "no size": ({"counts": [100]}, "RLE mask has size"),
    "size without pixels": ({"size": [0, 0], "counts": [0]}, "size 0 x 0"),
}


@pytest.mark.parametrize("case", BAD_MASKS)
@pytest.mark.parametrize("side", ["predictions", "references"])
def test_damaged_masks_are_refused(case, side):
    rle, message = BAD_MASKS[case]
    good = {"size": [10, 10], "counts": [40, 60]}
    row = {"id": 0, "label_id": 0, "score": 0.5}
    batch = {
        name: [{"segmentation": [good, good], "segments_info": [row, row]}] for name in ("predictions", "references")
    }
    batch[side][0] = {"segmentation": [good, rle], "segments_info": [row, row]}
    metric = MaskAveragePrecision(num_labels=1)
    with pytest.raises(ValueError, match=f"image 0, {side[:-1]}.*{message}"):
        metric.add_batch(**batch)
    assert metric.num_images == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label_id": 3}, r"label_id 3, outside 0\.\.1"),
        ({"score": float("nan")}, "score nan"),
        ({"score": None}, "no score"),
    ],
)
def test_bad_rows_are_refused(change, message):
    row = {"id": 0, "label_id": 0, "score": 0.5} | change
    row = {key: value for key, value in row.items() if value is not None}
    side = {"segmentation": np.ones((1, 4, 4), bool), "segments_info": [row]}
    good = {"segmentation": np.ones((1, 4, 4), bool), "segments_info": [{"id": 0, "label_id": 0}]}
    with pytest.raises(ValueError, match=message):
        MaskAveragePrecision(num_labels=2).add_batch(predictions=[side], references=[good])


def test_masks_that_do_not_fit_are_refused():
    row = {"id": 0, "label_id": 0, "score": 0.5}

    def side(masks, rows):
        return {"segmentation": masks, "segments_info": rows}

    good = side(np.ones((1, 4, 4), bool), [row])
    cases = [
        (side(np.ones((1, 4, 5), bool), [row]), r"\(4, 5\) but the reference \(4, 4\).*target_sizes"),
        (side(np.ones((2, 4, 4), bool), [row]), "2 masks for 1 rows"),
        (side(np.full((1, 4, 4), 0.3), [row]), "values other than 0 and 1"),
        (side([[1, 2, 3]], [row]), "list of list"),
        ({"segments_info": []}, r"no \['segmentation'\]"),
    ]
    for prediction, message in cases:
        with pytest.raises(ValueError, match=message):
            MaskAveragePrecision(num_labels=1).add_batch(predictions=[prediction], references=[good])
    with pytest.raises(ValueError, match="num_labels is 0"):
        MaskAveragePrecision(num_labels=0)
