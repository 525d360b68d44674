"""Convert an official ViT-P checkpoint: the same as `hf-segvit convert official-vit-p SRC DST`, see its --help."""

import sys

from hf_segvit.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", "official-vit-p", *sys.argv[1:]]))
