"""ViT-P's image processor: images squashed, prompts scaled with them, every mistake refused by its place."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as tvF
from transformers import AutoImageProcessor
from transformers.utils.generic import ModelOutput

from hf_segvit import ViTPConfig, ViTPForPointClassification, ViTPImageProcessor

LABELS = {0: "sky", 1: "road", 2: "car"}


def processor(**settings) -> ViTPImageProcessor:
    return ViTPImageProcessor(**{"size": 56, "id2label": LABELS, **settings})


def example_image(height: int = 40, width: int = 60, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


# What comes out


@pytest.mark.parametrize("size", [56, (28, 84), {"height": 28, "width": 84}])
def test_images_are_squashed_and_normalised(size):
    images = [example_image(), example_image(90, 20)]
    inputs = processor(size=size)(images)
    height, width = (56, 56) if size == 56 else (28, 84)
    assert inputs["original_sizes"].tolist() == [[40, 60], [90, 20]]
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    for pixels, image in zip(inputs["pixel_values"], images, strict=True):
        resized = tvF.resize(tvF.pil_to_tensor(image), [height, width])
        expected = (resized / 255 - mean[:, None, None]) / std[:, None, None]
        torch.testing.assert_close(pixels, expected)
    assert set(inputs) == {"pixel_values", "original_sizes"}  # for encode_image: no prompts asked


def test_points_precede_boxes_and_mixed_counts_are_padded():
    inputs = processor()(
        [example_image(40, 60), example_image(30, 20)],
        input_points=[[[59, 39], [0, 0]], []],
        input_boxes=[[[0, 0, 60, 40]], [[1, 2, 11, 26]]],
        input_labels=[[0, 1, 2], [-100]],
    )
    expected = [
        [[59.5 / 60, 39.5 / 40, 0, 0], [0.5 / 60, 0.5 / 40, 0, 0], [0.5, 0.5, 1, 1]],
        [[6 / 20, 14 / 30, 10 / 20, 24 / 30], [0, 0, 0, 0], [0, 0, 0, 0]],
    ]
    torch.testing.assert_close(inputs["prompts"], torch.tensor(expected))
    assert inputs["prompt_mask"].tolist() == [[True] * 3, [True, False, False]]
    assert inputs["labels"].tolist() == [[0, 1, 2], [-100, -100, -100]]
    assert inputs["prompts"].dtype == torch.float32


def test_a_point_means_the_middle_of_its_pixel_or_its_corner():
    for origin, offset in (("center", 0.5), ("corner", 0.0)):
        prompts = processor(point_origin=origin)(example_image(), input_points=[[[7, 3]]])["prompts"]
        torch.testing.assert_close(prompts[0, 0], torch.tensor([(7 + offset) / 60, (3 + offset) / 40, 0, 0]))
    # A box without area is a point at its place, not at a pixel's middle.
    box = processor()(example_image(), input_boxes=[[[7.5, 3.5, 7.5, 3.5]]])["prompts"]
    torch.testing.assert_close(box, processor()(example_image(), input_points=[[[7, 3]]])["prompts"])
    edge = processor()(example_image(), input_boxes=[[[60, 40, 60, 40]]])["prompts"]
    torch.testing.assert_close(edge[0, 0], torch.tensor([1.0, 1, 0, 0]))


def test_one_way_or_another_to_say_the_same():
    expected = processor()(example_image(), input_points=[[[7, 3], [8, 4]]])["prompts"]
    for points in (
        [[7, 3], [8, 4]],
        np.array([[7, 3], [8, 4]]),
        torch.tensor([[[7.0, 3.0], [8.0, 4.0]]]),
        [np.array([[7, 3], [8, 4]])],
        (((7, 3), (8, 4)),),
    ):
        assert torch.equal(processor()(example_image(), input_points=points)["prompts"], expected)
    arrays = processor()(example_image(), input_points=[[7, 3], [8, 4]], return_tensors="np")
    assert isinstance(arrays["prompts"], np.ndarray)
    assert np.array_equal(arrays["prompts"], expected.numpy())


def test_prompts_for_images_prepared_before():
    one = processor()
    whole = one(
        [example_image(), example_image(30, 20)], input_points=[[[5, 6]], [[1, 2], [3, 4]]], input_labels=[[0], [1, 2]]
    )
    first = one([example_image(), example_image(30, 20)])
    later = one.prepare_prompts(first["original_sizes"], [[[5, 6]], [[1, 2], [3, 4]]], input_labels=[[0], [1, 2]])
    assert set(later) == {"prompts", "prompt_mask", "labels"}
    assert all(torch.equal(later[name], whole[name]) for name in later)


def test_saved_and_loaded_it_is_the_same(tmp_path):
    one = processor(size=(28, 84), point_origin="corner", patch_size=14)
    one.save_pretrained(tmp_path)
    again = ViTPImageProcessor.from_pretrained(tmp_path)
    assert again.to_dict() == one.to_dict()
    assert again.id2label == LABELS
    ViTPConfig().save_pretrained(tmp_path)
    assert isinstance(AutoImageProcessor.from_pretrained(tmp_path), ViTPImageProcessor)


@torch.no_grad()
def test_what_it_makes_the_model_takes():
    config = ViTPConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=56,
        id2label=LABELS,
        label2id={name: index for index, name in LABELS.items()},
    )
    model = ViTPForPointClassification(config).eval()
    one = processor()
    points = [[[5, 6], [7, 8], [59, 0]], [[1, 2]]]
    outputs = model(**one([example_image(), example_image(30, 20)], input_points=points))
    answers = one.post_process_point_classification(outputs, top_k=2)
    alone = one.post_process_point_classification(model(**one(example_image(30, 20), input_points=points[1])), top_k=2)
    assert [len(answer["labels"]) for answer in answers] == [3, 1]
    assert answers[1]["labels"] == alone[0]["labels"]
    torch.testing.assert_close(answers[1]["scores"], alone[0]["scores"], atol=1e-5, rtol=0)


# Answers


def outputs(logits, mask=None) -> ModelOutput:
    return ModelOutput(logits=logits) if mask is None else ModelOutput(logits=logits, prompt_mask=mask)


def test_post_processing_ranks_names_and_scores():
    logits = torch.tensor([[[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]], [[0.0, 0.0, 5.0], [9.0, 0.0, 0.0]]])
    mask = torch.tensor([[True, True], [False, True]])
    first, second = processor().post_process_point_classification(outputs(logits, mask), top_k=2)
    assert first["labels"] == [["road", "car"], ["sky", "road"]]
    assert first["label_ids"].tolist() == [[1, 2], [0, 1]]
    torch.testing.assert_close(first["scores"][0], logits[0, 0].softmax(0)[[1, 2]])
    assert [row[0] for row in second["labels"]] == ["sky"]  # the padded prompt comes first and is left out
    whole = processor().post_process_point_classification(outputs(logits), top_k=9)[1]
    assert whole["scores"].shape == (2, 3)
    torch.testing.assert_close(whole["scores"].sum(1), torch.ones(2))
    named = processor(id2label=None).post_process_point_classification(outputs(logits))
    assert named[0]["labels"] == [["LABEL_1"], ["LABEL_0"]]
    given = processor().post_process_point_classification(outputs(logits), id2label={0: "a", 1: "b", 2: "c"})
    assert given[0]["labels"] == [["b"], ["a"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"top_k": 0}, "top_k=0"), ({"id2label": {0: "a", 1: "b"}}, "no name for class 2 of the 3")],
)
def test_post_processing_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        processor().post_process_point_classification(outputs(torch.zeros(1, 1, 3)), **arguments)


# Bad input

INSIDE = [[[1, 2]], [[3, 4]]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_points": [[[60, 0]], [[3, 4]]]}, r"input_points\[0\]\[0\] is \(60, 0\), outside.*60 x 40"),
        ({"input_points": [[[1, 2]], [[3, 4], [3, 30]]]}, r"input_points\[1\]\[1\] is \(3, 30\).*y from 0 to 29"),
        ({"input_points": [[[-1, 2]], [[3, 4]]]}, r"\(-1, 2\), outside"),
        ({"input_points": [[[float("nan"), 2]], [[3, 4]]]}, r"\(nan, 2\), outside"),
        ({"input_points": [[[1, 2]], []]}, r"images\[1\] has no prompt"),
        ({"input_points": [[], []]}, r"images\[0\] has no prompt"),
        ({"input_points": [[[1, 2]]]}, "1 entries, nested 3 deep for 2 images"),
        ({"input_points": [[1, 2], [3, 4]]}, "nested 2 deep for 2 images; give a list for each image"),
        ({"input_points": torch.zeros(2, 3, 4)}, r"input_points\[0\] has shape \(3, 4\); every entry is \(x, y\)"),
        ({"input_points": [[[1, 2, 3]], [[3, 4, 5]]]}, r"input_points\[0\] has shape \(1, 3\)"),
        ({"input_points": [[[1, 2], [3]], [[3, 4]]]}, r"input_points\[0\] is not a list of numbers"),
        ({"input_points": [[["a", 2]], [[3, 4]]]}, r"input_points\[0\] is not a list of numbers"),
        ({"input_boxes": [[[9, 2, 3, 4]], [[1, 2, 3, 4]]]}, r"input_boxes\[0\]\[0\].*comes before the other"),
        ({"input_boxes": [[[1, 2, 3, 4]], [[1, 9, 3, 4]]]}, r"input_boxes\[1\]\[0\].*comes before the other"),
        ({"input_boxes": [[[1, 2, 61, 4]], [[1, 2, 3, 4]]]}, r"input_boxes\[0\]\[0\].*outside the image.*clip it"),
        ({"input_boxes": [[[1, 2, float("nan"), 4]], [[1, 2, 3, 4]]]}, r"input_boxes\[0\]\[0\].*outside"),
        ({"input_boxes": [[[1, 2]], [[3, 4]]]}, r"every entry is \(x0, y0, x1, y1\)"),
        ({"input_points": INSIDE, "input_labels": [[0], [3]]}, r"input_labels\[1\]\[0\] is 3.*0 to 2"),
        ({"input_points": INSIDE, "input_labels": [[0], [-1]]}, r"input_labels\[1\]\[0\] is -1"),
        ({"input_points": INSIDE, "input_labels": [[0.5], [1]]}, r"input_labels\[0\]\[0\] is 0.5"),
        ({"input_points": INSIDE, "input_labels": [[0, 1], [1]]}, r"\[1, 1\] classes for the 2 images"),
        ({"input_points": INSIDE, "input_labels": 3}, r"\[1, 1\] classes for the 2 images"),
        ({"input_labels": [[0], [1]]}, "input_labels came without input_points or input_boxes"),
        ({"input_points": INSIDE, "do_resize": False}, r"images\[0\] is 40 x 60 pixels.*do_resize=False"),
        ({"size": 60}, r"size 60 x 60 is no multiple of patch_size=14.*'height': 56"),
        ({"point_origin": "middle"}, "point_origin='middle'"),
        ({"return_tensors": "tf"}, "return_tensors='tf'"),
    ],
)
def test_mistakes_are_refused_by_their_place(arguments, message):
    with pytest.raises(ValueError, match=message):
        processor()([example_image(40, 60), example_image(30, 20)], **arguments)


def test_no_image_is_refused():
    with pytest.raises(ValueError, match="images is empty"):
        processor()([])
