"""Panoptic quality against a plain-loop implementation, against panopticapi, and by hand."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from hf_segvit.metrics.panoptic_quality import PanopticQuality, panoptic_counts, panoptic_quality_from_counts
from tests.panoptic_quality_reference import reference_counts, reference_quality

NUM_LABELS = 6
STUFF = [0, 1, 2]
# Counts are whole numbers and must be equal; IoU sums differ at most by the order of additions.
TOLERANCE = {"rtol": 0, "atol": 1e-9}


def example_image(segmentation, labels, crowds=()):
    """A prediction or reference from a map and {id: label}."""
    rows = [{"id": i, "label_id": label, "is_crowd": i in crowds} for i, label in labels.items()]
    return {"segmentation": np.asarray(segmentation, dtype=np.int32), "segments_info": rows}


def random_image(rng, size, max_segments, void=0.2, crowd=0.0, id_range=2**24 - 1, block=4):
    """Blocky random segments with random sparse ids, labels and crowds; rows in random order."""
    height, width = size
    coarse = rng.integers(-1 if rng.random() < void else 0, max_segments, (height // block + 1, width // block + 1))
    dense = np.kron(coarse, np.ones((block, block), dtype=int))[:height, :width]
    present = [index for index in np.unique(dense) if index >= 0]
    ids = rng.choice(id_range, len(present), replace=False)
    segmentation = np.full(size, -1, dtype=np.int32)
    for index, segment_id in zip(present, ids, strict=True):
        segmentation[dense == index] = segment_id
    labels = {int(i): int(rng.integers(NUM_LABELS)) for i in rng.permutation(ids)}
    return example_image(segmentation, labels, {i for i in labels if rng.random() < crowd})


def perturbed(rng, reference, num_boxes=4, relabel=0.2):
    """A plausible prediction: the reference shifted, cut by boxes of other segments and of void, some relabelled."""
    segmentation = np.roll(reference["segmentation"], rng.integers(-6, 7, 2), axis=(0, 1))
    ids = [-1] + [row["id"] for row in reference["segments_info"]]
    for _ in range(num_boxes):
        y, x = rng.integers(segmentation.shape[0]), rng.integers(segmentation.shape[1])
        h, w = rng.integers(1, segmentation.shape[0] + 1), rng.integers(1, segmentation.shape[1] // 2 + 2)
        segmentation[y : y + h, x : x + w] = ids[rng.integers(len(ids))]
    present = set(np.unique(segmentation).tolist())
    labels = {row["id"]: row["label_id"] for row in reference["segments_info"] if row["id"] in present}
    for segment_id in labels:
        if rng.random() < relabel:
            labels[segment_id] = int(rng.choice(list(labels.values())))
    return example_image(segmentation, labels)


def assert_same(prediction, reference, num_labels=NUM_LABELS):
    counts = panoptic_counts(prediction, reference, num_labels)
    np.testing.assert_allclose(counts, reference_counts(prediction, reference, num_labels), **TOLERANCE)
    return counts


def coco_images(folder, json_name, png_folder):
    """Real references with label ids made dense, and (num_labels, stuff label ids)."""
    data = json.loads((folder / json_name).read_text())
    label_of = {category["id"]: index for index, category in enumerate(data["categories"])}
    stuff = [index for index, category in enumerate(data["categories"]) if not category["isthing"]]
    images = []
    for annotation in data["annotations"]:
        rgb = np.asarray(Image.open(folder / png_folder / annotation["file_name"]).convert("RGB"), dtype=np.int32)
        segmentation = rgb @ np.array([1, 256, 65536], dtype=np.int32)
        segmentation[segmentation == 0] = -1
        rows = annotation["segments_info"]
        labels = {row["id"]: label_of[row["category_id"]] for row in rows}
        images.append(example_image(segmentation, labels, {row["id"] for row in rows if row["iscrowd"]}))
    return images, len(label_of), stuff


@pytest.mark.parametrize("seed", range(40))
def test_random_maps_equal_plain_loops(seed):
    rng = np.random.default_rng(seed)
    size = tuple(int(n) for n in rng.integers(1, 40, 2))
    reference = random_image(rng, size, int(rng.integers(1, 9)), void=0.7, crowd=0.3)
    assert_same(perturbed(rng, reference), reference)
    assert_same(random_image(rng, size, int(rng.integers(1, 9)), void=0.7, block=1), reference)


def test_data_set_result_equals_plain_loops_averages():
    rng = np.random.default_rng(0)
    metric, total = PanopticQuality(num_labels=NUM_LABELS, stuff_classes=STUFF), 0
    for _ in range(5):
        references = [random_image(rng, (33, 47), 7, crowd=0.2) for _ in range(3)]
        predictions = [perturbed(rng, reference) for reference in references]
        metric.add_batch(predictions=predictions, references=references)
        total += sum(reference_counts(*pair, NUM_LABELS) for pair in zip(predictions, references, strict=True))
    result = metric.compute()
    for suffix, classes in (("", range(NUM_LABELS)), ("_stuff", STUFF), ("_things", [3, 4, 5])):
        for key, value in reference_quality(total, classes).items():
            assert result[key + suffix] == pytest.approx(value, abs=1e-9)
    for label, row in result["per_class"].items():
        assert [row["tp"], row["fp"], row["fn"], row["iou"]] == pytest.approx(total[label].tolist(), abs=1e-9)
        assert row["pq"] == pytest.approx(row["sq"] * row["rq"], abs=1e-12)
    assert result["per_class"].keys() == set(range(NUM_LABELS))


def test_a_image_worked_by_hand():
    # Class 3: reference 0 has 6 pixels, the prediction 5 of them and 2 void pixels that do not count: IoU 5/6.
    # Class 4: reference 1 is missed, the prediction of class 5 on its place is false.
    reference = example_image([[0, 0, 0, -1, 1], [0, 0, 0, -1, 1]], {0: 3, 1: 4})
    prediction = example_image([[0, 0, 0, 0, 1], [0, 0, -1, 0, 1]], {0: 3, 1: 5})
    metric = PanopticQuality(num_labels=NUM_LABELS, stuff_classes=[3])
    metric.add_batch(predictions=[prediction], references=[reference])
    result = metric.compute()
    assert result["per_class"][3] == pytest.approx(
        {"pq": 5 / 6, "sq": 5 / 6, "rq": 1, "tp": 1, "fp": 0, "fn": 0, "iou": 5 / 6}
    )
    assert (result["per_class"][4]["fn"], result["per_class"][5]["fp"]) == (1, 1)
    assert result["num_classes"] == 3
    assert result["pq"] == pytest.approx(5 / 18)
    assert (result["pq_stuff"], result["pq_things"]) == (pytest.approx(5 / 6), 0)


ONES, HALF = np.ones((4, 4), int), np.repeat([[0, 0, 1, 1]], 4, axis=0)
ADVERSARIAL = {
    "reference all void": (example_image(ONES, {1: 2}), example_image(-ONES, {}), [0, 0, 0]),
    "prediction all void": (example_image(-ONES, {}), example_image(ONES, {1: 2}), [0, 0, 1]),
    "both all void": (example_image(-ONES, {}), example_image(-ONES, {}), [0, 0, 0]),
    "crowd of the class covers all": (example_image(HALF, {0: 2, 1: 2}), example_image(ONES, {1: 2}, {1}), [0, 0, 0]),
    "crowd of another class": (example_image(HALF, {0: 2, 1: 2}), example_image(ONES, {1: 3}, {1}), [0, 2, 0]),
    "an equal crowd is no match": (example_image(ONES, {1: 2}), example_image(ONES, {1: 2}, {1}), [0, 0, 0]),
    "IoU of exactly half": (example_image(HALF, {0: 2, 1: 3}), example_image(ONES, {1: 2}), [0, 1, 1]),
    "label of no reference": (example_image(ONES, {1: 5}), example_image(ONES, {1: 2}), [0, 0, 1]),
    "half on void is still false": (example_image(ONES, {1: 2}), example_image(HALF - 1, {0: 3}), [0, 1, 0]),
    "only the last of two crowds": (example_image(ONES, {1: 2}), example_image(HALF, {0: 2, 1: 2}, {0, 1}), [0, 1, 0]),
    "one pixel": (example_image([[7]], {7: 2}), example_image([[9]], {9: 2}), [1, 0, 0]),
}


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_adversarial_maps(name):
    prediction, reference, expected = ADVERSARIAL[name]
    counts = assert_same(prediction, reference)
    assert counts[2, :3].tolist() == expected


def test_last_crowd_in_row_order_counts():
    # The big crowd is the last row, so it forgives; with the rows turned round, it does not.
    segmentation = np.repeat([[0, 1, 1, 1]], 4, axis=0)
    prediction = example_image(ONES, {1: 2})
    assert assert_same(prediction, example_image(segmentation, {0: 2, 1: 2}, {0, 1}))[2, 1] == 0
    assert assert_same(prediction, example_image(segmentation, {1: 2, 0: 2}, {0, 1}))[2, 1] == 1


def test_kinds_of_maps_agree():
    rng = np.random.default_rng(3)
    reference = random_image(rng, (20, 30), 5, void=1, id_range=120)
    prediction = perturbed(rng, reference)
    expected = reference_counts(prediction, reference, NUM_LABELS)
    for convert in (np.int8, np.int64, np.float32, torch.from_numpy, lambda a: np.asfortranarray(a)):
        changed = prediction | {"segmentation": convert(prediction["segmentation"])}
        np.testing.assert_allclose(panoptic_counts(changed, reference, NUM_LABELS), expected, **TOLERANCE)


def test_void_ids_read_maps_where_zero_is_void():
    reference = example_image([[3, 3], [-1, 4]], {3: 1, 4: 2})
    zero_void = example_image([[1, 1], [0, 2]], {1: 1, 2: 2})
    from_zero = example_image([[0, 0], [-1, 1]], {0: 1, 1: 2})
    metric = PanopticQuality(num_labels=3, stuff_classes=[], void_ids=(-1, 0))
    metric.add_batch(predictions=[zero_void, from_zero], references=[reference, reference])
    assert metric.compute()["pq"] == 1
    with pytest.raises(ValueError, match=r"ids \[0\] that segments_info has no row for"):
        PanopticQuality(num_labels=3, stuff_classes=[]).add_batch(predictions=[zero_void], references=[reference])


def test_nothing_counted_is_nan_and_absent_groups_are_nan():
    metric = PanopticQuality(num_labels=2, stuff_classes=[0])
    assert np.isnan(metric.compute()["pq"])
    metric.add_batch(predictions=[example_image(ONES, {1: 1})], references=[example_image(ONES, {1: 1})])
    result = metric.compute()
    assert (result["pq"], result["pq_things"], result["num_classes_stuff"]) == (1, 1, 0)
    assert np.isnan(result["pq_stuff"])
    assert result["per_class"][0]["pq"] == 0
    metric.reset()
    assert np.isnan(metric.compute()["pq"])


def test_merged_processes_equal_one_process():
    rng = np.random.default_rng(1)
    references = [random_image(rng, (25, 25), 6, crowd=0.2) for _ in range(6)]
    predictions = [perturbed(rng, reference) for reference in references]
    one, *shards = (PanopticQuality(num_labels=NUM_LABELS, stuff_classes=STUFF) for _ in range(4))
    one.add_batch(predictions=predictions, references=references, image_ids=range(6))
    for rank, shard in enumerate(shards):
        ids = range(rank, 6, 3)
        shard.add_batch(
            predictions=[predictions[i] for i in ids], references=[references[i] for i in ids], image_ids=ids
        )
    shards[0].merge(shards[1])
    counts = {"panoptic": shards[2].counts["panoptic"].tolist()}
    shards[0].merge(json.loads(json.dumps(shards[2].state_dict() | {"counts": counts})))
    np.testing.assert_allclose(shards[0].counts["panoptic"], one.counts["panoptic"], rtol=0, atol=1e-12)
    assert (shards[0].num_images, shards[0].image_ids) == (6, set(range(6)))
    with pytest.raises(ValueError, match="image id 1 was counted already"):
        shards[0].merge(shards[1])
    with pytest.raises(ValueError, match=r"cannot merge counts of shapes \{'panoptic': \(2, 4\)\}"):
        one.merge(PanopticQuality(num_labels=2, stuff_classes=[]))


GOOD = example_image([[0, 1], [0, 1]], {0: 2, 1: 3})


@pytest.mark.parametrize(
    ("prediction", "reference", "message"),
    [
        (example_image([[0, 1]], {0: 2, 1: 3}), GOOD, r"image 1 .* \(1, 2\) but the reference \(2, 2\).*target_sizes"),
        (example_image(GOOD["segmentation"], {0: 2}), GOOD, r"image 1 .*prediction: .*ids \[1\].*no row"),
        (GOOD, example_image(GOOD["segmentation"], {0: 2}), r"image 1 .*reference: .*ids \[1\].*no row"),
        (example_image(GOOD["segmentation"], {0: 2, 1: 3, 8: 1}), GOOD, r"image 1 .*prediction: .*\[8\].*no pixel"),
        (GOOD, example_image(GOOD["segmentation"], {0: 2, 1: 3, 8: 1}), r"image 1 .*reference: .*\[8\].*no pixel"),
        (example_image(GOOD["segmentation"], {0: 2, 1: 6}), GOOD, r"segment 1 has label_id 6, outside 0\.\.5"),
        (GOOD, example_image(GOOD["segmentation"], {0: -1, 1: 3}), r"reference: segment 0 has label_id -1"),
        (example_image([[-1, 1]] * 2, {-1: 2, 1: 3}), GOOD, "row of id -1, which means void"),
        (GOOD | {"segments_info": GOOD["segments_info"] * 2}, GOOD, "several rows of id 0"),
        (GOOD | {"segmentation": np.full((2, 2), 0.5)}, GOOD, "float64; it must hold integer"),
        (GOOD | {"segmentation": np.full((2, 2), np.nan)}, GOOD, "float64; it must hold integer"),
        (GOOD | {"segmentation": np.zeros((1, 2, 2), int)}, GOOD, r"shape \(1, 2, 2\)"),
        (GOOD, {"segment_map": GOOD["segmentation"], "segments": []}, r"no \['segmentation', 'segments_info'\]"),
    ],
)
def test_bad_input_is_named_and_counts_nothing(prediction, reference, message):
    metric = PanopticQuality(num_labels=NUM_LABELS, stuff_classes=STUFF)
    with pytest.raises(ValueError, match=message):
        metric.add_batch(predictions=[GOOD, prediction], references=[GOOD, reference], image_ids=["a", "b"])
    assert metric.num_images == 0
    assert not metric.counts["panoptic"].any()
    assert not metric.image_ids


def test_bad_batches_and_arguments():
    metric = PanopticQuality(num_labels=NUM_LABELS, stuff_classes=STUFF)
    with pytest.raises(ValueError, match="'predictions': 1, 'references': 0"):
        metric.add_batch(predictions=[GOOD], references=[])
    with pytest.raises(ValueError, match="'image_ids': 2"):
        metric.add_batch(predictions=[GOOD], references=[GOOD], image_ids=[1, 2])
    with pytest.raises(ValueError, match="image id 5 was counted already"):
        metric.add_batch(predictions=[GOOD] * 2, references=[GOOD] * 2, image_ids=[5, 5])
    metric.add_batch(predictions=[GOOD], references=[GOOD], image_ids=[5])
    with pytest.raises(ValueError, match="image id 5 was counted already"):
        metric.add_batch(predictions=[GOOD], references=[GOOD], image_ids=[5])
    with pytest.raises(ValueError, match=r"stuff_classes \[6\]"):
        PanopticQuality(num_labels=6, stuff_classes=[0, 6])
    with pytest.raises(ValueError, match="num_labels is 0"):
        PanopticQuality(num_labels=0, stuff_classes=[])


@pytest.mark.parametrize(
    ("json_name", "png_folder", "limit"),
    [
        ("panoptic_sample/panoptic_examples.json", "panoptic_sample/panoptic_examples", 2),
        ("coco_train100/annotations/panoptic_train2017.json", "coco_train100/annotations/panoptic_train2017", 20),
    ],
)
def test_real_annotations(sample_data, json_name, png_folder, limit):
    references, num_labels, stuff = coco_images(sample_data, json_name, png_folder)
    rng = np.random.default_rng(0)
    perfect = PanopticQuality(num_labels=num_labels, stuff_classes=stuff)
    perfect.add_batch(predictions=references, references=references)
    result = perfect.compute()
    assert (result["pq"], result["sq"], result["rq"]) == (1, 1, 1)
    crowds = sum(row["is_crowd"] for reference in references for row in reference["segments_info"])
    segments = sum(len(reference["segments_info"]) for reference in references)
    assert perfect.counts["panoptic"][:, 0].sum() == segments - crowds
    for reference in references[:limit]:
        assert_same(perturbed(rng, reference), reference, num_labels)


def test_equal_to_panopticapi(tmp_path):
    evaluation = pytest.importorskip(
        "panopticapi.evaluation", reason="needs panopticapi, installed from its repository"
    )
    rng = np.random.default_rng(11)
    total, annotations = np.zeros((NUM_LABELS, 4)), []
    for index in range(40):
        reference = random_image(rng, (40, 60), int(rng.integers(1, 9)), crowd=0.3, void=0.7, id_range=2**24 - 2)
        prediction = perturbed(rng, reference)
        total += panoptic_counts(prediction, reference, NUM_LABELS)
        pair = []
        for kind, side in (("true", reference), ("predicted", prediction)):
            # Its files hold void as 0, so ids move up by one.
            ids = side["segmentation"] + 1
            rgb = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)
            Image.fromarray(rgb).save(tmp_path / f"{kind}{index}.png")
            rows = [
                {
                    "id": row["id"] + 1,
                    "category_id": row["label_id"],
                    "iscrowd": int(row["is_crowd"]),
                    "area": int((side["segmentation"] == row["id"]).sum()),
                }
                for row in side["segments_info"]
            ]
            pair.append({"image_id": index, "file_name": f"{kind}{index}.png", "segments_info": rows})
        annotations.append(tuple(pair))
    categories = {label: {"id": label, "isthing": int(label not in STUFF)} for label in range(NUM_LABELS)}
    stat = evaluation.pq_compute_single_core(0, annotations, str(tmp_path), str(tmp_path), categories)
    result = panoptic_quality_from_counts(total, STUFF)
    for suffix, isthing in (("", None), ("_things", True), ("_stuff", False)):
        average, per_class = stat.pq_average(categories, isthing=isthing)
        for key in ("pq", "sq", "rq"):
            assert result[key + suffix] == pytest.approx(average[key], abs=1e-9)
            for label, row in per_class.items():
                assert result["per_class"][label][key] == pytest.approx(row[key], abs=1e-9)
        assert result["num_classes" + suffix] == average["n"]
