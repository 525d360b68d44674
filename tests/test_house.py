"""The house stays as CONTRIBUTING.md draws it: its file tree, no import cycle, arrows one way, models/ on its own."""

import ast
import runpy
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "hf_segvit"
# A room may import from those after it; files at the root that import nothing of ours come last.
ROOMS = (
    "cli",
    "app",
    "demo",
    "training",
    "export",
    "evaluation",
    "conversion",
    "inference",
    "hub",
    "data",
    "metrics",
    "drawing",
    "auto",
    "models",
    "weight_checks",
    "atomic_files",
    "lookup",
)
# `from_backbone` and exported folders are offered on the model class, and only where the package is installed.
ALLOWED = {
    ("models.modeling_plain_vit", "conversion.backbones"),
    ("models.checkpoint_guard", "inference.loading"),
}


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imported(name: str) -> set[str]:
    """Our modules that a module imports, also inside functions."""
    path, found = MODULES[name], set()
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    package = [part for part in package if part]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level:
            base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
        elif (node.module or "").split(".")[0] == "hf_segvit":
            base = node.module.split(".")[1:]
        else:
            continue
        target = ".".join(part for part in base if part)
        for alias in node.names:
            inner = f"{target}.{alias.name}".lstrip(".")
            found.add(inner if inner in MODULES else target)
    return found - {name}


IMPORTS = {name: imported(name) for name in MODULES}


def test_no_import_cycle():
    graph = {name: {other for other in others if (name, other) not in ALLOWED} for name, others in IMPORTS.items()}
    list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the modules


@pytest.mark.parametrize("name", [name for name in MODULES if name not in ("", "__main__")])
def test_arrows_point_one_way(name):
    rank = ROOMS.index(name.split(".")[0])
    for other in IMPORTS[name] - {""}:
        if (name, other) in ALLOWED:
            continue
        assert ROOMS.index(other.split(".")[0]) >= rank, f"{name} imports {other}, which is above it"


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("models.")])
def test_models_stand_alone(name):
    """What travels to the Hub imports its siblings only, as `from .module import name`."""
    others = {other for other in IMPORTS[name] if (name, other) not in ALLOWED}
    assert all(other.startswith("models.") for other in others), others


def test_names_say_something():
    drawers = ("utils", "helpers", "misc", "common")
    assert not [name for name in MODULES if set(name.split(".")) & set(drawers)]


def test_the_file_tree_is_current():
    tree = runpy.run_path(str(ROOT / "docs" / "file_tree.py"))
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert tree["with_tree"](page) == page, "out of date; run python docs/file_tree.py"
    for path in MODULES.values():
        assert tree["first_sentence"](path), f"{path} does not say what it is"
