"""Convert an EoMT of Transformers: the same as `hf-segvit convert transformers-eomt SRC DST`, see its --help."""

import sys

from hf_segvit.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", "transformers-eomt", *sys.argv[1:]]))
