"""The loop's options against a plain run, the choice of the best checkpoint, and where training ends early."""

import copy
import warnings

import pytest
import torch
from safetensors.torch import load_file

from hf_segvit import EoMTForUniversalSegmentation
from hf_segvit.models.configuration_eomt import EoMTConfig
from hf_segvit.models.modeling_eomt import EoMTModel
from hf_segvit.training.loop import train
from hf_segvit.training.results import Selection
from hf_segvit.training.start import compile_blocks
from hf_segvit.training.tasks.eomt import EoMTTask

from .tiny_training import MODEL, saved_tensors, tiny_recipe


def losses_of(recipe, task=None):
    losses = []
    outcome = train(recipe, task=task, cpu=True, on_step=lambda step, loss: losses.append(loss), progress=False)
    return losses, outcome


def test_options_that_must_not_change_the_result(tmp_path):
    plain, _ = losses_of(tiny_recipe(tmp_path / "plain", steps=3))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "`gradient_checkpointing_enable` is deprecated")
        recipe = tiny_recipe(tmp_path / "checkpointed", steps=3, gradient_checkpointing=True)
        checkpointed, outcome = losses_of(recipe)
    assert outcome.model.is_gradient_checkpointing
    assert checkpointed == pytest.approx(plain, rel=1e-5)  # the same sums, computed twice


def test_bf16_trains_close_to_float32(tmp_path):
    plain, _ = losses_of(tiny_recipe(tmp_path / "plain", steps=2))
    half, outcome = losses_of(tiny_recipe(tmp_path / "half", steps=2, precision="bf16"))
    assert half != plain
    assert half == pytest.approx(plain, rel=0.05)  # 8 bits of mantissa
    assert all(parameter.dtype == torch.float32 for parameter in outcome.model.parameters())
    again, _ = losses_of(tiny_recipe(tmp_path / "again", steps=2))
    assert again == plain, "the precision of one training does not stay for the next"


def test_what_depends_on_the_image_size_compiles_for_every_size():
    torch._dynamo.reset()
    torch.manual_seed(0)
    compiled = EoMTModel(EoMTConfig(**MODEL, image_size=64))
    plain = copy.deepcopy(compiled)
    compile_blocks(compiled)
    for model in (compiled, plain):
        torch.manual_seed(1)
        # The scale layers see 4 x 4 and 8 x 8 cells; positions are resampled to the second grid.
        model.upscale_block(torch.randn(2, 4, 4, 32)).square().mean().backward()
        for grid_height in (4, 6):
            model.embeddings(torch.randn(2, 3, 16 * grid_height, 64)).square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in plain.named_parameters() if parameter.grad is not None}
    assert any("upscale_block" in name for name in gradients)
    for name, parameter in compiled.named_parameters():
        if name in gradients:  # fused kernels round in another order
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.slow
def test_compiled_blocks_give_the_same_losses(tmp_path):
    plain, _ = losses_of(tiny_recipe(tmp_path / "plain", steps=3))
    compiled, _ = losses_of(tiny_recipe(tmp_path / "compiled", steps=3, compile=True))
    assert compiled == pytest.approx(plain, rel=1e-4)
    names = load_file(tmp_path / "compiled" / "model" / "model.safetensors").keys()
    assert names == load_file(tmp_path / "plain" / "model" / "model.safetensors").keys()


def test_a_checkpoint_is_fine_tuned_with_a_frozen_backbone(tmp_path):
    train(tiny_recipe(tmp_path / "first", steps=1, warmup_steps=[0]), cpu=True, progress=False)
    source = tmp_path / "first" / "model"
    recipe = tiny_recipe(
        tmp_path / "second", steps=2, init=str(source), model_config={}, freeze="backbone", warmup_steps=[0]
    )
    train(recipe, cpu=True, progress=False)
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "second" / "model"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert not {name for name in changed if "layers." in name or "embeddings." in name}
    assert "class_predictor.weight" in changed


