"""The fused image processor: inputs as the parts' own processors make them, one file, sizes, and bad input."""

import json

import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as tvF
from transformers import (
    CLIPImageProcessor,
    EomtImageProcessor,
    Mask2FormerImageProcessor,
    MaskFormerImageProcessor,
    OneFormerImageProcessor,
)

from hf_segvit import ViTPFusionForUniversalSegmentation, ViTPFusionImageProcessor
from hf_segvit.models import image_processing_vit_p_fusion as fusion_processors
from hf_segvit.models import transformers_eomt as transformers_eomt_processor
from hf_segvit.models.image_processing_eomt import EoMTImageProcessor
from hf_segvit.models.image_processing_vit_p import ViTPImageProcessor
from hf_segvit.models.published_labels import COCO_PANOPTIC_LABELS, COCO_PANOPTIC_STUFF

from .tiny_generators import GENERATORS, TASK_INPUTS, noise_images, tiny_classifier, tiny_generator

FORMER = {"shortest_edge": 64, "longest_edge": 96}
SQUARE = {"shortest_edge": 64, "longest_edge": 64}
PROCESSORS = {
    "segvit_eomt": EoMTImageProcessor(size=64),
    "segvit_mask2former_vit": EoMTImageProcessor(size=64),
    "eomt": EomtImageProcessor(size=SQUARE, do_pad=True),
    "eomt_dinov3": EomtImageProcessor(size=SQUARE, do_pad=True),
    "mask2former": Mask2FormerImageProcessor(size=FORMER, image_mean=[0.3, 0.4, 0.5], image_std=[0.2, 0.3, 0.4]),
    "maskformer": MaskFormerImageProcessor(size=FORMER),
    "oneformer": OneFormerImageProcessor(size=FORMER),
}
CLASSIFIER = ViTPImageProcessor(size={"height": 28, "width": 56})
SIZES = [(90, 70), (50, 80), (64, 64)]


def example_images():
    return noise_images(SIZES)


def joined(kind="segvit_eomt", **settings):
    return ViTPFusionImageProcessor(generator=PROCESSORS[kind].to_dict(), classifier=CLASSIFIER, **settings)


@pytest.mark.parametrize("kind", GENERATORS)
def test_each_part_gets_what_its_own_processor_makes(kind):
    images = example_images()
    made = joined(kind)(images)
    arguments = {"task_inputs": ["panoptic"] * 3} if kind == "oneformer" else {}
    own = PROCESSORS[kind](images, return_tensors="pt", **arguments)
    # Decoded once and handed on as tensors, whose antialiasing is the same; another build may round a sum elsewhere.
    torch.testing.assert_close(made["pixel_values"], torch.as_tensor(own["pixel_values"]), atol=1e-5, rtol=0)
    assert torch.equal(made["classifier_pixel_values"], CLASSIFIER(images)["pixel_values"])
    if kind.endswith("former"):
        assert torch.equal(made["pixel_mask"], own["pixel_mask"])
        expected = [(int(mask.any(1).sum()), int(mask.any(0).sum())) for mask in own["pixel_mask"]]
    else:
        expected = [(50, 64), (64, 40), (64, 64)]
    assert [tuple(size) for size in made["content_sizes"].tolist()] == expected


def test_windows():
    generator = EoMTImageProcessor(size=64, task="semantic")
    processor = ViTPFusionImageProcessor(generator=generator, classifier=CLASSIFIER)
    made, own = processor(example_images()), generator(example_images())
    for name in ("content_sizes", "patch_offsets"):
        assert torch.equal(made[name], own[name])
    assert len(made["pixel_values"]) == len(own["pixel_values"]) == 5
    assert len(made["classifier_pixel_values"]) == 3
    assert processor.task == "semantic"
    assert not hasattr(processor, "post_process_panoptic_segmentation")


