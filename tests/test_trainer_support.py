"""EoMT under Transformers' own Trainer, for a few real steps of a tiny model on generated scenes."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_segvit.data.augmentation import AugmentedDataset, augmentation
from hf_segvit.data.collation import MaskCollator
from hf_segvit.data.reading import describe, load_segmentation_dataset
from hf_segvit.demo import one_thread
from hf_segvit.models.image_processing_eomt import EoMTImageProcessor
from hf_segvit.models.modeling_eomt import EoMTForUniversalSegmentation
from hf_segvit.training.annealing import MaskAnnealing
from hf_segvit.training.derivation import derive
from hf_segvit.training.optimizers import build_optimizer, learning_rate_schedule
from hf_segvit.training.recipe import Recipe
from hf_segvit.training.transformers_trainer import EoMTTrainer, MaskAnnealingCallback, SegmentationScores, segment_maps

from .tiny_models import tiny_eomt
from .trainer_processes import Objects, one_step_and_scores, same_points


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


@pytest.fixture(scope="module")
def scenes():
    dataset = load_segmentation_dataset("generated:easy?num_scenes=8&size=64", split="train")
    return AugmentedDataset(dataset, augmentation("eomt_coco_panoptic", 64, scale_range=(1.0, 1.0))), describe(dataset)


def model_for(description) -> EoMTForUniversalSegmentation:
    return tiny_eomt(num_labels=len(description.id2label))


def arguments(folder, **overrides) -> TrainingArguments:
    settings = {
        "output_dir": str(folder),
        "max_steps": 12,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "seed": 3,
    }
    return TrainingArguments(**{**settings, **overrides})


class Probabilities(TrainerCallback):
    """What the model trains with at each step, seen after the callback under test has run."""

    def __init__(self):
        self.seen: dict[int, list[float]] = {}

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.seen[state.global_step] = list(model.config.masked_attention_probabilities)


class TestAnnealing:
    @pytest.mark.parametrize("trainer_class", [Trainer, EoMTTrainer])
    def test_probabilities_of_every_step_and_none_at_the_end(self, scenes, tmp_path, trainer_class):
        dataset, description = scenes
        model, seen = model_for(description), Probabilities()
        trainer = trainer_class(
            model,
            arguments(tmp_path),
            train_dataset=dataset,
            data_collator=MaskCollator(),
            callbacks=[MaskAnnealingCallback(), seen],
        )
        trainer.train()
        schedule = MaskAnnealing.by_rule(12, 2)
        assert seen.seen == {step: schedule.probabilities(step) for step in range(12)}
        assert 0.0 < seen.seen[3][0] < 1.0
        assert model.config.masked_attention_probabilities == [0.0, 0.0]
        records = [record for record in trainer.state.log_history if "loss" in record]
        assert [record["masked_attention_0"] for record in records] == [
            schedule.probabilities(step)[0] for step in range(1, 13)
        ]
        assert all(math.isfinite(record["loss"]) for record in records)

    def test_it_learns(self, scenes, tmp_path):
        dataset, description = scenes
        trainer = EoMTTrainer(
            model_for(description),
            arguments(tmp_path, max_steps=30, learning_rate=3e-3),
            train_dataset=dataset,
            data_collator=MaskCollator(),
        )
        trainer.train()
        losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
        assert sum(losses[-5:]) < 0.85 * sum(losses[:5])

    def test_phases_of_ones_own(self, scenes, tmp_path):
        dataset, description = scenes
        seen, callback = Probabilities(), MaskAnnealingCallback([[0, "1/4"], [0.5, 0.75]], power=1.0)
        trainer = EoMTTrainer(
            model_for(description),
            arguments(tmp_path, max_steps=8),
            train_dataset=dataset,
            data_collator=MaskCollator(),
            callbacks=[callback, seen],
        )
        assert trainer.mask_annealing is callback
        trainer.train()
        assert [seen.seen[step] for step in range(8)] == [
            [1.0, 1.0], [0.5, 1.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0], [0.0, 0.5], [0.0, 0.0], [0.0, 0.0],
        ]  # fmt: skip
        assert [callback.finished(step) for step in (5, 6)] == [False, True]

    def test_resumed_training_goes_on_in_the_schedule_and_ends_the_same(self, scenes, tmp_path):
        dataset, description = scenes

        def trainer(callback):
            return EoMTTrainer(
                model_for(description),
                arguments(tmp_path, max_steps=8, save_strategy="steps", save_steps=6),
                train_dataset=AugmentedDataset(dataset.dataset, dataset.augmentation),  # as in a fresh program
                data_collator=MaskCollator(),
                callbacks=[callback],
            )

        whole = trainer(Probabilities())
        whole.train()
        schedule = MaskAnnealing.by_rule(8, 2)
        assert schedule.probabilities(6) == [0.0, 0.5**0.9]
        saved = EoMTForUniversalSegmentation.from_pretrained(tmp_path / "checkpoint-6")
        assert saved.config.masked_attention_probabilities == [0.0, 0.5**0.9]
        seen = Probabilities()
        resumed = trainer(seen)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))  # in the middle of the second epoch
        assert seen.seen == {step: schedule.probabilities(step) for step in (6, 7)}
        assert resumed.model.config.masked_attention_probabilities == [0.0, 0.0]
        assert resumed.train_dataset.epoch == 1
        for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
            assert torch.equal(one, other)

    def test_models_without_masked_attention_and_other_layers_are_told(self, scenes, tmp_path):
        dataset, description = scenes
        settings = {"train_dataset": dataset, "data_collator": MaskCollator()}
        trainer = EoMTTrainer(
            model_for(description), arguments(tmp_path), callbacks=[MaskAnnealingCallback([[0, 1]])], **settings
        )
        with pytest.raises(ValueError, match="annealing has 1 phases, and the model 2 query layers"):
            trainer.train()
        with pytest.raises(ValueError, match="Linear has no masked attention"):
            MaskAnnealingCallback().on_train_begin(None, trainer.state, None, model=torch.nn.Linear(1, 1))


@pytest.mark.parametrize("normalization", ["global", "per_rank"])
def test_accumulated_batches_equal_the_joint_one(tmp_path, normalization):

    def trained(trainer_class, batch_size: int, accumulation: int):
        torch.manual_seed(0)
        model = tiny_eomt(loss_normalization=normalization)
        model.criterion.point_sampler = same_points
        trainer = trainer_class(
            model,
            arguments(
                tmp_path,
                max_steps=1,
                optim="sgd",
                learning_rate=1e-2,
                max_grad_norm=0,
                per_device_train_batch_size=batch_size,
                gradient_accumulation_steps=accumulation,
            ),
            train_dataset=Objects(4),
            data_collator=MaskCollator(),
        )
        loss = trainer.train().training_loss
        return loss, torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    before = torch.cat([parameter.detach().flatten() for parameter in tiny_eomt().parameters()])
    joint_loss, joint = trained(EoMTTrainer, 4, 1)
    for batch_size, accumulation in ((1, 4), (2, 2)):
        loss, weights = trained(EoMTTrainer, batch_size, accumulation)
        # Sums in another order, in float32; the step moves the weights by about 0.1.
        assert loss == pytest.approx(joint_loss, rel=1e-5)
        assert (weights - joint).norm() < 1e-4 * (joint - before).norm()
    _, plain = trained(Trainer, 1, 4)
    assert (plain - joint).norm() > 0.01 * (joint - before).norm(), "what EoMTTrainer is for"


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    command = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "-m", "tests.trainer_processes"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, *command, str(tmp_path)],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    weights, scores = load_file(tmp_path / "weights.safetensors"), json.loads((tmp_path / "scores.json").read_text())
    expected_weights, expected_scores = one_step_and_scores(tmp_path / "alone", 4)
    for name, expected in expected_weights.items():
        # The step moves the largest weights by about 0.1; sums over processes come in another order.
        torch.testing.assert_close(weights[name], expected, rtol=1e-4, atol=1e-5, msg=name)
    # Five images among two processes: the one that fills up the second's share counts once.
    assert scores == pytest.approx(expected_scores, abs=1e-3)
    assert scores["pixel_accuracy"] > 0.01


class TestEvaluation:
    @pytest.mark.parametrize("task", ["panoptic", "semantic"])
    def test_scores_equal_those_of_the_metric_on_its_own(self, scenes, tmp_path, task):
        dataset, description = scenes
        model = model_for(description)
        processor = EoMTImageProcessor(
            task="panoptic",
            size={"height": 64, "width": 64},
            stuff_classes=description.stuff_classes,
            num_labels=len(description.id2label),
            threshold=0.0,
        )
        scores = SegmentationScores(processor, len(description.id2label), task)
        trainer = EoMTTrainer(
            model,
            arguments(tmp_path, batch_eval_metrics=True, per_device_eval_batch_size=3, eval_do_concat_batches=False),
            eval_dataset=dataset,
            data_collator=MaskCollator(),
            compute_metrics=scores,
        )
        result = trainer.evaluate()
        assert trainer.evaluate()["eval_loss"] == pytest.approx(result["eval_loss"], rel=0.5)  # points are random
        assert math.isfinite(result["eval_loss"])

        batch = MaskCollator()([dataset[index] for index in range(len(dataset))])
        with torch.no_grad():
            outputs = model(batch["pixel_values"])
        alone = SegmentationScores(processor, len(description.id2label), task).metric
        sizes = [(64, 64)] * len(dataset)
        if task == "semantic":
            answers = processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)
            truths = []
            for masks, labels in zip(batch["mask_labels"], batch["class_labels"], strict=True):
                truth = torch.full((64, 64), -1)
                for mask, label in zip(masks, labels, strict=True):
                    truth[mask] = label
                truths.append(truth)
            key = "mean_iou"
        else:
            answers = processor.post_process_panoptic_segmentation(outputs, target_sizes=sizes)
            truths = []
            for masks, labels in zip(batch["mask_labels"], batch["class_labels"], strict=True):
                truth = torch.full((64, 64), -1)
                for place, mask in enumerate(masks):
                    truth[mask] = place
                rows = [{"id": place, "label_id": int(label)} for place, label in enumerate(labels)]
                truths.append({"segmentation": truth, "segments_info": rows})
            key = "pq"
        alone.add_batch(predictions=answers, references=truths)
        assert result[f"eval_{key}"] == pytest.approx(alone.compute()[key], abs=1e-9)

    def test_without_scores_there_is_a_loss_and_predictions(self, scenes, tmp_path):
        dataset, description = scenes
        trainer = EoMTTrainer(
            model_for(description),
            arguments(tmp_path, per_device_eval_batch_size=4),
            eval_dataset=dataset,
            data_collator=MaskCollator(),
        )
        assert math.isfinite(trainer.evaluate()["eval_loss"])
        predictions = trainer.predict(dataset)
        classes, masks = predictions.predictions
        assert classes.shape == (8, 7, len(description.id2label) + 1)
        assert masks.shape == (8, 7, 16, 16)
        assert predictions.label_ids[0].shape == (8, 64, 64)

    def test_a_task_without_scores(self):
        with pytest.raises(ValueError, match="choose one of panoptic, semantic"):
            SegmentationScores(EoMTImageProcessor(task="instance", num_labels=3), 3)


def test_segment_maps():
    masks = torch.zeros(2, 2, 3, dtype=torch.bool)
    masks[0, 0] = True
    masks[1, 0, 2] = masks[1, 1, 2] = True
    maps, labels = segment_maps([masks, masks[:0]], [torch.tensor([4, 2]), torch.tensor([], dtype=torch.int64)])
    assert maps.tolist() == [[[0, 0, 1], [-1, -1, 1]], [[-1] * 3] * 2]
    assert labels.tolist() == [[4, 2], [-100, -100]]


def test_groups_and_schedule_of_a_recipe_go_in(scenes, tmp_path):
    dataset, description = scenes
    model = model_for(description)
    recipe = Recipe(steps=6, backbone="b", batch_size=2, learning_rate=1e-3, warmup_steps=[2, 2])
    plan = derive(recipe, len(dataset), config=model.config)
    optimizer = build_optimizer(model, plan)
    before = model.eomt.layers[0].mlp.fc1.weight.detach().clone()
    trainer = EoMTTrainer(
        model,
        arguments(tmp_path, max_steps=2, max_grad_norm=recipe.max_grad_norm),
        train_dataset=dataset,
        data_collator=MaskCollator(),
        optimizers=(optimizer, learning_rate_schedule(optimizer, plan)),
    )
    trainer.train()
    assert torch.equal(model.eomt.layers[0].mlp.fc1.weight, before), "the backbone stands still in the first stage"
