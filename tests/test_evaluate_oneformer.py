"""Transformers' OneFormer in the evaluation: it is told the task, and its instances are those of its official rule."""

import json
import string

import pytest
import torch
from PIL import Image
from transformers import (
    CLIPTokenizer,
    OneFormerConfig,
    OneFormerForUniversalSegmentation,
    OneFormerImageProcessor,
    OneFormerProcessor,
    SwinConfig,
)

from hf_segvit.data.generated_scenes import GeneratedScenes
from hf_segvit.evaluation import evaluate
from hf_segvit.inference.segmenter import Segmenter
from hf_segvit.inference.views import Views
from hf_segvit.models.mask_encoding import decode_mask
from tests.test_evaluate import HEADLINES, TASKS, dataset_for

NUM_QUERIES = 9


def tiny_tokenizer() -> CLIPTokenizer:
    """A tokenizer of single letters: no download, and still one text for each task."""
    letters = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters]
    return CLIPTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("oneformer")
    labels = GeneratedScenes(1).id2label
    torch.manual_seed(0)
    swin = SwinConfig(
        image_size=64, patch_size=4, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = OneFormerConfig(
        backbone_config=swin, hidden_dim=32, conv_dim=32, mask_dim=32, encoder_feedforward_dim=16, dim_feedforward=16,
        encoder_layers=1, decoder_layers=2, query_dec_layers=1, num_attention_heads=2, num_queries=NUM_QUERIES,
        text_encoder_width=32, text_encoder_num_layers=1, text_encoder_vocab_size=80, text_encoder_n_ctx=4,
        task_seq_len=40, id2label=labels, init_std=0.5,
    )  # fmt: skip
    OneFormerForUniversalSegmentation(config).save_pretrained(folder)
    classes = {str(label): {"name": name, "isthing": int(label % 2 == 0)} for label, name in labels.items()}
    (folder / "classes.json").write_text(json.dumps(classes))
    images = OneFormerImageProcessor(
        size={"shortest_edge": 64, "longest_edge": 128}, repo_path=str(folder), class_info_file="classes.json",
        num_text=5,
    )  # fmt: skip
    processor = OneFormerProcessor(images, tiny_tokenizer(), max_seq_length=40, task_seq_length=40)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_evaluated(task, checkpoint):
    scenes = GeneratedScenes(3, size=(48, 64))
    predictor = Segmenter.from_pretrained(checkpoint, task=task, stuff_classes=scenes.stuff_classes)
    predictor.threshold = 0.02 if task == "panoptic" else None  # a random model is sure of nothing
    settings = {"stuff_classes": scenes.stuff_classes, "more_metrics": ["oracle"], "batch_size": 2}
    result = evaluate(predictor, dataset_for(task, scenes), scenes.id2label, **settings)
    assert result.num_images == 3
    assert 0 <= result.metrics[HEADLINES[task]] <= result.metrics[f"oracle_{HEADLINES[task]}"] < 0.9


def example_images():
    scenes = GeneratedScenes(2, size=(48, 64))
    return [Image.fromarray(scenes[0]["image"]), Image.fromarray(scenes[1]["image"]).crop((0, 0, 64, 32))]


def test_the_model_is_told_its_task(checkpoint):
    logits = {}
    for task in ("panoptic", "semantic"):
        predictor = Segmenter.from_pretrained(checkpoint, task=task)
        with torch.no_grad():
            (asked,) = predictor.ask(example_images()[:1])
        logits[task] = asked.views[0].outputs.class_queries_logits
        with torch.no_grad():
            told = predictor.processor(example_images()[:1], task_inputs=[task], return_tensors="pt")
            torch.testing.assert_close(predictor.model(**told).class_queries_logits, logits[task])
    assert (logits["panoptic"] - logits["semantic"]).abs().max() > 1e-4


def test_padding_of_a_batch_changes_no_answer(checkpoint):
    predictor = Segmenter.from_pretrained(checkpoint, task="semantic")
    together = predictor.answers(example_images())
    for one, image in zip(together, example_images(), strict=True):
        assert one.shape == (image.height, image.width)
        assert torch.equal(one, predictor.answers([image])[0])


def decided(model, inputs, outputs):
    """Queries that differ in their classes and in where they are; those of random weights hardly do."""
    classes, masks = outputs.class_queries_logits, outputs.masks_queries_logits
    outputs.class_queries_logits = 20 * (classes - classes.mean(1, keepdim=True))
    outputs.masks_queries_logits = 3 * (masks - masks.mean((2, 3), keepdim=True)) / masks.std((2, 3), keepdim=True)
    return outputs


def test_views_are_averaged(checkpoint):
    predictor = Segmenter.from_pretrained(checkpoint, task="semantic", views=Views((0.5, 1.0), flip=True))
    predictor.model.register_forward_hook(decided)
    (answer,) = predictor.answers(example_images()[:1])
    (image, processor), total = (example_images()[0], predictor.processor), 0
    for side in (32, 64):
        for mirrored in (False, True):
            seen = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image
            size = {"shortest_edge": side, "longest_edge": 2 * side}
            inputs = processor([seen], task_inputs=["semantic"], return_tensors="pt", size=size)
            with torch.no_grad():
                outputs = predictor.model(**inputs)
            # Scores at the masks' own cells, then scaled: what Transformers' processor of this model does.
            scores = torch.einsum(
                "qc,qhw->chw",
                outputs.class_queries_logits[0].softmax(-1)[:, :-1],
                outputs.masks_queries_logits[0].sigmoid(),
            )
            scores = torch.nn.functional.interpolate(scores[None], (48, 64), mode="bilinear", align_corners=False)[0]
            total = total + (scores.flip(-1) if mirrored else scores)
    assert len(answer.unique()) > 1
    assert (answer == total.argmax(0)).float().mean() > 0.995  # sums in another order


def test_instances_are_those_of_the_official_rule(checkpoint):
    predictor = Segmenter.from_pretrained(checkpoint, task="instance")
    image = example_images()[0]
    (answer,) = predictor.answers([image])
    with torch.no_grad():
        inputs = predictor.processor([image], task_inputs=["instance"], return_tensors="pt")
        outputs = predictor.model(**inputs)
    probabilities = outputs.class_queries_logits[0].softmax(-1)[:, :-1]
    masks = torch.nn.functional.interpolate(
        outputs.masks_queries_logits, inputs["pixel_values"].shape[-2:], mode="bilinear", align_corners=False
    )
    masks = torch.nn.functional.interpolate(masks, (image.height, image.width), mode="bilinear")[0]
    best, places = probabilities.flatten().topk(min(100, probabilities.numel()))
    expected = []
    for score, place in zip(best.tolist(), places.tolist(), strict=True):
        inside = masks[place // probabilities.shape[1]] > 0
        if inside.any():
            mean = masks[place // probabilities.shape[1]].sigmoid()[inside].mean().item()
            expected.append((place % probabilities.shape[1], int(inside.sum()), score * mean))
    areas = [int(decode_mask(rle).sum()) for rle in answer["segmentation"]]
    found = [(row["label_id"], area, row["score"]) for row, area in zip(answer["segments_info"], areas, strict=True)]
    assert len(found) == len(expected) > 20
    for ours, theirs in zip(sorted(found), sorted(expected), strict=True):
        assert ours[:2] == theirs[:2]
        assert ours[2] == pytest.approx(theirs[2], abs=1e-6)  # scores are rounded to six decimals
