"""A custom handler for Hugging Face Inference Endpoints: the segments of an image, each with its mask.

Copy this file and a requirements.txt with the line `hf-segvit[onnx]` into the root of the model's repository. Answers
have the form of the task image-segmentation: of each segment `label`, `score` and `mask`, a PNG in base64.
"""

import base64
import binascii
import io
from typing import Any

import numpy as np
from PIL import Image

from hf_segvit import Segmenter
from hf_segvit.models.image_decoding import open_image, to_pixels


class EndpointHandler:
    """What the endpoint loads once, and calls for each request."""

    def __init__(self, path: str = "") -> None:
        self.segmenter = Segmenter.from_pretrained(path)

    def __call__(self, data: dict[str, Any]) -> list[dict[str, Any]]:
        """Segment `data["inputs"]`, a Pillow image, a file's bytes, or these in base64.

        `data["parameters"]` may have `threshold`. What is wrong with a request is a `ValueError`.
        """
        if data.get("inputs") is None:
            raise ValueError("the request has no inputs; send an image, or JSON with its file in base64 as inputs")
        parameters = data.get("parameters") or {}
        unknown = set(parameters) - {"threshold"}
        if unknown:
            raise ValueError(f"unknown parameters {', '.join(sorted(unknown))}; there is only threshold")
        image = self._image(data["inputs"])
        (result,) = self.segmenter([image], threshold=parameters.get("threshold"))
        return [
            {"label": each.label, "score": each.score, "mask": _png(result.segment_map == each.id)}
            for each in result.segments
        ]

    def _image(self, inputs: Any) -> Any:
        if isinstance(inputs, str):
            # A data URL has its media type before a comma.
            try:
                inputs = base64.b64decode(inputs.rpartition(",")[2], validate=True)
            except (binascii.Error, ValueError) as error:
                raise ValueError(f"inputs is text that is not base64 ({error}); encode the image's file") from error
        if isinstance(inputs, Image.Image):
            return to_pixels(inputs, "inputs", self.segmenter.image_settings)
        if not isinstance(inputs, bytes | bytearray):
            raise ValueError(f"inputs is a {type(inputs).__name__}; send an image, or its file in base64")
        return open_image(bytes(inputs), "inputs", self.segmenter.image_settings)


def _png(mask: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8) * 255).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
