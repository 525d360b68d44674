"""The class head of a model that goes on from a checkpoint: rows by name, never silently by order."""

import re

import pytest
import torch
from torch import nn

from hf_segvit import EoMTImageProcessor
from hf_segvit.data.reading import describe, load_segmentation_dataset
from hf_segvit.training.loop import train
from hf_segvit.training.start import carry_over_classes
from hf_segvit.training.tasks.eomt import EoMTTask

from .tiny_models import tiny_eomt
from .tiny_training import tiny_recipe

BEFORE = {0: "Road", 1: "traffic light", 2: "cat", 3: "tree"}
WIDTH = 6


def head(num_rows, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(WIDTH, num_rows)


@pytest.mark.parametrize("extra", [0, 1], ids=["classes alone", "with no object"])
@pytest.mark.parametrize(
    ("names", "rows", "said"),
    [
        (["Road", "traffic light", "cat", "tree"], [0, 1, 2, 3], None),
        (["tree", "road", "cat", "traffic-light"], [3, 0, 2, 1], None),
        (["zebra", "road", "cat", "lamp"], [None, 0, 2, None], r"2 of 4 .* 2 are new \('zebra', 'lamp'\)"),
        (["tree", "zebra"], [3, None], r"1 of 2 classes are carried over .*, 1 are new \('zebra'\)"),
        (["car", "Tree", "bus", "road", "van"], [None, 3, None, 0, None], r"2 of 5 .* 3 are new"),
        (["a", "b", "c", "d"], [None] * 4, r"0 of 4 .* 4 are new \('a', 'b', 'c', 'd'\)"),
    ],
)
def test_rows_follow_names(names, rows, said, extra):
    before, ours = head(4 + extra), head(len(names) + extra, seed=1)
    made_up = ours.weight.detach().clone()
    with torch.no_grad():  # as where `from_pretrained` kept the rows of as many other classes
        ours.weight.fill_(7.0)
        ours.bias.fill_(7.0)
    remark = carry_over_classes(ours, before, dict(enumerate(names)), BEFORE)
    for row, source in enumerate([*rows, *([4] if extra else [])]):
        if source is not None:
            assert torch.equal(ours.weight[row], before.weight[source])
            assert ours.bias[row] == before.bias[source]
        else:
            assert not any(torch.equal(ours.weight[row], other) for other in (*before.weight, *made_up))
            # PyTorch's own initial values lie in +-1/sqrt(D).
            assert max(ours.weight[row].abs().max(), ours.bias[row].abs()) <= WIDTH**-0.5
    if said is None:
        assert remark is None
    else:
        assert re.search(said, remark)


def test_a_checkpoint_without_names_is_taken_in_order_and_that_is_said():
    unnamed = {number: f"LABEL_{number}" for number in range(4)}
    before, ours = head(5), head(5, seed=1)
    remark = carry_over_classes(ours, before, BEFORE, unnamed)
    assert torch.equal(ours.weight, before.weight)
    assert "4 classes have no names and are taken in order" in remark
    before, ours = head(4), head(5, seed=1)
    assert "0 of 4 classes" in carry_over_classes(ours, before, BEFORE, dict(list(unnamed.items())[:3]))


def checkpoint(folder, id2label):
    model = tiny_eomt(id2label=id2label, label2id={name: number for number, name in id2label.items()})
    model.save_pretrained(folder)
    EoMTImageProcessor(size=64).save_pretrained(folder)
    return model


def test_training_says_which_classes_are_new(tmp_path, capsys):
    recipe = tiny_recipe(tmp_path / "run", steps=1, warmup_steps=[0], model_config={}, init=str(tmp_path / "before"))
    names = describe(load_segmentation_dataset(recipe.data, split="train", task="panoptic")).id2label
    count = len(names)
    last = count - 1

    reversed_names = {last - number: name for number, name in names.items()}
    before = checkpoint(tmp_path / "before", dict(sorted(reversed_names.items())))
    task = EoMTTask(recipe)
    model, _ = task.build_model()
    assert task.remarks == []
    rows = [*range(last, -1, -1), count]
    assert torch.equal(model.class_predictor.weight, before.class_predictor.weight[rows])
    assert torch.equal(model.class_predictor.bias, before.class_predictor.bias[rows])
    assert model.config.id2label == names

    # As many classes, all but one of other names: their rows used to stay, as if they were the data's.
    other = {0: names[0], **{number: f"thing {number}" for number in range(1, count)}}
    before = checkpoint(tmp_path / "before", other)
    task = EoMTTask(recipe)
    model, _ = task.build_model()
    same = (model.class_predictor.weight == before.class_predictor.weight).all(dim=1).tolist()
    assert same == [True] + [False] * last + [True]
    assert torch.equal(model.eomt.query.weight, before.eomt.query.weight)
    train(recipe, cpu=True)
    assert f"class head: 1 of {count} classes are carried over" in capsys.readouterr().err
