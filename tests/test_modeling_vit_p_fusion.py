"""Fusion of six kinds of generators with a ViT-P: the recipe step by step, geometry, saving, pruning, bad input."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForSemanticSegmentation,
    AutoModelForUniversalSegmentation,
    Mask2FormerImageProcessor,
    OneFormerImageProcessor,
    pipeline,
)
from transformers.utils.generic import ModelOutput

from hf_segvit import ViTPFusionConfig, ViTPFusionForUniversalSegmentation, ViTPFusionImageProcessor
from hf_segvit.models.class_fusion import fuse_class_logits, queries_that_matter
from hf_segvit.models.image_processing_eomt import EoMTImageProcessor
from hf_segvit.models.image_processing_vit_p import ViTPImageProcessor
from hf_segvit.models.modeling_eomt import EoMTForUniversalSegmentation

from .tiny_generators import (
    GENERATORS,
    LABELS,
    NUM_QUERIES,
    TASK_INPUTS,
    noise_images,
    tiny_classifier,
    tiny_generator,
)
from .tiny_models import tiny_eomt

SIZES = [[64, 64], [40, 64]]
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}  # the same float32 sums, in another order


def fused_model(kind="segvit_eomt", classifier=None, **settings):
    if kind == "oneformer":
        settings.setdefault("task_inputs", TASK_INPUTS)
    return ViTPFusionForUniversalSegmentation.from_generator_and_classifier(
        tiny_generator(kind), classifier or tiny_classifier(), **settings
    )


def inputs(kind="segvit_eomt"):
    generator = torch.Generator().manual_seed(5)
    made = {
        "pixel_values": torch.randn(2, 3, 64, 64, generator=generator),
        "classifier_pixel_values": torch.randn(2, 3, 56, 56, generator=generator),
        "content_sizes": torch.tensor(SIZES),
    }
    if kind.endswith("former"):
        made["pixel_mask"] = torch.ones(2, 64, 64, dtype=torch.int64)
        made["pixel_mask"][1, 40:] = 0
    return made


def naive_points(masks, contents, input_size=64):
    """Middle of the first highest cell that lies in the content, cell by cell."""
    points = torch.zeros(*masks.shape[:2], 2)
    for row, queries in enumerate(masks):
        cell = input_size / masks.shape[-1]
        height, width = contents[row]
        for query, mask in enumerate(queries):
            best = -math.inf
            for y in range(mask.shape[0]):
                for x in range(mask.shape[1]):
                    inside = (y + 0.5) * cell < height and (x + 0.5) * cell < width
                    if inside and mask[y, x] > best:
                        best = mask[y, x]
                        points[row, query] = torch.tensor([(x + 0.5) * cell / width, (y + 0.5) * cell / height])
    return points


def as_prompts(points):
    return torch.cat((points, torch.zeros_like(points)), dim=-1)


# The recipe


@pytest.mark.parametrize("kind", GENERATORS)
def test_the_recipe_step_by_step(kind):
    model, given = fused_model(kind, alpha=0.3, task="semantic"), inputs(kind)
    with torch.no_grad():
        outputs = model(**given)
        extras = {"pixel_mask": given["pixel_mask"]} if "pixel_mask" in given else {}
        if kind == "oneformer":
            extras["task_inputs"] = torch.tensor([TASK_INPUTS["semantic"]] * 2)
        drawn = tiny_generator(kind)(pixel_values=given["pixel_values"], **extras)
        prompts = as_prompts(naive_points(drawn.masks_queries_logits, SIZES))
        said = [
            tiny_classifier()(image[None], asked[None]).logits[0]
            for image, asked in zip(given["classifier_pixel_values"], prompts, strict=True)
        ]
    torch.testing.assert_close(outputs.masks_queries_logits, drawn.masks_queries_logits, **TOLERANCE)
    torch.testing.assert_close(outputs.generator_class_queries_logits, drawn.class_queries_logits, **TOLERANCE)
    torch.testing.assert_close(outputs.prompts, prompts, atol=1e-6, rtol=0)
    torch.testing.assert_close(outputs.prompt_logits, torch.stack(said), **TOLERANCE)
    expected = fuse_class_logits(drawn.class_queries_logits, torch.stack(said), 0.3)
    torch.testing.assert_close(outputs.class_queries_logits, expected, **TOLERANCE)
    assert (outputs.class_queries_logits.softmax(-1) - drawn.class_queries_logits.softmax(-1)).abs().max() > 0.01


def test_alpha_0_is_the_generator_alone():
    model, given = fused_model(alpha=0.0), inputs()
    model.classifier = None  # it is not even asked
    with torch.no_grad():
        outputs = model(given["pixel_values"])
        expected = tiny_generator("segvit_eomt")(given["pixel_values"])
    assert torch.equal(outputs.class_queries_logits, expected.class_queries_logits)
    assert outputs.prompt_logits is None


def test_alpha_1_is_the_classifier_with_the_generators_no_object():
    with torch.no_grad():
        outputs = fused_model(alpha=1.0)(**inputs())
    fused, prompted = outputs.class_queries_logits.softmax(-1), outputs.prompt_logits.softmax(-1)
    no_object = outputs.generator_class_queries_logits.softmax(-1)[..., -1:]
    torch.testing.assert_close(fused, torch.cat(((1 - no_object) * prompted, no_object), -1), atol=2e-6, rtol=0)


def test_alpha_by_task_and_by_call():
    alpha = {"panoptic": 0.2, "instance": 0.0, "semantic": 1}
    model, given = fused_model(alpha=alpha, task="instance"), inputs()
    with torch.no_grad():
        assert model(**given).prompt_logits is None
        for task in ("panoptic", "semantic"):
            by_task = model(**given, task=task)
            assert torch.equal(by_task.class_queries_logits, model(**given, alpha=alpha[task]).class_queries_logits)
        again = model.fuse(by_task.generator_class_queries_logits, by_task.prompt_logits, alpha=0.2)
        assert torch.equal(again, model(**given, task="panoptic").class_queries_logits)


def test_internimage_normalisation():
    with torch.no_grad():
        outputs = fused_model(normalization="internimage")(**inputs())
    expected = fuse_class_logits(
        outputs.generator_class_queries_logits, outputs.prompt_logits, normalization="internimage"
    )
    assert torch.equal(outputs.class_queries_logits, expected)


def test_classes_are_matched_by_name():
    shuffled = {0: "person", 1: "car", 2: "Road", 3: "dog", 4: "grass"}
    model = fused_model(classifier=tiny_classifier(shuffled))
    with torch.no_grad():
        outputs = model(**inputs())
    assert model.config.id2label == LABELS
    expected = fuse_class_logits(outputs.generator_class_queries_logits, outputs.prompt_logits[..., [2, 4, 1, 3, 0]])
    assert torch.equal(outputs.class_queries_logits, expected)


def test_a_classifier_of_fewer_classes_is_kept_to_those(caplog):
    fewer = tiny_classifier({0: "dog", 1: "cat", 2: "car"})
    with pytest.raises(ValueError, match=r"'road', 'grass', 'person'; only the classifier knows 'cat'.*'keep'"):
        fused_model(classifier=fewer)
    model = fused_model(classifier=fewer, label_mismatch="keep")
    assert "2 classes are fused; only the generator knows 'road', 'grass', 'person'" in caplog.text
    assert model.label_match.class_matches == (-1, -1, 2, 0, -1)
    with torch.no_grad():
        outputs = model(**inputs())
    before, after = outputs.generator_class_queries_logits.softmax(-1), outputs.class_queries_logits.softmax(-1)
    torch.testing.assert_close(after[..., [0, 1, 4, 5]], before[..., [0, 1, 4, 5]], atol=2e-6, rtol=0)
    assert (after[..., [2, 3]] - before[..., [2, 3]]).abs().max() > 0.01


def test_a_batch_answers_as_its_images_do():
    model, given = fused_model(), inputs()
    with torch.no_grad():
        together = model(**given).class_queries_logits
        alone = [model(**{name: value[i : i + 1] for name, value in given.items()}) for i in range(2)]
    torch.testing.assert_close(together, torch.cat([one.class_queries_logits for one in alone]), **TOLERANCE)


def test_the_generator_is_frozen():
    made = ViTPFusionForUniversalSegmentation(fused_model().config)
    assert made.training
    assert not made.generator.training
    assert not any(parameter.requires_grad for parameter in made.generator.parameters())
    model = fused_model().train()
    assert not model.generator.training
    assert model.classifier.training
    assert not any(parameter.requires_grad for parameter in model.generator.parameters())
    model(**inputs()).class_queries_logits[..., 0].sum().backward()
    assert model.classifier.classifier.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in model.generator.parameters())


@pytest.mark.parametrize("kind", GENERATORS)
def test_bfloat16_weights_take_the_processors_float32_images(kind):
    with torch.no_grad():
        outputs = fused_model(kind).bfloat16()(**inputs(kind))
    assert outputs.class_queries_logits.dtype == torch.float32
    torch.testing.assert_close(outputs.class_queries_logits.exp().sum(-1), torch.ones(2, NUM_QUERIES))


def test_a_oneformer_is_told_the_task():
    model, given = fused_model("oneformer"), inputs("oneformer")
    with torch.no_grad():
        answers = {task: model(**given, task=task).generator_class_queries_logits for task in TASK_INPUTS}
    assert (answers["panoptic"] - answers["semantic"]).abs().max() > 1e-4
    assert model.config.task_inputs == TASK_INPUTS


class Words:
    """Stands in for a tokenizer: a word's id is its length and its first letter."""

    def __call__(self, texts, padding, max_length, truncation):
        assert (padding, truncation) == ("max_length", True)
        rows = [[100 * len(word) + ord(word[0]) - ord("a") for word in text.split()][:max_length] for text in texts]
        return {
            "input_ids": [row + [49] * (max_length - len(row)) for row in rows],
            "attention_mask": [[1] * len(row) + [0] * (max_length - len(row)) for row in rows],
        }


