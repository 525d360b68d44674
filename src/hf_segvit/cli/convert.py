"""`hf-segvit convert KIND SRC DST`: convert weights of other formats, in and out."""

import argparse
from pathlib import Path

from ..conversion.kinds import KINDS, check_kind
from ..data.label_tables import LABEL_TABLES
from ..models.published_labels import TASKS
from .model_options import model_folder

_EPILOG = """kinds:
{kinds}

examples:
  hf-segvit convert official-eomt tue-mps/coco_panoptic_eomt_large_640 eomt-large
  hf-segvit convert official-eomt last.ckpt my-eomt --task semantic --labels labels.txt
  hf-segvit convert official-eomt tue-mps/coco_panoptic_eomt_large_640_dinov3 eomt-large-dinov3 \\
      --base facebook/dinov3-vitl16-pretrain-lvd1689m
  hf-segvit convert timm timm/vit_base_patch14_reg4_dinov2.lvd142m backbone --set image_size=640 patch_size=16
  hf-segvit convert mask2former-head facebook/mask2former-swin-large-coco-panoptic ladder-0 \\
      --base timm/vit_large_patch14_reg4_dinov2.lvd142m --set image_size=640
  hf-segvit convert to-transformers eomt-large for-transformers
  hf-segvit convert official-vit-p model_ADE20k_798_250point.pth vit-p-large-ade20k
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "convert",
        help="convert weights of other formats, and into Transformers' own",
        description=(
            "Convert a checkpoint into a complete folder: weights, config, image processor, labels and model card. "
            "Nothing is dropped or invented silently, and the folder appears complete or not at all."
        ),
        epilog=_EPILOG.format(kinds="\n".join(f"  {name:<18} {kind.description}" for name, kind in KINDS.items())),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("kind", metavar="KIND", help=f"{', '.join(KINDS)}; see below")
    parser.add_argument("source", metavar="SRC", help="file, folder, Hub id or timm/NAME")
    parser.add_argument("destination", metavar="DST", help="folder to write")
    parser.add_argument(
        "--set",
        dest="fields",
        metavar="FIELD=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="what the weights do not show or what to change: num_attention_heads=4, image_size=512,1024, num_labels=5",
    )
    parser.add_argument("--base", metavar="FOLDER_OR_ID", help="backbone: that a delta file is added to, or of a head")
    parser.add_argument("--model", metavar="NAME", help="released model, or timm model, in the file")
    parser.add_argument("--labels", metavar="NAME_OR_FILE", help=f"{', '.join(LABEL_TABLES)}, or a .json or .txt file")
    parser.add_argument("--task", choices=TASKS, help="task of the model")
    parser.add_argument("--reset-class-head", action="store_true", help="replace the class head, for other labels")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a Hub repository")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing model folder at DST")
    parser.add_argument("--no-check", action="store_true", help="skip the forward pass that compares with a reference")
    parser.add_argument("--max-gib", type=float, default=64.0, metavar="N", help="largest checkpoint (default 64)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Convert `args.source`, and print what was done."""
    check_kind(args.kind)
    if not args.max_gib > 0:  # also refuses NaN
        raise ValueError(f"--max-gib {args.max_gib} must be above 0")
    # Refused before libraries are imported, unless it may be the id owner/name or a timm name.
    if args.kind != "timm" and args.source.count("/") != 1 and not Path(args.source).exists():
        raise ValueError(
            f"{args.source} is neither a file nor a folder here, nor the id owner/name of a Hub repository"
        )

    args.source = model_folder(args.source)

    import dataclasses

    from transformers import PreTrainedConfig
    from transformers.utils import logging

    from ..conversion.checkpoint_files import GIB
    from ..conversion.convert import convert
    from ..conversion.options import ConversionOptions, parse_fields
    from ..models.configuration_eomt import EoMTConfig
    from ..models.configuration_mask2former_vit import Mask2FormerViTConfig

    # The fields of every Transformers config, such as `return_dict`, are not the model's.
    general = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    fields = (*dataclasses.fields(EoMTConfig), *dataclasses.fields(Mask2FormerViTConfig))
    known = list(dict.fromkeys(field.name for field in fields if field.name not in general))
    options = ConversionOptions(
        fields=parse_fields(args.fields, known),
        base=args.base,
        model=args.model,
        labels=args.labels,
        task=args.task,
        reset_class_head=args.reset_class_head,
        revision=args.revision,
        max_bytes=int(args.max_gib * GIB),
        check=not args.no_check,
    )
    logging.disable_progress_bar()  # of loading weights; the lines below are the report
    for line in convert(args.kind, args.source, args.destination, options, args.overwrite):
        print(line)
    return 0
