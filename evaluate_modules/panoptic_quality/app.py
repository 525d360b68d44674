"""The page of the metric's Space: JSON in, JSON out."""

from pathlib import Path

from hf_segvit.metrics.evaluate_module import space_interface

interface = space_interface(
    Path(__file__).with_name("panoptic_quality.py"),
    predictions=[
        {
            "segmentation": [[0, 1, 1, 0], [0, 1, 1, 0], [0, 1, 1, 0]],
            "segments_info": [{"id": 0, "label_id": 0}, {"id": 1, "label_id": 2}],
        }
    ],
    references=[
        {
            "segmentation": [[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0]],
            "segments_info": [{"id": 0, "label_id": 0}, {"id": 1, "label_id": 2}],
        }
    ],
    num_labels=3,
    stuff_classes=[0],
)

if __name__ == "__main__":
    interface.launch()
