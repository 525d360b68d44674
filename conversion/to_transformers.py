"""The same as `hf-segvit convert to-transformers SRC DST`, whose --help lists the options."""

import sys

from hf_segvit.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", "to-transformers", *sys.argv[1:]]))
