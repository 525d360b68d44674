"""The page of the metric's Space: JSON in, JSON out."""

from pathlib import Path

from hf_segvit.metrics.evaluate_module import space_interface

interface = space_interface(
    Path(__file__).with_name("mask_average_precision.py"),
    predictions=[
        {
            "segmentation": [{"size": [2, 3], "counts": [0, 4, 2]}, {"size": [2, 3], "counts": [4, 1, 1]}],
            "segments_info": [{"label_id": 0, "score": 0.9}, {"label_id": 1, "score": 0.8}],
        }
    ],
    references=[
        {
            "segmentation": [{"size": [2, 3], "counts": [0, 4, 2]}, {"size": [2, 3], "counts": [4, 2]}],
            "segments_info": [{"label_id": 0}, {"label_id": 1}],
        }
    ],
    num_labels=2,
)

if __name__ == "__main__":
    interface.launch()
