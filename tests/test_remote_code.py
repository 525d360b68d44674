"""Checkpoints that carry their code, loaded in an environment that does not have this package.

The environment is a virtual environment of its own with links to this one's packages, but for this package and for
everything that the code of a checkpoint must do without.
"""

import json
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModelForUniversalSegmentation, pipeline
from transformers.dynamic_module_utils import get_imports

from hf_segvit import models
from hf_segvit.hub.push import push_to_hub
from hf_segvit.hub.remote_code import AUTO_CLASSES, code_files, with_auto_map
from hf_segvit.models.configuration_eomt import EoMTConfig
from hf_segvit.models.image_processing_eomt import EoMTImageProcessor
from hf_segvit.models.modeling_eomt import EoMTForUniversalSegmentation

from .hub_server import HubServer
from .tiny_models import save_with_code, tiny_eomt

ALLOWED_IMPORTS = {"torch", "torchvision", "transformers", "huggingface_hub", "numpy", "PIL"} | sys.stdlib_module_names
# Without SciPy, scikit-learn would be broken rather than absent, and Transformers imports it where it finds it.
ABSENT = (
    "hf_segvit",
    "scipy",
    "scikit_learn",
    "sklearn",
    "pycocotools",
    "timm",
    "datasets",
    "accelerate",
    "matplotlib",
    "peft",
)
PIXELS = torch.linspace(-1, 1, 3 * 64 * 64).view(1, 3, 64, 64)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("with-code")
    save_with_code(tiny_eomt(), EoMTImageProcessor(size=64, stuff_classes=[3, 4]), folder)
    return folder


# The code itself


@pytest.mark.parametrize("model_type", sorted(AUTO_CLASSES))
def test_code_is_self_contained(model_type):
    files = code_files(model_type)
    names = {path.stem for path in files}
    assert {reference.split(".")[0] for reference in AUTO_CLASSES[model_type].values()} <= names
    for path in files:
        # What the loader finds (all but imports inside `try`) must be everywhere, and every sibling must come along.
        assert set(get_imports(path)) <= ALLOWED_IMPORTS, path.name
        source = path.read_text()
        assert set(re.findall(r"^\s*from \.(\w+) import", source, re.MULTILINE)) <= names, path.name
        # Forms that the loader does not follow.
        assert not re.search(r"^\s*from (\.\.|\. import)", source, re.MULTILINE), path.name


def test_code_of_an_unknown_type_is_refused():
    with pytest.raises(ValueError, match="'bert' is none of this package's: segvit_eomt"):
        code_files("bert")


def test_save_with_code_writes_exactly_what_a_plain_save_does_and_code(saved, tmp_path):
    tiny_eomt().save_pretrained(tmp_path)
    EoMTImageProcessor(size=64, stuff_classes=[3, 4]).save_pretrained(tmp_path)
    plain = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    coded = {path.name: path.read_bytes() for path in saved.iterdir()}
    assert set(plain) == {"config.json", "preprocessor_config.json", "model.safetensors"}
    assert set(coded) == set(plain) | {path.name for path in code_files("segvit_eomt")}
    assert coded["model.safetensors"] == plain["model.safetensors"]
    for name in ("config.json", "preprocessor_config.json"):
        assert json.loads(coded[name]).keys() - json.loads(plain[name]).keys() == {"auto_map"}
        assert json.loads(with_auto_map(coded[name].decode(), "segvit_eomt", code=False)) == json.loads(plain[name])
    for path in code_files("segvit_eomt"):
        assert coded[path.name] == path.read_bytes()
        assert path.parent == Path(models.__path__[0])


# Where the package is installed


@pytest.mark.parametrize("trust_remote_code", [None, False, True])
def test_the_installed_package_wins_over_the_copies(saved, trust_remote_code):
    assert type(AutoConfig.from_pretrained(saved, trust_remote_code=trust_remote_code)) is EoMTConfig
    model = AutoModelForUniversalSegmentation.from_pretrained(saved, trust_remote_code=trust_remote_code)
    assert type(model) is EoMTForUniversalSegmentation
    assert type(AutoImageProcessor.from_pretrained(saved, trust_remote_code=trust_remote_code)) is EoMTImageProcessor


# Where it is not