def test_the_prompts_of_a_oneformer_come_from_its_processor_once(tmp_path):
    oneformer = tiny_generator("oneformer")
    make = ViTPFusionForUniversalSegmentation.from_generator_and_classifier
    model = make(oneformer, tiny_classifier(), generator_processor=SimpleNamespace(tokenizer=Words()))
    assert model.config.task_inputs == {
        "panoptic": [319, 419, 208, 815, 0, 0],
        "instance": [319, 419, 208, 808, 0, 0],
        "semantic": [319, 419, 208, 818, 0, 0],
    }
    with pytest.raises(ValueError, match="is told its task in words: pass generator_processor"):
        make(oneformer, tiny_classifier())
    oneformer.save_pretrained(tmp_path)  # without a tokenizer
    with pytest.raises(ValueError, match=r"pass .*task_inputs=\{task: token ids\}"):
        make(tmp_path, tiny_classifier())


# Saving, loading, Auto classes, the pipeline


def without(fields, name):
    """A JSON value without the fields of a name, at any depth."""
    if not isinstance(fields, dict):
        return fields
    return {key: without(value, name) for key, value in fields.items() if key != name}


@pytest.mark.parametrize("kind", GENERATORS)
def test_one_checkpoint(kind, tmp_path):
    model, given = fused_model(kind, alpha={"panoptic": 0.4, "instance": 0.3, "semantic": 0.5}), inputs(kind)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    loaded, report = ViTPFusionForUniversalSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert (loaded.config.alpha, loaded.config.id2label) == (model.config.alpha, LABELS)
    assert type(loaded.generator) is type(model.generator)
    assert not any(parameter.requires_grad for parameter in loaded.generator.parameters())
    with torch.no_grad():
        answers = (one(**given).class_queries_logits for one in (loaded, model))
        torch.testing.assert_close(*answers, **TOLERANCE)
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()
    first, second = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, tmp_path / "again"))
    assert without(first, "dtype") == without(second, "dtype")  # the parts of the first were made here and not loaded
    assert "_name_or_path" not in json.dumps(second)  # where the parts once lay on a disk is nobody's business


