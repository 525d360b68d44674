"""The metrics as modules of `evaluate`: equal to the package's classes, and at home in `evaluate`'s ways of use."""

import doctest
import gc
import importlib.util
import json
import os
import pickle
import re
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import evaluate
import numpy as np
import pytest
import yaml
from datasets.utils.filelock import FileLock
from evaluate.loading import get_imports

from hf_segvit.metrics.boundary import BoundaryAveragePrecision, BoundaryIoU
from hf_segvit.metrics.evaluate_module import compute_from_json
from hf_segvit.metrics.mask_average_precision import MaskAveragePrecision
from hf_segvit.metrics.mean_iou import MeanIoU
from hf_segvit.metrics.panoptic_quality import PanopticQuality
from hf_segvit.metrics.point_accuracy import PointAccuracy

ROOT = Path(__file__).parents[1]
MODULES = ROOT / "evaluate_modules"
NUM_LABELS = 4


def label_maps(rng, size):
    """Blocky labels with void, and a prediction with boxes of other classes, of no class too."""
    reference = np.kron(rng.integers(-1, NUM_LABELS, (size[0] // 4 + 1, size[1] // 4 + 1)), np.ones((4, 4), int))
    reference = reference[: size[0], : size[1]]
    prediction = np.roll(reference, rng.integers(-2, 3, 2), axis=(0, 1))
    prediction[: rng.integers(size[0]), : rng.integers(size[1])] = rng.integers(-1, NUM_LABELS + 1)
    return prediction, reference


def panoptic(rng, size):
    """Segments of random classes, some of them crowds, with void, and a prediction of shifted and renamed segments."""
    sides = []
    for ids in label_maps(rng, size):
        rows = [
            {"id": int(i), "label_id": int(i) % NUM_LABELS if rng.random() < 0.7 else int(rng.integers(NUM_LABELS))}
            for i in np.unique(ids)
            if i >= 0
        ]
        sides.append({"segmentation": ids.astype(np.int32), "segments_info": rows})
    for row in sides[1]["segments_info"]:
        row["is_crowd"] = bool(rng.random() < 0.2)
    return tuple(sides)


def instances(rng, size):
    """Random boxes as masks, some of them crowds, and shifted copies with coarse scores, so that many are equal."""
    count = int(rng.integers(0, 5))
    masks = np.zeros((count, *size), dtype=bool)
    for mask in masks:
        y, x = rng.integers(size[0] - 2), rng.integers(size[1] - 2)
        mask[y : y + rng.integers(2, 9), x : x + rng.integers(2, 9)] = True
    labels = rng.integers(NUM_LABELS, size=count)
    reference = {
        "segmentation": masks,
        "segments_info": [{"label_id": int(label), "is_crowd": bool(rng.random() < 0.2)} for label in labels],
    }
    kept = rng.random(count) < 0.8
    found = [{"label_id": int(label), "score": float(rng.integers(1, 5)) / 4} for label in labels[kept]]
    return {"segmentation": np.roll(masks[kept], rng.integers(-1, 2), axis=2), "segments_info": found}, reference


def points(rng, size):
    """Logits of as many points as the size has rows, sometimes of none, and labels of which some do not count."""
    count = int(size[0]) if rng.random() < 0.8 else 0
    return rng.normal(size=(count, NUM_LABELS)).astype(np.float32), rng.integers(-1, NUM_LABELS, count)


# Name: the package's class, its settings, and a maker of samples.
METRICS = {
    "panoptic_quality": (PanopticQuality, {"num_labels": NUM_LABELS, "stuff_classes": [0, 1]}, panoptic),
    "mean_iou": (MeanIoU, {"num_labels": NUM_LABELS, "absent": "zero"}, label_maps),
    "boundary_iou": (BoundaryIoU, {"num_labels": NUM_LABELS, "dilation_ratio": 0.04}, label_maps),
    "mask_average_precision": (MaskAveragePrecision, {"num_labels": NUM_LABELS}, instances),
    "boundary_average_precision": (BoundaryAveragePrecision, {"num_labels": NUM_LABELS}, instances),
    "point_accuracy": (PointAccuracy, {"num_labels": NUM_LABELS, "ignore_index": 255}, points),
}
every_metric = pytest.mark.parametrize("name", METRICS)


def samples(name, count=7, seed=0):
    """Pairs of predictions and references of different sizes; the same in every process."""
    rng = np.random.default_rng([seed, *name.encode()])
    return [METRICS[name][2](rng, tuple(rng.integers(8, 40, 2))) for _ in range(count)]


def sides(pairs):
    predictions, references = zip(*pairs, strict=True)
    return {"predictions": list(predictions), "references": list(references)}


@pytest.fixture(autouse=True)
def _offline(tmp_path, monkeypatch):
    """Nothing is fetched, and all that `evaluate` writes goes to the test's folder."""
    monkeypatch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", True)
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", tmp_path / "modules")
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path / "metrics")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "path", list(sys.path))
    # A module of an earlier test's folder would be found again by its name.
    for module in [module for module in sys.modules if module.split(".")[0] == "evaluate_modules"]:
        monkeypatch.delitem(sys.modules, module)


def load(name, **arguments):
    return evaluate.load(str(MODULES / name), **{**METRICS[name][1], **arguments})


@every_metric
def test_equals_the_class_to_the_last_digit(name):
    cls, settings, _ = METRICS[name]
    for seed in range(5):
        pairs = samples(name, 9, seed)
        metric, expected = load(name), cls(**settings)
        for batch in (pairs[:4], pairs[4:5], pairs[5:]):
            metric.add_batch(**sides(batch))
            expected.add_batch(**sides(batch))
        assert len(metric) == 9
        np.testing.assert_equal(metric.compute(), expected.compute())  # as ==, and NaN equals NaN


@every_metric
def test_the_ways_to_add_images_agree(name):
    pairs, metric = samples(name), load(name)
    ids = [f"image-{index}" for index in range(len(pairs))]
    metric.add_batch(**sides(pairs), image_ids=ids)
    expected = metric.compute()
    assert len(metric) == 0
    np.testing.assert_equal(metric.compute(**sides(pairs), image_ids=ids), expected)
    metric.add_batch(**sides(pairs[:-2]), image_ids=ids[:-2])
    np.testing.assert_equal(metric._compute(**sides(pairs), image_ids=ids), expected)
    last = metric.compute(**sides(pairs[-2:]), image_ids=ids[-2:])
    for (prediction, reference), image_id in zip(pairs, ids, strict=True):
        metric.add(prediction=prediction, reference=reference, image_id=image_id)
    for other in (last, metric.compute()):
        assert_close(other, expected)


def assert_close(result, expected):
    """Equal up to the order in which numbers were summed."""
    assert result.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, dict):
            assert_close(result[key], value)
        elif isinstance(value, float):
            assert result[key] == pytest.approx(value, rel=1e-12, nan_ok=True)
        else:
            assert result[key] == value


