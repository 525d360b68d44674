"""Transformers' own common tests, from its source distribution, made importable.

The distribution ships the mixins but not the modules that some of them import for other kinds of models; those are
stood in for by empty classes. Nothing of it is kept here: `make test-upstream` fetches the distribution that matches
the installed version and names its `tests` folder in `HF_SEGVIT_TRANSFORMERS_TESTS`.
"""

import importlib
import os
import shutil
import sys
import tempfile
from pathlib import Path
from types import ModuleType

STAND_INS = {
    "__init__.py": "",
    "exporters/__init__.py": "",
    "exporters/test_export.py": "class ExportTesterMixin: pass\n",
    "generation/__init__.py": "",
    "generation/test_utils.py": "class GenerationTesterMixin: pass\n",
    "utils/__init__.py": "",
    "utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
    "distributed_testing_utils.py": "def __getattr__(name): return None\n",
}


def folder() -> Path | None:
    """The `tests` folder of Transformers' source distribution, where one was named."""
    path = os.environ.get("HF_SEGVIT_TRANSFORMERS_TESTS")
    return Path(path) if path else None


def import_common(name: str) -> ModuleType:
    """Import one of the shipped modules, such as `test_modeling_common`."""
    source = folder()
    assert source is not None
    package = Path(tempfile.mkdtemp()) / "transformers_common_tests"
    if "transformers_common_tests" not in sys.modules:
        shutil.copytree(source, package)
        for path, text in STAND_INS.items():
            target = package / path
            target.parent.mkdir(exist_ok=True)
            if not target.exists():
                target.write_text(text)
        sys.path.insert(0, str(package.parent))
    return importlib.import_module(f"transformers_common_tests.{name}")
