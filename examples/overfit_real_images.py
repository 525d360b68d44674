"""Overfit a tiny EoMT on eight photographs from scratch, then segment them with `hf-segvit segment`.

    python examples/overfit_real_images.py ../shared/data/coco_train100 --output overfit

The folder has COCO's layout: `train2017/*.jpg`, `annotations/panoptic_train2017.json` and its PNGs. This shows that
images, id maps, matching, losses, annealing, saving, the command line and post-processing work together on real input;
it shows nothing about unseen images. Prints the panoptic quality on the eight images, and that of the truth averaged
over the cells of the mask grid: the cost of a coarse grid. A trained model can do better, as its logits can put an
outline between the centres of two cells.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from hf_segvit import EoMTConfig, EoMTForUniversalSegmentation, EoMTImageProcessor
from hf_segvit.cli import main as hf_segvit
from hf_segvit.metrics.panoptic_quality import PanopticQuality
from hf_segvit.models.image_post_processing import panoptic_segments
from hf_segvit.training.loop import train
from hf_segvit.training.recipe import Recipe
from hf_segvit.training.tasks.eomt import EoMTTask

STUFF_CLASSES = list(range(80, 133))


def read_images(folder: Path, count: int) -> tuple[list[dict[str, Any]], dict[int, str]]:
    """The first images by id with their id maps (void -1) and segments, and the names of the classes."""
    annotation_file = folder / "annotations" / "panoptic_train2017.json"
    if not annotation_file.is_file():
        raise SystemExit(f"{annotation_file} is missing: give the folder that holds train2017/ and annotations/")
    contents = json.loads(annotation_file.read_text())
    labels = {category["id"]: index for index, category in enumerate(contents["categories"])}
    names = {index: category["name"] for index, category in enumerate(contents["categories"])}
    files = {image["id"]: image["file_name"] for image in contents["images"]}
    images = []
    for annotation in sorted(contents["annotations"], key=lambda a: a["image_id"])[:count]:
        segments = [
            {"id": s["id"], "label_id": labels[s["category_id"]], "is_crowd": bool(s["iscrowd"])}
            for s in annotation["segments_info"]
        ]
        images.append(
            {
                "path": folder / "train2017" / files[annotation["image_id"]],
                "segment_map": read_panoptic_map(annotation_file.with_suffix("") / annotation["file_name"]),
                "segments": segments,
            }
        )
    return images, names


def read_panoptic_map(path: Path) -> np.ndarray:
    """COCO's segment ids (H, W), with void as -1."""
    rgb = np.asarray(Image.open(path).convert("RGB")).astype(np.int32)
    ids = rgb[..., 0] + 256 * rgb[..., 1] + 65536 * rgb[..., 2]
    return np.where(ids == 0, -1, ids)


def quality_of_averaged_truth(images: list[dict[str, Any]], processor: EoMTImageProcessor, cells: int) -> float:
    """PQ of the truth if each mask is reduced to its share of each of `cells` x `cells` mask cells."""
    quality = PanopticQuality(num_labels=133, stuff_classes=STUFF_CLASSES)
    for image in images:
        batch = processor(Image.open(image["path"]), image["segment_map"], mapping(image))
        masks, classes = batch["mask_labels"][0], batch["class_labels"][0]
        shares = torch.nn.functional.adaptive_avg_pool2d(masks.float(), cells)
        class_logits = torch.full((1, len(classes), 134), -20.0)
        class_logits[0, torch.arange(len(classes)), classes] = 20.0
        size = processor.size["height"], processor.size["width"]
        answer = panoptic_segments(
            class_logits,
            torch.logit(shares.clamp(1e-4, 1 - 1e-4))[None],
            [image["segment_map"].shape],
            input_size=size,
            content_sizes=batch["content_sizes"],
            stuff_classes=STUFF_CLASSES,
        )
        quality.add_batch(predictions=answer, references=[reference(image)])
    return quality.compute()["pq"]


def mapping(image: dict[str, Any]) -> dict[int, int | None]:
    """Segment id to label id; None for crowds, which are ignored in training."""
    return {s["id"]: None if s["is_crowd"] else s["label_id"] for s in image["segments"]}


