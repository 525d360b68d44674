"""Where a training writes to: `output_folder` for results and checkpoints, `cache_folder` for id maps."""

from __future__ import annotations

from pathlib import Path

from .recipe import Recipe


def output_folder(recipe: Recipe) -> Path:
    """Where a recipe writes to."""
    return Path(recipe.output or Path("runs") / recipe.name)


def cache_folder(recipe: Recipe) -> Path | None:
    """Where id maps are kept for quicker reading; `None` where they are not."""
    if not recipe.cache:
        return None
    return output_folder(recipe) / "cache" if recipe.cache is True else Path(recipe.cache)
