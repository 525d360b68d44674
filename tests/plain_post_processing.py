"""The post-processing rules written plainly: whole images, all queries, loops. Also the logits to try them on.

Each reference also says where float32 rounding may decide: pixels where two queries, or a probability and its
threshold, are closer than the rounding of a resampled logit. Shapes: Q queries, C classes, h w cells, H W pixels.
"""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F


@dataclass
class Case:
    """Logits of one image (B = 1) and where it lies."""

    class_logits: Tensor
    mask_logits: Tensor
    input_size: tuple[int, int]
    content_size: tuple[int, int]
    target_size: tuple[int, int]

    @property
    def geometry(self) -> dict:
        return {"input_size": self.input_size, "content_sizes": [self.content_size]}


def mask_family(kind: str, num_queries: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    noise = torch.randn(num_queries, *size, generator=generator)
    if kind == "noise":
        return 5 * noise
    if kind == "huge":
        return 1e4 * noise
    if kind == "mixed scales":
        return noise * 10.0 ** torch.randint(-3, 5, (num_queries, 1, 1), generator=generator)
    if kind == "all low":
        return -200 + noise  # probabilities underflow to 0
    if kind == "all high":
        return 3 + noise
    if kind == "tiny":
        cells = torch.randint(0, size[0] * size[1], (num_queries,), generator=generator)
        return torch.full((num_queries, size[0] * size[1]), -9.0).scatter(1, cells[:, None], 6.0).view(-1, *size)
    if kind == "constant":
        return noise[:, :1, :1].expand(-1, *size).contiguous()
    if kind == "infinite":
        return torch.where(noise > 0, 4.0, -torch.inf)
    if kind == "blobs":
        rows, columns = (torch.linspace(0, 1, length) for length in size)
        centre, radius = torch.rand(2, num_queries, 2, 1, 1, generator=generator)
        radius = 0.1 + 0.5 * radius
        distance = ((rows[:, None] - centre[:, 0]) / radius[:, 0]) ** 2 + ((columns - centre[:, 1]) / radius[:, 1]) ** 2
        return 6 * torch.tanh(1 - distance) + 0.2 * noise
    raise AssertionError(kind)


KINDS = ["noise", "huge", "mixed scales", "all low", "all high", "tiny", "constant", "blobs"]


@st.composite
def cases(draw, kinds=KINDS, square_input=False, max_queries=9) -> Case:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    num_queries = draw(st.integers(1, max_queries))
    num_classes = draw(st.integers(1, 6))
    mask_size = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    height, width = draw(st.tuples(st.integers(1, 33), st.integers(1, 33)))
    input_size = (height, height) if square_input else (height, width)
    content = tuple(draw(st.integers(1, length)) for length in input_size)
    target = draw(st.tuples(st.integers(1, 45), st.integers(1, 45)))
    confidence = draw(st.sampled_from([0.0, 1.0, 6.0, 50.0]))
    class_logits = confidence * torch.randn(num_queries, num_classes + 1, generator=generator)
    who = draw(st.sampled_from(["any", "objects", "nobody", "equals"]))
    if who == "objects":
        class_logits[:, -1] = -100
    elif who == "nobody":
        class_logits[:, -1] = 100
    elif who == "equals":
        class_logits = class_logits[:1].repeat(num_queries, 1)
    mask_logits = mask_family(draw(st.sampled_from(kinds)), num_queries, mask_size, generator)
    return Case(class_logits[None], mask_logits[None], input_size, content, target)


def upsample(values: Tensor, case: Case) -> Tensor:
    """(n, h, w) -> (n, H, W): resize to the input, crop, resize to the answer."""
    values = F.interpolate(values[None].float(), size=case.input_size, mode="bilinear")
    values = values[..., : case.content_size[0], : case.content_size[1]]
    return F.interpolate(values, size=case.target_size, mode="bilinear")[0]


def rounding(case: Case) -> Tensor:
    """(Q, 1, 1): how far two float32 computations of a resampled logit may lie apart."""
    return 1e-7 + 1e-6 * case.mask_logits[0].abs().amax((1, 2), keepdim=True)


def score_tolerance(case: Case) -> float:
    """Of a mean mask probability (slope of the sigmoid: 1/4), and of a score rounded to 6 digits."""
    return 2e-6 + 0.25 * float(rounding(case).max())


def near(logits: Tensor, threshold: float, slack: Tensor) -> Tensor:
    """Where the probability is the threshold up to rounding."""
    low, high = ((logits + shift).double().sigmoid() for shift in (-slack, slack))
    return (low <= threshold + 1e-7) & (high >= threshold - 1e-7)


def plain_panoptic(
    case: Case, threshold: float, mask_threshold: float, overlap: float, stuff: set[int]
) -> tuple[Tensor, list[dict], Tensor, bool]:
    """(H, W) ids, rows, (H, W) pixels left to rounding, and whether rounding may decide on a whole segment."""
    scores, labels = case.class_logits[0].float().softmax(-1).max(-1)
    kept = (labels != case.class_logits.shape[-1] - 1) & (scores > threshold)
    fragile = bool(((scores - threshold).abs() < 1e-6).any())
    ids = torch.full(case.target_size, -1, dtype=torch.int32)
    rows: list[dict] = []
    if not kept.any():
        return ids, rows, torch.zeros(case.target_size, dtype=torch.bool), fragile
    scores, labels, logits = scores[kept], labels[kept], upsample(case.mask_logits[0][kept], case)
    probabilities = logits.sigmoid()
    products = scores[:, None, None] * probabilities
    winner = products.argmax(0)
    slack = rounding(case)[kept]
    spread = (logits + slack).sigmoid() - (logits - slack).sigmoid() + 2e-7
    upper, lower = products + scores[:, None, None] * spread, products - scores[:, None, None] * spread
    rivals = upper.scatter(0, winner[None], -1.0).amax(0) >= lower.gather(0, winner[None])[0]
    # All of them exactly 0 is not a matter of rounding: then the first query wins.
    rivals &= ~((products == 0).all(0) & ((logits + slack).amax(0) < -104))
    doubtful_mask = near(logits, mask_threshold, slack)
    doubtful = rivals | doubtful_mask.gather(0, winner[None])[0]
    stuff_ids: dict[int, int] = {}
    for query, (score, label) in enumerate(zip(scores.tolist(), labels.tolist(), strict=True)):
        own = probabilities[query] >= mask_threshold
        won = winner == query
        final = own & won
        reach = int((doubtful_mask[query] | rivals).sum())
        if own.any():
            share = int(won.sum()) / int(own.sum())
            fragile |= reach > 0 and abs(share - overlap) * int(own.sum()) <= 2 * reach + 1
        fragile |= reach > 0 and int(final.sum()) <= reach
        if not final.any() or share < overlap:
            continue
        segment = stuff_ids.get(label, len(rows))
        ids[final] = segment
        if segment == len(rows):
            rows.append({"id": segment, "label_id": label, "was_fused": label in stuff, "score": score})
            if label in stuff:
                stuff_ids[label] = segment
    return ids, rows, doubtful, fragile


def plain_instances(
    case: Case, num_instances: int, threshold: float, mask_threshold: float
) -> tuple[list[dict], Tensor, Tensor, bool]:
    """Rows, masks (n, H, W), pixels (n, H, W) left to rounding, and whether rounding may decide on an instance."""
    probabilities = case.class_logits[0].float().softmax(-1)[:, :-1]
    num_classes = probabilities.shape[1]
    ranked = sorted(((-value, pair) for pair, value in enumerate(probabilities.flatten().tolist())))
    fragile = num_instances < len(ranked) and ranked[num_instances][0] - ranked[num_instances - 1][0] < 1e-6
    logits = upsample(case.mask_logits[0], case)
    slack = rounding(case)
    rows, masks, doubts = [], [], []
    for pair in sorted(pair for _, pair in ranked[:num_instances]):
        query, label = divmod(pair, num_classes)
        probability = logits[query].sigmoid()
        mask = probability > mask_threshold
        doubt = near(logits[query], mask_threshold, slack[query])
        area = int(mask.sum())
        score = float(probabilities[query, label] * (probability * mask).sum() / (area + 1e-6))
        margin = 1e-5 + int(doubt.sum()) / max(area, 1)
        fragile |= (area > 0 and abs(score - threshold) < margin) or (bool(doubt.any()) and area <= int(doubt.sum()))
        if area and score >= threshold:
            rows.append({"id": len(rows), "label_id": label, "was_fused": False, "score": score})
            masks.append(mask)
            doubts.append(doubt)
    shape = (0, *case.target_size)
    empty = torch.zeros(shape, dtype=torch.bool)
    return rows, torch.stack(masks) if masks else empty, torch.stack(doubts) if doubts else empty, fragile


def plain_semantic_scores(case: Case) -> Tensor:
    """(C, H, W) scores: sigmoid x softmax at the input size, crop, resize."""
    masks = F.interpolate(case.mask_logits.float(), size=case.input_size, mode="bilinear").sigmoid()
    classes = case.class_logits.float().softmax(-1)[..., :-1]
    scores = torch.einsum("bqc,bqhw->bchw", classes, masks)[..., : case.content_size[0], : case.content_size[1]]
    return F.interpolate(scores, size=case.target_size, mode="bilinear")[0]


def same_rows(ours: list[dict], expected: list[dict], tolerance: float = 2e-6) -> bool:
    """Rows equal up to the rounding of scores; keys that `expected` lacks are not compared."""
    return len(ours) == len(expected) and all(
        abs(one["score"] - other["score"]) <= tolerance
        and all(one[key] == value for key, value in other.items() if key != "score")
        for one, other in zip(ours, expected, strict=True)
    )
