"""What Transformers' `Trainer` needs in order to train EoMT as it should be: `EoMTTrainer`.

`Trainer` itself gets four things wrong here. It knows nothing of mask annealing. With accumulation it averages the
losses of batches that hold different numbers of segments, which is not the loss of the joint batch. What it gathers for
metrics across processes must be tensors of one shape, while masks come as lists. And with several processes or after a
resume, the data set is not told the epoch, so that its augmentation repeats. Everything else is `Trainer`'s.

Layer-wise learning rates and the two-stage warm-up go in by its argument `optimizers`:

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
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from ..models.mask_criterion import MaskCriterion
from .annealing_callback import MaskAnnealingCallback

NO_LABEL = -100  # what Trainer pads with


class EoMTTrainer(Trainer):
    """`Trainer` for `EoMTForUniversalSegmentation`, on batches of `MaskCollator` or `EoMTImageProcessor`.

    A `MaskAnnealingCallback` among `callbacks` replaces the one by the official rule. `compute_metrics` gets
    `predictions`, the class and mask logits, and `label_ids`: segment maps (B, H, W) of places in the labels, -1 void,
    and the labels (B, n), padded with -100. Where masks overlap, the last one has the pixel. `SegmentationScores`
    (trainer_metrics.py) is such a function; it needs `batch_eval_metrics=True`.

    Args:
        args: of `Trainer`, all of them.
        kwargs: of `Trainer`, all of them.
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
        config = self.accelerator.unwrap_model(self.model).config
        normalizers = MaskCriterion.count_normalizers(
            labels, config.num_queries, config.no_object_weight, config.loss_normalization
        )
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
        mask_labels: per picture (n, H, W) bool, of one size; n may be 0.
        class_labels: per picture (n,).

    Returns:
        (B, H, W) int64 places in the picture's labels, -1 where no mask is, and the labels (B, most n), padded with
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
