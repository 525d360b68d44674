"""A ViT-P checkpoint that carries its code, loaded where the package is not installed."""

import json
import subprocess

import pytest
import torch

from hf_segvit import ViTPImageProcessor
from hf_segvit.hub.remote_code import code_files

from .test_modeling_vit_p import tiny_vit_p
from .test_remote_code import environment_without_package
from .tiny_models import save_with_code

LOAD = """
import json, pathlib, sys
import torch
try:
    import hf_segvit
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("hf_segvit is in the environment that should lack it")
from transformers import AutoConfig, AutoImageProcessor, AutoModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

folder = sys.argv[1]
remote = {"trust_remote_code": True}
processor = AutoImageProcessor.from_pretrained(folder, **remote)
base = AutoModel.from_pretrained(folder, **remote)
# The head has no Auto class of its own in Transformers, so it is asked for by name.
model = get_class_from_dynamic_module("modeling_vit_p.ViTPForPointClassification", folder).from_pretrained(folder)
inputs = processor(torch.linspace(0, 1, 3 * 40 * 60).view(3, 40, 60), input_points=[[5, 6], [50, 30]])
with torch.no_grad():
    outputs = model.eval()(**inputs)
answers = {
    "names": [type(item).__name__ for item in (AutoConfig.from_pretrained(folder, **remote), base, processor, model)],
    "module": type(model).__module__,
    "logits": outputs.logits.tolist(),
    "labels": processor.post_process_point_classification(outputs)[0]["labels"],
}
pathlib.Path("answers.json").write_text(json.dumps(answers))
"""


@pytest.mark.slow
def test_a_checkpoint_loads_without_the_package(tmp_path):
    model = tiny_vit_p("isolated", "registers")
    processor = ViTPImageProcessor(size=56, id2label={index: f"thing {index}" for index in range(5)})
    save_with_code(model, processor, tmp_path / "model")
    saved = {path.name for path in (tmp_path / "model").iterdir()}
    assert {path.name for path in code_files("segvit_vit_p")} < saved
    process = subprocess.run(
        [environment_without_package(tmp_path / "env"), "-c", LOAD, str(tmp_path / "model")],
        env={"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    answers = json.loads((tmp_path / "answers.json").read_text())
    names = ["ViTPConfig", "ViTPModel", "ViTPImageProcessor", "ViTPForPointClassification"]
    assert answers["names"] == names
    assert answers["module"].startswith("transformers_modules.")
    inputs = processor(torch.linspace(0, 1, 3 * 40 * 60).view(3, 40, 60), input_points=[[5, 6], [50, 30]])
    with torch.no_grad():
        outputs = model(**inputs)
    # The same code; another process may use other threads and so another order of sums.
    torch.testing.assert_close(torch.tensor(answers["logits"]), outputs.logits, atol=1e-5, rtol=1e-5)
    assert answers["labels"] == processor.post_process_point_classification(outputs)[0]["labels"]
