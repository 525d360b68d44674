"""Export a model to a folder for another runtime, for `hf-segvit export`.

The folder holds the graphs, `export.json`, configuration, labels, image processor and card, and is used like any other
model's. It appears once each graph has given PyTorch's answers in its own runtime, or not at all.
"""

import copy
import json
import os
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..atomic_files import check_destination, complete_folder, write_json
from ..hub.export_record import MARK, RECORD_FILE, ExportRecord, GraphRecord
from ..hub.model_card import REPOSITORY_PLACEHOLDER, make_model_card, rows
from ..inference.loading import checkpoint_type, load_point_classifier, load_universal_model, out_of_file
from ..inference.runtimes import RuntimeSettings, open_graph
from ..models.configuration_vit_p import ViTPConfig
from ..models.modeling_eomt import EoMTForUniversalSegmentation
from ..models.modeling_vit_p_fusion import ViTPFusionForUniversalSegmentation
from ..models.transformers_eomt import TRANSFORMERS_EOMT_TYPES
from .formats import FORMATS, check_format, check_packages, check_quantization
from .graphs import EoMTGraph, Graph, Sizes, graphs_of
from .quantization import quantize_graph, read_calibration
from .writers import WRITERS

_OPSETS = range(18, 24)  # what torch.onnx writes
_LIBRARIES = ("torch", "onnx", "onnxscript", "onnxruntime", "openvino", "nncf", "executorch", "hf-segvit")
_COPIED = ("results.json", "LICENSE", "LICENSE.txt")


def export_model(
    model: Any,
    destination: str | os.PathLike[str],
    file_format: str = "onnx",
    processor: Any = None,
    *,
    size: tuple[int, int] | None = None,
    max_size: tuple[int, int] | None = None,
    batch: int | None = None,
    semantic_map: bool = False,
    opset: int | None = None,
    quantize: str | None = None,
    calibration: str | None = None,
    calibration_images: int = 64,
    overwrite: bool = False,
    revision: str | None = None,
    progress: Callable[[str], Any] | None = None,
) -> ExportRecord:
    """Export an EoMT, a ViT-P or a fused model.

    Args:
        model: a folder or Hub id, or a model in memory, which comes with its `processor`.
        destination: the folder, which appears complete or not at all.
        file_format: one of `FORMATS`.
        processor: image processor of a model in memory.
        size: the only (height, width) that the export shall take; `None`: any multiples of the patch size.
        max_size: the largest (height, width), for ExecuTorch, which reserves memory for it; `None`: the model's own
            longer side for both.
        batch: the only number of images of a call; `None`: any, for ExecuTorch 1.
        semantic_map: add an output with the class of every input pixel, uint8.
        opset: version of ONNX's operators, lower for older runtimes; `None`: PyTorch's default.
        quantize: `int8`, for an EoMT in onnx or openvino, of a fused model the generator; `None`: float32.
        calibration: FORMAT:PATH of a data set whose images show the ranges of activations, for int8.
        calibration_images: how many of its images.
        overwrite: replace an existing model folder.
        revision: branch, tag or commit of a Hub repository.
        progress: called with a line for each step.

    Returns:
        The content of the folder's `export.json`, with the differences from PyTorch.

    Raises:
        ValueError: the format, the model or the sizes are not possible, a package is missing, or the runtime gives
            other answers than PyTorch; nothing was written.
        OSError: the folder cannot be written.
    """
    say = progress or (lambda line: None)
    check_format(file_format)
    check_packages(file_format)
    check_quantization(quantize, calibration, file_format)
    if opset is not None and (file_format not in ("onnx", "openvino") or opset not in _OPSETS):
        raise ValueError(
            f"opset={opset} is for the formats onnx and openvino, from {_OPSETS.start} to {_OPSETS.stop - 1}"
        )
    check_destination(destination, overwrite)
    source = model if isinstance(model, str | os.PathLike) else None
    if source is not None:
        model, processor = _load(os.fspath(source), revision)
    elif processor is None:
        raise ValueError("a model in memory needs its image processor, which travels with it; pass processor=")
    model = _with_own_eomt(_in_float32(model))
    sizes = _sizes(file_format, size, max_size, batch)
    graphs = graphs_of(model, sizes, semantic_map)
    if sizes.height is not None:
        processor = _with_size(processor, sizes)
    _refuse_larger_inputs(graphs, processor)
    if quantize is not None and not any(isinstance(graph.module, EoMTGraph) for graph in graphs):
        raise ValueError(f"a {type(model).__name__} cannot be quantised, only an EoMT can; export it without quantize")
    # Of a fused model the generator, whose images those of its own processor are.
    images = getattr(processor, "generator", processor)
    calibrated = None if calibration is None else read_calibration(calibration, calibration_images, images)
    with complete_folder(destination, overwrite) as folder:
        records, checks, quantization = {}, [], None
        for graph in graphs:
            say(f"{graph.name}: tracing and writing {file_format}")
            records[graph.name] = _write(graph, file_format, folder, opset)
            checks += _check(graph, records[graph.name], file_format, folder, say)
            if calibrated is not None and isinstance(graph.module, EoMTGraph):
                say(f"{graph.name}: quantising to int8 with {len(calibrated.inputs)} images of {calibrated.name}")
                written = records[graph.name]
                records[graph.name], quantization = quantize_graph(graph, written, file_format, folder, calibrated)
                say(
                    f"{graph.name}: int8 differs from PyTorch by {quantization['difference']:.1e}, and changes the "
                    f"class of {100 * quantization['changed_classes']:.2g} % of the pixels"
                )
        record = ExportRecord(
            format=file_format,
            graphs=records,
            tolerance=FORMATS[file_format].tolerance,
            checks=checks,
            made_with=_versions(),
            options={"opset": opset, "semantic_map": semantic_map},
            quantization=quantization,
        )
        write_json(folder / RECORD_FILE, record.content())
        model.config.save_pretrained(folder)
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        write_json(folder / "config.json", {**settings, MARK: file_format})
        processor.save_pretrained(folder)
        _write_card(folder, source, model, processor, record)
    return record


