"""Anomaly segmentation: images with masks of what is known, anomalous and void.

Read as delivered: RoadAnomaly (frames/NAME.jpg, frames/NAME.labels/labels_semantic.png), SegmentMeIfYouCan's
RoadAnomaly21 and RoadObstacle21 (images, labels_masks/NAME_labels_semantic.png), Lost and Found (leftImg8bit,
gtCoarse), Fishyscapes (NUMBER_NAME_rgb.png, NUMBER_NAME_labels.png; masks alone with `images=`, the folder of Lost and
Found; Static's NUMBER_NAME_rgb.npz, what to add to the images of Cityscapes, with that as `images=`); copies that
courses pass on (images, labels_masks), and any folder of images and masks. Label ids are 0 (known) and 1 (anomaly).
"""

from __future__ import annotations

import io
import posixpath
import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ...models.image_values import AS_STORED, ImageSettings
from ..archives import Location, location_name, read_location
from ..class_lists import ANOMALY_CLASSES, VOID, option_names
from ..decoding import SampleDecoder, image_in_frame
from ..folders import IMAGE_SUFFIXES, DataFolder, by_stem
from ..label_maps import LabelMaps, pair_rows
from ..problems import ProblemList
from ..reading import Reading
from ..shapes import split_names

DESCRIPTION = "anomaly segmentation: masks of 0 (known), 1 (anomaly) and 255 (void)"
TASKS = ("semantic",)
LAYOUT = (
    "images/NAME.jpg and labels_masks/NAME.png (or labels, masks, annotations), perhaps in folders of splits; "
    "labels_masks/NAME_labels_semantic.png; frames/NAME.labels/labels_semantic.png; leftImg8bit and "
    "gtCoarse, also zipped; or NAME_rgb.png and NAME_labels.png"
)
VARIANTS = {
    "smiyc": ("SegmentMeIfYouCan: RoadAnomaly21, RoadObstacle21", {}),
    "fishyscapes": ("Fishyscapes: Lost & Found, Static", {}),
    "road_anomaly": ("RoadAnomaly (2019), whose masks have 2 for anomalies", {"anomaly": "2"}),
    "lost_and_found": (
        "Lost and Found: 1 is the road, 2 to 200 are objects, and all else is void",
        {"known": "1", "anomaly": "2-200", "void": "0"},
    ),
}
FLAT = "val"  # the split of a folder without splits: such sets are there to be scored on

_ARCHIVES = ("leftImg8bit.zip", "gtCoarse.zip", "leftImg8bit_trainvaltest.zip")  # of Lost and Found, and Cityscapes
_VOID_VALUE = 255
_NUMBER = re.compile(r"^\d{4}_")  # before the name of the image that a mask of Fishyscapes is for
_OVERLAY = "rgb.npz"


@dataclass(frozen=True)
class _Layout:
    """Where images and masks are, and what their names end in."""

    images: str
    image_ending: str
    masks: tuple[str, ...]
    mask_ending: str
    all_have_masks: bool = True


_LAYOUTS = (
    # Masks of the test images are the benchmark's secret.
    _Layout("images", "", ("labels_masks",), "_labels_semantic", all_have_masks=False),
    _Layout("images", "", ("labels_masks", "labels", "masks", "annotations"), ""),
    _Layout("original", "", ("labels",), ""),
    _Layout("frames", "", ("frames",), ".labels/labels_semantic"),
    _Layout("leftImg8bit", "_leftImg8bit", ("gtCoarse",), "_gtCoarse_labelIds"),
    _Layout("", "_rgb", ("",), "_labels"),
)


def splits(path: str, wanted: Sequence[str] = (), images: str = "") -> list[str]:
    """Folders in the folder of images, or "val"; "all" is everything."""
    return split_names((_split_of(name) for name in _pairs(path, images)[1]), wanted)


