"""`hf-segvit push FOLDER REPO`: publish a checkpoint on the Hugging Face Hub."""

import argparse
from pathlib import Path

from ..lookup import printable
from .model_options import model_folder


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "push",
        help="publish a checkpoint on the Hugging Face Hub",
        description=(
            "Check a checkpoint and publish it in one commit: weights, configuration, image processor, model card and "
            "the code that loads it without this package; of an export its graphs instead of weights and code. "
            "Other files of the folder are left out."
        ),
    )
    parser.add_argument("folder", help="folder of a model with its image processor, or of `hf-segvit export`")
    parser.add_argument("repo", help="repository as owner/name; created if it does not exist")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to publish to; created if it does not exist")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing to main")
    parser.add_argument("--message", default="Upload model", help="commit message (default: %(default)s)")
    parser.add_argument("--license", metavar="ID", help="licence of the weights for the model card, such as mit")
    parser.add_argument("--no-code", action="store_true", help="leave out the code for trust_remote_code=True")
    parser.add_argument("--dry-run", action="store_true", help="check and list what would be published, offline")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Publish `args.folder`, or list what would be published."""
    # hub/check.py refuses it too, but only after seconds of imports.
    if not Path(args.folder).is_dir():
        raise ValueError(f"{args.folder}: no such folder; name the folder that save_pretrained or training wrote")

    args.folder = model_folder(args.folder)

    from ..hub.push import plan_push, publish

    # Everything is checked, and the card written, before the Hub is contacted.
    with plan_push(args.folder, args.repo, with_code=not args.no_code, license=args.license) as plan:
        if args.dry_run:
            print(f"{args.folder} is fit for publishing as {args.repo}:")
            for name, content in sorted(plan.files.items()):
                size = len(content.encode()) if isinstance(content, str) else content.stat().st_size
                print(f"  {name:<40} {size:>14,} bytes")
        if plan.left_out:
            print(f"left out: {', '.join(map(printable, plan.left_out))}")
        if args.dry_run:
            return 0
        commit = publish(
            plan,
            args.repo,
            private=args.private or None,  # None: an existing repository stays as it is
            revision=args.revision,
            commit_message=args.message,
            create_pr=args.create_pr,
        )
    print(f"published: {commit.pr_url or commit.commit_url}")
    return 0
