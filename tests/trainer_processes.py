"""What test_trainer_support.py runs in two processes: one step and one evaluation under `EoMTTrainer`.

`python -m tests.trainer_processes FOLDER` writes the weights and the scores of the main process there.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.utils.data import Dataset
from transformers import TrainingArguments

from hf_segvit.data.augmentation import AugmentedSample
from hf_segvit.data.collation import MaskCollator
from hf_segvit.models.image_processing_eomt import EoMTImageProcessor
from hf_segvit.training.loop import leave_process_group
from hf_segvit.training.transformers_trainer import EoMTTrainer, SegmentationScores

from .tiny_models import tiny_eomt


class Objects(Dataset):
    """Images of which the first has one object and the others three."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> AugmentedSample:
        number = 3 if index else 1
        segment_map = torch.full((64, 64), -1, dtype=torch.int16)
        for place in range(number):
            segment_map[16 * place : 16 * place + 16] = place
        pixels = torch.randint(0, 256, (3, 64, 64), generator=torch.Generator().manual_seed(index), dtype=torch.uint8)
        return AugmentedSample(index, pixels, segment_map, torch.arange(number))


def same_points(num_sets: int, num_points: int, device: torch.device) -> torch.Tensor:
    """In place of the criterion's random points: always the same, so that runs can be compared."""
    return torch.linspace(0.01, 0.99, 2 * num_points).reshape(1, num_points, 2).expand(num_sets, -1, -1)


def one_step_and_scores(folder: Path, batch_size: int) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Weights after a step of SGD on four images, and scores of five, of which two processes see three each."""
    model = tiny_eomt()
    model.criterion.point_sampler = same_points
    processor = EoMTImageProcessor(
        task="panoptic", size={"height": 64, "width": 64}, stuff_classes=[0], num_labels=5, threshold=0.0
    )
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=1,
        optim="sgd",
        learning_rate=1e-2,
        max_grad_norm=0,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=1,
        batch_eval_metrics=True,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = EoMTTrainer(
        model,
        arguments,
        train_dataset=Objects(4),
        eval_dataset=Objects(5),
        data_collator=MaskCollator(),
        compute_metrics=SegmentationScores(processor, 5, "semantic"),
    )
    trainer.train()
    found = trainer.evaluate()
    scores = {name: found[f"eval_{name}"] for name in ("pixel_accuracy", "mean_iou")}
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}, scores


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    weights, scores = one_step_and_scores(folder, 2)
    if torch.distributed.get_rank() == 0:
        save_file(weights, folder / "weights.safetensors")
        (folder / "scores.json").write_text(json.dumps(scores))
    leave_process_group()


if __name__ == "__main__":
    main()