@every_metric
def test_settings_may_wait_for_compute(name):
    _, settings, _ = METRICS[name]
    inputs = sides(samples(name))
    metric = evaluate.load(str(MODULES / name))
    np.testing.assert_equal(metric.compute(**inputs, **settings), load(name).compute(**inputs))
    with pytest.raises(ValueError, match=r"needs \['num_labels'.*evaluate.load\(.*num_labels=\.\.\."):
        metric.add_batch(**inputs)


@every_metric
def test_no_image_is_kept_or_written(name, tmp_path):
    metric, pairs = load(name), samples(name)
    arrays = [side["segmentation"] if isinstance(side, dict) else side for pair in pairs for side in pair]
    alive = [weakref.ref(array) for array in arrays]
    metric.add_batch(**sides(pairs))
    metric.add(prediction=pairs[0][0], reference=pairs[0][1])
    del pairs, arrays
    gc.collect()
    assert [ref() for ref in alive] == [None] * len(alive)
    assert not [path for path in (tmp_path / "metrics").rglob("*") if path.is_file()]
    assert len(metric) == 8


@every_metric
def test_is_described_as_evaluate_expects(name):
    metric = load(name)
    assert (metric.name, metric.module_type, metric.format) == (name, "metric", None)
    assert metric.description
    assert metric.citation.startswith("@")
    assert f"usage: {chr(34) * 3}{METRICS[name][0].__doc__}" in repr(metric)
    assert METRICS[name][0].__doc__ in metric.add_batch.__doc__
    choices = metric.features if isinstance(metric.features, list) else [metric.features]
    assert all(set(features) == {"predictions", "references"} for features in choices)
    required = load(name, require_image_ids=True)
    assert required._feature_names() == ["predictions", "references", "image_ids"]


