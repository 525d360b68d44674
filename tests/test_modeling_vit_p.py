"""ViT-P: answers do not depend on padding, on the batch, or (isolated) on each other; images may be encoded first."""

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, Dinov2Config, Dinov2Model, ViTConfig, ViTModel

from hf_segvit.conversion.backbones import convert_backbone
from hf_segvit.models import prompt_layers as prompt_attention
from hf_segvit.models.configuration_plain_vit import PlainViTConfig
from hf_segvit.models.configuration_vit_p import ViTPConfig
from hf_segvit.models.modeling_plain_vit import PlainViTModel
from hf_segvit.models.modeling_vit_p import ViTPForPointClassification, ViTPModel, prompt_loss
from hf_segvit.models.prompt_layers import resample_as_official

from .tiny_models import randomize

# Other orders of the same fp32 sums, where tokens are added to a product.
TOLERANCE = 1e-5
FAMILIES = {
    "dinov2": {},
    "registers": {"num_register_tokens": 3, "mlp_type": "swiglu"},
    "rope": {"position_embedding_type": "rope", "num_register_tokens": 2, "key_bias": False},
    "normed": {"embedding_norm": True, "attention_norm": True, "layer_scale_init_value": None},
}
KINDS = ("joint", "isolated")


def tiny_vit_p(kind: str = "joint", family: str = "dinov2", attn: str = "sdpa", **overrides):
    settings = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "image_size": 56,
        "num_labels": 5,
        "prompt_attention": kind,
    }
    config = ViTPConfig(**{**settings, **FAMILIES[family], **overrides})
    config._attn_implementation = attn
    torch.manual_seed(0)
    return randomize(ViTPForPointClassification(config)).eval()


def inputs(num_images: int = 2, num_prompts: int = 6, height: int = 56, width: int = 84):
    return torch.randn(num_images, 3, height, width), torch.rand(num_images, num_prompts, 4)


def padded(prompts: torch.Tensor, count: int, value: float = float("nan")):
    filled = torch.full((len(prompts), count, 4), value)
    mask = torch.ones(len(prompts), prompts.shape[1] + count, dtype=torch.bool)
    mask[:, prompts.shape[1] :] = False
    return torch.cat((prompts, filled), dim=1), mask


# What an answer may depend on


