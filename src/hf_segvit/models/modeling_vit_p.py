"""ViT-P, a classifier of points and boxes on the plain ViT (CVPR 2026).

In order: outputs, the model with head and loss, the model up to the prompts' states, the heads. A prompt is a token
beside the patches; its class is read off its last state. With isolated prompts an image can be encoded once
(`encode_image`) and asked later (`classify_prompts`), with the answers of `forward`.

Shapes: B batch, N prompts, C classes, D hidden size, S image tokens (registers and patches), H W pixels, h w patch
grid. Tokens are ordered prompts, registers, patches. A prompt is centre x, centre y, width, height in [0, 1] of the
image; a point has width and height 0.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.utils.generic import ModelOutput, can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_vit_p import ViTPConfig
from .modeling_plain_vit import PlainViTModel, PlainViTPreTrainedModel
from .prompt_layers import KeysValues, PromptAttention, PromptEncoder, ViTPEmbeddings, ViTPLayer, isolation_mask

IGNORED_LABEL = -100


@dataclass
class ViTPModelOutput(ModelOutput):
    """Output of `ViTPModel`."""

    last_hidden_state: Tensor | None = None  # (B, N + S, D) after the final norm, prompts first
    hidden_states: tuple[Tensor, ...] | None = None  # on request, input and output of every block
    attentions: tuple[Tensor, ...] | None = None  # on request; isolated prompts have weight 0 for all others


@dataclass
class ViTPForPointClassificationOutput(ModelOutput):
    """Output of `ViTPForPointClassification`."""

    loss: Tensor | None = None  # mean cross-entropy of the labelled prompts
    logits: Tensor | None = None  # (B, N, C); rows of padding are meaningless
    prompt_mask: Tensor | None = None  # passed through from the image processor to its post-processing
    last_hidden_state: Tensor | None = None  # as in ViTPModelOutput; from `classify_prompts` only prompts, (B, N, D)
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class EncodedImage:
    """Images encoded by a model with isolated prompts, for later prompts."""

    keys_values: tuple[KeysValues, ...]  # per block, (B, heads, S, E) each
    last_hidden_state: Tensor  # (B, S, D) after the final norm


class ViTPPreTrainedModel(PlainViTPreTrainedModel):
    """Base of both ViT-P models."""

    config: ViTPConfig
    base_model_prefix = "vit_p"
    _no_split_modules = ["ViTPEmbeddings", "ViTPLayer"]  # noqa: RUF012
    _can_record_outputs = {"hidden_states": ViTPLayer, "attentions": PromptAttention}  # noqa: RUF012


class ViTPForPointClassification(ViTPPreTrainedModel):
    """ViT-P with its head and loss: a class for every prompt."""

    def __init__(self, config: ViTPConfig):
        super().__init__(config)
        assert config.num_labels is not None  # id2label always names the classes
        self.num_labels = config.num_labels
        self.vit_p = ViTPModel(config)
        self.classifier = MLPClassifier(config) if config.head_type == "mlp" else _linear_classifier(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The module that turns pixels into tokens."""
        return self.vit_p.get_input_embeddings()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        prompts: Tensor,
        prompt_mask: Tensor | None = None,
        labels: Tensor | None = None,
        loss_normalizer: Tensor | float | None = None,
        original_sizes: Tensor | None = None,
        **kwargs: Any,
    ) -> ViTPForPointClassificationOutput:
        """Classify prompts, and compute the loss if labels are given.

        Args:
            pixel_values: (B, channels, H, W), normalised; H and W multiples of the patch size.
            prompts: (B, N, 4), centre x, centre y, width, height in [0, 1]; points have width and height 0.
            prompt_mask: (B, N) bool, True for real prompts; padding changes no answer. `None`: all are real.
            labels: (B, N) int64 classes in [0, C); -100 and padding are ignored.
            loss_normalizer: divisor of the summed cross-entropy, such as the labelled prompts of all processes and
                accumulated batches over the number of processes. `None` counts this batch.
            original_sizes: unused; accepted so that the image processor's output can be passed whole.
        """
        del original_sizes
        num_prompts = _check_prompts(prompts, prompt_mask, labels, pixel_values.shape[0], self.num_labels)
        outputs = self.vit_p(pixel_values, prompts, prompt_mask, **kwargs)
        logits = self.classifier(outputs.last_hidden_state[:, :num_prompts])
        loss = None if labels is None else prompt_loss(logits, labels, prompt_mask, loss_normalizer)
        return ViTPForPointClassificationOutput(
            loss=loss,
            logits=logits,
            prompt_mask=prompt_mask,
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def encode_image(self, pixel_values: Tensor) -> EncodedImage:
        """Encode images once, for later prompts; see `ViTPModel.encode_image`."""
        return self.vit_p.encode_image(pixel_values)

    def classify_prompts(
        self,
        encoded: EncodedImage,
        prompts: Tensor,
        prompt_mask: Tensor | None = None,
        labels: Tensor | None = None,
        loss_normalizer: Tensor | float | None = None,
        prompts_per_chunk: int = 1024,
    ) -> ViTPForPointClassificationOutput:
        """`forward` for images that `encode_image` encoded, in chunks of prompts to bound the memory."""
        if prompts_per_chunk < 1:
            raise ValueError(f"prompts_per_chunk={prompts_per_chunk} must be at least 1")
        num_images = encoded.last_hidden_state.shape[0]
        num_prompts = _check_prompts(prompts, prompt_mask, labels, num_images, self.num_labels)
        # Isolated prompts do not see each other, so chunks change no answer.
        chunks = [slice(start, start + prompts_per_chunk) for start in range(0, num_prompts, prompts_per_chunk)]
        masks = [None if prompt_mask is None else prompt_mask[:, chunk] for chunk in chunks]
        states = [
            self.vit_p.encode_prompts(encoded, prompts[:, chunk], mask)
            for chunk, mask in zip(chunks, masks, strict=True)
        ]
        last_hidden_state = torch.cat(states, dim=1)
        logits = self.classifier(last_hidden_state)
        loss = None if labels is None else prompt_loss(logits, labels, prompt_mask, loss_normalizer)
        return ViTPForPointClassificationOutput(
            loss=loss, logits=logits, prompt_mask=prompt_mask, last_hidden_state=last_hidden_state
        )


def prompt_loss(
    logits: Tensor, labels: Tensor, prompt_mask: Tensor | None = None, normalizer: Tensor | float | None = None
) -> Tensor:
    """Summed cross-entropy of logits (B, N, C) and labels (B, N), divided by `normalizer`.

    By default that is the number of labelled prompts. Label -100 and padding are ignored; 0 if nothing is labelled.
    """
    if prompt_mask is not None:
        labels = labels.masked_fill(~prompt_mask.bool(), IGNORED_LABEL)
    total = F.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten().long(), ignore_index=IGNORED_LABEL, reduction="sum"
    )
    if normalizer is None:
        normalizer = (labels != IGNORED_LABEL).sum().clamp(min=1)
    return total / normalizer


