"""The page of the metric's Space: JSON in, JSON out."""

from pathlib import Path

from hf_segvit.metrics.evaluate_module import space_interface

interface = space_interface(
    Path(__file__).with_name("point_accuracy.py"),
    predictions=[[[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]]],
    references=[[0, 2]],
    num_labels=3,
)

if __name__ == "__main__":
    interface.launch()
