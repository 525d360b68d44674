"""Score a model on a data set, on any number of processes.

    accelerate launch training/evaluate.py --model runs/mine/model --data coco:/data/coco --task panoptic

The same as `hf-segvit evaluate`, whose `--help` lists the options.
"""

import sys

from hf_segvit.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