@pytest.mark.parametrize("count", [0, 1, 1000])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_padding_changes_no_answer(kind, family, count):
    model = tiny_vit_p(kind, family)
    pixels, prompts = inputs()
    expected = model(pixels, prompts).logits
    more, mask = padded(prompts, count)
    answer = model(pixels, more, mask).logits[:, :6]
    torch.testing.assert_close(answer, expected, atol=TOLERANCE, rtol=0)
    first = model(pixels, more.roll(count, dims=1), mask.roll(count, dims=1)).logits[:, count:]
    torch.testing.assert_close(first, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_other_images_of_the_batch_change_no_answer(kind):
    model = tiny_vit_p(kind)
    pixels, prompts = inputs(3)
    mask = torch.tensor([[True] * 6, [True] * 2 + [False] * 4, [False] * 6])
    batch = model(pixels, prompts, mask).logits
    for index, count in ((0, 6), (1, 2)):
        alone = model(pixels[index : index + 1], prompts[index : index + 1, :count]).logits[0]
        torch.testing.assert_close(batch[index, :count], alone, atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_isolated_answers_do_not_depend_on_other_prompts_and_joint_ones_do(monkeypatch):
    monkeypatch.setattr(prompt_attention, "PROMPTS_PER_GROUP", 4)  # 6 prompts make two groups
    pixels, prompts = inputs()
    for kind in KINDS:
        model = tiny_vit_p(kind)
        whole = model(pixels, prompts).logits
        for asked in ([0], [2, 5], [5, 4, 3, 2, 1, 0]):
            answer = model(pixels, prompts[:, asked]).logits
            same = torch.allclose(answer, whole[:, asked], atol=TOLERANCE, rtol=0)
            assert same == (kind == "isolated" or len(asked) == 6)


@torch.no_grad()
def test_prompts_in_another_order_have_their_answers_in_that_order():
    pixels, prompts = inputs()
    model = tiny_vit_p("joint", "rope")
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    answer = model(pixels, prompts[:, order]).logits
    torch.testing.assert_close(answer, model(pixels, prompts).logits[:, order], atol=TOLERANCE, rtol=0)


# The formula


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_isolated_attention_is_joint_attention_under_its_mask(family):
    """The obvious form: all tokens in one product, with a mask of who sees whom."""
    model = tiny_vit_p("isolated", family)
    vit = model.vit_p
    pixels, prompts = inputs()
    image = vit.embeddings(pixels)
    centred = torch.cat((2 * prompts[..., :2] - 1, prompts[..., 2:]), dim=-1)
    tokens = centred @ vit.prompt_encoder.weight.T + vit.prompt_position_embedding
    states = torch.cat((vit.embeddings.layernorm(tokens), image), dim=1)
    total = states.shape[1]
    visible = torch.ones(total, total, dtype=torch.bool)
    visible[:, :6] = torch.eye(total, 6, dtype=torch.bool)
    for layer in vit.layers:
        attention, normed = layer.attention, layer.norm1(states)
        rotary = vit.position_embeddings_for(pixels, 6 + model.config.num_prefix_tokens)
        query, key, value = attention._project(normed, rotary)
        scores = (query @ key.transpose(-1, -2) * attention.scaling).masked_fill(~visible, -torch.inf)
        context = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        states = layer._add(states, attention.out_proj(attention.norm(context)), layer.layer_scale1)
        states = layer._add(states, layer.mlp(layer.norm2(states)), layer.layer_scale2)
    expected = vit.layernorm(states)
    outputs = model(pixels, prompts)
    torch.testing.assert_close(outputs.last_hidden_state, expected, atol=2e-5, rtol=0)
    torch.testing.assert_close(outputs.logits, model.classifier(expected[:, :6]), atol=2e-5, rtol=0)


@torch.no_grad()
def test_a_joint_prompt_is_the_cls_token_of_dinov2():
    """With the prompt encoder off, one prompt is a CLS token without content: Transformers' DINOv2 agrees."""
    torch.manual_seed(0)
    reference = Dinov2Model(
        Dinov2Config(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, mlp_ratio=2, image_size=56)
    )
    randomize(reference).eval().embeddings.cls_token.zero_()
    model = ViTPModel.from_backbone(reference, prompt_attention="joint")
    assert model.config.model_type == "segvit_vit_p"
    assert not model.config.use_cls_token
    position = reference.embeddings.position_embeddings[0, :1]
    assert torch.equal(model.prompt_position_embedding, position)
    model.prompt_encoder.weight.zero_()
    pixels, prompts = inputs(2, 1, 56, 56)
    answer = model(pixels, prompts).last_hidden_state
    torch.testing.assert_close(answer, reference(pixels).last_hidden_state, atol=TOLERANCE, rtol=0)


def test_boxes_and_points_are_encoded_as_the_contract_says():
    model = tiny_vit_p()
    encoder = model.vit_p.prompt_encoder
    weight = encoder.weight
    prompts = torch.tensor([[[0.25, 0.75, 0.0, 0.0], [0.5, 0.5, 0.2, 0.4]]])
    expected = torch.stack([-0.5 * weight[:, 0] + 0.5 * weight[:, 1], 0.2 * weight[:, 2] + 0.4 * weight[:, 3]])
    torch.testing.assert_close(encoder(prompts)[0], expected)
    # Points stay sharp in half precision: neighbouring pixels of 1036 give different tokens.
    half = tiny_vit_p().bfloat16().vit_p.prompt_encoder
    tokens = half(torch.tensor([[[0.9990, 0.5, 0, 0], [0.9980, 0.5, 0, 0]]]))
    assert tokens.dtype == torch.float32
    assert not torch.equal(tokens[0, 0], tokens[0, 1])


@pytest.mark.parametrize(("old", "new"), [((4, 4), (4, 4)), ((5, 5), (3, 9))])
def test_official_resampling_has_the_offset_and_no_shortcut(old, new):
    table = torch.randn(old[0] * old[1], 6)
    answer = resample_as_official(table, old, new)
    grid = table.T.reshape(1, 6, *old)
    factors = ((new[0] + 0.1) / old[0], (new[1] + 0.1) / old[1])
    expected = F.interpolate(grid, scale_factor=factors, mode="bicubic")
    assert expected.shape[2:] == new
    torch.testing.assert_close(answer, expected.reshape(6, -1).T)
    assert old != new or not torch.allclose(answer, table, atol=1e-3)
    pixels, prompts = inputs(1, 3, 56, 56)
    outputs = [tiny_vit_p(position_interpolation=name)(pixels, prompts).logits for name in ("clean", "official")]
    assert not torch.allclose(*outputs, atol=1e-4)


# Images first, prompts later


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_questions_asked_later_have_the_answers_of_forward(family, attn, monkeypatch):
    monkeypatch.setattr(prompt_attention, "PROMPTS_PER_GROUP", 8)
    model = tiny_vit_p("isolated", family, attn)
    pixels, prompts = inputs(2, 20)
    expected = model(pixels, prompts).logits
    encoded = model.encode_image(pixels)
    image_states = model(pixels, prompts).last_hidden_state[:, 20:]
    torch.testing.assert_close(encoded.last_hidden_state, image_states, atol=TOLERANCE, rtol=0)
    for chunk in (9, 1024):
        answer = model.classify_prompts(encoded, prompts, prompts_per_chunk=chunk).logits
        torch.testing.assert_close(answer, expected, atol=TOLERANCE, rtol=0)
    more, mask = padded(prompts, 3)
    answer = model.classify_prompts(encoded, more, mask, labels=torch.zeros(2, 23, dtype=torch.long))
    torch.testing.assert_close(answer.logits[:, :20], expected, atol=TOLERANCE, rtol=0)
    loss = F.cross_entropy(expected.flatten(0, 1), torch.zeros(40, dtype=torch.long))
    torch.testing.assert_close(answer.loss, loss, atol=TOLERANCE, rtol=0)


def test_joint_prompts_cannot_be_asked_later():
    model = tiny_vit_p("joint")
    pixels, _ = inputs()
    with pytest.raises(ValueError, match="encode_image needs prompt_attention='isolated'"):
        model.encode_image(pixels)


# Back-ends, training


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_back_ends_agree(kind, family):
    pixels, prompts = inputs()
    more, mask = padded(prompts, 2, 0.0)
    eager = tiny_vit_p(kind, family, "eager")(pixels, more, mask, output_attentions=True, output_hidden_states=True)
    answer = tiny_vit_p(kind, family, "sdpa")(pixels, more, mask).logits
    torch.testing.assert_close(answer[:, :6], eager.logits[:, :6], atol=2e-5, rtol=0)
    tokens = eager.last_hidden_state.shape[1]
    assert len(eager.attentions) == 3
    assert len(eager.hidden_states) == 4
    weights = eager.attentions[0]
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, tokens))
    if kind == "joint":
        assert not weights[..., 6:8].any()  # padding is seen by nobody
    else:
        assert torch.equal(weights[0, 0, :, :8] > 0, torch.eye(tokens, 8, dtype=torch.bool))


