"""The distributions hold what a user and a packager need, and what describes the project agrees with itself."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def literal_version():
    """`__version__`, read without importing anything, as the build does."""
    for node in ast.parse((ROOT / "src/hf_segvit/__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__":
            return ast.literal_eval(node.value)
    raise AssertionError("hf_segvit/__init__.py assigns no literal to __version__")


def build(folder, output, *options):
    # Without isolation: that would fetch setuptools.
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(output), *options, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """The sources, the unpacked sdist, the wheel built from that, and the wheel built from the sources."""
    folder = tmp_path_factory.mktemp("distributions")
    sources = folder / "sources"
    # What is under version control, and nothing else that may lie in a working tree.
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0 or not (ROOT / ".git").exists():
        pytest.skip(f"needs a git checkout: {listed.stderr}")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).exists():  # else it was deleted a moment ago
            (sources / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, sources / name, follow_symlinks=False)  # training/recipes is a link
    present = files(sources)
    build(sources, folder / "of_sdist")  # both: the wheel from the sdist
    build(sources, folder / "of_sources", "--wheel")
    (archive,) = (folder / "of_sdist").glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder / "sdist", filter="data")
    (sdist,) = (folder / "sdist").iterdir()
    wheels = [next((folder / name).glob("*.whl")) for name in ("of_sdist", "of_sources")]
    return present, sdist, *wheels


def test_the_sdist_holds_the_repository(distributions):
    present, sdist, _, _ = distributions
    assert sdist.name == f"hf_segvit-{literal_version()}"
    # Some of what the quick suite reads, in case the fixture copied too little.
    assert present >= {"Makefile", "tests/conftest.py", "docs/demo.jpg", "training/train.py", ".ci/run"}
    assert present - files(sdist) == set()


def test_the_wheel_of_the_sdist_holds_the_package_and_its_data(distributions):
    present, _, of_sdist, of_sources = distributions
    with zipfile.ZipFile(of_sdist) as wheel, zipfile.ZipFile(of_sources) as other:
        names = wheel.namelist()
        assert {name: wheel.read(name) for name in names} == {name: other.read(name) for name in other.namelist()}
        (metadata,) = (wheel.read(name).decode() for name in names if name.endswith(".dist-info/METADATA"))
    package = {name.removeprefix("src/") for name in present if name.startswith("src/hf_segvit/")}
    assert {name for name in names if name.startswith("hf_segvit/")} == package
    assert {Path(name).suffix for name in package} == {".py", ".json", ".yaml", ".md", ".typed"}
    assert not any(name.startswith("tests") for name in names)
    assert f"\nVersion: {literal_version()}\n" in metadata
    # On an index, relative links lead nowhere and relative images are not shown.
    page = metadata.partition("\n\n")[2]
    assert page.startswith("# hf_segvit\n")
    links = re.findall(r"\]\(([^)]+)\)", page)
    ours = f"{PROJECT['urls']['Repository']}/"
    assert len(links) > 20
    for link in links:
        assert link.startswith("https://"), link
        if link.startswith(ours):
            kind, branch, path = link.removeprefix(ours).split("/", 2)
            assert (branch, path) != ("main", "")
            assert kind == ("raw" if path.endswith(".jpg") else "blob")
            assert path in present or any(name.startswith(f"{path}/") for name in present)


# One process for both, as starting takes seconds; `run_module` is what `python -m hf_segvit` does.
USE = """
import hf_segvit, pathlib, runpy, sys
assert pathlib.Path(hf_segvit.__file__).is_relative_to(sys.argv[1]), hf_segvit.__file__
from hf_segvit.data.label_tables import label_table
from hf_segvit.training.recipe import load_recipe
print(len(label_table("coco_panoptic").id2label), load_recipe("own_panoptic").task)
sys.argv[1:] = ["train", "--list"]
runpy.run_module("hf_segvit", run_name="__main__", alter_sys=True)
"""


def test_an_unpacked_wheel_works(distributions, tmp_path):
    *_, wheel = distributions
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as file:
        file.extractall(installed)
    # Not in the checkout, and with the wheel before any installation of it on the path.
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, "-c", USE, str(installed)]
    used, *listed = subprocess.check_output(command, cwd=tmp_path, env=environment, text=True).splitlines()
    assert used == "133 panoptic"
    assert sorted(listed) == sorted(path.stem for path in (ROOT / "src/hf_segvit/training/recipes").glob("*.yaml"))


def test_the_version_stands_in_one_file():
    assert PROJECT["dynamic"] == ["version", "readme"]
    assert "version" not in PROJECT
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    changelog = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert citation["version"] == changelog[0] == literal_version()


def requirements(*extras):
    lines = [*PROJECT["dependencies"], *(line for name in extras for line in PROJECT["optional-dependencies"][name])]
    return {canonicalize_name(requirement.name): requirement for requirement in map(Requirement, lines)}


def test_every_import_is_of_a_declared_dependency():
    imported = set()
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {name.name.split(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(node.module.split(".")[0])
    foreign = imported - sys.stdlib_module_names - {"hf_segvit"}
    assert foreign >= {"torch", "PIL", "yaml", "peft"}  # modules whose distribution has another name among them
    distributions = packages_distributions()
    extras = ("lora", "app", "tiff", "onnx", "int8", "executorch", "video", "ray", "supervision", "quantization")
    declared = set(requirements(*extras))
    assert {
        name for name in foreign if not set(map(canonicalize_name, distributions.get(name, [name]))) & declared
    } == set()


def test_the_floor_is_the_lower_bound_of_every_dependency():
    lines = (ROOT / "constraints-floor.txt").read_text(encoding="utf-8").splitlines()
    pins = [line.split("==") for line in lines if not line.startswith("#")]
    bounds = {
        name: next(Version(part.version) for part in requirement.specifier if part.operator == ">=")
        for name, requirement in requirements("lora", "quantization").items()
    }
    assert {name: Version(version) for name, version in pins} == bounds


def make_targets():
    return set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def made(text):
    """Targets of the `make` commands in a text."""
    return set(re.findall(r"^\s*make ([\w-]+)", text, re.MULTILINE))


def test_the_workflow_runs_what_there_is():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    assert set(workflow["on"]) == {"push", "pull_request"}
    assert workflow["permissions"] == {"contents": "read"}
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    commands = [step["run"] for step in steps if "run" in step]
    assert commands == ["bash .ci/run", "make test-floor"]
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert made(script) == {"check", "docs", "test", "test-slow"}
    assert made("\n".join([*commands, script])) <= make_targets()
    pythons = {
        f"Programming Language :: Python :: {minor}"
        for minor in workflow["jobs"]["test"]["strategy"]["matrix"]["python-version"]
    }
    assert pythons <= set(PROJECT["classifiers"])


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_documented_targets_are_there(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    targets = made(text) | set(re.findall(r"`make\s+([\w-]+)`", text))
    assert targets >= {"test"}
    assert targets <= make_targets()


# Stands in for Python in the Makefile: notes what it is asked, and "makes" an environment whose python is itself.
STAND_IN = """#!/bin/sh
echo "$0 $*" >> "$NOTES"
case "$1 $2" in
  "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "-c import importlib"*) exit "${MISSING:-0}" ;;
  "-m pip") exit "${PIP_FAILS:-0}" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path):
    """A folder with the Makefile, and a function that runs it there and returns what Python was asked to do."""
    for name in ("Makefile", "pyproject.toml", "constraints-floor.txt"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / "stand-in"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    notes = tmp_path / "notes"

    def make(*words, fails=False, **variables):
        notes.write_text("")
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("VIRTUAL_ENV", "MAKE"))
        }
        environment |= {"NOTES": str(notes), **variables}
        command = ["make", f"PYTHON={python}", *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert (done.returncode != 0) == fails, done.stdout + done.stderr
        lines = [line.replace(f"{tmp_path}/", "") for line in notes.read_text().splitlines()]
        return [line for line in lines if "version_info" not in line], done.stderr

    return make


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
INSTALLATION = ".venv/bin/python -m pip install --quiet --editable .[dev]"


@needs_make
def test_the_first_command_makes_the_environment_once(checkout, tmp_path):
    demo = ".venv/bin/python -m hf_segvit demo --output outputs/demo"
    made_and_installed = ["stand-in -m venv .venv", INSTALLATION]
    # An installation that fails is tried again.
    assert checkout("demo", fails=True, PIP_FAILS="1")[0] == made_and_installed
    assert checkout("demo")[0] == [*made_and_installed, demo]
    assert checkout("demo")[0] == [demo]
    assert checkout("test")[0] == [".venv/bin/python -m pytest -n 2 -m not slow"]
    # Other dependencies, another installation. Far in the future, as file systems round times.
    os.utime(tmp_path / "pyproject.toml", (4e9, 4e9))
    assert checkout("demo")[0] == [*made_and_installed, demo]


@needs_make
@pytest.mark.parametrize("missing", [False, True])
def test_an_active_environment_is_used(checkout, tmp_path, missing):
    (tmp_path / "active/bin").mkdir(parents=True)
    shutil.copy(tmp_path / "stand-in", tmp_path / "active/bin/python")
    asked, _ = checkout("test-slow", VIRTUAL_ENV=str(tmp_path / "active"), MISSING=str(int(missing)))
    installed = [INSTALLATION.replace(".venv", "active")] if missing else []
    assert asked[1:] == [*installed, "active/bin/python -m pytest -n 2 -m slow"]
    assert not (tmp_path / ".venv").exists()


@needs_make
def test_an_old_python_is_refused_by_name(checkout, tmp_path):
    old = tmp_path / "old"
    # What the check sees, without an old Python at hand.
    check = (
        f'exec "{sys.executable}" -c "import sys; sys.version_info = (3, 10, 2); sys.version = \'3.10.2 (main)\'; $2"'
    )
    old.write_text(f"#!/bin/sh\n{check}\n")
    old.chmod(0o755)
    _, error = checkout(f"PYTHON={old}", "demo", fails=True)
    assert (
        f"hf_segvit needs Python 3.11 or newer, and {old} is 3.10.2; name a newer one: make PYTHON=python3.12" in error
    )
    _, error = checkout("PYTHON=python-of-nowhere", "test-floor", fails=True)
    assert "python-of-nowhere is not there; install Python 3.11 or newer" in error
    assert not (tmp_path / ".venv").exists()
