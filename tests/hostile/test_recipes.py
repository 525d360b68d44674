"""Recipes of strangers and of slips: every field takes any value of JSON or refuses it by its name, before a run."""

import contextlib
import dataclasses
import io
import json
import os

import pytest
import torch
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hf_segvit.cli import main
from hf_segvit.training.declarations import shown
from hf_segvit.training.derivation import derive
from hf_segvit.training.guards import TrainingFailed
from hf_segvit.training.loop import train
from hf_segvit.training.recipe import FIELDS, Recipe, load_recipe

from ..tiny_training import tiny_recipe

HUGE, LONG = 10**400, 10**5000
NUMBERS = [0, -0.0, -1, 1, 3, 0.5, 1e12, 1e300, float("inf"), float("-inf"), float("nan"), HUGE, -HUGE, True, False]
TEXTS = ["", "x", "\0", "a\nb", "\ud800", "1e999999999", "nan", "../../x", "os.system", "os:system", "9" * 5000]
LEAVES = [*NUMBERS, *TEXTS, None]
OTHERS = [
    [],
    {},
    [1, "a", None],
    {"a": 1},
    [[0, 1]],
    [float("nan")],
    {"rank": HUGE},
    {"": {}},
    [[[[[]]]]],
    ["os:system"],
]
# Fields that a plan without data, weights and Hub does not look at further than the recipe does.
TRAINED = ("data", "val_data", "init", "backbone", "train_split", "val_split", "keep_best", "trackers", "callbacks")


def json_values():
    scalars = st.sampled_from(LEAVES) | st.integers() | st.floats() | st.text(max_size=8)
    return st.sampled_from(OTHERS) | st.recursive(
        scalars,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
        max_leaves=6,
    )


def plan_or_refusal(name: str, fields: dict) -> None:
    """A recipe has a plan, or a `ValueError` names the field in a text of ordinary length."""
    try:
        recipe = Recipe(**{**fields})
        json.dumps(recipe.to_dict())
        derive(recipe, 100)
    except ValueError as error:
        said = str(error)
        assert name in said, said
        assert len(said) < 2000
        assert "\0" not in said


@pytest.mark.parametrize("model", ["eomt", "vit_p"])
@pytest.mark.parametrize("name", sorted(FIELDS))
def test_no_value_of_a_field_escapes(name, model):
    for value in [*LEAVES, *OTHERS]:
        fields = {"model": model, "steps": 100, name: value}
        if name == "epochs":
            del fields["steps"]
        plan_or_refusal(name, fields)


@pytest.mark.slow
@settings(max_examples=3000, deadline=None, derandomize=True)
@given(st.sampled_from(sorted(FIELDS)), json_values())
@example("annealing", [["1e-999999999", 1]])
@example("seed", LONG)
def test_no_value_of_json_escapes(name, value):
    fields = {"steps": 100, name: value}
    if name == "epochs":
        del fields["steps"]
    plan_or_refusal(name, fields)


EXPLAINED = {
    **{"data": "generated:easy?num_scenes=3&size=64", "train_split": "train", "image_size": 64, "steps": 4},
    "model_config": {
        **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48},
        **{"num_queries": 5, "num_query_layers": 1, "hidden_act": "gelu"},
    },
    **{"augmentation": "eomt_semantic", "augmentation_options": {"scale_range": [0.8, 1.5]}, "num_workers": 0},
    **{"trackers": [], "output": "runs/x", "cache": "cache"},
}
WITHIN = {
    "model_config": [
        *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_queries", "num_query_layers", "hidden_act"),
        *("return_dict", "num_upscale_blocks", "drop_path_rate", "layer_norm_eps", "masked_attention", "id2label"),
        *("position_embedding_type", "patch_size", "image_size", "num_channels", "no_such_field", "oversample_ratio"),
    ],
    "augmentation_options": ["scale_range", "color_jitter", "flip_probability", "max_tries", "no_such_option"],
    "lora": ["rank", "alpha", "dropout", "targets", "no_such_key"],
    "points": ["num_points", "source", "box_share", "coarse_margin", "mixture", "evaluate", "no_such_key"],
}


def explained(fields: dict, where: str, tmp_path) -> None:
    """`--explain` works, or one line names the field."""
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(fields, allow_unicode=False))
    said, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors):
        code = main(["train", str(path), "--explain"])
    text = errors.getvalue()
    assert code in (0, 2), text
    if code == 0:
        assert "parameters in" in said.getvalue()
        return
    last = text.strip().splitlines()[-1]
    assert last.startswith("hf-segvit train: error:"), text
    assert len(last) < 2000
    assert any(word in last for word in where.split(".")), (last, where)


