"""EoMT, the encoder-only mask transformer (CVPR 2025).

In order: outputs, the model with class head and loss, the model up to mask logits. Queries join the tokens of a plain
ViT in its last `num_query_layers` blocks; there is no decoder (Kerssies et al., arXiv 2503.19108).

Shapes: B batch, Q queries, C classes without no-object, D hidden size, H W pixels, h w patch grid,
s = 2 ** num_upscale_blocks. Tokens are ordered queries, CLS, registers, patches.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init
from transformers.models.auto.modeling_auto import MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES
from transformers.utils.generic import ModelOutput, can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_eomt import EoMTConfig, set_probabilities
from .cpu_kernels import in_autocast_type
from .inference_optimization import compile_module, queries_to_decode, refuse_masked_attention, take_queries
from .mask_criterion import MaskCriterion, MaskPrediction, validate_targets
from .mask_head import EoMTMaskHead, EoMTScaleBlock, attention_mask_from, initialize_by_default, mask_logits
from .modeling_plain_vit import PlainViTModel, PlainViTPreTrainedModel, misfits_name_the_flag
from .token_merging import (
    MergedTokens,
    compile_unless_merging,
    refuse_compiled,
    refuse_merging,
    refuse_merging_until_the_end,
)
from .transformers_eomt import transformers_eomt_arguments

_RECORDED = ("output_hidden_states", "output_attentions")


@dataclass
class EoMTModelOutput(ModelOutput):
    """Output of `EoMTModel`."""

    last_hidden_state: Tensor | None = None  # (B, Q + prefix + h * w, D), after the final norm
    masks_queries_logits: Tensor | None = None  # (B, Q, s * h, s * w), of the last layer, if they were to be decoded
    hidden_states: tuple[Tensor, ...] | None = None  # on request, input and output of every block
    attentions: tuple[Tensor, ...] | None = None  # on request, attention weights of every block
    # One entry per prediction, the final one last. Training predicts before every query layer, inference only before
    # masked ones.
    query_hidden_states: tuple[Tensor, ...] | None = None  # (B, Q, D), normed
    mask_queries: tuple[Tensor, ...] | None = None  # (B, Q, D) mask embeddings
    mask_features: tuple[Tensor, ...] | None = None  # (B, s * h, s * w, D) upscaled patches
    auxiliary_masks_queries_logits: tuple[Tensor, ...] | None = None  # all but the final one, without gradient


@dataclass
class EoMTForUniversalSegmentationOutput(ModelOutput):
    """Output of `EoMTForUniversalSegmentation`, as every Mask2Former-style post-processor takes it.

    With a `pruning_threshold`, Q is the number of queries that `kept_queries` names.
    """

    loss: Tensor | None = None  # total, summed over all predictions
    loss_dict: dict[str, Tensor] | None = None  # its unweighted terms by layer, without gradient
    class_queries_logits: Tensor | None = None  # (B, Q, C + 1), no-object last
    masks_queries_logits: Tensor | None = None  # (B, Q, s * h, s * w), before the sigmoid
    query_predictions: dict[str, Tensor] | None = None  # what a subclass predicts besides, by name (B, Q, ...)
    last_hidden_state: Tensor | None = None  # (B, Q + prefix + h * w, D), after the final norm
    hidden_states: tuple[Tensor, ...] | None = None  # on request, as in EoMTModelOutput
    attentions: tuple[Tensor, ...] | None = None  # on request, as in EoMTModelOutput
    kept_queries: Tensor | None = None  # (B, K) their indices, if queries were pruned
    # Passed through from the image processor to its post-processing.
    content_sizes: Tensor | None = None
    patch_offsets: Tensor | None = None


class EoMTPreTrainedModel(PlainViTPreTrainedModel):
    """Base of both EoMT models: loading, and the masked-attention probabilities."""

    config: EoMTConfig
    base_model_prefix = "eomt"
    _no_split_modules = ["PlainViTEmbeddings", "PlainViTLayer", "EoMTScaleLayer"]  # noqa: RUF012

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint of this package, or of Transformers' own `eomt` or `eomt_dinov3`.

        For a new label set pass `num_labels=...` or `id2label=...` with `ignore_mismatched_sizes=True`, which resets
        only the class head.
        """
        # The arguments of a translated checkpoint hold its configuration already.
        translated = transformers_eomt_arguments(cls, pretrained_model_name_or_path, kwargs)
        if translated is not None:
            with misfits_name_the_flag(pretrained_model_name_or_path):
                return super().from_pretrained(None, *args, **translated)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def set_masked_attention_probabilities(self, probabilities: float | Sequence[float]) -> None:
        """Set the probability that a query is confined to its own mask, one for all query layers or one for each."""
        set_probabilities(self.config, probabilities, self.config.num_query_layers)

    def merge_tokens(
        self,
        threshold: float | None,
        *,
        layers: Sequence[int] | None = None,
        end: str = "queries",
        batch: str = "lowest",
    ) -> Any:
        """Merge alike tokens in inference (ALGM), which gives other segments, or with `None` merge none; the model.

        Args:
            threshold: mean cosine similarity from which 2 x 2 patches become one token, such as 0.9.
            layers: numbers, from 1, of the block that merges windows and of the one that merges tokens anywhere, or of
                the first alone; `None`: those of ALGM.
            end: when tokens go back on the grid: before the `"queries"` enter, or before `"upscaling"`.
            batch: `"lowest"`: all images of a batch merge as much as the one that allows the least; `"per_image"`: the
                answer to an image does not depend on the others.

        Raises:
            ValueError: a value is impossible, or the model is compiled or masks attention with `end="upscaling"`.
        """
        config, layers = self.config, None if layers is None else list(layers)
        values = {"threshold": threshold, "layers": layers, "end": end, "batch": batch}
        before = {f"token_merging_{name}": getattr(config, f"token_merging_{name}") for name in values}
        try:
            for name, value in values.items():
                setattr(config, f"token_merging_{name}", value)
            config.check()
            if threshold is not None:
                refuse_compiled(self)
            if threshold is not None and end == "upscaling":
                refuse_merging_until_the_end(config)
        except Exception:
            for name, value in before.items():
                setattr(config, name, value)
            raise
        return self


