"""Configuration of EoMT, the encoder-only mask transformer (CVPR 2025).

The fields of the plain ViT, plus queries, heads and loss (Kerssies et al., arXiv 2503.19108). A folder of Transformers'
own `eomt` or `eomt_dinov3` loads too: `transformers_eomt.py` translates its fields here, so nothing else has to.
"""

from collections.abc import Sequence
from typing import Any

from huggingface_hub.dataclasses import strict

from .checkpoint_json import StoredFields
from .configuration_plain_vit import PlainViTConfig, check_label_ids, check_limits
from .transformers_eomt import is_transformers_eomt, translate_config

LOSS_NORMALIZATIONS = ("global", "per_rank")
# Limits far beyond any published model, so that no file can ask for memory without end.
_LIMITS = {"num_queries": (1, 2**16), "num_upscale_blocks": (0, 8), "train_num_points": (1, 2**20)}
TOKEN_MERGING_ENDS = ("queries", "upscaling")
TOKEN_MERGING_BATCHES = ("lowest", "per_image")


@strict
class EoMTConfig(PlainViTConfig):
    """Configuration of `EoMTModel` and `EoMTForUniversalSegmentation`: the fields of `PlainViTConfig`, and these.

    Args:
        num_queries: number Q of queries, the most segments an image can have.
        num_query_layers: last blocks, in which the queries take part (the paper's L2).
        num_upscale_blocks: twofold upscalings before the mask product. `None` is max(1, floor(log2(patch_size)) - 2),
            which puts mask logits on a quarter of the input's resolution.
        masked_attention: `False` disables attention masks and intermediate predictions, also in training (the paper's
            "w/o masking").
        masked_attention_probabilities: per query layer, the probability that a query is confined to its own mask: 1 is
            masked attention, 0 mask-free, `None` 1 everywhere. Training draws by it; inference masks a layer from 0.5
            on. Change it with the model's `set_masked_attention_probabilities`.
        no_object_weight: weight of the no-object class in the class loss.
        class_weight: weight of the class loss in the total.
        mask_weight: weight of the binary cross-entropy in the total.
        dice_weight: weight of the dice loss in the total.
        train_num_points: points sampled per mask, in matching and in the loss.
        oversample_ratio: candidates drawn per point of the loss.
        importance_sample_ratio: share of the points taken where the prediction is least certain.
        loss_normalization: `"global"` divides by counts over all processes, so that N processes train like one;
            `"per_rank"` reproduces the official code.
        token_merging_threshold: mean cosine similarity from which inference merges 2 x 2 patches into one token (ALGM,
            arXiv 2406.09936); `None` merges nothing. These fields are set by the model's `merge_tokens`.
        token_merging_layers: numbers, from 1, of the block that merges windows and, if there are two, of the block that
            merges alike tokens anywhere; `None` is `merging_layers`.
        token_merging_end: when tokens go back on the grid: before the `"queries"` enter, or before `"upscaling"`, which
            is faster and needs attention without masks.
        token_merging_batch: `"lowest"` merges in all images of a batch as much as the one that allows the least, so
            answers depend on the batch; `"per_image"` runs the blocks image by image.
    """

    model_type = "segvit_eomt"
    keys_to_ignore_at_inference = [  # noqa: RUF012
        "loss_dict",
        "last_hidden_state",
        "hidden_states",
        "attentions",
        "content_sizes",
        "patch_offsets",
    ]

    num_queries: int = 200
    num_query_layers: int = 4
    num_upscale_blocks: int | None = None
    masked_attention: bool = True
    masked_attention_probabilities: list[float] | list[int] | list[float | int] | None = None
    no_object_weight: float | int = 0.1
    class_weight: float | int = 2.0
    mask_weight: float | int = 5.0
    dice_weight: float | int = 5.0
    train_num_points: int = 12544
    oversample_ratio: float | int = 3.0
    importance_sample_ratio: float | int = 0.75
    loss_normalization: str = "global"
    token_merging_threshold: float | int | None = None
    token_merging_layers: list[int] | None = None
    token_merging_end: str = "queries"
    token_merging_batch: str = "lowest"

    def __post_init__(self, **kwargs: Any):
        if self.num_upscale_blocks is None:
            # bit_length() - 1 is floor(log2).
            self.num_upscale_blocks = max(1, self.patch_size.bit_length() - 3)
        if self.masked_attention_probabilities is None and self.num_query_layers <= self.num_hidden_layers:
            self.masked_attention_probabilities = [1.0] * self.num_query_layers
        super().__post_init__(**kwargs)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> tuple[dict, dict]:
        """The fields of a saved configuration, translated if Transformers' own `eomt` wrote them."""
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if is_transformers_eomt(config_dict):
            path = getattr(config_dict, "path", StoredFields.path)
            config_dict = StoredFields(translate_config(config_dict))
            config_dict.path = path
        return config_dict, kwargs

    @property
    def upscale_factor(self) -> int:
        """Cells of the mask logits per patch along each axis, s."""
        return 2 ** (self.num_upscale_blocks or 0)

    @property
    def merging_layers(self) -> tuple[int, ...]:
        """The blocks that merge tokens: as set, or those of ALGM, 1 and 5 of 12 and 1 and 7 of 24."""
        if self.token_merging_layers is not None:
            return tuple(self.token_merging_layers)
        last = min(3 + self.num_hidden_layers // 6, self.num_hidden_layers - self.num_query_layers)
        return (1, last) if last > 1 else (1,)

    def criterion_arguments(self) -> dict[str, Any]:
        """Arguments of the `MaskCriterion` for this configuration."""
        return criterion_arguments(self)

    def check(self) -> None:
        """Refuse contradictory fields with a ValueError that names the field, its value and the remedy."""
        super().check()
        if not 1 <= self.num_query_layers <= self.num_hidden_layers:
            raise ValueError(
                f"num_query_layers={self.num_query_layers} must be between 1 and num_hidden_layers="
                f"{self.num_hidden_layers}: the queries join the last of the blocks"
            )
        check_label_ids(self.id2label)
        if self.num_upscale_blocks is None:
            raise ValueError("num_upscale_blocks=None must be a whole number")
        check_limits(self, _LIMITS)
        check_loss_fields(self)
        check_probabilities(self.masked_attention_probabilities, self.num_query_layers)
        self._check_token_merging()

    def _check_token_merging(self) -> None:
        threshold, layers = self.token_merging_threshold, self.token_merging_layers
        for name, choices in (
            ("token_merging_end", TOKEN_MERGING_ENDS),
            ("token_merging_batch", TOKEN_MERGING_BATCHES),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {choices}")
        last = self.num_hidden_layers - self.num_query_layers
        if layers is not None and not (
            len(layers) in (1, 2) and layers == sorted(set(layers)) and 1 <= layers[0] <= layers[-1] <= last
        ):
            raise ValueError(
                f"token_merging_layers={layers} must be one or two rising numbers of blocks from 1 to {last}, which "
                "the queries do not take part in; the first block merges windows, the second tokens anywhere"
            )
        if threshold is None:
            return
        if not 0 < threshold <= 1:
            raise ValueError(
                f"token_merging_threshold={threshold} is a cosine similarity, above 0 and at most 1, such as 0.9; None "
                "merges nothing"
            )
        if last < 1:
            raise ValueError(
                f"token_merging_threshold={threshold}: tokens are merged before the queries enter, but here they take "
                f"part in all {self.num_hidden_layers} blocks; leave it None"
            )


def criterion_arguments(config: Any) -> dict[str, Any]:
    """Arguments of the `MaskCriterion` for a configuration with its fields."""
    names = ["num_labels", "class_weight", "mask_weight", "dice_weight", "no_object_weight"]
    names += ["oversample_ratio", "importance_sample_ratio", "loss_normalization"]
    return {"num_points": config.train_num_points, **{name: getattr(config, name) for name in names}}


def check_loss_fields(config: Any) -> None:
    """Refuse impossible weights, samples and normalisation of the loss with a ValueError that names the field."""
    for name in ("no_object_weight", "class_weight", "mask_weight", "dice_weight"):
        if not 0 <= getattr(config, name) < 1e12:
            raise ValueError(f"{name}={getattr(config, name)} must not be negative, and finite")
    if not 1 <= config.oversample_ratio <= 100:
        raise ValueError(f"oversample_ratio={config.oversample_ratio} must be between 1 and 100")
    if not 0 <= config.importance_sample_ratio <= 1:
        raise ValueError(f"importance_sample_ratio={config.importance_sample_ratio} must be between 0 and 1")
    if config.loss_normalization not in LOSS_NORMALIZATIONS:
        raise ValueError(f"loss_normalization={config.loss_normalization!r} is not one of {LOSS_NORMALIZATIONS}")


def set_probabilities(
    config: Any, probabilities: float | Sequence[float], num_layers: int, layers: str = "query layers"
) -> None:
    """Set `masked_attention_probabilities` of a configuration, from one number for all layers or one for each.

    Raises:
        ValueError: they do not fit, or the model never masks attention.
    """
    values = checked_probabilities(probabilities, num_layers, layers)
    if not config.masked_attention and any(values):
        raise ValueError(
            f"masked_attention_probabilities={values}: the model has masked_attention=False, so there are no masks to "
            "anneal; leave them at 0, or build it with masked_attention=True"
        )
    # Kept in the config, so that every checkpoint has them.
    config.masked_attention_probabilities = values


def checked_probabilities(
    probabilities: float | Sequence[float], num_layers: int, layers: str = "query layers"
) -> list[float]:
    """One probability for each layer, from those or from one number for all; a ValueError if they do not fit."""
    if isinstance(probabilities, int | float):
        probabilities = [probabilities] * num_layers
    check_probabilities(probabilities, num_layers, layers)
    return [float(p) for p in probabilities]


def check_probabilities(probabilities: Any, num_layers: int, layers: str = "query layers") -> None:
    """Refuse, with a ValueError, probabilities that are not one number in [0, 1] per layer."""
    if (
        not isinstance(probabilities, list | tuple)
        or len(probabilities) != num_layers
        or not all(isinstance(p, int | float) and 0.0 <= p <= 1.0 for p in probabilities)
    ):
        raise ValueError(
            f"masked_attention_probabilities={probabilities} must hold one number in [0, 1] for each of the "
            f"{num_layers} {layers}"
        )
