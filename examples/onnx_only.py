"""Panoptic segmentation by an exported EoMT with NumPy, Pillow and ONNX Runtime only.

    hf-segvit export MODEL exported --format onnx     (where PyTorch is)
    python onnx_only.py exported photo.jpg map.png    (where it is not)

Prints the segments, and writes a map in which the pixel value is a segment's number from 1, 0 where there is none.
`segment` gives the segments of `EoMTImageProcessor.post_process_panoptic_segmentation`.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


class Model:
    """An exported folder: its session, and the settings of its image processor."""

    def __init__(self, folder: str, threads: int | None = None) -> None:
        root = Path(folder)
        record = json.loads((root / "export.json").read_text(encoding="utf-8"))
        if record["format"] != "onnx" or "model" not in record["graphs"]:
            raise ValueError(f"{folder} holds no single ONNX model; export an EoMT with --format onnx")
        self.settings = json.loads((root / "preprocessor_config.json").read_text(encoding="utf-8"))
        if self.settings.get("do_split_image"):
            raise ValueError(f"{folder} is a semantic model, whose images are cut into windows")
        labels = json.loads((root / "config.json").read_text(encoding="utf-8"))["id2label"]
        self.labels = {int(label): name for label, name in labels.items()}
        options = onnxruntime.SessionOptions()
        if threads is not None:
            options.intra_op_num_threads = threads
        file = next(iter(record["graphs"]["model"]["files"]))
        self.session = onnxruntime.InferenceSession(root / file, options, providers=["CPUExecutionProvider"])

    def prepare(self, image: Image.Image) -> tuple[np.ndarray, tuple[int, int]]:
        """Pixels (1, 3, H, W), and the height and width of the image in them; the rest is black."""
        size = self.settings["size"]
        height, width = size["height"], size["width"]
        factor = min(height / image.height, width / image.width)
        content = max(1, round(image.height * factor)), max(1, round(image.width * factor))
        resized = image.resize(content[::-1], Image.Resampling(self.settings.get("resample", 2)))
        pixels = np.zeros((height, width, 3), np.float32)
        pixels[: content[0], : content[1]] = np.asarray(resized, np.float32)
        pixels *= self.settings.get("rescale_factor", 1 / 255)
        mean, std = (np.array(self.settings[name], np.float32) for name in ("image_mean", "image_std"))
        return ((pixels - mean) / std).transpose(2, 0, 1)[None], content

    def segment(self, image: Image.Image, threshold: float | None = None) -> tuple[np.ndarray, list[dict]]:
        """The (H, W) int32 map of segment ids, void -1, and a row for each segment: id, label_id, label, score."""
        image = ImageOps.exif_transpose(image).convert("RGB")
        pixels, content = self.prepare(image)
        names = ["class_queries_logits", "masks_queries_logits"]
        classes, masks = (output[0] for output in self.session.run(names, {"pixel_values": pixels}))
        threshold = self.settings.get("threshold", 0.8) if threshold is None else threshold
        probabilities = softmax(classes)
        labels, scores = probabilities.argmax(1), probabilities.max(1)
        kept = np.flatnonzero((labels != classes.shape[1] - 1) & (scores > threshold))
        segments = np.full((image.height, image.width), -1, np.int32)
        if not len(kept):
            return segments, []
        masks = resize_masks(masks[kept], pixels.shape[2:], content, segments.shape)
        mask_probabilities = 1 / (1 + np.exp(-masks))
        return segments, self.compete(segments, mask_probabilities, labels[kept], scores[kept])

    def compete(self, segments: np.ndarray, masks: np.ndarray, labels: np.ndarray, scores: np.ndarray) -> list[dict]:
        """Paint the queries into `segments`, each where it is the most probable; gives the rows."""
        inside = masks >= self.settings.get("mask_threshold", 0.5)
        winners = (masks * scores[:, None, None]).argmax(0)
        stuff = set(self.settings.get("stuff_classes") or ())
        rows: list[dict] = []
        stuff_ids: dict[int, int] = {}
        for query, label in enumerate(labels.tolist()):
            won = winners == query
            visible = won & inside[query]
            # The part of its own mask that a segment must keep against the others.
            share = won.sum() / max(inside[query].sum(), 1)
            if not visible.any() or share < self.settings.get("overlap_mask_area_threshold", 0.8):
                continue
            if label in stuff_ids:  # the stuff of a class is one segment
                segments[visible] = stuff_ids[label]
                continue
            segments[visible] = len(rows)
            if label in stuff:
                stuff_ids[label] = len(rows)
            score = round(float(scores[query]), 6)
            rows.append({"id": len(rows), "label_id": label, "label": self.labels[label], "score": score})
        return rows


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities along the last axis."""
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def resize_masks(
    masks: np.ndarray, input_size: tuple[int, ...], content: tuple[int, int], size: tuple[int, ...]
) -> np.ndarray:
    """Masks (K, h, w) brought to the model's input, cropped to the image in it, and brought to the image's size."""
    rows, columns = (
        bilinear(kept, target) @ bilinear(length, whole)[:kept]
        for length, whole, kept, target in zip(masks.shape[1:], input_size, content, size, strict=True)
    )
    return (rows @ masks @ columns.T).astype(np.float32)


def bilinear(length: int, target: int) -> np.ndarray:
    """The (target, length) matrix of bilinear interpolation along an axis."""
    positions = ((np.arange(target) + 0.5) * length / target - 0.5).clip(0, length - 1)
    low = positions.astype(int)
    high = np.minimum(low + 1, length - 1)
    matrix = np.zeros((target, length))
    np.add.at(matrix, (np.arange(target), low), 1 - (positions - low))
    np.add.at(matrix, (np.arange(target), high), positions - low)
    return matrix


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder that `hf-segvit export --format onnx` wrote")
    parser.add_argument("image")
    parser.add_argument("map", help="PNG to write")
    parser.add_argument("--threads", type=int, help="of the processor; default: all cores")
    args = parser.parse_args()
    with Image.open(args.image) as image:
        segments, rows = Model(args.model, args.threads).segment(image)
    for row in rows:
        area = int((segments == row["id"]).sum())
        print(f"{row['id'] + 1:4} {row['label']:24} {row['score']:.3f} {area:9} pixels")
    Image.fromarray((segments + 1).astype(np.uint16)).save(args.map)


if __name__ == "__main__":
    main()
