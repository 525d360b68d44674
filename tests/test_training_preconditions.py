"""What is refused before the first step, and leaves no folder behind."""

import pytest
import yaml

from hf_segvit.cli import main
from hf_segvit.hub import push as hub
from hf_segvit.training import loop as preconditions
from hf_segvit.training.loop import check_keep_best, check_trackers
from hf_segvit.training.tasks import task_for

from .test_training_vit_p import recipe as point_recipe
from .tiny_training import tiny_recipe


@pytest.fixture
def recipe_file(tmp_path):
    file = tmp_path / "tiny.yaml"
    recipe = tiny_recipe(tmp_path / "run")
    file.write_text(yaml.safe_dump({name: value for name, value in recipe.to_dict().items() if name != "name"}))
    return file


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trackers=[wandb]"], "trackers has wandb, which is not installed: pip install wandb"),
        (["trackers=[tensorbord]"], "trackers has 'tensorbord'; did you mean tensorboard?"),
        (["push_to_hub=me/tiny"], "push_to_hub=me/tiny: no access token: run `hf auth login`"),
        (["push_to_hub=tiny"], "push_to_hub=tiny: repo_id='tiny' lacks the owner"),
        (["keep_best=mIOU", "task=semantic"], "keep_best='mIOU' is no score of this task; did you mean mean_iou?"),
        (["data=generated:none"], "choose generated:easy"),
        (["val_data=generated:none"], "choose generated:easy"),
        (["batch_size=5", "device_batch_size=2"], "does not divide"),
        (["output=FILE"], "is a file or a device"),
    ],
)
def test_a_start_that_is_refused_leaves_nothing(recipe_file, arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(preconditions, "get_available_trackers", lambda: ["tensorboard"])
    monkeypatch.setattr(hub, "get_token", lambda: None)
    words = [word.replace("FILE", str(recipe_file)) for word in arguments]
    assert main(["train", str(recipe_file), *words, "--cpu"]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]


def test_offline_there_is_nothing_to_push_to(monkeypatch):
    monkeypatch.setattr(hub, "get_token", lambda: "a token")
    preconditions.check_publishing("me/tiny")
    preconditions.check_publishing(None)
    monkeypatch.setattr(hub, "is_offline_mode", lambda: True)
    with pytest.raises(ValueError, match=r"push_to_hub=me/tiny: offline mode is on.*hf-segvit push"):
        preconditions.check_publishing("me/tiny")


def test_trackers_that_are_there_are_fine():
    check_trackers(["tensorboard", "all"])
    check_trackers([])


def test_the_scores_of_a_task_are_known_before(tmp_path):
    names = task_for(tiny_recipe(tmp_path)).score_names
    assert {"pq", "pq_stuff", "sq_things"} <= set(names)
    assert "num_classes" not in names
    assert "mean_iou" in task_for(tiny_recipe(tmp_path, task="semantic")).score_names
    points = {"evaluate": ["random", "interior"]}
    names = task_for(point_recipe(tmp_path, points=points)).score_names
    assert {"top_1", "interior_top_1", "num_points"} <= set(names)
    assert not any(name.startswith("generator_") for name in names)
    check_keep_best("interior_top_1", names)
    check_keep_best(None, names)
    check_keep_best("whatever", ())
    with pytest.raises(ValueError, match=r"keep_best='pq' is no score of this task; choose one of top_1"):
        check_keep_best("pq", names)
