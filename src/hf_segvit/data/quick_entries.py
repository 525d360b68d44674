"""The entries of a data set of ours, decoded for training: the same pixels and segments, sooner.

`quick_entries` wraps a data set. A picture comes as a tensor, plain JPEG files decoded by torchvision, which takes four
fifths of Pillow's time for the same pixels (both are libjpeg-turbo with its defaults); whatever needs a second look -
an orientation, CMYK, 16 bits, transparency, damage - is left to Pillow, as everywhere else. With a cache folder, id
maps are decoded once and then read as runs (run_maps.py). H W pixels.
"""

from __future__ import annotations

import os
from io import BytesIO
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from ..models.picture_decoding import MAX_PICTURE_PIXELS
from .decoding import SampleDecoder, orientation, picture_in_frame
from .run_maps import MapCache


class QuickEntries:
    """Entries as `datasets` gives them, but with `image` (3, H, W) uint8 and `segment_map` perhaps a `RunMap`.

    Args:
        dataset: read by `load_segmentation_dataset`.
        decoder: of its rows.
        cache: folder for id maps; `None` keeps none.

    Raises:
        ValueError: the folder cannot be written to.
    """

    def __init__(
        self, dataset: datasets.Dataset, decoder: SampleDecoder, cache: str | os.PathLike[str] | None = None
    ) -> None:
        self.rows = dataset.with_format(None)
        read_masks = decoder.read_masks if cache is None else MapCache(decoder.read_masks, cache)
        self.decoder = SampleDecoder(read_masks, picture_pixels)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.decoder.decode(self.rows[index])

    def with_format(self, kind: None) -> datasets.Dataset:
        """The rows undecoded, as `datasets` names it."""
        return self.rows.with_format(kind)


def quick_entries(dataset: Any, cache: str | os.PathLike[str] | None = None) -> Any:
    """A data set whose entries are decoded quickly, where it is one of our readers'; any other stays as it is.

    Args:
        dataset: of entries.
        cache: folder for id maps, see `MapCache`; without effect where a data set has none.

    Raises:
        ValueError: the folder cannot be written to.
    """
    if not isinstance(dataset, datasets.Dataset):
        return dataset
    decoder = dataset.format["format_kwargs"].get("transform")
    columns = {"image", "segment_map", "segments"}
    if type(decoder) is not SampleDecoder or not columns <= set(dataset.column_names):
        return dataset
    return QuickEntries(dataset, decoder, cache)


def picture_pixels(content: bytes, name: str, size: tuple[int, int] | None = None) -> Tensor:
    """The pixels of `picture_in_frame`, (3, H, W) uint8 with the channels of a pixel side by side in memory."""
    pixels = _plain_jpeg(content, size)
    if pixels is None:
        pixels = torch.from_numpy(np.array(picture_in_frame(content, name, size))).permute(2, 0, 1)
    return pixels


def _plain_jpeg(content: bytes, size: tuple[int, int] | None) -> Tensor | None:
    """The pixels of a JPEG file without peculiarities; `None`: Pillow shall decode it, or say what is wrong."""
    try:
        with Image.open(BytesIO(content), formats=("JPEG",)) as image:
            found = (image.height, image.width)
            is_upright = not {"exif", "xmp"} & image.info.keys() or orientation(image) == 1
            is_plain = image.format == "JPEG" and image.mode in ("RGB", "L") and is_upright
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        return None
    if not is_plain or found != (size or found) or found[0] * found[1] > MAX_PICTURE_PIXELS:
        return None
    try:
        return decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), mode=ImageReadMode.RGB)
    except RuntimeError:
        return None
