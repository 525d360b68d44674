"""Comparing a converted model with the one it came from, by a forward pass of both on one random picture."""

from typing import Any

import torch

from ..models.modeling_eomt import EoMTForUniversalSegmentation


@torch.no_grad()
def compare_with_transformers(ours: EoMTForUniversalSegmentation, theirs: Any, tolerance: float) -> str:
    """Compare with Transformers' `eomt` or `eomt_dinov3`, both without attention masks.

    Masks are a step function of logits: where one is nearly 0 they may differ though all weights are equal. What is
    compared passes through all weights all the same.

    Args:
        ours: our model; left as it was.
        theirs: Transformers' model; left as it was, in evaluation mode.
        tolerance: as for `compare_outputs`.

    Returns:
        A line that says what was compared and how close it is.

    Raises:
        ValueError: the outputs differ by more.
    """
    config, size = ours.config, ours.config.image_height_width
    weight = next(ours.parameters())
    generator = torch.Generator().manual_seed(0)
    pixel_values = torch.randn(1, config.num_channels, *size, generator=generator).to(weight.device, weight.dtype)
    kept = ours.training, config.masked_attention_probabilities, theirs.attn_mask_probs.clone()
    try:
        config.masked_attention_probabilities = [0.0] * config.num_query_layers
        theirs.attn_mask_probs.zero_()
        our_outputs, their_outputs = ours.eval()(pixel_values), theirs.eval()(pixel_values)
    finally:
        ours.train(kept[0])
        config.masked_attention_probabilities = kept[1]
        theirs.attn_mask_probs.copy_(kept[2])
    return compare_outputs(
        {name: (our_outputs[name], their_outputs[name]) for name in ("class_queries_logits", "masks_queries_logits")},
        tolerance,
        "Transformers' model",
    )


def compare_outputs(pairs: dict[str, tuple[torch.Tensor, torch.Tensor]], tolerance: float, reference: str) -> str:
    """Compare tensors that should be equal.

    Args:
        pairs: name to our output and the reference's.
        tolerance: largest difference allowed, as a share of the reference's largest value (1 at least). In half
            precision eight of its rounding steps are allowed.
        reference: what the second ones come from, for the message.

    Returns:
        A line that says how close they are.

    Raises:
        ValueError: they differ by more; the message names the output and the difference.
    """
    worst = 0.0
    for name, (ours, theirs) in pairs.items():
        if ours.shape != theirs.shape:
            raise ValueError(f"{name} has shape {tuple(ours.shape)} here and {tuple(theirs.shape)} in {reference}")
        allowed = tolerance if ours.dtype == torch.float32 else 8 * torch.finfo(ours.dtype).eps
        scale = max(1.0, float(theirs.float().abs().max()))
        difference = float((ours.float() - theirs.float()).abs().max()) / scale
        if not difference <= allowed:  # NaN too
            raise ValueError(
                f"the converted model does not compute what {reference} does: {name} differs by {difference:.1e} of "
                "its largest value; nothing was written"
            )
        worst = max(worst, difference)
    return f"checked: outputs equal those of {reference} to {worst:.0e} of their largest value"
