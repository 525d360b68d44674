"""A checkpoint without its optimiser's state, as DeepSpeed leaves it, is refused with the reason; its weights load."""

import pytest

from hf_segvit import EoMTForUniversalSegmentation
from hf_segvit.training import saving
from hf_segvit.training.loop import train

from .tiny_training import tiny_recipe


def test_a_checkpoint_without_optimizer_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "collect_optimizer", lambda *arguments: None)
    recipe = tiny_recipe(tmp_path, steps=2, warmup_steps=[0])
    train(recipe, cpu=True, progress=False)
    with pytest.raises(ValueError, match=r"saved under DeepSpeed.*init=.*step-00000002"):
        train(recipe, cpu=True, progress=False)
    folder = tmp_path / "checkpoints" / "step-00000002"
    assert EoMTForUniversalSegmentation.from_pretrained(folder).config.architectures == ["EoMTForUniversalSegmentation"]
