"""Coarse labels made of fine ones: what an annotator in a hurry would give, sure of every pixel but leaving many out.

Cityscapes' coarse annotators drew polygons well inside of each segment, so that no labelled pixel is wrong; borders,
thin parts and small things stay without a label. `coarse_segment_map` keeps the pixels that are farther than a margin
from any other segment. With it, training with coarse labels can be tried on any data with fine ones.

H W pixels.
"""

from __future__ import annotations

import numpy as np
from scipy.ndimage import maximum_filter, minimum_filter

COARSE_MARGIN = 0.03  # of the picture's short side


def coarse_segment_map(segment_map: np.ndarray, margin: float = COARSE_MARGIN, void: int = -1) -> np.ndarray:
    """Leave out pixels near the border of their segment.

    Args:
        segment_map: (H, W) integer ids.
        margin: distance to other segments, to void too, along rows and columns, as a share of the short side; at least
            one pixel. The picture's own border does not count.
        void: id of what is left out.

    Returns:
        (H, W) a new map; segments that are thin everywhere are gone from it.

    Raises:
        ValueError: the margin is not in (0, 0.5).
    """
    if not 0 < margin < 0.5:
        raise ValueError(f"the margin of coarse labels is {margin}; give a share of the short side in (0, 0.5)")
    side = 2 * max(1, round(margin * min(segment_map.shape))) + 1
    lowest, highest = (extreme(segment_map, size=side, mode="nearest") for extreme in (minimum_filter, maximum_filter))
    return np.where(lowest == highest, segment_map, void).astype(segment_map.dtype)
