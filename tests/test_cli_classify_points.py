"""`hf-segvit classify-points`: the answers of the model as table, image and JSON; mistakes as one line."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from hf_segvit import ViTPConfig, ViTPForPointClassification, ViTPImageProcessor
from hf_segvit.cli import main
from hf_segvit.drawing.colors import segment_colors
from hf_segvit.drawing.segments import draw_prompts

from .tiny_models import randomize, tiny_eomt

LABELS = {0: "sky", 1: "road", 2: "car", 3: "tree"}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vit-p")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    config = ViTPConfig(**sizes, image_size=56, id2label=LABELS, label2id={v: k for k, v in LABELS.items()})
    randomize(ViTPForPointClassification(config)).save_pretrained(folder)
    ViTPImageProcessor(size=56, id2label=LABELS).save_pretrained(folder)
    return folder


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def run(*words) -> int:
    return main(["classify-points", *map(str, words)])


@torch.no_grad()
def test_table_image_and_json_hold_the_answers_of_the_model(model_folder, photo, tmp_path, capsys):
    points, boxes = [[20, 30], [150, 119.5]], [[10, 10, 90, 60]]
    words = ["--points", "20,30", "150,119.5", "--boxes", "10,10,90,60", "--model", model_folder, "--top-k", 2]
    assert run(photo, *words, "--output", tmp_path / "new" / "out.png", "--json", tmp_path / "out.json") == 0
    model = ViTPForPointClassification.from_pretrained(model_folder).eval()
    processor = ViTPImageProcessor.from_pretrained(model_folder)
    outputs = model(**processor(Image.open(photo), input_points=[points], input_boxes=[boxes]))
    expected = processor.post_process_point_classification(outputs, top_k=2)[0]

    found = json.loads((tmp_path / "out.json").read_text())
    assert (found["format"], found["width"], found["height"]) == ("hf-segvit points", 160, 120)
    assert [prompt.get("point", prompt.get("box")) for prompt in found["prompts"]] == points + boxes
    for row, prompt in enumerate(found["prompts"]):
        assert [one["label"] for one in prompt["classes"]] == expected["labels"][row]
        assert [one["label_id"] for one in prompt["classes"]] == expected["label_ids"][row].tolist()
        scores = [one["score"] for one in prompt["classes"]]
        assert scores == pytest.approx(expected["scores"][row].tolist(), abs=1e-5)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["20,30", "150,119.5", "10,10,90,60"]
    assert all(line.split()[2] == labels[0] for line, labels in zip(lines, expected["labels"], strict=True))

    drawing = np.asarray(Image.open(tmp_path / "new" / "out.png").convert("RGB"))
    assert drawing.shape == (120, 160, 3)
    label = int(expected["label_ids"][0, 0])
    color = segment_colors([{"id": label, "label_id": label}])[label]
    assert tuple(drawing[30, 20]) == color


def test_without_files_it_prints_only(model_folder, photo, tmp_path, capsys):
    before = sorted(tmp_path.iterdir())
    assert run(photo, "--points", "1,2", "--model", model_folder) == 0
    assert sorted(tmp_path.iterdir()) == before
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_drawing_marks_places_and_leaves_the_image_alone():
    image = Image.new("RGB", (200, 100), (90, 90, 90))
    points, boxes = [(30, 50), (199, 99)], [(100, 20, 160, 80), (190, 0, 200, 100)]
    drawing = draw_prompts(image, points, boxes, [0, 1, 2, 0], ["sky 0.9", "road 0.8", "car 0.7", "sky 0.6"])
    assert drawing.size == image.size
    assert image.getcolors() == [(20000, (90, 90, 90))]
    colors = segment_colors([{"id": label, "label_id": label} for label in (0, 1, 2)])
    pixels = np.asarray(drawing)
    assert tuple(pixels[50, 30]) == colors[0]
    assert tuple(pixels[80, 130]) == colors[2]
    assert tuple(pixels[70, 115]) == (90, 90, 90)  # boxes are frames
    with pytest.raises(ValueError, match="4 prompts need as many"):
        draw_prompts(image, points, boxes, [0], ["sky"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no prompts"),
        (["--points", "1"], "--points 1: expected X,Y"),
        (["--points", "1,b"], "--points 1,b: expected X,Y"),
        (["--boxes", "1,2,3"], "--boxes 1,2,3: expected X0,Y0,X1,Y1"),
        (["--points", "-5,240"], "input_points[0][0] is (-5, 240), outside the image of 160 x 120"),
        (["--points", "5,-2.5,b"], "--points 5,-2.5,b: expected X,Y"),
        (["--points", "-5,2,3"], "--points -5,2,3: expected X,Y"),
        (["--boxes", "-5,-2,30,40"], "(-5, -2, 30, 40)"),
        (["--points", "160,5"], "input_points[0][0] is (160, 5), outside the image of 160 x 120"),
        (["--points", "nan,5"], "input_points[0][0] is (nan, 5), outside"),
        (["--boxes", "9,9,3,20"], "input_boxes[0][0]"),
        (["--points", "1,2", "--top-k", "0"], "--top-k 0 must be at least 1"),
        (["--points", "1,2", "--output", "x.gif"], "--output x.gif: its ending"),
        (["--points", "1,2", "--device", "warp"], "warp"),
    ],
)
def test_mistakes_are_one_line(model_folder, photo, words, message, capsys):
    assert run(photo, "--model", model_folder, *words) == 2
    printed = capsys.readouterr().err.strip().splitlines()
    assert message in printed[-1]
    assert printed[-1].startswith("hf-segvit classify-points: error: ")


def test_models_and_images_that_do_not_do(model_folder, photo, tmp_path, capsys):
    assert run(tmp_path / "none.png", "--points", "1,2", "--model", model_folder) == 2
    assert "none.png: no such file" in capsys.readouterr().err
    assert run(photo, "--points", "1,2", "--model", tmp_path / "none") == 2
    assert "there is no folder" in capsys.readouterr().err
    tiny_eomt().save_pretrained(tmp_path / "eomt")
    assert run(photo, "--points", "1,2", "--model", tmp_path / "eomt") == 2
    assert "this command classifies points with those of type segvit_vit_p" in capsys.readouterr().err
    ViTPForPointClassification.from_pretrained(model_folder).vit_p.save_pretrained(tmp_path / "base")
    assert run(photo, "--points", "1,2", "--model", tmp_path / "base") == 2
    assert "2 parameters are missing, such as 'classifier.bias'" in capsys.readouterr().err
