"""The same as `hf-segvit convert official-vit-p SRC DST`, whose --help lists the options."""

import sys

from hf_segvit.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", "official-vit-p", *sys.argv[1:]]))
