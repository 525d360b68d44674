"""A Hugging Face Space that offers segmentation models, and a ViT-P that names points and corrects labels.

Settings are variables of the Space: MODELS (Hub ids, with commas between) and CLASSIFIER (the Hub id of a ViT-P).
"""

import os

from hf_segvit.app.server import serve

MODELS = os.environ.get("MODELS", "tue-mps/coco_panoptic_eomt_large_640,tue-mps/coco_panoptic_eomt_base_640_2x")

if __name__ == "__main__":
    serve(
        [model.strip() for model in MODELS.split(",")],
        os.environ.get("CLASSIFIER") or None,
        host="0.0.0.0",  # a Space is reached from outside of its container
        port=int(os.environ.get("PORT", 7860)),
        keep=1,
        label_mismatch="keep",
        examples="examples" if os.path.isdir("examples") else None,
    )