def test_the_parts_may_be_folders(tmp_path):
    tiny_generator("mask2former").save_pretrained(tmp_path / "generator")
    tiny_generator("eomt").save_pretrained(tmp_path / "eomt")
    tiny_classifier().save_pretrained(tmp_path / "classifier")
    make = ViTPFusionForUniversalSegmentation.from_generator_and_classifier
    given = inputs("mask2former")
    with torch.no_grad():
        expected = fused_model("mask2former")(**given)
        loaded = make(tmp_path / "generator", tmp_path / "classifier", 0.4)(**given)
        torch.testing.assert_close(loaded.class_queries_logits, expected.class_queries_logits, **TOLERANCE)
        # Transformers' own EoMT becomes ours, with the same answers.
        model = make(str(tmp_path / "eomt"), str(tmp_path / "classifier"))
        assert type(model.generator) is EoMTForUniversalSegmentation
        torch.testing.assert_close(
            model(**inputs()).class_queries_logits, fused_model("eomt")(**inputs()).class_queries_logits, **TOLERANCE
        )
    with pytest.raises(ValueError, match=r"of type 'mask2former'; it must be a ViT-P .*\(is the order"):
        make(tmp_path / "classifier", tmp_path / "generator")
    with pytest.raises(ValueError, match="of type 'EoMTForUniversalSegmentation'; it must be a ViT-P"):
        make(tiny_eomt(), tiny_eomt())
    with pytest.raises(
        ValueError, match="the generator is of type 'segvit_vit_p'; it must be a universal segmentation"
    ):
        make(tmp_path / "classifier", tmp_path / "classifier")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fused")
    model = fused_model(stuff_classes=[0, 1])
    model.save_pretrained(folder)
    ViTPFusionImageProcessor.from_generator_and_classifier(
        EoMTImageProcessor(size=64), ViTPImageProcessor(size=56), config=model.config
    ).save_pretrained(folder)
    return folder


