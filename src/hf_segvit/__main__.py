"""Run the command `hf-segvit` as `python -m hf_segvit`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