def read(
    path: str,
    split: str,
    task: str,
    problems: ProblemList,
    known: Any = "0",
    anomaly: Any = "1",
    void: Any = "",
    images: str = "",
) -> Reading:
    """Read one split.

    Args:
        known, anomaly, void: values in the masks, such as "0,3" or "2-200"; 255 is void unless it is listed.
        images: folder of the images, where masks came without; those of Fishyscapes are in Lost and Found, or for
            Static in Cityscapes.
    """
    labels = _labels(known, anomaly, void)
    layout, masks, pictures = _pairs(path, images)
    overlays = _overlays(path, masks)
    if overlays and not images:
        raise ValueError(
            f"{path}: {location_name(next(iter(overlays.values())))} is what Fishyscapes Static adds to an image of "
            "Cityscapes; say where those are: ?images=FOLDER, with leftImg8bit in it"
        )
    chosen = [name for name in masks if split in ("all", _split_of(name))]
    own_masks = {_in_split(name, split): masks[name] for name in chosen}
    own_images = {_in_split(name, split): pictures[name] for name in pictures if split in ("all", _split_of(name))}
    remarks = [
        "values in masks: "
        + "; ".join(
            f"{_ranges([value for value, own in labels.items() if own == label])} {name}"
            for label, name in (*enumerate(ANOMALY_CLASSES), (VOID, "void"))
            if label in labels.values()
        )
        + "; known=, anomaly= and void= change that"
    ]
    unlabelled = [name for name in own_images if name not in own_masks]
    if unlabelled and not layout.all_have_masks:
        own_images = {name: location for name, location in own_images.items() if name in own_masks}
        remarks.append(f"images without a mask, as of a test set, which are left out: {len(unlabelled)}")
    rows = pair_rows(own_images, [own_masks], problems)
    remedy = (
        f"{remarks[0]}; the masks of RoadAnomaly are read by road_anomaly:PATH, those of Lost and Found by "
        "lost_and_found:PATH"
    )
    decoder = None
    if overlays:
        remarks.append("images are those of Cityscapes with the overlays of Fishyscapes Static")
        shared = {name: f"{split}/{name}" if name not in masks else name for name in own_masks}
        for name in [name for name in own_images if shared.get(name) not in overlays]:
            problems.error(location_name(masks[shared[name]]), name, f"there is no overlay of its number ({_OVERLAY})")
        added = {location_name(own_images[name]): overlays.get(shared[name]) for name in own_images if name in shared}
        decoder = SampleDecoder(LabelMaps(labels, remedy), OverlaidImages({k: v for k, v in added.items() if v}))
    return Reading(LabelMaps(labels, remedy), list(ANOMALY_CLASSES), [0, 1], rows, remarks=remarks, decoder=decoder)


@dataclass(frozen=True)
class OverlaidImages:
    """Reads images and adds what an NPZ file of the same number holds as `rgb`, clipped to 0 ... 255.

    Attributes:
        overlays: the NPZ file by the name of the image's location.
    """

    overlays: Mapping[str, Location]

    def __call__(
        self, content: bytes, name: str, size: tuple[int, int] | None = None, settings: ImageSettings | None = None
    ) -> Any:
        """As `image_in_frame`, whose arguments these are; an image without an overlay is an error."""
        if settings not in (None, AS_STORED):
            raise ValueError(f"{name}: the overlays of Fishyscapes are of 8-bit RGB; leave range and bands out")
        pixels = np.asarray(image_in_frame(content, name, size))
        if name not in self.overlays:
            raise ValueError(f"{name}: there is no overlay for it")
        return Image.fromarray(
            np.clip(pixels + self._overlay(self.overlays[name], pixels.shape), 0, 255).astype("uint8")
        )

    @staticmethod
    def _overlay(location: Location, shape: tuple[int, ...]) -> np.ndarray:
        name = location_name(location)
        content = io.BytesIO(read_location(location))
        try:
            # Its size before it is unpacked: a few bytes may claim to hold gigabytes.
            with zipfile.ZipFile(content) as archive:
                num_bytes = {entry.filename: entry.file_size for entry in archive.infolist()}.get("rgb.npy")
            if num_bytes is None or num_bytes > 8 * int(np.prod(shape)) + 4096:
                raise ValueError(f"it has no array rgb of {shape}")
            with np.load(content, allow_pickle=False) as arrays:
                overlay = arrays["rgb"]
            if overlay.shape != shape or overlay.dtype.kind not in "iuf" or not np.isfinite(overlay).all():
                raise ValueError(f"rgb is {overlay.dtype} {overlay.shape}, not numbers of {shape}")
        except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{name} is no overlay of Fishyscapes Static ({error}); download it again") from error
        return overlay.astype(np.int64)


