"""Test-time augmentation: one plain view changes nothing, mirror images agree, and means are those of a plain loop."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Mask2FormerImageProcessor, MaskFormerImageProcessor, OneFormerImageProcessor

from hf_segvit import (
    EoMTImageProcessor,
    ViTPFusionForUniversalSegmentation,
    ViTPFusionImageProcessor,
    ViTPImageProcessor,
)
from hf_segvit.inference.segmenter import Segmenter
from hf_segvit.inference.views import Views, merge_views, scaled_size

from .tiny_generators import TASK_INPUTS, noise_images, tiny_classifier, tiny_generator

SIZES = [(50, 40), (32, 70)]  # (width, height)
VIEWS = Views((0.5, 1.0, 1.5), flip=True)
CASES = ("padded", "windows", "mask2former", "maskformer", "fused", "fused windows", "fused mask2former")


@torch.no_grad()
def decided(model, processor):
    """The model, with queries that differ in their classes and in where they are, so that several win somewhere."""
    logits = model(**processor(images=example_images()[:1], return_tensors="pt")).class_queries_logits[0]
    model.class_predictor.bias.copy_(20 * (model.class_predictor.bias - logits.mean(0)))
    model.class_predictor.weight *= 20
    model.register_forward_hook(contrasted)
    return model


def contrasted(model, inputs, outputs):
    """Mask logits of mean 0 and deviation 3 for each query; those of random weights hardly vary over an image."""
    masks = outputs.masks_queries_logits
    deviation, mean = torch.std_mean(masks, dim=(-2, -1), keepdim=True)
    outputs.masks_queries_logits = 3 * (masks - mean) / deviation
    return outputs


def case(kind):
    """A tiny model and its processor."""
    windows = "windows" in kind
    if kind.endswith("former"):
        name = kind.split()[-1]
        cls = Mask2FormerImageProcessor if name == "mask2former" else MaskFormerImageProcessor
        model, processor = tiny_generator(name), cls(size={"shortest_edge": 64, "longest_edge": 128})
    else:
        model = tiny_generator("segvit_eomt")
        processor = EoMTImageProcessor(
            task="semantic", size={"height": 64, "width": 64}, do_split_image=windows, image_std=[0.1] * 3
        )
    decided(model, processor)
    if not kind.startswith("fused"):
        return model, processor
    model = ViTPFusionForUniversalSegmentation.from_generator_and_classifier(model, tiny_classifier(), alpha=0.3)
    classifier = ViTPImageProcessor(size={"height": 56, "width": 56})
    return model, ViTPFusionImageProcessor.from_generator_and_classifier(processor, classifier, config=model.config)


def example_images():
    """Halves of different noise, so that a mirror image is another image for the coarsest of models."""
    made = []
    for image in noise_images(SIZES):
        pixels = np.asarray(image).copy()
        pixels[:, : image.width // 2] //= 8
        made.append(Image.fromarray(pixels))
    return made


def mirrored(image):
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


@pytest.mark.parametrize("kind", CASES)
def test_one_plain_view_is_the_plain_answer(kind):
    model, processor = case(kind)
    (image,) = example_images()[:1]
    settings = {"task": "semantic"} if kind.startswith("fused") else {}
    with torch.no_grad():
        outputs = model(**processor(images=[image], return_tensors="pt"), **settings)
    (expected,) = processor.post_process_semantic_segmentation(outputs, target_sizes=[(40, 50)])
    for views in (Views(), Views((1.0,))):
        (answer,) = Segmenter(model, processor, task="semantic", views=views).answers([image])
        assert torch.equal(answer, expected)
    assert len(expected.unique()) > 1  # or a mistake could hide


@pytest.mark.parametrize("kind", CASES)
def test_views_are_averaged_as_a_plain_loop_does(kind):
    """Every view anew: processor, model, post-processing, one image at a time."""
    model, processor = case(kind)
    predictor = Segmenter(model, processor, task="semantic", views=VIEWS)
    answers = predictor.answers(example_images())
    settings = {"task": "semantic"} if kind.startswith("fused") else {}
    is_eomt = "former" not in kind
    for image, answer in zip(example_images(), answers, strict=True):
        total = 0
        for scale in VIEWS.scales:
            side = round(64 * scale)
            size = {"height": side, "width": side} if is_eomt else {"shortest_edge": side, "longest_edge": 2 * side}
            for seen in (image, mirrored(image)):
                with torch.no_grad():
                    outputs = model(**processor(images=[seen], size=size, return_tensors="pt"), **settings)
                (scored,) = processor.post_process_semantic_segmentation(
                    outputs,
                    target_sizes=[(image.height, image.width)],
                    return_segmentation_scores=True,
                    **({"size": size} if is_eomt else {}),
                )
                scores = scored["segmentation_scores"]
                total = total + (scores if seen is image else scores.flip(-1))
        assert len(answer.unique()) > 1
        # A batch sums in another order, which can decide where two classes are as good as equal.
        assert (answer == total.argmax(0)).float().mean() > 0.995


@pytest.mark.parametrize("kind", CASES)
def test_the_mirror_image_gets_the_mirrored_answer(kind):
    """Classifier's image and points included: the fused model would not agree if one of them were not mirrored."""
    model, processor = case(kind)
    image = example_images()[0]
    predictor = Segmenter(model, processor, task="semantic", views=Views((1.0,), flip=True))
    (answer,), (mirror,) = predictor.answers([image]), predictor.answers([mirrored(image)])
    # The two views are summed in the other order, which is exact for two; resampling is mirrored but for rounding.
    assert (answer == mirror.flip(-1)).float().mean() > 0.995
    plain = Segmenter(model, processor, task="semantic")
    assert not torch.equal(plain.answers([image])[0], plain.answers([mirrored(image)])[0].flip(-1))


