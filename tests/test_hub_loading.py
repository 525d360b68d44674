"""Loading from a Hub on loopback, in processes whose environment names it as the Hub.

By name, revision and token, with the network and later without; checkpoints of this package and of Transformers' own
`eomt`.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import EomtConfig, EomtForUniversalSegmentation, EomtImageProcessor

from hf_segvit.hub.push import push_to_hub
from hf_segvit.models.configuration_eomt import EoMTConfig
from hf_segvit.models.image_processing_eomt import EoMTImageProcessor

from .hub_server import HubServer
from .tiny_models import tiny_eomt

ONLINE = """
import json, pathlib, re, sys
import torch, transformers
from huggingface_hub import hf_hub_download
from transformers import AutoImageProcessor, AutoModelForUniversalSegmentation
import hf_segvit
from hf_segvit.inference.loading import load_segmentation_model
from hf_segvit.models.modeling_eomt import EoMTForUniversalSegmentation

def answer(load):
    try:
        model = load().eval()
    except (OSError, ValueError) as error:
        return str(error)
    pixels = torch.linspace(-1, 1, 3 * 64 * 64).view(1, 3, 64, 64)
    with torch.no_grad():
        return type(model).__name__, model(pixels).class_queries_logits.flatten().tolist()

auto, eomt = AutoModelForUniversalSegmentation.from_pretrained, EoMTForUniversalSegmentation.from_pretrained
answers = {
    "ours": answer(lambda: auto("tester/tiny")),
    "ours_v2": answer(lambda: auto("tester/tiny", revision="v2")),
    "upstream": answer(lambda: eomt("tester/upstream")),
    "upstream_v2": answer(lambda: eomt("tester/upstream", revision="v2")),
}
"""
REFUSED = """
for name, load in {"ours": auto, "upstream": eomt}.items():
    answers[f"{name}_wrong_token"] = answer(lambda: load(f"tester/{name}_private", token="hf_wrong"))
    answers[f"{name}_other_token"] = answer(lambda: load(f"tester/{name}_private", token="hf_reader"))
    answers[f"{name}_right_token"] = answer(lambda: load(f"tester/{name}_private", token="hf_writer"))
    answers[f"{name}_no_revision"] = answer(lambda: load("tester/upstream", revision="v3"))
answers["no_repository"] = answer(lambda: eomt("tester/nothing"))
answers["explained_repository"] = answer(lambda: load_segmentation_model("tester/nothing"))
answers["explained_revision"] = answer(lambda: load_segmentation_model("tester/upstream", revision="v3"))
"""
EXAMPLES = """
answers["stuff"] = AutoImageProcessor.from_pretrained("tester/tiny").stuff_classes
card = pathlib.Path(hf_hub_download("tester/tiny", "README.md")).read_text()
examples = re.findall("```python\\n(.*?)```", card, re.DOTALL)
found = {}
for example in examples[:2]:
    exec(example, found)