class EoMTForUniversalSegmentation(EoMTPreTrainedModel):
    """EoMT with class head and loss.

    Override `predict_queries` for another head and `criterion_class` for its loss; to change only the loss, set
    `model.criterion`.
    """

    criterion_class = MaskCriterion

    def __init__(self, config: EoMTConfig):
        super().__init__(config)
        assert config.num_labels is not None  # id2label always names the classes
        self.num_labels = config.num_labels
        self.eomt = EoMTModel(config)
        self.class_predictor = nn.Linear(config.hidden_size, self.num_labels + 1)
        self.criterion = self.criterion_class.from_config(config)
        self.prunes_masks = False  # whether whoever knows the threshold should pass it to `forward`
        self.uses_cuda_graphs = False
        self.post_init()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "criterion" and type(value) is not MaskCriterion:
            # A record of the loss in every checkpoint. Nothing ever imports it: loading a checkpoint must not run code
            # that the checkpoint names.
            self.config.criterion = f"{type(value).__module__}:{type(value).__qualname__}"

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Called by Transformers for classes from a checkpoint's own code."""
        super().register_for_auto_class(auto_class)
        # The image segmentation pipeline accepts only models that this table names.
        MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES.setdefault(EoMTConfig.model_type, cls.__name__)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if module is self.class_predictor:
            initialize_by_default(self.class_predictor)

    def get_input_embeddings(self) -> nn.Module:
        """The module that turns pixels into tokens."""
        return self.eomt.get_input_embeddings()

    def optimize_for_inference(
        self,
        *,
        fuse_qkv: bool | None = None,
        channels_last: bool | None = None,
        prune_masks: bool = True,
        compile: bool | None = None,
        cuda_graphs: bool | None = None,
    ) -> "EoMTForUniversalSegmentation":
        """Make inference faster without another checkpoint or other segments; the model itself, in evaluation mode.

        A second call starts afresh.

        Args:
            fuse_qkv: compute queries, keys and values in one product; `None`: where that is faster.
            channels_last: lay out the kernels of convolutions channels-last; `None`: on accelerators.
            prune_masks: let `Segmenter` decode the masks only of queries that can pass its threshold.
            compile: compile all up to the mask features, once for each size of the input; `None`: on CUDA.
            cuda_graphs: replay compiled kernels as a CUDA graph; `None`: where compiled for CUDA.

        Raises:
            ValueError: attention is still masked, or this machine lacks what a switch needs.
        """
        refuse_masked_attention(self.config)
        super().optimize_for_inference(fuse_qkv=fuse_qkv, channels_last=channels_last)
        compile = compile_unless_merging(self.config, compile, self.device)
        compiled = compile_module(self.eomt, compile, cuda_graphs)
        self.uses_cuda_graphs = compiled and self.device.type == "cuda" and cuda_graphs is not False
        self.prunes_masks = prune_masks
        return self

    def predict_queries(self, queries: Tensor) -> dict[str, Tensor]:
        """`class_logits` (B, Q, C + 1), no-object last, of queries (B, Q, D) after the norm.

        A subclass may add others by name, each (B, Q, ...): the criterion gets them as `MaskPrediction.others`, and
        those of the last layer become the output's `query_predictions`.
        """
        return {"class_logits": self.class_predictor(queries)}

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        mask_labels: list[Tensor] | None = None,
        class_labels: list[Tensor] | None = None,
        loss_mask: Tensor | None = None,
        loss_normalizers: Tensor | None = None,
        outlier_map: Tensor | None = None,
        content_sizes: Tensor | None = None,
        patch_offsets: Tensor | None = None,
        task: str = "panoptic",
        pruning_threshold: float | None = None,
        **kwargs: Any,
    ) -> EoMTForUniversalSegmentationOutput:
        """Segment images, and compute the loss if labels are given.

        Args:
            pixel_values: (B, channels, H, W), normalised; H and W multiples of the patch size.
            mask_labels: per image, (n, H, W) masks of its segments; n may be 0 or exceed Q.
            class_labels: per image, (n,) int64 classes in [0, C).
            loss_mask: (B, H, W) bool, True for pixels that count in matching and loss; `None` counts all.
            loss_normalizers: of `criterion.count_normalizers`, for gradient accumulation; `None` counts this batch.
            outlier_map: (B, H, W) int8, 1 for pixels of objects that no class is for, 0 for others, -1 for void; read
                if `criterion.outlier_weight` is set.
            content_sizes: (B, 2), returned as given.
            patch_offsets: (B, 3), returned as given.
            task: of the post-processing that follows, for `pruning_threshold`.
            pruning_threshold: leave out queries that cannot pass this score or a higher one; changes no segment.
            kwargs: `output_hidden_states`, `output_attentions`, `return_dict`, and targets for a custom criterion:
                lists like `class_labels` whose names end with `_labels`, such as `box_labels`.
        """
        if (mask_labels is None) != (class_labels is None):
            given, missing = ("mask", "class") if class_labels is None else ("class", "mask")
            raise ValueError(f"{given}_labels came without {missing}_labels; the loss needs both")
        others = {name: kwargs.pop(name) for name in list(kwargs) if name.endswith("_labels")}
        outliers = {} if outlier_map is None else {"outlier_map": outlier_map}  # a criterion need not know them
        if mask_labels is not None and class_labels is not None:
            batch_size = pixel_values.shape[0]
            # Before the forward pass: bad labels should not cost one.
            validate_targets(mask_labels, class_labels, self.num_labels, batch_size, loss_mask, others=others)

        # How many masks are wanted depends on the data, so they are decoded after what may be compiled for one shape.
        prune = mask_labels is None and task != "semantic"
        threshold = pruning_threshold if prune else None
        if self.uses_cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        outputs = self.eomt(pixel_values, decode_masks=threshold is None, **kwargs)
        if threshold is not None:
            return self._pruned(outputs, task, threshold, content_sizes, patch_offsets)
        predicted = [self.predict_queries(queries) for queries in outputs.query_hidden_states]
        loss = loss_dict = None
        if mask_labels is not None and class_labels is not None:
            loss, loss_dict = self.criterion(
                self._predictions(outputs, predicted, class_labels),
                mask_labels,
                class_labels,
                loss_mask=loss_mask,
                normalizers=loss_normalizers,
                **outliers,
                **others,
            )
        return EoMTForUniversalSegmentationOutput(
            loss=loss,
            loss_dict=loss_dict,
            class_queries_logits=predicted[-1]["class_logits"],
            masks_queries_logits=self._own(outputs.masks_queries_logits),
            query_predictions=_others(predicted[-1]) or None,
            last_hidden_state=self._own(outputs.last_hidden_state),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            content_sizes=content_sizes,
            patch_offsets=patch_offsets,
        )

    def _pruned(
        self,
        outputs: EoMTModelOutput,
        task: str,
        threshold: float,
        content_sizes: Tensor | None,
        patch_offsets: Tensor | None,
    ) -> EoMTForUniversalSegmentationOutput:
        """The output with only those queries that may pass the threshold."""
        assert outputs.query_hidden_states is not None
        assert outputs.mask_queries is not None
        assert outputs.mask_features is not None
        predicted = self.predict_queries(outputs.query_hidden_states[-1])
        kept = queries_to_decode(predicted["class_logits"], task, threshold)
        predicted = {name: take_queries(values, kept) for name, values in predicted.items()}
        return EoMTForUniversalSegmentationOutput(
            class_queries_logits=predicted["class_logits"],
            masks_queries_logits=mask_logits(take_queries(outputs.mask_queries[-1], kept), outputs.mask_features[-1]),
            query_predictions=_others(predicted) or None,
            last_hidden_state=self._own(outputs.last_hidden_state),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            kept_queries=kept,
            content_sizes=content_sizes,
            patch_offsets=patch_offsets,
        )

    def _own(self, values: Tensor | None) -> Tensor | None:
        """A copy of what the next replay of a CUDA graph would overwrite."""
        return values.clone() if values is not None and self.uses_cuda_graphs else values

    def _predictions(
        self, outputs: EoMTModelOutput, predicted: list[dict[str, Tensor]], class_labels: list[Tensor]
    ) -> list[MaskPrediction]:
        counts = [min(len(labels), self.config.num_queries) for labels in class_labels]
        final_mask_logits = outputs.masks_queries_logits
        assert final_mask_logits is not None  # always made; optional only as a field of an output
        layers = zip(
            predicted,
            (*(outputs.auxiliary_masks_queries_logits or ()), final_mask_logits),
            outputs.mask_queries or (),
            outputs.mask_features or (),
            strict=True,
        )
        return [
            MaskPrediction(
                layer["class_logits"],
                masks.detach(),
                _MatchedMaskLogits(queries, features, counts),
                _others(layer),
                partial(mask_logits, queries, features),
            )
            for layer, masks, queries, features in layers
        ]


