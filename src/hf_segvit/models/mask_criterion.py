"""Loss of a set of predicted masks: match queries to segments, then compare.

In order: the records of a layer, the criterion, the matching. Formulas are EoMT's (arXiv 2503.19108), which takes them
from Mask2Former (arXiv 2112.01527). Each layer is matched on its own, one-to-one at the least cost: the weighted sum of
binary cross-entropy, dice and minus the class probability. Matched masks are compared at points most of which lie where
the prediction is uncertain, and all layers count alike. docs/extending.md shows a subclass with another loss.

Shapes: L layers with a prediction, B batch, Q queries, C classes without no-object, H W pixels, h w cells of the mask
logits, N segments of all images, n of one image, M matched pairs of one layer, P points.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
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
    """Predictions of one layer."""

    class_logits: Tensor  # (B, Q, C + 1), no-object last
    mask_logits: Tensor  # (B, Q, h, w); matching reads them fastest if memory holds them channels-last
    # Maps image_index (M,) and query_index (M,), ordered by image, then query, to mask logits (M, h, w) with gradient,
    # so that no graph is kept for the other queries. By default they are read from `mask_logits`.
    matched_mask_logits: Callable[[Tensor, Tensor], Tensor] | None = None
    others: Mapping[str, Tensor] = field(default_factory=dict)  # such as boxes, by name (B, Q, ...)
    # Gives mask logits (B, Q, h, w) with gradient, for the outlier loss. By default they are `mask_logits`.
    all_mask_logits: Callable[[], Tensor] | None = None


@dataclass
class MatchedLayer:
    """Prediction of one layer with its pairs, ordered by image, then by query: the input of its losses."""

    prediction: MaskPrediction
    image_index: Tensor  # (M,) int64
    query_index: Tensor  # (M,) int64, within the image
    target_index: Tensor  # (M,) int64, within `targets`
    targets: MaskTargets  # the segments of the batch
    logits: Tensor  # (M, P) float32 mask logits of the matched queries at the sampled points, with gradient
    truth: Tensor  # (M, P) float32, the masks of their segments there, in [0, 1]
    counted: Tensor  # (M, P) float32, 0 for points that `loss_mask` leaves out, else 1
    num_pairs: Tensor  # scalar divisor of sums over pairs: the pairs of the whole step
    class_weights: Tensor  # scalar divisor of sums over all queries: their class weights in the whole step

    def of_queries(self, values: Tensor) -> Tensor:
        """Rows (M, ...) of the matched queries from values (B, Q, ...), such as `prediction.others["boxes"]`."""
        return values[self.image_index, self.query_index]

    def of_segments(self, name: str) -> Tensor:
        """Rows (M, ...) of the matched segments from the targets passed to the model as `name`."""
        return self.targets.others[name][self.target_index]


PointSampler = Callable[[int, int, torch.device], Tensor]


def uniform_points(num_sets: int, num_points: int, device: torch.device) -> Tensor:
    """Uniform points (num_sets, num_points, 2) in [0, 1), from PyTorch's global generator of the device."""
    return torch.rand(num_sets, num_points, 2, device=device)