@pytest.mark.slow  # flex attention compiles its kernel
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_flex_attention_agrees(kind):
    pixels, prompts = inputs()
    answers = [tiny_vit_p(kind, attn=name)(pixels, prompts).logits for name in ("flex_attention", "sdpa")]
    torch.testing.assert_close(*answers, rtol=1e-4, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_model_compiles_without_a_graph_break(kind):
    torch._dynamo.reset()
    model = tiny_vit_p(kind)
    pixels, prompts = inputs()
    more, mask = padded(prompts, 2, 0.0)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(pixels, more, mask).logits, model(pixels, more, mask).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_near_single(kind):
    pixels, prompts = inputs()
    with torch.no_grad():
        expected = tiny_vit_p(kind)(pixels, prompts).logits
        answer = tiny_vit_p(kind).bfloat16()(pixels.bfloat16(), prompts).logits
    assert answer.dtype == torch.bfloat16
    assert (answer.float() - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_type", ["linear", "mlp"])
def test_every_weight_learns_and_checkpointing_changes_no_gradient(kind, head_type):
    pixels, prompts = inputs()
    labels = torch.randint(0, 5, (2, 6))
    gradients = []
    for checkpointing in (False, True):
        model = tiny_vit_p(kind, "registers", head_type=head_type).train()
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable()
            assert all(layer.gradient_checkpointing for layer in model.vit_p.layers)
        model(pixels, prompts, labels=labels).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.numel()})
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7)


