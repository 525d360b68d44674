"""What Transformers' `Trainer` needs in order to train EoMT as it should be trained: `EoMTTrainer`.

`Trainer` itself gets four things wrong here. It knows nothing of mask annealing: a model would keep its masked
attention for ever, slow and tied to its masks at inference; `MaskAnnealingCallback` sets the probabilities after every
step. With accumulation it averages the losses of batches that hold different numbers of segments, which is not the loss
of the joint batch. What it gathers for metrics across processes must be tensors of one shape, while masks come as
lists; `SegmentationScores` computes panoptic quality or mean IoU of what `EoMTTrainer` gives it, at the resolution of
the batches, which is quick and good for watching (`hf-segvit evaluate` follows the protocol of the papers). And with
several processes or after a resume, the data set is not told the epoch, so that its augmentation repeats. Everything
else is `Trainer`'s. Layer-wise learning rates and the two-stage warm-up go in by its argument `optimizers`:

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

NO_LABEL = -100  # what Trainer pads with


class EoMTTrainer(Trainer):
    """`Trainer` for `EoMTForUniversalSegmentation`, on batches of `MaskCollator` or `EoMTImageProcessor`.

    A `MaskAnnealingCallback` among `callbacks` replaces the one by the official rule. `compute_metrics` gets
    `predictions`, the class and mask logits, and `label_ids`: segment maps (B, H, W) of places in the labels, -1 void,
    and the labels (B, n), padded with -100. Where masks overlap, the last one has the pixel. `SegmentationScores` is
    such a function; it needs `batch_eval_metrics=True`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.args.remove_unused_columns = False  # samples have no columns of the model's names
        given = [
            callback for callback in self.callback_handler.callbacks if isinstance(callback, MaskAnnealingCallback)
        ]
        self.mask_annealing = given[0] if given else MaskAnnealingCallback()
        if not given:
            self.add_callback(self.mask_annealing)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        """The batches of a step, each told what the joint batch of all processes is normalised by."""
        # Accelerate leaves this out where samplers are nested: with several processes, and after a resume.
        dataset: Any = self.train_dataset
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(math.floor(self.state.epoch or 0))
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        labels = [label for batch in batches for label in batch["class_labels"]]
        if not labels:
            return batches, num_items
        model = self.accelerator.unwrap_model(self.model)
        normalizers = model.criterion.count_normalizers(labels, model.config.num_queries)
        # Trainer divides each loss by the number of batches; the joint loss is their sum.
        return [{**batch, "loss_normalizers": normalizers / len(batches)} for batch in batches], num_items

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the probabilities of masked attention, for trackers that come before the callback."""
        if "loss" in logs:
            logs.update(self.mask_annealing.record(self.state.global_step))
        super().log(logs, start_time)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """As `Trainer`'s, with labels of one shape on every process; see the class."""
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
        (B, H, W) int64 places in the image's labels, -1 where no mask is, and the labels (B, most n), padded with
        -100.
    """
    maps, labels = [], []
    most = max(1, *(len(label) for label in class_labels))
    for masks, label in zip(mask_labels, class_labels, strict=True):
        places = torch.arange(len(masks), device=masks.device)[:, None, None]
        ids = torch.where(masks.bool(), places, -1)
        maps.append(ids.amax(dim=0) if len(masks) else ids.new_full(masks.shape[1:], -1))
        padded = label.new_full((most,), NO_LABEL)
        padded[: len(label)] = label
        labels.append(padded)
    return torch.stack(maps), torch.stack(labels)


TASKS = ("panoptic", "semantic")


class SegmentationScores:
    """A `compute_metrics` for `EoMTTrainer`, with `batch_eval_metrics=True` among the training arguments.

    Args:
        processor: an `EoMTImageProcessor`, for its post-processing and its stuff classes.
        num_labels: classes C.
        task: "panoptic" or "semantic"; by default the processor's.

    Raises:
        ValueError: the task has no scores here.
    """

    def __init__(self, processor: Any, num_labels: int, task: str | None = None) -> None:
        self.task = task or processor.task
        if self.task not in TASKS:
            raise ValueError(f"task={self.task!r} has no scores here; choose one of {', '.join(TASKS)}")
        self.processor, self.num_labels = processor, num_labels
        self.metric = self._fresh()

    def __call__(self, prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        """Count a batch; the scores, in [0, 1], once it is the last one."""
        class_logits, mask_logits = (torch.as_tensor(logits) for logits in prediction.predictions[:2])
        maps, labels = (torch.as_tensor(label) for label in prediction.label_ids)
        outputs = SimpleNamespace(class_queries_logits=class_logits, masks_queries_logits=mask_logits)
        sizes = [tuple(maps.shape[1:])] * len(maps)
        if self.task == "semantic":
            answers = self.processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)
            references: list[Any] = [_semantic_map(*pair) for pair in zip(maps, labels, strict=True)]
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


def _semantic_map(segment_map: Tensor, labels: Tensor) -> Tensor:
    """Label ids (H, W) of a map of places, -1 void."""
    return torch.where(segment_map < 0, -1, labels[segment_map.clamp(min=0)])


def _panoptic_reference(segment_map: Tensor, labels: Tensor) -> dict[str, Any]:
    places = [place for place in segment_map.unique().tolist() if place >= 0]
    rows = [{"id": place, "label_id": int(labels[place]), "is_crowd": False} for place in places]
    return {"segmentation": segment_map, "segments_info": rows}


class MaskAnnealingCallback(TrainerCallback):
    """Anneals masked attention over the steps that `Trainer` takes in all, also after it was resumed.

    The probabilities live in the model's config, so that every checkpoint has those of its step. They are 0 when the
    training is over; where it was stopped early, they stay what they were. Evaluation before the last phase ends
    measures a model that still masks, so let the best model be chosen after that (`finished` tells).

    Args:
        phases: (start, end) per query layer as fractions of training; `None` places them by the official rule.
        power: of the fall in between.
    """

    def __init__(self, phases: Sequence[Sequence[Any]] | None = None, power: float = POWER) -> None:
        self.phases, self.power = phases, power
        self.schedule: MaskAnnealing | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Place the phases, now that the number of steps is known.

        Raises:
            ValueError: the model is none whose attention can be annealed, or has another number of query layers.
        """
        config: Any = getattr(_unwrapped(model), "config", None)
        if not hasattr(config, "masked_attention_probabilities"):
            raise ValueError(
                f"{type(_unwrapped(model)).__name__} has no masked attention to anneal; train an "
                "EoMTForUniversalSegmentation (from_pretrained reads Transformers' own checkpoints), or leave the "
                "callback out"
            )
        if self.phases is None:
            self.schedule = MaskAnnealing.by_rule(state.max_steps, config.num_query_layers, self.power)
        elif len(self.phases) != config.num_query_layers:
            raise ValueError(
                f"annealing has {len(self.phases)} phases, and the model {config.num_query_layers} query layers; give "
                "one (start, end) for each"
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
        """Add the probabilities to the record of training losses."""
        if self.schedule is None or logs is None or "loss" not in logs:
            return
        values = self.record(state.global_step)
        logs.update(values)
        if state.log_history:
            state.log_history[-1].update(values)

    def finished(self, step: int) -> bool:
        """Whether nothing is masked any more after a number of steps."""
        return self.schedule is not None and self.schedule.finished(step)

    def record(self, step: int) -> dict[str, float]:
        """The probabilities by name, for logs."""
        probabilities = [] if self.schedule is None else self.schedule.probabilities(step)
        return {f"masked_attention_{layer}": probability for layer, probability in enumerate(probabilities)}

    def _set(self, model: Any, step: int) -> None:
        if self.schedule is not None:
            _unwrapped(model).set_masked_attention_probabilities(self.schedule.probabilities(step))


def _unwrapped(model: Any) -> Any:
    """The model inside those of DistributedDataParallel, `torch.compile` and PEFT."""
    while True:
        for name in ("_orig_mod", "module"):
            if name in getattr(model, "_modules", {}):
                model = getattr(model, name)
                break
        else:
            return model.get_base_model() if hasattr(model, "get_base_model") else model