@pytest.mark.slow
@pytest.mark.parametrize("field", WITHIN)
def test_no_value_within_a_field_escapes(field, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for key in WITHIN[field]:
        for value in (
            *(n for n in NUMBERS if n not in (1e300, -HUGE)),
            "os.system",
            "x",
            None,
            [1, 2],
            {"a": 1},
            [HUGE],
        ):
            fields = {**EXPLAINED, field: {**EXPLAINED.get(field, {}), key: value}}
            if field == "points":
                fields |= {"model": "vit_p", "model_config": {}, "augmentation": "vit_p", "augmentation_options": {}}
                with contextlib.suppress(ValueError):
                    Recipe(**fields)
                    from hf_segvit.training.tasks.vit_p import point_settings

                    point_settings(fields["points"])
                continue
            explained(fields, f"{field}.{key}.{value}", tmp_path)


class TestFiles:
    def refusal(self, capsys, *words: str) -> str:
        capsys.readouterr()
        assert main(["train", *words]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("hf-segvit train: error:")
        return line

    def test_files_that_are_none(self, tmp_path, capsys):
        os.mkfifo(tmp_path / "pipe")
        for path in ("/dev/zero", str(tmp_path), str(tmp_path / "pipe")):
            assert "is a folder or a device; give a YAML file" in self.refusal(capsys, path)
        assert "there is no user" in self.refusal(capsys, "~nobody-of-this-name/x.yaml")
        assert "cannot be opened" in self.refusal(capsys, "x" * 300)
        assert "holds a null character" in self.refusal(capsys, "a\0b")
        with open(tmp_path / "big.yaml", "wb") as file:
            file.truncate(2**33)
        assert "which no recipe needs" in self.refusal(capsys, str(tmp_path / "big.yaml"))

    @pytest.mark.parametrize(
        ("text", "told"),
        [
            ("", "and this is empty"),
            ("5", "and this is not a whole number"),
            ("model_config: !!python/object/apply:os.system [id]", "no valid YAML"),
            ("steps: !!timestamp 5", "r.yaml"),
            ("steps: !!int ''", "r.yaml"),
            ("compile: !!bool foo", "r.yaml"),
            ("model_config: " + "[" * 30 + "]" * 30, "nested more than 12 deep"),
            ("model_config: " + "[" * 60 + "]" * 60, "nested too deep, more than 50 levels"),
            ("betas: &a [*a, *a]", "betas"),
            ("steps: " + "9" * 5000, "r.yaml"),
            ("? [a]\n: 1", "r.yaml"),
            ("1: 2", "a recipe has no key 1"),
            ("name: ../../etc/x", "give a short name without slashes"),
        ],
    )
    def test_texts_that_are_none(self, tmp_path, capsys, text, told):
        (tmp_path / "r.yaml").write_text(text)
        line = self.refusal(capsys, str(tmp_path / "r.yaml"))
        assert told in line
        assert len(line) < 1500

    def test_an_alias_bomb_is_small(self, tmp_path, capsys):
        lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
        lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
        (tmp_path / "r.yaml").write_text("model_config:\n  " + "\n  ".join(lines))
        assert len(self.refusal(capsys, str(tmp_path / "r.yaml"))) < 1500

    def test_a_recipe_in_another_encoding(self, tmp_path, capsys):
        (tmp_path / "r.yaml").write_bytes(b"name: caf\xe9")
        assert "is no text; give a YAML file in UTF-8" in self.refusal(capsys, str(tmp_path / "r.yaml"))


class TestFolders:
    @pytest.mark.parametrize("explain", [[], ["--explain"]])
    def test_devices_and_files_are_no_folders(self, tmp_path, capsys, explain):
        recipe, mine = tmp_path / "r.yaml", tmp_path / "mine.txt"
        recipe.write_text(yaml.safe_dump({**EXPLAINED, "output": str(tmp_path / "out"), "cache": False}))
        mine.write_text("mine")
        refusal = TestFiles().refusal
        for path in ("/dev/null", "/dev/null/x", str(mine), str(mine / "x")):
            for name in ("output", "cache"):
                line = refusal(capsys, str(recipe), f"{name}={path}", *explain)
                assert f"{name}={path}: " in line
                assert "and no folder; name another" in line
        assert mine.read_text() == "mine"
        assert not (tmp_path / "out").exists()

    def test_neither_is_written_into_the_other(self, tmp_path, capsys):
        recipe, out = tmp_path / "r.yaml", tmp_path / "out"
        recipe.write_text(yaml.safe_dump({**EXPLAINED, "output": str(out)}))
        for cache in (out, tmp_path, out / "model", out / "checkpoints" / "x", out / "logs" / ".." / "model"):
            assert "would be written into one another" in TestFiles().refusal(capsys, str(recipe), f"cache={cache}")
        assert main(["train", str(recipe), f"cache={out}/cache", "--explain"]) == 0


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("save_every_steps=5", "save_every_steps=5 is beyond the end of the run, which has 4 steps"),
        ("save_every=5 steps", "save_every=5 steps is 5 steps, but the run ends after 4"),
        ("evaluate_every=100", "evaluate_every=100 epochs"),
        ("evaluate_every=1e99 steps", "evaluate_every='1e99 steps' is no interval"),
        ("evaluate_every=.inf", "evaluate_every=inf must be > 0 and <= 1e6"),
        ("num_workers=100000", "num_workers=100000 must be >= 0 and <= 512"),
        ("epochs=1e300", "epochs=1e+300 must be > 0 and <= 1e6"),
        ("steps=1e12", "steps=1000000000000.0 must be > 0 and <= 10000000"),
        ("learning_rate=.inf", "learning_rate=inf must be > 0 and <= 1000"),
        ("weight_decay=.nan", "weight_decay=nan must be >= 0 and <= 100"),
        ("lora=[16]", "lora=[16] does not fit; expected key: value pairs or null"),
        ("augmentation_options=5", "augmentation_options=5 does not fit"),
        ("augmentation_options.scale_range=[.inf, .inf]", "scale_range"),
        ("model_config.return_dict=false", "model_config has no field 'return_dict'"),
        ("model_config.hidden_act=os.system", "model_config.hidden_act='os.system' is no activation"),
        ("model_config.num_hidden_layers=1e12", "model_config.num_hidden_layers=1000000000000.0 must be"),
        ("push_to_hub=/etc/passwd", "push_to_hub=/etc/passwd"),
    ],
)
def test_it_is_told_before_a_run_starts(tmp_path, capsys, override, told):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump({**EXPLAINED, "output": str(tmp_path / "out"), "cache": False}))
    words = [override, "steps=null"] if override.startswith("epochs") else [override]
    line = TestFiles().refusal(capsys, str(recipe), *words)
    assert told in line
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_a_push_that_would_be_refused_is_refused_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    monkeypatch.setattr("getpass.getuser", lambda: "jane.doe")
    steps: list[int] = []
    recipe = tiny_recipe(tmp_path / "a", push_to_hub="nobody")
    with pytest.raises(ValueError, match="push_to_hub=nobody: repo_id='nobody' lacks the owner"):
        train(recipe, cpu=True, on_step=lambda step, loss: steps.append(step))
    monkeypatch.setattr(
        "hf_segvit.training.tasks.eomt.EoMTTask.validation_name",
        lambda self: {"task": "panoptic", "dataset": "mask_folder:jane.doe", "split": "val"},
    )
    recipe = tiny_recipe(tmp_path / "b", push_to_hub="me/tiny")
    with pytest.raises(ValueError, match=r"push_to_hub=me/tiny: .*results\.json, line 2: holds 'jane\.doe', the user"):
        train(recipe, cpu=True, on_step=lambda step, loss: steps.append(step))
    assert steps == []