class ViTPModel(ViTPPreTrainedModel, PlainViTModel):
    """The plain ViT with prompts, up to their last states."""

    embeddings_class = ViTPEmbeddings
    layer_class = ViTPLayer
    _keys_to_ignore_on_load_unexpected = [r"^classifier\."]  # noqa: RUF012

    def __init__(self, config: ViTPConfig):
        super().__init__(config)
        self.prompt_encoder = PromptEncoder(4, config.hidden_size, bias=False)
        self.prompt_position_embedding = nn.Parameter(torch.empty(1, config.hidden_size))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            # Like the position embeddings of patches, whose counterpart it is for prompts.
            init.trunc_normal_(self.prompt_position_embedding, std=self.config.initializer_range)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self, pixel_values: Tensor, prompts: Tensor, prompt_mask: Tensor | None = None, **kwargs: Any
    ) -> ViTPModelOutput:
        """Encode images (B, channels, H, W) and prompts (B, N, 4) together.

        `kwargs` are `output_hidden_states`, `output_attentions` (needs the eager back-end) and `return_dict`.
        """
        num_prompts = _check_prompts(prompts, prompt_mask, None, pixel_values.shape[0])
        image_states = self.embeddings(pixel_values)
        hidden_states = torch.cat((self._prompt_tokens(prompts, prompt_mask, image_states.dtype), image_states), dim=1)
        # Prompts count as prefix tokens: rotary embeddings leave them alone, their position is in the prompt itself.
        num_prefix_tokens = num_prompts + self.config.num_prefix_tokens
        arguments: dict[str, Any] = {
            "position_embeddings": self.position_embeddings_for(pixel_values, num_prefix_tokens)
        }
        if self.config.prompt_attention == "isolated":
            arguments["isolation"] = self._isolation_mask(num_prompts, image_states.shape[1])
        # Isolated padding needs no mask: nobody sees it. A mask would also rule out the fast kernels.
        elif prompt_mask is not None and not _all_real(prompt_mask):
            real = prompt_mask.bool()
            image_keys = real.new_ones(image_states.shape[:2])
            arguments["key_mask"] = torch.cat((real, image_keys), dim=1)[:, None, None]
        for layer in self.layers:
            hidden_states = layer(hidden_states, **arguments)
        return ViTPModelOutput(last_hidden_state=self.layernorm(hidden_states))

    def encode_image(self, pixel_values: Tensor) -> EncodedImage:
        """Encode images (B, channels, H, W) once, for later prompts, which have to be isolated."""
        if self.config.prompt_attention != "isolated":
            raise ValueError(
                f"encode_image needs prompt_attention='isolated', but this model has "
                f"{self.config.prompt_attention!r}: its image tokens depend on the prompts, so they cannot be made "
                "without them; call the model with image and prompts"
            )
        hidden_states = self.embeddings(pixel_values)
        position_embeddings = self.position_embeddings_for(pixel_values, self.config.num_prefix_tokens)
        keys_values = []
        for layer in self.layers:
            hidden_states, layer_keys_values = layer(
                hidden_states, position_embeddings=position_embeddings, return_keys_values=True
            )
            keys_values.append(layer_keys_values)
        return EncodedImage(tuple(keys_values), self.layernorm(hidden_states))

    def encode_prompts(self, encoded: EncodedImage, prompts: Tensor, prompt_mask: Tensor | None = None) -> Tensor:
        """States (B, N, D), after the final norm, of prompts (B, N, 4) on encoded images."""
        num_image_tokens = encoded.last_hidden_state.shape[1]
        num_prompts = _check_prompts(prompts, prompt_mask, None, encoded.last_hidden_state.shape[0])
        isolation = self._isolation_mask(num_prompts, num_image_tokens)
        hidden_states = self._prompt_tokens(prompts, prompt_mask, encoded.last_hidden_state.dtype)
        for layer, keys_values in zip(self.layers, encoded.keys_values, strict=True):
            hidden_states = layer(hidden_states, isolation=isolation, image_keys_values=keys_values)
        return self.layernorm(hidden_states)

    def _prompt_tokens(self, prompts: Tensor, prompt_mask: Tensor | None, dtype: torch.dtype) -> Tensor:
        if prompt_mask is not None:
            # Padding may hold anything, and NaN would reach other tokens even with weight 0.
            prompts = prompts.masked_fill(~prompt_mask.bool().unsqueeze(-1), 0.0)
        tokens = (self.prompt_encoder(prompts) + self.prompt_position_embedding).to(dtype)
        return self.embeddings.layernorm(tokens)

    def _isolation_mask(self, num_prompts: int, num_image_tokens: int) -> Tensor:
        # Eager attention returns weights, and of several groups only the last ones would be left.
        one_group = self.config._attn_implementation in (None, "eager") or torch.compiler.is_exporting()
        device = self.prompt_position_embedding.device
        return isolation_mask(num_prompts, num_image_tokens, device, one_group)