LOAD = """
import json, pathlib, re, sys
import torch
for name in json.loads(sys.argv[3]):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{name} is in the environment that should lack it")
from PIL import Image
from transformers import (
    AutoConfig, AutoImageProcessor, AutoModel, AutoModelForSemanticSegmentation, AutoModelForUniversalSegmentation,
    pipeline,
)

pixels = torch.linspace(-1, 1, 3 * 64 * 64).view(1, 3, 64, 64)
image = Image.open("photo.png")
answers = {}
for source in sys.argv[1:3]:
    found = answers[source] = {}
    remote = {"trust_remote_code": True}
    found["config"] = type(AutoConfig.from_pretrained(source, **remote)).__name__
    found["base"] = type(AutoModel.from_pretrained(source, **remote)).__name__
    for auto_class in (AutoModelForUniversalSegmentation, AutoModelForSemanticSegmentation):
        model = auto_class.from_pretrained(source, **remote).eval()
        found["module"] = type(model).__module__
        with torch.no_grad():
            found[auto_class.__name__] = model(pixels).class_queries_logits.flatten().tolist()
    processor = AutoImageProcessor.from_pretrained(source, **remote)
    found["processor"] = type(processor).__name__
    with torch.no_grad():
        outputs = model(**processor(images=image, return_tensors="pt"))
    result = processor.post_process_panoptic_segmentation(outputs, threshold=0.1, target_sizes=[image.size[::-1]])[0]
    found["map"] = result["segmentation"].tolist()
    segmenter = pipeline("image-segmentation", model=source, **remote)
    found["segments"] = [
        [s["score"], s["label"], list(s["mask"].tobytes())] for s in segmenter(image, threshold=0.1)
    ]
    try:
        AutoModelForUniversalSegmentation.from_pretrained(source, trust_remote_code=False)
    except ValueError as error:
        found["untrusted"] = str(error)
# A model trained here and saved takes its code along.
model.save_pretrained("again")
processor.save_pretrained("again")
again = AutoModelForUniversalSegmentation.from_pretrained("again", trust_remote_code=True).eval()
with torch.no_grad():
    answers["again"] = again(pixels).class_queries_logits.flatten().tolist()
exec(pathlib.Path("example.py").read_text())
pathlib.Path("answers.json").write_text(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def elsewhere(saved, tmp_path_factory):
    """What a process without the package finds, loading from a folder and from a Hub."""
    work = tmp_path_factory.mktemp("elsewhere")
    Image.effect_noise((90, 70), 50).convert("RGB").save(work / "photo.png")
    with HubServer() as server, pytest.MonkeyPatch.context() as patch:
        server.stand_in(patch, work / "cache")
        push_to_hub(saved, "tester/tiny")
        card = ModelCard(server.files("tester/tiny")["README.md"].decode()).text
        (work / "example.py").write_text(re.findall(r"```python\n(.*?)```", card, re.DOTALL)[2])
        process = subprocess.run(
            [environment_without_package(work / "env"), "-c", LOAD, str(saved), "tester/tiny", json.dumps(ABSENT)],
            env={k: v for k, v in server.environment(work / "home").items() if not k.startswith("PYTHON")},
            cwd=work,
            capture_output=True,
            text=True,
        )
    assert process.returncode == 0, process.stderr
    answers = json.loads((work / "answers.json").read_text())
    return {
        "folder": answers[str(saved)],
        "hub": answers["tester/tiny"],
        "again": answers["again"],
        "image": Image.open(work / "photo.png"),
    }


def environment_without_package(folder: Path) -> str:
    """The interpreter of a new virtual environment with links to this one's packages, `ABSENT` ones left out."""
    venv.create(folder, symlinks=True)
    (links,) = folder.glob("lib/python*/site-packages")
    for place in (Path(entry) for entry in sys.path if entry.endswith(("site-packages", "dist-packages"))):
        for package in place.iterdir():
            absent = package.name.startswith(ABSENT) or package.suffix == ".pth" or "editable" in package.name
            if not absent and not (links / package.name).exists():
                (links / package.name).symlink_to(package)
    return str(folder / "bin" / "python")


@pytest.mark.parametrize("source", ["folder", "hub"])
def test_auto_classes_load_without_the_package(saved, elsewhere, source):
    found = elsewhere[source]
    assert (found["config"], found["base"], found["processor"]) == ("EoMTConfig", "EoMTModel", "EoMTImageProcessor")
    assert found["module"].startswith("transformers_modules.")
    with torch.no_grad():
        expected = EoMTForUniversalSegmentation.from_pretrained(saved).eval()(PIXELS).class_queries_logits.flatten()
    for auto_class in ("AutoModelForUniversalSegmentation", "AutoModelForSemanticSegmentation"):
        # The same code; another process may use other threads and so another order of sums.
        torch.testing.assert_close(torch.tensor(found[auto_class]), expected, atol=1e-5, rtol=1e-5)
    assert "trust_remote_code=True" in found["untrusted"]


@pytest.mark.parametrize("source", ["folder", "hub"])
def test_processor_and_pipeline_answer_as_with_the_package(saved, elsewhere, source):
    found, image = elsewhere[source], elsewhere["image"]
    model = EoMTForUniversalSegmentation.from_pretrained(saved).eval()
    processor = EoMTImageProcessor.from_pretrained(saved)
    with torch.no_grad():
        outputs = model(**processor(images=image, return_tensors="pt"))
    result = processor.post_process_panoptic_segmentation(outputs, threshold=0.1, target_sizes=[(70, 90)])[0]
    assert len(result["segments_info"]) >= 1
    # Another process may use other threads, so a pixel whose probability is at a threshold may fall on either side.
    assert (torch.tensor(found["map"]) == result["segmentation"]).float().mean() > 0.999

    segments = pipeline("image-segmentation", model=model, image_processor=processor)(image, threshold=0.1)
    assert [label for _, label, _ in found["segments"]] == [segment["label"] for segment in segments]
    for (score, _, mask), segment in zip(found["segments"], segments, strict=True):
        assert score == pytest.approx(segment["score"], abs=1e-4)
        assert (torch.tensor(mask) == torch.tensor(list(segment["mask"].tobytes()))).float().mean() > 0.999


def test_a_model_saved_without_the_package_keeps_its_code(elsewhere):
    expected = elsewhere["folder"]["AutoModelForUniversalSegmentation"]
    torch.testing.assert_close(elsewhere["again"], expected, atol=1e-5, rtol=1e-5)
