"""A metric: the share of pixels with the right class, over all images."""

import numpy as np

from hf_segvit.metrics.accumulation import ImageMetric


class PixelShare(ImageMetric):
    """Takes the label maps (H, W) of semantic segmentation; void is -1."""

    def __init__(self, id2label, stuff_classes):
        super().__init__()

    def _no_counts(self):
        return {"pixels": np.zeros(2, dtype=np.int64)}

    def _count(self, prediction, reference, name, image_id):
        prediction, reference = np.asarray(prediction), np.asarray(reference)
        counted = reference >= 0
        return {"pixels": np.array([(prediction == reference)[counted].sum(), counted.sum()])}

    def compute(self):
        right, counted = self.counts["pixels"]
        return {"right_pixels": float(right / counted) if counted else float("nan")}
