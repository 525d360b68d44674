"""Which queries a point classifier need not be asked about, because the answer would change nothing.

Fusion never takes probability away from no-object: of a query whose probability of no-object was v, the fused one is v
or more ("internimage"), and each class gets 1 - v at most. (With Z = (1 - v) sum(g) + v and sum(g) <= 1, the
probability of a fused class grows with its g_c and is 1 - v at g_c = 1; with shared classes of mass S, one of the
generator's own grows from s_c to (1 - S - v) / (1 - S) <= 1 - v.) A query left with the generator's own logits obeys
the same bounds. So, whatever the classifier would have said,

- panoptic: v > 1/2 makes no-object the best class, and 1 - v <= threshold leaves no class above the threshold; both
  drop the query before masks compete for pixels;
- instance: a score is a class probability times a mean mask probability, so 1 - v < threshold leaves no object to
  keep. Nor does such a query displace one among the most probable objects, as those that are kept are more probable;
- semantic: all queries add to all pixels, so none can be left out.

This holds for answers that do not depend on which others are asked, that is isolated prompts.
"""

import torch
from torch import Tensor

# Bounds are met up to rounding in float32; a query this close to them is asked.
_ROUNDING = 1e-5


def queries_that_matter(class_queries_logits: Tensor, task: str, threshold: float) -> Tensor:
    """The queries whose class can make a difference.

    Args:
        class_queries_logits: (..., Q, C + 1) of the generator, no-object last.
        task: which post-processing will follow, `"panoptic"`, `"instance"` or `"semantic"`.
        threshold: the least that post-processing will ask of a score.

    Returns:
        (..., Q) bool.

    Raises:
        ValueError: the threshold is outside [0, 1].
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold={threshold} is outside [0, 1]")
    no_object = class_queries_logits.float().softmax(-1)[..., -1]
    if task == "semantic":
        return torch.ones_like(no_object, dtype=torch.bool)
    possible = 1 - no_object
    if task == "instance":
        return possible >= threshold - _ROUNDING
    return (possible > threshold - _ROUNDING) & (no_object <= 0.5 + _ROUNDING)