def test_weights_that_are_not_finite_are_not_scored_saved_or_drawn(tmp_path):
    class Ruin:
        def on_step_end(self, args, state, control, model=None, **others):
            with torch.no_grad():
                model.class_predictor.weight.mul_(float("inf"))

    recipe = tiny_recipe(tmp_path, steps=2, evaluate_every="2 steps", save_every="end", save_every_steps=None, draw=2)
    with pytest.raises(TrainingFailed, match=r"step 2: 1 weights are no longer finite.*Lower learning_rate"):
        train(recipe, cpu=True, callbacks=[Ruin()])
    assert not list(tmp_path.glob("checkpoints/step-*"))
    assert not list(tmp_path.glob("predictions/*"))


def test_an_infinite_learning_rate_meets_the_guard(tmp_path):
    """No recipe file can ask for it, but a program that changes its recipe can."""
    recipe = tiny_recipe(tmp_path, steps=2, evaluate_every="1 steps", save_every_steps=1, warmup_steps=[0], draw=2)
    object.__setattr__(recipe, "learning_rate", float("inf"))
    with pytest.raises(TrainingFailed, match=r"step 1: \d+ weights are no longer finite.*Lower learning_rate"):
        train(recipe, cpu=True, progress=False)
    assert not list(tmp_path.glob("checkpoints/step-*"))
    assert not list(tmp_path.glob("predictions/*"))


def test_values_in_messages_are_short():
    assert shown(LONG) == "a number of 5001 digits"
    assert len(shown([[["x" * 10_000] * 100] * 100] * 100)) < 3000
    assert len(shown({str(number): number for number in range(10_000)})) < 300
    assert shown({"a": [1, "b"], "c": None}) == "{'a': [1, 'b'], 'c': None}"


def test_every_number_has_an_upper_limit():
    for field in dataclasses.fields(Recipe):
        limits = field.metadata["limits"]
        if limits and field.name != "seed":
            assert "<" in limits, f"{field.name} has no upper limit"


def test_packaged_recipes_are_within_the_limits():
    assert load_recipe("own_tiny_semantic", ["save_every=end"]).save_every == "end"
