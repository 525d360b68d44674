"""Maps of labels or segment ids to binary masks and their classes.

`read_label_maps` reads maps from any form into one integer channel, `resize_label_map` and `pad_label_map` bring them
to the model's input, and `masks_of_label_maps` splits them into masks, as mask classification is trained. A map keeps
its single channel until the last step. Negative values always mean "ignore": void in this package's own results, and
padding.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .image_files import open_image_file
from .image_tensors import as_list

_INTEGER_MODES = ("1", "L", "P", "I")  # of Pillow; its 16-bit ones start with "I;16"


def label_map_tensor(label_map: Any, name: str = "segmentation map", device: Any = None) -> Tensor:
    """A map of labels or ids as an (H, W) int64 tensor; `name` is what errors call it.

    `label_map` is a Pillow image of one integer channel (palette images give their indices), a NumPy array or tensor of
    integers, (H, W) or with a channel axis of length 1, or the path of such an image.
    """
    if not isinstance(label_map, Image.Image | np.ndarray | Tensor):
        label_map = open_image_file(label_map)
    if isinstance(label_map, Image.Image):
        mode = label_map.mode
        if mode not in _INTEGER_MODES and not mode.startswith("I;16"):
            raise ValueError(f"{name}: an image of mode {mode}; {_one_channel_remedy(len(label_map.getbands()))}")
        label_map = np.array(label_map)
    shape = tuple(label_map.shape)
    if len(shape) == 3 and 1 in (shape[0], shape[2]):
        label_map = label_map.squeeze(0 if shape[0] == 1 else 2)
    elif len(shape) != 2:
        channels = min(shape) if len(shape) == 3 else 0
        raise ValueError(f"{name}: shape {shape}; {_one_channel_remedy(channels)}")
    dtype = str(label_map.dtype).removeprefix("torch.")
    if not dtype.startswith(("int", "uint", "bool")):
        raise ValueError(f"{name}: values of type {dtype}; labels and ids are integers, convert the map first")
    if isinstance(label_map, np.ndarray):
        # NumPy widens first: PyTorch has no uint16 arithmetic, and rejects flipped views.
        label_map = torch.from_numpy(np.ascontiguousarray(label_map.astype(np.int64)))
    return label_map.to(device=device, dtype=torch.int64)


def _one_channel_remedy(num_channels: int) -> str:
    if num_channels in (3, 4):
        return (
            "a map has one channel of labels or ids. If this is a panoptic PNG, decode it: "
            "id = R + 256 * G + 65536 * B. If colours stand for classes, replace each by its label"
        )
    return "a map has one channel of integer labels or ids, (H, W)"


def resize_label_map(label_map: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize a map (H, W) to (height, width): the value under each new pixel's centre."""
    if tuple(label_map.shape) == size:
        return label_map
    # Not by interpolation in floating point, which loses ids above 2**24.
    rows, columns = (
        # floor((i + 0.5) * length / new_length) in integers.
        (2 * torch.arange(new_length, device=label_map.device) + 1) * length // (2 * new_length)
        for length, new_length in zip(label_map.shape, size, strict=True)
    )
    return label_map[rows[:, None], columns]


def pad_label_map(label_map: Tensor, size: tuple[int, int]) -> Tensor:
    """Pad a map (H, W) of signed integers to `size`, right and below with -1 for "ignore"."""
    height, width = label_map.shape
    if (height, width) == size:
        return label_map
    padded = label_map.new_full(size, -1)
    padded[:height, :width] = label_map
    return padded


def read_label_maps(segmentation_maps: Any, image_sizes: Sequence[tuple[int, int]], device: Any) -> list[Tensor]:
    """The label maps of a batch, (H, W) int64 each, checked against the (height, width) of the images."""
    given = as_list(segmentation_maps, 2)
    if len(image_sizes) == 1 and len(given) > 1 and not isinstance(segmentation_maps, list | tuple):
        given = [segmentation_maps]  # with one image, the third axis holds channels, not images
    if len(given) != len(image_sizes):
        raise ValueError(f"{len(given)} segmentation_maps for {len(image_sizes)} images; give one for each image")
    maps = []
    for index, (label_map, size) in enumerate(zip(given, image_sizes, strict=True)):
        name = f"segmentation_maps[{index}]"
        maps.append(label_map_tensor(label_map, name, device))
        map_size = tuple(maps[-1].shape)
        if map_size != size:
            remedy = "it must be the image's own, pixel for pixel"
            # Viewers and some readers turn an image by its EXIF orientation; label PNGs have none.
            if map_size == size[::-1]:
                remedy = (
                    "it lies on its side: the image's EXIF orientation was applied (or the map was transposed); "
                    "rotate the map in the same way"
                )
            raise ValueError(
                f"{name} is {map_size[0]}x{map_size[1]} (height x width), but images[{index}] is {size[0]}x{size[1]}; "
                f"{remedy}"
            )
    return maps


