"""Twenty thousand images through `evaluate` and `segment`: memory does not grow with their number."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf_segvit.cli import main
from hf_segvit.evaluation import evaluate
from hf_segvit.inference import bulk
from hf_segvit.inference.segmenter import Asked, Segmenter
from hf_segvit.models.image_processing_eomt import EoMTImageProcessor
from tests.tiny_models import tiny_eomt

COUNT, EARLY = 20_000, 4_000
STATUS = Path("/proc/self/statm")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not STATUS.exists(), reason="needs Linux' /proc to read its memory")]


def resident_mib() -> float:
    return int(STATUS.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


class Growth:
    """Notes the memory after `EARLY` images and at the end."""

    def __init__(self):
        self.images, self.early, self.late = 0, 0.0, 0.0

    def add(self, count):
        self.images += count
        if self.images <= EARLY:
            self.early = resident_mib()
        self.late = resident_mib() if self.images % 1000 == 0 else self.late


class Scenes:
    """Semantic truth of 8 x 8 pixels for each index."""

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        pixels = np.random.default_rng(index).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        label_map = (pixels[..., 0] % 2).astype(np.int32)
        rows = [{"id": label, "label_id": label, "is_crowd": False} for label in np.unique(label_map).tolist()]
        return {"image": Image.fromarray(pixels), "image_id": index, "segment_map": label_map, "segments": rows}


def test_evaluating_many_images(tmp_path):
    growth = Growth()

    class StandIn:
        task, id2label = "semantic", {0: "even", 1: "odd"}

        def answers(self, images):
            growth.add(len(images))
            return [np.asarray(image)[..., 0] % 2 for image in images]

    settings = {"batch_size": 50, "partial_folder": tmp_path / "partial", "chunk_size": 2000}
    result = evaluate(StandIn(), Scenes(), StandIn.id2label, **settings)
    assert (result.num_images, result.metrics["mean_iou"]) == (COUNT, 1.0)
    assert growth.images == COUNT
    # A row of index, id and score for each image is 200 bytes; an 8 x 8 image with its parts would be 2 KiB.
    assert growth.late - growth.early < 15, (growth.early, growth.late)


def test_segmenting_many_images(tmp_path, monkeypatch, capsys):
    growth = Growth()
    folder = tmp_path / "images"
    folder.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / "0.png")
    for number in range(1, COUNT):
        os.link(folder / "0.png", folder / f"{number}.png")
    tiny_eomt().save_pretrained(tmp_path / "model")
    EoMTImageProcessor(size=64, task="semantic").save_pretrained(tmp_path / "model")
    answers, original, infer, results = [], Segmenter.prepare, Segmenter.infer, Segmenter.results

    def prepare(self, images):
        growth.add(len(images))
        if not answers:
            (asked,) = original(self, images[:1])
            answers.extend(self.results(self.infer(asked)))
        yield Asked([], [(64, 64)] * len(images))

    monkeypatch.setattr(Segmenter, "prepare", prepare)
    monkeypatch.setattr(Segmenter, "infer", lambda self, asked, *_, **__: infer(self, asked) if asked.views else asked)
    monkeypatch.setattr(
        Segmenter,
        "results",
        lambda self, asked, *_: results(self, asked) if asked.views else answers * len(asked.sizes),
    )
    written = []
    monkeypatch.setattr(bulk, "write_segment_files", lambda prefix, image, *rest: written.append(image.size))
    options = ["--model", str(tmp_path / "model"), "--device", "cpu", "--batch-size", "50"]
    assert main(["segment", str(folder), *options, "--output", str(tmp_path / "out")]) == 0
    assert f"{COUNT} of {COUNT} images segmented" in capsys.readouterr().out
    assert len(written) == growth.images == COUNT
    # Each image has 12 KiB of pixels, so that keeping them would take 190 MiB.
    assert growth.late - growth.early < 15, (growth.early, growth.late)
