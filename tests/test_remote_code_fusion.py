"""A fused checkpoint with its code, loaded where this package is not installed, and pushed to a Hub."""

import json
import subprocess

import pytest
import torch

from hf_segvit import ViTPFusionForUniversalSegmentation, ViTPFusionImageProcessor
from hf_segvit.hub.push import push_to_hub
from hf_segvit.models.image_processing_eomt import EoMTImageProcessor
from hf_segvit.models.image_processing_vit_p import ViTPImageProcessor

from .hub_server import HubServer
from .test_remote_code import ABSENT, environment_without_package
from .tiny_generators import LABELS, noise_images, tiny_classifier, tiny_generator
from .tiny_models import save_with_code

LOAD = """
import json, sys
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModelForUniversalSegmentation, pipeline

for name in json.loads(sys.argv[2]):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{name} is in the environment that should lack it")
answers = []
for source in sys.argv[1], "again":
    remote = {"trust_remote_code": True}
    model = AutoModelForUniversalSegmentation.from_pretrained(source, **remote)
    processor = AutoImageProcessor.from_pretrained(source, **remote)
    inputs = processor(Image.open("photo.png"))
    found = {"module": type(model).__module__, "processor": type(processor).__name__}
    found["config"] = type(AutoConfig.from_pretrained(source, **remote)).__name__
    found["logits"] = model(**inputs).class_queries_logits.tolist()
    answers.append(found)
    model.save_pretrained("again")
    processor.save_pretrained("again")
segmenter = pipeline("image-segmentation", model=sys.argv[1], trust_remote_code=True)
answers.append([segment["label"] for segment in segmenter("photo.png", threshold=0.0)])
json.dump(answers, open("answers.json", "w"))
"""


@pytest.fixture(scope="module")
def parts():
    model = ViTPFusionForUniversalSegmentation.from_generator_and_classifier(
        tiny_generator("segvit_eomt"), tiny_classifier(), stuff_classes=[0]
    )
    processor = ViTPFusionImageProcessor.from_generator_and_classifier(
        EoMTImageProcessor(size=64), ViTPImageProcessor(size=56), config=model.config
    )
    return model, processor


@pytest.mark.slow
def test_a_fused_checkpoint_loads_without_the_package(parts, tmp_path):
    model, processor = parts
    save_with_code(model, processor, tmp_path / "saved")
    (image,) = noise_images([(90, 70)])
    image.save(tmp_path / "photo.png")
    process = subprocess.run(
        [environment_without_package(tmp_path / "env"), "-c", LOAD, str(tmp_path / "saved"), json.dumps(ABSENT)],
        env={"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    first, again, labels = json.loads((tmp_path / "answers.json").read_text())
    with torch.no_grad():
        expected = model(**processor(image)).class_queries_logits
    for found in (first, again):
        assert found["module"].startswith("transformers_modules.")
        assert (found["config"], found["processor"]) == ("ViTPFusionConfig", "ViTPFusionImageProcessor")
        torch.testing.assert_close(torch.tensor(found["logits"]), expected, atol=1e-5, rtol=1e-5)
    assert labels
    assert set(labels) <= set(LABELS.values())


def test_push(parts, tmp_path, monkeypatch):
    model, processor = parts
    with HubServer() as server:
        server.stand_in(monkeypatch, tmp_path / "cache")
        push_to_hub(model, "tester/fused", processor=processor)
        files = set(server.files("tester/fused"))
        assert {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"} <= files
        assert "modeling_vit_p_fusion.py" in files
        card = server.files("tester/fused")["README.md"].decode()
        assert "| Masks by | a generator of type segvit_eomt, frozen |" in card
        assert "| Labels by | the generator and a ViT-P of 5 classes, weighted 0.4 |" in card
        loaded = ViTPFusionForUniversalSegmentation.from_pretrained("tester/fused")
        again = ViTPFusionImageProcessor.from_pretrained("tester/fused")
    (image,) = noise_images([(90, 70)])
    with torch.no_grad():
        one, other = (m(**p(image)).class_queries_logits for m, p in ((model, processor), (loaded, again)))
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
