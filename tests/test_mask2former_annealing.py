"""Mask annealing of Mask2Former: beside stock Mask2Former, and one whose masks are opened from outside."""

import copy

import pytest
import torch
from torch import nn
from transformers import Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor, Trainer, TrainingArguments
from transformers.models.mask2former.modeling_mask2former import Mask2FormerMaskPredictor

from hf_segvit.cli import main
from hf_segvit.data.generated_scenes import GeneratedScenes
from hf_segvit.inference.loading import load_universal_model
from hf_segvit.models.configuration_mask2former_vit import REMOVABLE_PARTS
from hf_segvit.models.mask2former_annealing import MaskAnnealedDecoder, enable_mask_annealing
from hf_segvit.models.modeling_vit_p_fusion import ViTPFusionForUniversalSegmentation
from hf_segvit.training.annealing import MaskAnnealing
from hf_segvit.training.transformers_trainer import EoMTTrainer, MaskAnnealingCallback

from .tiny_generators import tiny_classifier, tiny_generator
from .tiny_models import tiny_eomt, tiny_mask2former_vit

LAYERS = 4


def stock(**overrides) -> Mask2FormerForUniversalSegmentation:
    """A tiny Mask2Former of Transformers with four layers in its decoder and random weights."""
    torch.manual_seed(0)
    config = copy.deepcopy(tiny_generator("mask2former").config)
    config.update({"decoder_layers": LAYERS + 1, "init_std": 0.3, "init_xavier_std": 1.0, "train_num_points": 64})
    config.update(overrides)
    return Mask2FormerForUniversalSegmentation(config).eval()


def batch() -> dict:
    generator = torch.Generator().manual_seed(3)
    masks = [(torch.rand(n, 64, 96, generator=generator) > 0.6).float() for n in (3, 2)]
    classes = [torch.tensor([0, 1, 2]), torch.tensor([3, 4])]
    pixels = torch.randn(2, 3, 64, 96, generator=generator)
    return {"pixel_values": pixels, "mask_labels": masks, "class_labels": classes}


def seed(number: int) -> None:
    torch.manual_seed(number)


def answers(model, **inputs) -> list[torch.Tensor]:
    """Loss and all predictions, with the same random points."""
    # Not before the model: some versions of Transformers draw numbers in the decoder too, and do not use them.
    hook = model.criterion.register_forward_pre_hook(lambda *_: seed(7))
    outputs = model(**inputs, output_auxiliary_logits=True)
    hook.remove()
    layers = [*(outputs.auxiliary_logits or ()), outputs]
    loss = [] if outputs.loss is None else [outputs.loss]
    return [*loss, *(layer[name] for layer in layers for name in ("class_queries_logits", "masks_queries_logits"))]


def trained(model) -> dict[str, torch.Tensor]:
    """Gradients by name, of the parameters that have one."""
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def open_masks(model, monkeypatch) -> None:
    """Let stock Mask2Former attend to everything, by masks that close nothing."""
    whole = Mask2FormerMaskPredictor.forward

    def forward(self, *args, **kwargs):
        logits, closed = whole(self, *args, **kwargs)
        return logits, torch.zeros_like(closed)

    monkeypatch.setattr(Mask2FormerMaskPredictor, "forward", forward)


class Calls:
    """Counts the mask predictions of a decoder, and records the masks that its layers get."""

    def __init__(self, decoder: nn.Module) -> None:
        self.predictions, self.masks = 0, []
        decoder.mask_predictor.mask_embedder.register_forward_hook(self._predicted)
        for layer in decoder.layers:
            layer.register_forward_pre_hook(self._ran, with_kwargs=True)

    def _predicted(self, *args) -> None:
        self.predictions += 1

    def _ran(self, layer, args, kwargs) -> None:
        self.masks.append(kwargs["encoder_attention_mask"])


