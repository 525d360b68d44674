"""The page of the metric's Space: JSON in, JSON out."""

from pathlib import Path

from hf_segvit.metrics.evaluate_module import space_interface

interface = space_interface(
    Path(__file__).with_name("boundary_average_precision.py"),
    predictions=[
        {
            "segmentation": [{"size": [4, 5], "counts": [5, 2, 2, 2, 2, 2, 5]}],
            "segments_info": [{"label_id": 0, "score": 0.9}],
        }
    ],
    references=[
        {
            "segmentation": [{"size": [4, 5], "counts": [5, 2, 2, 2, 9]}],
            "segments_info": [{"label_id": 0}],
        }
    ],
    num_labels=1,
)

if __name__ == "__main__":
    interface.launch()
