"""Files of the BRAVO challenge: names, submissions, lists of sampled pixels.

A submission is a tree like the data set's with NAME_pred.png (8 bits, train ids) and NAME_conf.png (16 bits) for each
image, and, encoded for the server, one tar file of NAME_encoded.bin: a header, the class map and the confidences at the
sampled pixels, compressed, and a checksum. `write_prediction` and `encoded_submission` make them, `decode_submission`
reads them back. H W pixels.
"""

from __future__ import annotations

import io
import posixpath
import struct
import tarfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from PIL import Image

from ..atomic_files import replacing
from ..metrics.bravo import NUM_CLASSES, confidence_levels, quantized_confidence, sampled_pixels
from .archives import Location
from .folders import IMAGE_SUFFIXES, DataFolder
from .mask_files import read_index_map

_HEADER = struct.Struct("<4sIIIIII")  # magic, version, rows, columns, confidences, bytes of classes, of confidences
_MAGIC, _VERSION, _LEVEL = b"BV23", 2, 9
_CHECKSUM = struct.Struct("<I")
_MOST_BYTES = 2**30  # of a decompressed file


@dataclass(frozen=True)
class BravoNames:
    """Names of the files of one part of the data set, behind the name that they share."""

    image: str  # without the ending of its format
    labels: str
    invalid: str


# By folder; ACDC has a folder for each of its conditions.
BRAVO_FOLDERS = {
    "bravo_ACDC": BravoNames("_rgb_anon", "_gt_labelTrainIds.png", "_gt_invIds.png"),
    "bravo_SMIYC": BravoNames("", "_labels_semantic_fake.png", "_labels_semantic.png"),
    "bravo_outofcontext": BravoNames("_leftImg8bit", "_gt_labelTrainIds.png", "_gt_invIds.png"),
    "bravo_synflare": BravoNames("_leftImg8bit", "_gt_labelTrainIds.png", "_gt_invIds.png"),
    "bravo_synobjs": BravoNames("", "_gt.png", "_mask.png"),
    "bravo_synrain": BravoNames("_leftImg8bit", "_gt_labelTrainIds.png", "_gt_invIds.png"),
}
_CONDITIONS = ("fog", "rain", "night", "snow")
PREDICTION, CONFIDENCE, ENCODED, SAMPLES = "_pred.png", "_conf.png", "_encoded.bin", "_samples.bin"


@dataclass(frozen=True)
class BravoImage:
    """An image and its files, by its name in the challenge, such as bravo_synobjs/armchair/1."""

    name: str
    subset: str  # one of `metrics.bravo.SUBSETS`
    image: Location
    labels: Location | None
    invalid: Location | None

    @property
    def prediction_name(self) -> str:
        """What the names of the files of a prediction begin with, as they begin with the name of the image."""
        return self.name + BRAVO_FOLDERS[self.name.split("/")[0]].image


def bravo_images(path: str) -> list[BravoImage]:
    """All images of the data set in a folder, by name."""
    folder, found = DataFolder(path), []
    for top, names in BRAVO_FOLDERS.items():
        files = folder.files(top)
        others = (names.labels, names.invalid, PREDICTION, CONFIDENCE, "_color.png")
        for name, location in files.items():
            stem, suffix = posixpath.splitext(name)
            if suffix.lower() not in IMAGE_SUFFIXES or name.endswith(others) or not stem.endswith(names.image):
                continue
            base = stem.removesuffix(names.image)
            found.append(
                BravoImage(
                    name=f"{top}/{base}",
                    subset=_subset(top, base),
                    image=location,
                    labels=files.get(base + names.labels),
                    invalid=files.get(base + names.invalid),
                )
            )
    return found


def _subset(folder: str, name: str) -> str:
    subset = folder.removeprefix("bravo_")
    if subset != "ACDC":
        return subset
    return subset + next((part for part in name.split("/") if part in _CONDITIONS), "")


def write_prediction(folder: Path, image: BravoImage, classes: Any, confidence: Any) -> tuple[Path, Path]:
    """Write the two PNGs of an image, and return their paths.

    Args:
        classes: (H, W) train ids 0..18.
        confidence: (H, W) in [0, 1]; larger values are clipped, as they would wrap around.

    Raises:
        ValueError: the classes are others, the confidence is NaN, or a file cannot be written.
    """
    class_map = _checked_classes(np.asarray(classes), image.name)
    try:
        levels = quantized_confidence(confidence)
    except ValueError as error:
        raise ValueError(f"{image.name}: {error}") from error
    if levels.shape != class_map.shape:
        raise ValueError(f"{image.name}: the confidence is {levels.shape}, but the class map {class_map.shape}")
    paths = folder / (image.prediction_name + PREDICTION), folder / (image.prediction_name + CONFIDENCE)
    for path, values in zip(paths, (class_map, levels), strict=True):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as partial:
                Image.fromarray(values).save(partial, "PNG")
        except OSError as error:
            raise ValueError(f"cannot write {path}: {error.strerror or error}; check its folder and disk") from error
    return paths


