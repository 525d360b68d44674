"""`hf-segvit segment`: what it writes equals the library's answers, and every bad input ends in one clear line."""

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_masks
from safetensors.torch import load_file, save_file
from transformers import EomtConfig, EomtForUniversalSegmentation, EomtImageProcessor, PreTrainedConfig

from hf_segvit import EoMTImageProcessor
from hf_segvit.cli import main
from hf_segvit.drawing.colors import class_color
from hf_segvit.drawing.segments import draw_segments
from hf_segvit.inference import devices
from hf_segvit.inference.input_files import find_images, output_names
from hf_segvit.inference.segmenter import Segmenter
from hf_segvit.models.cpu_kernels import CPUKernels
from hf_segvit.models.mask_encoding import decode_mask

from .test_semantic_views import case, example_images
from .tiny_models import randomize, tiny_eomt

THRESHOLD = {"panoptic": 0.3, "instance": 0.03, "semantic": None}
PNG = {"panoptic": ["panoptic.png"], "instance": [], "semantic": ["semantic.png"]}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """A tiny random model for each task, whose answers have several segments."""
    folder = tmp_path_factory.mktemp("checkpoints")
    model = tiny_eomt(num_queries=9)
    with torch.no_grad():
        model.class_predictor.weight *= 4
    for task in THRESHOLD:
        model.save_pretrained(folder / task)
        # Random masks overlap so much that none would keep 80 % of its own.
        processor = EoMTImageProcessor(
            task=task, size={"height": 64, "width": 64}, stuff_classes=[4], overlap_mask_area_threshold=0.05
        )
        processor.save_pretrained(folder / task)
    return {task: folder / task for task in THRESHOLD}