def reference(image: dict[str, Any]) -> dict[str, Any]:
    return {"segmentation": image["segment_map"], "segments_info": image["segments"]}


class ImagesTask(EoMTTask):
    """Trains on a few images in memory, without augmentation."""

    def __init__(self, recipe: Recipe, config: EoMTConfig, processor: EoMTImageProcessor, batch: Any) -> None:
        super().__init__(recipe)
        self.config, self.processor, self.batch = config, processor, batch

    def build_model(self) -> tuple[Any, Any]:
        return EoMTForUniversalSegmentation(self.config), self.processor

    def train_samples(self) -> "ImagesTask":
        return self

    def __len__(self) -> int:
        return len(self.batch["pixel_values"])

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, ...]:
        return tuple(self.batch[name][key[1]] for name in ("pixel_values", "mask_labels", "class_labels"))

    def collator(self, processor: Any, device: torch.device) -> Any:
        return collate

    def evaluate(self, model: Any, processor: Any, device: torch.device, limit: int | None) -> dict[str, float]:
        return {"pq": 0.0}  # scored below, through the command line

    def validation_name(self) -> dict[str, str]:
        return {"task": "panoptic", "dataset": "the training images", "split": "train"}


def collate(samples: list[tuple[Any, ...]]) -> dict[str, Any]:
    images, masks, classes = zip(*samples, strict=True)
    return {"pixel_values": torch.stack(images), "mask_labels": list(masks), "class_labels": list(classes)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", default=Path("../shared/data/coco_train100"))
    parser.add_argument("--output", type=Path, default=Path("outputs/overfit"))
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--size", type=int, default=192)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    images, names = read_images(arguments.data, arguments.images)
    size = {"height": arguments.size, "width": arguments.size}
    processor = EoMTImageProcessor(task="panoptic", size=size, stuff_classes=STUFF_CLASSES, num_labels=133)
    config = EoMTConfig(
        hidden_size=128,
        num_hidden_layers=5,
        num_attention_heads=4,
        intermediate_size=256,
        image_size=arguments.size,
        patch_size=12,
        num_upscale_blocks=1,
        num_register_tokens=0,
        layer_scale_init_value=None,
        initializer_range=0.09,  # about 1 / sqrt(hidden_size)
        num_queries=40,
        num_query_layers=2,
        train_num_points=512,
        id2label=names,
        label2id={name: index for index, name in names.items()},
    )
    cells = arguments.size // config.patch_size * config.upscale_factor
    averaged = quality_of_averaged_truth(images, processor, cells)
    print(f"truth averaged over a mask grid of {cells} cells on the long side: PQ {averaged:.3f}")

    batch = processor(
        [Image.open(p["path"]) for p in images], [p["segment_map"] for p in images], [mapping(p) for p in images]
    )
    recipe = Recipe(
        data=str(arguments.data),
        steps=arguments.steps,
        batch_size=max(1, len(images) // 2),  # half of the images: noise helps, and a step takes half the time
        learning_rate=1e-3,
        weight_decay_mode="matrices",
        max_grad_norm=1.0,
        warmup_steps=[min(50, arguments.steps // 10)],
        layer_decay=1.0,
        num_workers=0,
        evaluate_every="end",
        trackers=[],
        draw=0,
        resume=False,
        output=str(arguments.output),
    )
    train(recipe, task=ImagesTask(recipe, config, processor, batch))

    files = [str(p["path"]) for p in images]
    segments = arguments.output / "segments"
    code = hf_segvit(["segment", *files, "--model", str(arguments.output / "model"), "--output", str(segments)])
    if code:
        raise SystemExit(code)
    quality = PanopticQuality(num_labels=133, stuff_classes=STUFF_CLASSES)
    for image in images:
        stem = image["path"].stem
        answer = {
            "segmentation": read_panoptic_map(segments / f"{stem}.panoptic.png"),
            "segments_info": json.loads((segments / f"{stem}.segments.json").read_text())["segments"],
        }
        quality.add_batch(predictions=[answer], references=[reference(image)])
    result = quality.compute()
    print(f"PQ on the {len(images)} images: {result['pq']:.3f} (SQ {result['sq']:.3f}, RQ {result['rq']:.3f})")
    print(f"overlays: {segments}/*.overlay.png")


if __name__ == "__main__":
    main()
