"""Quantise an exported EoMT to int8: NNCF for OpenVINO, ONNX Runtime for ONNX.

Weights are int8 by channel; the ranges of activations are those seen on the images of a calibration set. How far the
answers move from PyTorch's is measured on other images of the same set, where it has any left.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.reading import describe, load_segmentation_dataset
from ..hub.export_record import GraphRecord
from ..inference.runtimes import Graph as Runtime
from ..inference.runtimes import RuntimeSettings, no_reports_home, open_graph
from ..models.image_decoding import to_pixels
from ..models.image_processing_plain_vit import image_settings
from .graphs import Graph
from .writers import LARGEST_ONNX

_MEASURED_IMAGES = 16
_SEED = 0  # of the choice of images
_REMEDY = "nothing was written. Export it without quantize, or to another format"


@dataclass(frozen=True)
class Calibration:
    """Inputs (1, channels, H, W) from the images of a data set.

    Attributes:
        data: FORMAT:PATH of the set.
        split: the part that was read.
        inputs: to find the ranges of activations with.
        held_out: to measure the answers with; the same ones where the set has no more.
    """

    data: str
    split: str
    inputs: list[Tensor] = field(repr=False)
    held_out: list[Tensor] = field(repr=False)

    @property
    def name(self) -> str:
        """The data set without the folders above it, which are this machine's own."""
        file_format, _, path = self.data.partition(":")
        return f"{file_format}:{Path(path).name}"


def read_calibration(data: str, count: int, processor: Any) -> Calibration:
    """Draw `count` images from a data set, and a few more to measure with, as inputs of the model.

    Raises:
        ValueError: the data set cannot be read or has no images.
    """
    if count < 1:
        raise ValueError(f"calibration_images={count} must be at least 1")
    dataset = load_segmentation_dataset(data)
    if not len(dataset):
        raise ValueError(f"the calibration set {data} has no images; name one that has some of those to be segmented")
    split = describe(dataset).split
    settings = image_settings(vars(processor))
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(_SEED)).tolist()

    def inputs(indices: Sequence[int]) -> list[Tensor]:
        found = []
        for index in indices:  # one by one: images may be far larger than the inputs made of them
            entry = dataset[index]
            image = to_pixels(entry["image"], f"image {entry['image_id']!r}", settings)
            found.append(processor(images=[image], return_tensors="pt")["pixel_values"][:1])  # of windows the first
        return found

    calibrated, held_out = inputs(order[:count]), inputs(order[count : count + _MEASURED_IMAGES])
    return Calibration(data, split, calibrated, held_out or calibrated[:_MEASURED_IMAGES])


def quantize_graph(
    graph: Graph, record: GraphRecord, file_format: str, folder: Path, calibration: Calibration
) -> tuple[GraphRecord, dict[str, Any]]:
    """Replace a written graph by its int8 form; gives its record, and what `export.json` says about it.

    Raises:
        ValueError: the tool failed, or the int8 graph gives numbers that are not finite.
    """
    batch = record.batch or 1
    file = folder / next(iter(record.files))
    feeds = [inputs.expand(batch, -1, -1, -1) for inputs in calibration.inputs]
    large = sum(weight.nbytes for weight in graph.module.parameters()) > LARGEST_ONNX
    try:
        with _quiet():
            _TOOLS[file_format](file, feeds, large)
    except OSError:
        raise
    except Exception as error:  # each tool has its own classes
        text = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(
            f"{graph.name}: the quantisation to int8 failed ({type(error).__name__}: {text}); {_REMEDY}"
        ) from error
    files = {path.name: path.stat().st_size for path in (folder / name for name in record.files) if path.is_file()}
    record = replace(record, files=files)
    run = open_graph(folder, record, file_format, RuntimeSettings())
    _check_sizes(graph, run)
    differences = _differences(graph, run, calibration, batch)
    return record, {
        "type": "int8",
        "graph": graph.name,
        "calibration": calibration.name,
        "split": calibration.split,
        "calibration_images": len(calibration.inputs),
        "measured_images": len(calibration.held_out),
        "measured_on_calibration_images": calibration.held_out[0] is calibration.inputs[0],
        **differences,
    }


