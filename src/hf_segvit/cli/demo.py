"""`hf-segvit demo`: train a tiny model on generated scenes and use it."""

import argparse
import sys
from pathlib import Path
from typing import Any

from .model_options import check_minimum


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "demo",
        help="train a tiny model on generated scenes, and use it",
        description=(
            "Draw scenes, train a tiny EoMT on them, measure it on scenes it has not seen, save it, load it back "
            "through Transformers, and draw what it sees. Needs no network and no data; takes under 3 minutes on 2 "
            "cores. Writes demo.png, curves.png, results.json and model/."
        ),
    )
    folder = Path("hf-segvit-demo")
    parser.add_argument("--output", type=Path, default=folder, metavar="DIR", help=f"for results (default {folder})")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of scenes and training (default 0)")
    parser.add_argument("--steps", type=int, metavar="N", help="steps of training; default: about two minutes")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the demo; see `hf_segvit.demo`."""
    check_minimum(args, steps=1)
    if not 0 <= args.seed < 2**63:  # what PyTorch's generators take
        raise ValueError(f"--seed {args.seed} must be between 0 and {2**63 - 1}")

    from tqdm import tqdm

    from ..atomic_files import prepare_output_folder
    from ..demo import STEPS, run_demo

    steps = STEPS if args.steps is None else args.steps
    prepare_output_folder(args.output)
    with tqdm(total=steps, unit="step", disable=None) as bar:

        def on_step(step: int, loss: float) -> None:
            bar.update()
            if step % 10 == 0:  # losses of single steps change too fast to read
                bar.set_postfix(loss=f"{loss:.2f}", refresh=False)

        def report(text: str) -> None:
            bar.write(text, file=sys.stderr)

        results = run_demo(args.output, seed=args.seed, steps=steps, on_step=on_step, report=report)
    print(
        f"panoptic quality {results['pq']:.3f} (things {results['pq_things']:.3f}, stuff {results['pq_stuff']:.3f}) in "
        f"{results['total_seconds']:.0f} s; look at {args.output / 'demo.png'}"
    )
    return 0
