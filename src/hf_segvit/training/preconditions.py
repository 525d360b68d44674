"""What a run needs that a recipe alone does not tell, refused before the first step and not after the last.

`check_trackers`: they are installed. `check_publishing`: the result can be pushed. `check_keep_best`: the score that
decides which checkpoint is the best is one that the task has.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from ..hub.push import check_destination


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that are not there: Accelerate passes over them without a word.

    Args:
        names: of a recipe; "all" stands for those that are installed.

    Raises:
        ValueError: one is unknown or not installed; the message says what to do.
    """
    known = sorted(LOGGER_TYPE_TO_CLASS)
    available = {str(name) for name in get_available_trackers()}
    for name in names:
        if name in available or name == "all":
            continue
        if name not in known:
            raise ValueError(f"trackers has {name!r}; {_suggestion(name, [*known, 'all'])}")
        raise ValueError(f"trackers has {name}, which is not installed: pip install {name}, or trackers=[tensorboard]")


def check_publishing(repo_id: str | None) -> None:
    """Refuse to train for a repository that cannot be pushed to, as far as that shows without the network.

    Args:
        repo_id: `push_to_hub` of a recipe.

    Raises:
        ValueError: it is no repository's name, there is no access token, or offline mode is on.
    """
    if repo_id is None:
        return
    try:
        check_destination(repo_id)
    except ValueError as error:
        raise ValueError(f"push_to_hub={repo_id}: {error}") from error


def check_keep_best(name: str | None, scores: Sequence[str]) -> None:
    """Refuse a score that the task has not.

    Args:
        name: `keep_best` of a recipe; `None` is the task's headline.
        scores: names that the task may give; none where that is not known.

    Raises:
        ValueError: it is none of them.
    """
    if name is not None and scores and name not in scores:
        raise ValueError(f"keep_best={name!r} is no score of this task; {_suggestion(name, scores)}")


def _suggestion(name: str, choices: Sequence[str]) -> str:
    near = get_close_matches(name.lower(), choices, n=1)
    return f"did you mean {near[0]}?" if near else f"choose one of {', '.join(choices)}"
