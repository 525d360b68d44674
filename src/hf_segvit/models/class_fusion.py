"""Fusion of a query's class probabilities from the generator and from ViT-P.

Let p = softmax of the generator's logits without no-object, v = its probability of no-object, q = softmax of ViT-P's
logits and g = p^(1 - alpha) q^alpha. The fused probabilities of class c and of no-object are, in the two forms of the
official code (ViT-P, CVPR 2026),

    "oneformer":    (1 - v) g_c / sum(g)   and   v
    "internimage":  (1 - v) g_c / Z        and   v / Z,   with Z = (1 - v) sum(g) + v

Below that, `queries_that_matter` finds the queries for which no answer of ViT-P could change the result.

Shapes: C classes of the generator without no-object, K classes of ViT-P, Q queries; leading dimensions are free.
"""

from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

NORMALIZATIONS = ("oneformer", "internimage")
NO_MATCH = -1


def fuse_class_logits(
    class_queries_logits: Tensor,
    prompt_logits: Tensor,
    alpha: float = 0.4,
    normalization: str = "oneformer",
    class_matches: Sequence[int] | None = None,
) -> Tensor:
    """Class logits (..., C + 1), no-object last, whose softmax is the fused class probability.

    They are float32 (float64 for such inputs), and log probabilities except for alpha 0. Classes that either model
    excludes (-inf) stay excluded; if none is left, the generator's answer stands.

    Args:
        class_queries_logits: (..., C + 1) of the generator, no-object last.
        prompt_logits: (..., K) of ViT-P for a point in each query's mask.
        alpha: weight of ViT-P in [0, 1]. 0 returns the generator's logits; 1 is ViT-P's answer among the classes.
        normalization: `"oneformer"` keeps the generator's probability of no-object; `"internimage"` raises it where
            the two disagree.
        class_matches: for each of the C classes its label id in ViT-P, or -1 if ViT-P does not know it. `None` if both
            have the same classes in the same order.
    """
    check_alpha(alpha)
    if normalization not in NORMALIZATIONS:
        raise ValueError(f"normalization={normalization!r} is not one of {', '.join(map(repr, NORMALIZATIONS))}")
    if class_queries_logits.shape[:-1] != prompt_logits.shape[:-1]:
        raise ValueError(
            f"class_queries_logits {tuple(class_queries_logits.shape)} and prompt_logits {tuple(prompt_logits.shape)} "
            "differ before the last dimension; give one row of prompt logits for each query"
        )
    num_classes, num_prompt_classes = class_queries_logits.shape[-1] - 1, prompt_logits.shape[-1]
    shared, matched = _shared_classes(num_classes, num_prompt_classes, class_matches)
    dtype = torch.promote_types(class_queries_logits.dtype, torch.float32)
    if alpha == 0:
        return class_queries_logits.to(dtype)

    # Logarithms in float32 need none of the 1e-8 that the official code adds to probabilities.
    log_all = class_queries_logits.to(dtype).log_softmax(-1)
    # If only some classes are shared, p and q are renormalised on those and fused there. Together they keep the mass
    # that the generator gave them, and its other classes keep theirs.
    log_shared = log_all[..., :-1] if shared is None else log_all[..., shared]
    log_mass = log_shared.logsumexp(-1, keepdim=True)
    # A query that is certainly no-object has no mass to distribute: its p may be anything but NaN.
    log_p = log_shared - log_mass.masked_fill(log_mass == -torch.inf, 0)
    log_q = (prompt_logits if matched is None else prompt_logits[..., matched]).to(dtype).log_softmax(-1)
    # alpha = 1 is a case of its own because 0 * -inf is NaN.
    log_g = log_q if alpha == 1 else (1 - alpha) * log_p + alpha * log_q
    log_sum = log_g.logsumexp(-1, keepdim=True)
    if normalization == "oneformer":
        excluded = log_sum == -torch.inf
        fused = log_mass + torch.where(excluded, log_p, log_g - log_sum.masked_fill(excluded, 0))
    else:
        fused = log_mass + log_g
    if shared is None:
        result = torch.cat((fused, log_all[..., -1:]), dim=-1)
    else:
        result = log_all.clone()
        result[..., shared] = fused
    if normalization == "internimage":
        nothing_left = (result == -torch.inf).all(-1, keepdim=True)
        result = torch.where(nothing_left, log_all, result).log_softmax(-1)
    return result


