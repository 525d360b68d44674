"""Publishing on a Hub on loopback: what is sent, what is kept, and what is refused before anything is sent."""

import json
import re
import shutil
import socket
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from hf_segvit.cli import main
from hf_segvit.hub.model_card import GENERATED_MARK, REPOSITORY_PLACEHOLDER, make_model_card
from hf_segvit.hub.push import push_to_hub
from hf_segvit.hub.remote_code import code_files
from hf_segvit.models.configuration_eomt import EoMTConfig
from hf_segvit.models.image_processing_eomt import EoMTImageProcessor

from .hub_server import READ_TOKEN, WRITE_TOKEN, File, HubServer
from .tiny_models import tiny_eomt

RESULTS = {
    "task": "panoptic",
    "dataset": "Generated scenes",
    "split": "test",
    "metrics": {"PQ": 51.25, "PQ things": 40},
}
CHECKPOINT_FILES = {"config.json", "preprocessor_config.json", "model.safetensors"}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with HubServer() as server:
        server.stand_in(monkeypatch, tmp_path / "cache")
        yield server


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    tiny_eomt().save_pretrained(folder)
    EoMTImageProcessor(size=64, stuff_classes=[3, 4]).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "checkpoint"))


def edit_json(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# What is published


def test_push_publishes_checkpoint_card_and_code_in_one_commit_and_nothing_else(hub, folder):
    (folder / "results.json").write_text(json.dumps(RESULTS))
    for junk in ("optimizer.pt", "pytorch_model.bin", "events.log", ".netrc", "notes.py"):
        (folder / junk).write_bytes(b"junk")
    (folder / "checkpoint-10").mkdir()
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}

    commit = push_to_hub(folder, "tester/tiny", private=True)

    published = hub.files("tester/tiny")
    code = {path.name: path.read_bytes() for path in code_files("segvit_eomt")}
    assert set(published) == CHECKPOINT_FILES | {"README.md", "results.json"} | set(code)
    assert published.items() >= code.items()
    assert published["model.safetensors"] == before["model.safetensors"]
    assert hub.repositories["tester/tiny"].private
    assert commit.oid == hub.repositories["tester/tiny"].branches["main"]
    assert len([path for method, path in hub.requests if "/commit/" in path]) == 1
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before

    config = json.loads(published["config.json"])
    assert config["auto_map"] == {
        "AutoConfig": "configuration_eomt.EoMTConfig",
        "AutoModel": "modeling_eomt.EoMTModel",
        "AutoModelForSemanticSegmentation": "modeling_eomt.EoMTForUniversalSegmentation",
        "AutoModelForUniversalSegmentation": "modeling_eomt.EoMTForUniversalSegmentation",
    }
    assert {k: v for k, v in config.items() if k != "auto_map"} == json.loads(before["config.json"])
    processor = json.loads(published["preprocessor_config.json"])
    assert processor["auto_map"] == {"AutoImageProcessor": "image_processing_eomt.EoMTImageProcessor"}


def test_push_without_code_takes_a_leftover_auto_map_out(hub, folder):
    edit_json(folder / "config.json", auto_map={"AutoConfig": "configuration_eomt.EoMTConfig"})
    assert main(["push", str(folder), "tester/tiny", "--no-code"]) == 0
    published = hub.files("tester/tiny")
    assert set(published) == CHECKPOINT_FILES | {"README.md"}
    assert "auto_map" not in json.loads(published["config.json"])
    assert b"trust_remote_code" not in published["README.md"]


def test_push_takes_a_model_with_its_processor(hub, saved):
    push_to_hub(tiny_eomt(), "tester/tiny", processor=EoMTImageProcessor.from_pretrained(saved))
    assert hub.files("tester/tiny")["model.safetensors"] == (saved / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="processor="):
        push_to_hub(tiny_eomt(), "tester/tiny")


def test_second_push_replaces_weights_of_another_layout(hub, folder, tmp_path):
    push_to_hub(folder, "tester/tiny")
    sharded = tmp_path / "sharded"
    tiny_eomt().save_pretrained(sharded, max_shard_size="20KB")
    shutil.copy(folder / "preprocessor_config.json", sharded)
    shards = {path.name for path in sharded.glob("model-*.safetensors")}
    assert len(shards) > 1

    push_to_hub(sharded, "tester/tiny")
    weights = {name for name in hub.files("tester/tiny") if ".safetensors" in name}
    # model.safetensors of the first push is gone: from_pretrained would prefer it to the new shards.
    assert weights == shards | {"model.safetensors.index.json"}
    push_to_hub(folder, "tester/tiny")
    assert {name for name in hub.files("tester/tiny") if ".safetensors" in name} == {"model.safetensors"}