@pytest.mark.parametrize("kind", ["segvit_eomt", "mask2former", "oneformer"])
def test_the_classifiers_image_from_the_generators_input(kind):
    """A smooth image: scaling it twice is the same as once but for the edges of pixels."""
    ramp = torch.linspace(0, 255, 120).expand(100, 120)
    smooth = Image.fromarray(torch.stack((ramp, ramp.flip(1), ramp / 2), -1).to(torch.uint8).numpy())
    one, other = (
        joined(kind, classifier_source=source)([smooth, example_images()[1]]) for source in ("picture", "input")
    )
    assert torch.equal(one["pixel_values"], other["pixel_values"])
    difference = (one["classifier_pixel_values"] - other["classifier_pixel_values"])[0].abs()
    assert difference.max() < 0.1  # of values that span 4.5
    assert other["classifier_pixel_values"].shape == (2, 3, 28, 56)


def test_official_oneformer_input():
    processor = joined("mask2former", official_geometry="oneformer")
    made = processor(example_images())
    assert made["original_sizes"].tolist() == [[70, 90], [80, 50], [64, 64]]
    squashed = tvF.resize(made["pixel_values"], [28, 56], antialias=True)
    assert torch.equal(made["classifier_pixel_values"], squashed)


@pytest.mark.parametrize("kind", ["segvit_eomt", "maskformer"])
def test_kinds_of_images_give_the_same(kind):
    image = example_images()[0]
    array = tvF.pil_to_tensor(image)
    expected = joined(kind)(image)
    for given in (array, array.numpy(), array.permute(1, 2, 0).numpy(), array / 255, image.convert("RGBA")):
        made = joined(kind)(given)
        for name in ("pixel_values", "classifier_pixel_values"):
            # Floats are scaled without rounding to 8 bits, which shows by one of 255 steps over a range of 4.5.
            torch.testing.assert_close(made[name], expected[name], atol=0.03 if given is not array else 0, rtol=0)


@pytest.mark.parametrize("kind", GENERATORS)
def test_one_file(kind, tmp_path):
    processor = joined(kind, stuff_classes=[3, 1], threshold=0.7, num_instances=20)
    processor.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["preprocessor_config.json"]
    stored = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert stored["stuff_classes"] == [1, 3]
    assert stored["classifier"]["size"] == {"height": 28, "width": 56}
    loaded = ViTPFusionImageProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    assert (loaded.threshold, loaded.num_instances) == (0.7, 20)
    images = example_images()
    for name, value in processor(images).items():
        assert torch.equal(loaded(images)[name], value)
    assert ViTPFusionImageProcessor.from_pretrained(tmp_path, task="semantic").task == "semantic"


def test_the_classes_of_a_oneformers_training_are_not_asked_for():
    processor = OneFormerImageProcessor(size=FORMER)
    processor.class_info_file, processor.num_text = "ade20k_panoptic.json", 134
    settings = {**processor.to_dict(), "metadata": {"0": "wall"}}
    joined_up = ViTPFusionImageProcessor(generator=settings, classifier=CLASSIFIER)
    assert not joined_up.generator.class_info_file
    assert not hasattr(joined_up.generator, "metadata")


def test_parts_in_folders_and_what_they_say(tmp_path):
    labels = dict(enumerate(COCO_PANOPTIC_LABELS))
    generator = tiny_generator("mask2former", labels)
    for part, processor, model in (
        ("generator", PROCESSORS["mask2former"], generator),
        ("classifier", CLASSIFIER, tiny_classifier(labels)),
        ("eomt", PROCESSORS["eomt"], tiny_generator("eomt", labels)),
    ):
        processor.save_pretrained(tmp_path / part)
        model.config.save_pretrained(tmp_path / part)
    make = ViTPFusionImageProcessor.from_generator_and_classifier
    processor = make(tmp_path / "generator", tmp_path / "classifier")
    assert processor.stuff_classes == list(COCO_PANOPTIC_STUFF)
    assert processor.generator.image_mean == (0.3, 0.4, 0.5)
    assert make(tmp_path / "generator", CLASSIFIER, stuff_classes=[]).stuff_classes == []
    translated = make(str(tmp_path / "eomt"), CLASSIFIER)
    assert type(translated.generator) is EoMTImageProcessor
    assert translated.stuff_classes == list(COCO_PANOPTIC_STUFF)
    # An older file names a feature extractor.
    path = tmp_path / "generator" / "preprocessor_config.json"
    stored = json.loads(path.read_text())
    del stored["image_processor_type"]
    path.write_text(json.dumps({**stored, "feature_extractor_type": "MaskFormerFeatureExtractor"}))
    assert type(make(tmp_path / "generator", CLASSIFIER).generator) is MaskFormerImageProcessor