def read_prediction(folder: Path, image: BravoImage) -> tuple[np.ndarray, np.ndarray]:
    """(H, W) uint8 classes and uint16 levels from the PNGs of an image, checked."""
    classes, levels = (
        read_index_map({"archive": None, "member": str(folder / (image.prediction_name + ending))})
        for ending in (PREDICTION, CONFIDENCE)
    )
    class_map = _checked_classes(classes, image.name)
    every = np.arange(class_map.size)
    return class_map, confidence_levels(levels, class_map.shape, every, image.name).reshape(classes.shape).astype("u2")


def encode_submission(classes: Any, levels: Any, samples: Any) -> bytes:
    """One image's prediction as the server takes it.

    Args:
        classes: (H, W) train ids.
        levels: (H, W) whole levels of confidence, 0..65535.
        samples: ascending indices of the pixels whose confidence counts.
    """
    class_map = _checked_classes(np.asarray(classes), "the image")
    indices = np.asarray(samples)
    chosen = confidence_levels(levels, class_map.shape, indices, "the image").astype("<u2").tobytes()
    content = class_map.tobytes()
    header = _HEADER.pack(_MAGIC, _VERSION, *class_map.shape, len(indices), len(content), len(chosen))
    body = header + _compressed(content + chosen)
    return body + _CHECKSUM.pack(zlib.crc32(body))


def decode_submission(encoded: bytes, name: str = "the submission") -> tuple[np.ndarray, np.ndarray]:
    """(H, W) uint8 classes and (n,) uint16 levels at the sampled pixels.

    Raises:
        ValueError: the file is damaged, or of another format or version.
    """
    if len(encoded) < _HEADER.size + _CHECKSUM.size:
        raise ValueError(f"{name}: {len(encoded)} bytes are no encoded prediction of BRAVO; encode it again")
    magic, version, rows, columns, count, num_classes, num_levels = _HEADER.unpack_from(encoded)
    if magic != _MAGIC or version != _VERSION:
        raise ValueError(
            f"{name}: begins with {magic!r}, version {version}, not {_MAGIC!r}, {_VERSION}; encode it again"
        )
    if zlib.crc32(encoded[: -_CHECKSUM.size]) != _CHECKSUM.unpack(encoded[-_CHECKSUM.size :])[0]:
        raise ValueError(f"{name}: the checksum is wrong, so that the file is damaged; encode it again")
    if num_classes != rows * columns or num_levels != 2 * count:
        raise ValueError(f"{name}: the header's sizes contradict each other; encode it again")
    content = _decompressed(encoded[_HEADER.size : -_CHECKSUM.size], name, num_classes + num_levels)
    classes = np.frombuffer(content, np.uint8, num_classes).reshape(rows, columns)
    return classes, np.frombuffer(content, "<u2", count, offset=num_classes).astype(np.uint16)


def encode_samples(indices: Any) -> bytes:
    """A list of sampled pixels as the challenge stores it: number and first index (3 bytes each), then differences."""
    values = np.asarray(indices, dtype=np.int64)
    if not len(values) or values[0] < 0 or values[-1] >= 2**24 or (np.diff(values) <= 0).any():
        raise ValueError("sampled pixels must be at least one, and ascend within 0..16777215")
    parts = bytearray(len(values).to_bytes(3, "little") + int(values[0]).to_bytes(3, "little"))
    for step in np.diff(values).tolist():
        # A step of more than a byte follows a zero, which no step can be.
        parts += step.to_bytes(1, "little") if step <= 255 else b"\0" + step.to_bytes(3, "little")
    return _compressed(bytes(parts))


