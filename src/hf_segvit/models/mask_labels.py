"""From a map of labels or segment ids to binary masks and their classes, as mask classification is trained.

`read_label_maps` takes whatever holds maps to one integer channel, `resize_label_map` and `pad_label_map` bring them to
the model's input, and `masks_of_label_maps` splits them. A map keeps its single channel until the last step. Negative
values always mean "ignore": that is void in this package's own results, and what padding is filled with.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .image_decoding import as_list, open_image_file

_INTEGER_MODES = ("1", "L", "P", "I")


def label_map_tensor(label_map: Any, name: str = "segmentation map", device: Any = None) -> Tensor:
    """A map of labels or ids as an (H, W) int64 tensor.

    Args:
        label_map: a Pillow image of one integer channel (palette images give their indices), a NumPy array or tensor of
            integers, (H, W) or with a channel axis of length 1, or the path of such an image.
        name: what to call the map in errors.
        device: where the result shall be.

    Returns:
        (H, W) int64.

    Raises:
        ValueError: three channels (an encoded panoptic map, or a coloured one), or values that are no integers.
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
    """Resize to the nearest pixel's value.

    Args:
        label_map: (H, W) of any integer type.
        size: (height, width) of the result.

    Returns:
        (height, width): the value under each new pixel's centre, exact for ids of any size (interpolation in floating
        point loses ids above 2**24).
    """
    if tuple(label_map.shape) == size:
        return label_map
    rows, columns = (
        # Integer arithmetic for floor((i + 0.5) * length / new_length).
        (2 * torch.arange(new_length, device=label_map.device) + 1) * length // (2 * new_length)
        for length, new_length in zip(label_map.shape, size, strict=True)
    )
    return label_map[rows[:, None], columns]


def pad_label_map(label_map: Tensor, size: tuple[int, int]) -> Tensor:
    """Pad right and below with "ignore".

    Args:
        label_map: (H, W) signed integers.
        size: (height, width) of the result, at least the map's.

    Returns:
        (height, width), -1 where the map does not reach.
    """
    height, width = label_map.shape
    if (height, width) == size:
        return label_map
    padded = label_map.new_full(size, -1)
    padded[:height, :width] = label_map
    return padded


def read_label_maps(segmentation_maps: Any, image_sizes: Sequence[tuple[int, int]], device: Any) -> list[Tensor]:
    """The label maps of a batch of images, checked against them.

    Args:
        segmentation_maps: what `label_map_tensor` takes, one or a list, or a batch in one array.
        image_sizes: (height, width) of each image.
        device: where the results shall be.

    Returns:
        (H, W) int64 for each image.

    Raises:
        ValueError: not as many maps as images, or a map of another size than its image's.
    """
    given = as_list(segmentation_maps, 2)
    if len(image_sizes) == 1 and len(given) > 1 and not isinstance(segmentation_maps, list | tuple):
        given = [segmentation_maps]  # the third axis holds channels, not images
    if len(given) != len(image_sizes):
        raise ValueError(f"{len(given)} segmentation_maps for {len(image_sizes)} images; give one for each image")
    maps = []
    for index, (label_map, size) in enumerate(zip(given, image_sizes, strict=True)):
        name = f"segmentation_maps[{index}]"
        maps.append(label_map_tensor(label_map, name, device))
        found = tuple(maps[-1].shape)
        if found != size:
            remedy = "it must be the image's own, pixel for pixel"
            if found == size[::-1]:
                remedy = (
                    "it lies on its side: the image's EXIF orientation was applied (or the map was transposed); "
                    "rotate the map in the same way"
                )
            raise ValueError(
                f"{name} is {found[0]}x{found[1]} (height x width), but images[{index}] is {size[0]}x{size[1]}; "
                f"{remedy}"
            )
    return maps


def masks_of_label_maps(
    label_maps: Sequence[Tensor], owners: Sequence[int], class_of_id: Any, **settings: Any
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """`masks_of_label_map` for a batch.

    Args:
        label_maps: (H, W) int64, whole maps or windows of them.
        owners: for each, the index of the image it comes from.
        class_of_id: `None`, one mapping for all images, or a list of one for each image.
        settings: keyword arguments of `masks_of_label_map`.

    Returns:
        Masks, classes and counted pixels of each.

    Raises:
        ValueError: not as many mappings as images, or what `masks_of_label_map` raises.
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
            whatever `ignore_index` says; a class that is `None`, negative or `ignore_index` makes a segment ignored.
        ignore_index: label, or id that `class_of_id` does not list, of pixels that belong to no mask; `None`: no such.
        do_reduce_labels: classes are counted from 1, and 0 is ignored: class k becomes k - 1.
        num_labels: number C of classes, if known; classes beyond are an error.
        name: what to call the map in errors.

    Returns:
        `masks` (n, H, W) bool in ascending order of ids, `classes` (n,) int64, and `counted` (H, W) bool, False where
        pixels are ignored. n = 0 if there is nothing.

    Raises:
        ValueError: an id that `class_of_id` does not list, or a class outside [0, C).
    """
    values, positions = torch.unique(label_map, return_inverse=True)
    classes = _classes_of_values(values.tolist(), class_of_id, ignore_index, do_reduce_labels, num_labels, name)
    kept = [label is not None for label in classes]
    num_masks = sum(kept)
    # The rows of the values that are dropped all go to one more row behind the masks.
    rows = torch.tensor(kept, dtype=torch.int64).cumsum(0) - 1
    rows[[not keep for keep in kept]] = num_masks
    rows = rows.to(label_map.device)[positions]
    masks = torch.zeros((num_masks + 1, *label_map.shape), dtype=torch.bool, device=label_map.device)
    masks.scatter_(0, rows[None], True)
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
    # An index that is a class as well ("0 is void" of an id map) speaks of ids only.
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
            label -= 1
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
