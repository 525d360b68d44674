"""Configuration of the plain Vision Transformer behind EoMT and ViT-P.

One flat set of fields describes every supported family: a family is a choice of values, never a subclass.
`PlainViTConfig.check` refuses impossible combinations, for all models in one place.
"""

from collections.abc import Mapping
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN

from .checkpoint_json import MAX_LABELS, StoredConfig, check_fields, errors_name, path_of, shown

POSITION_EMBEDDING_TYPES = ("learned", "rope", "learned_rope")
MLP_TYPES = ("mlp", "swiglu")
# Limits far beyond any published model, so that no file can ask for memory without end.
_LIMITS = {
    "hidden_size": (1, 2**16),
    "num_hidden_layers": (1, 1000),
    "num_attention_heads": (1, 2**12),
    "intermediate_size": (1, 2**18),
    "patch_size": (1, 512),
    "num_channels": (1, 4096),
    "num_register_tokens": (0, 4096),
}
MAX_IMAGE_SIDE = 2**15


@strict
class PlainViTConfig(StoredConfig):
    """Configuration of a `PlainViTModel`; the defaults are DINOv2 ViT-L with registers, patch 16, 640 pixels.

    Args:
        hidden_size: width D of a token.
        num_hidden_layers: number of blocks.
        num_attention_heads: heads per block; must divide `hidden_size`.
        intermediate_size: hidden width of the MLP (of each half with `mlp_type="swiglu"`).
        patch_size: side of a patch in pixels.
        image_size: pixels, an int or `[height, width]`. Sets the size of the table of learned position embeddings,
            which is resampled for other inputs.
        num_channels: channels of `pixel_values`.
        use_cls_token: whether a CLS token comes first (SigLIP has none).
        num_register_tokens: register tokens between the CLS token and the patches.
        position_embedding_type: `"learned"` (a table added to the patches, DINOv2), `"rope"` (rotary, on the patches
            in every block, DINOv3) or `"learned_rope"` (both, EVA-02).
        rope_theta: base of the rotary frequencies.
        rope_reference_grid: `None` maps patch centres to [-1, 1] (DINOv3). A number counts patches on a square grid
            with that many rows, onto which every image is stretched (EVA-02).
        rope_offset: rotary coordinate of the first patch, in patches; needs `rope_reference_grid` (1 in Perception
            Encoder).
        embedding_norm: whether tokens are normalised before the first block (Perception Encoder).
        attention_norm: whether the heads' output is normalised before its projection (EVA-02-CLIP).
        hidden_act: activation of the MLP and of EoMT's heads.
        mlp_type: `"mlp"` (two linear layers) or `"swiglu"` (gated, DINOv2 giant).
        gate_act: activation of the gate with `mlp_type="swiglu"`.
        mlp_norm: whether the gated product is normalised; needs `mlp_type="swiglu"` (EVA-02 B, L).
        key_bias: whether the key projection has a bias (not in DINOv3).
        final_norm: whether tokens are normalised after the last block (not in Perception Encoder spatial).
        layer_norm_eps: epsilon of every LayerNorm of the ViT.
        layer_scale_init_value: initial LayerScale, or `None` for blocks without LayerScale.
        drop_path_rate: stochastic depth of the last block; grows linearly from 0 at the first.
        attention_dropout: dropout of the attention weights.
        initializer_range: standard deviation of the initial weights of the blocks.
    """

    model_type = "segvit_plain_vit"
    keys_to_ignore_at_inference = ["last_hidden_state", "hidden_states", "attentions"]  # noqa: RUF012

    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    intermediate_size: int = 4096
    patch_size: int = 16
    image_size: int | list[int] | tuple[int, ...] = 640
    num_channels: int = 3
    use_cls_token: bool = True
    num_register_tokens: int = 4
    position_embedding_type: str = "learned"
    rope_theta: float | int = 100.0
    rope_reference_grid: int | None = None
    rope_offset: float | int = 0
    embedding_norm: bool = False
    attention_norm: bool = False
    hidden_act: str = "gelu"
    mlp_type: str = "mlp"
    gate_act: str = "silu"
    mlp_norm: bool = False
    key_bias: bool = True
    final_norm: bool = True
    layer_norm_eps: float = 1e-6
    layer_scale_init_value: float | int | None = 1.0
    drop_path_rate: float | int = 0.0
    attention_dropout: float | int = 0.0
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any):
        if isinstance(self.image_size, tuple):
            # JSON has no tuples, and a config must equal its saved and reloaded self.
            self.image_size = list(self.image_size)
        # Transformers only warns, then silently ignores num_labels.
        num_labels = kwargs.get("num_labels")
        if isinstance(num_labels, int) and num_labels > MAX_LABELS:  # before a name is made for each
            raise ValueError(f"num_labels={num_labels} must be at most {MAX_LABELS}")
        if self.id2label is not None and num_labels is not None and len(self.id2label) != num_labels:
            raise ValueError(
                f"num_labels={num_labels} disagrees with id2label, which names {len(self.id2label)} classes; "
                "give one of the two, or make them equal"
            )
        super().__post_init__(**kwargs)
        self.check()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The configuration of saved fields; `num_labels` or `id2label` in `kwargs` replace the saved classes."""
        where = path_of(config_dict, kwargs.get("name_or_path"))
        check_fields(cls, config_dict, where)
        with errors_name(where):
            config_dict, kwargs = replace_labels(config_dict, kwargs)
            return super().from_dict(config_dict, **kwargs)

    @property
    def image_height_width(self) -> tuple[int, int]:
        """`image_size` as (height, width) in pixels."""
        if isinstance(self.image_size, int):
            return self.image_size, self.image_size
        return self.image_size[0], self.image_size[1]

    @property
    def grid_size(self) -> tuple[int, int]:
        """Patch (rows, columns) of an image of `image_size`."""
        height, width = self.image_height_width
        return height // self.patch_size, width // self.patch_size

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches: CLS and registers."""
        return int(self.use_cls_token) + self.num_register_tokens

    @property
    def has_learned_positions(self) -> bool:
        """Whether a table of position embeddings is added to the patches."""
        return self.position_embedding_type in ("learned", "learned_rope")

    @property
    def has_rotary_positions(self) -> bool:
        """Whether queries and keys are rotated by the position of their patch."""
        return self.position_embedding_type in ("rope", "learned_rope")

    def to_dict(self) -> dict[str, Any]:
        """The fields as saved."""
        fields = super().to_dict()
        # A folder saved without the code must not name it, or loading would look for the missing files.
        if self._auto_class is None:
            fields.pop("auto_map", None)
        return fields

    def check(self) -> None:
        """Refuse contradictory fields with a ValueError that names the field, its value and the remedy."""
        check_limits(self, _LIMITS)
        for name in ("hidden_act", "gate_act"):
            if getattr(self, name) not in ACT2FN:
                raise ValueError(
                    f"{name}={shown(getattr(self, name))} is no activation of Transformers, such as 'gelu'"
                )
        for name in ("drop_path_rate", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0 and less than 1")
        for name in ("layer_norm_eps", "rope_theta"):
            if not 0 < getattr(self, name) < 1e12:
                raise ValueError(f"{name}={getattr(self, name)} must be positive and finite")
        if not 0 <= self.initializer_range < 1e6:
            raise ValueError(f"initializer_range={self.initializer_range} must not be negative")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} does not divide hidden_size={self.hidden_size}; "
                "published plain ViTs use heads of 64 channels"
            )
        if not isinstance(self.image_size, int) and len(self.image_size) != 2:
            raise ValueError(f"image_size={self.image_size} must be an int or [height, width]")
        height, width = self.image_height_width
        if max(height, width) > MAX_IMAGE_SIDE:
            raise ValueError(f"image_size={self.image_size} must be at most {MAX_IMAGE_SIDE} pixels")
        if min(height, width) < self.patch_size or height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"image_size={self.image_size} is not a multiple of patch_size={self.patch_size}; the nearest that is: "
                f"[{_nearest_multiple(height, self.patch_size)}, {_nearest_multiple(width, self.patch_size)}]"
            )
        if self.position_embedding_type not in POSITION_EMBEDDING_TYPES:
            raise ValueError(
                f"position_embedding_type={self.position_embedding_type!r} is not one of {POSITION_EMBEDDING_TYPES}"
            )
        # Rotation pairs channels, and rows and columns take half of the pairs each.
        if self.has_rotary_positions and (self.hidden_size // self.num_attention_heads) % 4:
            raise ValueError(
                f"rotary embeddings need heads of a multiple of 4 channels, not "
                f"{self.hidden_size // self.num_attention_heads}; change num_attention_heads or hidden_size"
            )
        if self.rope_reference_grid is not None and self.rope_reference_grid < 1:
            raise ValueError(f"rope_reference_grid={self.rope_reference_grid} must be at least 1, or None")
        if self.rope_offset and self.rope_reference_grid is None:
            raise ValueError(f"rope_offset={self.rope_offset} needs rope_reference_grid, whose patches it counts")
        if self.mlp_type not in MLP_TYPES:
            raise ValueError(f"mlp_type={self.mlp_type!r} is not one of {MLP_TYPES}")
        if self.mlp_norm and self.mlp_type != "swiglu":
            raise ValueError(f"mlp_norm=True needs mlp_type='swiglu', not {self.mlp_type!r}")


def replace_labels(fields: dict[str, Any], kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Saved fields with the classes that `num_labels`, `id2label` or `label2id` ask for, and the other arguments.

    Transformers sets such arguments on a finished configuration, where the saved classes would contradict them.
    """
    asked = {name: kwargs[name] for name in ("num_labels", "id2label", "label2id") if kwargs.get(name) is not None}
    kwargs = {name: value for name, value in kwargs.items() if name not in ("num_labels", "id2label", "label2id")}
    if not asked:
        return fields, kwargs
    names, num_labels = asked.get("id2label"), asked.get("num_labels")
    if names is None and "label2id" in asked:
        names = {label: name for name, label in asked["label2id"].items()}
    if names is None:
        saved = fields.get("id2label")
        # As many as before: the names are still right.
        names = saved if saved is not None and len(saved) == num_labels else None
    else:
        names = _label_names(names)
        if num_labels is not None and num_labels != len(names):
            raise ValueError(
                f"num_labels={num_labels}, but id2label names {len(names)} classes; give one of the two, or make them "
                "equal"
            )
    if names is None:
        if not isinstance(num_labels, int) or not 1 <= num_labels <= MAX_LABELS:
            raise ValueError(f"num_labels={shown(num_labels)} must be a whole number from 1 to {MAX_LABELS}")
        names = {label: f"LABEL_{label}" for label in range(num_labels)}
    # Saved next to the old names, and not replaced by Transformers.
    label2id = {name: int(label) for label, name in names.items()}
    stale = ("num_labels", "label2id")
    kept = {name: value for name, value in fields.items() if name not in stale}
    return {**kept, "id2label": dict(names), "label2id": label2id}, kwargs


def _label_names(labels: Any) -> dict[int, str]:
    """Names by label id, from a mapping whose ids may be text, as in JSON, or a list."""
    if isinstance(labels, list | tuple):
        return dict(enumerate(labels))
    try:
        return {int(label): name for label, name in labels.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"id2label={shown(labels)} must map label ids to names, such as {{0: 'sky', 1: 'cat'}}"
        ) from error


def check_label_ids(id2label: Mapping[Any, str] | None) -> None:
    """Refuse labels that are not numbered from 0 without gaps with a ValueError that names the ids."""
    if id2label is not None and sorted(id2label) != list(range(len(id2label))):
        raise ValueError(
            f"id2label has the ids {shown(sorted(id2label))}, not 0 to {len(id2label) - 1}: the class head has "
            "one output per id; renumber the labels"
        )


def check_limits(config: Any, limits: Mapping[str, tuple[int, int]]) -> None:
    """Refuse fields outside (least, most) with a ValueError that names field and limit."""
    for name, (least, most) in limits.items():
        value = getattr(config, name)
        if value < least:
            raise ValueError(f"{name}={value} must " + (f"be at least {least}" if least else "not be negative"))
        if value > most:
            raise ValueError(f"{name}={value} must be at most {most}")


def _nearest_multiple(length: int, step: int) -> int:
    return max(step, round(length / step) * step)
