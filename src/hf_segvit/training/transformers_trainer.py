"""Train EoMT with Transformers' own `Trainer`: `EoMTTrainer`.

Plain `Trainer` gets four things wrong, which `EoMTTrainer` corrects:

- Without mask annealing, attention would stay masked, and inference slow; see `MaskAnnealingCallback`.
- With gradient accumulation it averages the losses of batches with different numbers of segments, which is not the loss
  of the joint batch.
- For metrics it gathers only tensors of one shape, while masks come as lists. `SegmentationScores` computes panoptic
  quality or mean IoU at the resolution of the batches; `hf-segvit evaluate` follows the protocol of the papers.
- With several processes, or after resuming, the data set is not told the epoch, so that its augmentation repeats.

Layer-wise learning rates and the two-stage warm-up are passed as `optimizers`:

    recipe = Recipe(steps=args.max_steps, backbone="...", batch_size=16)
    plan = derive(recipe, len(dataset), config=model.config)
    optimizer = build_optimizer(model, plan)
    trainer = EoMTTrainer(
        model, args, train_dataset=dataset, data_collator=MaskCollator(),
        optimizers=(optimizer, learning_rate_schedule(optimizer, plan)),
    )
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..metrics.accumulation import ImageMetric
from ..metrics.mean_iou import MeanIoU
from ..metrics.panoptic_quality import PanopticQuality
from .annealing import POWER, MaskAnnealing

NO_LABEL = -100  # Trainer pads with it too where processes gather labels of different lengths
TASKS = ("panoptic", "semantic")


class EoMTTrainer(Trainer):
    """`Trainer` for EoMT, and Mask2Former on a plain ViT, on batches of `MaskCollator` or `EoMTImageProcessor`.

    A `MaskAnnealingCallback` among `callbacks` replaces the default one, which follows the official rule.
    `compute_metrics`, such as `SegmentationScores`, gets class and mask logits as `predictions`, and the two tensors of
    `segment_maps` as `label_ids`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        model = _unwrapped(self.model)
        if not hasattr(getattr(model, "criterion", None), "count_normalizers"):
            raise ValueError(
                f"EoMTTrainer trains models of this package with a MaskCriterion, not {type(model).__name__}; take "
                "Transformers' Trainer, with MaskAnnealingCallback after enable_mask_annealing"
            )
        # Trainer would drop every column that is not named like an argument of the model's forward.
        self.args.remove_unused_columns = False
        handler = self.callback_handler
        given = [callback for callback in handler.callbacks if isinstance(callback, MaskAnnealingCallback)]
        self.mask_annealing = given[0] if given else MaskAnnealingCallback()
        if not given:
            self.add_callback(self.mask_annealing)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        """The batches of a step, each with the normalizers of the joint batch of all processes."""
        # Accelerate omits this where it wraps the sampler: with several processes, and after resuming.
        dataset: Any = self.train_dataset
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(math.floor(self.state.epoch or 0))
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        labels = [label for batch in batches for label in batch["class_labels"]]
        if not labels:
            return batches, num_items
        model = self.accelerator.unwrap_model(self.model)
        normalizers = model.criterion.count_normalizers(labels, model.config.num_queries)
        # Trainer divides each loss by the number of batches, while the joint loss is the sum: this cancels out.
        return [{**batch, "loss_normalizers": normalizers / len(batches)} for batch in batches], num_items

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the probabilities of masked attention to the logs of training."""
        if "loss" in logs:  # here and not only in the callback's on_log: trackers may come before it
            logs.update(self.mask_annealing.record(self.state.global_step))
        super().log(logs, start_time)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """As `Trainer`'s, with labels as tensors, which processes can gather."""
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if labels is None:
            return loss, logits, None
        masks: Any = inputs["mask_labels"]
        classes: Any = inputs["class_labels"]
        return loss, logits, tuple(label.to(self.args.device) for label in segment_maps(masks, classes))