def masks_of_label_maps(
    label_maps: Sequence[Tensor], owners: Sequence[int], class_of_id: Any, **settings: Any
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """`masks_of_label_map` for a batch: masks, classes and counted pixels of each map.

    Args:
        label_maps: (H, W) int64, whole maps or windows of them.
        owners: for each, the index of the image it comes from.
        class_of_id: `None`, one mapping for all images, or a list of one for each image.
        settings: keyword arguments of `masks_of_label_map`.
    """
    num_images = max(owners) + 1
    mappings = [class_of_id] * num_images if class_of_id is None or isinstance(class_of_id, Mapping) else class_of_id
    if len(mappings) != num_images:
        raise ValueError(
            f"instance_id_to_semantic_id has {len(mappings)} mappings for {num_images} segmentation_maps; give one "
            "for each, or one for all"
        )
    results = [
        masks_of_label_map(label_map, mappings[owner], name=f"segmentation_maps[{owner}]", **settings)
        for label_map, owner in zip(label_maps, owners, strict=True)
    ]
    masks, classes, counted = zip(*results, strict=True)
    return list(masks), list(classes), list(counted)


def masks_of_label_map(
    label_map: Tensor,
    class_of_id: Mapping[int, int | None] | None = None,
    *,
    ignore_index: int | None = 255,
    do_reduce_labels: bool = False,
    num_labels: int | None = None,
    name: str = "segmentation map",
) -> tuple[Tensor, Tensor, Tensor]:
    """One binary mask for each label or id of a map.

    Args:
        label_map: (H, W) int64, labels (semantic) or segment ids (panoptic, instance).
        class_of_id: segment id to class; `None` where the values are the classes. Ids that it lists are segments,
            whatever `ignore_index` is; a class that is `None`, negative or `ignore_index` makes a segment ignored.
        ignore_index: label, or id that `class_of_id` does not list, of pixels that belong to no mask; `None`: no such.
        do_reduce_labels: classes are counted from 1, and 0 is ignored: class k becomes k - 1.
        num_labels: number C of classes, to check them against; `None` does not check.

    Returns:
        `masks` (n, H, W) bool in ascending order of ids, `classes` (n,) int64, and `counted` (H, W) bool, False where
        pixels are ignored. n = 0 if there is nothing.
    """
    values, positions = torch.unique(label_map, return_inverse=True)
    classes = _classes_of_values(values.tolist(), class_of_id, ignore_index, do_reduce_labels, num_labels, name)
    kept = [label is not None for label in classes]
    num_masks = sum(kept)
    # All values that are dropped share one more row behind the masks, which becomes `counted`.
    rows = torch.tensor(kept, dtype=torch.int64).cumsum(0) - 1
    rows[[not keep for keep in kept]] = num_masks
    rows = rows.to(label_map.device)[positions]
    masks = torch.zeros((num_masks + 1, *label_map.shape), dtype=torch.bool, device=label_map.device)
    masks.scatter_(0, rows[None], True)  # one pass, where a comparison for each id would read the map n times
    labels = torch.tensor([label for label in classes if label is not None], dtype=torch.int64)
    return masks[:num_masks], labels.to(label_map.device), ~masks[num_masks]


def _classes_of_values(
    values: list[int],
    class_of_id: Mapping[int, int | None] | None,
    ignore_index: int | None,
    do_reduce_labels: bool,
    num_labels: int | None,
    name: str,
) -> list[int | None]:
    # Where `ignore_index` is also a class ("0 is void" in an id map), it means the id only.
    ignored_class = None if class_of_id and _is_class(ignore_index, num_labels, do_reduce_labels) else ignore_index
    classes: list[int | None] = []
    for value in values:
        label: int | None = value
        if value < 0:
            label = None
        elif class_of_id is not None:
            if value in class_of_id:
                label = class_of_id[value]
            elif value == ignore_index or (do_reduce_labels and value == 0):
                label = None
            else:
                raise ValueError(
                    f"{name}: id {value} has no class in instance_id_to_semantic_id, which lists "
                    f"{_few(sorted(class_of_id))}; add it, or map it to a negative class to ignore its pixels"
                )
        if label is not None and (label < 0 or label == ignored_class or (do_reduce_labels and label == 0)):
            label = None
        if label is not None and do_reduce_labels:
            label -= 1  # after the comparison: `ignore_index` is a label of the file
        if label is not None and num_labels is not None and label >= num_labels:
            given = label + 1 if do_reduce_labels else label
            first = 1 if do_reduce_labels else 0
            raise ValueError(
                f"{name}: label {given} is outside {first}..{num_labels - 1 + first}, the {num_labels} classes "
                f"(ignore_index={ignore_index}, do_reduce_labels={do_reduce_labels}); correct the map or the settings"
            )
        classes.append(label)
    return classes


def _is_class(index: int | None, num_labels: int | None, do_reduce_labels: bool) -> bool:
    first = 1 if do_reduce_labels else 0
    return index is not None and num_labels is not None and first <= index < num_labels + first


def _few(values: list[int]) -> str:
    return ", ".join(map(str, values[:10])) + (", ..." if len(values) > 10 else "")
