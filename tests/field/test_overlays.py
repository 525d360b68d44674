"""Overlays, answers and their remarks: names in any script, colours, many objects, nothing found, NaN, run folders."""

import json
import logging
import shutil

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from hf_segvit import EoMTImageProcessor
from hf_segvit.cli import main
from hf_segvit.drawing import fonts
from hf_segvit.drawing.colors import segment_colors
from hf_segvit.drawing.segments import contact_sheet, draw_prompts, draw_segments
from hf_segvit.inference.segmenter import Segmenter
from hf_segvit.inference.task_settings import task_of_checkpoint
from hf_segvit.models.image_processing_vit_p import ViTPImageProcessor

from ..test_visualize import boxes  # noqa: F401 - a fixture
from ..tiny_generators import noise_images, tiny_classifier, tiny_generator
from ..tiny_models import tiny_eomt

NAMES = {"Latin": "chaîne", "Cyrillic": "собака", "Greek": "σκύλος", "Han": "猫", "Devanagari": "घर"}


@pytest.fixture
def no_system_fonts(monkeypatch):
    """A machine without fonts, on which no notice was given yet."""
    monkeypatch.setattr(fonts, "_fontconfig_files", lambda letters: [])
    monkeypatch.setattr(fonts, "_folder_files", list)
    monkeypatch.delenv(fonts.VARIABLE, raising=False)
    monkeypatch.setattr(fonts, "_noticed", [])
    fonts._system_font.cache_clear()
    yield
    fonts._system_font.cache_clear()


def drawn(names, monkeypatch):
    """The texts that are drawn for segments of these names."""
    texts = []
    monkeypatch.setattr("hf_segvit.drawing.segments.label_segments", lambda *args: texts.extend(args[2]))
    side = 20 * len(names)
    segmentation = np.arange(side)[None].repeat(40, 0) // 20
    rows = [{"id": index, "label_id": index + 7, "score": 0.5} for index in range(len(names))]
    draw_segments(Image.new("RGB", (side, 40)), segmentation, rows, {i + 7: name for i, name in enumerate(names)})
    return [with_score for with_score, _ in texts]


def test_the_font_that_is_chosen_has_every_letter():
    found = 0
    for name in (*NAMES.values(), "cat", "Ünïcödé", "日本 cat"):
        if fonts.drawable(name, "?") != name:
            continue  # no such font on this machine
        found += 1
        font = fonts.font_of(name, 30)
        box = font.getmask("\uffff")
        for letter in set(name) - {" "}:
            mask = font.getmask(letter)
            assert any(bytes(mask)), f"{letter} has no ink"
            assert (mask.size, bytes(mask)) != (box.size, bytes(box)), f"{letter} is the box for missing letters"
    assert found, "plain letters at least"


def test_without_a_font_accents_go_and_other_names_become_label_ids(no_system_fonts, monkeypatch, caplog):
    with caplog.at_level(logging.WARNING):
        assert drawn(["chaîne", "猫", "cat"], monkeypatch) == ["chaine 0.50", "class 8 0.50", "cat 0.50"]
        assert drawn(["猫", "狗"], monkeypatch) == ["class 7 0.50", "class 8 0.50"]
    assert len(caplog.records) == 1, "said once"
    assert "(CJK)" in caplog.text
    assert fonts.VARIABLE in caplog.text
    assert "--font" in caplog.text


def test_prompts_and_titles_are_never_boxes_either(no_system_fonts, monkeypatch):
    texts = []
    monkeypatch.setattr("hf_segvit.drawing.segments.label_marks", lambda *args: texts.extend(args[2]))
    draw_prompts(Image.new("RGB", (40, 40)), [(5, 5)], [], [3], ["猫 0.9"])
    assert texts == ["class 3"]
    plain, odd = (contact_sheet([[Image.new("RGB", (90, 90))]], row_titles=[title]) for title in ("?.png", "猫.png"))
    assert plain.tobytes() == odd.tobytes()


