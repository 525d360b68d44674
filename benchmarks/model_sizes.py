"""Parameters and multiply-adds of EoMT and its baseline beside the paper's (CVPR 2025, Tables 1 to 6 and D).

    python benchmarks/model_sizes.py [--ade20k ADEChallengeData2016/images/validation]

Only shapes are computed (meta device), so it takes seconds and no memory. The paper's "GFLOPs" are fvcore's
multiply-adds in 10^9 of one image; so are ours, of every matrix product and convolution, attention included. Exits
with 1 if multiply-adds differ by more than 1 % from the paper's, or parameters by more than 0.5 % and, since the paper
cuts or rounds to millions, by more than one million.

One figure is not reproduced: the paper has 700 for Table 1 without the adapter, and its pixel decoder alone explains
why. Counted in full it is 740; without the six layers of deformable attention, which rows 0 and 1 share, it is 702.8.
Both are printed. All other rows with that pixel decoder agree with the paper when its layers are counted.

Semantic models see an image in windows: two of a Cityscapes image. Of ADE20K's, 1.83 on average is inferred from
the paper, whose 721 for an image is 1.83 times the 394 for a window; with the folder of the validation images,
theirs are counted instead.
"""

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from hf_segvit.models.configuration_eomt import EoMTConfig
from hf_segvit.models.configuration_mask2former_vit import Mask2FormerViTConfig
from hf_segvit.models.image_geometry import windowed_content_size, windows_of
from hf_segvit.models.modeling_eomt import EoMTForUniversalSegmentation
from hf_segvit.models.modeling_mask2former_vit import Mask2FormerViTForUniversalSegmentation

TOLERANCE = 0.01
PARAMETER_TOLERANCE = 0.005
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
    """A row of the paper: model and its figures."""

    tables: str
    backbone: str
    image_size: int
    data: str
    num_labels: int
    million_parameters: int
    giga_multiply_adds: int
    # Of EoMT: whether attention is masked, and its L2. Of its baseline: the last part that is removed.
    masked: bool = False
    query_layers: int | None = None
    removed: str | None = None
    # Whether the paper's figure seems to leave out the pixel decoder's deformable attention.
    without_deformable: bool = False

    @property
    def model(self) -> str:
        if self.removed is None:
            return f"EoMT{', masked' if self.masked else ''}{f', L2={self.query_layers}' if self.query_layers else ''}"
        return "baseline" if self.removed == "nothing" else f"w/o {self.removed.replace('_', ' ')}"

    @property
    def semantic(self) -> bool:
        return self.image_size in (512, 1024)

    @property
    def num_queries(self) -> int:
        return 100 if self.semantic else 200

    @property
    def num_query_layers(self) -> int:
        return self.query_layers or QUERY_LAYERS[self.backbone[0]]


