"""The loss of a set of predicted masks: which query answers for which segment, then losses of each layer that predicts.

In here, in this order: what a layer predicts, the criterion and what its losses are computed from, and the matching.
The formulas are those of EoMT (arXiv 2503.19108), which takes them from Mask2Former (arXiv 2112.01527). Each layer is
matched on its own, one-to-one at the least cost; the cost of a pair is the weighted sum of binary cross-entropy, dice
and minus the class probability, the first two at points that all queries and segments of an image share. Costs are
computed on the device, copied to the host at once, and solved there. Matched masks are then compared at points of
which most lie where the prediction is unsure, and all layers count alike.

Another loss is a subclass with its own `layer_losses`; docs/extending.md shows one.

Shapes: L layers with a prediction, B batch, Q queries, C classes without no-object, H W pixels, h w cells of the mask
logits, N segments of all images, n of one image, M matched pairs of one layer, P points.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .mask_targets import MaskTargets, bilinear_position, validate_targets

try:
    from scipy.optimize import linear_sum_assignment
except ImportError:  # a model that only predicts needs no SciPy
    linear_sum_assignment = None

# Keeps 0 / 0 at 0 where nothing was matched; a real count is never below 1 / number of processes.
SMALLEST_NORMALIZER = 1e-12


@dataclass
class MaskPrediction:
    """What one layer predicts.

    Args:
        class_logits: (B, Q, C + 1), no-object last.
        mask_logits: (B, Q, h, w), read without gradient where `matched_mask_logits` is given. Matching is quickest
            where memory holds them channels-last.
        matched_mask_logits: from image_index (M,) and query_index (M,), int64 on the device and ordered by image, then
            query, to the mask logits (M, h, w) of these queries with gradient: so no graph is kept through the others.
            By default these are read from `mask_logits`.
        others: what else is predicted of the queries, such as boxes: by name (B, Q, ...).
    """

    class_logits: Tensor
    mask_logits: Tensor
    matched_mask_logits: Callable[[Tensor, Tensor], Tensor] | None = None
    others: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass
class MatchedLayer:
    """What the losses of one layer are computed from: its prediction, and its pairs ordered by image, then by query.

    Args:
        prediction: of the layer.
        image_index: (M,) int64.
        query_index: (M,) int64, within the image.
        target_index: (M,) int64, within `targets`.
        targets: the segments of the batch.
        logits: (M, P) float32 mask logits of the matched queries at the sampled points, with gradient.
        truth: (M, P) float32, the masks of their segments there, in [0, 1].
        counted: (M, P) float32, 1 where a point counts and 0 where `loss_mask` leaves it out.
        num_pairs: scalar by which a sum over pairs is divided: pairs of the whole step.
        class_weights: scalar by which a sum over all queries is divided: their class weights in the whole step.
    """

    prediction: MaskPrediction
    image_index: Tensor
    query_index: Tensor
    target_index: Tensor
    targets: MaskTargets
    logits: Tensor
    truth: Tensor
    counted: Tensor
    num_pairs: Tensor
    class_weights: Tensor

    def of_queries(self, values: Tensor) -> Tensor:
        """Rows (M, ...) of the matched queries, from values (B, Q, ...) such as `prediction.others["boxes"]`."""
        return values[self.image_index, self.query_index]

    def of_segments(self, name: str) -> Tensor:
        """Rows (M, ...) of the matched segments, from the targets that the model was given as `name`."""
        return self.targets.others[name][self.target_index]


PointSampler = Callable[[int, int, torch.device], Tensor]


def uniform_points(num_sets: int, num_points: int, device: torch.device) -> Tensor:
    """Uniform points (num_sets, num_points, 2) in [0, 1), from PyTorch's global generator of the device."""
    return torch.rand(num_sets, num_points, 2, device=device)