class MaskCriterion(nn.Module):
    """Match predictions to targets and sum their losses.

    The total is the sum over layers of `mask_weight` * binary cross-entropy + `dice_weight` * dice + `class_weight` *
    cross-entropy, in float32. A subclass adds or replaces losses in `layer_losses`; the weight of one named `focal` is
    the attribute `focal_weight`. Arguments not listed are fields of `EoMTConfig`.

    Args:
        num_labels: number C of classes without no-object.
        num_points: points sampled from a mask, in matching and again in the loss.
        point_sampler: maps (num_sets, num_points, device) to points (num_sets, num_points, 2) in [0, 1); the only
            source of randomness.
        logit_norm_temperature: divides class logits, scaled to length 1, before matching and class loss (LogitNorm,
            Wei et al., ICML 2022, who take 0.04 for CIFAR); `None`: they are taken as they are. Inference is the same.
        outlier_weight: weight of the outlier loss in the total, for batches with an `outlier_map`; see `_outlier_loss`.
    """

    # Of RbA's published configuration.
    _INLIER_LIMIT, _OUTLIER_LIMIT = -1.0, -0.1

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
        logit_norm_temperature: float | None = None,
        outlier_weight: float = 0.0,
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
        self.logit_norm_temperature = logit_norm_temperature
        self.outlier_weight = outlier_weight

    @classmethod
    def from_config(cls, config: Any) -> "MaskCriterion":
        """The criterion for a model's configuration; a subclass reads its own fields here."""
        return cls(**config.criterion_arguments())

    def count_normalizers(
        self,
        class_labels: list[Tensor],
        num_queries: int,
        device: torch.device | None = None,
        all_processes: bool = True,
    ) -> Tensor:
        """Divisors of the losses (2,), float32: number of matched pairs, sum of class weights.

        With an outlier loss (3,), the last of which is the number of images.

        They follow from the targets alone. For gradient accumulation pass the labels of all micro-batches of a step at
        once and give the result to each of them; the summed gradients are then those of the joint batch.

        Args:
            class_labels: per image (n,).
            num_queries: number Q, the most pairs an image can have.
            device: of the result, and of the exchange between processes; by default that of the labels.
            all_processes: whether to exchange counts if `torch.distributed` runs. Then every process has to call.
        """
        # "global": counts are summed over processes and divided by their number, so that the mean gradient over
        # processes is that of one process with all images. "per_rank" is the official code: the same for pairs, but at
        # least 1, and class weights of this process alone.
        num_pairs = sum(min(len(labels), num_queries) for labels in class_labels)
        class_weights = num_pairs + self.no_object_weight * (len(class_labels) * num_queries - num_pairs)
        device = class_labels[0].device if device is None else device
        numbers = [num_pairs, class_weights, *([len(class_labels)] if self.outlier_weight else [])]
        counts = torch.tensor(numbers, dtype=torch.float32).to(device, non_blocking=True)
        num_processes = 1
        summed = counts.clone()
        if all_processes and torch.distributed.is_available() and torch.distributed.is_initialized():
            num_processes = torch.distributed.get_world_size()
            torch.distributed.all_reduce(summed)
        if self.loss_normalization == "per_rank":
            return torch.cat([(summed[:1] / num_processes).clamp(min=1), counts[1:]])
        return summed / num_processes

    @staticmethod
    def curve_name(term: str) -> str:
        """Name "PANEL/CURVE" of a loss term's curve: a panel per loss, with a curve per layer."""
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
        outlier_map: Tensor | None = None,
        **others: list[Tensor],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Total loss and its terms.

        Args:
            predictions: per layer, the final one last.
            mask_labels: per image (n, H, W) masks; n may be 0 or exceed Q. They have passed `validate_targets`.
            class_labels: per image (n,) integers in [0, C).
            loss_mask: boolean (B, H, W), True for pixels that count; others affect neither matching nor mask losses.
            normalizers: of `count_normalizers`; `None` counts this batch.
            outlier_map: (B, H, W) integers, 1 for pixels of objects that no class is for, 0 for others, -1 for void.
            others: other targets, by name, per image (n, ...), for `MatchedLayer.of_segments`.

        Returns:
            The total, a float32 scalar connected to every prediction; and detached, unweighted scalars
            `loss_mask_layer_i`, `loss_dice_layer_i`, `loss_class_layer_i` for layer i of `predictions`, and with an
            outlier loss `loss_outlier_layer_i`.
        """
        batch_size, num_queries = predictions[0].class_logits.shape[:2]
        device = predictions[0].class_logits.device
        if normalizers is None:
            # In evaluation processes may see different numbers of batches, so an exchange could wait forever.
            normalizers = self.count_normalizers(class_labels, num_queries, device, all_processes=self.training)
        num_pairs, class_weights, *num_images = normalizers.to(device, torch.float32).clamp(min=SMALLEST_NORMALIZER)
        if outlier_map is not None and (outlier_map.dim() != 3 or len(outlier_map) != batch_size):
            raise ValueError(f"outlier_map is {tuple(outlier_map.shape)}; give integers ({batch_size}, H, W)")
        if self.logit_norm_temperature is not None:
            predictions = [self._with_normalized_logits(prediction) for prediction in predictions]

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
            # Values on the device are not checked up front, as that would wait for it; this names the wrong one.
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
            # A layer without pairs still gives losses of 0, so that all parameters have gradients in every process.
            for name, loss in self.layer_losses(MatchedLayer(prediction, *pairs, num_pairs, class_weights)).items():
                total = total + getattr(self, f"{name}_weight") * loss
                terms[f"loss_{name}_layer_{layer}"] = loss.detach()
            if self.outlier_weight and outlier_map is not None:
                loss = self._outlier_loss(prediction, outlier_map) / num_images[0]
                total = total + self.outlier_weight * loss
                terms[f"loss_outlier_layer_{layer}"] = loss.detach()
        return total, terms

    def layer_losses(self, layer: MatchedLayer) -> dict[str, Tensor]:
        """Unweighted scalar losses of one layer by name; the names are the same in every step, even without pairs."""
        error = F.binary_cross_entropy_with_logits(layer.logits, layer.truth, layer.counted, reduction="none")
        mask_loss = (error.sum(1) / layer.counted.sum(1).clamp(min=1)).sum()
        probabilities, truth = layer.logits.sigmoid() * layer.counted, layer.truth * layer.counted
        # The 1 in both terms of dice is Mask2Former's smoothing, which also keeps an empty mask from giving 0 / 0.
        overlap = 2 * (probabilities * truth).sum(1)
        dice_loss = (1 - (overlap + 1) / (probabilities.sum(1) + truth.sum(1) + 1)).sum()
        return {
            "mask": mask_loss / layer.num_pairs,
            "dice": dice_loss / layer.num_pairs,
            "class": self._class_loss(layer) / layer.class_weights,
        }

    def _with_normalized_logits(self, prediction: MaskPrediction) -> MaskPrediction:
        """The prediction with class logits of one length, so that the loss cannot fall by making them longer."""
        assert self.logit_norm_temperature is not None
        logits = prediction.class_logits.float()
        # The added constant, which keeps 0 / 0 at 0, is the authors'.
        length = self.logit_norm_temperature * (logits.norm(dim=-1, keepdim=True) + 1e-7)
        return replace(prediction, class_logits=logits / length)

    def _outlier_loss(self, prediction: MaskPrediction, outlier_map: Tensor) -> Tensor:
        """Squared hinge loss of RbA (Nayal et al., ICCV 2023), summed over images.

        The score of a pixel is -sum_c tanh(S_c), S_c = sum_q p_q(c) m_q: 0 where every query rejects it. Of an image it
        is half of mean max(0, score + 1)^2 over known pixels plus mean max(0, -0.1 - score)^2 over outliers, if there
        are any. (The authors' code averages over the pixels of a batch, which accumulation would change.)
        """
        masks = prediction.mask_logits if prediction.all_mask_logits is None else prediction.all_mask_logits()
        classes = prediction.class_logits.float().softmax(-1)[..., :-1]
        with torch.autocast(masks.device.type, enabled=False):
            scores = -torch.einsum("bqc,bqhw->bchw", classes, masks.float().sigmoid()).tanh().sum(1)
        scores = F.interpolate(scores[:, None], outlier_map.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
        known, outlier = outlier_map == 0, outlier_map == 1
        inside = torch.where(known, (scores - self._INLIER_LIMIT).relu().square(), 0).sum((1, 2))
        outside = torch.where(outlier, (self._OUTLIER_LIMIT - scores).relu().square(), 0).sum((1, 2))
        means = inside / known.sum((1, 2)).clamp(min=1) + outside / outlier.sum((1, 2)).clamp(min=1)
        return 0.5 * means.sum()

    def _class_loss(self, layer: MatchedLayer) -> Tensor:
        """Weighted cross-entropy summed over all queries; those without a segment are no-object."""
        class_logits = layer.prediction.class_logits
        truth = torch.full(class_logits.shape[:2], self.num_labels, device=class_logits.device)
        truth[layer.image_index, layer.query_index] = layer.targets.labels[layer.target_index]
        losses = F.cross_entropy(class_logits.float().flatten(0, 1), truth.flatten(), reduction="none")
        return torch.where(truth.flatten() == self.num_labels, self.no_object_weight * losses, losses).sum()

    def _points_of_loss(self, mask_logits: Tensor, image_index: Tensor, targets: MaskTargets) -> Tensor:
        """Points (M, P, 2) for masks (M, h, w): most near each predicted border, some anywhere."""
        num_masks, device = len(mask_logits), mask_logits.device
        num_uncertain = int(self.importance_sample_ratio * self.num_points)
        candidates = self.point_sampler(num_masks, int(self.num_points * self.oversample_ratio), device)
        # Point sampling of PointRend (arXiv 1912.08193): a logit near 0 is the least certain.
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


# A larger cost says no more than "not this pair", and SciPy may refuse infinite ones. The official matcher's bound.
LARGEST_COST = 1e10

# Numbers held at a time. Image by image keeps a CPU's memory small and its caches warm; a GPU prefers few kernels
# (256 MiB).
CHUNK_ON_CPU = 2**22
CHUNK_ELSEWHERE = 2**26


@dataclass
class Matches:
    """Pairs of all layers, ordered by image, then by query."""

    image_index: Tensor  # (M,) int64; the same in every layer, as an image always has min(n, Q) pairs
    query_index: Tensor  # (L, M) int64, within the image
    target_index: Tensor  # (L, M) int64, within `MaskTargets`


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
    """Assign queries to segments, separately for each layer and image; `None` if a target is out of range.

    Args:
        class_logits: per layer (B, Q, C + 1), no-object last.
        mask_logits: per layer (B, Q, h, w), any floating type; fastest if memory holds them channels-last.
        points: per layer (B, P, 2), (x, y) in [0, 1], shared by all queries and segments of an image.
        targets: the segments.
        class_weight: weight of the class probability in the cost.
        mask_weight: weight of the binary cross-entropy.
        dice_weight: weight of the dice loss.
    """
    if linear_sum_assignment is None:
        raise ImportError("matching predictions with targets needs SciPy: pip install scipy")
    batch_size, num_queries = mask_logits[0].shape[:2]
    weights = (class_weight, mask_weight, dice_weight)
    shape = (len(mask_logits), batch_size, num_queries, max(targets.counts))
    costs = mask_logits[0].new_zeros(shape, dtype=torch.float32)
    # Autocast would take the matrix products below in half precision.
    with torch.autocast(mask_logits[0].device.type, enabled=False):
        for layer_costs, classes, masks, layer_points in zip(costs, class_logits, mask_logits, points, strict=True):
            budget = CHUNK_ON_CPU if masks.device.type == "cpu" else CHUNK_ELSEWHERE
            step = max(1, budget // (num_queries * max(layer_points.shape[1], masks.shape[2] * masks.shape[3])))
            for start in range(0, batch_size, step):
                images = range(start, min(start + step, batch_size))
                most = max(targets.counts[i] for i in images)
                if most > 0:
                    chunk = slice(images.start, images.stop)
                    layer_costs[chunk, :, :most] = _costs(
                        classes[chunk], masks[chunk], layer_points[chunk], targets, images, weights
                    )
    costs = costs.clamp(-LARGEST_COST, LARGEST_COST).nan_to_num(nan=0.0)
    on_host = torch.cat([costs.flatten(), targets.valid.float().view(1)]).cpu().numpy()  # the one wait for the device
    if not on_host[-1]:
        return None
    return _assign(on_host[:-1].reshape(costs.shape), targets.counts, mask_logits[0].device)


def _assign(costs: np.ndarray, counts: list[int], device: torch.device) -> Matches:
    """Solve the costs (L, B, Q, n) on the host."""
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
    # One copy to the device for all pairs of all layers.
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
    """Costs (b, Q, n) of the pairs in each of b consecutive images; 0 in the columns of images with fewer segments."""
    class_weight, mask_weight, dice_weight = weights
    num_images, num_points = points.shape[:2]
    first = sum(targets.counts[: images.start])
    counts = [targets.counts[i] for i in images]
    target_index = torch.arange(first, first + sum(counts), device=points.device)
    image = targets.image_index[target_index] - images.start
    slot = targets.slot[target_index]
    image_index = torch.arange(images.start, images.stop, device=points.device)
    counted = targets.weights(image_index, points)

    # One row per segment and a last row of ones, all 0 at points that do not count: every sum over points that the
    # costs need is then a product with these rows.
    rows = points.new_zeros((num_images, max(counts) + 1, num_points))
    rows[image, slot] = targets.sample(target_index, points[image]) * counted[image]
    rows[:, -1] = counted
    num_counted = counted.sum(1).clamp(min=1)[:, None, None]

    logits = _sample_queries(mask_logits, points)
    probabilities = logits.sigmoid()
    sums = _over_points(rows, probabilities)
    dice = 1 - (2 * sums[:, :-1] + 1) / (sums[:, -1:] + rows[:, :-1].sum(-1, keepdim=True) + 1)
    # BCE with target t is softplus(x) - t x, and softplus(x) = max(x, 0) - log(max(p, 1 - p)) for p = sigmoid(x): half
    # the time of log1p(exp(x)) at the same accuracy. In place, because these are the largest tensors here.
    agreement = _over_points(rows[:, :-1], logits)
    softplus = logits.relu_().sub_(probabilities.sub_(0.5).abs_().add_(0.5).log_())
    cross_entropy = (_over_points(rows[:, -1:], softplus) - agreement) / num_counted

    labels = targets.labels.new_zeros((num_images, max(counts)))
    labels[image, slot] = targets.labels[target_index]
    class_probabilities = class_logits.float().softmax(-1).transpose(1, 2)
    class_probability = class_probabilities.gather(1, labels[..., None].expand(-1, -1, class_logits.shape[1]))
    return (mask_weight * cross_entropy + dice_weight * dice - class_weight * class_probability).transpose(1, 2)


def _over_points(rows: Tensor, values: Tensor) -> Tensor:
    """Products (b, n, Q) of rows (b, n, P) and values (b, P, Q)."""
    parts = _parts(rows)
    if parts == 1:
        return rows @ values
    return (rows.unflatten(2, (parts, -1)).transpose(1, 2) @ values.unflatten(1, (parts, -1))).sum(1)


def _parts(rows: Tensor) -> int:
    # Few long rows leave most of a GPU idle; parts of them in a batch do not.
    return 32 if rows.device.type != "cpu" and rows.shape[-1] % 32 == 0 else 1


def _sample_queries(mask_logits: Tensor, points: Tensor) -> Tensor:
    """Bilinear float32 values (b, P, Q) of logits (b, Q, h, w) at points (b, P, 2) that all queries share."""
    # `grid_sample` reads each query on its own; here a point's four cells are found once and read as rows of Q numbers.
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
