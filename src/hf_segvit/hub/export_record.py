"""Read `export.json`, the record of an exported folder, and check its files.

Every graph of the folder has an entry: its files, its inputs and outputs, and the sizes it takes. Exported folders are
recognised by the field `exported` of their config.json, so that one on the Hub is known before anything is fetched.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..models.checkpoint_json import json_fault
from ..models.configuration_vit_p_fusion import ViTPFusionConfig

RECORD_FILE = "export.json"
RECORD_VERSION = 1
MARK = "exported"  # in config.json: the format
# File formats that an export has, and the runtimes that run each, the default first.
RUNTIMES = {
    "onnx": ("onnxruntime", "openvino"),
    "openvino": ("openvino",),
    "pt2": ("aotinductor",),
    "executorch": ("executorch",),
}


@dataclass(frozen=True)
class GraphRecord:
    """One graph: a model, or the generator or classifier of a fused one.

    Attributes:
        files: sizes in bytes by name; the first file is the one to open.
        batch: the only number of images that it takes; `None`: any.
        height: the only height in pixels; `None`: any multiple of the patch size.
        width: the same.
        limits: the largest `height`, `width` and number of `prompts`, where memory was planned for them.
    """

    files: dict[str, int]
    inputs: list[str]
    outputs: list[str]
    patch_size: int
    batch: int | None = None
    height: int | None = None
    width: int | None = None
    limits: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class ExportRecord:
    """The content of `export.json`.

    Attributes:
        graphs: by name, `"model"`, or `"generator"` and `"classifier"`.
        tolerance: largest difference from PyTorch, relative to the largest output, at which the export was accepted.
        checks: batch, height, width and measured difference of each comparison.
        made_with: versions of the libraries.
        quantization: of an int8 export its calibration set and how far its answers are from PyTorch's; `checks` are
            then those of the graph in float32 that it was made from.
    """

    format: str
    graphs: dict[str, GraphRecord]
    tolerance: float
    checks: list[dict[str, Any]]
    made_with: dict[str, str]
    version: int = RECORD_VERSION
    options: dict[str, Any] = field(default_factory=dict)
    quantization: dict[str, Any] | None = None

    def content(self) -> dict[str, Any]:
        """The record as JSON."""
        return {"version": self.version, **asdict(self)}


def exported_format(settings: Mapping[str, Any]) -> str | None:
    """The format that the fields of a config.json name; `None` for weights of PyTorch."""
    return settings.get(MARK)


def graph_names(model_type: Any) -> list[str]:
    """Names of the graphs of a model type."""
    return ["generator", "classifier"] if model_type == ViTPFusionConfig.model_type else ["model"]


def read_record(folder: Path) -> ExportRecord:
    """The record of a folder, whose files are there and as long as they should be.

    Raises:
        ValueError: it is missing, damaged or too new, or a file is missing, outside of the folder or truncated.
    """
    path = folder / RECORD_FILE
    again = "export the model again, or copy the whole folder again"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{folder} is an exported model without {RECORD_FILE}; {again}") from error
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({json_fault(error)}); {again}") from error
    except RecursionError as error:
        raise ValueError(f"{path} is damaged (nested too deep); {again}") from error
    version = content.get("version") if isinstance(content, dict) else None
    if isinstance(version, int) and version > RECORD_VERSION:
        raise ValueError(
            f"{path} has version {version}, but this hf-segvit reads up to {RECORD_VERSION}; update it with "
            "`pip install -U hf-segvit`, or export the model again with this one"
        )
    try:
        graphs = {name: GraphRecord(**entry) for name, entry in content["graphs"].items()}
        known = {each.name for each in fields(ExportRecord)}
        record = ExportRecord(**{**{k: v for k, v in content.items() if k in known}, "graphs": graphs})
        if record.format not in RUNTIMES:
            raise ValueError(f"format {record.format!r} is not one of {', '.join(RUNTIMES)}")
        for graph in graphs.values():
            if not all(isinstance(limit, int) for limit in graph.limits.values()):
                raise TypeError("limits")
            for name, size in graph.files.items():
                _check_file(folder, name, size)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: it lacks a field, or one is of another type; {again}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}; {again}") from error
    return record


def _check_file(folder: Path, name: str, size: int) -> None:
    # Names only: a stranger's folder must not make us open files elsewhere.
    if Path(name).name != name or name in ("", ".", ".."):
        raise ValueError(f"the file {name!r} is not in the folder itself")
    path = folder / name
    if not path.is_file():
        raise ValueError(f"the file {name} is missing")
    actual = path.stat().st_size
    if actual != size:
        raise ValueError(
            f"{name} has {actual} bytes instead of {size}, so it is truncated or another file; {name} is not loaded"
        )