def _pairs(path: str, images: str) -> tuple[_Layout, dict[str, Location], dict[str, Location]]:
    """The layout of a folder, and its masks and images by the name that they share, with the split before it."""
    folder = DataFolder(path, _ARCHIVES)
    lonely: tuple[_Layout, dict[str, Location]] | None = None
    for layout in _LAYOUTS:
        for masks_in in layout.masks:
            masks = _named(folder, masks_in, layout.mask_ending)
            if not masks:
                continue
            if images:
                return layout, masks, _images_of(masks, images)
            pictures = _named(folder, layout.images, layout.image_ending)
            if masks.keys() & pictures.keys():
                return layout, masks, pictures
            lonely = lonely or (layout, masks)
    if lonely is not None:
        return *lonely, _named(folder, lonely[0].images, lonely[0].image_ending)
    return _LAYOUTS[1], {}, {}


def _overlays(path: str, masks: Mapping[str, Location]) -> dict[str, Location]:
    """The overlays of Fishyscapes Static, by the name of the mask whose number they have; none of other data sets."""
    files = DataFolder(path, _ARCHIVES).files("", suffixes=(".npz",))
    by_number = {
        posixpath.basename(name)[:5]: location
        for name, location in files.items()
        if name.endswith(_OVERLAY) and _NUMBER.match(posixpath.basename(name))
    }
    numbers = {name: posixpath.basename(name)[:5] for name in masks}
    return {name: by_number[number] for name, number in numbers.items() if number in by_number}


def _named(folder: DataFolder, inside: str, ending: str) -> dict[str, Location]:
    """Files below a folder whose names have this ending, by what is before it."""
    files = {
        name: location
        for name, location in folder.files(inside, suffixes=IMAGE_SUFFIXES).items()
        if posixpath.splitext(name)[0].endswith(ending)
        # Drawings of masks that are delivered beside them, and images beside folders of masks.
        and (ending or not (name.endswith("_color.png") or ".labels/" in name))
    }
    return {stem.removesuffix(ending): location for stem, location in by_stem(files).items()}


def _images_of(masks: dict[str, Location], images: str) -> dict[str, Location]:
    """Images of another folder by the names of the masks."""
    by_name: dict[str, Location] = {}
    for name, location in DataFolder(images, _ARCHIVES).files("leftImg8bit", "", suffixes=IMAGE_SUFFIXES).items():
        stem = posixpath.splitext(posixpath.basename(name))[0]
        for ending in ("_leftImg8bit", "_rgb", ""):
            if stem.endswith(ending):
                by_name.setdefault(stem.removesuffix(ending), location)
    found = {name: by_name.get(_NUMBER.sub("", posixpath.basename(name)).removesuffix("_labels")) for name in masks}
    return {name: location for name, location in found.items() if location is not None}


def _split_of(name: str) -> str:
    return name.split("/")[0] if "/" in name else FLAT


def _in_split(name: str, split: str) -> str:
    return name if split == "all" else name.removeprefix(f"{split}/")


def _labels(known: Any, anomaly: Any, void: Any) -> dict[int, int]:
    """Label ids by value in masks."""
    labels: dict[int, int] = {}
    for option, values, label in (("known", known, 0), ("anomaly", anomaly, 1), ("void", void, VOID)):
        for value in _values(values, option):
            if labels.setdefault(value, label) != label:
                raise ValueError(f"the value {value} of masks is listed twice, also in {option}={values}; list it once")
    if 0 not in labels.values() or 1 not in labels.values():
        raise ValueError(f"known={known} and anomaly={anomaly}: give at least one value for each")
    return {_VOID_VALUE: VOID} | labels


def _values(text: Any, option: str) -> list[int]:
    """The values in "0,3" or "2-200"."""
    values: list[int] = []
    for part in filter(None, option_names(text)):
        match = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", part)
        if match is None:
            raise ValueError(f"{option}={text}: {part!r} is no value of a mask; give numbers, such as 0,3 or 2-200")
        values += range(int(match[1]), int(match[2] or match[1]) + 1)
    return values


def _ranges(values: list[int]) -> str:
    """Values in words: 0, 2-200."""
    parts: list[list[int]] = []
    for value in sorted(values):
        if parts and value == parts[-1][1] + 1:
            parts[-1][1] = value
        else:
            parts.append([value, value])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)
