"""`hf-segvit train RECIPE key=value ...`: train by a recipe, see `hf_segvit.training`.

The same command goes on where an interrupted one stopped. Several processes train together under
`accelerate launch -m hf_segvit train RECIPE ...`. Exit code 75: it was asked to stop, has saved, and can go on; the
launcher reports 1 then.
"""

import argparse
import sys
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Add the subcommand to the command line."""
    parser = subparsers.add_parser(
        "train",
        help="train a model by a recipe",
        description=(
            "Train by a recipe: a YAML file, or the name of one that comes with the package (--list). Whatever it says "
            "can be changed with key=value, as in data=coco:/data/coco batch_size=8 model_config.num_queries=100."
        ),
        epilog=(
            "Writes model/, results.json, curves.png and checkpoints to the output folder. The same command goes on "
            "from the newest valid checkpoint. SIGTERM and Ctrl-C finish the step, save, and end with exit code 75. "
            "Launchers such as torchrun and accelerate launch report 1 in its place; results.json is there only once "
            "training is complete."
        ),
    )
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="YAML file, or name of a packaged recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    parser.add_argument("--output", metavar="DIR", help="folder for everything that is written; same as output=DIR")
    parser.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        help="go on from the newest valid checkpoint in the output folder (default), or insist on a new run",
    )
    parser.add_argument("--push-to-hub", metavar="REPO", help="publish the result as owner/name")
    parser.add_argument(
        "--explain",
        nargs="?",
        const="brief",
        metavar="full",
        help="print what follows from the recipe, and train nothing; `full` has every parameter",
    )
    parser.add_argument(
        "--fields", action="store_true", help="print all fields of the recipe, or of any, with values and meaning"
    )
    parser.add_argument("--list", action="store_true", help="print the packaged recipes")
    parser.add_argument("--replay", type=Path, metavar="DIR", help="repeat a step that was not finite, see failures/")
    parser.add_argument("--cpu", action="store_true", help="compute on the CPU even where there is a GPU")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Train; see the module.

    Returns:
        0, or 75 where training was asked to stop and can go on.

    Raises:
        ValueError: recipe, data or model do not go together, or training cannot go on; the message says what to do.
        OSError: something cannot be written.
    """
    if args.list:
        from ..training.recipe import packaged_recipes

        print("\n".join(packaged_recipes()))
        return 0
    if args.replay is not None:
        from ..training.guards import replay

        print(replay(args.replay))
        return 0
    if args.recipe is None and not args.fields and args.explain in (None, "brief", "full"):
        raise ValueError("name a recipe: a YAML file, or one of `hf-segvit train --list`")

    from ..training.recipe import Recipe, load_recipe

    _give_back(args)
    overrides = list(args.overrides)
    for key, value in (("output", args.output), ("resume", args.resume), ("push_to_hub", args.push_to_hub)):
        if value is not None:
            overrides.append(f"{key}={str(value).lower() if isinstance(value, bool) else value}")
    recipe = Recipe() if args.recipe is None else load_recipe(args.recipe, overrides)
    if args.fields:
        from ..training.explanation import field_table

        print(field_table(recipe))
        return 0
    if args.explain:
        print(_explanation(recipe, args.explain == "full"))
        return 0

    from ..training.loop import train
    from ..training.signals import STOPPED_EXIT_CODE

    outcome = train(recipe, cpu=args.cpu)
    if outcome.stopped is not None:
        return STOPPED_EXIT_CODE
    if outcome.results:
        scores = ", ".join(f"{name} {value:.4f}" for name, value in outcome.results["metrics"].items())
        print(f"{scores or 'no scores'}: {outcome.results['selection']}")
        print(f"model: {outcome.output / 'model'}", file=sys.stderr)
    return 0


def _give_back(args: argparse.Namespace) -> None:
    """Put a word back that is no "full": argparse takes whatever comes after `--explain` for its value."""
    word = args.explain
    if word in (None, "brief", "full"):
        return
    args.explain = "brief"
    if "=" in word:
        args.overrides = [word, *args.overrides]
    elif args.recipe is None or "=" in args.recipe:
        args.overrides = [*([args.recipe] if args.recipe else []), *args.overrides]
        args.recipe = word
    else:
        raise ValueError(f"--explain {word} is unknown; give --explain or --explain full")


def _explanation(recipe: Any, full: bool) -> str:
    from ..inference.loading import quiet_transformers
    from ..training.derivation import derive
    from ..training.explanation import explain
    from ..training.start import build_trained_model
    from ..training.tasks import task_for

    task = task_for(recipe)
    published = task.without_data()
    if published is not None:
        print(f"{recipe.data} is not there; going by what is published: {published:,} images", file=sys.stderr)
    with quiet_transformers():
        model, processor = build_trained_model(task)
    for remark in task.remarks:
        print(remark, file=sys.stderr)
    num_images = len(task.train_samples()) if published is None else published
    return explain(derive(recipe, num_images, config=model.config), model, processor, full)