def test_adapters_are_merged_into_an_ordinary_model(tmp_path):
    pytest.importorskip("peft")
    train(tiny_recipe(tmp_path / "first", steps=1, warmup_steps=[0]), cpu=True, progress=False)
    source = tmp_path / "first" / "model"
    recipe = tiny_recipe(
        tmp_path / "second", steps=2, init=str(source), model_config={}, lora={"rank": 2}, warmup_steps=[0]
    )
    outcome = train(recipe, cpu=True, progress=False)
    loaded = EoMTForUniversalSegmentation.from_pretrained(tmp_path / "second" / "model").eval()
    before = load_file(source / "model.safetensors")
    after = loaded.state_dict()
    assert before.keys() == after.keys()
    assert not torch.equal(before["eomt.layers.0.mlp.fc1.weight"], after["eomt.layers.0.mlp.fc1.weight"])
    assert torch.equal(before["eomt.layers.0.norm1.weight"], after["eomt.layers.0.norm1.weight"])
    pixels = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(loaded(pixels).class_queries_logits, outcome.model(pixels).class_queries_logits)


class ScoredTask(EoMTTask):
    """Scores are given; the weights are remembered at each evaluation."""

    def __init__(self, recipe, scores):
        super().__init__(recipe)
        self.scores, self.weights = iter(scores), []

    def evaluate(self, model, processor, device, limit):
        torch.rand(7)  # an evaluation that draws numbers must not change the training
        self.weights.append(model.class_predictor.weight.detach().clone())
        return {"pq": next(self.scores)}


def test_the_best_weights_are_published_once_masks_are_gone(tmp_path):
    """Annealing of two layers in 12 steps ends with step 10; what was better before does not count."""
    recipe = tiny_recipe(tmp_path, steps=12, evaluate_every=1.0, save_every="end", save_every_steps=None, keep_last=1)
    task = ScoredTask(recipe, [0.9, 0.8, 0.7, 0.6, 0.3, 0.2])
    losses, outcome = losses_of(recipe, task)
    results = outcome.results
    assert [row["step"] for row in results["evaluations"]] == [2, 4, 6, 8, 10, 12]
    assert [row["not_comparable"] is None for row in results["evaluations"]] == [False] * 4 + [True] * 2
    assert results["metrics"] == {"pq": 0.3}
    assert results["step"] == 10
    assert "those up to step 8 were left out, as masked attention is still being annealed" in results["selection"]
    assert torch.equal(outcome.model.class_predictor.weight, task.weights[4])
    assert not torch.equal(task.weights[4], task.weights[5])
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000010", "step-00000012"]

    seldom, _ = losses_of(tiny_recipe(tmp_path / "seldom", steps=12))
    assert losses == seldom, "evaluations leave no trace in the training"


def test_training_ends_when_patience_does(tmp_path):
    recipe = tiny_recipe(tmp_path, steps=40, evaluate_every=1.0, annealing=False, patience=2)
    losses, outcome = losses_of(recipe, ScoredTask(recipe, [0.1, 0.3, 0.2, 0.3, 0.9]))
    assert len(losses) == outcome.step == 8
    assert outcome.results["metrics"] == {"pq": 0.3}
    assert outcome.results["step"] == 4


def test_the_average_is_what_is_scored_and_published(tmp_path):
    recipe = tiny_recipe(tmp_path, ema_decay=0.5, steps=4, annealing=False)
    task = ScoredTask(recipe, [0.5])
    outcome = losses_of(recipe, task)[1]
    tensors = saved_tensors(tmp_path)
    average = tensors["ema/class_predictor.weight"]
    assert not torch.equal(average, tensors["model/class_predictor.weight"])
    assert torch.equal(task.weights[0], average)
    assert torch.equal(outcome.model.class_predictor.weight, average)


def test_selection_goes_on_where_it_was():
    selection = Selection("pq", patience=2)
    for step, score in ((1, 0.5), (2, 0.4)):
        selection.add(step, {"pq": score}, None)
    other = Selection("pq", patience=2)
    other.restore(selection.state())
    assert not other.out_of_patience
    assert not other.add(3, {"pq": 0.5}, None), "as good is not better"
    assert other.out_of_patience
    assert other.best["step"] == 1
    with pytest.raises(ValueError, match=r"'pq' is no score of this task; choose one of mean_iou"):
        other.add(4, {"mean_iou": 1.0}, None)
