"""The ViT-P benchmark on scenes: what each cell trains on, that finished cells are not repeated, peers and report."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import vit_p_scenes
import vit_p_scenes_peers
import vit_p_scenes_report
import vit_p_scenes_start
import vit_p_scenes_timing

from hf_segvit.models.image_processing_eomt import EoMTImageProcessor
from tests.tiny_models import tiny_eomt

FULL_CONFIG = vit_p_scenes.model_config


@pytest.fixture(autouse=True)
def small(monkeypatch) -> None:
    config = vit_p_scenes.model_config

    def tiny_config(attention, difficulty):
        made = config(attention, difficulty)
        made.hidden_size, made.intermediate_size, made.num_hidden_layers, made.num_attention_heads = 16, 24, 2, 2
        return made

    for name, value in {"model_config": tiny_config, "NUM_POINTS": 6, "BATCH_SIZE": 2, "RECORD_EVERY": 2}.items():
        monkeypatch.setattr(vit_p_scenes, name, value)
    # Scores do not depend on the number of threads, but other tests may have wanted theirs.
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)


def run(tmp_path, experiment, *options) -> None:
    sizes = ["--scenes", "64", "--test-scenes", "2", "--difficulty", "easy", "--steps", "4"]
    vit_p_scenes.main([experiment, "--output", str(tmp_path), *sizes, *options])


def test_cells_train_on_the_labels_that_they_are_named_after():
    cells = vit_p_scenes.CELLS
    scenes = vit_p_scenes.Scenes("train", 64, 0, "easy")
    few = vit_p_scenes.training_samples(cells["few fine"][1][0], scenes, 0, 32)
    assert len(few) == vit_p_scenes.FEW == 60
    boxes, then = (vit_p_scenes.training_samples(stage, scenes, 0, 32) for stage in cells["boxes, then few fine"][1])
    assert len(boxes) == 4  # of other scenes than the fine labels
    assert (boxes[0, 0].prompts[:, 2:] > 0).any()
    assert torch.equal(then[0, 5].prompts, few[0, 5].prompts)
    mixed = vit_p_scenes.training_samples(cells["few fine + coarse"][1][0], scenes, 0, 32)
    assert [part.augmentation.sampling.source for part in mixed.parts] == ["mask", "coarse"]
    assert [len(part.dataset) for part in mixed.parts] == [60, 4]
    assert mixed.ends.tolist() == [16, 64]
    assert sum(stage.share for stage in cells["boxes, then few fine"][1]) == 1


def test_runs_are_told_once_and_reported(tmp_path, capsys):
    run(tmp_path, "boxes")
    path = tmp_path / "boxes-then-few-fine-seed0.json"
    result = json.loads(path.read_text())
    assert [step for step, _ in result["history"]] == [2, 4]
    assert set(result["scores"]) == {"random", "interior", "boxes"}
    assert result["scores"]["random"]["num_points"] == 12
    before = path.stat().st_mtime_ns
    run(tmp_path, "boxes")
    assert path.stat().st_mtime_ns == before
    assert "few fine, seed 0: finished before" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="another setting"):
        run(tmp_path, "boxes", "--difficulty", "medium")
    run(tmp_path, "table")
    table = capsys.readouterr().out
    assert [row.split("|")[1].strip() for row in table.splitlines()[2:4]] == ["few fine", "boxes, then few fine"]
    top_1 = 100 * result["scores"]["random"]["top_1"]
    assert f"| boxes, then few fine | {top_1:.1f} |" in table
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_peers_answer_at_the_same_points(tmp_path):
    labels = {0: "disc", 1: "sky", 2: "grass", 3: "square", 4: "water", 5: "triangle"}
    tiny_eomt(id2label=labels, image_size=96).save_pretrained(tmp_path / "eomt")
    EoMTImageProcessor(size=96).save_pretrained(tmp_path / "eomt")
    run(tmp_path, "classes", "--eomt", str(tmp_path / "eomt"))
    results, timing = vit_p_scenes_report.read_results(tmp_path)
    assert set(results) == {"joint", "linear baseline", "EoMT"}
    assert timing is None
    points = [
        {
            kind: [row["points"] for row in cell[0]["scores"][kind]["per_class"].values()]
            for kind in ("random", "interior")
        }
        for cell in results.values()
    ]
    assert points[0] == points[1] == points[2]
    assert results["EoMT"][0]["scores"]["random"]["top_5"] is None
    assert "| EoMT |" in vit_p_scenes_report.markdown_table(results, None)


def test_the_linear_baseline_sees_the_pixels_around_a_point():
    image = torch.zeros(20, 30, 3, dtype=torch.uint8)
    image[5, 7] = 255
    entry = {"image": image.numpy()}
    at, beside, far = vit_p_scenes_peers.features(entry, torch.tensor([[7.5 / 30, 5.5 / 20], [0.3, 0.3], [0.9, 0.9]]))
    pixels = slice(0, 3 * 64)  # 16 x 16 pixels, averaged by four
    assert at[pixels].reshape(3, 8, 8)[0].nonzero().tolist() == [[4, 4]]
    assert beside[pixels].sum() == pytest.approx(at[pixels].sum())
    assert not far.any()


def test_times_of_all_ways_of_asking(monkeypatch):
    monkeypatch.setattr(vit_p_scenes_timing, "NUMBERS", (1, 3))
    monkeypatch.setattr(vit_p_scenes_timing, "REPEATS", 1)
    timing = vit_p_scenes_timing.time_prompts(vit_p_scenes.model_config, "easy", large=False)
    (ways,) = timing["milliseconds"].values()
    assert len(ways) == 4
    assert all(set(row) == {1, 3} and min(row.values()) > 0 for row in ways.values())
    table = vit_p_scenes_report.markdown_table({}, json.loads(json.dumps(timing)))
    assert "| joint, one pass |" in table


def test_rare_classes_are_those_that_occur_least():
    rows = {"0": (100, 0.9), "1": (80, 0.7), "2": (10, 0.2), "3": (20, 0.4)}
    scores = {"per_class": {label: {"points": points, "top_1": top_1} for label, (points, top_1) in rows.items()}}
    assert vit_p_scenes_report.rare_accuracy(scores) == pytest.approx(0.3)


def test_new_models_look_where_they_are_asked():
    torch.manual_seed(0)
    model = vit_p_scenes.ViTPForPointClassification(FULL_CONFIG("joint", "easy"))
    model = vit_p_scenes.place_aware(model).eval()
    model.set_attn_implementation("eager")
    rows, columns = model.config.grid_size
    points = torch.tensor([[0.1, 0.1], [0.9, 0.1], [0.1, 0.9], [0.9, 0.9]])
    pixels = torch.zeros(1, 3, 96, 96)
    with torch.no_grad():
        attentions = model(pixels, vit_p_scenes.as_prompts(points), output_attentions=True).attentions
    of_patches = attentions[0][0].mean(0)[:4, 4:].reshape(4, rows, columns)
    half = rows // 2
    near = [
        of_patches[0, :half, :half],
        of_patches[1, :half, half:],
        of_patches[2, half:, :half],
        of_patches[3, half:, half:],
    ]
    for share, quarter in zip(of_patches, near, strict=True):
        assert quarter.sum() > 0.35 * share.sum()  # a quarter of the patches; 0.25 without


def test_a_classifier_starts_from_the_blocks_of_an_eomt(tmp_path):
    eomt = tiny_eomt(image_size=32, num_register_tokens=0)
    eomt.save_pretrained(tmp_path)
    model = vit_p_scenes_start.from_eomt(str(tmp_path), vit_p_scenes.model_config("joint", "easy"))
    assert model.config.num_labels == len(vit_p_scenes.scene_labels("easy"))
    for index, layer in enumerate(model.vit_p.layers):
        source = eomt.eomt.layers[index]
        assert torch.equal(layer.mlp.state_dict()["fc1.weight"], source.mlp.state_dict()["fc1.weight"])
        assert torch.equal(layer.attention.k_proj.weight, layer.attention.q_proj.weight) == (index < 2)
    before = eomt.eomt.embeddings.position_embeddings.weight
    assert not torch.equal(model.vit_p.embeddings.position_embeddings.weight, before)
