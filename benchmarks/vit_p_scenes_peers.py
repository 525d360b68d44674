"""Peers of ViT-P on generated scenes: a linear classifier of the pixels around a point, and an EoMT.

Both are scored at the same points as ViT-P (`score`); see vit_p_scenes.py.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from hf_segvit.data.augmentation import sample_generator
from hf_segvit.data.prompts import draw_points
from hf_segvit.evaluation.points import InteriorPoints, RandomPoints, labelled_segments
from hf_segvit.inference.segmenter import Segmenter
from hf_segvit.metrics.point_accuracy import PointAccuracy

WINDOW = 16  # pixels around a point, as many as four patches of the ViT
LEARNING_RATE = 2e-3


def linear_accuracy(scenes: Any, tests: Any, num_labels: int, seed: int, size: tuple[int, int, int]) -> dict[str, Any]:
    """Softmax regression on the window around a point: its pixels, their squares, and mean and spread of each colour.

    It sees as many labelled points as ViT-P in its steps.

    Args:
        scenes: to train on.
        tests: to score on.
        num_labels: classes.
        seed: of points and order.
        size: steps, images of a step and points of an image.
    """
    steps, batch_size, num_points = size
    torch.manual_seed(seed)
    start, history = time.process_time(), []
    model: Any = None
    for step in range(steps):
        found = []
        for place in range(batch_size):
            number = step * batch_size + place
            entry = scenes[number % len(scenes)]
            segment_map, labels = labelled_segments(entry)
            generator = sample_generator(seed, number // len(scenes), number)
            points, drawn = draw_points(np.append(labels, -1)[segment_map], num_points, generator)
            found.append((features(entry, points), drawn))
        inputs, truth = torch.cat([row[0] for row in found]), torch.cat([row[1] for row in found])
        if model is None:
            model = nn.Sequential(nn.BatchNorm1d(inputs.shape[1], affine=False), nn.Linear(inputs.shape[1], num_labels))
            optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=1e-2)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (1 - step / steps)
        loss = nn.functional.cross_entropy(model(inputs), truth)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 10 == 0:
            history.append([step + 1, float(loss.detach())])
    seconds = time.process_time() - start
    model.eval()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    with torch.inference_mode():
        scores = score(tests, num_labels, num_points, lambda entry, points: model(features(entry, points)))
    return {"seconds": seconds, "history": history, "parameters": parameters, "scores": scores}


def features(entry: Any, points: Tensor) -> Tensor:
    """(N, F) features of the windows around points (N, 2) in [0, 1]."""
    image = torch.from_numpy(entry["image"]).permute(2, 0, 1).float() / 255
    half = WINDOW // 2
    padded = nn.functional.pad(image[None], (half,) * 4, mode="reflect")[0]
    height, width = image.shape[1:]
    columns = (points[:, 0] * width).long().clamp(max=width - 1)
    rows = (points[:, 1] * height).long().clamp(max=height - 1)
    reach = torch.arange(WINDOW + 1)
    windows = padded[:, (rows[:, None] + reach)[:, :, None], (columns[:, None] + reach)[:, None, :]].transpose(0, 1)
    middle = windows[..., half - 1 : half + 2, half - 1 : half + 2]
    pixels = nn.functional.avg_pool2d(windows[..., :WINDOW, :WINDOW], 2).flatten(1)
    spread = [part.flatten(2).std(-1) for part in (windows, middle)]
    mean = [part.flatten(2).mean(-1) for part in (windows, middle)]
    return torch.cat([pixels, pixels**2, *mean, *spread], dim=1)


def eomt_accuracy(folder: str, tests: Any, num_points: int) -> dict[str, Any]:
    """Accuracy of the semantic map of a trained EoMT at the points, without probabilities."""
    predictor = Segmenter.from_pretrained(folder, task="semantic")
    num_labels = len(predictor.id2label)

    def answer(entry: Any, points: Tensor) -> Tensor:
        (label_map,) = predictor.answers([Image.fromarray(entry["image"])])
        height, width = label_map.shape
        columns = (points[:, 0] * width).long().clamp(max=width - 1)
        rows = (points[:, 1] * height).long().clamp(max=height - 1)
        return nn.functional.one_hot(label_map[rows, columns].long().clamp(min=0), num_labels).float()

    start = time.process_time()
    scores = score(tests, num_labels, num_points, answer)
    for kind in scores.values():  # one answer a point has neither a second choice nor a confidence
        kind["top_5"] = kind["expected_calibration_error"] = None
    parameters = sum(parameter.numel() for parameter in predictor.model.parameters())
    return {"folder": folder, "seconds_asking": time.process_time() - start, "parameters": parameters, "scores": scores}


def score(tests: Any, num_labels: int, num_points: int, answer: Callable[[Any, Tensor], Tensor]) -> dict[str, Any]:
    """`PointAccuracy` at random and at innermost points.

    Args:
        tests: scenes.
        num_labels: C.
        num_points: random points of a scene.
        answer: logits (N, C) for a scene and points (N, 2).
    """
    results = {}
    for kind, source in (("random", RandomPoints(num_points)), ("interior", InteriorPoints())):
        metric = PointAccuracy(num_labels)
        for index in range(len(tests)):
            located = source(tests[index], index)
            metric.add_batch(predictions=[answer(tests[index], located.points)], references=[located.labels])
        result = metric.compute()
        result["per_class"] = {label: row for label, row in result["per_class"].items() if row["points"]}
        results[kind] = result
    return results