class TestStock:
    @pytest.mark.parametrize("training", [False, True])
    def test_probability_1_is_stock_mask2former_bit_by_bit(self, training):
        inputs = batch()
        model = stock().train(training)
        expected = answers(model, **inputs)
        expected[0].backward()
        gradients = trained(model)
        model.zero_grad()
        assert enable_mask_annealing(model) is model
        found = answers(model, **inputs)
        assert len(found) == len(expected) == 1 + 2 * (LAYERS + 1)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        found[0].backward()
        torch.testing.assert_close(trained(model), gradients)

    @pytest.mark.parametrize("training", [False, True])
    def test_probability_0_is_stock_mask2former_that_attends_to_everything(self, training, monkeypatch):
        inputs = batch()
        annealed = enable_mask_annealing(stock(), 0.0).train(training)
        with monkeypatch.context() as context:
            model = stock().train(training)
            masked = answers(model, pixel_values=inputs["pixel_values"])
            open_masks(model, context)
            expected = answers(model, pixel_values=inputs["pixel_values"])
        found = answers(annealed, pixel_values=inputs["pixel_values"])
        # Training predicts for the loss of every layer, inference only at the end.
        assert len(found) == (2 * (LAYERS + 1) if training else 2)
        for one, other in zip(found, expected[-len(found) :], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        assert (found[-1] - masked[-1]).abs().max() > 0.01

    def test_inference_skips_the_predictions_before_layers_without_masks(self):
        model, inputs = enable_mask_annealing(stock()), {"pixel_values": batch()["pixel_values"]}
        calls = Calls(model.model.transformer_module.decoder)
        for probabilities, expected in (
            ([1, 1, 1, 1], [True] * 4),
            ([0, 0.2, 0.5, 1], [False, False, True, True]),
            ([0, 0, 0, 0], [False] * 4),
        ):
            calls.predictions, calls.masks = 0, []
            model.set_masked_attention_probabilities(probabilities)
            outputs = model(**inputs, output_hidden_states=True)
            assert calls.predictions == sum(expected) + 1
            assert [mask is not None for mask in calls.masks] == expected
            assert len(outputs.transformer_decoder_hidden_states) == LAYERS + 1

    def test_training_draws_queries_that_attend_to_everything(self):
        model = enable_mask_annealing(stock(), [0.5, 0.0, 1.0, 0.5]).train()
        calls = Calls(model.model.transformer_module.decoder)
        pixels = torch.randn(1, 3, 64, 64).expand(60, -1, -1, -1)
        model(pixels)
        assert calls.predictions == LAYERS + 1
        half, none, all_masked, _ = calls.masks
        assert none is None
        heads = model.config.num_attention_heads
        closed = half.unflatten(0, (60, heads)).any(-1)  # (images, heads, queries)
        assert (closed == closed[:, :1]).all()  # a query is drawn once for all heads
        could = all_masked.unflatten(0, (60, heads)).any(-1)[:, 0]
        share = closed[:, 0].float().mean().item() / could.float().mean().clamp(min=1e-9).item()
        assert 0.35 < share < 0.75

    def test_gradients_reach_every_parameter_at_any_probability(self):
        model = stock().train()
        model(**batch()).loss.backward()
        expected = trained(model).keys()
        for probability in (0.0, 0.5, 1.0):
            model = enable_mask_annealing(stock(), probability).train()
            model(**batch()).loss.backward()
            assert trained(model).keys() == expected
            assert all(gradient.isfinite().all() for gradient in trained(model).values())

    def test_never_masked_predicts_and_supervises_the_final_masks_only(self, tmp_path):
        model = enable_mask_annealing(stock(), masked_attention=False).train()
        calls = Calls(model.model.transformer_module.decoder)
        assert len(answers(model, **batch())) == 3
        assert calls.predictions == 1
        assert calls.masks == [None] * LAYERS
        # The loss is that of stock Mask2Former's final layer.
        final = answers(enable_mask_annealing(stock(), 0.0).eval(), **batch())
        torch.testing.assert_close(answers(model, **batch())[0], final[0])
        model.save_pretrained(tmp_path)
        loaded = enable_mask_annealing(Mask2FormerForUniversalSegmentation.from_pretrained(tmp_path))
        assert loaded.config.masked_attention is False
        with pytest.raises(ValueError, match="masked_attention=False, so there are no masks to anneal"):
            loaded.set_masked_attention_probabilities(0.5)

    def test_saved_in_the_config_and_restored(self, tmp_path):
        model = enable_mask_annealing(stock(), [0.0, 0.25, 0.5, 1.0])
        model.save_pretrained(tmp_path)
        loaded = Mask2FormerForUniversalSegmentation.from_pretrained(tmp_path)
        assert loaded.config.masked_attention_probabilities == [0.0, 0.25, 0.5, 1.0]
        assert enable_mask_annealing(loaded).config.masked_attention_probabilities == [0.0, 0.25, 0.5, 1.0]
        pixels = batch()["pixel_values"]
        for one, other in zip(answers(loaded, pixel_values=pixels), answers(model, pixel_values=pixels), strict=True):
            assert torch.equal(one, other)
        duplicate = copy.deepcopy(model)
        duplicate.set_masked_attention_probabilities(0.0)
        assert model.config.masked_attention_probabilities == [0.0, 0.25, 0.5, 1.0]
        assert len(answers(duplicate, pixel_values=pixels)) == 2

    def test_the_loader_of_this_package_restores_it(self, tmp_path):
        enable_mask_annealing(stock(), 0.0).save_pretrained(tmp_path)
        Mask2FormerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path)
        model, _ = load_universal_model(str(tmp_path))
        assert isinstance(model.model.transformer_module.decoder, MaskAnnealedDecoder)
        assert len(answers(model, pixel_values=batch()["pixel_values"])) == 2

    def test_the_command_scores_an_annealed_checkpoint_by_one_prediction(self, tmp_path, capsys, monkeypatch):
        labels = GeneratedScenes(1).id2label
        model = stock(id2label=labels, label2id={name: label for label, name in labels.items()})
        enable_mask_annealing(model, 0.0).save_pretrained(tmp_path / "model")
        Mask2FormerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path / "model")
        # Would be called wherever attention is masked.
        monkeypatch.setattr(Mask2FormerMaskPredictor, "forward", lambda *_: pytest.fail("masks attention"))
        words = ["evaluate", "--model", str(tmp_path / "model"), "--data", "generated:easy?num_scenes=2&size=64"]
        assert main([*words, "--split", "val", "--device", "cpu", "--output", str(tmp_path / "scores")]) == 0
        assert "pq_things" in capsys.readouterr().out

    def test_a_fused_model_keeps_it(self, tmp_path):
        generator = enable_mask_annealing(tiny_generator("mask2former"), 0.0)
        generator.save_pretrained(tmp_path / "generator")
        tiny_classifier().save_pretrained(tmp_path / "classifier")
        parts = str(tmp_path / "generator"), str(tmp_path / "classifier")
        fused = ViTPFusionForUniversalSegmentation.from_generator_and_classifier(*parts)
        fused.save_pretrained(tmp_path / "fused")
        for model in (fused, ViTPFusionForUniversalSegmentation.from_pretrained(tmp_path / "fused")):
            decoder = model.generator.model.transformer_module.decoder
            assert isinstance(decoder, MaskAnnealedDecoder)
            assert decoder.annealing_config.masked_attention_probabilities == [0.0]

    def test_what_does_not_fit_is_refused(self):
        with pytest.raises(ValueError, match="each of the 4 decoder layers"):
            enable_mask_annealing(stock(), [0.5])
        with pytest.raises(ValueError, match=r"one number in \[0, 1\]"):
            enable_mask_annealing(stock(), 1.5)
        with pytest.raises(ValueError, match=r"leaves no masks that probabilities=0\.5 could open"):
            enable_mask_annealing(stock(), 0.5, masked_attention=False)
        with pytest.raises(
            ValueError, match=r"MaskFormerForInstanceSegmentation is no Mask2Former.*no masks to anneal"
        ):
            enable_mask_annealing(tiny_generator("maskformer"))
        with pytest.raises(ValueError, match="call set_masked_attention_probabilities"):
            enable_mask_annealing(tiny_eomt())
        with pytest.raises(ValueError, match="masked_attention=False, so there are no masks to anneal"):
            tiny_eomt(masked_attention=False).set_masked_attention_probabilities(1.0)

    def test_masks_of_low_precision_round_as_in_stock_mask2former(self):
        model = stock().to(torch.bfloat16)
        pixels = batch()["pixel_values"].to(torch.bfloat16)
        expected = answers(model, pixel_values=pixels)
        found = answers(enable_mask_annealing(model), pixel_values=pixels)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


