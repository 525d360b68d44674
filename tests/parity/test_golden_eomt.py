"""Official EoMT checkpoints, converted, against outputs that the official code computed from them."""

import json

import pytest
import torch
from safetensors import safe_open

from hf_segvit.conversion.convert import convert
from hf_segvit.conversion.official_eomt import read_official_eomt
from hf_segvit.conversion.options import ConversionOptions
from hf_segvit.models.image_processing_eomt import EoMTImageProcessor
from hf_segvit.models.modeling_eomt import EoMTForUniversalSegmentation

# Another order of the same sums in fp32 (the transposed convolution as a matrix product); logits are of order 1 to 10.
TOLERANCE = 1e-4
CASES = {
    "eomt_dinov2_mlp": {"num_attention_heads": 4},
    "eomt_dinov2_swiglu": {"num_attention_heads": 3, "image_size": [64, 96]},
    "eomt_deit3": {"num_attention_heads": 4},
}


@pytest.fixture(scope="module", params=sorted(CASES))
def case(request, golden, tmp_path_factory):
    """A converted folder, the official inputs and outputs, and what the official model was made of."""
    folder = tmp_path_factory.mktemp("golden") / request.param
    options = ConversionOptions(fields=CASES[request.param], task="panoptic")
    convert("official-eomt", str(golden(f"{request.param}.ckpt.safetensors")), folder, options)
    with safe_open(golden(f"{request.param}.io.safetensors"), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        facts = json.loads(file.metadata()["case"])
    return folder, tensors, facts


def load(folder):
    return EoMTForUniversalSegmentation.from_pretrained(folder), EoMTImageProcessor.from_pretrained(folder)


@pytest.mark.parametrize(("mode", "probability"), [("masked", 1.0), ("unmasked", 0.0)])
@torch.no_grad()
def test_every_prediction_is_that_of_the_official_code(case, mode, probability):
    folder, tensors, facts = case
    model, processor = load(folder)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (processor.image_mean, processor.image_std))
    model.set_masked_attention_probabilities(probability)
    outputs = model.eomt((tensors["input.pixels01"] - mean) / std)
    mask_logits = [*outputs.auxiliary_masks_queries_logits, outputs.masks_queries_logits]
    class_logits = [model.class_predictor(queries) for queries in outputs.query_hidden_states]
    expected = [name for name in tensors if name.startswith(f"output.{mode}.mask_logits.")]
    assert len(mask_logits) == len(class_logits) == len(expected) == (facts["nb"] + 1 if mode == "masked" else 1)
    for layer, (masks, classes) in enumerate(zip(mask_logits, class_logits, strict=True)):
        torch.testing.assert_close(masks, tensors[f"output.{mode}.mask_logits.{layer}"], atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(classes, tensors[f"output.{mode}.class_logits.{layer}"], atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_the_folder_says_what_the_file_says(case):
    folder, tensors, facts = case
    model, processor = load(folder)
    config, height_width = model.config, tuple(facts["img"])
    assert (config.num_queries, config.num_query_layers, config.num_labels) == (facts["q"], facts["nb"], facts["C"])
    assert (config.hidden_size, config.num_hidden_layers) == (facts["kw"]["embed_dim"], facts["kw"]["depth"])
    assert config.image_height_width == height_width == (processor.size["height"], processor.size["width"])
    assert config.masked_attention_probabilities == [1.0] * facts["nb"]  # these files were never annealed
    # A model fresh from the folder masks where the file's probabilities say so.
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (processor.image_mean, processor.image_std))
    answer = model((tensors["input.pixels01"] - mean) / std).masks_queries_logits
    expected = tensors[f"output.masked.mask_logits.{facts['nb']}"]
    torch.testing.assert_close(answer, expected, atol=TOLERANCE, rtol=0)


def test_a_square_file_resampled_to_its_own_size_is_unchanged(golden):
    path = str(golden("eomt_dinov2_mlp.ckpt.safetensors"))
    heads = {"num_attention_heads": 4}
    native = read_official_eomt(path, ConversionOptions(fields=heads)).state_dict
    same = read_official_eomt(path, ConversionOptions(fields={**heads, "image_size": 96})).state_dict
    assert native.keys() == same.keys()
    assert all(torch.equal(native[name], same[name]) for name in native)
