"""The CamVid benchmark: floors and splits on frames made up here, the budget, a short run of each model, the report."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import camvid
import camvid_data
import camvid_models
import camvid_report


class Ticks:
    """A clock that moves only when told."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def write_frame(folder: Path, part: str, name: str, color: int, labels: np.ndarray) -> None:
    for kind in ("images", "annotations"):
        (folder / kind / part).mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", labels.shape[::-1], (color, color, color))
    image.save(folder / "images" / part / f"{name}.png")
    Image.fromarray(labels.astype(np.uint8)).save(folder / "annotations" / part / f"{name}.png")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four frames of two drives to train on, and two to score, of 48 x 64 pixels."""
    sky, road = np.zeros((48, 64), int), np.full((48, 64), 3)
    mixed = np.where(np.arange(48)[:, None] < 24, sky, road)
    voided = mixed.copy()
    voided[:, :32] = camvid_data.VOID
    for name, color, labels in (
        ("0001TP_1", 10, sky),
        ("0001TP_2", 250, voided),
        ("0006R0_1", 120, road),
        ("0006R0_2", 60, mixed),
    ):
        write_frame(tmp_path / "data", "train", name, color, labels)
    write_frame(tmp_path / "data", "val", "0016E5_1", 64, mixed)
    write_frame(tmp_path / "data", "val", "0016E5_2", 14, sky)
    return tmp_path / "data"


def test_splits(folder):
    train, score = camvid_data.read_split(folder, "official")
    assert [frame.name for frame in train] == ["0001TP_1", "0001TP_2", "0006R0_1", "0006R0_2"]
    assert [frame.name for frame in score] == ["0016E5_1", "0016E5_2"]
    train, score = camvid_data.read_split(folder, "drive")
    assert [frame.name for frame in train] == ["0001TP_1", "0001TP_2"]
    assert [frame.name for frame in score] == ["0006R0_1", "0006R0_2"]
    assert sorted(np.unique(train[1].labels)) == [-1, 0, 3]  # void is -1, not a class
    with pytest.raises(ValueError, match="no split 'test'; choose one of official, drive"):
        camvid_data.read_split(folder, "test")


def test_floors_of_frames_made_up_here(folder):
    train, score = camvid_data.read_split(folder, "official")
    images = [[frame.image for frame in frames] for frames in (train, score)]
    assert camvid_data.nearest_frames(*images) == [3, 0]  # grey 64 is nearest to 60, 14 to 10
    # Upper half: sky three times right, road once; void does not vote. Lower half left: sky 1, road 2; right: 1 to 3.
    prior = camvid_data.position_prior([frame.labels for frame in train])
    assert np.array_equal(prior, np.where(np.arange(48)[:, None] < 24, 0, 3) * np.ones((1, 64), int))
    floors = camvid_data.floors(train, score)
    assert floors["labels of the nearest training frame"] == 1.0
    # Of the prior: sky hits 2 of 3 halves and claims nothing else, road hits 1 of the 2 it claims.
    assert floors["commonest class of each position"] == pytest.approx((2 / 3 + 1 / 2) / 2)


def test_void_does_not_win_a_position():
    label_maps = [np.full((2, 2), label) for label in (-1, -1, -1, 4)]
    assert (camvid_data.position_prior(label_maps) == 4).all()


@pytest.mark.slow  # decodes 468 photographs twice
def test_floors_of_camvid(sample_data):
    """As the sample data's README states them."""
    for split, nearest, prior in (("official", 35.7, 16.7), ("drive", 19.3, 13.5)):
        floors = camvid_data.floors(*camvid_data.read_split(sample_data / "camvid", split))
        assert [round(100 * value, 1) for value in floors.values()] == [nearest, prior]


def test_budget_counts_only_what_runs():
    clock = Ticks()
    budget = camvid.Budget(40, clock)
    for _ in range(3):
        with budget.running():
            clock.now += 10
        clock.now += 1000  # scoring
    assert (budget.used, budget.share) == (30, 0.75)
    with pytest.raises(ValueError, match="give --minutes above 0"):
        camvid.Budget(0)


def test_trainings_take_turns():
    clock, order = Ticks(), []

    def steps(name, duration):
        budget = camvid.Budget(12, clock)
        while budget.share < 1:
            with budget.running():
                clock.now += duration
            order.append(name)
            yield budget
        return name

    assert camvid.take_turns([steps("slow", 6), steps("quick", 2)]) == ["slow", "quick"]
    # Ties go to the first; nobody waits for more than one step of the other.
    assert order == ["slow", "quick", "quick", "quick", "slow", "quick", "quick", "quick"]


def test_learning_rate_follows_the_share_of_the_budget():
    factor, warmup = camvid_models.learning_rate_factor, camvid_models.WARMUP
    assert [factor(0), factor(warmup / 2), factor(warmup), factor(1), factor(1.2)] == [0, 0.5, 1, 0, 0]
    assert factor((1 + warmup) / 2) == pytest.approx(0.5**0.9)