def test_auto_classes(saved):
    assert type(AutoConfig.from_pretrained(saved)) is ViTPFusionConfig
    assert type(AutoImageProcessor.from_pretrained(saved)) is ViTPFusionImageProcessor
    for auto_class in (AutoModelForUniversalSegmentation, AutoModelForSemanticSegmentation):
        assert type(auto_class.from_pretrained(saved)) is ViTPFusionForUniversalSegmentation


@pytest.mark.parametrize("subtask", ["panoptic", "instance", "semantic"])
def test_pipeline(saved, subtask, caplog):
    segment = pipeline("image-segmentation", model=saved)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
    images = noise_images(((90, 70), (50, 80), (64, 64)))
    arguments = {} if subtask == "semantic" else {"threshold": 0.0}
    batched = segment(images, subtask=subtask, batch_size=2, **arguments)
    for image, found in zip(images, batched, strict=True):
        assert found
        assert {segment["label"] for segment in found} <= set(LABELS.values())
        assert all(segment["mask"].size == image.size for segment in found)
    processor, model = segment.image_processor, segment.model
    with torch.no_grad():
        outputs = model(**processor(images[0]))
    label_map = processor.post_process_semantic_segmentation(outputs, target_sizes=[(70, 90)])[0]
    if subtask == "semantic":
        assert [s["label"] for s in batched[0]] == [LABELS[int(label)] for label in label_map.unique()]


def test_mask2formers_own_post_processing_takes_the_outputs():
    model = fused_model("mask2former")
    with torch.no_grad():
        model.generator.class_predictor.bias[-1] -= 9  # something is there
        outputs = model(**inputs("mask2former"))
    processor = Mask2FormerImageProcessor()
    sizes = [(30, 40), (20, 40)]
    for segmentation, size in zip(processor.post_process_semantic_segmentation(outputs, sizes), sizes, strict=True):
        assert segmentation.shape == size
    found = processor.post_process_panoptic_segmentation(outputs, 0.0, 0.0, 0.0, label_ids_to_fuse=set())
    assert found[0]["segments_info"]
    assert processor.post_process_instance_segmentation(outputs, threshold=0.0)[0]["segments_info"]


# Geometry: where the point lies in the image that the classifier sees


class BrightSpots(nn.Module):
    """A generator whose masks are the brightness of what it sees, and its opposite."""

    config = SimpleNamespace(id2label=LABELS)

    def forward(self, pixel_values, pixel_mask=None, task_inputs=None):
        bright = nn.functional.avg_pool2d(pixel_values.mean(1, keepdim=True), 4, ceil_mode=True)
        logits = torch.zeros(len(bright), 2, len(LABELS) + 1)
        return ModelOutput(class_queries_logits=logits, masks_queries_logits=torch.cat((bright, -bright), 1))


