"""Train by a recipe, on any number of processes.

    accelerate launch training/train.py coco_panoptic_large_640 data=coco:/data/coco
    accelerate launch --config_file training/accelerate/ddp.yaml training/train.py RECIPE key=value ...

The same as `hf-segvit train`, whose `--help` lists the options.

Without a launcher, on one process, exit code 75 means that SIGTERM or Ctrl-C stopped the run after saving a checkpoint;
the same command resumes it. Launchers turn every code but 0 into 1; with them, check for `results.json` in the output
folder. It exists once training is complete; if it does not, the same command resumes the run, whatever the reason.

SIGTERM must reach the training processes. `torchrun`, and `accelerate launch` with several processes, forward it and
kill after 30 seconds. With one process `accelerate launch` does not forward it, and leaves the run going: use no
launcher then, as in `python training/train.py RECIPE`.
"""

import sys

from hf_segvit.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