def _load(source: str, revision: str | None) -> tuple[Any, Any]:
    if checkpoint_type(source, revision) == ViTPConfig.model_type:
        return load_point_classifier(source, revision=revision)
    return load_universal_model(source, revision=revision)


def _in_float32(model: Any) -> Any:
    weights = list(getattr(model, "parameters", list)())
    if all(weight.dtype == torch.float32 and weight.device.type == "cpu" for weight in weights):
        return model.eval()
    return copy.deepcopy(model).to("cpu", torch.float32).eval()  # the caller's own stays as it is


def _with_own_eomt(model: Any) -> Any:
    """The model with an EoMT of Transformers, its own or its generator, translated to ours, which can be traced."""
    generator = getattr(model, "generator", model)
    if getattr(getattr(generator, "config", None), "model_type", None) not in TRANSFORMERS_EOMT_TYPES:
        return model
    with tempfile.TemporaryDirectory() as folder:
        generator.save_pretrained(folder)
        ours = EoMTForUniversalSegmentation.from_pretrained(folder)
        out_of_file(ours)
    if generator is model:
        return ours.eval()
    config = copy.deepcopy(model.config)
    config.generator_config = ours.config
    with torch.device("meta"):  # the parts that are replaced take neither memory nor time
        joined = ViTPFusionForUniversalSegmentation(config)
    joined.generator, joined.classifier = ours, model.classifier
    joined._adopt()
    return joined.eval()


def _sizes(
    file_format: str, size: tuple[int, int] | None, max_size: tuple[int, int] | None, batch: int | None
) -> Sizes:
    if file_format == "executorch":
        if size is not None and max_size is not None:
            raise ValueError(
                f"size={size} is the only size and leaves nothing to max_size={max_size}; drop one of them"
            )
        # More images are run one batch after the other, so that memory is reserved for one only.
        height, width = size or (None, None)
        max_height, max_width = max_size or (None, None)
        return Sizes(batch or 1, height, width, True, max_height, max_width)
    if max_size is not None:
        raise ValueError(f"max_size={max_size} is for executorch; in the format {file_format} a model takes any size")
    return Sizes(batch, *(size or (None, None)))


def _refuse_larger_inputs(graphs: list[Graph], processor: Any) -> None:
    """Refuse a processor whose inputs are larger than those that memory is planned for."""
    for graph in graphs:
        if not {"height", "width"} <= graph.limits.keys():
            continue
        size = getattr(processor, graph.name, processor).size  # of a fused model, the part's
        if size["height"] > graph.limits["height"] or size["width"] > graph.limits["width"]:
            raise ValueError(
                f"{graph.name}: the image processor makes inputs of {size['height']} x {size['width']} pixels, and "
                f"memory would be planned for {graph.limits['height']} x {graph.limits['width']}; pass max_size="
                f"({size['height']}, {size['width']}), or set the processor's size"
            )


def _with_size(processor: Any, sizes: Sizes) -> Any:
    """The processor for the only size that the graph takes."""
    processor = copy.deepcopy(processor)
    inner = getattr(processor, "generator", processor)
    inner.size = {"height": sizes.height, "width": sizes.width}
    return processor