def test_a_font_that_is_named_is_used(monkeypatch, tmp_path):
    monkeypatch.delenv(fonts.VARIABLE, raising=False)
    path = next((file for file in fonts._folder_files() if "Mono" in file), None)
    if path is None:
        pytest.skip("needs a monospaced font on this machine")
    monkeypatch.setenv(fonts.VARIABLE, path)
    assert fonts.font_of("cat", 20).getname() == ImageFont.truetype(path, 20).getname()
    monkeypatch.setenv(fonts.VARIABLE, str(tmp_path / "none.ttf"))
    with pytest.raises(ValueError, match=r"HF_SEGVIT_FONT .*none\.ttf cannot be opened as a font"):
        fonts.font_of("cat", 20)


def test_a_label_has_one_colour_in_every_image_and_its_neighbours_others():
    def colour(label, others=()):
        rows = [{"id": index, "label_id": each} for index, each in enumerate((*others, label))]
        return np.array(segment_colors(rows)[len(others)])

    for label in range(60):
        alone = colour(label)
        assert (alone == colour(label, others=(label + 1, label + 2))).all(), "whatever else is in the image"
        for step in (1, 2, 8, 16):
            assert np.abs(alone - colour(label + step)).max() >= 25, (label, step)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A tiny model for each task, and a ViT-P."""
    folder = tmp_path_factory.mktemp("models")
    for task in ("panoptic", "instance", "semantic"):
        tiny_eomt(num_queries=9).save_pretrained(folder / task)
        EoMTImageProcessor(task=task, size={"height": 64, "width": 64}).save_pretrained(folder / task)
    tiny_classifier().save_pretrained(folder / "vit_p")
    ViTPImageProcessor(size={"height": 56, "width": 56}).save_pretrained(folder / "vit_p")
    return folder


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    noise_images([(60, 40)])[0].save(path)
    return path


def segment(*words):
    return main(["segment", *map(str, words), "--device", "cpu"])


def test_font_option(checkpoints, photo, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv(fonts.VARIABLE, "")
    words = (photo, "--model", checkpoints / "semantic", "--output", tmp_path / "out")
    assert segment(*words, "--font", tmp_path / "none.ttf") == 2
    assert "none.ttf cannot be opened as a font" in capsys.readouterr().err
    path = next(iter(fonts._folder_files()), None)
    if path is not None:
        assert segment(*words, "--font", path) == 0


def test_nothing_above_the_threshold_is_said_with_the_highest_score(checkpoints, photo, tmp_path, capsys):
    for task in ("panoptic", "instance"):
        out = tmp_path / task
        assert segment(photo, "--model", checkpoints / task, "--output", out, "--threshold", "0.99") == 0
        listed = json.loads((out / "photo.segments.json").read_text())
        assert listed["segments"] == []
        answer = Segmenter.from_pretrained(str(checkpoints / task), device="cpu")([Image.open(photo)], threshold=0.0)
        assert listed["highest_score"] == pytest.approx(max(each.score for each in answer[0].segments), abs=1e-5)
        message = capsys.readouterr().err
        assert f"nothing above the threshold 0.99; the highest score is {listed['highest_score']:.3f}" in message


def test_more_objects_are_answered_when_asked_for(checkpoints, photo, tmp_path, capsys):
    def count(*more):
        words = (photo, "--model", checkpoints / "instance", "--threshold", "0", "--output", tmp_path / "out", *more)
        words = (*words, "--no-resume")
        assert segment(*words) == 0
        rows = json.loads((tmp_path / "out" / "photo.segments.json").read_text())["segments"]
        return rows, capsys.readouterr().err

    all_rows, message = count("--max-segments", "45")  # 9 queries of 5 classes
    assert "9 queries" in message
    rows, message = count("--max-segments", "3")
    assert "3 objects, the most that are kept" in message
    assert len(rows) == 3 < len(all_rows)
    for task in ("semantic", "panoptic"):
        words = (photo, "--model", checkpoints / task, "--output", tmp_path / "out", "--max-segments", "3")
        assert segment(*words) == 2
        assert f"--max-segments 3 is for instance segmentation; {task}" in capsys.readouterr().err


def test_the_limit_of_segments_leaves_the_processor_alone_and_serves_foreign_models():
    images = noise_images([(64, 64)])
    processor = EoMTImageProcessor(task="instance", size={"height": 64, "width": 64})
    limited = Segmenter(tiny_eomt(), processor, threshold=0.0, max_segments=2, device="cpu")
    assert len(limited(images)[0].segments) == 2
    assert processor.num_instances == 100
    from transformers import Mask2FormerImageProcessor

    foreign = Mask2FormerImageProcessor(size={"height": 64, "width": 64}, do_rescale=True)
    model = tiny_generator("mask2former")
    every, best = (
        Segmenter(model, foreign, task="instance", threshold=0.0, max_segments=limit, device="cpu").answers(images)[0]
        for limit in (None, 2)
    )
    scores = sorted((row["score"] for row in every["segments_info"]), reverse=True)
    assert len(scores) > 2
    assert sorted((row["score"] for row in best["segments_info"]), reverse=True) == scores[:2]
    assert len(best["segmentation"]) == 2


def test_nan_is_said_for_each_image(checkpoints, photo, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(checkpoints / "semantic", broken)
    settings = json.loads((broken / "preprocessor_config.json").read_text())
    # As an overflow in float16 would be: weights that are numbers, and outputs that are none.
    settings |= {"image_std": [1e-44, 0.5, 0.5]}
    (broken / "preprocessor_config.json").write_text(json.dumps(settings))
    for side in (1, 2):
        Image.new("RGB", (64, 64), (124, 116, 104)).save(tmp_path / f"grey{side}.png")
    files = [tmp_path / "grey1.png", tmp_path / "grey2.png"]
    assert segment(*files, "--model", broken, "--output", tmp_path / "out", "--batch-size", "2") == 1
    message = capsys.readouterr().err
    for file in files:
        assert f"{file}: the model answers NaN or infinity instead of numbers" in message
    assert not list((tmp_path / "out").glob("*.overlay.png"))


def test_only_the_images_with_nan_fail():
    model = tiny_eomt()
    segmenter = Segmenter(model, EoMTImageProcessor(size={"height": 64, "width": 64}), task="panoptic", device="cpu")
    forward = model.forward

    def spoil(pixel_values, **kwargs):
        outputs = forward(pixel_values, **kwargs)
        outputs.class_queries_logits[0] = torch.nan
        return outputs

    model.forward = spoil
    with pytest.raises(ValueError, match="for 1 of 2 inputs"):
        segmenter(noise_images([(64, 64), (64, 64)]))


def test_the_folder_of_a_run_is_its_model(checkpoints, photo, tmp_path, capsys):
    run = tmp_path / "runs" / "x"
    run.mkdir(parents=True)
    (run / "history.jsonl").write_text("")
    words = (photo, "--model", run, "--output", tmp_path / "out")
    assert segment(*words) == 2
    assert "a run that has not finished" in capsys.readouterr().err
    shutil.copytree(checkpoints / "semantic", run / "checkpoint-7")
    assert segment(*words) == 2
    assert f"name one of {run / 'checkpoint-7'}" in capsys.readouterr().err
    shutil.copytree(checkpoints / "semantic", run / "model")
    assert segment(*words) == 0
    assert f"its model is {run / 'model'}" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "photo.segments.json").read_text())["model"] == str(run / "model")
    assert main(["convert", "to-transformers", str(run), str(tmp_path / "converted"), "--no-check"]) in (0, 2)
    assert f"its model is {run / 'model'}" in capsys.readouterr().err
    assert main(["push", str(run), "owner/name", "--dry-run"]) in (0, 2)
    assert f"its model is {run / 'model'}" in capsys.readouterr().err


def test_the_task_of_a_checkpoint(checkpoints):
    for task in ("panoptic", "instance", "semantic"):
        assert task_of_checkpoint(str(checkpoints / task)) == task
    assert task_of_checkpoint(str(checkpoints / "vit_p")) == "points"
    assert task_of_checkpoint(str(checkpoints / "panoptic"), ("semantic",)) == "semantic", "the data has nothing else"