@pytest.mark.parametrize("name", ["panoptic_quality", "mean_iou", "boundary_iou", "point_accuracy"])
def test_the_features_hold_the_samples(name):
    metric = load(name)
    for prediction, reference in samples(name, 3):
        encoded = metric.features.encode_example({"predictions": prediction, "references": reference})
        again = metric.features.decode_example(encoded)
        np.testing.assert_equal(
            metric.compute(predictions=[again["predictions"]], references=[again["references"]]),
            metric.compute(predictions=[prediction], references=[reference]),
        )


def test_combined_metrics_return_the_values_of_both():
    pairs = samples("mean_iou")
    expected = {name: load(name).compute(**sides(pairs)) for name in ("mean_iou", "boundary_iou")}
    both = evaluate.combine([load("mean_iou"), load("boundary_iou")])
    results = [both.compute(**sides(pairs))]
    both.add_batch(**sides(pairs))
    results.append(both.compute())
    for prediction, reference in pairs:
        both.add(prediction=prediction, reference=reference)
    results.append(both.compute())
    for result in results:
        assert result["mean_iou"] == expected["mean_iou"]["mean_iou"]
        assert result["boundary_iou"] == expected["boundary_iou"]["boundary_iou"]
        np.testing.assert_equal(result["mean_iou_per_class"], expected["mean_iou"]["per_class"])
        np.testing.assert_equal(result["boundary_iou_per_class"], expected["boundary_iou"]["per_class"])


def test_combined_metrics_get_image_ids_where_they_require_them():
    pairs = samples("mean_iou")
    both = evaluate.combine([load(name, require_image_ids=True) for name in ("mean_iou", "boundary_iou")])
    both.add_batch(**sides(pairs), image_ids=range(7))
    with pytest.raises(ValueError, match="image id 3 was counted already"):
        both.add(prediction=pairs[0][0], reference=pairs[0][1], image_ids=3)


def run_processes(name, folder, rounds):
    """What two processes computed, round by round."""
    images = folder / "images.pickle"
    images.write_bytes(pickle.dumps((rounds, METRICS[name][1])))
    environment = {
        "HF_EVALUATE_OFFLINE": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(folder / "modules"),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    outputs, processes = [folder / f"results-{process_id}.pickle" for process_id in range(2)], []
    for process_id, output in enumerate(outputs):
        command = [sys.executable, ROOT / "tests" / "evaluate_processes.py", MODULES / name, folder / "cache"]
        command += [str(process_id), "2", images, output]
        processes.append(subprocess.Popen(command, env={**os.environ, **environment}))
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    return [pickle.loads(output.read_bytes()) for output in outputs]


def run_threads(folder, inputs, settings=({}, {}), use=lambda metric, inputs: metric.compute(**inputs)):
    """What two threads in the part of processes computed, or the errors that they met."""
    metrics = [
        load("mean_iou", num_process=2, process_id=index, cache_dir=str(folder), timeout=30, **settings[index])
        for index in range(2)
    ]
    with ThreadPoolExecutor() as threads:
        futures = [threads.submit(use, metric, inputs[index]) for index, metric in enumerate(metrics)]
        return [future.exception() or future.result() for future in futures]


@pytest.mark.parametrize("name", ["panoptic_quality", "mask_average_precision"])
def test_two_processes_agree_with_one(name, tmp_path):
    # The second round has one image, none of it for process 1; the third comes as soon as process 1 is through.
    rounds = [samples(name, 7, seed=1), samples(name, 1, seed=2), samples(name, 4, seed=3)]
    first, second = run_processes(name, tmp_path, rounds)
    assert second == [None] * 3
    for result, pairs in zip(first, rounds, strict=True):
        parts = [METRICS[name][0](**METRICS[name][1]) for _ in range(2)]
        for index, (prediction, reference) in enumerate(pairs):
            parts[index % 2].add_batch(predictions=[prediction], references=[reference], image_ids=[index])
        parts[0].merge(parts[1])
        np.testing.assert_equal(result, parts[0].compute())
        assert_close(result, load(name).compute(**sides(pairs), image_ids=range(len(pairs))))
    left = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert {path.suffix for path in left} <= {".lock"}
    assert sum(path.stat().st_size for path in left) == 0


def test_processes_that_disagree_are_told(tmp_path):
    pairs = samples("mean_iou")
    halves = [sides(pairs[:4]), sides(pairs[4:])]
    first, second = run_threads(tmp_path, halves, [{"ignore_index": 255}, {"ignore_index": 254}])
    assert second is None
    with pytest.raises(ValueError, match=r"settings .*'ignore_index': 254.*process 0 has .*'ignore_index': 255"):
        raise first
    first, _ = run_threads(tmp_path, [{**half, "image_ids": range(len(half["references"]))} for half in halves])
    with pytest.raises(ValueError, match=r"image id 0 was counted already.*shard the evaluation"):
        raise first
    # Both times the folder was left as it should be for the next run.
    first, _ = run_threads(tmp_path, halves)
    assert first == load("mean_iou").compute(**sides(pairs))


def test_what_a_broken_run_left_is_not_counted(tmp_path):
    folder = tmp_path / "mean_iou" / "default"
    folder.mkdir(parents=True)
    (folder / "default_experiment-2-1.npz").write_bytes(b"of another run")
    pairs = samples("mean_iou")
    halves = [sides(pairs[:4]), sides(pairs[4:])]

    def use(metric, inputs):
        metric.add_batch(**inputs)
        if metric.process_id:
            metric._release()  # as when it ends before it computes
            return None
        return metric.compute()

    first, _ = run_threads(tmp_path, halves, use=use)
    with pytest.raises(ValueError, match=r"no counts in .*2-1\.npz: its process ended before it computed"):
        raise first
    first, _ = run_threads(tmp_path, halves)
    assert first == load("mean_iou").compute(**sides(pairs))


def test_a_process_that_stays_away_is_told(tmp_path):
    metric = load("mean_iou", num_process=2, cache_dir=str(tmp_path), timeout=0.1)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"Expected to find locked file .*2-1\.arrow\.lock"):
            metric.compute(**sides(samples("mean_iou")))