def test_loss_counts_labelled_prompts_only():
    logits = torch.randn(2, 4, 5)
    labels = torch.tensor([[0, -100, 3, 1], [-100, 2, 4, 4]])
    mask = torch.tensor([[True, True, True, False], [True, True, True, True]])
    counted = [(0, 0), (0, 2), (1, 1), (1, 2), (1, 3)]
    terms = torch.stack([-logits[b, n].log_softmax(-1)[labels[b, n]] for b, n in counted])
    torch.testing.assert_close(prompt_loss(logits, labels, mask), terms.mean())
    # Two halves under the common count add up to the whole.
    halves = [prompt_loss(logits[i : i + 1], labels[i : i + 1], mask[i : i + 1], normalizer=5) for i in (0, 1)]
    torch.testing.assert_close(sum(halves), terms.mean())
    assert prompt_loss(logits, torch.full((2, 4), -100)) == 0


# Weights of backbones, saving


@torch.no_grad()
def test_everything_but_prompt_encoder_and_head_is_inherited(tmp_path):
    import timm

    torch.manual_seed(0)
    source = timm.create_model(
        "vit_small_patch14_reg4_dinov2", num_classes=0, depth=2, embed_dim=32, num_heads=2, img_size=56
    )
    randomize(source)
    model = ViTPForPointClassification.from_backbone(source, image_size=84, num_labels=3, head_type="mlp")
    assert model.config.num_labels == 3
    assert model.config.num_register_tokens == 4
    _, weights = convert_backbone(source, image_size=84)
    ours = model.vit_p.state_dict()
    new = {"prompt_encoder.weight", "prompt_position_embedding", "embeddings.cls_token"}
    assert ours.keys() - weights.keys() == new - {"embeddings.cls_token"}
    assert all(torch.equal(ours[name], weights[name]) for name in weights.keys() - new)
    if source.no_embed_class:  # its table covers the patches alone, so there is no position to inherit
        assert not model.vit_p.prompt_position_embedding.any()
    else:
        assert torch.equal(model.vit_p.prompt_position_embedding, source.pos_embed[0, :1])
    assert model.vit_p.prompt_encoder.weight.std() == pytest.approx(0.02, rel=0.3)
    assert not model.classifier.fc2.bias.any()
    model.save_pretrained(tmp_path)
    again = ViTPForPointClassification.from_pretrained(tmp_path)
    pixels, prompts = inputs(1, 3, 84, 84)
    assert torch.equal(again(pixels, prompts).logits, model.eval()(pixels, prompts).logits)


def test_the_position_of_the_cls_token_is_not_its_content():
    torch.manual_seed(0)
    source = ViTModel(ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48))
    randomize(source)
    model = ViTPModel.from_backbone(source)
    assert torch.equal(model.prompt_position_embedding, source.embeddings.position_embeddings[0, :1])
    plain = PlainViTModel.from_backbone(source)
    folded = source.embeddings.position_embeddings[:, :1] + source.embeddings.cls_token
    assert torch.equal(plain.embeddings.cls_token, folded)
    # A plain ViT has them folded into one, so the position is not known any more.
    assert not ViTPModel.from_backbone(plain).prompt_position_embedding.any()


