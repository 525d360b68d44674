"""Panoptic quality written out in plain loops from its published rules, to compare the fast one with.

Slow on purpose: dictionaries of pixel counts, one segment pair at a time. `benchmarks/metrics.py` times it where
panopticapi itself is not installed.
"""

import numpy as np


def reference_counts(prediction, reference, num_labels):
    """(C, 4) true positives, false positives, false negatives, summed IoU of one image."""
    counts = np.zeros((num_labels, 4))
    shared, predicted_area, true_area = {}, {}, {}
    # One number per (reference id, prediction id); ids are below 2**24 and void is -1.
    packed = (np.asarray(reference["segmentation"]).astype(np.int64) + 1) * 2**25 + (
        np.asarray(prediction["segmentation"]).astype(np.int64) + 1
    )
    for pair, pixels in zip(*np.unique(packed, return_counts=True), strict=True):
        true_id, predicted_id = int(pair) // 2**25 - 1, int(pair) % 2**25 - 1
        pixels = int(pixels)
        shared[true_id, predicted_id] = pixels
        true_area[true_id] = true_area.get(true_id, 0) + pixels
        predicted_area[predicted_id] = predicted_area.get(predicted_id, 0) + pixels

    found, explained = set(), set()
    for true_row in reference["segments_info"]:
        if true_row["is_crowd"]:
            continue
        for predicted_row in prediction["segments_info"]:
            if true_row["label_id"] != predicted_row["label_id"]:
                continue
            both = shared.get((true_row["id"], predicted_row["id"]), 0)
            either = true_area[true_row["id"]] + predicted_area[predicted_row["id"]] - both
            either -= shared.get((-1, predicted_row["id"]), 0)
            if both / either > 0.5:
                counts[true_row["label_id"], 0] += 1
                counts[true_row["label_id"], 3] += both / either
                found.add(true_row["id"])
                explained.add(predicted_row["id"])

    crowd_of_class = {}
    for row in reference["segments_info"]:
        if row["is_crowd"]:
            crowd_of_class[row["label_id"]] = row["id"]
        elif row["id"] not in found:
            counts[row["label_id"], 2] += 1

    for row in prediction["segments_info"]:
        if row["id"] in explained:
            continue
        forgiven = shared.get((-1, row["id"]), 0)
        if row["label_id"] in crowd_of_class:
            forgiven += shared.get((crowd_of_class[row["label_id"]], row["id"]), 0)
        if forgiven / predicted_area[row["id"]] <= 0.5:
            counts[row["label_id"], 1] += 1
    return counts


def reference_quality(counts, classes):
    """Mean pq, sq, rq over those of the classes that occur, and their number."""
    rows = []
    for label in classes:
        tp, fp, fn, iou = counts[label]
        if tp + fp + fn > 0:
            weight = tp + fp / 2 + fn / 2
            rows.append((iou / weight, iou / tp if tp else 0.0, tp / weight))
    means = [sum(column) / len(rows) for column in zip(*rows, strict=True)] if rows else [float("nan")] * 3
    return dict(zip(("pq", "sq", "rq", "num_classes"), [*means, len(rows)], strict=True))