class TestOnAPlainViT:
    @pytest.mark.parametrize("removed", REMOVABLE_PARTS)
    def test_annealed_rows_predict_once_and_train_as_the_others(self, removed):
        model = tiny_mask2former_vit(removed)
        decoder = model.mask2former.transformer_module.decoder
        # Random masks without an adapter are almost all open. Of both signs, they close about half of the positions.
        with torch.no_grad():
            for parameter in decoder.get_submodule("mask_predictor.mask_embedder.2.0").parameters():
                parameter[::2] *= -1
        inputs = batch()
        calls = Calls(decoder)
        masked = answers(model, **inputs)
        assert calls.predictions == 4
        assert all(mask.any() for mask in calls.masks)
        model.set_masked_attention_probabilities(0)
        calls.predictions, calls.masks = 0, []
        found = answers(model, pixel_values=inputs["pixel_values"])
        assert len(found) == 2
        assert calls.predictions == 1
        assert calls.masks == [None] * 3
        assert not torch.equal(found[-1], masked[-1])
        loss = model.train()(**inputs).loss
        loss.backward()
        assert [name for name, value in model.named_parameters() if value.requires_grad and value.grad is None] == []

    def test_never_masked_supervises_the_final_masks_only(self, tmp_path):
        model = tiny_mask2former_vit("adapter", masked_attention=False).train()
        outputs = model(**batch())
        assert {name.rpartition("_")[2] for name in outputs.loss_dict} == {"0"}
        with pytest.raises(ValueError, match="no masks to anneal"):
            model.set_masked_attention_probabilities([0.5] * 3)

    def test_saved_in_the_config(self, tmp_path):
        model = tiny_mask2former_vit("multi_scale", masked_attention_probabilities=[0, 0.75, 0])
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path)
        assert loaded.config.masked_attention_probabilities == [0, 0.75, 0]
        pixels = batch()["pixel_values"]
        pairs = zip(answers(loaded, pixel_values=pixels), answers(model, pixel_values=pixels), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)
        with pytest.raises(ValueError, match="each of the 3 decoder layers"):
            tiny_mask2former_vit(masked_attention_probabilities=[1.0])


