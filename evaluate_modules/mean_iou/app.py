"""The page of the metric's Space: JSON in, JSON out."""

from pathlib import Path

from hf_segvit.metrics.evaluate_module import space_interface

interface = space_interface(
    Path(__file__).with_name("mean_iou.py"),
    predictions=[[[0, 0, 1], [1, 1, 1]]],
    references=[[[0, 0, 0], [1, 1, 255]]],
    num_labels=2,
)

if __name__ == "__main__":
    interface.launch()
