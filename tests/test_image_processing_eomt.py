"""The image processor: geometry, targets, settings on disk, bad input, and its place in the pipeline."""

import copy
import json
import logging
import math
import os
import pickle
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, EomtImageProcessor, PreTrainedConfig, PreTrainedModel, pipeline
from transformers.modeling_outputs import ModelOutput
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

from hf_segvit.models import image_claims
from hf_segvit.models.image_geometry import padded_content_size, windowed_content_size, windows_of
from hf_segvit.models.image_processing_eomt import EoMTImageProcessor
from hf_segvit.models.mask_labels import masks_of_label_map, resize_label_map
from hf_segvit.models.published_labels import (
    ADE20K_LABELS,
    ADE20K_STUFF,
    CITYSCAPES_LABELS,
    COCO_PANOPTIC_LABELS,
    find_published_labels,
)

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def example_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def normalized(array: np.ndarray) -> torch.Tensor:
    return (torch.from_numpy(array).permute(2, 0, 1) / 255 - MEAN) / STD


class TestGeometry:
    def test_official_sizes(self) -> None:
        assert padded_content_size((480, 640), (640, 640)) == (480, 640)
        assert padded_content_size((1500, 776), (640, 640)) == (640, 331)  # Transformers: 639
        assert windowed_content_size((480, 640), (512, 512)) == (512, 683)  # Transformers: 682
        assert windowed_content_size((1024, 2048), (1024, 1024)) == (1024, 2048)
        # Halves round to even, as Python's round does.
        assert padded_content_size((64, 5), (32, 32)) == (32, 2)
        assert padded_content_size((64, 7), (32, 32)) == (32, 4)

    def test_official_windows(self) -> None:
        assert windows_of([(1024, 2048)], (1024, 1024)) == [(0, 0, 1024), (0, 1024, 2048)]
        assert windows_of([(512, 683)], (512, 512)) == [(0, 0, 512), (0, 171, 683)]
        assert windows_of([(512, 512), (1200, 512)], (512, 512)) == [
            (0, 0, 512),
            (1, 0, 512),
            (1, 344, 856),
            (1, 688, 1200),
        ]

    def test_windows_cover_every_pixel_and_keep_the_official_starts(self) -> None:
        for length in range(64, 64 * 12):
            windows = windows_of([(64, length)], (64, 64))
            count = math.ceil(length / 64)
            assert len(windows) == count
            assert all(end - start == 64 for _, start, end in windows)
            covered = np.zeros(length, bool)
            for _, start, end in windows:
                covered[start:end] = True
            assert covered.all()
            step = 64 - (count * 64 - length) / max(count - 1, 1)
            assert all(start - int(index * step) in (0, 1) for index, (_, start, _) in enumerate(windows))

    def test_a_side_never_vanishes(self) -> None:
        assert padded_content_size((1, 10_000), (64, 64)) == (1, 64)
        assert EoMTImageProcessor(size=64)(example_image(1, 500))["content_sizes"].tolist() == [[1, 64]]

    def test_inputs_need_not_be_square(self) -> None:
        assert padded_content_size((100, 100), (64, 128)) == (64, 64)
        assert windowed_content_size((100, 100), (64, 128)) == (128, 128)
        assert windows_of([(128, 128)], (64, 128)) == [(0, 0, 64), (0, 64, 128)]
        data = EoMTImageProcessor(size={"height": 64, "width": 128}, task="semantic")(example_image(128, 128))
        expected = normalized(example_image(128, 128))
        torch.testing.assert_close(data["pixel_values"], torch.stack([expected[:, :64], expected[:, 64:]]))


