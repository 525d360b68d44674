"""Train by a recipe, on any number of processes.

    accelerate launch training/train.py coco_panoptic_large_640 data=coco:/data/coco
    accelerate launch --config_file training/accelerate/ddp.yaml training/train.py RECIPE key=value ...

The same as `hf-segvit train`, whose `--help` lists the options.

Without a launcher, on one process, the exit code is 75 where SIGTERM or Ctrl-C asked it to stop: it has saved, and the
same command goes on. Launchers turn every code but 0 into 1. Under them `results.json` in the output folder tells: it
is there once training is complete, and where it is not, the same command goes on, whatever the reason.

SIGTERM has to reach the training processes. `torchrun`, and `accelerate launch` with several processes, pass it on and
wait 30 seconds before they kill. With one process `accelerate launch` does not pass it on, and leaves the training
running: do without a launcher then, as in `python training/train.py RECIPE`.
"""

import sys

from hf_segvit.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