def _others(predicted: dict[str, Tensor]) -> dict[str, Tensor]:
    """Predictions of a subclass, all but the classes."""
    return {name: values for name, values in predicted.items() if name != "class_logits"}


@dataclass
class _MatchedMaskLogits:
    """Mask logits of the matched queries only, with gradient: a tenth of the masks carry all of the loss."""

    mask_queries: Tensor  # (B, Q, D)
    mask_features: Tensor  # (B, height, width, D)
    counts: list[int]  # matches per image

    def __call__(self, image_index: Tensor, query_index: Tensor) -> Tensor:
        """Logits (M, height, width) of the pairs (M,), (M,), which are ordered by image."""
        if joins_images(self.mask_features):
            return self._in_one_product(image_index, query_index)
        matched = self.mask_queries[image_index, query_index].split(self.counts)
        images = zip(matched, self.mask_features, strict=True)
        return torch.cat([mask_logits(queries[None], features[None])[0] for queries, features in images])

    def _in_one_product(self, image_index: Tensor, query_index: Tensor) -> Tensor:
        # Image by image, the gradients of the features, the largest of the model, would be put together by a copy.
        # Rows of images with fewer pairs are filled up with the first query, and left out of the result.
        batch_size, num_queries = self.mask_queries.shape[:2]
        most = max(self.counts)
        slots = [image * most + slot for image, count in enumerate(self.counts) for slot in range(count)]
        slot = torch.tensor(slots, dtype=torch.int64).to(image_index.device, non_blocking=True)
        rows = torch.zeros(batch_size * most, dtype=torch.int64, device=image_index.device)
        rows[slot] = image_index * num_queries + query_index
        queries = self.mask_queries.flatten(0, 1).index_select(0, rows).unflatten(0, (batch_size, most))
        # Features times queries: the other way round the gradient of the features would come transposed.
        cells = self.mask_features.flatten(1, 2) @ queries.transpose(1, 2)
        logits = cells.transpose(1, 2).flatten(0, 1).index_select(0, slot)
        return logits.unflatten(1, self.mask_features.shape[1:3])


