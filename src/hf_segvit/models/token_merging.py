"""Token merging for inference: alike patches become one token (ALGM).

Adaptive local-then-global merging (Norouzi et al., CVPR 2024, arXiv 2406.09936), written from the papers. Between
attention and MLP of an early block every 2 x 2 window whose tokens are alike becomes one token; in a middle block any
two alike tokens do. EoMT's paper (section A.3) adds the rule for batches. `MergedTokens` knows which patches became one
token and puts them back on the grid.

Shapes: B batch, P prefix tokens, N = h * w patches, M tokens that are left of them, D hidden size, E channels of one
head.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import logging

from .plain_vit_layers import rotary_angles

logger = logging.get_logger(__name__)

_ROUNDING = 1e-5  # exceeds the error of a cosine in fp32, so that equal tokens pass a threshold of 1


class MergedTokens:
    """The patches of one forward pass, with whatever tokens they were merged into.

    A merged token is the mean of its patches. Learned positions were added to the patches, so it has the mean of
    theirs; its rotary angles are the mean of its patches' angles, which is the angle at their mean position.

    Args:
        config: an `EoMTConfig`.
        grid_size: (h, w), both even.
        num_prefix_tokens: P; the caller raises the attribute when tokens are put in front.
        device: of the tokens.
    """

    def __init__(self, config: Any, grid_size: tuple[int, int], num_prefix_tokens: int, device: torch.device):
        self.config, self.grid_size, self.num_prefix_tokens = config, grid_size, num_prefix_tokens
        self.sizes: Tensor | None = None  # (B, M) patches of each token; `None`: one each
        self.indices: Tensor | None = None  # (B, N) the token of each patch; `None`: its own
        self.angles: Tensor | None = None  # (1 or B, M, E)
        if config.has_rotary_positions:
            head_size = config.hidden_size // config.num_attention_heads
            self.angles = rotary_angles(
                grid_size, head_size, config.rope_theta, device, config.rope_reference_grid, config.rope_offset
            )[None]

    def position_embeddings(self) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines (1 or B, 1, P + M, E) of all tokens, or `None` if positions are only learned."""
        if self.angles is None:
            return None
        angles = F.pad(self.angles, (0, 0, self.num_prefix_tokens, 0))[:, None]
        return angles.cos(), angles.sin()

    def merge_windows(self, hidden_states: Tensor) -> Tensor:
        """Merge the 2 x 2 windows whose mean cosine similarity reaches the threshold.

        Tokens (B, P + N, D) become (B, P + M, D): merged windows first, then the patches of the others by window.
        """
        prefix, patches = self._split(hidden_states)
        height, width = self.grid_size
        # (N,) patches in the order of their windows.
        order = torch.arange(height * width, device=patches.device).view(height // 2, 2, width // 2, 2)
        members = order.transpose(1, 2).flatten()
        windows = patches[:, members].unflatten(1, (-1, 4))
        # The square of a sum of four unit vectors is 4 and twice each of the 6 cosines.
        total = F.normalize(windows.float(), dim=-1).sum(2)
        similarities = (total.square().sum(-1) - 4) / 12
        merged, kept = self._best(similarities, self.config.token_merging_threshold)

        def merge(values: Tensor) -> Tensor:
            values = values.expand(len(patches), -1, -1)[:, members].unflatten(1, (-1, 4))
            return torch.cat((_rows(values, merged).mean(2), _rows(values, kept).flatten(1, 2)), dim=1)

        count, num_kept = merged.shape[1], kept.shape[1]
        first = torch.arange(count, device=patches.device)[:, None].expand(-1, 4)
        rest = count + torch.arange(4 * num_kept, device=patches.device).view(-1, 4)
        by_window = _rank(torch.cat((merged, kept), dim=1))
        self.indices = torch.empty(patches.shape[:2], dtype=torch.long, device=patches.device)
        self.indices[:, members] = torch.cat((first, rest))[by_window].flatten(1)
        self.sizes = patches.new_ones((len(patches), count + 4 * num_kept), dtype=torch.float32)
        self.sizes[:, :count] = 4
        if self.angles is not None:
            self.angles = merge(self.angles)
        return torch.cat((prefix, merge(patches)), dim=1)

    def merge_alike(self, hidden_states: Tensor, layer: int) -> Tensor:
        """Merge tokens with the ones that are most like them, after `merge_windows`.

        Every second token may join the token between them that has the highest cosine similarity. A pair is merged from
        the image's mean of these similarities on, plus their standard deviation over `layer`, the block's number from
        1. Tokens (B, P + M, D) become those that stay, then those that others may have joined.
        """
        prefix, patches = self._split(hidden_states)
        assert self.sizes is not None
        assert self.indices is not None
        if patches.shape[1] < 2:
            return hidden_states
        unit = F.normalize(patches.float(), dim=-1)
        similarities, partners = (unit[:, 0::2] @ unit[:, 1::2].transpose(1, 2)).max(-1)
        threshold = similarities.mean(1) + similarities.std(1, correction=0) / layer
        merged, kept = self._best(similarities, threshold[:, None])
        sizes, partners = self.sizes, partners.gather(1, merged)
        joined = sizes[:, 1::2].scatter_add(1, partners, sizes[:, 0::2].gather(1, merged))

        def merge(values: Tensor) -> Tensor:
            weighted = values.float() * sizes[..., None]
            index = partners[..., None].expand(-1, -1, values.shape[-1])
            totals = weighted[:, 1::2].scatter_add(1, index, _rows(weighted[:, 0::2], merged))
            means = (totals / joined[..., None]).to(values.dtype)
            return torch.cat((_rows(values[:, 0::2], kept), means), dim=1)

        # Where each token went: first those that stayed, then the partners.
        count = kept.shape[1]
        moved = torch.empty(patches.shape[:2], dtype=torch.long, device=patches.device)
        moved[:, 1::2] = torch.arange(count, count + joined.shape[1], device=patches.device)
        stayed = torch.arange(count, device=patches.device).expand_as(kept)
        moved[:, 0::2] = moved[:, 0::2].scatter(1, kept, stayed).scatter(1, merged, count + partners)
        self.indices = moved.gather(1, self.indices)
        self.sizes = torch.cat((sizes[:, 0::2].gather(1, kept), joined), dim=1)
        if self.angles is not None:
            self.angles = merge(self.angles)
        return torch.cat((prefix, merge(patches)), dim=1)

    def unmerge(self, hidden_states: Tensor) -> Tensor:
        """Put tokens (B, P + M, D) back on the grid, (B, P + N, D): each patch gets a copy of its token."""
        if self.indices is None:
            return hidden_states
        prefix, patches = self._split(hidden_states)
        return torch.cat((prefix, _rows(patches, self.indices)), dim=1)

    def _split(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        return hidden_states[:, : self.num_prefix_tokens], hidden_states[:, self.num_prefix_tokens :]

    def _best(self, similarities: Tensor, threshold: float | Tensor) -> tuple[Tensor, Tensor]:
        """Rising indices (B, K) of what is merged and (B, rest) of what is not."""
        count = lowest_count(similarities >= threshold - _ROUNDING)
        order = similarities.argsort(dim=1, descending=True, stable=True)
        return order[:, :count].sort(1).values, order[:, count:].sort(1).values


def lowest_count(passing: Tensor) -> int:
    """The lowest number of merges (B, candidates) that an image of the batch allows, so that all have equal lengths."""
    return int(passing.sum(1).amin())  # waits for the device


def _rows(values: Tensor, indices: Tensor) -> Tensor:
    """Rows `indices` (B, K) of values (B, M, ...)."""
    return values[torch.arange(len(values), device=values.device)[:, None], indices]


def _rank(order: Tensor) -> Tensor:
    """The inverse of permutations (B, K)."""
    ranks = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, ranks)


def refuse_odd_grid(size: tuple[int, int], patch_size: int) -> None:
    """Refuse an input of (height, width) pixels that 2 x 2 windows of patches do not cover."""
    rows, columns = (length // patch_size for length in size)
    if rows % 2 or columns % 2:
        raise ValueError(
            f"token merging takes windows of 2 x 2 patches, but {size[0]} x {size[1]} pixels are {rows} x {columns} "
            f"patches; use sides that are multiples of {2 * patch_size}, or turn it off with model.merge_tokens(None)"
        )


def refuse_merging(model: Any, pixel_values: Tensor, recorded: bool) -> None:
    """Refuse a forward pass that cannot merge tokens, with a ValueError that says why and what to do.

    Args:
        model: whose configuration asks for token merging.
        pixel_values: its input.
        recorded: whether hidden states or attention weights are to be returned.
    """
    off = "turn it off with model.merge_tokens(None)"
    if model.training:
        raise ValueError(f"token merging is for inference: call model.eval(), or, before training, {off}")
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        raise ValueError(
            "token merging cannot be compiled or exported, as its number of tokens depends on the image; run it eagerly"
            f", or {off}"
        )
    if recorded:
        raise ValueError(
            f"hidden states and attention weights of merged tokens do not line up with the patches; {off} to get them"
        )
    if model.config.token_merging_end == "upscaling":
        refuse_merging_until_the_end(model.config)
    height, width = pixel_values.shape[-2:]
    refuse_odd_grid((height, width), model.config.patch_size)


def refuse_merging_until_the_end(config: Any) -> None:
    """Refuse merged tokens in query layers that mask attention, for which patches have to be on the grid."""
    masked = [value for value in config.masked_attention_probabilities or [] if value >= 0.5]
    if config.masked_attention and masked:
        raise ValueError(
            f"token merging with end='upscaling' needs attention without masks, but {len(masked)} of "
            f"{config.num_query_layers} query layers mask it (masked_attention_probabilities="
            f"{config.masked_attention_probabilities}); use end='queries', or anneal the masks by training to the end"
        )


def refuse_compiled(model: Any) -> None:
    """Refuse a model of which `optimize_for_inference` compiled a part."""
    if any(getattr(module, "_compiled_call_impl", None) is not None for module in model.modules()):
        raise ValueError(
            "the model is compiled, but token merging makes the number of tokens depend on the image; call "
            "model.optimize_for_inference(compile=False) first"
        )


def compile_unless_merging(config: Any, compile: bool | None, device: torch.device) -> bool | None:
    """What `compile` becomes for a model that may merge tokens: False, said on CUDA, where it would be the default.

    Raises:
        ValueError: both were asked for.
    """
    if config.token_merging_threshold is None:
        return compile
    reason = "token merging makes the number of tokens depend on the image"
    if compile:
        raise ValueError(f"compile=True: {reason}; turn it off with model.merge_tokens(None), or leave compile out")
    if compile is None and device.type == "cuda":
        logger.warning(f"the model runs uncompiled, as {reason}; what merging gains has to make up for that")
    return False
