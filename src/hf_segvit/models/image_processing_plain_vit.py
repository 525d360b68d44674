"""Base of the image processors: shared settings, reading, scaling and output.

`PlainViTImageProcessor` is the base class, `PixelSettings` the settings of those processors that resize images
themselves. The functions below take the settings of one call: `read_images` and `scaled_images` before a batch is
made, `normalization` for making it, `as_requested` for what is returned.
"""

from collections.abc import Sequence
from typing import Any, TypedDict

from PIL.Image import Resampling
from torch import Tensor
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, SizeDict
from transformers.utils import logging

from .image_decoding import ImageSettings, as_list, checked_range, image_tensor
from .image_geometry import Size, scale_image

logger = logging.get_logger(__name__)

# What a preprocessor_config.json holds besides settings.
_NOT_SETTINGS = {"image_processor_type", "processor_class", "feature_extractor_type", "auto_map"}


class PixelSettings(TypedDict, total=False):
    """Settings that take an image to the model's input, as stored in preprocessor_config.json."""

    size: int | list[int] | tuple[int, ...] | dict[str, int] | SizeDict
    do_resize: bool
    resample: int | Resampling
    do_rescale: bool
    rescale_factor: float
    do_normalize: bool
    image_mean: float | list[float] | tuple[float, ...]
    image_std: float | list[float] | tuple[float, ...]
    value_range: list[float] | tuple[float, ...] | str | None


class PlainViTImageProcessor(TorchvisionBackend):
    """Base of image processors whose input has one height and width; subclasses name their settings."""

    do_resize = True
    resample = Resampling.BILINEAR
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    value_range: list[float] | None = None

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        image_settings(vars(self))  # refuses what does not fit together
        # Transformers stores unknown settings silently, so a misspelt one would never be noticed.
        for name in kwargs.keys() - self.valid_kwargs.__annotations__.keys() - _NOT_SETTINGS:
            logger.warning(f"{type(self).__name__} has no setting {name!r}; it is kept, but has no effect")

    def to_dict(self) -> dict[str, Any]:
        """The settings as they are saved."""
        settings = super().to_dict()
        # Where the code is not saved along, an `auto_map` would make a loader look for files that are missing.
        if self._auto_class is None:
            settings.pop("auto_map", None)
        return settings

    def _standardize_kwargs(self, size: Any = None, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        # Transformers would take one integer for the shortest edge.
        if isinstance(size, int):
            size = {"height": size, "width": size}
        settings = super()._standardize_kwargs(size=size, **kwargs)
        height, width = settings["size"].height, settings["size"].width
        if not (height and width and height > 0 and width > 0):
            raise ValueError(f"size={size}: the model's input is {{'height': H, 'width': W}} in pixels")
        return settings


def image_settings(settings: dict[str, Any]) -> ImageSettings:
    """How images are read: as many channels as means, and the range of values."""
    mean, std = (settings.get(name) for name in ("image_mean", "image_std"))
    lengths = [len(values) for values in (mean, std) if isinstance(values, list | tuple)]
    if len(set(lengths)) > 1:
        raise ValueError(
            f"image_mean has {lengths[0]} values and image_std {lengths[1]}; give one of each for every channel"
        )
    return ImageSettings((lengths or [3])[0], checked_range(settings.get("value_range")))


def read_images(
    images: Any, settings: dict[str, Any], device: Any = None, input_data_format: str | None = None
) -> list[Tensor]:
    """One image or several as tensors (C, H, W), by a processor's settings; see `image_tensor`."""
    reading = image_settings(settings)
    tensors = [
        image_tensor(image, f"images[{index}]", input_data_format, device, reading)
        for index, image in enumerate(as_list(images, 3))
    ]
    if not tensors:
        raise ValueError("images is empty; give at least one image")
    return tensors


def scaled_images(images: Sequence[Tensor], sizes: Sequence[Size], settings: dict[str, Any]) -> list[Tensor]:
    """Resize each image (C, H, W) to its (height, width) in `sizes`; see `scale_image`."""
    resample, do_rescale = settings["resample"], settings["do_rescale"]
    return [
        scale_image(image, size, resample=resample, do_rescale=do_rescale, name=f"images[{index}]")
        for index, (image, size) in enumerate(zip(images, sizes, strict=True))
    ]


def normalization(settings: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of `normalized_batch` that follow from the settings."""
    channels = image_settings(settings).channels or 3
    mean, std = (_per_channel(settings[name], channels) for name in ("image_mean", "image_std"))
    if not settings["do_normalize"]:
        mean, std = (0.0,) * channels, (1.0,) * channels
    return {
        "rescale_factor": settings["rescale_factor"] if settings["do_rescale"] else 1.0,
        "mean": mean,
        "std": std,
    }


def unit_normalization(settings: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel for pixels in [0, 1], whatever `rescale_factor` the settings have."""
    applied = normalization(settings)
    # (v r - m) / s is (v / 255 - m / 255r) / (s / 255r); with r = 1/255 the quotients are m and s to the bit.
    scale = 255 * applied["rescale_factor"]
    return [value / scale for value in applied["mean"]], [value / scale for value in applied["std"]]


def as_requested(data: dict[str, Any], return_tensors: Any) -> dict[str, Any]:
    """Tensors and lists of tensors, as they are (`None`, `"pt"`) or as NumPy arrays (`"np"`)."""
    kind = str(getattr(return_tensors, "value", return_tensors))  # a string or Transformers' enum
    if kind in ("None", "pt"):
        return data
    if kind != "np":
        raise ValueError(f"return_tensors={return_tensors!r}; it is 'pt' or 'np'")
    return {key: [v.cpu().numpy() for v in x] if isinstance(x, list) else x.cpu().numpy() for key, x in data.items()}


def _per_channel(values: Any, channels: int) -> Sequence[float]:
    return (float(values),) * channels if isinstance(values, int | float) else tuple(float(value) for value in values)
