"""Parameters and multiply-adds of EoMT compared with the paper (Kerssies et al., CVPR 2025, Tables 1 to 6).

    python benchmarks/model_sizes.py [--ade20k ADEChallengeData2016/images/validation]

Only shapes are computed (meta device), so it takes seconds and no memory. The paper's "GFLOPs" are fvcore's
multiply-adds in 10^9 of one image; so are ours, of every matrix product and convolution, attention included. Exits
with 1 if a figure differs by more than 1 % from the paper's.

Semantic models see an image in windows: two of a Cityscapes image. Of ADE20K's, 1.83 on average is inferred from
the paper, whose 721 for an image is 1.83 times the 394 for a window; with the folder of the validation images,
theirs are counted instead.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from hf_segvit.models.configuration_eomt import EoMTConfig
from hf_segvit.models.image_geometry import windowed_content_size, windows_of
from hf_segvit.models.modeling_eomt import EoMTForUniversalSegmentation

TOLERANCE = 0.01
BACKBONES = {
    "S": {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536},
    "B": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "L": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    "g": {
        "hidden_size": 1536,
        "num_hidden_layers": 40,
        "num_attention_heads": 24,
        "intermediate_size": 4096,
        "mlp_type": "swiglu",
    },
    # EVA-02 L: gated MLP of two thirds the width with a norm inside, both kinds of positions, no LayerScale.
    "L, EVA-02": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 2730,
        "mlp_type": "swiglu",
        "mlp_norm": True,
        "position_embedding_type": "learned_rope",
        "rope_reference_grid": 16,
        "key_bias": False,
        "num_register_tokens": 0,
        "layer_scale_init_value": None,
    },
}
BACKBONES["L, DeiT-III"] = {**BACKBONES["L"], "num_register_tokens": 0}
QUERY_LAYERS = {"S": 3, "B": 3, "L": 4, "g": 5}
ADE20K_WINDOWS = 1.83


@dataclass(frozen=True)
class Row:
    """A row of the paper: model, masking, and its figures."""

    tables: str
    backbone: str
    image_size: int
    data: str
    num_labels: int
    million_parameters: int
    giga_multiply_adds: int
    masked: bool = False

    @property
    def semantic(self) -> bool:
        return self.image_size in (512, 1024)

    @property
    def num_queries(self) -> int:
        return 100 if self.semantic else 200

    @property
    def num_query_layers(self) -> int:
        return QUERY_LAYERS[self.backbone[0]]


ROWS = [
    Row("1, 3, 4", "L", 640, "COCO panoptic", 133, 316, 669),
    Row("1, 3", "L", 640, "COCO panoptic", 133, 316, 828, masked=True),
    Row("2", "L, EVA-02", 640, "COCO panoptic", 133, 316, 667),
    Row("2", "L, EVA-02", 640, "COCO panoptic", 133, 316, 826, masked=True),
    Row("2", "L, DeiT-III", 640, "COCO panoptic", 133, 316, 669),
    Row("2", "L, DeiT-III", 640, "COCO panoptic", 133, 316, 828, masked=True),
    Row("3", "S", 640, "COCO panoptic", 133, 24, 68),
    Row("3", "S", 640, "COCO panoptic", 133, 24, 89, masked=True),
    Row("3", "B", 640, "COCO panoptic", 133, 93, 216),
    Row("3", "B", 640, "COCO panoptic", 133, 93, 286, masked=True),
    Row("3, 4", "g", 640, "COCO panoptic", 133, 1164, 2261),
    Row("3", "g", 640, "COCO panoptic", 133, 1164, 2689, masked=True),
    Row("4", "L", 1280, "COCO panoptic", 133, 322, 4146),
    Row("4", "g", 1280, "COCO panoptic", 133, 1171, 12712),
    Row("4", "L", 640, "ADE20K", 150, 316, 669),
    Row("4", "L", 1280, "ADE20K", 150, 322, 4146),
    Row("4", "g", 640, "ADE20K", 150, 1164, 2261),
    Row("4", "g", 1280, "ADE20K", 150, 1171, 12712),
    Row("5", "L", 1024, "Cityscapes", 19, 319, 4350),
    Row("5", "L", 512, "ADE20K", 150, 316, 721),
    Row("6", "L", 640, "COCO instance", 80, 316, 669),
    Row("6", "L", 1280, "COCO instance", 80, 322, 4146),
]


def count(row: Row) -> tuple[int, int]:
    """Parameters, and multiply-adds of one pass over one input."""
    config = EoMTConfig(
        **BACKBONES[row.backbone],
        num_query_layers=row.num_query_layers,
        num_queries=row.num_queries,
        num_labels=row.num_labels,
        image_size=row.image_size,
        masked_attention_probabilities=[float(row.masked)] * row.num_query_layers,
        attn_implementation="eager",  # attention as two matrix products, which the counter sees on any device
    )
    with torch.device("meta"):
        model = EoMTForUniversalSegmentation(config).eval()
        pixel_values = torch.empty(1, 3, row.image_size, row.image_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(pixel_values)
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2


def windows_of_images(sizes: list[tuple[int, int]], side: int) -> float:
    """Windows an image needs on average, of images (height, width)."""
    input_size = (side, side)
    return len(windows_of([windowed_content_size(size, input_size) for size in sizes], input_size)) / len(sizes)


def ade20k_windows(folder: str | None) -> float:
    if folder is None:
        return ADE20K_WINDOWS
    sizes = []
    for path in sorted(Path(folder).glob("*.jpg")):
        with Image.open(path) as image:
            sizes.append((image.height, image.width))
    if not sizes:
        raise SystemExit(f"{folder} holds no .jpg images")
    return windows_of_images(sizes, 512)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ade20k", metavar="FOLDER", help="ADE20K's validation images, to count their windows")
    windows = {
        "Cityscapes": windows_of_images([(1024, 2048)], 1024),
        "ADE20K": ade20k_windows(parser.parse_args(argv).ade20k),
    }
    print("Parameters in 10^6, multiply-adds in 10^9: ours / the paper's")
    print(
        f"{'table':8} {'ViT':12}{'input':>5} {'data':14} {'masked':6} {'parameters':>15} {'of a window':>12} "
        f"{'windows':>7} {'of an image':>18} {'ratio':>6}"
    )
    far = 0
    for row in ROWS:
        parameters, multiply_adds = count(row)
        factor = windows[row.data] if row.semantic else 1.0
        millions, giga = parameters / 1e6, multiply_adds / 1e9
        ratio = giga * factor / row.giga_multiply_adds
        within = max(abs(ratio - 1), abs(millions / row.million_parameters - 1)) <= TOLERANCE
        far += not within
        print(
            f"{row.tables:8} {row.backbone:12}{row.image_size:5} {row.data:14} {'yes' if row.masked else 'no':6} "
            f"{millions:8.1f} / {row.million_parameters:4} {giga:12.1f} {factor:7.3g} "
            f"{giga * factor:10.1f} / {row.giga_multiply_adds:5} {ratio:6.3f}{'' if within else '  further than 1 %'}"
        )
    print(f"{len(ROWS) - far} of {len(ROWS)} rows within 1 % on both")
    return 1 if far else 0


if __name__ == "__main__":
    sys.exit(main())
