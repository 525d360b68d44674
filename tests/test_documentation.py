"""README and documentation: commands are parsed, code is parsed or run, links lead somewhere, and the site builds."""

import ast
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import hf_segvit
from hf_segvit import ViTPImageProcessor
from hf_segvit.cli import COMMANDS, build_parser
from hf_segvit.cli.segment_options import kinds_of
from hf_segvit.training.recipe import Recipe, load_recipe

from .test_evaluate_points import tiny_vit_p
from .test_exports import save_model

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))]
TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def fences(text):
    """Language and content of every code block."""
    return re.findall(r"^```(\w*)[^\n]*\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def blocks(language, pages=PAGES):
    return [
        pytest.param(page, content, id=f"{page}-{index}")
        for page in pages
        for index, (name, content) in enumerate(fences(TEXTS[page]))
        if name == language
    ]


def shell_lines(page):
    """The commands of a page, without comments."""
    content = "\n".join(content for name, content in fences(TEXTS[page]) if name == "bash")
    lines = [shlex.split(line, comments=True) for line in content.replace("\\\n", " ").splitlines()]
    return [words for words in lines if words]


def written_in_text(page):
    """Commands in backticks, which tables have too."""
    text = re.sub(r"^```.*?^```$", "", TEXTS[page], flags=re.DOTALL | re.MULTILINE)
    return [shlex.split(code) for code in re.findall(r"`(hf-segvit [^`\n]+)`", text)]


COMMAND_LINES = [
    pytest.param(words, id=f"{page}: {' '.join(words)[:60]}")
    for page in PAGES
    for words in [*shell_lines(page), *written_in_text(page)]
]


def check_training(recipe, overrides):
    load_recipe(recipe, [word for word in overrides if "=" in word and not word.startswith("-")])


def check_ours(words):
    if len(words) == 2:  # only named
        assert words[1] in COMMANDS or words[1].startswith("--")
        return
    try:
        arguments, rest = build_parser().parse_known_args(words[1:])
    except SystemExit as stopped:  # after --help
        if stopped.code:
            raise
        return
    assert arguments.command == "train" or not rest, words
    if arguments.command == "segment":
        kinds_of(arguments)
    if arguments.command == "train" and arguments.recipe is not None:
        check_training(arguments.recipe, [*arguments.overrides, *rest])


def check_accelerate(words):
    assert words[1] == "launch"
    assert (ROOT / words[words.index("--config_file") + 1]).is_file()
    script = next(index for index, word in enumerate(words) if word.endswith(".py"))
    assert (ROOT / words[script]).is_file()
    check_training(words[script + 1], words[script + 2 :])


def check_python(words):
    script = ROOT / words[1]
    assert script.is_file(), words
    # Options may be those of another script that it imports.
    texts = [path.read_text(encoding="utf-8") for path in script.parent.glob("*.py")]
    for option in [word for word in words[2:] if word.startswith("--")]:
        assert any(f'"{option.split("=")[0]}"' in text or option in text for text in texts), words


def check_pip(words):
    assert words[1] == "install"
    for word in words[2:]:
        extra = re.fullmatch(r"(?:hf-segvit|\.)\[(\w+)\]", word)
        assert extra is None or extra[1] in PROJECT["optional-dependencies"], words


def check_make(words):
    assert {word for word in words[1:] if "=" not in word} <= TARGETS


CHECKS = {
    "hf-segvit": check_ours,
    "accelerate": check_accelerate,
    "python": check_python,
    "pip": check_pip,
    "make": check_make,
    "hf": lambda words: None,  # the command of huggingface_hub
}


@pytest.mark.parametrize("words", COMMAND_LINES)
def test_a_command_is_understood(words):
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):  # settings of the environment
        words = words[1:]
    assert words[0] in CHECKS, f"no test knows the command {words[0]}"
    CHECKS[words[0]](words)


def test_commands_were_found():
    found = {words.values[0][1] for words in COMMAND_LINES if words.values[0][0] == "hf-segvit"}
    assert found >= {"segment", "train", "evaluate", "check-data", "convert", "demo", "export", "benchmark", "compare"}
    assert len(COMMAND_LINES) > 100


def test_every_block_names_its_language():
    known = {"bash", "python", "yaml", "toml", "json", "text"}
    assert {name for text in TEXTS.values() for name, _ in fences(text)} <= known


