"""The file tree in CONTRIBUTING.md, one line a file: `python docs/file_tree.py` writes it anew.

The line of a file is the first sentence of its module docstring, so that the tree says what the files say.
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "hf_segvit"
BEGIN, END = "<!-- file tree -->\n", "<!-- end of the file tree -->\n"
WIDTH = 120


def file_tree() -> str:
    """The tree as a code block: folders by name, files below them, packages before their modules."""
    lines = ["```", "src/hf_segvit/"]
    for folder in [PACKAGE, *sorted(path for path in PACKAGE.rglob("*") if path.is_dir())]:
        files = sorted(folder.glob("*.py"))
        if not files:
            continue
        depth = len(folder.relative_to(PACKAGE).parts)
        if depth:
            init = folder / "__init__.py"
            lines.append(_line(f"{folder.name}/", first_sentence(init), depth))
            files.remove(init)
        lines += [_line(file.name, first_sentence(file), depth + 1) for file in files]
    return "\n".join([*lines, "```"]) + "\n"


def first_sentence(file: Path) -> str:
    """The first sentence of a module's docstring, on one line and without its full stop."""
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    return re.split(r"\.(?:\s|$)", paragraph)[0].rstrip(":")


def with_tree(text: str) -> str:
    """CONTRIBUTING.md with the tree of today between its marks."""
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + file_tree() + END + rest.partition(END)[2]


def _line(name: str, about: str, depth: int) -> str:
    line = f"{'  ' * depth}{name}".ljust(40) + "  " + about
    # Cut at a word: the module has the rest.
    return line if len(line) <= WIDTH else line[: WIDTH - 2].rsplit(" ", 1)[0].rstrip(",;:") + " ..."


if __name__ == "__main__":
    page = ROOT / "CONTRIBUTING.md"
    page.write_text(with_tree(page.read_text(encoding="utf-8")), encoding="utf-8")
