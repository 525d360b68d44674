"""Official ViT-P checkpoints, converted, against logits that the official code computed from them."""

import json

import pytest
import torch
from safetensors import safe_open

from hf_segvit.conversion.convert import convert
from hf_segvit.conversion.options import ConversionOptions
from hf_segvit.models.image_processing_vit_p import ViTPImageProcessor
from hf_segvit.models.modeling_vit_p import ViTPForPointClassification

# Another order of the same sums in fp32; logits are of order 1.
TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=["vitp_small", "vitp_square", "vitp_wide"])
def case(request, golden, tmp_path_factory):
    """A converted folder, the official inputs and outputs, and what the official model was made of."""
    with safe_open(golden(f"{request.param}.io.safetensors"), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        facts = json.loads(file.metadata()["case"])
    folder = tmp_path_factory.mktemp("golden") / request.param
    options = ConversionOptions(fields={"num_attention_heads": facts["heads"], "image_size": facts["hw"]})
    convert("official-vit-p", str(golden(f"{request.param}.ckpt.safetensors")), folder, options)
    return folder, tensors, facts


@torch.no_grad()
def test_logits_are_those_of_the_official_code(case):
    folder, tensors, _ = case
    model = ViTPForPointClassification.from_pretrained(folder)
    pixels = tensors["input.pixel_values_per_patch"]
    pixels = pixels.repeat_interleave(14, dim=2).repeat_interleave(14, dim=3)
    centres = (tensors["input.points_yx"].flip(-1) + 1) / 2
    prompts = torch.cat((centres, torch.zeros_like(centres)), dim=-1)
    expected = tensors["output.logits"]
    torch.testing.assert_close(model(pixels, prompts).logits, expected, atol=TOLERANCE, rtol=0)
    # The official resampling of positions is part of it, at the size of the table too.
    model.vit_p.embeddings.position_interpolation = "clean"
    assert not torch.allclose(model(pixels, prompts).logits, expected, atol=TOLERANCE, rtol=0)


def test_the_folder_says_what_the_file_says(case):
    folder, _, facts = case
    config = ViTPForPointClassification.from_pretrained(folder).config
    assert (config.hidden_size, config.num_hidden_layers, config.num_labels) == (facts["D"], facts["depth"], facts["C"])
    assert (config.image_size, config.patch_size) == (518, 14)  # of the position table, whatever the image
    assert (config.prompt_attention, config.head_type, config.point_origin) == ("joint", "linear", "corner")
    processor = ViTPImageProcessor.from_pretrained(folder)
    assert [processor.size["height"], processor.size["width"]] == facts["hw"]
    assert processor.point_origin == "corner"


def test_the_processor_makes_the_official_points(case):
    folder, _, _ = case
    processor = ViTPImageProcessor.from_pretrained(folder)
    rows, columns = torch.tensor([0, 5, 39]), torch.tensor([0, 7, 59])
    inputs = processor(torch.zeros(3, 40, 60), input_points=[torch.stack((columns, rows), dim=1)])
    official = 2 * torch.stack((rows / 40, columns / 60), dim=1) - 1
    torch.testing.assert_close(2 * inputs["prompts"][0, :, :2].flip(-1) - 1, official)