class TestImages:
    def test_padding_is_black_before_normalisation(self) -> None:
        array = example_image(40, 64)
        data = EoMTImageProcessor(size=64)(Image.fromarray(array))
        black = normalized(np.zeros((64, 64, 3), np.uint8))
        torch.testing.assert_close(data["pixel_values"][0, :, :40], normalized(array))
        torch.testing.assert_close(data["pixel_values"][0, :, 40:], black[:, 40:])
        assert data["content_sizes"].tolist() == [[40, 64]]
        assert data["content_sizes"].dtype == torch.int64
        assert set(data) == {"pixel_values", "content_sizes"}

    def test_resizing_is_pillows(self) -> None:
        # The official code resizes with Pillow; 8-bit results differ by one level in few pixels when enlarging.
        for height, width in ((100, 160), (30, 20)):
            array = example_image(height, width)
            size = padded_content_size((height, width), (64, 64))
            expected = np.asarray(Image.fromarray(array).resize(size[::-1], Image.Resampling.BILINEAR))
            found = EoMTImageProcessor(size=64)(array)["pixel_values"][0, :, : size[0], : size[1]]
            levels = ((found * STD + MEAN) * 255).permute(1, 2, 0).numpy()
            assert np.abs(levels - expected).max() < 1.01
            assert (np.abs(levels - expected) > 0.01).mean() < 0.01

    def test_windows_of_a_batch(self) -> None:
        wide, tall = example_image(64, 100, 1), example_image(150, 64, 2)
        data = EoMTImageProcessor(size=64, task="semantic")([wide, tall])
        assert data["patch_offsets"].tolist() == [[0, 0, 64], [0, 36, 100], [1, 0, 64], [1, 43, 107], [1, 86, 150]]
        assert data["content_sizes"].tolist() == [[64, 100], [150, 64]]
        expected = [normalized(wide)[..., s:e] for s, e in ((0, 64), (36, 100))]
        expected += [normalized(tall)[:, s:e] for s, e in ((0, 64), (43, 107), (86, 150))]
        torch.testing.assert_close(data["pixel_values"], torch.stack(expected))

    def test_every_kind_of_image_gives_the_same(self, tmp_path: Path) -> None:
        array = example_image(50, 64)
        path = tmp_path / "image.png"
        Image.fromarray(array).save(path)
        processor = EoMTImageProcessor(size=64)
        expected = processor(Image.fromarray(array))["pixel_values"]
        tensor = torch.from_numpy(array)
        kinds: dict[str, Any] = {
            "array": array,
            "channels first": array.transpose(2, 0, 1),
            "path": path,
            "name": str(path),
            "bytes": path.read_bytes(),
            "tensor": tensor.permute(2, 0, 1),
            "list": [array],
            "batch": array[None],
            "16 bits": array.astype(np.uint16) * 257,
            "unit floats": array.astype(np.float32) / 255,
            "float tensor": tensor.permute(2, 0, 1) / 255,
        }
        for name, kind in kinds.items():
            torch.testing.assert_close(processor(kind)["pixel_values"], expected, msg=name)

    def test_exif_orientation(self, tmp_path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        array = example_image(64, 40)
        Image.fromarray(array).save(tmp_path / "turned.png", exif=exif)
        data = EoMTImageProcessor(size=64)([tmp_path / "turned.png", Image.open(tmp_path / "turned.png")])
        upright = normalized(np.rot90(array, -1).copy())
        for row in data["pixel_values"]:
            torch.testing.assert_close(row[:, :40], upright)
        assert data["content_sizes"].tolist() == [[40, 64], [40, 64]]

    def test_switches(self) -> None:
        array = example_image(64, 64)
        plain = torch.from_numpy(array).permute(2, 0, 1).float()
        processor = EoMTImageProcessor(size=64)
        found = processor(array, do_normalize=False)["pixel_values"][0]
        torch.testing.assert_close(found, plain / 255)
        found = processor(array, do_rescale=False, do_normalize=False)["pixel_values"][0]
        torch.testing.assert_close(found, plain)
        # Floats that are scaled already, whatever their range, stay as they are.
        found = processor(plain * 3 - 9, do_rescale=False, do_normalize=False)["pixel_values"][0]
        torch.testing.assert_close(found, plain * 3 - 9)
        found = processor(array, image_mean=0.5, image_std=[0.25] * 3)["pixel_values"][0]
        torch.testing.assert_close(found, (plain / 255 - 0.5) / 0.25)
        found = processor(example_image(20, 30), do_resize=False)
        assert found["content_sizes"].tolist() == [[20, 30]]
        torch.testing.assert_close(found["pixel_values"][0, :, :20, :30], normalized(example_image(20, 30)))
        found = processor([example_image(32, 64)] * 2, do_pad=False)["pixel_values"]
        assert found.shape == (2, 3, 32, 64)

    def test_numpy_results(self) -> None:
        data = EoMTImageProcessor(size=64)(example_image(8, 8), np.zeros((8, 8), np.uint8), return_tensors="np")
        assert all(isinstance(data[key], np.ndarray) for key in ("pixel_values", "content_sizes"))
        assert all(isinstance(data[key][0], np.ndarray) for key in ("mask_labels", "class_labels"))


class TestTargets:
    def test_label_map(self) -> None:
        labels = np.array([[0, 0, 3, 255], [3, 3, 7, 255]], dtype=np.uint8)
        data = EoMTImageProcessor(size=4)(example_image(2, 4), labels, return_loss_mask=True)
        padded = np.full((4, 4), 255)
        padded[:2] = labels
        assert data["class_labels"][0].tolist() == [0, 3, 7]
        for mask, label in zip(data["mask_labels"][0], (0, 3, 7), strict=True):
            assert np.array_equal(mask, padded == label)
        assert data["mask_labels"][0].dtype == torch.bool
        assert data["class_labels"][0].dtype == torch.int64
        # Neither padding nor ignored pixels count; padding is never class 0.
        assert np.array_equal(data["loss_mask"][0], padded != 255)

    def test_every_kind_of_map_gives_the_same(self, tmp_path: Path) -> None:
        labels = np.array([[0, 1], [2, 255]], dtype=np.uint8)
        path = tmp_path / "map.png"
        Image.fromarray(labels).save(path)
        palette = Image.fromarray(labels).copy()
        palette.putpalette([channel for value in range(256) for channel in (255 - value, 0, value)])
        assert palette.mode == "P"
        kinds: list[Any] = [
            labels,
            labels.astype(np.int32),
            labels.astype(np.uint16),
            labels.astype(np.int64)[None],
            labels[:, :, None],
            torch.from_numpy(labels),
            Image.fromarray(labels),
            Image.fromarray(labels.astype(np.int32)),
            Image.fromarray(labels.astype(np.uint16)),
            palette,
            path,
            str(path),
        ]
        for kind in kinds:
            data = EoMTImageProcessor(size=2)(example_image(2, 2), [kind])
            assert data["class_labels"][0].tolist() == [0, 1, 2]
            assert data["mask_labels"][0].int().tolist() == [[[1, 0], [0, 0]], [[0, 1], [0, 0]], [[0, 0], [1, 0]]]

    def test_reducing_labels_does_not_depend_on_ignore_index(self) -> None:
        labels = np.array([[0, 1, 2, 255]], dtype=np.uint8)
        for ignore_index, classes, counted in (
            (255, [0, 1], [False, True, True, False]),
            (2, [0, 254], [False, True, False, True]),
            (None, [0, 1, 254], [False, True, True, True]),
        ):
            processor = EoMTImageProcessor(
                size={"height": 1, "width": 4}, do_reduce_labels=True, ignore_index=ignore_index
            )
            data = processor(example_image(1, 4), labels, return_loss_mask=True)
            assert data["class_labels"][0].tolist() == classes
            assert data["loss_mask"][0, 0].tolist() == counted
        data = EoMTImageProcessor(size={"height": 1, "width": 4}, ignore_index=0)(example_image(1, 4), labels)
        assert data["class_labels"][0].tolist() == [1, 2, 255]

    def test_id_map(self) -> None:
        ids = torch.tensor([[5, 5, 9, 2**30 + 1], [0, -1, 9, 2**30]], dtype=torch.int32)
        mapping = {5: 1, 9: 1, 2**30: 0, 2**30 + 1: 2, 0: 255}
        processor = EoMTImageProcessor(size={"height": 2, "width": 4}, num_labels=3)
        data = processor(example_image(2, 4), ids, mapping, return_loss_mask=True)
        assert data["class_labels"][0].tolist() == [1, 1, 0, 2]
        for mask, segment in zip(data["mask_labels"][0], (5, 9, 2**30, 2**30 + 1), strict=True):
            assert torch.equal(mask, ids == segment)
        assert data["loss_mask"][0].tolist() == [[True] * 4, [False, False, True, True]]
        reduced = processor(example_image(2, 4), ids, {**mapping, 0: 0, 9: 3}, do_reduce_labels=True)
        assert reduced["class_labels"][0].tolist() == [0, 2, 1]

    def test_ids_that_equal_ignore_index(self) -> None:
        ids = torch.tensor([[0, 255, 7]])
        # A listed id is a segment, an unlisted one that equals ignore_index is void.
        assert masks_of_label_map(ids, {0: 3, 7: 4, 255: 5})[1].tolist() == [3, 4, 5]
        assert masks_of_label_map(ids, {0: 3, 7: 5})[1].tolist() == [3, 5]
        # "0 is void" of an id map does not ignore the class 0.
        masks, classes, counted = masks_of_label_map(ids, {255: 0, 7: 1}, ignore_index=0, num_labels=2)
        assert classes.tolist() == [1, 0]
        assert masks.int().tolist() == [[[0, 0, 1]], [[0, 1, 0]]]
        assert counted.tolist() == [[False, True, True]]

    def test_maps_against_a_plain_loop(self) -> None:
        rng = np.random.default_rng(0)
        for seed in range(20):
            height, width = rng.integers(1, 30, 2)
            labels = torch.from_numpy(rng.choice([-1, 0, 1, 2, 9, 254, 255], (height, width)))
            reduce = bool(seed % 2)
            masks, classes, counted = masks_of_label_map(labels, do_reduce_labels=reduce)
            expected = [v for v in labels.unique().tolist() if v >= (1 if reduce else 0) and v != 255]
            assert classes.tolist() == [v - reduce for v in expected]
            assert masks.shape == (len(expected), height, width)
            for mask, value in zip(masks, expected, strict=True):
                assert torch.equal(mask, labels == value)
            assert torch.equal(counted, masks.any(0) if expected else torch.zeros(height, width, dtype=torch.bool))

    def test_nothing_in_a_map(self) -> None:
        empty = np.full((2, 4), 255, dtype=np.uint8)
        data = EoMTImageProcessor(size=4)([example_image(2, 4)] * 2, [empty, empty], return_loss_mask=True)
        for masks, classes in zip(data["mask_labels"], data["class_labels"], strict=True):
            assert masks.shape == (0, 4, 4)
            assert masks.dtype == torch.bool
            assert classes.shape == (0,)
            assert classes.dtype == torch.int64
        assert not data["loss_mask"].any()

    def test_maps_take_the_value_under_each_pixels_centre(self) -> None:
        rng = np.random.default_rng(0)
        for _ in range(50):
            height, width, new_height, new_width = rng.integers(1, 40, 4)
            labels = torch.from_numpy(rng.integers(0, 2**40, (height, width)))
            found = resize_label_map(labels, (int(new_height), int(new_width)))
            for row in range(new_height):
                for column in range(new_width):
                    source = labels[
                        (2 * row + 1) * height // (2 * new_height), (2 * column + 1) * width // (2 * new_width)
                    ]
                    assert found[row, column] == source
        labels = torch.from_numpy(rng.integers(0, 200, (33, 47)))
        expected = torch.nn.functional.interpolate(labels[None, None].float(), (20, 64), mode="nearest-exact")
        assert (resize_label_map(labels, (20, 64)) == expected[0, 0].long()).float().mean() > 0.95  # ties differ

    def test_windows_of_maps(self) -> None:
        labels = np.zeros((4, 7), dtype=np.uint8)
        labels[:, 5:], labels[:, 6] = 1, 255
        data = EoMTImageProcessor(size=4, task="semantic")(example_image(4, 7), labels, return_loss_mask=True)
        assert data["patch_offsets"].tolist() == [[0, 0, 4], [0, 3, 7]]
        assert [classes.tolist() for classes in data["class_labels"]] == [[0], [0, 1]]
        assert data["mask_labels"][0].all()
        assert data["mask_labels"][1][:, 0].int().tolist() == [[1, 1, 0, 0], [0, 0, 1, 0]]
        assert data["loss_mask"][:, 0].int().tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]

    def test_mappings_of_each_image_reach_its_windows(self) -> None:
        ids = [np.full((4, 7), 3), np.full((4, 4), 3), np.full((9, 4), 3)]
        processor = EoMTImageProcessor(size=4, task="semantic")
        data = processor([example_image(*i.shape) for i in ids], ids, [{3: 10}, {3: 11}, {3: 12}])
        assert torch.cat(data["class_labels"]).tolist() == [10, 10, 11, 12, 12, 12]

    def test_targets_follow_the_batch(self) -> None:
        data = EoMTImageProcessor(size=4)(example_image(4, 4), np.eye(4, dtype=np.int64), return_loss_mask=True)
        data = data.to("meta", dtype=torch.bfloat16)
        for value in (
            data["pixel_values"],
            data["content_sizes"],
            data["loss_mask"],
            *data["mask_labels"],
            *data["class_labels"],
        ):
            assert value.device.type == "meta"
        assert data["pixel_values"].dtype == torch.bfloat16
        assert data["mask_labels"][0].dtype == torch.bool