def test_revision_makes_a_branch_and_pull_requests_leave_main_alone(hub, folder, capsys):
    push_to_hub(folder, "tester/tiny")
    (folder / "LICENSE").write_text("MIT")
    assert main(["push", str(folder), "tester/tiny", "--revision", "v2"]) == 0
    assert "LICENSE" in hub.files("tester/tiny", "v2")
    assert main(["push", str(folder), "tester/tiny", "--create-pr"]) == 0
    assert "LICENSE" in hub.files("tester/tiny", "refs/pr/1")
    assert "LICENSE" not in hub.files("tester/tiny")
    assert f"published: {hub.url}/tester/tiny/discussions/1" in capsys.readouterr().out


def test_dry_run_lists_files_and_sends_nothing(hub, folder, capsys):
    (folder / "optimizer.pt").write_bytes(b"junk")
    assert main(["push", str(folder), "tester/tiny", "--dry-run"]) == 0
    output = capsys.readouterr().out
    size = (folder / "model.safetensors").stat().st_size
    assert re.search(rf"model\.safetensors +{size:,} bytes", output)
    assert "left out: optimizer.pt" in output
    assert hub.requests == []


# The card


def test_card_made_before_the_repository_was_known_is_completed(hub, folder):
    config, processor = EoMTConfig.from_pretrained(folder), EoMTImageProcessor.from_pretrained(folder)
    (folder / "README.md").write_text(make_model_card(config, processor, training_data="Scenes."))
    push_to_hub(folder, "tester/tiny")
    published = hub.files("tester/tiny")["README.md"].decode()
    assert 'from_pretrained("tester/tiny", trust_remote_code=True)' in published
    assert "Scenes." in published
    assert REPOSITORY_PLACEHOLDER not in published
    push_to_hub(folder, "tester/tiny", with_code=False)
    published = hub.files("tester/tiny")["README.md"].decode()
    assert 'from_pretrained("tester/tiny")' in published
    assert "trust_remote_code" not in published


