"""Export an EoMT for stock Transformers: the same as `hf-segvit convert to-transformers SRC DST`, see its --help."""

import sys

from hf_segvit.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", "to-transformers", *sys.argv[1:]]))
