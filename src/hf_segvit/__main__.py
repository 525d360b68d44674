"""Run the command `hf-segvit` as `python -m hf_segvit`."""

import sys


def run() -> int:
    """Run the command line; Ctrl-C during the imports ends in the same line and exit code as later."""
    try:
        from .cli import main
    except KeyboardInterrupt:
        print("hf-segvit: interrupted", file=sys.stderr)
        return 130
    return main()


if __name__ == "__main__":
    sys.exit(run())
