"""Configuration of ViT-P, the point classifier (CVPR 2026).

The fields of the plain ViT, plus how prompts attend, the kind of head, and two conventions of the official code on
which its weights depend: how position embeddings are resampled, and which part of a pixel a point means.
"""

from huggingface_hub.dataclasses import strict

from .configuration_plain_vit import PlainViTConfig, check_label_ids

PROMPT_ATTENTIONS = ("joint", "isolated")
HEAD_TYPES = ("linear", "mlp")
POSITION_INTERPOLATIONS = ("clean", "official")
POINT_ORIGINS = ("center", "corner")


@strict
class ViTPConfig(PlainViTConfig):
    """Configuration of `ViTPModel` and `ViTPForPointClassification`: the fields of `PlainViTConfig`, and these.

    The defaults are DINOv2 ViT-B at 518 pixels, without registers. Prompts replace the CLS token.

    Args:
        prompt_attention: `"isolated"`: a prompt sees itself and the image, which does not see it, so answers are
            independent and an image can be encoded before its prompts are known. `"joint"`: prompts and patches all see
            each other, so an answer depends on the other prompts (the official model).
        head_type: `"linear"` (the official code) or `"mlp"`, with one hidden layer (the paper).
        position_interpolation: how learned position embeddings become those of another grid: `"clean"`, or
            `"official"`, bicubic by a factor that is 0.1 patches too large, also at the table's own grid.
        point_origin: what a point meant in training: `"center"`, the middle of a pixel, or `"corner"`, its upper left
            corner (the official code).
    """

    model_type = "segvit_vit_p"
    keys_to_ignore_at_inference = ["prompt_mask", "last_hidden_state", "hidden_states", "attentions"]  # noqa: RUF012

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    patch_size: int = 14
    image_size: int | list[int] | tuple[int, ...] = 518
    use_cls_token: bool = False
    num_register_tokens: int = 0
    prompt_attention: str = "isolated"
    head_type: str = "linear"
    position_interpolation: str = "clean"
    point_origin: str = "center"

    def check(self) -> None:
        """Refuse contradictory fields with a ValueError that names the field, its value and the remedy."""
        super().check()
        check_label_ids(self.id2label)
        for name, choices in (
            ("prompt_attention", PROMPT_ATTENTIONS),
            ("head_type", HEAD_TYPES),
            ("position_interpolation", POSITION_INTERPOLATIONS),
            ("point_origin", POINT_ORIGINS),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {choices}")
        if self.use_cls_token:
            raise ValueError("use_cls_token=True: ViT-P has no CLS token, prompts replace it; leave it False")
        if self.position_interpolation == "official" and not self.has_learned_positions:
            raise ValueError(
                f"position_interpolation='official' means nothing for position_embedding_type="
                f"{self.position_embedding_type!r}, which has no table to resample; use 'clean'"
            )
