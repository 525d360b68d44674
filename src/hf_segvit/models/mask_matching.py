"""Which query answers for which segment: a one-to-one assignment of least cost, for all layers and images of a step.

In here: `match_masks`, then the costs. The cost of a pair is the weighted sum of binary cross-entropy, dice and minus
the class probability, the first two at points that all queries and segments of an image share (EoMT, arXiv 2503.19108;
Mask2Former, arXiv 2112.01527). Costs are computed on the device, copied to the host at once, and solved there.

Shapes: L layers with a prediction, B batch, Q queries, C classes without no-object, h w cells of the mask logits,
N segments of all images, n the most of one image, M matched pairs of one layer, P points.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .mask_targets import MaskTargets, bilinear_position

try:
    from scipy.optimize import linear_sum_assignment
except ImportError:
    linear_sum_assignment = None

# Beyond this, costs say no more than "not this pair"; the official matcher has the same bound.
LARGEST_COST = 1e10

# Numbers held at a time. One image after the other keeps a CPU's memory small and its caches warm; a GPU would rather
# launch few kernels (256 MiB).
CHUNK_ON_CPU = 2**22
CHUNK_ELSEWHERE = 2**26


@dataclass
class Matches:
    """The pairs of every layer, ordered by image, then by query.

    Args:
        image_index: (M,) int64; an image has the same number of pairs in every layer, the lesser of segments and Q.
        query_index: (L, M) int64, within the image.
        target_index: (L, M) int64, within `MaskTargets`.
    """

    image_index: Tensor
    query_index: Tensor
    target_index: Tensor


@torch.no_grad()
def match_masks(
    class_logits: list[Tensor],
    mask_logits: list[Tensor],
    points: Iterable[Tensor],
    targets: MaskTargets,
    class_weight: float,
    mask_weight: float,
    dice_weight: float,
) -> Matches | None:
    """Assign queries to segments, separately for each layer and image.

    Args:
        class_logits: per layer (B, Q, C + 1), no-object last.
        mask_logits: per layer (B, Q, h, w), any floating type; quickest where memory holds them channels-last.
        points: per layer (B, P, 2), (x, y) in [0, 1].
        targets: the segments.
        class_weight: weight of the class probability in the cost.
        mask_weight: weight of the binary cross-entropy.
        dice_weight: weight of the dice loss.

    Returns:
        The pairs on the device of the logits; `None` where a target was found to be out of range.

    Raises:
        ImportError: SciPy is missing.
    """
    if linear_sum_assignment is None:
        raise ImportError("matching predictions with targets needs SciPy: pip install scipy")
    batch_size, num_queries = mask_logits[0].shape[:2]
    costs = mask_logits[0].new_zeros(
        (len(mask_logits), batch_size, num_queries, max(targets.counts)), dtype=torch.float32
    )
    # Autocast would take the matrix products below in half precision.
    with torch.autocast(mask_logits[0].device.type, enabled=False):
        for layer_costs, classes, masks, layer_points in zip(costs, class_logits, mask_logits, points, strict=True):
            chunk = CHUNK_ON_CPU if masks.device.type == "cpu" else CHUNK_ELSEWHERE
            step = max(1, chunk // (num_queries * max(layer_points.shape[1], masks.shape[2] * masks.shape[3])))
            for start in range(0, batch_size, step):
                images = range(start, min(start + step, batch_size))
                most = max(targets.counts[i] for i in images)
                if most > 0:
                    layer_costs[start : images.stop, :, :most] = _costs(
                        classes[start : images.stop],
                        masks[start : images.stop],
                        layer_points[start : images.stop],
                        targets,
                        images,
                        (class_weight, mask_weight, dice_weight),
                    )
    costs = costs.clamp(-LARGEST_COST, LARGEST_COST).nan_to_num(nan=0.0)
    on_host = torch.cat([costs.flatten(), targets.valid.float().view(1)]).cpu().numpy()  # the one wait for the device
    if not on_host[-1]:
        return None
    return _assign(on_host[:-1].reshape(costs.shape), targets.counts, mask_logits[0].device)


def _assign(costs: np.ndarray, counts: list[int], device: torch.device) -> Matches:
    """Solve the costs (L, B, Q, n) on the host, and send all pairs to the device at once."""
    offsets = np.cumsum([0, *counts])
    pairs = [
        [linear_sum_assignment(image_costs[:, :count]) for image_costs, count in zip(layer_costs, counts, strict=True)]
        for layer_costs in costs
    ]
    rows = [np.repeat(np.arange(len(counts)), [len(queries) for queries, _ in pairs[0]])]
    rows += [np.concatenate([queries for queries, _ in layer]) for layer in pairs]
    rows += [
        np.concatenate([targets + offset for (_, targets), offset in zip(layer, offsets[:-1], strict=True)])
        for layer in pairs
    ]
    packed = torch.from_numpy(np.stack(rows).astype(np.int64)).to(device, non_blocking=True)
    return Matches(packed[0], packed[1 : 1 + len(pairs)], packed[1 + len(pairs) :])


def _costs(
    class_logits: Tensor,
    mask_logits: Tensor,
    points: Tensor,
    targets: MaskTargets,
    images: range,
    weights: tuple[float, float, float],
) -> Tensor:
    """Costs (b, Q, n) of the pairs within each of some consecutive images, b of them; 0 where an image has fewer."""
    class_weight, mask_weight, dice_weight = weights
    num_images, num_points = points.shape[:2]
    first = sum(targets.counts[: images.start])
    counts = [targets.counts[i] for i in images]
    target_index = torch.arange(first, first + sum(counts), device=points.device)
    image = targets.image_index[target_index] - images.start
    slot = targets.slot[target_index]
    image_index = torch.arange(images.start, images.stop, device=points.device)
    counted = targets.weights(image_index, points)

    # One row per segment and a last one of ones, all of them 0 at points that do not count: every sum over points that
    # the costs need is then a product with these rows.
    rows = points.new_zeros((num_images, max(counts) + 1, num_points))
    rows[image, slot] = targets.sample(target_index, points[image]) * counted[image]
    rows[:, -1] = counted
    num_counted = counted.sum(1).clamp(min=1)[:, None, None]

    logits = _sample_queries(mask_logits, points)
    probabilities = logits.sigmoid()
    sums = rows @ probabilities
    dice = 1 - (2 * sums[:, :-1] + 1) / (sums[:, -1:] + rows[:, :-1].sum(-1, keepdim=True) + 1)
    # BCE with target t is softplus(x) - t x, and softplus(x) = max(x, 0) - log(max(p, 1 - p)) for p = sigmoid(x): half
    # the time of log1p(exp(x)) at the same accuracy, in place because these are the largest tensors here.
    agreement = rows[:, :-1] @ logits
    softplus = logits.relu_().sub_(probabilities.sub_(0.5).abs_().add_(0.5).log_())
    cross_entropy = (rows[:, -1:] @ softplus - agreement) / num_counted

    labels = targets.labels.new_zeros((num_images, max(counts)))
    labels[image, slot] = targets.labels[target_index]
    class_probabilities = class_logits.float().softmax(-1).transpose(1, 2)
    class_probability = class_probabilities.gather(1, labels[..., None].expand(-1, -1, class_logits.shape[1]))
    return (mask_weight * cross_entropy + dice_weight * dice - class_weight * class_probability).transpose(1, 2)


def _sample_queries(mask_logits: Tensor, points: Tensor) -> Tensor:
    """Bilinear values (b, P, Q), float32, of the logits (b, Q, h, w) of all queries at the points (b, P, 2) they share.

    `grid_sample` reads each query on its own; here a point's four cells are found once and read as rows of Q numbers.
    """
    num_images, num_queries, height, width = mask_logits.shape
    # Rows must be contiguous, or embedding_bag takes five times as long.
    table = mask_logits.permute(0, 2, 3, 1).reshape(-1, num_queries).float().contiguous()
    column, x = bilinear_position(points[..., 0], width)
    row, y = bilinear_position(points[..., 1], height)
    columns = torch.stack([column, column + 1, column, column + 1], dim=-1)
    rows = torch.stack([row, row, row + 1, row + 1], dim=-1)
    shares = torch.stack([(1 - x) * (1 - y), x * (1 - y), (1 - x) * y, x * y], dim=-1)
    shares = shares * ((columns >= 0) & (columns < width) & (rows >= 0) & (rows < height))
    image = torch.arange(num_images, device=points.device)[:, None, None]
    cells = (image * height + rows.clamp(0, height - 1)) * width + columns.clamp(0, width - 1)
    values = F.embedding_bag(cells.view(-1, 4), table, per_sample_weights=shares.view(-1, 4), mode="sum")
    return values.view(num_images, -1, num_queries)