class TestSettings:
    def test_defaults(self) -> None:
        processor = EoMTImageProcessor()
        assert processor.task == "panoptic"
        assert dict(processor.size) == {"height": 640, "width": 640}
        assert (processor.threshold, processor.mask_threshold, processor.overlap_mask_area_threshold) == (0.8, 0.5, 0.8)
        assert (processor.instance_threshold, processor.num_instances, processor.ignore_index) == (0.5, 100, 255)
        assert not processor.do_split_image
        assert EoMTImageProcessor(task="semantic").do_split_image
        assert not EoMTImageProcessor(task="semantic", do_split_image=False).do_split_image

    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"task": "semantic", "size": [32, 64], "do_split_image": False, "num_labels": 19},
            {"task": "instance", "ignore_index": None, "instance_threshold": 0.25, "num_instances": 7},
            {"stuff_classes": [3, 1, 1], "threshold": 0.1, "do_reduce_labels": True, "image_mean": 0.5, "size": 128},
        ],
    )
    def test_saved_and_loaded(self, settings: dict[str, Any], tmp_path: Path) -> None:
        processor = EoMTImageProcessor(**settings)
        processor.save_pretrained(tmp_path)
        loaded = EoMTImageProcessor.from_pretrained(tmp_path)
        assert loaded.to_dict() == processor.to_dict()
        for name in EoMTImageProcessor.valid_kwargs.__annotations__:
            assert getattr(loaded, name) == getattr(processor, name), name
        for other in (copy.deepcopy(processor), pickle.loads(pickle.dumps(processor))):
            assert other.to_dict() == processor.to_dict()

    def test_what_is_stored(self, tmp_path: Path) -> None:
        EoMTImageProcessor(size=64, stuff_classes=(5, 2), num_labels=6).save_pretrained(tmp_path)
        stored = json.loads((tmp_path / "preprocessor_config.json").read_text())
        assert stored["size"] == {"height": 64, "width": 64}
        assert stored["stuff_classes"] == [2, 5]
        assert stored["task"] == "panoptic"
        assert stored["image_processor_type"] == "EoMTImageProcessor"
        changed = EoMTImageProcessor.from_pretrained(tmp_path, threshold=0.25, stuff_classes=[1], size=32)
        assert (changed.threshold, changed.stuff_classes, dict(changed.size)) == (
            0.25,
            [1],
            {"height": 32, "width": 32},
        )

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"task": "detection"}, "task='detection'; it is one of 'panoptic', 'instance', 'semantic'"),
            ({"size": {"shortest_edge": 640}}, r"size=\{'shortest_edge': 640\}.*'height': H"),
            ({"size": {"height": 0, "width": 64}}, "size="),
            ({"do_split_image": True}, "do_split_image=True with task='panoptic'.*pass do_split_image=False"),
            ({"threshold": 1.5}, r"threshold=1.5 is outside \[0, 1\]"),
            ({"num_instances": 0}, "num_instances=0"),
            ({"num_labels": 3, "stuff_classes": [3]}, r"stuff_classes=\[3\].*num_labels=3"),
        ],
    )
    def test_bad_settings(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            EoMTImageProcessor(**settings)

    def test_unknown_names(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING, logger="hf_segvit"):
            EoMTImageProcessor(ignore_indx=0)
        assert "no setting 'ignore_indx'" in caplog.text
        with pytest.raises(TypeError, match="do_center_crop"):
            EoMTImageProcessor(size=64)(example_image(4, 4), do_center_crop=True)
        with pytest.raises(ValueError, match="threshold: cannot be set for one call"):
            EoMTImageProcessor(size=64)(example_image(4, 4), threshold=0.5)

    def test_auto_class(self, tmp_path: Path) -> None:
        EoMTImageProcessor(size=32, task="instance").save_pretrained(tmp_path)
        AutoImageProcessor.register(StripesConfig, image_processor_classes={"torchvision": EoMTImageProcessor})
        try:
            for arguments in ({}, {"backend": "torchvision"}, {"num_instances": 3}):
                loaded = AutoImageProcessor.from_pretrained(tmp_path, **arguments)
                assert type(loaded) is EoMTImageProcessor
                assert (loaded.task, loaded.size["height"]) == ("instance", 32)
            assert loaded.num_instances == 3
        finally:
            IMAGE_PROCESSOR_MAPPING._extra_content.pop(StripesConfig)

    @pytest.mark.slow
    def test_code_that_travels_with_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(EoMTImageProcessor, "_auto_class", "AutoImageProcessor")
        EoMTImageProcessor(size=32, stuff_classes=[1]).save_pretrained(tmp_path / "saved")
        script = f"""
import sys
sys.modules["hf_segvit"] = None  # as if the package were not installed
import numpy
from transformers import AutoImageProcessor
processor = AutoImageProcessor.from_pretrained({str(tmp_path / "saved")!r}, trust_remote_code=True)
print(processor.stuff_classes, processor(numpy.zeros((16, 32, 3), numpy.uint8))["content_sizes"].tolist())
"""
        environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
        result = subprocess.run(
            [sys.executable, "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        assert result.stdout.strip() == "[1] [[16, 32]]"


class TestBadInput:
    @pytest.mark.parametrize(
        ("images", "arguments", "message"),
        [
            ([], {}, "images is empty"),
            (["nowhere.png"], {}, r"nowhere\.png: no such file"),
            ([example_image(4, 4), None], {}, r"images\[1\]: got NoneType"),
            (
                [example_image(4, 4), np.full((8, 8, 3), 200.0)],
                {},
                r"images\[1\]: floating-point values from 200 to 200",
            ),
            (np.full((8, 8), np.nan), {}, r"images\[0\]: floating-point values from nan"),
            (example_image(70, 8), {"do_resize": False}, r"images\[0\]: 70x8.*fit into it"),
            ([example_image(8, 8), example_image(8, 9)], {"do_pad": False}, "all images must come out at one size"),
            (example_image(8, 8), {"return_tensors": "tf"}, "return_tensors='tf'"),
        ],
    )
    def test_images(self, images: Any, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            EoMTImageProcessor(size=64)(images, **arguments)

    def test_images_that_are_too_long_for_windows(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(image_claims, "MAX_IMAGE_PIXELS", 10_000)
        with pytest.raises(ValueError, match=r"images\[0\]: 1x100 .* scaled to 64x6400, above the limit.*crop it"):
            EoMTImageProcessor(size=64, task="semantic")(example_image(1, 100))
        with pytest.raises(ValueError, match="match it on one side"):
            EoMTImageProcessor(size=64, task="semantic", do_resize=False)(example_image(65, 100))

    @pytest.mark.parametrize(
        ("maps", "mapping", "message"),
        [
            ([np.zeros((4, 6), int)] * 2, None, "2 segmentation_maps for 1 images"),
            (np.zeros((4, 5), int), None, r"segmentation_maps\[0\] is 4x5 .*images\[0\] is 4x6.*pixel for pixel"),
            (np.zeros((6, 4), int), None, r"is 6x4 .*lies on its side.*rotate the map"),
            (np.zeros((4, 6, 3), np.uint8), None, r"segmentation_maps\[0\]: shape \(4, 6, 3\).*R \+ 256 \* G"),
            (Image.new("RGB", (6, 4)), None, r"an image of mode RGB.*R \+ 256 \* G"),
            (np.zeros((4, 6)), None, "values of type float64"),
            (np.full((4, 6), 7), None, r"segmentation_maps\[0\]: label 7 is outside 0\.\.4, the 5 classes"),
            (np.full((4, 6), 7), {7: 5}, r"label 5 is outside 0\.\.4"),
            (np.full((4, 6), 7), {8: 1}, r"segmentation_maps\[0\]: id 7 has no class .*lists 8; add it"),
            (np.full((4, 6), 7), [{7: 1}] * 2, "2 mappings for 1 segmentation_maps"),
        ],
    )
    def test_maps(self, maps: Any, mapping: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            EoMTImageProcessor(size=64, num_labels=5)(example_image(4, 6), maps, mapping)

    def test_labels_counted_from_one(self) -> None:
        processor = EoMTImageProcessor(size=64, num_labels=5, do_reduce_labels=True)
        processor(example_image(4, 6), np.full((4, 6), 5))
        with pytest.raises(ValueError, match=r"label 6 is outside 1\.\.5"):
            processor(example_image(4, 6), np.full((4, 6), 6))


class TestTransformersFolders:
    def save(self, folder: Path, labels: Any, **settings: Any) -> None:
        EomtImageProcessor(**settings).save_pretrained(folder)
        if labels is not None:
            PreTrainedConfig(id2label=dict(enumerate(labels))).save_pretrained(folder)

    def test_panoptic(self, tmp_path: Path) -> None:
        size = {"shortest_edge": 128, "longest_edge": 128}
        self.save(tmp_path, COCO_PANOPTIC_LABELS, size=size, do_pad=True, image_mean=[0.1, 0.2, 0.3])
        for path in (tmp_path, tmp_path / "preprocessor_config.json"):
            processor = EoMTImageProcessor.from_pretrained(path)
            assert processor.task == "panoptic"
            assert dict(processor.size) == {"height": 128, "width": 128}
            assert processor.stuff_classes == list(range(80, 133))
            assert processor.num_labels == 133
            assert tuple(processor.image_mean) == (0.1, 0.2, 0.3)
            assert (processor.ignore_index, processor.do_reduce_labels) == (255, False)
            assert (processor.threshold, processor.overlap_mask_area_threshold) == (0.8, 0.8)
        image = Image.fromarray(example_image(60, 128))
        expected = EomtImageProcessor.from_pretrained(tmp_path)(image, return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(processor(image)["pixel_values"], expected)
        # Once saved it is ours.
        processor.save_pretrained(tmp_path / "ours")
        assert EoMTImageProcessor.from_pretrained(tmp_path / "ours").to_dict() == processor.to_dict()

    def test_semantic(self, tmp_path: Path) -> None:
        self.save(tmp_path, ADE20K_LABELS, size={"shortest_edge": 64}, do_split_image=True, ignore_index=255)
        processor = EoMTImageProcessor.from_pretrained(tmp_path)
        assert (processor.task, processor.do_split_image) == ("semantic", True)
        assert dict(processor.size) == {"height": 64, "width": 64}
        assert (processor.ignore_index, processor.do_reduce_labels) == (255, True)
        assert processor.stuff_classes == list(ADE20K_STUFF)

    def test_instance(self, tmp_path: Path) -> None:
        self.save(tmp_path, COCO_PANOPTIC_LABELS[:80], do_pad=True)
        processor = EoMTImageProcessor.from_pretrained(tmp_path)
        assert (processor.task, processor.stuff_classes) == ("instance", [])

    def test_unknown_labels_fuse_nothing_and_warn_once(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        self.save(tmp_path, ["cat", "dog", "rug"], do_pad=True)
        with caplog.at_level(logging.WARNING, logger="hf_segvit"):
            processors = [EoMTImageProcessor.from_pretrained(tmp_path) for _ in range(2)]
        assert [processor.stuff_classes for processor in processors] == [[], []]
        assert caplog.text.count("stuff is not fused") == 1
        assert "pass stuff_classes=" in caplog.text
        assert EoMTImageProcessor.from_pretrained(tmp_path, stuff_classes=[2]).stuff_classes == [2]

    def test_without_a_config(self, tmp_path: Path) -> None:
        self.save(tmp_path, None, do_pad=True)
        processor = EoMTImageProcessor.from_pretrained(tmp_path)
        assert (processor.task, processor.num_labels) == ("panoptic", None)

    def test_files_of_older_versions(self, tmp_path: Path) -> None:
        stored = {
            "image_processor_type": "EomtImageProcessorFast",
            "do_split_image": True,
            "ignore_index": 255,
            "do_reduce_labels": False,
            "size": {"longest_edge": None, "shortest_edge": 96},
            "resample": 3,
            "some_forgotten_setting": 1,
        }
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(stored))
        processor = EoMTImageProcessor.from_pretrained(tmp_path)
        assert (processor.task, dict(processor.size), processor.resample) == (
            "semantic",
            {"height": 96, "width": 96},
            3,
        )
        assert not processor.do_reduce_labels
        assert not hasattr(processor, "some_forgotten_setting")

    def test_two_edges_cannot_be_padded(self, tmp_path: Path) -> None:
        self.save(tmp_path, None, size={"shortest_edge": 64, "longest_edge": 128}, do_pad=True)
        with pytest.raises(ValueError, match=r"pass size=\{'height': H"):
            EoMTImageProcessor.from_pretrained(tmp_path)

    def test_published_labels(self, sample_data: Path) -> None:
        annotations = sample_data / "coco_train100" / "annotations" / "panoptic_train2017.json"
        categories = json.loads(annotations.read_text())["categories"]
        assert tuple(category["name"] for category in categories) == COCO_PANOPTIC_LABELS
        coco = find_published_labels({i: category["name"] for i, category in enumerate(categories)})
        assert coco is not None
        assert list(coco.stuff_classes) == [i for i, category in enumerate(categories) if not category["isthing"]]

        lines = (sample_data / "ADEChallengeData2016" / "objectInfo150.csv").read_text().splitlines()[1:]
        ade = find_published_labels({str(i): line.split(",")[5] for i, line in enumerate(lines)})
        assert ade is not None
        assert (ade.name, ade.stuff_classes) == ("ADE20K", ADE20K_STUFF)
        assert len(ADE20K_STUFF) == 50

    def test_published_labels_by_size_and_place(self) -> None:
        cityscapes = find_published_labels(dict(enumerate(CITYSCAPES_LABELS)))
        assert cityscapes is not None
        assert cityscapes.stuff_classes == tuple(range(11))
        things = find_published_labels(dict(enumerate(CITYSCAPES_LABELS[11:])))
        assert things is not None
        assert things.stuff_classes == ()
        assert find_published_labels(dict(enumerate(reversed(CITYSCAPES_LABELS)))) is None
        assert find_published_labels({i: f"LABEL_{i}" for i in range(133)}) is None
        assert find_published_labels({}) is None


def dominant_channel_logits(pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A model by hand: query k < 3 has class k and covers where channel k is brightest; a fourth is no-object."""
    plain = pixel_values * STD + MEAN
    cells = torch.nn.functional.avg_pool2d(plain, 4)
    others = torch.stack([cells[:, [j for j in range(3) if j != k]].amax(1) for k in range(3)], 1)
    masks = torch.cat([(cells - others) * 40, torch.full_like(cells[:, :1], 20)], 1)
    classes = torch.eye(4) * 12
    return classes.expand(len(pixel_values), 4, 4), masks


def stripes(height: int, width: int, channels: tuple[int, ...]) -> np.ndarray:
    """Vertical stripes of pure colours, as wide as each other."""
    array = np.zeros((height, width, 3), dtype=np.uint8)
    for index, channel in enumerate(channels):
        array[:, index * width // len(channels) : (index + 1) * width // len(channels), channel] = 255
    return array


def outputs_of(data: Any, **replaced: Any) -> SimpleNamespace:
    classes, masks = dominant_channel_logits(data["pixel_values"])
    fields = {"class_queries_logits": classes, "masks_queries_logits": masks}
    fields |= {key: data[key] for key in ("content_sizes", "patch_offsets") if key in data}
    return SimpleNamespace(**{**fields, **replaced})


class TestPostProcessing:
    def test_each_task_serves_its_own(self) -> None:
        methods = [f"post_process_{task}_segmentation" for task in ("semantic", "instance", "panoptic")]
        for task, served in (
            ("panoptic", [True, True, True]),
            ("instance", [False, True, False]),
            ("semantic", [True, False, False]),
        ):
            processor = EoMTImageProcessor(task=task)
            assert [hasattr(processor, method) for method in methods] == served
            assert [method in dir(processor) for method in methods] == served
            assert all(hasattr(EoMTImageProcessor, method) for method in methods)
        with pytest.raises(AttributeError, match="not served by a processor of task='semantic', but by 'panoptic'"):
            EoMTImageProcessor(task="semantic").post_process_panoptic_segmentation(None)

    @pytest.mark.parametrize("size", [(64, 64), (40, 96), (96, 40), (30, 90)])
    def test_panoptic_gives_back_the_image(self, size: tuple[int, int]) -> None:
        truth = stripes(*size, (2, 0, 2)).argmax(-1)
        processor = EoMTImageProcessor(size=64, stuff_classes=[2])
        data = processor(stripes(*size, (2, 0, 2)))
        for outputs in (outputs_of(data), outputs_of(data, content_sizes=None)):
            (result,) = processor.post_process_panoptic_segmentation(outputs, target_sizes=[size])
            rows = result["segments_info"]
            assert sorted(row["label_id"] for row in rows) == [0, 2]
            assert [row["was_fused"] for row in sorted(rows, key=lambda row: row["label_id"])] == [False, True]
            labels = torch.full(size, -1)
            for row in rows:
                labels[result["segmentation"] == row["id"]] = row["label_id"]
            assert (labels.numpy() == truth).mean() > 0.9  # stripes' edges lie between mask cells

    def test_semantic_padded_and_windowed(self) -> None:
        size = (48, 120)
        truth = stripes(*size, (1, 0, 2)).argmax(-1)
        for settings in ({"task": "panoptic"}, {"task": "semantic"}, {"task": "semantic", "do_split_image": False}):
            processor = EoMTImageProcessor(size=64, **settings)
            data = processor([stripes(*size, (1, 0, 2)), stripes(*size, (2, 2, 2))])
            for outputs in (outputs_of(data), outputs_of(data, content_sizes=None, patch_offsets=None)):
                maps = processor.post_process_semantic_segmentation(outputs, target_sizes=torch.tensor([size, size]))
                assert [tuple(found.shape) for found in maps] == [size, size]
                assert maps[0].dtype == torch.int64
                assert (maps[0].numpy() == truth).mean() > 0.93
                assert (maps[1] == 2).all()
                scored = processor.post_process_semantic_segmentation(outputs, [size, size], True)
                for found, labels in zip(scored, maps, strict=True):
                    assert torch.equal(found.segmentation, labels)
                    assert found.segmentation_scores.shape == (3, *size)
                    assert torch.equal(found.segmentation_scores.argmax(0), labels)

    def test_a_padded_call_of_a_windowed_processor(self) -> None:
        size = (96, 40)
        processor = EoMTImageProcessor(size=64, task="semantic")
        data = processor(stripes(*size, (1, 0)), do_split_image=False)
        (found,) = processor.post_process_semantic_segmentation(outputs_of(data), target_sizes=[size])
        assert (found.numpy() == stripes(*size, (1, 0)).argmax(-1)).mean() > 0.9

    def test_windows_of_other_processors(self) -> None:
        # Transformers' rounds the longer side down and keeps a list of offsets.
        data = EomtImageProcessor(size={"shortest_edge": 64}, do_split_image=True)(
            stripes(48, 62, (1, 0)), return_tensors="pt"
        )
        assert [row.tolist() for row in data["patch_offsets"]] == [[0, 0, 64], [0, 18, 82]]  # officially 83
        processor = EoMTImageProcessor(size=64, task="semantic")
        (found,) = processor.post_process_semantic_segmentation(outputs_of(data), target_sizes=[(48, 62)])
        assert (found.numpy() == stripes(48, 62, (1, 0)).argmax(-1)).mean() > 0.93

    def test_instance(self) -> None:
        size = (64, 128)
        truth = stripes(*size, (1, 0)).argmax(-1)
        for task in ("instance", "panoptic"):
            processor = EoMTImageProcessor(size=64, task=task)
            (result,) = processor.post_process_instance_segmentation(
                outputs_of(processor(stripes(*size, (1, 0)))),
                threshold=0.9,
                mask_threshold=0.5,
                overlap_mask_area_threshold=0.5,
                target_sizes=[size],
                return_binary_maps=True,
            )
            assert sorted(row["label_id"] for row in result["segments_info"]) == [0, 1]
            for mask, row in zip(result["segmentation"], result["segments_info"], strict=True):
                assert mask.dtype == torch.bool
                assert (mask.numpy() == (truth == row["label_id"])).mean() > 0.97

    def test_without_target_sizes(self) -> None:
        processor = EoMTImageProcessor(size=64)
        outputs = outputs_of(processor(stripes(32, 64, (0, 1))))
        assert processor.post_process_panoptic_segmentation(outputs)[0]["segmentation"].shape == (64, 64)
        assert processor.post_process_semantic_segmentation(outputs)[0].shape == (64, 64)
        windowed = EoMTImageProcessor(size=64, task="semantic")
        outputs = outputs_of(windowed(stripes(32, 64, (0, 1))))
        assert windowed.post_process_semantic_segmentation(outputs)[0].shape == (64, 128)

    def test_stored_values_are_the_defaults(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[dict[str, Any]] = []
        for name in ("panoptic_segments", "instance_segments"):
            monkeypatch.setattr(
                f"hf_segvit.models.image_post_processing.{name}", lambda *logits, **kwargs: calls.append(kwargs)
            )
        processor = EoMTImageProcessor(
            size=64,
            threshold=0.1,
            mask_threshold=0.2,
            overlap_mask_area_threshold=0.3,
            instance_threshold=0.4,
            num_instances=5,
            stuff_classes=[1],
        )
        outputs = outputs_of(processor(example_image(64, 64)))
        panoptic = processor.post_process_panoptic_segmentation
        panoptic(outputs)
        panoptic(outputs, 0.5, 0.6, 0.7, [2])
        panoptic(outputs, threshold=0.0, stuff_classes=[])
        panoptic(outputs, label_ids_to_fuse=[2, 1], stuff_classes={1, 2})
        names = ("threshold", "mask_threshold", "overlap_mask_area_threshold", "stuff_classes")
        assert [[call[name] for name in names] for call in calls] == [
            [0.1, 0.2, 0.3, [1]],
            [0.5, 0.6, 0.7, [2]],
            [0.0, 0.2, 0.3, []],
            [0.1, 0.2, 0.3, [1, 2]],
        ]
        calls.clear()
        processor.post_process_instance_segmentation(outputs)
        processor.post_process_instance_segmentation(outputs, threshold=0.0, mask_threshold=1.0)
        names = ("threshold", "mask_threshold", "num_instances")
        assert [[call[name] for name in names] for call in calls] == [[0.4, 0.2, 5], [0.0, 1.0, 5]]

    def test_another_size_for_one_call(self) -> None:
        processor = EoMTImageProcessor(size=128)
        data = processor(stripes(30, 60, (0, 1)), size=64)
        assert data["content_sizes"].tolist() == [[32, 64]]
        (result,) = processor.post_process_semantic_segmentation(outputs_of(data), target_sizes=[(30, 60)], size=64)
        assert (result.numpy() == stripes(30, 60, (0, 1)).argmax(-1)).mean() > 0.93
        smaller = EoMTImageProcessor(size=32)
        with pytest.raises(ValueError, match=r"exceed the input size .*pass the same size="):
            smaller.post_process_semantic_segmentation(outputs_of(data), target_sizes=[(30, 60)])

    def test_unpadded_and_unscaled(self) -> None:
        processor = EoMTImageProcessor(size=64, do_pad=False)
        outputs = outputs_of(processor(stripes(32, 64, (0, 1))))
        (found,) = processor.post_process_semantic_segmentation(outputs, target_sizes=[(32, 64)])
        assert (found.numpy() == stripes(32, 64, (0, 1)).argmax(-1)).mean() > 0.95
        processor = EoMTImageProcessor(size=64, do_resize=False)
        outputs = outputs_of(processor(stripes(24, 40, (0, 1))), content_sizes=None)
        (found,) = processor.post_process_semantic_segmentation(outputs, target_sizes=[(24, 40)])
        assert (found.numpy() == stripes(24, 40, (0, 1)).argmax(-1)).mean() > 0.95

    def test_bad_arguments(self) -> None:
        processor = EoMTImageProcessor(size=64)
        outputs = outputs_of(processor([example_image(64, 64)] * 2))
        panoptic = processor.post_process_panoptic_segmentation
        sizes = [(64, 64)] * 2
        for function in (panoptic, processor.post_process_instance_segmentation):
            with pytest.raises(ValueError, match="pass target_sizes="):
                function(outputs, sizes)
            with pytest.raises(ValueError, match=r"mask_threshold=1.5 is outside \[0, 1\]"):
                function(outputs, mask_threshold=1.5)
        for function in (panoptic, processor.post_process_semantic_segmentation):
            with pytest.raises(ValueError, match="target_sizes has 3 entries for 2 images"):
                function(outputs, target_sizes=[*sizes, (1, 1)])
            for bad in ([(64, 64), (64,)], [(64, 64), (0, 64)], [64, 64], [(64, 64), (6.5, 64)]):
                with pytest.raises(ValueError, match="is not a pair of positive integers"):
                    function(outputs, target_sizes=bad)
        with pytest.raises(ValueError, match=r"label_ids_to_fuse=\[1\] and stuff_classes=\[2\]"):
            panoptic(outputs, label_ids_to_fuse=[1], stuff_classes=[2])
        with pytest.raises(ValueError, match="exclude each other"):
            processor.post_process_instance_segmentation(outputs, return_coco_annotation=True, return_binary_maps=True)
        windows = outputs_of(processor(example_image(64, 64)), patch_offsets=torch.tensor([[0, 0, 64]]))
        with pytest.raises(ValueError, match="can be merged into a semantic map only"):
            panoptic(windows)

    def test_windows_that_do_not_belong_together(self) -> None:
        processor = EoMTImageProcessor(size=64, task="semantic")
        data = processor([stripes(64, 100, (0, 1))] * 2)
        post_process = processor.post_process_semantic_segmentation
        with pytest.raises(ValueError, match="target_sizes has 1 entries for 2 images"):
            post_process(outputs_of(data), target_sizes=[(64, 100)])
        with pytest.raises(ValueError, match="All windows of an image must come together"):
            post_process(outputs_of(data, patch_offsets=data["patch_offsets"][:3]), target_sizes=[(64, 100)] * 2)
        with pytest.raises(ValueError, match="cut into 6 windows"):
            post_process(outputs_of(data, content_sizes=None, patch_offsets=None), target_sizes=[(64, 190)] * 2)
        with pytest.raises(ValueError, match="pass target_sizes="):
            post_process(outputs_of(data, content_sizes=None))


class StripesConfig(PreTrainedConfig):
    model_type = "stripes"


@dataclass
class StripesOutput(ModelOutput):
    class_queries_logits: torch.Tensor | None = None
    masks_queries_logits: torch.Tensor | None = None
    content_sizes: torch.Tensor | None = None
    patch_offsets: torch.Tensor | None = None


class StripesModel(PreTrainedModel):
    """`dominant_channel_logits` with the face of a model."""

    config_class = StripesConfig

    def __init__(self, config: StripesConfig) -> None:
        super().__init__(config)
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, content_sizes: Any = None, patch_offsets: Any = None) -> Any:
        classes, masks = dominant_channel_logits(pixel_values)
        return StripesOutput(classes, masks, content_sizes, patch_offsets)


class TestPipeline:
    NAMES = ("red", "green", "blue")

    def pipe(self, **settings: Any) -> Any:
        model = StripesModel(StripesConfig(id2label=dict(enumerate(self.NAMES))))
        return pipeline("image-segmentation", model=model, image_processor=EoMTImageProcessor(size=64, **settings))

    def check(self, answer: list[dict[str, Any]], truth: np.ndarray, channels: set[int]) -> None:
        assert sorted(segment["label"] for segment in answer) == sorted(self.NAMES[channel] for channel in channels)
        for segment in answer:
            expected = truth == self.NAMES.index(segment["label"])
            assert segment["mask"].size == truth.shape[::-1]
            assert ((np.asarray(segment["mask"]) == 255) == expected).mean() > 0.93

    @pytest.mark.parametrize("task", ["panoptic", "instance", "semantic"])
    def test_images_and_lists(self, task: str) -> None:
        pipe = self.pipe(task=task)
        arrays = [stripes(48, 100, (0, 2)), stripes(90, 40, (1, 0)), stripes(64, 64, (2,))]
        images = [Image.fromarray(array) for array in arrays]
        self.check(pipe(images[0]), arrays[0].argmax(-1), {0, 2})
        for answer, array, channels in zip(pipe(images), arrays, ({0, 2}, {0, 1}, {2}), strict=True):
            self.check(answer, array.argmax(-1), channels)

    def test_default_subtask_and_what_is_not_served(self) -> None:
        image = Image.fromarray(stripes(64, 64, (0, 1)))
        assert all(segment["score"] is None for segment in self.pipe(task="semantic")(image))
        assert all(segment["score"] > 0.9 for segment in self.pipe(task="instance")(image))
        panoptic = self.pipe()
        for subtask in ("panoptic", "instance", "semantic"):
            self.check(panoptic(image, subtask=subtask), stripes(64, 64, (0, 1)).argmax(-1), {0, 1})
        with pytest.raises(ValueError, match="Subtask panoptic is not supported"):
            self.pipe(task="semantic")(image, subtask="panoptic")

    def test_stuff_is_fused(self) -> None:
        class Twice(StripesModel):
            def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> Any:
                # Red twice: left and right half each by a query of its own.
                outputs = super().forward(pixel_values, **kwargs)
                masks = torch.full_like(outputs["masks_queries_logits"][:, :2], -20)
                masks[:, 0, :, :8], masks[:, 1, :, 8:] = 20, 20
                outputs["masks_queries_logits"] = masks
                outputs["class_queries_logits"] = outputs["class_queries_logits"][:, [0, 0]]
                return outputs

        model = Twice(StripesConfig(id2label=dict(enumerate(self.NAMES))))
        image = Image.fromarray(stripes(64, 64, (0,)))
        for stuff_classes, count in (([], 2), ([0], 1)):
            processor = EoMTImageProcessor(size=64, stuff_classes=stuff_classes)
            answer = pipeline("image-segmentation", model=model, image_processor=processor)(image)
            assert [segment["label"] for segment in answer] == ["red"] * count

    def test_batches(self) -> None:
        arrays = [stripes(48, 100, (0, 2)), stripes(90, 40, (1, 0)), stripes(64, 64, (2,))]
        images = [Image.fromarray(array) for array in arrays]
        for answer, array, channels in zip(
            self.pipe()(images, batch_size=2), arrays, ({0, 2}, {0, 1}, {2}), strict=True
        ):
            self.check(answer, array.argmax(-1), channels)
        windowed = self.pipe(task="semantic")
        with pytest.raises(ValueError, match="use batch_size=1 in a pipeline"):
            windowed(images, batch_size=2)
        with pytest.raises(ValueError, match="use batch_size=1 in a pipeline"):
            windowed(images[::-1], batch_size=3)
        # Images of one window each do no harm.
        for answer in windowed([images[2]] * 3, batch_size=2):
            self.check(answer, arrays[2].argmax(-1), {2})