def decode_samples(encoded: bytes, name: str = "the list") -> np.ndarray:
    """(n,) int64 ascending indices of a list of sampled pixels."""
    content = _decompressed(encoded, name)
    if len(content) < 6:
        raise ValueError(f"{name}: no list of sampled pixels of BRAVO; get the official file")
    steps, position = [int.from_bytes(content[3:6], "little")], 6
    while position < len(content):
        long = content[position] == 0
        steps.append(int.from_bytes(content[position + 1 : position + 4], "little") if long else content[position])
        position += 4 if long else 1
    if len(steps) != int.from_bytes(content[:3], "little") or position != len(content):
        raise ValueError(f"{name}: {len(steps)} sampled pixels, but the list announces another number; it is damaged")
    return np.cumsum(steps)


def read_samples(tar_path: Path) -> dict[str, np.ndarray]:
    """The lists of sampled pixels of bravo_SAMPLING.tar, by the name of the image."""
    return {
        name.removesuffix(SAMPLES): decode_samples(content, f"{tar_path}: {name}")
        for name, content in _tar_files(tar_path).items()
        if name.endswith(SAMPLES)
    }


def encoded_submission(
    folder: Path, images: list[BravoImage], tar_path: Path, samples: Mapping[str, np.ndarray]
) -> Path:
    """Write the tar file that the server takes from the PNGs of all images.

    Args:
        folder: with the PNGs of `write_prediction`.
        samples: of `read_samples`; images that it lacks are drawn from their labels, if those are there.

    Raises:
        ValueError: a PNG is missing or wrong, or an image has neither list nor labels.
    """
    try:
        tar_path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(tar_path) as partial, tarfile.open(partial, "w") as tar:
            for image in images:
                indices = samples.get(image.name)
                if indices is None and image.labels is not None:
                    indices = sampled_pixels(read_index_map(image.labels))
                if indices is None:
                    raise ValueError(f"{image.name}: the lists of sampled pixels lack it; give the challenge's lists")
                content = encode_submission(*read_prediction(folder, image), indices)
                member = tarfile.TarInfo(image.name + ENCODED)  # of time 0: equal predictions make equal files
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    except OSError as error:
        raise ValueError(f"cannot write {tar_path}: {error.strerror or error}; check its folder and disk") from error
    return tar_path


def read_submission(tar_path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Classes and levels, as of `decode_submission`, by the name of the image."""
    return {
        name.removesuffix(ENCODED): decode_submission(content, f"{tar_path}: {name}")
        for name, content in _tar_files(tar_path).items()
        if name.endswith(ENCODED)
    }


def read_ground_truth(image: BravoImage) -> dict[str, np.ndarray]:
    """`labels` and `invalid` of an image, as the metric `BravoSubset` takes them."""
    if image.labels is None or image.invalid is None:
        raise ValueError(f"{image.name}: there is no ground truth; most of it is on the challenge's server only")
    return {"labels": read_index_map(image.labels), "invalid": read_index_map(image.invalid)}


def _tar_files(path: Path) -> dict[str, bytes]:
    """The plain files of a tar archive, read in memory: nothing is unpacked."""
    try:
        with tarfile.open(path, "r") as tar:
            members = [member for member in tar if member.isfile() and member.size <= _MOST_BYTES]
            return {member.name: file.read() for member in members if (file := tar.extractfile(member))}
    except (OSError, tarfile.TarError) as error:
        raise ValueError(f"{path}: cannot be read as a tar archive ({error}); check the path") from error


def _checked_classes(classes: np.ndarray, name: str) -> np.ndarray:
    if classes.ndim != 2 or classes.dtype.kind not in "iu":
        raise ValueError(f"{name}: the class map must be (height, width) of whole numbers, but is {classes.shape}")
    if unknown := np.unique(classes[(classes < 0) | (classes >= NUM_CLASSES)])[:5].tolist():
        raise ValueError(f"{name}: the class map holds {unknown}; it must hold train ids 0..{NUM_CLASSES - 1}")
    return classes.astype(np.uint8)


def _compressed(content: bytes) -> bytes:
    return bytes(pyarrow.Codec("zstd", compression_level=_LEVEL).compress(content, asbytes=True))


def _decompressed(content: bytes, name: str, size: int | None = None) -> bytes:
    """What zstd compressed; at most `size` bytes, or a gigabyte."""
    limit = _MOST_BYTES if size is None else size + 1
    try:
        with pyarrow.CompressedInputStream(pyarrow.BufferReader(content), "zstd") as stream:
            found = bytes(stream.read(min(limit, _MOST_BYTES)))
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{name}: cannot be decompressed ({error}); the file is damaged") from error
    if size is not None and len(found) != size:
        raise ValueError(f"{name}: holds other numbers of pixels than its header says; encode it again")
    return found
