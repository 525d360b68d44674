"""What the image processors of this package share: reading settings, the input size, and tensors or arrays out."""

from collections.abc import Sequence
from typing import Any

from transformers.image_processing_backends import TorchvisionBackend
from transformers.utils import logging

logger = logging.get_logger(__name__)

# What a preprocessor_config.json holds besides settings.
_NOT_SETTINGS = {"image_processor_type", "processor_class", "feature_extractor_type", "auto_map"}


class PlainViTImageProcessor(TorchvisionBackend):
    """Base of image processors whose input has one height and width; settings are those of the subclass."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in kwargs.keys() - self.valid_kwargs.__annotations__.keys() - _NOT_SETTINGS:
            logger.warning(f"{type(self).__name__} has no setting {name!r}; it is kept, but has no effect")

    def to_dict(self) -> dict[str, Any]:
        """The settings as saved; without the names of remote code where that is not saved along."""
        settings = super().to_dict()
        if self._auto_class is None:
            settings.pop("auto_map", None)
        return settings

    def _standardize_kwargs(self, size: Any = None, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        if isinstance(size, int):
            size = {"height": size, "width": size}
        settings = super()._standardize_kwargs(size=size, **kwargs)
        height, width = settings["size"].height, settings["size"].width
        if not (height and width and height > 0 and width > 0):
            raise ValueError(f"size={size}: the model's input is {{'height': H, 'width': W}} in pixels")
        return settings


def normalization(settings: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `normalized_batch` that settings stand for."""
    mean, std = (_per_channel(settings[name]) for name in ("image_mean", "image_std"))
    if not settings["do_normalize"]:
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return {
        "rescale_factor": settings["rescale_factor"] if settings["do_rescale"] else 1.0,
        "mean": mean,
        "std": std,
    }


def unit_normalization(settings: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel that settings stand for, of pixels scaled from 8 bits to [0, 1].

    Another `rescale_factor`, and what `do_rescale` and `do_normalize` switch off, are allowed for in the two.
    """
    applied = normalization(settings)
    # (v r - m) / s is (v / 255 - m / 255r) / (s / 255r); with r = 1/255 the quotients are m and s to the bit.
    scale = 255 * applied["rescale_factor"]
    return [value / scale for value in applied["mean"]], [value / scale for value in applied["std"]]


def as_requested(data: dict[str, Any], return_tensors: Any) -> dict[str, Any]:
    """Tensors, or lists of tensors, as they are or as NumPy arrays.

    Args:
        data: names to tensors or lists of them.
        return_tensors: `None` or `"pt"` for tensors, `"np"` for arrays.

    Raises:
        ValueError: another kind.
    """
    kind = str(getattr(return_tensors, "value", return_tensors))
    if kind in ("None", "pt"):
        return data
    if kind != "np":
        raise ValueError(f"return_tensors={return_tensors!r}; it is 'pt' or 'np'")
    return {key: [v.cpu().numpy() for v in x] if isinstance(x, list) else x.cpu().numpy() for key, x in data.items()}


def _per_channel(values: Any) -> Sequence[float]:
    return (float(values),) * 3 if isinstance(values, int | float) else tuple(float(value) for value in values)