def test_masked_attention_is_annealed_by_the_share_of_the_budget():
    model = camvid_models.build_eomt()
    for share, expected in ((0.0, [1, 1]), (0.25, [0.5**0.9, 1]), (0.5, [0, 1]), (1.3, [0, 0])):
        camvid_models.RECIPES["eomt"].on_progress(model, share)
        assert model.config.masked_attention_probabilities == pytest.approx(expected, abs=1e-9)


def test_crops_are_the_same_whatever_the_batch_size(folder):
    train, _ = camvid_data.read_split(folder, "official")
    by_one, by_two = (iter(camvid_data.TrainingCrops(train, size, seed=3)) for size in (1, 2))
    single = [next(by_one)[0] for _ in range(8)]
    pairs = [sample for _ in range(4) for sample in next(by_two)]
    assert len({sample.image_id for sample in single[:4]}) == 4
    for one, other in zip(single, pairs, strict=True):
        assert one.image_id == other.image_id
        assert torch.equal(one.pixels, other.pixels)
        assert torch.equal(one.segment_map, other.segment_map)
    assert single[0].pixels.shape == (3, *camvid_data.INPUT)


def test_label_maps_of_a_batch_are_those_of_its_masks(folder):
    train, _ = camvid_data.read_split(folder, "official")
    samples = next(iter(camvid_data.TrainingCrops(train, 4, seed=0)))
    labels = camvid_models.collate_label_maps(samples)["labels"]
    masks = camvid_models.collate_masks(samples)
    for label_map, image, classes in zip(labels, masks["mask_labels"], masks["class_labels"], strict=True):
        expected = torch.full_like(label_map, camvid_models.IGNORED)
        for mask, label in zip(image, classes, strict=True):
            expected[mask.bool()] = label
        assert torch.equal(label_map, expected)
    assert (labels == camvid_models.IGNORED).any()  # padding, void


def test_a_run_is_scored_saved_and_not_repeated(folder, tmp_path, capsys):
    output = tmp_path / "out"
    arguments = ["train", "eomt", "segformer", "--data", str(folder), "--output", str(output), "--minutes", "0.002"]
    assert camvid.main(arguments) == 0
    paths = {model: camvid_report.result_file(output, "official", model, 0) for model in ("eomt", "segformer")}
    _, score = camvid_data.read_split(folder, "official")
    for model, path in paths.items():
        result = json.loads(path.read_text())
        assert result["steps"] >= 1
        assert result["crops"] == result["steps"] * result["batch_size"]
        assert all(math.isfinite(value) for point in result["losses"] for value in point)
        # What was saved scores the same.
        recipe = camvid_models.RECIPES[model]
        saved = type(recipe.build()).from_pretrained(output / "models" / path.stem).eval()
        assert camvid.evaluate(saved, recipe, score)["mean_iou"] == pytest.approx(result["mean_iou"], abs=1e-6)
    before = paths["eomt"].stat().st_mtime_ns
    assert camvid.main(arguments) == 0
    assert paths["eomt"].stat().st_mtime_ns == before
    assert "is there already" in capsys.readouterr().out
    assert camvid.main([*arguments[:-1], "0.004"]) == 2
    assert "choose another --output" in capsys.readouterr().err


def test_table_and_curves(tmp_path):
    common = {
        "minutes": 1,
        "clock": "wall",
        "machine": "m",
        "parameters": 2.5e6,
        "steps": 10,
        "crops": 40,
        "batch_size": 4,
    }
    common |= {"losses": [[1, 4.0], [2, 2.0]], "scores": [[1, 0.1], [2, 0.2]]}
    for split, model, seed, score in (
        ("official", "eomt", 0, 0.4),
        ("official", "eomt", 1, 0.5),
        ("drive", "segformer", 0, 0.25),
    ):
        result = {"split": split, "model": model, "seed": seed, "mean_iou": score}
        camvid.write_json(camvid_report.result_file(tmp_path, split, model, seed), common | result)
    results = camvid_report.read_results(tmp_path)
    lines = camvid_report.markdown_table(results, {"official": {"copy": 0.357}, "drive": {"copy": 0.193}}).splitlines()
    assert "| eomt | 45.0 [40.0, 50.0] |  | 2 | 2.5 M | 10 | 4 | 40 |" in lines
    assert "| segformer |  | 25.0 | 1 | 2.5 M | 10 | 4 | 40 |" in lines
    assert lines[-1].startswith("| floor: copy | 35.7 | 19.3 |")
    camvid_report.draw_curves(results, tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").size[0] > 1000
    with pytest.raises(ValueError, match="holds no results"):
        camvid_report.read_results(tmp_path / "empty")