class Scenes(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict:
        generator = torch.Generator().manual_seed(index)
        return {
            "pixel_values": torch.randn(3, 64, 64, generator=generator),
            "mask_labels": torch.rand(2, 64, 64, generator=generator) > 0.5,
            "class_labels": torch.tensor([0, 1]),
        }


def collate(samples: list[dict]) -> dict:
    pixels = torch.stack([sample["pixel_values"] for sample in samples])
    masks = [sample["mask_labels"].float() for sample in samples]
    return {"pixel_values": pixels, "mask_labels": masks, "class_labels": [s["class_labels"] for s in samples]}


@pytest.mark.parametrize("build", [lambda: enable_mask_annealing(stock()), lambda: tiny_mask2former_vit("adapter")])
def test_the_callback_anneals_both_under_trainer(build, tmp_path):
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        remove_unused_columns=False, logging_steps=1, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    model = build()
    trainer = Trainer(
        model, arguments, train_dataset=Scenes(), data_collator=collate, callbacks=[MaskAnnealingCallback()]
    )
    trainer.train()
    num_layers = len(model.config.masked_attention_probabilities)
    assert model.config.masked_attention_probabilities == [0.0] * num_layers
    records = [record for record in trainer.state.log_history if "loss" in record]
    schedule = MaskAnnealing.by_rule(6, num_layers)
    for step, record in enumerate(records, start=1):
        values = [record[f"masked_attention_{layer}"] for layer in range(num_layers)]
        assert values == schedule.probabilities(step)
        assert torch.isfinite(torch.tensor(record["loss"]))
    assert len(records) == 6


def test_the_trainer_of_this_package_names_the_one_for_stock_models(tmp_path):
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(ValueError, match=r"not Mask2FormerForUniversalSegmentation; take Transformers' Trainer, with"):
        EoMTTrainer(enable_mask_annealing(stock()), arguments)


def test_the_callback_refuses_models_without_masks(tmp_path):
    arguments = TrainingArguments(output_dir=str(tmp_path), max_steps=2, report_to=[], use_cpu=True)
    settings = {"train_dataset": Scenes(), "data_collator": collate}
    without = Trainer(stock(), arguments, callbacks=[MaskAnnealingCallback()], **settings)
    with pytest.raises(ValueError, match="Mask2Former after enable_mask_annealing"):
        without.train()
    never = enable_mask_annealing(stock(), masked_attention=False)
    with pytest.raises(ValueError, match="annealing has phases, but the model has masked_attention=False"):
        Trainer(never, arguments, callbacks=[MaskAnnealingCallback([[0, 1]] * 4)], **settings).train()
    other = enable_mask_annealing(stock())
    with pytest.raises(ValueError, match="annealing has 1 phases, and the model 4 decoder layers"):
        Trainer(other, arguments, callbacks=[MaskAnnealingCallback([[0, 1]])], **settings).train()