def test_cards_that_people_wrote_survive(hub, folder):
    push_to_hub(folder, "tester/tiny")
    made = hub.files("tester/tiny")["README.md"]
    assert GENERATED_MARK.encode() in made

    (folder / "results.json").write_text(json.dumps(RESULTS))
    push_to_hub(folder, "tester/tiny")
    assert b"51.25" in hub.files("tester/tiny")["README.md"]  # a made card is made anew

    repository = hub.repositories["tester/tiny"]
    edited = made.replace(GENERATED_MARK.encode(), b"My own words.")
    repository.commit("main", repository.commits[repository.find("main")] | {"README.md": File(edited, lfs=False)})
    push_to_hub(folder, "tester/tiny")
    assert hub.files("tester/tiny")["README.md"] == edited

    (folder / "README.md").write_text(f"# Mine\n\nLoad {REPOSITORY_PLACEHOLDER}.\n")
    push_to_hub(folder, "tester/tiny")
    assert hub.files("tester/tiny")["README.md"] == b"# Mine\n\nLoad tester/tiny.\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "results.json: not JSON"),
        ('{"task": "panoptic", "metrics": {"PQ": 1}}', "lacks dataset, split"),
        (json.dumps(RESULTS | {"metrics": {"PQ": float("nan")}}), "metric PQ is nan"),
        (json.dumps(RESULTS | {"metrics": {"PQ": "51"}}), "metric PQ is '51'"),
        (json.dumps(RESULTS | {"metrics": {}}), "metrics is {}"),
    ],
)
def test_unusable_results_are_refused(hub, folder, content, message):
    (folder / "results.json").write_text(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        push_to_hub(folder, "tester/tiny")
    assert hub.requests == []


# What is refused before anything is sent


def remove(name):
    return lambda folder: (folder / name).unlink()


def other_type(folder):
    edit_json(folder / "config.json", model_type="eomt")


def wrong_type_of_field(folder):
    edit_json(folder / "config.json", hidden_size="wide")


def bad_field(folder):
    edit_json(folder / "config.json", num_attention_heads=3)


def unknown_stuff(folder):
    edit_json(folder / "preprocessor_config.json", stuff_classes=[5])


def base_model(folder):
    edit_json(folder / "config.json", architectures=["EoMTModel"])


def truncated(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def edit_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def not_finite(folder):
    edit_weights(folder, lambda weights: weights["class_predictor.bias"].fill_(float("nan")))


def lacking(folder):
    edit_weights(folder, lambda weights: weights.pop("class_predictor.bias"))


def superfluous(folder):
    edit_weights(folder, lambda weights: weights.update(extra=torch.zeros(1)))


def other_shape(folder):
    edit_weights(folder, lambda weights: weights.update({"class_predictor.bias": torch.zeros(7)}))


def shard_outside(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../secret.safetensors"}}')


def shard_missing(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00001.safetensors"}}')


def pickle_only(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove("config.json"), "config.json: missing"),
        (remove("preprocessor_config.json"), "preprocessor_config.json: missing; save the image processor"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json: not JSON"),
        (other_type, "model_type is 'eomt'; load it with EoMTForUniversalSegmentation"),
        (wrong_type_of_field, "hidden_size"),
        (bad_field, "num_attention_heads=3 does not divide"),
        (unknown_stuff, "stuff_classes names [5], but the classes of config.json are 0 to 4"),
        (base_model, "architectures is ['EoMTModel']"),
        (truncated, "the file is cut short, fetch it again"),
        (not_finite, "class_predictor.bias holds NaN or infinity (6 of 6 values)"),
        (lacking, "1 parameters are missing, such as 'class_predictor.bias'; save model and"),
        (superfluous, "1 unknown to the model, such as 'extra'"),
        (other_shape, "'class_predictor.bias' has shape (7,) instead of (6,)"),
        (shard_outside, "names '../secret.safetensors'"),
        (shard_missing, "names model-00001-of-00001.safetensors, which is missing"),
        (pickle_only, "pytorch_model.bin is a pickle, convert it"),
        (shutil.rmtree, "no such folder"),
    ],
)
def test_checkpoints_that_would_not_load_are_refused(hub, folder, damage, message):
    damage(folder)
    with pytest.raises(ValueError, match=re.escape(message)):
        push_to_hub(folder, "tester/tiny")
    assert hub.requests == []


@pytest.mark.parametrize(
    ("repo_id", "arguments", "message"),
    [
        ("tiny", {}, "lacks the owner"),
        ("tester/with space", {}, "is no name of a repository"),
        ("tester/tiny", {"create_pr": True, "revision": "v2"}, "drop one"),
        ("tester/tiny", {"commit_message": ""}, "commit_message is empty"),
    ],
)
def test_arguments_are_checked_before_anything_is_sent(hub, folder, repo_id, arguments, message):
    with pytest.raises(ValueError, match=message):
        push_to_hub(folder, repo_id, **arguments)
    assert hub.requests == []


def test_command_tells_errors_in_one_line_and_exits_with_2(hub, folder, capsys):
    (folder / "preprocessor_config.json").unlink()
    assert main(["push", str(folder), "tester/tiny"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("hf-segvit push: error:")
    assert "preprocessor_config.json: missing" in line


# What the Hub refuses


def test_private_push_to_a_public_repository_is_refused(hub, folder):
    push_to_hub(folder, "tester/tiny")
    before = dict(hub.repositories["tester/tiny"].branches)
    with pytest.raises(ValueError, match="exists and is public"):
        push_to_hub(folder, "tester/tiny", private=True)
    assert hub.repositories["tester/tiny"].branches == before


@pytest.mark.parametrize(
    ("token", "repo_id", "message"),
    [
        ("hf_wrong", "tester/tiny", "does not accept the access token; run `hf auth login`"),
        (READ_TOKEN, "tester/tiny", "may not write to tester/tiny"),
        (WRITE_TOKEN, "somebody/tiny", "may not write to somebody/tiny"),
    ],
)
def test_refused_tokens_are_explained(hub, folder, token, repo_id, message):
    with pytest.raises(OSError, match=message):
        push_to_hub(folder, repo_id, token=token)
    assert hub.repositories == {}


def test_missing_pull_request_is_explained(hub, folder):
    with pytest.raises(OSError, match="tester/tiny has no revision 'refs/pr/7'"):
        push_to_hub(folder, "tester/tiny", revision="refs/pr/7")


def test_missing_token_offline_mode_and_network_are_explained(hub, folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ValueError, match="no access token: run `hf auth login`"):
        push_to_hub(folder, "tester/tiny")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        with pytest.raises(OSError, match=r"cannot reach http://127\.0\.0\.1:\d+ .* check the network"):
            push_to_hub(folder, "tester/tiny", token=WRITE_TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="offline mode is on"):
        push_to_hub(folder, "tester/tiny", token=WRITE_TOKEN)
    assert hub.requests == []