def test_from_scratch_prompts_have_a_position_as_patches_do():
    torch.manual_seed(0)
    config = ViTPConfig(
        hidden_size=512, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, initializer_range=0.1
    )
    vit = ViTPForPointClassification(config).vit_p
    assert vit.prompt_position_embedding.std().item() == pytest.approx(0.1, rel=0.1)  # of 512 numbers
    assert vit.embeddings.position_embeddings.weight.std().item() == pytest.approx(0.1, rel=0.1)


def test_a_backbone_without_cls_position_gives_none():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    rotary = PlainViTModel(PlainViTConfig(**sizes, image_size=64, position_embedding_type="rope"))
    model = ViTPForPointClassification.from_backbone(rotary, prompt_attention="isolated", num_labels=2)
    assert not model.vit_p.prompt_position_embedding.any()
    pixels, prompts = inputs(1, 2, 64, 80)
    assert model(pixels, prompts).logits.shape == (1, 2, 2)


def test_auto_classes_and_another_label_set(tmp_path):
    model = tiny_vit_p("isolated")
    model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), ViTPConfig)
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is ViTPModel
    assert base.config.prompt_attention == "isolated"
    pixels, prompts = inputs()
    expected = model(pixels, prompts).last_hidden_state
    assert torch.equal(base(pixels, prompts).last_hidden_state, expected)
    other = ViTPForPointClassification.from_pretrained(
        tmp_path, id2label={0: "a", 1: "b"}, label2id={"a": 0, "b": 1}, ignore_mismatched_sizes=True
    )
    assert torch.equal(other(pixels, prompts).last_hidden_state, expected)
    assert other(pixels, prompts).logits.shape == (2, 6, 2)


# Bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": torch.zeros(2, 6, 2)}, r"prompts of shape \(2, 6, 2\)"),
        ({"prompts": torch.zeros(2, 0, 4)}, "N of at least 1"),
        ({"prompts": torch.zeros(6, 4)}, r"prompts of shape \(6, 4\)"),
        ({"prompts": torch.zeros(1, 6, 4)}, "for 2 images"),
        ({"prompt_mask": torch.ones(2, 5, dtype=torch.bool)}, r"prompt_mask of shape \(2, 5\)"),
        ({"labels": torch.zeros(2, 7, dtype=torch.long)}, r"labels of shape \(2, 7\)"),
        ({"labels": torch.tensor([[0] * 6, [0, 1, 5, 0, 0, 0]])}, r"labels\[1, 2\] is 5.*0 to 4"),
        ({"labels": torch.tensor([[0] * 6, [0, -1, 0, 0, 0, 0]])}, r"labels\[1, 1\] is -1"),
        ({"pixel_values": torch.zeros(2, 3, 50, 56)}, "50 x 56 pixels.*patch_size=14"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(changes, message):
    pixels, prompts = inputs()
    with pytest.raises(ValueError, match=message):
        tiny_vit_p()(**{"pixel_values": pixels, "prompts": prompts, **changes})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt_attention": "both"}, "prompt_attention='both' is not one of"),
        ({"head_type": "conv"}, "head_type='conv'"),
        ({"position_interpolation": "nearest"}, "position_interpolation='nearest'"),
        ({"point_origin": "middle"}, "point_origin='middle'"),
        ({"use_cls_token": True}, "ViT-P has no CLS token"),
        ({"position_interpolation": "official", "position_embedding_type": "rope"}, "no table to resample"),
        ({"id2label": {1: "a", 2: "b"}}, r"id2label has the ids \[1, 2\]"),
    ],
)
def test_impossible_configs_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ViTPConfig(**fields)
