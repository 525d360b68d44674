"""Time of 1, 10, 100 and 1000 points: in one pass with the image, and on an image that is encoded already.

Times do not depend on the weights, which are random here.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from measuring import machine

from hf_segvit.models.configuration_vit_p import ViTPConfig
from hf_segvit.models.modeling_vit_p import ViTPForPointClassification

NUMBERS = (1, 10, 100, 1000)
REPEATS, LARGE_REPEATS = 15, 3


def time_prompts(model_config: Callable[[str, str], ViTPConfig], difficulty: str, large: bool) -> Any:
    """Median processor time in milliseconds, on one thread, by model, way of asking and number of points."""
    configs = {"small, 96 px": lambda attention: model_config(attention, difficulty)}
    if large:
        configs["ViT-S/14, 518 px, random weights"] = lambda attention: ViTPConfig(
            hidden_size=384, num_attention_heads=6, intermediate_size=1536, prompt_attention=attention, num_labels=150
        )
    rows = {}
    for name, make in configs.items():
        torch.manual_seed(0)
        models = {attention: ViTPForPointClassification(make(attention)).eval() for attention in ("joint", "isolated")}
        side = models["joint"].config.image_height_width[0]
        rows[name] = _times(models, torch.randn(1, 3, side, side), LARGE_REPEATS if side > 96 else REPEATS)
    return {"milliseconds": rows, "machine": machine()}


@torch.inference_mode()
def _times(models: dict[str, Any], pixel_values: torch.Tensor, repeats: int) -> dict[str, dict[int, float]]:
    joint, isolated = models["joint"], models["isolated"]
    encoded = isolated.encode_image(pixel_values)
    ways: dict[str, Callable[[torch.Tensor], Any]] = {
        "joint, one pass": lambda prompts: joint(pixel_values, prompts),
        "isolated, one pass": lambda prompts: isolated(pixel_values, prompts),
        "isolated, encoded and asked": lambda prompts: isolated.classify_prompts(
            isolated.encode_image(pixel_values), prompts
        ),
        "isolated, asked of an encoded image": lambda prompts: isolated.classify_prompts(encoded, prompts),
    }
    times: dict[str, dict[int, list[float]]] = {way: {number: [] for number in NUMBERS} for way in ways}
    for repeat in range(repeats + 1):  # the ways take turns; the first time is a warm-up
        for number in NUMBERS:
            prompts = torch.cat([torch.rand(1, number, 2), torch.zeros(1, number, 2)], dim=-1)
            for way, ask in ways.items():
                start = time.process_time()
                ask(prompts)
                if repeat:
                    times[way][number].append(1e3 * (time.process_time() - start))
    return {way: {number: statistics.median(values) for number, values in row.items()} for way, row in times.items()}
