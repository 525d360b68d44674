"""Classify points and boxes of images: a ViT-P with its image processor. N points, C classes."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..models.image_decoding import image_size
from ..models.image_processing_plain_vit import image_settings
from ..models.image_values import ImageSettings
from .devices import pick_device, pick_dtype
from .loading import is_exported, load_point_classifier
from .runtimes import RuntimeSettings
from .segmenter import refuse_non_finite


class PointClassifier:
    """A `ViTPForPointClassification` with its image processor; `device` as for `pick_device`."""

    def __init__(self, model: Any, processor: Any, device: str | torch.device | None = None) -> None:
        self.device = pick_device(device)
        self.model, self.processor = model.eval().to(self.device), processor
        self.id2label: dict[int, str] = {int(index): name for index, name in model.config.id2label.items()}

    @property
    def file_settings(self) -> ImageSettings:
        """How the files of new images become those that the model takes: channels, range of values, bands."""
        return image_settings(vars(self.processor))

    @classmethod
    def from_pretrained(
        cls,
        source: str,
        *,
        device: str | torch.device | None = None,
        revision: str | None = None,
        dtype: torch.dtype | str = torch.float32,
        runtime: str | None = None,
        threads: int | None = None,
        allow_native_code: bool = False,
    ) -> "PointClassifier":
        """Load a folder or Hub repository; errors as for `load_point_classifier`, the rest as for `Segmenter`."""
        running = RuntimeSettings(runtime, threads, allow_native_code=allow_native_code)
        if is_exported(source, revision):
            running = replace(running, device=None if device is None else str(device))
            device, dtype = "cpu", torch.float32  # of the tensors that go in and come out
        device = pick_device(device)  # an unknown device is refused before minutes of loading
        dtype = pick_dtype(dtype, device)
        return cls(*load_point_classifier(source, revision=revision, dtype=dtype, runtime=running), device)

    def classify(
        self, image: Image.Image, points: Sequence[Any] = (), boxes: Sequence[Any] = (), top_k: int = 1
    ) -> list[list[dict[str, Any]]]:
        """Classify what is at points and in boxes of an RGB image.

        Args:
            points: (x, y) in pixels.
            boxes: (x0, y0, x1, y1), edges in pixels.
            top_k: number of classes to return.

        Returns:
            For each point, then for each box, its most probable classes, best first: `label_id`, `label`, `score`.
        """
        outputs = self._ask(self.processor(image, input_points=[list(points)], input_boxes=[list(boxes)]))
        (answer,) = self.processor.post_process_point_classification(outputs, top_k=top_k, id2label=self.id2label)
        columns = answer["label_ids"].tolist(), answer["labels"], answer["scores"].tolist()
        return [
            [
                {"label_id": label_id, "label": label, "score": score}
                for label_id, label, score in zip(*row, strict=True)
            ]
            for row in zip(*columns, strict=True)
        ]

    def __call__(self, images: Sequence[Image.Image], points: Sequence[Tensor]) -> list[Tensor]:
        """Classify points of RGB images, all in one forward pass.

        Points are (N, 2) x, y in [0, 1] for each image; N may differ, and be 0. Gives (N, C) float32 logits on the CPU.
        """
        answers = [torch.zeros(0, len(self.id2label)) for _ in images]
        asked = [index for index, located in enumerate(points) if len(located)]
        # Images without points are left out: they would cost a forward pass, and a row of prompts that are all masked.
        if not asked:
            return answers
        prompts = [self._prompts(images[index], points[index]) for index in asked]
        inputs = {
            "pixel_values": self.processor([images[index] for index in asked])["pixel_values"],
            "prompts": pad_sequence(prompts, batch_first=True),
            "prompt_mask": pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in prompts], batch_first=True),
        }
        logits = self._ask(inputs).logits.float().cpu()
        for row, index in enumerate(asked):
            answers[index] = logits[row, : len(points[index])]
        return answers

    @torch.inference_mode()
    def _ask(self, inputs: Any) -> Any:
        outputs = self.model(**{name: tensor.to(self.device) for name, tensor in inputs.items()})
        refuse_non_finite(outputs)
        return outputs

    def _prompts(self, image: Image.Image, points: Tensor) -> Tensor:
        # Points given here are pixel centres; such a model was trained with the upper left corner of the pixel.
        if self.model.config.point_origin == "corner":
            points = (points - 0.5 / torch.tensor(image_size(image)[::-1])).clamp(min=0)
        return torch.cat([points, torch.zeros_like(points)], dim=1)