def segment_maps(mask_labels: list[Tensor], class_labels: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Lists of masks and labels as two tensors.

    Args:
        mask_labels: per image (n, H, W) bool, of one size; n may be 0.
        class_labels: per image (n,).

    Returns:
        (B, H, W) int64 indices into the image's labels, -1 where there is no mask and the last mask where several
        overlap; and the labels (B, largest n), padded with -100.
    """
    maps, labels = [], []
    most = max(1, *(len(label) for label in class_labels))
    for masks, label in zip(mask_labels, class_labels, strict=True):
        indices = torch.arange(len(masks), device=masks.device)[:, None, None]
        indices = torch.where(masks.bool(), indices, -1)
        # amax refuses an empty dimension
        maps.append(indices.amax(dim=0) if len(masks) else indices.new_full(masks.shape[1:], -1))
        padded = label.new_full((most,), NO_LABEL)
        padded[: len(label)] = label
        labels.append(padded)
    return torch.stack(maps), torch.stack(labels)


class SegmentationScores:
    """A `compute_metrics` for `EoMTTrainer`; it needs the training argument `batch_eval_metrics=True`.

    The `processor`, an `EoMTImageProcessor`, supplies post-processing, stuff classes, and `task` if that is `None`.

    Raises:
        ValueError: the task is neither "panoptic" nor "semantic".
    """

    def __init__(self, processor: Any, num_labels: int, task: str | None = None) -> None:
        self.task = task or processor.task
        if self.task not in TASKS:
            raise ValueError(f"task={self.task!r} has no scores here; choose one of {', '.join(TASKS)}")
        self.processor, self.num_labels = processor, num_labels
        self.metric = self._fresh()

    def __call__(self, prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        """Add a batch; the scores, in [0, 1], after the last one, which has `compute_result`."""
        class_logits, mask_logits = (torch.as_tensor(logits) for logits in prediction.predictions[:2])
        maps, labels = (torch.as_tensor(label) for label in prediction.label_ids)
        outputs = SimpleNamespace(class_queries_logits=class_logits, masks_queries_logits=mask_logits)
        sizes = [tuple(maps.shape[1:])] * len(maps)
        if self.task == "semantic":
            answers = self.processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)
            references: list[Any] = [
                torch.where(segment_map < 0, -1, label_ids[segment_map.clamp(min=0)])
                for segment_map, label_ids in zip(maps, labels, strict=True)
            ]
        else:
            answers = self.processor.post_process_panoptic_segmentation(outputs, target_sizes=sizes)
            references = [_panoptic_reference(*pair) for pair in zip(maps, labels, strict=True)]
        self.metric.add_batch(predictions=answers, references=references)
        if not compute_result:
            return {}
        result = self.metric.compute()
        self.metric = self._fresh()
        return {name: value for name, value in result.items() if isinstance(value, float)}

    def _fresh(self) -> ImageMetric:
        if self.task == "semantic":
            return MeanIoU(self.num_labels)
        return PanopticQuality(self.num_labels, self.processor.stuff_classes or [])


def _panoptic_reference(segment_map: Tensor, labels: Tensor) -> dict[str, Any]:
    indices = [index for index in segment_map.unique().tolist() if index >= 0]
    rows = [{"id": index, "label_id": int(labels[index]), "is_crowd": False} for index in indices]
    return {"segmentation": segment_map, "segments_info": rows}


class MaskAnnealingCallback(TrainerCallback):
    """Anneals masked attention over all steps of a `Trainer`, also when it resumes.

    Evaluations before the last phase ends measure a model that still masks, so choose the best model among later ones
    (see `finished`). A run that is stopped early keeps the probabilities it has reached.

    Args:
        phases: (start, end) per query layer, or per decoder layer of a Mask2Former, as fractions of training; `None`
            follows the official rule.
        power: of the decay between start and end.
    """

    def __init__(self, phases: Sequence[Sequence[Any]] | None = None, power: float = POWER) -> None:
        self.phases, self.power = phases, power
        self.schedule: MaskAnnealing | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Compute the phases in steps, now that their number is known.

        Raises:
            ValueError: the model has no masked attention, or `phases` are not one for each layer that has it.
        """
        config: Any = getattr(_unwrapped(model), "config", None)
        if not hasattr(_unwrapped(model), "set_masked_attention_probabilities"):
            raise ValueError(
                f"{type(_unwrapped(model)).__name__} has no masked attention to anneal; train an "
                "EoMTForUniversalSegmentation (from_pretrained reads Transformers' own checkpoints) or a Mask2Former "
                "after enable_mask_annealing, or leave the callback out"
            )
        if not config.masked_attention:
            if self.phases is not None:
                raise ValueError(
                    "annealing has phases, but the model has masked_attention=False, so there are no masks to anneal; "
                    "leave the phases out, or build it with masked_attention=True"
                )
            self.schedule = None
            return
        num_layers = len(config.masked_attention_probabilities)
        if self.phases is None:
            self.schedule = MaskAnnealing.by_rule(state.max_steps, num_layers, self.power)
        elif len(self.phases) != num_layers:
            kind = "query" if hasattr(config, "num_query_layers") else "decoder"
            raise ValueError(
                f"annealing has {len(self.phases)} phases, and the model {num_layers} {kind} layers; give one "
                "(start, end) for each layer"
            )
        else:
            self.schedule = MaskAnnealing.from_fractions(self.phases, state.max_steps, self.power)
        self._set(model, state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Set the probabilities of the next step, before the model is evaluated or saved."""
        self._set(model, state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the probabilities to the logs of training."""
        if self.schedule is None or logs is None or "loss" not in logs:
            return
        values = self.record(state.global_step)
        logs.update(values)
        if state.log_history:
            state.log_history[-1].update(values)

    def finished(self, step: int) -> bool:
        """Whether nothing is masked any more after `step` steps."""
        return self.schedule is not None and self.schedule.finished(step)

    def record(self, step: int) -> dict[str, float]:
        """The probabilities by name, for logs."""
        probabilities = [] if self.schedule is None else self.schedule.probabilities(step)
        return {f"masked_attention_{layer}": probability for layer, probability in enumerate(probabilities)}

    def _set(self, model: Any, step: int) -> None:
        if self.schedule is not None:  # they live in the config, so that each checkpoint has those of its step
            _unwrapped(model).set_masked_attention_probabilities(self.schedule.probabilities(step))


def _unwrapped(model: Any) -> Any:
    """The model inside the wrappers of DistributedDataParallel, `torch.compile` and PEFT."""
    while True:
        for name in ("_orig_mod", "module"):
            if name in getattr(model, "_modules", {}):
                model = getattr(model, name)
                break
        else:
            return model.get_base_model() if hasattr(model, "get_base_model") else model