def test_two_evaluations_of_one_name_are_told(tmp_path):
    metric = load("mean_iou", num_process=2, cache_dir=str(tmp_path), timeout=0.1)
    with (
        FileLock(str(tmp_path / "mean_iou" / "default" / "default_experiment-2-rdv.lock")),
        pytest.raises(ValueError, match=r"another evaluation holds .*'default_experiment'.*another experiment_id="),
    ):
        metric.compute(**sides(samples("mean_iou")))


def test_wrong_input_is_refused_with_image_and_remedy():
    (prediction, reference), *_ = samples("panoptic_quality")
    metric = load("panoptic_quality")
    metric.add(prediction=prediction, reference=reference, image_id="a")
    before = metric._metric.state_dict()

    def add(message, **inputs):
        with pytest.raises(ValueError, match=message):
            metric.add_batch(**inputs)

    add("no references; give", predictions=[prediction])
    add("no predictions", references=[reference])
    pair = {"predictions": [prediction], "references": [reference]}
    add(r"does not count \['labels'\]", **pair, labels=[1])
    no_rows = {"predictions": [prediction], "references": [{"segmentation": reference["segmentation"]}]}
    add(r"image 0 \(id 'b'\), reference: there is no \['segments_info'\].*give both", **no_rows, image_ids=["b"])
    smaller = {"predictions": [prediction], "references": [{**reference, "segmentation": np.zeros((3, 3), int)}]}
    add(r"image 0 \(id 'b'\): .*pass target_sizes=", **smaller, image_ids=["b"])
    add("image id 'a' was counted already.*drop the repeated", **pair, image_ids=["a"])
    add("image 0: the image id 1.5 is a float; give a string or an integer", **pair, image_ids=[1.5])
    assert len(metric) == 1
    np.testing.assert_equal(metric._metric.state_dict(), before)
    with pytest.raises(ValueError, match="no image_ids; give"):
        load("panoptic_quality", require_image_ids=True).add(prediction=prediction, reference=reference)


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match=r"no settings \['labels'\]; it has \['num_labels'"):
        load("mean_iou", labels=3)
    with pytest.raises(ValueError, match="num_labels is 0"):
        load("mean_iou", num_labels=0)
    metric, pairs = load("mean_iou"), samples("mean_iou")
    metric.add_batch(**sides(pairs))
    with pytest.raises(ValueError, match=r"has counted 7 images by other settings than .*'ignore_index': 9"):
        metric.compute(ignore_index=9)
    assert metric.compute(ignore_index=255) == load("mean_iou").compute(**sides(pairs))
    with pytest.raises(ValueError, match="has counted no image; call add"):
        metric.compute()


