"""Mask annealing for Mask2Former: masked attention by a probability per layer.

Stock Mask2Former masks the cross-attention of every layer of its transformer decoder, in inference too, so it needs
ten mask predictions where one is asked for. `enable_mask_annealing` gives a model of Transformers the fields of EoMT's
configuration, `masked_attention` and `masked_attention_probabilities`; once they are annealed to 0, only the final
prediction is left (Table C of EoMT, arXiv 2503.19108).

Shapes: B batch, Q queries, E channels of the decoder, h w cells of the mask logits, L keys of a layer's feature map.
"""

from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Mask2FormerForUniversalSegmentation
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerMaskedAttentionDecoder,
    Mask2FormerMaskedAttentionDecoderOutput,
)

from .configuration_eomt import checked_probabilities, set_probabilities


class MaskAnnealedDecoder(Mask2FormerMaskedAttentionDecoder):
    """Mask2Former's transformer decoder with a probability of masked attention for each of its layers.

    Attributes:
        annealing_config: the model's configuration, of which `masked_attention` and `masked_attention_probabilities`
            are read. Training predicts before every layer, for the loss of every layer, unless `masked_attention` is
            `False`; inference only before layers that are masked, which are those with a probability of at least 0.5.
    """

    annealing_config: Any

    def forward(  # type: ignore[override]
        self,
        inputs_embeds: Tensor,
        multi_stage_positional_embeddings: Sequence[Tensor],
        pixel_embeddings: Tensor,
        encoder_hidden_states: Sequence[Tensor],
        query_position_embeddings: Tensor | None = None,
        feature_size_list: Sequence[torch.Size] = (),
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Update queries (Q, B, E); the interface and outputs of the class this derives from."""
        config = self.annealing_config
        states = inputs_embeds
        predictions: list[Tensor] = []
        normed: list[Tensor] = []
        all_states: list[Tensor] = [states]
        attentions: list[Tensor] = []
        for index, layer in enumerate(self.layers):
            if self.training and self.layerdrop > 0 and torch.rand([]) < self.layerdrop:
                continue
            level = index % self.num_feature_levels
            probability = config.masked_attention_probabilities[index] if config.masked_attention else 0.0
            # As in EoMT: inference must not be random, and a layer is masked if it was so more often than not.
            masked = probability > 0 if self.training else probability >= 0.5
            closed = None
            if masked or (self.training and config.masked_attention):
                normed.append(self.layernorm(states))
                predictions.append(self._predict(normed[-1], pixel_embeddings))
            if masked:
                keep = None
                if self.training and probability < 1:
                    keep = torch.rand(predictions[-1].shape[:2], device=states.device) <= probability
                closed = self._closed_keys(predictions[-1], feature_size_list[level], keep)
            # By position where gradient checkpointing needs it.
            outputs = layer(
                states,
                level,
                None,
                multi_stage_positional_embeddings,
                query_position_embeddings,
                encoder_hidden_states,
                encoder_attention_mask=closed,
                output_attentions=output_attentions,
            )
            states = outputs[0]
            all_states.append(states)
            if output_attentions:
                attentions.append(outputs[1])
        normed.append(self.layernorm(states))
        predictions.append(self._predict(normed[-1], pixel_embeddings))
        fields: dict[str, Any] = {
            "last_hidden_state": states.transpose(0, 1),
            "hidden_states": tuple(all_states) if output_hidden_states else None,
            "attentions": tuple(attentions) if output_attentions else None,
            "intermediate_hidden_states": tuple(normed),
            "masks_queries_logits": tuple(predictions),
        }
        output = Mask2FormerMaskedAttentionDecoderOutput(**fields)
        return output.to_tuple() if return_dict is False else output

    def _predict(self, normed: Tensor, pixel_embeddings: Tensor) -> Tensor:
        """Mask logits (B, Q, h, w), without the attention mask that `mask_predictor` makes along with them."""
        embeddings = self.mask_predictor.mask_embedder(normed.transpose(0, 1))
        return torch.einsum("bqc, bchw -> bqhw", embeddings, pixel_embeddings)

    def _closed_keys(self, logits: Tensor, size: torch.Size, keep: Tensor | None) -> Tensor:
        """Keys that queries must not see, boolean (B * heads, Q, L): those outside of their masks.

        Args:
            logits: (B, Q, h, w).
            size: height and width of the feature map, L cells.
            keep: boolean (B, Q), True for queries that are confined to their mask; `None` confines all.
        """
        with torch.no_grad():
            inside = F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)
            closed = inside.flatten(2).sigmoid() < 0.5  # not logits < 0, which rounds differently in half precision
            # A query whose mask is empty sees everything; without a key, attention would be 0 / 0.
            closed = closed & ~closed.all(-1, keepdim=True)
            if keep is not None:
                closed = closed & keep[..., None]
            return closed.repeat_interleave(self.mask_predictor.num_heads, dim=0)


def anneal_decoder(decoder: Mask2FormerMaskedAttentionDecoder, config: Any) -> None:
    """Turn a decoder of Transformers into a `MaskAnnealedDecoder` that follows `config`, in place."""
    # The same module with another forward: names of weights, hooks and devices stay as they are.
    decoder.__class__ = MaskAnnealedDecoder
    decoder.annealing_config = config


def enable_mask_annealing(
    model: Mask2FormerForUniversalSegmentation,
    probabilities: float | Sequence[float] | None = None,
    *,
    masked_attention: bool | None = None,
) -> Mask2FormerForUniversalSegmentation:
    """Let masked attention of a Mask2Former of Transformers be annealed, in place; the model itself.

    Its configuration gets `masked_attention` and `masked_attention_probabilities`, which are saved with it, and the
    model `set_masked_attention_probabilities`, so that `MaskAnnealingCallback` works on it. At 1, the default, it
    answers as before. Stock Transformers loads the saved model but ignores both fields: call this again after
    `from_pretrained`; the loaders of this package do.

    Args:
        model: with weights of any origin.
        probabilities: that a query is confined to its own mask, one for all layers of the decoder or one for each;
            `None`: those of the configuration, or 1.
        masked_attention: `False` never masks, and predicts and supervises the final masks only; `None`: as the
            configuration says, or `True`.

    Raises:
        ValueError: the model is no Mask2Former of Transformers, or the probabilities do not fit.
    """
    if not isinstance(model, Mask2FormerForUniversalSegmentation):
        hint = (
            "it has masked_attention_probabilities already; call set_masked_attention_probabilities"
            if hasattr(model, "set_masked_attention_probabilities")
            else "its attention has no masks to anneal; give a Mask2FormerForUniversalSegmentation"
        )
        raise ValueError(f"{type(model).__name__} is no Mask2Former of Transformers: {hint}")
    config, decoder = model.config, model.model.transformer_module.decoder
    stored = getattr(config, "masked_attention_probabilities", None)
    if masked_attention is None:
        masked_attention = getattr(config, "masked_attention", True)
    if not isinstance(masked_attention, bool):
        raise ValueError(f"masked_attention={masked_attention!r} must be true or false")
    if probabilities is None:
        probabilities = 0.0 if not masked_attention else 1.0 if stored is None else stored
    elif not masked_attention:
        raise ValueError(f"masked_attention=False leaves no masks that probabilities={probabilities} could open")
    checked = checked_probabilities(probabilities, len(decoder.layers), "decoder layers")
    config.masked_attention, config.masked_attention_probabilities = masked_attention, checked
    anneal_decoder(decoder, config)
    annealed: Any = model
    annealed.set_masked_attention_probabilities = MethodType(_set_probabilities, model)
    return model


def restore_mask_annealing(model: Any) -> Any:
    """Enable mask annealing on a loaded model whose configuration was saved with it; the model itself."""
    saved = getattr(model.config, "masked_attention_probabilities", None) is not None
    return enable_mask_annealing(model) if saved and isinstance(model, Mask2FormerForUniversalSegmentation) else model


def _set_probabilities(model: Any, probabilities: float | Sequence[float]) -> None:
    """Set the probability that a query is confined to its own mask, one for all decoder layers or one for each."""
    set_probabilities(model.config, probabilities, len(model.model.transformer_module.decoder.layers), "decoder layers")