class Bright:
    """A toy that looks at each pixel alone: bright ones are class 1, in every view."""

    config = type("Config", (), {"patch_size": 1})()

    def __call__(self, pixel_values, **_):
        gray = pixel_values.mean(1)
        masks = torch.stack((-gray, gray), dim=1) * 8
        classes = torch.tensor([[[9.0, 0.0, 0.0], [0.0, 9.0, 0.0]]]).expand(len(gray), 2, 3)
        return type("Outputs", (), {"class_queries_logits": classes, "masks_queries_logits": masks})()


def test_a_model_that_is_equivariant_gives_the_same_answer_from_all_views():
    image = Image.fromarray(np.kron(np.eye(4, dtype=np.uint8) * 255, np.ones((16, 16), dtype=np.uint8))).convert("RGB")
    processor = EoMTImageProcessor(task="semantic", size={"height": 64, "width": 64}, do_split_image=False)
    model = Bright()

    answers = []
    for views in (Views(), Views((1.0,), flip=True), Views((0.5, 1.0, 2.0), flip=True)):
        asked = list(views.of([image], processor))
        for view in asked:
            settings = {} if view.size is None else {"size": view.size}
            view.outputs = model(**processor(images=view.images, return_tensors="pt", **settings))
        assert len(asked) == len(views.scales) * (1 + views.flip)
        answers.append(merge_views(processor, asked, [(64, 64)])[0])
    truth = torch.from_numpy(np.asarray(image.convert("L")) > 127).long()
    assert torch.equal(answers[0], truth)
    assert torch.equal(answers[1], truth)
    edges = torch.zeros(64, 64, dtype=torch.bool)
    for line in (16, 32, 48):
        edges[line - 2 : line + 2] = edges[:, line - 2 : line + 2] = True  # half the size blurs them
    assert torch.equal(answers[2][~edges], truth[~edges])


@pytest.mark.parametrize("kind", ["segvit_eomt", "mask2former", "maskformer", "oneformer"])
def test_no_answer_of_a_fused_model_depends_on_the_rest_of_the_batch(kind):
    generator = tiny_generator(kind)
    rules = {"size": {"shortest_edge": 64, "longest_edge": 128}}
    processors = {
        "segvit_eomt": lambda: EoMTImageProcessor(size=64),
        "mask2former": lambda: Mask2FormerImageProcessor(**rules),
        "maskformer": lambda: MaskFormerImageProcessor(**rules),
        "oneformer": lambda: OneFormerImageProcessor(**rules),
    }
    model = ViTPFusionForUniversalSegmentation.from_generator_and_classifier(
        generator, tiny_classifier(), task_inputs=TASK_INPUTS if kind == "oneformer" else None
    )
    processor = ViTPFusionImageProcessor.from_generator_and_classifier(
        processors[kind](), ViTPImageProcessor(size={"height": 56, "width": 56}), config=model.config
    )
    segmenter = Segmenter(model, processor, task="semantic", device="cpu")
    unequal = [*example_images(), example_images()[0]]
    alone = [segmenter.answers([image])[0] for image in unequal]
    for answer, segmented, pair, expected in zip(
        segmenter.answers(unequal), segmenter(unequal), segmenter.compare(unequal), alone, strict=True
    ):
        # Where the batch is computed together, it is summed in another order.
        assert (answer == expected).float().mean() > 0.995
        assert np.array_equal(segmented.segment_map, answer.numpy())
        assert np.array_equal(pair[1].segment_map, answer.numpy())
    assert segmenter([]) == segmenter.compare([]) == segmenter.answers([]) == []


def test_segments_and_answers_agree():
    model, processor = case("fused")
    maps = Segmenter(model, processor, task="semantic", device="cpu", views=VIEWS).answers(example_images())
    segmented = Segmenter(model, processor, task="semantic", device="cpu", views=VIEWS)(example_images())
    for label_map, image in zip(maps, segmented, strict=True):
        assert np.array_equal(image.segment_map, label_map.numpy())


def test_input_sizes():
    eomt = EoMTImageProcessor(size={"height": 640, "width": 512})
    assert scaled_size(eomt, 0.5, 16) == {"height": 320, "width": 256}
    assert scaled_size(eomt, 0.7, 16) == {"height": 448, "width": 352}  # 358.4 is nearest to 22 patches
    assert scaled_size(eomt, 0.01, 16) == {"height": 16, "width": 16}
    edges = Mask2FormerImageProcessor(size={"shortest_edge": 800, "longest_edge": 1333})
    assert scaled_size(edges, 1.5) == {"shortest_edge": 1200, "longest_edge": 2000}
    with pytest.raises(ValueError, match=r"do_resize=False.*use scale 1 alone"):
        scaled_size(EoMTImageProcessor(do_resize=False), 0.5)


@pytest.mark.parametrize("scales", [(), (1.0, 1.0), (0.0,), (-1.0,), (9.0,), (float("nan"),)])
def test_scales_that_are_none(scales):
    with pytest.raises(ValueError, match="scale"):
        Views(scales)


def test_views_are_for_semantic_segmentation():
    model, _ = case("padded")
    with pytest.raises(ValueError, match="for semantic segmentation only, not for panoptic"):
        Segmenter(model, EoMTImageProcessor(size=64), task="panoptic", device="cpu", views=VIEWS)
