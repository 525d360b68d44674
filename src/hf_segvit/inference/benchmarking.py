"""Benchmark a model: its variants and peers in turns, equal precision beside equal precision.

In order: variants, the models that they are made of, measuring. Outputs are compared before anything is timed.
`benchmark_report.py` shows the rows, `measuring.py` has the clock.
"""

import copy
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..models.configuration_eomt import EoMTConfig
from ..models.configuration_mask2former_vit import Mask2FormerViTConfig
from ..models.image_processing_eomt import EoMTImageProcessor
from ..models.modeling_eomt import EoMTForUniversalSegmentation
from ..models.modeling_mask2former_vit import Mask2FormerViTForUniversalSegmentation
from .measuring import PeakMemory, relative_difference, time_interleaved
from .quantization import quantize_model
from .segmenter import Segmenter, optimize_model

AS_IT_IS = "as it is"
# Of the largest value: in float32 only the order of sums differs, other types and quantisation round.
LIMITS = {torch.float32: 1e-3}
_OTHER_LIMIT = 0.25
_PASSING = 0.15  # share of the queries that become segments, where weights are random


@dataclass
class Variant:
    """One way to run a model, or a peer.

    Attributes:
        forward: pixels (B, channels, H, W) in, outputs with logits out.
        segment: images in, answers out, with all processing; `None` if the peer has none.
        same_weights: whether its outputs must equal the model's.
        facts: `attention`, `compiled`, `quantization`, each a text or `None`.
    """

    name: str
    dtype: torch.dtype
    forward: Callable[[Tensor], Any]
    segment: Callable[[Sequence[Any]], Any] | None
    parameters: int
    facts: Mapping[str, Any]
    same_weights: bool = True


@dataclass(frozen=True)
class Row:
    """What was measured of a variant at a batch size; `None` is what could not be.

    Attributes:
        forward: seconds of each forward pass.
        whole: seconds of each pass from images to segments.
        forward_ratio: its median over that of the baseline of the same type and batch size.
        peak_mebibytes: memory of a forward pass above the start.
        difference: largest difference to the model's float32 outputs, as a share of their largest value.
        failure: why a peer was not measured.
    """

    model: str
    variant: str
    dtype: str
    batch_size: int
    parameters: int
    baseline: str
    facts: Mapping[str, Any]
    forward: Sequence[float] | None = None
    whole: Sequence[float] | None = None
    forward_ratio: float | None = None
    whole_ratio: float | None = None
    peak_mebibytes: float | None = None
    difference: float | None = None
    failure: str | None = None

    @property
    def images_per_second(self) -> float | None:
        """Of the forward pass."""
        return self.batch_size / statistics.median(self.forward) if self.forward else None


def variant_of(
    model: Any,
    segment: Callable[[Sequence[Any]], Any],
    name: str,
    dtype: torch.dtype,
    quantization: str | None = None,
) -> Variant:
    """The variant that a model is, whose answers for images `segment` gives."""
    parameters = getattr(model, "parameters", None)  # an exported model has none
    module = getattr(model, "eomt", getattr(model, "mask2former", model))
    compiled = getattr(module, "_compiled_call_impl", None) is not None
    graphs = getattr(model, "uses_cuda_graphs", False)
    facts = {
        "attention": getattr(getattr(model, "config", None), "_attn_implementation", None),
        "compiled": ("with CUDA graphs" if graphs else "yes") if compiled else None,
        "quantization": quantization,
    }

    def forward(pixels: Tensor) -> Any:
        return model(pixel_values=pixels)

    number = sum(parameter.numel() for parameter in parameters()) if parameters is not None else 0
    return Variant(name, dtype, forward, segment, number, facts)


def variants_of(
    segmenter: Segmenter,
    dtype: torch.dtype,
    optimizations: Sequence[Mapping[str, Any]],
    quantizations: Sequence[str],
) -> list[Variant]:
    """The model as it is, and with each of these switches, each of these quantisations, and both."""
    made = []
    for method in (None, *quantizations):
        for switches in (None, *optimizations):
            words = [method] if method is not None else []
            if switches is not None:
                named = (name if on else f"no {name}" for name, on in switches.items())
                words.append("optimised" + "".join(f", {name.replace('_', ' ')}" for name in named))
            each = copy.copy(segmenter)
            if words:
                each.model = copy.deepcopy(segmenter.model)
            if method is not None:
                quantize_model(each.model, method)
            if switches is not None:
                optimize_model(each.model, switches)
            made.append(variant_of(each.model, each.answers, "; ".join(words) or AS_IT_IS, dtype, method))
    return made


def random_segmenter(
    config: EoMTConfig | Mask2FormerViTConfig,
    dtype: torch.dtype,
    device: torch.device,
    task: str | None = None,
    seed: int = 0,
) -> Segmenter:
    """A segmenter of this shape with random weights, an EoMT annealed; about a sixth of the queries become segments."""
    torch.manual_seed(seed)
    config = copy.deepcopy(config)
    model: Any
    if isinstance(config, EoMTConfig):
        config.masked_attention_probabilities = [0.0] * config.num_query_layers
        model = EoMTForUniversalSegmentation(config).eval()
    else:
        model = Mask2FormerViTForUniversalSegmentation(config).eval()
    height, width = config.image_height_width
    task = task or "panoptic"
    processor = EoMTImageProcessor(task=task, size={"height": height, "width": width}, stuff_classes=[])
    threshold = None
    if task != "semantic":
        # Random scores are all alike, so the threshold is one that as many pass as in a photo.
        with torch.inference_mode():
            pixels = torch.randn(1, config.num_channels, height, width)
            scores = model(pixels).class_queries_logits.softmax(-1)[0, :, :-1].amax(-1)
        threshold = scores.quantile(1 - _PASSING).item()
    return Segmenter(model.to(dtype), processor, task=task, device=device, threshold=threshold)


