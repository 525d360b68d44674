"""Base of the image processors: shared settings, reading, scaling and output.

`PlainViTImageProcessor` is the base class, `PixelSettings` the settings of those processors that resize images
themselves. The functions below take the settings of one call: `read_images` and `scaled_images` before a batch is
made, `normalization` for making it, `as_requested` for what is returned.
"""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, get_type_hints

from PIL.Image import Resampling
from torch import Tensor
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_processing_base import ImageProcessingMixin
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, SizeDict
from transformers.utils import logging

from .checkpoint_json import HUB_ARGUMENTS, check_type, errors_name, read_table, shown
from .image_geometry import Size, scale_image
from .image_tensors import as_list, image_tensor
from .image_values import ImageSettings, checked_bands, checked_range

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
    value_range: list[float | int] | tuple[float | int, ...] | str | None
    bands: list[int] | tuple[int, ...] | str | None


class PlainViTImageProcessor(TorchvisionBackend):
    """Base of image processors whose input has one height and width; subclasses name their settings."""

    valid_kwargs = PixelSettings  # type: ignore[assignment] # subclasses add theirs

    do_resize = True
    resample = Resampling.BILINEAR
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    value_range: list[float] | None = None
    bands: list[int] | None = None

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        image_settings(vars(self))  # refuses what does not fit together
        # Transformers stores unknown settings silently, so a misspelt one would never be noticed.
        for name in kwargs.keys() - self.valid_kwargs.__annotations__.keys() - _NOT_SETTINGS:
            logger.warning(f"{type(self).__name__} has no setting {name!r}; it is kept, but has no effect")

    @classmethod
    def get_image_processor_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The stored settings of a folder or Hub repository, read by `stored_settings`."""
        settings = stored_settings(pretrained_model_name_or_path, **kwargs)
        return settings, {name: value for name, value in kwargs.items() if name not in (*HUB_ARGUMENTS, *_READING)}

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The image processor of stored settings; `kwargs` replace some of them."""
        check_settings(cls, image_processor_dict, PROCESSOR)
        with errors_name(PROCESSOR):
            return super().from_dict(image_processor_dict, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The settings as they are saved."""
        settings = super().to_dict()
        # Where the code is not saved along, an `auto_map` would make a loader look for files that are missing.
        if self._auto_class is None:
            settings.pop("auto_map", None)
        if settings.get("temperature") is None:  # a field that few models have
            settings.pop("temperature", None)
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


PROCESSOR = "preprocessor_config.json"
NESTED = "processor_config.json"  # of a whole processor, which has that of images as a part
# Arguments of Transformers' function that do not stand for settings.
_READING = ("image_processor_filename", "_from_pipeline", "_from_auto")
MAX_INPUT_PIXELS = 2**25
_RANGES = {
    **dict.fromkeys(("threshold", "mask_threshold", "overlap_mask_area_threshold", "instance_threshold"), (0, 1)),
    "resample": (0, 5),
    "rescale_factor": (1e-12, 1e6),
    "temperature": (1e-3, 1e3),
    "num_instances": (1, 100_000),
    "num_labels": (1, 100_000),
    "patch_size": (1, 512),
}


def stored_settings(source: Any, **kwargs: Any) -> dict[str, Any]:
    """The image processor's settings in a folder or Hub repository, of any type.

    Raises:
        ValueError: a file is no readable table, or holds no settings.
        OSError: there is none, or the Hub cannot be reached.
    """
    folder = os.path.join(source, kwargs.get("subfolder") or "")
    paths = [os.path.join(folder, name) for name in (NESTED, PROCESSOR)]
    if os.path.isfile(source):
        paths = [os.fspath(source)]
    for path in paths:  # before Transformers reads them, which takes anything
        if os.path.isfile(path):
            fields = read_table(path)
            if os.path.basename(path) == NESTED and not isinstance(fields.get("image_processor", {}), dict):
                raise ValueError(
                    f"{path}: image_processor is {shown(fields['image_processor'])}, which is no settings of an image "
                    "processor"
                )
    with errors_name(f"{source}: {PROCESSOR}"):
        settings, _ = ImageProcessingMixin.get_image_processor_dict(source, **kwargs)
    if not isinstance(settings, dict) or not settings:
        raise ValueError(
            f"{source}: {PROCESSOR} is {shown(settings)}, which are no settings of an image processor; save them "
            "again with save_pretrained"
        )
    return settings


def check_settings(cls: Any, settings: Mapping[str, Any], where: str) -> None:
    """Refuse stored settings of a wrong type or beyond any use.

    `cls` is the class of the image processor, or `PlainViTImageProcessor` for one of Transformers, which shares those.
    """
    kind = settings.get("image_processor_type", settings.get("feature_extractor_type"))
    if not isinstance(kind, str):
        raise ValueError(f"{where}: image_processor_type is {shown(kind)}, not the name of an image processor")
    hints = get_type_hints(cls.valid_kwargs)
    for name, value in settings.items():
        key = name if len(name) <= 100 else shown(name)
        if name in hints and hints[name] is not Any:
            # JSON has one kind of number.
            check_type(where, key, value, hints[name] | int if hints[name] is float else hints[name])
        elif name == "auto_map":
            check_type(where, key, value, dict | None)
        elif name.startswith("__") or (name not in (*_NOT_SETTINGS, *hints) and callable(getattr(cls, name, None))):
            raise ValueError(f"{where}: {key} is no setting of a {cls.__name__}; remove it")
        if name in _RANGES and value is not None and not _RANGES[name][0] <= value <= _RANGES[name][1]:
            least, most = _RANGES[name]
            raise ValueError(f"{where}: {key} is {shown(value)}; it must be between {least} and {most}")
    for name in ("image_mean", "image_std"):
        values = settings.get(name)
        numbers = values if isinstance(values, list | tuple) else [] if values is None else [values]
        if isinstance(values, list | tuple) and not 1 <= len(values) <= 4096:
            raise ValueError(f"{where}: {name} has {len(values)} values; it needs one for each channel")
        if not all(math.isfinite(number) and (number > 0 or name == "image_mean") for number in numbers):
            raise ValueError(f"{where}: {name} is {shown(values)}; it must be finite, and a deviation positive")
    _check_size(settings.get("size"), where)


def _check_size(size: Any, where: str) -> None:
    sides = size.values() if isinstance(size, dict) else size if isinstance(size, list | tuple) else [size, size]
    given = [side for side in sides if side is not None]
    if not all(type(side) is int and side > 0 for side in given) or math.prod(given) > MAX_INPUT_PIXELS:
        raise ValueError(
            f"{where}: size is {shown(size)}; it must be a height and width in pixels, of at most {MAX_INPUT_PIXELS} "
            "pixels together"
        )


def image_settings(settings: dict[str, Any]) -> ImageSettings:
    """How images are read: as many channels as means, the range of values, and the bands of files."""
    mean, std = (settings.get(name) for name in ("image_mean", "image_std"))
    lengths = [len(values) for values in (mean, std) if isinstance(values, list | tuple)]
    if len(set(lengths)) > 1:
        raise ValueError(
            f"image_mean has {lengths[0]} values and image_std {lengths[1]}; give one of each for every channel"
        )
    channels, bands = (lengths or [3])[0], checked_bands(settings.get("bands"))
    if bands is not None and len(bands) not in (channels, 1):
        raise ValueError(f"bands={list(bands)}, but image_mean is for {channels} channels; name as many bands")
    return ImageSettings(channels, checked_range(settings.get("value_range")), bands)


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
