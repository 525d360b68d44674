"""Ground truth of masks for training: checked, packed, and sampled at points.

`validate_targets` refuses targets that do not fit. `MaskTargets` holds those of a whole batch side by side and samples
them bilinearly, straight from booleans, like `grid_sample` with `align_corners=False` and zero padding: float copies of
all masks would be the largest tensors of the loss.

Shapes: B batch, C classes without no-object, H W pixels, N segments of all images together, n of one image,
P points, m masks that are read. Points are (x, y) in [0, 1], relative to the whole image.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce

import torch
from torch import Tensor


def validate_targets(
    mask_labels: list[Tensor],
    class_labels: list[Tensor],
    num_labels: int,
    batch_size: int,
    loss_mask: Tensor | None = None,
    read_values: bool | None = None,
    others: Mapping[str, list[Tensor]] | None = None,
) -> None:
    """Refuse targets that cannot be matched with predictions; a ValueError names image, value and remedy.

    Args:
        mask_labels: per image (n, H, W), boolean or numbers in [0, 1]; one size for the whole batch.
        class_labels: per image (n,) integers in [0, `num_labels`).
        num_labels: number C of classes.
        loss_mask: boolean (B, H, W), True for pixels that count; `None` counts all.
        read_values: whether to check values besides shapes and types. `None` checks them on the CPU only.
        others: targets of a custom criterion, by name, per image (n, ...).
    """
    for name, labels in (("mask_labels", mask_labels), ("class_labels", class_labels)):
        if len(labels) != batch_size:
            raise ValueError(f"{name} has {len(labels)} entries for a batch of {batch_size} images; give one per image")
    size, first = None, 0
    for image, (masks, classes) in enumerate(zip(mask_labels, class_labels, strict=True)):
        if not isinstance(masks, Tensor) or masks.dim() != 3 or masks.is_complex():
            raise ValueError(
                f"mask_labels[{image}] is {_described(masks)}; give a boolean tensor (n, H, W), n = 0 for no segment"
            )
        if not isinstance(classes, Tensor) or classes.dim() != 1 or classes.is_floating_point():
            raise ValueError(f"class_labels[{image}] is {_described(classes)}; give an int64 tensor (n,)")
        if len(masks) != len(classes):
            raise ValueError(
                f"mask_labels[{image}] has {len(masks)} masks but class_labels[{image}] has {len(classes)} labels; "
                "give one label per mask"
            )
        if len(masks) > 0 and size is None:
            size, first = masks.shape[1:], image
        if len(masks) > 0 and masks.shape[1:] != size:
            raise ValueError(
                f"mask_labels[{image}] is {_by(masks.shape[1:])} pixels but mask_labels[{first}] is {_by(size)}; "
                "pad or resize them with their images to one size"
            )
        # On another device a look would wait for it; there the criterion looks when it has to wait anyway.
        if read_values or (read_values is None and masks.device.type == "cpu" == classes.device.type):
            _validate_values(image, masks, classes, num_labels)
    for name, rows in (others or {}).items():
        for image, classes in enumerate(class_labels):
            if len(rows) != batch_size or len(rows[image]) != len(classes):
                raise ValueError(
                    f"{name} does not fit class_labels: give a tensor per image, with a row for each of its segments "
                    f"({len(classes)} in image {image})"
                )
    if loss_mask is None:
        return
    if loss_mask.dim() != 3 or loss_mask.dtype != torch.bool or len(loss_mask) != batch_size:
        raise ValueError(f"loss_mask is {_described(loss_mask)}; give a boolean tensor ({batch_size}, H, W)")
    if size is not None and loss_mask.shape[1:] != size:
        raise ValueError(
            f"loss_mask is {_by(loss_mask.shape[1:])} pixels but mask_labels[{first}] is {_by(size)}; "
            "both must have the size of the model's input"
        )


def _validate_values(image: int, masks: Tensor, classes: Tensor, num_labels: int) -> None:
    if len(classes) == 0:
        return
    for extreme in (int(classes.min()), int(classes.max())):
        if not 0 <= extreme < num_labels:
            raise ValueError(
                f"class_labels[{image}] holds label id {extreme}, outside 0..{num_labels - 1}; fix the annotation, "
                "map it to the labels of the config, or give the model a config whose id2label has it"
            )
    if masks.dtype != torch.bool and masks.numel() > 0:
        low, high = (float(extreme) for extreme in masks.aminmax())
        if not (low >= 0 and high <= 1):  # also true of NaN
            raise ValueError(
                f"mask_labels[{image}] holds values from {low:g} to {high:g}; give boolean masks, one per segment "
                "(an id map becomes masks by comparing it with each id)"
            )


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"


def _by(size: torch.Size | None) -> str:
    return " x ".join(str(length) for length in size or ())


@dataclass
class MaskTargets:
    """Targets of a batch, image after image."""

    masks: Tensor  # (N, H + 2, W + 2), any type; with a border of zeros, and 0 at pixels that do not count
    labels: Tensor  # (N,) int64, clamped to the valid range: see `valid`
    image_index: Tensor  # (N,) int64, the image of each segment
    slot: Tensor  # (N,) int64, its index among the segments of its image
    counts: list[int]  # number of segments of each image, on the host
    counted: Tensor | None  # boolean (B, H + 2, W + 2), True where pixels count and in the border; None if all do
    valid: Tensor  # boolean scalar on the device, whether every value is in range
    others: dict[str, Tensor] = field(default_factory=dict)  # other targets of the segments, by name (N, ...)

    @classmethod
    def pack(
        cls,
        mask_labels: list[Tensor],
        class_labels: list[Tensor],
        num_labels: int,
        loss_mask: Tensor | None,
        device: torch.device,
        others: Mapping[str, list[Tensor]] | None = None,
    ) -> "MaskTargets":
        """Put the targets of a batch side by side on the device of the predictions, without waiting for it.

        All must have passed `validate_targets`, which has the same arguments.
        """
        counts = [len(classes) for classes in class_labels]
        height, width = next((masks.shape[1:] for masks in mask_labels if len(masks) > 0), (0, 0))
        dtype = reduce(torch.promote_types, (masks.dtype for masks in mask_labels))
        # The border of zeros spares `_bilinear` any test for the edge.
        packed = torch.zeros((sum(counts), height + 2, width + 2), dtype=dtype, device=device)
        counted = None
        if loss_mask is not None:
            loss_mask = loss_mask.to(device, non_blocking=True)
            counted = torch.nn.functional.pad(loss_mask, (1, 1, 1, 1), value=True)
        valid = torch.ones((), dtype=torch.bool, device=device)
        inside = packed[:, 1:-1, 1:-1].split(counts)
        for image, masks in enumerate(mask_labels):
            if counts[image] == 0:
                continue
            inside[image].copy_(masks, non_blocking=True)
            if dtype != torch.bool:
                low, high = inside[image].aminmax()
                valid &= (low >= 0) & (high <= 1)
            if loss_mask is not None:
                inside[image].mul_(loss_mask[image])
        labels = torch.cat([classes.to(device, torch.int64, non_blocking=True) for classes in class_labels])
        valid &= ((labels >= 0) & (labels < num_labels)).all()
        # Built on the host: repeat_interleave of counts on the device would wait to learn the size of its result.
        slots = [(image, slot) for image, count in enumerate(counts) for slot in range(count)]
        image_index, slot = torch.tensor(slots, dtype=torch.int64).view(-1, 2).to(device, non_blocking=True).unbind(1)
        # An impossible label must not crash a kernel before `valid` is read on the host.
        labels = labels.clamp(0, num_labels - 1)
        rows = {name: torch.cat([row.to(device) for row in images]) for name, images in (others or {}).items()}
        return cls(packed, labels, image_index, slot, counts, counted, valid, rows)

    def sample(self, target_index: Tensor, points: Tensor) -> Tensor:
        """Bilinear values (m, P), float32, of masks `target_index` (m,) at points (m, P, 2)."""
        values = _bilinear(self.masks, target_index, points)
        if self.counted is None:
            return values
        # `masks` is 0 at pixels that do not count, so dividing by the share of the others gives the mean over those.
        share = _bilinear(self.counted, self.image_index[target_index], points)
        return torch.where(share > 0, values / share, values)

    def weights(self, image_index: Tensor, points: Tensor) -> Tensor:
        """1 or 0, float32 (m, P): whether points (m, P, 2) of images `image_index` (m,) lie in a pixel that counts."""
        if self.counted is None:
            return points.new_ones(()).expand(points.shape[:2])
        height, width = self.counted.shape[1] - 2, self.counted.shape[2] - 2
        # Rounding may put a point on the far edge itself, which belongs to the last pixel.
        column = (points[..., 0] * width).long().clamp(max=width - 1) + 1
        row = (points[..., 1] * height).long().clamp(max=height - 1) + 1
        return self.counted[image_index[:, None], row, column].float()


def _bilinear(planes: Tensor, plane_index: Tensor, points: Tensor) -> Tensor:
    """Bilinear values (m, P) of planes (K, H + 2, W + 2) with a border at points (m, P, 2) of their inside."""
    num_rows, num_columns = planes.shape[1:]
    column, x = bilinear_position(points[..., 0], num_columns - 2)
    row, y = bilinear_position(points[..., 1], num_rows - 2)
    start = ((plane_index[:, None] * num_rows + row + 1) * num_columns + column + 1).flatten()
    # Four reads of the flat planes at one index, each from another start: index_select on bytes is the fastest gather.
    flat = planes.reshape(-1)
    corners = [
        flat[offset:].index_select(0, start).view(x.shape).float() for offset in (0, 1, num_columns, num_columns + 1)
    ]
    return torch.lerp(torch.lerp(corners[0], corners[1], x), torch.lerp(corners[2], corners[3], x), y)


def bilinear_position(coordinate: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Position of points between pixel centres along one axis, as in `grid_sample` with `align_corners=False`.

    Returns the index of the pixel before each `coordinate` in [0, 1], int64 from -1 to length - 1, and the fraction of
    the way to the next one.
    """
    position = coordinate * length - 0.5
    before = position.floor()
    return before.long(), position - before