def test_settings_of_the_parts_and_the_models_config():
    generator = EoMTImageProcessor(size=64, threshold=0.6, num_instances=7, stuff_classes=[2], task="instance")
    make = ViTPFusionImageProcessor.from_generator_and_classifier
    processor = make(generator, CLASSIFIER)
    assert (processor.threshold, processor.num_instances, processor.mask_threshold) == (0.6, 7, 0.5)
    assert (processor.stuff_classes, processor.task) == ([2], "instance")
    model = ViTPFusionForUniversalSegmentation.from_generator_and_classifier(
        tiny_generator("oneformer"), tiny_classifier(), task="semantic", task_inputs=TASK_INPUTS, stuff_classes=[0]
    )
    processor = make(PROCESSORS["oneformer"], ViTPImageProcessor(size=56), config=model.config)
    assert (processor.task, processor.stuff_classes) == ("semantic", [0])


def test_input_sizes_of_a_batch_decide_where_images_lie():
    """Mask2Former's batches are as large as their largest image; the answer must not depend on it."""
    processor = joined("mask2former")
    model = ViTPFusionForUniversalSegmentation.from_generator_and_classifier(
        tiny_generator("mask2former"), tiny_classifier()
    )

    class Halves(torch.nn.Module):
        config = model.generator.config

        def forward(self, pixel_values, pixel_mask):
            """Two masks: the left half of each image and the right one."""
            masks = torch.full((len(pixel_values), 2, *(side // 4 for side in pixel_values.shape[2:])), -9.0)
            classes = torch.zeros(len(pixel_values), 2, 6)
            for row, width in enumerate(pixel_mask.any(1).sum(1).tolist()):
                masks[row, 0, :, : width // 8] = 9
                masks[row, 1, :, width // 8 :] = 9
            classes[:, [0, 1], [2, 3]] = 9
            return type("Outputs", (), {"class_queries_logits": classes, "masks_queries_logits": masks})

    model.generator = Halves()
    sizes = [(80, 160), (160, 80)]
    with torch.no_grad():
        outputs = model(**processor([Image.new("RGB", (w, h)) for h, w in sizes]), alpha=0)
    assert outputs.input_sizes.tolist() == [[96, 96]] * 2
    for found, (height, width) in zip(
        processor.post_process_panoptic_segmentation(outputs, target_sizes=sizes), sizes, strict=True
    ):
        assert [row["label_id"] for row in found["segments_info"]] == [2, 3]
        expected = torch.zeros(height, width, dtype=torch.int32)
        expected[:, width // 2 :] = 1
        # Bilinear borders of half a cell.
        assert (found["segmentation"] != expected).float().mean() < 0.05


# Bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"generator": CLIPImageProcessor()}, r"generator's image processor is of type 'CLIPImageProcessor'.*order"),
        ({"generator": CLASSIFIER}, r"of type 'ViTPImageProcessor'; fusion knows EoMTImageProcessor"),
        ({"classifier": PROCESSORS["segvit_eomt"]}, r"of type 'EoMTImageProcessor'; it must be a ViTPImageProcessor"),
        ({"generator": None}, "the generator's image processor is missing: NoneType"),
        ({"generator": tiny_generator("segvit_eomt")}, "EoMTForUniversalSegmentation is none; pass an image processor"),
        ({"classifier": {}}, "classifier of preprocessor_config.json: image_processor_type is None"),
        ({"task": "video"}, "task='video'; it is one of"),
        ({"classifier_source": "file"}, "classifier_source='file' is not one of 'picture', 'input'"),
        ({"official_geometry": "paper"}, "official_geometry='paper' is not one of"),
        ({"threshold": 1.5}, r"threshold=1.5 is outside \[0, 1\]"),
        ({"generator": EoMTImageProcessor(size=64, task="semantic"), "task": "panoptic"}, "task='panoptic'; pass task"),
        (
            {"generator": EoMTImageProcessor(size=64, task="semantic"), "classifier_source": "input"},
            "no input holds a whole image",
        ),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        ViTPFusionImageProcessor(**{"generator": PROCESSORS["segvit_eomt"], "classifier": CLASSIFIER, **settings})


def test_a_processor_of_another_kind_than_the_generator():
    model = ViTPFusionForUniversalSegmentation.from_generator_and_classifier(
        tiny_generator("mask2former"), tiny_classifier()
    )
    make = ViTPFusionImageProcessor.from_generator_and_classifier
    with pytest.raises(ValueError, match="of type 'mask2former', but the processor given for it is a EoMTImageProc"):
        make(PROCESSORS["segvit_eomt"], CLASSIFIER, config=model.config)
    with pytest.raises(ValueError, match="images of 28x60, but its patches have 14 pixels"):
        make(
            PROCESSORS["mask2former"],
            ViTPImageProcessor(size={"height": 28, "width": 60}, patch_size=None),
            config=model.config,
        )


@pytest.mark.parametrize(
    ("images", "arguments", "message"),
    [
        ([], {}, "images is empty"),
        (["nowhere.png"], {}, "nowhere.png: no such file"),
        ([torch.rand(3, 8, 8), torch.full((3, 8, 8), 300.0)], {}, r"images\[1\]"),
        ([Image.new("RGB", (8, 8))], {"task": "semantic"}, "task: cannot be set for one call"),
        ([Image.new("RGB", (8, 8))], {"return_tensors": "tf"}, "return_tensors='tf'"),
        ([Image.new("RGB", (8, 8))], {"segmentation_maps": [1]}, "segmentation_maps: neither understood here nor by"),
    ],
)
@pytest.mark.parametrize("kind", ["segvit_eomt", "mask2former"])
def test_images_that_do_not_fit(kind, images, arguments, message):
    with pytest.raises(ValueError, match=message):
        joined(kind)(images, **arguments)


@pytest.mark.parametrize("kind", GENERATORS)
@pytest.mark.parametrize("size", [(1, 1), (2, 90), (90, 2)])
def test_images_smaller_than_a_patch(kind, size):
    settings = {"task_inputs": TASK_INPUTS} if kind == "oneformer" else {}
    model = ViTPFusionForUniversalSegmentation.from_generator_and_classifier(
        tiny_generator(kind), tiny_classifier(), **settings
    )
    processor = joined(kind)
    with torch.no_grad():
        outputs = model(**processor(Image.new("RGB", size, (200, 90, 10))))
    assert outputs.class_queries_logits.isfinite().all()
    assert ((outputs.prompts >= 0) & (outputs.prompts <= 1)).all()
    label_map = processor.post_process_semantic_segmentation(outputs, target_sizes=[size[::-1]])[0]
    assert label_map.shape == size[::-1]


def test_settings_of_one_call():
    made = joined()(example_images(), size={"height": 96, "width": 128})
    assert made["pixel_values"].shape == (3, 3, 96, 128)
    assert made["classifier_pixel_values"].shape == (3, 3, 28, 56)
    arrays = joined("mask2former")(example_images(), return_tensors="np")
    assert arrays["content_sizes"].dtype == "int64"


@pytest.mark.parametrize("kind", ["segvit_eomt", "eomt", "mask2former"])
def test_parts_are_found_where_their_models_are(kind, tmp_path):
    PROCESSORS[kind].save_pretrained(tmp_path / "parts" / "generator")
    CLASSIFIER.save_pretrained(tmp_path / "parts" / "classifier")
    made = ViTPFusionImageProcessor.from_generator_and_classifier(
        str(tmp_path / "parts"),
        str(tmp_path / "parts"),
        generator_kwargs={"subfolder": "generator", "dtype": torch.bfloat16},  # as the model is given
        classifier_kwargs={"subfolder": "classifier"},
        stuff_classes=[0],
    )
    expected = joined(kind, stuff_classes=[0])
    assert made.to_dict() == expected.to_dict()


def test_an_eomt_processor_in_memory_is_translated_in_silence(monkeypatch):
    def warn(*arguments):
        raise AssertionError(arguments)

    for module in (fusion_processors, transformers_eomt_processor):
        monkeypatch.setattr(module.logger, "warning_once", warn)
    made = ViTPFusionImageProcessor.from_generator_and_classifier(PROCESSORS["eomt"], CLASSIFIER, stuff_classes=[0])
    assert made.stuff_classes == [0]
    assert (made.generator.size["height"], made.generator.size["width"]) == (64, 64)
