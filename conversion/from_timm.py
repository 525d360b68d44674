"""Convert a backbone of timm: the same as `hf-segvit convert timm SRC DST`, see its --help."""

import sys

from hf_segvit.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", "timm", *sys.argv[1:]]))
