"""What every evaluation of `hf-segvit evaluate` begins and ends with.

`prepare` gives data set, device and settings, `load_segmenter` the model; `write_result` prints and writes a result,
and `finish` deletes the counts that an interrupted run would have resumed from.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..lookup import import_object, suggestion
from .model_options import errors_name_options, name_of_dtype, runtime_options, views_of

if TYPE_CHECKING:
    from ..inference.segmenter import Segmenter

# An evaluation resumes from saved counts only if all of these are the same.
ABOUT = (
    *("model", "revision", "data", "split", "task", "threshold", "absent_classes", "limit"),
    *("dtype", "classifier", "alpha", "label_mismatch", "tta_scales", "tta_flip", "classes", "max_detections"),
    *("runtime", "token_merging", "quantization"),
)


def load_segmenter(args: argparse.Namespace, device: Any, **settings: Any) -> "Segmenter":
    """The model that the options name."""
    from ..inference.segmenter import Segmenter

    with errors_name_options():
        return Segmenter.from_pretrained(
            args.model,
            device=device,
            dtype=args.dtype,
            quantization=args.quantization,
            revision=args.revision,
            views=views_of(args),
            classifier=args.classifier,
            alpha=args.alpha,
            label_mismatch=args.label_mismatch,
            token_merging=args.token_merging,
            **settings,
            **runtime_options(args),
        )


def class_ids(text: str, id2label: Mapping[int, str]) -> list[int]:
    """Label ids of class names separated by commas; a name may contain commas itself, and case does not matter."""
    from ..models.label_spaces import whole_name

    by_name = {whole_name(name): label for label, name in id2label.items()}
    parts = text.split(",")
    labels: list[int] = []
    while parts:
        # The longest name first: "person, individual" is one class of ADE20K.
        for count in range(len(parts), 0, -1):
            label = by_name.get(whole_name(",".join(parts[:count])))
            if label is not None:
                labels.append(label)
                del parts[:count]
                break
        else:
            name = parts[0].strip()
            raise ValueError(f"--classes: the data set has no class {name!r}; {suggestion(name, id2label.values())}")
    return sorted(set(labels))


def prepare(args: argparse.Namespace, task: str, about: tuple[str, ...]) -> tuple[Any, Any, dict[str, Any]]:
    """The data set, the device, and the settings that all evaluations share."""
    from accelerate import PartialState

    from ..atomic_files import prepare_output_folder
    from ..data.reading import load_segmentation_dataset, validation_split
    from ..inference.devices import pick_device
    from ..inference.loading import is_exported
    from ..metrics.accumulation import METRIC_METHODS

    # First, as a result that cannot be written is worth nothing.
    for folder in (args.output, args.json.parent if args.json is not None else None):
        if folder is not None:
            prepare_output_folder(folder)
    metrics = [import_object(path, "--metrics", METRIC_METHODS) for path in args.metrics]
    args.split = args.split or validation_split(args.data, "name one with --split")
    dataset = load_segmentation_dataset(args.data, split=args.split, task=task)
    if args.limit is not None:
        dataset = dataset.select(range(min(args.limit, len(dataset))))
    state = PartialState()
    device: Any
    if is_exported(args.model, args.revision):
        device = args.device  # of its runtime
    else:
        # Under accelerate, each process has its own GPU.
        device = state.device if state.num_processes > 1 and args.device is None else pick_device(args.device)
        args.dtype = name_of_dtype(args.dtype, device)  # what `auto` chose, as scores may depend on it
    settings = {
        "metrics": metrics,
        "batch_size": args.batch_size,
        # On the CPU, processes that read would compete with the model for cores.
        "num_workers": args.workers if args.workers is not None else 4 if "cuda" in str(device) else 0,
        "partial_folder": args.output / "partial" if args.output is not None else None,
        "about": {name: getattr(args, name) for name in about},
        "progress": True,
    }
    return dataset, device, settings


def identity(args: argparse.Namespace, dataset: Any, models: Mapping[str, Any]) -> dict[str, str]:
    """What counts to resume from must agree with, besides the options."""
    from ..evaluation.identity import data_identity, model_identity, program_identity

    if args.output is None:  # nothing is kept, so nothing is resumed
        return {}
    facts = program_identity() | data_identity(dataset)
    for name, model in models.items():
        if model is not None:
            facts |= model_identity(model.model, model.processor, name)
    return facts


def write_result(args: argparse.Namespace, result: Any, settings: Mapping[str, Any]) -> bool:
    """Print and write a result or sweep; whether this is the main process, which alone does so."""
    from accelerate import PartialState

    from ..evaluation.alpha_sweep import AlphaSweep, sweep_content, sweep_text
    from ..evaluation.report import result_content, result_text

    if not PartialState().is_main_process:
        return False
    is_sweep = isinstance(result, AlphaSweep)
    calibration = None if is_sweep else result.calibration
    text, content = (sweep_text, sweep_content) if is_sweep else (result_text, result_content)
    print(text(result, args.rows))
    report = {**settings["about"], **content(result)}
    write_report(args, text(result, sys.maxsize), report)
    if calibration is not None:
        from ..evaluation.calibration import plot_reliability, save_temperature

        if args.output is not None:
            title = f"{Path(args.model).name}: {args.data}"
            plot_reliability(args.output / "reliability.png", calibration, title)
        if args.save_temperature is not None:
            message = f"no temperature is saved: {calibration.undefined}"
            if calibration.temperature is not None:
                path = save_temperature(args.save_temperature or args.model, calibration.temperature)
                message = f"temperature {calibration.temperature:g} saved in {path}"
            print(f"hf-segvit evaluate: {message}", file=sys.stderr)
    return True


def write_report(args: argparse.Namespace, text: str, report: Mapping[str, Any]) -> None:
    """Write a result where the options want it."""
    from ..atomic_files import write_json, writing

    if args.json is not None:
        write_json(args.json, report)
    if args.output is not None:
        with writing(args.output / "results.txt") as partial:
            partial.write_text(text + "\n", encoding="utf-8")
        write_json(args.output / "results.json", report)


def finish(settings: Mapping[str, Any]) -> int:
    """Delete the counts, now that everything is written."""
    from accelerate import PartialState

    from ..evaluation.counts import delete_partial_results

    if PartialState().is_main_process and settings["partial_folder"] is not None:
        delete_partial_results(settings["partial_folder"])
    return 0
