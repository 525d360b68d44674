"""Convert an official EoMT checkpoint: the same as `hf-segvit convert official-eomt SRC DST`, see its --help."""

import sys

from hf_segvit.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", "official-eomt", *sys.argv[1:]]))
