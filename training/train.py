"""Train by a recipe, on any number of processes.

    accelerate launch training/train.py coco_panoptic_large_640 data=coco:/data/coco
    accelerate launch --config_file training/accelerate/ddp.yaml training/train.py RECIPE key=value ...

The same as `hf-segvit train`, whose `--help` lists the options.
"""

import sys

from hf_segvit.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