@pytest.fixture
def images(tmp_path) -> Path:
    """A folder with three images of different shapes."""
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, size in (("one.png", (50, 70)), ("two.jpg", (64, 40)), ("three.webp", (33, 90))):
        blocks = rng.integers(0, 256, (*(-(-side // 8) for side in size), 3), dtype=np.uint8)
        large = blocks.repeat(8, 0).repeat(8, 1)[: size[0], : size[1]]
        Image.fromarray(large).save(folder / name)
    return folder


def segment(*arguments) -> int:
    return main(["segment", *map(str, arguments)])


def threshold_of(task: str) -> list[str]:
    return [] if THRESHOLD[task] is None else ["--threshold", str(THRESHOLD[task])]


def read_ids(path: Path) -> np.ndarray:
    """COCO's ids of a panoptic PNG, spelled out."""
    red, green, blue = np.moveaxis(np.asarray(Image.open(path)).astype(int), -1, 0)
    return red + 256 * green + 65536 * blue


def names_in(folder: Path) -> list[str]:
    """Files in a folder, without the manifest of the job."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(path.as_posix() for path in paths if not path.name.startswith(".hf-segvit-job"))


@pytest.mark.parametrize("task", list(THRESHOLD))
def test_files_hold_what_the_library_answers(task, checkpoints, images, tmp_path, capsys):
    output = tmp_path / "deep" / "output"
    assert segment(images, "--model", checkpoints[task], "--output", output, *threshold_of(task)) == 0
    endings = ["overlay.png", *PNG[task], "segments.json"]
    assert names_in(output) == sorted(f"{name}.{ending}" for name in ("one", "two", "three") for ending in endings)
    printed = capsys.readouterr()
    assert "3 of 3 images segmented" in printed.out
    assert f"{task} segmentation with {checkpoints[task]} on " in printed.err

    segmenter = Segmenter.from_pretrained(str(checkpoints[task]), device="cpu")
    num_segments = 0
    for file in images.iterdir():
        image = Image.open(file).convert("RGB")
        [answer] = segmenter([image], THRESHOLD[task])
        description = json.loads((output / f"{file.stem}.segments.json").read_text())
        assert {key: description[key] for key in list(description)[:-1]} == {
            "format": "hf-segvit segments",
            "version": 1,
            "model": str(checkpoints[task]),
            "task": task,
            "threshold": THRESHOLD[task],
            "picture": str(file),
            "width": image.width,
            "height": image.height,
        }
        rows = description["segments"]
        num_segments += len(rows)
        assert [row["label_id"] for row in rows] == [one.label_id for one in answer.segments]
        assert [row["label"] for row in rows] == [f"LABEL_{one.label_id}" for one in answer.segments]
        assert [row["score"] for row in rows] == [one.score for one in answer.segments]
        ids = None
        if task == "panoptic":
            ids = read_ids(output / f"{file.stem}.panoptic.png")
            assert (ids == np.maximum(answer.segment_map, 0)).all()
            assert set(np.unique(ids)) - {0} == {row["id"] for row in rows} == set(range(1, len(rows) + 1))
        elif task == "semantic":
            written = Image.open(output / f"{file.stem}.semantic.png")
            ids = np.asarray(written)
            # The palette shows each class in the colour that it has in overlays.
            assert (
                np.asarray(written.convert("RGB")) == np.array([class_color(label) for label in range(256)])[ids]
            ).all()
            assert ids.dtype == np.uint8
            assert (ids == answer.segment_map).all()
            assert [row["id"] for row in rows] == [row["label_id"] for row in rows] == np.unique(ids).tolist()
        for row in rows:
            mask = coco_masks.decode(row["segmentation"]).astype(bool) if ids is None else ids == row["id"]
            assert mask.shape == (image.height, image.width)
            assert row["area"] == mask.sum() > 0
            assert row["bbox"] == coco_masks.toBbox(coco_masks.encode(np.asfortranarray(mask, dtype=np.uint8))).tolist()
        overlay = Image.open(output / f"{file.stem}.overlay.png")
        assert overlay.width == image.width
        assert overlay.height >= image.height, "a legend may follow below"
        # The measures that the command hands on change nothing.
        drawn = draw_segments(image, answer.segment_map, answer.segments_info, segmenter.id2label, with_legend=True)
        assert (np.asarray(overlay) == np.asarray(drawn)).all()
        assert (np.asarray(overlay)[: image.height] != np.asarray(image)).any()
    assert num_segments >= 6, "too few segments to test anything"


def test_instances_equal_binary_maps_and_the_best_is_on_top(checkpoints, images):
    segmenter = Segmenter.from_pretrained(str(checkpoints["instance"]), device="cpu")
    image = Image.open(images / "one.png")
    [answer] = segmenter([image], 0.03)
    with torch.inference_mode():
        outputs = segmenter.model(**segmenter.processor([image]))
    [expected] = segmenter.processor.post_process_instance_segmentation(
        outputs, threshold=0.03, target_sizes=[(50, 70)], return_binary_maps=True
    )
    masks, scores = expected["segmentation"].numpy(), [row["score"] for row in expected["segments_info"]]
    assert len(masks) == len(answer.segments) > 2
    best = np.full((50, 70), -1)
    for index in np.argsort(scores, kind="stable"):
        best[masks[index]] = index
    assert (answer.segment_map == np.where(best < 0, -1, best + 1)).all()
    assert [one.area for one in answer.segments] == masks.sum((1, 2)).tolist()


@pytest.mark.parametrize("task", list(THRESHOLD))
def test_a_mask2former_segments_alone(task):
    """Its processor numbers segments from 1, with void as 0, and gives instances as binary maps."""
    model, processor = case("mask2former")
    # Random masks overlap so much that none would keep 80 % of its own.
    processor.post_process_panoptic_segmentation = functools.partial(
        processor.post_process_panoptic_segmentation, overlap_mask_area_threshold=0.05
    )
    threshold = {"panoptic": 0.05, "instance": 0.02, "semantic": None}[task]
    segmenter = Segmenter(model, processor, task=task, device="cpu")
    counts = []
    for image in example_images():
        [answer] = segmenter([image], threshold)
        with torch.inference_mode():
            outputs = model(**processor([image], return_tensors="pt"))
        post_process = getattr(processor, f"post_process_{task}_segmentation")
        size = [(image.height, image.width)]
        if task == "semantic":
            [label_map] = post_process(outputs, target_sizes=size)
            assert (answer.segment_map == label_map.numpy()).all()
            assert [one.label_id for one in answer.segments] == label_map.unique().tolist()
        elif task == "panoptic":
            [found] = post_process(outputs, threshold=threshold, target_sizes=size, label_ids_to_fuse=set())
            ids = found["segmentation"].numpy()
            rows = [row for row in found["segments_info"] if (ids == row["id"]).any()]
            assert [(one.label_id, one.score) for one in answer.segments] == [
                (row["label_id"], row["score"]) for row in rows
            ]
            for one, row in zip(answer.segments, rows, strict=True):
                assert ((answer.segment_map == one.id) == (ids == row["id"])).all()
            assert ((answer.segment_map == -1) == ~np.isin(ids, [row["id"] for row in rows])).all()
        else:
            [found] = post_process(outputs, threshold=threshold, target_sizes=size, return_binary_maps=True)
            masks = found["segmentation"].bool().numpy()
            assert all((decode_mask(one.rle) == mask).all() for one, mask in zip(answer.segments, masks, strict=True))
            assert [one.area for one in answer.segments] == masks.sum((1, 2)).tolist()
        counts.append(len(answer.segments))
    # Random weights differ between versions of PyTorch, and may give a single class to an image.
    assert sum(counts) > len(counts) or task == "semantic"


@pytest.mark.parametrize("task", list(THRESHOLD))
def test_batches_change_nothing(task, checkpoints, images, tmp_path):
    for size in (1, 2, 8):
        common = ("--model", checkpoints[task], "--batch-size", size, *threshold_of(task))
        assert segment(images, *common, "--output", tmp_path / str(size)) == 0
    for path in (tmp_path / "1").glob("[!.]*"):
        for size in (2, 8):
            other = tmp_path / str(size) / path.name
            if path.suffix == ".json":
                one, two = (json.loads(file.read_text())["segments"] for file in (path, other))
                assert [row["label_id"] for row in one] == [row["label_id"] for row in two]
                # Sums in batches of another size differ in their last bits.
                assert [row["score"] for row in one] == pytest.approx([row["score"] for row in two], abs=1e-5)
            elif "overlay" not in path.name:
                assert (np.asarray(Image.open(path)) != np.asarray(Image.open(other))).mean() < 0.01


def test_half_precision_gives_nearly_the_same(checkpoints, images, tmp_path):
    for dtype in ("float32", "bfloat16"):
        arguments = ("--model", checkpoints["semantic"], "--dtype", dtype, "--output", tmp_path / dtype)
        assert segment(images, *arguments) == 0
    for path in (tmp_path / "float32").glob("*.semantic.png"):
        one, two = (np.asarray(Image.open(tmp_path / dtype / path.name)) for dtype in ("float32", "bfloat16"))
        assert (one == two).mean() > 0.9  # bfloat16 has 8 bits of precision; random masks have wide soft borders


def test_a_panoptic_model_serves_every_task(checkpoints, images, tmp_path):
    for task in THRESHOLD:
        arguments = ("--model", checkpoints["panoptic"], "--task", task, "--output", tmp_path / task)
        assert segment(images / "one.png", *arguments) == 0
        assert json.loads((tmp_path / task / "one.segments.json").read_text())["task"] == task


def test_transformers_own_checkpoints(images, tmp_path):
    torch.manual_seed(0)
    model = EomtForUniversalSegmentation(
        EomtConfig(
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=64,
            num_queries=7,
            num_blocks=2,
            num_labels=5,
        )
    )
    randomize(model).save_pretrained(tmp_path / "eomt")
    EomtImageProcessor(size={"shortest_edge": 64, "longest_edge": 64}, do_pad=True).save_pretrained(tmp_path / "eomt")
    arguments = ("--model", tmp_path / "eomt", "--output", tmp_path / "output", "--threshold", "0")
    assert segment(images / "one.png", *arguments) == 0
    assert names_in(tmp_path / "output") == ["one.overlay.png", "one.panoptic.png", "one.segments.json"]


def test_orientation_is_applied(checkpoints, images, tmp_path):
    image = Image.open(images / "one.png")
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by a quarter
    image.save(tmp_path / "turned.png", exif=exif)
    arguments = ("--model", checkpoints["panoptic"], "--output", tmp_path / "output")
    assert segment(tmp_path / "turned.png", *arguments) == 0
    assert Image.open(tmp_path / "output" / "turned.panoptic.png").size == (50, 70)


def test_a_bad_image_is_reported_and_the_rest_go_on(checkpoints, images, tmp_path, capsys):
    (images / "empty.png").write_bytes(b"")
    (images / "text.jpg").write_text("not an image")
    whole = (images / "one.png").read_bytes()
    (images / "truncated.png").write_bytes(whole[: len(whole) // 2])
    for size in (1, 4):
        output = tmp_path / str(size)
        arguments = ("--model", checkpoints["panoptic"], "--output", output, "--batch-size", size)
        assert segment(images, images / "missing.png", *arguments) == 1
        assert names_in(output) == sorted(
            f"{name}.{ending}"
            for name in ("one", "two", "three")
            for ending in ("overlay.png", "panoptic.png", "segments.json")
        )
        printed = capsys.readouterr()
        assert "3 of 7 images segmented" in printed.out
        for name, reason in (
            ("empty.png", "empty"),
            ("text.jpg", "not an image"),
            ("truncated.png", "truncated"),
            ("missing.png", "no such image"),
        ):
            [line] = [line for line in printed.err.splitlines() if name in line]
            assert reason in line
        assert "Traceback" not in printed.err


def test_a_image_that_the_model_cannot_take_does_not_stop_its_batch(checkpoints, images, tmp_path, capsys):
    Image.new("RGB", (50_000, 1)).save(images / "line.png")  # would be scaled to 3.2 million x 64 pixels
    arguments = ("--model", checkpoints["semantic"], "--output", tmp_path / "output", "--batch-size", 4)
    assert segment(images, *arguments) == 1
    assert "line.png: " in capsys.readouterr().err
    assert len(names_in(tmp_path / "output")) == 9


def test_finding_images(tmp_path):
    for name in (
        "a.jpg",
        "b.PNG",
        "notes.txt",
        "deep/c.webp",
        "deep/c.overlay.png",
        "c.segments.json",
        "d.panoptic.png",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def found(*patterns):
        images, empty = find_images(str(pattern) for pattern in patterns)
        return [str(image.relative_path) for image in images], empty

    assert found(tmp_path) == (["a.jpg", "b.PNG", "deep/c.webp"], [])
    assert found(tmp_path / "*.[jP]*") == (["a.jpg", "b.PNG"], [])
    assert found(tmp_path / "**" / "*.webp") == (["c.webp"], [])
    # A file that is named is taken whatever its ending, and everything counts once.
    assert found(tmp_path / "notes.txt", tmp_path / "a.jpg", tmp_path) == (
        ["notes.txt", "a.jpg", "b.PNG", "deep/c.webp"],
        [],
    )
    assert found(tmp_path / "x*", tmp_path / "a.jpg") == (["a.jpg"], [str(tmp_path / "x*")])
    # A glob character in a real name is no glob.
    (tmp_path / "e[1].jpg").touch()
    assert found(tmp_path / "e[1].jpg") == (["e[1].jpg"], [])


@pytest.mark.parametrize(
    ("places", "names"),
    [
        (["a.jpg", "b.jpg"], ["a", "b"]),
        (["a.jpg", "a.png", "b.png"], ["a.jpg", "a.png", "b"]),
        (["a.jpg", "A.png"], ["a.jpg", "A.png"]),
        (["x/a.jpg", "y/a.jpg"], ["x/a", "y/a"]),
        (["a.jpg", "a.jpg", "a.jpg"], ["a.jpg", "a.jpg-2", "a.jpg-3"]),
        (["a.jpg", "a.png", "a.jpg.png"], ["a.jpg", "a.png", "a.jpg-2"]),
        (["photo.2024.jpg"], ["photo.2024"]),
    ],
)
def test_names_never_collide(places, names):
    assert output_names([PurePosixPath(place) for place in places]) == names


def test_results_do_not_overwrite_each_other_and_folders_are_kept(checkpoints, images, tmp_path):
    (images / "deep").mkdir()
    for name in ("one.jpg", "deep/one.png"):
        Image.open(images / "one.png").save(images / name)
    output = images / "output"  # inside the folder that is searched
    for _ in range(2):
        assert segment(images, "--model", checkpoints["instance"], "--output", output) == 0
        assert [name for name in names_in(output) if name.endswith("json")] == [
            "deep/one.segments.json",
            "one.jpg.segments.json",
            "one.png.segments.json",
            "three.segments.json",
            "two.segments.json",
        ]


def broken_copy(source: Path, target: Path, change) -> Path:
    """A checkpoint whose weights were changed."""
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    weights = load_file(target / "model.safetensors")
    change(weights)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_nan_in_the_weights_is_named(checkpoints, images, tmp_path, capsys):
    name = "eomt.layers.1.mlp.fc1.weight"
    model = broken_copy(checkpoints["panoptic"], tmp_path / "nan", lambda w: w[name].view(-1)[5:6].fill_(float("nan")))
    assert segment(images, "--model", model, "--output", tmp_path / "output") == 2
    assert f"{model}: {name} holds NaN or infinity" in capsys.readouterr().err


def change_config(folder: Path, **fields) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder: os.truncate(folder / "model.safetensors", 5000),
            "bytes, but the file has 5000; the file is damaged",
        ),
        (lambda folder: (folder / "model.safetensors").unlink(), "it holds no model.safetensors"),
        (
            lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
            "holds no model.safetensors, but 'pytorch_model.bin'; pickled weights are read only by",
        ),
        (lambda folder: (folder / "config.json").write_text("{"), "model/config.json: cannot be read as JSON"),
        (
            lambda folder: (folder / "preprocessor_config.json").write_text("{"),
            "preprocessor_config.json: cannot be read as JSON",
        ),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), "no preprocessor_config.json"),
        (lambda folder: change_config(folder, num_queries=5), "'eomt.query.weight' has shape (9, 32) instead of (5,"),
        (lambda folder: change_config(folder, num_attention_heads=3), "num_attention_heads=3 does not divide"),
    ],
)
def test_damaged_models_end_in_one_line(damage, message, checkpoints, images, tmp_path, capsys):
    model = broken_copy(checkpoints["panoptic"], tmp_path / "model", lambda weights: None)
    damage(model)
    assert segment(images, "--model", model, "--output", tmp_path / "output") == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_missing_weights_are_not_made_up(checkpoints, images, tmp_path, capsys):
    model = broken_copy(checkpoints["panoptic"], tmp_path / "partial", lambda w: w.pop("class_predictor.bias"))
    assert segment(images, "--model", model, "--output", tmp_path / "output") == 2
    assert "1 parameters are missing, such as 'class_predictor.bias'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": "nowhere/*.jpg"}, "no images match nowhere/*.jpg"),
        ({"--model": "./nowhere"}, "there is no folder ./nowhere"),
        ({"--model": "some/deep/path"}, "there is no folder some/deep/path"),
        ({"--model": "EMPTY"}, "holds no config.json"),
        ({"--model": "FILE"}, "is a file; name the folder"),
        ({"--task": "panoptic"}, "was trained for semantic segmentation and cannot do task 'panoptic'"),
        ({"--threshold": "0.5"}, "threshold=0.5: in semantic segmentation every pixel has a class"),
        ({"--threshold": "1.5"}, "--threshold 1.5 is outside [0, 1]"),
        ({"--batch-size": "0"}, "--batch-size 0 must be at least 1"),
        ({"--device": "cuda:9"}, "device 'cuda:9' is not there; this machine has"),
        ({"--device": "toaster"}, "device 'toaster' is not a device that PyTorch knows"),
        ({"--device": "meta"}, "device 'meta' computes nothing"),
        # Before a model is loaded that would not load either.
        ({"--output": "FILE", "--model": "./nowhere"}, "it exists and is not a folder"),
        ({"--output": "FILE/below", "--model": "./nowhere"}, "cannot write to"),
    ],
)
def test_wrong_arguments_end_in_one_line(change, message, checkpoints, images, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    arguments = {"--model": str(checkpoints["semantic"]), "--output": str(tmp_path / "output")}
    arguments |= {
        option: value.replace("EMPTY", str(tmp_path / "empty")).replace("FILE", str(tmp_path / "file"))
        for option, value in change.items()
    }
    first = arguments.pop("images", str(images))
    assert segment(first, *(word for pair in arguments.items() for word in pair)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert error.startswith("hf-segvit segment: error: ")
    assert not (tmp_path / "output").exists() or not any((tmp_path / "output").iterdir())


def test_other_model_types_are_refused(images, tmp_path, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "bert"}')
    assert segment(images, "--model", tmp_path / "model", "--output", tmp_path / "output") == 2
    error = capsys.readouterr().err
    assert "is a model of type 'bert'" in error
    assert "segvit_vit_p_fusion, mask2former, maskformer, oneformer segment" in error


@pytest.mark.parametrize("options", [[], ["--classifier", "vit-p"], ["--alpha", "0.5"]])
def test_a_name_that_no_repository_can_have_is_not_asked_for(options, images, tmp_path, capsys, monkeypatch):
    def ask(*args, **settings):
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr(PreTrainedConfig, "get_config_dict", ask)
    assert segment(images, "--model", "nofolder", "--output", tmp_path / "output", *options) == 2
    assert "there is no folder nofolder, and a Hub id looks like owner/name" in capsys.readouterr().err


def test_without_network_it_says_so_and_what_to_do(images, tmp_path):
    # A process of its own, as the Hub client reads its settings when it is imported.
    command = [sys.executable, "-m", "hf_segvit", "segment", str(images), "--model", "nobody/nothing"]
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache"), "PATH": "", "HOME": str(tmp_path)}
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "output")], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "cannot load nobody/nothing: it is neither a folder here nor in the local cache" in done.stderr
    assert "hf download nobody/nothing --local-dir FOLDER" in done.stderr
    assert "Traceback" not in done.stderr


def test_debug_shows_the_traceback(checkpoints, tmp_path):
    with pytest.raises(ValueError, match="no images match"):
        main(["--debug", "segment", "nowhere.jpg", "--model", "x", "--output", str(tmp_path)])


def test_usage_errors_exit_with_2(capsys):
    with pytest.raises(SystemExit) as error:
        main(["segment", "a.jpg"])
    assert error.value.code == 2
    assert "--model" in capsys.readouterr().err


def annealed(source: Path, folder: Path) -> Path:
    """A copy of a checkpoint whose attention is not masked."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "masked_attention_probabilities": [0.0, 0.0]}))
    return folder


@pytest.mark.parametrize("task", list(THRESHOLD))
def test_an_optimised_model_writes_the_same_files(task, checkpoints, images, tmp_path):
    model = annealed(checkpoints[task], tmp_path / "model")
    arguments = [images, "--model", model, "--device", "cpu", *threshold_of(task)]
    assert segment(*arguments, "--output", tmp_path / "plain") == 0
    assert segment(*arguments, "--output", tmp_path / "fast", "--optimize") == 0
    names = names_in(tmp_path / "plain")
    assert names == names_in(tmp_path / "fast")
    for name in names:
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "fast" / name).read_bytes()


def test_an_optimised_model_decodes_few_masks_and_still_knows_the_highest_score(checkpoints, images, tmp_path):
    model = annealed(checkpoints["panoptic"], tmp_path / "model")
    plain = Segmenter.from_pretrained(str(model), device="cpu")
    fast = Segmenter.from_pretrained(str(model), device="cpu", optimize={"fuse_qkv": True})
    pictures = [Image.open(file).convert("RGB") for file in sorted(images.iterdir())]
    for threshold in (0.3, 0.99):
        for expected, answer in zip(plain(pictures, threshold), fast(pictures, threshold), strict=True):
            assert [one.label_id for one in answer.segments] == [one.label_id for one in expected.segments]
            assert np.array_equal(answer.segment_map, expected.segment_map)
            assert answer.highest_score == pytest.approx(expected.highest_score, abs=1e-5)
    [asked] = fast.ask(pictures, 0.99, prune=True)
    assert asked.views[0].outputs.masks_queries_logits.shape[1] == 1
    assert fast.model.eomt.layers[0].attention.fused is not None


def test_optimisation_that_cannot_be_had_is_one_clear_line(checkpoints, images, tmp_path, capsys):
    model = annealed(checkpoints["panoptic"], tmp_path / "model")
    for folder, switch, text in (
        (checkpoints["panoptic"], [], "still masks attention in 2 of its 2 query layers"),
        (model, ["prune-mask"], "optimize: there is no switch 'prune_mask'; did you mean prune_masks?"),
        (model, ["cuda-graphs"], "cuda_graphs=True needs a model on a CUDA device"),
    ):
        arguments = ["--model", folder, "--output", tmp_path / "out", "--device", "cpu", "--optimize", *switch]
        assert segment(images, *arguments) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert text in error


def test_dtype_auto_is_what_the_processor_is_fast_in(checkpoints, images, tmp_path, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(devices.logger, "warning_once", said.append)
    for fast, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(devices, "KERNELS", CPUKernels(fast_bfloat16=fast))
        segmenter = Segmenter.from_pretrained(str(checkpoints["panoptic"]), device="cpu", dtype="auto")
        assert segmenter.model.dtype == dtype
        arguments = ["--model", checkpoints["panoptic"], "--output", tmp_path / str(fast), "--dtype", "auto"]
        assert segment(images, *arguments, "--device", "cpu") == 0
    assert [message.split(",")[0] for message in said] == [
        *["dtype auto: weights in bfloat16"] * 2,
        *["dtype auto: weights in float32"] * 2,
    ]
