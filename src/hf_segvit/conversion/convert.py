"""Convert a checkpoint into a complete model folder, for `hf-segvit convert`.

The conversion, with all its refusals, happens in memory before anything is written. The folder is then written beside
its destination, checked, and renamed. `sources.py` and
`mask2former_vit.py` have the function for each kind of source.
"""

import os
from dataclasses import fields
from pathlib import Path

from ..atomic_files import check_destination, complete_folder, delete_remains, only_writer, write_json
from ..hub.check import check_checkpoint
from ..hub.model_card import make_model_card
from ..models.modeling_plain_vit import PlainViTModel
from .kinds import KINDS, check_kind
from .mask2former_vit import from_mask2former_head, from_vit_adapter
from .options import ConversionOptions
from .sources import (
    Converted,
    from_any_backbone,
    from_official_eomt,
    from_official_vit_p,
    from_timm,
    from_transformers_eomt,
)
from .to_transformers import export_to_transformers

_SOURCES = {
    "timm": from_timm,
    "official-eomt": from_official_eomt,
    "transformers-eomt": from_transformers_eomt,
    "official-vit-p": from_official_vit_p,
    "backbone": from_any_backbone,
    "mask2former-head": from_mask2former_head,
    "vit-adapter": from_vit_adapter,
}
_GENERAL_OPTIONS = ("max_bytes", "check")


def convert(
    kind: str, source: str, destination: str | Path, options: ConversionOptions, overwrite: bool = False
) -> list[str]:
    """Convert a checkpoint, and return lines that report what was done.

    Args:
        kind: one of `KINDS`.
        source: file, folder or Hub id.
        destination: folder to write; it appears complete or not at all.
        options: what the source does not state, and what to change.
        overwrite: replace an existing model folder.

    Raises:
        ValueError: the kind is unknown, the source is bad or does not fit the options, or the destination is taken
            or written by another process.
        DiskFull: there is no room; nothing was written.
        OSError: a file cannot be read or written, or the Hub cannot be reached.
    """
    # What costs nothing to refuse comes before the weights are read.
    check_kind(kind)
    _check_options(kind, options)
    check_destination(destination, overwrite)
    if Path(source).exists() and Path(source).resolve() == Path(destination).resolve():
        raise ValueError(f"{destination} is the source; choose another destination")
    with only_writer(destination, beside=True):
        delete_remains(Path(os.path.realpath(destination)))
        return _convert(kind, source, destination, options, overwrite)


def _convert(kind: str, source: str, destination: str | Path, options: ConversionOptions, overwrite: bool) -> list[str]:
    """`convert`, once nothing else writes the destination."""
    if kind == "to-transformers":
        return export_to_transformers(
            source,
            destination,
            overwrite=overwrite,
            check=options.check,
            revision=options.revision,
            max_bytes=options.max_bytes,
        )
    converted = _SOURCES[kind](source, options)
    with complete_folder(destination, overwrite) as folder:
        write_folder(converted, folder)
    return [*converted.lines, f"wrote {destination}"]


def write_folder(converted: Converted, folder: Path) -> None:
    """Write model, image processor, results and card into an empty folder, and check that it loads."""
    converted.model.save_pretrained(folder)
    converted.processor.save_pretrained(folder)
    if isinstance(converted.model, PlainViTModel):
        return  # a backbone is to start training from, not to publish: no card
    if converted.results:
        write_json(folder / "results.json", converted.results)
    # Read back from disk, so that the folder and not only the model in memory is known to be complete.
    checkpoint = check_checkpoint(folder)
    card = make_model_card(
        checkpoint.config,
        checkpoint.processor,
        num_parameters=checkpoint.num_parameters,
        results=converted.results,
        **converted.card,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def _check_options(kind: str, options: ConversionOptions) -> None:
    """Refuse options that would have no effect for this kind."""
    for option in fields(options):
        if option.name in (*KINDS[kind].options, *_GENERAL_OPTIONS) or not getattr(options, option.name):
            continue
        flag = "--set" if option.name == "fields" else f"--{option.name.replace('_', '-')}"
        raise ValueError(f"{flag} has no effect for {kind}; leave it out")
