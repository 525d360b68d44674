"""One process of a run of several, for test_training_processes.py: `python -m tests.training_process SETTINGS`.

SETTINGS is JSON: `recipe` (fields), `counts` (objects of each image), `fail` (process that raises in step 2), `stop`
(process that is sent SIGTERM in step 3), `end` (process whose callback ends training after step 2), `stop_all` (every
process and its workers are, in step 2), `sharded` (weights are, by FSDP2), `timeout` (seconds). A ViT-P is trained on
the recipe's data, and `counts` are labelled prompts. Rank, world size and address come from the environment.
"""

import json
import os
import signal
import subprocess
import sys

import torch
from transformers import TrainerCallback

from hf_segvit.training import loop
from hf_segvit.training.optimizers import build_optimizer, learning_rate_schedule
from hf_segvit.training.recipe import Recipe
from hf_segvit.training.tasks.eomt import EoMTTask
from hf_segvit.training.tasks.vit_p import ViTPTask
from tests.sharding import shard_model

torch.set_num_threads(1)


class CountedTask(EoMTTask):
    """Random images with a given number of objects each; where the criterion samples follows from the image."""

    def __init__(self, recipe, counts):
        super().__init__(recipe)
        self.counts = counts

    def train_samples(self):
        return self

    def __len__(self):
        return len(self.counts)

    def __getitem__(self, key):
        epoch, index = key
        generator = torch.Generator().manual_seed(100 * epoch + index)
        count = self.counts[index]
        return (
            torch.randn(3, 64, 64, generator=generator),
            torch.rand(count, 64, 64, generator=generator) > 0.7,
            torch.randint(6, (count,), generator=generator),
        )

    def name(self, index):
        return f"sample {index}"

    def collator(self, processor, device):
        return collate

    def evaluate(self, model, processor, device, limit):
        """A number that the weights decide; processes ask a different number of times, as for images."""
        for _ in range(1 + int(os.environ.get("RANK", 0))):
            outputs = model(torch.linspace(-1, 1, 3 * 64 * 64).view(1, 3, 64, 64))
        return {"pq": float(outputs.class_queries_logits.detach().std())}

    def validation_name(self):
        return {"task": "panoptic", "dataset": "random", "split": "val"}


class RepeatableTask(CountedTask):
    """What is drawn at random is the same for every image, however they are split over processes and batches."""

    def loss(self, model, batch, normalizers):
        criterion = (model.module if hasattr(model, "module") else model).criterion
        criterion.point_sampler = lambda sets, points, device: fixed_points(points).expand(sets, -1, -1)
        return super().loss(model, batch, normalizers)


class UnevenTask(ViTPTask):
    """The recipe's data, with a given number of labelled prompts in each image."""

    def __init__(self, recipe, counts):
        super().__init__(recipe)
        self.counts = counts

    def train_samples(self):
        self.samples = super().train_samples()
        return self

    def __len__(self):
        return len(self.counts)

    def __getitem__(self, key):
        sample = self.samples[key]
        sample.prompt_labels[self.counts[key[1]] :] = -100
        return sample

    def name(self, index):
        return self.samples.name(index)


def fixed_points(count):
    return torch.rand(1, count, 2, generator=torch.Generator().manual_seed(count))


def collate(samples):
    images, masks, classes = zip(*samples, strict=True)
    return {"pixel_values": torch.stack(images), "mask_labels": list(masks), "class_labels": list(classes)}


def prepare_sharded(accelerator, model, plan):
    """As on GPUs under fsdp2.yaml; on CPUs Accelerate leaves sharding out."""
    model = shard_model(model)
    optimizer = build_optimizer(model, plan)
    return model, accelerator.prepare(optimizer), learning_rate_schedule(optimizer, plan)


def main(settings):
    if settings.get("sharded"):
        loop.prepare = prepare_sharded
    recipe = Recipe(**settings["recipe"])
    kind = RepeatableTask if settings.get("repeatable") else CountedTask
    task = (UnevenTask if recipe.model == "vit_p" else kind)(recipe, settings["counts"])
    rank = int(os.environ.get("RANK", 0))
    losses = []

    def on_step(step, loss):
        losses.append(loss)
        if step == 1 and rank == settings.get("fail"):
            raise SystemExit("this process fails")
        if step == 1 and settings.get("stop_all"):
            # From outside: what the parent itself sends its workers ends them.
            text = f"import os, signal; os.killpg({os.getpgrp()}, signal.SIGTERM)"
            subprocess.run([sys.executable, "-c", text], check=False)
        if step == 2 and rank == settings.get("stop"):
            os.kill(os.getpid(), signal.SIGTERM)

    class End(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2 and rank == settings.get("end")

    options = {"callbacks": [End()], "process_timeout": settings.get("timeout", 60)}
    outcome = loop.train(recipe, task=task, cpu=True, on_step=on_step, **options)
    loop.leave_process_group()
    if rank == 0:
        print(json.dumps({"losses": losses, "step": outcome.step, "stopped": outcome.stopped}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