FORMER = {"shortest_edge": 64, "longest_edge": 128}
PROCESSORS = {
    "padded": EoMTImageProcessor(size=64),
    "windows": EoMTImageProcessor(size=64, task="semantic"),
    "mask2former": Mask2FormerImageProcessor(size=FORMER),
    "oneformer": OneFormerImageProcessor(size=FORMER),
}


def image_of_spot(size, box, value=90):
    """Black but for a square; value 90 is darker than the mean, which some processors pad with."""
    image = Image.new("RGB", size)
    image.paste((value,) * 3, box)
    return image


@pytest.mark.parametrize(
    ("kind", "source"),
    # No window holds the whole image that the classifier wants.
    [
        (kind, source)
        for kind in PROCESSORS
        for source in ("picture", "input")
        if (kind, source) != ("windows", "input")
    ],
)
def test_the_point_is_on_the_object_in_the_classifiers_image(kind, source):
    """Whatever was scaled, padded, cut into windows or batched with larger images."""
    model = fused_model()
    model.generator = BrightSpots()
    processor = ViTPFusionImageProcessor(
        generator=PROCESSORS[kind], classifier=ViTPImageProcessor(size=56), classifier_source=source
    )
    scenes = [
        ((160, 100), (110, 60, 140, 85)),
        ((160, 100), (130, 75, 160, 100)),
        ((70, 150), (0, 120, 18, 150)),
        ((64, 64), (40, 8, 52, 20)),
        ((300, 80), (230, 10, 260, 40)),
    ]
    given = processor([image_of_spot(*scene) for scene in scenes])
    with torch.no_grad():
        outputs = model(**given)
    rows = range(len(scenes)) if kind != "windows" else given["patch_offsets"][:, 0].tolist()
    brightest = outputs.masks_queries_logits[:, 0].flatten(1).amax(1)
    checked = set()
    for row, index in enumerate(rows):
        if brightest[row] < brightest.max() - 0.5:
            continue  # a window without the object
        (width, height), (left, top, right, bottom) = scenes[index]
        x, y = outputs.prompts[row, 0, :2].tolist()
        assert left <= x * width <= right
        assert top <= y * height <= bottom
        view = given["classifier_pixel_values"][index]
        at_point = view[:, int(y * view.shape[1]), int(x * view.shape[2])].mean()
        assert at_point > view.amax() - 1.0 > view.mean()
        checked.add(index)
    assert checked == set(range(len(scenes)))


def test_a_mirrored_image_has_mirrored_points():
    model = fused_model()
    model.generator = BrightSpots()
    processor = ViTPFusionImageProcessor(generator=PROCESSORS["padded"], classifier=ViTPImageProcessor(size=56))
    image = image_of_spot((160, 100), (100, 40, 120, 60))
    with torch.no_grad():
        one, other = (model(**processor(p)).prompts[0, 0] for p in (image, image.transpose(Image.FLIP_LEFT_RIGHT)))
    assert float(one[0] + other[0]) == pytest.approx(1, abs=0.1)  # a cell and a half
    assert float(one[1]) == pytest.approx(float(other[1]), abs=1e-6)


def test_windows_share_one_look_at_their_image():
    model = fused_model(task="semantic")
    processor = ViTPFusionImageProcessor(
        generator=EoMTImageProcessor(size=64, task="semantic"), classifier=ViTPImageProcessor(size=56)
    )
    given = processor(noise_images(((150, 64), (64, 64), (64, 100))))
    assert given["patch_offsets"][:, 0].tolist() == [0, 0, 0, 1, 2, 2]
    seen = []
    model.classifier.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].shape[0]))
    with torch.no_grad():
        outputs = model(**given)
        assert seen == [3]
        drawn = model.generator(given["pixel_values"]).masks_queries_logits
        in_window = naive_points(drawn, [[64, 64]] * 6) * 64
        for image, rows in enumerate(([0, 1, 2], [3], [4, 5])):
            (height, width), starts = given["content_sizes"][image].tolist(), given["patch_offsets"][rows, 1]
            shift = torch.zeros(len(rows), 1, 2)
            shift[:, 0, 1 if height > 64 else 0] = starts.float()
            points = ((in_window[rows] + shift) / torch.tensor([width, height])).flatten(0, 1)
            torch.testing.assert_close(outputs.prompts[rows, :, :2].flatten(0, 1), points, atol=1e-6, rtol=0)
            said = model.classifier(given["classifier_pixel_values"][image, None], as_prompts(points)[None]).logits
            torch.testing.assert_close(outputs.prompt_logits[rows].flatten(0, 1), said[0], **TOLERANCE)
    assert [m.shape for m in processor.post_process_semantic_segmentation(outputs, [(9, 20), (8, 8), (10, 7)])] == [
        (9, 20),
        (8, 8),
        (10, 7),
    ]


