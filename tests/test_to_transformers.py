"""Export to Transformers: stock Transformers loads the folder without this package and computes the same."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForUniversalSegmentation, EomtDinov3ForUniversalSegmentation

from hf_segvit.conversion import to_transformers
from hf_segvit.conversion.to_transformers import compare_outputs, export_to_transformers
from hf_segvit.models.image_processing_eomt import EoMTImageProcessor
from hf_segvit.models.modeling_eomt import EoMTForUniversalSegmentation

from .tiny_models import tiny_eomt, tiny_mask2former_vit

# Upstream's names; the width of a gated MLP must be one that upstream derives from the hidden size.
LEARNED = {"intermediate_size": 64}
CASES = {
    "dinov2": LEARNED,
    "without registers": {**LEARNED, "num_register_tokens": 0},
    "dinov2 giant": {"mlp_type": "swiglu", "intermediate_size": 88},
    "without layer scale and key bias": {**LEARNED, "layer_scale_init_value": None, "key_bias": False},
    "patch 14": {**LEARNED, "patch_size": 14, "image_size": 56},
    "dinov3": {"position_embedding_type": "rope", "key_bias": False, "layer_norm_eps": 1e-5},
    "dinov3 with key bias": {"position_embedding_type": "rope", "rope_theta": 50.0},
    "dinov3 gated": {"position_embedding_type": "rope", "mlp_type": "swiglu", "gate_act": "silu", "hidden_act": "silu"},
}
LOAD_WITHOUT_US = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_segvit":
            raise ImportError("hf_segvit is not installed here")

sys.meta_path.insert(0, Block())
import torch
from transformers import AutoImageProcessor, AutoModelForUniversalSegmentation

pixels = torch.linspace(-2, 2, 3 * 64 * 64).view(1, 3, 64, 64)
for folder in sys.argv[1:]:
    model, loading = AutoModelForUniversalSegmentation.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    AutoImageProcessor.from_pretrained(folder)
    with torch.no_grad():
        outputs = model.eval()(pixels)
    torch.save({name: outputs[name] for name in ("class_queries_logits", "masks_queries_logits")}, f"{folder}.pt")
assert "hf_segvit" not in sys.modules
"""