def _check_sizes(graph: Graph, run: Runtime) -> None:
    """Run the sizes that were compared in float32, some of which a runtime may not take in int8."""
    for inputs in graph.checked_inputs():
        where = f"{graph.name}: in int8, {inputs[0].shape[-2]} x {inputs[0].shape[-1]} pixels"
        try:
            answers = run(dict(zip(graph.input_names, inputs, strict=True)))
        except Exception as error:  # each runtime has its own classes
            last = (str(error).strip() or type(error).__name__).splitlines()[-1]
            raise ValueError(f"{where}: the runtime fails ({last}); {_REMEDY}") from error
        with torch.inference_mode():
            shapes = [tuple(output.shape) for output in graph.module(*inputs)]
        if [tuple(answer.shape) for answer in answers] != shapes:
            raise ValueError(f"{where}: the outputs have other shapes than PyTorch's; {_REMEDY}")


def _differences(graph: Graph, run: Runtime, calibration: Calibration, batch: int) -> dict[str, Any]:
    """From PyTorch: of logits, relative to the largest, and the share of mask cells that change their class."""
    worst, changed, cells = 0.0, 0, 0
    for inputs in calibration.held_out:
        with torch.inference_mode():
            expected = graph.module(inputs)[:2]
        answers = [output[:1] for output in run({"pixel_values": inputs.expand(batch, -1, -1, -1)})[:2]]
        if not all(answer.isfinite().all() for answer in answers):
            raise ValueError(f"{graph.name}: in int8 it gives numbers that are not finite; {_REMEDY}")
        for ours, theirs in zip(expected, answers, strict=True):
            worst = max(worst, float((ours - theirs).abs().max() / ours.abs().max().clamp(min=1.0)))
        before, after = (_classes(*outputs) for outputs in (expected, answers))
        changed, cells = changed + int((before != after).sum()), cells + before.numel()
    return {"difference": float(f"{worst:.2g}"), "changed_classes": float(f"{changed / cells:.2g}")}


def _classes(classes: Tensor, masks: Tensor) -> Tensor:
    """The semantic class of each mask cell."""
    return torch.einsum("bqc,bqhw->bchw", classes.softmax(-1)[..., :-1], masks.sigmoid()).argmax(1)


def _quantize_openvino(file: Path, feeds: list[Tensor], large: bool) -> None:
    del large
    with no_reports_home():
        import nncf
        import openvino

    model = openvino.Core().read_model(file)
    dataset = nncf.Dataset(feeds, lambda feed: {"pixel_values": feed.contiguous().numpy()})
    model = nncf.quantize(
        model,
        dataset,
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(feeds),
        # Depthwise convolutions, whose inputs would be int8 by channel, with which OpenVINO fails at other sizes.
        ignored_scope=nncf.IgnoredScope(types=["GroupConvolution"], validate=False),
        # Smoothing fails on matrix products of two computed operands, such as the resampling of a position table.
        advanced_parameters=nncf.AdvancedQuantizationParameters(
            smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(matmul=-1)
        ),
    )
    written = file.with_name(f"int8-{file.name}")
    openvino.save_model(model, written, compress_to_fp16=False)
    del model  # it may still hold the files open, which Windows would not replace
    for ending in (".xml", ".bin"):
        written.with_suffix(ending).replace(file.with_suffix(ending))


def _quantize_onnx(file: Path, feeds: list[Tensor], large: bool) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.feeds: Iterator[Tensor] = iter(feeds)

        def get_next(self) -> dict[str, Any] | None:
            feed = next(self.feeds, None)
            return None if feed is None else {"pixel_values": feed.contiguous().numpy()}

    written = file.with_name(f"int8-{file.name}")
    quantize_static(
        file,
        written,
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=["Conv", "Gemm", "MatMul"],
        use_external_data_format=large,
        # Products of two activations, in attention and of the masks, stay in float32: they are most sensitive.
        extra_options={"MatMulConstBOnly": True},
    )
    if large:
        import onnx

        model = onnx.load(written)  # with its weights, which int8 brings under the limit
        for beside in (written, *file.parent.glob(f"{written.name}*"), file.with_name(f"{file.name}.data")):
            beside.unlink(missing_ok=True)
        onnx.save(model, file)
    else:
        written.replace(file)


_TOOLS: dict[str, Callable[[Path, list[Tensor], bool], None]] = {
    "onnx": _quantize_onnx,
    "openvino": _quantize_openvino,
}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the tools' advice and progress bars off the terminal."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
            yield
    finally:
        logging.disable(level)