def test_settings_may_be_any_iterable():
    pairs = samples("panoptic_quality")
    given = load("panoptic_quality", stuff_classes=(label for label in np.arange(2)))
    for _ in range(2):
        np.testing.assert_equal(given.compute(**sides(pairs)), load("panoptic_quality").compute(**sides(pairs)))


def test_a_missing_package_is_told_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "hf_segvit", None)
    with pytest.raises(ImportError, match=r"hf_segvit.*pip install hf_segvit"):
        load("mean_iou")


def test_every_metric_has_a_whole_folder():
    assert {path.name for path in MODULES.iterdir()} == METRICS.keys()
    # A package of this name would hide the one that `evaluate` writes for loaded modules.
    assert not (MODULES / "__init__.py").exists()


@every_metric
def test_the_folder_stands_alone_as_a_space(name):
    script, card = MODULES / name / f"{name}.py", (MODULES / name / "README.md").read_text(encoding="utf-8")
    assert {(kind, module) for kind, module, *_ in get_imports(script)} == {
        ("library", module) for module in ("datasets", "evaluate", "hf_segvit")
    }
    head = yaml.safe_load(card.split("---\n")[1])
    assert {key: head[key] for key in ("sdk", "app_file", "tags")} == {
        "sdk": "gradio",
        "app_file": "app.py",
        "tags": ["evaluate", "metric"],
    }
    assert head["title"]
    assert head["description"]
    sections = ["Metric description", "How to use", "Inputs", "Output values", "Examples", "Limitations", "Citation"]
    assert re.findall(r"^##+ (.*)$", card, re.MULTILINE) == sections
    assert load(name).citation.strip() in card
    requirements = (MODULES / name / "requirements.txt").read_text().splitlines()
    assert [line for line in requirements if not line.startswith("#")] == ["evaluate>=0.4.6", "hf-segvit"]


@every_metric
def test_the_examples_of_the_card_run(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    results = doctest.testfile(str(MODULES / name / "README.md"), module_relative=False)
    assert results.attempted > 5
    assert not results.failed


@every_metric
def test_the_card_names_what_the_metric_takes_and_returns(name):
    card = (MODULES / name / "README.md").read_text(encoding="utf-8")
    outputs = card.split("### Output values")[1].split("## Examples")[0]
    result = load(name).compute(**sides(samples(name)))
    for key in [*result, *result["per_class"][0]]:
        base = re.sub(r"(_things|_stuff)$", "", key)
        assert f"`{key}`" in outputs or f"`{base}`" in outputs, key
    settings = card.split("Settings, given")[1].split("### Output")[0]
    assert re.findall(r"^- `(\w+)`", settings, re.MULTILINE) == list(METRICS[name][0].__init__.__annotations__)[:-1]


def run_app(name):
    specification = importlib.util.spec_from_file_location("app", MODULES / name / "app.py")
    app = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(app)
    return app


@every_metric
def test_the_page_computes_its_example(name, monkeypatch):
    shown = {}
    monkeypatch.setattr(
        "hf_segvit.metrics.evaluate_module.space_interface",  # needs gradio, see below
        lambda module, *, predictions, references, **settings: shown.update(
            module=module, predictions=predictions, references=references, settings=settings
        ),
    )
    run_app(name)
    module = shown.pop("module")
    assert module == MODULES / name / f"{name}.py"
    texts = {key: json.dumps(value) for key, value in shown.items()}
    result = json.loads(compute_from_json(module, **texts))
    expected = METRICS[name][0](**shown["settings"])
    expected.add_batch(predictions=shown["predictions"], references=shown["references"])
    main = next(iter(result))
    assert result[main] == expected.compute()[main]
    assert 0 < result[main] < 1
    with pytest.raises(ValueError, match="the references are not JSON"):
        compute_from_json(module, **{**texts, "references": "[1,"})
    with pytest.raises(ValueError, match=r"no settings \['cache_dir'\]"):
        compute_from_json(module, **{**texts, "settings": '{"cache_dir": "elsewhere"}'})


def test_the_page_in_gradio():
    gradio = pytest.importorskip("gradio")
    interface = run_app("panoptic_quality").interface
    values = [component.value for component in interface.input_components]
    assert json.loads(interface.fn(*values))["pq"] == pytest.approx((2 / 3 + 3 / 4) / 2)
    with pytest.raises(gradio.Error, match="their lengths are"):
        interface.fn("[]", *values[1:])