ROWS = [
    Row("1, 2, 3, 4", "L", 640, "COCO panoptic", 133, 349, 830, removed="nothing"),
    Row("1", "L", 640, "COCO panoptic", 133, 342, 700, removed="adapter", without_deformable=True),
    Row("1", "L", 640, "COCO panoptic", 133, 337, 685, removed="pixel_decoder"),
    Row("1", "L", 640, "COCO panoptic", 133, 328, 673, removed="multi_scale"),
    Row("2", "L, EVA-02", 640, "COCO panoptic", 133, 349, 829, removed="nothing"),
    Row("2", "L, DeiT-III", 640, "COCO panoptic", 133, 349, 830, removed="nothing"),
    Row("3", "S", 640, "COCO panoptic", 133, 47, 165, removed="nothing"),
    Row("3", "B", 640, "COCO panoptic", 133, 121, 347, removed="nothing"),
    Row("3, 4", "g", 640, "COCO panoptic", 133, 1209, 2510, removed="nothing"),
    Row("4", "L", 1280, "COCO panoptic", 133, 354, 4817, removed="nothing"),
    Row("4", "g", 1280, "COCO panoptic", 133, 1216, 13790, removed="nothing"),
    Row("4", "L", 640, "ADE20K", 150, 349, 830, removed="nothing"),
    Row("4", "L", 1280, "ADE20K", 150, 354, 4817, removed="nothing"),
    Row("4", "g", 640, "ADE20K", 150, 1209, 2510, removed="nothing"),
    Row("4", "g", 1280, "ADE20K", 150, 1216, 13790, removed="nothing"),
    Row("5", "L", 1024, "Cityscapes", 19, 351, 5200, removed="nothing"),
    # Table 5 has the parameters for the larger input only; these are those of Table 1.
    Row("5", "L", 512, "ADE20K", 150, 349, 910, removed="nothing"),
    Row("6", "L", 640, "COCO instance", 80, 349, 830, removed="nothing"),
    Row("6", "L", 1280, "COCO instance", 80, 354, 4817, removed="nothing"),
    Row("D", "L", 640, "COCO panoptic", 133, 316, 660, query_layers=2),
    Row("D", "L", 640, "COCO panoptic", 133, 316, 669, query_layers=4),
    Row("D", "L", 640, "COCO panoptic", 133, 316, 676, query_layers=6),
    Row("D", "L", 640, "COCO panoptic", 133, 316, 688, query_layers=9),
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


@dataclass
class Size:
    """Parameters of a model, and multiply-adds of one pass over one input."""

    parameters: int
    multiply_adds: int
    deformable: int = field(default=0)  # those of the pixel decoder's layers of deformable attention


def count(row: Row) -> Size:
    """The size of a row's model."""
    shared = {
        **BACKBONES[row.backbone],
        "num_queries": row.num_queries,
        "num_labels": row.num_labels,
        "image_size": row.image_size,
        "attn_implementation": "eager",  # attention as two matrix products, which the counter sees on any device
    }
    with torch.device("meta"):
        if row.removed is None:
            masked = [float(row.masked)] * row.num_query_layers
            config = EoMTConfig(**shared, num_query_layers=row.num_query_layers, masked_attention_probabilities=masked)
            model = EoMTForUniversalSegmentation(config).eval()
        else:
            model = Mask2FormerViTForUniversalSegmentation(Mask2FormerViTConfig(**shared, removed=row.removed)).eval()
        pixel_values = torch.empty(1, 3, row.image_size, row.image_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(pixel_values)
    deformable = counter.get_flop_counts().get(f"{type(model).__name__}.mask2former.pixel_decoder.encoder", {})
    return Size(
        sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2, sum(deformable.values()) // 2
    )


def windows_of_images(sizes: list[tuple[int, int]], side: int) -> float:
    """Windows an image needs on average, of images (height, width)."""
    input_size = (side, side)
    return len(windows_of([windowed_content_size(size, input_size) for size in sizes], input_size)) / len(sizes)


def parameters_agree(millions: float, papers: int) -> bool:
    """Whether a number of parameters is the paper's, which has whole millions."""
    return abs(millions - papers) <= max(1.0, PARAMETER_TOLERANCE * papers)


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
        f"{'table':11}{'model':19} {'ViT':12}{'input':>5} {'data':14} {'parameters':>15} {'of a window':>12} "
        f"{'windows':>7} {'of an image':>18} {'ratio':>6}"
    )
    far = 0
    for row in ROWS:
        size = count(row)
        factor = windows[row.data] if row.semantic else 1.0
        millions, giga = size.parameters / 1e6, size.multiply_adds / 1e9
        ratio, remark = giga * factor / row.giga_multiply_adds, ""
        compared = ratio
        if row.without_deformable:
            rest = (size.multiply_adds - size.deformable) / 1e9 * factor
            compared = rest / row.giga_multiply_adds
            remark = f"  {rest:.1f} without deformable attention: {compared:.3f}"
        within = abs(compared - 1) <= TOLERANCE and parameters_agree(millions, row.million_parameters)
        far += not within
        print(
            f"{row.tables:11}{row.model:19} {row.backbone:12}{row.image_size:5} {row.data:14} "
            f"{millions:8.1f} / {row.million_parameters:4} {giga:12.1f} {factor:7.3g} "
            f"{giga * factor:10.1f} / {row.giga_multiply_adds:5} {ratio:6.3f}{remark}{'' if within else '  too far'}"
        )
    print(f"{len(ROWS) - far} of {len(ROWS)} rows within the tolerances")
    return 1 if far else 0


if __name__ == "__main__":
    sys.exit(main())
