"""`hf-segvit train RECIPE key=value ...`: train by a recipe; see `hf_segvit.training`.

The same command resumes an interrupted run. Several processes train together under `accelerate launch -m hf_segvit
train RECIPE ...`. Exit code 75: training was asked to stop, has saved, and can be resumed; launchers report 1 instead.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from .model_options import add_cache_option


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "train",
        help="train a model by a recipe",
        description=(
            "Train by a recipe: a YAML file, or the name of one that comes with the package (--list). key=value "
            "changes any of its fields, as in data=coco:/data/coco batch_size=8 model_config.num_queries=100."
        ),
        epilog=(
            "Writes model/, results.json, curves.png and checkpoints to the output folder. The same command resumes "
            "from the newest valid checkpoint. SIGTERM and Ctrl-C finish the step, save, and end with exit code 75. "
            "Launchers such as torchrun and accelerate launch report 1 instead; results.json appears only when the run "
            "is complete."
        ),
    )
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="YAML file, or name of a packaged recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    parser.add_argument("--output", metavar="DIR", help="folder for all results; same as output=DIR")
    parser.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        help="resume from the newest valid checkpoint in the output folder (default), or insist on a new run",
    )
    parser.add_argument("--push-to-hub", metavar="REPO", help="publish the result as owner/name")
    parser.add_argument(
        "--explain",
        nargs="?",
        const="brief",
        metavar="full",
        help="print the training plan and exit; `full` lists every parameter",
    )
    parser.add_argument(
        "--fields", action="store_true", help="print all fields, with meaning and the recipe's values, and exit"
    )
    parser.add_argument("--list", action="store_true", help="print the packaged recipes")
    parser.add_argument("--replay", type=Path, metavar="DIR", help="repeat a step that was not finite, see failures/")
    parser.add_argument("--cpu", action="store_true", help="compute on the CPU even if there is a GPU")
    add_cache_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Train, or print what the options ask for; 75 if training was asked to stop and can be resumed.

    Raises:
        ValueError: recipe, data or model do not fit together, or the run cannot be resumed.
    """
    if args.list:
        from ..training.recipe import packaged_recipes

        print("\n".join(packaged_recipes()))
        return 0
    if args.replay is not None:
        if not args.replay.is_dir():
            raise ValueError(f"{args.replay}: no such folder; name a folder in `failures` of a run's output")

        from ..training.guards import replay

        print(replay(args.replay))
        return 0
    if args.recipe is None and not args.fields and args.explain in (None, "brief", "full"):
        raise ValueError("name a recipe: a YAML file, or one of `hf-segvit train --list`")

    from ..training.recipe import Recipe, load_recipe

    _give_back(args)
    # Later words win, so these options override key=value.
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

    from ..training.loop import leave_process_group, train
    from ..training.signals import STOPPED_EXIT_CODE

    outcome = train(recipe, cpu=args.cpu)
    leave_process_group()
    if outcome.stopped is not None:
        return STOPPED_EXIT_CODE
    if outcome.results:
        scores = ", ".join(f"{name} {value:.4f}" for name, value in outcome.results["metrics"].items())
        print(f"{scores or 'no scores'}: {outcome.results['selection']}")
        print(f"model: {outcome.output / 'model'}", file=sys.stderr)
    return 0


def _give_back(args: argparse.Namespace) -> None:
    """Return a word that is not an `--explain` value to the recipe or the overrides."""
    word = args.explain  # argparse takes the next word for its value, whatever it is
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
    from ..training.preflight import check_folders
    from ..training.recipe import cache_folder, output_folder
    from ..training.start import build_trained_model
    from ..training.tasks import task_for

    check_folders(output_folder(recipe), cache_folder(recipe))
    task = task_for(recipe)
    published = task.without_data()
    if published is not None and not task.remarks:
        print(f"{recipe.data} does not exist here; using the published size: {published:,} images", file=sys.stderr)
    with quiet_transformers():  # a plan needs no warning about new heads
        model, processor = build_trained_model(task)
    for remark in task.remarks:
        print(remark, file=sys.stderr)
    num_images = len(task.train_samples()) if published is None else published
    in_words = getattr(task, "validation_in_words", None)
    validation = "" if published is not None or in_words is None else in_words()
    return explain(derive(recipe, num_images, config=model.config), model, processor, full, validation)