@pytest.mark.parametrize("probability", [0.0, 1.0])
@pytest.mark.parametrize("case", sorted(CASES))
@torch.no_grad()
def test_stock_transformers_computes_the_same(tmp_path, case, probability):
    model = tiny_eomt(**CASES[case], masked_attention_probabilities=[probability] * 2)
    lines = export_to_transformers(model, tmp_path / "out")
    assert any(line.startswith("checked: outputs equal") for line in lines)
    theirs, loading = AutoModelForUniversalSegmentation.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading.values())
    assert type(theirs).__module__.startswith("transformers.models.eomt")
    assert theirs.attn_mask_probs.tolist() == [probability] * 2
    assert theirs.criterion.empty_weight.tolist() == pytest.approx([1.0] * 5 + [0.1])
    pixels = torch.randn(2, 3, *model.config.image_height_width)
    ours, expected = model(pixels), theirs.eval()(pixels)
    # fp32 sums in another order; logits are of order 1 to 10.
    for name in ("class_queries_logits", "masks_queries_logits"):
        torch.testing.assert_close(ours[name], expected[name], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_it_loads_where_this_package_is_not_installed(tmp_path):
    models = {}
    for case in ("dinov2", "dinov3"):
        models[tmp_path / case] = tiny_eomt(**CASES[case], masked_attention_probabilities=[0.0, 1.0])
        export_to_transformers(models[tmp_path / case], tmp_path / case)
    subprocess.run([sys.executable, "-c", LOAD_WITHOUT_US, *map(str, models)], check=True, timeout=300)
    for folder, model in models.items():
        ours = model(torch.linspace(-2, 2, 3 * 64 * 64).view(1, 3, 64, 64))
        for name, expected in torch.load(f"{folder}.pt", weights_only=True).items():
            torch.testing.assert_close(ours[name], expected, atol=1e-5, rtol=1e-5)


def test_other_models_are_refused_by_their_type(tmp_path):
    tiny_mask2former_vit().save_pretrained(tmp_path / "row 0")
    with pytest.raises(ValueError, match=r"config\.json: the model is of type 'segvit_mask2former_vit', which"):
        export_to_transformers(tmp_path / "row 0", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_there_and_back_is_the_same_model(tmp_path):
    model = tiny_eomt(**LEARNED, id2label={0: "cat", 1: "sky"}, label2id={"cat": 0, "sky": 1}, no_object_weight=0.2)
    export_to_transformers(model, tmp_path / "out")
    back = EoMTForUniversalSegmentation.from_pretrained(tmp_path / "out")
    assert all(torch.equal(tensor, back.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert back.config.id2label == {0: "cat", 1: "sky"}
    assert back.config.no_object_weight == 0.2
    assert back.config.masked_attention_probabilities == model.config.masked_attention_probabilities


@pytest.mark.parametrize("task", ["panoptic", "semantic"])
def test_the_image_processor_prepares_images_alike(tmp_path, task):
    model = tiny_eomt(**LEARNED)
    processor = EoMTImageProcessor(task=task, size=64, stuff_classes=[3, 4], image_mean=[0.4, 0.5, 0.6])
    lines = export_to_transformers(model, tmp_path / "out", processor)
    assert any("stuff_classes=[3, 4]" in line for line in lines)
    theirs = AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert type(theirs).__module__.startswith("transformers.models.eomt")
    # Of a size that scales to whole pixels: elsewhere upstream cuts where the official evaluation rounds.
    pixels = np.random.default_rng(0).integers(0, 256, (48, 72, 3), dtype=np.uint8)
    ours, expected = (p(images=[Image.fromarray(pixels)], return_tensors="pt") for p in (processor, theirs))
    assert ours["pixel_values"].shape == expected["pixel_values"].shape
    # Upstream may round the resized 8-bit values the other way: one of 255 steps over the standard deviation.
    torch.testing.assert_close(ours["pixel_values"], expected["pixel_values"], atol=1 / 255 / 0.224 + 1e-4, rtol=0)


def test_half_precision_stays_half(tmp_path):
    export_to_transformers(tiny_eomt(**LEARNED).to(torch.bfloat16), tmp_path / "out")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert weights["query.weight"].dtype == torch.bfloat16
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_probabilities_between_0_and_1_warn(tmp_path):
    model = tiny_eomt(**LEARNED, masked_attention_probabilities=[0.0, 0.3])
    assert any("warning" in line and "random" in line for line in export_to_transformers(model, tmp_path / "out"))
    theirs = AutoModelForUniversalSegmentation.from_pretrained(tmp_path / "out")
    assert theirs.attn_mask_probs.tolist() == pytest.approx([0.0, 0.3])


def test_a_model_that_is_never_masked_has_probabilities_of_0(tmp_path):
    model = tiny_eomt(**LEARNED, masked_attention=False, masked_attention_probabilities=[1.0, 1.0])
    export_to_transformers(model, tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors")["attn_mask_probs"].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"image_size": [64, 96]}, "image_size=64 x 96"),
        ({"position_embedding_type": "rope", "image_size": [64, 96]}, "image_size=64 x 96"),
        ({"position_embedding_type": "learned_rope"}, "position_embedding_type='learned_rope'"),
        ({"position_embedding_type": "rope", "rope_reference_grid": 4}, "rope_reference_grid=4"),
        ({"use_cls_token": False}, "use_cls_token=False"),
        ({"attention_norm": True}, "attention_norm=True"),
        ({"embedding_norm": True}, "embedding_norm=True"),
        ({"mlp_type": "swiglu", "intermediate_size": 88, "mlp_norm": True}, "mlp_norm=True"),
        ({"intermediate_size": 50}, "intermediate_size=50 with hidden_size=32"),
        ({"mlp_type": "swiglu", "intermediate_size": 50}, "intermediate_size=50 with hidden_size=32"),
        ({"mlp_type": "swiglu", "intermediate_size": 88, "gate_act": "gelu"}, "gate_act='gelu'"),
        ({"position_embedding_type": "rope", "mlp_type": "swiglu"}, "gate_act='silu' beside hidden_act='gelu'"),
        ({"masked_attention_probabilities": [1.0, 0.0]}, r"\[1\.0, 0\.0\]: where a masked layer comes before"),
    ],
)
def test_what_cannot_be_expressed_is_refused_and_nothing_written(tmp_path, overrides, message):
    with pytest.raises(ValueError, match=f"Transformers' EoMT cannot express .*{message}"):
        export_to_transformers(tiny_eomt(**{**LEARNED, **overrides}), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_broken_weights_are_refused(tmp_path):
    model = tiny_eomt(**LEARNED)
    with torch.no_grad():
        model.eomt.layernorm.weight[0] = float("nan")
    with pytest.raises(ValueError, match=r"eomt\.layernorm\.weight holds NaN"):
        export_to_transformers(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_export_is_noticed_before_the_folder_appears(tmp_path, monkeypatch):
    """The forward pass would catch a mistake in the translation, here swapped norms."""
    right = to_transformers.transformers_state_dict

    def wrong(*args):
        state_dict = right(*args)
        first, second = "layers.0.norm1.weight", "layers.0.norm2.weight"
        state_dict[first], state_dict[second] = state_dict[second], state_dict[first]
        return state_dict

    monkeypatch.setattr(to_transformers, "transformers_state_dict", wrong)
    with pytest.raises(ValueError, match="does not compute what Transformers' model does"):
        export_to_transformers(tiny_eomt(**LEARNED), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_check_leaves_the_model_as_it_was(tmp_path):
    model = tiny_eomt(**LEARNED, masked_attention_probabilities=[0.25, 1.0]).train()
    export_to_transformers(model, tmp_path / "out")
    assert model.training
    assert model.config.masked_attention_probabilities == [0.25, 1.0]


def test_outputs_that_differ_are_told_apart():
    ones = torch.ones(3)
    assert "equal those of here" in compare_outputs({"x": (ones, ones + 1e-6)}, 1e-5, "here")
    for other in (ones + 1e-3, ones * float("nan")):
        with pytest.raises(ValueError, match="x differs by"):
            compare_outputs({"x": (ones, other)}, 1e-5, "here")
    with pytest.raises(ValueError, match=r"x has shape \(3,\) here and \(2,\) in there"):
        compare_outputs({"x": (ones, ones[:2])}, 1e-5, "there")


def test_older_versions_of_transformers_get_their_names_of_the_gated_mlp():
    """Up to 5.17, `eomt` keeps gate and value in one matrix."""
    layer = {
        f"layers.0.mlp.{name}.weight": torch.full((2, 3), float(i)) for i, name in enumerate(("gate_proj", "up_proj"))
    }
    layer["layers.0.mlp.down_proj.weight"] = torch.full((3, 2), 2.0)
    packed = to_transformers._pack_gates({**layer, "query.weight": torch.zeros(1)})
    assert packed.keys() == {"layers.0.mlp.weights_in.weight", "layers.0.mlp.weights_out.weight", "query.weight"}
    assert packed["layers.0.mlp.weights_in.weight"][:, 0].tolist() == [0.0, 0.0, 1.0, 1.0]


def test_the_rotary_export_is_of_the_dinov3_type(tmp_path):
    model = tiny_eomt(**CASES["dinov3"])
    export_to_transformers(model, tmp_path / "out")
    theirs = EomtDinov3ForUniversalSegmentation.from_pretrained(tmp_path / "out")
    assert theirs.config.rope_parameters["rope_theta"] == model.config.rope_theta
    assert theirs.config.layer_norm_eps == 1e-5
