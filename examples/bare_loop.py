"""A minimal training loop: model, criterion, AdamW, mask annealing, Accelerate.

    python examples/bare_loop.py                          # on generated scenes, under a minute on a CPU
    accelerate launch --num_processes 2 examples/bare_loop.py

This is the core of `hf-segvit train`, to copy and change. Left out: checkpoints and resuming, evaluation, a moving
average of the weights, protection against non-finite losses, and whatever else a long run needs.
"""

import torch
from accelerate import Accelerator
from torch.optim import AdamW
from torch.optim.lr_scheduler import PolynomialLR
from torch.utils.data import DataLoader, Dataset

from hf_segvit import EoMTConfig, EoMTForUniversalSegmentation, EoMTImageProcessor
from hf_segvit.data.augmentation import MaskAugmentation, sample_generator
from hf_segvit.data.collation import MaskCollator
from hf_segvit.data.reading import describe, load_segmentation_dataset
from hf_segvit.training.annealing import MaskAnnealing
from hf_segvit.training.optimizers import layer_factor

SIZE, BATCH_SIZE, ACCUMULATION = 64, 8, 2  # pixels per side, images per device and micro-batch, micro-batches per step


class Scenes(Dataset):
    """Augmented scenes; a sample depends on its index only, so every worker and process draws the same."""

    def __init__(self, dataset, num_samples):
        self.dataset, self.num_samples = dataset, num_samples
        self.augment = MaskAugmentation((SIZE, SIZE), scale_range=(0.7, 1.4))

    def __len__(self):
        return self.num_samples

    def __getitem__(self, index):
        epoch, index = divmod(index, len(self.dataset))
        return self.augment(self.dataset[index], sample_generator(0, epoch, index))


def main(steps=60, learning_rate=1e-3):
    """Train a tiny model on generated scenes, and return the losses of all steps."""
    torch.manual_seed(0)
    accelerator = Accelerator()
    dataset = load_segmentation_dataset("generated:easy?num_scenes=200&size=64", split="train")
    description = describe(dataset)
    config = EoMTConfig(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=128,
        patch_size=8,
        image_size=SIZE,
        num_queries=16,
        num_query_layers=2,
        train_num_points=256,
        id2label=description.id2label,
    )
    model = EoMTForUniversalSegmentation(config).train()
    processor = EoMTImageProcessor(
        task="panoptic", size={"height": SIZE, "width": SIZE}, stuff_classes=description.stuff_classes
    )

    # Each block of the ViT learns at 0.8 of the rate of the next one, embeddings like the first block, heads at 1.
    rates = {name: layer_factor(name, config.num_hidden_layers, 0.8) for name, _ in model.named_parameters()}
    groups = [{"params": [p], "lr": learning_rate * rates[name]} for name, p in model.named_parameters()]
    optimizer = AdamW(groups, weight_decay=0.05)
    schedule = PolynomialLR(optimizer, steps, power=0.9)
    annealing = MaskAnnealing.by_rule(steps, config.num_query_layers)
    scenes = Scenes(dataset, steps * BATCH_SIZE * ACCUMULATION * accelerator.num_processes)
    collate = MaskCollator(processor.image_mean, processor.image_std, with_loss_mask=True)
    loader = DataLoader(scenes, BATCH_SIZE, shuffle=True, collate_fn=collate, drop_last=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    unwrapped, batches, losses = accelerator.unwrap_model(model), iter(loader), []

    for step in range(steps):
        unwrapped.set_masked_attention_probabilities(annealing.probabilities(step))
        micro_batches = [next(batches) for _ in range(ACCUMULATION)]
        # Over all micro-batches and processes, so that the gradient does not depend on how the batch is split.
        labels = [labels for batch in micro_batches for labels in batch["class_labels"]]
        normalizers = unwrapped.criterion.count_normalizers(labels, config.num_queries, accelerator.device)
        total = 0.0
        for batch in micro_batches:
            loss = model(**batch, loss_normalizers=normalizers).loss
            accelerator.backward(loss)
            total += loss.item()
        accelerator.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(total)
        if step % 10 == 0:
            accelerator.print(f"step {step + 1}: loss {total:.2f}")
    unwrapped.set_masked_attention_probabilities(0.0)  # inference needs no masked attention: it is a plain ViT
    return losses


if __name__ == "__main__":
    main()
