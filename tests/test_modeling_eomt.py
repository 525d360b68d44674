"""EoMT: masks where they belong, annealing, deep supervision, saving, compiling, and refusals."""

import warnings

import pytest
import torch
from torch.nn import functional as F

from hf_segvit.models import mask_criterion, modeling_eomt, plain_vit_layers
from hf_segvit.models.configuration_eomt import EoMTConfig
from hf_segvit.models.mask_head import EoMTScaleLayer, attention_mask_from
from hf_segvit.models.modeling_eomt import EoMTForUniversalSegmentation, EoMTModel

from .tiny_models import FAMILIES, randomize, tiny_config, tiny_eomt


def targets(counts: list[int], size: tuple[int, int] = (64, 64), seed: int = 0) -> dict[str, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "mask_labels": [torch.rand(n, *size, generator=generator) > 0.7 for n in counts],
        "class_labels": [torch.randint(0, 5, (n,), generator=generator) for n in counts],
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("height", "width"), [(64, 64), (32, 80)])
def test_outputs_have_the_promised_shapes_on_any_grid(family: str, height: int, width: int) -> None:
    model = tiny_eomt(**FAMILIES[family])
    outputs = model(torch.randn(2, 3, height, width))
    assert outputs.class_queries_logits.shape == (2, 7, 6)
    assert outputs.masks_queries_logits.shape == (2, 7, height // 4, width // 4)
    assert outputs.last_hidden_state.shape == (2, 7 + 5 + height * width // 256, 32)
    assert outputs.loss is None


@pytest.mark.parametrize("patch_size", [8, 14, 16, 32])
def test_default_upscaling_reaches_a_quarter_of_the_image_as_the_official_rule_says(patch_size: int) -> None:
    steps = {8: 1, 14: 1, 16: 2, 32: 3}[patch_size]
    assert tiny_config(patch_size=patch_size, image_size=4 * patch_size).num_upscale_blocks == steps


@pytest.mark.parametrize("gradient", [True, False])  # two ways to compute it
def test_upscaling_equals_the_convolutions_that_it_replaces(gradient: bool) -> None:
    layer = randomize(EoMTScaleLayer(16, "gelu"))
    features = torch.randn(2, 16, 3, 5)
    expected = F.conv_transpose2d(features, layer.conv1.weight, layer.conv1.bias, stride=2)
    expected = F.conv2d(F.gelu(expected), layer.conv2.weight, padding=1, groups=16)
    norm = layer.layernorm2d
    expected = F.layer_norm(expected.permute(0, 2, 3, 1), (16,), norm.weight, norm.bias, eps=1e-6)
    with torch.set_grad_enabled(gradient):
        answer = layer(features.permute(0, 2, 3, 1))
    torch.testing.assert_close(answer, expected, rtol=1e-4, atol=1e-5)


def test_attention_mask_confines_queries_to_their_own_mask_only() -> None:
    logits = torch.full((1, 2, 8, 8), -1.0)
    logits[0, 0, :4] = 1.0  # the upper half of a 2 x 2 grid
    mask = attention_mask_from(logits, (2, 2), 3, keep=None)
    assert mask.shape == (1, 1, 2, 2 + 3 + 4)
    assert mask[0, 0, :, :5].all()
    assert mask[0, 0, 0, 5:].tolist() == [True, True, False, False]
    assert mask[0, 0, 1, 5:].tolist() == [False] * 4
    kept = attention_mask_from(logits, (2, 2), 3, keep=torch.tensor([[False, True]]))
    assert kept[0, 0, 0].all()
    assert torch.equal(kept[0, 0, 1], mask[0, 0, 1])


def test_predictions_are_made_where_they_are_needed() -> None:
    pixels = torch.randn(1, 3, 64, 64)
    model = tiny_eomt().eomt
    expected = {  # probabilities -> number of predictions in training and in evaluation
        (1.0, 1.0): (3, 3),
        (0.0, 1.0): (3, 2),
        (0.4, 0.5): (3, 2),
        (0.0, 0.0): (3, 1),
    }
    for probabilities, counts in expected.items():
        model.set_masked_attention_probabilities(probabilities)
        made = [len(model.train(mode)(pixels).query_hidden_states) for mode in (True, False)]
        assert tuple(made) == counts, probabilities
    never = tiny_eomt(masked_attention=False).eomt.train()
    assert len(never(pixels).query_hidden_states) == 1


def test_masked_layers_change_the_answer_and_mask_free_ones_do_not_carry_a_stale_mask() -> None:
    pixels = torch.randn(1, 3, 64, 64)
    model = tiny_eomt()
    answers = {}
    for probabilities in ((1, 1), (0, 1), (1, 0), (0, 0)):
        model.set_masked_attention_probabilities(probabilities)
        answers[probabilities] = model(pixels).class_queries_logits
    assert len({round(a.double().sum().item(), 6) for a in answers.values()}) == 4
    # The second query layer without a mask: the same as running it by hand on the first one's output.
    model.set_masked_attention_probabilities([1, 0])
    body = model.eomt
    states = body(pixels, output_hidden_states=True).hidden_states
    by_hand = body.layernorm(body.layers[3](states[3]))
    torch.testing.assert_close(model.class_predictor(by_hand[:, :7]), answers[1, 0])


def test_evaluation_is_deterministic_and_training_draws_by_the_probability() -> None:
    pixels = torch.randn(2, 3, 64, 64)
    model = tiny_eomt()
    model.set_masked_attention_probabilities(0.5)
    assert torch.equal(model(pixels).class_queries_logits, model(pixels).class_queries_logits)
    model.train()
    assert not torch.equal(model(pixels).class_queries_logits, model(pixels).class_queries_logits)


def test_probabilities_are_set_checked_and_saved(tmp_path) -> None:
    model = tiny_eomt()
    assert model.config.masked_attention_probabilities == [1.0, 1.0]
    model.set_masked_attention_probabilities(0)
    assert model.config.masked_attention_probabilities == [0.0, 0.0]
    model.eomt.set_masked_attention_probabilities([0.25, 1])
    assert model.config.masked_attention_probabilities == [0.25, 1.0]
    model.save_pretrained(tmp_path)
    assert EoMTForUniversalSegmentation.from_pretrained(tmp_path).config.masked_attention_probabilities == [0.25, 1.0]
    for bad in (1.5, -0.1, [0.5], [0.5, 0.5, 0.5], [0.5, float("nan")]):
        with pytest.raises(ValueError, match=r"one number in \[0, 1\] for each of the 2 query layers"):
            model.set_masked_attention_probabilities(bad)
    assert model.config.masked_attention_probabilities == [0.25, 1.0]


@pytest.mark.parametrize("family", FAMILIES)
def test_save_and_load_is_exact_and_silent(family: str, tmp_path, caplog) -> None:
    model = tiny_eomt(**FAMILIES[family])
    model.save_pretrained(tmp_path)
    pixels = torch.randn(1, 3, 64, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = EoMTForUniversalSegmentation.from_pretrained(tmp_path)
        body = EoMTModel.from_pretrained(tmp_path)
    assert not caplog.records
    assert not loaded.training
    for ours, theirs in zip(model(pixels).to_tuple(), loaded(pixels).to_tuple(), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(body(pixels).masks_queries_logits, model(pixels).masks_queries_logits)


def test_initial_weights_follow_the_official_code() -> None:
    torch.manual_seed(0)
    model = EoMTForUniversalSegmentation(tiny_config(hidden_size=128, intermediate_size=512, num_queries=50))
    assert model.eomt.query.weight.std().item() == pytest.approx(1.0, rel=0.05)
    assert model.eomt.layers[0].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.eomt.layers[0].layer_scale1.lambda1.unique().tolist() == [1.0]
    for layer in (model.class_predictor, model.eomt.mask_head.fc2):
        reference = torch.nn.Linear(layer.in_features, layer.out_features)
        assert layer.weight.std().item() == pytest.approx(reference.weight.std().item(), rel=0.1)
        assert layer.bias.abs().max() <= layer.in_features**-0.5
    upscale = model.eomt.upscale_block.block[0]
    reference = torch.nn.ConvTranspose2d(128, 128, 2, stride=2)
    assert upscale.conv1.weight.std().item() == pytest.approx(reference.weight.std().item(), rel=0.05)
    reference = torch.nn.Conv2d(128, 128, 3, groups=128)
    assert upscale.conv2.weight.std().item() == pytest.approx(reference.weight.std().item(), rel=0.1)


def test_training_reaches_every_parameter_and_learns_one_batch() -> None:
    torch.manual_seed(0)
    model = EoMTForUniversalSegmentation(tiny_config()).train()
    model.set_masked_attention_probabilities([0.5, 1])
    pixels = torch.randn(2, 3, 64, 64)
    labels = targets([3, 2])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(60):
        loss = model(pixels, **labels).loss
        loss.backward()
        if step == 0:
            missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
            # Without RoPE, attention is blind to a constant shift of the keys: their bias gets (rounding aside) none.
            assert not [name for name in missing if not name.endswith("k_proj.bias")]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_only_matched_masks_are_in_the_graph_of_the_loss() -> None:
    """The shortcut through the matched queries gives the gradient of the plain formula, all masks in the graph."""
    pixels = torch.randn(2, 3, 64, 64)
    labels = targets([3, 0])
    gradients = []
    for shortcut in (True, False):
        model = tiny_eomt().train()
        outputs = model.eomt(pixels)
        predicted = [model.predict_queries(q) for q in outputs.query_hidden_states]
        predictions = model._predictions(outputs, predicted, labels["class_labels"])
        if not shortcut:
            for prediction, queries, features in zip(
                predictions, outputs.mask_queries, outputs.mask_features, strict=True
            ):
                prediction.mask_logits = torch.einsum("bqc,bhwc->bqhw", queries, features)
                prediction.matched_mask_logits = None
        torch.manual_seed(1)
        loss, _ = model.criterion(predictions, **labels)
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("counts", [[2, 5], [3, 3], [0, 4], [0, 0], [9, 1]])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_step_of_an_accelerator_equals_that_of_a_cpu(counts, autocast, monkeypatch) -> None:
    # Queries, keys and values in one product, the matched masks of all images in one, sums over points in parts: all
    # for the sake of fewer kernels.
    model = tiny_eomt(num_hidden_layers=3, num_query_layers=2).train()

    def step() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        torch.manual_seed(0)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(torch.randn(2, 3, 64, 64), **targets(counts)).loss
        loss.backward()
        return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    loss, gradients = step()
    joined = []
    monkeypatch.setattr(plain_vit_layers, "joins_projections", lambda states: joined.append(states.dtype) or True)
    monkeypatch.setattr(modeling_eomt, "joins_images", lambda _: True)
    monkeypatch.setattr(mask_criterion, "_parts", lambda rows: 4)
    other_loss, other_gradients = step()
    assert joined == [torch.bfloat16 if autocast else torch.float32] * 3
    # In half precision the order of sums shows: each is rounded to 2^-9 of itself, through three blocks and back.
    tolerance = 0.02 if autocast else 1e-5
    assert float((other_loss - loss).abs() / loss) < tolerance
    whole, other = (torch.cat([each.flatten() for each in all_.values()]) for all_ in (gradients, other_gradients))
    assert float((other - whole).norm() / whole.norm()) < tolerance


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("counts", [[2, 5], [0, 4]])
def test_cuda_step_equals_cpu(counts) -> None:
    model = tiny_eomt(num_hidden_layers=3, num_query_layers=2).train()
    found = []
    for device in ("cpu", "cuda"):
        model.to(device).zero_grad()
        generator = torch.Generator().manual_seed(0)
        model.criterion.point_sampler = lambda *sizes: torch.rand(*sizes[:2], 2, generator=generator).to(sizes[2])  # noqa: B023
        given = {name: [each.to(device) for each in values] for name, values in targets(counts).items()}
        pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)).to(device)
        with torch.backends.cudnn.flags(allow_tf32=False):
            loss = model(pixels, **given).loss
            loss.backward()
        gradient = torch.cat([parameter.grad.flatten().cpu() for parameter in model.parameters()])
        found.append((loss.detach().cpu(), gradient))
    (loss, gradient), (other_loss, other) = found
    torch.testing.assert_close(other_loss, loss, rtol=1e-4, atol=0)
    # A rounding can choose another of two points that are almost equally uncertain.
    assert float((other - gradient).norm() / gradient.norm()) < 1e-2


def test_loss_terms_are_reported_by_layer() -> None:
    model = tiny_eomt().train()
    outputs = model(torch.randn(1, 3, 64, 64), **targets([2]))
    assert len(outputs.loss_dict) == 3 * 3
    assert all(not term.requires_grad for term in outputs.loss_dict.values())


@pytest.mark.parametrize("training", [True, False])
def test_gradient_checkpointing_gives_the_same_loss_and_gradients(training: bool) -> None:
    pixels = torch.randn(1, 3, 64, 64)
    results = []
    for checkpointing in (False, True):
        model = tiny_eomt().train(training)
        if checkpointing:
            (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
        torch.manual_seed(3)
        loss = model(pixels, **targets([2])).loss
        loss.backward()
        results.append((loss, model.eomt.layers[0].mlp.fc1.weight.grad))
    torch.testing.assert_close(results[0], results[1])


def test_tuples_on_request() -> None:
    model = tiny_eomt()
    pixels = torch.randn(1, 3, 64, 64)
    outputs = model(pixels)
    as_tuple = model(pixels, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], outputs.class_queries_logits)
    assert torch.equal(as_tuple[1], outputs.masks_queries_logits)


def test_attentions_join_masked_and_unmasked_rows() -> None:
    model = tiny_eomt()
    model.set_attn_implementation("eager")
    attentions = model(torch.randn(1, 3, 64, 64), output_attentions=True).attentions
    assert [a.shape[-1] for a in attentions] == [21, 21, 28, 28]
    for weights in attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    assert (attentions[2][:, :, :7, 12:] == 0).any()  # queries, confined
    assert (attentions[2][:, :, 7:] > 0).all()  # everything else, free


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_annealed_inference_compiles_as_one_graph_and_exports(family: str) -> None:
    model = tiny_eomt(**FAMILIES[family])
    model.set_masked_attention_probabilities(0)
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(pixels)
        compiled = torch.compile(model, fullgraph=True)(pixels)
        exported = torch.export.export(model, (pixels,)).module()(pixels)
    for name in ("class_queries_logits", "masks_queries_logits"):
        # Fused kernels round in another order.
        torch.testing.assert_close(compiled[name], expected[name], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(exported[name], expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision_trains_and_stays_near_single(dtype: torch.dtype, autocast: bool) -> None:
    pixels = torch.randn(1, 3, 64, 64)
    labels = targets([3])
    torch.manual_seed(0)
    reference = tiny_eomt().train()(pixels, **labels).loss
    model = tiny_eomt().train()
    torch.manual_seed(0)
    if autocast:
        with torch.autocast("cpu", dtype=dtype):
            loss = model(pixels, **labels).loss
    else:
        model = model.to(dtype)
        loss = model(pixels.to(dtype), **labels).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(reference.item(), rel=0.05)
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_query_layers": 0}, "num_query_layers=0 must be between 1 and num_hidden_layers=4"),
        ({"num_query_layers": 5}, "num_query_layers=5"),
        ({"num_queries": 0}, "num_queries=0"),
        ({"num_upscale_blocks": -1}, "num_upscale_blocks=-1"),
        ({"loss_normalization": "local"}, "loss_normalization='local' is not one of"),
        ({"masked_attention_probabilities": [1.0]}, "each of the 2 query layers"),
        ({"masked_attention_probabilities": [1.0, 1.2]}, "one number in .0, 1."),
        ({"id2label": {0: "a", 2: "b"}}, r"id2label has the ids \[0, 2\], not 0 to 1"),
    ],
)
def test_impossible_configs_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(**fields)


def test_labels_that_do_not_fit_are_refused() -> None:
    model = tiny_eomt()
    pixels = torch.randn(1, 3, 64, 64)
    with pytest.raises(ValueError, match="class_labels came without mask_labels"):
        model(pixels, class_labels=[torch.tensor([0])])
    with pytest.raises(ValueError, match="5"):
        model(pixels, mask_labels=[torch.ones(1, 64, 64)], class_labels=[torch.tensor([5])])


def test_a_new_label_set_resets_the_class_head_only(tmp_path) -> None:
    model = tiny_eomt()
    model.save_pretrained(tmp_path)
    labels = {0: "cat", 1: "dog"}
    with pytest.raises(ValueError, match="ignore_mismatched_sizes=True"):
        EoMTForUniversalSegmentation.from_pretrained(tmp_path, id2label=labels)
    loaded = EoMTForUniversalSegmentation.from_pretrained(tmp_path, id2label=labels, ignore_mismatched_sizes=True)
    assert loaded.config.id2label == labels
    assert loaded.class_predictor.weight.shape == (3, 32)
    assert loaded.class_predictor.weight.isfinite().all()
    for name, tensor in model.eomt.state_dict().items():
        assert torch.equal(loaded.eomt.state_dict()[name], tensor), name
    loss = loaded.train()(torch.randn(1, 3, 64, 64), **{**targets([1]), "class_labels": [torch.tensor([1])]}).loss
    loss.backward()
    assert loaded.class_predictor.weight.grad.abs().sum() > 0


def test_config_round_trip(tmp_path) -> None:
    config = tiny_config(image_size=[64, 96], masked_attention_probabilities=[0.5, 1.0])
    config.save_pretrained(tmp_path)
    loaded = EoMTConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert loaded.grid_size == (4, 6)
