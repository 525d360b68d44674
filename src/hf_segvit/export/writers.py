"""Write a traced graph in each format: the file, and whatever lies beside it."""

import io
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from ..inference.runtimes import no_reports_home
from .graphs import Graph

# Protocol buffers end at 2 GiB; weights beyond go to a file beside.
LARGEST_ONNX = 1_800_000_000


def write_onnx(program: ExportedProgram, graph: Graph, path: Path, opset: int | None) -> None:
    """Write an ONNX file."""
    silence = io.StringIO()
    with warnings.catch_warnings(), redirect_stdout(silence), redirect_stderr(silence):
        warnings.simplefilter("ignore")  # about the exporter's own dependencies
        exported: Any = torch.onnx.export(
            program,
            (),
            input_names=graph.input_names,
            output_names=graph.output_names,
            opset_version=opset,
            dynamo=True,
            verbose=False,
        )
    for node in exported.model.graph.all_nodes():
        node.metadata_props.clear()  # the lines of code behind it, with the paths of this machine
        node.doc_string = None
    size = sum(weight.nbytes for weight in graph.module.parameters())
    exported.save(str(path), external_data=size > LARGEST_ONNX)


def write_openvino(program: ExportedProgram, graph: Graph, path: Path, opset: int | None) -> None:
    """Write OpenVINO's XML and BIN, by way of ONNX."""
    with no_reports_home():
        import openvino

    onnx = path.with_name(f"{path.stem}-onnx")
    onnx.mkdir()
    try:
        write_onnx(program, graph, onnx / "graph.onnx", opset)
        # Read by the core: `convert_model` would report its use over the network.
        model = openvino.Core().read_model(onnx / "graph.onnx")
        # Its default of float16 would lose digits that it does not win back.
        openvino.save_model(model, path, compress_to_fp16=False)
        del model  # it may still hold the file open, which Windows would not delete
    finally:
        for file in onnx.iterdir():
            file.unlink()
        onnx.rmdir()


def write_pt2(program: ExportedProgram, graph: Graph, path: Path, opset: int | None) -> None:
    """Compile an AOTInductor package."""
    del graph, opset
    torch._inductor.aoti_compile_and_package(program, package_path=str(path))


def write_executorch(program: ExportedProgram, graph: Graph, path: Path, opset: int | None) -> None:
    """Write an ExecuTorch program whose matrix products are XNNPACK's."""
    del graph, opset
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    path.write_bytes(lowered.to_executorch().buffer)


Writer = Callable[[ExportedProgram, Graph, Path, int | None], None]
# By format: the function, and the endings of the files, the one to open first.
WRITERS: dict[str, tuple[Writer, Sequence[str]]] = {
    "onnx": (write_onnx, (".onnx", ".onnx.data")),
    "openvino": (write_openvino, (".xml", ".bin")),
    "pt2": (write_pt2, (".pt2",)),
    "executorch": (write_executorch, (".pte",)),
}
