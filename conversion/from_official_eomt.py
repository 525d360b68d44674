"""The same as `hf-segvit convert official-eomt SRC DST`, whose --help lists the options."""

import sys

from hf_segvit.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", "official-eomt", *sys.argv[1:]]))