def _write(graph: Graph, file_format: str, folder: Path, opset: int | None) -> GraphRecord:
    writer, endings = WRITERS[file_format]
    try:
        writer(graph.trace(), graph, folder / f"{graph.name}{endings[0]}", opset)
    except OSError:
        raise
    except Exception as error:  # each exporter has its own classes
        text = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(
            f"{graph.name}: the export to {file_format} failed ({type(error).__name__}: {text}); other formats: "
            f"{', '.join(name for name in FORMATS if name != file_format)}"
        ) from error
    files = [folder / f"{graph.name}{ending}" for ending in endings]
    return GraphRecord(
        files={file.name: file.stat().st_size for file in files if file.is_file()},
        inputs=list(graph.input_names),
        outputs=list(graph.output_names),
        patch_size=graph.patch_size,
        batch=graph.sizes.batch,
        height=graph.sizes.height,
        width=graph.sizes.width,
        limits=graph.limits,
    )


def _check(
    graph: Graph, record: GraphRecord, file_format: str, folder: Path, say: Callable[[str], Any]
) -> list[dict[str, Any]]:
    """Compare the written graph, in its own runtime, with PyTorch."""
    tolerance = FORMATS[file_format].tolerance
    run = open_graph(folder, record, file_format, RuntimeSettings(allow_native_code=True))  # compiled here just now
    checks = []
    for inputs in graph.checked_inputs():
        with torch.inference_mode():
            expected = graph.module(*inputs)
        answers = run(dict(zip(graph.input_names, inputs, strict=True)))
        batch, _, height, width = inputs[0].shape
        where = f"{graph.name}, batch {batch}, {height} x {width} pixels"
        worst = 0.0
        for name, ours, theirs in zip(graph.output_names, expected, answers, strict=True):
            if tuple(theirs.shape) != tuple(ours.shape):
                raise ValueError(f"{where}: {name} has shape {tuple(theirs.shape)} instead of {tuple(ours.shape)}")
            if ours.dtype == torch.uint8:  # classes of pixels: near ties may fall otherwise
                difference = float((ours != theirs).float().mean())
            else:
                if record.inputs[-1] == "prompt_mask":  # answers to padding are meaningless
                    ours, theirs = ours[inputs[-1]], theirs[inputs[-1]]
                difference = float((ours - theirs).abs().max() / ours.abs().max().clamp(min=1.0))
            limit = max(tolerance, 1e-3) if ours.dtype == torch.uint8 else tolerance
            if not difference <= limit:  # also refuses NaN
                raise ValueError(
                    f"{where}: {name} differs from PyTorch's by {difference:.2g}, more than {limit:g}; nothing was "
                    f"written. Update the packages of {file_format}, or choose another format"
                )
            worst = max(worst, difference)
        say(f"{where}: differs from PyTorch by {worst:.1e} (tolerance {tolerance:g})")
        checks.append(
            {"graph": graph.name, "batch": batch, "height": height, "width": width, "difference": float(f"{worst:.2g}")}
        )
    return checks


def _versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _quantization_facts(record: ExportRecord) -> dict[str, str]:
    found = record.quantization
    if found is None:
        return {}
    return {
        "Quantised": f"`{found['graph']}` to int8, calibrated with {found['calibration_images']} images of "
        f"`{found['calibration']}`",
        "Difference of int8 from PyTorch": f"{found['difference']:.1e} of the largest output; "
        f"{100 * found['changed_classes']:.2g} % of the pixels change their class ({found['measured_images']} images)",
    }


def _write_card(folder: Path, source: Any, model: Any, processor: Any, record: ExportRecord) -> None:
    """The source's card, or a new one, with a section on the export; other papers of the source travel along."""
    origin = Path(source) if source is not None and Path(source).is_dir() else None
    for name in _COPIED:
        if origin is not None and (origin / name).is_file():
            (folder / name).write_bytes((origin / name).read_bytes())
    if origin is not None and (origin / "README.md").is_file():
        card = (origin / "README.md").read_text(encoding="utf-8")
    else:
        card = make_model_card(model.config, processor, with_code=False)
    sizes = {
        f"`{name}`": ", ".join(
            f"{what} {'any' if value is None else value}"
            for what, value in (("batch", graph.batch), ("height", graph.height), ("width", graph.width))
        )
        for name, graph in record.graphs.items()
    }
    worst = max(check["difference"] for check in record.checks)
    in_float32 = ", in float32" if record.quantization else ""
    facts = {
        "Format": record.format,
        **sizes,
        f"Largest difference from PyTorch{in_float32}": (
            f"{worst:.1e} of the largest output, in {len(record.checks)} comparisons"
        ),
        **_quantization_facts(record),
        "Made with": ", ".join(f"{name} {number}" for name, number in record.made_with.items()),
    }
    native = ", allow_native_code=True" if record.format == "pt2" else ""
    card += f"\n## Exported\n\n| | |\n|---|---|\n{rows(facts.items())}\n\n"
    card += "These files have no weights for PyTorch. Used with hf-segvit:\n\n"
    card += "```python\nfrom hf_segvit import Segmenter\n\n"
    card += f'segmenter = Segmenter.from_pretrained("{REPOSITORY_PLACEHOLDER}"{native})\n```\n'
    (folder / "README.md").write_text(card, encoding="utf-8")
