"""The benchmark of the ladder: its rows, a short run of each start, what is skipped, the tables."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import ladder


def options(output: Path, *words: str) -> list[str]:
    short = ["--steps", "2", "--seconds", "0.01", "--scenes", "2", "--training-scenes", "3", "--pretraining-steps", "2"]
    return ["run", "--output", str(output), "--seeds", "0", "--difficulties", "hard", *short, *words]


def test_rows_differ_in_what_the_paper_removes() -> None:
    sizes = []
    for row in ladder.ROWS[:4]:
        model = ladder.build(row, "medium")
        sizes.append(sum(parameter.numel() for parameter in model.parameters()))
        assert model.config.masked_attention_probabilities == [1.0] * 4
    assert sizes == sorted(sizes, reverse=True)
    assert not ladder.build(ladder.BY_NAME["row0_never"], "medium").config.masked_attention
    assert ladder.build(ladder.BY_NAME["row5"], "medium").config.num_query_layers == 3


def test_progress_is_of_steps_or_of_time(monkeypatch) -> None:
    assert list(ladder.progress_of(4, None)) == [0, 0.25, 0.5, 0.75]
    ticks = iter([0.0, 0.0, 3.0, 6.0, 9.0, 12.0])
    monkeypatch.setattr(ladder.time, "process_time", lambda: next(ticks))
    assert list(ladder.progress_of(None, 10.0)) == [0, 0.3, 0.6, 0.9]


@pytest.mark.parametrize("kind", ["classifier", "autoencoder"])
def test_rows_start_from_the_pretrained_vit(kind, tmp_path) -> None:
    weights = ladder.pretrain(kind, "medium", 2, 3, tmp_path)
    name = "layers.2.attention.q_proj.weight"
    name = name if name in weights else next(key for key in weights if key.startswith("layers.2.") and "weight" in key)
    for row in (ladder.ROWS[0], ladder.ROWS[3], ladder.ROWS[5]):
        model = ladder.build(row, "medium", weights)
        assert torch.equal(model.base_model.state_dict()[name], weights[name])
    again = ladder.pretrain(kind, "medium", 2, 3, tmp_path)  # read, not trained
    assert all(torch.equal(again[key], value) for key, value in weights.items())


def test_a_run_is_written_once_and_reported(tmp_path, capsys, monkeypatch) -> None:
    for row, protocol in (("row3", "steps"), ("row5", "time"), ("eomt_never", "steps")):
        ladder.main(options(tmp_path, "--rows", row, "--protocols", protocol))
    files = sorted(path.name for path in tmp_path.glob("*.json"))
    names = ("steps-scratch-eomt_never", "steps-scratch-row3", "time-scratch-row5")
    assert files == [f"hard-{name}-0.json" for name in names]
    result = json.loads((tmp_path / files[1]).read_text())
    assert (result["row"], result["steps"], result["limit"]) == ("row3", 2, 2)
    assert {"pq", "pq_things", "pq_stuff"} <= result["scores"].keys()
    monkeypatch.setattr(ladder, "run_one", lambda *_: pytest.fail("is finished"))
    ladder.main(options(tmp_path, "--rows", "row3", "--protocols", "steps"))
    capsys.readouterr()
    ladder.main(["table", "--output", str(tmp_path)])
    text = capsys.readouterr().out
    assert "**hard scenes, 2 steps each, from scratch**" in text
    assert "| (3) without multi-scale | 1 | " in text
    assert "| EoMT, never masked | 1 | " in text
    assert (tmp_path / "ladder.png").stat().st_size > 1000


def test_without_results_there_is_no_table(tmp_path) -> None:
    with pytest.raises(SystemExit, match="there are no results"):
        ladder.main(["table", "--output", str(tmp_path)])


@pytest.mark.slow
def test_times_of_all_rows_beside_the_papers(monkeypatch, capsys) -> None:
    monkeypatch.setitem(ladder.SIZES, "S", (32, 4, 2))
    ladder.main(["time", "S", "--repeats", "1", "--image-size", "64"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| (")]
    assert len(lines) == 7
    assert [line.split("|")[-2].strip() for line in lines] == ["1.00", "1.24", "2.10", "2.21", "2.10", "4.41", ""]
