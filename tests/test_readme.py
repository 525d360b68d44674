"""The README's commands and Python examples are ones that the package understands."""

import ast
import re
import shlex
from pathlib import Path

import pytest

import hf_segvit
from hf_segvit.cli import build_parser
from hf_segvit.training.recipe import load_recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def commands():
    """The lines that start `hf-segvit`, without their comments."""
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith("hf-segvit ")]


@pytest.mark.parametrize("line", commands())
def test_a_command_is_understood(line):
    arguments = build_parser().parse_args(shlex.split(line, comments=True)[1:])
    if arguments.command == "train" and arguments.recipe is not None:
        load_recipe(arguments.recipe, arguments.overrides)


def test_commands_were_found():
    assert {line.split()[1] for line in commands()} >= {"segment", "train", "evaluate", "check-data", "convert", "demo"}


@pytest.mark.parametrize("code", blocks("python"))
def test_what_python_examples_import_is_there(code):
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hf_segvit"):
            module = __import__(node.module, fromlist=["*"])
            assert all(hasattr(module, name.name) for name in node.names)
            if module is hf_segvit:
                assert {name.name for name in node.names} <= set(hf_segvit.__all__)


@pytest.mark.parametrize("target", re.findall(r"\]\((?!https?:|#)([^)]+)\)", README))
def test_links_lead_somewhere(target):
    assert (ROOT / target.split("#")[0]).exists()