@pytest.mark.parametrize(("page", "code"), blocks("python"))
def test_what_python_examples_import_is_there(page, code):
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hf_segvit"):
            module = __import__(node.module, fromlist=["*"])
            assert all(hasattr(module, name.name) for name in node.names)
            if module is hf_segvit:
                assert {name.name for name in node.names} <= set(hf_segvit.__all__)


@pytest.mark.parametrize(("page", "content"), blocks("yaml"))
def test_settings_are_fields_of_recipes(page, content):
    assert set(yaml.safe_load(content)) <= set(Recipe.__dataclass_fields__)


@pytest.mark.parametrize(("page", "content"), blocks("toml"))
def test_toml_is_toml(page, content):
    assert tomllib.loads(content)


# What a page names, and what stands for it in a test. Blocks of other pages are fragments, or run elsewhere: those of
# extending.md in test_extending.py, of neighbours.md in test_neighbours.py.
RUN_PAGES = ("docs/quickstart.md", "docs/relabel.md", "docs/your_data.md")
STAND_INS = {
    "tue-mps/coco_panoptic_eomt_large_640": "generator",
    "path/to/checkpoint": "generator",
    "path/to/generator": "generator",
    "path/to/vit-p": "vit-p",
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with the models and files that the pages name."""
    folder = tmp_path_factory.mktemp("pages")
    names = ["road", "wall", "car", "tree", "sky"]
    save_model(folder / "generator", "panoptic", names)
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: label for label, name in enumerate(names)}}
    tiny_vit_p(**labels).save_pretrained(folder / "vit-p")
    ViTPImageProcessor(size=56, id2label=labels["id2label"]).save_pretrained(folder / "vit-p")
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    for name in ("photo.jpg", "other.jpg"):
        Image.fromarray(pixels.repeat(6, 0).repeat(6, 1)).save(folder / name)
    masks = np.zeros((2, 360, 480), dtype=bool)
    masks[0, 100:200, 50:300] = masks[1, 250:, 300:] = True
    np.save(folder / "masks.npy", masks)
    return folder


@pytest.mark.parametrize(("page", "code"), blocks("python", RUN_PAGES))
def test_python_examples_run(page, code, workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    for name, folder in STAND_INS.items():
        code = code.replace(f'"{name}"', f'"{folder}"')
    names: dict = {"__name__": "page"}
    exec(compile(code, page, "exec"), names)
    if "segments" in names:
        assert all(row["mask"].size == (480, 360) for row in names["segments"])
    if "answers" in names:
        assert len(names["answers"]) in (1, 2)


def slug(heading):
    return re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).strip().replace(" ", "-")


def anchors(page):
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", TEXTS[page]):
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), target
        if anchor and path.suffix == ".md":
            assert anchor in anchors(path), target


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return folder


@pytest.mark.slow
class TestSite:
    def test_every_page_is_there_and_asks_no_other_host(self, site):
        for page in PAGES[1:]:
            assert (site / Path(page).relative_to("docs").with_suffix(".html")).is_file()
        for file in site.rglob("*.html"):
            text = file.read_text(encoding="utf-8")
            loaded = re.findall(
                r"<(?:script|img|iframe|source|link)\b[^>]*?(?:src|href)=[\"']?(?:https?:)?//[^>]*>", text
            )
            assert [tag for tag in loaded if 'rel="canonical"' not in tag] == [], file
            # What the theme's script would ask GitHub and a CDN about, if a page had it.
            assert 'data-md-component="source"' not in text
            assert 'class="mermaid"' not in text
        for file in site.rglob("*.css"):
            assert not re.findall(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", file.read_text(encoding="utf-8")), file

    def test_every_public_name_is_documented(self, site):
        text = "".join(file.read_text(encoding="utf-8") for file in (site / "api").glob("*.html"))
        documented = {name.rsplit(".", 1)[-1] for name in re.findall(r'id="(hf_segvit\.[\w.]+)"', text)}
        assert set(hf_segvit.__all__) <= documented

    def test_links_out_of_the_documentation_lead_to_the_repository(self, site):
        text = (site / "index.html").read_text(encoding="utf-8")
        assert "https://github.com/hf-segvit/hf_segvit/blob/main/examples/relabel_masks.ipynb" in text
        assert 'href="../' not in text