answers["example_map"] = list(found["result"]["segmentation"].shape)
answers["example_pipeline"] = isinstance(found["segments"], list)
"""
PLAIN_PUSH = """
eomt("tester/tiny").push_to_hub("tester/plain", token="hf_writer")
AutoImageProcessor.from_pretrained("tester/tiny").push_to_hub("tester/plain", token="hf_writer")
"""
REPORT = """
pathlib.Path(sys.argv[1]).write_text(json.dumps(answers))
"""
OFFLINE = """
answers["not_cached"] = answer(lambda: eomt("tester/nothing"))
answers["explained_offline"] = answer(lambda: load_segmentation_model("tester/nothing"))
answers["not_cached_revision"] = answer(lambda: eomt("tester/upstream", revision="v3"))
"""


@pytest.fixture(scope="module")
def loading(tmp_path_factory):
    """Answers of a process with the server, of a later one without it, what was published, and what is expected."""
    work = tmp_path_factory.mktemp("loading")
    Image.effect_noise((90, 70), 50).save(work / "photo.jpg")
    pixels = torch.linspace(-1, 1, 3 * 64 * 64).view(1, 3, 64, 64)
    expected = {}

    def save(model, processor, name) -> Path:
        model.save_pretrained(work / name)
        processor.save_pretrained(work / name)
        with torch.no_grad():
            expected[name] = model(pixels).class_queries_logits.flatten().tolist()
        return work / name

    with HubServer() as server, pytest.MonkeyPatch.context() as patch:
        server.stand_in(patch, work / "cache")
        processor = EoMTImageProcessor(size=64, stuff_classes=[3, 4])
        for branch, seed in (("main", 0), ("v2", 1)):
            torch.manual_seed(seed)
            config = EomtConfig(
                hidden_size=32, num_hidden_layers=4, num_attention_heads=2, num_blocks=2, image_size=64, num_queries=7
            )
            upstream = save(EomtForUniversalSegmentation(config).eval(), EomtImageProcessor(), f"upstream_{branch}")
            server.add("tester/upstream", upstream, branch=branch)
            server.add("tester/upstream_private", upstream, private=True)
            model = tiny_eomt()
            with torch.no_grad():
                model.class_predictor.bias += seed
            ours = save(model, processor, f"ours_{branch}")
            for repo_id in ("tester/tiny", "tester/ours_private"):
                revision = None if branch == "main" else branch
                push_to_hub(ours, repo_id, revision=revision, private="private" in repo_id)

        def run(name: str, script: str, **environment) -> dict:
            output = work / f"{name}.json"
            process = subprocess.run(
                [sys.executable, "-c", script + REPORT, str(output)],
                env=server.environment(work / "home", **environment),
                cwd=work,
                capture_output=True,
                text=True,
            )
            assert process.returncode == 0, process.stderr
            return json.loads(output.read_text())

        online = run("online", ONLINE + REFUSED + EXAMPLES + PLAIN_PUSH)
        plain = server.files("tester/plain")
        served = len(server.requests)
        offline = run("offline", ONLINE + OFFLINE, offline=True)
        assert len(server.requests) == served
    return online, offline, plain, expected


@pytest.mark.parametrize("process", ["online", "offline"])
def test_what_was_pushed_loads_by_name_and_revision(loading, process):
    answers, expected = loading[0 if process == "online" else 1], loading[3]
    for name, source in {
        "ours": "ours_main",
        "ours_v2": "ours_v2",
        "upstream": "upstream_main",
        "upstream_v2": "upstream_v2",
    }.items():
        class_name, logits = answers[name]
        assert class_name == "EoMTForUniversalSegmentation"
        # The same code on the same machine; upstream's own differs in the order of sums.
        torch.testing.assert_close(logits, expected[source], atol=2e-5, rtol=1e-5)
    assert max(abs(a - b) for a, b in zip(answers["ours"][1], answers["ours_v2"][1], strict=True)) > 0.5


@pytest.mark.parametrize("name", ["ours", "upstream"])
def test_tokens_and_revisions_are_honoured_on_load(loading, name):
    answers = loading[0]
    assert isinstance(answers[f"{name}_right_token"], list)
    assert f"tester/{name}_private" in answers[f"{name}_wrong_token"]
    assert "Invalid credentials" in answers[f"{name}_wrong_token"]
    assert f"tester/{name}_private is not a local folder" in answers[f"{name}_other_token"]
    assert "having permission to this repo" in answers[f"{name}_other_token"]
    assert "v3 is not a valid git identifier" in answers[f"{name}_no_revision"]


def test_what_is_not_there_is_named(loading):
    online, offline, _, _ = loading
    assert "tester/nothing is not a local folder and is not a valid model identifier" in online["no_repository"]
    for missing in ("not_cached", "not_cached_revision"):
        assert "couldn't find them in the cached files" in offline[missing]
    assert "cannot load tester/nothing" in online["explained_repository"]
    assert "hf auth login" in online["explained_repository"]
    assert "cannot load tester/upstream: the Hub repository has no such revision" in online["explained_revision"]
    assert "cannot load tester/nothing" in offline["explained_offline"]
    assert "HF_HUB_OFFLINE" in offline["explained_offline"]


def test_examples_of_the_card_run(loading):
    answers = loading[0]
    assert answers["stuff"] == [3, 4]
    assert answers["example_map"] == [70, 90]
    assert answers["example_pipeline"]


def test_push_to_hub_of_transformers_is_unharmed_and_carries_no_code(loading):
    _, _, plain, _ = loading
    assert {"config.json", "preprocessor_config.json", "model.safetensors", "README.md"} == set(plain)
    assert EoMTConfig.from_dict(json.loads(plain["config.json"])).num_queries == 7