def joins_images(mask_features: Tensor) -> bool:
    """Whether masks of all images are computed in one product: not on a CPU, where filling up costs more."""
    return mask_features.device.type != "cpu"


class EoMTModel(EoMTPreTrainedModel, PlainViTModel):
    """The plain ViT with queries, up to mask logits."""

    _keys_to_ignore_on_load_unexpected = [r"^class_predictor\."]  # noqa: RUF012

    def __init__(self, config: EoMTConfig):
        super().__init__(config)
        self.query = nn.Embedding(config.num_queries, config.hidden_size)
        self.mask_head = EoMTMaskHead(config.hidden_size, config.hidden_act)
        self.upscale_block = EoMTScaleBlock(config.hidden_size, config.hidden_act, config.num_upscale_blocks or 0)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if module is self.query:
            init.normal_(module.weight)
        elif isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d) and any(
            module is layer for head in (self.mask_head, self.upscale_block) for layer in head.modules()
        ):
            initialize_by_default(module)
        else:
            super()._init_weights(module)

    @merge_with_config_defaults
    @capture_outputs
    def forward(self, pixel_values: Tensor, decode_masks: bool = True, **kwargs: Any) -> EoMTModelOutput:
        """Encode images (B, channels, H, W), normalised, with sides that are multiples of the patch size.

        Without `decode_masks` the last layer's mask logits are left to the caller. `kwargs` are
        `output_hidden_states`, `output_attentions` (needs the eager back-end) and `return_dict`.
        """
        # Probabilities are annealed to 0 in training. Inference is then a plain ViT without intermediate predictions,
        # data-dependent control flow or device syncs.
        config = self.config
        first_query_layer = config.num_hidden_layers - config.num_query_layers
        probabilities = config.masked_attention_probabilities or []
        grid_size = (pixel_values.shape[-2] // config.patch_size, pixel_values.shape[-1] // config.patch_size)
        hidden_states = self.embeddings(pixel_values)
        position_embeddings = self.position_embeddings_for(pixel_values, config.num_prefix_tokens)
        predictions: list[_Prediction] = []
        num_merged_layers = 0
        if config.token_merging_threshold is not None:
            recorded = any(kwargs.get(name, getattr(config, name, False)) for name in _RECORDED)
            refuse_merging(self, pixel_values, recorded)
            until_the_end = config.token_merging_end == "upscaling"
            num_merged_layers = config.num_hidden_layers if until_the_end else first_query_layer
            images = hidden_states.split(1) if config.token_merging_batch == "per_image" else [hidden_states]
            hidden_states = torch.cat([self._run_merged(each, grid_size, num_merged_layers) for each in images])
        for index in range(num_merged_layers, config.num_hidden_layers):
            layer, leading_mask = self.layers[index], None
            if index == first_query_layer:
                hidden_states = self._with_queries(hidden_states)
                num_prefix_tokens = config.num_queries + config.num_prefix_tokens
                position_embeddings = self.position_embeddings_for(pixel_values, num_prefix_tokens)
            if index >= first_query_layer and config.masked_attention:
                probability = probabilities[index - first_query_layer]
                # Inference must not be random: a layer is masked if it was so more often than not.
                masked = probability > 0 if self.training else probability >= 0.5
                # Training predicts before mask-free layers too, for the loss of every layer.
                if self.training or masked:
                    predictions.append(self._predict(self.layernorm(hidden_states), grid_size, final=False))
                if masked:
                    keep = None
                    if self.training and probability < 1:
                        shape = (hidden_states.shape[0], config.num_queries)
                        keep = torch.rand(shape, device=hidden_states.device) <= probability
                    layer_logits = predictions[-1].mask_logits
                    assert layer_logits is not None  # left out only of the final prediction
                    leading_mask = attention_mask_from(layer_logits, grid_size, config.num_prefix_tokens, keep)
            hidden_states = layer(hidden_states, position_embeddings, leading_mask)

        last_hidden_state = self.layernorm(hidden_states)
        predictions.append(self._predict(last_hidden_state, grid_size, final=True, decode=decode_masks))
        return EoMTModelOutput(
            last_hidden_state=last_hidden_state,
            masks_queries_logits=predictions[-1].mask_logits,
            query_hidden_states=tuple(p.queries for p in predictions),
            mask_queries=tuple(p.mask_queries for p in predictions),
            mask_features=tuple(p.mask_features for p in predictions),
            auxiliary_masks_queries_logits=tuple(p.mask_logits for p in predictions[:-1] if p.mask_logits is not None),
        )

    def _with_queries(self, hidden_states: Tensor) -> Tensor:
        queries = self.query.weight.to(hidden_states.dtype).expand(hidden_states.shape[0], -1, -1)
        return torch.cat((queries, hidden_states), dim=1)

    def _run_merged(self, hidden_states: Tensor, grid_size: tuple[int, int], num_layers: int) -> Tensor:
        """Run the first blocks with token merging; tokens (B, prefix + h * w, D) come back on the grid."""
        config = self.config
        tokens = MergedTokens(config, grid_size, config.num_prefix_tokens, hidden_states.device)
        merges = [tokens.merge_windows, partial(tokens.merge_alike, layer=config.merging_layers[-1])]
        merge_after = dict(zip(config.merging_layers, merges, strict=False))
        position_embeddings = tokens.position_embeddings()
        for number, layer in enumerate(self.layers[:num_layers], start=1):
            if number == config.num_hidden_layers - config.num_query_layers + 1:
                hidden_states = self._with_queries(hidden_states)
                tokens.num_prefix_tokens += config.num_queries
                position_embeddings = tokens.position_embeddings()
            hidden_states = layer(hidden_states, position_embeddings, merge=merge_after.get(number))
            if number in merge_after:
                position_embeddings = tokens.position_embeddings()
        return tokens.unmerge(hidden_states)

    def _predict(
        self, normed_states: Tensor, grid_size: tuple[int, int], final: bool, decode: bool = True
    ) -> "_Prediction":
        num_queries = self.config.num_queries
        queries = normed_states[:, :num_queries]
        patches = normed_states[:, num_queries + self.config.num_prefix_tokens :]
        mask_queries = self.mask_head(queries)
        patches = in_autocast_type(patches.unflatten(1, grid_size))
        if final:
            mask_features = self.upscale_block(patches)
            logits = mask_logits(mask_queries, mask_features) if decode else None
        else:
            if self.training and torch.is_grad_enabled():
                # Recomputed in the backward pass: the inner activations of upscaling are the largest of the model.
                # The final prediction keeps its own: it comes first in the backward pass, so the peak is the same.
                mask_features = checkpoint(self.upscale_block, patches, use_reentrant=False)
            else:
                mask_features = self.upscale_block(patches)
            # Matching and attention masks need no gradient; the loss recomputes its few masks. Matching reads all
            # queries of a cell at once, hence the channels-last layout.
            with torch.no_grad():
                # One product per image: queries broadcast over rows would be copied for each of them.
                cells = mask_features.flatten(1, 2) @ mask_queries.transpose(1, 2)
                logits = cells.unflatten(1, mask_features.shape[1:3]).permute(0, 3, 1, 2)
        return _Prediction(queries, mask_queries, mask_features, logits)


@dataclass
class _Prediction:
    queries: Tensor  # (B, Q, D), normed
    mask_queries: Tensor  # (B, Q, D)
    mask_features: Tensor  # (B, s * h, s * w, D)
    mask_logits: Tensor | None  # (B, Q, s * h, s * w)
