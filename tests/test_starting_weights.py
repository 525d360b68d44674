"""A checkpoint at another input size, patch size or number of queries: resampled like a backbone, or said to be new."""

import pytest
import torch

from hf_segvit import EoMTForUniversalSegmentation, PlainViTModel, ViTPForPointClassification
from hf_segvit.training.start import load_changed

from .tiny_generators import tiny_classifier
from .tiny_models import tiny_eomt


@pytest.mark.parametrize("fields", [{"image_size": 96}, {"image_size": [32, 80]}, {"image_size": 64, "patch_size": 8}])
def test_positions_and_patches_are_resampled_as_those_of_a_backbone(fields, tmp_path):
    before = tiny_eomt()
    before.save_pretrained(tmp_path)
    model, remarks = load_changed(EoMTForUniversalSegmentation, str(tmp_path), before, "class_predictor.", fields)
    backbone = PlainViTModel.from_backbone(str(_plain(before, tmp_path / "vit")), **fields)
    for name in ("embeddings.position_embeddings.weight", "embeddings.patch_embeddings.projection.weight"):
        assert torch.equal(model.eomt.get_parameter(name), backbone.get_parameter(name))
    assert torch.equal(model.eomt.query.weight, before.eomt.query.weight)
    assert len(remarks) == 1
    assert remarks[0].startswith("position embeddings: resampled from 4x4 to ")


def _plain(model, folder):
    """The ViT of a model as a checkpoint of its own."""
    from hf_segvit import PlainViTConfig

    names = PlainViTConfig().to_dict().keys() - {"architectures", "model_type", "transformers_version", "dtype"}
    vit = PlainViTModel(PlainViTConfig(**{name: getattr(model.config, name) for name in names}))
    own = model.eomt.state_dict()
    vit.load_state_dict({name: own[name] for name in vit.state_dict()})
    vit.save_pretrained(folder)
    return folder


def test_what_is_new_is_said_and_the_rest_is_kept(tmp_path, capfd):
    before = tiny_eomt()
    before.save_pretrained(tmp_path)
    model, remarks = load_changed(
        EoMTForUniversalSegmentation,
        str(tmp_path),
        before,
        "class_predictor.",
        {"num_queries": 9, "id2label": {0: "a", 1: "b"}},
    )
    assert remarks == [
        f"eomt.query.weight: new, as its size is 9x32, but {before.config.num_queries}x32 in the checkpoint"
    ]
    assert torch.equal(model.eomt.layers[1].mlp.fc1.weight, before.eomt.layers[1].mlp.fc1.weight)
    assert model.dtype == torch.float32
    assert "MISMATCH" not in capfd.readouterr().err


def test_nothing_is_said_where_nothing_changes(tmp_path):
    before = tiny_eomt()
    before.save_pretrained(tmp_path)
    model, remarks = load_changed(EoMTForUniversalSegmentation, str(tmp_path), before, "class_predictor.", {})
    assert remarks == []
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.state_dict().items())


def test_a_point_classifier_too(tmp_path):
    before = tiny_classifier()
    before.save_pretrained(tmp_path)
    model, remarks = load_changed(
        ViTPForPointClassification, str(tmp_path), before, "classifier.", {"image_size": [28, 84]}
    )
    assert remarks == ["position embeddings: resampled from 4x4 to 2x6 patches"]
    table = before.vit_p.embeddings.position_embeddings.weight
    resampled = model.vit_p.embeddings.position_embeddings.weight
    assert resampled.shape == (12, 32)
    assert resampled.mean().item() == pytest.approx(table.mean().item(), abs=0.1)
    assert torch.equal(
        model.classifier.state_dict()[next(iter(model.classifier.state_dict()))],
        next(iter(before.classifier.state_dict().values())),
    )


def test_sizes_that_are_no_multiples_are_refused(tmp_path):
    before = tiny_eomt()
    before.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not a multiple of patch_size=16"):
        load_changed(EoMTForUniversalSegmentation, str(tmp_path), before, "class_predictor.", {"image_size": 70})