def check_alpha(alpha: float) -> None:
    """Refuse a weight that is not a number in [0, 1] with a ValueError."""
    if isinstance(alpha, bool) or not isinstance(alpha, Real) or not 0 <= alpha <= 1:
        raise ValueError(
            f"alpha={alpha!r} is no number in [0, 1]: 0 is the generator's answer, 1 is ViT-P's; published is 0.4"
        )


def _shared_classes(
    num_classes: int, num_prompt_classes: int, class_matches: Sequence[int] | None
) -> tuple[list[int] | None, list[int] | None]:
    """Label ids of the fused classes in the generator, and the same in ViT-P; `None` for all, in order."""
    if class_matches is None:
        if num_classes != num_prompt_classes:
            raise ValueError(
                f"the generator has {num_classes} classes besides no-object and the classifier {num_prompt_classes}; "
                "say which are the same with class_matches, or take a classifier of the same classes"
            )
        return None, None
    matches = [int(match) for match in class_matches]
    if len(matches) != num_classes or any(not NO_MATCH <= match < num_prompt_classes for match in matches):
        raise ValueError(
            f"class_matches={matches} must hold one number for each of the generator's {num_classes} classes: that of "
            f"the classifier, in [0, {num_prompt_classes}), or {NO_MATCH}"
        )
    shared = [label for label, match in enumerate(matches) if match != NO_MATCH]
    if not shared:
        raise ValueError("class_matches matches no class, so there is nothing to fuse; check the names of the classes")
    matched = [matches[label] for label in shared]
    if len(set(matched)) < len(matched):
        raise ValueError(f"class_matches={matches} gives a class of the classifier to two of the generator's")
    everything = len(shared) == num_classes
    in_order = everything and num_classes == num_prompt_classes and matched == shared
    return (None if everything else shared), (None if in_order else matched)


# float32 probabilities meet the bounds only up to rounding; a query this close to one is kept.
_ROUNDING = 1e-5


def queries_that_matter(class_queries_logits: Tensor, task: str, threshold: float) -> Tensor:
    """Queries (..., Q), as booleans, whose class can affect the result of post-processing.

    Valid if an answer does not depend on which other prompts are asked, that is for isolated prompts.

    Args:
        class_queries_logits: (..., Q, C + 1) of the generator, no-object last.
        task: of the post-processing that follows, `"panoptic"`, `"instance"` or `"semantic"`.
        threshold: the lowest score threshold of that post-processing.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold={threshold} is outside [0, 1]")
    # Fusion never takes probability from no-object: if the generator gave it v, the fused one is at least v and every
    # class gets at most 1 - v. For "internimage", with Z = (1 - v) sum(g) + v and sum(g) <= 1, the probability of a
    # fused class grows with its g_c and is 1 - v at g_c = 1. With shared classes of mass S, one of the generator's own
    # grows from s_c to (1 - S - v) / (1 - S) <= 1 - v. A query that keeps the generator's logits obeys the same bounds.
    no_object = class_queries_logits.float().softmax(-1)[..., -1]
    if task == "semantic":
        # All queries add to all pixels.
        return torch.ones_like(no_object, dtype=torch.bool)
    possible = 1 - no_object
    if task == "instance":
        # A score is a class probability times a mean mask probability, so 1 - v < threshold leaves no object to keep.
        # Nor can such a query displace one of the most probable objects: those that are kept are more probable.
        return possible >= threshold - _ROUNDING
    # v > 1/2 makes no-object the best class, and 1 - v <= threshold leaves no class above the threshold. Both drop the
    # query before masks compete for pixels.
    return (possible > threshold - _ROUNDING) & (no_object <= 0.5 + _ROUNDING)