class MaskCriterion(nn.Module):
    """Matches predictions with targets and compares them.

    The total is the sum over layers of `mask_weight` * binary cross-entropy + `dice_weight` * dice + `class_weight` *
    cross-entropy. Logits may be of any floating type; everything here is computed in float32. A subclass adds or
    replaces losses in `layer_losses`: one named `focal` counts with the attribute `focal_weight`.

    Args:
        num_labels: number C of classes without no-object.
        class_weight: weight of the class loss, and of the class probability in matching.
        mask_weight: weight of the binary cross-entropy, in matching too.
        dice_weight: weight of the dice loss, in matching too.
        no_object_weight: weight of queries without a segment in the class loss; the others have 1.
        num_points: points that are sampled from a mask, in matching and again in the loss.
        oversample_ratio: candidates drawn for each point of the loss.
        importance_sample_ratio: share of the points taken from the candidates with the least certain prediction; the
            rest is drawn at random.
        loss_normalization: `"global"` or `"per_rank"`, see `count_normalizers`.
        point_sampler: gives (num_sets, num_points, 2) points in [0, 1) for (num_sets, num_points, device): all of the
            criterion's randomness.

    Raises:
        ValueError: the ratios ask for more uncertain points than there are points or candidates.
    """

    def __init__(
        self,
        num_labels: int,
        class_weight: float = 2.0,
        mask_weight: float = 5.0,
        dice_weight: float = 5.0,
        no_object_weight: float = 0.1,
        num_points: int = 12544,
        oversample_ratio: float = 3.0,
        importance_sample_ratio: float = 0.75,
        loss_normalization: str = "global",
        point_sampler: PointSampler = uniform_points,
    ):
        super().__init__()
        if not 0 <= importance_sample_ratio <= min(1, oversample_ratio):
            raise ValueError(
                f"importance_sample_ratio={importance_sample_ratio} must lie between 0 and the lesser of 1 and "
                f"oversample_ratio={oversample_ratio}: the uncertain points are chosen among the candidates"
            )
        self.num_labels = num_labels
        self.class_weight = class_weight
        self.mask_weight = mask_weight
        self.dice_weight = dice_weight
        self.no_object_weight = no_object_weight
        self.num_points = num_points
        self.oversample_ratio = oversample_ratio
        self.importance_sample_ratio = importance_sample_ratio
        self.loss_normalization = loss_normalization
        self.point_sampler = point_sampler

    @classmethod
    def from_config(cls, config: Any) -> "MaskCriterion":
        """The criterion of a model's configuration; a subclass reads here what else it needs."""
        return cls(**config.criterion_arguments())

    def count_normalizers(
        self,
        class_labels: list[Tensor],
        num_queries: int,
        device: torch.device | None = None,
        all_processes: bool = True,
    ) -> Tensor:
        """What the losses are divided by. It follows from the targets alone, so one count a step serves all layers.

        For accumulation, pass the labels of all micro-batches of a step at once, give the result to each of them, and
        add up their gradients: that is the gradient of the joint batch.

        With `loss_normalization="global"` both counts are summed over processes and divided by the number of processes,
        so that the mean gradient over processes is the gradient of one process with all the images. `"per_rank"` is the
        official code: the same for pairs but at least 1, while class weights are those of this process alone.

        Args:
            class_labels: per image (n,).
            num_queries: number Q; an image has at most so many matched pairs.
            device: of the result, and of the exchange between processes; by default that of the labels.
            all_processes: whether to exchange counts where `torch.distributed` runs. Every process has to call then.

        Returns:
            (2,) float32: number of matched pairs, sum of class weights.
        """
        num_pairs = sum(min(len(labels), num_queries) for labels in class_labels)
        class_weights = num_pairs + self.no_object_weight * (len(class_labels) * num_queries - num_pairs)
        device = class_labels[0].device if device is None else device
        counts = torch.tensor([num_pairs, class_weights], dtype=torch.float32).to(device, non_blocking=True)
        num_processes = 1
        summed = counts.clone()
        if all_processes and torch.distributed.is_available() and torch.distributed.is_initialized():
            num_processes = torch.distributed.get_world_size()
            torch.distributed.all_reduce(summed)
        if self.loss_normalization == "per_rank":
            return torch.stack([(summed[0] / num_processes).clamp(min=1), counts[1]])
        return summed / num_processes

    @staticmethod
    def curve_name(term: str) -> str:
        """The curve "PANEL/CURVE" of a term of the loss: losses of one name share a panel, with a curve per layer."""
        layer = re.fullmatch(r"loss_(.+)_layer_(\d+)", term)
        return term if layer is None else f"{layer[1]} loss/prediction {int(layer[2]) + 1}"

    # SciPy solves the matching on the host, and every step brings another number of pairs: nothing to compile.
    @torch.compiler.disable
    def forward(
        self,
        predictions: list[MaskPrediction],
        mask_labels: list[Tensor],
        class_labels: list[Tensor],
        loss_mask: Tensor | None = None,
        normalizers: Tensor | None = None,
        **others: list[Tensor],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Total loss, and its terms.

        In evaluation counts are not exchanged between processes, since these may then see different numbers of batches.

        Args:
            predictions: of each layer, the final one last.
            mask_labels: per image (n, H, W) masks; n may be 0 or exceed Q. They have passed `validate_targets`.
            class_labels: per image (n,) integers in [0, C).
            loss_mask: boolean (B, H, W), True where pixels count; others influence neither matching nor mask losses.
            normalizers: (2,) as `count_normalizers` returns; `None` counts this batch.
            others: what else is known of the segments: by name, per image (n, ...), for `MatchedLayer.of_segments`.

        Returns:
            The total, a float32 scalar, always connected to every prediction; and detached, unweighted scalars
            `loss_mask_layer_i`, `loss_dice_layer_i`, `loss_class_layer_i` for layer i of `predictions`.

        Raises:
            ValueError: a label or mask holds a value out of range.
            ImportError: SciPy is missing.
        """
        batch_size, num_queries = predictions[0].class_logits.shape[:2]
        device = predictions[0].class_logits.device
        if normalizers is None:
            normalizers = self.count_normalizers(class_labels, num_queries, device, all_processes=self.training)
        num_pairs, class_weights = normalizers.to(device, torch.float32).clamp(min=SMALLEST_NORMALIZER)

        targets = MaskTargets.pack(mask_labels, class_labels, self.num_labels, loss_mask, device, others)
        matches = match_masks(
            [prediction.class_logits for prediction in predictions],
            [prediction.mask_logits for prediction in predictions],
            (self.point_sampler(batch_size, self.num_points, device) for _ in predictions),
            targets,
            self.class_weight,
            self.mask_weight,
            self.dice_weight,
        )
        if matches is None:
            validate_targets(mask_labels, class_labels, self.num_labels, batch_size, loss_mask, read_values=True)
            raise ValueError(
                "mask_labels or class_labels changed while the loss was computed; leave them until it returns"
            )

        total = normalizers.new_zeros((), device=device, dtype=torch.float32)
        terms: dict[str, Tensor] = {}
        image_index = matches.image_index
        for layer, prediction in enumerate(predictions):
            query_index, target_index = matches.query_index[layer], matches.target_index[layer]
            if prediction.matched_mask_logits is None:
                mask_logits = prediction.mask_logits[image_index, query_index]
            else:
                mask_logits = prediction.matched_mask_logits(image_index, query_index)
            mask_logits = mask_logits.float()
            with torch.no_grad():
                points = self._points_of_loss(mask_logits, image_index, targets)
                counted = targets.weights(image_index, points)
                truth = targets.sample(target_index, points)
            logits = _sample_masks(mask_logits, points)
            pairs = (image_index, query_index, target_index, targets, logits, truth, counted)
            for name, loss in self.layer_losses(MatchedLayer(prediction, *pairs, num_pairs, class_weights)).items():
                total = total + getattr(self, f"{name}_weight") * loss
                terms[f"loss_{name}_layer_{layer}"] = loss.detach()
        return total, terms

    def layer_losses(self, layer: MatchedLayer) -> dict[str, Tensor]:
        """The losses of one layer, unweighted scalars by name, in the order in which they are added up.

        They have to be there in every step, also where nothing was matched.
        """
        error = F.binary_cross_entropy_with_logits(layer.logits, layer.truth, layer.counted, reduction="none")
        mask_loss = (error.sum(1) / layer.counted.sum(1).clamp(min=1)).sum()
        probabilities, truth = layer.logits.sigmoid() * layer.counted, layer.truth * layer.counted
        overlap = 2 * (probabilities * truth).sum(1)
        dice_loss = (1 - (overlap + 1) / (probabilities.sum(1) + truth.sum(1) + 1)).sum()
        return {
            "mask": mask_loss / layer.num_pairs,
            "dice": dice_loss / layer.num_pairs,
            "class": self._class_loss(layer) / layer.class_weights,
        }

    def _class_loss(self, layer: MatchedLayer) -> Tensor:
        """Weighted cross-entropy summed over all queries; those without a segment are no-object."""
        class_logits = layer.prediction.class_logits
        truth = torch.full(class_logits.shape[:2], self.num_labels, device=class_logits.device)
        truth[layer.image_index, layer.query_index] = layer.targets.labels[layer.target_index]
        losses = F.cross_entropy(class_logits.float().flatten(0, 1), truth.flatten(), reduction="none")
        return torch.where(truth.flatten() == self.num_labels, self.no_object_weight * losses, losses).sum()

    def _points_of_loss(self, mask_logits: Tensor, image_index: Tensor, targets: MaskTargets) -> Tensor:
        """Points (M, P, 2) for each of the masks (M, h, w): most where it is near its own border, some anywhere."""
        num_masks, device = len(mask_logits), mask_logits.device
        num_uncertain = int(self.importance_sample_ratio * self.num_points)
        candidates = self.point_sampler(num_masks, int(self.num_points * self.oversample_ratio), device)
        certainty = _sample_masks(mask_logits, candidates).abs_()
        if targets.counted is not None:
            certainty = certainty.masked_fill_(targets.weights(image_index, candidates) == 0, float("inf"))
        uncertain = certainty.topk(num_uncertain, dim=1, largest=False, sorted=False).indices
        points = candidates.gather(1, uncertain[..., None].expand(-1, -1, 2))
        if num_uncertain == self.num_points:
            return points
        return torch.cat([points, self.point_sampler(num_masks, self.num_points - num_uncertain, device)], dim=1)


def _sample_masks(masks: Tensor, points: Tensor) -> Tensor:
    """Bilinear values (M, P) of masks (M, h, w) at points (M, P, 2), with gradient."""
    grid = 2 * points[:, :, None] - 1
    return F.grid_sample(masks[:, None], grid, align_corners=False)[:, 0, :, 0]


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
