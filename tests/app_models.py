"""Tiny models for the tests of `hf-segvit app`, saved as folders, and files that are no images or claim too much."""

import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

from hf_segvit.models.image_processing_vit_p import ViTPImageProcessor

from .test_export import processor_of, unmasked
from .tiny_generators import LABELS, noise_images, tiny_classifier


@dataclass(frozen=True)
class Folders:
    model: Path
    other: Path  # a second model
    classifier: Path
    broken: Path  # a model without weights
    image: Path


def save_models(folder: Path) -> Folders:
    """Two EoMTs and a ViT-P of the same classes, a broken model, and an image of 80 x 50 pixels."""
    folders = Folders(*(folder / name for name in ("one", "two", "vit-p", "broken", "image.png")))
    for path, layers in ((folders.model, 1), (folders.other, 2)):
        unmasked(num_hidden_layers=2 + layers, num_query_layers=1, id2label=LABELS).save_pretrained(path)
        processor_of().save_pretrained(path)
    tiny_classifier().save_pretrained(folders.classifier)
    ViTPImageProcessor(size=56, id2label=LABELS).save_pretrained(folders.classifier)
    unmasked(id2label=LABELS).save_pretrained(folders.broken)
    processor_of().save_pretrained(folders.broken)
    (folders.broken / "model.safetensors").write_bytes(b"no weights")
    noise_images([(80, 50)])[0].save(folders.image)
    return folders


def bomb(side: int) -> bytes:
    """A small PNG of side x side black pixels of one bit."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((side // 8 + 1) * side), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
