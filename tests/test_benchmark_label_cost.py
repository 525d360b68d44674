"""The experiment on cheap labels: which models it trains, and what it refuses before it trains anything."""

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def label_cost(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import label_cost

    yield label_cost
    for name in [
        name for name, module in sys.modules.items() if str(BENCHMARKS) in str(getattr(module, "__file__", ""))
    ]:
        del sys.modules[name]


@pytest.mark.slow
@pytest.mark.parametrize("generator", ["eomt", "row0"])
def test_a_cell_is_trained_scored_and_not_repeated(generator, label_cost, tmp_path, capsys):
    words = ["run", "--generator", generator, "--masks", "3", "--labels", "coarse", "--steps", "1"]
    words += ["--classifier-steps", "1", "--limit", "5", "--output", str(tmp_path)]
    label_cost.main(words)
    content = json.loads((tmp_path / f"scenes-{generator}-3-coarse-seed0.json").read_text())
    assert content["generator"] == generator
    assert content["cheap_minutes"] > 0
    assert all(len(task["scores"]) == len(label_cost.ALPHAS) for task in content["tasks"].values())
    # ViT-P starts from an EoMT's blocks, whatever the generator.
    kinds = {path.name.split("-")[1] for path in tmp_path.iterdir() if (path / "config.json").is_file()}
    assert {"eomt", generator} <= kinds
    capsys.readouterr()
    label_cost.main(words)
    assert "is finished" in capsys.readouterr().out
    label_cost.main(["table", "--output", str(tmp_path)])
    assert (tmp_path / "label_cost.png").stat().st_size > 0


@pytest.mark.parametrize("words", [["--generator", "folder"], ["--generator", "folder", "--name", "Mine"]])
def test_another_generator_needs_a_name_and_the_blocks_to_start_from(words, label_cost, tmp_path):
    with pytest.raises(SystemExit, match=r"--generator folder needs --name, and --start"):
        label_cost.main(["run", *words, "--limit", "5", "--output", str(tmp_path)])
    assert not list(tmp_path.iterdir())
