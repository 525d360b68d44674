"""What starting up imports, and that the models are registered all the same, in whichever order things are imported.

Each test runs processes of its own, as imports happen once in a process.
"""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import hf_segvit
from hf_segvit.cli import COMMANDS

PACKAGE = Path(hf_segvit.__file__).parent
HEAVY = {"torch", "transformers", "datasets", "pyarrow", "timm", "scipy", "matplotlib", "numpy", "accelerate"}
# Prints whether each of our models is registered, and who is still waiting for Transformers.
CHECK = """
import sys
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING as MODELS
import hf_segvit
assert CONFIG_MAPPING["segvit_eomt"] is hf_segvit.EoMTConfig
assert CONFIG_MAPPING["segvit_vit_p"] is hf_segvit.ViTPConfig
assert MODELS[hf_segvit.ViTPFusionConfig] is hf_segvit.ViTPFusionForUniversalSegmentation
assert not [finder for finder in sys.meta_path if type(finder).__module__ == "hf_segvit"]
print("registered")
"""


def python(*words: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A Python process that finds this package, and modules in `path` before all others."""
    folders = [*([str(path)] if path else []), str(PACKAGE.parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    return subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, check=False)


def is_registered(code: str) -> None:
    done = python("-W", "error::ImportWarning", "-c", code + CHECK)
    assert done.stdout.endswith("registered\n"), done.stderr


# Runs a command line as `python -m hf_segvit` does, and says on the last line of stdout what was imported.
COMMAND = """
import atexit, runpy, sys
atexit.register(lambda: print("\\nimported:", *sorted({name.partition(".")[0] for name in sys.modules})))
runpy.run_module("hf_segvit", run_name="__main__", alter_sys=True)
"""


def test_ctrl_c_during_the_imports_is_one_line() -> None:
    code = """
import builtins
real = builtins.__import__
def interrupted(name, *rest):
    if name == "argparse":
        raise KeyboardInterrupt
    return real(name, *rest)
builtins.__import__ = interrupted
from hf_segvit.__main__ import run
print(run())
"""
    done = python("-c", code)
    assert (done.stdout, done.stderr) == ("130\n", "hf-segvit: interrupted\n")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("--help", 0, "COMMAND"),
        ("--version", 0, f"hf-segvit {hf_segvit.__version__}"),
        *((f"{command} --help", 0, "--help") for command in COMMANDS if command != "check-data"),
        ("check-data --help", 0, "FORMAT:PATH"),
        ("train --list", 0, "vit_p_coco_stuff_large"),
        ("train own_panoptic --fields", 0, "learning_rate"),
        ("segmnt a.jpg", 2, "there is no command 'segmnt'; did you mean segment?"),
        ("segment a.jpg --modle x --output y", 2, "--model"),
        ("segment nowhere.jpg --model x --output y", 2, "no images match nowhere.jpg"),
        ("classify-points nowhere.jpg --model x --points 1,2", 2, "nowhere.jpg: no such file"),
        ("evaluate --model x --task panoptic --data coco:nowhere?a=1", 2, "nowhere: no such file or folder"),
        ("check-data coco-folder:nowhere", 2, "nowhere: no such file or folder"),
        ("check-data coco_foldr:x", 2, "there is no format 'coco_foldr'; did you mean coco_folder?"),
        ("check-data nowhere", 2, "'nowhere': give FORMAT:PATH"),
        ("evaluate --model x --task panoptic --data cityscape:x", 2, "no format 'cityscape'; did you mean cityscapes?"),
        ("evaluate --model ./nowhere --task panoptic --data generated:easy", 2, "there is no folder ./nowhere"),
        ("evaluate --model x --classifier ~/nowhere --task panoptic --data hub:x", 2, "there is no folder ~/nowhere"),
        (f"classify-points {__file__} --model /nowhere --points 1,2", 2, "there is no folder /nowhere"),
        ("convert oficial-eomt x y", 2, "unknown kind 'oficial-eomt'; did you mean official-eomt?"),
        ("convert official-eomt nowhere.pth y", 2, "nowhere.pth is neither a file nor a folder"),
        ("export a/b y --format onx", 2, "unknown format 'onx'; did you mean onnx?"),
        ("export ./nowhere y", 2, "there is no folder ./nowhere"),
        ("app --model ./nowhere", 2, "there is no folder ./nowhere"),
        ("app --model owner/name --host 203.0.113.1", 2, "cannot listen on 203.0.113.1 port 7860"),
        ("train nowhere.yaml", 2, "nowhere.yaml: there is no such file"),
        ("train --replay nowhere", 2, "nowhere: no such folder"),
        ("push nowhere owner/name", 2, "nowhere: no such folder"),
    ],
)
def test_help_and_mistakes_need_no_heavy_import(words, code, message):
    answers_without_heavy_imports(words.split(), code, message)


def test_a_missing_model_is_refused_before_heavy_imports(tmp_path):
    (tmp_path / "a.png").touch()
    words = ["segment", str(tmp_path / "a.png"), "--model", "../nowhere", "--output", str(tmp_path)]
    answers_without_heavy_imports(words, 2, "there is no folder ../nowhere")


def answers_without_heavy_imports(words, code, message):
    done = python("-c", COMMAND, *words)
    assert done.returncode == code, done.stderr
    assert message in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    imported = done.stdout.splitlines()[-1].removeprefix("imported: ").split()
    assert "argparse" in imported
    assert HEAVY.isdisjoint(imported)


@pytest.mark.parametrize("name", ["hf_segvit", "hf_segvit.cli", "hf_segvit.lookup", "hf_segvit.models"])
def test_light_modules_stay_light(name):
    done = python("-c", f"import sys, {name}; dir(hf_segvit); print(*sys.modules)")
    assert HEAVY.isdisjoint(done.stdout.split()), done.stderr


def test_public_names_are_those_that_type_checkers_see():
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    (guard,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {}
    for node in guard.body:
        assert isinstance(node, ast.ImportFrom)
        seen |= {name.name: f"hf_segvit.{node.module}" for name in node.names}
    assert sorted(seen) == sorted(hf_segvit.__all__)
    assert {name: getattr(hf_segvit, name).__module__ for name in seen} == seen
    assert set(seen) <= set(dir(hf_segvit))
    assert not hasattr(hf_segvit, "EoMT")


@pytest.mark.parametrize(
    "code",
    [
        "import hf_segvit, transformers",
        "import transformers, hf_segvit",
        "from hf_segvit import *\nassert EoMTConfig.model_type == 'segvit_eomt'\n"
        "import hf_segvit\nassert hf_segvit.models.modeling_eomt.EoMTConfig is EoMTConfig",
        # Looking whether Transformers is installed is no import, and a second start does not make two wait.
        "import hf_segvit, importlib.util\nassert importlib.util.find_spec('transformers').has_location\n"
        "importlib.reload(hf_segvit)",
        "import hf_segvit.models.configuration_plain_vit",
    ],
)
def test_models_are_registered_in_every_order_of_imports(code):
    is_registered(code)


# Those that are half imported when Transformers is, and one of each room: a process takes seconds.
FIRST = [*sorted(f"models.{file.stem}" for file in (PACKAGE / "models").glob("*_*.py"))]
FIRST += ["data.collation", "metrics.mean_iou", "drawing.segments", "hub.push", "inference.segmenter"]
FIRST += ["conversion.backbones", "evaluation.tasks", "training.loop", "training.tasks.eomt", "demo", "auto"]


@pytest.mark.slow
@pytest.mark.parametrize("name", FIRST)
def test_models_are_registered_whichever_module_comes_first(name):
    is_registered(f"import hf_segvit.{name}")


def test_the_pipeline_knows_a_saved_model_without_another_import(tmp_path):
    from .test_auto import save

    save(tmp_path, "panoptic")
    code = "import sys, hf_segvit\nfrom transformers import pipeline\n"
    code += "print(type(pipeline('image-segmentation', sys.argv[1]).model).__name__)"
    assert python("-c", code, str(tmp_path)).stdout == "EoMTForUniversalSegmentation\n"
    # A pickled class names its module, which is then imported first.
    code = "import pickle\nassert pickle.loads(b'chf_segvit.models.configuration_eomt\\nEoMTConfig\\n.')().num_queries"
    is_registered(code)


def test_threads_that_import_both_at_once():
    """One imports Transformers, the other a module of ours that needs it."""
    is_registered(
        "import importlib, sys, threading, hf_segvit\n"
        "sys.setswitchinterval(1e-5)\n"
        "threads = [threading.Thread(target=importlib.import_module, args=(name,))\n"
        "           for name in ('transformers', 'hf_segvit.models.modeling_eomt')]\n"
        "[thread.start() for thread in threads]\n"
        "[thread.join() for thread in threads]\n"
    )


def test_finders_and_loaders_of_others_are_respected():
    is_registered("""
import sys, hf_segvit
from importlib.machinery import PathFinder

class Loader:
    __slots__ = ("loader",)  # takes no further attributes
    def __init__(self, loader): self.loader = loader
    def create_module(self, spec): return self.loader.create_module(spec)
    def exec_module(self, module):
        assert module.__spec__.loader is module.__loader__ is self
        self.loader.exec_module(module)
        done.append(module.__name__)

class Finder:
    def find_spec(self, name, path=None, target=None):
        spec = PathFinder.find_spec(name, path, target) if name == "transformers" else None
        if spec is not None: spec.loader = Loader(spec.loader)
        return spec

done = []
sys.meta_path[1:1] = [Finder()]
import transformers
assert done == ["transformers"]
import hf_segvit.models.modeling_eomt as module
assert type(module.__spec__.loader) is type(module.__loader__) is type(hf_segvit.__loader__)
""")


def test_an_import_of_transformers_that_fails_says_why_and_the_next_one_registers(tmp_path):
    package = tmp_path / "transformers"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('half installed')\n")
    done = python("-c", "import hf_segvit, transformers", path=tmp_path)
    assert done.stderr.endswith("RuntimeError: half installed\n")
    again = f"""
import sys, hf_segvit
sys.path.insert(0, {str(tmp_path)!r})
for module in ("transformers", "hf_segvit.models.configuration_plain_vit"):
    try:
        __import__(module)
    except RuntimeError as error:
        assert str(error) == "half installed"
    else:
        raise AssertionError
sys.path.pop(0)
sys.path_importer_cache.clear()
"""
    is_registered(again)
    # Where it is not installed at all, the error is Python's own.
    done = python("-c", "import sys, hf_segvit\nsys.path[:] = []\nimport transformers")
    assert "ModuleNotFoundError: No module named 'transformers'" in done.stderr


@pytest.mark.parametrize("name", ["torch", "hf_segvit.conversion.kinds"])
def test_an_interrupt_during_imports_is_one_line(tmp_path, name):
    (tmp_path / "a.png").touch()
    # A finder stands for the user, who presses Ctrl-C at this import.
    code = f"""
import os, signal, sys

class User:
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}: os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, User())
from hf_segvit.cli import main
sys.exit(main(["segment", {str(tmp_path / "a.png")!r}, "--model", "x", "--output", "y"]))
"""
    done = python("-c", code)
    assert (done.returncode, done.stderr) == (130, "hf-segvit: interrupted\n")