class MLPClassifier(nn.Module):
    """The paper's head: one hidden layer as wide as a token."""

    def __init__(self, config: ViTPConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]
        self.fc2 = _linear_classifier(config)

    def forward(self, states: Tensor) -> Tensor:
        """Logits (..., C) of states (..., D)."""
        return self.fc2(self.activation(self.fc1(states)))


def _linear_classifier(config: ViTPConfig) -> nn.Linear:
    return nn.Linear(config.hidden_size, len(config.id2label or {}))


def _all_real(prompt_mask: Tensor) -> bool:
    """Whether there is no padding, so that no mask is needed."""
    # A compiler cannot know the answer, so it gets the path with a mask.
    return not torch.compiler.is_compiling() and bool(prompt_mask.all())


def _check_prompts(
    prompts: Tensor,
    prompt_mask: Tensor | None,
    labels: Tensor | None,
    num_images: int,
    num_labels: int | None = None,
) -> int:
    """Refuse prompts whose shape or labels do not fit; returns N."""
    shape = tuple(prompts.shape)
    if len(shape) != 3 or shape[0] != num_images or shape[1] == 0 or shape[2] != 4:
        raise ValueError(
            f"prompts of shape {shape} for {num_images} images must be ({num_images}, N, 4) with N of at least "
            "1: centre x, centre y, width and height in [0, 1], as ViTPImageProcessor makes them"
        )
    for name, tensor in (("prompt_mask", prompt_mask), ("labels", labels)):
        if tensor is not None and tuple(tensor.shape) != shape[:2]:
            raise ValueError(f"{name} of shape {tuple(tensor.shape)} must have one entry a prompt, {shape[:2]}")
    # cross_entropy would crash the device on such a label, without naming it.
    if labels is not None and num_labels is not None and not torch.compiler.is_compiling():
        wrong = (labels != IGNORED_LABEL) & ((labels < 0) | (labels >= num_labels))
        if wrong.any():
            image, prompt = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"labels[{image}, {prompt}] is {int(labels[image, prompt])}, outside the classes 0 to "
                f"{num_labels - 1} of this model; {IGNORED_LABEL} marks prompts without label"
            )
    return shape[1]
