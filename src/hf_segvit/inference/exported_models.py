"""Exported models behind the interface of PyTorch's: what `Segmenter` and Transformers' pipeline call.

A model class here holds a configuration and a graph of a runtime, no weights. Of a fused model, generator and
classifier are two graphs, and points and fusion are computed as always. Tensors go in and come out on the CPU.

Shapes: B batch, N prompts, H W pixels.
"""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES

from ..hub.export_record import GraphRecord, graph_names, read_record
from ..models.configuration_eomt import EoMTConfig
from ..models.configuration_vit_p import ViTPConfig
from ..models.configuration_vit_p_fusion import ViTPFusionConfig
from ..models.modeling_eomt import EoMTForUniversalSegmentationOutput
from ..models.modeling_vit_p import ViTPForPointClassificationOutput
from ..models.modeling_vit_p_fusion import ViTPFusionForUniversalSegmentation
from .runtimes import Graph, RuntimeSettings, open_graph

SEMANTIC_MAP = "semantic_map"


class ExportedModel(nn.Module):
    """Base of the models that a graph computes."""

    device = torch.device("cpu")  # where tensors go in and come out, wherever the runtime computes
    dtype = torch.float32
    main_input_name = "pixel_values"
    graph_digest = ""  # of the files, as such a model has no weights of its own that could tell it from others

    def __init__(self, config: Any, graph: Graph, record: GraphRecord, description: str) -> None:
        super().__init__()
        self.config, self.record, self.description = config, record, description
        self._graph = graph

    def can_generate(self) -> bool:
        """Whether it writes text, as Transformers' pipelines ask."""
        return False

    def run(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Outputs by name, of inputs (B, ...) by name."""
        images = inputs["pixel_values"]
        self._check_size(images)
        wanted = {name: inputs[name].detach().cpu() for name in self.record.inputs}
        batch = self.record.batch
        chunks = [wanted] if batch is None else _chunks(wanted, batch)
        answers = [self._graph(chunk) for chunk in chunks]
        outputs = (torch.cat(parts)[: len(images)] for parts in zip(*answers, strict=True))
        return dict(zip(self.record.outputs, outputs, strict=True))

    def _check_size(self, images: Tensor) -> None:
        record, patch = self.record, self.record.patch_size
        if images.ndim != 4 or images.shape[1] != self.config.num_channels:
            raise ValueError(
                f"pixel_values of shape {tuple(images.shape)} must be (batch, {self.config.num_channels}, height, "
                "width)"
            )
        height, width = images.shape[-2:]
        fixed = record.height or height, record.width or width
        if (height, width) != fixed:
            raise ValueError(
                f"pixel_values of {height} x {width} pixels, but the model was exported for {fixed[0]} x {fixed[1]} "
                "only; set the processor's size to that, or export it without a fixed size"
            )
        largest = record.limits.get("height", height), record.limits.get("width", width)
        if height > largest[0] or width > largest[1]:
            raise ValueError(
                f"pixel_values of {height} x {width} pixels, but memory was planned for {largest[0]} x {largest[1]} at "
                "most when the model was exported; lower the processor's size, or export it with a larger max_size"
            )
        if height % patch or width % patch or not height or not width:
            raise ValueError(
                f"pixel_values of {height} x {width} pixels: both sides must be multiples of patch_size={patch}; "
                "resize or pad the image, as the image processor does"
            )


def _chunks(inputs: dict[str, Tensor], batch: int) -> list[dict[str, Tensor]]:
    """Batches of exactly `batch` rows; the last row is repeated to fill up the last batch."""
    count = len(inputs["pixel_values"])
    rows = torch.arange(-(-count // batch) * batch).clamp(max=count - 1)
    return [{name: value[chunk] for name, value in inputs.items()} for chunk in rows.split(batch)]


class ExportedEoMT(ExportedModel):
    """An exported `EoMTForUniversalSegmentation`."""

    config: EoMTConfig

    @torch.no_grad()
    def forward(
        self,
        pixel_values: Tensor,
        content_sizes: Tensor | None = None,
        patch_offsets: Tensor | None = None,
        **kwargs: Any,
    ) -> EoMTForUniversalSegmentationOutput:
        """Segment images (B, channels, H, W); see the PyTorch model."""
        _refuse_labels(kwargs)
        outputs = self.run({"pixel_values": pixel_values})
        return EoMTForUniversalSegmentationOutput(
            class_queries_logits=outputs["class_queries_logits"],
            masks_queries_logits=outputs["masks_queries_logits"],
            content_sizes=content_sizes,
            patch_offsets=patch_offsets,
        )

    def semantic_map(self, pixel_values: Tensor) -> Tensor:
        """The class of every input pixel, (B, H, W) uint8, if the model was exported with it."""
        if SEMANTIC_MAP not in self.record.outputs:
            raise ValueError("the model was exported without its semantic map; export it with --semantic-map")
        return self.run({"pixel_values": pixel_values})[SEMANTIC_MAP]


class ExportedViTP(ExportedModel):
    """An exported `ViTPForPointClassification`."""

    config: ViTPConfig

    @property
    def num_labels(self) -> int:
        """Number of classes."""
        return len(self.config.id2label or {})

    @torch.no_grad()
    def forward(
        self, pixel_values: Tensor, prompts: Tensor, prompt_mask: Tensor | None = None, **kwargs: Any
    ) -> ViTPForPointClassificationOutput:
        """Classify prompts (B, N, 4); see the PyTorch model."""
        _refuse_labels(kwargs)
        shape = tuple(prompts.shape)
        if len(shape) != 3 or shape[0] != len(pixel_values) or shape[1] == 0 or shape[2] != 4:
            raise ValueError(f"prompts of shape {shape} for {len(pixel_values)} images must be (images, N, 4)")
        real = torch.ones(shape[:2], dtype=torch.bool) if prompt_mask is None else prompt_mask.bool()
        most = self.record.limits.get("prompts", shape[1])
        if shape[1] > most and self.config.prompt_attention != "isolated":
            raise ValueError(
                f"{shape[1]} prompts of an image, but memory was planned for {most} at most, and this ViT-P lets "
                "prompts see one another, so that they cannot be asked in turns; ask fewer, or export to onnx"
            )
        logits = [
            self.run({"pixel_values": pixel_values, "prompts": asked, "prompt_mask": mask})["logits"]
            for asked, mask in zip(prompts.split(most, 1), real.split(most, 1), strict=True)
        ]
        return ViTPForPointClassificationOutput(logits=torch.cat(logits, 1), prompt_mask=prompt_mask)


class ExportedViTPFusion(ViTPFusionForUniversalSegmentation):
    """A fused model whose generator and classifier are exported."""

    device = torch.device("cpu")
    dtype = torch.float32
    description: str

    @classmethod
    def of(cls, config: ViTPFusionConfig, generator: ExportedEoMT, classifier: ExportedViTP) -> "ExportedViTPFusion":
        """Join both parts."""
        with torch.device("meta"):  # the parts that are replaced take neither memory nor time
            model = cls(config)
        model.generator, model.classifier = generator, classifier  # type: ignore[assignment]
        model._adopt()
        model.description = generator.description
        return model.eval()


def _refuse_labels(kwargs: dict[str, Any]) -> None:
    labels = [name for name, value in kwargs.items() if value is not None and name.endswith("labels")]
    if labels:
        raise ValueError(f"{', '.join(labels)}: an exported model has no loss; train the model it was exported from")


# The image segmentation pipeline accepts only models that this table names.
for _cls in (ExportedEoMT, ExportedViTPFusion):
    MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES.setdefault(f"exported_{_cls.__name__}", _cls.__name__)


def load_exported_model(folder: Path, settings: RuntimeSettings | None = None) -> Any:
    """Load an exported folder on this machine; the classes above say what comes out.

    Raises:
        ValueError: the folder is incomplete, damaged, too new or for another runtime, or the runtime is missing.
    """
    settings = settings or RuntimeSettings()
    record = read_record(folder)
    runtime = settings.runtime_for(record.format)
    threads = "" if settings.threads is None else f", {settings.threads} thread{'s' if settings.threads > 1 else ''}"
    description = f"{settings.device or 'cpu'} ({runtime}{threads})"
    config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if not isinstance(config, EoMTConfig | ViTPConfig | ViTPFusionConfig):
        raise ValueError(f"{folder} is an exported model of type {config.model_type!r}, which is not known here")
    expected = graph_names(config.model_type)
    if list(record.graphs) != expected:
        raise ValueError(f"{folder}: export.json has the graphs {list(record.graphs)}, not {expected}; export it again")

    def part(name: str, part_config: Any) -> Any:
        cls = ExportedViTP if isinstance(part_config, ViTPConfig) else ExportedEoMT
        graph = open_graph(folder, record.graphs[name], record.format, settings)
        model = cls(part_config, graph, record.graphs[name], description).eval()
        model.graph_digest = _digest(folder, record.graphs[name])
        return model

    if isinstance(config, ViTPFusionConfig):
        generator = part("generator", config.generator_config)
        return ExportedViTPFusion.of(config, generator, part("classifier", config.classifier_config))
    return part("model", config)


def _digest(folder: Path, record: GraphRecord) -> str:
    digest = hashlib.sha256()
    for name in record.files:
        with open(folder / name, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