def input_size(segmenter: Segmenter) -> tuple[int, int]:
    """Height and width of the model's input."""
    sizes = [getattr(getattr(segmenter.model, "config", None), "image_size", None)]
    processor = getattr(segmenter.processor, "image_processor", segmenter.processor)
    size = dict(getattr(processor, "size", None) or {})
    sizes += [(size["height"], size["width"]) if size.get("height") else size.get("shortest_edge"), 640]
    found = next(size for size in sizes if size)
    return (found, found) if isinstance(found, int) else tuple(found)


def example_images(number: int, size: tuple[int, int], channels: int = 3) -> list[Any]:
    """Images as smooth as photos, three quarters as high as the input, which is what cameras give."""
    generator = np.random.default_rng(0)
    height, width = max(1, size[0] * 3 // 4), size[1]
    images: list[Any] = []
    for _ in range(number):
        coarse = generator.integers(0, 256, (12, 16, channels), dtype=np.uint8)
        bands = [
            Image.fromarray(coarse[..., band]).resize((width, height), Image.Resampling.BICUBIC)
            for band in range(channels)
        ]
        images.append(np.stack([np.asarray(band) for band in bands], axis=-1))
    return images


def logits_of(outputs: Any) -> dict[str, Tensor]:
    """Class and mask logits of a model's outputs, on the CPU in float32."""
    names = ("class_queries_logits", "masks_queries_logits")
    return {name: outputs[name].detach().float().cpu() for name in names}


@torch.inference_mode()
def benchmark(
    model_name: str,
    variants: Sequence[Variant],
    *,
    device: torch.device,
    size: tuple[int, int],
    channels: int = 3,
    batch_sizes: Sequence[int] = (1,),
    repeats: int = 7,
    clock: str = "wall",
    reference: Callable[[Tensor], Any] | None = None,
    with_images: bool = True,
) -> list[Row]:
    """Measure variants of one type of weights; all of a batch size take turns.

    Args:
        model_name: for the rows.
        variants: the model as it is first. Ratios are to Transformers' own model, or else to that first one.
        size: height and width of the pixels.
        reference: gives the outputs to compare with; `None`: the first variant.
        with_images: measure from images to segments, too.

    Raises:
        ValueError: a variant with the same weights answers differently, so that times would not compare.
    """
    generator = torch.Generator().manual_seed(0)
    reference = variants[0].forward if reference is None else reference
    rows: list[Row] = []
    for batch_size in batch_sizes:
        pixels = torch.randn(batch_size, channels, *size, generator=generator)
        expected = logits_of(reference(pixels.to(device)))
        images = example_images(batch_size, size, channels)
        differences, failures = dict[str, float | None](), dict[str, str]()
        for variant in variants:
            given = pixels.to(device, variant.dtype)
            try:
                differences[variant.name] = _difference(variant, given, expected, first=variant is variants[0])
            except (RuntimeError, TypeError, ValueError) as error:
                if variant.facts.get("peer") is None:
                    raise
                failures[variant.name] = str(error).split("\n")[0]
        running = [variant for variant in variants if variant.name not in failures]
        baseline = next((each for each in running if each.facts.get("peer") == "transformers"), running[0])
        calls = [partial(variant.forward, pixels.to(device, variant.dtype)) for variant in running]
        forward = dict(zip((each.name for each in running), time_interleaved(calls, repeats, clock), strict=True))
        whole: dict[str, list[float]] = {}
        if with_images:
            able = {each.name: partial(each.segment, images) for each in running if each.segment is not None}
            whole = dict(zip(able, time_interleaved(list(able.values()), repeats, clock), strict=True))
        for variant in variants:
            name = variant.name
            peak = None
            if name in forward:
                with PeakMemory(device) as memory:
                    variant.forward(pixels.to(device, variant.dtype))
                peak = memory.mebibytes
            rows.append(
                Row(
                    model_name,
                    name,
                    str(variant.dtype).removeprefix("torch."),
                    batch_size,
                    variant.parameters,
                    baseline.name,
                    variant.facts,
                    forward.get(name),
                    whole.get(name),
                    _ratio(forward, name, baseline.name),
                    _ratio(whole, name, baseline.name),
                    peak,
                    differences.get(name),
                    failures.get(name),
                )
            )
    return rows


def _difference(variant: Variant, pixels: Tensor, expected: Mapping[str, Tensor], first: bool) -> float | None:
    """The largest difference to what is expected, or an error where that is too much."""
    answer = variant.forward(pixels)
    if not variant.same_weights:
        return None
    logits = logits_of(answer)
    wrong = [name for name in expected if logits[name].shape != expected[name].shape]
    if wrong:
        raise ValueError(f"{variant.name}: {wrong[0]} has shape {tuple(logits[wrong[0]].shape)}")
    found = [relative_difference(logits[name], expected[name]) for name in expected]
    difference = math.nan if any(map(math.isnan, found)) else max(found)  # `max` passes NaN over
    rounds = variant.facts.get("quantization") is not None or variant.facts.get("exported")
    limit = _OTHER_LIMIT if rounds else LIMITS.get(variant.dtype, _OTHER_LIMIT)
    if not difference <= limit and not (first and variant.dtype != torch.float32):
        raise ValueError(
            f"{variant.name} answers differently from the model ({difference:.1e} of the largest logit, where "
            f"{limit:g} is rounding), so times of the two say nothing"
        )
    return difference


def _ratio(seconds: Mapping[str, Sequence[float]], name: str, baseline: str) -> float | None:
    if name not in seconds or baseline not in seconds:
        return None
    return statistics.median(seconds[name]) / statistics.median(seconds[baseline])