def test_official_geometry_of_oneformer():
    """Masks at the size of the image, upper left corners, and a classifier that sees the padding."""
    model = fused_model("mask2former", official_geometry="oneformer")
    processor = ViTPFusionImageProcessor.from_generator_and_classifier(
        Mask2FormerImageProcessor(size=FORMER), ViTPImageProcessor(size=56), config=model.config
    )
    given = processor(noise_images(((45, 30), (30, 40))))
    assert given["original_sizes"].tolist() == [[30, 45], [40, 30]]
    assert given["content_sizes"].tolist() == [[64, 96], [96, 64]]
    with torch.no_grad():
        outputs = model(**given)
    resize = nn.functional.interpolate
    for row, ((height, width), (rows, columns)) in enumerate(
        zip(given["original_sizes"].tolist(), given["content_sizes"].tolist(), strict=True)
    ):
        masks = resize(outputs.masks_queries_logits[row, None], (96, 96), mode="bilinear")[..., :rows, :columns]
        masks = resize(masks, (height, width), mode="bilinear")[0]
        best = masks.flatten(1).argmax(1)
        expected = torch.stack((best % width / width, best // width / height), -1)
        torch.testing.assert_close(outputs.prompts[row, :, :2], expected, atol=1e-6, rtol=0)
    padded = nn.functional.interpolate(given["pixel_values"], (56, 56), mode="bilinear", antialias=True)
    torch.testing.assert_close(given["classifier_pixel_values"], padded, **TOLERANCE)


def test_official_geometry_of_internimage():
    with torch.no_grad():
        outputs = fused_model(official_geometry="internimage")(**inputs())
    best = outputs.masks_queries_logits.flatten(2).argmax(-1)
    expected = torch.stack((best % 16 / 16, best // 16 / 16), -1)
    torch.testing.assert_close(outputs.prompts[..., :2], expected, atol=1e-6, rtol=0)


# Pruning


@pytest.mark.parametrize("normalization", ["oneformer", "internimage"])
@pytest.mark.parametrize("matches", [None, [-1, 1, 0, -1]])
def test_no_classifier_can_bring_a_pruned_query_back(normalization, matches):
    logits = 2 * torch.randn(400, 5)
    logits[:, -1] += 2
    said = [torch.randn(400, 4), *(100 * torch.eye(4)[k].expand(400, 4) for k in range(4))]
    for threshold in (0.0, 0.3, 0.8):
        panoptic = ~queries_that_matter(logits, "panoptic", threshold)
        instance = ~queries_that_matter(logits, "instance", threshold)
        assert panoptic.any()
        assert not panoptic.all()
        assert instance.any() == (threshold > 0)
        assert queries_that_matter(logits, "semantic", threshold).all()
        answers = [fuse_class_logits(logits, s, a, normalization, matches) for s in said for a in (0, 0.4, 1)]
        for answer in answers:
            scores, labels = answer.softmax(-1).max(-1)
            assert ((labels == 4) | (scores <= threshold))[panoptic].all()
            assert (answer.softmax(-1)[..., :-1].amax(-1) < threshold)[instance].all()
    with pytest.raises(ValueError, match=r"threshold=1\.5"):
        queries_that_matter(logits, "panoptic", 1.5)


@pytest.mark.parametrize(("task", "threshold"), [("panoptic", 0.0), ("panoptic", 0.4), ("instance", 0.3)])
def test_pruning_changes_no_answer(task, threshold):
    generator = tiny_eomt(id2label=LABELS, num_queries=40)
    with torch.no_grad():
        generator.class_predictor.weight *= 6  # decided enough for some queries to be no-object
    model = ViTPFusionForUniversalSegmentation.from_generator_and_classifier(
        generator, tiny_classifier(prompt_attention="isolated"), task=task
    )
    processor = ViTPFusionImageProcessor.from_generator_and_classifier(
        EoMTImageProcessor(size=64), ViTPImageProcessor(size=56), config=model.config
    )
    asked = []
    model.classifier.register_forward_pre_hook(lambda module, arguments: asked.append(arguments[1].shape[1]))
    images = noise_images(((90, 70), (50, 80)))
    with torch.no_grad():
        full = model(**processor(images))
        pruned = model(**processor(images), pruning_threshold=threshold)
    assert 0 < asked[1] < asked[0] == 40
    assert (
        pruned.prompt_logits.isnan().any(-1).sum()
        == (~queries_that_matter(full.generator_class_queries_logits, task, threshold)).sum()
    )
    post_process = getattr(processor, f"post_process_{task}_segmentation")
    for sizes in (None, [(70, 90), (80, 50)]):
        one, other = (post_process(o, threshold=threshold, target_sizes=sizes) for o in (full, pruned))
        for expected, found in zip(one, other, strict=True):
            assert expected["segments_info"]
            assert torch.equal(found["segmentation"], expected["segmentation"])
            for row, expected_row in zip(found["segments_info"], expected["segments_info"], strict=True):
                assert row["score"] == pytest.approx(expected_row["score"], abs=1e-5)
                assert row["label_id"] == expected_row["label_id"]


def test_outputs_with_pruned_queries_can_be_fused_again():
    generator = tiny_eomt(id2label=LABELS, num_queries=40)
    with torch.no_grad():
        generator.class_predictor.weight *= 6
    model = ViTPFusionForUniversalSegmentation.from_generator_and_classifier(
        generator, tiny_classifier(prompt_attention="isolated"), alpha=0.4
    )
    with torch.no_grad():
        outputs = model(**inputs(), task="panoptic", pruning_threshold=0.4)
        again = model.fuse(outputs.generator_class_queries_logits, outputs.prompt_logits, alpha=0.4)
        other = model.fuse(outputs.generator_class_queries_logits, outputs.prompt_logits, alpha=0.9)
    assert torch.equal(again, outputs.class_queries_logits)
    left_out = outputs.prompt_logits.isnan().all(-1)
    assert 0 < left_out.sum() < left_out.numel()
    assert torch.equal(other[left_out], outputs.generator_class_queries_logits[left_out])
    assert (other != again)[~left_out].any()


def test_classes_are_matched_by_the_names_that_were_given():
    unnamed = {label: f"LABEL_{label}" for label in LABELS}
    generator, classifier = (
        tiny_generator("mask2former", unnamed),
        tiny_classifier(dict(enumerate(reversed(LABELS.values())))),
    )
    model = ViTPFusionForUniversalSegmentation.from_generator_and_classifier(generator, classifier, id2label=LABELS)
    assert model.label_match.class_matches == (4, 3, 2, 1, 0)
    with pytest.raises(ValueError, match="have no names"):
        ViTPFusionForUniversalSegmentation.from_generator_and_classifier(generator, classifier)


def test_nothing_left_to_ask():
    generator = tiny_eomt(id2label=LABELS)
    with torch.no_grad():
        generator.class_predictor.bias[-1] = 100
    model = ViTPFusionForUniversalSegmentation.from_generator_and_classifier(
        generator, tiny_classifier(prompt_attention="isolated")
    )
    with torch.no_grad():
        outputs = model(**inputs(), pruning_threshold=0.5)
    assert torch.equal(outputs.class_queries_logits, outputs.generator_class_queries_logits)
    assert outputs.prompt_logits.isnan().all()


def test_joint_prompts_are_never_pruned():
    model, given = fused_model(), inputs()
    with torch.no_grad():
        assert torch.equal(
            model(**given, pruning_threshold=0.9).class_queries_logits, model(**given).class_queries_logits
        )


# Bad input


class Detector(nn.Module):
    def forward(self, pixel_values):
        return ModelOutput(logits=pixel_values, pred_boxes=pixel_values)


def test_a_generator_with_other_outputs():
    model = fused_model()
    model.generator = Detector()
    with pytest.raises(
        ValueError, match=r"Detector answers with logits, pred_boxes; fusion needs class_queries_logits"
    ):
        model(**inputs())


def test_a_generator_whose_names_do_not_fit_its_head():
    generator = tiny_generator("mask2former")
    generator.class_predictor = nn.Linear(32, 9)
    model = ViTPFusionForUniversalSegmentation.from_generator_and_classifier(generator, tiny_classifier())
    with pytest.raises(ValueError, match=r"9 class logits, but its id2label names 5 classes.*makes 6"):
        model(**inputs("mask2former"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": 1.4}, r"alpha=1.4 is no number in \[0, 1\]"),
        ({"task": "depth"}, "task='depth' is not one of 'panoptic', 'instance', 'semantic'"),
        ({"classifier_pixel_values": None}, "classifier_pixel_values are missing.*ViTPFusionImageProcessor"),
        ({"classifier_pixel_values": torch.zeros(3, 3, 56, 56)}, "classifier_pixel_values has 3 rows.*call for 2"),
        ({"content_sizes": torch.tensor([[64, 64]])}, "content_sizes has 1 rows.*call for 2"),
        ({"content_sizes": torch.tensor([[64, 64], [65, 80]])}, r"content_sizes\[1\]"),
        ({"patch_offsets": torch.tensor([[0, 0, 64], [1, 0, 64]]), "content_sizes": None}, "without content_sizes"),
        ({"original_sizes": torch.tensor([[9, 9], [9, 9]])}, "has official_geometry=None; use the same for both"),
        ({"mask_labels": [torch.zeros(0)]}, "mask_labels: not understood here; the generator is frozen"),
        ({"classifier_pixel_values": torch.zeros(2, 3, 10, 10)}, "10"),
    ],
)
def test_calls_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        fused_model()(**{**inputs(), **change})


def test_official_oneformer_needs_sizes():
    with pytest.raises(ValueError, match="needs content_sizes and original_sizes"):
        fused_model(official_geometry="oneformer")(**inputs())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": -1}, r"alpha=-1 is no number in \[0, 1\]"),
        ({"alpha": {"panoptic": 0.4}}, "must have one weight for each of panoptic, instance, semantic"),
        ({"alpha": {"panoptic": 0.4, "instance": 2, "semantic": 0.4}}, "alpha=2 "),
        ({"normalization": "softmax"}, "normalization='softmax' is not one of"),
        ({"label_mismatch": "drop"}, "label_mismatch='drop' is not one of"),
        ({"official_geometry": "paper"}, "official_geometry='paper' is not one of"),
        ({"task": "video"}, "task='video' is not one of"),
        ({"id2label": {0: "road"}}, "id2label names 1 classes, but the generator has 5"),
        ({"stuff_classes": [5]}, r"stuff_classes=\[5\] are not all among the classes 0 to 4"),
        ({"task_inputs": {"panoptic": [1]}}, "task_inputs has prompts for"),
        ({"classifier_config": tiny_eomt().config}, "classifier_config is of type 'segvit_eomt'; .* must be a ViT-P"),
        ({"generator_config": None}, "needs generator_config and classifier_config"),
        ({"generator_config": {"num_labels": 5}}, "must say their model_type"),
    ],
)
def test_configurations_that_do_not_fit(settings, message):
    parts = {
        "generator_config": tiny_generator("segvit_eomt").config,
        "classifier_config": tiny_classifier().config,
    }
    with pytest.raises(Exception, match=message) as caught:
        ViTPFusionConfig(**{**parts, **settings})
    assert isinstance(caught.value, ValueError)


def test_stuff_classes_of_a_published_label_set():
    from hf_segvit.models.published_labels import CITYSCAPES_LABELS

    labels = dict(enumerate(CITYSCAPES_LABELS))
    config = ViTPFusionConfig(
        generator_config=tiny_eomt(id2label=labels).config, classifier_config=tiny_classifier(labels).config
    )
    assert config.stuff_classes == list(range(11))
