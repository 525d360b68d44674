"""Small data sets on disk, whole ones and damaged ones, for the tests of the readers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIZE = (20, 30)  # height, width


def write_image(path: Path, size: tuple[int, int] = SIZE, seed: int = 0, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


def write_mask(path: Path, values: Any, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = values if isinstance(values, Image.Image) else Image.fromarray(np.asarray(values))
    image.save(path, **options)
    return path


def write_json(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def halves(left: int = 0, right: int = 1, size: tuple[int, int] = SIZE, dtype: Any = np.uint8) -> np.ndarray:
    values = np.full(size, left, dtype=dtype)
    values[:, size[1] // 2 :] = right
    return values


def mask_folder(root: Path, names: tuple[str, ...] = ("one",), split: str = "train", classes: Any = None) -> str:
    for seed, name in enumerate(names):
        write_image(root / "images" / split / f"{name}.jpg", seed=seed)
        write_mask(root / "annotations" / split / f"{name}.png", halves())
    write_json(root / "classes.json", classes or {"0": "road", "1": "car"})
    return f"mask_folder:{root}"


def coco_content() -> dict[str, Any]:
    """One image with two triangles and a crowd."""
    height, width = SIZE
    crowd = {"size": [height, width], "counts": [0, 40, height * width - 40]}
    rows = [
        {
            "id": 1,
            "category_id": 3,
            "segmentation": [[2, 2, 12, 2, 2, 12]],
            "iscrowd": 0,
            "area": 50,
            "bbox": [2, 2, 10, 10],
        },
        {"id": 2, "category_id": 7, "segmentation": [[15, 5, 25, 5, 25, 15]], "iscrowd": 0},
        {"id": 3, "category_id": 3, "segmentation": crowd, "iscrowd": 1},
    ]
    return {
        "images": [{"id": 5, "file_name": "a.jpg", "height": height, "width": width}],
        "annotations": [{"image_id": 5, **row} for row in rows],
        "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}],
    }


def coco_folder(root: Path, change: Callable[[dict[str, Any]], object] = lambda content: None) -> str:
    content = coco_content()
    change(content)
    write_image(root / "train" / "a.jpg")
    write_json(root / "annotations" / "instances_train.json", content)
    return f"coco_folder:{root}"


def panoptic_content() -> dict[str, Any]:
    return {
        "images": [{"id": 5, "file_name": "a.jpg", "height": SIZE[0], "width": SIZE[1]}],
        "annotations": [
            {
                "image_id": 5,
                "file_name": "a.png",
                "segments_info": [
                    {"id": 7, "category_id": 1, "iscrowd": 0},
                    {"id": 70000, "category_id": 4, "iscrowd": 0},
                ],
            }
        ],
        "categories": [{"id": 1, "name": "cat", "isthing": 1}, {"id": 4, "name": "sky", "isthing": 0}],
    }


def colored(ids: np.ndarray) -> np.ndarray:
    return np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)


def panoptic_folder(
    root: Path, change: Callable[[dict[str, Any]], object] = lambda content: None, ids: np.ndarray | None = None
) -> str:
    content = panoptic_content()
    change(content)
    write_image(root / "train" / "a.jpg")
    if ids is None:
        ids = halves(7, 70000, dtype=np.int64)
        ids[0] = 0
    write_mask(root / "annotations" / "panoptic_train" / "a.png", colored(ids))
    write_json(root / "annotations" / "panoptic_train.json", content)
    return f"coco_folder:{root}"
